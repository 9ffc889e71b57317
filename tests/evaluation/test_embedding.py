"""Vectors of pictures on disk: those of the same pixels by hand, whatever the model, with unreadable ones counted."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from torch.testing import assert_close

from tests.tiny_clip import tiny_clip, tiny_clip_image_processor, tiny_siglip
from tests.tiny_florence import tiny_image_processor, tiny_model
from transformers_florence.evaluation.embedding import check_features, embed_pictures

COUNT = 5
MODELS = {
    "florence": lambda: (tiny_model(), tiny_image_processor()),
    "clip": lambda: (tiny_clip()[0], tiny_clip_image_processor()),
    "siglip": lambda: (tiny_siglip()[0], tiny_clip_image_processor()),
}


@pytest.fixture
def files(tmp_path):
    rng = np.random.default_rng(0)
    paths = [tmp_path / f"{number}.png" for number in range(COUNT)]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (40, 36, 3), dtype=np.uint8)).save(path)
    return paths


@torch.no_grad()
@pytest.mark.parametrize("kind", MODELS)
def test_vectors_are_the_models_own(files, kind):
    model, processor = MODELS[kind]()
    pixels = processor(images=[Image.open(path) for path in files], return_tensors="pt")["pixel_values"]
    pooled = model.vision_model(pixel_values=pixels).pooler_output
    projected = model.get_image_features(pixel_values=pixels).pooler_output
    tower, readable = embed_pictures(model, processor, files, tower=True, batch_size=2)
    shared, _ = embed_pictures(model, processor, files, batch_size=3)
    assert readable.tolist() == [True] * COUNT
    assert_close(tower, pooled, atol=1e-5, rtol=1e-5)
    assert_close(shared, F.normalize(projected, dim=-1), atol=1e-5, rtol=1e-5)


def test_a_tower_alone_has_features(files):
    model, processor = MODELS["florence"]()
    tower, _ = embed_pictures(model.vision_model, processor, files, tower=True)
    assert torch.equal(tower, embed_pictures(model, processor, files, tower=True)[0])


def test_flipped_pictures(files):
    model, processor = MODELS["florence"]()
    mirrored = [Image.open(path).transpose(Image.Transpose.FLIP_LEFT_RIGHT) for path in files]
    flipped, _ = embed_pictures(model, processor, files, flip=True)
    # Resizing 36 columns to 32 is symmetric, but for the rounding to 8 bits.
    assert_close(flipped, embed_pictures(model, processor, mirrored)[0], atol=1e-3, rtol=0)
    assert (flipped - embed_pictures(model, processor, files)[0]).abs().max() > 1e-2


def test_pictures_that_cannot_be_read_are_left_out_and_told(files, tmp_path):
    model, processor = MODELS["clip"]()
    whole, _ = embed_pictures(model, processor, files)
    files[1].write_bytes(files[1].read_bytes()[:60])
    files[3].write_text("no picture")
    for batch_size in (1, 4):
        some, readable = embed_pictures(model, processor, [*files, tmp_path / "absent.png"], batch_size=batch_size)
        assert readable.tolist() == [True, False, True, False, True, False]
        assert_close(some, whole[[0, 2, 4]], atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="expected at least one picture that can be read, got none among 2"):
        embed_pictures(model, processor, [files[1], files[3]])


def test_a_broken_model_is_told(files):
    model, processor = MODELS["florence"]()
    with torch.no_grad():
        model.visual_projection.weight[0, 0] = float("inf")
    with pytest.raises(ValueError, match="expected finite features, got NaN or infinity in 5 of 5 rows"):
        embed_pictures(model, processor, files)


@pytest.mark.parametrize("shape", [(3,), (0, 4), (3, 0), (2, 3, 4)])
def test_features_have_a_row_a_picture(shape):
    with pytest.raises(ValueError, match="expected features of shape"):
        check_features(torch.zeros(shape))
