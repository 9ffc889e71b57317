"""transformers' stock pipelines on saved Florence checkpoints give what the model gives by hand."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from transformers import pipeline
from transformers.utils import logging as transformers_logging

from tests.tiny_florence import CONTEXT, TEXTS, save_tiny, tiny_image_processor, tiny_processor, tiny_tokenizer
from transformers_florence import (
    FlorenceForImageClassification,
    FlorenceModel,
    FlorenceTextModel,
    FlorenceVisionModel,
    bundled_checkpoint,
    loading,
)

LABELS = ["cat", "dog", "red bicycle"]
NAMES = {0: "cat", 1: "dog", 2: "fox", 3: "owl"}
LONG = "a photo of " * 20
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Folders `both`, `vision`, `text` and `classifier`, each with what its pipelines need."""
    root = tmp_path_factory.mktemp("pipelines")
    torch.manual_seed(0)
    save_tiny(root / "both")
    FlorenceVisionModel.from_pretrained(root / "both").save_pretrained(root / "vision")
    FlorenceTextModel.from_pretrained(root / "both").save_pretrained(root / "text")
    numbers = {name: number for number, name in NAMES.items()}
    classifier = FlorenceForImageClassification.from_pretrained(root / "both", id2label=NAMES, label2id=numbers)
    torch.nn.init.normal_(classifier.classifier.weight)
    classifier.save_pretrained(root / "classifier")
    for folder in ("vision", "classifier"):
        tiny_image_processor().save_pretrained(root / folder)
    tiny_tokenizer().save_pretrained(root / "text")
    return root


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    noise = np.random.default_rng(0)
    return [Image.fromarray(noise.integers(0, 256, (40, width, 3), dtype=np.uint8)) for width in (30, 50, 40)]


def pixels(pictures) -> torch.Tensor:
    return tiny_image_processor()(pictures, return_tensors="pt")["pixel_values"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch_size", [1, 2])
def test_zero_shot_image_classification(root, pictures, dtype, batch_size):
    pipe = pipeline("zero-shot-image-classification", model=str(root / "both"), dtype=dtype, batch_size=batch_size)
    assert type(pipe.model) is FlorenceModel and pipe.model.dtype == dtype
    results = pipe(pictures, candidate_labels=LABELS, hypothesis_template="a photo of a {}")
    model = FlorenceModel.from_pretrained(root / "both", dtype=dtype)
    texts = [f"a photo of a {label}" for label in LABELS]
    for picture, result in zip(pictures, results, strict=True):
        inputs = tiny_processor()(images=picture, text=texts, return_tensors="pt")
        expected = model(**inputs).logits_per_image[0].softmax(-1)
        assert [entry["label"] for entry in result] == [LABELS[i] for i in expected.argsort(descending=True)]
        scores = {entry["label"]: entry["score"] for entry in result}
        assert_close(
            [scores[label] for label in LABELS], expected.tolist(), atol=1e-2 if dtype.itemsize == 2 else 1e-6, rtol=0
        )


def test_a_label_longer_than_the_context_is_cut_with_one_warning(root, pictures, caplog):
    transformers_logging.warning_once.cache_clear()
    pipe = pipeline("zero-shot-image-classification", model=str(root / "both"))
    with caplog.at_level(logging.WARNING):
        results = pipe(pictures, candidate_labels=["cat", LONG])
    assert {entry["label"] for result in results for entry in result} == {"cat", LONG}
    about_length = [record.getMessage() for record in caplog.records if "tokens" in record.getMessage()]
    assert len(about_length) == 1 and str(CONTEXT) in about_length[0]


def test_an_empty_list_of_labels_is_refused(root, pictures):
    with pytest.raises(ValueError, match="empty list"):
        pipeline("zero-shot-image-classification", model=str(root / "both"))(pictures[0], candidate_labels=[])


def test_a_bundled_checkpoint_needs_no_path(root, pictures, monkeypatch):
    monkeypatch.setattr(loading, "BUNDLED", root)
    pipe = pipeline("zero-shot-image-classification", model=bundled_checkpoint("both"))
    assert len(pipe(pictures[0], candidate_labels=LABELS)) == len(LABELS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch_size", [1, 2])
def test_image_classification(root, pictures, dtype, batch_size):
    pipe = pipeline("image-classification", model=str(root / "classifier"), dtype=dtype, batch_size=batch_size)
    assert type(pipe.model) is FlorenceForImageClassification and pipe.model.dtype == dtype
    results = pipe(pictures, top_k=len(NAMES))
    expected = FlorenceForImageClassification.from_pretrained(root / "classifier", dtype=dtype)(
        pixels(pictures)
    ).logits
    for result, likelihoods in zip(results, expected.float().softmax(-1), strict=True):
        scores = {entry["label"]: entry["score"] for entry in result}
        got = torch.tensor([scores[NAMES[index]] for index in range(len(NAMES))])
        assert_close(got, likelihoods, atol=2e-2 if dtype.itemsize == 2 else 1e-5, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch_size", [1, 2])
def test_image_feature_extraction(root, pictures, dtype, batch_size):
    pipe = pipeline("image-feature-extraction", model=str(root / "vision"), dtype=dtype, batch_size=batch_size)
    expected = FlorenceVisionModel.from_pretrained(root / "vision", dtype=dtype)(pixels(pictures))
    tolerance = {"atol": 5e-2 if dtype.itemsize == 2 else 1e-5, "rtol": 0}
    for index, result in enumerate(pipe(pictures, return_tensors=True)):
        assert_close(result[0], expected.last_hidden_state[index], **tolerance)
    for index, result in enumerate(pipe(pictures, pool=True, return_tensors=True)):
        assert_close(result[0], expected.pooler_output[index], **tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch_size", [1, 2])
def test_feature_extraction(root, dtype, batch_size):
    pipe = pipeline("feature-extraction", model=str(root / "text"), dtype=dtype, batch_size=batch_size)
    model = FlorenceTextModel.from_pretrained(root / "text", dtype=dtype)
    texts = [*TEXTS[:3], LONG]
    for text, result in zip(texts, pipe(texts, return_tensors=True), strict=True):
        inputs = tiny_tokenizer()(text, return_tensors="pt")
        count = inputs["input_ids"].shape[1]  # a batch adds padding behind
        expected = model(**inputs).last_hidden_state[0]
        assert_close(result[0][:count], expected, atol=1e-1 if dtype.itemsize == 2 else 1e-5, rtol=0)


def test_feature_extraction_on_a_dual_encoder_gives_embeddings(root, pictures):
    model = FlorenceModel.from_pretrained(root / "both")
    images = pipeline("image-feature-extraction", model=str(root / "both"))(pictures[0], return_tensors=True)
    assert_close(
        images[None, 0] if images.ndim == 1 else images, model(pixel_values=pixels(pictures[:1])).image_embeds
    )
    texts = pipeline("feature-extraction", model=str(root / "both"))(TEXTS[0], return_tensors=True)
    assert_close(texts, model(**tiny_tokenizer()(TEXTS[0], return_tensors="pt")).text_embeds)
