"""Pictures with captions: COCO's and Karpathy's JSON, Flickr8k's text file, metadata.jsonl, each to one list."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .files import check_pictures, check_text, load_json, metadata_rows, picture_inside


@dataclass(frozen=True)
class CaptionedPicture:
    """One picture.

    Attributes:
        file: where it lies.
        image_id: its number in the set, by which predictions and captions meet.
        captions: what people wrote about it, at least one.
    """

    file: Path
    image_id: int
    captions: tuple[str, ...]


def _captions(values: Any, where: str) -> tuple[str, ...]:
    """A text or a list of texts, without white space at their ends."""
    values = [values] if isinstance(values, str) else values
    if not isinstance(values, Sequence) or not values:
        raise ValueError(f"{where}: expected at least one caption, got {values!r}")
    return tuple(check_text(value, where, "a caption").strip() for value in values)


def _unique(pictures: list[CaptionedPicture], where: str) -> list[CaptionedPicture]:
    """The pictures, if there are any and their numbers differ."""
    if not pictures:
        raise ValueError(f"{where}: expected pictures with captions, got none")
    if len({picture.image_id for picture in pictures}) < len(pictures):
        raise ValueError(f"{where}: expected different numbers of pictures, got equal ones")
    return pictures


def read_coco_captions(file: str | os.PathLike, images: str | os.PathLike | None = None) -> list[CaptionedPicture]:
    """COCO's `captions_<split>.json`; pictures without a caption are left out.

    Args:
        images: folder of the pictures; that of the file if None.

    Raises:
        ValueError: not of this form, or no caption; OSError: not readable.
    """
    file = Path(file)
    root = file.parent if images is None else Path(images)
    captions: dict[int, list[str]] = {}
    try:
        content = load_json(file)
        for row in content["annotations"]:
            captions.setdefault(row["image_id"], []).append(row["caption"])
        found = [
            CaptionedPicture(
                picture_inside(root, row["file_name"], str(file)),
                row["id"],
                _captions(captions[row["id"]], f"{file}, picture {row['id']}"),
            )
            for row in content["images"]
            if row["id"] in captions
        ]
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: expected COCO's images and annotations with captions, got {error!r}") from error
    return _unique(found, str(file))


def read_karpathy(
    file: str | os.PathLike, split: str | None = None, images: str | os.PathLike | None = None
) -> list[CaptionedPicture]:
    """Karpathy's `dataset_<name>.json` of COCO, Flickr8k or Flickr30k.

    Args:
        split: "train", "val", "test", or several with a plus: "train+restval" is what COCO is trained on; None for
            all.
        images: folder of the pictures, or, for COCO, of its folders; that of the file if None.

    Raises:
        ValueError: not of this form, or no picture of the split; OSError: not readable.
    """
    file = Path(file)
    root = file.parent if images is None else Path(images)
    wanted = None if split is None else set(split.split("+"))
    found = []
    try:
        for row in load_json(file)["images"]:
            if wanted is not None and row["split"] not in wanted:
                continue
            where = f"{file}, picture {row['imgid']}"
            name = os.path.join(row.get("filepath", ""), row["filename"])
            captions = _captions([sentence["raw"] for sentence in row["sentences"]], where)
            found.append(CaptionedPicture(picture_inside(root, name, where), row["imgid"], captions))
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: expected Karpathy's images with sentences, got {error!r}") from error
    return _unique(found, f"{file}, split {split}")


def read_flickr8k(
    file: str | os.PathLike, listing: str | os.PathLike | None = None, images: str | os.PathLike | None = None
) -> list[CaptionedPicture]:
    """Flickr8k's `Flickr8k.token.txt`: lines of `<picture>#<number>`, a tab and a caption; Flickr30k's is alike.

    Args:
        listing: a file with the pictures of a split, such as `Flickr_8k.trainImages.txt`; None for all.
        images: folder of the pictures; that of the file if None.

    Raises:
        ValueError: not of this form, or no caption; OSError: not readable.
    """
    file = Path(file)
    root = file.parent if images is None else Path(images)
    wanted = None if listing is None else set(Path(listing).read_text("utf-8").split())
    captions: dict[str, list[str]] = {}
    for number, line in enumerate(file.read_text("utf-8").splitlines(), start=1):
        name, _, caption = line.partition("\t")
        name, sign, _ = name.rpartition("#")
        if not sign or not caption:
            raise ValueError(
                f"{file}, line {number}: expected a picture, #, a number, a tab and a caption, got {line!r}"
            )
        if wanted is None or name in wanted:
            captions.setdefault(name, []).append(caption)
    found = [
        CaptionedPicture(picture_inside(root, name, str(file)), number, _captions(values, f"{file}, {name}"))
        for number, (name, values) in enumerate(captions.items())
    ]
    return _unique(found, str(file))


def read_metadata_captions(path: str | os.PathLike, split: str | None = None) -> list[CaptionedPicture]:
    """A metadata.jsonl: a row a picture, with `file_name` and `captions`, a list, or `text`; others are left out.

    Args:
        path: the file, or its folder.
        split: rows whose `split` says so; None for all.

    Raises:
        ValueError: not of this form, or no caption; OSError: not readable.
    """
    found: list[CaptionedPicture] = []
    for where, file, row in metadata_rows(Path(path), split):
        values = row.get("captions") or row.get("text")
        if values:
            found.append(CaptionedPicture(file, len(found), _captions(values, where)))
    return _unique(found, f"{path}, split {split}")


def read_captions(
    path: str | os.PathLike, split: str | None = None, *, images: str | os.PathLike | None = None
) -> list[CaptionedPicture]:
    """Read a set in whichever of the four forms it is.

    Args:
        path: COCO's or Karpathy's JSON; Flickr8k's text file; a metadata.jsonl or its folder.
        split: see the readers; of Flickr8k, the file that lists its pictures; None for everything.
        images: folder of the pictures, if it is not that of the file.

    Raises:
        ValueError: none of these, not of its form, or pictures are missing; OSError: not readable.
    """
    path = Path(path)
    if path.is_dir() or path.suffix == ".jsonl":
        found = read_metadata_captions(path, split)
    elif path.suffix == ".txt":
        found = read_flickr8k(path, split, images)
    elif path.suffix == ".json" and "annotations" not in load_json(path):
        found = read_karpathy(path, split, images)
    elif path.suffix == ".json" and split is None:
        found = read_coco_captions(path, images)
    elif path.suffix == ".json":
        raise ValueError(f"split: expected none for one file of COCO, as it holds one split, got {split!r}")
    else:
        raise ValueError(f"expected a folder, a .json, .jsonl or .txt file, got {path}")
    check_pictures(picture.file for picture in found)
    return found


def all_captions(pictures: Iterable[CaptionedPicture]) -> list[str]:
    """Every caption of every picture."""
    return [caption for picture in pictures for caption in picture.captions]


__all__ = [
    "CaptionedPicture",
    "all_captions",
    "read_captions",
    "read_coco_captions",
    "read_flickr8k",
    "read_karpathy",
    "read_metadata_captions",
]
