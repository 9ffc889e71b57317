"""Anchors by counting, decoding against torchvision's, suppression against a greedy loop."""

import pytest
import torch
from torch.testing import assert_close
from torchvision.models.detection._utils import BoxCoder

from tests.oracles_detection import greedy_suppression
from transformers_florence.box_ops import box_centers, decode_boxes, grid_anchors, select_detections


def test_one_anchor_in_the_middle_of_every_location():
    anchors = grid_anchors([(3, 5), (2, 3)], [8, 16], torch.float64)
    expected = []
    for rows, columns, stride in ((3, 5, 8), (2, 3, 16)):
        for row in range(rows):
            for column in range(columns):
                x, y = column * stride + stride / 2, row * stride + stride / 2
                expected.append([x - 4 * stride, y - 4 * stride, x + 4 * stride, y + 4 * stride])
    assert anchors.tolist() == expected
    assert_close(box_centers(anchors)[0], torch.tensor([4.0, 4.0], dtype=torch.float64))


def test_a_level_more_than_strides_is_refused():
    with pytest.raises(ValueError):
        grid_anchors([(1, 1), (1, 1)], [8])


def test_decoding_is_that_of_faster_rcnn():
    anchors = grid_anchors([(4, 3)], [8], torch.float64)
    deltas = 4 * torch.randn(2, 12, 4, dtype=torch.float64)
    deltas[0, 0] = torch.tensor([0.0, 0.0, 1e9, -1e9])  # a growth beyond the limit, and one that leaves nothing
    for ours, picture in zip(decode_boxes(deltas, anchors), deltas, strict=True):
        assert_close(ours, BoxCoder((10.0, 10.0, 5.0, 5.0)).decode_single(picture, anchors))
    assert_close(decode_boxes(torch.zeros_like(deltas), anchors), anchors.expand(2, -1, -1), rtol=0, atol=0)


def random_detections(batch: int, boxes: int, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Many overlaps: corners within 40 pixels, sides of about 20."""
    corners = 40 * torch.rand(batch, boxes, 2)
    return torch.rand(batch, boxes, classes), torch.cat((corners, corners + 10 + 20 * torch.rand(batch, boxes, 2)), -1)


@pytest.mark.parametrize(("threshold", "top_k", "nms_threshold"), [(0.0, 100, 0.6), (0.3, 7, 0.3), (0.9, 5, 0.0)])
def test_suppression_is_greedy_in_each_class_of_each_picture(threshold, top_k, nms_threshold):
    scores, boxes = random_detections(3, 20, 2)
    scores[1] = 0.0  # a picture without detections
    found = select_detections(scores, boxes, threshold, top_k, nms_threshold)
    assert len(found) == 3
    for picture, ours in enumerate(found):
        expected = greedy_suppression(scores[picture], boxes[picture], threshold, top_k, nms_threshold)
        assert len(ours["scores"]) == len(expected) and (picture == 1) == (not expected)
        assert ours["scores"].tolist() == [score for score, _, _ in expected]
        assert ours["labels"].tolist() == [label for _, label, _ in expected]
        assert_close(ours["boxes"], boxes[picture][[box for _, _, box in expected]].reshape(-1, 4), rtol=0, atol=0)


def test_nothing_at_all():
    found = select_detections(torch.zeros(2, 0, 3), torch.zeros(2, 0, 4), 0.5, 10, 0.5)
    assert [{name: tuple(value.shape) for name, value in each.items()} for each in found] == [
        {"scores": (0,), "labels": (0,), "boxes": (0, 4)}
    ] * 2


def test_a_picture_does_not_depend_on_its_batch():
    """Overlaps at the threshold, and more classes than float32 could keep apart by moving each to its own place."""
    batch, classes = 24, 3000
    scores, boxes = torch.zeros(batch, 8, classes), torch.zeros(batch, 8, 4)
    shift = torch.linspace(0, 0.1, 8)
    boxes[:] = torch.stack((1000 + shift, shift, 1001 + shift, 1 + shift), dim=1)
    scores[:, :, -1] = torch.linspace(0.9, 0.5, 8)
    together = select_detections(scores, boxes, 0.1, 100, 0.9)
    alone = select_detections(scores[:1, :, -1:], boxes[:1], 0.1, 100, 0.9)[0]
    assert 1 < len(alone["scores"]) < 8
    for picture in together:
        assert_close(picture["boxes"], alone["boxes"], rtol=0, atol=0)
        assert (picture["labels"] == classes - 1).all()


def test_only_the_best_candidates_are_compared(monkeypatch):
    monkeypatch.setattr("transformers_florence.box_ops.MAX_CANDIDATES", 4)
    scores = torch.linspace(0.2, 0.9, 10)[None, :, None]
    boxes = torch.arange(10.0)[None, :, None] * 10 + torch.tensor([0.0, 0.0, 5.0, 5.0])
    assert select_detections(scores, boxes, 0.0, 100, 0.5)[0]["scores"].tolist() == scores[0, :, 0].tolist()[:-5:-1]
