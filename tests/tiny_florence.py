"""A Florence small enough for a test: configurations, a learnt tokenizer, a processor, and folders that hold them."""

from pathlib import Path

import torch

from transformers_florence import (
    FlorenceConfig,
    FlorenceImageProcessor,
    FlorenceModel,
    FlorenceProcessor,
    FlorenceTextConfig,
    FlorenceTokenizer,
    FlorenceVisionConfig,
)

SIDE, CONTEXT, VOCABULARY, DIM = 32, 12, 560, 12
TEXTS = [
    "a photo of a cat sitting on a mat",
    "a photo of a dog that barks at a cat",
    "an image of a red bicycle and a green bicycle",
    "some pictures of the same street, and of other streets",
    "12 drawings of houses, mountains and rivers",
]


def tiny_vision_config(**overrides) -> FlorenceVisionConfig:
    fields = {"image_size": SIDE, "embed_dim": 8, "depths": [1, 2], "num_heads": [1, 2], "window_size": 3}
    return FlorenceVisionConfig(**{**fields, **overrides})


def tiny_text_config(**overrides) -> FlorenceTextConfig:
    fields = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": CONTEXT,
    }
    return FlorenceTextConfig(**{**fields, **overrides})


def tiny_config(**overrides) -> FlorenceConfig:
    fields = {"vision_config": tiny_vision_config(), "text_config": tiny_text_config(), "projection_dim": DIM}
    return FlorenceConfig(**{**fields, **overrides})


def tiny_model(**overrides) -> FlorenceModel:
    """In evaluation mode, with weights wide enough for every input to matter."""
    model = FlorenceModel(tiny_config(**overrides)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4.0)
    return model


def tiny_tokenizer() -> FlorenceTokenizer:
    return FlorenceTokenizer.train_new(TEXTS, vocab_size=VOCABULARY, model_max_length=CONTEXT)


def tiny_image_processor() -> FlorenceImageProcessor:
    return FlorenceImageProcessor(size={"height": SIDE, "width": SIDE}, do_center_crop=False)


def tiny_processor() -> FlorenceProcessor:
    return FlorenceProcessor(tiny_image_processor(), tiny_tokenizer())


def save_tiny(folder: Path, **overrides) -> FlorenceModel:
    """A dual encoder and its processor in `folder`."""
    model = tiny_model(**overrides)
    model.save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return model


def random_pixels(count: int = 3, seed: int = 0) -> torch.Tensor:
    """(count, 3, SIDE, SIDE)"""
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
