# Copyright 2026 The transformers_florence authors. Licensed under the Apache License, Version 2.0.
"""Florence with language (section 2.5): METER's fusion on CoSwin and a text encoder, without a head."""

import os
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import BertModel, PreTrainedConfig, PreTrainedModel, RobertaModel, XLMRobertaModel
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_florence import FlorenceConfig, FlorenceTextConfig
from .configuration_florence_fusion import TEXT_CONFIGS, FlorenceCaptioningConfig, FlorenceFusionConfig
from .fusion import CoAttentionLayer, FusionEncoder, MergedAttentionLayer, MergedFusionEncoder
from .integrity import ManifestMixin
from .losses_fusion import check_labels, check_range
from .modeling_florence_text import FlorenceTextModel, check_input_ids
from .modeling_florence_vision import FlorenceVisionModel

TEXT_MODELS: dict[str, type[PreTrainedModel]] = {
    model.config_class.model_type: model for model in (RobertaModel, XLMRobertaModel, BertModel, FlorenceTextModel)
}


@dataclass
class FlorenceFusionOutput(ModelOutput):
    """What `FlorenceFusionModel` returns.

    Args:
        text_features: (batch, tokens, hidden_size), after the last layer.
        image_features: (batch, image_tokens, hidden_size), after the last layer.
        pooler_output: (batch, 2 * hidden_size): the first token's state and the mean of the image tokens, each through
            its pooler.
        hidden_states: of the text's stack, from its input on, if asked for.
        attentions: of the text to itself, (batch, heads, tokens, tokens) for each layer, if asked for and eager.
        cross_attentions: of the text to the picture, (batch, heads, tokens, image_tokens) for each layer.
            Merged attention has one stack over the texts' tokens and then the pictures': `hidden_states` and
            `attentions` are those, and there are no `cross_attentions`.
    """

    text_features: torch.Tensor | None = None
    image_features: torch.Tensor | None = None
    pooler_output: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    cross_attentions: tuple[torch.Tensor, ...] | None = None


def check_image_embeds(image_embeds: Any, hidden_size: int) -> torch.Tensor:
    """The image tokens if they are an image tower's `last_hidden_state` of this width.

    Raises:
        ValueError: they are not.
    """
    expected = f"floating image_embeds of shape (batch, image_tokens, {hidden_size})"
    if not isinstance(image_embeds, torch.Tensor):
        raise ValueError(f"expected {expected}, got {type(image_embeds).__name__}")
    shape = tuple(image_embeds.shape)
    if image_embeds.ndim != 3 or shape[2] != hidden_size or 0 in shape or not image_embeds.is_floating_point():
        raise ValueError(f"expected {expected}, got {image_embeds.dtype} of shape {shape}")
    return image_embeds


def load_tower(model_class: type[PreTrainedModel], folder: str | os.PathLike, **kwargs: Any) -> PreTrainedModel:
    """A tower out of a checkpoint that holds one, in float32, whole.

    Raises:
        ValueError: weights of the tower are missing.
    """
    tower, info = model_class.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **kwargs)
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"]))
        raise ValueError(f"expected the weights of a {model_class.__name__} in {folder}, missing are: {missing}")
    return tower


def load_text_encoder(text: str | os.PathLike | PreTrainedConfig) -> PreTrainedModel:
    """The text encoder of a folder or of the Hub, whose `config.json` names one of `TEXT_CONFIGS`; or a new one.

    Raises:
        ValueError: another kind of model, or weights are missing.
    """
    if isinstance(text, PreTrainedConfig):
        kind = text.model_type
    else:
        kind = PreTrainedConfig.get_config_dict(text)[0].get("model_type")
        kind = "florence_text_model" if kind == FlorenceConfig.model_type else kind
    if kind not in TEXT_MODELS:
        raise ValueError(f"expected a text encoder of one of the kinds {', '.join(TEXT_CONFIGS)}, got {kind!r}")
    options = {} if TEXT_MODELS[kind] is FlorenceTextModel else {"add_pooling_layer": False}
    if isinstance(text, PreTrainedConfig):
        return TEXT_MODELS[kind](text, **options)
    return load_tower(TEXT_MODELS[kind], text, **options)


class SharedVisionPreTrainedModel(ManifestMixin, PreTrainedModel):
    """For models on a `vision_model` that was pretrained elsewhere: it is trained with the rest, or left as it is."""

    config: FlorenceFusionConfig | FlorenceCaptioningConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    # The losses are means over the batch: a trainer must divide them by its accumulation steps itself.
    accepts_loss_kwargs = False
    _supports_sdpa = True
    _supports_attention_backend = True
    _supports_flash_attn = False  # the image tower adds a learnt bias to every attention
    _supports_flex_attn = False
    _no_split_modules = ["CoAttentionLayer", "MergedAttentionLayer"]

    def encode_images(
        self, pixel_values: torch.Tensor | None = None, image_embeds: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The image tower's tokens, (batch, image_tokens, channels): computed of pixels, or those given.

        Raises:
            ValueError: both or neither given, or what the tower refuses.
        """
        if (pixel_values is None) == (image_embeds is None):
            raise ValueError(
                "expected either pixel_values or image_embeds, got " + ("neither" if pixel_values is None else "both")
            )
        if image_embeds is not None:
            return check_image_embeds(image_embeds, self.config.vision_config.hidden_size).to(self.dtype)
        return self.image_tower(pixel_values, return_dict=True).last_hidden_state

    @property
    def image_tower(self) -> FlorenceVisionModel:
        """The image tower, wherever this model keeps it."""
        return cast("FlorenceVisionModel", getattr(self.base_model, "vision_model", self.base_model))

    def freeze_vision(self) -> None:
        """Leave the image tower as it is, in evaluation mode, and train the rest."""
        self.image_tower.requires_grad_(False)
        self.train(self.training)

    def unfreeze_vision(self) -> None:
        """Take `freeze_vision` back."""
        self.image_tower.requires_grad_(True)
        self.train(self.training)

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        tower = self.image_tower
        if not any(parameter.requires_grad for parameter in tower.parameters()):
            tower.eval()
        return self


class FlorenceFusionPreTrainedModel(SharedVisionPreTrainedModel):
    """Loading, saving and initialisation of everything that stands on the fusion."""

    config: FlorenceFusionConfig
    _can_record_outputs = {
        "hidden_states": [
            OutputRecorder(CoAttentionLayer, index=0, layer_name="text_layers"),
            OutputRecorder(MergedAttentionLayer, index=0),
        ],
        "attentions": [
            OutputRecorder(CoAttentionLayer, index=1, layer_name="text_layers"),
            OutputRecorder(MergedAttentionLayer, index=1),
        ],
        "cross_attentions": OutputRecorder(CoAttentionLayer, index=2, layer_name="text_layers"),
    }

    @classmethod
    def from_pretrained_towers(
        cls,
        folder: str | os.PathLike,
        *,
        text: str | os.PathLike | PreTrainedConfig | None = None,
        freeze_vision: bool = False,
        **fields: Any,
    ) -> Any:
        """A model to be trained, on the image tower of a Florence checkpoint and a text encoder.

        Args:
            folder: where a dual encoder, an image tower or a classifier was saved, or its name on the Hub.
            text: the same of a RoBERTa, XLM-RoBERTa, BERT or Florence; its configuration for a new one; None for the
                text tower of `folder`.
            freeze_vision: see the method of that name.
            fields: of the `FlorenceFusionConfig`, such as `id2label` and `num_hidden_layers`.

        Returns:
            The model in float32, in evaluation mode. New are the fusion and the head.

        Raises:
            ValueError: a checkpoint lacks weights of its tower or holds none; a field has an impossible value.

        Example:
            >>> answers = {0: "no", 1: "yes"}
            >>> model = FlorenceForQuestionAnswering.from_pretrained_towers(bundled_checkpoint(), id2label=answers)
        """
        vision_model = load_tower(FlorenceVisionModel, folder)
        text_model = load_text_encoder(folder if text is None else text)
        config = FlorenceFusionConfig(
            vision_config=vision_model.config.to_dict(), text_config=text_model.config.to_dict(), **fields
        )
        model = cls(config)
        model.image_tower.load_state_dict(vision_model.state_dict())
        model.base_model.text_model.load_state_dict(text_model.state_dict())
        if freeze_vision:
            model.freeze_vision()
        return model.eval()

    def get_input_embeddings(self) -> nn.Module:
        return self.base_model.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.base_model.text_model.set_input_embeddings(value)


class FlorenceFusionModel(FlorenceFusionPreTrainedModel):
    """Image tower, text encoder and co-attention without a head.

    Texts may be as many as pictures, or one of either for all of the other, or `image_rows` says which picture each is
    about. Image tokens can be computed once, with `encode_images`, and passed as `image_embeds` with every question.
    """

    def __init__(self, config: FlorenceFusionConfig) -> None:
        config.validate_architecture()  # fields that were set after the configuration was built
        super().__init__(config)
        dim, text_config = config.hidden_size, config.text_config
        text_class = TEXT_MODELS[text_config.model_type]
        options = {} if text_class is FlorenceTextModel else {"add_pooling_layer": False}
        self.vision_model = FlorenceVisionModel._from_config(config.vision_config)
        self.text_model = text_class._from_config(text_config, **options)
        self.text_transform = nn.Linear(text_config.hidden_size, dim)
        self.image_transform = nn.Linear(config.vision_config.hidden_size, dim)
        self.token_type_embeddings = nn.Embedding(2, dim)  # of texts, of pictures
        merged = config.fusion_type == "merged_attention"
        self.fusion = MergedFusionEncoder(config) if merged else FusionEncoder(config)
        self.text_pooler = nn.Linear(dim, dim)
        self.image_pooler = nn.Linear(dim, dim)
        self.post_init()
        # A tower alone passes over the rest of a dual encoder's checkpoint; the whole has collected that and must not.
        self._keys_to_ignore_on_load_unexpected: set[str] = set()

    def encode_texts(
        self,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The text encoder's states, (batch, tokens, channels).

        Raises:
            ValueError: ids that `check_input_ids` refuses, too many of them, or a mask of another shape.
        """
        input_ids = check_input_ids(input_ids, cast("FlorenceTextConfig", self.config.text_config))
        shape = tuple(input_ids.shape)
        if shape[1] > self.config.max_text_tokens:
            raise ValueError(f"expected texts of at most {self.config.max_text_tokens} tokens, got {shape[1]}")
        inputs = {"attention_mask": attention_mask, "token_type_ids": token_type_ids}
        for name, value in inputs.items():
            if value is not None and tuple(value.shape) != shape:
                raise ValueError(f"expected {name} of shape {shape}, as input_ids, got {tuple(value.shape)}")
        if isinstance(self.text_model, FlorenceTextModel):
            del inputs["token_type_ids"]
        return self.text_model(input_ids, return_dict=True, **inputs).last_hidden_state

    def fuse(
        self, text: torch.Tensor, image: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> FlorenceFusionOutput:
        """Both towers' states, and the text's mask, through the fusion and the poolers.

        Raises:
            ValueError: neither as many texts as pictures nor one of either.
        """
        if 1 not in (text.shape[0], image.shape[0]) and text.shape[0] != image.shape[0]:
            raise ValueError(
                f"expected as many texts as pictures, or one of either, got {text.shape[0]} and {image.shape[0]}"
            )
        # Called, not read: accelerate's hooks bring weights that lie on disk for calls alone.
        types = self.token_type_embeddings(torch.arange(2, device=text.device))
        text = self.text_transform(text) + types[0]
        image = self.image_transform(image) + types[1]
        if text.shape[0] != image.shape[0]:
            batch = max(text.shape[0], image.shape[0])
            text, image = text.expand(batch, -1, -1), image.expand(batch, -1, -1)
            attention_mask = None if attention_mask is None else attention_mask.expand(batch, -1)
        text, image = self.fusion(text, image, attention_mask)
        pooled = (self.text_pooler(text[:, 0]), self.image_pooler(image.mean(dim=1)))
        return FlorenceFusionOutput(
            text_features=text, image_features=image, pooler_output=torch.cat(pooled, dim=-1).tanh()
        )

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        image_embeds: torch.Tensor | None = None,
        image_rows: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> FlorenceFusionOutput:
        """
        Args:
            input_ids: (texts, tokens), integers.
            pixel_values: (pictures, channels, height, width), floating, normalised.
            attention_mask: (texts, tokens), 1 for tokens and 0 for padding; without it every token counts.
            token_type_ids: (texts, tokens), for text encoders that know several kinds of tokens.
            image_embeds: (pictures, image_tokens, channels) of `encode_images`, in place of `pixel_values`.
            image_rows: (texts,), integers: which picture each text is about, if not one by one. Each picture goes
                through its tower once, however many texts there are about it.

        Returns:
            A `FlorenceFusionOutput`.

        Raises:
            ValueError: see `encode_images`, `encode_texts` and `fuse`; or image rows of another shape or out of range.
        """
        image = self.encode_images(pixel_values, image_embeds)
        text = self.encode_texts(input_ids, attention_mask, token_type_ids)
        if image_rows is not None:
            check_labels(image_rows, (len(text),), floating=False, meaning="image_rows")
            check_range(image_rows, 0, len(image) - 1, "image_rows")
            image = image[image_rows]
        return self.fuse(text, image, attention_mask)


__all__ = [
    "FlorenceFusionModel",
    "FlorenceFusionOutput",
    "FlorenceFusionPreTrainedModel",
    "SharedVisionPreTrainedModel",
    "check_image_embeds",
    "load_tower",
]
