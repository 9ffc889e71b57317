# Copyright 2026 The transformers_florence authors. Licensed under the Apache License, Version 2.0.
"""Video CoSwin (Florence section 2.6): the image tower carried into time, and a classifier of clips on it."""

import os
import re
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_florence import FlorenceVisionConfig
from .configuration_florence_video import FlorenceVideoConfig
from .modeling_florence import check_class_labels
from .modeling_florence_vision import FlorenceVisionModel, FlorenceVisionPreTrainedModel
from .video_layers import TubeEmbed, VideoCoSwinEncoder, ZeroLinear, resize_video_table
from .window_ops import resize_relative_position_table


def check_clips(pixel_values_videos: torch.Tensor | None, num_channels: int) -> None:
    """Refuse clips that the tower cannot read; values are looked at on the CPU only, as in `check_pixel_values`.

    Raises:
        ValueError: missing, wrong type, rank, dtype or channels, an empty axis, NaN or infinite pixels.
    """
    expected = f"floating-point pixel_values_videos of shape (batch, frames, {num_channels}, height, width)"
    if not isinstance(pixel_values_videos, torch.Tensor):
        raise ValueError(f"expected {expected}, got {type(pixel_values_videos).__name__}")
    shape, dtype = tuple(pixel_values_videos.shape), pixel_values_videos.dtype
    if len(shape) != 5 or shape[2] != num_channels or not dtype.is_floating_point:
        raise ValueError(f"expected {expected}, got {dtype} of shape {shape}")
    if torch.compiler.is_compiling() or pixel_values_videos.device.type != "cpu":
        return
    if 0 in shape:
        raise ValueError(f"expected {expected} with at least one clip, frame and pixel, got shape {shape}")
    if not torch.isfinite(pixel_values_videos.sum(dtype=torch.float64)):
        raise ValueError(f"expected finite pixel_values_videos, got NaN or infinity in a batch of shape {shape}")


def inflate_tensors(
    tensors: dict[str, torch.Tensor], image_config: FlorenceVisionConfig, config: FlorenceVideoConfig
) -> dict[str, torch.Tensor]:
    """An image tower's tensors as a video tower's (Florence section 2.6): same names, some of them with time.

    The kernel of an embedding is repeated along time and divided by its extent there. A table of relative positions
    is resized where the window differs in space, then repeated for each offset in time. All others stay as they are.

    tensors: those of a `FlorenceVisionModel` of `image_config`; config: the video tower's.
    """
    inflated = {}
    for name, tensor in tensors.items():
        match = re.match(r"encoder\.stages\.(\d+)\.", name)
        stage = int(match[1]) if match else 0
        if name.endswith(("embeddings.projection.weight", ".embed.projection.weight")):
            length = config.temporal_kernel_sizes[stage]
            tensor = tensor[:, :, None].expand(-1, -1, length, -1, -1) / length  # (dim, channels, length, rows, cols)
        elif name.endswith(".relative_position_bias_table"):
            time, *window = config.windows[stage]
            tensor = resize_relative_position_table(tensor, (image_config.window_sizes[stage],) * 2, tuple(window))
            tensor = tensor.repeat(2 * time - 1, 1)
        inflated[name] = tensor
    return inflated


def resize_bias(attention: nn.Module, window: tuple[int, ...], new_window: tuple[int, ...]) -> None:
    """Give an attention over windows the relative position table for other ones, see `resize_video_table`."""
    table = cast("nn.Parameter", attention.relative_position_bias_table)
    resized = resize_video_table(table.detach(), window, new_window)
    attention.relative_position_bias_table = nn.Parameter(resized, requires_grad=table.requires_grad)


class FlorenceVideoPreTrainedModel(FlorenceVisionPreTrainedModel):
    """Loading, saving and initialisation of everything that is a video tower."""

    config: FlorenceVideoConfig
    base_model_prefix = "video_model"
    main_input_name = "pixel_values_videos"
    input_modalities = ("video",)
    _no_split_modules = ["VideoCoSwinLayer", "TubeEmbed", "FrameMerging"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ZeroLinear) and getattr(module, "weight", None) is not None:
            init.zeros_(module.weight)
            init.zeros_(module.bias)

    def _inflate(self, image_model: FlorenceVisionModel) -> None:
        """Take over an image tower's weights.

        Raises:
            ValueError: the tower has another shape; every tensor that does not fit is listed.
        """
        tower = cast("FlorenceVideoModel", getattr(self, self.base_model_prefix, self))
        tensors = inflate_tensors(image_model.state_dict(), image_model.config, tower.config)
        own = {name: value for name, value in tower.state_dict().items() if ".temporal_" not in name}
        unfit = sorted(
            name
            for name in own.keys() | tensors.keys()
            if name not in own or name not in tensors or own[name].shape != tensors[name].shape
        )
        if unfit:
            raise ValueError(f"expected an image tower of the video tower's shape, got another, in {', '.join(unfit)}")
        tower.load_state_dict(tensors, strict=False)

    @classmethod
    def from_pretrained_image(cls, folder: str | os.PathLike, **fields: Any) -> Any:
        """A video model to be trained, inflated from the image tower of a Florence checkpoint.

        Args:
            folder: where a dual encoder, an image tower or a classifier of pictures was saved, or its name on the Hub.
            fields: of the `FlorenceVideoConfig`, such as `id2label`, `num_frames` and `temporal_window_size`.

        Returns:
            The model in float32, in evaluation mode. New are the classifier, if it has one, and what attends along
            time alone with `temporal_mode="divided"`.

        Raises:
            ValueError: the checkpoint lacks weights of an image tower; a field has an impossible value.

        Example:
            >>> names = {0: "waving", 1: "nodding"}
            >>> folder = bundled_checkpoint()
            >>> model = FlorenceForVideoClassification.from_pretrained_image(folder, id2label=names, num_frames=8)
        """
        image_model, info = FlorenceVisionModel.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        if info["missing_keys"]:
            missing = ", ".join(sorted(info["missing_keys"]))
            raise ValueError(f"expected the weights of an image tower in {folder}, missing are: {missing}")
        model = cls(FlorenceVideoConfig.from_vision_config(image_model.config, **fields))
        model._inflate(image_model)
        return model.eval()


class FlorenceVideoModel(FlorenceVideoPreTrainedModel):
    """Florence's video tower without a head. Any number of frames and any picture size work, in any order of calls.

    Example:
        >>> model = FlorenceVideoModel(FlorenceVideoConfig.from_size("nano"))
        >>> model(torch.zeros(1, 5, 3, 64, 64)).last_hidden_state.shape  # 3 x 2 x 2 tokens
        torch.Size([1, 12, 512])
    """

    _keys_to_ignore_on_load_unexpected = [r"^classifier\."]

    def __init__(self, config: FlorenceVideoConfig) -> None:
        config.validate_architecture()  # fields that were set after the configuration was built
        super().__init__(config)
        self.embeddings = TubeEmbed(config, index=0)
        self.encoder = VideoCoSwinEncoder(config)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self, pixel_values_videos: torch.Tensor | None = None, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithPooling:
        """
        Args:
            pixel_values_videos: (batch, frames, channels, height, width), floating, normalised.

        Returns:
            last_hidden_state: (batch, tokens, hidden_size), after the final norm; time, then rows, then columns.
            pooler_output: (batch, hidden_size), their mean.
            hidden_states, if asked for: the stem's grid and each stage's, (batch, time, height, width, channels).
            attentions, if asked for (attn_implementation="eager"): one a layer, (batch * num_windows, heads,
            window_area, window_area); with divided attention two, the first (batch * height * width * num_windows,
            heads, time, time).

        Raises:
            ValueError: clips that `check_clips` refuses.
        """
        check_clips(pixel_values_videos, self.config.num_channels)
        hidden_states = self.embeddings(pixel_values_videos.to(self.dtype))  # (batch, time, height, width, channels)
        hidden_states = self.norm(self.encoder(hidden_states))
        last_hidden_state = hidden_states.flatten(1, 3)  # (batch, tokens, channels)
        return BaseModelOutputWithPooling(
            last_hidden_state=last_hidden_state, pooler_output=last_hidden_state.mean(dim=1)
        )

    def resize_window_size(
        self,
        window_size: int | list[int] | None = None,
        temporal_window_size: int | list[int] | None = None,
    ) -> None:
        """Change the windows in place; the relative position tables are resized, nothing else changes.

        Args:
            window_size: side of the new windows in tokens, one number or one a stage; None for what they have.
            temporal_window_size: their extent along time, likewise.

        Raises:
            ValueError: a size that the configuration refuses; the model is left as it was.
        """
        given = {"window_size": window_size, "temporal_window_size": temporal_window_size}
        given = {name: value for name, value in given.items() if value is not None}
        config = type(self.config)(**{**self.config.to_dict(), **given})
        stages = zip(self.encoder.stages, config.windows, config.temporal_window_sizes, strict=True)
        for stage, new_window, time in cast("Any", stages):
            for layer in stage.layers:
                resize_bias(layer.attention, stage.window_size, new_window)
                if layer.temporal_attention is not None:
                    resize_bias(layer.temporal_attention, layer.time_window, (time,))
                layer.time_window = (time,)
            stage.window_size = new_window
        for name, value in given.items():
            setattr(self.config, name, value)


def inflate_from_image(image_model: FlorenceVisionModel, **fields: Any) -> FlorenceVideoModel:
    """The video tower that an image tower becomes (Florence section 2.6), see `inflate_tensors`.

    A clip of one picture gives what the image tower gives for the picture, for every number of frames, as long as
    `temporal_padding` is "repeat" and the windows keep their size in space. With "zeros" that holds where nothing is
    padded along time: embeddings without overlap, and frames that fill the tubes and windows. For florence-nano with
    "zeros", a first embedding over 3 frames with a step of 2 moves the pooled output by 11, 5 and 1 percent of its
    length (2, 8 and 32 frames), embeddings over 3 in every stage by 19, 3 and 1 percent.

    Args:
        image_model: a `FlorenceVisionModel`, such as the `vision_model` of a dual encoder.
        fields: of the `FlorenceVideoConfig`, beside those that the image tower's configuration tells.

    Returns:
        A new model in evaluation mode, of the same dtype and on the same device.

    Raises:
        ValueError: a field has an impossible value or asks for another shape than the image tower's.
    """
    config = FlorenceVideoConfig.from_vision_config(image_model.config, **fields)
    model = FlorenceVideoModel(config).to(device=image_model.device, dtype=image_model.dtype)
    model._inflate(image_model)
    return model.eval()


class FlorenceForVideoClassification(FlorenceVideoPreTrainedModel):
    """The video tower with a linear classifier on its pooled output.

    Loads from its own checkpoints and from a video tower's; `from_pretrained_image` starts from an image tower.
    """

    # The loss is a mean over the batch: a trainer must divide it by its accumulation steps itself.
    accepts_loss_kwargs = False

    def __init__(self, config: FlorenceVideoConfig) -> None:
        super().__init__(config)
        self.video_model = FlorenceVideoModel._from_config(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()
        # The tower alone passes over a classifier's weights; a classifier must not.
        self._keys_to_ignore_on_load_unexpected: set[str] = set()

    def video_loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Scalar, of logits (batch, num_labels) in float32 at least.

        One class a clip is cross entropy with label smoothing, also for labels that mix clips: (batch, num_labels)
        floats with `problem_type="single_label_classification"`. Other problems are as in transformers.
        """
        config = self.config
        numbers = not labels.is_floating_point() and labels.ndim == 1 and config.num_labels > 1
        if config.problem_type == "single_label_classification" or (config.problem_type is None and numbers):
            labels = labels.to(logits.dtype) if labels.is_floating_point() else labels.long()
            return F.cross_entropy(logits, labels, label_smoothing=config.label_smoothing)
        return self.loss_function(labels, logits, config)

    @can_return_tuple
    def forward(
        self,
        pixel_values_videos: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ImageClassifierOutput:
        """
        Args:
            pixel_values_videos: (batch, frames, channels, height, width), floating, normalised.
            labels: (batch,) class numbers, or (batch, num_labels) floats, see `video_loss`.

        Returns:
            loss if labels were given, logits (batch, num_labels), and what the tower recorded.

        Raises:
            ValueError: clips that the tower refuses, or labels that `check_class_labels` refuses.
        """
        outputs = self.video_model(pixel_values_videos, return_dict=True, **kwargs)
        logits = self.classifier(self.dropout(outputs.pooler_output))
        loss = None
        if labels is not None:
            check_class_labels(labels, logits.shape[0], logits.shape[1])
            # The softmax of half-precision logits would be as coarse as they are.
            loss = self.video_loss(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels)
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )

    @torch.no_grad()
    def classify_views(self, pixel_values_videos: torch.Tensor, views_at_a_time: int = 4) -> torch.Tensor:
        """Multi-view testing: the mean of what it says of each view of a clip (Florence: 4 clips x 3 crops).

        Args:
            pixel_values_videos: (batch, views, frames, channels, height, width), as `FlorenceVideoProcessor.views`
                makes them.
            views_at_a_time: how many go through the tower together; the result is the same.

        Returns:
            (batch, num_labels), float32 at least: probabilities (of one class, or of each class for several), or the
            values of a regression.

        Raises:
            ValueError: another number of axes, `views_at_a_time` below 1, or clips that the tower refuses.
        """
        if not isinstance(pixel_values_videos, torch.Tensor) or pixel_values_videos.ndim != 6:
            got = getattr(pixel_values_videos, "shape", type(pixel_values_videos).__name__)
            raise ValueError(f"expected (batch, views, frames, channels, height, width), got {got}")
        if views_at_a_time < 1:
            raise ValueError(f"expected views_at_a_time of at least 1, got {views_at_a_time}")
        views = pixel_values_videos.flatten(0, 1).split(views_at_a_time)
        logits = torch.cat([self(view).logits for view in views])
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.config.problem_type == "multi_label_classification":
            logits = logits.sigmoid()
        elif self.config.problem_type != "regression" and self.config.num_labels > 1:
            logits = logits.softmax(dim=-1)
        return logits.unflatten(0, pixel_values_videos.shape[:2]).mean(dim=1)


__all__ = [
    "FlorenceForVideoClassification",
    "FlorenceVideoModel",
    "FlorenceVideoPreTrainedModel",
    "check_clips",
    "inflate_from_image",
    "inflate_tensors",
]
