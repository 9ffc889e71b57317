"""Zero-shot classifiers: the prompt ensemble in closed form, batching without effect, any CLIP-like model."""

import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.metrics import f1_score
from torch.nn import functional as F
from torch.testing import assert_close

from tests.tiny_clip import tiny_clip, tiny_siglip
from tests.tiny_florence import CONTEXT, DIM, SIDE, random_pixels, tiny_model, tiny_tokenizer
from transformers_florence.evaluation.zero_shot import (
    ZeroShotClassifier,
    best_thresholds,
    build_zero_shot_classifier,
    embed_pixels,
    embed_texts,
    text_fingerprint,
    top_k_accuracy,
)

LABELS = ["cat", "a green bicycle", "mountains, rivers and houses", "dog"]
TEMPLATES = ["{}", "a photo of a {}.", "{} drawing"]


@pytest.fixture(params=["florence", "clip"])
def dual_encoder(request):
    return (tiny_model(), tiny_tokenizer()) if request.param == "florence" else tiny_clip()


@pytest.fixture
def built():
    """A model, its tokenizer, a classifier, and unit vectors of seven pictures."""
    model, tokenizer = tiny_model(), tiny_tokenizer()
    return (
        model,
        tokenizer,
        ZeroShotClassifier.build(model, tokenizer, LABELS, TEMPLATES),
        embed_pixels(model, random_pixels(7)),
    )


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


@torch.no_grad()
@pytest.mark.parametrize("kind", ["florence", "clip", "siglip"])
def test_logits_are_the_models_own(kind):
    """With temperature, SigLIP's bias, and SigLIP's padding: what `forward` returns for one template."""
    model, tokenizer = {"clip": tiny_clip, "siglip": tiny_siglip}.get(kind, lambda: (tiny_model(), tiny_tokenizer()))()
    labels = ["cat", "dog"]  # shorter than the context, so that padding makes a difference
    classifier = ZeroShotClassifier.build(model, tokenizer, labels, ["a photo of a {}"])
    texts = [f"a photo of a {label}" for label in labels]
    padding = "max_length" if kind == "siglip" else True
    tokens = tokenizer(texts, return_tensors="pt", padding=padding, truncation=True)
    assert kind == "siglip" or tokens["input_ids"].shape[1] < CONTEXT
    wanted = model(pixel_values=random_pixels(5), **tokens).logits_per_image
    assert_close(classifier.logits(embed_pixels(model, random_pixels(5))), wanted, atol=1e-5, rtol=1e-5)


def test_a_classifier_in_the_cache_costs_no_text(tmp_path):
    model, tokenizer = tiny_model(), tiny_tokenizer()
    calls: list[int] = []
    model.text_model.register_forward_hook(lambda *of: calls.append(1))
    first = ZeroShotClassifier.build(model, tokenizer, LABELS, TEMPLATES, cache=tmp_path)
    runs = len(calls)
    again = ZeroShotClassifier.build(model, tokenizer, LABELS, TEMPLATES, cache=tmp_path)
    assert runs > 0 and len(calls) == runs
    assert torch.equal(again.weight, first.weight)
    assert (again.labels, again.templates, again.scale, again.bias) == (
        tuple(LABELS),
        tuple(TEMPLATES),
        first.scale,
        0,
    )
    ZeroShotClassifier.build(model, tokenizer, LABELS[:2], TEMPLATES, cache=tmp_path)
    ZeroShotClassifier.build(model, tokenizer, LABELS, TEMPLATES[:2], cache=tmp_path)
    with torch.no_grad():
        model.text_projection.weight.add_(0.1)
    other = ZeroShotClassifier.build(model, tokenizer, LABELS, TEMPLATES, cache=tmp_path)
    assert not torch.equal(other.weight, first.weight), "another model"
    assert len(list(tmp_path.iterdir())) == 4


def test_what_a_text_does_not_see_does_not_change_the_fingerprint():
    model, tokenizer = tiny_model(), tiny_tokenizer()
    before = text_fingerprint(model, tokenizer)
    with torch.no_grad():
        model.visual_projection.weight.add_(1)
        next(model.vision_model.parameters()).add_(1)
    assert text_fingerprint(model, tokenizer) == before
    with torch.no_grad():
        model.logit_scale.add_(1)  # the classifier holds it
    assert text_fingerprint(model, tokenizer) != before


def test_a_saved_classifier_is_the_same_one(built, tmp_path):
    *_, classifier, embeds = built
    present = torch.rand(7, len(LABELS)) < 0.5
    present[0] = True
    classifier = classifier.calibrate(embeds, present)
    classifier.save(tmp_path / "pets.safetensors")
    other = ZeroShotClassifier.load(tmp_path / "pets.safetensors")
    assert torch.equal(other.logits(embeds), classifier.logits(embeds))
    assert torch.equal(other.present(embeds), classifier.present(embeds))
    assert (other.labels, other.templates, other.fingerprint) == (
        classifier.labels,
        classifier.templates,
        classifier.fingerprint,
    )
    assert [path.name for path in tmp_path.iterdir()] == ["pets.safetensors"]


def test_what_is_no_saved_classifier_is_refused(built, tmp_path):
    *_, classifier, _ = built
    file = tmp_path / "a.safetensors"
    classifier.save(file)
    save_file(load_file(file), tmp_path / "bare.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(file.read_bytes()[:-9])
    for name in ("bare", "cut", "absent"):
        with pytest.raises(ValueError, match=f"expected a saved classifier, got .*{name}"):
            ZeroShotClassifier.load(tmp_path / f"{name}.safetensors")


def test_thresholds_are_those_of_highest_f1():
    """Against every possible threshold, with scikit-learn's F1; logits of few values, so that many are equal."""
    logits = (torch.randn(40, 5) * 3).round() / 3
    present = torch.rand(40, 5) < torch.tensor([0.05, 0.3, 0.5, 0.9, 1.0])
    present[0] = True
    thresholds = best_thresholds(logits, present, LABELS[:1] * 5)
    for column in range(5):
        truth, values = present[:, column].numpy(), logits[:, column]
        tried = [f1_score(truth, (values >= value).numpy()) for value in values.unique()]
        assert f1_score(truth, (values >= thresholds[column]).numpy()) == pytest.approx(max(tried))


def test_calibration_needs_a_picture_of_each_label(built):
    *_, classifier, embeds = built
    present = torch.ones(7, len(LABELS), dtype=torch.bool)
    with pytest.raises(ValueError, match="calibrate the classifier on a validation split first"):
        classifier.present(embeds)
    with pytest.raises(ValueError, match=r"expected present as bool of shape \(7, 4\), got torch.bool \(7, 3\)"):
        classifier.calibrate(embeds, present[:, 1:])
    present[:, 1] = False
    with pytest.raises(ValueError, match="expected pictures of every label, got none of 'a green bicycle'"):
        classifier.calibrate(embeds, present)


def test_thresholds_come_from_the_pictures_that_count():
    """The decisions on these are those of thresholds from them alone, a label at a time."""
    logits = torch.randn(60, 3)
    present, counted = torch.rand(60, 3) < (logits / 2).sigmoid(), torch.rand(60, 3) < 0.6
    thresholds = best_thresholds(logits, present, "abc", counted)
    for number, rows in enumerate(counted.T):
        column = logits[rows, number]
        alone = best_thresholds(column[:, None], present[rows, number][:, None], "a")
        assert torch.equal(column >= thresholds[number], column >= alone)
    assert not torch.allclose(thresholds, best_thresholds(logits, present, "abc"))
    with pytest.raises(ValueError, match=r"expected counted as bool of shape \(60, 3\), got torch.int64 \(60, 3\)"):
        best_thresholds(logits, present, "abc", counted.long())
    with pytest.raises(ValueError, match="expected pictures of every label, got none of 'a', 'b', 'c'"):
        best_thresholds(logits, present, "abc", ~present)


def test_vectors_that_are_not_finite_or_of_another_length_are_refused(built):
    *_, classifier, embeds = built
    with pytest.raises(ValueError, match="expected vectors of length 12, got 5"):
        classifier.logits(embeds[:, :5])
    embeds[2, 3] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinity in 1 of 7 rows"):
        classifier.logits(embeds)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["cat", "dog", " Cat"], "expected different names, got ' Cat' for the classes 0 and 2"),
        (["cat", "  "], "expected names that are not empty, got '  ' for class 1"),
        (
            ["a b c d e f g h i j k l cat", "a b c d e f g h i j k l dog"],
            "expected labels that differ within 12 tokens",
        ),
    ],
)
def test_labels_that_the_model_cannot_tell_apart_are_refused(labels, message):
    model, tokenizer = tiny_model(), tiny_tokenizer()
    with pytest.raises(ValueError, match=message):
        build_zero_shot_classifier(model, tokenizer, labels, TEMPLATES)
