"""Configurations of open-set detectors: towers of a dual encoder, round trips, errors."""

import pytest

from tests.tiny_florence import save_tiny, tiny_config, tiny_text_config, tiny_vision_config
from transformers_florence import FlorenceConfig
from transformers_florence.configuration_florence_zero_shot_detection import FlorenceZeroShotDetectionConfig


def tiny(**fields) -> FlorenceZeroShotDetectionConfig:
    towers = {"vision_config": tiny_vision_config().to_dict(), "text_config": tiny_text_config().to_dict()}
    for name in ("out_features", "out_indices"):
        towers["vision_config"].pop(name)
    return FlorenceZeroShotDetectionConfig(**{**towers, "hidden_size": 32, **fields})


def test_it_has_the_towers_of_a_dual_encoder():
    dual = tiny_config(max_logit_scale=50.0, logit_scale_init_value=1.0)
    config = FlorenceZeroShotDetectionConfig.from_dual_config(dual, hidden_size=32, naming="region")
    vision, expected = (each.to_dict() for each in (config.vision_config, dual.vision_config))
    own = {"out_features", "out_indices", "dtype"}
    assert {name: vision[name] for name in vision.keys() - own} == {
        name: expected[name] for name in vision.keys() - own
    }
    assert config.vision_config.out_features == ["stage1", "stage2"] and config.strides == [4, 8, 16, 32]
    assert config.text_config == dual.text_config and config.projection_dim == dual.projection_dim
    assert (config.max_logit_scale, config.logit_scale_init_value, config.naming) == (50.0, 1.0, "region")


def test_windows_are_the_dual_encoders():
    """Unlike a detector's, whose tower sees whole pictures alone."""
    assert tiny().vision_config.window_padding == "clamp"
    vision = tiny_vision_config(window_padding="pad")
    assert FlorenceZeroShotDetectionConfig(vision_config=vision).vision_config.window_padding == "pad"
    dual = tiny_config(vision_config=vision)
    assert FlorenceZeroShotDetectionConfig.from_dual_config(dual).vision_config.window_padding == "pad"


@pytest.mark.parametrize("naming", ["crop", "region", "text_head"])
def test_saved_and_loaded(naming, tmp_path):
    config = tiny(naming=naming, num_proposals=7, crop_margin=0.5, background_texts=["a wall"])
    config.save_pretrained(tmp_path)
    again = FlorenceZeroShotDetectionConfig.from_pretrained(tmp_path)
    assert again == config and again.background_texts == ["a wall"]
    assert again != tiny(naming=naming)


def test_from_a_folder_with_a_dual_encoder(tmp_path):
    save_tiny(tmp_path)
    config = FlorenceZeroShotDetectionConfig.from_pretrained(tmp_path, num_proposals=3)
    assert config.num_proposals == 3
    assert config.text_config.vocab_size == FlorenceConfig.from_pretrained(tmp_path).text_config.vocab_size


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"naming": "words"}, "`naming`: expected one of 'crop', 'region', 'text_head', got 'words'"),
        ({"num_proposals": 0}, "`num_proposals`: expected an integer between 1 and 10000, got 0"),
        ({"crop_margin": -0.1}, "`crop_margin`: expected a finite number from 0 up to 10, got -0.1"),
        ({"background_texts": "a wall"}, "`background_texts`: expected a list of texts, got 'a wall'"),
        ({"background_texts": [""]}, "`background_texts`: expected a list of texts"),
        ({"projection_dim": 0}, "`projection_dim`: expected an integer between 1"),
        ({"max_logit_scale": 0}, "`max_logit_scale`: expected a finite number above 0"),
        ({"text_config": 3}, "`text_config`: expected a FlorenceTextConfig, a dictionary or None, got 3"),
        (
            {"text_config": {"model_type": "bert"}},
            "expected 'florence_text_model', got 'bert'",
        ),
        ({"text_config": {"hidden_size": 0}}, "`hidden_size`: expected an integer between 1"),
        ({"vision_config": {"model_type": "swin"}}, "`vision_config.model_type`: expected 'florence_vision_model'"),
        ({"hidden_size": 33}, "`hidden_size`: expected a multiple of 16, got 33"),
    ],
)
def test_impossible_values(fields, message):
    with pytest.raises(ValueError, match=message):
        tiny(**fields)
