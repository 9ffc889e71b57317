"""Pictures with boxes written as a folder that every reader of COCO's form takes."""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torchvision.ops import box_convert

from .detection import AnnotatedPicture

ANNOTATIONS = "annotations.json"


def place_picture(file: Path, folder: Path, taken: set[str], link: bool) -> str:
    """Put a picture into a folder, with a number behind its name if that is taken; returns the name."""
    name, number = file.name, 1
    while name in taken:
        number += 1
        name = f"{file.stem}-{number}{file.suffix}"
    taken.add(name)
    target = folder / name
    target.unlink(missing_ok=True)
    if link:
        os.symlink(file.resolve(), target)
    else:
        shutil.copyfile(file, target)
    return name


def write_coco(
    pictures: Mapping[str, Sequence[AnnotatedPicture]],
    names: Sequence[str],
    folder: str | os.PathLike,
    *,
    scores: Sequence[torch.Tensor] | None = None,
    link: bool = False,
) -> Path:
    """Write pictures and their objects as `annotations.json` in COCO's form beside `images/<source>/<picture>`.

    Args:
        pictures: of each source; a source is a folder's name.
        names: of the classes by number.
        scores: of each picture, source after source, (objects,), if a model made the boxes; kept as `score`.
        link: symbolic links to the pictures instead of copies.

    Returns:
        The file of annotations. It is written last, so that where it is, all pictures are.

    Raises:
        ValueError: no picture, a source that is no name of a folder, class numbers without a name, or not as many
            scores as pictures; OSError: not writable.
    """
    folder = Path(folder)
    count = sum(map(len, pictures.values()))
    if count == 0 or (scores is not None and len(scores) != count):
        raise ValueError(f"expected pictures, and scores for each, got {count} and {scores and len(scores)}")
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for source, rows in pictures.items():
        if Path(source).name != source or source in ("", ".", ".."):
            raise ValueError(f"expected the name of a folder as a source, got {source!r}")
        place, taken = folder / "images" / source, set[str]()
        place.mkdir(parents=True, exist_ok=True)
        for picture in rows:
            if picture.labels.numel() and not 0 <= int(picture.labels.min()) <= int(picture.labels.max()) < len(names):
                got = picture.labels.tolist()
                raise ValueError(f"{picture.file}: expected classes from 0 to {len(names) - 1}, got {got}")
            number = len(images) + 1
            name = place_picture(picture.file, place, taken, link)
            height, width = picture.size
            images.append(
                {"id": number, "file_name": f"images/{source}/{name}", "height": height, "width": width}
                | {"source": source}
            )
            given = [None] * len(picture.labels) if scores is None else scores[number - 1].tolist()
            boxes = box_convert(picture.boxes, "xyxy", "xywh").tolist()
            for box, label, crowd, score in zip(
                boxes, picture.labels.tolist(), picture.crowd.tolist(), given, strict=True
            ):
                row = {"id": len(annotations) + 1, "image_id": number, "category_id": label + 1, "bbox": box}
                row |= {"area": box[2] * box[3], "iscrowd": int(crowd)}
                annotations.append(row if score is None else row | {"score": round(score, 4)})
    categories = [{"id": number, "name": name} for number, name in enumerate(names, start=1)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    file = folder / ANNOTATIONS
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(content), "utf-8")
    os.replace(partial, file)
    return file


__all__ = ["write_coco"]
