"""Pipelines on saved folders: answers with scores, captions through transformers' own; what users may get wrong."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from transformers import AutoModel, AutoModelForImageTextToText, AutoModelForPreTraining, AutoProcessor, pipeline
from transformers.utils import logging as transformers_logging

from tests.oracles import randomize
from tests.tiny_florence import tiny_processor
from tests.tiny_fusion import (
    ANSWERS,
    text_configs,
    tiny_captioning_config,
    tiny_fusion_config,
    tiny_fusion_processor,
)
from transformers_florence import FlorenceImageProcessor, FlorenceProcessor
from transformers_florence.configuration_florence_fusion import FlorenceCaptioningConfig, FlorenceFusionConfig
from transformers_florence.modeling_florence_captioning import FlorenceForImageCaptioning
from transformers_florence.modeling_florence_fusion import FlorenceFusionModel
from transformers_florence.modeling_florence_fusion_heads import FlorenceForPreTraining, FlorenceForQuestionAnswering
from transformers_florence.pipelines import FlorenceVisualQuestionAnsweringPipeline, register_pipelines

TASK = "florence-visual-question-answering"
QUESTIONS = ["is it red?", "how many dogs", "what?"]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Folders `answers` (RoBERTa), `florence` (Florence's own text tower), `captions`, each with its processor."""
    root = tmp_path_factory.mktemp("pipelines")
    randomize(FlorenceForQuestionAnswering(tiny_fusion_config())).save_pretrained(root / "answers")
    own = tiny_fusion_config(text_config=text_configs()["florence"])
    randomize(FlorenceForQuestionAnswering(own)).save_pretrained(root / "florence")
    config = tiny_captioning_config(bos_token_id=0, pad_token_id=1, eos_token_id=2)
    randomize(FlorenceForImageCaptioning(config)).save_pretrained(root / "captions")
    for folder in ("answers", "captions"):
        tiny_fusion_processor().save_pretrained(root / folder)
    tiny_processor().save_pretrained(root / "florence")
    return root


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    noise = np.random.default_rng(0)
    return [Image.fromarray(noise.integers(0, 256, (40, width, 3), dtype=np.uint8)) for width in (30, 50, 40)]


def by_hand(folder: Path, picture: Image.Image, question: str, dtype: torch.dtype = torch.float32) -> dict[str, float]:
    """Each answer's score from the model itself."""
    model = FlorenceForQuestionAnswering.from_pretrained(folder, dtype=dtype)
    inputs = FlorenceProcessor.from_pretrained(folder)(images=picture, text=question, return_tensors="pt")
    scores = model(**inputs.to(dtype)).logits[0].float().sigmoid().tolist()
    return dict(zip(ANSWERS.values(), scores, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize("folder", ["answers", "florence"])
def test_answers_are_the_models(root, pictures, folder, batch_size, dtype):
    pipe = pipeline(TASK, model=str(root / folder), dtype=dtype, batch_size=batch_size)
    assert type(pipe) is FlorenceVisualQuestionAnsweringPipeline
    assert type(pipe.model) is FlorenceForQuestionAnswering and pipe.model.dtype == dtype
    results = pipe(pictures, QUESTIONS, top_k=9)
    for picture, question, result in zip(pictures, QUESTIONS, results, strict=True):
        expected = by_hand(root / folder, picture, question, dtype)
        assert [entry["answer"] for entry in result] == sorted(
            (entry["answer"] for entry in result),
            key=lambda answer: -{e["answer"]: e["score"] for e in result}[answer],
        )
        got = {entry["answer"]: entry["score"] for entry in result}
        assert got.keys() == expected.keys()
        tolerance = 5e-2 if dtype == torch.bfloat16 else 1e-5
        assert_close([got[name] for name in expected], list(expected.values()), atol=tolerance, rtol=0)


def test_every_form_of_input_gives_the_same(root, pictures, tmp_path):
    pipe = pipeline(TASK, model=str(root / "answers"))
    pictures[0].save(tmp_path / "a.png")
    single = pipe(pictures[0], QUESTIONS[0])
    assert len(single) == 5 and single[0]["answer"] in ANSWERS.values()
    samples = [{"image": picture, "question": QUESTIONS[0]} for picture in pictures]
    assert pipe(samples[0]) == single
    assert pipe(str(tmp_path / "a.png"), QUESTIONS[0]) == single
    everything = pipe(samples)
    assert everything[0] == single and len(everything) == 3
    assert pipe(pictures, QUESTIONS[0]) == everything
    assert list(pipe(sample for sample in samples)) == everything
    one_picture = pipe(pictures[0], QUESTIONS)
    assert one_picture[0] == single and len(one_picture) == 3
    assert pipe(pictures[0], QUESTIONS[0], top_k=1) == single[:1]


def test_a_model_in_hand_needs_no_folder(root, pictures):
    processor = tiny_fusion_processor()
    model = FlorenceForQuestionAnswering.from_pretrained(root / "answers")
    pipe = pipeline(TASK, model=model, tokenizer=processor.tokenizer, image_processor=processor.image_processor)
    assert pipe(pictures[0], QUESTIONS[0]) == pipeline(TASK, model=str(root / "answers"))(pictures[0], QUESTIONS[0])


def test_special_tokens_that_users_type_are_text(root, pictures):
    pipe = pipeline(TASK, model=str(root / "answers"))
    ids = pipe.preprocess({"image": pictures[0], "question": "a <mask> </s>"})["input_ids"][0].tolist()
    assert ids[0] == 0 and ids[-1] == 2 and 4 not in ids and ids.count(2) == 1


@pytest.mark.parametrize("folder, limit", [("answers", 40), ("florence", 12)])
def test_a_long_question_is_cut_with_one_warning(root, pictures, folder, limit, caplog):
    transformers_logging.warning_once.cache_clear()
    pipe = pipeline(TASK, model=str(root / folder))
    with caplog.at_level(logging.WARNING):
        inputs = [pipe.preprocess({"image": pictures[0], "question": "is it so? " * 30}) for _ in range(2)]
    ids = inputs[0]["input_ids"][0]
    assert len(ids) == limit and ids[-1] == pipe.tokenizer.eos_token_id
    about_length = [record.getMessage() for record in caplog.records if "tokens" in record.getMessage()]
    assert about_length == [f"Questions longer than {limit} tokens are cut."]


@pytest.mark.parametrize(
    ("image", "question", "options", "message"),
    [
        (0, "", {}, "expected a question as a text that is not empty, got ''"),
        (0, " \n", {}, "expected a question as a text that is not empty"),
        (0, 3, {}, "expected a question as a text that is not empty, got 3"),
        (0, "\ud800", {}, "expected a question in valid Unicode"),
        ([0, 1], QUESTIONS, {}, r"expected as many pictures as questions, or one of either, got \[2, 3\]"),
        ([], QUESTIONS, {}, "expected as many pictures as questions"),
        ([], None, {}, "expected at least one picture with a question, got an empty list"),
        ({"image": 0}, None, {}, r"expected a dictionary with 'image' and 'question', .* got \['image'\]"),
        (0, None, {}, "expected a dictionary with 'image' and 'question', .* got Image"),
        (0, "what?", {"top_k": 0}, "`top_k`: expected an integer of at least 1, got 0"),
        (0, "what?", {"topk": 3}, "expected no options but top_k, got topk"),
        ("no-such-file.png", "what?", {}, "no-such-file.png"),
    ],
)
def test_doors(root, pictures, image, question, options, message):
    pipe = pipeline(TASK, model=str(root / "answers"))
    if isinstance(image, int):
        image = pictures[image]
    elif isinstance(image, list):
        image = [pictures[number] for number in image]
    with pytest.raises(ValueError, match=message):
        pipe(image, question, **options)


def test_registering_twice_says_nothing(caplog):
    with caplog.at_level(logging.WARNING):
        register_pipelines()
        register_pipelines()
    assert not caplog.records


def test_auto_classes_know_the_folders(root, tmp_path):
    assert type(AutoModel.from_pretrained(root / "answers")) is FlorenceFusionModel
    FlorenceForPreTraining(tiny_fusion_config()).save_pretrained(tmp_path)
    assert type(AutoModelForPreTraining.from_pretrained(tmp_path)) is FlorenceForPreTraining
    assert type(AutoModelForImageTextToText.from_pretrained(root / "captions")) is FlorenceForImageCaptioning
    assert type(AutoProcessor.from_pretrained(root / "captions")) is FlorenceProcessor


@pytest.mark.parametrize("text", ["", "a dog"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_captions_through_transformers_own_pipeline(root, pictures, text, dtype):
    pipe = pipeline("image-text-to-text", model=str(root / "captions"), dtype=dtype)
    assert type(pipe.model) is FlorenceForImageCaptioning
    options = {"max_new_tokens": 6, "generate_kwargs": {"do_sample": False}}
    result = pipe(pictures[0], text=text, return_full_text=False, **options)
    processor = tiny_fusion_processor()
    inputs = processor(images=pictures[0], text=text, return_tensors="pt").to(dtype)
    ids = FlorenceForImageCaptioning.from_pretrained(root / "captions", dtype=dtype).generate(
        **inputs, max_new_tokens=6, do_sample=False
    )
    prompt = inputs["input_ids"].shape[1] - 1  # less the end token
    expected = processor.tokenizer.decode(ids[0, prompt:], skip_special_tokens=True)
    assert result[0]["generated_text"] == expected and expected


def test_many_captions_at_once(root, pictures):
    pipe = pipeline("image-text-to-text", model=str(root / "captions"))
    options = {"generate_kwargs": {"max_new_tokens": 4, "do_sample": False}}
    together = pipe(pictures, text=["", "a dog", "two"], **options)
    for picture, text, result in zip(pictures, ["", "a dog", "two"], together, strict=True):
        alone = pipe(picture, text=text, **options)
        assert alone == [result]


CHILD = """
import json
import sys

sys.modules["transformers_florence"] = None  # even where it is installed, importing it fails

from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

folder = sys.argv[1]
picture = Image.effect_mandelbrot((48, 40), (-2, -1.5, 1, 1.5), 100)
asked = pipeline("florence-visual-question-answering", model=folder + "/answers", trust_remote_code=True)
told = pipeline("image-text-to-text", model=folder + "/captions", trust_remote_code=True)
for part in (asked, asked.model, told.model, told.processor):
    assert type(part).__module__.startswith("transformers_modules."), type(part)
caption = told(picture, text="a", generate_kwargs={"max_new_tokens": 4, "do_sample": False})
print(json.dumps([asked(picture, "is it red?"), caption]))
"""


@pytest.mark.slow
def test_folders_with_code_need_no_package(root, tmp_path, monkeypatch):
    doors = {
        FlorenceFusionConfig: "AutoConfig",
        FlorenceCaptioningConfig: "AutoConfig",
        FlorenceForQuestionAnswering: "AutoModelForVisualQuestionAnswering",
        FlorenceForImageCaptioning: "AutoModelForImageTextToText",
        FlorenceImageProcessor: "AutoImageProcessor",
        FlorenceProcessor: "AutoProcessor",
    }
    for ours, auto in doors.items():
        monkeypatch.setattr(ours, "_auto_class", None)  # taken back after the test, with what the next line does
        ours.register_for_auto_class(auto)
    asked = pipeline(TASK, model=str(root / "answers"))
    told = pipeline("image-text-to-text", model=str(root / "captions"))
    for pipe, folder in ((asked, "answers"), (told, "captions")):
        pipe.save_pretrained(tmp_path / folder)  # with the pipeline's code, where it is ours
        tiny_fusion_processor().save_pretrained(tmp_path / folder)
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", CHILD, str(tmp_path)]
    child = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert child.returncode == 0, child.stderr
    picture = Image.effect_mandelbrot((48, 40), (-2, -1.5, 1, 1.5), 100)
    caption = told(picture, text="a", generate_kwargs={"max_new_tokens": 4, "do_sample": False})
    expected = [asked(picture, "is it red?"), caption]
    assert json.loads(child.stdout.splitlines()[-1]) == expected
