"""FlorenceProcessor: each side as it is alone, defaults that a call may change, saved and loaded, errors."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer, CLIPTokenizer

from tests.tiny_florence import CONTEXT, SIDE, TEXTS, tiny_image_processor, tiny_model, tiny_processor, tiny_tokenizer
from transformers_florence import (
    FlorenceImageProcessor,
    FlorenceImageProcessorPil,
    FlorenceProcessor,
    FlorenceTokenizer,
)

LONG = "a photo of " * 20


@pytest.fixture
def pictures() -> list[Image.Image]:
    noise = np.random.default_rng(0)
    return [Image.fromarray(noise.integers(0, 256, (40, width, 3), dtype=np.uint8)) for width in (30, 50)]


def test_both_sides_give_what_each_gives_alone(pictures):
    processor = tiny_processor()
    both = processor(images=pictures, text=TEXTS, return_tensors="pt")
    texts = tiny_tokenizer()(TEXTS, padding=True, return_tensors="pt")
    images = tiny_image_processor()(pictures, return_tensors="pt")
    assert set(both) == {"input_ids", "attention_mask", "pixel_values"} == {*texts, *images}
    for name, expected in {**texts, **images}.items():
        assert torch.equal(both[name], expected), name
    assert both["pixel_values"].shape == (2, 3, SIDE, SIDE) and both["input_ids"].shape[0] == len(TEXTS)


def test_one_side_alone(pictures):
    processor = tiny_processor()
    assert set(processor(images=pictures[0], return_tensors="pt")) == {"pixel_values"}
    assert set(processor(text=TEXTS[0], return_tensors="pt")) == {"input_ids", "attention_mask"}


def test_a_model_takes_what_a_processor_gives(pictures):
    inputs = tiny_processor()(images=pictures, text=[*TEXTS, LONG], return_tensors="pt")
    assert tiny_model()(**inputs).logits_per_image.shape == (2, len(TEXTS) + 1)


def test_texts_are_padded_and_cut_unless_the_call_says_otherwise():
    processor = tiny_processor()
    encoded = processor(text=["a cat", LONG])
    assert [len(ids) for ids in encoded["input_ids"]] == [CONTEXT, CONTEXT]
    assert [len(ids) for ids in processor(text=["a cat", "a photo of a cat"])["input_ids"]] == [7, 7]
    assert [len(ids) for ids in processor(text=["a cat", "a photo of a cat"], padding=False)["input_ids"]] == [4, 7]
    assert len(processor(text=[LONG], truncation=False)["input_ids"][0]) > CONTEXT
    assert len(processor(text=[LONG], text_kwargs={"max_length": 5})["input_ids"][0]) == 5


def test_texts_are_cut_with_clips_own_tokenizer_too(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path)
    processor = FlorenceProcessor(tiny_image_processor(), CLIPTokenizer.from_pretrained(tmp_path))
    assert len(processor(text=LONG)["input_ids"]) == CONTEXT


def test_settings_of_the_image_side_reach_it(pictures):
    encoded = tiny_processor()(images=pictures, text=TEXTS, images_kwargs={"do_normalize": False}, return_tensors="pt")
    assert encoded["pixel_values"].min() >= 0 and encoded["pixel_values"].max() <= 1


@pytest.mark.parametrize(
    ("backend", "image_side"), [("torchvision", FlorenceImageProcessor), ("pil", FlorenceImageProcessorPil)]
)
def test_a_saved_processor_is_the_same_processor(pictures, tmp_path, backend, image_side):
    settings = {"size": {"shortest_edge": 36}, "crop_size": {"height": SIDE, "width": SIDE}, "matte": (9, 9, 9)}
    processor = FlorenceProcessor(image_side(**settings), tiny_tokenizer())
    processor.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "processor_config.json").read_text("utf-8"))
    assert saved["processor_class"] == "FlorenceProcessor"
    expected = processor(images=pictures, text=[*TEXTS, LONG], return_tensors="pt")
    for door in (FlorenceProcessor, AutoProcessor):
        loaded = door.from_pretrained(tmp_path, backend=backend)  # transformers does not save the backend
        assert type(loaded) is FlorenceProcessor
        assert type(loaded.tokenizer) is FlorenceTokenizer and type(loaded.image_processor) is image_side
        assert loaded.image_processor.to_dict() == processor.image_processor.to_dict()
        got = loaded(images=pictures, text=[*TEXTS, LONG], return_tensors="pt")
        assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert type(AutoImageProcessor.from_pretrained(tmp_path, backend=backend)) is image_side
    assert type(AutoTokenizer.from_pretrained(tmp_path)) is FlorenceTokenizer


def test_ids_become_text_again():
    processor = tiny_processor()
    ids = processor(text=["A photo of a CAT"])["input_ids"]
    assert processor.batch_decode(ids, skip_special_tokens=True) == ["a photo of a cat"]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "at least one input"),
        ({"text": []}, "empty list"),
        ({"text": ["a cat", None]}, "list of strings"),
        ({"text": 3}, "list of strings"),
        ({"images": []}, "picture|image"),
        ({"images": [None]}, "picture"),
        ({"text": ["a cat"], "videos": [np.zeros((2, 8, 8, 3))]}, "got videos"),
        ({"audio": np.zeros(8)}, "got audio"),
    ],
)
def test_bad_input_is_refused(inputs, message):
    with pytest.raises(ValueError, match=message):
        tiny_processor()(**inputs)


def test_the_two_sides_must_be_what_they_are_called():
    with pytest.raises(TypeError, match="image_processor"):
        FlorenceProcessor(tiny_tokenizer(), tiny_image_processor())
