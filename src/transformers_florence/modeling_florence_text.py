# Copyright 2026 The transformers_florence authors. Licensed under the Apache License, Version 2.0.
"""Florence's text tower: transformers' CLIP text classes with a choice of mask and the authors' pooling."""

import torch
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import CLIPTextModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_florence import FlorenceTextConfig
from .integrity import ManifestMixin


def check_input_ids(input_ids: torch.Tensor | None, config: FlorenceTextConfig) -> torch.Tensor:
    """The token ids if the tower can read them: the door of every model that takes `input_ids`.

    The ids themselves are looked at on the CPU only: on an accelerator that would wait for the device.

    Raises:
        ValueError: missing, wrong type, rank or dtype, an empty batch or text, a text longer than the context, an id
            outside the vocabulary.
    """
    limit = config.max_position_embeddings
    expected = f"integer input_ids of shape (batch, tokens) with at most {limit} tokens"
    if not isinstance(input_ids, torch.Tensor):
        raise ValueError(f"expected {expected}, got {type(input_ids).__name__}")
    shape = tuple(input_ids.shape)
    if input_ids.ndim != 2 or input_ids.dtype not in (torch.int64, torch.int32) or shape[1] > limit:
        raise ValueError(f"expected {expected}, got {input_ids.dtype} of shape {shape}")
    if torch.compiler.is_compiling() or input_ids.device.type != "cpu":
        return input_ids
    if 0 in shape:
        raise ValueError(f"expected {expected}, at least one text of one token, got shape {shape}")
    low, high = (int(value) for value in input_ids.aminmax())
    if low < 0 or high >= config.vocab_size:
        raise ValueError(f"expected token ids from 0 to {config.vocab_size - 1}, got {low if low < 0 else high}")
    return input_ids


def pool_at_first_eos(
    hidden_states: torch.Tensor, input_ids: torch.Tensor, eos_token_id: int, attention_mask: torch.Tensor | None
) -> torch.Tensor:
    """The state of each text's first end token, (batch, hidden_size).

    Padding with the end token, as CLIP's tokenizer does, is therefore harmless. A text that was cut before its end
    token is pooled at the last token that `attention_mask` shows.
    """
    is_eos = input_ids == eos_token_id
    if attention_mask is None or attention_mask.ndim != 2:
        last = torch.full_like(input_ids[:, 0], input_ids.shape[1] - 1, dtype=torch.int64)
    else:
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        last = (positions * (attention_mask != 0)).argmax(dim=1)
    position = torch.where(is_eos.any(dim=1), is_eos.int().argmax(dim=1), last)
    rows = torch.arange(hidden_states.shape[0], device=hidden_states.device)
    return hidden_states[rows, position.to(hidden_states.device)]


class FlorenceTextModel(ManifestMixin, CLIPTextModel):
    """Florence's text tower without a head; texts of any padded length up to the context length.

    Keys are those of `transformers.CLIPTextModel`.
    """

    config: FlorenceTextConfig
    base_model_prefix = "text_model"
    _keys_to_ignore_on_load_unexpected = [r"^vision_model\.", r"^(visual|text)_projection\.", r"^logit_scale$"]

    def __init__(self, config: FlorenceTextConfig) -> None:
        config.validate_architecture()  # fields that were set after the configuration was built
        super().__init__(config)

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """
        Args:
            input_ids: (batch, tokens), int64 or int32.
            attention_mask: (batch, tokens), 1 for tokens and 0 for padding; without it every token counts.
            position_ids: (batch, tokens), if not 0, 1, 2, ...

        Returns:
            last_hidden_state: (batch, tokens, hidden_size), after the final norm.
            pooler_output: (batch, hidden_size), the state at the first end token.
            hidden_states, attentions: as CLIP's text model, if asked for.

        Raises:
            ValueError: ids that `check_input_ids` refuses.
        """
        input_ids = check_input_ids(input_ids, self.config)
        hidden_states = self.embeddings(input_ids=input_ids, position_ids=position_ids)
        make_mask = create_causal_mask if self.config.causal else create_bidirectional_mask
        options = {"past_key_values": None} if self.config.causal else {}
        mask = make_mask(config=self.config, inputs_embeds=hidden_states, attention_mask=attention_mask, **options)
        kwargs.pop("is_causal", None)
        outputs = self.encoder(
            inputs_embeds=hidden_states, attention_mask=mask, is_causal=self.config.causal, **kwargs
        )
        last_hidden_state = self.final_layer_norm(outputs.last_hidden_state)
        eos_token_id = self.config.eos_token_id
        assert eos_token_id is not None, "the configuration derives it from the size of the vocabulary"
        pooled = pool_at_first_eos(last_hidden_state, input_ids, eos_token_id, attention_mask)
        return BaseModelOutputWithPooling(last_hidden_state=last_hidden_state, pooler_output=pooled)


__all__ = ["FlorenceTextModel", "check_input_ids", "pool_at_first_eos"]
