"""A folder saved with its code loads where the package is not installed, and computes the same: every class."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from tests.tiny_florence import TEXTS, tiny_model, tiny_processor
from tests.tiny_heads import HEADS, TABLE, batch_for, processor_for, tiny_head
from transformers_florence import (
    FlorenceConfig,
    FlorenceDetectionImageProcessor,
    FlorenceForImageCaptioning,
    FlorenceForImageClassification,
    FlorenceForObjectDetection,
    FlorenceForPreTraining,
    FlorenceForQuestionAnswering,
    FlorenceForVideoClassification,
    FlorenceForZeroShotObjectDetection,
    FlorenceImageProcessor,
    FlorenceModel,
    FlorenceProcessor,
    FlorenceTokenizer,
    FlorenceVideoProcessor,
    FlorenceZeroShotDetectionProcessor,
)

PICTURE = Image.effect_mandelbrot((48, 40), (-2, -1.5, 1, 1.5), 100)
LONG = "a photo of " * 20
CHILD = """
import sys

sys.modules["transformers_florence"] = None  # even where it is installed, importing it fails

from PIL import Image
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoProcessor, AutoTokenizer

folder, result, *texts = sys.argv[1:]
picture = Image.effect_mandelbrot((48, 40), (-2, -1.5, 1, 1.5), 100)
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
for loaded in (config, model, tokenizer, processor, processor.image_processor, processor.tokenizer):
    assert type(loaded).__module__.startswith("transformers_modules."), type(loaded)
    assert type(loaded).__name__.startswith("Florence"), type(loaded)
assert tokenizer(texts)["input_ids"] == processor.tokenizer(texts)["input_ids"]
inputs = processor(images=picture, text=texts, return_tensors="pt")
output = model(**inputs, return_loss=False)
save_file({**inputs, "logits": output.logits_per_image.contiguous()}, result)
"""


# The Auto class that opens each. A backbone's own takes a folder for a name on the Hub: test_hub.py has that.
PROCESSORS = {
    FlorenceTokenizer: "AutoTokenizer",
    FlorenceImageProcessor: "AutoImageProcessor",
    FlorenceDetectionImageProcessor: "AutoImageProcessor",
    FlorenceVideoProcessor: "AutoVideoProcessor",
    FlorenceProcessor: "AutoProcessor",
    FlorenceZeroShotDetectionProcessor: "AutoProcessor",
}
MODELS = {
    **dict.fromkeys(HEADS, "AutoModel"),
    FlorenceForImageClassification: "AutoModelForImageClassification",
    FlorenceForObjectDetection: "AutoModelForObjectDetection",
    FlorenceForQuestionAnswering: "AutoModelForVisualQuestionAnswering",
    FlorenceForPreTraining: "AutoModelForPreTraining",
    FlorenceForImageCaptioning: "AutoModelForImageTextToText",
    FlorenceForVideoClassification: "AutoModelForVideoClassification",
    FlorenceForZeroShotObjectDetection: "AutoModelForZeroShotObjectDetection",
}


def tensors(value, name=""):
    """Those in an output or a batch, by their paths: what the other process does too."""
    if isinstance(value, torch.Tensor):
        return {name: value.contiguous()}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, tuple | list) else ()
    return {path: each for key, item in items for path, each in tensors(item, f"{name}.{key}").items()}


EVERY_IMPORT = """
import sys

sys.modules["transformers_florence"] = None  # even where it is installed, importing it fails

import torch
import transformers
from safetensors.torch import load_file, save_file

"""
EVERY_HEAD = """
for number in range(1, len(sys.argv), 3):
    folder, door, opener = sys.argv[number : number + 3]
    model = getattr(transformers, door).from_pretrained(folder, trust_remote_code=True)
    processor = getattr(transformers, opener).from_pretrained(folder, trust_remote_code=True)
    for part in (model, model.config, processor):
        assert type(part).__module__.startswith("transformers_modules."), type(part)
    assert folder.endswith(type(model).__name__), type(model)
    given = load_file(f"{folder}/given")
    frames = given.pop("frames")
    made = {}
    if opener == "AutoImageProcessor":
        made = processor(list(frames), return_tensors="pt")
    elif opener == "AutoVideoProcessor":
        made = processor(frames, return_tensors="pt")
    with torch.no_grad():
        computed = model(**given)
    save_file({**tensors(dict(made), "made"), **tensors(dict(computed), "computed")}, f"{folder}/result")
"""


def publish(doors: dict[type, str], monkeypatch) -> None:
    """From now on these classes are saved with the files that define them, to be opened by these Auto classes."""
    for ours, auto in doors.items():
        monkeypatch.setattr(ours, "_auto_class", None)  # taken back after the test, with what the next line does
        ours.register_for_auto_class(auto)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A dual encoder and its processor, saved with the files that define them."""
    publish({FlorenceConfig: "AutoConfig", FlorenceModel: "AutoModel", **PROCESSORS}, monkeypatch)
    model = tiny_model()
    model.save_pretrained(tmp_path / "saved")
    tiny_processor().save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def run(code: str, folder: Path, *arguments: str) -> None:
    """In a fresh process; `folder` is for what it makes of code that comes with a checkpoint."""
    environment = {**os.environ, "HF_MODULES_CACHE": str(folder / "modules")}
    command = [sys.executable, "-c", code, *arguments]
    child = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, check=False)
    assert child.returncode == 0, child.stderr


def test_a_folder_with_code_needs_no_package(folder, tmp_path):
    run(CHILD, tmp_path, str(folder), str(tmp_path / "result.safetensors"), *TEXTS, LONG)
    result = load_file(tmp_path / "result.safetensors")
    inputs = tiny_processor()(images=PICTURE, text=[*TEXTS, LONG], return_tensors="pt")
    expected = {**inputs, "logits": FlorenceModel.from_pretrained(folder)(**inputs).logits_per_image}
    assert_close(result, expected)


def test_only_what_is_needed_travels(folder):
    code = {path.stem for path in folder.glob("*.py")}
    assert code == {
        "configuration_florence",
        "image_checks",
        "image_processing_florence",
        "image_processing_shared",
        "integrity",
        "layers",
        "losses_contrastive",
        "modeling_florence",
        "modeling_florence_text",
        "modeling_florence_vision",
        "processing_florence",
        "tokenization_florence",
        "window_ops",
    }


@pytest.mark.slow  # test_hub.py has every class, with its code, without its processor
def test_every_class_comes_with_its_code(tmp_path, monkeypatch):
    """One process opens them all, each from a folder of its own."""
    configs = {type(TABLE[head].config()): "AutoConfig" for head in HEADS}
    publish({**configs, **MODELS, **PROCESSORS}, monkeypatch)
    frames = torch.randint(0, 256, (4, 3, 40, 48), dtype=torch.uint8)
    arguments, expected = [], {}
    for head in HEADS:
        folder, model, processor = tmp_path / head.__name__, tiny_head(head), processor_for(head)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        batch = batch_for(head)
        save_file({**batch, "frames": frames}, folder / "given")
        opener = PROCESSORS[type(processor)]
        arguments += [str(folder), MODELS[head], opener]
        made = {}
        if opener in ("AutoImageProcessor", "AutoVideoProcessor"):
            made = dict(processor(frames if "Video" in opener else list(frames), return_tensors="pt"))
        with torch.no_grad():
            computed = dict(model(**batch))
        expected[head] = {**tensors(made, "made"), **tensors(computed, "computed")}
    run(f"{EVERY_IMPORT}{inspect.getsource(tensors)}{EVERY_HEAD}", tmp_path, *arguments)
    for head in HEADS:
        assert_close(load_file(tmp_path / head.__name__ / "result"), expected[head])
