# Copyright 2026 The transformers_florence authors. Licensed under the Apache License, Version 2.0.
"""METER's attention between images and texts (Dou et al. 2022; Florence section 2.5), and decoding over images."""

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.cache_utils import EncoderDecoderCache
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_florence_fusion import FlorenceCaptioningConfig, FlorenceFusionConfig
from .layers import FeedForward, Linear, eager_attention


class FusionAttention(nn.Module):
    """Multi-head attention of a modality to itself or, with `cross`, to the other one."""

    def __init__(
        self, config: FlorenceFusionConfig | FlorenceCaptioningConfig, *, cross: bool, causal: bool, index: int
    ) -> None:
        super().__init__()
        dim = config.hidden_size
        self.config = config
        self.cross = cross
        self.is_causal = causal and not cross
        self.index = index
        self.num_heads = config.num_attention_heads
        self.head_dim = dim // self.num_heads
        self.scaling = self.head_dim**-0.5
        self.q_proj = Linear(dim, dim)
        self.k_proj = Linear(dim, dim)
        self.v_proj = Linear(dim, dim)
        self.out_proj = Linear(dim, dim)

    def split_heads(self, states: torch.Tensor) -> torch.Tensor:
        """(batch, tokens, channels) -> (batch, heads, tokens, head_dim)."""
        return states.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def keys_and_values(
        self, source: torch.Tensor | None, cache: EncoderDecoderCache | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(batch, heads, tokens, head_dim) each, with what the cache holds of earlier tokens or of the picture.

        source: (batch, tokens, channels); None for a picture that the cache holds.
        """
        if self.cross and cache is not None and cache.is_updated.get(self.index):
            layer = cache.cross_attention_cache.layers[self.index]
            return layer.keys, layer.values
        assert source is not None, "only a cache makes up for a missing source"
        key, value = self.split_heads(self.k_proj(source)), self.split_heads(self.v_proj(source))
        if cache is None:
            return key, value
        if self.cross:
            cache.is_updated[self.index] = True
            return cache.cross_attention_cache.update(key, value, self.index)
        return cache.self_attention_cache.update(key, value, self.index)

    def forward(
        self,
        hidden_states: torch.Tensor,
        source: torch.Tensor | None,
        mask: torch.Tensor | None = None,
        cache: EncoderDecoderCache | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """hidden_states: (batch, tokens, channels) -> same shape, and the weights where they are recorded.

        source: (batch, source_tokens, channels), what is attended to; mask: as transformers' masking functions make
        it for (batch, 1, tokens, source_tokens).
        """
        query = self.split_heads(self.q_proj(hidden_states))
        key, value = self.keys_and_values(source, cache)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        output, weights = attend(
            self,
            query,
            key,
            value,
            mask,
            scaling=self.scaling,
            dropout=self.config.attention_dropout if self.training else 0.0,
        )
        return self.out_proj(output.flatten(2)), weights


class CoAttentionLayer(GradientCheckpointingLayer):
    """One modality's layer: self-attention, cross-attention to the other modality, feed-forward, each before a norm.

    With `causal` it is a decoder's, whose tokens see those before them, and which can keep keys and values.
    """

    def __init__(
        self,
        config: FlorenceFusionConfig | FlorenceCaptioningConfig,
        *,
        causal: bool = False,
        index: int = 0,
    ) -> None:
        super().__init__()
        dim, eps = config.hidden_size, config.layer_norm_eps
        self.self_attention = FusionAttention(config, cross=False, causal=causal, index=index)
        self.self_attention_norm = nn.LayerNorm(dim, eps=eps)
        self.cross_attention = FusionAttention(config, cross=True, causal=causal, index=index)
        self.cross_attention_norm = nn.LayerNorm(dim, eps=eps)
        self.mlp = FeedForward(config, dim=dim)
        self.mlp_norm = nn.LayerNorm(dim, eps=eps)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        context: torch.Tensor | None,
        mask: torch.Tensor | None = None,
        context_mask: torch.Tensor | None = None,
        past_key_values: EncoderDecoderCache | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """hidden_states: (batch, tokens, channels) -> same shape, and both attentions' weights if recorded.

        context: (batch, context_tokens, channels) of the other modality; None if `past_key_values` holds it already.
        mask, context_mask: which tokens of either can be seen, see `FusionAttention`.
        """
        branch, weights = self.self_attention(hidden_states, hidden_states, mask, past_key_values)
        hidden_states = self.self_attention_norm(hidden_states + self.dropout(branch))
        branch, cross_weights = self.cross_attention(hidden_states, context, context_mask, past_key_values)
        hidden_states = self.cross_attention_norm(hidden_states + self.dropout(branch))
        hidden_states = self.mlp_norm(hidden_states + self.dropout(self.mlp(hidden_states)))
        return hidden_states, weights, cross_weights


class FusionEncoder(nn.Module):
    """Two stacks of co-attention layers, one a modality; both take a layer from what the layer before left."""

    def __init__(self, config: FlorenceFusionConfig) -> None:
        super().__init__()
        self.config = config
        layers = range(config.num_hidden_layers)
        self.text_layers = nn.ModuleList(CoAttentionLayer(config, index=index) for index in layers)
        self.image_layers = nn.ModuleList(CoAttentionLayer(config, index=index) for index in layers)

    def forward(
        self, text: torch.Tensor, image: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """text: (batch, tokens, channels), image: (batch, image_tokens, channels) -> same shapes.

        attention_mask: (batch, tokens) of the text, 0 for padding; a picture has none.
        """
        mask = text_mask = None
        if attention_mask is not None:
            mask = create_bidirectional_mask(self.config, text, attention_mask)
            text_mask = create_bidirectional_mask(self.config, image, attention_mask, encoder_hidden_states=text)
        for text_layer, image_layer in zip(self.text_layers, self.image_layers, strict=True):
            new_text, *_ = text_layer(text, image, mask, None)
            image, *_ = image_layer(image, text, None, text_mask)  # of the old text, as METER
            text = new_text
        return text, image


class MergedAttentionLayer(GradientCheckpointingLayer):
    """A layer over the tokens of both modalities: self-attention and feed-forward, each before a norm."""

    def __init__(self, config: FlorenceFusionConfig) -> None:
        super().__init__()
        dim, eps = config.hidden_size, config.layer_norm_eps
        self.self_attention = FusionAttention(config, cross=False, causal=False, index=0)
        self.self_attention_norm = nn.LayerNorm(dim, eps=eps)
        self.mlp = FeedForward(config, dim=dim)
        self.mlp_norm = nn.LayerNorm(dim, eps=eps)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(
        self, hidden_states: torch.Tensor, mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """hidden_states: (batch, tokens, channels) -> same shape, and the attention's weights if recorded."""
        branch, weights = self.self_attention(hidden_states, hidden_states, mask)
        hidden_states = self.self_attention_norm(hidden_states + self.dropout(branch))
        hidden_states = self.mlp_norm(hidden_states + self.dropout(self.mlp(hidden_states)))
        return hidden_states, weights


class MergedFusionEncoder(nn.Module):
    """One stack over the tokens of both modalities: METER's merged attention, which it weighs co-attention against."""

    def __init__(self, config: FlorenceFusionConfig) -> None:
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(MergedAttentionLayer(config) for _ in range(config.num_hidden_layers))

    def forward(
        self, text: torch.Tensor, image: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `FusionEncoder`."""
        tokens = torch.cat((text, image), dim=1)
        mask = None
        if attention_mask is not None:
            seen = attention_mask.new_ones(image.shape[:2])
            mask = create_bidirectional_mask(self.config, tokens, torch.cat((attention_mask, seen), dim=1))
        for layer in self.layers:
            tokens, *_ = layer(tokens, mask)
        return tokens[:, : text.shape[1]], tokens[:, text.shape[1] :]


class CaptionDecoder(nn.Module):
    """Tokens and their positions through causal co-attention layers over a picture's tokens."""

    def __init__(
        self,
        config: FlorenceFusionConfig | FlorenceCaptioningConfig,
        *,
        vocab_size: int,
        max_tokens: int,
        num_layers: int,
    ) -> None:
        super().__init__()
        dim = config.hidden_size
        self.config = config
        self.word_embeddings = nn.Embedding(vocab_size, dim)
        self.position_embeddings = nn.Embedding(max_tokens, dim)
        self.norm = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.layers = nn.ModuleList(CoAttentionLayer(config, causal=True, index=index) for index in range(num_layers))

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        image: torch.Tensor | None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: EncoderDecoderCache | None = None,
    ) -> torch.Tensor:
        """input_ids, position_ids: (batch, tokens) -> (batch, tokens, hidden_size).

        image: (batch, image_tokens, hidden_size), or None if `past_key_values` holds it; attention_mask: (batch,
        earlier tokens and these), 0 for padding.
        """
        hidden_states = self.word_embeddings(input_ids) + self.position_embeddings(position_ids)
        hidden_states = self.dropout(self.norm(hidden_states))
        mask = create_causal_mask(self.config, hidden_states, attention_mask, past_key_values)
        for layer in self.layers:
            hidden_states, *_ = layer(hidden_states, image, mask, None, past_key_values=past_key_values)
        return hidden_states


class LanguageHead(nn.Module):
    """BERT's head of token predictions: a layer with activation and norm, then the vocabulary."""

    def __init__(self, config: FlorenceFusionConfig | FlorenceCaptioningConfig, *, vocab_size: int) -> None:
        super().__init__()
        dim = config.hidden_size
        self.transform = nn.Linear(dim, dim)
        self.activation = ACT2FN[config.hidden_act]
        self.norm = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.vocabulary = nn.Linear(dim, vocab_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(batch, tokens, channels) -> (batch, tokens, vocab_size)."""
        return self.vocabulary(self.norm(self.activation(self.transform(hidden_states))))


__all__ = [
    "CaptionDecoder",
    "CoAttentionLayer",
    "FusionAttention",
    "FusionEncoder",
    "LanguageHead",
    "MergedAttentionLayer",
    "MergedFusionEncoder",
]
