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
from transformers.pipelines.image_text_to_text import ImageTextToTextPipeline
from transformers.pipelines.zero_shot_image_classification import ZeroShotImageClassificationPipeline

from .entries import (
    DETECTION_IMAGE_PROCESSORS,
    FRAMES,
    IMAGE_PROCESSORS,
    MODELS,
    PROCESSOR,
    SIDE,
    VIDEO_PROCESSOR,
    ModelEntry,
)
from .loader import load
from .vocabulary import tokenizer

LABELS = ["a cat", "a dog", "a house"]
TEXTS = ["a photo of a cat", "hello there", "a dog runs over the lazy fox"]
LOCATION = "TRANSFORMERS_TINY_MODEL_PATH"  # where the mixin looks for tiny checkpoints
READS_TEXT = ("text", "pairs", "fusion")


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


class ObjectDetection(TaskTests):
    task = "object-detection"

    def run_pipeline_test(self, pipe, examples) -> None:
        """Every box of every picture, in pixels of the picture, best first."""
        for picture, found in zip(examples, pipe(examples, threshold=0.0), strict=True):
            inputs = pipe.image_processor(picture, return_tensors="pt").to(pipe.dtype)
            with torch.no_grad():
                outputs = pipe.model(**inputs)
            sizes = [(picture.height, picture.width)]
            (expected,) = pipe.image_processor.post_process_object_detection(outputs, 0.0, sizes)
            assert len(found) == len(expected["scores"]) > 0
            assert_close(torch.tensor([item["score"] for item in found]), expected["scores"], atol=1e-5, rtol=1e-5)
            labels = [pipe.model.config.id2label[number] for number in expected["labels"].tolist()]
            assert [item["label"] for item in found] == labels
            boxes = [list(item["box"].values()) for item in found]
            assert_close(torch.tensor(boxes), expected["boxes"].long(), atol=1, rtol=0)


class ImageTextToText(TaskTests):
    task = "image-text-to-text"
    OPTIONS = {"max_new_tokens": 5, "do_sample": False}

    class Captions(ImageTextToTextPipeline):
        """The mixin calls a pipeline with examples only, one by one from a generator too."""

        def __call__(self, images, batch_size=None):
            images = list(images)
            options = {"generate_kwargs": ImageTextToText.OPTIONS, "return_full_text": False}
            results = super().__call__(images, text=[""] * len(images), batch_size=batch_size, **options)
            return [each["generated_text"] for each in results]

    def get_test_pipeline(self, model, tokenizer=None, image_processor=None, dtype="float32", **others):
        model = model.to(getattr(torch, dtype))
        processor = PROCESSOR(image_processor, tokenizer)
        return self.Captions(model=model, processor=processor, task=self.task), self.examples()

    def run_pipeline_test(self, pipe, examples) -> None:
        for picture, found in zip(examples, pipe(examples), strict=True):
            inputs = pipe.processor(images=picture, text="", return_tensors="pt").to(pipe.dtype)
            ids = pipe.model.generate(**inputs, **self.OPTIONS)
            prompt = inputs["input_ids"].shape[1] - 1  # less the end token
            assert found == pipe.tokenizer.decode(ids[0, prompt:], skip_special_tokens=True)


class VideoClassification(ImageClassification):
    task = "video-classification"

    def examples(self) -> list:
        noise = np.random.default_rng(0)
        return [noise.integers(0, 256, (frames, 40, 50, 3), dtype=np.uint8) for frames in (2, FRAMES, 9)]

    def get_test_pipeline(self, model, tokenizer=None, image_processor=None, dtype="float32", **others):
        """With what upstream's table of processors, which are for pictures, leaves out."""
        clips = VIDEO_PROCESSOR(num_frames=FRAMES, size={"height": SIDE, "width": SIDE}, do_center_crop=False)
        model = model.to(getattr(torch, dtype))
        pipe = pipeline(self.task, model=model, image_processor=image_processor, video_processor=clips)
        return pipe, self.examples()

    def pixels(self, pipe, picture) -> torch.Tensor:
        return pipe.video_processor(picture, return_tensors="pt")["pixel_values_videos"].to(pipe.dtype)


TASKS = {
    tests.task: tests
    for tests in (
        ImageClassification,
        ZeroShotImageClassification,
        ImageFeatureExtraction,
        FeatureExtraction,
        ObjectDetection,
        ImageTextToText,
        VideoClassification,
    )
}


def image_processor_class(entry: ModelEntry) -> type:
    """The one that makes the entry's pictures."""
    choice = DETECTION_IMAGE_PROCESSORS if "object-detection" in entry.pipelines else IMAGE_PROCESSORS
    return choice["torchvision"]


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
            "processor_classes": [] if entry.kind == "text" else [image_processor_class(entry).__name__],
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
            size = {"height": SIDE, "width": SIDE}
            crop = {} if "object-detection" in entry.pipelines else {"do_center_crop": False}
            image_processor_class(entry)(size=size, **crop).save_pretrained(place)


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
