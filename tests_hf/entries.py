"""The table of what is tested: one entry for each public class. A new head is one more entry."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from transformers_florence import (
    FlorenceBackbone,
    FlorenceConfig,
    FlorenceDetectionConfig,
    FlorenceDetectionImageProcessor,
    FlorenceForImageClassification,
    FlorenceForObjectDetection,
    FlorenceImageProcessor,
    FlorenceImageProcessorPil,
    FlorenceModel,
    FlorenceProcessor,
    FlorenceTextConfig,
    FlorenceTextModel,
    FlorenceTokenizer,
    FlorenceVisionConfig,
    FlorenceVisionModel,
)

SIDE = 32  # pixels
TOKENS = 7
BATCH = 4


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


@dataclass(frozen=True)
class ModelEntry:
    """A model class and what transformers' mixins must know of it.

    Args:
        model_class: the public class.
        config: a configuration of less than a million parameters.
        inputs: from a configuration, what `forward` needs, `BATCH` samples of each.
        kind: `"text"`, `"pictures"` or `"pairs"`: which adaptations the class gets (`adaptations.KINDS`).
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


# 32 pixels: the stem makes a grid of 8 x 8, the second stage one of 4 x 4; windows of 3 x 3 cover them 9 and 4 times.
TOWER_SHAPES = {
    "hidden_shapes": ((8, 8, 8), (8, 8, 8), (4, 4, 16)),
    "attention_shapes": ((9, 1, 9, 9), (4, 2, 9, 9), (4, 2, 9, 9)),
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
    ModelEntry(FlorenceForObjectDetection, detection_config, pictures, "pictures", labels=objects, **TOWER_SHAPES),
    ModelEntry(FlorenceBackbone, backbone_config, pictures, "pictures", backbone=True, **TOWER_SHAPES),
)
CONFIGS = (
    (FlorenceVisionConfig, {"embed_dim": 16, "depths": [1, 2], "num_heads": [1, 2]}),
    (FlorenceTextConfig, {"hidden_size": 36, "num_attention_heads": 3, "vocab_size": 99}),
    (FlorenceConfig, {"projection_dim": 24}),
    (FlorenceDetectionConfig, {"hidden_size": 64, "num_blocks": 2}),
)
IMAGE_PROCESSORS = {"torchvision": FlorenceImageProcessor, "pil": FlorenceImageProcessorPil}
DETECTION_IMAGE_PROCESSORS = {"torchvision": FlorenceDetectionImageProcessor}
PROCESSOR = FlorenceProcessor
TOKENIZER = FlorenceTokenizer

__all__ = [
    "BATCH",
    "CONFIGS",
    "DETECTION_IMAGE_PROCESSORS",
    "IMAGE_PROCESSORS",
    "MODELS",
    "PROCESSOR",
    "TOKENIZER",
    "ModelEntry",
]
