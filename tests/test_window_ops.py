"""Window operations against slow loops, torchvision's and transformers' Swin, and their own inverses."""

import itertools
import math

import pytest
import torch
from torch.testing import assert_close
from torchvision.models.swin_transformer import ShiftedWindowAttention
from transformers import SwinConfig
from transformers.models.swin import modeling_swin

from transformers_florence.window_ops import (
    fit_window,
    pad_grid,
    padded_grid,
    relative_position_index,
    resize_relative_position_table,
    shift_mask,
    shift_regions,
    window_partition,
    window_reverse,
)

# (grid, window) whose sides divide: one, two and three dimensions, square and oblong, one window and many.
GRIDS = [
    ((6,), (3,)),
    ((4, 6), (2, 3)),
    ((7, 7), (7, 7)),
    ((3, 5), (1, 1)),
    ((4, 6, 4), (2, 3, 4)),
    ((2, 2, 2), (1, 2, 1)),
]


def cells(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Coordinates of a grid in row-major order."""
    return list(itertools.product(*[range(size) for size in shape]))


@pytest.mark.parametrize("grid, window", GRIDS)
def test_partition_lists_windows_and_their_cells_in_row_major_order(grid, window):
    hidden_states = torch.randn(2, *grid, 3)
    expected = [
        hidden_states[(batch, *[start * side + step for start, side, step in zip(corner, window, cell, strict=True)])]
        for batch in range(2)
        for corner in cells(tuple(size // side for size, side in zip(grid, window, strict=True)))
        for cell in cells(window)
    ]
    windows = window_partition(hidden_states, window)
    assert_close(windows, torch.stack(expected).view(-1, math.prod(window), 3), rtol=0, atol=0)


@pytest.mark.parametrize("grid, window", GRIDS)
def test_reverse_undoes_partition(grid, window):
    hidden_states = torch.randn(2, *grid, 3)
    assert torch.equal(window_reverse(window_partition(hidden_states, window), window, grid), hidden_states)


def test_partition_takes_grids_that_do_not_lie_in_one_piece():
    hidden_states = torch.randn(2, 3, 4, 6).permute(0, 2, 3, 1)  # as a convolution leaves it
    windows = window_partition(hidden_states, (2, 3))
    assert torch.equal(windows, window_partition(hidden_states.contiguous(), (2, 3)))
    assert torch.equal(window_reverse(windows, (2, 3), (4, 6)), hidden_states)


@pytest.mark.parametrize("window", [(7, 7), (4, 4), (3, 3), (2, 5), (1, 1)])
def test_relative_position_index_is_torchvisions(window):
    peer = ShiftedWindowAttention(8, list(window), [0, 0], 1).relative_position_index
    assert torch.equal(relative_position_index(window, window).flatten(), peer)


@pytest.mark.parametrize(
    "window, table_window", [((3,), (3,)), ((2, 3), (2, 3)), ((2, 3), (4, 4)), ((1, 2, 3), (2, 3, 3))]
)
def test_each_pair_reads_the_row_of_its_offset(window, table_window):
    """A table that holds each offset itself must give query minus key, whatever window the table was made for."""
    offsets = cells(tuple(2 * side - 1 for side in table_window))
    table = torch.tensor(offsets) - (torch.tensor(table_window) - 1)
    index = relative_position_index(window, table_window)
    assert index.dtype == torch.int64 and index.shape == (math.prod(window),) * 2
    for (row, query), (column, key) in itertools.product(enumerate(cells(window)), repeat=2):
        assert table[index[row, column]].tolist() == [a - b for a, b in zip(query, key, strict=True)]


@pytest.mark.parametrize("window", [(5, 4), (4, 5), (5, 5)])
def test_a_window_larger_than_its_table_is_refused(window):
    with pytest.raises(ValueError, match=r"at most \(4, 4\)"):
        relative_position_index(window, (4, 4))


def slow_mask(grid: tuple[int, ...], window: tuple[int, ...], shift: tuple[int, ...]) -> torch.Tensor:
    """0 where two cells of a window were as far apart before the roll as they are in the window, else -100."""
    before = [  # where the cell at each place of the rolled grid came from
        tuple((at + amount) % size for at, amount, size in zip(cell, shift, grid, strict=True)) for cell in cells(grid)
    ]
    coordinates = torch.tensor(before).view(*grid, len(grid))
    windows = window_partition(coordinates[None], window)
    inside = torch.tensor(cells(window))
    moved = (windows[:, :, None] - windows[:, None, :]) != (inside[:, None] - inside[None, :])
    return torch.where(moved.any(dim=-1), -100.0, 0.0)


@pytest.mark.parametrize(
    "grid, window, shift",
    [
        ((8, 8), (4, 4), (2, 2)),
        ((7, 14), (7, 7), (3, 3)),
        ((4, 4), (4, 4), (2, 2)),  # detection's Swin shifts even a single window
        ((6, 9), (2, 3), (1, 0)),
        ((3, 5), (1, 1), (0, 0)),
        ((9,), (3,), (1,)),
        ((4, 6, 6), (2, 3, 3), (1, 1, 1)),
        ((2, 4, 4), (2, 2, 2), (0, 1, 1)),
    ],
)
def test_shift_mask_parts_what_was_not_adjacent(grid, window, shift):
    mask = shift_mask(grid, window, shift, torch.float64)
    if not any(shift):
        assert mask is None
        return
    assert mask.dtype == torch.float64
    assert_close(mask, slow_mask(grid, window, shift).double(), rtol=0, atol=0)
    regions = shift_regions(grid, window, shift)
    assert torch.equal(regions[:, :, None] == regions[:, None, :], mask == 0)


@pytest.mark.parametrize("size", [(8, 8), (12, 20), (4, 4)])
def test_shift_mask_is_that_of_transformers_swin(size):
    layer = modeling_swin.SwinLayer(SwinConfig(window_size=4), 8, size, 2, shift_size=2)
    expected = layer.get_attn_mask(*size, torch.float32, torch.device("cpu"))
    assert torch.equal(shift_mask(size, (4, 4), (2, 2), torch.float32), expected)


@pytest.mark.parametrize(
    "grid, padding, expected",
    [
        ((8, 8), "clamp", ((4, 4), (2, 2))),
        ((5, 9), "clamp", ((4, 4), (2, 2))),
        ((4, 4), "clamp", ((4, 4), (0, 0))),
        ((4, 9), "clamp", ((4, 4), (0, 0))),  # one axis is enough: UniCL's rule
        ((9, 3), "clamp", ((3, 3), (0, 0))),
        ((1, 1), "clamp", ((1, 1), (0, 0))),
        ((3, 3), "pad", ((4, 4), (2, 2))),
        ((9, 3), "pad", ((4, 4), (2, 2))),
    ],
)
def test_fit_window(grid, padding, expected):
    assert fit_window(grid, (4, 4), (2, 2), padding) == expected


@pytest.mark.parametrize("side", range(1, 9))
def test_fit_window_is_the_rule_of_transformers_swin(side):
    layer = modeling_swin.SwinLayer(SwinConfig(window_size=4), 8, (side, 6), 2, shift_size=2)
    layer.set_shift_and_window_size((side, 6))
    assert fit_window((side, 6), (4, 4), (2, 2), "clamp") == ((layer.window_size,) * 2, (layer.shift_size,) * 2)


def test_padded_grid_is_the_smallest_that_divides():
    for height, width in itertools.product(range(1, 10), repeat=2):
        padded = padded_grid((height, width), (4, 3))
        assert padded[0] in (4, 8, 12) and padded[0] - 4 < height <= padded[0]
        assert padded[1] in (3, 6, 9) and padded[1] - 3 < width <= padded[1]
    assert padded_grid((1, 8, 9), (2, 4, 4)) == (2, 8, 12)


@pytest.mark.parametrize("shape, grid", [((2, 3, 5, 4), (4, 6)), ((2, 3, 5, 4), (3, 6)), ((1, 2, 3, 3, 2), (2, 5, 4))])
def test_pad_grid_adds_zeros_at_the_end(shape, grid):
    hidden_states = torch.randn(shape)
    padded = pad_grid(hidden_states, grid)
    assert padded.shape == (shape[0], *grid, shape[-1])
    inside = (slice(None), *[slice(size) for size in shape[1:-1]])
    assert torch.equal(padded[inside], hidden_states)
    assert padded.abs().sum() == pytest.approx(hidden_states.abs().sum().item())  # so the rest is zero


def test_pad_grid_copies_nothing_where_nothing_is_missing():
    hidden_states = torch.randn(1, 4, 6, 2)
    assert pad_grid(hidden_states, (4, 6)) is hidden_states


def cubic(distance: float) -> float:
    """Keys' cubic convolution kernel with a = -0.75, the one that torch interpolates with."""
    distance = abs(distance)
    if distance < 1:
        return 1.25 * distance**3 - 2.25 * distance**2 + 1
    return -0.75 * distance**3 + 3.75 * distance**2 - 6 * distance + 3 if distance < 2 else 0.0


def interpolation_matrix(old: int, new: int) -> torch.Tensor:
    """(new, old): weights of bicubic resampling with half-pixel centres and repeated borders."""
    matrix = torch.zeros(new, old, dtype=torch.float64)
    for row in range(new):
        centre = (row + 0.5) * old / new - 0.5
        for tap in range(math.floor(centre) - 1, math.floor(centre) + 3):
            matrix[row, min(max(tap, 0), old - 1)] += cubic(centre - tap)
    return matrix


@pytest.mark.parametrize(
    "window, new_window", [((4, 4), (7, 7)), ((7, 7), (4, 4)), ((7, 7), (12, 12)), ((2, 3), (4, 2)), ((1, 1), (3, 3))]
)
def test_resized_tables_are_bicubic(window, new_window):
    (old_height, old_width), (height, width) = [[2 * side - 1 for side in sides] for sides in (window, new_window)]
    table = torch.randn(old_height * old_width, 3)
    rows, columns = interpolation_matrix(old_height, height), interpolation_matrix(old_width, width)
    expected = torch.einsum("ya,xb,abh->yxh", rows, columns, table.double().view(old_height, old_width, 3))
    resized = resize_relative_position_table(table, window, new_window)
    assert resized.is_contiguous()
    assert_close(resized, expected.reshape(-1, 3).float(), rtol=0, atol=1e-5)


def test_resizing_keeps_constants_and_dtype_and_does_nothing_for_the_same_window():
    table = torch.tensor([1.0, -2.0, 0.5], dtype=torch.bfloat16).expand(49, 3)
    resized = resize_relative_position_table(table, (4, 4), (7, 7))
    assert resized.dtype == torch.bfloat16
    assert_close(resized, table[:1].expand(169, 3), rtol=0, atol=0)
    assert resize_relative_position_table(table, (4, 4), (4, 4)) is table


def test_only_flat_tables_are_resized():
    with pytest.raises(ValueError, match="two-dimensional"):
        resize_relative_position_table(torch.zeros(27, 1), (2, 2, 2), (3, 3, 3))
