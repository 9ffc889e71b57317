# Copyright 2026 The transformers_florence authors. Licensed under the Apache License, Version 2.0.
"""Dynamic Head (Dai et al. 2021): attention over scale, space and task on a feature pyramid (Florence section 2.4).

The paper writes a block as task(space(scale(pyramid))). Its authors' code computes task(scale(space(pyramid))), as
here, and as every published weight expects: deformable convolutions bring the neighbouring levels to each level's
size, attention over scale weighs them and adds them up, attention over tasks switches channels.

Offsets and masks of a level come from that level's own map, for all of its up to three convolutions. The one on the
next coarser level has an output of half the size, so that it needs a quarter of the offsets, and there are two
conventions of which. `"crop"`: the upper left quarter (mmdetection). `"official"`: the published code passes the map
as it is, and its kernel, which assumes the output's size, reads the numbers from the start of the memory.
"""

import itertools

import torch
from torch import nn
from torch.nn import functional as F
from torchvision.ops import deform_conv2d
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.generic import maybe_autocast

from .configuration_florence_detection import NORM_GROUPS, FlorenceDetectionConfig

KERNEL_SIZE = 3
TAPS = KERNEL_SIZE**2  # positions that a kernel looks at: two offsets (down, right) and one mask each
SPATIAL_LIMIT = 3  # in the spatial mode, an average position counts 1 / 3, none more than 1


def read_offsets(values: torch.Tensor, grid: tuple[int, int], layout: str) -> torch.Tensor:
    """The part of a map of offsets or masks that a convolution of a smaller output reads.

    values: (batch, channels, height, width); grid: height and width of the output; layout: see the module.
    Returns (batch, channels, *grid).
    """
    batch, channels, *size = values.shape
    if tuple(size) == tuple(grid):
        return values
    height, width = grid
    if layout == "crop":
        return values[:, :, :height, :width]
    return values.flatten(1)[:, : channels * height * width].reshape(batch, channels, height, width)


class Predictor(nn.Conv2d):
    """A convolution that starts out near a constant: narrow normal weights around zero, one bias for all outputs.

    What it is made with is read by the models' `_init_weights`; a convolution alone has torch's own weights. It
    computes in float32 at least, whatever goes in: half precision would round offsets and boxes by pixels.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int = 1, *, std: float = 0.01, bias_value: float = 0.0
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2)
        self.std, self.bias_value = std, bias_value

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """hidden_states: (batch, in_channels, height, width) -> (batch, out_channels, height, width)."""
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        with maybe_autocast(hidden_states.device.type, enabled=False):
            return F.conv2d(
                hidden_states.to(dtype), self.weight.to(dtype), self.bias.to(dtype), self.stride, self.padding
            )


def sample_taps(values: torch.Tensor, offsets: torch.Tensor, mask: torch.Tensor, stride: int) -> torch.Tensor:
    """What the taps of a modulated deformable convolution see: bilinear, zero outside of the map.

    values: (batch, channels, rows, columns); offsets: (batch, 2 * taps, height, width), down before right; mask:
    (batch, taps, height, width). Returns (batch, channels * taps, height * width), in the order of the weights.
    """
    batch, channels, rows, columns = values.shape
    height, width = offsets.shape[2:]
    reach = KERNEL_SIZE // 2
    sides = [torch.arange(-reach, reach + 1, dtype=values.dtype, device=values.device)] * 2
    down, right = (each.reshape(1, TAPS, 1, 1) for each in torch.meshgrid(*sides, indexing="ij"))
    starts = [torch.arange(size, dtype=values.dtype, device=values.device) * stride for size in (height, width)]
    moved = offsets.unflatten(1, (TAPS, 2))
    y, x = moved[:, :, 0] + down + starts[0][:, None], moved[:, :, 1] + right + starts[1]
    grid = torch.stack(((2 * x + 1) / columns - 1, (2 * y + 1) / rows - 1), dim=-1)  # edges of the map at -1 and 1
    seen = F.grid_sample(values, grid.flatten(1, 2), padding_mode="zeros", align_corners=False)
    seen = seen.view(batch, channels, TAPS, height * width) * mask.flatten(2)[:, None]
    return seen.flatten(1, 2)


class ModulatedDeformConv(nn.Conv2d):
    """Deformable convolution with a mask (DCN v2): offsets say where each tap looks, masks how much it counts."""

    def __init__(self, config: FlorenceDetectionConfig, *, stride: int = 1) -> None:
        super().__init__(config.hidden_size, config.hidden_size, KERNEL_SIZE, stride, padding=KERNEL_SIZE // 2)

    def forward(  # type: ignore[override]  # a convolution that has to be told where to look
        self, hidden_states: torch.Tensor, offsets: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """hidden_states: (batch, channels, rows, columns) -> (batch, channels, height, width).

        offsets: (batch, 2 * taps, height, width) in locations, down before right; mask: (batch, taps, height, width).
        """
        # torchvision has no kernel for bfloat16 on the CPU, and bilinear weights need more digits than it has.
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        values, offsets, mask, weight, bias = (
            each.to(dtype) for each in (hidden_states, offsets, mask, self.weight, self.bias)
        )
        with maybe_autocast(hidden_states.device.type, enabled=False):
            if hidden_states.device.type == "cpu" and not torch.compiler.is_compiling():
                # The same sums; torchvision's kernel for the CPU takes four times as long in a training step.
                taps = sample_taps(values, offsets, mask, self.stride[0])
                output = (weight.flatten(1) @ taps).unflatten(-1, offsets.shape[2:]) + bias[:, None, None]
            else:
                output = deform_conv2d(values, offsets, weight, bias, self.stride, self.padding, mask=mask)
        return output.to(hidden_states.dtype)


class DeformableBranch(nn.Module):
    """Deformable convolution, then group norm."""

    def __init__(self, config: FlorenceDetectionConfig, *, stride: int = 1) -> None:
        super().__init__()
        self.conv = ModulatedDeformConv(config, stride=stride)
        self.norm = nn.GroupNorm(NORM_GROUPS, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor, offsets: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """See `ModulatedDeformConv.forward`."""
        return self.norm(self.conv(hidden_states, offsets, mask))


class SpatialAwareAttention(nn.Module):
    """Where to look: a level and its neighbours, each through a deformable convolution, at the level's size."""

    def __init__(self, config: FlorenceDetectionConfig) -> None:
        super().__init__()
        self.offset_layout = config.offset_layout
        # Every tap starts at its own place, half on (DCN v2).
        self.offset = Predictor(config.hidden_size, 3 * TAPS, KERNEL_SIZE, std=0.0)
        self.same = DeformableBranch(config)
        self.finer = DeformableBranch(config, stride=2)
        self.coarser = DeformableBranch(config)

    def forward(
        self, hidden_states: torch.Tensor, finer: torch.Tensor | None, coarser: torch.Tensor | None
    ) -> list[torch.Tensor]:
        """
        Args:
            hidden_states: the level, (batch, channels, height, width).
            finer, coarser: the maps of its neighbours, of about twice and half the size; None at the ends.

        Returns:
            of the level and each neighbour (batch, channels, height, width).
        """
        offsets, mask = self.offset(hidden_states).split((2 * TAPS, TAPS), dim=1)
        mask = mask.sigmoid()
        branches = [self.same(hidden_states, offsets, mask)]
        if finer is not None:
            branches.append(self.finer(finer, offsets, mask))
        if coarser is not None:
            height, width = coarser.shape[2:]
            readings = (read_offsets(values, (height, width), self.offset_layout) for values in (offsets, mask))
            branch = self.coarser(coarser, *readings)
            size = hidden_states.shape[2:]
            branches.append(F.interpolate(branch, size=size, mode="bilinear", align_corners=True))
        return branches


class ScaleAwareAttention(nn.Module):
    """Which level matters: one weight for each picture and level, from what the level holds on average."""

    def __init__(self, config: FlorenceDetectionConfig) -> None:
        super().__init__()
        self.projection = Predictor(config.hidden_size, 1)

    def forward(self, branches: list[torch.Tensor]) -> torch.Tensor:
        """branches: each (batch, channels, height, width) -> their weighted mean, same shape."""
        pooled = torch.cat([branch.mean(dim=(2, 3), keepdim=True) for branch in branches])
        # After the rectifier the hard sigmoid leaves weights between a half and one: no level is switched off.
        weights = F.hardsigmoid(F.relu(self.projection(pooled))).to(pooled.dtype)
        # Not `chunk`, whose number of parts torch.export cannot tell for a batch of any size.
        first, *others = weights.unflatten(0, (len(branches), -1)).unbind()  # each (batch, 1, 1, 1)
        total = branches[0] * first
        for branch, weight in zip(branches[1:], others, strict=True):
            total = total + branch * weight
        return total / len(branches)


class TaskAwareAttention(nn.Module):
    """Which channels a task needs: a dynamic rectifier (DyReLU) whose slopes depend on the picture.

    Args:
        config: its `hidden_size` is the number of channels.
        num_slopes: 2 for the maximum of two lines (what the Dynamic Head uses), 1 for a single line.
        use_bias: whether the lines have offsets (the Dynamic Head's have).
        reduction: channels over the hidden width of the network that makes slopes and offsets.
        use_spatial: whether positions get weights too. No published detector does.
    """

    def __init__(
        self,
        config: FlorenceDetectionConfig,
        *,
        num_slopes: int = 2,
        use_bias: bool = True,
        reduction: int = 4,
        use_spatial: bool = False,
    ) -> None:
        super().__init__()
        channels = config.hidden_size
        width = channels // reduction
        if reduction != 4:  # the authors' rule: a multiple of four, at most a tenth less than asked for
            width = max(4, (width + 2) // 4 * 4)
            width += 4 if width < 0.9 * (channels // reduction) else 0
        self.num_slopes, self.use_bias = num_slopes, use_bias
        self.fc1 = nn.Linear(channels, width)
        self.fc2 = nn.Linear(width, channels * num_slopes * (1 + use_bias))
        self.spatial = nn.Sequential(nn.Conv2d(channels, 1, 1), nn.BatchNorm2d(1)) if use_spatial else None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """hidden_states: (batch, channels, height, width) -> same shape."""
        batch, channels, height, width = hidden_states.shape
        coefficients = F.hardsigmoid(self.fc2(F.relu(self.fc1(hidden_states.mean(dim=(2, 3)))))) - 0.5
        coefficients = coefficients.view(batch, self.num_slopes, -1, channels, 1, 1)
        lines = []
        for number, line in enumerate(coefficients.unbind(dim=1)):  # (batch, slope and bias, channels, 1, 1)
            slope = 2 * line[:, 0] + (1 if number == 0 else 0)  # the identity and zero, before anything is learnt
            lines.append(hidden_states * slope + line[:, 1] if self.use_bias else hidden_states * slope)
        output = lines[0] if len(lines) == 1 else torch.maximum(*lines)
        if self.spatial is not None:
            weights = self.spatial(hidden_states).flatten(1).softmax(dim=1) * (height * width)
            output = output * (weights.clamp(0, SPATIAL_LIMIT) / SPATIAL_LIMIT).view(batch, 1, height, width)
        return output


class DynamicHeadBlock(GradientCheckpointingLayer):
    """One round of the three attentions over the whole pyramid; its weights are the same for every level."""

    def __init__(self, config: FlorenceDetectionConfig) -> None:
        super().__init__()
        self.spatial_attention = SpatialAwareAttention(config)
        self.scale_attention = ScaleAwareAttention(config)
        self.task_attention = TaskAwareAttention(config)

    def forward(self, *maps: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """maps: the levels, finest first, each (batch, channels, height, width) -> same shapes."""
        outputs = []
        for level, hidden_states in enumerate(maps):
            finer = maps[level - 1] if level > 0 else None
            coarser = maps[level + 1] if level + 1 < len(maps) else None
            fused = self.scale_attention(self.spatial_attention(hidden_states, finer, coarser))
            outputs.append(self.task_attention(fused))
        return tuple(outputs)


class DynamicHead(nn.Module):
    """A stack of blocks. Any number of levels: with a single one, each block only deforms and switches channels."""

    def __init__(self, config: FlorenceDetectionConfig) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(DynamicHeadBlock(config) for _ in range(config.num_blocks))

    def forward(self, maps: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """
        Args:
            maps: the levels, finest first, each (batch, hidden_size, height, width).

        Returns:
            as many maps of the same shapes.

        Raises:
            ValueError: no level, or one whose sides are not half of the one before, rounded up.
        """
        if not maps:
            raise ValueError("expected at least one level, got none")
        for level, (finer, coarser) in enumerate(itertools.pairwise(maps)):
            expected = tuple((side + 1) // 2 for side in finer.shape[2:])
            if tuple(coarser.shape[2:]) != expected:
                raise ValueError(f"expected a map of {expected} at level {level + 1}, got {tuple(coarser.shape[2:])}")
        for block in self.blocks:
            maps = block(*maps)
        return maps


__all__ = [
    "DynamicHead",
    "DynamicHeadBlock",
    "ModulatedDeformConv",
    "Predictor",
    "ScaleAwareAttention",
    "SpatialAwareAttention",
    "TaskAwareAttention",
    "read_offsets",
]
