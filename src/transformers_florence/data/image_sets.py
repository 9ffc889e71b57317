"""Sets of pictures with classes, in the layouts in which people have them on disk, as one form."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torchvision import datasets as official

from .files import load_json, metadata_rows
from .prompts import PHOTO_TEMPLATES, normalize_text

BENCHMARKS_FILE = Path(__file__).with_name("benchmark_sets.json")
METADATA = "metadata.jsonl"
PICTURE_SUFFIXES = {".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".jp2", ".png", ".ppm", ".tif", ".tiff", ".webp"}
POSITIVE, DIFFICULT, NEGATIVE = 1, 0, -1  # VOC's marks of a picture for a class
# CLIP's eighty for ImageNet; `PHOTO_TEMPLATES` has two more, of UniCL and of the paper.
IMAGENET_TEMPLATES = tuple(text for text in PHOTO_TEMPLATES if text not in ("{}.", "a cropped photo of {}."))


@dataclass(frozen=True)
class Benchmark:
    """One of the twelve sets of Florence's table 1.

    Attributes:
        key: its short name, of a file's and an option's.
        title: its name in the paper.
        metric: what is reported of it, a key of `evaluation.classification.METRICS`.
        templates, names: CLIP's (Radford et al. 2021), names in the order of the set's class numbers. The names of
            Food101, SUN397, Stanford Cars and DTD are the sets' own, with spaces for underscores and slashes;
            Caltech101 goes without its background. CLIP has two names of ImageNet twice: 744 and 836 have the set's.
    """

    key: str
    title: str
    metric: str
    templates: tuple[str, ...]
    names: tuple[str, ...]


@cache
def benchmarks() -> dict[str, Benchmark]:
    """The twelve sets by their keys, in the order of the paper's table."""
    content = load_json(BENCHMARKS_FILE)
    return {
        key: Benchmark(key, row["title"], row["metric"], tuple(row["templates"]), tuple(row["names"]))
        for key, row in content.items()
    }


@dataclass(frozen=True)
class ImageSet:
    """Pictures with their classes.

    Attributes:
        name: what reports call it.
        pictures: what an image processor takes, each opened when it is asked for: paths, or PIL images.
        labels: (pictures,), int64, class numbers; or (pictures, classes) of VOC's marks, where a picture has several.
        names: of the classes, by number.

    Raises:
        ValueError: no picture, other counts of labels than of pictures, numbers of no class, or names that are empty
            or equal.
    """

    name: str
    pictures: Sequence[Any]
    labels: torch.Tensor
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.pictures) == 0 or len(self.pictures) != len(self.labels):
            raise ValueError(
                f"{self.name}: expected as many labels as pictures, at least one, got {len(self.labels)} labels "
                f"and {len(self.pictures)} pictures"
            )
        several = self.labels.ndim == 2
        low, high = (NEGATIVE, POSITIVE) if several else (0, len(self.names) - 1)
        outside = not low <= int(self.labels.min()) <= int(self.labels.max()) <= high
        if outside or (several and self.labels.shape[1] != len(self.names)):
            got = f"{tuple(self.labels.shape)} with {int(self.labels.min())} to {int(self.labels.max())}"
            raise ValueError(f"{self.name}: expected labels of {len(self.names)} classes, got {got}")
        check_class_names(self.names, self.name)

    def __len__(self) -> int:
        return len(self.pictures)

    def select(self, rows: Sequence[int]) -> "ImageSet":
        """Some of the pictures, all of the classes."""
        return replace(self, pictures=PictureView(self.pictures, rows), labels=self.labels[list(rows)])

    def empty_classes(self) -> list[str]:
        """Names of the classes that no picture belongs to."""
        if self.labels.ndim == 2:
            counts = (self.labels == POSITIVE).sum(dim=0)
        else:
            counts = self.labels.bincount(minlength=len(self.names))
        return [name for name, count in zip(self.names, counts.tolist(), strict=True) if not count]

    def split_off(self, part: float, seed: int = 0) -> tuple["ImageSet", "ImageSet"]:
        """Two sets, of which the second has `part` of each class's pictures, rounded, and leaves one at least.

        Raises:
            ValueError: a part that is not between 0 and 1, several classes a picture, or nothing to split off.
        """
        if not 0 < part < 1 or self.labels.ndim != 1:
            got = f"{part} of labels of shape {tuple(self.labels.shape)}"
            raise ValueError(f"expected a part between 0 and 1 of pictures with one class each, got {got}")
        generator = torch.Generator().manual_seed(seed)
        second: list[int] = []
        for number in range(len(self.names)):
            rows = (self.labels == number).nonzero()[:, 0]
            count = min(round(part * len(rows)), len(rows) - 1)
            second += rows[torch.randperm(len(rows), generator=generator)[: max(count, 0)]].tolist()
        if not second:
            raise ValueError(f"{self.name}: expected classes of several pictures to split {part} off, got none")
        away = set(second)
        return self.select([row for row in range(len(self)) if row not in away]), self.select(sorted(second))


class PictureView(Sequence[Any]):
    """Some elements of a sequence in another order, each fetched when it is asked for."""

    def __init__(self, whole: Sequence[Any], rows: Sequence[int], part: Callable[[Any], Any] = lambda item: item):
        self.whole, self.rows, self.part = whole, list(rows), part

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: Any) -> Any:
        return self.part(self.whole[self.rows[place]])


def check_class_names(names: Sequence[str], where: str) -> None:
    """Refuse names that say nothing or that two classes share.

    Raises:
        ValueError: no names, one that is empty or no text, or two that differ in nothing but case and white space.
    """
    if isinstance(names, str) or len(names) == 0:
        raise ValueError(f"{where}: expected a list of at least one class name, got {names!r}")
    empty = [number for number, name in enumerate(names) if not isinstance(name, str) or not name.strip()]
    if empty:
        raise ValueError(f"{where}: expected names that are not empty, got {names[empty[0]]!r} for class {empty[0]}")
    first: dict[str, int] = {}
    for number, name in enumerate(names):
        other = first.setdefault(normalize_text(name), number)
        if other != number:
            raise ValueError(f"{where}: expected different names, got {name!r} for the classes {other} and {number}")


def read_metadata(folder: Path, split: str | None = None) -> ImageSet:
    """A folder with a metadata.jsonl whose rows have `file_name`, `label`, and maybe `label_id` and `split`.

    The classes are those of all rows, by `label_id` where rows have it, so that splits have the same numbers.

    Raises:
        ValueError: not of this form, no row of the split, or one number for several names.
    """
    files, labels, splits = [], [], set()
    number_of: dict[str, int | None] = {}
    for where, file, row in metadata_rows(folder):
        name, number = row.get("label"), row.get("label_id")
        if not isinstance(name, str) or not (number is None or type(number) is int):
            raise ValueError(f"{where}: expected a label as text, label_id as integer, got {name!r} and {number!r}")
        if number_of.setdefault(name, number) != number:
            raise ValueError(f"{where}: expected label_id {number_of[name]!r} for {name!r}, got {number!r}")
        splits.add(row.get("split"))
        if split is None or row.get("split") == split:
            files.append(file)
            labels.append(name)
    if not files:
        raise ValueError(f"{folder}: expected rows of the split {split!r}, got the splits {sorted(map(str, splits))}")
    numbers = [number for number in number_of.values() if number is not None]
    if len(numbers) < len(number_of):
        names = sorted(number_of)
    elif sorted(numbers) == list(range(len(numbers))):
        names = [name for _, name in sorted(zip(numbers, number_of, strict=True))]
    else:
        raise ValueError(f"{folder}: expected one label_id from 0 on for each label, got {sorted(numbers)[:20]}")
    place = {name: number for number, name in enumerate(names)}
    return ImageSet(folder.resolve().name, files, torch.tensor([place[name] for name in labels]), tuple(names))


def read_class_folders(folder: Path, split: str | None = None) -> ImageSet:
    """Pictures in one folder for each class, `<class>/...` or `<split>/<class>/...`; underscores are spaces.

    Raises:
        ValueError: no such folder, or no classes with pictures in it.
    """
    root = folder if split is None else folder / split
    if not root.is_dir():
        raise ValueError(f"expected a folder of pictures for each class, got {root}: no such folder")
    classes = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    files, labels = [], []
    for number, path in enumerate(classes):
        found = sorted(file for file in path.rglob("*") if file.suffix.lower() in PICTURE_SUFFIXES)
        files += found
        labels += [number] * len(found)
    if not files:
        raise ValueError(f"expected a folder of pictures for each class in {root}, got {len(classes)} without any")
    names = tuple(path.name.replace("_", " ") for path in classes)
    return ImageSet(folder.resolve().name, files, torch.tensor(labels), names)


def read_hub(name: str, split: str | None = None, *, image: str = "image", label: str = "label") -> ImageSet:
    """A set by its name on the Hub, through `datasets` (an extra), which also finds what it has fetched before.

    Args:
        name: as `datasets.load_dataset` takes it.
        split: "test" if None.
        image, label: columns of the pictures and of `datasets`' class labels.

    Raises:
        ValueError: there is no such column, or labels without names.
    """
    from datasets import ClassLabel, load_dataset  # an extra: only who takes a set from the Hub needs it

    rows = load_dataset(name, split=split or "test")
    feature = rows.features.get(label)
    if image not in rows.features or not isinstance(feature, ClassLabel):
        raise ValueError(f"{name}: expected columns {image} and {label}, of class labels, got {rows.features}")
    names = tuple(str(text).replace("_", " ") for text in feature.names)
    pictures = PictureView(rows, range(len(rows)), part=lambda row: row[image])
    return ImageSet(name, pictures, torch.tensor(list(rows[label])), names)


# Of the official archives: how torchvision opens them (root, split) and where it keeps the class numbers.
ARCHIVES: dict[str, tuple[Callable[[str, str], Any], str]] = {
    "food101": (lambda root, split: official.Food101(root, split), "_labels"),
    "cifar10": (lambda root, split: official.CIFAR10(root, train=split == "train"), "targets"),
    "cifar100": (lambda root, split: official.CIFAR100(root, train=split == "train"), "targets"),
    "sun397": (lambda root, split: official.SUN397(root), "_labels"),  # all of it: its splits are lists apart
    "cars": (lambda root, split: official.StanfordCars(root, split), "_samples"),
    "aircraft": (lambda root, split: official.FGVCAircraft(root, split), "_labels"),
    "dtd": (lambda root, split: official.DTD(root, split), "_labels"),
    "pets": (lambda root, split: official.OxfordIIITPet(root, split), "_labels"),
    "caltech101": (lambda root, split: official.Caltech101(root), "y"),  # it has no official splits
    "flowers": (lambda root, split: official.Flowers102(root, split), "_labels"),
    "imagenet": (lambda root, split: official.ImageFolder(str(Path(root) / split)), "targets"),
}


def read_voc(root: Path, split: str) -> tuple[list[Path], torch.Tensor]:
    """VOC's lists of the classification task in `VOCdevkit/VOC2007` -> pictures, and their marks for each class.

    Raises:
        ValueError: a list is missing, of another form, or of other pictures than the others.
    """
    base = root / "VOCdevkit" / "VOC2007"
    columns: list[list[int]] = []
    pictures: list[str] = []
    for name in benchmarks()["voc2007"].names:
        file = base / "ImageSets" / "Main" / f"{name.replace(' ', '')}_{split}.txt"
        try:
            cells = [line.split() for line in file.read_text("utf-8").splitlines() if line.strip()]
            columns.append([int(mark) for _, mark in cells])
        except (OSError, ValueError) as error:
            raise ValueError(f"expected a list of pictures and marks, got {file}: {error}") from error
        pictures = pictures or [picture for picture, _ in cells]
        if pictures != [picture for picture, _ in cells]:
            raise ValueError(f"{file}: expected the pictures of the other classes' lists, got others")
    return [base / "JPEGImages" / f"{picture}.jpg" for picture in pictures], torch.tensor(columns).T


def read_benchmark(key: str, root: str | Path, split: str = "test") -> ImageSet:
    """One of the twelve sets from its official archive, unpacked in `root` as torchvision has it; fetches nothing.

    Args:
        key: of `benchmarks()`.
        root: the folder.
        split: the set's own name for it: "test"; ImageNet's is "val". SUN397 and Caltech101 are read as a whole.

    Raises:
        ValueError: no such set, it does not lie there, or has another number of classes than it should.
    """
    if key not in benchmarks():
        raise ValueError(f"expected one of the sets {', '.join(benchmarks())}, got {key!r}")
    names = benchmarks()[key].names
    if key == "voc2007":
        files, marks = read_voc(Path(root), split)
        return ImageSet(key, files, marks, names)
    make, attribute = ARCHIVES[key]
    try:
        found = make(str(root), split)
    except (RuntimeError, OSError, ValueError) as error:
        raise ValueError(f"expected {key} with the split {split!r} in {root}, got {error}") from error
    classes = getattr(found, "classes", None) or found.categories
    if len(classes) != len(names):
        raise ValueError(f"{key}: expected {len(names)} classes in {root}, got {len(classes)}")
    labels = [item[1] if isinstance(item, tuple) else item for item in getattr(found, attribute)]
    pictures = PictureView(found, range(len(found)), part=lambda item: item[0])
    return ImageSet(key, pictures, torch.tensor(labels), names)


def read_image_set(source: str | Path, split: str | None = None) -> ImageSet:
    """A set in whichever form it is.

    Args:
        source: a folder with a metadata.jsonl, or with a folder for each class; `datasets:NAME` for one of the Hub;
            or `KEY:FOLDER`, such as `food101:/data/food101`, for an official archive.
        split: "train", "test" or another; None for all of a folder, the test split of the others.

    Raises:
        ValueError: none of these.
    """
    kind, colon, rest = str(source).partition(":")
    if colon and kind == "datasets":
        return read_hub(rest, split)
    if colon and kind in benchmarks():
        return read_benchmark(kind, rest, split or ("val" if kind == "imagenet" else "test"))
    folder = Path(source)
    if not folder.is_dir():
        expected = "a folder of pictures, datasets:NAME or KEY:FOLDER"
        raise ValueError(f"expected {expected}, KEY one of {', '.join(benchmarks())}, got {str(source)!r}")
    return read_metadata(folder, split) if (folder / METADATA).is_file() else read_class_folders(folder, split)


__all__ = [
    "IMAGENET_TEMPLATES",
    "POSITIVE",
    "Benchmark",
    "ImageSet",
    "benchmarks",
    "check_class_names",
    "read_benchmark",
    "read_image_set",
]
