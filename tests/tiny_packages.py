"""Packages small enough for a test, in the formats that the corpus builder fetches, and the pictures in them."""

import io
import json
import tarfile
from pathlib import Path

from PIL import Image

import picture_sources

SQUARE = 'x="2" y="2" width="4" height="4"'
PUBLIC_DOMAIN = "http://web.resource.org/cc/PublicDomain"


def svg_of(color: str, head: str = 'viewBox="0 0 8 8"', shape: str = SQUARE, more: str = "") -> str:
    return f'<svg xmlns="http://www.w3.org/2000/svg" {head}><rect {shape} fill="{color}"/>{more}</svg>'


def clipart_of(title: str, color: str, license_: str = PUBLIC_DOMAIN, more: str = "") -> str:
    """An SVG with the metadata of Openclipart, one square on a larger page."""
    spaces = {
        "cc": "http://web.resource.org/cc/",
        "dc": "http://purl.org/dc/elements/1.1/",
        "rdf": "http://www.w3.org/1999/02/22-rdf-syntax-ns#",
        "xlink": "http://www.w3.org/1999/xlink",
    }
    head = 'width="80mm" height="80mm" ' + " ".join(f'xmlns:{name}="{space}"' for name, space in spaces.items())
    work = f"""<metadata><cc:Work>
        <dc:title>{title}</dc:title>
        <dc:description>drawn\n here</dc:description>
        <dc:subject><rdf:Bag><rdf:li>Big_Thing</rdf:li><rdf:li>unsorted</rdf:li></rdf:Bag></dc:subject>
        <dc:creator><cc:Agent><dc:title>Somebody</dc:title></cc:Agent></dc:creator>
        <cc:license rdf:resource="{license_}"/>
    </cc:Work></metadata>"""
    return svg_of(color, head, 'x="8" y="8" width="200" height="200"', work + more)


def png_of(color: str, file_format: str = "PNG", size: int = 8) -> bytes:
    """A square with a black square in its middle."""
    image = Image.new("RGBA", (size, size), color)
    image.paste("black", (size // 4, size // 4, size - size // 4, size - size // 4))
    buffer = io.BytesIO()
    image.save(buffer, file_format, lossless=True)
    return buffer.getvalue()


def icon_of(color: str, left: int = 2, **more: object) -> dict:
    """An icon of an Iconify set."""
    return {"body": f'<path d="M{left} 2h4v4h-4z" fill="{color}"/>', **more}


def emoji_of(code: str, label: str, order: int, **more: object) -> dict:
    """An emoji as emojibase describes it."""
    columns = {"label": label, "hexcode": f"{code}-FE0F", "emoji": chr(int(code, 16)), "order": order}
    return {**columns, "group": 0, "subgroup": order % 2, **more}


def tar_of(files: dict[str, str | bytes], mode: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, content in files.items():
            content = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def write_npm(cache: Path, package: str, files: dict[str, object]) -> None:
    """`files` are paths inside the package with their bytes, or anything else as JSON."""
    name, version = package.lstrip("@").replace("/", "-").rsplit("@", 1)
    content = {
        f"package/{path}": data if isinstance(data, bytes) else json.dumps(data) for path, data in files.items()
    }
    (cache / f"{name}-{version}.tgz").write_bytes(tar_of(content, "w:gz"))


def write_deb(cache: Path, name: str, files: dict[str, str | bytes]) -> None:
    """An ar archive as dpkg-deb writes it: the format's version, the control files (odd length), the data."""
    archive = b"!<arch>\n"
    data = tar_of({f"./{path}": content for path, content in files.items()}, "w:xz")
    for member, content in (("debian-binary", b"2.0\n"), ("control.tar.xz", b"odd"), ("data.tar.xz", data)):
        archive += f"{member:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode() + content
        archive += b"\n" * (len(content) % 2)
    (cache / f"{name}_1%3a1.0_all.deb").write_bytes(archive)


def write_iconify(cache: Path, style: str, icons: dict[str, dict], chars: dict[str, str], **more: object) -> None:
    icons_json = {"icons": icons, "width": 8, "height": 8, **more}
    package = picture_sources.EMOJI_STYLES[style].package
    write_npm(cache, package, {"icons.json": icons_json, "chars.json": chars})


def write_emoji_texts(cache: Path, emoji: list[dict]) -> None:
    """The packages of emojibase and CLDR; group 1 holds the parts that emoji are composed of."""
    groups = [{"key": "smileys", "order": 0}, {"key": "component", "order": 1}]
    subgroups = [{"key": "even", "order": 0}, {"key": "odd", "order": 1}]
    messages = {"groups": groups, "subgroups": subgroups}
    write_npm(cache, picture_sources.EMOJIBASE, {"en/data.json": emoji, "en/messages.json": messages})
    annotations = {row["emoji"]: {"default": ["cldr", "tag"]} for row in emoji}
    annotations = {"annotations": {"annotations": annotations}}
    write_npm(cache, picture_sources.CLDR, {"annotations/en/annotations.json": annotations})
