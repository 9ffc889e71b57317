"""Triplets: which pixels a picture becomes, which text is drawn, and which label it has."""

import collections
import io

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from tests.tiny_shards import BROKEN, DECODER, numbers_of, png, sentence
from transformers_florence.data.prompts import PHOTO_TEMPLATES
from transformers_florence.data.sources import text_label
from transformers_florence.data.triplets import BadSampleError, PictureDecoder, PixelNormalizer, TripletMaker
from transformers_florence.image_processing_florence import FlorenceImageProcessor
from transformers_florence.image_processing_pil_florence import FlorenceImageProcessorPil

# Pictures


@pytest.mark.parametrize(
    "settings",
    [
        dict(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 24}),
        dict(size={"height": 24, "width": 32}, do_center_crop=False),
        dict(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_mean=0.1, image_std=[1, 2, 3]),
        dict(crop_size={"height": 16, "width": 16}, do_resize=False, do_normalize=False),
        dict(crop_size={"height": 16, "width": 16}, do_resize=False, do_rescale=False),
    ],
    ids=["crop", "squash", "own normalisation", "no normalisation", "no rescaling"],
)
def test_decoded_and_normalised_pictures_are_the_processors(settings):
    rng = np.random.default_rng(0)
    buffer = io.BytesIO()
    PILImage.fromarray(rng.integers(0, 256, (50, 70, 4), np.uint8)).save(buffer, "PNG")
    picture = {"bytes": buffer.getvalue(), "path": None}
    processor = FlorenceImageProcessorPil(**settings)
    wanted = processor(PILImage.open(buffer), return_tensors="pt")["pixel_values"]
    pixels = PictureDecoder(FlorenceImageProcessor(**settings))(picture)
    assert pixels.dtype == torch.uint8
    normalised = PixelNormalizer(processor)(pixels[None])
    assert normalised.dtype == torch.float32
    torch.testing.assert_close(normalised, wanted.float(), rtol=0, atol=1e-6 * max(1, wanted.abs().max()))


def test_a_picture_is_read_from_its_path(tmp_path):
    (tmp_path / "a.png").write_bytes(png(300))
    pixels = DECODER({"bytes": None, "path": str(tmp_path / "a.png")})
    assert numbers_of({"pixels": pixels[None]}) == [300]


@pytest.mark.parametrize(
    "image",
    [
        None,
        {"bytes": None, "path": None},
        {"bytes": BROKEN, "path": None},
        {"bytes": b"", "path": "x.png"},
        {"bytes": png(1)[:-25], "path": None},
        {"bytes": None, "path": "nowhere/x.png"},
        {"bytes": png(1, (1, 500)), "path": None},
    ],
    ids=["nothing", "empty", "garbage", "no bytes", "truncated", "no file", "a line"],
)
def test_what_is_no_picture_is_a_bad_sample_with_its_name(image):
    with pytest.raises(BadSampleError, match="^row 7"):
        DECODER(image, "row 7")


def test_a_processor_without_a_fixed_size_is_refused():
    with pytest.raises(ValueError, match="expected an image processor that crops, or resizes to a height and a width"):
        PictureDecoder(FlorenceImageProcessor(do_center_crop=False))


# Texts and labels


def make(texts: list[str], is_label: bool = False, seed: int = 0, **options) -> dict:
    row = {"image": {"bytes": png(1), "path": None}, "texts": texts, "is_label": is_label}
    return TripletMaker(DECODER, **options)(row, np.random.default_rng(seed), "row 0")


def test_a_sentence_stays_and_a_phrase_comes_into_a_template():
    long = make(["two dogs run on a beach"])
    assert (long["text"], long["templated"]) == ("two dogs run on a beach", False)
    drawn = [make(["wild dog"], seed=seed) for seed in range(60)]
    assert all(sample["templated"] for sample in drawn)
    texts = {sample["text"] for sample in drawn}
    assert texts <= {template.replace("{}", "wild dog") for template in PHOTO_TEMPLATES} and len(texts) > 20
    assert {sample["label"] for sample in drawn} == {text_label("Wild  DOG")}, "the label is the bare text's"


def test_the_name_of_a_class_comes_into_a_template_however_long():
    sample = make(["a very long name of a class"], is_label=True, templates=["here is {}!"])
    assert (sample["text"], sample["templated"]) == ("here is a very long name of a class!", True)


def test_each_caption_is_drawn_as_often():
    captions = [sentence(n) for n in range(4)]
    drawn = collections.Counter(make(captions, seed=seed)["text"] for seed in range(400))
    assert set(drawn) == set(captions) and min(drawn.values()) > 70
    assert make(captions, seed=3)["label"] == text_label(make(captions, seed=3)["text"])


def test_the_second_stage_draws_no_short_text():
    captions = ["dog", "a dog runs on the beach", "wild dog"]
    drawn = [make(captions, seed=seed, leave_out_templated=True) for seed in range(20)]
    assert {sample["text"] for sample in drawn} == {captions[1]} and not any(s["templated"] for s in drawn)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(templates=[]), "at least one template"),
        (dict(templates="{}"), "a list of at least one template"),
        (dict(templates=["a {}", "b"]), "exactly one {}"),
        (dict(short_words=-1), "short_words of at least 0, got -1"),
    ],
)
def test_impossible_makers_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TripletMaker(DECODER, **options)
