"""Average precision: pycocotools' own numbers, hand-made cases, and the way from a model's outputs to them."""

import contextlib
import io
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.ops import box_convert

pytest.importorskip(
    "torchmetrics", reason="needs the extra `detection`: pip install 'transformers_florence[detection]'"
)
pytest.importorskip("faster_coco_eval", reason="needs the extra `detection`")

from transformers_florence import FlorenceDetectionImageProcessor
from transformers_florence.data.detection import AnnotatedPicture
from transformers_florence.evaluation.detection import DetectionEvaluator, DetectionScores, evaluate_detector

NAMES = ["cat", "dog", "bird", "fish"]
EXTENT = 300  # of the pictures, pixels


def picture(boxes: list, labels: list, crowd: list | None = None, number: int = 0) -> AnnotatedPicture:
    return AnnotatedPicture(
        Path(f"{number}.png"),
        number,
        (EXTENT, EXTENT),
        torch.tensor(boxes, dtype=torch.float64).reshape(-1, 4),
        torch.tensor(labels, dtype=torch.long),
        torch.tensor([False] * len(labels) if crowd is None else crowd, dtype=torch.bool),
    )


def found(boxes: list, labels: list, scores: list) -> dict[str, torch.Tensor]:
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor(labels, dtype=torch.long),
        "scores": torch.tensor(scores, dtype=torch.float32),
    }


def score(detections: list, pictures: list, names: list[str] = NAMES) -> DetectionScores:
    evaluator = DetectionEvaluator(names)
    evaluator.update(detections, pictures)
    return evaluator.compute()


def random_case(seed: int, count: int = 12) -> tuple[list[dict], list[AnnotatedPicture]]:
    """Detections near the objects and elsewhere; no object of the last class, crowds, pictures without objects."""
    random = np.random.default_rng(seed)
    detections, pictures = [], []
    for number in range(count):
        objects = int(random.integers(0, 9))
        corner, side = random.uniform(0, 180, (objects, 2)), random.uniform(8, 118, (objects, 2))
        boxes, labels = np.concatenate((corner, corner + side), axis=1), random.integers(0, 3, objects)
        crowd = random.random(objects) < 0.1
        pictures.append(picture(boxes.tolist(), labels.tolist(), crowd.tolist(), number))
        near = np.repeat(boxes, 2, axis=0) + random.normal(0, 6, (2 * objects, 4))
        corner = random.uniform(0, 180, (4, 2))
        far = np.concatenate((corner, corner + random.uniform(8, 118, (4, 2))), axis=1)
        every = np.concatenate((near, far)).astype(np.float32)
        classes = np.concatenate((np.repeat(labels, 2), random.integers(0, 4, 4)))
        detections.append(found(every.tolist(), classes.tolist(), random.random(len(every)).tolist()))
    return detections, pictures


def scores_of_pycocotools(detections: list[dict], pictures: list[AnnotatedPicture]) -> tuple[np.ndarray, np.ndarray]:
    """Its twelve numbers, and precision (overlaps, recalls, classes) of all areas with 100 detections."""
    coco = pytest.importorskip("pycocotools.coco", reason="needs pycocotools: pip install pycocotools")
    evaluation = pytest.importorskip("pycocotools.cocoeval")
    rows = [
        {
            "image_id": each.image_id,
            "bbox": box,
            "area": box[2] * box[3],
            "category_id": label,
            "iscrowd": int(crowd),
        }
        for each in pictures
        for box, label, crowd in zip(
            box_convert(each.boxes, "xyxy", "xywh").tolist(), each.labels.tolist(), each.crowd.tolist(), strict=True
        )
    ]
    results = [
        {"image_id": each.image_id, "bbox": box, "category_id": label, "score": value}
        for each, one in zip(pictures, detections, strict=True)
        for box, label, value in zip(
            box_convert(one["boxes"].double(), "xyxy", "xywh").tolist(),
            one["labels"].tolist(),
            one["scores"].tolist(),
            strict=True,
        )
    ]
    truth = coco.COCO()
    truth.dataset = {
        "info": {},
        "images": [{"id": each.image_id, "width": EXTENT, "height": EXTENT} for each in pictures],
        "categories": [{"id": number, "name": name} for number, name in enumerate(NAMES)],
        "annotations": [row | {"id": number} for number, row in enumerate(rows, start=1)],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        run = evaluation.COCOeval(truth, truth.loadRes(results), "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    return run.stats, run.eval["precision"][:, :, :, 0, -1]


def close(ours: float, theirs: float) -> bool:
    return math.isnan(ours) if theirs < 0 else abs(ours - theirs) < 1e-6


@pytest.mark.parametrize("seed", range(4))
def test_equal_to_pycocotools(seed: int):
    detections, pictures = random_case(seed)
    stats, curves = scores_of_pycocotools(detections, pictures)
    ours = score(detections, pictures)
    names = ("map", "map_50", "map_75", "map_small", "map_medium", "map_large")
    for name, theirs in zip((*names, "mar_100"), [*stats[:6], stats[8]], strict=True):
        assert close(getattr(ours, name), theirs), (name, getattr(ours, name), theirs)
    assert 0.05 < ours.map < 0.95  # or equality would say little
    for number, row in enumerate(ours.classes):
        assert close(row.precision, curves[:, :, number].mean()) and close(
            row.precision_50, curves[0, :, number].mean()
        )
    assert math.isnan(ours.classes[3].precision) and ours.classes[3].objects == 0


def test_a_detection_of_known_overlap():
    """An overlap of 0.6 counts at the thresholds 0.5, 0.55 and 0.6 itself: three of ten."""
    scores = score([found([[0, 0, 100, 60]], [0], [0.9])], [picture([[0, 0, 100, 100]], [0])], ["cat"])
    assert scores.map_50 == pytest.approx(1) and scores.map_75 == 0 and scores.map == pytest.approx(0.3)
    assert math.isnan(scores.map_small) and scores.map_large == pytest.approx(0.3)
    assert scores.numbers().keys() == {"map", "map_50", "map_75", "map_large", "mar_100"}


def test_a_crowd_is_neither_missed_nor_found():
    crowd = picture([[0, 0, 50, 50], [100, 100, 200, 200]], [0, 0], [False, True])
    scores = score([found([[0, 0, 50, 50], [110, 110, 150, 150]], [0, 0], [0.5, 0.9])], [crowd], ["cat"])
    assert scores.map == pytest.approx(1) and scores.classes[0].objects == 1


def test_nothing_found_and_nothing_there():
    empty = found([], [], [])
    assert score([empty], [picture([[0, 0, 9, 9]], [1])]).map == 0
    assert math.isnan(score([empty], [picture([], [])]).map)


def test_the_table_and_the_file():
    detections = [found([[0, 0, 50, 50]], [0], [0.9])]
    scores = score(detections, [picture([[0, 0, 50, 50], [9, 9, 40, 40]], [0, 1])], ["cat", "polar bear", "elk"])
    lines = scores.table().splitlines()
    assert [line.split()[-3:] for line in lines[1:]] == [
        ["1", "100.0", "100.0"],
        ["1", "0.0", "0.0"],
        ["0", "-", "-"],
        ["2", "50.0", "50.0"],
    ]
    assert len({len(line) for line in lines}) == 1 and lines[2].startswith("polar bear")
    content = scores.as_dict()
    assert content["classes"][2] == {"name": "elk", "objects": 0, "precision": None, "precision_50": None}
    assert content["map"] == pytest.approx(0.5) and content["map_large"] is None


def test_one_process_can_score_while_others_do_not():
    """With a group of processes, torchmetrics would gather from all of them, and wait for ever."""

    def gather(*_: object, **__: object) -> None:
        raise AssertionError("waits for the other processes")

    evaluator = DetectionEvaluator(["cat"])
    evaluator.update([found([[0, 0, 50, 50]], [0], [0.9])], [picture([[0, 0, 50, 50]], [0])])
    evaluator.metric.distributed_available_fn, evaluator.metric.dist_sync_fn = (lambda: True), gather
    assert evaluator.compute().map == pytest.approx(1)


def test_what_is_refused():
    evaluator = DetectionEvaluator(["cat"])
    with pytest.raises(ValueError, match="expected the detections of 1 pictures, got 0"):
        evaluator.update([], [picture([], [])])
    with pytest.raises(ValueError, match=r"from 0 to 0, got \[1\]"):
        evaluator.update([found([[0, 0, 5, 5]], [1], [0.5])], [picture([], [])])
    with pytest.raises(ValueError, match=r"from 0 to 0, got \[1\]"):
        evaluator.update([found([], [], [])], [picture([[0, 0, 5, 5]], [1])])
    with pytest.raises(ValueError, match="at least one picture"):
        evaluator.compute()


class Oracle(nn.Module):
    """Answers with boxes that it was given, over the picture's size, one picture after the other."""

    device = torch.device("cpu")

    def __init__(self, boxes: list[torch.Tensor], num_labels: int) -> None:
        super().__init__()
        self.boxes, self.num_labels, self.seen = boxes, num_labels, 0

    def forward(self, pixel_values: torch.Tensor, pixel_mask: torch.Tensor) -> SimpleNamespace:
        assert not self.training
        batch = len(pixel_values)
        boxes = torch.stack(self.boxes[self.seen : self.seen + batch])
        self.seen += batch
        logits = torch.full((batch, boxes.shape[1], self.num_labels), -20.0)
        logits[:, :, 1] = 4.0
        return SimpleNamespace(logits=logits, pred_boxes=box_convert(boxes, "xyxy", "cxcywh"))


def test_boxes_over_the_size_meet_boxes_in_pixels(tmp_path: Path):
    """Pictures of three shapes that are resized on the way: right boxes score 1, those of another picture do not."""
    shapes, pictures, boxes = [(30, 60), (64, 32), (41, 41)], [], []
    for number, (height, width) in enumerate(shapes):
        file = tmp_path / f"{number}.png"
        Image.new("RGB", (width, height), "gray").save(file)
        box = torch.tensor([[0.1, 0.2 + 0.1 * number, 0.7, 0.9], [0.5, 0.0, 1.0, 0.15]])
        scale = torch.tensor([width, height, width, height])
        pictures.append(
            AnnotatedPicture(
                file,
                number,
                (height, width),
                (box * scale).double(),
                torch.ones(2, dtype=torch.long),
                torch.zeros(2) > 0,
            )
        )
        boxes.append(box)
    processor = FlorenceDetectionImageProcessor(size={"shortest_edge": 20, "longest_edge": 40})
    model = Oracle(boxes, 2).train()
    scores = evaluate_detector(model, processor, pictures, ["cat", "dog"], batch_size=2)
    assert scores.map == pytest.approx(1) and model.training
    wrong = evaluate_detector(Oracle(boxes[::-1], 2), processor, pictures, ["cat", "dog"], batch_size=2)
    assert wrong.map < 0.9
