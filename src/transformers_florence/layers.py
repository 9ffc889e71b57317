# Copyright 2026 The transformers_florence authors. Licensed under the Apache License, Version 2.0.
"""Bricks of the window-attention towers: stochastic depth, feed-forward, token embeddings, window attention."""

import math
import platform
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_florence import FlorenceVisionConfig

# How many numbers a layer's widest intermediate may have on the CPU: few enough for the caches and for the memory
# allocator to keep their place, enough for full speed of the matrix products. What was tried: benchmarks/README.md.
SLICE_ELEMENTS = 5 * 2**19
# On x86, oneDNN's convolution beats what `F.linear` calls, up to so many input channels: see `Linear`.
HAS_FAST_CONVOLUTION = platform.machine() in ("x86_64", "AMD64") and torch.backends.mkldnn.is_available()
# From so many tokens in a window on, where no gradient is wanted: torch's fused kernel for the CPU is the faster one,
# but in bfloat16, whose own softmax is then faster than float32's.
FUSED_TOKENS = 128
CONVOLUTION_CHANNELS = {torch.float32: math.inf, torch.bfloat16: 256}


def runs_at_once_on_cpu(tensor: torch.Tensor) -> bool:
    """Whether torch runs operations on this tensor now, on the CPU: the only case that the detours below are for.

    `torch.compile` and `torch.export` see one plain path, in which the batch can stay symbolic; so do tensors of other
    kinds (quantised weights, shards), which know a linear layer and its few operations, but not what replaces them.
    """
    if type(tensor) not in (torch.Tensor, nn.Parameter):
        return False
    return tensor.device.type == "cpu" and not (torch.compiler.is_compiling() or torch.jit.is_tracing())


def pictures_at_a_time(hidden_states: torch.Tensor, width: int) -> int:
    """How many pictures of (batch, *grid, channels) to work on together, where the widest intermediate has `width`."""
    batch, *grid, _ = hidden_states.shape
    if not runs_at_once_on_cpu(hidden_states):
        return batch
    return max(1, SLICE_ELEMENTS // (math.prod(grid) * width))


class Linear(nn.Linear):
    """`nn.Linear`; a grid on an x86 CPU goes through the same product as a convolution of 1 x 1.

    `F.linear` first copies the bias to every row of its result and adds the product to it. oneDNN's convolution adds
    the bias while the result is in registers. In float32 it is 3 to 10 percent faster at the product itself; in
    bfloat16 the bias is all there is to save, which counts where few channels come in.
    """

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """hidden_states: (..., in_features) -> (..., out_features)."""
        if (
            not HAS_FAST_CONVOLUTION
            or self.in_features > CONVOLUTION_CHANNELS.get(self.weight.dtype, 0)
            or hidden_states.dtype != self.weight.dtype
            or hidden_states.ndim < 3
            or hidden_states.shape[-1] != self.in_features  # `F.linear` says so, a reshape would take it
            or not (runs_at_once_on_cpu(hidden_states) and runs_at_once_on_cpu(self.weight))
            or torch.is_autocast_enabled("cpu")
            # With one thread torch keeps a float32 convolution of 1 x 1 to itself, and is slower than `F.linear`.
            or (self.weight.dtype == torch.float32 and torch.get_num_threads() == 1)
        ):
            return super().forward(hidden_states)
        rows = hidden_states.reshape(1, -1, 1, self.in_features).permute(0, 3, 1, 2)  # one picture, channels last
        result = F.conv2d(rows, self.weight[:, :, None, None], self.bias).permute(0, 2, 3, 1)
        return result.reshape(*hidden_states.shape[:-1], self.out_features)


class DropPath(nn.Module):
    """Stochastic depth: in training, a sample's whole branch is zero with probability `rate`, else scaled up."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """hidden_states: (batch, ...) -> same shape."""
        if self.rate == 0.0 or not self.training:
            return hidden_states
        keep = 1.0 - self.rate
        shape = (hidden_states.shape[0],) + (1,) * (hidden_states.ndim - 1)
        return hidden_states * hidden_states.new_empty(shape).bernoulli_(keep).div_(keep)

    def extra_repr(self) -> str:
        return f"rate={self.rate}"


class FeedForward(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, config: FlorenceVisionConfig, *, dim: int) -> None:
        super().__init__()
        self.hidden_dim = int(dim * config.mlp_ratio)
        self.fc1 = Linear(dim, self.hidden_dim)
        self.activation = ACT2FN[config.hidden_act]
        self.fc2 = Linear(self.hidden_dim, dim)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """hidden_states: (..., channels) -> same shape."""
        return self.fc2(self.activation(self.fc1(hidden_states)))


class ConvEmbed(nn.Module):
    """CvT's convolutional token embedding (Florence section 2.3): overlapping convolution, then layer norm.

    The first stage takes pixels (kernel 7, stride 4, padding 2), later ones a grid (kernel 3, stride 2, padding 1).
    """

    def __init__(self, config: FlorenceVisionConfig, *, in_dim: int, dim: int, first: bool) -> None:
        super().__init__()
        kernel, stride, padding = (7, 4, 2) if first else (3, 2, 1)
        self.first = first
        self.projection = nn.Conv2d(in_dim, dim, kernel, stride, padding)
        self.norm = nn.LayerNorm(dim, eps=config.layer_norm_eps)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Pixels (batch, channels, height, width) if `first`, else a grid (batch, height, width, channels).

        Returns the grid of the stage: ceil(size / 2) on each side, or floor((size - 3) / 4) + 1 for pixels.
        """
        if self.first:
            height, width = hidden_states.shape[2:]
            # A picture of one or two pixels is smaller than the padded kernel: zeros make it three.
            if min(height, width) < 3:
                hidden_states = F.pad(hidden_states, (0, max(0, 3 - width), 0, max(0, 3 - height)))
        else:
            hidden_states = hidden_states.permute(0, 3, 1, 2)
        return self.norm(self.projection(hidden_states).permute(0, 2, 3, 1))  # (batch, height, width, channels)


class PatchEmbed(nn.Module):
    """Swin's patch embedding: each patch of 4 x 4 pixels becomes a token; other sizes are zero-padded to patches."""

    patch_size = 4

    def __init__(self, config: FlorenceVisionConfig, *, in_dim: int, dim: int) -> None:
        super().__init__()
        self.projection = nn.Conv2d(in_dim, dim, self.patch_size, self.patch_size)
        self.norm = nn.LayerNorm(dim, eps=config.layer_norm_eps)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """pixel_values: (batch, channels, height, width) -> (batch, ceil(height / 4), ceil(width / 4), dim)."""
        height, width = pixel_values.shape[2:]
        missing = (0, -width % self.patch_size, 0, -height % self.patch_size)
        if any(missing):
            pixel_values = F.pad(pixel_values, missing)
        return self.norm(self.projection(pixel_values).permute(0, 2, 3, 1))


class PatchMerging(nn.Module):
    """Swin's downsampling: four neighbours are concatenated, normalised and projected to twice the channels."""

    def __init__(self, config: FlorenceVisionConfig, *, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim, eps=config.layer_norm_eps)
        self.reduction = Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(batch, height, width, channels) -> (batch, ceil(height / 2), ceil(width / 2), 2 * channels)."""
        height, width = hidden_states.shape[1:3]
        if height % 2 or width % 2:
            hidden_states = F.pad(hidden_states, (0, 0, 0, width % 2, 0, height % 2))
        # (batch, rows, row of the corner, columns, column of the corner, channels): Swin lists the corners by column.
        corners = hidden_states.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).permute(0, 1, 3, 4, 2, 5)
        return self.reduction(self.norm(corners.flatten(3)))


def eager_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: object,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention written out, so that its weights can be recorded.

    query, key, value: (batch, heads, tokens, head_dim); attention_mask: additive, broadcastable to
    (batch, heads, tokens, tokens). Returns (batch, tokens, heads, head_dim) and the weights.
    """
    weights = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    # Half precision would lose the small weights: the softmax runs in float32 at least.
    weights = F.softmax(weights, dim=-1, dtype=torch.promote_types(query.dtype, torch.float32)).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2), weights


def cpu_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """What `eager_attention` computes, in the order that costs a CPU least: no product is copied to be changed.

    query, key, value: (num_windows, heads, tokens, head_dim); attention_mask: additive, (windows of a picture or 1,
    heads, tokens, tokens), contiguous, for all pictures alike. Returns (num_windows, tokens, heads, head_dim).
    """
    num_windows, heads, tokens, head_dim = query.shape
    query, key, value = (part.reshape(num_windows * heads, tokens, head_dim) for part in (query, key, value))
    weights = torch.bmm(query, key.transpose(1, 2)).mul_(scaling)
    weights = weights.view(-1, *attention_mask.shape).add_(attention_mask)
    # bfloat16's softmax takes 1.4 times as long with rows of 49; but a graph would keep float32's result for backward.
    narrow = torch.is_grad_enabled() or tokens >= FUSED_TOKENS
    dtype = query.dtype if narrow else torch.promote_types(query.dtype, torch.float32)
    weights = F.softmax(weights, dim=-1, dtype=dtype).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    output = torch.bmm(weights.view(-1, tokens, tokens), value)
    return output.view(num_windows, heads, tokens, head_dim).transpose(1, 2), None


def windows_at_a_time(query: torch.Tensor) -> int:
    """How many windows of (num_windows, heads, tokens, head_dim) have scores that are no wider than a slice."""
    _, heads, tokens, _ = query.shape
    return max(1, SLICE_ELEMENTS // (heads * tokens**2))


class WindowAttention(nn.Module):
    """Multi-head attention inside windows, with a learnt bias for each relative position and head (Swin)."""

    is_causal = False

    def __init__(
        self, config: FlorenceVisionConfig, *, dim: int, num_heads: int, window_size: tuple[int, ...]
    ) -> None:
        super().__init__()
        self.config = config
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scaling = self.head_dim**-0.5
        self.q_proj = Linear(dim, dim, bias=config.qkv_bias)
        self.k_proj = Linear(dim, dim, bias=config.qkv_bias)
        self.v_proj = Linear(dim, dim, bias=config.qkv_bias)
        self.out_proj = Linear(dim, dim)
        rows = 1
        for side in window_size:
            rows *= 2 * side - 1
        self.relative_position_bias_table = nn.Parameter(torch.zeros(rows, num_heads))

    def attention_bias(self, index: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Additive bias of position and shift, (1 or windows of a picture, heads, window_area, window_area).

        index: rows of the table, (window_area, window_area); mask: (windows of a picture, window_area,
        window_area) or None.
        """
        # Rows for the heads first: its gradient takes a fraction of that of `table[index]`, and the bias comes out
        # contiguous (adding a permuted one to the scores takes ten times as long).
        table = self.relative_position_bias_table.T.contiguous()
        # In float32, as torch's CPU kernel takes 2.5 times as long for bfloat16.
        wide = table.to(torch.promote_types(table.dtype, torch.float32))
        bias = wide.index_select(1, index.flatten()).to(table.dtype).view(1, self.num_heads, *index.shape)
        return bias if mask is None else bias + mask[:, None]

    def attend_on_cpu(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        index: torch.Tensor,
        mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """query, key, value: (num_windows, heads, tokens, head_dim) -> (num_windows, tokens, heads, head_dim).

        Scores of the large windows of clips do not fit the caches: they are made for a few windows at a time.
        """
        num_windows, count = query.shape[0], windows_at_a_time(query)
        # torch's fused CPU kernel has no gradient for a bias, and what steps in takes up to 2.7 times as long as ours;
        # without gradients, on windows of 49, the kernel itself takes longer too, in half precision 1.4 times as long;
        # in bfloat16 on windows of 196 still 1.5 times.
        attend = cpu_attention
        fused = query.shape[2] >= FUSED_TOKENS and query.dtype != torch.bfloat16
        if fused and not torch.is_grad_enabled():
            attend = ALL_ATTENTION_FUNCTIONS["sdpa"]
        elif count >= num_windows:
            return attend(self, query, key, value, self.attention_bias(index, mask).to(query.dtype), **kwargs)[0]
        bias = self.attention_bias(index, None).to(query.dtype)
        if mask is None and attend is not cpu_attention:
            return attend(self, query, key, value, bias, **kwargs)[0]
        outputs = []
        for start in range(0, num_windows, count):
            part = slice(start, min(start + count, num_windows))
            both = bias
            if mask is not None:
                both = bias + mask[torch.arange(part.start, part.stop) % mask.shape[0]].to(bias.dtype)[:, None]
            outputs.append(attend(self, query[part], key[part], value[part], both, **kwargs)[0])
        return torch.cat(outputs)

    def forward(
        self, windows: torch.Tensor, index: torch.Tensor, mask: torch.Tensor | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """windows: (num_windows, window_area, channels) -> same shape, and the weights where they are recorded."""
        num_windows, area, channels = windows.shape
        heads_shape = (num_windows, area, self.num_heads, self.head_dim)
        query = self.q_proj(windows).view(heads_shape).transpose(1, 2)  # (num_windows, heads, area, head_dim)
        key = self.k_proj(windows).view(heads_shape).transpose(1, 2)
        value = self.v_proj(windows).view(heads_shape).transpose(1, 2)
        kwargs |= {"scaling": self.scaling, "dropout": self.config.attention_dropout if self.training else 0.0}
        implementation = self.config._attn_implementation
        if implementation == "sdpa" and runs_at_once_on_cpu(query):
            output, weights = self.attend_on_cpu(query, key, value, index, mask, **kwargs), None
        else:
            attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention)
            bias = self.attention_bias(index, mask).to(query.dtype)
            if mask is not None:
                bias = bias.repeat(num_windows // bias.shape[0], 1, 1, 1)  # (num_windows, heads, area, area)
            output, weights = attend(self, query, key, value, bias, **kwargs)
        return self.out_proj(output.reshape(num_windows, area, channels)), weights


__all__ = [
    "ConvEmbed",
    "DropPath",
    "FeedForward",
    "Linear",
    "PatchEmbed",
    "PatchMerging",
    "WindowAttention",
    "cpu_attention",
    "eager_attention",
    "pictures_at_a_time",
]
