# Copyright 2026 The transformers_florence authors. Licensed under the Apache License, Version 2.0.
"""Configuration of Florence's open-set detector: a detector and a text tower, and how names meet boxes."""

from typing import Any

from .configuration_florence import (
    FlorenceConfig,
    FlorenceTextConfig,
    FlorenceVisionConfig,
    check_choice,
    check_float,
    check_int,
    fail,
    same_file,
)
from .configuration_florence_detection import OF_A_CHECKPOINT, FlorenceDetectionConfig

NAMINGS = ("crop", "region", "text_head")
FROM_DUAL_ENCODER = ("projection_dim", "logit_scale_init_value", "max_logit_scale")


class FlorenceZeroShotDetectionConfig(FlorenceDetectionConfig):
    """Shape of the open-set detector (Florence section 3.6, "zero-shot transfer in object detection").

    Args:
        vision_config: as in `FlorenceDetectionConfig`, but `window_padding` is the dual encoder's own, `"clamp"`
            unless it says otherwise: one tower sees whole pictures and single objects.
        text_config: a `FlorenceTextConfig`, or the fields of one as a dictionary.
        projection_dim, logit_scale_init_value, max_logit_scale: as in `FlorenceConfig`.
        naming: how a class is matched with a box. `"crop"`: the dual encoder sees each proposal cut out of the
            picture. `"region"`: it sees the part of the last feature map that belongs to the proposal, which costs
            next to nothing. `"text_head"`: the detector's own class predictor answers in the space of the texts, and
            is trained with boxes and names.
        num_proposals: how many boxes of a picture are named at most (`"crop"`, `"region"`).
        crop_margin: what is cut out beside a proposal, on all sides together, over its longer side (`"crop"`).
        background_texts: what a proposal may show beside the classes; a class scores against these (`"crop"`,
            `"region"`). `set_background` fills the vectors in; without texts a cosine of zero stands for the rest.

    Raises:
        ValueError: a field has an impossible value; the message names it.

    Example:
        >>> FlorenceZeroShotDetectionConfig.from_size("nano").vision_config.window_padding
        'clamp'
    """

    model_type = "florence_zero_shot_detection"
    sub_configs_defaults = {"vision_config": FlorenceVisionConfig, "text_config": FlorenceTextConfig}

    text_config: dict | FlorenceTextConfig | None = None
    projection_dim: int = 512
    logit_scale_init_value: float | int = 2.6592
    max_logit_scale: float | int | None = 100.0
    naming: str = "crop"
    num_proposals: int = 100
    crop_margin: float | int = 0.25
    background_texts: list[str] | tuple[str, ...] = ()

    __eq__ = same_file

    def __post_init__(self, **kwargs: Any) -> None:
        if self.text_config is None:
            self.text_config = {}
        if isinstance(self.text_config, dict):
            model_type = self.text_config.get("model_type", FlorenceTextConfig.model_type)
            if model_type != FlorenceTextConfig.model_type:
                fail("text_config.model_type", repr(FlorenceTextConfig.model_type), model_type)
            self.text_config = FlorenceTextConfig(**self.text_config)
        if self.vision_config is None or isinstance(self.vision_config, dict):
            self.vision_config = {"window_padding": "clamp", **(self.vision_config or {})}
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Raise a `ValueError` that names the first field with an impossible value."""
        super().validate_architecture()
        if not isinstance(self.text_config, FlorenceTextConfig):
            fail("text_config", "a FlorenceTextConfig, a dictionary or None", self.text_config)
        self.text_config.validate_architecture()
        FlorenceConfig(**{name: getattr(self, name) for name in FROM_DUAL_ENCODER})  # the dual encoder's own checks
        check_choice("naming", self.naming, NAMINGS)
        check_int("num_proposals", self.num_proposals, high=10_000)
        check_float("crop_margin", self.crop_margin, 0, 10)
        texts = self.background_texts
        if not isinstance(texts, list | tuple) or not all(isinstance(text, str) and text.strip() for text in texts):
            fail("background_texts", "a list of texts", texts)

    @classmethod
    def from_dual_config(cls, config: FlorenceConfig, **overrides: Any) -> "FlorenceZeroShotDetectionConfig":
        """For the towers of a dual encoder: their shapes, with the last stages as the pyramid's maps."""
        left_out = (*OF_A_CHECKPOINT, "out_features", "out_indices")
        towers = {
            name: {key: value for key, value in getattr(config, name).to_dict().items() if key not in left_out}
            for name in ("vision_config", "text_config")
        }
        own = {name: getattr(config, name) for name in FROM_DUAL_ENCODER}
        return cls(**{**towers, **own, **overrides})

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers; from the fields of a dual encoder, an open-set detector on its towers."""
        if config_dict.get("model_type") == FlorenceConfig.model_type:
            config_dict = cls.from_dual_config(FlorenceConfig.from_dict(config_dict)).to_dict()
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def from_size(cls, size: str, **overrides: Any) -> "FlorenceZeroShotDetectionConfig":
        """The towers of the named size, with single fields of the detector overridden."""
        return cls.from_dual_config(FlorenceConfig.from_size(size), **overrides)


__all__ = ["NAMINGS", "FlorenceZeroShotDetectionConfig"]
