"""Builds the free image-text-label picture corpus (emoji, clip art, stamps) from registry packages.

    python examples/build_picture_corpus.py --out data/corpus --permissive

The pictures come out of packages that the ordinary clients fetch (`npm pack`, `apt-get download`), rendered on white
squares by resvg (`pip install resvg-py`). What was fetched and rendered stays in the cache, so an interrupted run goes
on where it was, and the same packages give the same bytes on every run. The result loads by any of

    datasets.load_dataset("data/corpus")
    datasets.load_dataset("parquet", data_files={"train": "data/corpus/data/train-*.parquet"})
    datasets.load_dataset("imagefolder", data_dir="data/corpus/data/train")  # after --format imagefolder

Columns: image, file_name, source, style, license (SPDX), name, keywords, description, group, subgroup, concept,
hexcode and split. `concept` is the index of an emoji's meaning, equal in all styles, and -1 elsewhere. Splits:

- `test_concept`: every style of the concepts whose index modulo 7 is 3;
- `test_style`: the styles noto and noto-v1 of all other concepts;
- `test_clipart`: an eighth of the clip art, drawn by a hash of the title;
- `train`: the rest, without any picture that equals a test picture in every pixel, and without clip art that is called
  exactly what a concept of `test_concept` is called.

Texts are from emojibase (MIT) and Unicode CLDR (Unicode-3.0).
"""

import argparse
import hashlib
import io
import json
import lzma
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import unicodedata
import xml.etree.ElementTree as ElementTree
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features, Image, List, Value
from PIL import Image as PILImage
from PIL import ImageOps
from tqdm.auto import tqdm

try:
    import resvg_py
except ImportError:  # reported by main, in one line
    resvg_py = None


# Raise it when the same package would give other pictures or texts: finished shards are then redone.
RECIPE_VERSION = 1
SOURCES = ("emoji", "clipart", "stamps")
SPLITS = ("train", "test_style", "test_concept", "test_clipart")
PERMISSIVE = {"Apache-2.0", "MIT", "CC-BY-4.0", "CC-PDDC"}
MAX_MEMBER_BYTES = 128 * 2**20
MAX_PIXELS = 64 * 2**20
MARKER = ".picture_corpus"  # tells that a folder may be replaced

EMOJIBASE = "emojibase-data@17.0.0"
CLDR = "cldr-annotations-full@48.2.0"
CLIPART_PACKAGE = "openclipart-svg"
STAMPS_PACKAGE = "tuxpaint-stamps-default"

TEXT_FEATURES = {
    "file_name": Value("string"),
    "source": Value("string"),
    "style": Value("string"),
    "license": Value("string"),
    "name": Value("string"),
    "keywords": List(Value("string")),
    "description": Value("string"),
    "group": Value("string"),
    "subgroup": Value("string"),
    "concept": Value("int64"),
    "hexcode": Value("string"),
}
FEATURES = Features({"image": Image(), **TEXT_FEATURES, "split": Value("string")})
SHARD_FEATURES = Features({"image": Value("binary"), **TEXT_FEATURES, "pixels": Value("string")})


class Unavailable(Exception):
    """A package, or the client that fetches it, cannot be had."""


def say(line: str) -> None:
    tqdm.write(line, file=sys.stderr)


@dataclass(frozen=True)
class EmojiStyle:
    """Where a style of emoji comes from: a set of Iconify, or files whose names `members` finds the code points in."""

    package: str
    license: str
    members: str | None = None


EMOJI_STYLES = {
    "noto": EmojiStyle("@iconify-json/noto@1.2.9", "Apache-2.0"),
    "noto-v1": EmojiStyle("@iconify-json/noto-v1@1.2.5", "Apache-2.0"),
    "twemoji": EmojiStyle("@iconify-json/twemoji@1.2.5", "CC-BY-4.0"),
    "openmoji": EmojiStyle("openmoji@17.0.0", "CC-BY-SA-4.0", r"package/color/svg/([0-9A-F-]+)\.svg"),
    "emojione": EmojiStyle("@iconify-json/emojione@1.2.3", "CC-BY-4.0"),
    "emojione-v1": EmojiStyle("@iconify-json/emojione-v1@1.2.3", "CC-BY-SA-4.0"),
    "fluent-color": EmojiStyle("@iconify-json/fluent-emoji@1.2.7", "MIT"),
    "fluent-flat": EmojiStyle("@iconify-json/fluent-emoji-flat@1.2.6", "MIT"),
    "fluent-3d": EmojiStyle("@lobehub/fluent-emoji-3d@1.1.0", "MIT", r"package/assets/([0-9a-f-]+)\.webp"),
    "fxemoji": EmojiStyle("@iconify-json/fxemoji@1.2.2", "Apache-2.0"),
    "openmoji-black": EmojiStyle("openmoji@17.0.0", "CC-BY-SA-4.0", r"package/black/svg/([0-9A-F-]+)\.svg"),
    "fluent-hc": EmojiStyle("@iconify-json/fluent-emoji-high-contrast@1.2.6", "MIT"),
    "emojione-mono": EmojiStyle("@iconify-json/emojione-monotone@1.2.1", "CC-BY-4.0"),
    "streamline": EmojiStyle("@iconify-json/streamline-emojis@1.2.4", "CC-BY-4.0"),
}
NAMING_STYLES = ("fluent-flat", "noto", "twemoji")  # their packages tell which code points an icon's name stands for

# Generated stars, gradients and patterns, and themes of application icons: drawings that no title describes.
CLIPART_LEFT_OUT = (
    "shapes/stars",
    "special/gradients",
    "special/patterns",
    "computer/icons",
    "computer/buttons",
    "signs_and_symbols/led",
)
CLIPART_EMPTY_TAGS = {"", "hash", "unsorted", "clip art", "clipart"}
SERIES_TITLE = re.compile(
    r"clipart by|part of the|submission|svg road|theme|icons?$|various|collection", re.IGNORECASE
)
MAX_TITLE_REPEATS = 8  # a title that comes more often names a series, not a picture

CC = "{http://web.resource.org/cc/}"
DC = "{http://purl.org/dc/elements/1.1/}"
RDF = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"
PIXELS_PER_UNIT = {"": 1.0, "px": 1.0, "pt": 1.25, "pc": 15.0, "mm": 90 / 25.4, "cm": 90 / 2.54, "in": 90.0}  # 90 dpi


# Packages


def run_client(command: list[str], directory: Path) -> None:
    """Runs a package client in `directory`. Raises Unavailable with the first errors that it told."""
    if shutil.which(command[0]) is None:
        raise Unavailable(f"the client {command[0]} is not installed")
    try:
        done = subprocess.run(command, cwd=directory, capture_output=True, text=True, errors="replace", timeout=900)
    except subprocess.TimeoutExpired as error:
        raise Unavailable(f"`{' '.join(command)}` took longer than {error.timeout:.0f} s") from error
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        errors = [line for line in said if "error" in line or line.startswith("E:")] or said[-1:]
        raise Unavailable(f"`{' '.join(command)}` failed: {'; '.join(errors[:2])}")


def fetch(command: list[str], cache: Path, pattern: str) -> Path:
    """The one file in `cache` that matches `pattern`, fetched by `command` if it is not there."""
    if cached := sorted(cache.glob(pattern)):
        return cached[-1]
    with tempfile.TemporaryDirectory(dir=cache, prefix=".download-") as directory:
        run_client(command, Path(directory))
        found = sorted(Path(directory).glob(pattern))
        if not found:
            raise Unavailable(f"`{' '.join(command)}` left no file {pattern}")
        return found[-1].replace(cache / found[-1].name)


def fetch_npm(package: str, cache: Path) -> Path:
    """The tarball of an npm package, given as name@version."""
    name, version = package.rsplit("@", 1)
    command = ["npm", "pack", package, "--loglevel=error", "--ignore-scripts"]
    return fetch(command, cache, f"{name.removeprefix('@').replace('/', '-')}-{version}.tgz")


def fetch_deb(package: str, cache: Path) -> Path:
    """The Debian package that the system's sources offer; `apt-get update` may be needed first."""
    return fetch(["apt-get", "download", package], cache, f"{package}_*.deb")


def tar_members(file: io.BufferedIOBase) -> Iterator[tuple[str, bytes]]:
    """(path, content) of every regular file of bearable size, read in memory: nothing is unpacked to disk."""
    with tarfile.open(fileobj=file) as archive:
        for member in archive:
            if member.isreg() and member.size <= MAX_MEMBER_BYTES:
                yield member.name.removeprefix("./"), archive.extractfile(member).read()


def npm_members(path: Path) -> Iterator[tuple[str, bytes]]:
    with path.open("rb") as file:
        yield from tar_members(file)


def deb_members(path: Path) -> Iterator[tuple[str, bytes]]:
    """(path, content) of the files a Debian package installs. Raises ValueError if it is not such a package."""
    with path.open("rb") as file:
        if file.read(8) != b"!<arch>\n":
            raise ValueError(f"expected a Debian package (an ar archive), got {path.name}")
        while len(header := file.read(60)) == 60:
            name, size = header[:16].decode("ascii").strip().rstrip("/"), int(header[48:58])
            if name.startswith("data.tar"):
                yield from tar_members(io.BytesIO(file.read(size)))
                return
            file.seek(size + size % 2, os.SEEK_CUR)
    raise ValueError(f"expected a data.tar member in {path.name}, got none")


@contextmanager
def readable(what: str) -> Iterator[None]:
    """Turns whatever a damaged package raises while it is read into Unavailable."""
    try:
        yield
    except (tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, OSError, ValueError, KeyError) as error:
        raise Unavailable(f"{what} cannot be read ({error!r}); delete it from the cache to fetch it anew") from error


def npm_json(path: Path, *members: str) -> list:
    """The parsed JSON of the named members of a package; an empty dict for one that is not there."""
    content = {name: data for name, data in npm_members(path) if name in {f"package/{member}" for member in members}}
    return [json.loads(content.get(f"package/{member}", b"{}")) for member in members]


# Emoji


def code_points(hexcode: str) -> str:
    """One spelling of a sequence: upper case, without the variation selector, which the packages disagree on."""
    return "-".join(point for point in hexcode.upper().split("-") if point != "FE0F")


def slug(text: str) -> str:
    """A CLDR short name as icon sets spell it: `keycap: #` is `keycap-hash`."""
    text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower().replace("'", "")
    for sign, word in (("&", " and "), ("#", " hash "), ("*", " asterisk ")):
        text = text.replace(sign, word)
    return re.sub(r"[^a-z0-9]+", "-", text).strip("-")


class EmojiTexts:
    """The concepts of emojibase with CLDR's keywords, and the names that icon sets give them.

    `concepts` maps code points to the text columns of one concept. Skin tones are variants of it and left out.
    `packages` are those that were read.
    """

    def __init__(self, cache: Path):
        self.packages = [EMOJIBASE, CLDR]
        emoji, messages = npm_json(fetch_npm(EMOJIBASE, cache), "en/data.json", "en/messages.json")
        (annotations,) = npm_json(fetch_npm(CLDR, cache), "annotations/en/annotations.json")
        annotations = annotations["annotations"]["annotations"]
        groups = {group["order"]: group["key"] for group in messages["groups"]}
        subgroups = {group["order"]: group["key"] for group in messages["subgroups"]}
        emoji = [row for row in emoji if groups.get(row.get("group"), "component") != "component"]
        self.concepts = {}
        for index, row in enumerate(sorted(emoji, key=lambda row: row["order"])):
            said = annotations.get(row["emoji"]) or annotations.get(row["emoji"].replace("\ufe0f", "")) or {}
            self.concepts[code_points(row["hexcode"])] = {
                "name": row["label"],
                "keywords": sorted({*said.get("default", []), *row.get("tags", [])}),
                "group": groups[row["group"]],
                "subgroup": subgroups[row["subgroup"]],
                "concept": index,
            }
        self.names = {slug(concept["name"]): code for code, concept in self.concepts.items()}
        for style in NAMING_STYLES:
            with suppress(Unavailable), readable(style):  # told when it is the style's turn
                self.add_names(fetch_npm(EMOJI_STYLES[style].package, cache))
                self.packages.append(EMOJI_STYLES[style].package)
        for code in self.concepts:
            if "-" not in code:  # the older sets use the names of the Unicode characters
                self.names.setdefault(slug(unicodedata.name(chr(int(code, 16)), code)), code)
        for name, code in list(self.names.items()):
            self.names.setdefault(name.replace("-", ""), code)  # fxemoji writes names in one word

    def add_names(self, package: Path) -> None:
        """Adds the names and aliases of an Iconify set that lists code points; names that are known stay."""
        icons, chars = npm_json(package, "icons.json", "chars.json")
        listed = {name: code_points(code) for code, name in sorted(chars.items())}
        for name, code in listed.items():
            self.names.setdefault(name, code)
        for name, alias in icons.get("aliases", {}).items():
            if alias["parent"] in listed and alias.keys() == {"parent"}:
                self.names.setdefault(name, listed[alias["parent"]])

    def code_of(self, icon: str) -> str | None:
        """The code points that an icon's name stands for.

        `flag-for-chad` and `flag-for-flag-chad` are flag: Chad; `whale-2` is the second drawing of a whale.
        """
        spellings = (re.sub(r"^flag-for-(flag-)?", "flag-", icon), icon, re.sub(r"-[1-9]$", "", icon))
        return next((self.names[name] for name in spellings if name in self.names), None)


def iconify_pictures(package: Path, texts: EmojiTexts) -> Iterator[tuple[str, bytes]]:
    """(code points, SVG) of every icon of an Iconify set that stands for a concept."""
    icons, chars = npm_json(package, "icons.json", "chars.json")
    listed = {name: code_points(code) for code, name in sorted(chars.items())}
    aliases = {
        name: {**icons["icons"][alias["parent"]], **alias}
        for name, alias in icons.get("aliases", {}).items()
        if alias["parent"] in icons["icons"]
    }
    found = set()
    # An icon goes before a withdrawn one, and both before a second name of an icon.
    candidates = sorted(icons["icons"].items(), key=lambda item: (item[1].get("hidden", False), item[0]))
    for name, icon in [*candidates, *sorted(aliases.items())]:
        code = listed.get(name) or texts.code_of(name)
        if code not in texts.concepts or code in found:
            continue
        found.add(code)
        left, top = icon.get("left", 0), icon.get("top", 0)
        width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
        flip = f' transform="translate({2 * left + width} 0) scale(-1 1)"' if icon.get("hFlip") else ""
        yield (
            code,
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" color="#000" '
            f'viewBox="{left} {top} {width} {height}"><g{flip}>{icon["body"]}</g></svg>'.encode(),
        )


def emoji_jobs(style: str, package: Path, texts: EmojiTexts) -> list[tuple[dict, bytes]]:
    """(text columns, SVG or WebP) of one style, in the order of the concepts."""
    members = EMOJI_STYLES[style].members
    if members is None:
        pictures = dict(iconify_pictures(package, texts))
    else:
        matches = ((re.fullmatch(members, path), data) for path, data in npm_members(package))
        pictures = {code_points(match.group(1)): data for match, data in matches if match}
    common = {"source": "emoji", "style": style, "license": EMOJI_STYLES[style].license, "description": ""}
    return [
        ({**common, **concept, "hexcode": code, "file_name": f"{style}/{code.lower()}.png"}, pictures[code])
        for code, concept in texts.concepts.items()
        if code in pictures
    ]


# Clip art and stamps


def folder_columns(path: str, style: str) -> dict:
    """The columns that a path tells. Files are named by a hash: `datasets` would take train.png for a split."""
    folders = path.split("/")[:-1] or [""]
    digest = hashlib.sha256(path.encode()).hexdigest()[:16]
    group, subgroup = folders[0], "/".join(folders[:2])
    names = {"style": style, "file_name": f"{style}/{digest}.png", "hexcode": "", "concept": -1}
    return {**names, "group": group, "subgroup": subgroup}


def stem_words(path: str) -> str:
    return " ".join(re.sub(r"[_\d]+", " ", Path(path).stem).split())


def clipart_jobs(package: Path) -> list[tuple[dict, bytes]]:
    """(text columns, SVG) of every drawing; its title, description and tags are added when it is rendered."""
    prefix = "usr/share/openclipart/svg/"
    jobs = []
    for member, data in deb_members(package):
        path = member.removeprefix(prefix)
        if path != member and path.endswith(".svg") and not path.startswith(CLIPART_LEFT_OUT):
            row = {"source": "clipart", "license": "CC-PDDC", "path": path, **folder_columns(path, "openclipart")}
            jobs.append((row, data))
    return sorted(jobs, key=lambda job: job[0]["path"])


def clipart_texts(root: ElementTree.Element, path: str) -> dict | None:
    """Name, description and keywords from the metadata in an SVG; None if it is not dedicated to the public domain."""
    work = root.find(f".//{CC}Work")
    license_ = None if work is None else work.find(f"{CC}license")
    if license_ is None or "publicdomain" not in license_.get(f"{RDF}resource", "").lower():
        return None
    title, description = (" ".join(work.findtext(f"{DC}{key}", "").split()) for key in ("title", "description"))
    tags = {" ".join((tag.text or "").replace("_", " ").lower().split()) for tag in work.iter(f"{RDF}li")}
    title = " ".join(title.replace("_", " ").split())
    name = stem_words(path) if not title or SERIES_TITLE.search(title) else title
    return {"name": name, "description": description, "keywords": sorted(tags - CLIPART_EMPTY_TAGS)}


def rename_series(rows: list[dict]) -> None:
    """Gives drawings whose title is repeated too often the words of their file name, in place."""
    repeats = Counter(row["name"].lower() for row in rows)
    for row in rows:
        if repeats[row["name"].lower()] > MAX_TITLE_REPEATS:
            row["name"] = stem_words(row["path"]) or row["name"]


def stamp_jobs(package: Path) -> list[tuple[dict, bytes]]:
    """(text columns, PNG or SVG) of every stamp that has a sentence, the first line of the text file beside it."""
    prefix = "usr/share/tuxpaint/stamps/"
    pictures, sentences = {}, {}
    for member, data in deb_members(package):
        path = member.removeprefix(prefix)
        stem, extension = os.path.splitext(path)
        if path != member and extension in (".png", ".svg"):
            pictures[path] = data
        elif path != member and extension == ".txt":
            sentences[stem] = data.decode("utf-8", "replace").strip().split("\n")[0].strip()
    common = {"source": "stamps", "license": "GPL-2.0-or-later", "description": "", "keywords": []}
    return [
        ({**common, **folder_columns(path, "tuxpaint"), "name": sentences[os.path.splitext(path)[0]]}, data)
        for path, data in sorted(pictures.items())
        if sentences.get(os.path.splitext(path)[0])
    ]


# Rendering


def parse_svg(data: bytes) -> ElementTree.Element:
    """The root of an SVG without its references to files and addresses, which the renderer would follow."""
    root = ElementTree.fromstring(data)
    for element in root.iter():
        for key, value in list(element.attrib.items()):
            if key.rpartition("}")[2] == "href" and not value.strip().startswith(("#", "data:")):
                del element.attrib[key]
    return root


def view_box(root: ElementTree.Element) -> tuple[float, float, float, float]:
    """(left, top, width, height) of an SVG; from its width and height, in any unit, if it has no viewBox."""
    numbers = [float(number) for number in re.split(r"[\s,]+", root.get("viewBox", "").strip()) if number]
    if len(numbers) == 4 and min(numbers[2:]) > 0:
        return tuple(numbers)
    sides = []
    for side in ("width", "height"):
        match = re.fullmatch(r"\s*([\d.]+(?:[eE][+-]?\d+)?)\s*([a-z]*)\s*", root.get(side, ""))
        known = match is not None and match.group(2) in PIXELS_PER_UNIT and float(match.group(1)) > 0
        sides.append(float(match.group(1)) * PIXELS_PER_UNIT[match.group(2)] if known else 0.0)
    return (0.0, 0.0, *sides) if all(sides) else (0.0, 0.0, 1000.0, 1000.0)


def rasterize(root: ElementTree.Element, box: tuple[float, float, float, float], side: int) -> PILImage.Image:
    """The part `box` of an SVG in RGBA, its longer side `side` pixels."""
    root.attrib.pop("preserveAspectRatio", None)
    root.set("viewBox", " ".join(f"{number:.6g}" for number in box))
    root.set("width", f"{box[2]:.6g}")
    root.set("height", f"{box[3]:.6g}")
    text = ElementTree.tostring(root, encoding="unicode")
    png = resvg_py.svg_to_bytes(svg_string=text, width=side, height=side, skip_system_fonts=True)
    return PILImage.open(io.BytesIO(bytes(png))).convert("RGBA")


def rasterize_cropped(root: ElementTree.Element, side: int) -> PILImage.Image:
    """What is drawn in an SVG, without the empty page around it, in RGBA. Raises ValueError if nothing is."""
    box = view_box(root)
    image = rasterize(root, box, 2 * side)
    drawn = image.getbbox()
    if drawn is None:
        raise ValueError("expected an SVG that draws something, got an empty page")
    if max(drawn[2] - drawn[0], drawn[3] - drawn[1]) < side:  # a small drawing on a large page: render it closer
        unit = box[2] / image.width
        corner = (box[0] + drawn[0] * unit, box[1] + drawn[1] * unit)
        box = (*corner, (drawn[2] - drawn[0]) * unit, (drawn[3] - drawn[1]) * unit)
        image = rasterize(root, box, 2 * side)
        drawn = image.getbbox()
    return image.crop(drawn)


def open_raster(data: bytes) -> PILImage.Image:
    """A PNG or WebP in RGBA. Raises ValueError for one with more than MAX_PIXELS."""
    image = PILImage.open(io.BytesIO(data), formats=("PNG", "WEBP"))
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"expected at most {MAX_PIXELS} pixels, got {image.width}x{image.height}")
    return image.convert("RGBA")


def on_white(image: PILImage.Image, size: int) -> PILImage.Image:
    """An RGBA picture of any shape -> RGB (size, size), fitted and centred on white."""
    image = ImageOps.contain(image, (size, size), PILImage.Resampling.LANCZOS)
    square = PILImage.new("RGBA", (size, size), "white")
    square.alpha_composite(image, ((size - image.width) // 2, (size - image.height) // 2))
    return square.convert("RGB")


def render_picture(job: tuple[dict, bytes, int]) -> dict | None:
    """(text columns, picture file, size) -> the columns of a shard, or None for a picture that cannot be used."""
    row, data, size = job
    try:
        if data.startswith((b"\x89PNG", b"RIFF")):
            image = open_raster(data)
            if row["source"] != "emoji" and (drawn := image.getbbox()):
                image = image.crop(drawn)
        else:
            root = parse_svg(data)
            if row["source"] == "clipart":
                texts = clipart_texts(root, row["path"])
                if texts is None:
                    return None
                row = {**row, **texts}
            # The margin of an emoji belongs to its style; the page around a drawing belongs to nothing.
            cropped = row["source"] != "emoji"
            image = rasterize_cropped(root, size) if cropped else rasterize(root, view_box(root), size)
        image = on_white(image, size)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # whatever is wrong with one picture; a panic of resvg is no Exception
        return None
    if max(high - low for low, high in image.getextrema()) < 12:
        return None  # one colour all over shows nothing
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return {**row, "image": buffer.getvalue(), "pixels": hashlib.sha256(image.tobytes()).hexdigest()}


# Shards: the rendered pictures and texts of one style, kept in the cache


@dataclass(frozen=True)
class Part:
    """One style to build: `origin` names the packages that decide its content, `make_jobs` reads them."""

    label: str
    origin: tuple[str, ...]
    make_jobs: Callable[[], list[tuple[dict, bytes]]]


def emoji_parts(cache: Path, permissive: bool) -> Iterator[Part]:
    try:
        with readable("the packages with the texts"):
            texts = EmojiTexts(cache)
    except Unavailable as error:
        say(f"emoji are left out: {error}")
        return
    for style, source in EMOJI_STYLES.items():
        if permissive and source.license not in PERMISSIVE:
            continue
        try:
            package = fetch_npm(source.package, cache)
        except Unavailable as error:
            say(f"emoji/{style} is left out: {error}")
            continue
        yield Part(f"emoji/{style}", (*texts.packages, source.package), partial(emoji_jobs, style, package, texts))


def debian_parts(label: str, name: str, make_jobs: Callable, cache: Path) -> Iterator[Part]:
    try:
        package = fetch_deb(name, cache)
    except Unavailable as error:
        say(f"{label} is left out: {error} (`apt-get update` may be needed first)")
        return
    yield Part(label, (package.name,), partial(make_jobs, package))


def parts(sources: Iterable[str], permissive: bool, cache: Path) -> Iterator[Part]:
    """What can be had of the sources. What cannot is told in one line."""
    if "emoji" in sources:
        yield from emoji_parts(cache, permissive)
    if "clipart" in sources:
        yield from debian_parts("clipart", CLIPART_PACKAGE, clipart_jobs, cache)
    if "stamps" in sources and not permissive:
        yield from debian_parts("stamps", STAMPS_PACKAGE, stamp_jobs, cache)


def build_shard(part: Part, cache: Path, size: int, render: Callable) -> list[dict]:
    """The rows of one style: from its finished shard, or else rendered by `render`, a `map`, and kept as a shard."""
    versions = (metadata.version("pillow"), metadata.version("resvg-py"), unicodedata.unidata_version)
    key = hashlib.sha256(json.dumps([RECIPE_VERSION, size, *versions, *part.origin]).encode()).hexdigest()[:16]
    path = cache / "rendered" / f"{part.label.replace('/', '-')}-{key}.parquet"
    if not path.exists():
        with readable(f"the package of {part.label}"):
            tasks = [(*job, size) for job in part.make_jobs()]
        rows = [row for row in tqdm(render(render_picture, tasks), part.label, len(tasks), unit="picture") if row]
        if unusable := len(tasks) - len(rows):
            say(f"{part.label}: {unusable} of {len(tasks)} pictures cannot be used (empty, damaged or not free)")
        rename_series([row for row in rows if "path" in row])
        path.parent.mkdir(exist_ok=True)
        partial_path = path.with_suffix(".partial")
        write_table(rows, SHARD_FEATURES, partial_path)
        partial_path.replace(path)
    return pq.read_table(path).to_pylist()


def build_rows(sources: Iterable[str], permissive: bool, cache: Path, size: int, num_jobs: int) -> list[dict]:
    """The rows of every style that can be had, rendered by `num_jobs` processes."""
    cache.mkdir(parents=True, exist_ok=True)
    rows = []
    executor = ProcessPoolExecutor(num_jobs) if num_jobs > 1 else None  # its processes start with the first task
    render = partial(executor.map, chunksize=16) if executor else map
    try:
        for part in parts(sources, permissive, cache):
            try:
                rows += build_shard(part, cache, size, render)
            except Unavailable as error:
                say(f"{part.label} is left out: {error}")
    finally:
        if executor:
            executor.shutdown(cancel_futures=True)
    return rows


# The corpus


def normalize_title(title: str) -> str:
    return " ".join(title.lower().split())


def split_of(row: dict) -> str:
    if row["concept"] >= 0 and row["concept"] % 7 == 3:
        return "test_concept"
    if row["style"] in ("noto", "noto-v1"):
        return "test_style"
    if row["source"] == "clipart":
        title = normalize_title(row["name"]).encode()
        return "test_clipart" if int(hashlib.sha256(title).hexdigest(), 16) % 8 == 0 else "train"
    return "train"


def keep_first(rows: list[dict], taken: set[str] | None = None) -> list[dict]:
    """The rows whose pixels are neither in `taken` nor those of an earlier row."""
    first = {}
    for row in rows:
        first.setdefault(row["pixels"], row)
    return [row for pixels, row in first.items() if pixels not in (taken or ())]


def assign_splits(rows: list[dict]) -> dict[str, list[dict]]:
    """Split -> rows in their order. Of pictures equal in every pixel one stays in train, and none that is in a test.

    Clip art of train that has the name of an unseen concept would show the concept: it is left out.

    The emoji of a test stay as they are, since one drawing may stand for two concepts there as well as anywhere.
    """
    splits = {name: [row | {"split": name} for row in rows if split_of(row) == name] for name in SPLITS}
    counts = {name: len(members) for name, members in splits.items()}
    splits["test_clipart"] = keep_first(splits["test_clipart"])
    test = {row["pixels"] for name in SPLITS[1:] for row in splits[name]}
    unseen = {normalize_title(row["name"]) for row in splits["test_concept"]}
    unnamed = [row for row in splits["train"] if normalize_title(row["name"]) not in unseen]
    distinct = keep_first(unnamed)
    splits["train"] = keep_first(distinct, test)
    say(f"test_clipart: {counts['test_clipart'] - len(splits['test_clipart'])} pictures that come twice are left out")
    say(f"train: {counts['train'] - len(unnamed)} pictures with the name of an unseen concept are left out")
    say(f"train: {len(unnamed) - len(distinct)} pictures that come twice are left out")
    say(f"train: {len(distinct) - len(splits['train'])} pictures that equal a test picture are left out")
    return {name: members for name, members in splits.items() if members}


def write_table(rows: list[dict], features: Features, path: Path) -> None:
    schema = features.arrow_schema
    table = pa.Table.from_pylist([{name: row[name] for name in schema.names} for row in rows], schema=schema)
    pq.write_table(table, path, row_group_size=256)


def write_parquet(splits: dict[str, list[dict]], directory: Path) -> None:
    """One file a split, named so that `datasets` finds the splits by itself."""
    for split, rows in splits.items():
        pictures = [{**row, "image": {"bytes": row["image"], "path": row["file_name"]}} for row in rows]
        write_table(pictures, FEATURES, directory / f"{split}-00000-of-00001.parquet")


def write_imagefolder(splits: dict[str, list[dict]], directory: Path) -> None:
    """One folder a split, each with its metadata.jsonl."""
    names = [name for name in FEATURES if name != "image"]
    for split, rows in splits.items():
        for style in {row["style"] for row in rows}:
            (directory / split / style).mkdir(parents=True)
        for row in tqdm(rows, desc=f"writing {split}", unit="picture"):
            (directory / split / row["file_name"]).write_bytes(row["image"])
        lines = (json.dumps({name: row[name] for name in names}, ensure_ascii=False) + "\n" for row in rows)
        (directory / split / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")


WRITERS = {"parquet": write_parquet, "imagefolder": write_imagefolder}


def count_table(splits: dict[str, list[dict]]) -> str:
    """A Markdown table: pictures by source, style and licence, in each split."""
    counts = Counter()
    for split, rows in splits.items():
        counts.update(((row["source"], row["style"], row["license"]), split) for row in rows)
    lines = [["source", "style", "license", *splits, "all"]]
    lines.append(["---"] * 3 + ["---:"] * (len(splits) + 1))
    for origin in dict.fromkeys(origin for origin, _ in counts):
        numbers = [counts[origin, split] for split in splits]
        lines.append([*origin, *map(str, numbers), str(sum(numbers))])
    totals = [len(rows) for rows in splits.values()]
    lines.append(["**all**", "", "", *map(str, totals), str(sum(totals))])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def card(splits: dict[str, list[dict]], file_format: str, size: int) -> str:
    """The dataset card: what `datasets.load_dataset(folder)` needs to find the splits, and the counts."""
    end = "-*.parquet" if file_format == "parquet" else "/**"
    files = "".join(f"  - split: {split}\n    path: data/{split}{end}\n" for split in splits)
    return (
        f"---\nconfigs:\n- config_name: default\n  data_files:\n{files}---\n\n# Picture corpus\n\n"
        f"Emoji, clip art and stamps at {size}x{size} pixels with their names, built by `build_picture_corpus.py`.\n"
        f"Each picture has its own licence, in the column `license`.\n\n{count_table(splits)}\n"
    )


def write_corpus(splits: dict[str, list[dict]], out: Path, file_format: str, size: int) -> None:
    """Writes out/data and out/README.md; a corpus that was there is replaced once the new one is complete."""
    new, old = out / ".new", out / ".old"
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    new.mkdir(parents=True)
    WRITERS[file_format](splits, new)
    (out / MARKER).touch()
    if (out / "data").exists():
        (out / "data").rename(old)
    new.rename(out / "data")
    shutil.rmtree(old, ignore_errors=True)
    (out / "README.md").write_text(card(splits, file_format, size), encoding="utf-8")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the corpus")
    parser.add_argument("--format", choices=sorted(WRITERS), default="parquet")
    parser.add_argument("--permissive", action="store_true", help="leave share-alike and GPL pictures out")
    parser.add_argument("--size", type=int, default=128, help="side of the square pictures in pixels")
    parser.add_argument("--cache", type=Path, help="downloads and rendered pictures (default: OUT/.cache)")
    parser.add_argument("--sources", nargs="+", default=SOURCES, choices=SOURCES, help="default: all")
    parser.add_argument("--jobs", type=int, default=2, help="processes that render")
    args = parser.parse_args(argv)
    if not 16 <= args.size <= 1024:
        parser.error(f"expected --size from 16 to 1024, got {args.size}")
    if args.jobs < 1:
        parser.error(f"expected --jobs of at least 1, got {args.jobs}")
    if (args.out / "data").exists() and not (args.out / MARKER).exists():
        parser.error(f"expected {args.out} to be new or a corpus of this script, got a folder with other data")
    return args


def main(argv: list[str] | None = None) -> int:
    """Builds the corpus. Returns the exit code: 1 if there is nothing to build it from."""
    args = parse_args(argv)
    if resvg_py is None:
        say("nothing is built: the renderer is not installed (pip install resvg-py)")
        return 1
    rows = build_rows(args.sources, args.permissive, args.cache or args.out / ".cache", args.size, args.jobs)
    if not rows:
        say("nothing is built: no source could be had")
        return 1
    splits = assign_splits(rows)
    write_corpus(splits, args.out, args.format, args.size)
    print(count_table(splits))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
