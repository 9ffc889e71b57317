# Copyright 2026 The transformers_florence authors. Licensed under the Apache License, Version 2.0.
"""Configuration of Florence's detector: an image tower, a feature pyramid and a Dynamic Head.

It has a model type of its own: transformers' object-detection pipeline must find no tokenizer for it.
"""

from typing import Any

from transformers import PreTrainedConfig

from .configuration_florence import (
    FlorenceConfig,
    FlorenceVisionConfig,
    check_base_fields,
    check_choice,
    check_int,
    fail,
    same_file,
)

FIRST_STRIDE = 4  # of the image tower's first stage, in pixels
EXTRA_LEVELS = 2  # P6 and P7, made of the last map
NORM_GROUPS = 16  # of the group norms of the Dynamic Head
# What a configuration has that is said of a checkpoint, and not of its tower's shape.
OF_A_CHECKPOINT = ("_name_or_path", "architectures", "dtype", "id2label", "label2id", "problem_type")
TOWER_OUTPUTS = 3  # how many stages the pyramid starts from, unless the tower's configuration says otherwise


def _for_detection(fields: dict[str, Any]) -> dict[str, Any]:
    """Fields of an image tower, with what detection wants where they say nothing: padded windows, the last stages."""
    fields = {"window_padding": "pad", **fields}
    if fields.get("out_features") is None and fields.get("out_indices") is None:
        stages = FlorenceVisionConfig(**fields).stage_names[1:]
        fields["out_features"] = stages[-TOWER_OUTPUTS:]
    return fields


class FlorenceDetectionConfig(PreTrainedConfig):
    """Shape of the detector: CoSwin, FPN with the levels P3 to P7, Dynamic Head, ATSS (Florence section 2.4).

    Args:
        vision_config: a `FlorenceVisionConfig`, taken as it is; or the fields of one as a dictionary, in which
            `window_padding` is `"pad"` and `out_features` are the last three stages unless it says otherwise.
        hidden_size: channels of the pyramid and of the head. The group norms have 16 groups: a multiple of it, and
            more than 16 itself, unless every last map has more than one location.
        num_blocks: blocks of the Dynamic Head; 0 predicts from the pyramid itself.
        offset_layout: how the next coarser level's convolution reads a level's map of offsets, which is larger than
            it: `"crop"` takes its upper left part (mmdetection), `"official"` reads its memory from the start, as the
            published code does and its weights need. See `dynamic_head`.

    Raises:
        ValueError: a field has an impossible value; the message names it.

    Example:
        >>> FlorenceDetectionConfig.from_size("tiny", num_labels=20).strides
        [8, 16, 32, 64, 128]
    """

    model_type = "florence_detection"
    sub_configs_defaults = {"vision_config": FlorenceVisionConfig}
    # What transformers' Trainer does not collect over an evaluation set: `logits` holds both.
    keys_to_ignore_at_inference = ["class_logits", "centerness_logits"]

    vision_config: dict | FlorenceVisionConfig | None = None
    hidden_size: int = 256
    num_blocks: int = 6
    offset_layout: str = "crop"

    __eq__ = same_file

    def __post_init__(self, **kwargs: Any) -> None:
        check_base_fields(self, kwargs)
        if self.vision_config is None:
            self.vision_config = {}
        if isinstance(self.vision_config, dict):
            model_type = self.vision_config.get("model_type", FlorenceVisionConfig.model_type)
            if model_type != FlorenceVisionConfig.model_type:
                fail("vision_config.model_type", repr(FlorenceVisionConfig.model_type), model_type)
            self.vision_config = FlorenceVisionConfig(**_for_detection(self.vision_config))
        self.validate_architecture()
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Raise a `ValueError` that names the first field with an impossible value."""
        if not isinstance(self.vision_config, FlorenceVisionConfig):
            fail("vision_config", "a FlorenceVisionConfig, a dictionary or None", self.vision_config)
        self.vision_config.validate_architecture()
        indices = self.vision_config.out_indices
        if 0 in indices or list(indices) != list(range(indices[0], indices[0] + len(indices))):
            fail("vision_config.out_features", "successive stages", self.vision_config.out_features)
        check_int("hidden_size", self.hidden_size, high=1 << 14)
        if self.hidden_size % NORM_GROUPS:
            fail("hidden_size", f"a multiple of {NORM_GROUPS}", self.hidden_size)
        check_int("num_blocks", self.num_blocks, low=0, high=1000)
        check_choice("offset_layout", self.offset_layout, ("crop", "official"))

    @property
    def strides(self) -> list[int]:
        """Of each level of the pyramid, in pixels."""
        first = self.vision_config.out_indices[0]
        levels = len(self.vision_config.out_indices) + EXTRA_LEVELS
        return [FIRST_STRIDE * 2 ** (first - 1 + level) for level in range(levels)]

    @classmethod
    def from_vision_config(cls, vision_config: FlorenceVisionConfig, **overrides: Any) -> "FlorenceDetectionConfig":
        """For the image tower of a dual encoder or classifier: its shape, with detection's windows and outputs."""
        fields = {name: value for name, value in vision_config.to_dict().items() if name not in OF_A_CHECKPOINT}
        fields |= {"window_padding": "pad", "out_features": None, "out_indices": None}
        return cls(**{"vision_config": fields, **overrides})

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers; from the fields of a dual encoder or of an image tower, a detector on that tower."""
        kind = config_dict.get("model_type")
        if kind not in (FlorenceConfig.model_type, FlorenceVisionConfig.model_type):
            return super().from_dict(config_dict, **kwargs)
        fields = config_dict.get("vision_config") or {} if kind == FlorenceConfig.model_type else config_dict
        config = cls.from_vision_config(FlorenceVisionConfig.from_dict(fields))
        return super().from_dict(config.to_dict(), **kwargs)

    @classmethod
    def from_size(cls, size: str, **overrides: Any) -> "FlorenceDetectionConfig":
        """The image tower of the named size (`VISION_SIZES`), with single fields of the detector overridden."""
        return cls.from_vision_config(FlorenceVisionConfig.from_size(size), **overrides)


__all__ = ["FlorenceDetectionConfig"]
