"""Every model class of the package small enough for a test: its configuration, what it reads and what makes a loss."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, RobertaConfig

from tests.oracles import randomize
from tests.tiny_florence import (
    DIM,
    SIDE,
    random_pixels,
    tiny_config,
    tiny_image_processor,
    tiny_processor,
    tiny_text_config,
    tiny_tokenizer,
    tiny_vision_config,
)
from tests.tiny_fusion import (
    ANSWERS,
    ENCODER,
    TOKENS,
    random_texts,
    tiny_captioning_config,
    tiny_fusion_config,
    tiny_fusion_processor,
)
from transformers_florence import (
    FlorenceBackbone,
    FlorenceCaptioningConfig,
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
    FlorenceModel,
    FlorenceTextModel,
    FlorenceVideoConfig,
    FlorenceVideoModel,
    FlorenceVideoProcessor,
    FlorenceVideoTextConfig,
    FlorenceVisionModel,
    FlorenceZeroShotDetectionConfig,
    FlorenceZeroShotDetectionProcessor,
)

FRAMES = 4
NAMES = {0: "cat", 1: "dog", 2: "fox", 3: "owl"}
BOXES = torch.tensor([[0.5, 0.5, 0.4, 0.6], [0.3, 0.6, 0.4, 0.4]])
Tensors = dict[str, Any]  # tensors by name, and a detector's list of labels


def tiny_detection_config() -> FlorenceDetectionConfig:
    """Two stages, so levels of strides 4, 8, 16 and 32."""
    vision = tiny_vision_config(window_padding="pad", out_features=["stage1", "stage2"], drop_path_rate=0.0)
    return FlorenceDetectionConfig(vision_config=vision, hidden_size=32, num_blocks=1, id2label=NAMES)


def tiny_video_config() -> FlorenceVideoConfig:
    """Windows in space, then along time: every layer that a video tower can have."""
    fields = {"image_size": SIDE, "embed_dim": 8, "depths": [1, 2], "num_heads": [1, 2], "window_size": 3}
    time = {"num_frames": FRAMES, "temporal_window_size": 2, "temporal_mode": "divided"}
    return FlorenceVideoConfig(**fields, **time, drop_path_rate=0.0, id2label=NAMES)


def tiny_video_text_config() -> FlorenceVideoTextConfig:
    return FlorenceVideoTextConfig(
        video_config=tiny_video_config(), text_config=tiny_text_config(), projection_dim=DIM
    )


def tiny_open_set_config() -> FlorenceZeroShotDetectionConfig:
    """Its text head learns names and boxes together."""
    return FlorenceZeroShotDetectionConfig(
        vision_config=still_vision_config(out_features=["stage1", "stage2"]),
        text_config=tiny_text_config(),
        projection_dim=DIM,
        hidden_size=32,
        num_blocks=1,
        num_proposals=6,
        naming="text_head",
    )


def one_layer_fusion_config() -> FlorenceFusionConfig:
    """One layer of everything but the image tower."""
    encoder = RobertaConfig(
        **{**ENCODER, "num_hidden_layers": 1}, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    return tiny_fusion_config(text_config=encoder, num_hidden_layers=1)


def one_layer_captioning_config() -> FlorenceCaptioningConfig:
    """With the special tokens of `tiny_fusion_processor`."""
    return tiny_captioning_config(num_hidden_layers=1, bos_token_id=0, pad_token_id=1, eos_token_id=2)


def still_vision_config(**fields: Any) -> PreTrainedConfig:
    return tiny_vision_config(drop_path_rate=0.0, **fields)


def pictures(count: int, tokens: int) -> Tensors:
    return {"pixel_values": random_pixels(count)}


def padded_pictures(count: int, tokens: int) -> Tensors:
    """The first picture is narrower than the others, by a quarter."""
    pixel_mask = torch.ones(count, SIDE, SIDE, dtype=torch.int64)
    pixel_mask[0, :, 3 * SIDE // 4 :] = 0
    return {"pixel_values": random_pixels(count) * pixel_mask[:, None], "pixel_mask": pixel_mask}


def clips(count: int, tokens: int) -> Tensors:
    """`pixel_values_videos`: (count, FRAMES, 3, SIDE, SIDE)."""
    return {"pixel_values_videos": random_pixels(count * FRAMES).unflatten(0, (count, FRAMES))}


def texts(count: int, tokens: int) -> Tensors:
    """As of Florence's tokenizer: start token first, end token last and behind."""
    config, generator = tiny_text_config(), torch.Generator().manual_seed(0)
    input_ids = torch.randint(0, config.vocab_size - 2, (count, tokens), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    input_ids[:, 0] = config.bos_token_id
    for row in range(count):
        length = max(2, tokens - row % 4)
        input_ids[row, length - 1 :], attention_mask[row, length:] = config.eos_token_id, 0
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def words(count: int, tokens: int) -> Tensors:
    """As of RoBERTa's tokenizer."""
    return random_texts(count, tokens=tokens)


def pair_labels(count: int) -> Tensors:
    """The first and the third pair mean the same, as in UniCL."""
    return {"labels": torch.arange(count) % 2}


def class_labels(count: int) -> Tensors:
    return {"labels": torch.arange(count) % len(NAMES)}


def object_labels(count: int) -> Tensors:
    return {"labels": [{"class_labels": torch.tensor([2, number % 2]), "boxes": BOXES} for number in range(count)]}


def named_object_labels(count: int) -> Tensors:
    """Two objects of the only class that is asked for."""
    return {"labels": [{"class_labels": torch.zeros(2, dtype=torch.int64), "boxes": BOXES} for _ in range(count)]}


def answer_labels(count: int) -> Tensors:
    """How right each answer is, (count, answers)."""
    return {"labels": torch.arange(count * len(ANSWERS)).reshape(count, -1) % 4 / 3}


def word_labels(count: int) -> Tensors:
    """A word for each place, (count, TOKENS)."""
    return {"labels": random_texts(count, seed=1)["input_ids"]}


@dataclass(frozen=True)
class Head:
    """What is known of a model class.

    Args:
        config: makes its configuration. Nothing in it is left to chance: two runs of a step are the same.
        reads: what its inputs are made of, each from the number of samples and of tokens.
        labels: from the number of samples, what makes `forward` return a loss; None for a tower.
    """

    config: Callable[[], PreTrainedConfig]
    reads: tuple[Callable[[int, int], Tensors], ...]
    labels: Callable[[int], Tensors] | None = None


TABLE: dict[type[PreTrainedModel], Head] = {
    FlorenceModel: Head(lambda: tiny_config(vision_config=still_vision_config()), (texts, pictures), pair_labels),
    FlorenceForImageClassification: Head(lambda: still_vision_config(id2label=NAMES), (pictures,), class_labels),
    FlorenceVisionModel: Head(still_vision_config, (pictures,)),
    FlorenceTextModel: Head(tiny_text_config, (texts,)),
    FlorenceBackbone: Head(still_vision_config, (pictures,)),
    FlorenceForObjectDetection: Head(tiny_detection_config, (padded_pictures,), object_labels),
    FlorenceFusionModel: Head(one_layer_fusion_config, (words, pictures)),
    FlorenceForQuestionAnswering: Head(one_layer_fusion_config, (words, pictures), answer_labels),
    FlorenceForImageTextRetrieval: Head(one_layer_fusion_config, (words, pictures), pair_labels),
    FlorenceForPreTraining: Head(one_layer_fusion_config, (words, pictures), word_labels),
    FlorenceForImageCaptioning: Head(
        lambda: tiny_captioning_config(num_hidden_layers=1), (words, pictures), word_labels
    ),
    FlorenceVideoModel: Head(tiny_video_config, (clips,)),
    FlorenceForVideoClassification: Head(tiny_video_config, (clips,), class_labels),
    FlorenceForVideoTextRetrieval: Head(tiny_video_text_config, (texts, clips), pair_labels),
    FlorenceForZeroShotObjectDetection: Head(tiny_open_set_config, (texts, padded_pictures), named_object_labels),
}
HEADS = list(TABLE)
RESULTS = ("logits_per_image", "logits_per_video", "logits", "mlm_logits", "pooler_output", "feature_maps")


def tiny_head(head: type[PreTrainedModel]) -> PreTrainedModel:
    """In evaluation mode, with weights of which every one matters."""
    return randomize(head(TABLE[head].config()))


def save_heads(root: Path) -> dict[type[PreTrainedModel], Path]:
    """A checkpoint of every class under `root`."""
    for head in HEADS:
        tiny_head(head).save_pretrained(root / head.__name__)
    return {head: root / head.__name__ for head in HEADS}


def processor_for(head: type[PreTrainedModel]) -> Any:
    """What makes the class's inputs: a processor, an image or a video processor, or a tokenizer."""
    reads = TABLE[head].reads
    if words in reads:
        return tiny_fusion_processor()
    if head is FlorenceForZeroShotObjectDetection:
        pixels = FlorenceDetectionImageProcessor(size={"height": SIDE, "width": SIDE})
        return FlorenceZeroShotDetectionProcessor(image_processor=pixels, tokenizer=tiny_tokenizer())
    if texts in reads:
        return tiny_processor() if pictures in reads else tiny_tokenizer()
    size = {"height": SIDE, "width": SIDE}
    if clips in reads:
        return FlorenceVideoProcessor(num_frames=FRAMES, size=size, do_center_crop=False)
    if head is FlorenceForObjectDetection:
        return FlorenceDetectionImageProcessor(size=size)
    return tiny_image_processor()


def batch_for(head: type[PreTrainedModel], count: int = 3, *, tokens: int = TOKENS, labels: bool = False) -> Tensors:
    """What the class reads, `count` samples of it; with `labels`, what makes a loss of its own too, if it has one."""
    batch = {name: value for part in TABLE[head].reads for name, value in part(count, tokens).items()}
    make_labels = TABLE[head].labels
    return {**batch, **make_labels(count)} if labels and make_labels else batch


def result_of(output: Any) -> torch.Tensor:
    """What a model is for, as one tensor."""
    found = next(output[name] for name in RESULTS if name in output)
    return found if isinstance(found, torch.Tensor) else torch.cat([each.flatten(1) for each in found], dim=1)
