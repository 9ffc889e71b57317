"""COCO's average precision of a detector, as a whole and class by class (Florence section 3.6).

Needs the extra `detection`.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torchmetrics.detection import MeanAveragePrecision
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..data.detection import AnnotatedPicture
from ..image_processing_florence_detection import FlorenceDetectionImageProcessor

SUMMARY = ("map", "map_50", "map_75", "map_small", "map_medium", "map_large", "mar_100")


@dataclass(frozen=True)
class ClassScore:
    """Of one class: how many objects there are (without crowds), and its average precision, NaN if there are none.

    precision: mean over the overlaps 0.5, 0.55 .. 0.95; precision_50: at 0.5.
    """

    name: str
    objects: int
    precision: float
    precision_50: float


@dataclass(frozen=True)
class DetectionScores:
    """COCO's numbers, in 0..1; NaN where there is no object to be found.

    Attributes:
        map: mean over classes and the overlaps 0.5, 0.55 .. 0.95; map_50, map_75: at one overlap; map_small,
            map_medium, map_large: of objects below 32^2 pixels, up to 96^2, and above.
        mar_100: recall with at most 100 detections a picture, mean over classes and overlaps.
        classes: each class's own, by number.
    """

    map: float
    map_50: float
    map_75: float
    map_small: float
    map_medium: float
    map_large: float
    mar_100: float
    classes: list[ClassScore]

    def numbers(self) -> dict[str, float]:
        """Name -> number, those of the whole that are numbers."""
        return {name: getattr(self, name) for name in SUMMARY if not math.isnan(getattr(self, name))}

    def as_dict(self) -> dict[str, Any]:
        """For JSON: None in the place of NaN."""

        def plain(value: Any) -> Any:
            return None if isinstance(value, float) and math.isnan(value) else value

        content = {name: plain(value) for name, value in asdict(self).items() if name != "classes"}
        return content | {"classes": [{key: plain(v) for key, v in asdict(row).items()} for row in self.classes]}

    def table(self) -> str:
        """Classes with their objects and average precisions in per cent, the mean last, as text in columns."""
        mean = ClassScore("all", sum(row.objects for row in self.classes), self.map, self.map_50)
        width = max(len(row.name) for row in [*self.classes, mean])
        lines = [f"{'class':<{width}}  objects     AP   AP50"]
        for row in [*self.classes, mean]:
            cells = (
                f"{100 * value:5.1f}" if not math.isnan(value) else "    -"
                for value in (row.precision, row.precision_50)
            )
            lines.append(f"{row.name:<{width}}  {row.objects:>7}  {'  '.join(cells)}")
        return "\n".join(lines)


def _number(value: Any) -> float:
    """COCO says -1 for what cannot be measured."""
    return float(value) if float(value) >= 0 else math.nan


class DetectionEvaluator:
    """Collects detections and objects, and scores them as COCO's own evaluation does.

    Args:
        names: of the classes by number.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        # torchmetrics' own thresholds are rounded to float32, which moves scores by up to 1e-3 from COCO's.
        self.metric = MeanAveragePrecision(
            backend="faster_coco_eval",
            iou_thresholds=np.linspace(0.5, 0.95, 10).tolist(),
            rec_thresholds=np.linspace(0, 1, 101).tolist(),
            extended_summary=True,
            sync_on_compute=False,  # one process may evaluate while others wait
        )
        self.metric.warn_on_many_detections = False  # only the best 100 of a picture count, as in COCO
        self.objects = torch.zeros(len(self.names), dtype=torch.long)

    def update(self, detections: Sequence[dict[str, torch.Tensor]], pictures: Sequence[AnnotatedPicture]) -> None:
        """Add pictures.

        Args:
            detections: for each picture `scores (n,)`, `labels (n,)` and `boxes (n, 4)` as corners in its pixels, as
                `post_process_object_detection` gives them.
            pictures: what there was to be found.

        Raises:
            ValueError: not as many of one as of the other, or class numbers without a name.
        """
        if len(detections) != len(pictures):
            raise ValueError(f"expected the detections of {len(pictures)} pictures, got {len(detections)}")
        targets = []
        for found, picture in zip(detections, pictures, strict=True):
            for labels in (found["labels"], picture.labels):
                if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < len(self.names):
                    raise ValueError(f"expected class numbers from 0 to {len(self.names) - 1}, got {labels.tolist()}")
            self.objects += torch.bincount(picture.labels[~picture.crowd], minlength=len(self.names))
            targets.append({"boxes": picture.boxes, "labels": picture.labels, "iscrowd": picture.crowd.long()})
        kept = ("scores", "labels", "boxes")
        self.metric.update([{name: found[name].cpu() for name in kept} for found in detections], targets)

    def compute(self) -> DetectionScores:
        """Of everything so far. Raises ValueError if that is nothing."""
        if not self.metric.groundtruth_labels:
            raise ValueError("expected at least one picture, got none")
        result = self.metric.compute()
        classes = dict.fromkeys(range(len(self.names)), (math.nan, math.nan))
        # (overlaps, recalls, classes, areas, numbers of detections); all areas come first, 100 detections last
        curves = torch.as_tensor(result["precision"])[:, :, :, 0, -1]
        for place, number in enumerate(result["classes"].reshape(-1).tolist()):
            if self.objects[number]:
                classes[number] = (_number(curves[:, :, place].mean()), _number(curves[0, :, place].mean()))
        rows = [
            ClassScore(name, int(self.objects[number]), *classes[number]) for number, name in enumerate(self.names)
        ]
        return DetectionScores(**{name: _number(result[name]) for name in SUMMARY}, classes=rows)


@torch.no_grad()
def detect(
    model: PreTrainedModel,
    processor: FlorenceDetectionImageProcessor,
    pictures: Sequence[AnnotatedPicture],
    *,
    batch_size: int = 8,
    threshold: float = 0.01,
    class_embeds: torch.Tensor | None = None,
    progress: bool = False,
) -> Iterator[tuple[list[AnnotatedPicture], list[dict[str, torch.Tensor]]]]:
    """Detections of pictures, batch by batch, in the model's present mode.

    Args:
        threshold: what a score must exceed; average precision wants a low one.
        class_embeds: vectors of the classes, (classes, projection_dim), for an open-set detector.

    Returns:
        Pairs of pictures and their detections, boxes as corners in the pixels of each picture.
    """
    classes = {} if class_embeds is None else {"class_embeds": class_embeds}
    for start in tqdm(range(0, len(pictures), batch_size), desc="detecting", disable=not progress):
        part = list(pictures[start : start + batch_size])
        inputs = processor([str(picture.file) for picture in part], return_tensors="pt").to(model.device)
        outputs = model(**inputs, **classes)
        sizes = [picture.size for picture in part]
        yield part, processor.post_process_object_detection(outputs, threshold, target_sizes=sizes)


def evaluate_detector(
    model: PreTrainedModel,
    processor: FlorenceDetectionImageProcessor,
    pictures: Sequence[AnnotatedPicture],
    names: Sequence[str],
    *,
    batch_size: int = 8,
    class_embeds: torch.Tensor | None = None,
    progress: bool = False,
) -> DetectionScores:
    """COCO's numbers of a detector on pictures; the model is in its former mode afterwards.

    class_embeds: as in `detect`.

    Raises:
        ValueError: no picture, or one that the processor refuses.
    """
    evaluator, training = DetectionEvaluator(names), model.training
    model.eval()
    try:
        for part, found in detect(
            model, processor, pictures, batch_size=batch_size, class_embeds=class_embeds, progress=progress
        ):
            evaluator.update(found, part)
    finally:
        model.train(training)
    return evaluator.compute()


__all__ = ["ClassScore", "DetectionEvaluator", "DetectionScores", "detect", "evaluate_detector"]
