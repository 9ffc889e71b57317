# Copyright 2026 The transformers_florence authors. Licensed under the Apache License, Version 2.0.
"""Anchors, decoding of boxes, and the choice of detections; overlaps and suppression are torchvision's.

A box is (left, top, right, bottom); its coordinates are edges, so a box of one pixel has width 1.
"""

import math
from collections.abc import Sequence

import torch
from torchvision.ops import batched_nms

ANCHOR_SCALE = 8  # side of an anchor over its level's stride (ATSS)
DELTA_WEIGHTS = (10.0, 10.0, 5.0, 5.0)  # what deltas of centre and size are divided by (Faster R-CNN)
MAX_LOG_SIZE = math.log(1000 / 16)  # a box is at most this many times as large as its anchor
MAX_CANDIDATES = 5000  # of a picture before suppression: the original's 1000 for each of five levels


def box_centers(boxes: torch.Tensor) -> torch.Tensor:
    """boxes: (..., 4) -> (..., 2), x and y."""
    return (boxes[..., :2] + boxes[..., 2:]) / 2


def grid_anchors(
    grids: Sequence[tuple[int, int]],
    strides: Sequence[int],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """One square anchor in the middle of every location of a pyramid (ATSS).

    Args:
        grids: height and width of each level, in locations.
        strides: of each level, in pixels.

    Returns:
        (anchors, 4) in pixels: level after level, row after row.
    """
    anchors = []
    for (height, width), stride in zip(grids, strides, strict=True):
        rows = (torch.arange(height, dtype=dtype, device=device) + 0.5) * stride
        columns = (torch.arange(width, dtype=dtype, device=device) + 0.5) * stride
        y, x = torch.meshgrid(rows, columns, indexing="ij")
        centers = torch.stack((x, y), dim=-1).flatten(0, 1)  # (height * width, 2)
        half = ANCHOR_SCALE * stride / 2
        anchors.append(torch.cat((centers - half, centers + half), dim=1))
    return torch.cat(anchors)


def decode_boxes(deltas: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
    """What a detector predicts -> boxes, by the parametrisation of Faster R-CNN.

    Args:
        deltas: (..., anchors, 4): shift of the centre over the anchor's size and logarithm of the growth, weighted.
        anchors: (anchors, 4).

    Returns:
        (..., anchors, 4) in the anchors' unit; no box has a side of zero.
    """
    weights = deltas.new_tensor(DELTA_WEIGHTS)
    sizes = anchors[..., 2:] - anchors[..., :2]
    shift, growth = (deltas / weights).split(2, dim=-1)
    centers = box_centers(anchors) + shift * sizes
    half = growth.clamp(max=MAX_LOG_SIZE).exp() * sizes / 2
    return torch.cat((centers - half, centers + half), dim=-1)


def select_detections(
    scores: torch.Tensor, boxes: torch.Tensor, threshold: float, top_k: int, nms_threshold: float
) -> list[dict[str, torch.Tensor]]:
    """The best boxes of every picture, at most one where boxes of one class overlap; all pictures at once.

    Args:
        scores: (batch, boxes, classes) in 0..1.
        boxes: (batch, boxes, 4), in any unit.
        threshold: what a score must exceed.
        top_k: how many boxes a picture has at most.
        nms_threshold: boxes whose overlap (IoU) with a better one of their class exceeds this are dropped.

    Returns:
        for each picture `scores (n,)`, `labels (n,)` and `boxes (n, 4)`, the best first.
    """
    batch, _, num_classes = scores.shape
    flat = scores.flatten(1)
    best, places = flat.topk(min(MAX_CANDIDATES, flat.shape[1]), dim=1)  # (batch, candidates)
    picture, rank = torch.nonzero(best > threshold, as_tuple=True)  # (kept,) over all pictures
    kept_scores, place = best[picture, rank], places[picture, rank]
    labels = place % num_classes
    kept_boxes = boxes[picture, place // num_classes]
    groups = picture * num_classes + labels
    # torchvision moves each group to a place of its own: float32 has no room for the classes of a whole batch.
    order = batched_nms(kept_boxes.double(), kept_scores.double(), groups, nms_threshold)
    order = order[torch.argsort(picture[order], stable=True)]  # picture after picture, the best of each first
    counts = torch.bincount(picture[order], minlength=batch).tolist()
    return [
        {"scores": kept_scores[part], "labels": labels[part], "boxes": kept_boxes[part]}
        for part in (of_picture[:top_k] for of_picture in order.split(counts))
    ]


__all__ = ["box_centers", "decode_boxes", "grid_anchors", "select_detections"]
