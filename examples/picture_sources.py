"""What the packages hold: emoji with their texts, clip art and stamps, each picture as a job for the renderer.

A job is (text columns, picture file): all columns of the corpus but the image and the split. The title, description
and keywords of clip art lie in its SVG, and are read (`clipart_texts`) when the SVG is parsed to be rendered.
"""

import hashlib
import os
import re
import unicodedata
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from picture_packages import Unavailable, deb_members, fetch_npm, npm_json, npm_members, readable

EMOJIBASE = "emojibase-data@17.0.0"
CLDR = "cldr-annotations-full@48.2.0"
CLIPART_PACKAGE = "openclipart-svg"
STAMPS_PACKAGE = "tuxpaint-stamps-default"


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
