"""A folder saved with its code loads where the package is not installed, and computes the same."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file
from torch.testing import assert_close

from tests.tiny_florence import TEXTS, tiny_model, tiny_processor
from transformers_florence import (
    FlorenceConfig,
    FlorenceImageProcessor,
    FlorenceModel,
    FlorenceProcessor,
    FlorenceTokenizer,
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


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A dual encoder and its processor, saved with the files that define them."""
    doors = {
        FlorenceConfig: "AutoConfig",
        FlorenceModel: "AutoModel",
        FlorenceTokenizer: "AutoTokenizer",
        FlorenceImageProcessor: "AutoImageProcessor",
        FlorenceProcessor: "AutoProcessor",
    }
    for ours, auto in doors.items():
        monkeypatch.setattr(ours, "_auto_class", None)  # taken back after the test, with what the next line does
        ours.register_for_auto_class(auto)
    model = tiny_model()
    model.save_pretrained(tmp_path / "saved")
    tiny_processor().save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def test_a_folder_with_code_needs_no_package(folder, tmp_path):
    command = [sys.executable, "-c", CHILD, str(folder), str(tmp_path / "result.safetensors"), *TEXTS, LONG]
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    child = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert child.returncode == 0, child.stderr
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
