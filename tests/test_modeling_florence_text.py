"""FlorenceTextModel against transformers' CLIP text model, against a loop, and at its door."""

import math

import pytest
import torch
from torch.testing import assert_close
from transformers import CLIPTextConfig, CLIPTextModel
from transformers.activations import ACT2FN

from tests.tiny_florence import CONTEXT, VOCABULARY, tiny_text_config
from transformers_florence import FlorenceTextModel
from transformers_florence.modeling_florence_text import pool_at_first_eos

EOS = VOCABULARY - 1


def text_model(**overrides) -> FlorenceTextModel:
    model = FlorenceTextModel(tiny_text_config(**overrides)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (parameter if parameter.ndim == 1 else 0))
    return model


def some_texts() -> tuple[torch.Tensor, torch.Tensor]:
    """Three texts of different lengths, padded with the end token; and their mask."""
    input_ids = torch.randint(0, EOS - 1, (3, CONTEXT))
    mask = torch.ones_like(input_ids)
    for row, length in enumerate((5, CONTEXT, 3)):
        input_ids[row, length - 1 :] = EOS
        mask[row, length:] = 0
    return input_ids, mask


def slow_text_tower(model: FlorenceTextModel, ids: list[int], causal: bool) -> torch.Tensor:
    """One text without padding through the pre-norm transformer of CLIP, head by head: (tokens, hidden_size)."""
    config = model.config
    width = config.hidden_size // config.num_attention_heads
    embeddings = model.embeddings
    hidden = embeddings.token_embedding.weight[ids] + embeddings.position_embedding.weight[: len(ids)]
    for layer in model.encoder.layers:
        normed = layer.layer_norm1(hidden)
        attention = layer.self_attn
        heads = []
        for head in range(config.num_attention_heads):
            own = slice(head * width, (head + 1) * width)
            query, key, value = (
                normed @ projection.weight[own].T + projection.bias[own]
                for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            scores = query @ key.T / math.sqrt(width)  # (tokens, tokens)
            if causal:
                scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -math.inf)
            heads.append(scores.softmax(-1) @ value)
        hidden = hidden + attention.out_proj(torch.cat(heads, -1))
        hidden = hidden + layer.mlp.fc2(ACT2FN[config.hidden_act](layer.mlp.fc1(layer.layer_norm2(hidden))))
    return model.final_layer_norm(hidden)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_causal_tower_is_clips(masked, attention):
    model = text_model(layer_norm_eps=1e-4)
    model.set_attn_implementation(attention)
    fields = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    fields += ("max_position_embeddings", "hidden_act", "layer_norm_eps", "eos_token_id")
    config = CLIPTextConfig(**{name: getattr(model.config, name) for name in fields})
    clip = CLIPTextModel(config).eval()
    clip.load_state_dict(model.state_dict(), strict=True)
    input_ids, mask = some_texts()
    mask = mask if masked else None
    got = model(input_ids, attention_mask=mask, output_hidden_states=True)
    expected = clip(input_ids, attention_mask=mask, output_hidden_states=True)
    assert_close(got.pooler_output, expected.pooler_output)
    assert_close(got.hidden_states, expected.hidden_states)
    real = some_texts()[1].bool() if masked else torch.ones_like(input_ids).bool()
    assert_close(got.last_hidden_state[real], expected.last_hidden_state[real])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_each_text_is_what_a_loop_makes_of_it_alone(causal, attention):
    model = text_model(causal=causal)
    model.set_attn_implementation(attention)
    input_ids, mask = some_texts()
    outputs = model(input_ids, attention_mask=mask)
    for row, length in enumerate(mask.sum(1).tolist()):
        expected = slow_text_tower(model, input_ids[row, :length].tolist(), causal)
        assert_close(outputs.last_hidden_state[row, :length], expected, atol=1e-5, rtol=1e-5)
        assert_close(outputs.pooler_output[row], expected[-1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_causality(causal):
    model = text_model(causal=causal)
    first = torch.tensor([[1, 2, 3, 4, EOS]])
    second = torch.tensor([[1, 2, 3, 7, EOS]])
    same = (model(first).last_hidden_state == model(second).last_hidden_state).all(-1)[0].tolist()
    assert same == ([True] * 3 + [False] * 2 if causal else [False] * 5)


@pytest.mark.parametrize("causal", [True, False])
def test_padding_does_not_change_an_embedding(causal):
    model = text_model(causal=causal)
    text = [EOS - 1, 5, 6, 7, EOS]
    alone = model(torch.tensor([text])).pooler_output
    for length in range(len(text), CONTEXT + 1):
        padding = length - len(text)
        input_ids = torch.tensor([text + [EOS] * padding])
        mask = torch.tensor([[1] * len(text) + [0] * padding])
        assert_close(model(input_ids, attention_mask=mask).pooler_output, alone, atol=1e-5, rtol=1e-5)
        if causal:  # what comes later is not seen, masked or not
            assert_close(model(input_ids).pooler_output, alone, atol=1e-5, rtol=1e-5)


def test_pooling_takes_the_first_end_token():
    states = torch.arange(2 * 4.0).view(2, 4, 1)
    input_ids = torch.tensor([[1, 9, 9, 9], [1, 2, 3, 9]])
    assert pool_at_first_eos(states, input_ids, 9, None).flatten().tolist() == [1, 7]


def test_pooling_of_a_text_without_end_token_takes_the_last_that_is_shown():
    states = torch.arange(2 * 4.0).view(2, 4, 1)
    input_ids = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4]])
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    assert pool_at_first_eos(states, input_ids, 9, mask).flatten().tolist() == [1, 7]
    assert pool_at_first_eos(states, input_ids, 9, None).flatten().tolist() == [3, 7]


def test_position_ids_choose_the_positions():
    model = text_model()
    input_ids = torch.tensor([[1, 2, EOS]])
    standard = model(input_ids).pooler_output
    assert_close(model(input_ids, position_ids=torch.tensor([[0, 1, 2]])).pooler_output, standard)
    assert not torch.allclose(model(input_ids, position_ids=torch.tensor([[3, 4, 5]])).pooler_output, standard)


def test_int32_ids_and_attentions():
    model = text_model(causal=False)
    model.set_attn_implementation("eager")
    input_ids, mask = some_texts()
    outputs = model(input_ids.int(), attention_mask=mask, output_attentions=True)
    assert_close(outputs.pooler_output, model(input_ids, attention_mask=mask).pooler_output)
    assert len(outputs.attentions) == model.config.num_hidden_layers
    for weights in outputs.attentions:
        assert_close(weights.sum(-1), torch.ones(3, model.config.num_attention_heads, CONTEXT))
        assert (weights[0, :, :, 5:] == 0).all()  # nobody looks at padding


def test_save_and_load(tmp_path):
    model = text_model(causal=False)
    model.save_pretrained(tmp_path)
    loaded, info = FlorenceTextModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    input_ids, mask = some_texts()
    expected = model(input_ids, attention_mask=mask).pooler_output
    assert torch.equal(loaded(input_ids, attention_mask=mask).pooler_output, expected)


@pytest.mark.parametrize(
    ("input_ids", "message"),
    [
        (None, "NoneType"),
        ([[1, EOS]], "list"),
        (torch.tensor([1, EOS]), r"shape \(2,\)"),
        (torch.ones(1, 2, 3, dtype=torch.long), r"shape \(1, 2, 3\)"),
        (torch.ones(1, 3), "float32"),
        (torch.ones(1, 3, dtype=torch.bool), "bool"),
        (torch.ones(0, 3, dtype=torch.long), r"shape \(0, 3\)"),
        (torch.ones(1, 0, dtype=torch.long), r"shape \(1, 0\)"),
        (torch.ones(1, CONTEXT + 1, dtype=torch.long), f"at most {CONTEXT} tokens"),
        (torch.tensor([[1, VOCABULARY]]), f"0 to {VOCABULARY - 1}, got {VOCABULARY}"),
        (torch.tensor([[-1, EOS]]), "got -1"),
    ],
)
def test_bad_ids_are_refused_at_the_door(input_ids, message):
    with pytest.raises(ValueError, match=message):
        text_model()(input_ids)
