# Copyright 2026 The transformers_florence authors. Licensed under the Apache License, Version 2.0.
"""Window operations on channels-last grids `(batch, *grid, channels)` of any rank: 2D pictures and 3D clips alike."""

import math

import torch
from torch.nn import functional as F


def fit_window(
    grid: tuple[int, ...], window: tuple[int, ...], shift: tuple[int, ...], padding: str
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Window and shift that a layer really uses on a grid.

    With `padding="pad"` both stay as they are (detection's Swin: pad to the window, always shift). With
    `padding="clamp"` a grid whose shortest side is no longer than the window gets one size of window for every
    axis, that shortest side, and no shift (UniCL's Swin).
    """
    if padding == "clamp" and min(grid) <= min(window):
        return (min(grid),) * len(grid), (0,) * len(grid)
    return window, shift


def padded_grid(grid: tuple[int, ...], window: tuple[int, ...]) -> tuple[int, ...]:
    """The grid rounded up to whole windows on every axis."""
    return tuple(math.ceil(size / side) * side for size, side in zip(grid, window, strict=True))


def pad_grid(hidden_states: torch.Tensor, grid: tuple[int, ...]) -> torch.Tensor:
    """Zero-pad `(batch, *grid, channels)` at the end of each axis to the given grid; itself if it has that size."""
    missing = [target - size for target, size in zip(grid, hidden_states.shape[1:-1], strict=True)]
    if not any(missing):
        return hidden_states
    # F.pad counts from the last axis: nothing for the channels, then (before, after) for each axis backwards.
    return F.pad(hidden_states, [0, 0] + [amount for size in reversed(missing) for amount in (0, size)])


def window_partition(hidden_states: torch.Tensor, window: tuple[int, ...]) -> torch.Tensor:
    """`(batch, *grid, channels)` -> `(batch * num_windows, window_area, channels)`; the grid must divide."""
    batch, *grid, channels = hidden_states.shape
    rank = len(window)
    split = [item for size, side in zip(grid, window, strict=True) for item in (size // side, side)]
    hidden_states = hidden_states.view(batch, *split, channels)
    # (batch, n1, w1, n2, w2, ..., channels) -> (batch, n1, n2, ..., w1, w2, ..., channels)
    order = [0, *range(1, 2 * rank, 2), *range(2, 2 * rank + 1, 2), 2 * rank + 1]
    return hidden_states.permute(order).reshape(-1, math.prod(window), channels)


def window_reverse(windows: torch.Tensor, window: tuple[int, ...], grid: tuple[int, ...]) -> torch.Tensor:
    """`(batch * num_windows, window_area, channels)` -> `(batch, *grid, channels)`: undoes `window_partition`."""
    rank = len(window)
    counts = [size // side for size, side in zip(grid, window, strict=True)]
    windows = windows.view(-1, *counts, *window, windows.shape[-1])
    order = [0, *[axis for index in range(rank) for axis in (1 + index, 1 + rank + index)], 1 + 2 * rank]
    return windows.permute(order).reshape(-1, *grid, windows.shape[-1])


def relative_position_index(
    window: tuple[int, ...], table_window: tuple[int, ...], device: torch.device | None = None
) -> torch.Tensor:
    """Rows of a relative-position table, int64 `(window_area, window_area)`, for query (row) and key (column).

    `table_window` is the window that the table was made for: `prod(2 * side - 1)` rows, offsets in row-major
    order, from `-(side - 1)` to `side - 1` on each axis. A smaller `window` reads the rows of its own offsets,
    so that the same offset has the same bias in every window.
    """
    for side, table_side in zip(window, table_window, strict=True):
        if side > table_side:
            raise ValueError(f"expected a window of at most {table_window}, the table's own, got {window}")
    # The row of an offset is linear in it: each cell's number by the table's strides, once for queries, once for keys.
    number, middle = torch.zeros((), dtype=torch.long, device=device), 0
    for side, table_side in zip(window, table_window, strict=True):
        stride = 2 * table_side - 1
        number = number[..., None] * stride + torch.arange(side, device=device)
        middle = middle * stride + table_side - 1
    number = number.flatten()
    return (number + middle)[:, None] - number


def resize_relative_position_table(
    table: torch.Tensor, window: tuple[int, ...], new_window: tuple[int, ...]
) -> torch.Tensor:
    """A table `(prod(2 * side - 1), num_heads)` for another window, resized bicubically over its last two axes.

    This is how the authors of Swin carry weights to larger windows. The table's dtype stays; the interpolation runs in
    float32 at least, because CPUs have no bicubic kernel for half precision.
    """
    if window == new_window:
        return table
    if len(window) != 2 or len(new_window) != 2:
        raise ValueError(f"expected two-dimensional windows, got {window} and {new_window}")
    old_height, old_width = (2 * side - 1 for side in window)
    grid = table.T.reshape(1, -1, old_height, old_width)  # (1, num_heads, 2h-1, 2w-1)
    grid = grid.to(torch.promote_types(table.dtype, torch.float32))
    new_size = tuple(2 * side - 1 for side in new_window)
    grid = F.interpolate(grid, size=new_size, mode="bicubic", align_corners=False)
    return grid.flatten(2)[0].T.contiguous().to(table.dtype)


def shift_regions(
    grid: tuple[int, ...], window: tuple[int, ...], shift: tuple[int, ...], device: torch.device | None = None
) -> torch.Tensor:
    """Region number of each cell of a grid that was rolled by `-shift`, int64 `(num_windows, window_area)`.

    Cells of one window that lie in different regions were not neighbours before the roll.
    """
    regions = torch.zeros(grid, dtype=torch.long, device=device)
    for axis, (size, side, amount) in enumerate(zip(grid, window, shift, strict=True)):
        index = torch.arange(size, device=device)
        band = (index >= size - side).long() + (index >= size - amount).long() if amount else torch.zeros_like(index)
        shape = [1] * len(grid)
        shape[axis] = size
        regions = regions * 3 + band.view(shape)
    return window_partition(regions[None, ..., None], window)[..., 0]


def shift_mask(
    grid: tuple[int, ...],
    window: tuple[int, ...],
    shift: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device | None = None,
) -> torch.Tensor | None:
    """Additive attention mask `(num_windows, window_area, window_area)` of a shifted layer, `None` without shift.

    0 where query and key were neighbours before the roll, -100 where they were not (Swin's own constant, which a
    half-precision softmax takes without overflow).
    """
    if not any(shift):
        return None
    regions = shift_regions(grid, window, shift, device)
    apart = regions[:, :, None] != regions[:, None, :]
    return torch.zeros(apart.shape, dtype=dtype, device=device).masked_fill(apart, -100.0)


__all__ = [
    "fit_window",
    "pad_grid",
    "padded_grid",
    "relative_position_index",
    "resize_relative_position_table",
    "shift_mask",
    "shift_regions",
    "window_partition",
    "window_reverse",
]
