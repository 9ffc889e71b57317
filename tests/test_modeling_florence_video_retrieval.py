"""Texts and clips in one space: against the dual encoder of pictures that it is made of, and UniCL by hand."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from torch.testing import assert_close

from tests.tiny_florence import CONTEXT, VOCABULARY, save_tiny, tiny_text_config
from tests.tiny_retrieval import random_clips, retrieval_config, tiny_retrieval
from transformers_florence.configuration_florence import FlorenceConfig
from transformers_florence.configuration_florence_video import FlorenceVideoConfig, FlorenceVideoTextConfig
from transformers_florence.integrity import verify_checkpoint
from transformers_florence.losses_contrastive import unicl_loss
from transformers_florence.modeling_florence_video_retrieval import FlorenceForVideoTextRetrieval

FRAME_BY_FRAME = {"temporal_stride": 1, "temporal_window_size": 1}


def random_texts(count: int = 3, seed: int = 0) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, VOCABULARY - 2, (count, CONTEXT), generator=torch.Generator().manual_seed(seed))
    ids[:, -1] = tiny_text_config().eos_token_id
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def test_frame_by_frame_it_is_the_image_tower_and_a_mean(tmp_path):
    """Zero-shot, the first way: each frame as a picture, the features averaged."""
    images = save_tiny(tmp_path)
    model = FlorenceForVideoTextRetrieval.from_pretrained_image(tmp_path, num_frames=4, **FRAME_BY_FRAME)
    clips, texts = random_clips(), random_texts()
    outputs = model(**texts, pixel_values_videos=clips)
    features = torch.stack([images.get_image_features(clip).pooler_output.mean(dim=0) for clip in clips])
    expected = F.normalize(features, dim=-1)
    assert_close(outputs.video_embeds, expected, atol=1e-5, rtol=1e-5)
    text_embeds = images(**texts).text_embeds
    assert_close(outputs.text_embeds, text_embeds)
    scale = images.logit_scale.exp().clamp(max=100)
    assert_close(outputs.logits_per_video, scale * expected @ text_embeds.T, atol=1e-3, rtol=1e-4)
    assert_close(outputs.logits_per_text, outputs.logits_per_video.T)


@pytest.mark.parametrize("mode", ["windows", "divided"])
def test_inflated_it_knows_a_standing_picture_as_the_dual_encoder_does(tmp_path, mode):
    """Zero-shot, the second way: windows over time, which change nothing where nothing moves."""
    images = save_tiny(tmp_path)
    model = FlorenceForVideoTextRetrieval.from_pretrained_image(tmp_path, temporal_mode=mode, temporal_window_size=2)
    picture = random_clips(3, 1)
    expected = images(pixel_values=picture[:, 0]).image_embeds
    for frames in (1, 5):
        found = model(pixel_values_videos=picture.expand(-1, frames, -1, -1, -1)).video_embeds
        assert_close(found, expected, atol=1e-5, rtol=1e-5)
    moving = random_clips(3, 4)
    assert not torch.allclose(model(pixel_values_videos=moving).video_embeds, expected, atol=1e-3)


def test_features_are_the_towers_outputs_with_the_projection_as_pooled():
    model, clips, texts = tiny_retrieval(), random_clips(), random_texts()
    video, tower = model.get_video_features(clips), model.video_model(clips)
    assert_close(video.last_hidden_state, tower.last_hidden_state)
    assert_close(video.pooler_output, tower.pooler_output @ model.visual_projection.weight.T)
    text, tower = model.get_text_features(**texts), model.text_model(**texts)
    assert_close(text.last_hidden_state, tower.last_hidden_state)
    assert_close(text.pooler_output, tower.pooler_output @ model.text_projection.weight.T)
    both = model(**texts, pixel_values_videos=clips)
    assert_close(both.video_embeds, F.normalize(video.pooler_output, dim=-1))
    assert_close(model(**texts).text_embeds, both.text_embeds)
    assert model(**texts).video_embeds is None and model(pixel_values_videos=clips).logits_per_video is None
    assert len(model.get_video_features(clips, return_dict=False)) == 2


@pytest.mark.parametrize("labels", [[0, 1, 2], [0, 0, 1], [4, 4, 4]])
def test_the_loss_is_unicl_over_triplets(labels):
    """By hand: each clip's mean over the texts of its label, and each text's over the clips of its own."""
    model, labels = tiny_retrieval(), torch.tensor(labels)
    outputs = model(**random_texts(), pixel_values_videos=random_clips(), labels=labels)
    expected = 0.0
    for logits in (outputs.logits_per_video, outputs.logits_per_text):
        logs = logits.log_softmax(dim=1)
        rows = [logs[row, labels == labels[row]].mean() for row in range(3)]
        expected = expected - sum(rows) / 6
    assert_close(outputs.loss, expected)
    if labels.unique().numel() == 3:
        again = model(**random_texts(), pixel_values_videos=random_clips(), return_loss=True)
        assert_close(again.loss, outputs.loss)
        targets = torch.arange(3)
        clip = (
            F.cross_entropy(outputs.logits_per_video, targets) + F.cross_entropy(outputs.logits_per_text, targets)
        ) / 2
        assert_close(outputs.loss, clip)
    model.config.loss_reduction = "sum"
    summed = model(**random_texts(), pixel_values_videos=random_clips(), labels=labels).loss
    embeds = (outputs.video_embeds, outputs.text_embeds, labels, outputs.logit_scale)
    assert_close(summed, unicl_loss(*embeds, reduction="sum"))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_both_towers_get_the_attention_that_is_asked_for(tmp_path, attention):
    tiny_retrieval().save_pretrained(tmp_path)
    model = FlorenceForVideoTextRetrieval.from_pretrained(tmp_path, attn_implementation=attention)
    assert model.video_model.config._attn_implementation == attention
    assert model.text_model.config._attn_implementation == attention
    inputs = {**random_texts(), "pixel_values_videos": random_clips()}
    expected = tiny_retrieval()
    expected.load_state_dict(model.state_dict())
    assert_close(model(**inputs).logits_per_video, expected(**inputs).logits_per_video, atol=1e-4, rtol=1e-5)


def test_one_batch_is_learnt():
    torch.manual_seed(0)
    model = FlorenceForVideoTextRetrieval(retrieval_config()).train()
    clips, texts = random_clips(4), random_texts(4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(40):
        loss = model(**texts, pixel_values_videos=clips, return_loss=True).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1 < math.log(4)
    assert all(parameter.grad is not None for parameter in model.parameters())
    logits = model.eval()(**texts, pixel_values_videos=clips).logits_per_video
    assert logits.argmax(dim=1).tolist() == [0, 1, 2, 3]


def test_it_comes_back_from_its_folder(tmp_path):
    model = tiny_retrieval()
    model.save_pretrained(tmp_path)
    verify_checkpoint(tmp_path)
    loaded, info = FlorenceForVideoTextRetrieval.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert loaded.config.video_config.windows == model.config.video_config.windows
    inputs = {**random_texts(), "pixel_values_videos": random_clips()}
    assert_close(loaded(**inputs).logits_per_video, model(**inputs).logits_per_video)
    half = FlorenceForVideoTextRetrieval.from_pretrained(tmp_path, dtype=torch.bfloat16)(**inputs, return_loss=True)
    assert (half.logits_per_video.dtype, half.loss.dtype) == (torch.float32, torch.float32)


@pytest.mark.parametrize("bound, reached", [(100.0, 100.0), (None, math.exp(6))])
def test_the_temperature_stops_at_its_bound(bound, reached):
    model = tiny_retrieval(max_logit_scale=bound)
    model.logit_scale.data.fill_(6.0)
    assert model(**random_texts()).logit_scale.item() == pytest.approx(reached, rel=1e-5)


@pytest.mark.parametrize(
    "inputs, message",
    [
        ({}, "expected pixel_values_videos, input_ids or both, got neither"),
        (
            {"pixel_values_videos": random_clips(), "return_loss": True},
            "expected pixel_values_videos and input_ids, got",
        ),
        (
            {"pixel_values_videos": random_clips()[:, 0]},
            r"floating-point pixel_values_videos of shape \(batch, frames, 3",
        ),
        ({"pixel_values_videos": random_clips() / 0}, "expected finite pixel_values_videos"),
        ({"input_ids": torch.zeros(2, 3)}, "input_ids"),
        ({"pixel_values_videos": random_clips(2), **random_texts(3), "return_loss": True}, "as many texts as images"),
        (
            {"pixel_values_videos": random_clips(), **random_texts(), "labels": torch.zeros(2).long()},
            "labels of shape",
        ),
    ],
    ids=range(7),
)
def test_bad_input_is_refused(inputs, message):
    with pytest.raises(ValueError, match=message):
        tiny_retrieval()(**inputs)


def test_a_folder_that_lacks_weights_is_refused(tmp_path):
    save_tiny(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["text_projection.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="weights of a dual encoder in .*, missing are: text_projection.weight"):
        FlorenceForVideoTextRetrieval.from_pretrained_image(tmp_path)


# -------------------------------------------------------------------------------------------------- configuration


def test_the_configuration_is_the_dual_encoders_with_time(tmp_path):
    images = FlorenceConfig.from_size("nano", max_logit_scale=None, loss_reduction="sum")
    config = FlorenceVideoTextConfig.from_dual_encoder(images, num_frames=8, temporal_window_size=4)
    assert isinstance(config.video_config, FlorenceVideoConfig) and config.text_config == images.text_config
    assert config.video_config == FlorenceVideoConfig.from_vision_config(
        images.vision_config, num_frames=8, temporal_window_size=4
    )
    assert (config.projection_dim, config.max_logit_scale, config.loss_reduction) == (256, None, "sum")
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "florence_video_text"
    assert FlorenceVideoTextConfig.from_pretrained(tmp_path) == config
    # The tower alone reads its part.
    assert FlorenceVideoConfig.from_pretrained(tmp_path).num_frames == 8


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"video_config": 3}, "`video_config`: expected a FlorenceVideoConfig, a dictionary or None, got 3"),
        ({"video_config": {"model_type": "vivit"}}, "`video_config.model_type`: expected 'florence_video_model'"),
        ({"video_config": {"num_frames": 0}}, "`num_frames`"),
        ({"text_config": 3}, "`text_config`: expected a FlorenceTextConfig"),
        ({"projection_dim": 0}, "`projection_dim`"),
        ({"logit_scale_init_value": 99}, "`logit_scale_init_value`"),
        ({"max_logit_scale": -1.0}, "`max_logit_scale`"),
        ({"loss_reduction": "none"}, "`loss_reduction`"),
    ],
    ids=str,
)
def test_impossible_values_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        FlorenceVideoTextConfig(**fields)
