"""The detector's configuration: what follows from it, what it refuses, and that a saved one comes back."""

import pytest
from transformers import AutoConfig

from transformers_florence.configuration_florence import VISION_SIZES, FlorenceConfig, FlorenceVisionConfig
from transformers_florence.configuration_florence_detection import FlorenceDetectionConfig


def test_the_tower_is_made_for_detection():
    for config in (FlorenceDetectionConfig(), FlorenceDetectionConfig.from_size("tiny")):
        assert config.vision_config.window_padding == "pad"
        assert list(config.vision_config.out_features) == ["stage2", "stage3", "stage4"]
        assert config.strides == [8, 16, 32, 64, 128]
        assert (config.hidden_size, config.num_blocks, config.offset_layout) == (256, 6, "crop")
    assert FlorenceDetectionConfig.from_size("nano").vision_config.embed_dim == VISION_SIZES["nano"]["embed_dim"]


def test_a_configuration_is_taken_as_it_is_and_fields_are_completed():
    vision = FlorenceVisionConfig(depths=[1, 1], num_heads=[1, 1], window_padding="clamp", out_features=["stage2"])
    assert FlorenceDetectionConfig(vision_config=vision).vision_config is vision
    assert FlorenceDetectionConfig(vision_config=vision).strides == [8, 16, 32]
    fields = {"depths": [1, 1], "num_heads": [1, 1]}
    config = FlorenceDetectionConfig(vision_config=fields)
    assert fields == {"depths": [1, 1], "num_heads": [1, 1]}
    assert list(config.vision_config.out_features) == ["stage1", "stage2"] and config.strides == [4, 8, 16, 32]
    chosen = FlorenceDetectionConfig(vision_config={**fields, "out_indices": [1], "window_padding": "clamp"})
    assert list(chosen.vision_config.out_features) == ["stage1"]
    assert chosen.vision_config.window_padding == "clamp"


def test_the_tower_of_a_classifier_brings_no_classes():
    vision = FlorenceVisionConfig.from_size("nano", num_labels=7, out_features=["stage1"], attention_dropout=0.25)
    config = FlorenceDetectionConfig.from_vision_config(vision, id2label={0: "cat"})
    assert config.num_labels == 1 and config.vision_config.num_labels == 2
    assert config.vision_config.attention_dropout == 0.25 and config.strides[0] == 8
    assert vision.window_padding == "clamp" and list(vision.out_features) == ["stage1"]


def test_saved_and_loaded(tmp_path):
    config = FlorenceDetectionConfig.from_size(
        "nano", hidden_size=64, num_blocks=2, offset_layout="official", id2label={0: "fish", 1: "shark"}
    )
    config.save_pretrained(tmp_path)
    AutoConfig.register(config.model_type, FlorenceDetectionConfig, exist_ok=True)
    for loaded in (FlorenceDetectionConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert loaded == config and loaded.id2label == {0: "fish", 1: "shark"}
        assert loaded.vision_config == config.vision_config
    assert FlorenceVisionConfig.from_pretrained(tmp_path) == config.vision_config


def test_from_the_folder_of_a_tower_or_dual_encoder(tmp_path):
    vision = FlorenceVisionConfig.from_size("nano", num_labels=7, attention_dropout=0.25)
    for config in (vision, FlorenceConfig.from_size("nano", vision_config=vision)):
        config.save_pretrained(tmp_path)
        detector = FlorenceDetectionConfig.from_pretrained(tmp_path, hidden_size=64, id2label={0: "cat"})
        assert detector.model_type == "florence_detection" and detector.hidden_size == 64
        assert detector.vision_config == FlorenceDetectionConfig.from_vision_config(vision).vision_config
        assert detector.num_labels == 1 and detector.vision_config.attention_dropout == 0.25


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 100}, "`hidden_size`: expected a multiple of 16, got 100"),
        ({"hidden_size": 0}, "`hidden_size`: expected an integer between 1 and 16384, got 0"),
        ({"num_blocks": -1}, "`num_blocks`: expected an integer between 0 and 1000, got -1"),
        ({"offset_layout": "resize"}, "`offset_layout`: expected one of 'crop', 'official', got 'resize'"),
        ({"vision_config": {"out_features": ["stage2", "stage4"]}}, "expected successive stages, got .*stage4"),
        ({"vision_config": {"out_features": ["stem", "stage1"]}}, "expected successive stages"),
        ({"vision_config": {"model_type": "swin"}}, "`vision_config.model_type`: expected .*, got 'swin'"),
        ({"vision_config": {"depths": [0]}}, r"`depths\[0\]`: expected"),
    ],
)
def test_impossible_values(fields, message):
    with pytest.raises(ValueError, match=message):
        FlorenceDetectionConfig(**fields)


def test_another_kind_of_configuration_is_refused():
    with pytest.raises((ValueError, TypeError), match="vision_config"):
        FlorenceDetectionConfig(vision_config=FlorenceDetectionConfig())
