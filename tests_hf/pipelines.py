"""Tiny checkpoints in the layout that transformers' pipeline mixin reads, and the checks that it runs on each task.

Upstream's checks of a task are not in the source distribution: here each compares what the pipeline gives with what
the model gives by hand.
"""

import json
import os
import tempfile
from pathlib import Path
from types import ModuleType
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch.testing import assert_close
from transformers import PreTrainedModel, pipeline
from transformers.pipelines.zero_shot_image_classification import ZeroShotImageClassificationPipeline

from .entries import IMAGE_PROCESSORS, MODELS, SIDE, ModelEntry
from .loader import load
from .vocabulary import tokenizer

LABELS = ["a cat", "a dog", "a house"]
TEXTS = ["a photo of a cat", "hello there", "a dog runs over the lazy fox"]
LOCATION = "TRANSFORMERS_TINY_MODEL_PATH"  # where the mixin looks for tiny checkpoints
READS_TEXT = ("text", "pairs")


def pictures() -> list[Image.Image]:
    noise = np.random.default_rng(0)
    return [Image.fromarray(noise.integers(0, 256, (40, width, 3), dtype=np.uint8)) for width in (30, 50, 40)]


class TaskTests:
    """What the mixin asks of a task: a pipeline with examples for it, and a check of the pipeline on them."""

    task: str
    pipeline_class: type | None = None

    def examples(self) -> list:
        return pictures()

    def get_test_pipeline(self, model, tokenizer=None, image_processor=None, dtype="float32", **others):
        parts = {"tokenizer": tokenizer, "image_processor": image_processor, "pipeline_class": self.pipeline_class}
        model = model.to(getattr(torch, dtype))
        return pipeline(self.task, model=model, **{k: v for k, v in parts.items() if v is not None}), self.examples()

    def by_hand(self, pipe, example) -> object:
        """What the pipeline should return for one example."""
        raise NotImplementedError

    def run_pipeline_test(self, pipe, examples) -> None:
        tolerance = 1e-5 if pipe.dtype == torch.float32 else 1e-2
        with torch.no_grad():
            for example, result in zip(examples, pipe(examples), strict=True):
                expected = self.by_hand(pipe, example)
                if isinstance(expected, dict):  # label -> score
                    result = {item["label"]: item["score"] for item in result}
                    assert list(result.values()) == sorted(result.values(), reverse=True)
                    assert result.keys() == expected.keys()
                    result, expected = ([scores[label] for label in expected] for scores in (result, expected))
                assert_close(torch.tensor(result), torch.as_tensor(expected), atol=tolerance, rtol=tolerance)

    def pixels(self, pipe, picture) -> torch.Tensor:
        return pipe.image_processor(picture, return_tensors="pt")["pixel_values"].to(pipe.dtype)


class ImageClassification(TaskTests):
    task = "image-classification"

    def by_hand(self, pipe, example):
        scores = pipe.model(self.pixels(pipe, example)).logits[0].float().softmax(-1)
        return {pipe.model.config.id2label[number]: float(score) for number, score in enumerate(scores)}


class FixedLabels(ZeroShotImageClassificationPipeline):
    """The mixin calls a pipeline with examples only."""

    def __call__(self, image, candidate_labels=LABELS, **kwargs):
        return super().__call__(image, candidate_labels, **kwargs)


class ZeroShotImageClassification(TaskTests):
    task = "zero-shot-image-classification"
    pipeline_class = FixedLabels

    def by_hand(self, pipe, example):
        texts = pipe.tokenizer([f"This is a photo of {label}." for label in LABELS], padding=True, return_tensors="pt")
        scores = pipe.model(pixel_values=self.pixels(pipe, example), **texts).logits_per_image[0].softmax(-1)
        return dict(zip(LABELS, scores.tolist(), strict=True))


class ImageFeatureExtraction(TaskTests):
    task = "image-feature-extraction"

    def by_hand(self, pipe, example):
        return pipe.model(self.pixels(pipe, example)).last_hidden_state.float()


class FeatureExtraction(TaskTests):
    task = "feature-extraction"

    def examples(self) -> list:
        return TEXTS

    def by_hand(self, pipe, example):
        return pipe.model(**pipe.tokenizer(example, return_tensors="pt")).last_hidden_state.float()


TASKS = {
    tests.task: tests
    for tests in (ImageClassification, ZeroShotImageClassification, ImageFeatureExtraction, FeatureExtraction)
}


def tiny_model(entry: ModelEntry) -> PreTrainedModel:
    """The entry's model with a vocabulary that fits the learnt tokenizer."""
    config, words = entry.config(), tokenizer()
    if entry.kind in READS_TEXT:
        text = config.get_text_config()
        text.vocab_size = len(words)
        text.bos_token_id, text.eos_token_id, text.pad_token_id = (
            words.bos_token_id,
            words.eos_token_id,
            words.pad_token_id,
        )
    torch.manual_seed(0)
    return entry.model_class(config)


def served() -> dict[str, tuple[type[PreTrainedModel], ...]]:
    """task -> the model classes that serve it."""
    tasks = {task for entry in MODELS for task in entry.pipelines}
    return {task: tuple(entry.model_class for entry in MODELS if task in entry.pipelines) for task in sorted(tasks)}


def write_summary(folder: Path) -> None:
    """The list of tiny checkpoints, which the mixin reads when it is imported."""
    summary = {
        entry.model_class.__name__: {
            "model_classes": [entry.model_class.__name__],
            "tokenizer_classes": [type(tokenizer()).__name__] if entry.kind in READS_TEXT else [],
            "processor_classes": [] if entry.kind == "text" else [IMAGE_PROCESSORS["torchvision"].__name__],
        }
        for entry in MODELS
        if entry.pipelines
    }
    (folder / "reports").mkdir(parents=True)
    (folder / "reports" / "tiny_model_summary.json").write_text(json.dumps(summary), "utf-8")


def write_checkpoints(folder: Path) -> None:
    """A checkpoint with tokenizer and image processor for each entry that serves a pipeline."""
    for entry in MODELS:
        if not entry.pipelines:
            continue
        place = folder / entry.model_class.config_class.model_type / entry.model_class.__name__
        tiny_model(entry).save_pretrained(place)
        if entry.kind in READS_TEXT:
            tokenizer().save_pretrained(place)
        if entry.kind != "text":
            IMAGE_PROCESSORS["torchvision"](
                size={"height": SIDE, "width": SIDE}, do_center_crop=False
            ).save_pretrained(place)


_checkpoints = tempfile.TemporaryDirectory(prefix="florence-hf-pipelines-")  # removed when the process ends
CHECKPOINTS = Path(_checkpoints.name)


def load_mixin() -> ModuleType:
    """`test_pipeline_mixin`, reading the tiny checkpoints in `CHECKPOINTS` and running the checks above."""
    unknown = sorted(set(served()) - set(TASKS))
    if unknown:
        raise ValueError(f"expected tasks with a check in tests_hf/pipelines.py ({', '.join(TASKS)}), got {unknown}")
    write_summary(CHECKPOINTS)
    with mock.patch.dict(os.environ, {LOCATION: str(CHECKPOINTS)}):
        module = load("test_pipeline_mixin")
    for task, tests in TASKS.items():
        module.pipeline_test_mapping[task] = {"test": f"{__name__}.{tests.__name__}"}
    # By this it would compare pipelines of transformers with descriptions in huggingface_hub: nothing of ours.
    module.task_to_pipeline_and_spec_mapping.clear()
    return module


__all__ = ["CHECKPOINTS", "TASKS", "load_mixin", "served", "write_checkpoints"]
