"""Readers of pictures with boxes: COCO, Pascal VOC, YOLO and metadata.jsonl, each to `RawAnnotations`."""

import glob
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import yaml

from .detection import RawAnnotations, RawObject, RawPicture, check_names, picture_size
from .files import picture_inside

SPLIT_NAMES = ({"val", "valid", "validation", "dev"},)  # different words for one split
VOC_FOLDERS = (("Annotations", "JPEGImages"), ("annotations", "images"), ("annots", "images"))
MAX_GAPS = 1000  # of the numbers that are listed as missing
SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


def _numbers(values: Any, where: str, count: int = 4) -> list[float]:
    """`count` numbers, finite or not. Raises ValueError for anything else, a truth value or a text among them."""
    sound = isinstance(values, Sequence) and len(values) == count
    if not sound or any(isinstance(value, bool) or not isinstance(value, int | float) for value in values):
        raise ValueError(f"{where}: expected {count} numbers, got {values!r}")
    try:
        return [float(value) for value in values]
    except OverflowError as error:  # JSON's whole numbers have no end
        raise ValueError(f"{where}: expected {count} numbers, got a larger one than a float can hold") from error


def _size(row: Mapping[str, Any], where: str) -> tuple[float, float] | None:
    """Height and width that a row says, if it says both."""
    sides = [row.get("height"), row.get("width")]
    if None in sides:
        return None
    height, width = _numbers(sides, where, 2)
    return height, width


def _corners(values: Any, where: str) -> tuple[float, float, float, float]:
    """Left, top, width and height -> corners."""
    left, top, width, height = _numbers(values, where)
    return left, top, left + width, top + height


def _gaps(ids: Iterable[int]) -> list[int]:
    """Numbers between the lowest and the highest id that are no ids, the first ones of many."""
    missing = (number for low, high in pairwise(sorted(ids)) for number in range(low + 1, high))
    return list(islice(missing, MAX_GAPS))


def _spellings(split: str) -> list[str]:
    """A split's name, then other words for it."""
    others = next((names for names in SPLIT_NAMES if split in names), {split})
    return [split, *sorted(others - {split})]


def _find(folder: Path, split: str, *patterns: str) -> Path | None:
    """The first file or folder of a split that is there; `{}` in the patterns stands for the split's name."""
    paths = (folder / pattern.format(name) for name in _spellings(split) for pattern in patterns)
    return next((path for path in paths if path.exists()), None)


def read_coco(file: str | os.PathLike, root: str | os.PathLike | None = None) -> RawAnnotations:
    """COCO's instances JSON.

    Args:
        root: folder of the pictures; that of the file if None.

    Raises:
        ValueError: not of this form; OSError: not readable.
    """
    file = Path(file)
    root = file.parent if root is None else Path(root)
    try:
        content = json.loads(file.read_text("utf-8"))
        categories = {int(row["id"]): str(row["name"]) for row in content["categories"]}
        pictures = {
            row["id"]: RawPicture(picture_inside(root, row["file_name"], str(file)), _size(row, str(file)), [])
            for row in content["images"]
        }
        if len(pictures) < len(content["images"]) or len(categories) < len(content["categories"]):
            raise ValueError(f"{file}: expected different ids of pictures and of categories, got equal ones")
        orphans = []
        for number, row in enumerate(content.get("annotations", [])):
            where = f"annotation {row.get('id', number)}"
            if row["image_id"] not in pictures:
                orphans.append(f"{where} of picture {row['image_id']}")
                continue
            box = _corners(row["bbox"], f"{file}, {where}")
            name, crowd = categories.get(row["category_id"]), bool(row.get("iscrowd", 0))
            pictures[row["image_id"]].objects.append(RawObject(name, box, crowd))
    except (AttributeError, KeyError, OverflowError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file}: expected COCO's images, annotations and categories, got {error!r}") from error
    names = check_names([categories[number] for number in sorted(categories)], str(file))
    return RawAnnotations(names, list(pictures.values()), _gaps(categories), orphans)


class _NoDoctype(ElementTree.TreeBuilder):
    """Refuses entities before there are any: annotations have no use for a document type."""

    def doctype(self, name: str, public: str | None, system: str | None) -> None:
        raise ValueError(f"expected XML without a document type, got one named {name!r}")


def _parse_voc(file: Path, root: Path, one_based: bool) -> RawPicture:
    """One XML file, of a picture in `root`."""
    try:
        tree = ElementTree.fromstring(file.read_bytes(), ElementTree.XMLParser(target=_NoDoctype()))
        sides = [float(tree.findtext(f"size/{side}") or 0) for side in ("height", "width")]
        objects = []
        for element in tree.iter("object"):
            box = element.find("bndbox")
            if box is None:
                raise ValueError("an object without bndbox")
            sides_of_box = [float(box.findtext(name) or "nan") for name in ("xmin", "ymin", "xmax", "ymax")]
            left, top, right, bottom = sides_of_box
            shift = 1.0 if one_based else 0.0
            difficult = float(element.findtext("difficult") or 0) != 0
            corners = (left - shift, top - shift, right, bottom)
            objects.append(RawObject(element.findtext("name"), corners, crowd=difficult))
    except (ElementTree.ParseError, ValueError) as error:
        raise ValueError(f"{file}: expected an annotation of Pascal VOC, got {error}") from error
    picture = picture_inside(root, tree.findtext("filename") or file.stem, str(file))
    if not picture.is_file():  # tools that convert pictures often leave their old names in the XML
        picture = next(
            (path for path in root.glob(f"{glob.escape(file.stem)}.*") if path.suffix.lower() in SUFFIXES), picture
        )
    return RawPicture(picture, (sides[0], sides[1]) if all(sides) else None, objects)


def read_voc(folder: str | os.PathLike, split: str | None = None, *, one_based: bool = True) -> RawAnnotations:
    """Pascal VOC's XML files: in folders named as `VOC_FOLDERS` says, or beside their pictures.

    An object marked as difficult is taken as a crowd: neither learnt nor to be found, as in VOC's own evaluation.

    Args:
        split: listed in `ImageSets/Main/<split>.txt`, or a folder of that name; None for everything.
        one_based: count pixels from 1 and mean the last one included, as VOC does; else corners are taken as they
            are.

    Raises:
        ValueError: not of this form, no XML file, or one with a document type; OSError: not readable.
    """
    root = folder = Path(folder)
    listing = None if split is None else _find(folder, split, "ImageSets/Main/{}.txt")
    if split is not None and listing is None:
        found = _find(folder, split, "{}")
        if found is None:
            raise ValueError(f"{folder}: expected ImageSets/Main/{split}.txt or a folder {split}, got neither")
        root = folder = found
    parallel = next((names for names in VOC_FOLDERS if (folder / names[0]).is_dir()), None)
    if parallel is not None:
        root, folder = folder / parallel[1], folder / parallel[0]
    files = sorted(folder.glob("*.xml"))
    if listing is not None:
        stems = {line.split()[0] for line in listing.read_text("utf-8").splitlines() if line.strip()}
        files = [file for file in files if file.stem in stems]
    if not files:
        raise ValueError(f"{folder}: expected XML files, got none")
    pictures = [_parse_voc(file, root, one_based) for file in files]
    return RawAnnotations(_names_of(pictures), pictures)


def _names_of(pictures: Iterable[RawPicture]) -> list[str]:
    """The names that occur, sorted: for forms that list none."""
    return sorted({each.name for picture in pictures for each in picture.objects if each.name is not None})


def _parse_yolo(line: str, names: Mapping[int, str], size: tuple[int, int], where: str) -> RawObject:
    """`class centre-x centre-y width height` over the picture's size, or `class x y x y x y ...`, a polygon."""
    try:
        number, *values = [float(word) for word in line.split()]
    except ValueError as error:
        raise ValueError(f"{where}: expected numbers, got {line!r}") from error
    if len(values) == 4:
        x, y, width, height = values
        box = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
    elif len(values) >= 6 and len(values) % 2 == 0:
        box = (min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2]))
    else:
        raise ValueError(f"{where}: expected a class and a box of 4 numbers or a polygon, got {line!r}")
    height, width = size
    scaled = (box[0] * width, box[1] * height, box[2] * width, box[3] * height)
    return RawObject(names.get(int(number)) if number.is_integer() else None, scaled)


def read_yolo(file: str | os.PathLike, split: str = "train") -> RawAnnotations:
    """YOLO's data.yaml, with `images` and `labels` in parallel folders; no label file means no objects.

    Args:
        split: key of the YAML file, for a folder of pictures or a list of them.

    Raises:
        ValueError: not of this form, or a folder without pictures; OSError: not readable.
    """
    file = Path(file)
    try:
        content = yaml.safe_load(file.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: expected YAML, got {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("names"), list | dict):
        raise ValueError(f"{file}: expected names of classes and folders of splits, got neither")
    names = content["names"]
    if isinstance(names, dict) and not all(isinstance(key, int) for key in names):
        raise ValueError(f"{file}: expected whole numbers as keys of names, got {list(names)}")
    classes = {int(key): str(name) for key, name in (names.items() if isinstance(names, dict) else enumerate(names))}
    key = next((name for name in _spellings(split) if content.get(name)), None)
    folders = content[key] if key is not None else None
    folders = [folders] if isinstance(folders, str) else folders
    if not isinstance(folders, list) or not all(isinstance(name, str) for name in folders):
        raise ValueError(f"{file}: expected a folder of pictures under {split!r}, got {folders!r}")
    root, pictures = file.parent / str(content.get("path") or "."), []
    for name in folders:
        # Roboflow writes `../train/images` beside the very folder `train`.
        trials = (root / name, file.parent / name, file.parent / name.removeprefix("../"))
        folder = next((path for path in trials if path.is_dir()), None)
        if folder is None:
            raise ValueError(f"{file}: expected a folder of pictures at {root / name}, got none")
        images = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
        if not images:
            raise ValueError(f"{folder}: expected pictures, got none")
        for image in images:
            parts = list(image.parts)
            places = [place for place, part in enumerate(parts) if part == "images"]
            if places:
                parts[places[-1]] = "labels"
            labels = Path(*parts).with_suffix(".txt")
            lines = labels.read_text("utf-8").splitlines() if labels.is_file() else []
            try:
                size = picture_size(image)
            except ValueError:
                size = (1, 1)  # the validator leaves the picture out, with its objects
            objects = [
                _parse_yolo(line, classes, size, f"{labels}, line {number}")
                for number, line in enumerate(lines, start=1)
                if line.strip()
            ]
            pictures.append(RawPicture(image, None, objects))
    ordered = check_names([classes[number] for number in sorted(classes)], str(file))
    return RawAnnotations(ordered, pictures, _gaps(classes))


def _metadata_objects(row: Mapping[str, Any], where: str) -> list[RawObject]:
    """`boxes: [{label, bbox}]`, or `objects: {bbox: [...], categories: [...]}` as `datasets`' imagefolder has it."""
    boxes = row.get("boxes")
    if boxes is None:
        columns = row.get("objects") or {"bbox": [], "categories": []}
        labels = columns.get("categories", columns.get("category", columns.get("label")))
        if not isinstance(labels, list) or len(labels) != len(columns["bbox"]):
            raise ValueError(f"{where}: expected as many categories as boxes, got {labels!r}")
        boxes = [{"label": label, "bbox": box} for label, box in zip(labels, columns["bbox"], strict=True)]
    objects = []
    for each in boxes:
        label = each.get("label")
        name = None if label is None else str(label)
        objects.append(RawObject(name, _corners(each["bbox"], where), bool(each.get("iscrowd", 0))))
    return objects


def read_metadata(path: str | os.PathLike, split: str | None = None) -> RawAnnotations:
    """A metadata.jsonl: a row a picture, `file_name` and its boxes as (left, top, width, height) in pixels.

    Objects are `boxes: [{"label": name, "bbox": [...]}]`, or `objects: {"bbox": [...], "categories": [...]}`.

    Args:
        path: the file, or its folder.
        split: rows whose `split` says so, or a folder of that name with a metadata.jsonl; None for all rows.

    Raises:
        ValueError: not of this form, or no row of the split; OSError: not readable.
    """
    file = Path(path)
    if file.is_dir():
        inner = None if split is None else _find(file, split, "{}/metadata.jsonl")
        file, split = (file / "metadata.jsonl", split) if inner is None else (inner, None)
    wanted = None if split is None else set(_spellings(split))
    try:
        lines = file.read_text("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: expected UTF-8, got {error}") from error
    pictures, splits = [], set()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            row = json.loads(line)
            splits.add(row.get("split"))
            if wanted is None or row.get("split") in wanted:
                picture = picture_inside(file.parent, row["file_name"], where)
                pictures.append(RawPicture(picture, _size(row, where), _metadata_objects(row, where)))
        except (AttributeError, KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{where}: expected a row with file_name and boxes, got {error!r}") from error
    if not pictures:
        raise ValueError(f"{file}: expected rows of the split {split}, got the splits {sorted(map(str, splits))}")
    return RawAnnotations(_names_of(pictures), pictures)


def read_annotations(path: str | os.PathLike, split: str | None = None) -> RawAnnotations:
    """Read a set in whichever of the four forms it is.

    Args:
        path: COCO's JSON file; YOLO's YAML file; a metadata.jsonl; or a folder with a metadata.jsonl, with VOC's
            XML files, with a data.yaml, or with `<split>/_annotations.coco.json`.
        split: "train", "valid" or another; None for everything that is there (with YOLO: "train").

    Raises:
        ValueError: none of these, or not of its form; OSError: not readable.
    """
    path = Path(path)
    if path.is_dir():
        coco = _find(path, split, "{}/_annotations.coco.json") if split else None
        files = [file for file in (coco, path / "data.yaml") if file is not None and file.is_file()]
        metadata = path / "metadata.jsonl"
        if metadata.is_file() or (split and _find(path, split, "{}/metadata.jsonl")):
            return read_metadata(path, split)
        if not files:
            return read_voc(path, split)
        path = files[0]
        split = None if path == coco else split
    if path.suffix in (".yaml", ".yml"):
        return read_yolo(path, split or "train")
    if path.suffix == ".jsonl":
        return read_metadata(path, split)
    if path.suffix == ".json" and split is None:
        return read_coco(path)
    if path.suffix == ".json":
        raise ValueError(f"split: expected none for one COCO file, as it holds one split, got {split!r}")
    raise ValueError(f"expected a folder, or a .json, .jsonl or .yaml file, got {path}")


__all__ = ["read_annotations", "read_coco", "read_metadata", "read_voc", "read_yolo"]
