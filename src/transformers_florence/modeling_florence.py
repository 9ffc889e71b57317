# Copyright 2026 The transformers_florence authors. Licensed under the Apache License, Version 2.0.
"""Florence's dual encoder, its label-aware contrastive objective, and image classification on the image tower."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs
from transformers.utils.generic import can_return_tuple, maybe_autocast

from .configuration_florence import FlorenceConfig, FlorenceVisionConfig
from .integrity import ManifestMixin
from .losses_contrastive import unicl_loss
from .modeling_florence_text import FlorenceTextModel
from .modeling_florence_vision import FlorenceVisionModel, FlorenceVisionPreTrainedModel

IGNORED_LABEL = -100  # cross entropy's mark of a picture without a class


@dataclass
class FlorenceOutput(ModelOutput):
    """What `FlorenceModel` returns; with one modality alone, the other's fields are None.

    Args:
        loss: scalar, if `labels` or `return_loss` was given.
        logits_per_image: (images, texts), float32, cosine similarities times `logit_scale`.
        logits_per_text: (texts, images), its transpose.
        image_embeds: (images, projection_dim), unit length.
        text_embeds: (texts, projection_dim), unit length.
        logit_scale: scalar, float32, the factor itself (not its logarithm).
        text_model_output, vision_model_output: what the towers returned.
    """

    loss: torch.Tensor | None = None
    logits_per_image: torch.Tensor | None = None
    logits_per_text: torch.Tensor | None = None
    image_embeds: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None
    logit_scale: torch.Tensor | None = None
    text_model_output: BaseModelOutputWithPooling | None = None
    vision_model_output: BaseModelOutputWithPooling | None = None

    def to_tuple(self) -> tuple:
        """The fields that are set, nested outputs as tuples."""
        return tuple(value.to_tuple() if isinstance(value, ModelOutput) else value for value in self.values())


class FlorencePreTrainedModel(ManifestMixin, PreTrainedModel):
    """Loading, saving and initialisation of everything that holds both towers."""

    config: FlorenceConfig
    base_model_prefix = "florence"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    # The losses here are means over the batch: a trainer must divide them by its accumulation steps itself.
    accepts_loss_kwargs = False
    _supports_sdpa = True
    _supports_attention_backend = True
    _supports_flash_attn = False
    _supports_flex_attn = False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, FlorenceModel):
            init.constant_(module.logit_scale, self.config.logit_scale_init_value)
            for projection in (module.visual_projection, module.text_projection):
                if getattr(projection, "weight", None) is not None:
                    init.normal_(projection.weight, std=projection.in_features**-0.5)


class FlorenceModel(FlorencePreTrainedModel):
    """Florence: an image tower and a text tower that meet in one space.

    Example:
        >>> model = FlorenceModel(FlorenceConfig.from_size("nano"))
        >>> model(pixel_values=torch.zeros(2, 3, 64, 64)).image_embeds.shape
        torch.Size([2, 256])
    """

    def __init__(self, config: FlorenceConfig) -> None:
        config.validate_architecture()  # fields that were set after the configuration was built
        super().__init__(config)
        self.vision_model = FlorenceVisionModel._from_config(config.vision_config)
        self.text_model = FlorenceTextModel._from_config(config.text_config)
        self.visual_projection = nn.Linear(config.vision_config.hidden_size, config.projection_dim, bias=False)
        self.text_projection = nn.Linear(config.text_config.hidden_size, config.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(float(config.logit_scale_init_value)))
        self.post_init()
        # A tower alone passes over the rest of a dual encoder's checkpoint; the whole has collected that and must not.
        self._keys_to_ignore_on_load_unexpected: set[str] = set()

    @classmethod
    def maybe_distribute_model(cls, model: nn.Module, distributed_config: Any, mesh_manager: Any) -> nn.Module:
        """As every model's, but for the temperature: FSDP2 shards no scalar, so each rank has it whole."""
        scalar = model._parameters.pop("logit_scale")
        try:
            return super().maybe_distribute_model(model, distributed_config, mesh_manager)
        finally:
            model._parameters["logit_scale"] = scalar

    def get_input_embeddings(self) -> nn.Module:
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.text_model.set_input_embeddings(value)

    @can_return_tuple
    def get_image_features(
        self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithPooling:
        """The image tower's output with `pooler_output` projected: (batch, projection_dim), not normalised.

        pixel_values: (batch, channels, height, width), floating.
        """
        outputs = self.vision_model(pixel_values, return_dict=True, **kwargs)
        outputs.pooler_output = self.visual_projection(outputs.pooler_output)
        return outputs

    @can_return_tuple
    def get_text_features(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """The text tower's output with `pooler_output` projected: (batch, projection_dim), not normalised.

        input_ids, attention_mask, position_ids: (batch, tokens), integers.
        """
        outputs = self.text_model(
            input_ids, attention_mask=attention_mask, position_ids=position_ids, return_dict=True, **kwargs
        )
        outputs.pooler_output = self.text_projection(outputs.pooler_output)
        return outputs

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        return_loss: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> FlorenceOutput:
        """
        Args:
            input_ids: (texts, tokens), integers.
            pixel_values: (images, channels, height, width), floating.
            attention_mask, position_ids: (texts, tokens), integers.
            labels: (batch,), integers: pair i's meaning. Images and texts with equal labels are positives (UniCL).
            return_loss: without `labels`, whether to return the loss in which every pair is its own meaning (CLIP).

        Returns:
            A `FlorenceOutput`.

        Raises:
            ValueError: neither modality given, input that a tower refuses, or a loss without as many texts as images.
        """
        if input_ids is None and pixel_values is None:
            raise ValueError("expected pixel_values, input_ids or both, got neither")
        vision = None if pixel_values is None else self.get_image_features(pixel_values, return_dict=True, **kwargs)
        text = None
        if input_ids is not None:
            text = self.get_text_features(input_ids, attention_mask, position_ids, return_dict=True, **kwargs)
        image_embeds = None if vision is None else F.normalize(vision.pooler_output, dim=-1)
        text_embeds = None if text is None else F.normalize(text.pooler_output, dim=-1)
        scale_dtype = torch.promote_types(
            self.logit_scale.dtype, torch.float32
        )  # bfloat16 would round it by up to 0.4 %
        logit_scale = self.logit_scale.to(scale_dtype)
        if self.config.max_logit_scale is not None:
            logit_scale = logit_scale.clamp(max=math.log(self.config.max_logit_scale))
        logit_scale = logit_scale.exp()
        logits_per_image = loss = None
        if image_embeds is not None and text_embeds is not None:
            # Half precision would round a logit of 100 by up to 0.25, and so would a trainer's autocast.
            dtype = torch.promote_types(image_embeds.dtype, torch.float32)
            with maybe_autocast(image_embeds.device.type, enabled=False):
                logits_per_image = logit_scale * (image_embeds.to(dtype) @ text_embeds.to(dtype).T)  # (images, texts)
        if labels is not None or return_loss:
            if image_embeds is None or text_embeds is None:
                raise ValueError("the contrastive loss expected pixel_values and input_ids, got one of them")
            if labels is None:
                labels = torch.arange(image_embeds.shape[0], device=image_embeds.device)
            loss = unicl_loss(image_embeds, text_embeds, labels, logit_scale, self.config.loss_reduction)
        return FlorenceOutput(
            loss=loss,
            logits_per_image=logits_per_image,
            logits_per_text=None if logits_per_image is None else logits_per_image.T,
            image_embeds=image_embeds,
            text_embeds=text_embeds,
            logit_scale=logit_scale,
            text_model_output=text,
            vision_model_output=vision,
        )


def check_class_labels(labels: torch.Tensor, num_images: int, num_labels: int) -> None:
    """Refuse labels that do not fit: the door of the classification loss.

    Raises:
        ValueError: wrong type or shape, or class numbers out of range (looked at on the CPU only).
    """
    expected = f"labels of shape ({num_images},) or ({num_images}, {num_labels})"
    if not isinstance(labels, torch.Tensor):
        raise ValueError(f"expected {expected}, got {type(labels).__name__}")
    if tuple(labels.shape) not in ((num_images,), (num_images, num_labels)):
        raise ValueError(f"expected {expected}, got shape {tuple(labels.shape)}")
    if labels.is_floating_point() or labels.ndim == 2 or torch.compiler.is_compiling() or labels.device.type != "cpu":
        return
    named = labels[labels != IGNORED_LABEL]
    if num_labels > 1 and named.numel() and not 0 <= int(named.min()) <= int(named.max()) < num_labels:
        bad = int(named.min()) if int(named.min()) < 0 else int(named.max())
        raise ValueError(f"expected class numbers from 0 to {num_labels - 1} (or {IGNORED_LABEL}: none), got {bad}")


class FlorenceForImageClassification(FlorenceVisionPreTrainedModel):
    """The image tower with a linear classifier on its pooled output.

    Loads from its own checkpoints, from an image tower's, and from a dual encoder's (the classifier is then new).
    """

    accepts_loss_kwargs = False
    _keys_to_ignore_on_load_unexpected = [r"^text_model\.", r"^(visual|text)_projection\.", r"^logit_scale$"]

    def __init__(self, config: FlorenceVisionConfig | FlorenceConfig) -> None:
        if isinstance(config, FlorenceConfig):
            config = _vision_config_for_classification(config)
        super().__init__(config)
        self.vision_model = FlorenceVisionModel._from_config(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ImageClassifierOutput:
        """
        Args:
            pixel_values: (batch, channels, height, width), floating, normalised.
            labels: (batch,) class numbers, or (batch, num_labels) floats, as `config.problem_type` says.

        Returns:
            loss if labels were given, logits (batch, num_labels), and what the tower recorded.

        Raises:
            ValueError: pixels that the tower refuses, or labels that `check_class_labels` refuses.
        """
        outputs = self.vision_model(pixel_values, return_dict=True, **kwargs)
        logits = self.classifier(outputs.pooler_output)
        loss = None
        if labels is not None:
            check_class_labels(labels, logits.shape[0], logits.shape[1])
            # The softmax of half-precision logits would be as coarse as they are.
            precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
            loss = self.loss_function(labels, precise, self.config)
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


def _vision_config_for_classification(config: FlorenceConfig) -> FlorenceVisionConfig:
    """The image tower's configuration with what was set on the dual encoder's: labels, dtype, outputs and so on."""
    vision = config.vision_config
    fields = {
        "id2label": config.id2label,
        "label2id": config.label2id,
        "problem_type": config.problem_type,
        "dtype": config.dtype,
        "attn_implementation": vision._attn_implementation,
    }
    for name in ("gradient_checkpointing", "output_attentions", "output_hidden_states"):
        if getattr(config, name, False):
            fields[name] = True
    return FlorenceVisionConfig(**{**vision.to_dict(), **fields})


__all__ = ["FlorenceForImageClassification", "FlorenceModel", "FlorenceOutput", "FlorencePreTrainedModel"]
