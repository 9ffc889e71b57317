"""The video tower's configuration: what it derives, what it refuses, and that it comes back from its file."""

import json

import pytest

from transformers_florence.configuration_florence import VISION_SIZES, FlorenceConfig, FlorenceVisionConfig
from transformers_florence.configuration_florence_video import FlorenceVideoConfig


def test_windows_and_kernels_of_each_stage():
    config = FlorenceVideoConfig.from_size("tiny")
    assert config.windows == [(8, 7, 7)] * 4 and config.temporal_kernel_sizes == [2, 1, 1, 1]
    # "Small windows in early stages, large in later ones" (Florence section 2.6).
    config = FlorenceVideoConfig(window_size=[4, 4, 7, 7], temporal_window_size=(2, 4, 8, 8), temporal_stride=4)
    assert config.windows == [(2, 4, 4), (4, 4, 4), (8, 7, 7), (8, 7, 7)]
    assert config.temporal_kernel_sizes == [4, 1, 1, 1]
    assert FlorenceVideoConfig(temporal_kernel_size=3).temporal_kernel_sizes == [3, 1, 1, 1]
    assert FlorenceVideoConfig(temporal_kernel_size=[3, 3, 2, 1]).temporal_kernel_sizes == [3, 3, 2, 1]
    divided = FlorenceVideoConfig(temporal_mode="divided", temporal_window_size=4)
    assert divided.windows == [(1, 7, 7)] * 4 and divided.temporal_window_sizes == [4] * 4


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"num_frames": 0}, "`num_frames`: expected an integer between 1"),
        ({"num_frames": True}, "`num_frames`"),
        ({"temporal_stride": 0}, "`temporal_stride`"),
        ({"temporal_kernel_size": 1}, r"`temporal_kernel_size\[0\]`: expected a number from its stride, 2, up to 256"),
        ({"temporal_kernel_size": [2, 1, 1]}, "`temporal_kernel_size`: expected a list of 4 integers"),
        ({"temporal_kernel_size": [2, 0, 1, 1]}, r"`temporal_kernel_size\[1\]`"),
        ({"embed_type": "patch", "temporal_kernel_size": 3}, r"expected 2, as patches do not overlap, got 3"),
        ({"temporal_window_size": 0}, "`temporal_window_size`"),
        ({"temporal_window_size": [8, 8]}, "`temporal_window_size`: expected a list of 4 integers"),
        ({"temporal_mode": "factorised"}, "`temporal_mode`: expected one of 'windows', 'divided'"),
        ({"temporal_padding": "wrap"}, "`temporal_padding`: expected one of 'repeat', 'zeros'"),
        ({"clamped_bias": "rows"}, "`clamped_bias`: expected one of 'offsets', 'slice'"),
        ({"window_padding": "none"}, "`window_padding`: expected one of 'clamp', 'pad', 'clamp_axes', got 'none'"),
        ({"label_smoothing": 1.0}, "`label_smoothing`"),
        ({"classifier_dropout": -0.1}, "`classifier_dropout`"),
        ({"embed_dim": 0}, "`embed_dim`"),  # the image tower's own checks hold
        ({"window_size": [7, 7]}, "`window_size`"),
        ({"temporal_window_size": 65536, "window_size": 256}, "`temporal_window_size, window_size`: expected a tower"),
    ],
    ids=str,
)
def test_impossible_values_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        FlorenceVideoConfig(**fields)


def test_it_comes_back_from_its_file(tmp_path):
    config = FlorenceVideoConfig(
        window_padding="clamp_axes",
        temporal_window_size=(2, 2, 4, 4),
        temporal_kernel_size=(3, 1, 1, 1),
        id2label={0: "waving", 1: "nodding"},
    )
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["model_type"] == "florence_video_model" and saved["temporal_window_size"] == [2, 2, 4, 4]
    assert FlorenceVideoConfig.from_pretrained(tmp_path) == config
    assert FlorenceVideoConfig(num_frames=8) != FlorenceVideoConfig(num_frames=16)
    assert config.window_padding == "clamp_axes"


@pytest.mark.parametrize("size", sorted(VISION_SIZES))
def test_an_image_towers_shape_is_taken_over(size):
    image = FlorenceVisionConfig.from_size(size, window_padding="pad", id2label={0: "cat"}, dtype="bfloat16")
    config = FlorenceVideoConfig.from_vision_config(image, num_frames=8, window_size=[4, 4, 8, 8], num_labels=5)
    for name in ("embed_dim", "depths", "num_heads", "drop_path_rate", "window_padding", "image_size"):
        assert getattr(config, name) == getattr(image, name)
    assert (config.num_frames, config.window_sizes, config.num_labels) == (8, [4, 4, 8, 8], 5)
    assert config.dtype is None and config.model_type == "florence_video_model"


@pytest.mark.parametrize("other", [FlorenceVisionConfig(), FlorenceConfig()], ids=["tower", "dual"])
def test_another_models_file_is_refused(tmp_path, other):
    other.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"got '{other.model_type}': `from_pretrained_image`"):
        FlorenceVideoConfig.from_pretrained(tmp_path)
