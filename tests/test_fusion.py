"""Co-attention against transformers' BridgeTower layer and by its definition: masks, updates, kernels, cache."""

import itertools
import re

import pytest
import torch
from torch.testing import assert_close
from transformers import BertConfig, BridgeTowerTextConfig, DynamicCache, EncoderDecoderCache
from transformers.models.bert.modeling_bert import BertEncoder
from transformers.models.bridgetower.modeling_bridgetower import BridgeTowerBertCrossLayer

from tests.oracles import randomize
from tests.tiny_fusion import tiny_captioning_config, tiny_fusion_config
from transformers_florence.fusion import (
    CoAttentionLayer,
    FusionAttention,
    FusionEncoder,
    LanguageHead,
    MergedFusionEncoder,
)

DIM, HEADS = 24, 4
BRIDGETOWER = [
    (r"(self|cross)_attention\.([qkv])_proj\.", r"\1.self.\2."),
    (r"(self|cross)_attention\.out_proj\.", r"\1.output.dense."),
    (r"(self|cross)_attention_norm\.", r"\1.output.LayerNorm."),
    (r"mlp\.fc1\.", "intermediate.dense."),
    (r"mlp\.fc2\.", "output.dense."),
    (r"mlp_norm\.", "output.LayerNorm."),
]
NAMES = {"self.self.": "attention.self.", "self.output.": "attention.output.", "cross.": "crossattention."}
LETTERS = {".q.": ".query.", ".k.": ".key.", ".v.": ".value."}


def layer(implementation: str = "sdpa", **options) -> CoAttentionLayer:
    config = tiny_fusion_config(attn_implementation=implementation)
    return randomize(CoAttentionLayer(config, **options)).eval()


def bridgetower(ours: CoAttentionLayer) -> BridgeTowerBertCrossLayer:
    """transformers' layer with the same weights."""
    config = BridgeTowerTextConfig(
        hidden_size=DIM, num_attention_heads=HEADS, intermediate_size=4 * DIM, layer_norm_eps=1e-12
    )
    config._attn_implementation = "eager"
    theirs = BridgeTowerBertCrossLayer(config).to(next(ours.parameters()).dtype).eval()
    tensors = {}
    for key, tensor in ours.state_dict().items():
        pattern, target = next(row for row in BRIDGETOWER if re.match(row[0], key))
        name = re.sub("^" + pattern, target, key)
        for short, long in [*NAMES.items(), *LETTERS.items()]:
            name = re.sub("^" + re.escape(short), long, name) if short in NAMES else name.replace(short, long)
        tensors[name] = tensor
    theirs.load_state_dict(tensors)
    return theirs


def additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(batch, tokens) of ones and zeros -> (batch, 1, 1, tokens), to be added to the scores."""
    return (1.0 - mask[:, None, None].to(dtype)) * torch.finfo(dtype).min


@pytest.fixture
def streams() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Text (2, 5, DIM), image (2, 7, DIM), and the text's mask."""
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    return torch.randn(2, 5, DIM), torch.randn(2, 7, DIM), mask


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_a_layer_is_bridgetowers(streams, implementation, dtype, tolerance):
    text, image, mask = (streams[0].to(dtype), streams[1].to(dtype), additive(streams[2], dtype))
    ours = layer(implementation).to(dtype)
    theirs = bridgetower(ours)
    nothing = torch.zeros(2, 1, 1, 7, dtype=dtype)
    expected, self_weights, cross_weights = theirs(text, image, mask, nothing)
    output, *weights = ours(text, image, mask, None)
    assert_close(output, expected, rtol=0, atol=tolerance)
    if implementation == "eager":
        assert_close(weights, [self_weights, cross_weights], rtol=0, atol=tolerance)
    # The other way round the mask hides the context.
    expected, *_ = theirs(image, text, nothing, mask)
    output, *_ = ours(image, text, None, mask)
    assert_close(output, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("depth", [0, 1, 3])
@torch.no_grad()
def test_both_modalities_are_updated_from_the_old_states(streams, depth, implementation):
    text, image, mask = streams
    config = tiny_fusion_config(num_hidden_layers=depth, attn_implementation=implementation)
    encoder = randomize(FusionEncoder(config)).eval()
    hidden, nothing = additive(mask, text.dtype), torch.zeros(2, 1, 1, 7)
    expected_text, expected_image = text, image
    for text_layer, image_layer in zip(encoder.text_layers, encoder.image_layers, strict=True):
        expected_text, expected_image = (
            bridgetower(text_layer)(expected_text, expected_image, hidden, nothing)[0],
            bridgetower(image_layer)(expected_image, expected_text, nothing, hidden)[0],
        )
    new_text, new_image = encoder(text, image, mask)
    assert_close(new_text[mask.bool()], expected_text[mask.bool()], rtol=0, atol=1e-5)
    assert_close(new_image, expected_image, rtol=0, atol=1e-5)


@torch.no_grad()
def test_padding_changes_nothing(streams):
    text, image, mask = streams
    encoder = randomize(FusionEncoder(tiny_fusion_config(attn_implementation="sdpa"))).eval()
    new_text, new_image = encoder(text, image, mask)
    alone_text, alone_image = encoder(text[1:, :3], image[1:], None)
    assert_close(new_text[1:, :3], alone_text, rtol=0, atol=1e-5)
    assert_close(new_image[1:], alone_image, rtol=0, atol=1e-5)
    garbage = torch.where(mask[..., None] == 1, text, 1e3)
    assert_close(encoder(garbage, image, mask)[1], new_image, rtol=0, atol=1e-5)


def test_gradients_of_checkpointing_are_those_without(streams):
    text, image, mask = streams
    encoder = randomize(FusionEncoder(tiny_fusion_config(attn_implementation="sdpa"))).train()
    gradients = []
    for checkpointing in (False, True):
        for module in encoder.modules():
            if isinstance(module, CoAttentionLayer):
                module.gradient_checkpointing = checkpointing
                module._gradient_checkpointing_func = lambda function, *inputs: torch.utils.checkpoint.checkpoint(
                    function, *inputs, use_reentrant=False
                )
        encoder.zero_grad()
        sum(part.square().sum() for part in encoder(text, image, mask)).backward()
        gradients.append([parameter.grad.clone() for parameter in encoder.parameters()])
    assert all(gradient.abs().sum() > 0 for gradient in gradients[0][::2])
    assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_a_causal_layer_sees_no_later_token():
    text, image = torch.randn(2, 6, DIM), torch.randn(2, 7, DIM)
    decoder = layer(causal=True)
    whole, *_ = decoder(text, image)
    for length in (1, 3, 5):
        part, *_ = decoder(text[:, :length], image)
        assert_close(part, whole[:, :length], rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_cache_stands_in_for_earlier_tokens_and_for_the_picture():
    text, image = torch.randn(2, 6, DIM), torch.randn(2, 7, DIM)
    config = tiny_captioning_config(attn_implementation="sdpa")
    decoder = randomize(CoAttentionLayer(config, causal=True)).eval()
    whole, *_ = decoder(text, image)
    cache = EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config))
    first, *_ = decoder(text[:, :3], image, past_key_values=cache)
    assert_close(first, whole[:, :3], rtol=0, atol=1e-5)
    for position in range(3, 6):  # no picture is needed any more
        step, *_ = decoder(text[:, position : position + 1], None, past_key_values=cache)
        assert_close(step, whole[:, position : position + 1], rtol=0, atol=1e-5)
    assert cache.get_seq_length() == 6


def test_dropout_is_on_in_training_only(streams):
    text, image, _ = streams
    for fields in ({"hidden_dropout": 0.5}, {"attention_dropout": 0.5}):
        module = randomize(CoAttentionLayer(tiny_fusion_config(attn_implementation="eager", **fields)))
        first, second = (module.train()(text, image)[0] for _ in range(2))
        assert (first - second).abs().max() > 0.01
        first, second = (module.eval()(text, image)[0] for _ in range(2))
        assert_close(first, second, rtol=0, atol=0)


@torch.no_grad()
def test_a_language_head_is_its_formula():
    config = tiny_fusion_config(hidden_act="gelu")
    head = randomize(LanguageHead(config, vocab_size=11)).double()
    states = torch.randn(2, 3, DIM, dtype=torch.float64)
    hidden = states @ head.transform.weight.T + head.transform.bias
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    hidden = (hidden - hidden.mean(-1, keepdim=True)) / hidden.std(-1, keepdim=True, unbiased=False)
    hidden = hidden * head.norm.weight + head.norm.bias
    expected = hidden @ head.vocabulary.weight.T + head.vocabulary.bias
    assert_close(head(states), expected, rtol=0, atol=1e-10)


def test_what_lora_looks_for_is_there():
    """Separate linear layers for query, key, value and output, in both kinds of attention."""
    names = {name for name, module in layer().named_modules() if isinstance(module, torch.nn.Linear)}
    kinds = itertools.product(("self", "cross"), ("q_proj", "k_proj", "v_proj", "out_proj"))
    assert {f"{kind}_attention.{part}" for kind, part in kinds} <= names
    assert sum(isinstance(module, FusionAttention) for module in layer().modules()) == 2


# Merged attention


def bert(ours: MergedFusionEncoder) -> BertEncoder:
    """transformers' encoder with the same weights."""
    config = BertConfig(
        hidden_size=DIM,
        num_attention_heads=HEADS,
        num_hidden_layers=len(ours.layers),
        intermediate_size=4 * DIM,
        layer_norm_eps=1e-12,
        attn_implementation="eager",
    )
    theirs = BertEncoder(config).eval()
    renamed = {}
    for name, value in ours.state_dict().items():
        name = re.sub(r"^layers\.", "layer.", name)
        for pattern, target in BRIDGETOWER:
            name = re.sub(pattern, target, name)
        for old, new in {"self.self.": "attention.self.", "self.output.": "attention.output.", **LETTERS}.items():
            name = name.replace(old, new)
        renamed[name] = value
    theirs.load_state_dict(renamed)
    return theirs


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_merged_attention_is_one_encoder_over_both(implementation):
    config = tiny_fusion_config(fusion_type="merged_attention", attn_implementation=implementation)
    encoder = randomize(MergedFusionEncoder(config)).eval()
    text, image = torch.randn(2, 5, DIM), torch.randn(2, 3, DIM)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    tokens, seen = torch.cat((text, image), dim=1), torch.cat((mask, torch.ones(2, 3)), dim=1)
    added = ((1 - seen) * torch.finfo(torch.float32).min)[:, None, None, :]
    expected = bert(encoder)(tokens, attention_mask=added).last_hidden_state
    got_text, got_image = encoder(text, image, mask)
    assert_close(torch.cat((got_text, got_image), dim=1)[seen == 1], expected[seen == 1], rtol=0, atol=1e-5)
    without = bert(encoder)(tokens).last_hidden_state
    assert_close(torch.cat(encoder(text, image), dim=1), without, rtol=0, atol=1e-5)
