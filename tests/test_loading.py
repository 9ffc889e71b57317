"""The loading helper refuses every damaged checkpoint by name; bundled checkpoints need no path."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor

from tests.tiny_florence import random_pixels, save_tiny, tiny_vision_config
from transformers_florence import (
    FlorenceBackbone,
    FlorenceForImageClassification,
    FlorenceModel,
    FlorenceTextModel,
    FlorenceVisionModel,
    bundled_checkpoint,
    load_bundled,
    load_checkpoint,
    loading,
    verify_checkpoint,
)
from transformers_florence.integrity import MANIFEST

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    save_tiny(folder)
    return folder


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    """Without a manifest, so that what was changed is seen by its own light and not by its digest."""
    return Path(shutil.copytree(whole, tmp_path / "copy", ignore=shutil.ignore_patterns(MANIFEST)))


def change_weights(folder: Path, **changes) -> None:
    """Replace weights (two underscores stand for a dot); None removes one."""
    weights = load_file(folder / WEIGHTS)
    for name, value in changes.items():
        weights[name.replace("__", ".")] = value
    save_file(
        {name: value for name, value in weights.items() if value is not None}, folder / WEIGHTS, {"format": "pt"}
    )


@pytest.mark.parametrize("model_class", [FlorenceModel, FlorenceVisionModel, FlorenceTextModel, AutoModel])
def test_a_whole_checkpoint_loads(whole, model_class):
    model = load_checkpoint(model_class, whole, dtype=torch.bfloat16)
    expected = model_class.from_pretrained(whole, dtype=torch.bfloat16)
    assert type(model) is type(expected) and not model.training and model.dtype == torch.bfloat16
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected.state_dict()[name]), name


def test_a_checkpoint_in_shards_loads(whole, tmp_path):
    FlorenceModel.from_pretrained(whole).save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / INDEX).is_file() and not (tmp_path / WEIGHTS).exists()
    model = load_checkpoint(FlorenceModel, tmp_path)
    assert torch.equal(model.logit_scale, FlorenceModel.from_pretrained(whole).logit_scale)
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ValueError, match=f"missing: {shard.name}"):
        load_checkpoint(FlorenceModel, tmp_path)
    (tmp_path / MANIFEST).unlink()
    with pytest.raises(ValueError, match=f"missing are: .*{shard.name}"):
        load_checkpoint(FlorenceModel, tmp_path)


@pytest.mark.parametrize(
    ("model_class", "new"), [(FlorenceForImageClassification, "classifier."), (FlorenceBackbone, "feature_norms.")]
)
def test_a_head_is_new_only_where_that_is_said(whole, model_class, new):
    assert any(name.startswith(new) for name in load_checkpoint(model_class, whole, new=(new,)).state_dict())
    with pytest.raises(ValueError, match=f"weights missing: {new}"):
        load_checkpoint(model_class, whole)


def test_keywords_reach_the_configuration(whole):
    model = load_checkpoint(FlorenceForImageClassification, whole, new=("classifier.",), num_labels=7)
    assert model(random_pixels(1)).logits.shape == (1, 7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logit_scale": None, "text_model__final_layer_norm__bias": None}, "missing: logit_scale, text_model.final"),
        ({"text_model__extra": torch.ones(1), "other": torch.ones(1)}, "unexpected: other, text_model.extra"),
        ({"logit_scale": torch.ones(3)}, r"another shape: logit_scale \(expected \(\), got \(3,\)\)"),
        ({"logit_scale": torch.tensor(math.nan)}, "not finite: logit_scale"),
        ({"visual_projection__weight": torch.full((12, 16), -math.inf)}, "not finite: visual_projection.weight"),
        ({"logit_scale": None, "other": torch.ones(1)}, "missing: logit_scale; unexpected: other"),
        ({"logit_scale": torch.tensor(2)}, r"another dtype: logit_scale \(I64\)"),
        ({"logit_scale": torch.tensor(True)}, r"another dtype: logit_scale \(BOOL\)"),
        ({"logit_scale": torch.tensor(2.0, dtype=torch.float64)}, r"another dtype: logit_scale \(F64\)"),
        ({"logit_scale": torch.tensor(2.0).to(torch.float8_e4m3fn)}, r"another dtype: logit_scale \(F8_E4M3\)"),
        (
            {"logit_scale": torch.tensor(2), "text_model__extra": torch.ones(1), "visual_projection__weight": None},
            "missing: visual_projection.weight; unexpected: text_model.extra; of another dtype: logit_scale",
        ),
    ],
)
def test_weights_that_do_not_fit_are_listed(copy, changes, message):
    change_weights(copy, **changes)
    with pytest.raises(ValueError, match=message) as caught:
        load_checkpoint(FlorenceModel, copy)
    assert str(copy) in str(caught.value)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_weights_may_be_stored_in_half_precision(copy, stored):
    """One of them, or all: the model computes in what its configuration says."""
    change_weights(copy, logit_scale=torch.tensor(2.0, dtype=stored))
    model = load_checkpoint(FlorenceModel, copy)
    assert model.logit_scale.item() == 2.0 and model.dtype == model.logit_scale.dtype == torch.float32


def test_double_precision_is_right_where_the_configuration_says_so(whole, tmp_path):
    FlorenceModel.from_pretrained(whole).double().save_pretrained(tmp_path)
    assert load_checkpoint(FlorenceModel, tmp_path).dtype == torch.float64
    assert load_checkpoint(FlorenceModel, tmp_path, dtype=torch.float32).dtype == torch.float32


def test_a_weight_in_two_files_is_refused(whole, tmp_path):
    FlorenceModel.from_pretrained(whole).save_pretrained(tmp_path, max_shard_size="60KB")
    (tmp_path / MANIFEST).unlink()
    first, second = (load_file(file) for file in sorted(tmp_path.glob("*.safetensors")))
    name = next(iter(first))
    save_file({**second, name: first[name] + 1}, sorted(tmp_path.glob("*.safetensors"))[1], {"format": "pt"})
    with pytest.raises(ValueError, match=f"stored twice: {name}$"):
        load_checkpoint(FlorenceModel, tmp_path)


def test_a_manifest_is_verified_where_there_is_one(whole, tmp_path):
    """The change of one bit of one weight, which nothing else could notice."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    verify_checkpoint(tmp_path)
    weights = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    with pytest.raises(ValueError, match=f"changed: {WEIGHTS}"):
        load_checkpoint(FlorenceModel, tmp_path)
    (tmp_path / MANIFEST).unlink()
    load_checkpoint(FlorenceModel, tmp_path)


def test_a_tower_passes_over_other_parts_and_nothing_else(copy):
    change_weights(copy, text_model__extra=torch.ones(1))
    load_checkpoint(FlorenceVisionModel, copy)
    change_weights(copy, vision_model__extra=torch.ones(1))
    with pytest.raises(ValueError, match="unexpected: vision_model.extra"):
        load_checkpoint(FlorenceVisionModel, copy)


def test_another_size_is_refused(copy):
    config = json.loads((copy / "config.json").read_text("utf-8"))
    config["vision_config"]["embed_dim"] *= 2
    (copy / "config.json").write_text(json.dumps(config), "utf-8")
    with pytest.raises(ValueError, match="of another shape: .*vision_model.embeddings.norm.bias"):
        load_checkpoint(FlorenceModel, copy)


def test_a_tower_is_no_dual_encoder(whole, tmp_path):
    FlorenceVisionModel(tiny_vision_config()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="FlorenceModel .*got .* with model_type 'florence_vision_model'"):
        load_checkpoint(FlorenceModel, tmp_path)


@pytest.mark.parametrize("content", [b"", b"<html>404</html>" * 99, "half"], ids=["empty", "page", "truncated"])
def test_a_damaged_weight_file_is_named(copy, content):
    file = copy / WEIGHTS
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2] if content == "half" else content)
    with pytest.raises(ValueError, match=f"{WEIGHTS}, which is truncated or corrupt") as caught:
        load_checkpoint(FlorenceModel, copy)
    assert caught.value.__cause__ is not None


def test_a_pickle_is_never_read(copy):
    torch.save(load_file(copy / WEIGHTS), copy / "pytorch_model.bin")
    (copy / WEIGHTS).unlink()
    with pytest.raises(ValueError, match=f"expected {WEIGHTS}"):
        load_checkpoint(FlorenceModel, copy)


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"weight_map": 3}',
        '{"weight_map": {"a": 3}}',
        '{"weight_map": {"a": "../whole/model.safetensors"}}',
    ],
)
def test_a_damaged_index_is_named(copy, content):
    (copy / WEIGHTS).unlink()
    (copy / INDEX).write_text(content, "utf-8")
    with pytest.raises(ValueError, match=f"{INDEX}, which is corrupt") as caught:
        load_checkpoint(FlorenceModel, copy)
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize("content", [None, "{", "[]", "{}", '{"model_type": "florence", "projection_dim": 0}'])
def test_a_damaged_configuration_is_refused(copy, content):
    file = copy / "config.json"
    file.unlink() if content is None else file.write_text(content, "utf-8")
    with pytest.raises(ValueError, match="config.json|projection_dim"):
        load_checkpoint(FlorenceModel, copy)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        load_checkpoint(FlorenceModel, tmp_path / "nowhere")


@pytest.fixture
def bundle(whole, tmp_path, monkeypatch) -> Path:
    shutil.copytree(whole, tmp_path / "florence-tiny")
    monkeypatch.setattr(loading, "BUNDLED", tmp_path)
    return tmp_path / "florence-tiny"


def test_a_bundled_checkpoint_loads_by_name(bundle):
    assert bundled_checkpoint("florence-tiny") == str(bundle)
    model, processor = load_bundled("florence-tiny", dtype=torch.bfloat16)
    assert type(model) is FlorenceModel and model.dtype == torch.bfloat16
    inputs = processor(text=["a cat"], return_tensors="pt")
    expected = FlorenceModel.from_pretrained(bundle, dtype=torch.bfloat16)(**inputs).text_embeds
    assert torch.equal(model(**inputs).text_embeds, expected)
    assert AutoProcessor.from_pretrained(bundled_checkpoint("florence-tiny"))(text="a cat")["input_ids"]


@pytest.mark.parametrize("name", ["florence-huge", "", "..", "florence-tiny/../florence-tiny", None])
def test_an_unknown_name_is_answered_with_the_known_ones(bundle, name):
    with pytest.raises(ValueError, match=r"\(florence-tiny\)"):
        bundled_checkpoint(name)


def test_a_damaged_bundle_is_refused(bundle):
    (bundle / WEIGHTS).write_bytes(b"")
    with pytest.raises(ValueError, match=WEIGHTS):
        load_bundled("florence-tiny")


@pytest.mark.parametrize("folder", sorted(path.name for path in loading.BUNDLED.glob("*/")) or [None])
def test_what_comes_with_the_package_is_whole(folder):
    if folder is None:
        pytest.skip(
            "needs a checkpoint in src/transformers_florence/checkpoints; train one with examples/pretrain_unicl.py"
        )
    model, processor = load_bundled(folder)
    size = model.config.vision_config.image_size
    inputs = processor(text=["a photo of a cat", "a photo of a dog"], return_tensors="pt")
    output = model(pixel_values=torch.zeros(1, 3, size, size), **inputs)
    assert output.logits_per_image.isfinite().all() and output.logits_per_image.shape == (1, 2)
    assert len(processor.tokenizer) == model.config.text_config.vocab_size
    assert processor.tokenizer.model_max_length == model.config.text_config.max_position_embeddings
