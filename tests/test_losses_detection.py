"""ATSS against a loop over anchors and objects, its losses against their formulas."""

import math

import pytest
import torch
from torch.autograd import gradcheck
from torch.testing import assert_close

from tests.oracles_detection import atss, overlap
from transformers_florence.box_ops import box_centers, grid_anchors
from transformers_florence.losses_detection import (
    BACKGROUND,
    DetectionTargets,
    assign_anchors,
    atss_losses,
    centerness_of,
    detection_targets,
)

PYRAMID = ([(8, 11), (4, 6), (2, 3)], [8, 16, 32])


def pyramid(grids=PYRAMID[0], strides=PYRAMID[1]) -> tuple[torch.Tensor, list[int]]:
    return grid_anchors(grids, strides, torch.float64), [height * width for height, width in grids]


def random_boxes(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 2, generator=generator, dtype=torch.float64) * torch.tensor([88.0, 64.0])
    sizes = 2 + 60 * torch.rand(count, 2, generator=generator, dtype=torch.float64) ** 2
    return torch.cat((corners - sizes / 2, corners + sizes / 2), dim=1)


@pytest.mark.parametrize("count", [1, 2, 7, 40])
@pytest.mark.parametrize("seed", range(3))
def test_assignment_is_that_of_a_loop(count, seed):
    anchors, sizes = pyramid()
    boxes = random_boxes(count, seed)
    levels = [level.tolist() for level in anchors.split(sizes)]
    expected = atss(levels, boxes.tolist())
    assert assign_anchors(anchors, sizes, boxes).tolist() == expected
    if count == 40:
        assert len(set(expected)) > 10  # there is something to agree on


@pytest.mark.parametrize("grid", [(1, 1), (1, 3), (2, 2), (1, 20)])
def test_levels_smaller_than_the_number_of_candidates(grid):
    anchors, sizes = pyramid([grid], [8])
    box = torch.tensor([[0.5, 0.25, 7.3, 7.9]], dtype=torch.float64)
    assert assign_anchors(anchors, sizes, box).tolist() == atss([anchors.tolist()], box.tolist())
    assert (assign_anchors(anchors, sizes, box) == 0).any()


def test_no_object_no_anchor():
    anchors, sizes = pyramid()
    assert (assign_anchors(anchors, sizes, torch.zeros(0, 4, dtype=torch.float64)) == BACKGROUND).all()


def test_the_first_of_identical_objects_takes_all():
    anchors, sizes = pyramid()
    box = random_boxes(1, seed=3)
    alone = assign_anchors(anchors, sizes, box)
    assert (alone == 0).any()
    assert_close(assign_anchors(anchors, sizes, box.repeat(5, 1)), alone)


def test_objects_without_an_anchor_inside():
    """Smaller than a stride and between locations, or without an area."""
    anchors, sizes = pyramid()
    boxes = torch.tensor([[6.0, 6.0, 10.0, 10.0], [4.0, 4.0, 4.0, 4.0], [50.0, 20.0, 40.0, 30.0]], dtype=torch.float64)
    assert (assign_anchors(anchors, sizes, boxes) == BACKGROUND).all()


def test_centerness():
    box = torch.tensor([[0.0, 0.0, 10.0, 20.0]]).expand(4, 4)
    points = torch.tensor([[5.0, 10.0], [2.5, 10.0], [2.5, 5.0], [0.0, 10.0]])
    assert_close(centerness_of(points, box), torch.tensor([1.0, math.sqrt(1 / 3), 1 / 3, 0.0]))


def test_targets_of_a_batch():
    anchors, sizes = pyramid()
    boxes = [random_boxes(5, 1), random_boxes(0), random_boxes(3, 2)]
    classes = [torch.tensor([4, 0, 2, 1, 3]), torch.zeros(0, dtype=torch.long), torch.tensor([7, 7, 0])]
    targets = detection_targets(anchors, sizes, boxes, classes)
    for picture in range(3):
        for place, number in enumerate(assign_anchors(anchors, sizes, boxes[picture]).tolist()):
            label, box = targets.labels[picture, place].item(), targets.boxes[picture, place]
            if number < 0:
                assert label == BACKGROUND and not box.any() and targets.centerness[picture, place] == 0
                continue
            assert label == classes[picture][number]
            assert box.tolist() == boxes[picture][number].tolist()
            x, y = box_centers(anchors)[place].tolist()
            left, top, right, bottom = x - box[0], y - box[1], box[2] - x, box[3] - y
            ratios = min(left, right) / max(left, right), min(top, bottom) / max(top, bottom)
            assert targets.centerness[picture, place].item() == pytest.approx(math.sqrt(ratios[0] * ratios[1]))
    assert (targets.labels >= 0).sum() > 5


def predictions(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, DetectionTargets]:
    """Two pictures, three anchors of which the first of each and the last are positive, four classes."""
    torch.manual_seed(seed)
    logits, centers = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    boxes, true = random_boxes(6, 1).view(2, 3, 4), random_boxes(6, 2).view(2, 3, 4)
    labels = torch.tensor([[2, -1, -1], [0, -1, 3]])
    return logits, boxes, centers, DetectionTargets(labels, true, torch.rand(2, 3, dtype=torch.float64))


def test_losses_are_their_formulas():
    logits, boxes, centers, targets = predictions()
    num_positives, total = torch.tensor(3.0), torch.tensor(1.25)
    losses = atss_losses(logits, boxes, centers, targets, num_positives, total)
    focal = giou = entropy = 0.0
    for picture in range(2):
        for anchor in range(3):
            label = targets.labels[picture, anchor].item()
            for number in range(4):
                p = torch.sigmoid(logits[picture, anchor, number]).item()
                hit = number == label
                focal -= 0.25 * (1 - p) ** 2 * math.log(p) if hit else 0.75 * p**2 * math.log(1 - p)
            if label < 0:
                continue
            first, second = boxes[picture, anchor].tolist(), targets.boxes[picture, anchor].tolist()
            iou = overlap(first, second)
            areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
            union = sum(areas) / (1 + iou)
            hull = (max(first[2], second[2]) - min(first[0], second[0])) * (
                max(first[3], second[3]) - min(first[1], second[1])
            )
            weight = targets.centerness[picture, anchor].item()
            giou += weight * (1 - iou + (hull - union) / hull)
            p = torch.sigmoid(centers[picture, anchor]).item()
            entropy -= weight * math.log(p) + (1 - weight) * math.log(1 - p)
    expected = {"loss_cls": focal / 3, "loss_box_reg": 2 * giou / 1.25, "loss_ctr": entropy / 3}
    assert {name: value.item() for name, value in losses.items()} == pytest.approx(expected, rel=1e-6)


def test_gradients_by_finite_differences():
    *tensors, targets = predictions(1)
    inputs = [tensor.requires_grad_() for tensor in tensors]

    def total(*inputs: torch.Tensor) -> torch.Tensor:
        return sum(atss_losses(*inputs, targets, torch.tensor(3.0), torch.tensor(2.0)).values())

    assert gradcheck(total, inputs)


def test_without_objects_only_the_classes_have_a_loss():
    logits, boxes, centers, targets = predictions()
    nothing = DetectionTargets(torch.full_like(targets.labels, BACKGROUND), *map(torch.zeros_like, targets[1:]))
    inputs = [tensor.requires_grad_() for tensor in (logits, boxes, centers)]
    losses = atss_losses(*inputs, nothing, torch.tensor(0), torch.tensor(0.0))
    assert losses["loss_cls"] > 0 and losses["loss_box_reg"] == 0 and losses["loss_ctr"] == 0
    sum(losses.values()).backward()
    assert logits.grad.abs().min() > 0
    assert not boxes.grad.any() and not centers.grad.any()
