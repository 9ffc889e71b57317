"""The towers' bricks against torch's own functions written out, torchvision's Swin, and slow loops in float64."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from torchvision.models.swin_transformer import PatchMerging as TorchvisionPatchMerging

from tests.oracles import randomize
from transformers_florence import layers
from transformers_florence.configuration_florence import FlorenceVisionConfig
from transformers_florence.layers import (
    ConvEmbed,
    DropPath,
    FeedForward,
    Linear,
    PatchEmbed,
    PatchMerging,
    WindowAttention,
    eager_attention,
)
from transformers_florence.window_ops import relative_position_index, shift_mask, window_partition


def tiny_config(**fields) -> FlorenceVisionConfig:
    shape = dict(image_size=32, embed_dim=8, depths=[2], num_heads=[2], window_size=4, attn_implementation="sdpa")
    return FlorenceVisionConfig(**{**shape, **fields})


def layer_norm(tokens: torch.Tensor, norm: nn.LayerNorm) -> torch.Tensor:
    """Layer norm over the last axis, written out."""
    centred = tokens - tokens.mean(dim=-1, keepdim=True)
    return centred / (centred.square().mean(dim=-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias


def convolve(pixels: torch.Tensor, conv: nn.Conv2d) -> torch.Tensor:
    """A convolution as a product of patches and weights, (batch, height, width, channels)."""
    patches = F.unfold(pixels, conv.kernel_size, padding=conv.padding, stride=conv.stride)
    tokens = torch.einsum("bkn,ck->bnc", patches, conv.weight.flatten(1)) + conv.bias
    (top, left), (height, width), stride = conv.padding, conv.kernel_size, conv.stride[0]
    rows = (pixels.shape[2] + 2 * top - height) // stride + 1
    return tokens.unflatten(1, (rows, (pixels.shape[3] + 2 * left - width) // stride + 1))


# ------------------------------------------------------------------------------------------------------- drop path


def test_drop_path_keeps_or_drops_whole_samples_and_keeps_the_mean():
    hidden_states = torch.rand(20_000, 2, 3) + 1
    dropped = DropPath(0.3).train()(hidden_states)
    kept = dropped[:, 0, 0] != 0
    assert_close(dropped[kept], hidden_states[kept] / 0.7)
    assert dropped[~kept].abs().max() == 0
    deviation = math.sqrt(0.3 * 0.7 / len(kept))
    assert kept.double().mean().item() == pytest.approx(0.7, abs=4 * deviation)
    # Samples are drawn one by one: neighbours agree as often as independent coins do.
    agreement = (kept[1:] == kept[:-1]).double().mean().item()
    assert agreement == pytest.approx(0.3**2 + 0.7**2, abs=4 * deviation)


def test_drop_path_does_nothing_in_evaluation_or_at_rate_zero():
    hidden_states = torch.randn(4, 3, 3, 2)
    assert torch.equal(DropPath(0.9).eval()(hidden_states), hidden_states)
    assert torch.equal(DropPath(0.0).train()(hidden_states), hidden_states)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_drop_path_draws_anew_and_keeps_dtype_and_gradient(dtype):
    layer = DropPath(0.5).train()
    hidden_states = torch.ones(64, 2, dtype=dtype, requires_grad=True)
    first, second = layer(hidden_states), layer(hidden_states)
    assert first.dtype == dtype and not torch.equal(first, second)
    (gradient,) = torch.autograd.grad(first.sum(), hidden_states)
    assert torch.equal(gradient, first.detach())  # the input is one: what came through is what flows back


# ---------------------------------------------------------------------------------------------------- feed-forward


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 3, 5), (1, 1, 1)])
def test_linear_is_torchs_however_it_is_computed(monkeypatch, shape, bias, fast):
    """Values and gradients of all inputs, also of a grid whose memory is not in order."""
    monkeypatch.setattr(layers, "HAS_FAST_CONVOLUTION", fast)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)  # or float32 would never be fast
    layer = randomize(Linear(8, 12, bias=bias))
    for grid in (torch.randn(*shape, 8), torch.randn(8, *shape).movedim(0, -1)):
        grid.requires_grad_()
        expected = grid.double() @ layer.weight.double().T
        if bias:
            expected = expected + layer.bias.double()
        output = layer(grid)
        assert output.dtype == torch.float32 and output.shape == (*shape, 12)
        assert_close(output.double(), expected, rtol=1e-5, atol=1e-5)
        inputs = [grid, *layer.parameters()]
        gradients = torch.autograd.grad(output.square().sum(), inputs)
        assert_close(gradients, torch.autograd.grad(expected.square().sum(), inputs), rtol=1e-4, atol=1e-4)
        assert all(gradient.shape == one.shape for gradient, one in zip(gradients, inputs, strict=True))


def test_linear_takes_the_convolution_where_it_is_faster(monkeypatch):
    """Double precision, vectors, autocast, bfloat16 from many channels and float32 on one thread go the plain way; so
    does a compiler.
    """
    monkeypatch.setattr(layers, "HAS_FAST_CONVOLUTION", True)
    taken = []
    conv2d = F.conv2d
    monkeypatch.setattr(F, "conv2d", lambda *arguments: taken.append(1) or conv2d(*arguments))
    layer = Linear(8, 8)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    layer(torch.randn(2, 3, 8))
    assert not taken
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    layer(torch.randn(2, 3, 8))
    assert len(taken) == 1
    layer(torch.randn(3, 8))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(2, 3, 8)).dtype == torch.bfloat16
    for dtype in (torch.float16, torch.float64):
        assert layer.to(dtype)(torch.randn(2, 3, 8, dtype=dtype)).dtype == dtype
    wide = Linear(512, 8).to(torch.bfloat16)
    assert wide(torch.randn(2, 3, 512, dtype=torch.bfloat16)).dtype == torch.bfloat16
    exported = torch.export.export(layer.float(), (torch.randn(2, 3, 8),))
    assert not any("conv" in str(node.target) for node in exported.graph.nodes)
    assert len(taken) == 1
    assert layer.to(torch.bfloat16)(torch.randn(2, 3, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert len(taken) == 2


def test_linear_in_bfloat16_rounds_once(monkeypatch):
    """Products and bias are added up in more digits than the result has, which is the nearest to the exact one."""
    monkeypatch.setattr(layers, "HAS_FAST_CONVOLUTION", True)
    layer = randomize(Linear(96, 64)).to(torch.bfloat16)
    grid = torch.randn(2, 7, 5, 96, dtype=torch.bfloat16)
    exact = grid.double() @ layer.weight.double().T + layer.bias.double()
    assert_close(layer(grid).double(), exact, rtol=torch.finfo(torch.bfloat16).eps / 2, atol=1e-5)


def test_linear_refuses_another_width(monkeypatch):
    for fast in (True, False):
        monkeypatch.setattr(layers, "HAS_FAST_CONVOLUTION", fast)
        with pytest.raises(RuntimeError):
            Linear(8, 4)(torch.randn(2, 8, 4))


@pytest.mark.parametrize("shape", [(3,), (2, 5, 7), (1, 96, 130)])
@pytest.mark.parametrize("mlp_ratio, hidden", [(4.0, 32), (1.3, 10)])
def test_feed_forward_is_two_products_and_an_exact_gelu(shape, mlp_ratio, hidden):
    """The same with and without gradient, for few tokens and for many."""
    layer = randomize(FeedForward(tiny_config(mlp_ratio=mlp_ratio), dim=8)).double()
    tokens = torch.randn(*shape, 8, dtype=torch.float64)
    inner = tokens @ layer.fc1.weight.T + layer.fc1.bias
    assert inner.shape[-1] == hidden
    inner = inner * (1 + torch.erf(inner / math.sqrt(2))) / 2
    expected = inner @ layer.fc2.weight.T + layer.fc2.bias
    assert_close(layer(tokens), expected)
    with torch.no_grad():
        assert_close(layer(tokens), expected.detach())
    parameters = list(layer.parameters())
    gradients = torch.autograd.grad(layer(tokens).square().sum(), parameters)
    assert_close(gradients, torch.autograd.grad(expected.square().sum(), parameters))


def test_feed_forward_does_not_mind_how_many_tokens_come_at_once():
    layer = randomize(FeedForward(tiny_config(), dim=96))
    tokens = torch.randn(2, 120, 120, 96)
    with torch.no_grad():
        together = layer(tokens)
        pieces = torch.cat([layer(piece) for piece in tokens.flatten(0, 1).split(7)])
    assert_close(together.flatten(0, 1), pieces, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------------------ embeddings


@pytest.mark.parametrize("size", [(3, 3), (4, 9), (31, 6), (32, 48), (1, 1), (2, 1), (1, 20), (20, 2)])
def test_the_stem_is_a_convolution_and_a_norm(size):
    layer = randomize(ConvEmbed(tiny_config(), in_dim=3, dim=8, first=True)).double()
    pixels = torch.randn(2, 3, *size, dtype=torch.float64)
    # A picture that is smaller than the padded kernel counts as three pixels, the missing ones black.
    enough = F.pad(pixels, (0, max(0, 3 - size[1]), 0, max(0, 3 - size[0])))
    expected = layer_norm(convolve(enough, layer.projection), layer.norm)
    assert expected.shape == (2, *[(max(side, 3) + 4 - 7) // 4 + 1 for side in size], 8)
    assert_close(layer(pixels), expected)


@pytest.mark.parametrize("grid", [(1, 1), (1, 4), (2, 3), (7, 8), (13, 5)])
def test_later_embeddings_halve_the_grid(grid):
    layer = randomize(ConvEmbed(tiny_config(), in_dim=6, dim=8, first=False)).double()
    hidden_states = torch.randn(2, *grid, 6, dtype=torch.float64)
    expected = layer_norm(convolve(hidden_states.permute(0, 3, 1, 2), layer.projection), layer.norm)
    assert expected.shape == (2, *[math.ceil(side / 2) for side in grid], 8)
    assert_close(layer(hidden_states), expected)


def test_paper_sizes_give_the_papers_grids():
    """Florence section 2.3 and CvT: 224 gives 56, 28, 14, 7; 384 gives 96 down to 12; 512 gives 128 down to 16."""
    config = tiny_config()
    stem, step = ConvEmbed(config, in_dim=1, dim=1, first=True), ConvEmbed(config, in_dim=1, dim=1, first=False)
    for size, expected in {224: [56, 28, 14, 7], 384: [96, 48, 24, 12], 512: [128, 64, 32, 16]}.items():
        grids = [stem(torch.zeros(1, 1, size, 5))]
        for _ in range(3):
            grids.append(step(grids[-1]))
        assert [grid.shape[1] for grid in grids] == expected


@pytest.mark.parametrize("size", [(4, 4), (1, 1), (5, 12), (8, 3), (17, 18)])
def test_patch_embedding_cuts_patches_out_of_a_zero_padded_picture(size):
    layer = randomize(PatchEmbed(tiny_config(), in_dim=3, dim=8)).double()
    pixels = torch.randn(2, 3, *size, dtype=torch.float64)
    rows, columns = (math.ceil(side / 4) for side in size)
    whole = torch.zeros(2, 3, 4 * rows, 4 * columns, dtype=torch.float64)
    whole[:, :, : size[0], : size[1]] = pixels
    weight = layer.projection.weight.flatten(1)
    tokens = [
        whole[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].flatten(1) @ weight.T + layer.projection.bias
        for row, column in itertools.product(range(rows), range(columns))
    ]
    expected = layer_norm(torch.stack(tokens, dim=1), layer.norm).unflatten(1, (rows, columns))
    assert_close(layer(pixels), expected)


@pytest.mark.parametrize("grid", [(4, 4), (1, 1), (5, 6), (6, 5), (3, 7)])
def test_patch_merging_is_torchvisions(grid):
    layer = randomize(PatchMerging(tiny_config(), dim=6)).double()
    peer = TorchvisionPatchMerging(6).double()
    peer.load_state_dict(layer.state_dict())
    hidden_states = torch.randn(2, *grid, 6, dtype=torch.float64)
    assert_close(layer(hidden_states), peer(hidden_states))


# ------------------------------------------------------------------------------------------------------- attention


def slow_attention(
    layer: WindowAttention, windows: torch.Tensor, index: torch.Tensor, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """One window, one head and one query at a time."""
    num_windows, area, channels = windows.shape
    width = channels // layer.num_heads
    query, key, value = (
        F.linear(windows, part.weight, part.bias) for part in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    mixed = torch.zeros_like(windows)
    weights = windows.new_zeros(num_windows, layer.num_heads, area, area)
    for window, head, row in itertools.product(range(num_windows), range(layer.num_heads), range(area)):
        part = slice(head * width, (head + 1) * width)
        scores = key[window, :, part] @ query[window, row, part] / math.sqrt(width)
        scores = scores + layer.relative_position_bias_table[index[row], head]
        if mask is not None:
            scores = scores + mask[window % len(mask), row]
        weights[window, head, row] = scores.exp() / scores.exp().sum()
        mixed[window, row, part] = weights[window, head, row] @ value[window, :, part]
    return F.linear(mixed, layer.out_proj.weight, layer.out_proj.bias), weights


# (window, the window that the table was made for, grid, shift)
WINDOWS = [
    ((2, 2), (2, 2), (4, 6), (1, 1)),
    ((3, 3), (3, 3), (3, 6), (0, 0)),
    ((2, 2), (4, 4), (2, 2), (0, 0)),
    ((2, 3), (2, 3), (4, 3), (1, 1)),
    ((2, 2, 2), (2, 2, 2), (2, 4, 2), (0, 1, 1)),
]


@pytest.mark.parametrize("window, table_window, grid, shift", WINDOWS)
@pytest.mark.parametrize("qkv_bias", [True, False])
@pytest.mark.parametrize("implementation, tolerance", [("sdpa", 1e-9), ("eager", 1e-9)])
def test_window_attention_is_the_slow_loop(window, table_window, grid, shift, qkv_bias, implementation, tolerance):
    config = tiny_config(qkv_bias=qkv_bias, attn_implementation=implementation)
    layer = randomize(WindowAttention(config, dim=8, num_heads=2, window_size=table_window)).double()
    windows = window_partition(torch.randn(2, *grid, 8, dtype=torch.float64), window)
    index = relative_position_index(window, table_window)
    mask = shift_mask(grid, window, shift, torch.float64)
    expected, weights = slow_attention(layer, windows, index, mask)
    output, recorded = layer(windows, index, mask)
    assert_close(output, expected, rtol=0, atol=tolerance)
    if implementation == "eager":
        assert_close(recorded, weights, rtol=0, atol=tolerance)
    else:
        assert recorded is None


@pytest.mark.parametrize("dtype, atol, rtol", [(torch.float32, 1e-6, 1e-4), (torch.bfloat16, 1e-2, 1e-2)])
@pytest.mark.parametrize("shift", [(0, 0), (2, 2)])
def test_implementations_agree(dtype, atol, rtol, shift):
    outputs, gradients = [], []
    windows = window_partition(torch.randn(3, 8, 8, 8), (4, 4)).to(dtype)
    for implementation in ("eager", "sdpa"):
        config = tiny_config(attn_implementation=implementation)
        layer = randomize(WindowAttention(config, dim=8, num_heads=2, window_size=(4, 4))).to(dtype)
        output, _ = layer(windows, relative_position_index((4, 4), (4, 4)), shift_mask((8, 8), (4, 4), shift, dtype))
        outputs.append(output)
        gradients.append(torch.autograd.grad(output.float().square().mean(), layer.relative_position_bias_table)[0])
    assert_close(*outputs, atol=atol, rtol=rtol)
    assert_close(*gradients, atol=atol, rtol=20 * rtol)


@pytest.mark.parametrize("shift", [(0, 0), (2, 2)])
@pytest.mark.parametrize("dtype, atol, fused", [(torch.float32, 1e-5, True), (torch.bfloat16, 2e-2, False)])
def test_large_windows_without_gradients_are_the_slow_loop(monkeypatch, dtype, atol, fused, shift):
    """torch's fused kernel in float32, ours in bfloat16; a few windows at a time in both."""
    monkeypatch.setattr(layers, "FUSED_TOKENS", 16)
    monkeypatch.setattr(layers, "SLICE_ELEMENTS", 2 * 2 * 16**2)
    calls, real = [], F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *given, **fields: calls.append(1) or real(*given, **fields)
    )
    layer = randomize(WindowAttention(tiny_config(), dim=8, num_heads=2, window_size=(4, 4))).to(dtype)
    windows = window_partition(torch.randn(2, 8, 8, 8), (4, 4)).to(dtype)
    index, mask = relative_position_index((4, 4), (4, 4)), shift_mask((8, 8), (4, 4), shift, dtype)
    with torch.no_grad():
        output, _ = layer(windows, index, mask)
        exact, _ = slow_attention(layer.double(), windows.double(), index, None if mask is None else mask.double())
    assert_close(output.double(), exact, rtol=atol, atol=atol)
    assert bool(calls) == fused


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_each_row_of_the_position_table_is_read_as_often_as_its_offset_occurs(dtype):
    """For no offset at all that is 400 times, where sums in bfloat16 would end at 256."""
    layer = randomize(WindowAttention(tiny_config(), dim=4, num_heads=2, window_size=(20, 20))).to(dtype)
    table, index = layer.relative_position_bias_table, relative_position_index((20, 20), (20, 20))
    bias = layer.attention_bias(index, None)
    assert bias.dtype == dtype and torch.equal(bias[0], table[index].movedim(-1, 0))
    bias.sum().backward()
    along = 20 - torch.arange(-19, 20).abs()
    times = (along[:, None] * along).flatten()[:, None].expand(-1, 2).to(dtype)
    assert torch.equal(table.grad, times)


def test_attention_gradients_are_finite_differences():
    layer = randomize(WindowAttention(tiny_config(), dim=4, num_heads=2, window_size=(2, 2))).double()
    index, mask = relative_position_index((2, 2), (2, 2)), shift_mask((4, 2), (2, 2), (1, 0), torch.float64)
    names = list(layer.state_dict())

    def attend(windows: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (windows, index, mask))[0]

    windows = torch.randn(2, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(attend, (windows, *layer.parameters()), atol=1e-8, rtol=1e-5)


def test_attention_dropout_acts_in_training_only():
    config = tiny_config(attention_dropout=0.5)
    layer = randomize(WindowAttention(config, dim=8, num_heads=2, window_size=(4, 4)))
    windows, index = torch.randn(6, 16, 8), relative_position_index((4, 4), (4, 4))
    assert torch.equal(layer(windows, index)[0], layer(windows, index)[0])
    layer.train()
    assert not torch.equal(layer(windows, index)[0], layer(windows, index)[0])


def test_eager_attention_is_torchs():
    query, key, value = torch.randn(3, 2, 4, 5, 8)
    bias = torch.randn(2, 4, 5, 5)
    output, weights = eager_attention(nn.Module(), query, key, value, bias, scaling=0.3)
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=0.3)
    assert_close(output, expected.transpose(1, 2))
    assert_close(weights.sum(dim=-1), torch.ones(2, 4, 5))
    assert_close(weights @ value, expected)
