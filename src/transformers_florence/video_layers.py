# Copyright 2026 The transformers_florence authors. Licensed under the Apache License, Version 2.0.
"""Bricks of Video CoSwin: the image tower's embeddings, layers and stages on grids of time, height and width."""

import math
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F

from .configuration_florence import FlorenceVisionConfig
from .configuration_florence_video import FlorenceVideoConfig
from .layers import Linear, PatchMerging, WindowAttention
from .modeling_florence_vision import CoSwinEncoder, CoSwinLayer, CoSwinStage
from .window_ops import (
    fit_window,
    pad_grid,
    padded_grid,
    relative_position_index,
    resize_relative_position_table,
    shift_mask,
)


def pad_time(clips: torch.Tensor, before: int, after: int, policy: str) -> torch.Tensor:
    """(batch, time, ...) -> (batch, before + time + after, ...); policy: `FlorenceVideoConfig.temporal_padding`."""
    if not before and not after:
        return clips
    first, last = clips[:, :1], clips[:, -1:]
    if policy == "zeros":
        first, last = torch.zeros_like(first), torch.zeros_like(last)
    size = [-1] * (clips.ndim - 2)
    return torch.cat([first.expand(-1, before, *size), clips, last.expand(-1, after, *size)], dim=1)


def resize_video_table(table: torch.Tensor, window: tuple[int, ...], new_window: tuple[int, ...]) -> torch.Tensor:
    """A table `(prod(2 * side - 1), num_heads)` over (time, height, width), or over time alone, for another window.

    Each offset in time is resized in space as the image tower's table, then each offset in space linearly along time.
    So a table that is the same at every offset in time, as an inflated one, stays so.
    """
    times, new_times, heads = 2 * window[0] - 1, 2 * new_window[0] - 1, table.shape[1]
    grid = table.unflatten(0, (times, -1)).movedim(0, 1)  # (area, times, heads)
    if window[1:] != new_window[1:]:
        grid = resize_relative_position_table(grid.flatten(1), window[1:], new_window[1:]).unflatten(1, (times, heads))
    if times != new_times:
        lines = grid.movedim(1, 2).to(torch.promote_types(table.dtype, torch.float32))  # (area, heads, times)
        grid = F.interpolate(lines, size=new_times, mode="linear", align_corners=False).movedim(2, 1).to(table.dtype)
    return grid.movedim(1, 0).flatten(0, 1).contiguous()


class TubeConv(nn.Conv3d):
    """`nn.Conv3d` without padding along time; where tubes do not overlap in time, as one convolution of pictures.

    The frames of a tube are then the channels of one picture: a product of the same numbers that every backend is
    good at, with nothing copied.
    """

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        """clips: (batch, channels, frames, height, width) -> (batch, dim, tokens of time, rows, columns)."""
        length = self.kernel_size[0]
        if length != self.stride[0]:
            return super().forward(clips)
        clips = clips.transpose(1, 2).unflatten(1, (-1, length))  # (batch, tokens, length, channels, height, width)
        tokens = clips.shape[1]
        pictures = clips.flatten(0, 1).flatten(1, 2)  # (batch * tokens, length * channels, height, width)
        weight = self.weight.transpose(1, 2).flatten(1, 2)
        stride, padding = self.stride[1:], cast("tuple[int, ...]", self.padding)[1:]
        result = F.conv2d(pictures, weight, self.bias, stride, padding)
        return result.unflatten(0, (-1, tokens)).transpose(1, 2)


class TubeEmbed(nn.Module):
    """The image tower's `ConvEmbed`, or its `PatchEmbed`, with an extent along time: a tube of frames is a token."""

    def __init__(self, config: FlorenceVideoConfig, *, index: int) -> None:
        super().__init__()
        self.first = index == 0
        self.patches = config.embed_type == "patch"
        self.temporal_padding = config.temporal_padding
        in_dim, dim = ([config.num_channels, *config.embed_dims])[index], config.embed_dims[index]
        kernel, stride, padding = (4, 4, 0) if self.patches else (7, 4, 2) if self.first else (3, 2, 1)
        length, step = config.temporal_kernel_sizes[index], config.temporal_stride if self.first else 1
        self.projection = TubeConv(
            in_dim, dim, (length, kernel, kernel), (step, stride, stride), (0, padding, padding)
        )
        self.norm = nn.LayerNorm(dim, eps=config.layer_norm_eps)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(batch, frames, channels, height, width) if first, else a grid (batch, time, height, width, channels).

        Returns the grid of the stage: ceil(frames / temporal_stride) or as much time as before, and the rows and
        columns that the image tower makes of a frame.
        """
        if not self.first:
            hidden_states = hidden_states.permute(0, 1, 4, 2, 3)
        frames, height, width = hidden_states.shape[1], *hidden_states.shape[3:]
        length, step = self.projection.kernel_size[0], self.projection.stride[0]
        before = (length - step + 1) // 2
        after = (math.ceil(frames / step) - 1) * step + length - frames - before
        hidden_states = pad_time(hidden_states, before, after, self.temporal_padding)
        missing = (-height % 4, -width % 4) if self.patches else (max(0, 3 - height), max(0, 3 - width))
        if self.first and any(missing):
            hidden_states = F.pad(hidden_states, (0, missing[1], 0, missing[0]))
        return self.norm(self.projection(hidden_states.transpose(1, 2)).permute(0, 2, 3, 4, 1))


class FrameMerging(PatchMerging):
    """Swin's downsampling of every frame by itself; time stays."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(batch, time, height, width, channels) -> (batch, time, ceil(height / 2), ceil(width / 2), 2 * channels)."""
        time = hidden_states.shape[1]
        return super().forward(hidden_states.flatten(0, 1)).unflatten(0, (-1, time))


class ZeroLinear(Linear):
    """The last projection of a new branch: its weights begin at zero, so that the branch adds nothing at first."""


class TimeAttention(WindowAttention):
    """Window attention along time alone, a branch that the image tower does not have."""

    def __init__(self, config: FlorenceVideoConfig, *, dim: int, num_heads: int, time: int) -> None:
        super().__init__(config, dim=dim, num_heads=num_heads, window_size=(time,))
        self.out_proj = ZeroLinear(dim, dim)


class VideoCoSwinLayer(CoSwinLayer):
    """The image tower's layer on a grid of time and space.

    With divided attention each place first attends along time, behind a norm and a projection that begins at zero:
    at the start of training the layer is the image tower's, frame by frame.
    """

    def __init__(self, config: FlorenceVideoConfig, *, dim: int, num_heads: int, time: int, **fields: Any) -> None:
        super().__init__(config, dim=dim, num_heads=num_heads, **fields)
        self.temporal_padding = config.temporal_padding
        self.time_window = (time,)
        self.temporal_norm: nn.LayerNorm | None = None
        self.temporal_attention: TimeAttention | None = None
        if config.temporal_mode == "divided":
            self.temporal_norm = nn.LayerNorm(dim, eps=config.layer_norm_eps)
            self.temporal_attention = TimeAttention(config, dim=dim, num_heads=num_heads, time=time)

    def pad(self, hidden_states: torch.Tensor, grid: tuple[int, ...]) -> torch.Tensor:
        """(batch, *smaller grid, channels) -> (batch, *grid, channels); time, the first axis, as the policy says."""
        hidden_states = pad_time(hidden_states, 0, grid[0] - hidden_states.shape[1], self.temporal_padding)
        return pad_grid(hidden_states, grid)

    def attend_along_time(self, attention: WindowAttention, hidden_states: torch.Tensor) -> torch.Tensor:
        """(batch, time, height, width, channels) -> same shape: each place with itself at other times."""
        time, height, width = hidden_states.shape[1:4]
        lines = hidden_states.permute(0, 2, 3, 1, 4).flatten(0, 2)  # (batch * height * width, time, channels)
        half = (self.time_window[0] // 2 if self.shifted else 0,)
        window, shift = fit_window((time,), self.time_window, half, "clamp")
        index = relative_position_index(window, self.time_window, lines.device)
        mask = shift_mask(padded_grid((time,), window), window, shift, lines.dtype, lines.device)
        lines = self.attend(attention, lines, window, shift, index, mask)
        return lines.unflatten(0, (-1, height, width)).permute(0, 3, 1, 2, 4)

    def transform(self, hidden_states: torch.Tensor, *args: Any) -> torch.Tensor:
        """As the image tower's, after the attention along time where it is divided."""
        if self.temporal_attention is not None and self.temporal_norm is not None:
            branch = self.attend_along_time(self.temporal_attention, self.temporal_norm(hidden_states))
            hidden_states = hidden_states + self.drop_path(branch)
        return super().transform(hidden_states, *args)


class VideoCoSwinStage(CoSwinStage):
    """The image tower's stage on a grid of time and space."""

    def __init__(self, config: FlorenceVideoConfig, **fields: Any) -> None:
        super().__init__(config, **fields)
        self.clamped_bias = config.clamped_bias

    def window_of(self, config: FlorenceVisionConfig, index: int) -> tuple[int, ...]:
        return cast("FlorenceVideoConfig", config).windows[index]

    def make_embed(self, config: FlorenceVisionConfig, index: int) -> nn.Module:
        if config.embed_type == "patch":
            return FrameMerging(config, dim=config.embed_dims[index - 1])
        return TubeEmbed(cast("FlorenceVideoConfig", config), index=index)

    def make_layer(self, config: FlorenceVisionConfig, index: int, **fields: Any) -> CoSwinLayer:
        config = cast("FlorenceVideoConfig", config)
        dim, heads, time = config.embed_dims[index], config.num_heads[index], config.temporal_window_sizes[index]
        return VideoCoSwinLayer(config, dim=dim, num_heads=heads, window_size=self.window_size, time=time, **fields)

    def fit(self, grid: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Window and shift of this stage: time is clamped by itself, space as `window_padding` says."""
        half = tuple(side // 2 for side in self.window_size)
        each = self.window_padding == "clamp_axes"
        window, shift = fit_window(grid[:1], self.window_size[:1], half[:1], "clamp")
        for axes in (slice(1, 2), slice(2, 3)) if each else (slice(1, 3),):
            padding = "clamp" if each else self.window_padding
            sides, amounts = fit_window(grid[axes], self.window_size[axes], half[axes], padding)
            window, shift = window + sides, shift + amounts
        return window, shift

    def bias_index(self, window: tuple[int, ...], device: torch.device) -> torch.Tensor:
        if self.clamped_bias == "slice":
            area = math.prod(window)
            return relative_position_index(self.window_size, self.window_size, device)[:area, :area]
        return super().bias_index(window, device)


class VideoCoSwinEncoder(CoSwinEncoder):
    """The image tower's encoder on a grid of time and space."""

    stage_class = VideoCoSwinStage


__all__ = [
    "FrameMerging",
    "TimeAttention",
    "TubeConv",
    "TubeEmbed",
    "VideoCoSwinEncoder",
    "VideoCoSwinLayer",
    "VideoCoSwinStage",
    "ZeroLinear",
    "pad_time",
    "resize_video_table",
]
