# Copyright 2026 The transformers_florence authors. Licensed under the Apache License, Version 2.0.
"""Pictures described, and questions answered in free words: a causal decoder of co-attention layers over CoSwin."""

import copy
import os
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import GenerationMixin
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.generation import StoppingCriteria, StoppingCriteriaList
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_florence import FlorenceTextConfig
from .configuration_florence_fusion import FlorenceCaptioningConfig, FlorenceFusionConfig
from .fusion import CaptionDecoder, CoAttentionLayer, LanguageHead
from .losses_fusion import IGNORED_TOKEN, token_loss
from .modeling_florence_fusion import SharedVisionPreTrainedModel, load_tower
from .modeling_florence_text import check_input_ids
from .modeling_florence_vision import FlorenceVisionModel

# What a decoder has in common with the fusion that it was pretrained with.
DECODER_FIELDS = """hidden_size num_attention_heads mlp_ratio hidden_act hidden_dropout attention_dropout
    layer_norm_eps initializer_range"""


@dataclass
class FlorenceCaptioningOutput(ModelOutput):
    """What `FlorenceForImageCaptioning` returns.

    Args:
        loss: scalar, if `labels` were given.
        logits: (batch, tokens, vocab_size), of the token behind each.
        past_key_values: keys and values of the tokens so far and of the picture, if `use_cache`.
        hidden_states, attentions, cross_attentions: of the decoder, if asked for (weights: eager only).
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    cross_attentions: tuple[torch.Tensor, ...] | None = None


class ContextEnd(StoppingCriteria):
    """Generation ends where the decoder has no more positions, whatever length was asked for."""

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return torch.full(input_ids.shape[:1], input_ids.shape[1] >= self.max_length, device=input_ids.device)


def open_prompts(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, eos_token_id: int, pad_token_id: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Texts as tokenizers make them, so that they can be continued: no end token, and the padding in front.

    Args:
        input_ids, attention_mask: (batch, tokens), padded on either side.

    Returns:
        Both, (batch, tokens of the longest prompt).

    Raises:
        ValueError: a mask of another shape, or a text without a token before its end.
    """
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"expected attention_mask of shape {tuple(input_ids.shape)}, as input_ids, "
            f"got {tuple(attention_mask.shape)}"
        )
    kept = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask != 0
    kept = kept & ((kept & (input_ids == eos_token_id)).cumsum(dim=1) == 0)
    lengths = kept.sum(dim=1)
    if (lengths == 0).any():
        raise ValueError("expected prompts of at least one token before the end token, got an empty one")
    order = kept.int().argsort(dim=1, stable=True)[:, -int(lengths.max()) :]  # what is kept moves to the end
    kept = kept.gather(1, order)
    return input_ids.gather(1, order).masked_fill(~kept, pad_token_id), kept.long()


class FlorenceCaptioningPreTrainedModel(SharedVisionPreTrainedModel):
    """Loading, saving and initialisation of captioning models."""

    config: FlorenceCaptioningConfig
    base_model_prefix = "vision_model"
    _skip_keys_device_placement = ["past_key_values"]
    _can_record_outputs = {
        "hidden_states": OutputRecorder(CoAttentionLayer, index=0),
        "attentions": OutputRecorder(CoAttentionLayer, index=1),
        "cross_attentions": OutputRecorder(CoAttentionLayer, index=2),
    }


class FlorenceForImageCaptioning(FlorenceCaptioningPreTrainedModel, GenerationMixin):
    """Writes about a picture: captions from nothing or from a beginning, answers behind a question.

    Example:
        >>> model = FlorenceForImageCaptioning(FlorenceCaptioningConfig(num_hidden_layers=1))
        >>> model.generate(pixel_values=torch.zeros(2, 3, 64, 64), max_new_tokens=4, num_beams=3).shape[0]
        2
    """

    _tied_weights_keys = {"lm_head.vocabulary.weight": "decoder.word_embeddings.weight"}

    def __init__(self, config: FlorenceCaptioningConfig) -> None:
        config.validate_architecture()  # fields that were set after the configuration was built
        super().__init__(config)
        self.vision_model = FlorenceVisionModel._from_config(config.vision_config)
        self.image_transform = nn.Linear(config.vision_config.hidden_size, config.hidden_size)
        self.decoder = CaptionDecoder(
            config,
            vocab_size=config.vocab_size,
            max_tokens=config.max_position_embeddings,
            num_layers=config.num_hidden_layers,
        )
        self.lm_head = LanguageHead(config, vocab_size=config.vocab_size)
        self.post_init()
        # A tower alone passes over the rest of a dual encoder's checkpoint; the whole has collected that and must not.
        self._keys_to_ignore_on_load_unexpected: set[str] = set()

    @classmethod
    def from_pretrained_vision(
        cls, folder: str | os.PathLike, *, freeze_vision: bool = False, **fields: Any
    ) -> "FlorenceForImageCaptioning":
        """A model to be trained, on the image tower of a Florence checkpoint.

        Args:
            folder: where a dual encoder, an image tower or a classifier was saved, or its name on the Hub.
            freeze_vision: see the method of that name.
            fields: of the `FlorenceCaptioningConfig`, such as `vocab_size` and `num_hidden_layers`.

        Returns:
            The model in float32, in evaluation mode. All but the image tower is new.

        Raises:
            ValueError: the checkpoint lacks weights of the image tower; a field has an impossible value.
        """
        vision_model = load_tower(FlorenceVisionModel, folder)
        model = cls(FlorenceCaptioningConfig(vision_config=vision_model.config.to_dict(), **fields))
        model.vision_model.load_state_dict(vision_model.state_dict())
        if freeze_vision:
            model.freeze_vision()
        return model.eval()

    @classmethod
    def from_pretraining(
        cls, folder: str | os.PathLike, *, freeze_vision: bool = False, **fields: Any
    ) -> "FlorenceForImageCaptioning":
        """The image tower and the decoder that `FlorenceForPreTraining` has trained.

        Args:
            folder: where it was saved, or its name on the Hub.
            freeze_vision: see the method of that name.
            fields: of the `FlorenceCaptioningConfig`, such as the special tokens where the text encoder's
                configuration names none (BERT's).

        Returns:
            The model in float32, in evaluation mode.

        Raises:
            ValueError: pretrained without a decoder, or with special tokens that nobody names.
        """
        fusion = FlorenceFusionConfig.from_pretrained(folder)
        text = fusion.text_config
        if not fusion.num_decoder_layers:
            raise ValueError(f"expected a checkpoint with a decoder, got num_decoder_layers=0 in {folder}")
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        tokens = {name: fields.pop(name, getattr(text, name)) for name in names}
        if None in tokens.values():
            raise ValueError(f"expected the ids of the special tokens, got {tokens}")
        config = FlorenceCaptioningConfig(
            vision_config=fusion.vision_config.to_dict(),
            vocab_size=text.vocab_size,
            num_hidden_layers=fusion.num_decoder_layers,
            max_position_embeddings=fusion.max_text_tokens,
            tie_word_embeddings=False,
            **{name: getattr(fusion, name) for name in DECODER_FIELDS.split()},
            **tokens,
            **fields,
        )
        model = load_tower(cls, folder, config=config, key_mapping={r"^model\.vision_model\.": "vision_model."})
        if freeze_vision:
            model.freeze_vision()
        return model.eval()

    def get_input_embeddings(self) -> nn.Module:
        return self.decoder.word_embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.decoder.word_embeddings = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head.vocabulary

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.lm_head.vocabulary = value

    def _positions(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        past: int,
    ) -> torch.Tensor:
        """(batch, tokens), those given or counted from each text's first token on, padding aside."""
        tokens = input_ids.shape[1]
        if position_ids is None and attention_mask is not None and attention_mask.ndim == 2:
            position_ids = (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, -tokens:]
        elif position_ids is None:
            position_ids = torch.arange(past, past + tokens, device=input_ids.device)[None]
        if position_ids.device.type == "cpu" and not torch.compiler.is_compiling():
            limit, last = self.config.max_position_embeddings, int(position_ids.max())
            if last >= limit:
                raise ValueError(f"expected texts of at most {limit} tokens, got one with {last + 1}")
        return position_ids

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        image_embeds: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> FlorenceCaptioningOutput:
        """
        Args:
            input_ids: (batch, tokens), integers: the texts, or what follows on `past_key_values`.
            pixel_values: (batch or 1, channels, height, width), floating, normalised.
            attention_mask: (batch, earlier tokens and these), 1 for tokens and 0 for padding on either side.
            position_ids: (batch, tokens), if not counted from each text's first token on.
            image_embeds: (batch or 1, image_tokens, channels) of `encode_images`, in place of `pixel_values`.
            past_key_values: what an earlier call returned; the picture is in it.
            labels: (batch, tokens), integers: `input_ids` again, `IGNORED_TOKEN` for padding and for what is given
                (a question). Each is predicted from the tokens before it.
            use_cache: whether `past_key_values` are returned, `config.use_cache` if None; never with `labels`.
            logits_to_keep: of how many last tokens the logits are computed; 0 for all.

        Returns:
            A `FlorenceCaptioningOutput`.

        Raises:
            ValueError: no picture, pixels or ids that are refused, too long a text, labels of another shape.
        """
        input_ids = check_input_ids(input_ids, cast("FlorenceTextConfig", self.config))
        use_cache = bool(use_cache) and labels is None
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if past_key_values is not None and not isinstance(past_key_values, EncoderDecoderCache):
            past_key_values = EncoderDecoderCache(past_key_values, DynamicCache(config=self.config))
        image = None
        if past_key_values is None or not past_key_values.is_updated.get(0):
            image = self.image_transform(self.encode_images(pixel_values, image_embeds))
            if image.shape[0] not in (1, input_ids.shape[0]):
                raise ValueError(f"expected as many pictures as texts, or one, got {len(image)} and {len(input_ids)}")
            image = image.expand(input_ids.shape[0], -1, -1)
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        if attention_mask is not None and attention_mask.ndim == 2:
            expected = (input_ids.shape[0], past + input_ids.shape[1])
            if tuple(attention_mask.shape) != expected:
                raise ValueError(f"expected attention_mask of shape {expected}, got {tuple(attention_mask.shape)}")
        position_ids = self._positions(input_ids, attention_mask, position_ids, past)
        hidden_states = self.decoder(input_ids, position_ids, image, attention_mask, past_key_values)
        logits = self.lm_head(hidden_states[:, -logits_to_keep:] if logits_to_keep else hidden_states)
        loss = None
        if labels is not None:
            if not isinstance(labels, torch.Tensor) or labels.shape != input_ids.shape or logits_to_keep:
                got = tuple(labels.shape) if isinstance(labels, torch.Tensor) else type(labels).__name__
                raise ValueError(f"expected labels of shape {tuple(input_ids.shape)} and all logits, got {got}")
            loss = token_loss(logits[:, :-1], labels[:, 1:])
        return FlorenceCaptioningOutput(
            loss=loss, logits=logits, past_key_values=past_key_values if use_cache else None
        )

    def _special_tokens(self) -> tuple[int, int, int]:
        """Ids of the start, end and padding tokens."""
        config = self.config
        return cast("tuple[int, int, int]", (config.bos_token_id, config.eos_token_id, config.pad_token_id))

    def _prompts(
        self, input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None, count: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`open_prompts` of the texts given, or the start token for each of `count` pictures."""
        bos, eos, pad = self._special_tokens()
        if input_ids is None:
            input_ids, attention_mask = torch.full((count, 1), bos, device=self.device), None
        return open_prompts(
            check_input_ids(input_ids, cast("FlorenceTextConfig", self.config)), attention_mask, eos, pad
        )

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Continue texts about pictures, as transformers' `generate`: greedily, by sampling, by beam search.

        Args:
            input_ids, attention_mask: (batch, tokens), questions or beginnings as a tokenizer makes them, with or
                without end tokens, padded on either side; None for a caption from the start.
            pixel_values, image_embeds: see `forward`.
            kwargs: what `generate` takes. No text grows beyond `config.max_position_embeddings`.

        Returns:
            (batch, tokens), the prompts, padded in front, and what was written; or what `kwargs` ask for.

        Raises:
            ValueError: see `forward` and `open_prompts`; or a prompt that leaves no room.
        """
        image_embeds = self.encode_images(pixel_values, image_embeds)
        input_ids, attention_mask = self._prompts(input_ids, attention_mask, len(image_embeds))
        limit = self.config.max_position_embeddings
        if input_ids.shape[1] >= limit:
            raise ValueError(f"expected prompts of less than {limit} tokens, got {input_ids.shape[1]}")
        if len(image_embeds) != len(input_ids):
            if len(image_embeds) != 1:
                raise ValueError(
                    f"expected as many pictures as texts, or one, got {len(image_embeds)} and {len(input_ids)}"
                )
            image_embeds = image_embeds.expand(len(input_ids), -1, -1)
        kwargs["stopping_criteria"] = StoppingCriteriaList(
            [*(kwargs.get("stopping_criteria") or ()), ContextEnd(limit)]
        )
        return super().generate(input_ids, attention_mask=attention_mask, image_embeds=image_embeds, **kwargs)

    @torch.no_grad()
    def rank_answers(
        self,
        answer_ids: torch.Tensor,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_embeds: torch.Tensor | None = None,
        batch_size: int = 64,
    ) -> torch.Tensor:
        """How likely each of a list of answers is, for each question about its picture.

        Pictures and questions go through the model once; only the answers' own tokens are computed for each pair.

        Args:
            answer_ids: (answers, tokens), as a tokenizer makes them: start token, answer, end token, padding behind.
            input_ids, pixel_values, attention_mask, image_embeds: see `generate`.
            batch_size: pairs of question and answer at a time.

        Returns:
            (questions, answers), float32: the logarithm of each answer's probability, its end included.

        Raises:
            ValueError: see `generate`; or answers that do not start with the start token and end with the end token.
        """
        answer_ids = check_input_ids(answer_ids, cast("FlorenceTextConfig", self.config))
        bos, eos, _ = self._special_tokens()
        if (answer_ids[:, 0] != bos).any() or not (answer_ids[:, 1:] == eos).any(dim=1).all():
            raise ValueError(f"expected answers from the start token {bos} to the end token {eos}, got others")
        answers = answer_ids[:, 1:]
        counted = (answers == eos).cumsum(dim=1) - (answers == eos).long() == 0  # up to the first end token
        image_embeds = self.encode_images(pixel_values, image_embeds)
        prompts, mask = self._prompts(input_ids, attention_mask, len(image_embeds))
        asked = self(prompts, attention_mask=mask, image_embeds=image_embeds, use_cache=True, logits_to_keep=1)
        first = asked.logits[:, -1].float().log_softmax(dim=-1)  # (questions, vocab_size)
        scores = []
        at_a_time = max(1, batch_size // len(prompts))
        for tokens, real in zip(answers.split(at_a_time), counted.split(at_a_time), strict=True):
            count, length = tokens.shape
            cache = copy.deepcopy(asked.past_key_values)
            cache.batch_repeat_interleave(count)
            behind = tokens[:, :-1].repeat(len(prompts), 1)  # (questions * count, length - 1)
            likelihoods = first.repeat_interleave(count, dim=0)[:, None]  # (questions * count, 1, vocab_size)
            if length > 1:
                masks = torch.cat((mask.repeat_interleave(count, dim=0), torch.ones_like(behind)), dim=1)
                logits = self(behind, attention_mask=masks, past_key_values=cache, use_cache=True).logits
                likelihoods = torch.cat((likelihoods, logits.float().log_softmax(dim=-1)), dim=1)
            chosen = likelihoods.gather(2, tokens.repeat(len(prompts), 1)[..., None]).squeeze(2)
            total = (chosen * real.repeat(len(prompts), 1)).sum(dim=1)
            scores.append(total.view(len(prompts), count))
        return torch.cat(scores, dim=1)


__all__ = [
    "IGNORED_TOKEN",
    "FlorenceCaptioningOutput",
    "FlorenceCaptioningPreTrainedModel",
    "FlorenceForImageCaptioning",
    "open_prompts",
]
