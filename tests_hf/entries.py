"""The table of what is tested: one entry for each public class. A new head is one more entry."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedConfig, PreTrainedModel, RobertaConfig

from transformers_florence import (
    FlorenceBackbone,
    FlorenceCaptioningConfig,
    FlorenceConfig,
    FlorenceDetectionConfig,
    FlorenceDetectionImageProcessor,
    FlorenceForImageCaptioning,
    FlorenceForImageClassification,
    FlorenceForImageTextRetrieval,
    FlorenceForObjectDetection,
    FlorenceForPreTraining,
    FlorenceForQuestionAnswering,
    FlorenceForVideoClassification,
    FlorenceForVideoTextRetrieval,
    FlorenceForZeroShotObjectDetection,
    FlorenceFusionConfig,
    FlorenceFusionModel,
    FlorenceImageProcessor,
    FlorenceImageProcessorPil,
    FlorenceModel,
    FlorenceProcessor,
    FlorenceTextConfig,
    FlorenceTextModel,
    FlorenceTokenizer,
    FlorenceVideoConfig,
    FlorenceVideoModel,
    FlorenceVideoProcessor,
    FlorenceVideoTextConfig,
    FlorenceVisionConfig,
    FlorenceVisionModel,
    FlorenceZeroShotDetectionConfig,
    FlorenceZeroShotDetectionProcessor,
)

SIDE = 32  # pixels
TOKENS = 7
BATCH = 4
FRAMES = 6


def vision_config(**overrides) -> FlorenceVisionConfig:
    fields = {"image_size": SIDE, "embed_dim": 8, "depths": [1, 2], "num_heads": [1, 2], "window_size": 3}
    return FlorenceVisionConfig(**{**fields, "drop_path_rate": 0.1, **overrides})


def text_config(**overrides) -> FlorenceTextConfig:
    fields = {
        "vocab_size": 99,
        "hidden_size": 32,
        "intermediate_size": 37,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        # Not the last of the vocabulary, as in CLIP: the mixins cut that down to 4 tokens.
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    return FlorenceTextConfig(**{**fields, **overrides})


def dual_config() -> FlorenceConfig:
    """With a text tower that is not causal, as UniCL's variants; the text tower's own entry is causal."""
    return FlorenceConfig(vision_config=vision_config(), text_config=text_config(causal=False), projection_dim=16)


def backbone_config() -> FlorenceVisionConfig:
    """Plain Swin in detection's convention, with layer scale: every brick that the other entries do not have."""
    return vision_config(
        embed_type="patch", window_padding="pad", layer_scale_init_value=0.1, out_features=["stage1", "stage2"]
    )


def detection_config() -> FlorenceDetectionConfig:
    """Two stages, so levels of strides 4, 8, 16 and 32."""
    vision = vision_config(window_padding="pad", out_features=["stage1", "stage2"])
    return FlorenceDetectionConfig(vision_config=vision, hidden_size=32, num_blocks=1, num_labels=3)


def pictures(config: PreTrainedConfig) -> dict[str, torch.Tensor]:
    """`pixel_values`: (BATCH, 3, SIDE, SIDE), float32."""
    return {"pixel_values": torch.rand(BATCH, 3, SIDE, SIDE)}


def texts(config: PreTrainedConfig) -> dict[str, torch.Tensor]:
    """`input_ids`, `attention_mask`: (BATCH, TOKENS), int64. Each text ends with the end token, one is padded."""
    config = config.get_text_config()
    input_ids = torch.randint(2, config.vocab_size, (BATCH, TOKENS))
    input_ids[:, 0], input_ids[:, -1] = config.bos_token_id, config.eos_token_id
    input_ids[-1, -3:] = config.eos_token_id
    attention_mask = torch.ones_like(input_ids)
    attention_mask[-1, -2:] = 0
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def pairs(config: PreTrainedConfig) -> dict[str, torch.Tensor]:
    """As many texts as pictures."""
    return {**texts(config), **pictures(config)}


def meanings(config: PreTrainedConfig) -> dict[str, torch.Tensor]:
    """`labels`: (BATCH,), int64; two pairs mean the same, as in UniCL."""
    return {"labels": torch.arange(BATCH) // 2}


def objects(config: PreTrainedConfig) -> dict[str, list]:
    """`labels`: for each picture two objects, of which the classes differ."""
    boxes = torch.tensor([[0.5, 0.5, 0.4, 0.6], [0.3, 0.6, 0.4, 0.4]])
    return {"labels": [{"class_labels": torch.tensor([2, number % 2]), "boxes": boxes} for number in range(BATCH)]}


def named_objects(config: PreTrainedConfig) -> dict[str, list]:
    """`labels`: for each picture two objects of its only class."""
    labels = objects(config)["labels"]
    return {"labels": [{**label, "class_labels": torch.zeros(2, dtype=torch.long)} for label in labels]}


@dataclass(frozen=True)
class ModelEntry:
    """A model class and what transformers' mixins must know of it.

    Args:
        model_class: the public class.
        config: a configuration of less than a million parameters.
        inputs: from a configuration, what `forward` needs, `BATCH` samples of each.
        kind: a key of `adaptations.KINDS`: which adaptations the class gets.
        labels: from a configuration, what makes `forward` return a loss, if upstream's own choice by the Auto class
            is not it. A class with `labels` is trained, even a base model.
        overfit: from a configuration, a batch with labels that the training mixin must fit, if it is to try.
        backbone: whether the backbone mixin runs too.
        hidden_shapes: of each of the hidden states, without the batch.
        attention_shapes: of the attention weights of each layer, without the batch; `windows` of a picture first.
        pipelines: tasks of transformers' pipelines that the class serves.
        meaningless: name of an upstream test -> what of the architecture makes it meaningless.
    """

    model_class: type[PreTrainedModel]
    config: Callable[[], PreTrainedConfig]
    inputs: Callable[[PreTrainedConfig], dict[str, torch.Tensor]]
    kind: str
    labels: Callable[[PreTrainedConfig], dict[str, torch.Tensor]] | None = None
    overfit: Callable[[PreTrainedConfig], dict[str, torch.Tensor]] | None = None
    backbone: bool = False
    hidden_shapes: tuple[tuple[int, ...], ...] = ()
    attention_shapes: tuple[tuple[int, ...], ...] = ()
    pipelines: tuple[str, ...] = ()
    meaningless: Mapping[str, str] = field(default_factory=dict)


def video_config(**overrides) -> FlorenceVideoConfig:
    """Frames of 32 pixels, two to a token of time; windows of two tokens of time by 3 x 3."""
    fields = {"image_size": SIDE, "embed_dim": 8, "depths": [1, 2], "num_heads": [1, 2], "window_size": 3}
    time = {"num_frames": FRAMES, "temporal_window_size": 2}
    return FlorenceVideoConfig(**{**fields, **time, "drop_path_rate": 0.1, **overrides})


def divided_config() -> FlorenceVideoConfig:
    return video_config(temporal_mode="divided")


def clips(config: PreTrainedConfig) -> dict[str, torch.Tensor]:
    """`pixel_values_videos`: (BATCH, FRAMES, 3, SIDE, SIDE), float32."""
    return {"pixel_values_videos": torch.rand(BATCH, FRAMES, 3, SIDE, SIDE)}


def still_and_noisy(config: PreTrainedConfig) -> dict[str, torch.Tensor]:
    """Clips of two classes that differ in their mean over time and space: different noise alone hardly does."""
    labels = torch.arange(BATCH) % 2
    videos = clips(config)["pixel_values_videos"] * labels.view(-1, 1, 1, 1, 1)
    return {"pixel_values_videos": videos, "labels": labels}


def zero_shot_detection_config() -> FlorenceZeroShotDetectionConfig:
    """The detector's towers and head, and the dual encoder's text tower; names are matched by the text head."""
    vision = vision_config(out_features=["stage1", "stage2"])
    fields = {"hidden_size": 32, "num_blocks": 1, "projection_dim": 16, "naming": "text_head"}
    return FlorenceZeroShotDetectionConfig(vision_config=vision, text_config=text_config(causal=False), **fields)


def video_text_config() -> FlorenceVideoTextConfig:
    return FlorenceVideoTextConfig(video_config=video_config(), text_config=text_config(), projection_dim=16)


def clip_pairs(config: PreTrainedConfig) -> dict[str, torch.Tensor]:
    """As many texts as clips."""
    return {**texts(config), **clips(config)}


def fusion_config() -> FlorenceFusionConfig:
    """On RoBERTa, as METER."""
    encoder = RobertaConfig(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    return FlorenceFusionConfig(
        vision_config=vision_config(),
        text_config=encoder,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_labels=3,
    )


def captioning_config() -> FlorenceCaptioningConfig:
    return FlorenceCaptioningConfig(
        vision_config=vision_config(),
        vocab_size=99,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=1,
    )


def questions(config: PreTrainedConfig) -> dict[str, torch.Tensor]:
    """`input_ids`, `attention_mask`: (BATCH, TOKENS), int64, nothing padded; and as many pictures."""
    vocabulary = config.get_text_config().vocab_size
    input_ids = torch.randint(min(3, vocabulary - 1), vocabulary, (BATCH, TOKENS))
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), **pictures(config)}


def soft_answers(config: PreTrainedConfig) -> dict[str, torch.Tensor]:
    """`labels`: (BATCH, answers), scores from 0 to 1."""
    count = BATCH * config.num_labels
    return {"labels": torch.arange(count).reshape(BATCH, -1) / count}


def matches(config: PreTrainedConfig) -> dict[str, torch.Tensor]:
    return {"labels": torch.arange(BATCH) % 2}


def words(config: PreTrainedConfig) -> dict[str, torch.Tensor]:
    """`labels`: (BATCH, TOKENS), a word to predict at each place."""
    vocabulary = config.get_text_config().vocab_size
    return {"labels": torch.arange(BATCH * TOKENS).reshape(BATCH, TOKENS) % vocabulary}


# 32 pixels: the stem makes a grid of 8 x 8, the second stage one of 4 x 4; windows of 3 x 3 cover them 9 and 4 times.
TOWER_SHAPES = {
    "hidden_shapes": ((8, 8, 8), (8, 8, 8), (4, 4, 16)),
    "attention_shapes": ((9, 1, 9, 9), (4, 2, 9, 9), (4, 2, 9, 9)),
}
# 3 tokens of time are two windows of two, padded: twice as many windows as a picture has, of twice as many tokens.
VIDEO_SHAPES = {
    "hidden_shapes": ((3, 8, 8, 8), (3, 8, 8, 8), (3, 4, 4, 16)),
    "attention_shapes": ((18, 1, 18, 18), (8, 2, 18, 18), (8, 2, 18, 18)),
}
# Along time at 8 x 8, then 4 x 4 places, two windows each; then in 3 frames, 9 and 4 windows of 3 x 3 each.
DIVIDED_SHAPES = {
    "hidden_shapes": VIDEO_SHAPES["hidden_shapes"],
    "attention_shapes": ((128, 1, 2, 2), (27, 1, 9, 9), *((32, 2, 2, 2), (12, 2, 9, 9)) * 2),
}
MODELS = (
    ModelEntry(
        FlorenceVisionModel,
        vision_config,
        pictures,
        "pictures",
        pipelines=("image-feature-extraction",),
        **TOWER_SHAPES,
    ),
    ModelEntry(FlorenceTextModel, text_config, texts, "text", pipelines=("feature-extraction",)),
    ModelEntry(
        FlorenceModel,
        dual_config,
        pairs,
        "pairs",
        labels=meanings,
        overfit=lambda config: {**pairs(config), "labels": torch.arange(BATCH)},
        pipelines=("zero-shot-image-classification",),
        **TOWER_SHAPES,
    ),
    ModelEntry(
        FlorenceForImageClassification,
        vision_config,
        pictures,
        "pictures",
        overfit=lambda config: {**pictures(config), "labels": torch.arange(BATCH) % 2},
        pipelines=("image-classification",),
        **TOWER_SHAPES,
    ),
    # Without `overfit`: a loss of centerness has a floor, the entropy of its targets.
    ModelEntry(
        FlorenceForObjectDetection,
        detection_config,
        pictures,
        "pictures",
        labels=objects,
        pipelines=("object-detection",),
        **TOWER_SHAPES,
    ),
    ModelEntry(
        FlorenceForZeroShotObjectDetection,
        zero_shot_detection_config,
        pairs,
        "named",
        labels=named_objects,
        **TOWER_SHAPES,
    ),
    ModelEntry(FlorenceVideoModel, divided_config, clips, "pictures", **DIVIDED_SHAPES),
    ModelEntry(
        FlorenceForVideoClassification,
        video_config,
        clips,
        "pictures",
        overfit=still_and_noisy,
        pipelines=("video-classification",),
        **VIDEO_SHAPES,
    ),
    ModelEntry(
        FlorenceForVideoTextRetrieval,
        video_text_config,
        clip_pairs,
        "clip pairs",
        labels=meanings,
        overfit=lambda config: {**clip_pairs(config), "labels": torch.arange(BATCH)},
        **VIDEO_SHAPES,
    ),
    ModelEntry(FlorenceFusionModel, fusion_config, questions, "fusion"),
    ModelEntry(FlorenceForQuestionAnswering, fusion_config, questions, "fusion", labels=soft_answers),
    ModelEntry(FlorenceForImageTextRetrieval, fusion_config, questions, "fusion", labels=matches),
    ModelEntry(
        FlorenceForPreTraining,
        fusion_config,
        questions,
        "fusion",
        labels=words,
        meaningless={"test_model_outputs_equivalence": "It draws new false pairs on each call."},
    ),
    ModelEntry(
        FlorenceForImageCaptioning,
        captioning_config,
        questions,
        "fusion",
        labels=words,
        pipelines=("image-text-to-text",),
        meaningless={
            "test_generation_tester_mixin_inheritance": "Upstream's tests of generation are not in its source "
            "distribution; tests/test_modeling_florence_captioning.py has our own.",
            "test_causal_lm_loss_honors_shift_labels": "The loss shifts the labels itself; labels that somebody else "
            "has shifted, for sequences split over processes, are not taken.",
        },
    ),
    ModelEntry(FlorenceBackbone, backbone_config, pictures, "pictures", backbone=True, **TOWER_SHAPES),
)
CONFIGS = (
    (FlorenceVideoConfig, {"embed_dim": 16, "depths": [1, 2], "num_heads": [1, 2], "num_frames": 6}),
    (FlorenceFusionConfig, {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}),
    (FlorenceCaptioningConfig, {"hidden_size": 32, "num_attention_heads": 4, "vocab_size": 99}),
    (FlorenceVisionConfig, {"embed_dim": 16, "depths": [1, 2], "num_heads": [1, 2]}),
    (FlorenceTextConfig, {"hidden_size": 36, "num_attention_heads": 3, "vocab_size": 99}),
    (FlorenceConfig, {"projection_dim": 24}),
    (FlorenceVideoTextConfig, {"projection_dim": 24}),
    (FlorenceDetectionConfig, {"hidden_size": 64, "num_blocks": 2}),
    (FlorenceZeroShotDetectionConfig, {"hidden_size": 64, "num_blocks": 2, "naming": "region"}),
)
IMAGE_PROCESSORS = {"torchvision": FlorenceImageProcessor, "pil": FlorenceImageProcessorPil}
DETECTION_IMAGE_PROCESSORS = {"torchvision": FlorenceDetectionImageProcessor}
VIDEO_PROCESSOR = FlorenceVideoProcessor
PROCESSOR = FlorenceProcessor
OPEN_SET_PROCESSOR = FlorenceZeroShotDetectionProcessor
TOKENIZER = FlorenceTokenizer

__all__ = [
    "BATCH",
    "CONFIGS",
    "DETECTION_IMAGE_PROCESSORS",
    "FRAMES",
    "IMAGE_PROCESSORS",
    "MODELS",
    "OPEN_SET_PROCESSOR",
    "PROCESSOR",
    "SIDE",
    "TOKENIZER",
    "VIDEO_PROCESSOR",
    "ModelEntry",
]
