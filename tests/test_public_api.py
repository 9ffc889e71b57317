"""What `import transformers_florence` promises: names, docstrings, Auto classes, and no need of any extra."""

import inspect
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
    AutoTokenizer,
)

import transformers_florence
from tests.tiny_florence import random_pixels, save_tiny, tiny_image_processor, tiny_tokenizer
from transformers_florence import (
    FlorenceBackbone,
    FlorenceConfig,
    FlorenceForImageClassification,
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

ROOT = Path(__file__).resolve().parents[1]

# A name that goes away or changes its arguments breaks somebody: change this list only on purpose, with the changelog.
PUBLIC = {
    "FlorenceBackbone": "(config)",
    "FlorenceCaptioningConfig": None,
    "FlorenceConfig": None,  # fields, see test_configuration_florence.py
    "FlorenceDetectionConfig": None,  # fields, see test_configuration_florence_detection.py
    "FlorenceDetectionImageProcessor": "(**kwargs)",
    "FlorenceForImageCaptioning": "(config)",
    "FlorenceForImageClassification": "(config)",
    "FlorenceForImageTextRetrieval": "(config)",
    "FlorenceForObjectDetection": "(config)",
    "FlorenceForPreTraining": "(config)",
    "FlorenceForQuestionAnswering": "(config)",
    "FlorenceForVideoClassification": "(config)",
    "FlorenceForVideoTextRetrieval": "(config)",
    "FlorenceForZeroShotObjectDetection": "(config)",
    "FlorenceFusionConfig": None,
    "FlorenceFusionModel": "(config)",
    "FlorenceImageProcessor": "(**kwargs)",
    "FlorenceImageProcessorPil": "(**kwargs)",
    "FlorenceModel": "(config)",
    "FlorenceOutput": None,
    "FlorenceProcessor": "(image_processor, tokenizer)",
    "FlorenceTextConfig": None,
    "FlorenceTextModel": "(config)",
    "FlorenceTokenizer": None,
    "FlorenceVideoConfig": None,
    "FlorenceVideoError": None,
    "FlorenceVideoModel": "(config)",
    "FlorenceVideoProcessor": "(**kwargs)",
    "FlorenceVideoTextConfig": None,
    "FlorenceVisionConfig": None,
    "FlorenceVisionModel": "(config, *, add_final_norm=True)",
    "FlorenceVisualQuestionAnsweringPipeline": None,  # transformers' own
    "FlorenceZeroShotDetectionConfig": None,
    "FlorenceZeroShotDetectionProcessor": "(image_processor, tokenizer)",
    "bundled_checkpoint": "(name='florence-nano')",
    "create_model_card": "(model, name, *, results=(), description='', **metadata)",
    "fusion_learning_rates": "(learning_rate, *, fusion_factor=5.0, head_factor=50.0)",
    "inflate_from_image": "(image_model, **fields)",
    "load_bundled": "(name='florence-nano', **kwargs)",
    "load_checkpoint": "(model_class, path, *, new=(), **kwargs)",
    "sample_frame_indices": "(total, num_frames, sampling='uniform', frame_stride=1, num_clips=1, generator=None)",
    "unicl_loss": "(image_embeds, text_embeds, labels, logit_scale, reduction='mean')",
    "verify_checkpoint": "(folder)",
    "write_manifest": "(folder)",
}
FORWARD = {
    "FlorenceModel": "(self, input_ids=None, pixel_values=None, attention_mask=None, position_ids=None, labels=None, "
    "return_loss=None, **kwargs)",
    "FlorenceVisionModel": "(self, pixel_values=None, **kwargs)",
    "FlorenceTextModel": "(self, input_ids=None, attention_mask=None, position_ids=None, **kwargs)",
    "FlorenceForImageClassification": "(self, pixel_values=None, labels=None, **kwargs)",
    "FlorenceForObjectDetection": "(self, pixel_values=None, pixel_mask=None, labels=None, **kwargs)",
    "FlorenceBackbone": "(self, pixel_values, **kwargs)",
    "FlorenceProcessor": "(self, images=None, text=None, **kwargs)",
    "FlorenceForImageCaptioning": "(self, input_ids=None, pixel_values=None, attention_mask=None, position_ids=None, "
    "image_embeds=None, past_key_values=None, labels=None, use_cache=None, logits_to_keep=0, **kwargs)",
    "FlorenceForZeroShotObjectDetection": "(self, pixel_values=None, pixel_mask=None, input_ids=None, "
    "attention_mask=None, class_embeds=None, labels=None, **kwargs)",
    "FlorenceFusionModel": "(self, input_ids=None, pixel_values=None, attention_mask=None, "
    "token_type_ids=None, image_embeds=None, image_rows=None, **kwargs)",
    "FlorenceForImageTextRetrieval": "(self, input_ids=None, pixel_values=None, attention_mask=None, "
    "token_type_ids=None, "
    "image_embeds=None, labels=None, **kwargs)",
    "FlorenceForPreTraining": "(self, input_ids=None, pixel_values=None, attention_mask=None, "
    "token_type_ids=None, "
    "image_embeds=None, labels=None, pair_labels=None, similarities=None, **kwargs)",
    "FlorenceForQuestionAnswering": "(self, input_ids=None, pixel_values=None, attention_mask=None, "
    "token_type_ids=None, image_embeds=None, image_rows=None, labels=None, **kwargs)",
    "FlorenceForVideoClassification": "(self, pixel_values_videos=None, labels=None, **kwargs)",
    "FlorenceForVideoTextRetrieval": "(self, input_ids=None, pixel_values_videos=None, attention_mask=None, "
    "position_ids=None, labels=None, return_loss=None, **kwargs)",
    "FlorenceVideoModel": "(self, pixel_values_videos=None, **kwargs)",
}
INHERITED_MEANING = {  # methods documented by transformers
    f"{verb}_{side}_embeddings" for verb in ("get", "set") for side in ("input", "output")
}


def bare_signature(function) -> str:
    """The signature without annotations."""
    signature = inspect.signature(function)
    parameters = [each.replace(annotation=each.empty) for each in signature.parameters.values()]
    return str(signature.replace(parameters=parameters, return_annotation=signature.empty))


def test_public_names_and_their_arguments():
    assert sorted(transformers_florence.__all__) == sorted(PUBLIC)
    found = {name: getattr(transformers_florence, name) for name in PUBLIC}
    signatures = {name: bare_signature(found[name]) for name, expected in PUBLIC.items() if expected is not None}
    assert signatures == {name: expected for name, expected in PUBLIC.items() if expected is not None}
    calls = {name: found[name].__call__ if name == "FlorenceProcessor" else found[name].forward for name in FORWARD}
    assert {name: bare_signature(call) for name, call in calls.items()} == FORWARD


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_every_public_name_says_what_it_is(name):
    thing = getattr(transformers_florence, name)
    assert len(inspect.cleandoc(thing.__dict__.get("__doc__") or thing.__doc__ or "")) > 60
    if inspect.isclass(thing):
        assert thing.__doc__ not in [base.__doc__ for base in thing.__mro__[1:]], "an inherited docstring"
        for method, value in vars(thing).items():
            if inspect.isfunction(value) and not method.startswith("_") and method not in INHERITED_MEANING:
                assert value.__doc__, f"{name}.{method}"


def test_the_version_is_the_projects():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert transformers_florence.__version__ in (project["version"], "0+unknown")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Checkpoints as a user would save them: the dual encoder, each tower alone, a classifier."""
    root = tmp_path_factory.mktemp("checkpoints")
    save_tiny(root / "both")
    FlorenceVisionModel.from_pretrained(root / "both").save_pretrained(root / "vision")
    FlorenceTextModel.from_pretrained(root / "both").save_pretrained(root / "text")
    FlorenceForImageClassification.from_pretrained(root / "both", num_labels=5).save_pretrained(root / "classifier")
    tiny_image_processor().save_pretrained(root / "vision")
    tiny_image_processor().save_pretrained(root / "classifier")
    tiny_tokenizer().save_pretrained(root / "text")
    return {name: root / name for name in ("both", "vision", "text", "classifier")}


@pytest.mark.parametrize(
    ("auto", "folder", "expected"),
    [
        (AutoConfig, "both", FlorenceConfig),
        (AutoConfig, "vision", FlorenceVisionConfig),
        (AutoConfig, "text", FlorenceTextConfig),
        (AutoModel, "both", FlorenceModel),
        (AutoModel, "vision", FlorenceVisionModel),
        (AutoModel, "text", FlorenceTextModel),
        (AutoModelForZeroShotImageClassification, "both", FlorenceModel),
        (AutoModelForImageClassification, "classifier", FlorenceForImageClassification),
        (AutoModelForImageClassification, "vision", FlorenceForImageClassification),
        (AutoModelForImageClassification, "both", FlorenceForImageClassification),
        (AutoImageProcessor, "both", FlorenceImageProcessor),
        (AutoImageProcessor, "vision", FlorenceImageProcessor),
        (AutoTokenizer, "both", FlorenceTokenizer),
        (AutoTokenizer, "text", FlorenceTokenizer),
        (AutoProcessor, "both", FlorenceProcessor),
    ],
)
def test_auto_classes_find_ours(folders, auto, folder, expected):
    assert type(auto.from_pretrained(folders[folder])) is expected


def test_auto_classes_find_ours_without_files_of_their_own(folders, tmp_path):
    """A configuration alone is enough, but only a text tower's brings a tokenizer: others would get an empty one."""
    config = AutoConfig.from_pretrained(folders["vision"])
    assert type(AutoBackbone.from_config(config)) is FlorenceBackbone
    assert type(AutoImageProcessor.from_pretrained(folders["vision"], backend="pil")) is FlorenceImageProcessorPil
    FlorenceModel.from_pretrained(folders["both"]).save_pretrained(tmp_path)
    with pytest.raises((ValueError, OSError)):
        AutoTokenizer.from_pretrained(tmp_path)


def test_a_dual_encoder_starts_a_classifier(folders):
    model = AutoModelForImageClassification.from_pretrained(folders["both"], num_labels=10, dtype=torch.bfloat16)
    tower = FlorenceVisionModel.from_pretrained(folders["both"], dtype=torch.bfloat16)
    assert type(model.config) is FlorenceVisionConfig and model.dtype == torch.bfloat16
    output = model(random_pixels(2), output_hidden_states=True)
    assert output.logits.shape == (2, 10)
    assert torch.equal(output.hidden_states[-1], tower(random_pixels(2), output_hidden_states=True).hidden_states[-1])


# Hides packages as if they had never been installed; what else a finder can do, it still does.
HIDE = """
import sys

class Hiding:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, *args):
        return None if name.split(".")[0] in HIDDEN else self.finder.find_spec(name, *args)

sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path]
"""
USE = """
import torch
import transformers_florence as florence

vision = florence.FlorenceVisionConfig(embed_dim=8, depths=[1], num_heads=[1])
text = florence.FlorenceTextConfig(hidden_size=8, num_attention_heads=1, num_hidden_layers=1, vocab_size=520)
model = florence.FlorenceModel(florence.FlorenceConfig(vision_config=vision, text_config=text))
tokenizer = florence.FlorenceTokenizer.train_new(["a cat"] * 9, vocab_size=515, model_max_length=8)
processor = florence.FlorenceProcessor(florence.FlorenceImageProcessor(), tokenizer)
inputs = processor(images=torch.zeros(3, 30, 40), text="a cat", return_tensors="pt")
print(tuple(model(**inputs).logits_per_image.shape), sorted(HIDDEN & {name.split(".")[0] for name in sys.modules}))
"""
COST = """
import json, sys
from transformers import AutoBackbone, AutoModel, AutoProcessor, AutoTokenizer
from transformers import CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

before = set(sys.modules)
import transformers_florence
print(json.dumps(sorted({name.split(".")[0] for name in set(sys.modules) - before})))
"""


def run_python(code: str) -> str:
    """What a fresh interpreter prints."""
    source = str(Path(transformers_florence.__file__).parents[1])
    paths = os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-c", code]
    result = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths}, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def extras() -> set[str]:
    """Import names of every package that only an extra brings."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    names = {
        re.split(r"[^\w-]", requirement)[0].lower().replace("-", "_")
        for extra in project["optional-dependencies"].values()
        for requirement in extra
    }
    imports = {"scikit_learn": "sklearn", "resvg_py": "resvg_py", "pyyaml": None, "transformers_florence": None}
    return {imports.get(name, name) for name in names} - {None}  # PyYAML also comes with transformers


def test_the_package_needs_no_extra():
    hidden = extras()
    assert {"datasets", "accelerate", "matplotlib", "sklearn"} <= hidden
    assert run_python(f"HIDDEN = {hidden!r}\n{HIDE}\n{USE}").strip() == "(1, 1) []"


def test_the_package_imports_no_more_than_transformers_does():
    """What it costs to import: nothing beyond transformers' own models, tokenizers and image processors."""
    added = set(json.loads(run_python(COST)))
    assert added - set(sys.stdlib_module_names) - {"transformers"} == {"transformers_florence"}
