# Copyright 2026 The transformers_florence authors. Licensed under the Apache License, Version 2.0.
"""Texts to clips and back (Florence section 3.8): the dual encoder with the video tower in the image tower's place."""

import math
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs
from transformers.utils.generic import can_return_tuple, maybe_autocast

from .configuration_florence_video import FlorenceVideoTextConfig
from .losses_contrastive import similarities, unicl_loss
from .modeling_florence import FlorenceModel, FlorencePreTrainedModel
from .modeling_florence_text import FlorenceTextModel
from .modeling_florence_video import FlorenceVideoModel


@dataclass
class FlorenceVideoTextOutput(ModelOutput):
    """What `FlorenceForVideoTextRetrieval` returns; with one modality alone, the other's fields are None.

    Args:
        loss: scalar, if `labels` or `return_loss` was given.
        logits_per_video: (clips, texts), float32, cosine similarities times `logit_scale`.
        logits_per_text: (texts, clips), its transpose.
        video_embeds: (clips, projection_dim), unit length.
        text_embeds: (texts, projection_dim), unit length.
        logit_scale: scalar, float32, the factor itself (not its logarithm).
        text_model_output, video_model_output: what the towers returned.
    """

    loss: torch.Tensor | None = None
    logits_per_video: torch.Tensor | None = None
    logits_per_text: torch.Tensor | None = None
    video_embeds: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None
    logit_scale: torch.Tensor | None = None
    text_model_output: BaseModelOutputWithPooling | None = None
    video_model_output: BaseModelOutputWithPooling | None = None

    def to_tuple(self) -> tuple:
        """The fields that are set, nested outputs as tuples."""
        return tuple(value.to_tuple() if isinstance(value, ModelOutput) else value for value in self.values())


class FlorenceForVideoTextRetrieval(FlorencePreTrainedModel):
    """A video tower and a text tower that meet in one space; texts find clips and clips texts by their cosines.

    Zero-shot, `from_pretrained_image` makes it of a dual encoder of pictures, in one of two ways. With
    `temporal_stride=1, temporal_window_size=1` each frame goes through the image tower by itself, and the frames'
    features are averaged. Else the tower is inflated: its convolutions and windows reach over time as they would after
    the first step of a training (the paper follows ViViT here).

    Example:
        >>> folder = bundled_checkpoint()
        >>> model = FlorenceForVideoTextRetrieval.from_pretrained_image(folder, num_frames=8)
        >>> model(pixel_values_videos=torch.zeros(2, 8, 3, 64, 64)).video_embeds.shape
        torch.Size([2, 256])
    """

    config: FlorenceVideoTextConfig
    base_model_prefix = "florence_video_text"
    input_modalities = ("video", "text")

    def __init__(self, config: FlorenceVideoTextConfig) -> None:
        config.validate_architecture()  # fields that were set after the configuration was built
        super().__init__(config)
        self.video_model = FlorenceVideoModel._from_config(config.video_config)
        self.text_model = FlorenceTextModel._from_config(config.text_config)
        self.visual_projection = nn.Linear(config.video_config.hidden_size, config.projection_dim, bias=False)
        self.text_projection = nn.Linear(config.text_config.hidden_size, config.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(float(config.logit_scale_init_value)))
        self.post_init()
        # A tower alone passes over the rest of a dual encoder's checkpoint; the whole has collected that and must not.
        self._keys_to_ignore_on_load_unexpected: set[str] = set()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, FlorenceForVideoTextRetrieval):
            init.constant_(module.logit_scale, self.config.logit_scale_init_value)
            for projection in (module.visual_projection, module.text_projection):
                if getattr(projection, "weight", None) is not None:
                    init.normal_(projection.weight, std=projection.in_features**-0.5)

    # The text side is the dual encoder's.
    get_input_embeddings = FlorenceModel.get_input_embeddings
    set_input_embeddings = FlorenceModel.set_input_embeddings
    get_text_features = FlorenceModel.get_text_features

    @classmethod
    def from_pretrained_image(cls, folder: str | os.PathLike, **fields: Any) -> "FlorenceForVideoTextRetrieval":
        """A model inflated from a dual encoder of pictures: nothing in it is new but what attends along time alone.

        Args:
            folder: where a `FlorenceModel` was saved, or its name on the Hub.
            fields: of the `FlorenceVideoConfig`, such as `num_frames`, `temporal_stride` and `temporal_window_size`.

        Returns:
            The model in float32, in evaluation mode.

        Raises:
            ValueError: the checkpoint lacks weights of a dual encoder; a field has an impossible value.
        """
        images, info = FlorenceModel.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        if info["missing_keys"]:
            missing = ", ".join(sorted(info["missing_keys"]))
            raise ValueError(f"expected the weights of a dual encoder in {folder}, missing are: {missing}")
        model = cls(FlorenceVideoTextConfig.from_dual_encoder(images.config, **fields))
        model.video_model._inflate(images.vision_model)
        for part in ("text_model", "visual_projection", "text_projection"):
            getattr(model, part).load_state_dict(getattr(images, part).state_dict())
        model.logit_scale.data.copy_(images.logit_scale.data)
        return model.eval()

    @can_return_tuple
    def get_video_features(
        self, pixel_values_videos: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithPooling:
        """The video tower's output with `pooler_output` projected: (batch, projection_dim), not normalised.

        pixel_values_videos: (batch, frames, channels, height, width), floating.
        """
        outputs = self.video_model(pixel_values_videos, return_dict=True, **kwargs)
        outputs.pooler_output = self.visual_projection(outputs.pooler_output)
        return outputs

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        return_loss: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> FlorenceVideoTextOutput:
        """
        Args:
            input_ids: (texts, tokens), integers.
            pixel_values_videos: (clips, frames, channels, height, width), floating.
            attention_mask, position_ids: (texts, tokens), integers.
            labels: (batch,), integers: pair i's meaning. Clips and texts with equal labels are positives (UniCL).
            return_loss: without `labels`, whether to return the loss in which every pair is its own meaning (CLIP).

        Returns:
            A `FlorenceVideoTextOutput`.

        Raises:
            ValueError: neither modality given, input that a tower refuses, or a loss without as many texts as clips.
        """
        if input_ids is None and pixel_values_videos is None:
            raise ValueError("expected pixel_values_videos, input_ids or both, got neither")
        video = text = None
        if pixel_values_videos is not None:
            video = self.get_video_features(pixel_values_videos, return_dict=True, **kwargs)
        if input_ids is not None:
            text = self.get_text_features(input_ids, attention_mask, position_ids, return_dict=True, **kwargs)
        video_embeds = None if video is None else F.normalize(video.pooler_output, dim=-1)
        text_embeds = None if text is None else F.normalize(text.pooler_output, dim=-1)
        # bfloat16 would round the scale by up to 0.4 %
        logit_scale = self.logit_scale.to(torch.promote_types(self.logit_scale.dtype, torch.float32))
        if self.config.max_logit_scale is not None:
            logit_scale = logit_scale.clamp(max=math.log(self.config.max_logit_scale))
        logit_scale = logit_scale.exp()
        logits_per_video = loss = None
        if video_embeds is not None and text_embeds is not None:
            with maybe_autocast(video_embeds.device.type, enabled=False):  # which would round the logits
                logits_per_video = similarities(video_embeds, text_embeds, logit_scale)  # (clips, texts)
        if labels is not None or return_loss:
            if video_embeds is None or text_embeds is None:
                raise ValueError("the contrastive loss expected pixel_values_videos and input_ids, got one of them")
            if labels is None:
                labels = torch.arange(video_embeds.shape[0], device=video_embeds.device)
            loss = unicl_loss(video_embeds, text_embeds, labels, logit_scale, self.config.loss_reduction)
        return FlorenceVideoTextOutput(
            loss=loss,
            logits_per_video=logits_per_video,
            logits_per_text=None if logits_per_video is None else logits_per_video.T,
            video_embeds=video_embeds,
            text_embeds=text_embeds,
            logit_scale=logit_scale,
            text_model_output=text,
            video_model_output=video,
        )


__all__ = ["FlorenceForVideoTextRetrieval", "FlorenceVideoTextOutput"]
