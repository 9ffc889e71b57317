"""The fusion model without a head: towers of every kind, shared and frozen, folders, doors."""

import pytest
import torch
from torch.testing import assert_close
from transformers import BertConfig, BertForMaskedLM, BertModel, RobertaModel, XLMRobertaModel

from tests.oracles import randomize
from tests.tiny_florence import SIDE, random_pixels, save_tiny, tiny_model
from tests.tiny_fusion import ENCODER, TOKENS, random_texts, text_configs, tiny_fusion_config
from transformers_florence import FlorenceTextModel, FlorenceVisionModel, verify_checkpoint
from transformers_florence.fusion import CoAttentionLayer
from transformers_florence.modeling_florence_fusion import FlorenceFusionModel
from transformers_florence.modeling_florence_fusion_heads import FlorenceForQuestionAnswering

CLASSES = {
    "roberta": RobertaModel,
    "xlm-roberta": XLMRobertaModel,
    "bert": BertModel,
    "florence": FlorenceTextModel,
}


def tiny_fusion(**fields) -> FlorenceFusionModel:
    """In evaluation mode, with weights of which every one matters."""
    return randomize(FlorenceFusionModel(tiny_fusion_config(**fields))).eval()


@pytest.mark.parametrize("kind", list(CLASSES))
@torch.no_grad()
def test_every_kind_of_text_encoder(kind, tmp_path):
    model = tiny_fusion(text_config=text_configs()[kind])
    assert type(model.text_model) is CLASSES[kind]
    inputs = {"pixel_values": random_pixels(), **random_texts()}
    # The encoder by itself is transformers' own.
    plain = {} if kind == "florence" else {"add_pooling_layer": False}
    encoder = CLASSES[kind](model.config.text_config, **plain).eval()
    encoder.load_state_dict(model.text_model.state_dict())
    texts = random_texts()
    expected = encoder(**texts).last_hidden_state
    assert_close(model.encode_texts(**texts), expected, rtol=0, atol=1e-5)
    output = model(**inputs)
    assert output.pooler_output.shape == (3, 48) and output.text_features.shape == (3, TOKENS, 24)
    model.save_pretrained(tmp_path)
    verify_checkpoint(tmp_path)
    loaded = FlorenceFusionModel.from_pretrained(tmp_path)
    assert_close(loaded(**inputs).pooler_output, output.pooler_output, rtol=0, atol=1e-6)


@torch.no_grad()
def test_the_whole_by_its_parts():
    model = tiny_fusion()
    texts, pixels = random_texts(), random_pixels()
    text = model.text_model(**texts).last_hidden_state
    image = model.vision_model(pixels).last_hidden_state
    text = text @ model.text_transform.weight.T + model.text_transform.bias + model.token_type_embeddings.weight[0]
    image = image @ model.image_transform.weight.T + model.image_transform.bias + model.token_type_embeddings.weight[1]
    text, image = model.fusion(text, image, texts["attention_mask"])
    pooled = [
        torch.tanh(text[:, 0] @ model.text_pooler.weight.T + model.text_pooler.bias),
        torch.tanh(image.mean(1) @ model.image_pooler.weight.T + model.image_pooler.bias),
    ]
    output = model(pixel_values=pixels, **texts)
    assert_close(output.text_features, text, rtol=0, atol=1e-5)
    assert_close(output.image_features, image, rtol=0, atol=1e-5)
    assert_close(output.pooler_output, torch.cat(pooled, dim=1), rtol=0, atol=1e-5)


@torch.no_grad()
def test_eager_and_sdpa_agree_and_eager_records():
    model = tiny_fusion()
    inputs = {"pixel_values": random_pixels(), **random_texts()}
    fast = model(**inputs)
    model.set_attn_implementation("eager")
    slow = model(**inputs, output_attentions=True, output_hidden_states=True)
    assert_close(fast.pooler_output, slow.pooler_output, rtol=0, atol=1e-5)
    assert [tuple(states.shape) for states in slow.hidden_states] == [(3, TOKENS, 24)] * 3
    assert_close(slow.hidden_states[-1], slow.text_features)
    image_tokens = slow.image_features.shape[1]
    assert [tuple(weights.shape) for weights in slow.attentions] == [(3, 4, TOKENS, TOKENS)] * 2
    assert [tuple(weights.shape) for weights in slow.cross_attentions] == [(3, 4, TOKENS, image_tokens)] * 2
    for weights in (*slow.attentions, *slow.cross_attentions):
        assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    hidden = inputs["attention_mask"][:, None, None] == 0
    assert (slow.attentions[0] * hidden).abs().max() == 0


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_a_batch_is_its_parts_and_padding_is_nothing(implementation):
    model = tiny_fusion(attn_implementation=implementation)
    texts, pixels = random_texts(), random_pixels()
    together = model(pixel_values=pixels, **texts).pooler_output
    for row in range(3):
        length = int(texts["attention_mask"][row].sum())
        alone = model(pixel_values=pixels[row : row + 1], input_ids=texts["input_ids"][row : row + 1, :length])
        assert_close(alone.pooler_output[0], together[row], rtol=0, atol=1e-5)


@torch.no_grad()
def test_image_tokens_serve_many_questions():
    model = tiny_fusion()
    texts, pixels = random_texts(), random_pixels(1)
    calls = []
    model.vision_model.register_forward_hook(lambda *call: calls.append(1))
    expected = model(pixel_values=pixels.expand(3, -1, -1, -1), **texts).pooler_output
    image_embeds = model.encode_images(pixels)
    calls.clear()
    output = model(image_embeds=image_embeds, **texts).pooler_output
    assert calls == []
    assert_close(output, expected, rtol=0, atol=1e-5)
    # And one question serves many pictures.
    one = {name: value[:1] for name, value in texts.items()}
    many = model(pixel_values=random_pixels(3), **one).pooler_output
    pairs = model(pixel_values=random_pixels(3), **{name: value.expand(3, -1) for name, value in one.items()})
    assert_close(many, pairs.pooler_output, rtol=0, atol=1e-5)


@torch.no_grad()
def test_texts_about_some_pictures():
    """Five texts about three pictures: what each gives with its picture alone, and every picture is seen once."""
    model, pixels, texts = tiny_fusion(), random_pixels(3), random_texts(5)
    rows = [2, 0, 0, 1, 2]
    expected = [
        model(**{name: value[text : text + 1] for name, value in texts.items()}, pixel_values=pixels[row : row + 1])
        for text, row in enumerate(rows)
    ]
    seen = []
    model.vision_model.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    output = model(**texts, pixel_values=pixels, image_rows=torch.tensor(rows))
    assert_close(output.pooler_output, torch.cat([each.pooler_output for each in expected]), rtol=0, atol=1e-5)
    assert seen == [3]


def test_towers_of_a_folder_are_taken_over(tmp_path):
    dual = save_tiny(tmp_path)
    fields = {"hidden_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1}
    model = FlorenceForQuestionAnswering.from_pretrained_towers(tmp_path, num_labels=3, **fields)
    assert model.config.num_labels == 3 and not model.training and model.dtype == torch.float32
    assert_close(model.model.vision_model.state_dict(), dual.vision_model.state_dict(), rtol=0, atol=0)
    assert_close(model.model.text_model.state_dict(), dual.text_model.state_dict(), rtol=0, atol=0)
    assert all(parameter.requires_grad for parameter in model.parameters())
    # With a text encoder of its own, under the head that it was pretrained with.
    encoder = randomize(BertForMaskedLM(BertConfig(**ENCODER)))
    encoder.save_pretrained(tmp_path / "bert")
    model = FlorenceFusionModel.from_pretrained_towers(tmp_path, text=tmp_path / "bert", **fields)
    assert_close(model.text_model.state_dict(), encoder.bert.state_dict(), rtol=0, atol=0)
    # Or with a new one.
    model = FlorenceFusionModel.from_pretrained_towers(tmp_path, text=text_configs()["roberta"], **fields)
    assert type(model.text_model) is RobertaModel
    assert_close(model.vision_model.state_dict(), dual.vision_model.state_dict(), rtol=0, atol=0)


def test_towers_that_are_none_are_refused(tmp_path):
    randomize(BertForMaskedLM(BertConfig(**ENCODER))).save_pretrained(tmp_path / "bert")
    save_tiny(tmp_path / "dual")
    FlorenceVisionModel.from_pretrained(tmp_path / "dual").save_pretrained(tmp_path / "vision")
    with pytest.raises(ValueError, match=r"expected a text encoder of one of the kinds .* 'florence_vision_model'"):
        FlorenceFusionModel.from_pretrained_towers(tmp_path / "vision")
    model = tiny_model()
    model.config.save_pretrained(tmp_path / "headless")
    model.text_model.save_pretrained(tmp_path / "headless")
    model.config.save_pretrained(tmp_path / "headless")
    with pytest.raises(ValueError, match=r"expected the weights of a FlorenceVisionModel in .*, missing are: embedd"):
        FlorenceFusionModel.from_pretrained_towers(tmp_path / "headless")


def test_a_frozen_tower_stays_as_it_is(tmp_path):
    save_tiny(tmp_path)
    fields = {"hidden_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1, "freeze_vision": True}
    model = FlorenceForQuestionAnswering.from_pretrained_towers(tmp_path, **fields).train()
    tower = model.model.vision_model
    assert model.training and not tower.training
    before = {name: tensor.clone() for name, tensor in tower.state_dict().items()}
    optimizer = torch.optim.SGD((each for each in model.parameters() if each.requires_grad), lr=0.1)
    texts = {"input_ids": torch.randint(5, 200, (3, 6))}
    model(pixel_values=random_pixels(), labels=torch.rand(3, 2), **texts).loss.backward()
    optimizer.step()
    assert_close(tower.state_dict(), before, rtol=0, atol=0)
    assert model.model.fusion.text_layers[0].mlp.fc1.weight.grad.abs().sum() > 0
    model.unfreeze_vision()
    assert tower.training and all(parameter.requires_grad for parameter in tower.parameters())


def test_gradient_checkpointing_changes_no_gradient():
    model = randomize(FlorenceFusionModel(tiny_fusion_config())).train()
    inputs = {"pixel_values": random_pixels(), **random_texts()}
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
            assert model.fusion.text_layers[0].gradient_checkpointing
        model.zero_grad()
        model(**inputs).pooler_output.square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert sum(isinstance(module, CoAttentionLayer) for module in model.modules()) == 4
    assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)


def test_new_weights_have_the_configurations_deviation():
    config = tiny_fusion_config(hidden_size=96, initializer_range=0.05)
    model = FlorenceFusionModel(config)
    fresh = [
        model.text_transform,
        model.image_pooler,
        model.fusion.text_layers[1].mlp.fc1,
        model.token_type_embeddings,
    ]
    for module in fresh:
        assert module.weight.std().item() == pytest.approx(0.05, rel=0.15)
    assert model.image_transform.bias.abs().max() == 0
    assert model.vision_model.embeddings.projection.weight.std().item() < 0.03  # the tower keeps to its own


def test_a_folder_of_weights_without_a_part_is_noticed(tmp_path):
    model = tiny_fusion()
    model.save_pretrained(tmp_path)
    _, info = FlorenceForQuestionAnswering.from_pretrained(tmp_path, output_loading_info=True)
    assert {name.split(".")[0] for name in info["missing_keys"]} == {"classifier"}
    assert not info["unexpected_keys"]


@torch.no_grad()
def test_half_precision_runs():
    inputs = {"pixel_values": random_pixels(), **random_texts()}
    model = tiny_fusion()
    expected = model(**inputs).pooler_output
    output = model.bfloat16()(**inputs).pooler_output
    assert output.dtype == torch.bfloat16
    assert (output.float() - expected).abs().mean() < 0.1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pixel_values": None}, "expected either pixel_values or image_embeds, got neither"),
        ({"image_rows": torch.tensor([0, 1])}, r"expected image_rows of shape \(3,\), integers, got"),
        ({"image_rows": torch.tensor([0.0, 1.0, 2.0])}, "integers, got torch.float32"),
        ({"image_rows": torch.tensor([0, 1, 3])}, "expected image_rows from 0 to 2, got 3"),
        ({"image_rows": torch.tensor([0, -1, 2])}, "expected image_rows from 0 to 2, got -1"),
        ({"image_embeds": torch.zeros(3, 4, 16)}, "expected either pixel_values or image_embeds, got both"),
        (
            {"pixel_values": None, "image_embeds": torch.zeros(3, 16)},
            r"image_tokens, 16\), got torch.float32 of shape",
        ),
        ({"pixel_values": None, "image_embeds": "tokens"}, "floating image_embeds .* got str"),
        ({"pixel_values": None, "image_embeds": torch.zeros(3, 4, 8)}, r"image_tokens, 16\)"),
        ({"input_ids": None}, "expected integer input_ids"),
        ({"input_ids": torch.full((3, TOKENS), 261)}, "expected token ids from 0 to 260, got 261"),
        ({"input_ids": torch.zeros(3, 41, dtype=torch.long)}, "expected texts of at most 40 tokens, got 41"),
        ({"attention_mask": torch.ones(3, 4)}, r"expected attention_mask of shape \(3, 9\), as input_ids"),
        ({"token_type_ids": torch.zeros(2, 9).long()}, "expected token_type_ids of shape"),
        ({"pixel_values": torch.zeros(2, 3, SIDE, SIDE)}, "as many texts as pictures, or one of either, got 3 and 2"),
        ({"pixel_values": torch.full((3, 3, SIDE, SIDE), torch.nan)}, "expected finite pixel_values"),
    ],
)
def test_doors(changes, message):
    inputs = {"pixel_values": random_pixels(), **random_texts(), **changes}
    with pytest.raises(ValueError, match=message):
        tiny_fusion()(**inputs)
