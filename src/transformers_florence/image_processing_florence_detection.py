# Copyright 2026 The transformers_florence authors. Licensed under the Apache License, Version 2.0.
"""The detector's image processor: pictures and COCO annotations to tensors and labels, predictions to boxes."""

import math
from collections.abc import Sequence
from operator import index
from typing import Any

import torch
from torch.nn import functional as F
from torchvision.ops import box_convert
from transformers.image_processing_backends import TorchvisionBackend
from transformers.image_processing_utils import BatchFeature, get_size_dict
from transformers.image_transforms import group_images_by_shape, reorder_images
from transformers.image_utils import PILImageResampling, SizeDict
from transformers.processing_utils import Unpack

from .box_ops import select_detections
from .image_processing_shared import FlorenceImageProcessorKwargs, PictureDoor, check_size, is_count


class FlorenceDetectionImageProcessorKwargs(FlorenceImageProcessorKwargs, total=False):  # type: ignore[call-arg]
    """Settings of the detector's image processor: those of `FlorenceImageProcessor`, and this one.

    Attributes:
        size_divisor: without `pad_size`, a batch is padded to the next multiple of this on both sides; 1 for no more
            than its largest picture needs.
    """

    size_divisor: int | None


def _label(target: Any, name: str, height: int, width: int) -> dict[str, torch.Tensor]:
    """COCO's annotations of one picture -> boxes (objects, 4) as corners in pixels, and what else a label holds.

    Raises:
        ValueError: not COCO's form; the message starts with `name`.
    """
    if not isinstance(target, dict) or not {"image_id", "annotations"} <= target.keys():
        got = sorted(map(str, target)) if isinstance(target, dict) else type(target).__name__
        raise ValueError(f"{name}: expected a dictionary with 'image_id' and 'annotations', got {got}")
    # A crowd's box covers many objects: as one object it would teach the wrong thing.
    try:
        rows = [item for item in target["annotations"] if not item.get("iscrowd", 0)]
        boxes = torch.tensor([item["bbox"] for item in rows], dtype=torch.float64).reshape(len(rows), 4)
        classes = torch.tensor([index(item["category_id"]) for item in rows], dtype=torch.long)
        areas = [item.get("area", item["bbox"][2] * item["bbox"][3]) for item in rows]
        image_id = torch.tensor([index(target["image_id"])])
        area = torch.tensor(areas, dtype=torch.float32)
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError, IndexError) as error:
        raise ValueError(
            f"{name}: expected annotations as COCO's, with 'bbox' (left, top, width, height) and 'category_id', and "
            f"whole numbers as ids, got something else: {error!r}"
        ) from error
    if not torch.isfinite(boxes).all() or (classes < 0).any():
        raise ValueError(f"{name}: expected finite boxes and class numbers from 0 on, got {target['annotations']}")
    corners = box_convert(boxes, "xywh", "xyxy")
    corners = torch.minimum(corners.clamp(min=0), corners.new_tensor([width, height, width, height]))
    kept = (corners[:, 2:] > corners[:, :2]).all(dim=1)
    return {
        "image_id": image_id,
        "class_labels": classes[kept],
        "boxes": corners[kept],
        "area": area[kept],
        "iscrowd": torch.zeros_like(classes[kept]),
        "orig_size": torch.tensor([height, width]),
    }


class FlorenceDetectionImageProcessor(PictureDoor, TorchvisionBackend):
    """Turns pictures into `pixel_values` and `pixel_mask`, COCO annotations into `labels`, predictions into boxes.

    The shortest side becomes 800 pixels unless the longest would exceed 1333 (bilinear); values are rescaled and
    normalised as ImageNet's, and a batch is zero-padded at the right and below. What counts as a picture is said at
    `FlorenceImageProcessor`. Pictures of different sizes fit into one batch of transformers' pipelines only with
    `pad_size`, since each is processed alone there.

    Args:
        kwargs: see `FlorenceDetectionImageProcessorKwargs`. `size` is `{"shortest_edge": n, "longest_edge": m}`,
            `{"shortest_edge": n}`, `{"max_height": n, "max_width": m}` or `{"height": n, "width": m}`; `pad_size` is
            `{"height": n, "width": m}`.
    """

    valid_kwargs = FlorenceDetectionImageProcessorKwargs
    model_input_names = ["pixel_values", "pixel_mask"]
    resample = PILImageResampling.BILINEAR
    size = {"shortest_edge": 800, "longest_edge": 1333}
    crop_size = None  # type: ignore[assignment]  # objects are never cut off
    do_center_crop = False
    do_pad = True
    size_divisor = 32

    def __init__(self, **kwargs: Unpack[FlorenceDetectionImageProcessorKwargs]):
        super().__init__(**kwargs)

    def _standardize_kwargs(
        self, size: Any = None, default_to_square: bool | None = None, size_divisor: int | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        settings = super()._standardize_kwargs(**kwargs)
        if size is not None and not isinstance(size, SizeDict):
            size = SizeDict(**get_size_dict(size, default_to_square=bool(default_to_square)))
        sides, edges, bounds = {"height", "width"}, {"shortest_edge", "longest_edge"}, {"max_height", "max_width"}
        check_size("size", size, edges, {"shortest_edge"}, bounds, sides)
        check_size("pad_size", settings["pad_size"], sides)
        size_divisor = self.size_divisor if size_divisor is None else size_divisor
        if not is_count(size_divisor):
            raise ValueError(f"size_divisor: expected a positive integer, got {size_divisor!r}")
        if settings.get("do_center_crop"):
            raise ValueError("do_center_crop: expected False, since objects would be cut off, got True")
        return settings | {"size": size, "size_divisor": size_divisor}

    def process_image(
        self, image: Any, name: str = "picture", device: str | torch.device | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """One picture -> uint8 `(3, height, width)` at its own size, on `device` or else where it was."""
        pixels = self.read_picture(image, name, **kwargs).contiguous()
        return pixels if device is None else pixels.to(device)

    def preprocess(self, images: Any, annotations: Any = None, **kwargs: Any) -> BatchFeature:
        """
        Args:
            images: one picture or a list of them.
            annotations: for each picture `{"image_id": int, "annotations": [{"bbox": [left, top, width, height],
                "category_id": int, "area": float, "iscrowd": 0 or 1}, ...]}`, boxes in pixels of the upright
                picture; one dictionary for one picture. Boxes are cut at the picture's edge; those outside of it and
                crowds are left out. `area` and `iscrowd` may be missing.
            kwargs: see `FlorenceDetectionImageProcessorKwargs`.

        Returns:
            pixel_values: (batch, 3, height, width), float32.
            pixel_mask: (batch, height, width), int64, 1 for pixels of the picture, if `do_pad`.
            labels, if there were annotations: for each picture `class_labels (objects,)`, `boxes (objects, 4)` as
            centre, width and height over the picture's size without padding, `area (objects,)` in pixels of the
            resized picture, `iscrowd`, `image_id`, `orig_size` and `size`, (height, width) before and after resizing.

        Raises:
            ValueError: pictures, annotations or settings that are refused, or not as many annotations as pictures.
        """
        return super().preprocess(images, annotations, **kwargs)

    def _preprocess(
        self,
        images: list[torch.Tensor],
        annotations: Any,
        do_resize: bool,
        size: SizeDict,
        resample: Any,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: Any,
        image_std: Any,
        do_pad: bool,
        pad_size: SizeDict | None,
        size_divisor: int,
        disable_grouping: bool | None,
        return_tensors: Any,
        **kwargs: Any,
    ) -> BatchFeature:
        labels = None
        if annotations is not None:
            annotations = [annotations] if isinstance(annotations, dict) else annotations
            if not isinstance(annotations, Sequence) or len(annotations) != len(images):
                got = len(annotations) if isinstance(annotations, Sequence) else type(annotations).__name__
                raise ValueError(f"expected the annotations of {len(images)} pictures, got {got}")
            labels = [
                _label(target, f"annotations of picture {number}", *image.shape[-2:])
                for number, (image, target) in enumerate(zip(images, annotations, strict=True))
            ]
        groups, order = group_images_by_shape(images, disable_grouping=disable_grouping)
        for shape, stacked in groups.items():
            if do_resize:
                stacked = self.resize(stacked, size=size, resample=resample)
            groups[shape] = self.rescale_and_normalize(
                stacked, do_rescale, rescale_factor, do_normalize, image_mean, image_std
            )
        pixels = reorder_images(groups, order)
        sizes = [tuple(picture.shape[-2:]) for picture in pixels]
        data: dict[str, Any] = {}
        if do_pad:
            largest = [math.ceil(max(sides) / size_divisor) * size_divisor for sides in zip(*sizes, strict=True)]
            height, width = largest if pad_size is None else (pad_size.height, pad_size.width)
            if any(rows > height or columns > width for rows, columns in sizes):
                raise ValueError(f"pad_size: expected room for pictures of {sizes} (height, width), got {pad_size}")
            data["pixel_mask"] = torch.zeros(len(pixels), height, width, dtype=torch.long, device=pixels[0].device)
            for mask, (rows, columns) in zip(data["pixel_mask"], sizes, strict=True):
                mask[:rows, :columns] = 1
            pixels = [F.pad(each, (0, width - each.shape[-1], 0, height - each.shape[-2])) for each in pixels]
        elif len(set(sizes)) > 1:
            raise ValueError(f"expected pictures of one size as do_pad is off, got {sizes} (height, width)")
        data["pixel_values"] = torch.stack(pixels)
        features = BatchFeature(data, tensor_type=return_tensors)
        if labels is not None:
            features["labels"] = [
                BatchFeature(self._finish_label(label, size), tensor_type=return_tensors)
                for label, size in zip(labels, sizes, strict=True)
            ]
        return features

    def _finish_label(self, label: dict[str, torch.Tensor], size: tuple[int, int]) -> dict[str, torch.Tensor]:
        """Boxes over the picture's size, which resizing does not change; areas as resizing to `size` leaves them."""
        height, width = label["orig_size"].tolist()
        scale = label["boxes"].new_tensor([width, height, width, height])
        boxes = box_convert(label["boxes"] / scale, "xyxy", "cxcywh")
        area = label["area"] * (math.prod(size) / (height * width))
        return label | {"boxes": boxes.float(), "area": area, "size": torch.tensor(size)}

    def post_process_object_detection(
        self,
        outputs: Any,
        threshold: float = 0.5,
        target_sizes: torch.Tensor | Sequence[tuple[int, int]] | None = None,
        top_k: int = 100,
        nms_threshold: float = 0.6,
    ) -> list[dict[str, torch.Tensor]]:
        """Predictions -> the detections of each picture, the best first.

        Dynamic Head's own evaluation asks a class for a probability of 0.05, before the centerness is multiplied on;
        `threshold=0.05` is the nearest here, and a little stricter.

        Args:
            outputs: what the model returned, or anything with its `logits` and `pred_boxes`.
            threshold: what the score must exceed.
            target_sizes: (height, width) of each picture, (batch, 2), for boxes in its pixels; None for boxes over
                the picture's size.
            top_k: how many detections a picture has at most.
            nms_threshold: boxes that overlap (IoU) more with a better one of their class are dropped.

        Returns:
            for each picture `scores (n,)`, `labels (n,)` and `boxes (n, 4)` as corners within the picture.

        Raises:
            ValueError: a threshold outside of 0..1, no detection asked for, or not as many sizes as pictures.
        """
        for name, value in (("threshold", threshold), ("nms_threshold", nms_threshold)):
            if not 0 <= value <= 1:
                raise ValueError(f"{name}: expected a number from 0 to 1, got {value!r}")
        if not is_count(top_k):
            raise ValueError(f"top_k: expected a positive integer, got {top_k!r}")
        scores, boxes = outputs.logits.sigmoid(), box_convert(outputs.pred_boxes, "cxcywh", "xyxy")
        if target_sizes is None:
            sizes = torch.ones(len(scores), 2)
        else:
            sizes = torch.tensor([[float(side) for side in size] for size in target_sizes]).reshape(-1, 2)
        if len(sizes) != len(scores):
            raise ValueError(f"expected the target_sizes of {len(scores)} pictures, got {len(sizes)}")
        factors = sizes.flip(1).repeat(1, 2).to(boxes)  # (batch, 4): width, height, width, height
        detections = []
        for found, factor in zip(
            select_detections(scores, boxes, threshold, top_k, nms_threshold), factors, strict=True
        ):
            within = found["boxes"].clamp(0, 1) * factor
            kept = (within[:, 2:] > within[:, :2]).all(dim=1)  # not those that lie in the padding
            detections.append({name: value[kept] for name, value in (found | {"boxes": within}).items()})
        return detections


__all__ = ["FlorenceDetectionImageProcessor", "FlorenceDetectionImageProcessorKwargs"]
