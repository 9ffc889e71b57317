"""Zero-shot classifiers: the prompt ensemble in closed form, batching without effect, any CLIP-like model."""

import json
import math

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from tests.tiny_florence import CONTEXT, DIM, SIDE, VOCABULARY, random_pixels, tiny_model, tiny_tokenizer
from transformers_florence.evaluation.zero_shot import (
    build_zero_shot_classifier,
    embed_pixels,
    embed_texts,
    top_k_accuracy,
)

LABELS = ["cat", "a green bicycle", "mountains, rivers and houses", "dog"]
TEMPLATES = ["{}", "a photo of a {}.", "{} drawing"]


def tiny_clip() -> tuple[CLIPModel, CLIPTokenizer]:
    """transformers' own CLIP with random weights, and its own tokenizer with our vocabulary."""
    learnt = json.loads(tiny_tokenizer().backend_tokenizer.to_str())["model"]
    tokenizer = CLIPTokenizer(
        vocab=learnt["vocab"], merges=[tuple(merge) for merge in learnt["merges"]], model_max_length=CONTEXT
    )
    shared = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": VOCABULARY, "max_position_embeddings": CONTEXT, "eos_token_id": tokenizer.eos_token_id}
    config = CLIPConfig(
        text_config={**shared, **text, "bos_token_id": tokenizer.bos_token_id},
        vision_config={**shared, "image_size": SIDE, "patch_size": 8},
        projection_dim=DIM,
    )
    return CLIPModel(config).eval(), tokenizer


@pytest.fixture(params=["florence", "clip"])
def dual_encoder(request):
    return (tiny_model(), tiny_tokenizer()) if request.param == "florence" else tiny_clip()


def slow_unit(vector: torch.Tensor) -> torch.Tensor:
    return vector / math.sqrt(sum(value**2 for value in vector.tolist()))


@torch.no_grad()
def slow_text(model, tokenizer, text: str) -> torch.Tensor:
    """One text alone, without padding."""
    tokens = tokenizer(text, return_tensors="pt", truncation=True)
    return slow_unit(model.get_text_features(**tokens).pooler_output[0])


@torch.no_grad()
def test_the_classifier_is_the_mean_of_unit_vectors_made_unit(dual_encoder):
    model, tokenizer = dual_encoder
    classifier = build_zero_shot_classifier(model, tokenizer, LABELS, TEMPLATES)
    assert classifier.shape == (len(LABELS), DIM) and classifier.dtype == torch.float32
    for label, row in zip(LABELS, classifier, strict=True):
        embeds = [slow_text(model, tokenizer, template.format(label)) for template in TEMPLATES]
        assert_close(row, slow_unit(sum(embeds) / len(embeds)), atol=1e-6, rtol=0)


@torch.no_grad()
def test_pictures_are_classified_as_the_model_itself_does(dual_encoder):
    """One template, and the product of the unit vectors: what `forward` returns, but for the temperature."""
    model, tokenizer = dual_encoder
    pixels = random_pixels(5)
    classifier = build_zero_shot_classifier(model, tokenizer, LABELS, ["a photo of a {}"])
    scores = embed_pixels(model, pixels) @ classifier.T
    tokens = tokenizer(
        [f"a photo of a {label}" for label in LABELS], return_tensors="pt", padding=True, truncation=True
    )
    wanted = model(pixel_values=pixels, **tokens).logits_per_image / model.logit_scale.exp()
    assert_close(scores, wanted, atol=1e-6, rtol=0)


def test_batches_do_not_change_vectors(dual_encoder):
    model, tokenizer = dual_encoder
    texts = [template.format(label) for label in LABELS for template in TEMPLATES]
    whole, pixels = embed_texts(model, tokenizer, texts), random_pixels(7)
    pictures = embed_pixels(model, pixels)
    for batch_size in (1, 2, 5):
        assert_close(embed_texts(model, tokenizer, texts, batch_size=batch_size), whole, atol=1e-6, rtol=0)
        assert_close(embed_pixels(model, pixels, batch_size=batch_size), pictures, atol=1e-6, rtol=0)
        classifier = build_zero_shot_classifier(model, tokenizer, LABELS, TEMPLATES, batch_size=batch_size)
        assert_close(classifier, build_zero_shot_classifier(model, tokenizer, LABELS, TEMPLATES), atol=1e-6, rtol=0)
    assert_close(whole.norm(dim=1), torch.ones(len(texts)))
    assert_close(pictures.norm(dim=1), torch.ones(7))


def test_the_text_tower_runs_once_for_a_label_set():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    sizes: list[int] = []
    model.text_model.register_forward_hook(lambda module, inputs, output: sizes.append(len(output.pooler_output)))
    classifier = build_zero_shot_classifier(model, tokenizer, LABELS, TEMPLATES, batch_size=5)
    assert sizes == [5, 5, 2]  # 4 labels in 3 templates
    for _ in range(3):
        embed_pixels(model, random_pixels(4)) @ classifier.T
    assert sizes == [5, 5, 2], "pictures must not cost texts"


def test_a_text_beyond_the_context_is_cut():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    long = "cat " * 100
    assert_close(embed_texts(model, tokenizer, [long]), slow_text(model, tokenizer, long)[None], atol=1e-6, rtol=0)


def test_half_precision_models_give_float32_vectors(dual_encoder):
    model, tokenizer = dual_encoder
    texts, pixels = embed_texts(model, tokenizer, LABELS), embed_pixels(model, random_pixels())
    model.to(torch.bfloat16)
    for half, whole in (
        (embed_texts(model, tokenizer, LABELS), texts),
        (embed_pixels(model, random_pixels()), pixels),
    ):
        assert half.dtype == torch.float32
        assert_close(half.norm(dim=1), torch.ones(len(half)))  # normalised after the cast, not before
        assert (F.cosine_similarity(half, whole) > 0.99).all()


def test_a_classifier_may_stand_in_a_training_step():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    classifier = build_zero_shot_classifier(model, tokenizer, LABELS, TEMPLATES)
    assert not classifier.requires_grad
    embeds = model.get_image_features(random_pixels(4)).pooler_output
    F.cross_entropy(embeds @ classifier.T, torch.arange(4)).backward()
    assert model.visual_projection.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("empty", [[], (), "", "cat"])
def test_what_is_no_list_of_texts_is_refused(empty):
    """One text alone too: it would be read as the list of its letters."""
    model, tokenizer = tiny_model(), tiny_tokenizer()
    with pytest.raises(ValueError, match="expected a list of at least one of labels"):
        build_zero_shot_classifier(model, tokenizer, empty, TEMPLATES)
    with pytest.raises(ValueError, match="expected a list of at least one of templates"):
        build_zero_shot_classifier(model, tokenizer, LABELS, empty)
    with pytest.raises(ValueError, match="expected a list of at least one of texts"):
        embed_texts(model, tokenizer, empty)


def test_a_template_without_a_place_and_no_pictures_are_refused():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    with pytest.raises(ValueError, match="exactly one {}"):
        build_zero_shot_classifier(model, tokenizer, LABELS, ["a photo"])
    with pytest.raises(ValueError, match="at least one picture"):
        embed_pixels(model, torch.zeros(0, 3, SIDE, SIDE))


@pytest.mark.parametrize("k", [1, 2, 5, 9])
def test_top_k_accuracy_equals_a_loop(k):
    scores = torch.randn(40, 9)
    targets = torch.randint(9, (40,))
    hits = 0
    for row, target in zip(scores.tolist(), targets.tolist(), strict=True):
        hits += sum(other > row[target] for other in row) < k
    assert top_k_accuracy(scores, targets, k) == pytest.approx(hits / 40)


@pytest.mark.parametrize("k", [0, 10])
def test_top_k_must_lie_within_the_columns(k):
    with pytest.raises(ValueError, match=f"expected k between 1 and 9, got {k}"):
        top_k_accuracy(torch.randn(4, 9), torch.zeros(4, dtype=torch.long), k)


@pytest.mark.parametrize(("scores", "targets"), [((0, 9), (0,)), ((4, 9), (3,)), ((4, 9), (4, 1)), ((9,), (9,))])
def test_top_k_takes_one_target_a_row(scores, targets):
    with pytest.raises(ValueError, match="expected scores"):
        top_k_accuracy(torch.zeros(scores), torch.zeros(targets, dtype=torch.long), 1)
