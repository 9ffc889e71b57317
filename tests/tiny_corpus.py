"""A picture corpus small enough for a test, in the layout that `examples/build_picture_corpus.py` writes."""

import io
from pathlib import Path

from PIL import Image, ImageDraw

import build_picture_corpus

SIDE = 32
COLORS = ("red", "blue", "green", "orange", "purple", "black", "brown", "pink")
SHAPES = ("square", "disc", "cross")
PLACES = (
    "house",
    "garden",
    "river",
    "harbour",
    "mountain",
    "street",
    "market",
    "school",
    "kitchen",
    "station",
    "library",
)
CLIPART_SUBGROUPS = ("places/indoors", "places")


def draw(shape: str, color: str, margin: int, background: str = "white") -> bytes:
    """A PNG of one shape, `margin` pixels from the border."""
    image = Image.new("RGB", (SIDE, SIDE), background)
    pen = ImageDraw.Draw(image)
    low, high = margin, SIDE - 1 - margin
    if shape == "square":
        pen.rectangle((low, low, high, high), color)
    elif shape == "disc":
        pen.ellipse((low, low, high, high), color)
    else:
        pen.line((low, low, high, high), color, 5)
        pen.line((low, high, high, low), color, 5)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def row_of(**fields) -> dict:
    empty = {name: [] if name == "keywords" else "" for name in build_picture_corpus.TEXT_FEATURES}
    return {**empty, "license": "MIT", "concept": -1, **fields}


def emoji_rows(style: str, margin: int, background: str) -> list[dict]:
    """One picture for each colour and shape; they are the concepts, in this order."""
    concepts = [(color, shape) for color in COLORS for shape in SHAPES]
    return [
        row_of(
            image=draw(shape, color, margin, background),
            file_name=f"{style}/{index:04x}.png",
            source="emoji",
            style=style,
            name=f"{color} {shape}",
            keywords=[color, shape, "geometric"],
            group="shapes",
            subgroup=f"{'pale' if index < 12 else 'dark'}-{shape}",
            concept=index,
            hexcode=f"{index:04X}",
        )
        for index, (color, shape) in enumerate(concepts)
    ]


def clipart_rows(prefix: str) -> list[dict]:
    """Twenty-two drawings, each with a title, a description and a path of its own."""
    return [
        row_of(
            image=draw(SHAPES[index % 3], COLORS[index % 8], 2 + number, "lightyellow"),
            file_name=f"openclipart/{prefix}{index}{number}.png",
            source="clipart",
            style="openclipart",
            name=f"{prefix} {place} {number}",
            keywords=[place, "drawing"],
            description=f"Somebody drew a {place}." if index % 2 else "",
            group="places",
            subgroup=CLIPART_SUBGROUPS[number],
        )
        for index, place in enumerate(PLACES)
        for number in range(2)
    ]


def tiny_splits() -> dict[str, list[dict]]:
    """64 pictures to train on, and the three held-out splits; concepts whose index modulo 7 is 3 are held out."""
    styles = {
        "twemoji": emoji_rows("twemoji", 4, "white"),
        "fluent-flat": emoji_rows("fluent-flat", 7, "white"),
        "noto": emoji_rows("noto", 5, "lightgray"),
        "noto-v1": emoji_rows("noto-v1", 8, "lightgray")[::2],
    }
    known = [row for rows in styles.values() for row in rows if row["concept"] % 7 != 3]
    splits = {
        "train": [row for row in known if not row["style"].startswith("noto")] + clipart_rows("old"),
        "test_style": [row for row in known if row["style"].startswith("noto")],
        "test_concept": [row for rows in styles.values() for row in rows if row["concept"] % 7 == 3],
        "test_clipart": clipart_rows("new"),
    }
    return {split: [{**row, "split": split} for row in rows] for split, rows in splits.items()}


def write_tiny_corpus(folder: Path, file_format: str = "parquet", splits: dict[str, list[dict]] | None = None) -> Path:
    splits = tiny_splits() if splits is None else splits
    build_picture_corpus.write_corpus(splits, folder, file_format, SIDE)
    return folder
