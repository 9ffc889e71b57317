"""Pictures together with their boxes: read, augmented by torchvision's transforms, batched, and drawn."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F
from torchvision import tv_tensors
from torchvision.ops import box_convert
from torchvision.transforms import v2
from torchvision.utils import draw_bounding_boxes, make_grid

from ..image_processing_florence_detection import FlorenceDetectionImageProcessor
from .detection import AnnotatedPicture

AUGMENTATIONS = ("none", "flip", "multiscale", "jitter")
SCALES = (0.6, 1.2)  # of the shorter side, in multi-scale training: DETR's 480..800 of 800 pixels, and a little more
JITTER = (0.1, 2.0)  # of the picture against its full size (large-scale jitter, Ghiasi et al. 2021, section 4)
PER_OBJECT = ("labels", "crowd")
COLORS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#808000", "#000075", "#f032e6")


class CropToSize(v2.Transform):
    """Cut a random part out of a picture that is larger than `size`, (height, width); a smaller one stays as it is."""

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size

    def make_params(self, flat_inputs: list[Any]) -> dict[str, int]:
        """Where to cut: `top`, `left`, `height` and `width` in pixels."""
        picture = next(each for each in flat_inputs if isinstance(each, tv_tensors.Image))
        full = v2.functional.get_size(picture)
        height, width = (min(sides) for sides in zip(full, self.size, strict=True))
        top, left = (
            int(torch.randint(whole - part + 1, ())) for whole, part in zip(full, (height, width), strict=True)
        )
        return {"top": top, "left": left, "height": height, "width": width}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """As torchvision calls it, once for the picture and once for its boxes."""
        return self._call_kernel(v2.functional.crop, inpt, **params)


def _sanitized(sample: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    """What goes together with the boxes."""
    return tuple(sample[name] for name in PER_OBJECT)


def training_transforms(
    kind: str, shortest_edge: int, longest_edge: int, *, crop: float = 0.0, color: float = 0.0
) -> v2.Compose:
    """Augmentation of a sample as `read_sample` gives it; random choices come from torch's generator.

    Objects of which a crop leaves less than a pixel are left out, the others are cut at its edge.

    Args:
        kind: "none" resizes only; "flip" also mirrors half of the pictures; "multiscale" draws the shorter side
            from 60 % to 120 % of `shortest_edge`, and mirrors; "jitter" resizes to 10 % to 200 % of what would fit
            into a square of `longest_edge`, cuts that much out, and mirrors.
        shortest_edge, longest_edge: of the pictures that come out, in pixels: the shorter side is `shortest_edge`,
            unless the longer one would exceed `longest_edge`.
        crop: part of the pictures that first are cut around some of their objects, as SSD does.
        color: part of the pictures whose brightness, contrast, saturation and hue are changed.

    Raises:
        ValueError: another kind, sides that are not positive or in the wrong order, a part not from 0 to 1.
    """
    if kind not in AUGMENTATIONS:
        raise ValueError(f"augmentation: expected one of {', '.join(AUGMENTATIONS)}, got {kind!r}")
    if not 0 < shortest_edge <= longest_edge:
        raise ValueError(f"expected 0 < shortest_edge <= longest_edge, got {shortest_edge} and {longest_edge}")
    for name, part in (("crop", crop), ("color", color)):
        if not 0 <= part <= 1:
            raise ValueError(f"{name}: expected a part from 0 to 1, got {part}")
    steps: list[v2.Transform] = []
    if color:
        steps.append(v2.RandomApply([v2.RandomPhotometricDistort(p=1.0)], p=color))
    if crop:
        steps.append(v2.RandomApply([v2.RandomIoUCrop(), v2.SanitizeBoundingBoxes(labels_getter=_sanitized)], p=crop))
    if kind != "none":
        steps.append(v2.RandomHorizontalFlip())
    if kind == "jitter":
        square = (longest_edge, longest_edge)
        steps += [v2.ScaleJitter(square, scale_range=JITTER), CropToSize(square)]
    else:
        low, high = SCALES if kind == "multiscale" else (1.0, 1.0)
        sides = range(max(1, math.ceil(low * shortest_edge)), int(high * shortest_edge) + 1)
        steps.append(v2.RandomShortestSize(list(sides), max_size=longest_edge))
    # Resizing rounds the picture's size but not that of the boxes: what stands out by a fraction of a pixel is cut.
    steps += [v2.ClampBoundingBoxes(), v2.SanitizeBoundingBoxes(labels_getter=_sanitized)]
    return v2.Compose(steps)


def read_sample(picture: AnnotatedPicture, processor: FlorenceDetectionImageProcessor) -> dict[str, Any]:
    """A picture and its objects, as torchvision's transforms take them.

    Returns:
        `image` (3, height, width), uint8, upright; `boxes` (objects, 4), float32 corners in pixels; `labels`
        (objects,); `crowd` (objects,).

    Raises:
        ValueError: a picture that the processor refuses, or one that has another size by now.
    """
    pixels = processor.process_image(picture.file, str(picture.file))
    if tuple(pixels.shape[1:]) != picture.size:
        raise ValueError(f"{picture.file}: expected (height, width) {picture.size}, got {tuple(pixels.shape[1:])}")
    boxes = tv_tensors.BoundingBoxes(picture.boxes.float(), format="XYXY", canvas_size=picture.size)
    return {"image": tv_tensors.Image(pixels), "boxes": boxes, "labels": picture.labels, "crowd": picture.crowd}


def collate_samples(
    samples: Sequence[dict[str, Any]], processor: FlorenceDetectionImageProcessor, *, size_divisor: int = 32
) -> dict[str, Any]:
    """Samples of any sizes -> a batch for the detector: they are normalised and padded, not resized.

    Returns:
        `pixel_values` (batch, 3, height, width), `pixel_mask` (batch, height, width), and `labels`, for each picture
        `class_labels`, `boxes` as centre, width and height over the picture's size, and `iscrowd`.
    """
    batch = processor(
        [sample["image"].as_subclass(torch.Tensor) for sample in samples],
        do_resize=False,
        size_divisor=size_divisor,
        return_tensors="pt",
    )
    labels = []
    for sample in samples:
        height, width = sample["image"].shape[-2:]
        boxes = sample["boxes"].as_subclass(torch.Tensor)
        labels.append(
            {
                "class_labels": sample["labels"],
                "boxes": box_convert(boxes / boxes.new_tensor([width, height, width, height]), "xyxy", "cxcywh"),
                "iscrowd": sample["crowd"].long(),
            }
        )
    return {"pixel_values": batch["pixel_values"], "pixel_mask": batch["pixel_mask"], "labels": labels}


def draw_objects(
    image: torch.Tensor,
    boxes: torch.Tensor,
    labels: torch.Tensor,
    names: Sequence[str],
    scores: torch.Tensor | None = None,
    side: int = 320,
) -> torch.Tensor:
    """A picture with boxes and names, a colour a class.

    Args:
        image: (3, height, width), uint8.
        boxes: (objects, 4), corners in pixels; labels: (objects,); scores: (objects,) or None.
        names: of the classes by number.
        side: of the longer side in pixels, at least; a smaller picture is enlarged, so that names are legible.

    Returns:
        (3, height, width) times a whole number, uint8.
    """
    image = image.as_subclass(torch.Tensor)
    factor = max(1, math.ceil(side / max(image.shape[1:])))
    image = image.repeat_interleave(factor, dim=1).repeat_interleave(factor, dim=2)
    if len(boxes) == 0:
        return image
    numbers = labels.tolist()
    texts = [names[number] for number in numbers]
    if scores is not None:
        texts = [f"{text} {score:.2f}" for text, score in zip(texts, scores.tolist(), strict=True)]
    colors: list[Any] = [COLORS[number % len(COLORS)] for number in numbers]
    scaled = boxes.as_subclass(torch.Tensor) * factor
    return draw_bounding_boxes(
        image,
        scaled,
        texts,
        colors=colors,
        width=2,
        label_colors="white",
        label_background_colors=colors,
        fill_labels=True,
    )


def make_mosaic(pictures: Sequence[torch.Tensor], columns: int = 4, side: int = 320) -> torch.Tensor:
    """Pictures (3, height, width), uint8, of any sizes -> one picture, each fitted into a square of `side` pixels.

    Raises:
        ValueError: no picture.
    """
    if not pictures:
        raise ValueError("expected at least one picture, got none")
    tiles = []
    for picture in pictures:
        height, width = picture.shape[1:]
        scale = side / max(height, width)
        size = [max(1, round(height * scale)), max(1, round(width * scale))]
        small = v2.functional.resize(picture, size)
        tiles.append(F.pad(small, (0, side - size[1], 0, side - size[0]), value=255))
    return make_grid(torch.stack(tiles), nrow=columns, pad_value=255)


__all__ = [
    "CropToSize",
    "collate_samples",
    "draw_objects",
    "make_mosaic",
    "read_sample",
    "training_transforms",
]
