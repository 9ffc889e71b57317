"""Pictures with boxes in one form, whatever files they come from, with their faults counted.

The form: boxes as corners (left, top, right, bottom) in pixels of the upright picture, float64; class numbers from 0
on, without gaps. A reader (`detection_readers`) gives what the files say; `validate_annotations` makes it sound or
refuses it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import ExifTags, Image
from torchvision.ops import box_convert

from ..image_checks import PICTURE_FORMATS

MODES = ("raise", "clip", "drop")
# Two exporters rarely round alike: what leaves the picture by no more than this is cut in every mode, uncounted.
EDGE_TOLERANCE = 1.0  # pixels
SIDEWAYS = (5, 6, 7, 8)  # orientations that swap width and height once a picture is turned upright
FAULTS = {
    "orphan": "an object of a picture that is not listed",
    "no_picture": "a picture that is missing or cannot be opened",
    "wrong_size": "a picture of another size than its annotations say, so that its boxes cannot be trusted",
    "unknown_class": "an object of a class without a name, or of none of the wanted classes",
    "not_finite": "a box with NaN or infinity",
    "negative_size": "a box whose right side is left of its left one, or its bottom above its top",
    "zero_area": "a box of no width or no height",
    "outside": "a box that does not touch the picture",
    "beyond_edge": "a box that leaves the picture by more than a pixel",
}


@dataclass(frozen=True)
class RawObject:
    """One object as a file has it: the name of its class (None: it has none), corners in pixels, crowd or not.

    `crowd` is whatever is neither to be learnt nor to be found: COCO's crowds, VOC's difficult objects.
    """

    name: str | None
    box: tuple[float, float, float, float]
    crowd: bool = False


@dataclass(frozen=True)
class RawPicture:
    """One picture as the files have it; `size` is the (height, width) that they say, if they do."""

    file: Path
    size: tuple[float, float] | None
    objects: list[RawObject]


@dataclass(frozen=True)
class RawAnnotations:
    """What a reader returns: class names in the order of their ids, pictures, and what only the reader can see.

    id_gaps: numbers between the lowest and the highest class id that no class has. They do no harm, as classes are
    numbered anew, but often tell of a set that was filtered.
    orphans: places of objects whose picture is not listed.
    """

    names: list[str]
    pictures: list[RawPicture]
    id_gaps: list[int] = field(default_factory=list)
    orphans: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class AnnotatedPicture:
    """One sound picture.

    Attributes:
        file: where it lies.
        image_id: its place among the pictures that were read.
        size: (height, width) of the upright picture, in pixels.
        boxes: (objects, 4), float64, corners within the picture, in pixels.
        labels: (objects,), int64, places in the set's names.
        crowd: (objects,), bool: neither to be learnt nor to be found, such as one box around many objects.
    """

    file: Path
    image_id: int
    size: tuple[int, int]
    boxes: torch.Tensor
    labels: torch.Tensor
    crowd: torch.Tensor

    def coco(self) -> dict[str, Any]:
        """As `FlorenceDetectionImageProcessor` takes annotations."""
        sides = box_convert(self.boxes, "xyxy", "xywh").tolist()
        rows = zip(sides, self.labels.tolist(), self.crowd.tolist(), strict=True)
        objects = [{"bbox": box, "category_id": label, "iscrowd": int(crowd)} for box, label, crowd in rows]
        return {"image_id": self.image_id, "annotations": objects}


@dataclass(frozen=True)
class AnnotationReport:
    """What was found wrong and what was kept.

    Attributes:
        mode: of `validate_annotations`.
        pictures, objects: (kept, read).
        faults: kind, one of `FAULTS` -> where it was found; each object counts once, for the first that fits.
        id_gaps: as in `RawAnnotations`.
    """

    mode: str
    pictures: tuple[int, int]
    objects: tuple[int, int]
    faults: dict[str, list[str]]
    id_gaps: list[int]

    @property
    def counts(self) -> dict[str, int]:
        """How many there are of each kind of fault that there is."""
        return {kind: len(places) for kind, places in self.faults.items()}

    def __str__(self) -> str:
        kept = "{} of {} pictures and {} of {} objects kept ({})"
        lines = [kept.format(*self.pictures, *self.objects, self.mode)]
        for kind, places in self.faults.items():
            more = ", ..." if len(places) > 3 else ""
            lines.append(f"{len(places)} x {kind} ({FAULTS[kind]}): {', '.join(places[:3])}{more}")
        if self.id_gaps:
            lines.append(f"class ids that no class has: {', '.join(map(str, self.id_gaps))}")
        return "\n".join(lines)


@dataclass(frozen=True)
class DetectionSet:
    """Sound pictures, the names of their classes by number, and the report on how they became sound."""

    names: list[str]
    pictures: list[AnnotatedPicture]
    report: AnnotationReport


def picture_size(file: Path) -> tuple[int, int]:
    """(height, width) of a picture once it is upright, from its header.

    Raises:
        ValueError: it is missing or cannot be opened.
    """
    try:
        with Image.open(file, formats=PICTURE_FORMATS) as picture:
            width, height = picture.size
            sideways = picture.getexif().get(ExifTags.Base.Orientation) in SIDEWAYS
    except Exception as error:  # bytes from anywhere: decoders raise whatever they like
        raise ValueError(f"{file}: expected a picture, got {error!r}") from error
    return (width, height) if sideways else (height, width)


def check_names(names: Sequence[Any], where: str) -> list[str]:
    """Names of classes as texts. Raises ValueError if two are equal."""
    names = [str(name) for name in names]
    if len(set(names)) < len(names):
        raise ValueError(f"{where}: expected different names of classes, got {sorted(names)}")
    return names


def _check_objects(
    objects: list[RawObject], numbers: Mapping[str | None, int], size: tuple[int, int], mode: str
) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], dict[str, list[int]]]:
    """Boxes, labels and crowd of those that stay, and kind of fault -> places in `objects`."""
    boxes = torch.tensor([each.box for each in objects], dtype=torch.float64).reshape(-1, 4)
    labels = torch.tensor([numbers.get(each.name, -1) for each in objects], dtype=torch.long)
    crowd = torch.tensor([each.crowd for each in objects], dtype=torch.bool)
    height, width = size
    limit = boxes.new_tensor([width, height, width, height])
    within = torch.minimum(boxes.clamp(min=0), limit)
    sides, left = boxes[:, 2:] - boxes[:, :2], within[:, 2:] - within[:, :2]
    found = {
        "unknown_class": labels < 0,
        "not_finite": ~torch.isfinite(boxes).all(dim=1),
        "negative_size": (sides < 0).any(dim=1),
        "zero_area": (sides == 0).any(dim=1),
        "outside": (left <= 0).any(dim=1),
        "beyond_edge": ((boxes - within).abs() > EDGE_TOLERANCE).any(dim=1),
    }
    sound, places = torch.ones(len(objects), dtype=torch.bool), {}
    for kind, flags in found.items():
        places[kind] = (flags & sound).nonzero().flatten().tolist()
        sound &= ~flags
    if mode == "clip":
        sound[places["beyond_edge"]] = True
    return (within[sound], labels[sound], crowd[sound]), places


def validate_annotations(raw: RawAnnotations, mode: str = "clip", names: Sequence[str] | None = None) -> DetectionSet:
    """Look at every picture and every box; see `FAULTS` for what is a fault.

    A picture without (sound) objects stays, as background: it teaches too.

    Args:
        mode: "raise" refuses a set with a fault; "clip" cuts boxes at the picture's edge and leaves out what cannot
            be cut; "drop" leaves out whatever is faulty. A picture that is missing or of another size is left out
            whole.
        names: the classes by number, such as those of the training set; those of `raw` if None.

    Raises:
        ValueError: another mode, equal names, no picture left, or in mode "raise" the report.
    """
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
    names = check_names(raw.names if names is None else names, "names")
    numbers: dict[str | None, int] = {name: number for number, name in enumerate(names)}
    faults: dict[str, list[str]] = {kind: [] for kind in FAULTS} | {"orphan": list(raw.orphans)}
    pictures = []
    for image_id, picture in enumerate(raw.pictures):
        try:
            size = picture_size(picture.file)
        except ValueError:
            faults["no_picture"].append(picture.file.name)
            continue
        if picture.size is not None and picture.size != size:
            said, is_so = (f"{width:g}x{height:g}" for height, width in (picture.size, size))
            faults["wrong_size"].append(f"{picture.file.name} ({is_so}, annotated as {said})")
            continue

        parts, found = _check_objects(picture.objects, numbers, size, mode)
        for kind, places in found.items():
            faults[kind] += [f"{picture.file.name} object {place}" for place in places]
        pictures.append(AnnotatedPicture(picture.file, image_id, size, *parts))
    report = AnnotationReport(
        mode,
        (len(pictures), len(raw.pictures)),
        (
            sum(len(picture.labels) for picture in pictures),
            sum(len(picture.objects) for picture in raw.pictures) + len(raw.orphans),
        ),
        {kind: places for kind, places in faults.items() if places},
        raw.id_gaps,
    )
    if mode == "raise" and report.faults:
        raise ValueError(f"expected annotations without a fault, got:\n{report}")
    if not pictures:
        raise ValueError(f"expected pictures, got none that can be used:\n{report}")
    return DetectionSet(names, pictures, report)


__all__ = [
    "AnnotatedPicture",
    "AnnotationReport",
    "DetectionSet",
    "RawAnnotations",
    "RawObject",
    "RawPicture",
    "check_names",
    "picture_size",
    "validate_annotations",
]
