# Copyright 2026 The transformers_florence authors. Licensed under the Apache License, Version 2.0.
"""What Florence does with language (sections 2.5 and 3.7): answers, matches of text and picture, their pretraining."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs
from transformers.utils.generic import can_return_tuple

from .configuration_florence_fusion import FlorenceFusionConfig
from .fusion import CaptionDecoder, LanguageHead
from .losses_fusion import (
    IGNORED_TOKEN,
    answer_loss,
    check_labels,
    check_range,
    draw_false_partners,
    false_pairs,
    matching_loss,
    token_loss,
)
from .modeling_florence_fusion import FlorenceFusionModel, FlorenceFusionPreTrainedModel

CLASSIFIER_NORM_EPS = 1e-5  # METER's answer classifier has torch's, its other norms BERT's
MATCH = 1  # the second of the two matching logits
# For `training.parameter_groups`: the paper lets neither the text embeddings nor the modalities' own decay.
NO_DECAY = ("text_model.embeddings.", "token_type_embeddings.")
FUSION_PARTS = ("fusion.", "text_transform.", "image_transform.", "text_pooler.", "image_pooler.")
HEADS = ("classifier.", "itm_head.", "mlm_head.", "decoder.", "lm_head.")


def fusion_learning_rates(
    learning_rate: float, *, fusion_factor: float = 5.0, head_factor: float = 50.0
) -> dict[str, float]:
    """METER's rates by parts of parameter names, for `training.parameter_groups(learning_rates=...)`.

    Towers and token-type embeddings take `learning_rate`, the fusion five times it, and a head 50 times it (in
    METER for questions; 5 in pretraining and for retrieval, 10 elsewhere).
    """
    rates = dict.fromkeys(FUSION_PARTS, learning_rate * fusion_factor)
    return rates | dict.fromkeys(HEADS, learning_rate * head_factor)


@dataclass
class FlorenceFusionHeadOutput(ModelOutput):
    """What the heads on the pooled pair return.

    Args:
        loss: scalar, if `labels` were given.
        logits: (batch, num_labels) of the answers, or (batch, 2) of "no match" and "match".
        hidden_states, attentions, cross_attentions: as `FlorenceFusionOutput`.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    cross_attentions: tuple[torch.Tensor, ...] | None = None


@dataclass
class FlorenceForPreTrainingOutput(ModelOutput):
    """What `FlorenceForPreTraining` returns.

    Args:
        loss: scalar, if `labels` were given: the sum of the others.
        itm_loss, mlm_loss: scalars.
        caption_loss: scalar, if there is a decoder.
        itm_logits: (batch, 2) of the pairs given; with a loss (3 * batch, 2), behind them the false ones.
        itm_labels: (3 * batch,) with a loss: 1 for the pairs given, 0 for false ones, `IGNORED_TOKEN` where none was
            to be had.
        mlm_logits: (batch, tokens, vocabulary).
        hidden_states, attentions, cross_attentions: as `FlorenceFusionOutput`, without a loss.
    """

    loss: torch.Tensor | None = None
    itm_loss: torch.Tensor | None = None
    mlm_loss: torch.Tensor | None = None
    caption_loss: torch.Tensor | None = None
    itm_logits: torch.Tensor | None = None
    itm_labels: torch.Tensor | None = None
    mlm_logits: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    cross_attentions: tuple[torch.Tensor, ...] | None = None


class FlorenceForQuestionAnswering(FlorenceFusionPreTrainedModel):
    """Questions about pictures, answered out of a vocabulary, `config.id2label` (section 3.7).

    Example:
        >>> config = FlorenceFusionConfig(num_hidden_layers=1, id2label={0: "no", 1: "yes"})
        >>> pixels, ids = torch.zeros(2, 3, 64, 64), torch.tensor([[0, 9, 2], [0, 8, 2]])
        >>> FlorenceForQuestionAnswering(config)(input_ids=ids, pixel_values=pixels).logits.shape
        torch.Size([2, 2])
    """

    _keys_to_ignore_on_load_unexpected = [r"^(itm|mlm|lm)_head\.", r"^decoder\.", r"^image_transform\."]

    def __init__(self, config: FlorenceFusionConfig) -> None:
        super().__init__(config)
        dim = 2 * config.hidden_size
        self.model = FlorenceFusionModel(config)
        self.classifier = nn.Sequential(
            nn.Linear(dim, dim),
            nn.LayerNorm(dim, eps=CLASSIFIER_NORM_EPS),
            nn.GELU(),
            nn.Linear(dim, config.num_labels),
        )
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        image_embeds: torch.Tensor | None = None,
        image_rows: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> FlorenceFusionHeadOutput:
        """
        Args:
            labels: (batch, num_labels), floating, from 0 to 1: how right each answer is.
            others: see `FlorenceFusionModel`.

        Returns:
            logits (batch, num_labels), whose sigmoid is an answer's score; the loss if labels were given; what was
            recorded.

        Raises:
            ValueError: input that `FlorenceFusionModel` refuses, or labels of another shape or out of range.
        """
        inputs = (input_ids, pixel_values, attention_mask, token_type_ids, image_embeds, image_rows)
        outputs = self.model(*inputs, return_dict=True, **kwargs)
        logits = self.classifier(outputs.pooler_output)
        loss = None
        if labels is not None:
            check_labels(labels, tuple(logits.shape), floating=True, meaning="scores of the answers")
            check_range(labels, 0, 1, "scores of the answers")
            loss = answer_loss(logits, labels)
        return FlorenceFusionHeadOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            cross_attentions=outputs.cross_attentions,
        )


class FlorenceForImageTextRetrieval(FlorenceFusionPreTrainedModel):
    """Whether a text goes with a picture: re-ranks what a dual encoder finds."""

    _keys_to_ignore_on_load_unexpected = [r"^(mlm|lm)_head\.", r"^(classifier|decoder|image_transform)\."]

    def __init__(self, config: FlorenceFusionConfig) -> None:
        super().__init__(config)
        self.model = FlorenceFusionModel(config)
        self.itm_head = nn.Linear(2 * config.hidden_size, 2)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        image_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> FlorenceFusionHeadOutput:
        """
        Args:
            labels: (batch,), integers: 1 for a match, 0 for none.
            others: see `FlorenceFusionModel`.

        Returns:
            logits (batch, 2) of "no match" and "match"; the loss if labels were given; what was recorded.

        Raises:
            ValueError: input that `FlorenceFusionModel` refuses, or labels of another shape or out of range.
        """
        outputs = self.model(
            input_ids, pixel_values, attention_mask, token_type_ids, image_embeds, return_dict=True, **kwargs
        )
        logits = self.itm_head(outputs.pooler_output)
        loss = None
        if labels is not None:
            check_labels(labels, (len(logits),), floating=False, meaning="labels")
            check_range(labels, 0, 1, "labels")
            loss = matching_loss(logits, labels)
        return FlorenceFusionHeadOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            cross_attentions=outputs.cross_attentions,
        )

    @torch.no_grad()
    def score_pairs(
        self,
        image_embeds: torch.Tensor,
        text_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        image_rows: torch.Tensor,
        text_rows: torch.Tensor,
        batch_size: int = 64,
    ) -> torch.Tensor:
        """How well pictures and texts go together, of which the towers' states are at hand.

        Args:
            image_embeds: (pictures, image_tokens, channels) of `encode_images`.
            text_embeds: (texts, tokens, channels) of `model.encode_texts`; attention_mask: (texts, tokens).
            image_rows, text_rows: (pairs,), integers.
            batch_size: pairs at a time.

        Returns:
            (pairs,), float32: log odds of a match.
        """
        scores = []
        for pictures, texts in zip(image_rows.split(batch_size), text_rows.split(batch_size), strict=True):
            mask = None if attention_mask is None else attention_mask[texts]
            pooled = self.model.fuse(text_embeds[texts], image_embeds[pictures], mask).pooler_output
            logits = self.itm_head(pooled).float()
            scores.append(logits[:, MATCH] - logits[:, 1 - MATCH])
        return torch.cat(scores)

    @torch.no_grad()
    def score_shortlists(
        self,
        image_embeds: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        shortlists: torch.Tensor,
        batch_size: int = 64,
    ) -> torch.Tensor:
        """How well each picture goes with the texts on its shortlist, as a dual encoder finds them.

        Every text and every picture goes through its tower once; the pairs go through the fusion.

        Args:
            image_embeds: (pictures, image_tokens, channels) of `encode_images`.
            input_ids, attention_mask: (texts, tokens).
            shortlists: (pictures, k), integers: rows of `input_ids`.
            batch_size: pairs at a time.

        Returns:
            (pictures, k), float32: log odds of a match.

        Raises:
            ValueError: input that the model refuses, or shortlists of another shape or with numbers of no text.
        """
        image = self.encode_images(image_embeds=image_embeds)
        text = self.model.encode_texts(input_ids, attention_mask)
        if not isinstance(shortlists, torch.Tensor) or shortlists.ndim != 2 or len(shortlists) != len(image):
            got = tuple(shortlists.shape) if isinstance(shortlists, torch.Tensor) else type(shortlists).__name__
            raise ValueError(f"expected shortlists of shape ({len(image)}, k), got {got}")
        check_range(shortlists, 0, len(text) - 1, "numbers of texts")
        rows = torch.arange(len(image), device=image.device).repeat_interleave(shortlists.shape[1])
        return self.score_pairs(image, text, attention_mask, rows, shortlists.flatten(), batch_size).view(
            shortlists.shape
        )


class FlorenceForPreTraining(FlorenceFusionPreTrainedModel):
    """Image-text matching and masked language modelling at once: METER's pretraining, with false pairs of the batch.

    Each text gets a false picture and each picture a false text (ALBEF), drawn by `draw_false_partners`. With
    `config.num_decoder_layers`, a decoder learns to write the texts as well, for `FlorenceForImageCaptioning`.
    """

    _keys_to_ignore_on_load_unexpected = [r"^classifier\."]

    def __init__(self, config: FlorenceFusionConfig) -> None:
        super().__init__(config)
        self.model = FlorenceFusionModel(config)
        self.itm_head = nn.Linear(2 * config.hidden_size, 2)
        vocab_size = config.text_config.vocab_size
        self.mlm_head = LanguageHead(config, vocab_size=vocab_size)
        if config.num_decoder_layers:
            self.image_transform = nn.Linear(config.vision_config.hidden_size, config.hidden_size)
            self.decoder = CaptionDecoder(
                config,
                vocab_size=vocab_size,
                max_tokens=config.max_text_tokens,
                num_layers=config.num_decoder_layers,
            )
            self.lm_head = LanguageHead(config, vocab_size=vocab_size)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.mlm_head.vocabulary

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.mlm_head.vocabulary = value

    def write(
        self, input_ids: torch.Tensor, image: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The captioning loss of whole texts, (batch, tokens), about pictures, (batch, image_tokens, channels)."""
        kept = torch.ones_like(input_ids) if attention_mask is None else (attention_mask != 0).long()
        positions = (kept.cumsum(dim=1) - 1).clamp(min=0)
        states = self.decoder(input_ids, positions, self.image_transform(image), attention_mask)
        return token_loss(self.lm_head(states[:, :-1]), input_ids.masked_fill(kept == 0, IGNORED_TOKEN)[:, 1:])

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        image_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        pair_labels: torch.Tensor | None = None,
        similarities: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> FlorenceForPreTrainingOutput:
        """
        Args:
            input_ids: (batch, tokens), integers; with `labels`, texts of which some tokens are masked.
            labels: (batch, tokens), integers: what the masked tokens were, `IGNORED_TOKEN` elsewhere, as
                transformers' collator makes them. Matching reads the texts with these put back.
            pair_labels: (batch,), integers: pairs with equal numbers mean the same (UniCL) or show the same picture,
                and never make a false pair. Neither do equal texts, with or without this.
            similarities: (batch, batch) of pictures and texts, a dual encoder's `logits_per_image`: the more alike,
                the likelier a false pair. Without it the draw is even.
            others: see `FlorenceFusionModel`.

        Returns:
            A `FlorenceForPreTrainingOutput`. Where no false pair is to be had, the true ones make the matching loss.

        Raises:
            ValueError: input that `FlorenceFusionModel` refuses; labels, pair labels or similarities of another
                shape, or labels outside the vocabulary.
        """
        inputs = (input_ids, pixel_values, attention_mask, token_type_ids, image_embeds)
        if labels is None:
            outputs = self.model(*inputs, return_dict=True, **kwargs)
            return FlorenceForPreTrainingOutput(
                itm_logits=self.itm_head(outputs.pooler_output),
                mlm_logits=self.mlm_head(outputs.text_features),
                hidden_states=outputs.hidden_states,
                attentions=outputs.attentions,
                cross_attentions=outputs.cross_attentions,
            )
        image = self.encode_images(pixel_values, image_embeds)
        masked_text = self.model.encode_texts(input_ids, attention_mask, token_type_ids)
        assert input_ids is not None  # the text encoder has refused it
        batch = len(input_ids)
        if len(image) != batch:
            raise ValueError(f"expected as many pictures as texts, got {len(image)} and {batch}")
        check_labels(labels, tuple(input_ids.shape), floating=False, meaning="labels")
        if pair_labels is not None:
            check_labels(pair_labels, (batch,), floating=False, meaning="pair_labels")
        if similarities is not None:
            check_labels(similarities, (batch, batch), floating=True, meaning="similarities")
        check_range(labels[labels != IGNORED_TOKEN], 0, self.config.text_config.vocab_size - 1, "labels")

        mlm_logits = self.mlm_head(self.model.fuse(masked_text, image, attention_mask).text_features)
        mlm_loss = token_loss(mlm_logits, labels)

        whole_ids = torch.where(labels == IGNORED_TOKEN, input_ids, labels.to(input_ids.dtype))
        text = self.model.encode_texts(whole_ids, attention_mask, token_type_ids)
        allowed = false_pairs(whole_ids, attention_mask, pair_labels)
        false_texts, found = draw_false_partners(allowed, similarities)
        false_images, _ = draw_false_partners(allowed, None if similarities is None else similarities.T)
        order = torch.arange(batch, device=text.device)
        texts = torch.cat((order, false_texts, order))
        images = torch.cat((order, order, false_images))
        mask = None if attention_mask is None else attention_mask[texts]
        itm_logits = self.itm_head(self.model.fuse(text[texts], image[images], mask).pooler_output)
        itm_labels = torch.cat((torch.ones_like(order), torch.zeros_like(texts[batch:])))
        counted = torch.cat((torch.ones_like(found), found, found))
        itm_loss = matching_loss(itm_logits, itm_labels, counted)
        caption_loss = self.write(whole_ids, image, attention_mask) if self.config.num_decoder_layers else None
        return FlorenceForPreTrainingOutput(
            loss=itm_loss + mlm_loss + (0 if caption_loss is None else caption_loss),
            itm_loss=itm_loss,
            mlm_loss=mlm_loss,
            caption_loss=caption_loss,
            itm_logits=itm_logits,
            itm_labels=torch.where(counted, itm_labels, IGNORED_TOKEN),
            mlm_logits=mlm_logits,
        )


__all__ = [
    "NO_DECAY",
    "FlorenceForImageTextRetrieval",
    "FlorenceForPreTraining",
    "FlorenceForPreTrainingOutput",
    "FlorenceForQuestionAnswering",
    "FlorenceFusionHeadOutput",
    "fusion_learning_rates",
]
