"""Speed of detection: the Dynamic Head beside its naive form and RetinaNet's head, and whole detectors.

    python benchmarks/detection.py
    python benchmarks/detection.py --sides 320 --channels 128 --blocks 2 --rounds 5

The naive form is the published structure of mmdetection's DyHead written down plainly: torchvision's kernel for the
deformable convolutions, each level and each branch by itself. It gets the weights of ours, and has to give the same
maps to 1e-4. RetinaNet's head has as many channels. The whole detectors are ours on the nano tower, torchvision's
RetinaNet on a ResNet-18 of as many channels, and transformers' RT-DETR on a ResNet-18 with its own 300 queries; none
is trained, and none chooses detections. All take turns; milliseconds are medians of the wall clock, processor
milliseconds those of all threads.
"""

import argparse
import math
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models import resnet18
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import deform_conv2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7
from transformers import RTDetrConfig, RTDetrForObjectDetection, RTDetrResNetConfig

from transformers_florence import FlorenceDetectionConfig, FlorenceForObjectDetection
from transformers_florence.dynamic_head import DynamicHead, DynamicHeadBlock

ANCHORS = 9  # of RetinaNet at a location
CLASSES = 80
STRIDES = (8, 16, 32, 64, 128)
SMALLEST = 160  # pixels: RT-DETR's maps have no less than its 300 places from there on


class NaiveBlock(nn.Module):
    """mmdetection's DyHeadBlock on the weights of ours."""

    def __init__(self, block: DynamicHeadBlock) -> None:
        super().__init__()
        self.block = block

    def branch(self, branch: nn.Module, maps: torch.Tensor, offsets: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        conv = branch.conv
        deformed = deform_conv2d(maps, offsets, conv.weight, conv.bias, conv.stride, conv.padding, mask=mask)
        return branch.norm(deformed)

    def weigh(self, branch: torch.Tensor) -> torch.Tensor:
        pooled = branch.mean(dim=(2, 3), keepdim=True)
        return branch * F.hardsigmoid(F.relu(self.block.scale_attention.projection(pooled)))

    def forward(self, *maps: torch.Tensor) -> list[torch.Tensor]:
        spatial, outputs = self.block.spatial_attention, []
        for level, hidden_states in enumerate(maps):
            offsets, mask = spatial.offset(hidden_states).split((18, 9), dim=1)
            mask = mask.sigmoid()
            total, count = self.weigh(self.branch(spatial.same, hidden_states, offsets, mask)), 1
            if level > 0:
                total, count = (
                    total + self.weigh(self.branch(spatial.finer, maps[level - 1], offsets, mask)),
                    count + 1,
                )
            if level + 1 < len(maps):
                height, width = maps[level + 1].shape[2:]
                cut = (each[:, :, :height, :width].contiguous() for each in (offsets, mask))
                coarse = self.branch(spatial.coarser, maps[level + 1], *cut)
                size = hidden_states.shape[2:]
                coarse = F.interpolate(coarse, size=size, mode="bilinear", align_corners=True)
                total, count = total + self.weigh(coarse), count + 1
            outputs.append(self.block.task_attention(total / count))
        return outputs


class NaiveHead(nn.Module):
    """The blocks, one after the other."""

    def __init__(self, head: DynamicHead) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(NaiveBlock(block) for block in head.blocks)

    def forward(self, maps: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
        outputs = list(maps)
        for block in self.blocks:
            outputs = block(*outputs)
        return outputs


class PlainRetinaNet(nn.Module):
    """torchvision's RetinaNet up to its predictions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        layers = {"layer2": "0", "layer3": "1", "layer4": "2"}
        extra = LastLevelP6P7(channels, channels)
        self.backbone = BackboneWithFPN(resnet18(), layers, [128, 256, 512], channels, extra_blocks=extra)
        self.head = RetinaNetHead(channels, ANCHORS, CLASSES)

    def forward(self, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        return list(self.head(list(self.backbone(pixel_values).values())).values())


def outputs_of(model: nn.Module, inputs: object) -> list[torch.Tensor]:
    """What a head or detector predicts, as tensors."""
    outputs = model(inputs)
    if isinstance(outputs, dict):
        outputs = [outputs[name] for name in ("logits", "pred_boxes") if name in outputs] or list(outputs.values())
    return list(outputs)


def forward(model: nn.Module, inputs: object) -> None:
    with torch.no_grad():
        outputs_of(model, inputs)


def step(model: nn.Module, inputs: object) -> None:
    """Forward and backward; what a loss and an optimizer take is the same for all."""
    model.zero_grad()
    torch.stack([each.square().mean() for each in outputs_of(model, inputs)]).sum().backward()


def measure(calls: dict[str, Callable[[], None]], rounds: int) -> dict[str, tuple[float, ...]]:
    """Milliseconds by the clock and of the processor, of each call, all in turns after one that is not counted."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            started = time.perf_counter(), time.process_time()
            call()
            if number:
                times[name].append((time.perf_counter() - started[0], time.process_time() - started[1]))
    return {
        name: (1e3 * median(row[0] for row in rows), 1e3 * median(row[1] for row in rows))
        for name, rows in times.items()
    }


def make_heads(channels: int, blocks: int) -> dict[str, nn.Module]:
    """Ours, the naive one with its weights, and RetinaNet's."""
    ours = DynamicHead(FlorenceDetectionConfig.from_size("nano", hidden_size=channels, num_blocks=blocks))
    for name, parameter in ours.named_parameters():
        if ".offset." in name:
            nn.init.normal_(parameter, std=0.05)  # so that it deforms
    return {
        "Dynamic Head, ours": ours.eval(),
        "Dynamic Head, naive": NaiveHead(ours).eval(),
        "RetinaNet's head": RetinaNetHead(channels, ANCHORS, CLASSES).eval(),
    }


def make_detectors(channels: int, blocks: int) -> dict[str, nn.Module]:
    """Ours and the peers, of 80 classes."""
    config = FlorenceDetectionConfig.from_size("nano", hidden_size=channels, num_blocks=blocks, num_labels=CLASSES)
    body = RTDetrResNetConfig(
        depths=[2, 2, 2, 2], hidden_sizes=[64, 128, 256, 512], layer_type="basic", out_indices=[2, 3, 4]
    )
    peer = RTDetrConfig(
        backbone_config=body,
        encoder_in_channels=[128, 256, 512],
        hidden_expansion=0.5,
        decoder_layers=3,
        num_labels=CLASSES,
    )
    detectors = {
        "florence nano": FlorenceForObjectDetection(config),
        "RetinaNet, ResNet-18": PlainRetinaNet(channels),
        "RT-DETR, ResNet-18": RTDetrForObjectDetection(peer),
    }
    return {name: model.eval() for name, model in detectors.items()}


def main(argv: list[str] | None = None) -> list[tuple]:
    """Measure; returns the rows that are printed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", type=int, nargs="+", default=[320, 640], help="of the square pictures, pixels")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--channels", type=int, default=128, help="of pyramids and heads")
    parser.add_argument("--blocks", type=int, default=2, help="of the Dynamic Head")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(argv)
    if any(side % 32 or side < SMALLEST for side in options.sides):
        parser.error(f"--sides: expected multiples of 32 from {SMALLEST} on, as RT-DETR needs, got {options.sides}")
    torch.manual_seed(0)
    rows: list[tuple] = []
    print("| what | side | parameters | forward ms a picture | processor | step ms a picture | processor |")
    print("|---|---|---|---|---|---|---|")
    for side in options.sides:
        maps = tuple(
            torch.randn(options.batch, options.channels, *[math.ceil(side / stride)] * 2) for stride in STRIDES
        )
        heads, detectors = (make(options.channels, options.blocks) for make in (make_heads, make_detectors))
        with torch.no_grad():
            ours, naive = (outputs_of(heads[f"Dynamic Head, {kind}"], maps) for kind in ("ours", "naive"))
        for one, other in zip(ours, naive, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
        pictures = torch.randn(options.batch, 3, side, side)
        for models, inputs in ((heads, list(maps)), (detectors, pictures)):
            given = {name: tuple(maps) if "Dynamic" in name else inputs for name in models}
            results = [
                measure({name: partial(call, model, given[name]) for name, model in models.items()}, options.rounds)
                for call in (forward, step)
            ]
            for name, model in models.items():
                parameters = sum(weight.numel() for weight in model.parameters())
                times = [value / options.batch for result in results for value in result[name]]
                rows.append((name, side, parameters, *times))
                print(f"| {name} | {side} | {parameters:,} | " + " | ".join(f"{value:.1f}" for value in times) + " |")
    return rows


if __name__ == "__main__":
    main()
