"""The corpus builder on tiny packages made here: what it reads, draws, splits, keeps, leaves out and says."""

import hashlib
import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import pytest
from datasets import load_dataset
from PIL import Image

pytest.importorskip("resvg_py", reason="needs the renderer: pip install resvg-py")

from examples import build_picture_corpus as corpus

NUM_CONCEPTS = 14  # of which 3 and 10 are test concepts
CODES = [f"{0x1F600 + index:X}" for index in range(NUM_CONCEPTS)]
PUBLIC_DOMAIN = "http://web.resource.org/cc/PublicDomain"
SENTENCE = "A blue block."


SQUARE = 'x="2" y="2" width="4" height="4"'


def svg_of(color: str, head: str = 'viewBox="0 0 8 8"', shape: str = SQUARE, more: str = "") -> str:
    return f'<svg xmlns="http://www.w3.org/2000/svg" {head}><rect {shape} fill="{color}"/>{more}</svg>'


def png_of(color: str, file_format: str = "PNG", size: int = 8) -> bytes:
    """A square with a black square in its middle."""
    image = Image.new("RGBA", (size, size), color)
    image.paste("black", (size // 4, size // 4, size - size // 4, size - size // 4))
    buffer = io.BytesIO()
    image.save(buffer, file_format, lossless=True)
    return buffer.getvalue()


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


def icon_of(color: str, left: int = 2, **more: object) -> dict:
    return {"body": f'<path d="M{left} 2h4v4h-4z" fill="{color}"/>', **more}


def write_iconify(cache: Path, style: str, icons: dict[str, dict], chars: dict[str, str], **more: object) -> None:
    icons_json = {"icons": icons, "width": 8, "height": 8, **more}
    write_npm(cache, corpus.EMOJI_STYLES[style].package, {"icons.json": icons_json, "chars.json": chars})


def clipart_of(title: str, color: str, license_: str = PUBLIC_DOMAIN, more: str = "") -> str:
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


def color_of(style_index: int, concept: int) -> str:
    return f"#{10 + 40 * style_index:02x}{10 + 15 * concept:02x}80"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with all packages of six styles, of clip art and of stamps; no client is installed."""
    folder = tmp_path / "cache"
    folder.mkdir()
    kept = ("noto", "noto-v1", "twemoji", "openmoji", "fluent-flat", "fluent-3d")
    monkeypatch.setattr(corpus, "EMOJI_STYLES", {style: corpus.EMOJI_STYLES[style] for style in kept})
    monkeypatch.setattr(corpus.shutil, "which", lambda client: None)

    emoji = [
        {
            "label": f"face {index}",
            "hexcode": f"{code}-FE0F",
            "emoji": chr(int(code, 16)),
            "order": index,
            "group": 0,
            "subgroup": index % 2,
            "tags": ["tag", f"tag {index}"],
            "skins": [{"label": f"face {index}: dark", "hexcode": f"{code}-1F3FF", "tone": 5}],
        }
        for index, code in enumerate(CODES)
    ]
    tone = {"label": "dark skin tone", "hexcode": "1F3FF", "emoji": "\U0001f3ff", "order": -1, "group": 1}
    letter = {"label": "regional indicator A", "hexcode": "1F1E6", "emoji": "\U0001f1e6"}
    groups = [{"key": "smileys", "order": 0}, {"key": "component", "order": 1}]
    subgroups = [{"key": "even", "order": 0}, {"key": "odd", "order": 1}]
    messages = {"groups": groups, "subgroups": subgroups}
    texts = {"en/data.json": [letter, tone, *reversed(emoji)], "en/messages.json": messages}
    write_npm(folder, corpus.EMOJIBASE, texts)
    annotations = {row["emoji"]: {"default": ["cldr", "tag"]} for row in emoji}
    annotations = {"annotations": {"annotations": annotations}}
    write_npm(folder, corpus.CLDR, {"annotations/en/annotations.json": annotations})

    chars = {code.lower(): f"icon-{index}" for index, code in enumerate(CODES)} | {f"{CODES[0]}-1f3ff".lower(): "dark"}
    for style_index, style in enumerate(("noto", "twemoji")):
        icons = {f"icon-{index}": icon_of(color_of(style_index, index)) for index in range(NUM_CONCEPTS)}
        write_iconify(folder, style, {**icons, "dark": icon_of("#000"), "not-an-emoji": icon_of("#f00")}, chars)
    # No code points here: found by CLDR's name, by the name in another set, by an alias, by the Unicode name.
    icons = {"face-0": icon_of(color_of(2, 0)), "icon-1": icon_of(color_of(2, 1)), "old": icon_of(color_of(2, 2))}
    icons |= {corpus.slug("SMILING FACE WITH OPEN MOUTH"): icon_of(color_of(2, 3)), "grinning": icon_of("#f00")}
    icons |= {corpus.slug("GRINNING FACE WITH SMILING EYES"): icon_of("#f00", hidden=True)}  # withdrawn for icon-1
    icons |= {"left-half": icon_of(color_of(2, 4), left=0)}
    aliases = {"face-2": {"parent": "old"}, "face-4": {"parent": "left-half", "hFlip": True}}
    write_iconify(folder, "noto-v1", icons, {}, aliases=aliases)
    # Icons 4 and 5 look the same, and 6 looks like twemoji's test concept 3.
    icons = {f"icon-{index}": icon_of(color_of(3, index)) for index in range(NUM_CONCEPTS)}
    icons |= {"icon-5": icons["icon-4"], "icon-6": icon_of(color_of(1, 3))}
    write_iconify(folder, "fluent-flat", icons, chars)
    openmoji = {f"color/svg/{code}-FE0F.svg": svg_of(color_of(4, i)).encode() for i, code in enumerate(CODES)}
    write_npm(folder, "openmoji@17.0.0", {**openmoji, "color/svg/1F3FF.svg": svg_of("red").encode()})
    webp = {f"assets/{code.lower()}.webp": png_of(color_of(5, i), "WEBP", 200) for i, code in enumerate(CODES)}
    write_npm(folder, corpus.EMOJI_STYLES["fluent-3d"].package, webp)

    secret = tmp_path / "secret.png"
    secret.write_bytes(png_of("red"))
    leak = f'<image xlink:href="{secret}" x="8" y="8" width="200" height="200"/>'
    apples = range(40)
    drawings = {f"food/fruit/apple_{index}.svg": clipart_of(f"Apple {index}", f"#00{index:02x}00") for index in apples}
    drawings |= {
        "food/twin.svg": clipart_of("Twin", "#000100"),  # the drawing of Apple 1
        "food/not_free.svg": clipart_of("Not free", "#111111", "http://creativecommons.org/licenses/GPL/2.0/"),
        "food/blank.svg": clipart_of("Blank", "white"),
        "food/broken.svg": "<svg",
        "food/leak.svg": clipart_of("Leak", "#0000aa", more=leak),
        "tools/Red_hammer_01.svg": clipart_of("Part of the tool collection", "#990000"),
        "computer/icons/theme.svg": clipart_of("Left out", "#123456"),
        "tools/train.svg": clipart_of("Steam_Engine", "#654321"),
    }
    drawings |= {f"cards/queen_{index}.svg": clipart_of("Card", f"#aa{index:02x}00") for index in range(9)}
    drawings = {f"usr/share/openclipart/svg/{path}": data for path, data in drawings.items()}
    write_deb(folder, corpus.CLIPART_PACKAGE, drawings)
    disc = '<circle cx="300" cy="300" r="20" fill="#00f8f8"/>'
    disc = svg_of("none", 'viewBox="0 0 800 800"', more=disc)
    stamps = {"a/b/block.png": png_of("blue"), "a/b/block.txt": f"{SENTENCE}\nfr.utf8=Un bloc."}
    stamps |= {"a/mute.png": png_of("red"), "c/disc.svg": disc, "c/disc.txt": "A disc."}
    stamps = {f"usr/share/tuxpaint/stamps/{path}": data for path, data in stamps.items()}
    write_deb(folder, corpus.STAMPS_PACKAGE, stamps)
    return folder


def build(cache: Path, out: Path, *options: str) -> int:
    return corpus.main(["--out", str(out), "--cache", str(cache), "--size", "16", "--jobs", "1", *options])


def load(folder: Path, tmp_path: Path):
    """All splits as `datasets` finds them by itself."""
    return load_dataset(str(folder), cache_dir=str(tmp_path / "datasets"))


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def rows_of(splits) -> list[dict]:
    return [row for split in splits.values() for row in split]


def test_parquet_rows_splits_and_licences(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert build(cache, tmp_path / "out") == 0
    splits = load(tmp_path / "out", tmp_path)
    assert set(splits) == set(corpus.SPLITS)
    rows = rows_of(splits)
    assert all(row["split"] == name for name, split in splits.items() for row in split)
    assert len({(row["style"], row["file_name"]) for row in rows}) == len(rows)
    assert all(row["image"].size == (16, 16) and row["image"].mode == "RGB" for row in rows)

    emoji = [row for row in rows if row["source"] == "emoji"]
    assert {row["concept"] for row in emoji} == set(range(NUM_CONCEPTS))
    for row in emoji:
        assert (row["name"], row["hexcode"]) == (f"face {row['concept']}", CODES[row["concept"]])
        assert row["keywords"] == ["cldr", "tag", f"tag {row['concept']}"]
        assert (row["group"], row["subgroup"]) == ("smileys", ("even", "odd")[row["concept"] % 2])
        held_out_style = row["style"] in ("noto", "noto-v1")
        expected = "test_concept" if row["concept"] in (3, 10) else "test_style" if held_out_style else "train"
        assert row["split"] == expected
    found = {style: {row["concept"] for row in emoji if row["style"] == style} for style in corpus.EMOJI_STYLES}
    everything = set(range(NUM_CONCEPTS))
    # 5 is drawn as 4, and 6 as a test concept of twemoji
    assert found.pop("fluent-flat") == everything - {5, 6}
    assert found.pop("noto-v1") == {0, 1, 2, 3, 4}
    assert all(concepts == everything for concepts in found.values())

    clipart = {row["name"]: row for row in rows if row["source"] == "clipart"}
    names = {f"Apple {index}" for index in range(40)} | {"Leak", "Red hammer", "Steam Engine"} | {"queen"}
    assert {"Twin", "Apple 1"} & set(clipart)
    assert set(clipart) - {"Twin", "Apple 1"} == names - {"Apple 1"}
    assert clipart["Apple 7"]["keywords"] == ["big thing"]
    assert clipart["Apple 7"]["description"] == "drawn here"
    assert (clipart["Apple 7"]["group"], clipart["Apple 7"]["subgroup"]) == ("food", "food/fruit")
    for name, row in clipart.items():
        held_out = int(hashlib.sha256(name.lower().encode()).hexdigest(), 16) % 8 == 0
        assert row["split"] == ("test_clipart" if held_out else "train")
        assert (row["concept"], row["hexcode"]) == (-1, "")

    stamps = {row["name"]: row for row in rows if row["source"] == "stamps"}
    assert set(stamps) == {SENTENCE, "A disc."}
    licenses = {row["style"]: row["license"] for row in rows}
    expected = {style: source.license for style, source in corpus.EMOJI_STYLES.items()}
    assert licenses == expected | {"openclipart": "CC-PDDC", "tuxpaint": "GPL-2.0-or-later"}

    said = capsys.readouterr()
    assert "clipart: 3 of 56 pictures cannot be used" in said.err
    assert "train: 2 pictures that come twice are left out" in said.err
    assert "train: 1 pictures that equal a test picture are left out" in said.err
    assert f"| {len(rows)} |" in said.out.splitlines()[-1]


def test_pictures_are_drawn_whole_on_white(cache: Path, tmp_path: Path) -> None:
    assert build(cache, tmp_path / "out", "--size", "32") == 0
    rows = {row["name"] + row["style"]: row["image"] for row in rows_of(load(tmp_path / "out", tmp_path))}
    emoji = rows["face 8twemoji"]  # the middle half of the icon's box, its margin kept
    assert emoji.getpixel((16, 16)) == emoji.getpixel((9, 22)) == (50, 130, 128)
    assert emoji.getpixel((6, 16)) == emoji.getpixel((25, 16)) == (255, 255, 255)
    assert rows["face 1noto-v1"].getpixel((16, 16)) == (90, 25, 128)
    flipped = [rows["face 4noto-v1"].getpixel((x, 16)) for x in (4, 28)]
    assert flipped == [(255, 255, 255), (90, 70, 128)]
    drawing = rows["Apple 7openclipart"]  # its page cut away
    assert [drawing.getpixel(corner) for corner in ((1, 1), (30, 30))] == [(0, 7, 0), (0, 7, 0)]
    disc = rows["A disc.tuxpaint"]  # a small drawing on a large page, drawn closer
    edges = [disc.getpixel(edge) for edge in ((1, 16), (16, 1), (30, 16), (16, 30))]
    assert all(red < 5 and min(green, blue) > 240 for red, green, blue in edges)
    assert [disc.getpixel(corner) for corner in ((1, 1), (30, 30))] == [(255, 255, 255)] * 2
    red, green, blue = rows[SENTENCE + "tuxpaint"].getpixel((31, 31))  # 8 pixels wide in the package
    assert max(red, green) < 5 and blue > 250
    leak = rows["Leakopenclipart"]  # a drawing cannot show a file of the reader
    assert leak.getpixel((16, 16)) == (0, 0, 170)


def test_imagefolder_holds_what_parquet_holds(cache: Path, tmp_path: Path) -> None:
    assert build(cache, tmp_path / "parquet") == 0
    assert build(cache, tmp_path / "folder", "--format", "imagefolder") == 0
    parquet, folder = (load(tmp_path / name, tmp_path) for name in ("parquet", "folder"))
    for split in corpus.SPLITS:
        assert len(parquet[split]) == len(folder[split]) > 0
        expected = {row["file_name"]: row for row in parquet[split]}
        metadata = tmp_path / "folder" / "data" / split / "metadata.jsonl"
        for line in metadata.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            picture = Image.open(metadata.parent / row["file_name"])
            same = expected.pop(row["file_name"])
            assert picture.tobytes() == same.pop("image").tobytes()
            assert row == same
        assert not expected
    # One split alone: no picture is taken for a split because of its name.
    train = load_dataset("imagefolder", data_dir=str(tmp_path / "folder/data/train"), cache_dir=str(tmp_path / "one"))
    assert len(train["train"]) == len(parquet["train"])


def test_permissive_leaves_share_alike_and_gpl_out(cache: Path, tmp_path: Path) -> None:
    assert build(cache, tmp_path / "out", "--format", "imagefolder") == 0
    assert list((tmp_path / "out").rglob("tuxpaint"))
    assert build(cache, tmp_path / "out", "--permissive") == 0  # nothing of the first corpus stays behind
    assert not list((tmp_path / "out").rglob("tuxpaint"))
    rows = rows_of(load(tmp_path / "out", tmp_path))
    assert {row["license"] for row in rows} == {"Apache-2.0", "CC-BY-4.0", "MIT", "CC-PDDC"}
    assert {row["style"] for row in rows} == set(corpus.EMOJI_STYLES) - {"openmoji"} | {"openclipart"}


def test_same_packages_give_the_same_bytes(cache: Path, tmp_path: Path) -> None:
    other_cache = tmp_path / "other"
    shutil.copytree(cache, other_cache)
    for file_format in ("parquet", "imagefolder"):
        assert build(cache, tmp_path / "a", "--format", file_format) == 0
        assert build(other_cache, tmp_path / "b", "--format", file_format, "--jobs", "2") == 0
        assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
        shutil.rmtree(other_cache / "rendered")


def test_a_second_run_goes_on_where_the_first_was(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rendered = []
    render = corpus.render_picture

    def interrupt_in_clipart(task):
        if task[0]["source"] == "clipart":
            raise KeyboardInterrupt
        rendered.append(task[0]["style"])
        return render(task)

    monkeypatch.setattr(corpus, "render_picture", interrupt_in_clipart)
    with pytest.raises(KeyboardInterrupt):
        build(cache, tmp_path / "out")
    assert set(rendered) == set(corpus.EMOJI_STYLES)
    assert not (tmp_path / "out" / "data").exists()

    rendered.clear()
    monkeypatch.setattr(corpus, "render_picture", lambda task: rendered.append(task[0]["style"]) or render(task))
    assert build(cache, tmp_path / "out") == 0
    assert set(rendered) == {"openclipart", "tuxpaint"}
    first = files_of(tmp_path / "out")

    rendered.clear()
    assert build(cache, tmp_path / "out") == 0
    assert rendered == []
    assert files_of(tmp_path / "out") == first

    assert build(cache, tmp_path / "large", "--sources", "stamps", "--size", "24") == 0
    assert rendered == ["tuxpaint", "tuxpaint"]  # another size is another picture


def test_what_cannot_be_had_is_one_line_and_the_rest_is_built(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    next(cache.glob("*twemoji*")).write_bytes(b"no package")
    next(cache.glob("openmoji*")).unlink()
    next(cache.glob("openclipart*")).unlink()
    next(cache.glob("tuxpaint*")).write_bytes(b"no package either")
    assert build(cache, tmp_path / "out") == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "left out:" in line]
    left_out = [line.split(" is left out: ")[0] for line in lines]
    assert left_out == ["emoji/twemoji", "emoji/openmoji", "clipart", "stamps"]
    assert "cannot be read" in lines[0] and "cannot be read" in lines[3]
    assert "the client npm is not installed" in lines[1]
    assert "the client apt-get is not installed" in lines[2]
    styles = {row["style"] for row in rows_of(load(tmp_path / "out", tmp_path))}
    assert styles == {"noto", "noto-v1", "fluent-flat", "fluent-3d"}


def test_nothing_to_build_from_is_exit_code_1(tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture) -> None:
    assert build(tmp_path / "empty", tmp_path / "out") == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert [line.split(":")[0] for line in lines] == [
        "emoji are left out",
        "clipart is left out",
        "stamps is left out",
        "nothing is built",
    ]
    assert not (tmp_path / "out" / "data").exists()


def test_missing_renderer_is_one_line(cache, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(corpus, "resvg_py", None)
    assert build(cache, tmp_path / "out") == 1
    assert capsys.readouterr().err == "nothing is built: the renderer is not installed (pip install resvg-py)\n"


@pytest.mark.skipif(os.name != "posix", reason="the stand-in for a client is a shell script; run it on Linux or macOS")
def test_client_is_run_once_and_its_words_are_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client = tmp_path / "bin" / "npm"
    client.parent.mkdir()
    monkeypatch.setenv("PATH", f"{client.parent}{os.pathsep}{os.environ['PATH']}")
    cache = tmp_path / "cache"
    cache.mkdir()

    client.write_text(
        "#!/bin/sh\necho npm notice >&2\necho npm error 404 no such package >&2\necho more >&2\nexit 1\n"
    )
    client.chmod(0o755)
    with pytest.raises(corpus.Unavailable, match="npm pack @a/b@1.2 .*failed: npm error 404 no such package$"):
        corpus.fetch_npm("@a/b@1.2", cache)
    assert list(cache.iterdir()) == []  # nothing half fetched

    client.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\nprintf content > a-b-1.2.tgz\n')
    for _ in range(2):
        assert corpus.fetch_npm("@a/b@1.2", cache).read_bytes() == b"content"
    assert (tmp_path / "calls").read_text() == "pack @a/b@1.2 --loglevel=error --ignore-scripts\n"
    assert [path.name for path in cache.iterdir()] == ["a-b-1.2.tgz"]


def test_archives_are_read_in_memory_and_within_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "MAX_MEMBER_BYTES", 10)
    buffer = io.BytesIO(tar_of({"../../outside": "small", "large": "x" * 11}, "w:gz"))
    with tarfile.open(fileobj=(linked := io.BytesIO()), mode="w:gz") as archive:
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        archive.addfile(link)
    linked.seek(0)
    assert list(corpus.tar_members(buffer)) == [("../../outside", b"small")]
    assert list(corpus.tar_members(linked)) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ('viewBox="1 2 30 40" width="9" height="9"', (1, 2, 30, 40)),
        ('viewBox="1,2,30,40"', (1, 2, 30, 40)),
        ('width="10" height="20px"', (0, 0, 10, 20)),
        ('width="4in" height="2pc"', (0, 0, 360, 30)),
        ('width="25.4mm" height="2.54cm"', (0, 0, 90, 90)),
        ('width="100%" height="5e1pt"', (0, 0, 1000, 1000)),
        ('viewBox="0 0 0 0" width="3" height="4"', (0, 0, 3, 4)),
    ],
)
def test_view_box(attributes: str, expected: tuple) -> None:
    assert corpus.view_box(corpus.parse_svg(svg_of("red", attributes).encode())) == pytest.approx(expected)


def test_extreme_pictures_are_refused_without_the_memory_they_ask_for(monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"source": "stamps", "style": "tuxpaint"}
    endless = svg_of("red", 'viewBox="0 0 4000000 1"', 'width="4000000" height="1"')
    assert corpus.render_picture((row, endless.encode(), 16)) is None
    entities = "".join(f'<!ENTITY e{index} "{f"&e{index - 1};" * 10}">' for index in range(1, 12))
    bomb = f'<!DOCTYPE svg [<!ENTITY e0 "ten bytes!">{entities}]>' + svg_of("red", more="<desc>&e11;</desc>")
    assert corpus.render_picture((row, bomb.encode(), 16)) is None
    assert corpus.render_picture((row, png_of("red"), 16)) is not None
    monkeypatch.setattr(corpus, "MAX_PIXELS", 63)
    assert corpus.render_picture((row, png_of("red"), 16)) is None


def test_equal_titles_fall_on_one_side() -> None:
    row = {"source": "clipart", "style": "openclipart", "concept": -1}
    titles = [f"A drawing of thing {index}" for index in range(400)]
    sides = [corpus.split_of({**row, "name": title}) for title in titles]
    assert sides == [corpus.split_of({**row, "name": title.upper().replace(" ", " \t")}) for title in titles]
    assert 30 < sides.count("test_clipart") < 70


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("keycap: #", "keycap-hash"),
        ("keycap: *", "keycap-asterisk"),
        ("flag: Côte d’Ivoire", "flag-cote-divoire"),
        ("Mrs. Claus", "mrs-claus"),
        ("flag: Trinidad & Tobago", "flag-trinidad-and-tobago"),
    ],
)
def test_slug(name: str, expected: str) -> None:
    assert corpus.slug(name) == expected


def test_a_folder_with_other_data_is_not_touched(cache, tmp_path, capsys) -> None:
    (tmp_path / "out" / "data").mkdir(parents=True)
    (tmp_path / "out" / "data" / "thesis.txt").write_text("three years")
    with pytest.raises(SystemExit) as stop:
        build(cache, tmp_path / "out")
    assert stop.value.code == 2
    assert "got a folder with other data" in capsys.readouterr().err
    assert (tmp_path / "out" / "data" / "thesis.txt").read_text() == "three years"


@pytest.mark.parametrize("options", [("--size", "8"), ("--size", "5000"), ("--jobs", "0"), ("--sources", "photos")])
def test_impossible_options_are_refused(options: tuple, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        corpus.main(["--out", str(tmp_path / "out"), *options])
    assert stop.value.code == 2
    assert options[1] in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
