# Copyright 2026 The transformers_florence authors. Licensed under the Apache License, Version 2.0.
"""ATSS (Zhang et al. 2020): which anchor is responsible for which object, and the three losses of a detector."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn import functional as F
from torchvision.ops import box_iou, generalized_box_iou_loss, sigmoid_focal_loss

from .box_ops import box_centers

BACKGROUND = -1
CANDIDATES_PER_LEVEL = 9
MIN_MARGIN = 0.01  # pixels that the centre of an anchor lies inside its object at least
FOCAL_ALPHA, FOCAL_GAMMA = 0.25, 2.0
BOX_LOSS_WEIGHT = 2.0


class DetectionTargets(NamedTuple):
    """What every anchor should predict.

    labels: (batch, anchors), class numbers or `BACKGROUND`; boxes: (batch, anchors, 4) in pixels and centerness:
    (batch, anchors) in 0..1, both zero for background.
    """

    labels: torch.Tensor
    boxes: torch.Tensor
    centerness: torch.Tensor


def assign_anchors(anchors: torch.Tensor, level_sizes: Sequence[int], boxes: torch.Tensor) -> torch.Tensor:
    """Adaptive training sample selection: the object of each anchor.

    Candidates of an object are the anchors of each level with the nearest centres. Those are its positives whose
    overlap (IoU) reaches the mean of all its candidates plus their standard deviation, and whose centre lies inside
    the object. An anchor of several objects goes to the one of the highest overlap, the first of equal ones.

    Args:
        anchors: (anchors, 4) in pixels, level after level.
        level_sizes: how many of them are of each level.
        boxes: (objects, 4) in pixels, any number of them.

    Returns:
        (anchors,): the number of the object, or -1.
    """
    if boxes.shape[0] == 0:
        return anchors.new_full((anchors.shape[0],), BACKGROUND, dtype=torch.long)
    points = box_centers(anchors)
    # Matrix products would round distances on large pictures.
    distances = torch.cdist(box_centers(boxes), points, compute_mode="donot_use_mm_for_euclid_dist")
    nearest, start = [], 0
    for size in level_sizes:
        level = distances[:, start : start + size]
        nearest.append(start + level.topk(min(CANDIDATES_PER_LEVEL, size), dim=1, largest=False).indices)
        start += size
    candidates = torch.cat(nearest, dim=1)  # (objects, candidates)
    overlaps = torch.vmap(box_iou)(boxes[:, None], anchors[candidates])[:, 0]  # (objects, candidates)
    deviation = overlaps.std(dim=1, correction=min(1, candidates.shape[1] - 1))
    threshold = overlaps.mean(dim=1) + deviation
    margins = torch.cat((points[candidates] - boxes[:, None, :2], boxes[:, None, 2:] - points[candidates]), dim=-1)
    positive = (overlaps >= threshold[:, None]) & (margins.amin(dim=-1) > MIN_MARGIN)
    claims = overlaps.new_full((boxes.shape[0], anchors.shape[0]), -1.0)
    claims.scatter_(1, candidates, overlaps.masked_fill(~positive, -1.0))
    best, objects = claims.max(dim=0)
    return objects.masked_fill(best < 0, BACKGROUND)


def centerness_of(points: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """FCOS's centerness: 1 in the middle of a box, 0 on its edge.

    points: (n, 2), inside of boxes: (n, 4). Returns (n,).
    """
    before, behind = points - boxes[:, :2], boxes[:, 2:] - points
    return (torch.minimum(before, behind) / torch.maximum(before, behind)).prod(dim=1).sqrt()


@torch.no_grad()
def detection_targets(
    anchors: torch.Tensor,
    level_sizes: Sequence[int],
    boxes: Sequence[torch.Tensor],
    class_labels: Sequence[torch.Tensor],
) -> DetectionTargets:
    """`assign_anchors` for each picture of a batch.

    boxes, class_labels: of each picture (objects, 4) in pixels and (objects,).
    """
    points = box_centers(anchors)
    labels, target_boxes, centerness = [], [], []
    for picture_boxes, picture_labels in zip(boxes, class_labels, strict=True):
        objects = assign_anchors(anchors, level_sizes, picture_boxes)
        positive = objects >= 0
        objects = objects[positive]
        labels.append(torch.full_like(positive, BACKGROUND, dtype=torch.long))
        target_boxes.append(torch.zeros_like(anchors))
        centerness.append(torch.zeros_like(anchors[:, 0]))
        labels[-1][positive] = picture_labels[objects]
        target_boxes[-1][positive] = picture_boxes[objects]
        centerness[-1][positive] = centerness_of(points[positive], picture_boxes[objects])
    return DetectionTargets(torch.stack(labels), torch.stack(target_boxes), torch.stack(centerness))


def atss_losses(
    class_logits: torch.Tensor,
    boxes: torch.Tensor,
    centerness_logits: torch.Tensor,
    targets: DetectionTargets,
    num_positives: torch.Tensor,
    total_centerness: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """Focal loss on every anchor; on positives, GIoU loss weighted by centerness, and the centerness's own.

    Args:
        class_logits: (batch, anchors, classes), floating; each class is a question of its own.
        boxes: (batch, anchors, 4) in pixels.
        centerness_logits: (batch, anchors), floating.
        num_positives, total_centerness: scalars, what the sums are divided by: of the targets of this batch, or their
            mean over all processes. Less than one counts as one, so that pictures without objects have a loss.

    Returns:
        `loss_cls`, `loss_box_reg` and `loss_ctr` (Dynamic Head's names), scalars whose sum is the loss. Without
        positives the last two are zero, with zero gradients.
    """
    positive = targets.labels != BACKGROUND
    classes = torch.arange(class_logits.shape[-1], device=class_logits.device)
    one_hot = (targets.labels[..., None] == classes).to(class_logits.dtype)  # (batch, anchors, classes)
    class_loss = sigmoid_focal_loss(class_logits, one_hot, FOCAL_ALPHA, FOCAL_GAMMA, reduction="sum")
    centerness = targets.centerness[positive]  # (positives,)
    box_loss = generalized_box_iou_loss(boxes[positive], targets.boxes[positive]) * centerness
    center_loss = F.binary_cross_entropy_with_logits(centerness_logits[positive], centerness, reduction="sum")
    num_positives, total_centerness = num_positives.clamp(min=1), total_centerness.clamp(min=1)
    return {
        "loss_cls": class_loss / num_positives,
        "loss_box_reg": BOX_LOSS_WEIGHT * box_loss.sum() / total_centerness,
        "loss_ctr": center_loss / num_positives,
    }


__all__ = [
    "BACKGROUND",
    "DetectionTargets",
    "assign_anchors",
    "atss_losses",
    "centerness_of",
    "detection_targets",
]
