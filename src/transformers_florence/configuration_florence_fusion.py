# Copyright 2026 The transformers_florence authors. Licensed under the Apache License, Version 2.0.
"""Configurations of vision and language (Florence sections 2.5 and 3.7): METER's fusion, and a captioning decoder.

Both have model types of their own: one checkpoint, one task, and no tokenizer where a stock pipeline wants none.
"""

from typing import Any

from transformers import BertConfig, PreTrainedConfig, RobertaConfig, XLMRobertaConfig

from .configuration_florence import (
    FlorenceConfig,
    FlorenceTextConfig,
    FlorenceVisionConfig,
    check_base_fields,
    check_choice,
    check_float,
    check_int,
    check_parameters,
    fail,
    same_file,
)

# The text encoders that the fusion stands on. METER's is RoBERTa; Florence's own serves too (section 2.5).
TEXT_CONFIGS: dict[str, type[PreTrainedConfig]] = {
    config.model_type: config for config in (RobertaConfig, XLMRobertaConfig, BertConfig, FlorenceTextConfig)
}
# These number a text's positions from behind their padding token's id.
OFFSET_POSITIONS = (RobertaConfig, XLMRobertaConfig)
FUSION_TYPES = ("co_attention", "merged_attention")
ACTIVATIONS = ("gelu", "gelu_new", "quick_gelu", "relu", "silu")


def _built_vision_config(value: Any) -> FlorenceVisionConfig:
    """The image tower's configuration, built of its fields if need be."""
    if isinstance(value, FlorenceVisionConfig):
        return value
    if value is not None and not isinstance(value, dict):
        fail("vision_config", "a FlorenceVisionConfig, a dictionary or None", value)
    fields = value or {}
    model_type = fields.get("model_type", FlorenceVisionConfig.model_type)
    if model_type != FlorenceVisionConfig.model_type:
        fail("vision_config.model_type", repr(FlorenceVisionConfig.model_type), model_type)
    return FlorenceVisionConfig(**fields)


def _built_text_config(value: Any) -> PreTrainedConfig:
    """A text encoder's configuration, built of its fields by one of the classes of `TEXT_CONFIGS` if need be."""
    if isinstance(value, PreTrainedConfig):
        return value
    if value is not None and not isinstance(value, dict):
        fail("text_config", "the configuration of a text encoder, a dictionary or None", value)
    fields = value or {}
    model_type = fields.get("model_type", RobertaConfig.model_type)
    check_choice("text_config.model_type", model_type, tuple(TEXT_CONFIGS))
    return TEXT_CONFIGS[model_type](**fields)


def _check_layers(config: Any, *, low: int) -> None:
    """Check the fields of a stack of co-attention layers, of which there are at least `low`."""
    check_int("hidden_size", config.hidden_size, high=1 << 16)
    check_int("num_hidden_layers", config.num_hidden_layers, low=low, high=1000)
    check_int("num_attention_heads", config.num_attention_heads)
    if config.hidden_size % config.num_attention_heads:
        fail("num_attention_heads", f"a divisor of hidden_size={config.hidden_size}", config.num_attention_heads)
    check_float("mlp_ratio", config.mlp_ratio, 1 / config.hidden_size, 64)
    check_choice("hidden_act", config.hidden_act, ACTIVATIONS)
    check_float("hidden_dropout", config.hidden_dropout, 0, 1)
    check_float("attention_dropout", config.attention_dropout, 0, 1)
    check_float("layer_norm_eps", config.layer_norm_eps, 0, 1, open_low=True)
    check_float("initializer_range", config.initializer_range, 0, 10, open_low=True)
    layer = (8 + 2 * config.mlp_ratio) * config.hidden_size**2
    check_parameters("hidden_size, num_hidden_layers, mlp_ratio", 2 * config.num_hidden_layers * layer)


class FlorenceFusionConfig(PreTrainedConfig):
    """Shape of METER's fusion on Florence: image tower, text encoder, two stacks of co-attention layers.

    Args:
        vision_config: a `FlorenceVisionConfig`, or the fields of one as a dictionary.
        text_config: a `RobertaConfig`, `XLMRobertaConfig`, `BertConfig` or `FlorenceTextConfig`; or the fields of one
            as a dictionary, in which `model_type` says of which (RoBERTa's, as METER's, without it).
        hidden_size: width of both stacks; `num_attention_heads` must divide it.
        num_hidden_layers: layers of each stack (M_co in the paper; 6 in METER). With 0 the modalities meet in the
            heads only, and the text encoder must not be causal.
        num_attention_heads: attention heads of a layer.
        fusion_type: "co_attention", two stacks that attend to each other, or "merged_attention", one stack over the
            tokens of both, which METER compares with it.
        num_decoder_layers: layers of the captioning decoder of `FlorenceForPreTraining`; 0 for none.
        mlp_ratio: hidden width of the feed-forward block over `hidden_size`.
        hidden_act: activation of the feed-forward block and of the language head.
        hidden_dropout: dropout on each branch of a layer in training.
        attention_dropout: dropout on attention weights in training.
        layer_norm_eps: epsilon of the layers' norms.
        initializer_range: standard deviation of the normal that fills weights.
        id2label: the answer vocabulary of `FlorenceForQuestionAnswering`.

    Raises:
        ValueError: a field has an impossible value; the message names it.

    Example:
        >>> FlorenceFusionConfig(text_config={"model_type": "bert"}).text_config.model_type
        'bert'
    """

    model_type = "florence_fusion"
    sub_configs_defaults = {"vision_config": FlorenceVisionConfig, "text_config": RobertaConfig}
    # What transformers' Trainer does not collect over an evaluation set: every token's state.
    keys_to_ignore_at_inference = ["text_features", "image_features", "cross_attentions"]

    vision_config: dict | FlorenceVisionConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    hidden_size: int = 768
    num_hidden_layers: int = 6
    num_attention_heads: int = 12
    fusion_type: str = "co_attention"
    num_decoder_layers: int = 0
    mlp_ratio: float | int = 4.0
    hidden_act: str = "gelu"
    hidden_dropout: float | int = 0.1
    attention_dropout: float | int = 0.1
    layer_norm_eps: float | int = 1e-12
    initializer_range: float | int = 0.02

    __eq__ = same_file

    def __post_init__(self, **kwargs: Any) -> None:
        check_base_fields(self, kwargs)
        self.vision_config = _built_vision_config(self.vision_config)
        self.text_config = _built_text_config(self.text_config)
        self.validate_architecture()
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Raise a `ValueError` that names the first field with an impossible value."""
        _built_vision_config(self.vision_config).validate_architecture()
        text = self.text_config
        if type(text) not in TEXT_CONFIGS.values():
            names = ", ".join(config.__name__ for config in TEXT_CONFIGS.values())
            fail("text_config", f"one of {names}", type(text).__name__)
        if getattr(text, "is_decoder", False) or getattr(text, "add_cross_attention", False):
            fail("text_config", "an encoder", "is_decoder or add_cross_attention")
        if isinstance(text, FlorenceTextConfig):
            text.validate_architecture()
        else:
            check_int("text_config.vocab_size", text.vocab_size, high=1 << 24)
            check_int("text_config.hidden_size", text.hidden_size)
            check_int("text_config.num_hidden_layers", text.num_hidden_layers, low=0, high=1000)
            check_int("text_config.max_position_embeddings", text.max_position_embeddings)
            layer = 4 * text.hidden_size**2 + 2 * text.hidden_size * text.intermediate_size
            tables = (text.vocab_size + text.max_position_embeddings) * text.hidden_size
            check_parameters("text_config", text.num_hidden_layers * layer + tables)
        check_int("the context of `text_config`", self.max_text_tokens)
        check_choice("fusion_type", self.fusion_type, FUSION_TYPES)
        check_int("num_decoder_layers", self.num_decoder_layers, low=0, high=1000)
        # The first token stands for the text: in a causal encoder it has seen none of it, and the fusion must tell it.
        _check_layers(self, low=1 if getattr(text, "causal", False) else 0)

    @property
    def max_text_tokens(self) -> int:
        """How many tokens a text may have."""
        text = self.text_config
        taken = text.pad_token_id + 1 if isinstance(text, OFFSET_POSITIONS) else 0
        return text.max_position_embeddings - taken

    @property
    def num_channels(self) -> int:
        """Channels of `pixel_values`."""
        return self.vision_config.num_channels

    @property
    def image_size(self) -> int | list[int] | tuple[int, int]:
        """Side of the training pictures in pixels, or height and width."""
        return self.vision_config.image_size

    @classmethod
    def from_florence_config(cls, config: FlorenceConfig, **overrides: Any) -> "FlorenceFusionConfig":
        """On both towers of a dual encoder: its shapes, with other fields as they are or overridden."""
        fields = {"vision_config": config.vision_config.to_dict(), "text_config": config.text_config.to_dict()}
        return cls(**{**fields, **overrides})


class FlorenceCaptioningConfig(PreTrainedConfig):
    """Shape of a captioning model: image tower, and a causal decoder of co-attention layers over its tokens.

    Args:
        vision_config: a `FlorenceVisionConfig`, or the fields of one as a dictionary.
        vocab_size: tokens of the decoder's vocabulary.
        hidden_size: width of the decoder; `num_attention_heads` must divide it.
        num_hidden_layers: layers of the decoder.
        num_attention_heads: attention heads of a layer.
        max_position_embeddings: the longest text in tokens, prompt and answer together.
        mlp_ratio, hidden_act, hidden_dropout, attention_dropout, layer_norm_eps, initializer_range: as in
            `FlorenceFusionConfig`.
        pad_token_id, bos_token_id, eos_token_id: ids of the special tokens; a text starts with `bos_token_id`. They
            are the vocabulary's last ones, as in CLIP, unless given.
        tie_word_embeddings: whether the decoder predicts with the table that it reads with.
        use_cache: whether generation keeps the keys and values of earlier tokens.

    Raises:
        ValueError: a field has an impossible value; the message names it.
    """

    model_type = "florence_captioning"
    sub_configs_defaults = {"vision_config": FlorenceVisionConfig}
    keys_to_ignore_at_inference = ["past_key_values", "image_embeds", "cross_attentions"]

    vision_config: dict | FlorenceVisionConfig | None = None
    vocab_size: int = 49408
    hidden_size: int = 768
    num_hidden_layers: int = 6
    num_attention_heads: int = 12
    max_position_embeddings: int = 76
    mlp_ratio: float | int = 4.0
    hidden_act: str = "gelu"
    hidden_dropout: float | int = 0.1
    attention_dropout: float | int = 0.1
    layer_norm_eps: float | int = 1e-12
    initializer_range: float | int = 0.02
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    tie_word_embeddings: bool = True
    use_cache: bool = True

    __eq__ = same_file

    def __post_init__(self, **kwargs: Any) -> None:
        check_base_fields(self, kwargs)
        self.vision_config = _built_vision_config(self.vision_config)
        if isinstance(self.vocab_size, int):
            self.eos_token_id = self.vocab_size - 1 if self.eos_token_id is None else self.eos_token_id
            self.bos_token_id = max(self.vocab_size - 2, 0) if self.bos_token_id is None else self.bos_token_id
            self.pad_token_id = self.eos_token_id if self.pad_token_id is None else self.pad_token_id
        self.validate_architecture()
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Raise a `ValueError` that names the first field with an impossible value."""
        _built_vision_config(self.vision_config).validate_architecture()
        check_int("vocab_size", self.vocab_size, low=2, high=1 << 24)
        _check_layers(self, low=1)
        check_int("max_position_embeddings", self.max_position_embeddings, low=2)
        for name in ("eos_token_id", "bos_token_id", "pad_token_id"):
            check_int(name, getattr(self, name), low=0, high=self.vocab_size - 1)
        if self.bos_token_id == self.eos_token_id:
            fail("bos_token_id", f"another token than eos_token_id={self.eos_token_id}", self.bos_token_id)
        tables = (self.vocab_size + self.max_position_embeddings) * self.hidden_size
        check_parameters("vocab_size, hidden_size", tables)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers; from the fields of a dual encoder or of an image tower, a new decoder on that tower."""
        kind = config_dict.get("model_type")
        if kind == FlorenceConfig.model_type:
            config_dict = {"vision_config": config_dict.get("vision_config")}
        elif kind == FlorenceVisionConfig.model_type:
            config_dict = {"vision_config": config_dict}
        return super().from_dict(config_dict, **kwargs)

    @property
    def num_channels(self) -> int:
        """Channels of `pixel_values`."""
        return self.vision_config.num_channels

    @property
    def image_size(self) -> int | list[int] | tuple[int, int]:
        """Side of the training pictures in pixels, or height and width."""
        return self.vision_config.image_size


__all__ = ["TEXT_CONFIGS", "FlorenceCaptioningConfig", "FlorenceFusionConfig"]
