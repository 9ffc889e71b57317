# Copyright 2026 The transformers_florence authors. Licensed under the Apache License, Version 2.0.
"""Configurations of Video CoSwin (Florence section 2.6) and of the dual encoder of clips and texts (section 3.8)."""

from typing import Any, cast

from transformers import PreTrainedConfig

from .configuration_florence import (
    FlorenceConfig,
    FlorenceTextConfig,
    FlorenceVisionConfig,
    check_base_fields,
    check_choice,
    check_float,
    check_int,
    check_int_list,
    check_parameters,
    fail,
    same_file,
)

MAX_FRAMES = 1 << 16  # of a window, a kernel or a clip
SHARED_SPACE = ("projection_dim", "logit_scale_init_value", "max_logit_scale", "loss_reduction")  # of a dual encoder


class FlorenceVideoConfig(FlorenceVisionConfig):
    """Shape of the video tower: CoSwin whose convolutions and windows reach over time.

    Every field of `FlorenceVisionConfig` means the same here, and these are new. Time is counted in frames before the
    first embedding and in tokens after it.

    Args:
        num_frames: frames of a clip that the tower is made for; any other number works too.
        temporal_stride: frames that become one token of time in the first embedding. Later ones keep the time.
        temporal_kernel_size: extent along time of each stage's embedding, in frames for the first and in tokens for
            the others; one number for the first alone, the others then have 1. An embedding of `temporal_stride`, or
            of 1 in later stages, has no overlap along time; a larger one overlaps (`embed_type="conv"` only). None
            for `temporal_stride` in the first stage.
        temporal_window_size: extent along time of each stage's windows in tokens, one number or one a stage.
        temporal_mode: `"windows"` attends in windows of time and space (Video Swin). `"divided"` attends along time at
            each place, then in each frame as the image tower does (TimeSformer); the part along time begins at zero.
        temporal_padding: what stands where a clip is no multiple of a kernel or a window. `"repeat"`: its first and
            last frame go on, so that a clip of one picture stays one. `"zeros"`: Video Swin's.
        window_padding: beside the image tower's `"clamp"` and `"pad"`, which tell what happens in space alone,
            `"clamp_axes"`, in which each side of a map is clamped by itself (Video Swin). Along time a window is
            always clamped by itself: a clip no longer than it is one unshifted window.
        clamped_bias: which rows of its table a window that was clamped reads. `"offsets"`: those of its own relative
            positions. `"slice"`: the first rows and columns of the full window's, as Video Swin's weights were
            trained; the same where time alone is clamped, other relative positions where space is.
        label_smoothing: share of each label that goes to all classes alike in a classifier's loss.
        classifier_dropout: dropout before the classifier in training.

    Raises:
        ValueError: a field has an impossible value; the message names it.

    Example:
        >>> FlorenceVideoConfig.from_size("tiny", temporal_window_size=[2, 4, 8, 8]).windows
        [(2, 7, 7), (4, 7, 7), (8, 7, 7), (8, 7, 7)]
    """

    model_type = "florence_video_model"
    base_config_key = "video_config"

    num_frames: int = 32
    temporal_stride: int = 2
    temporal_kernel_size: int | list[int] | tuple[int, ...] | None = None
    temporal_window_size: int | list[int] | tuple[int, ...] = 8
    temporal_mode: str = "windows"
    temporal_padding: str = "repeat"
    clamped_bias: str = "offsets"
    label_smoothing: float | int = 0.0
    classifier_dropout: float | int = 0.0

    __eq__ = same_file

    def __post_init__(self, **kwargs: Any) -> None:
        for name in ("temporal_kernel_size", "temporal_window_size"):
            if isinstance(value := getattr(self, name), tuple):
                setattr(self, name, list(value))  # what a saved configuration comes back with
        for name in ("temporal_kernel_sizes", "temporal_window_sizes", "windows"):
            kwargs.pop(name, None)  # derived
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        """Raise a `ValueError` that names the first field with an impossible value."""
        check_choice("window_padding", self.window_padding, ("clamp", "pad", "clamp_axes"))
        padding = self.window_padding
        try:  # everything else of space is the image tower's to check
            if padding == "clamp_axes":
                self.window_padding = "clamp"
            super().validate_architecture()
        finally:
            self.window_padding = padding
        check_int("num_frames", self.num_frames, high=MAX_FRAMES)
        check_int("temporal_stride", self.temporal_stride, high=256)
        for name in ("temporal_kernel_size", "temporal_window_size"):
            if isinstance(value := getattr(self, name), list | tuple):
                check_int_list(name, value, self.num_layers)
            elif value is not None or name == "temporal_window_size":
                check_int(name, value, high=MAX_FRAMES)
        for index, size in enumerate(self.temporal_kernel_sizes):
            stride = self.temporal_stride if index == 0 else 1
            if not stride <= size <= 256:
                fail(f"temporal_kernel_size[{index}]", f"a number from its stride, {stride}, up to 256", size)
            if size != stride and self.embed_type == "patch":
                fail(f"temporal_kernel_size[{index}]", f"{stride}, as patches do not overlap", size)
        check_choice("temporal_mode", self.temporal_mode, ("windows", "divided"))
        check_choice("temporal_padding", self.temporal_padding, ("repeat", "zeros"))
        check_choice("clamped_bias", self.clamped_bias, ("offsets", "slice"))
        check_float("label_smoothing", self.label_smoothing, 0, 0.99)
        check_float("classifier_dropout", self.classifier_dropout, 0, 0.99)
        tables = [
            depth * heads * (2 * time - 1) * (2 * side - 1) ** 2
            for depth, heads, time, side in zip(
                self.depths, self.num_heads, self.temporal_window_sizes, self.window_sizes, strict=True
            )
        ]
        check_parameters("temporal_window_size, window_size", sum(tables))

    @property
    def temporal_kernel_sizes(self) -> list[int]:
        """Extent along time of each stage's embedding."""
        size = self.temporal_stride if self.temporal_kernel_size is None else self.temporal_kernel_size
        return list(size) if isinstance(size, list | tuple) else [size] + [1] * (self.num_layers - 1)

    @property
    def temporal_window_sizes(self) -> list[int]:
        """Extent along time of each stage's windows, in tokens."""
        size = self.temporal_window_size
        return list(size) if isinstance(size, list | tuple) else [size] * self.num_layers

    @property
    def windows(self) -> list[tuple[int, int, int]]:
        """Windows of each stage over (time, height, width), in tokens; of one frame where attention is divided."""
        times = [1] * self.num_layers if self.temporal_mode == "divided" else self.temporal_window_sizes
        return [(time, side, side) for time, side in zip(times, self.window_sizes, strict=True)]

    @classmethod
    def from_vision_config(cls, vision_config: FlorenceVisionConfig, **overrides: Any) -> "FlorenceVideoConfig":
        """For the image tower of a dual encoder or classifier: its shape; fields of time and others by name."""
        left_out = {"_name_or_path", "architectures", "dtype", "id2label", "label2id", "problem_type", "model_type"}
        left_out |= {"out_features", "out_indices", "transformers_version"}
        fields = {name: value for name, value in vision_config.to_dict().items() if name not in left_out}
        return cls(**{**fields, **overrides})

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers; the configuration of an image tower or of a dual encoder is refused."""
        kind = config_dict.get("model_type")
        if kind in (FlorenceConfig.model_type, FlorenceVisionConfig.model_type):
            raise ValueError(
                f"expected model_type {cls.model_type!r}, got {kind!r}: `from_pretrained_image` of the video models "
                "makes a video tower of an image tower"
            )
        return super().from_dict(config_dict, **kwargs)


class FlorenceVideoTextConfig(PreTrainedConfig):
    """The dual encoder of clips and texts: a video tower, a text tower, and the space in which both meet.

    Args:
        video_config: a `FlorenceVideoConfig`, or the fields of one as a dictionary.
        text_config: a `FlorenceTextConfig`, or the fields of one as a dictionary.
        projection_dim, logit_scale_init_value, max_logit_scale, loss_reduction: as in `FlorenceConfig`.

    Raises:
        ValueError: a field has an impossible value; the message names it.

    Example:
        >>> config = FlorenceVideoTextConfig.from_dual_encoder(FlorenceConfig.from_size("nano"), temporal_stride=1)
        >>> config.video_config.temporal_stride, config.projection_dim
        (1, 256)
    """

    model_type = "florence_video_text"
    sub_configs_defaults = {"video_config": FlorenceVideoConfig, "text_config": FlorenceTextConfig}
    # What transformers' Trainer does not collect over an evaluation set: every token's state, and the temperature.
    keys_to_ignore_at_inference = ["logit_scale", "text_model_output", "video_model_output"]

    video_config: dict | FlorenceVideoConfig | None = None
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
        kind, value = FlorenceVideoConfig, self.video_config
        if value is not None and not isinstance(value, dict | kind):
            fail("video_config", f"a {kind.__name__}, a dictionary or None", value)
        if isinstance(value, dict) and value.get("model_type", kind.model_type) != kind.model_type:
            fail("video_config.model_type", repr(kind.model_type), value["model_type"])
        # What a dual encoder of pictures has too is its to check. It gets a copy, whose attention it may set.
        text = self.text_config.to_dict() if isinstance(self.text_config, FlorenceTextConfig) else self.text_config
        FlorenceConfig(text_config=text, **{name: getattr(self, name) for name in SHARED_SPACE})

    @classmethod
    def from_dual_encoder(cls, config: FlorenceConfig, **fields: Any) -> "FlorenceVideoTextConfig":
        """For the towers of a dual encoder of pictures: its shape; `fields` are those of the `FlorenceVideoConfig`."""
        video = FlorenceVideoConfig.from_vision_config(cast("FlorenceVisionConfig", config.vision_config), **fields)
        shared = {name: getattr(config, name) for name in SHARED_SPACE}
        return cls(video_config=video, text_config=config.text_config.to_dict(), **shared)


__all__ = ["FlorenceVideoConfig", "FlorenceVideoTextConfig"]
