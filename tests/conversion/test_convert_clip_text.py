"""CLIP's text towers in the layouts of three projects: the same numbers from ours, with projection and gradients."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from transformers import (
    AutoModel,
    AutoProcessor,
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
)

from conversion import convert_clip_text
from conversion.convert_clip_text import TABLES, convert, convert_file, saved_fields
from conversion.key_tables import apply_table
from conversion.reading import config_beside
from tests.conversion.sources import PRECISIONS, Tensors, TextTower, random_weights, texts, write
from tests.tiny_florence import random_pixels, tiny_tokenizer, tiny_vision_config
from transformers_florence import FlorenceModel, FlorenceTextModel, FlorenceVisionModel, load_checkpoint

SHAPE = {"vocab_size": 560, "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "projection_dim": 12}
SHAPE |= {"num_attention_heads": 1, "max_position_embeddings": 12, "bos_token_id": 558, "eos_token_id": 559}


def transformers_text(**fields: Any) -> CLIPTextModelWithProjection:
    return random_weights(CLIPTextModelWithProjection(CLIPTextConfig(**{**SHAPE, **fields})), 1)


def open_clip_keys(tensors: Tensors) -> Tensors:
    """By hand: what open_clip, and OpenAI before it, would call the tensors of transformers' text tower."""
    named = {
        "token_embedding.weight": tensors["text_model.embeddings.token_embedding.weight"],
        "positional_embedding": tensors["text_model.embeddings.position_embedding.weight"],
        "ln_final.weight": tensors["text_model.final_layer_norm.weight"],
        "ln_final.bias": tensors["text_model.final_layer_norm.bias"],
        "text_projection": tensors["text_projection.weight"].T,
    }
    parts = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    for layer in range(2):
        ours, theirs = f"text_model.encoder.layers.{layer}.", f"transformer.resblocks.{layer}."
        for kind in ("weight", "bias"):
            attention = [tensors[f"{ours}self_attn.{part}_proj.{kind}"] for part in "qkv"]
            named[f"{theirs}attn.in_proj_{kind}"] = torch.cat(attention)
            named[f"{theirs}attn.out_proj.{kind}"] = tensors[f"{ours}self_attn.out_proj.{kind}"]
            for their_part, part in parts.items():
                named[f"{theirs}{their_part}.{kind}"] = tensors[f"{ours}{part}.{kind}"]
    return named


def reference_keys(tensors: Tensors) -> Tensors:
    """The tensors of our own copy of CLIP's text transformer, which has no module named `transformer`."""
    return {name.replace("resblocks", "transformer.resblocks"): tensor for name, tensor in tensors.items()}


def with_everything_else(tensors: Tensors, layout: str) -> Tensors:
    """A whole model's file: an image tower, the temperature, and what old files hold beside the weights."""
    tower = "text." if layout == "younger" else ""
    whole = {tower + name: tensor for name, tensor in tensors.items()}
    whole |= {"logit_scale": torch.tensor(4.6), "visual.conv1.weight": torch.ones(2), "visual.proj": torch.ones(2)}
    if layout == "younger":
        return whole | {"text.attn_mask": torch.full((12, 12), -torch.inf).triu(1), "logit_bias": torch.tensor(-10.0)}
    return whole | {"context_length": torch.tensor(12), "vocab_size": torch.tensor(560)}


def gradients_of(model: torch.nn.Module) -> Tensors:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


# --------------------------------------------------------------------------------------------- the same numbers


@PRECISIONS
@pytest.mark.parametrize("layout", ["elder", "younger"])
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_open_clips_towers(activation: str, layout: str, dtype: torch.dtype, tolerance: float):
    """Against the transformer as CLIP's authors wrote it, on PyTorch's own attention."""
    source = random_weights(TextTower(activation, eps=1e-5), 1).to(dtype)
    tensors = with_everything_else(reference_keys(source.state_dict()), layout)
    model, conversion = convert(tensors, "here", {"hidden_act": activation})
    assert isinstance(model, FlorenceTextModel) and model.dtype == dtype
    assert (model.config.layer_norm_eps, model.config.max_position_embeddings) == (1e-5, 12)
    states, pooled, _ = source(texts())
    output = model(texts())
    assert_close(output.last_hidden_state, states, rtol=0, atol=tolerance)
    assert_close(output.pooler_output, pooled, rtol=0, atol=tolerance)

    weights = torch.randn(pooled.shape, dtype=dtype, generator=torch.Generator().manual_seed(6))
    for result in (pooled, output.pooler_output):
        (result * weights).sum().backward()
    expected = apply_table(reference_keys(gradients_of(source)), TABLES["open_clip"], "gradients")
    assert expected.unknown == []
    assert_close(gradients_of(model), expected.tensors, rtol=0, atol=tolerance)
    # What is not the text tower's is left out, by name.
    left = {"logit_scale", "visual.conv1.weight", "visual.proj", "context_length", "vocab_size"}
    if layout == "younger":
        left = left - {"context_length", "vocab_size"} | {"logit_bias", "text.attn_mask"}
    assert set(conversion.left_out) == left | {"text.text_projection" if layout == "younger" else "text_projection"}


@PRECISIONS
@pytest.mark.parametrize("layout", ["elder", "younger"])
def test_open_clips_layouts_hold_transformers_tensors(layout: str, dtype: torch.dtype, tolerance: float):
    source = transformers_text(hidden_act="gelu").to(dtype)
    tensors = with_everything_else(open_clip_keys(source.state_dict()), layout)
    model, _ = convert(tensors, "here", {"hidden_act": "gelu"})
    expected = source.text_model(texts(), output_hidden_states=True)
    output = model(texts(), output_hidden_states=True)
    assert_close(output.pooler_output, expected.pooler_output, rtol=0, atol=tolerance)
    assert_close(output.hidden_states, expected.hidden_states, rtol=0, atol=tolerance)


@PRECISIONS
@pytest.mark.parametrize("names", [dict, open_clip_keys], ids=["transformers", "open_clip"])
def test_the_projection_comes_with_an_image_tower(names: Callable, dtype: torch.dtype, tolerance: float):
    source = transformers_text().to(dtype)
    vision = FlorenceVisionModel(tiny_vision_config())
    model, conversion = convert(names(source.state_dict()), "here", {"hidden_act": "quick_gelu"}, vision)
    assert isinstance(model, FlorenceModel) and model.dtype == dtype
    embeds = model.get_text_features(texts()).pooler_output
    assert_close(embeds, source(texts()).text_embeds, rtol=0, atol=tolerance)
    pictures = random_pixels().to(dtype)
    with torch.no_grad():
        assert_close(model.vision_model(pictures).pooler_output, vision.to(dtype).eval()(pictures).pooler_output)
    assert set(conversion.new) == {"visual_projection.weight", "logit_scale"}
    assert model.logit_scale.item() == pytest.approx(2.6592)

    weights = torch.randn(embeds.shape, dtype=dtype, generator=torch.Generator().manual_seed(6))
    for result in (embeds, source(texts()).text_embeds):
        (result * weights).sum().backward()
    expected = apply_table(names(gradients_of(source)), TABLES["transformers" if names is dict else "open_clip"], "")
    expected.rename(r"(?!text_projection)", "text_model.")
    assert_close(gradients_of(model), expected.tensors, rtol=0, atol=tolerance)


# -------------------------------------------------------------------------------------------------------- transformers


def transformers_source(kind: str) -> torch.nn.Module:
    """One of the models that hold CLIP's text tower."""
    text = transformers_text(hidden_act="gelu", layer_norm_eps=1e-3)
    if kind == "tower":
        tower = CLIPTextModel(text.config)
        tower.load_state_dict(text.text_model.state_dict())
        return tower.eval()
    if kind == "projected":
        return text
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 1}
    both = CLIPModel(
        CLIPConfig(
            text_config=text.config.to_dict(),
            vision_config={**vision, "image_size": 32, "patch_size": 16},
            projection_dim=12,
        )
    )
    both.load_state_dict(text.state_dict(), strict=False)
    return both.eval()


@pytest.mark.parametrize("kind", ["tower", "projected", "both"])
@pytest.mark.parametrize("form", ["folder", "file.safetensors", "file.bin"])
def test_transformers_checkpoints(kind: str, form: str, tmp_path: Path, capsys):
    """Saved by transformers, with the activation and the norms' epsilon in its config.json."""
    source, folder, output = transformers_source(kind), tmp_path / "in", tmp_path / "out"
    source.save_pretrained(folder)
    file = folder
    if form != "folder":
        extra = {"text_model.embeddings.position_ids": torch.arange(12)[None]}  # as older files have it
        file = write(folder / form, dict(source.state_dict()) | extra)
    convert_clip_text.main([str(file), str(output)])
    printed = capsys.readouterr().out
    assert ("text_projection.*: a text tower ends at the pooled state" in printed) == (kind != "tower")
    assert ("vision_model.embeddings.class_embedding: belongs to CLIP's image tower" in printed) == (kind == "both")
    assert ("position_ids: counts from zero" in printed) == (form != "folder")
    model = load_checkpoint(FlorenceTextModel, output)
    assert isinstance(AutoModel.from_pretrained(output), FlorenceTextModel)
    tower = source if kind == "tower" else source.text_model
    # Another epsilon and activation than the defaults, with and without a mask.
    for mask in (None, (texts() != 559).long()):
        with torch.no_grad():
            expected = tower(texts(), attention_mask=mask)
            result = model(texts(), attention_mask=mask)
        assert_close(result.last_hidden_state, expected.last_hidden_state, rtol=0, atol=1e-5)
        assert_close(result.pooler_output, expected.pooler_output, rtol=0, atol=1e-5)


@pytest.mark.parametrize("eos", [559, 2, 17])
def test_each_configuration_pools_where_transformers_does(eos: int, tmp_path: Path):
    """2 is what old configurations say by mistake: then the highest id counts."""
    source = transformers_text(eos_token_id=eos)
    source.save_pretrained(tmp_path / "in")
    convert_file(tmp_path / "in", tmp_path / "out")
    model = load_checkpoint(FlorenceTextModel, tmp_path / "out")
    ids = texts()
    ids[:, 1], ids[:, 5] = 17, 17
    ids[0, 2] = 2
    with torch.no_grad():
        expected = source.text_model(ids).pooler_output
        assert_close(model(ids).pooler_output, expected, rtol=0, atol=1e-5)


def test_a_dual_encoder_to_train_in_one_command(tmp_path: Path):
    """Two towers, their tokenizer and image processor: what zero-shot classification needs."""
    source, vision = transformers_text(), FlorenceVisionModel(tiny_vision_config())
    source.save_pretrained(tmp_path / "clip")
    vision.save_pretrained(tmp_path / "vision")
    tiny_tokenizer().save_pretrained(tmp_path / "clip")
    clip, words = str(tmp_path / "clip"), ["--tokenizer", str(tmp_path / "clip")]
    convert_clip_text.main([clip, str(tmp_path / "out"), "--vision", str(tmp_path / "vision"), *words])
    model = load_checkpoint(FlorenceModel, tmp_path / "out")
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    assert processor.image_processor.crop_size == {"height": 32, "width": 32}
    inputs = processor(text=["a cat", "a photo of a dog on a mat and of houses"], return_tensors="pt")
    assert inputs["input_ids"].shape == (2, 12)
    with torch.no_grad():
        expected = source(**inputs).text_embeds
        assert_close(model.get_text_features(**inputs).pooler_output, expected, rtol=0, atol=1e-5)
    # The tower alone gets the tokenizer alone.
    convert_clip_text.main([clip, str(tmp_path / "text"), *words])
    assert AutoTokenizer.from_pretrained(tmp_path / "text").model_max_length == 12
    assert not (tmp_path / "text" / "processor_config.json").exists()


# ------------------------------------------------------------------------------------------------------------ refusals


def test_the_activation_has_to_be_known(tmp_path: Path):
    source = transformers_text(hidden_act="gelu")
    file = write(tmp_path / "open_clip.pt", open_clip_keys(source.state_dict()))
    with pytest.raises(ValueError, match="hidden_act: expected 'quick_gelu' or 'gelu' for .*clip.pt, .* got none"):
        convert_file(file, tmp_path / "out")
    convert_clip_text.main([str(file), str(tmp_path / "out"), "--activation", "gelu"])
    assert load_checkpoint(FlorenceTextModel, tmp_path / "out").config.hidden_act == "gelu"
    source.save_pretrained(tmp_path / "in")
    with pytest.raises(ValueError, match="expected the activation 'gelu' of .*in, got 'quick_gelu'"):
        convert_file(tmp_path / "in", tmp_path / "other", activation="quick_gelu")


def test_transformers_weights_need_their_configuration(tmp_path: Path):
    file = write(tmp_path / "a.bin", transformers_text().state_dict())
    with pytest.raises(ValueError, match="expected CLIP's config.json beside the weights, got none"):
        convert_file(file, tmp_path / "out", activation="gelu")
    (tmp_path / "config.json").write_text('{"model_type": "siglip"}')
    with pytest.raises(ValueError, match="expected CLIP's config.json beside the weights, got siglip"):
        convert_file(file, tmp_path / "out")
    source = transformers_text()
    source.save_pretrained(tmp_path / "in")
    part = {name: value for name, value in source.state_dict().items() if "layers.1." not in name}
    with pytest.raises(ValueError, match="by its configuration, num_hidden_layers: 2, got 1"):
        convert_file(write(tmp_path / "in" / "part.bin", part), tmp_path / "out")
    with pytest.raises(ValueError, match="expected a dictionary under text_config in CLIP's config.json"):
        saved_fields({"model_type": "clip", "text_config": [1]})


def test_old_configurations_state_the_text_tower_twice(tmp_path: Path):
    old = {"model_type": "clip", "text_config": {"hidden_act": "quick_gelu", "eos_token_id": 2}}
    old["text_config_dict"] = {"hidden_act": "gelu", "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(old))
    fields = saved_fields(config_beside(tmp_path))
    expected = CLIPConfig.from_pretrained(tmp_path).text_config
    assert fields == {name: getattr(expected, name) for name in fields}
    assert fields["num_attention_heads"] == 4 and "eos_token_id" not in fields


def test_other_towers_are_refused():
    tensors = open_clip_keys(transformers_text().state_dict())
    act = {"hidden_act": "gelu"}
    for name, message in (
        ("cls_emb", "not consumed: cls_emb$"),
        ("transformer.resblocks.0.ls_1.gamma", "not consumed: transformer.resblocks.0.ls_1.gamma$"),
        ("transformer.resblocks.0.attn.ln_q.weight", "not consumed: .*ln_q.weight$"),
    ):
        with pytest.raises(ValueError, match=f"FlorenceTextModel in here, got keys {message}"):
            convert(tensors | {name: torch.ones(64)}, "here", act)
    vision = FlorenceVisionModel(tiny_vision_config())
    linear = {"text_projection.weight": tensors["text_projection"].T, "text_projection.bias": torch.ones(12)}
    with pytest.raises(ValueError, match="FlorenceModel in here, got keys not consumed: text_projection.bias$"):
        convert({name: value for name, value in tensors.items() if "text_p" not in name} | linear, "here", act, vision)
    with pytest.raises(ValueError, match="in here, got keys not filled: text_projection.weight"):
        convert({name: value for name, value in tensors.items() if "text_p" not in name}, "here", act, vision)
    with pytest.raises(ValueError, match="expected CLIP's keys as open_clip or transformers .* in here, got a, ..."):
        convert({"a": torch.ones(1)}, "here", act)
    with pytest.raises(ValueError, match="num_attention_heads"):
        convert(tensors, "here", {**act, "num_attention_heads": 5})
