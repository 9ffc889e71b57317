"""What the notebooks share: pictures to try them on, and rows of pictures with titles."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
from PIL import Image

GALLERY = Path(__file__).resolve().parents[1] / "gallery"
MOST = 36  # pictures of a class, so that none counts for much more than the others
HELD_OUT = 3  # one picture in so many of each class is not trained on

# Class -> keywords of the gallery's pictures. A picture with keywords of two classes belongs to none.
CLASSES = {
    "button": {"arrow", "button", "keycap"},
    "face": {"face"},
    "person": {"boy", "girl", "man", "person", "woman"},
    "plant": {"flower", "plant", "tree"},
    "vehicle": {"airplane", "boat", "bus", "car", "ship", "train", "vehicle"},
}


def classes_of(keywords: Sequence[str]) -> list[str]:
    """The classes that a picture with these keywords belongs to, by name."""
    words = {keyword.lower() for keyword in keywords}
    return [name for name, wanted in CLASSES.items() if wanted & words]


def write_classes(folder: Path) -> Path:
    """Copy pictures of the gallery to `<folder>/train/<class>/` and `<folder>/valid/<class>/`; returns the folder."""
    counts = dict.fromkeys(CLASSES, 0)
    for line in (GALLERY / "metadata.jsonl").read_text("utf-8").splitlines():
        row = json.loads(line)
        found = classes_of(row["keywords"])
        if len(found) != 1 or counts[found[0]] == MOST:
            continue
        split = "train" if counts[found[0]] % HELD_OUT else "valid"
        counts[found[0]] += 1
        target = folder / split / found[0] / Path(row["file_name"]).name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(GALLERY / row["file_name"], target)
    return folder


def show(pictures: Sequence[Path], titles: Sequence[str], across: int = 8) -> None:
    """Draw pictures in lines of `across`, each with a title."""
    down = -(-len(pictures) // across)
    _, axes = plt.subplots(down, across, figsize=(1.5 * across, 1.9 * down), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, picture, title in zip(axes.flat, pictures, titles, strict=False):
        with Image.open(picture) as image:
            image.thumbnail((160, 160))
            axis.imshow(image.convert("RGB"))
        axis.set_title(title, fontsize=8, parse_math=False)
    plt.tight_layout()
    plt.show()
