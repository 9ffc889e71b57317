"""Dynamic Head's detector by its definition, under its authors' names: what tests of the detector compare with.

Deformable convolution is a loop over taps with bilinear reads from a zero-padded map, and the two conventions of the
map of offsets are index arithmetic; the pyramid and the assignment of anchors are written out.
"""

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


def bilinear(plane: torch.Tensor, y: float, x: float) -> torch.Tensor:
    """plane: (channels, height, width), zero outside, read between its locations -> (channels,)."""
    top, left = math.floor(y), math.floor(x)
    value = plane.new_zeros(plane.shape[0])
    for row, column in ((top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1)):
        if 0 <= row < plane.shape[1] and 0 <= column < plane.shape[2]:
            value = value + plane[:, row, column] * (1 - abs(y - row)) * (1 - abs(x - column))
    return value


def deformable_convolution(
    plane: torch.Tensor,
    offsets: torch.Tensor,
    mask: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    stride: int,
    official: bool = False,
) -> torch.Tensor:
    """One picture, 3 x 3 taps, one zero around it: (channels, rows, columns) -> (channels, height, width).

    offsets: (18, *, *), mask: (9, *, *), whose sides may exceed the output's. official: read them as the published
    kernel does, whose strides are those of the output.
    """
    height, width = ((side - 1) // stride + 1 for side in plane.shape[1:])

    def read(values: torch.Tensor, channel: int, row: int, column: int) -> torch.Tensor:
        if official:
            return values.flatten()[channel * height * width + row * width + column]
        return values[channel, row, column]

    output = plane.new_empty(weight.shape[0], height, width)
    for row in range(height):
        for column in range(width):
            total = bias
            for tap in range(9):
                y = row * stride - 1 + tap // 3 + read(offsets, 2 * tap, row, column).item()
                x = column * stride - 1 + tap % 3 + read(offsets, 2 * tap + 1, row, column).item()
                seen = bilinear(plane, y, x) * read(mask, tap, row, column)
                total = total + weight[:, :, tap // 3, tap % 3] @ seen
            output[:, row, column] = total
    return output


class DyConv(nn.Module):
    """Deformable convolution and norm."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv, self.bn = nn.Conv2d(channels, channels, 3), nn.GroupNorm(16, channels)

    def forward(self, hidden_states: torch.Tensor, offsets: torch.Tensor, mask: torch.Tensor, official: bool):
        pictures = [
            deformable_convolution(*each, self.conv.weight, self.conv.bias, self.stride, official)
            for each in zip(hidden_states, offsets, mask, strict=True)
        ]
        return self.bn(torch.stack(pictures))


class DyReLU(nn.Module):
    """The maximum of two lines for each picture and channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(channels, channels // 4), nn.ReLU(), nn.Linear(channels // 4, 4 * channels))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        squashed = F.relu6(self.fc(hidden_states.mean(dim=(2, 3))) + 3) / 6
        slope1, bias1, slope2, bias2 = (squashed - 0.5)[..., None, None].chunk(4, dim=1)
        return torch.max(hidden_states * (2 * slope1 + 1) + bias1, hidden_states * 2 * slope2 + bias2)


class DyHeadBlock(nn.Module):
    """Space, then scale, then task; `DyConv` holds the convolutions on the coarser, the same and the finer level."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.DyConv = nn.ModuleList(DyConv(channels, stride) for stride in (1, 1, 2))
        self.AttnConv = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, 1, 1), nn.ReLU())
        self.relu = DyReLU(channels)
        self.offset = nn.Conv2d(channels, 27, 3, padding=1)

    def forward(self, maps: list[torch.Tensor], official: bool) -> list[torch.Tensor]:
        outputs = []
        for level, hidden_states in enumerate(maps):
            values = self.offset(hidden_states)
            where = (values[:, :18], values[:, 18:].sigmoid(), official)
            branches = [self.DyConv[1](hidden_states, *where)]
            if level > 0:
                branches.append(self.DyConv[2](maps[level - 1], *where))
            if level < len(maps) - 1:
                size = hidden_states.shape[2:]
                coarser = self.DyConv[0](maps[level + 1], *where)
                branches.append(F.interpolate(coarser, size=size, mode="bilinear", align_corners=True))
            weighed = [branch * F.relu6(self.AttnConv(branch) + 3) / 6 for branch in branches]
            outputs.append(self.relu(torch.stack(weighed).mean(dim=0)))
        return outputs


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))


class Detector(nn.Module):
    """From the feature maps of three stages to class logits, deltas and centerness logits of each level."""

    def __init__(self, stage_channels: list[int], channels: int, blocks: int, classes: int) -> None:
        super().__init__()
        body, head = nn.Module(), nn.Module()
        for level, width in enumerate(stage_channels, start=3):
            body.add_module(f"fpn_lateral{level}", nn.Conv2d(width, channels, 1))
            body.add_module(f"fpn_output{level}", nn.Conv2d(channels, channels, 3, padding=1))
        body.top_block = nn.Module()
        body.top_block.p6, body.top_block.p7 = (nn.Conv2d(channels, channels, 3, 2, 1) for _ in range(2))
        self.backbone = nn.Module()
        self.backbone.backbone = body
        self.backbone.dyhead_tower = nn.ModuleList(DyHeadBlock(channels) for _ in range(blocks))
        head.cls_logits, head.bbox_pred = nn.Conv2d(channels, classes, 1), nn.Conv2d(channels, 4, 1)
        head.centerness = nn.Conv2d(channels, 1, 1)
        head.scales = nn.ModuleList(Scale() for _ in range(5))
        self.head = head

    def forward(self, features: list[torch.Tensor], official: bool = True) -> list[tuple[torch.Tensor, ...]]:
        body, head = self.backbone.backbone, self.head
        top, maps = None, []
        for level in (5, 4, 3):
            lateral = body.get_submodule(f"fpn_lateral{level}")(features[level - 3])
            # Twice as large, cut to size where the larger map has an odd side: nearest neighbours.
            top = lateral if top is None else lateral + F.interpolate(top, size=lateral.shape[2:])
            maps.insert(0, body.get_submodule(f"fpn_output{level}")(top))
        maps.append(body.top_block.p6(maps[-1]))
        maps.append(body.top_block.p7(maps[-1].relu()))
        for block in self.backbone.dyhead_tower:
            maps = block(maps, official)
        return [
            (head.cls_logits(each), head.bbox_pred(each) * scale.scale, head.centerness(each))
            for each, scale in zip(maps, head.scales, strict=True)
        ]


def overlap(first: list[float], second: list[float]) -> float:
    """Intersection over union of two boxes."""
    width = max(0.0, min(first[2], second[2]) - max(first[0], second[0]))
    height = max(0.0, min(first[3], second[3]) - max(first[1], second[1]))
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    return width * height / (sum(areas) - width * height)


def atss(levels: list[list[list[float]]], boxes: list[list[float]]) -> list[int]:
    """The object of each anchor, or -1; `levels` are lists of anchors."""
    anchors = [anchor for level in levels for anchor in level]
    claims: list[tuple[float, int]] = [(0.0, -1)] * len(anchors)
    for number, box in enumerate(boxes):
        middle = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
        candidates, start = [], 0
        for level in levels:
            distances = [math.dist(middle, ((a[0] + a[2]) / 2, (a[1] + a[3]) / 2)) for a in level]
            nearest = sorted(range(len(level)), key=distances.__getitem__)[:9]
            candidates += [start + place for place in nearest]
            start += len(level)
        overlaps = [overlap(box, anchors[place]) for place in candidates]
        mean = sum(overlaps) / len(overlaps)
        spread = sum((value - mean) ** 2 for value in overlaps) / max(1, len(overlaps) - 1)
        for place, value in zip(candidates, overlaps, strict=True):
            x, y = (anchors[place][0] + anchors[place][2]) / 2, (anchors[place][1] + anchors[place][3]) / 2
            inside = min(x - box[0], y - box[1], box[2] - x, box[3] - y) > 0.01
            if value >= mean + math.sqrt(spread) and inside and value > claims[place][0]:
                claims[place] = (value, number)
    return [number for _, number in claims]


def greedy_suppression(
    scores: torch.Tensor, boxes: torch.Tensor, threshold: float, top_k: int, nms_threshold: float
) -> list[tuple[float, int, int]]:
    """Of one picture (scores: (boxes, classes)): score, class and number of each box that is kept, best first."""
    ranked: list[Any] = sorted(
        ((scores[box, label].item(), label, box) for box in range(len(boxes)) for label in range(scores.shape[1])),
        reverse=True,
    )
    kept: list[tuple[float, int, int]] = []
    for score, label, box in ranked:
        rivals = [other for _, its_label, other in kept if its_label == label]
        if score > threshold and all(
            overlap(boxes[box].tolist(), boxes[other].tolist()) <= nms_threshold for other in rivals
        ):
            kept.append((score, label, box))
    return kept[:top_k]
