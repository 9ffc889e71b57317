# Copyright 2026 The transformers_florence authors. Licensed under the Apache License, Version 2.0.
"""CoSwin, Florence's image tower (section 2.3), and plain Swin; also as a backbone of four feature maps."""

from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.backbone_utils import BackboneMixin, filter_output_hidden_states
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BackboneOutput, BaseModelOutputWithPooling
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_florence import FlorenceVisionConfig
from .integrity import ManifestMixin
from .layers import ConvEmbed, DropPath, FeedForward, PatchEmbed, PatchMerging, WindowAttention, pictures_at_a_time
from .window_ops import (
    fit_window,
    pad_grid,
    padded_grid,
    relative_position_index,
    resize_relative_position_table,
    shift_mask,
    window_partition,
    window_reverse,
)

# What a checkpoint of a dual encoder or of a classifier holds beside the image tower.
OTHER_PARTS = [r"^text_model\.", r"^(visual|text)_projection\.", r"^logit_scale$", r"^classifier\."]


def check_pixel_values(pixel_values: torch.Tensor | None, num_channels: int) -> None:
    """Refuse pictures that the tower cannot read: the door of every model that takes `pixel_values`.

    The values themselves are looked at on the CPU only: on an accelerator that would wait for the device, and the
    image processor has refused NaN before.

    Raises:
        ValueError: missing, wrong type, rank, dtype or channels, an empty batch or side, NaN or infinite pixels.
    """
    expected = f"floating-point pixel_values of shape (batch, {num_channels}, height, width)"
    if not isinstance(pixel_values, torch.Tensor):
        raise ValueError(f"expected {expected}, got {type(pixel_values).__name__}")
    shape = tuple(pixel_values.shape)
    if pixel_values.ndim != 4 or shape[1] != num_channels or not pixel_values.is_floating_point():
        raise ValueError(f"expected {expected}, got {pixel_values.dtype} of shape {shape}")
    if torch.compiler.is_compiling() or pixel_values.device.type != "cpu":
        return
    if 0 in shape:
        raise ValueError(f"expected {expected} with at least one picture and one pixel, got shape {shape}")
    if not torch.isfinite(pixel_values.sum(dtype=torch.float64)):
        raise ValueError(f"expected finite pixel_values, got NaN or infinity in a batch of shape {shape}")


class CoSwinLayer(GradientCheckpointingLayer):
    """Window attention and feed-forward, each behind a layer norm, each with stochastic depth on its branch."""

    def __init__(
        self,
        config: FlorenceVisionConfig,
        *,
        dim: int,
        num_heads: int,
        window_size: tuple[int, ...],
        shifted: bool,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.shifted = shifted
        self.norm1 = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.attention = WindowAttention(config, dim=dim, num_heads=num_heads, window_size=window_size)
        self.norm2 = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.mlp = FeedForward(config, dim=dim)
        self.drop_path = DropPath(drop_path)
        initial = config.layer_scale_init_value
        self.layer_scale1 = None if initial is None else nn.Parameter(torch.full((dim,), float(initial)))
        self.layer_scale2 = None if initial is None else nn.Parameter(torch.full((dim,), float(initial)))

    def pad(self, hidden_states: torch.Tensor, grid: tuple[int, ...]) -> torch.Tensor:
        """hidden_states: (batch, *smaller grid, channels) -> (batch, *grid, channels), filled up to whole windows."""
        return pad_grid(hidden_states, grid)

    def attend(
        self,
        attention: WindowAttention,
        hidden_states: torch.Tensor,
        window: tuple[int, ...],
        shift: tuple[int, ...],
        index: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """hidden_states: (batch, *grid, channels) -> same shape, attended window by window."""
        grid = tuple(hidden_states.shape[1:-1])
        axes = tuple(range(1, len(grid) + 1))
        # Pad, then roll, as Microsoft does: rolling first differs when the grid does not divide.
        whole = padded_grid(grid, window)
        hidden_states = self.pad(hidden_states, whole)
        if any(shift):
            hidden_states = torch.roll(hidden_states, [-amount for amount in shift], axes)
        windows = window_partition(hidden_states, window)  # (batch * num_windows, window_area, channels)
        windows, _ = attention(windows, index, mask)
        hidden_states = window_reverse(windows, window, whole)  # (batch, *whole, channels)
        if any(shift):
            hidden_states = torch.roll(hidden_states, list(shift), axes)
        for axis, size in zip(axes, grid, strict=True):
            if hidden_states.shape[axis] != size:  # a slice of everything would still be a copy in the backward pass
                hidden_states = hidden_states.narrow(axis, 0, size)
        return hidden_states

    def transform(
        self,
        hidden_states: torch.Tensor,
        window: tuple[int, ...],
        shift: tuple[int, ...],
        index: torch.Tensor,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`forward`, on all pictures at once."""
        branch = self.attend(self.attention, self.norm1(hidden_states), window, shift, index, mask)
        if self.layer_scale1 is not None:
            branch = branch * self.layer_scale1
        hidden_states = hidden_states + self.drop_path(branch)
        branch = self.mlp(self.norm2(hidden_states))
        if self.layer_scale2 is not None:
            branch = branch * self.layer_scale2
        return hidden_states + self.drop_path(branch)

    def forward(
        self,
        hidden_states: torch.Tensor,
        window: tuple[int, ...],
        shift: tuple[int, ...],
        index: torch.Tensor,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """hidden_states: (batch, *grid, channels) -> same shape.

        window, shift: what this layer uses on this grid (shift of zeros for an unshifted layer); index: see
        `relative_position_index`; mask: see `shift_mask`.
        """
        count = pictures_at_a_time(hidden_states, self.mlp.hidden_dim)
        # Recorded weights come from one call of the attention for each layer, so all pictures go through together.
        if count >= hidden_states.shape[0] or self.attention.config._attn_implementation != "sdpa":
            return self.transform(hidden_states, window, shift, index, mask)
        # A few pictures at a time: what a large batch would stream through memory stays in the caches.
        parts = hidden_states.split(count)
        return torch.cat([self.transform(part, window, shift, index, mask) for part in parts])


class CoSwinStage(nn.Module):
    """A token embedding (the first stage has none: it is the tower's stem), then layers, every second one shifted.

    A tower of another rank says by itself what its windows, embeddings and layers are.
    """

    def __init__(self, config: FlorenceVisionConfig, *, index: int, drop_path_rates: list[float]) -> None:
        super().__init__()
        self.window_padding = config.window_padding
        self.window_size = self.window_of(config, index)
        self.embed = self.make_embed(config, index) if index > 0 else None
        self.layers = nn.ModuleList(
            self.make_layer(config, index, shifted=depth % 2 == 1, drop_path=rate)
            for depth, rate in enumerate(drop_path_rates)
        )

    def window_of(self, config: FlorenceVisionConfig, index: int) -> tuple[int, ...]:
        """The window of the stage `index`."""
        return (config.window_sizes[index],) * 2

    def make_embed(self, config: FlorenceVisionConfig, index: int) -> nn.Module:
        """The embedding that opens the stage `index`, which is not the first."""
        dim = config.embed_dims[index]
        if config.embed_type == "conv":
            return ConvEmbed(config, in_dim=dim // 2, dim=dim, first=False)
        return PatchMerging(config, dim=dim // 2)

    def make_layer(self, config: FlorenceVisionConfig, index: int, **fields: Any) -> CoSwinLayer:
        """A layer of the stage `index`; fields: `shifted` and `drop_path`."""
        dim, heads = config.embed_dims[index], config.num_heads[index]
        return CoSwinLayer(config, dim=dim, num_heads=heads, window_size=self.window_size, **fields)

    def fit(self, grid: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Window and shift of this stage on a grid."""
        half = tuple(side // 2 for side in self.window_size)
        return fit_window(grid, self.window_size, half, self.window_padding)

    def bias_index(self, window: tuple[int, ...], device: torch.device) -> torch.Tensor:
        """Rows of the layers' tables for a window that may be smaller than theirs, (window_area, window_area)."""
        return relative_position_index(window, self.window_size, device)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(batch, *grid, channels) of the stage before -> (batch, *grid, channels) of this stage."""
        if self.embed is not None:
            hidden_states = self.embed(hidden_states)
        grid = tuple(hidden_states.shape[1:-1])
        window, shift = self.fit(grid)
        device, dtype = hidden_states.device, hidden_states.dtype
        index = self.bias_index(window, device)
        mask = shift_mask(padded_grid(grid, window), window, shift, dtype, device) if len(self.layers) > 1 else None
        still = (0,) * len(grid)
        for layer in self.layers:
            if layer.shifted:
                hidden_states = layer(hidden_states, window, shift, index, mask)
            else:
                hidden_states = layer(hidden_states, window, still, index)
        return hidden_states


class CoSwinEncoder(nn.Module):
    """The stages, with stochastic depth that grows linearly over all layers."""

    stage_class = CoSwinStage

    def __init__(self, config: FlorenceVisionConfig) -> None:
        super().__init__()
        total = sum(config.depths)
        rates = [config.drop_path_rate * layer / max(total - 1, 1) for layer in range(total)]
        starts = [sum(config.depths[:index]) for index in range(len(config.depths))]
        self.stages = nn.ModuleList(
            self.stage_class(config, index=index, drop_path_rates=rates[start : start + config.depths[index]])
            for index, start in enumerate(starts)
        )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(batch, *grid, channels) of the stem -> (batch, *grid, channels) of the last stage."""
        for stage in self.stages:
            hidden_states = stage(hidden_states)
        return hidden_states


class FlorenceVisionPreTrainedModel(ManifestMixin, PreTrainedModel):
    """Loading, saving and initialisation of everything that is an image tower."""

    config: FlorenceVisionConfig
    base_model_prefix = "vision_model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    # The first convolution: a module whose output is a tensor, as activation checkpointing with LoRA needs.
    _input_embed_layer = "projection"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True
    # A learnt additive bias goes into every attention: the fused kernels below take none.
    _supports_flash_attn = False
    _supports_flex_attn = False
    _no_split_modules = ["CoSwinLayer", "ConvEmbed", "PatchEmbed", "PatchMerging"]
    _can_record_outputs = {
        "hidden_states": OutputRecorder(CoSwinStage, index=0),
        "attentions": OutputRecorder(WindowAttention, index=1),
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d) and getattr(module, "weight", None) is not None:
            init.trunc_normal_(module.weight, std=std)
        elif isinstance(module, WindowAttention):
            init.trunc_normal_(module.relative_position_bias_table, std=std)
        elif isinstance(module, CoSwinLayer) and module.layer_scale1 is not None:
            init.constant_(module.layer_scale1, self.config.layer_scale_init_value)
            init.constant_(module.layer_scale2, self.config.layer_scale_init_value)


class FlorenceVisionModel(FlorenceVisionPreTrainedModel):
    """Florence's image tower without a head.

    Any picture size works, odd, oblong or smaller than a window, in any order of calls.
    """

    _keys_to_ignore_on_load_unexpected = OTHER_PARTS

    def __init__(self, config: FlorenceVisionConfig, *, add_final_norm: bool = True) -> None:
        config.validate_architecture()  # fields that were set after the configuration was built
        super().__init__(config)
        channels, dim = config.num_channels, config.embed_dim
        self.embeddings: ConvEmbed | PatchEmbed
        if config.embed_type == "conv":
            self.embeddings = ConvEmbed(config, in_dim=channels, dim=dim, first=True)
        else:
            self.embeddings = PatchEmbed(config, in_dim=channels, dim=dim)
        self.encoder = CoSwinEncoder(config)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps) if add_final_norm else nn.Identity()
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self, pixel_values: torch.Tensor | None = None, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithPooling:
        """
        Args:
            pixel_values: (batch, channels, height, width), floating, normalised.

        Returns:
            last_hidden_state: (batch, tokens, hidden_size), after the final norm.
            pooler_output: (batch, hidden_size), their mean.
            hidden_states, if asked for: the stem's grid and each stage's, (batch, height, width, channels).
            attentions, if asked for (attn_implementation="eager"): one a layer, (batch * num_windows, heads,
            window_area, window_area).

        Raises:
            ValueError: pixels that `check_pixel_values` refuses.
        """
        check_pixel_values(pixel_values, self.config.num_channels)
        hidden_states = self.embeddings(pixel_values.to(self.dtype))  # (batch, height, width, channels)
        hidden_states = self.norm(self.encoder(hidden_states))
        last_hidden_state = hidden_states.flatten(1, 2)  # (batch, tokens, channels)
        return BaseModelOutputWithPooling(
            last_hidden_state=last_hidden_state, pooler_output=last_hidden_state.mean(dim=1)
        )

    def resize_window_size(self, window_size: int | list[int]) -> None:
        """Change the windows in place; the relative position tables are resized bicubically, nothing else changes.

        Args:
            window_size: side of the new windows in tokens, one number or one a stage.

        Raises:
            ValueError: a size that the configuration refuses; the model is left as it was.
        """
        values = {**self.config.to_dict(), "window_size": window_size}
        sizes = type(self.config)(**values).window_sizes
        for stage, size in zip(cast("list[CoSwinStage]", self.encoder.stages), sizes, strict=True):
            new_window = (size,) * 2
            for layer in cast("list[CoSwinLayer]", stage.layers):
                attention = layer.attention
                table = attention.relative_position_bias_table
                resized = resize_relative_position_table(table.detach(), stage.window_size, new_window)
                attention.relative_position_bias_table = nn.Parameter(resized, requires_grad=table.requires_grad)
            stage.window_size = new_window
        self.config.window_size = window_size


class FlorenceBackbone(BackboneMixin, FlorenceVisionPreTrainedModel):
    """The image tower as a backbone: a layer norm behind each stage that `config.out_features` names.

    Detectors want `window_padding="pad"`, the convention of detection's Swin. Load folders by this class itself, and
    everything in offline mode: `AutoBackbone.from_pretrained` first asks the Hub whether it has such a repository.
    """

    # The tower's own final norm, and what else a dual encoder or a classifier holds.
    _keys_to_ignore_on_load_unexpected = [r"^(vision_model\.)?norm\.", *OTHER_PARTS]

    def __init__(self, config: FlorenceVisionConfig) -> None:
        super().__init__(config)
        self.num_features = [config.embed_dim, *config.embed_dims]
        self.vision_model = FlorenceVisionModel(config, add_final_norm=False)
        self.feature_norms = nn.ModuleDict(
            {
                stage: nn.LayerNorm(channels, eps=config.layer_norm_eps)
                for stage, channels in zip(self.out_features, self.channels, strict=True)
            }
        )
        self.post_init()

    @can_return_tuple
    @filter_output_hidden_states
    def forward(self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> BackboneOutput:
        """
        Args:
            pixel_values: (batch, channels, height, width), floating, normalised.

        Returns:
            feature_maps: one (batch, channels, height, width) for each name in `config.out_features`, before the
            next stage's embedding, each behind its own layer norm; hidden_states and attentions as the tower's.

        Raises:
            ValueError: pixels that `check_pixel_values` refuses.
        """
        outputs = self.vision_model(pixel_values, **kwargs)
        feature_maps = tuple(
            self.feature_norms[stage](hidden_states).permute(0, 3, 1, 2)
            for stage, hidden_states in zip(self.stage_names, outputs.hidden_states, strict=True)
            if stage in self.out_features
        )
        return BackboneOutput(
            feature_maps=feature_maps, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


__all__ = [
    "CoSwinEncoder",
    "CoSwinLayer",
    "CoSwinStage",
    "FlorenceBackbone",
    "FlorenceVisionModel",
    "FlorenceVisionPreTrainedModel",
    "check_pixel_values",
]
