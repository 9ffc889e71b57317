"""FlorenceModel and FlorenceForImageClassification against their formulas, CLIP's own loss, and loops."""

import math

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import image_text_contrastive_loss

from tests.tiny_florence import CONTEXT, DIM, VOCABULARY, random_pixels, tiny_config, tiny_model, tiny_vision_config
from transformers_florence import (
    FlorenceBackbone,
    FlorenceForImageClassification,
    FlorenceModel,
    FlorenceTextModel,
    FlorenceVisionModel,
)

EOS = VOCABULARY - 1


def random_texts(count: int = 3, seed: int = 0) -> dict[str, torch.Tensor]:
    """Texts of different lengths, padded with the end token."""
    input_ids = torch.randint(0, EOS - 1, (count, CONTEXT), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(input_ids)
    for row in range(count):
        length = 3 + row % (CONTEXT - 2)
        input_ids[row, length - 1 :] = EOS
        mask[row, length:] = 0
    return {"input_ids": input_ids, "attention_mask": mask}


def slow_unicl(logits: torch.Tensor, labels: list[int]) -> float:
    """Florence's equations 1 to 3, pair by pair; the sum over both directions."""
    total = 0.0
    for matrix in (logits.double(), logits.double().T):
        for i, row in enumerate(matrix):
            positives = [j for j in range(len(labels)) if labels[j] == labels[i]]
            denominator = sum(math.exp(value) for value in row.tolist())
            total -= sum(math.log(math.exp(row[j].item()) / denominator) for j in positives) / len(positives)
    return total


def test_forward_is_the_composition_of_its_parts():
    model = tiny_model()
    pixels, texts = random_pixels(2), random_texts(3)
    output = model(pixel_values=pixels, **texts)
    image = model.vision_model(pixels).last_hidden_state.mean(1) @ model.visual_projection.weight.T
    text_states = model.text_model(**texts).last_hidden_state
    ends = [row.index(EOS) for row in texts["input_ids"].tolist()]
    text = text_states[range(3), ends] @ model.text_projection.weight.T
    image, text = (value / value.square().sum(-1, keepdim=True).sqrt() for value in (image, text))
    assert_close(output.image_embeds, image)
    assert_close(output.text_embeds, text)
    assert_close(output.logit_scale.item(), math.exp(model.config.logit_scale_init_value))
    for i in range(2):
        for j in range(3):
            cosine = F.cosine_similarity(image[i], text[j], dim=0)
            assert_close(output.logits_per_image[i, j], output.logit_scale * cosine)
    assert torch.equal(output.logits_per_text, output.logits_per_image.T)
    assert output.loss is None


def test_features_are_the_towers_outputs_with_the_projection_as_pooled():
    model = tiny_model()
    pixels, texts = random_pixels(2), random_texts(2)
    image, text = model.get_image_features(pixels), model.get_text_features(**texts)
    output = model(pixel_values=pixels, **texts)
    assert isinstance(image, BaseModelOutputWithPooling) and isinstance(text, BaseModelOutputWithPooling)
    assert image.pooler_output.shape == text.pooler_output.shape == (2, DIM)
    assert_close(F.normalize(image.pooler_output), output.image_embeds)
    assert_close(F.normalize(text.pooler_output), output.text_embeds)
    assert torch.equal(image.last_hidden_state, output.vision_model_output.last_hidden_state)
    assert torch.equal(text.last_hidden_state, output.text_model_output.last_hidden_state)
    as_tuple = model.get_image_features(pixels, return_dict=False)
    assert torch.equal(as_tuple[1], image.pooler_output)


def test_one_modality_alone_gives_the_same_embeddings():
    model = tiny_model()
    pixels, texts = random_pixels(2), random_texts(2)
    both, images, words = model(pixel_values=pixels, **texts), model(pixel_values=pixels), model(**texts)
    assert torch.equal(images.image_embeds, both.image_embeds) and torch.equal(words.text_embeds, both.text_embeds)
    assert images.text_embeds is images.logits_per_image is images.loss is images.text_model_output is None
    assert words.image_embeds is words.logits_per_text is words.loss is words.vision_model_output is None
    assert torch.equal(model(pixel_values=pixels, return_dict=False)[0], both.image_embeds)
    assert torch.equal(model(**texts, return_dict=False)[0], both.text_embeds)


def test_a_tuple_starts_with_the_loss_and_the_logits():
    model = tiny_model()
    inputs = {"pixel_values": random_pixels(2), **random_texts(2)}
    output = model(**inputs, return_loss=True)
    values = model(**inputs, return_loss=True, return_dict=False)
    assert torch.equal(values[0], output.loss)
    assert torch.equal(values[1], output.logits_per_image)
    assert torch.equal(values[2], output.logits_per_text)
    assert list(output) == [
        "loss",
        "logits_per_image",
        "logits_per_text",
        "image_embeds",
        "text_embeds",
        "logit_scale",
        "text_model_output",
        "vision_model_output",
    ]


def test_unique_labels_give_clips_loss():
    model = tiny_model()
    inputs = {"pixel_values": random_pixels(4), **random_texts(4)}
    output = model(**inputs, labels=torch.tensor([7, 3, 9, 1]))
    assert_close(output.loss, image_text_contrastive_loss(output.logits_per_text))
    assert_close(model(**inputs, return_loss=True).loss, output.loss)


@pytest.mark.parametrize("labels", [[0, 0, 1, 2], [5, 5, 5, 5], [1, 2, 1, 2]])
def test_shared_labels_give_the_papers_loss_in_both_forms(labels):
    model = tiny_model()
    inputs = {"pixel_values": random_pixels(4), **random_texts(4), "labels": torch.tensor(labels)}
    mean = model(**inputs)
    model.config.loss_reduction = "sum"
    total = slow_unicl(mean.logits_per_image, labels)
    assert_close(model(**inputs).loss.item(), total, rtol=1e-5, atol=1e-5)
    assert_close(mean.loss.item(), total / (2 * len(labels)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "got neither"),
        ({"pixel_values": random_pixels(2), "return_loss": True}, "got one of them"),
        ({**random_texts(2), "labels": torch.tensor([0, 1])}, "got one of them"),
        ({"pixel_values": random_pixels(2), **random_texts(3), "return_loss": True}, "as many texts as images"),
        ({"pixel_values": random_pixels(2), **random_texts(2), "labels": torch.tensor([0, 1, 2])}, r"shape \(2,\)"),
        ({"pixel_values": random_pixels(2), **random_texts(2), "labels": torch.tensor([0.0, 1.0])}, "float32"),
        ({"pixel_values": random_pixels(2) * math.nan}, "finite"),
        ({"pixel_values": random_pixels(2)[:, :2]}, "3, height"),
        ({"input_ids": torch.full((1, 3), VOCABULARY)}, str(VOCABULARY)),
    ],
)
def test_bad_input_is_refused(inputs, message):
    with pytest.raises(ValueError, match=message):
        tiny_model()(**inputs)


@pytest.mark.parametrize(
    ("bound", "reached"), [({}, 100.0), ({"max_logit_scale": 20}, 20.0), ({"max_logit_scale": None}, math.exp(7))]
)
def test_the_temperature_stops_at_its_bound(bound, reached):
    model = tiny_model(**bound)
    with torch.no_grad():
        model.logit_scale.fill_(7.0)
    output = model(pixel_values=random_pixels(2), **random_texts(2))
    assert_close(output.logit_scale.item(), reached)
    assert_close(output.logits_per_image, output.logit_scale * output.image_embeds @ output.text_embeds.T)


def test_half_precision_keeps_logits_and_loss_in_single(tmp_path):
    model = tiny_model()
    inputs = {"pixel_values": random_pixels(4), **random_texts(4), "labels": torch.tensor([0, 0, 1, 2])}
    expected = model(**inputs)
    model.save_pretrained(tmp_path)
    half = FlorenceModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    output = half(**inputs)  # pixels in float32: the tower casts them
    assert half.dtype == output.image_embeds.dtype == torch.bfloat16
    assert output.logits_per_image.dtype == output.loss.dtype == output.logit_scale.dtype == torch.float32
    assert F.cosine_similarity(output.image_embeds.float(), expected.image_embeds).min() > 0.999
    assert F.cosine_similarity(output.text_embeds.float(), expected.text_embeds).min() > 0.999
    assert_close(output.loss, expected.loss, rtol=0.05, atol=0.05)


def test_sdpa_and_eager_agree():
    model = tiny_model()
    inputs = {"pixel_values": random_pixels(3), **random_texts(3)}
    model.set_attn_implementation("sdpa")
    sdpa = model(**inputs)
    model.set_attn_implementation({"vision_config": "eager", "text_config": "eager"})
    assert model.vision_model.config._attn_implementation == "eager"
    eager = model(**inputs, output_attentions=True)
    assert_close(eager.logits_per_image, sdpa.logits_per_image, atol=1e-4, rtol=1e-5)
    assert len(eager.vision_model_output.attentions) == sum(model.config.vision_config.depths)
    assert len(eager.text_model_output.attentions) == model.config.text_config.num_hidden_layers


def training_gradients(model: FlorenceModel) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.train()
    inputs = {"pixel_values": random_pixels(3), **random_texts(3), "labels": torch.tensor([0, 1, 1])}
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def test_every_parameter_gets_a_gradient():
    model = tiny_model(vision_config=tiny_vision_config(layer_scale_init_value=0.5, drop_path_rate=0.0))
    _, gradients = training_gradients(model)
    for name, gradient in gradients.items():
        assert gradient is not None, name
        assert torch.isfinite(gradient).all(), name
        # A constant added to every key changes no softmax, and of the window's offsets some lie outside of small maps.
        assert name.endswith("k_proj.bias") or gradient.abs().max() > 0, name


@pytest.mark.filterwarnings("ignore:.*checkpointing:FutureWarning")  # its new name is younger than our floor
def test_gradient_checkpointing_changes_no_gradient():
    overrides = {"vision_config": tiny_vision_config(drop_path_rate=0.0)}
    model = tiny_model(**overrides)
    copy = FlorenceModel(tiny_config(**overrides))
    copy.load_state_dict(model.state_dict())
    copy.gradient_checkpointing_enable()
    assert copy.is_gradient_checkpointing and copy.vision_model.encoder.stages[0].layers[0].gradient_checkpointing
    loss, gradients = training_gradients(model)
    loss_again, gradients_again = training_gradients(copy)
    assert_close(loss_again, loss)
    assert_close(gradients_again, gradients)


def test_save_and_load(tmp_path):
    model = tiny_model(logit_scale_init_value=1.0, loss_reduction="sum")
    model.save_pretrained(tmp_path)
    loaded, info = FlorenceModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    inputs = {"pixel_values": random_pixels(2), **random_texts(2), "return_loss": True}
    expected, got = model(**inputs), loaded(**inputs)
    assert torch.equal(got.logits_per_image, expected.logits_per_image) and torch.equal(got.loss, expected.loss)


def test_the_whole_forgives_no_unknown_weight(tmp_path):
    """The towers pass over each other's weights; that must not make the dual encoder blind."""
    model = tiny_model()
    weights = {**model.state_dict(), "text_model.unknown": torch.ones(1), "vision_model.unknown": torch.ones(1)}
    model.save_pretrained(tmp_path, state_dict=weights)
    _, info = FlorenceModel.from_pretrained(tmp_path, output_loading_info=True)
    assert sorted(info["unexpected_keys"]) == ["text_model.unknown", "vision_model.unknown"]


@pytest.mark.parametrize("tower", [FlorenceVisionModel, FlorenceTextModel])
def test_a_tower_loads_from_a_dual_encoder_and_from_its_own_folder(tmp_path, tower):
    model = tiny_model()
    model.save_pretrained(tmp_path / "both")
    inputs = {"pixel_values": random_pixels(2)} if tower is FlorenceVisionModel else random_texts(2)
    expected = getattr(model, tower.base_model_prefix)(**inputs).pooler_output
    for source, target in (("both", "one"), ("one", "again")):
        loaded, info = tower.from_pretrained(tmp_path / source, output_loading_info=True)
        assert not info["missing_keys"] and not info["mismatched_keys"]
        assert torch.equal(loaded(**inputs).pooler_output, expected)
        loaded.save_pretrained(tmp_path / target)


@pytest.mark.parametrize("head", [FlorenceForImageClassification, FlorenceBackbone])
def test_a_head_loads_the_tower_from_wherever_it_is(tmp_path, head):
    model = tiny_model()
    model.save_pretrained(tmp_path / "both")
    FlorenceVisionModel.from_pretrained(tmp_path / "both").save_pretrained(tmp_path / "tower")
    new = "classifier." if head is FlorenceForImageClassification else "feature_norms."
    for source in ("both", "tower"):
        loaded, info = head.from_pretrained(tmp_path / source, output_loading_info=True)
        assert info["missing_keys"] and all(name.startswith(new) for name in info["missing_keys"])
        for name, tensor in loaded.vision_model.named_parameters():
            assert torch.equal(tensor, model.vision_model.get_parameter(name)), name
        loaded.save_pretrained(tmp_path / "head")
        again, info = head.from_pretrained(tmp_path / "head", output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert_close(dict(again.state_dict()), dict(loaded.state_dict()), rtol=0, atol=0)


def classifier(num_labels: int, **fields) -> FlorenceForImageClassification:
    return FlorenceForImageClassification(
        tiny_vision_config(num_labels=num_labels, drop_path_rate=0.0, **fields)
    ).eval()


def test_a_classifier_is_linear_on_the_pooled_tower_and_its_loss_is_cross_entropy():
    model = classifier(5)
    pixels, labels = random_pixels(3), torch.tensor([4, 0, 2])
    output = model(pixels, labels=labels)
    pooled = model.vision_model(pixels).pooler_output
    logits = pooled @ model.classifier.weight.T + model.classifier.bias
    assert_close(output.logits, logits)
    likelihoods = logits.double().softmax(-1)[range(3), labels.tolist()]
    assert_close(output.loss.item(), -likelihoods.log().mean().item(), rtol=1e-5, atol=1e-6)
    ignored = model(pixels, labels=torch.tensor([4, -100, -100])).loss
    assert_close(ignored.item(), -likelihoods[0].log().item(), rtol=1e-5, atol=1e-6)


def test_problem_types():
    pixels = random_pixels(3)
    one = classifier(1)
    target = torch.tensor([0.5, -1.0, 2.0])
    output = one(pixels, labels=target)
    assert_close(output.loss, (output.logits[:, 0] - target).square().mean())
    many = classifier(4, problem_type="multi_label_classification")
    targets = torch.tensor([[1.0, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]])
    output = many(pixels, labels=targets)
    likelihoods = torch.where(targets == 1, output.logits.sigmoid(), 1 - output.logits.sigmoid())
    assert_close(output.loss, -likelihoods.log().mean())
    values = classifier(4, problem_type="regression")
    output = values(pixels, labels=targets)
    assert_close(output.loss, (output.logits - targets).square().mean())


def test_a_half_precision_classifier_has_its_loss_in_single():
    model = classifier(5).to(torch.bfloat16)
    output = model(random_pixels(3), labels=torch.tensor([4, 0, 2]))
    assert output.logits.dtype == torch.bfloat16
    assert_close(output.loss, F.cross_entropy(output.logits.float(), torch.tensor([4, 0, 2])))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, 2], "list"),
        (torch.tensor([0, 1]), r"\(3,\) or \(3, 5\)"),
        (torch.zeros(3, 4), r"\(3,\) or \(3, 5\)"),
        (torch.tensor([0, 1, 5]), "from 0 to 4"),
        (torch.tensor([0, -1, 1]), "got -1"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        classifier(5)(random_pixels(3), labels=labels)


def test_a_classifier_takes_its_labels_from_a_dual_encoders_configuration():
    names = {0: "cat", 1: "dog", 2: "fox"}
    numbers = {name: number for number, name in names.items()}
    config = tiny_config(id2label=names, label2id=numbers, problem_type="single_label_classification")
    model = FlorenceForImageClassification(config)
    assert model.config.id2label == names and model.config.label2id == numbers
    assert model.config.problem_type == "single_label_classification"
    assert model.config.embed_dims == config.vision_config.embed_dims
    assert model(random_pixels(1)).logits.shape == (1, 3)
