# Copyright 2026 The transformers_florence authors. Licensed under the Apache License, Version 2.0.
"""Configurations of Florence: the image tower, the text tower, and the dual encoder that holds both.

Every configuration is checked when it is built, before a single weight is allocated: a wrong value is a
`ValueError` that names the field, what was expected and what came.
"""

import math
from typing import Any, ClassVar

import torch
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneConfigMixin

# Shapes by name. tiny to large follow Swin's published depths, widths and heads; `huge` is a declared
# reconstruction of CoSwin-H, of which the paper publishes parameter counts only (637M vision, 256M text).
# `nano` is this project's own small model, trained at 64 px on two CPU cores.
VISION_SIZES: dict[str, dict[str, Any]] = {
    "nano": {
        "image_size": 64,
        "embed_dim": 64,
        "depths": [2, 2, 3, 1],
        "num_heads": [2, 4, 8, 16],
        "window_size": 8,
        "drop_path_rate": 0.1,
    },
    "tiny": {"embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24], "drop_path_rate": 0.2},
    "small": {"embed_dim": 96, "depths": [2, 2, 18, 2], "num_heads": [3, 6, 12, 24], "drop_path_rate": 0.3},
    "base": {"embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32], "drop_path_rate": 0.5},
    "large": {"embed_dim": 192, "depths": [2, 2, 18, 2], "num_heads": [6, 12, 24, 48], "drop_path_rate": 0.5},
    "huge": {"embed_dim": 256, "depths": [2, 2, 32, 4], "num_heads": [8, 16, 32, 64], "drop_path_rate": 0.5},
}
TEXT_SIZES: dict[str, dict[str, Any]] = {
    "nano": {
        "vocab_size": 3072,
        "hidden_size": 192,
        "intermediate_size": 768,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "max_position_embeddings": 24,
    },
    "tiny": {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8},
    "small": {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8},
    "base": {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8},
    "large": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
    "huge": {"hidden_size": 1152, "intermediate_size": 4864, "num_attention_heads": 18},
}
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")
PROJECTION_DIMS = {"nano": 256, "tiny": 512, "small": 512, "base": 512, "large": 768, "huge": 1024}
MAX_DIMENSION = 1 << 20  # no width, depth, vocabulary or side of a published model comes near this
MAX_PARAMETERS = 20_000_000_000  # thirty times CoSwin-H: a tower beyond that is a slip or an attack on the memory


def fail(name: str, expected: str, got: Any) -> None:
    """Refuse a field's value."""
    raise ValueError(f"`{name}`: expected {expected}, got {got!r}.")


def check_int(name: str, value: Any, low: int = 1, high: int = MAX_DIMENSION) -> None:
    """Refuse what is no integer from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        fail(name, f"an integer between {low} and {high}", value)


def check_float(name: str, value: Any, low: float, high: float, *, open_low: bool = False) -> None:
    """Refuse what is no finite number from `low` (or above it, if `open_low`) to `high`."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not low <= value <= high or (open_low and value == low):  # NaN fails every comparison
        fail(name, f"a finite number {'above' if open_low else 'from'} {low} up to {high}", value)


def check_choice(name: str, value: Any, choices: tuple[str | None, ...]) -> None:
    """Refuse what is none of the choices."""
    if value not in choices:
        fail(name, "one of " + ", ".join(repr(choice) for choice in choices), value)


def check_int_list(name: str, value: Any, length: int | None = None) -> None:
    """Refuse what is no list of integers, of that length."""
    if not isinstance(value, list | tuple) or not value or (length is not None and len(value) != length):
        fail(name, "a non-empty list of integers" if length is None else f"a list of {length} integers", value)
    for index, item in enumerate(value):
        check_int(f"{name}[{index}]", item)


def check_parameters(names: str, count: float) -> None:
    """Refuse fields that would make more parameters than anybody has memory for."""
    if count > MAX_PARAMETERS:
        fail(names, f"a tower of at most {MAX_PARAMETERS:.0e} parameters", f"{count:.0e}")


def check_base_fields(config: PreTrainedConfig, extra: dict[str, Any]) -> None:
    """Check the fields of transformers' base class that a model reads; it takes them from `extra` unchecked."""
    for name in ("trust_remote_code", "_attn_implementation"):  # a file must not choose what code runs
        extra.pop(name, None)
    attention = extra.get("attn_implementation")
    for value in attention.values() if isinstance(attention, dict) else [attention]:
        if value is not None and (not isinstance(value, str) or "/" in value):  # a slash names kernels on the Hub
            fail("attn_implementation", "the name of a local implementation (such as 'sdpa' or 'eager')", value)
    dtype = extra.get("torch_dtype") if config.dtype is None else config.dtype
    resolved = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and not (isinstance(resolved, torch.dtype) and resolved.is_floating_point):
        fail("dtype", "a floating-point dtype of torch or its name", dtype)
    if extra.get("num_labels") is not None:
        check_int("num_labels", extra["num_labels"])
    labels = config.id2label
    if labels is not None and not (isinstance(labels, dict) and labels and all(str(n).isdecimal() for n in labels)):
        fail("id2label", "a non-empty dictionary with class numbers as keys", labels)
    check_choice("problem_type", config.problem_type, (None, *PROBLEM_TYPES))


def same_file(config: PreTrainedConfig, other: Any) -> bool:
    """Whether two configurations would be saved as the same file; where they were loaded from does not count."""
    return type(config) is type(other) and config.to_json_string() == other.to_json_string()


def _named_size(table: dict[str, Any], size: str) -> Any:
    if not isinstance(size, str) or size not in table:
        fail("size", "one of " + ", ".join(table), size)
    return table[size]


class FlorenceVisionConfig(BackboneConfigMixin, PreTrainedConfig):
    """Shape of the image tower: CoSwin (Florence section 2.3) or, by `embed_type`, plain Swin.

    Args:
        image_size: side of the training pictures in pixels, or `[height, width]`. The tower accepts any size;
            this one is what processors and exporters read.
        num_channels: channels of `pixel_values`.
        embed_dim: channels of the first stage; every stage doubles them.
        depths: layers of each stage.
        num_heads: attention heads of each stage; each must divide that stage's channels.
        window_size: side of the attention windows in tokens, one number or one a stage.
        window_padding: what happens to a map that is no larger than the window. `"clamp"` (classification) makes
            it one unshifted window; `"pad"` (detection) always pads to the window and always shifts.
        embed_type: `"conv"` opens each stage with CvT's convolutional embedding (CoSwin), `"patch"` with Swin's
            patch embedding and patch merging.
        mlp_ratio: hidden width of the feed-forward block over the channels.
        qkv_bias: whether query, key and value projections have a bias.
        hidden_act: activation of the feed-forward block.
        attention_dropout: dropout on attention weights in training.
        drop_path_rate: stochastic depth of the last layer; it grows linearly from 0 at the first.
        layer_scale_init_value: start value of the per-channel residual scale, `None` for none.
        layer_norm_eps: epsilon of every layer norm.
        initializer_range: standard deviation of the truncated normal that fills weights.

    Raises:
        ValueError: a field has an impossible value; the message names it.

    Example:
        >>> FlorenceVisionConfig.from_size("tiny").hidden_size
        768
    """

    model_type = "florence_vision_model"
    base_config_key = "vision_config"
    attribute_map = {"num_attention_heads": "num_heads", "num_hidden_layers": "num_layers"}
    base_model_fsdp_plan = {"encoder.stages.*.layers.*": "free_full_weight"}

    image_size: int | list[int] | tuple[int, int] = 224
    num_channels: int = 3
    embed_dim: int = 96
    depths: list[int] | tuple[int, ...] = (2, 2, 6, 2)
    num_heads: list[int] | tuple[int, ...] = (3, 6, 12, 24)
    window_size: int | list[int] | tuple[int, ...] = 7
    window_padding: str = "clamp"
    embed_type: str = "conv"
    mlp_ratio: float | int = 4.0
    qkv_bias: bool = True
    hidden_act: str = "gelu"
    attention_dropout: float | int = 0.0
    drop_path_rate: float | int = 0.2
    layer_scale_init_value: float | int | None = None
    layer_norm_eps: float | int = 1e-5
    initializer_range: float | int = 0.02
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    __eq__ = same_file

    def __post_init__(self, **kwargs: Any) -> None:
        check_base_fields(self, kwargs)
        self.num_heads = kwargs.pop("num_attention_heads", self.num_heads)
        for name in ("image_size", "depths", "num_heads", "window_size"):
            if isinstance(value := getattr(self, name), tuple):
                setattr(self, name, list(value))  # what a saved configuration comes back with
        self.validate_architecture()
        for name in ("hidden_size", "num_layers", "num_hidden_layers", "stage_names", "embed_dims", "window_sizes"):
            if (value := kwargs.pop(name, None)) not in (None, getattr(self, name)):
                fail(name, f"{getattr(self, name)}, which follows from the other fields", value)
        numbers = range(-self.num_layers - 1, self.num_layers + 1)
        for name, choices in (("out_features", self.stage_names), ("out_indices", numbers)):
            if (value := kwargs.get(name)) is not None:
                items = value if isinstance(value, list | tuple) else ()
                if not items or any(type(item) not in (str, int) or item not in choices for item in items):
                    fail(name, f"some of {list(choices)}, or None", value)
        self.set_output_features_output_indices(kwargs.pop("out_features", None), kwargs.pop("out_indices", None))
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Raise a `ValueError` that names the first field with an impossible value."""
        if isinstance(self.image_size, list | tuple):
            check_int_list("image_size", self.image_size, 2)
        else:
            check_int("image_size", self.image_size)
        check_int("num_channels", self.num_channels, high=1024)
        check_int("embed_dim", self.embed_dim)
        check_int_list("depths", self.depths)
        if len(self.depths) > 8 or sum(self.depths) > 1000:
            fail("depths", "at most 8 stages and 1000 layers", self.depths)
        check_int_list("num_heads", self.num_heads, len(self.depths))
        for index, (dim, heads) in enumerate(zip(self.embed_dims, self.num_heads, strict=True)):
            if dim % heads:
                fail(f"num_heads[{index}]", f"a divisor of that stage's {dim} channels", heads)
        if isinstance(self.window_size, list | tuple):
            check_int_list("window_size", self.window_size, len(self.depths))
        for index, size in enumerate(self.window_sizes):
            check_int(f"window_size[{index}]", size, high=256)
        check_choice("window_padding", self.window_padding, ("clamp", "pad"))
        check_choice("embed_type", self.embed_type, ("conv", "patch"))
        check_float("mlp_ratio", self.mlp_ratio, 1 / self.embed_dim, 64, open_low=True)  # at least one hidden channel
        if not isinstance(self.qkv_bias, bool):
            fail("qkv_bias", "True or False", self.qkv_bias)
        check_choice("hidden_act", self.hidden_act, tuple(ACT2FN))
        check_float("attention_dropout", self.attention_dropout, 0, 1)
        check_float("drop_path_rate", self.drop_path_rate, 0, 0.99)
        if self.layer_scale_init_value is not None:
            check_float("layer_scale_init_value", self.layer_scale_init_value, 0, 10, open_low=True)
        check_float("layer_norm_eps", self.layer_norm_eps, 0, 1, open_low=True)
        check_float("initializer_range", self.initializer_range, 0, 10, open_low=True)
        stages = zip(self.embed_dims, self.depths, self.num_heads, self.window_sizes, strict=True)
        layers = [n * ((4 + 2 * self.mlp_ratio) * dim**2 + heads * (2 * w - 1) ** 2) for dim, n, heads, w in stages]
        check_parameters("embed_dim, depths, mlp_ratio, window_size", sum(layers))

    @property
    def num_layers(self) -> int:
        """Number of stages."""
        return len(self.depths)

    @property
    def embed_dims(self) -> list[int]:
        """Channels of each stage."""
        return [self.embed_dim * 2**index for index in range(self.num_layers)]

    @property
    def hidden_size(self) -> int:
        """Channels of the last stage."""
        return self.embed_dims[-1]

    @property
    def stage_names(self) -> list[str]:
        """Names of the feature maps: the stem's and one for each stage."""
        return ["stem"] + [f"stage{index}" for index in range(1, self.num_layers + 1)]

    @property
    def window_sizes(self) -> list[int]:
        """Side of the window of each stage, in tokens."""
        if isinstance(self.window_size, list | tuple):
            return list(self.window_size)
        return [self.window_size] * self.num_layers

    @classmethod
    def from_size(cls, size: str, **overrides: Any) -> "FlorenceVisionConfig":
        """The named size (one of `VISION_SIZES`), with single fields overridden."""
        return cls(**{**_named_size(VISION_SIZES, size), **overrides})


class FlorenceTextConfig(PreTrainedConfig):
    """Shape of the text tower: a transformer "similar to CLIP" (Florence section 2.3).

    Args:
        vocab_size: tokens of the vocabulary.
        hidden_size: width of the tower; `num_attention_heads` must divide it.
        intermediate_size: hidden width of the feed-forward block.
        num_hidden_layers: layers of the tower.
        num_attention_heads: attention heads of a layer.
        max_position_embeddings: context length in tokens (76 in Florence, 77 in UniCL).
        causal: whether a token sees only those before it (CLIP, UniCL) or all tokens of its text.
        hidden_act: activation of the feed-forward block.
        layer_norm_eps: epsilon of every layer norm (1e-12 in UniCL's checkpoints).
        attention_dropout: dropout on attention weights in training.
        initializer_range: standard deviation of the normal that fills the embeddings.
        initializer_factor: factor on every standard deviation of CLIP's scheme.
        pad_token_id, bos_token_id, eos_token_id: ids of the special tokens; the text is pooled at its first
            `eos_token_id`.

    Raises:
        ValueError: a field has an impossible value; the message names it.
    """

    model_type = "florence_text_model"
    base_config_key = "text_config"
    base_model_fsdp_plan = {"encoder.layers.*": "free_full_weight"}

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 76
    causal: bool = True
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float | int = 1e-5
    attention_dropout: float | int = 0.0
    initializer_range: float | int = 0.02
    initializer_factor: float | int = 1.0
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | None = None

    __eq__ = same_file

    def __post_init__(self, **kwargs: Any) -> None:
        check_base_fields(self, kwargs)
        # CLIP's vocabulary ends with its begin and end tokens, and pads with the end token.
        if isinstance(self.vocab_size, int):
            self.eos_token_id = self.vocab_size - 1 if self.eos_token_id is None else self.eos_token_id
            self.bos_token_id = max(self.vocab_size - 2, 0) if self.bos_token_id is None else self.bos_token_id
            self.pad_token_id = self.eos_token_id if self.pad_token_id is None else self.pad_token_id
        self.validate_architecture()
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Raise a `ValueError` that names the first field with an impossible value."""
        check_int("vocab_size", self.vocab_size, high=1 << 24)
        check_int("hidden_size", self.hidden_size)
        check_int("intermediate_size", self.intermediate_size)
        check_int("num_hidden_layers", self.num_hidden_layers, high=1000)
        check_int("num_attention_heads", self.num_attention_heads)
        if self.hidden_size % self.num_attention_heads:
            fail("num_attention_heads", f"a divisor of hidden_size={self.hidden_size}", self.num_attention_heads)
        check_int("max_position_embeddings", self.max_position_embeddings)
        if not isinstance(self.causal, bool):
            fail("causal", "True or False", self.causal)
        check_choice("hidden_act", self.hidden_act, tuple(ACT2FN))
        check_float("layer_norm_eps", self.layer_norm_eps, 0, 1, open_low=True)
        check_float("attention_dropout", self.attention_dropout, 0, 1)
        check_float("initializer_range", self.initializer_range, 0, 10, open_low=True)
        check_float("initializer_factor", self.initializer_factor, 0, 100, open_low=True)
        for name in ("eos_token_id", "bos_token_id", "pad_token_id"):
            check_int(name, getattr(self, name), low=0, high=self.vocab_size - 1)
        layer = 4 * self.hidden_size**2 + 2 * self.hidden_size * self.intermediate_size
        tables = (self.vocab_size + self.max_position_embeddings) * self.hidden_size
        check_parameters("hidden_size, intermediate_size, vocab_size", self.num_hidden_layers * layer + tables)

    @classmethod
    def from_size(cls, size: str, **overrides: Any) -> "FlorenceTextConfig":
        """The named size (one of `TEXT_SIZES`), with single fields overridden."""
        return cls(**{**_named_size(TEXT_SIZES, size), **overrides})


class FlorenceConfig(PreTrainedConfig):
    """The dual encoder: an image tower, a text tower, and the space in which both meet.

    Args:
        vision_config: a `FlorenceVisionConfig`, or the fields of one as a dictionary.
        text_config: a `FlorenceTextConfig`, or the fields of one as a dictionary.
        projection_dim: width of the shared space.
        logit_scale_init_value: start value of the logarithm of the temperature (ln(1/0.07) in CLIP, 1 in UniCL).
        max_logit_scale: what the learnt factor on the cosine similarities may reach at most (100 in CLIP), or None for
            no bound (UniCL).
        loss_reduction: `"mean"` is UniCL's pseudo-code (mean over the batch and over both directions), `"sum"`
            is the Florence paper's equations 1 to 3 (sum over the batch and over both directions).

    Raises:
        ValueError: a field has an impossible value; the message names it.

    Example:
        >>> FlorenceConfig.from_size("huge").vision_config.depths
        [2, 2, 32, 4]
    """

    model_type = "florence"
    sub_configs_defaults = {"vision_config": FlorenceVisionConfig, "text_config": FlorenceTextConfig}
    base_model_fsdp_plan: ClassVar[dict[str, str]] = {}  # the towers bring their own
    # What transformers' Trainer does not collect over an evaluation set: every token's state, and the temperature.
    keys_to_ignore_at_inference = ["logit_scale", "text_model_output", "vision_model_output"]

    vision_config: dict | FlorenceVisionConfig | None = None
    text_config: dict | FlorenceTextConfig | None = None
    projection_dim: int = 512
    logit_scale_init_value: float | int = 2.6592
    max_logit_scale: float | int | None = 100.0
    loss_reduction: str = "mean"

    __eq__ = same_file

    def __post_init__(self, **kwargs: Any) -> None:
        check_base_fields(self, kwargs)
        self.validate_architecture()
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Raise a `ValueError` that names the first field with an impossible value."""
        for name, config_class in (("vision_config", FlorenceVisionConfig), ("text_config", FlorenceTextConfig)):
            value = getattr(self, name)
            if value is not None and not isinstance(value, dict | config_class):
                fail(name, f"a {config_class.__name__}, a dictionary or None", value)
            if isinstance(value, dict) and value.get("model_type", config_class.model_type) != config_class.model_type:
                fail(f"{name}.model_type", repr(config_class.model_type), value["model_type"])
        check_int("projection_dim", self.projection_dim, high=1 << 16)
        if self.max_logit_scale is not None:
            check_float("max_logit_scale", self.max_logit_scale, 0, 1e4, open_low=True)
        bound = math.log(1e4 if self.max_logit_scale is None else self.max_logit_scale)
        highest = math.ceil(bound * 1e4) / 1e4  # a logarithm rounded to four digits passes
        check_float("logit_scale_init_value", self.logit_scale_init_value, -10, highest)
        check_choice("loss_reduction", self.loss_reduction, ("mean", "sum"))

    @classmethod
    def from_size(cls, size: str, **overrides: Any) -> "FlorenceConfig":
        """The named size of both towers (`VISION_SIZES`, `TEXT_SIZES`), with single fields overridden."""
        vision, text = FlorenceVisionConfig.from_size(size), FlorenceTextConfig.from_size(size)
        fields = {"vision_config": vision, "text_config": text, "projection_dim": _named_size(PROJECTION_DIMS, size)}
        return cls(**{**fields, **overrides})


__all__ = [
    "TEXT_SIZES",
    "VISION_SIZES",
    "FlorenceConfig",
    "FlorenceTextConfig",
    "FlorenceVisionConfig",
    "check_base_fields",
    "check_choice",
    "check_float",
    "check_int",
    "check_int_list",
    "check_parameters",
    "fail",
    "same_file",
]
