"""Key tables, the account of every key, and the models and tokenizers built of them."""

import re
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from conversion.key_tables import (
    Conversion,
    KeyTable,
    LeftOut,
    Row,
    apply_table,
    build_model,
    image_processor,
    load_tokenizer,
    new_folder,
    prefixed,
    text_fields,
    thirds,
    transposed,
    twice,
)
from tests.tiny_florence import tiny_text_config, tiny_tokenizer
from transformers_florence import FlorenceTextModel

TABLE: KeyTable = [
    LeftOut(r".*\bindex$", "follows from the rest"),
    Row(r"block\.(\d+)\.qkv\.", r"layers.\1.[qkv]_proj.", thirds),
    Row(r"block\.(\d+)\.gamma$", r"layers.\1.scale[12]", twice),
    Row(r"block\.(\d+)\.down\.", lambda match: f"layers.{int(match[1]) + 1}.embed."),
    Row(r"block\.(\d+)\.", r"layers.\1."),
    Row(r"projection$", "projection.weight", transposed),
]


def test_each_line_of_a_table():
    tensors = {
        "block.0.qkv.weight": torch.arange(18.0).view(6, 3),
        "block.10.qkv.bias": torch.arange(6.0),
        "block.0.gamma": torch.ones(2),
        "block.0.down.weight": torch.zeros(1),
        "block.0.bias": torch.zeros(2),
        "projection": torch.arange(6.0).view(2, 3),
        "block.3.index": torch.arange(2),
    }
    conversion = apply_table(tensors, TABLE, "here")
    expected = {"projection.weight": torch.tensor([[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]])}
    for index, part in enumerate("qkv"):
        expected[f"layers.0.{part}_proj.weight"] = torch.arange(6.0).view(2, 3) + 6 * index
        expected[f"layers.10.{part}_proj.bias"] = torch.arange(2.0) + 2 * index
    expected |= {"layers.0.scale1": torch.ones(2), "layers.0.scale2": torch.ones(2)}
    expected |= {"layers.1.embed.weight": torch.zeros(1), "layers.0.bias": torch.zeros(2)}
    assert_close(conversion.tensors, expected, rtol=0, atol=0)
    assert conversion.left_out == {"block.3.index": "follows from the rest"}
    assert conversion.sources["layers.10.k_proj.bias"] == "block.10.qkv.bias"
    assert conversion.unknown == conversion.bad == []
    lines = str(conversion).splitlines()
    assert "taken       6  block.*.qkv.* -> layers.*.[qkv]_proj.*" in lines
    assert "taken       1  block.*.down.* -> layers.*.embed.*" in lines
    assert "left out    1  block.*.index: follows from the rest" in lines
    assert sum(int(re.search(r"\d+", line)[0]) for line in lines) == len(expected) + 1


def test_a_prefix_goes_before_every_line():
    table = prefixed(TABLE, r"(?:image|visual)\.", "vision.")
    tensors = {"visual.block.0.down.bias": torch.ones(1), "image.block.2.gamma": torch.ones(1)}
    conversion = apply_table(tensors | {"image.x.index": torch.ones(1)}, table, "here")
    assert set(conversion.tensors) == {
        "vision.layers.1.embed.bias",
        "vision.layers.2.scale1",
        "vision.layers.2.scale2",
    }
    assert set(conversion.left_out) == {"image.x.index"}
    assert apply_table({"block.0.down.bias": torch.ones(1)}, table, "here").unknown == ["block.0.down.bias"]


@pytest.mark.parametrize("key", ["other", "block.0.bias.x", "block.0.running_mean", "block.x.weight", "projection.x"])
def test_what_no_line_names_is_unknown(key: str):
    conversion = apply_table({key: torch.ones(1), "block.0.bias": torch.ones(1)}, TABLE, "here")
    assert conversion.unknown == [key]
    with pytest.raises(ValueError, match=f"expected the weights of X in here, got keys not consumed: {key}$"):
        conversion.refuse("X", [])


@pytest.mark.parametrize(
    ("key", "tensor"),
    [("block.0.qkv.bias", torch.ones(4)), ("block.0.qkv.bias", torch.ones(())), ("projection", torch.ones(2, 2, 2))],
)
def test_what_cannot_be_cut_or_turned_is_told(key: str, tensor: torch.Tensor):
    conversion = apply_table({key: tensor}, TABLE, "here")
    assert conversion.tensors == {}
    with pytest.raises(ValueError, match=rf"got keys unfit: {key} \(expected"):
        conversion.refuse("X", [])


def test_two_keys_for_one_place_are_told():
    table: KeyTable = [Row(r"(?:old|new)$", "name")]
    conversion = apply_table({"old": torch.ones(1), "new": torch.ones(1)}, table, "here")
    with pytest.raises(ValueError, match=r"unfit: new \(its place is taken by old\)"):
        conversion.refuse("X", [])


def text_conversion(**changes: torch.Tensor | None) -> Conversion:
    tensors = FlorenceTextModel(tiny_text_config()).state_dict()
    tensors = {name: tensor for name, tensor in (tensors | changes).items() if tensor is not None}
    return Conversion("here", tensors, {name: f"their {name}" for name in tensors})


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
    ],
)
def test_a_model_keeps_every_number(dtype: torch.dtype, expected: torch.dtype):
    conversion = text_conversion()
    conversion.tensors = {name: tensor.to(dtype) for name, tensor in conversion.tensors.items()}
    model = build_model(FlorenceTextModel, tiny_text_config(), conversion)
    assert model.dtype == expected and not model.training
    assert_close(model.state_dict(), {n: t.to(expected) for n, t in conversion.tensors.items()}, rtol=0, atol=0)


def test_new_weights_are_drawn_the_same_each_time_and_disturb_no_one():
    new = "embeddings.token_embedding.weight"
    models = []
    for seed in (1, 2):
        conversion = text_conversion(**{new: None})
        conversion.new[new] = "there is no source"
        torch.manual_seed(seed)
        models.append(build_model(FlorenceTextModel, tiny_text_config(), conversion))
        after = torch.rand(3)
        torch.manual_seed(seed)
        assert_close(after, torch.rand(3), rtol=0, atol=0)
    first, second = (model.state_dict()[new] for model in models)
    assert_close(first, second, rtol=0, atol=0)
    assert first.std() > 0


def test_a_huge_claim_takes_no_memory():
    """A configuration of a hundred gigabytes with a file of a few bytes: refused on the meta device."""
    config = tiny_text_config(hidden_size=32768, intermediate_size=65536, num_hidden_layers=2)
    with pytest.raises(ValueError, match=r"unfit: .*their final_layer_norm.bias \(expected \(32768,\), got \(16,\)\)"):
        build_model(FlorenceTextModel, config, text_conversion())


def test_heads_follow_clips_rule_or_are_asked_for():
    assert text_fields(text_conversion(), 4)["num_attention_heads"] == 4
    with pytest.raises(ValueError, match="expected the number of attention heads for here, of width 16"):
        text_fields(text_conversion(), None)
    with pytest.raises(ValueError, match="in here, got keys not filled: embeddings.position_embedding.weight"):
        text_fields(text_conversion(**{"embeddings.position_embedding.weight": None}), 4)


def test_a_tokenizer_has_to_be_the_towers(tmp_path: Path):
    tiny_tokenizer().save_pretrained(tmp_path / "good")
    tokenizer = load_tokenizer(str(tmp_path / "good"), tiny_text_config(max_position_embeddings=9))
    assert len(tokenizer("a photo of a cat " * 9, verbose=False)["input_ids"]) == 9
    for config in (tiny_text_config(vocab_size=561), tiny_text_config(eos_token_id=3)):
        with pytest.raises(
            ValueError, match=f"{config.vocab_size} tokens with the end token {config.eos_token_id}, got 560"
        ):
            load_tokenizer(str(tmp_path / "good"), config)
    (tmp_path / "empty").mkdir()
    (tmp_path / "corrupt").mkdir()
    (tmp_path / "corrupt" / "tokenizer.json").write_text("{")
    for name in (str(tmp_path / "empty"), str(tmp_path / "corrupt"), str(tmp_path / "gone"), "nobody/nothing"):
        with pytest.raises(ValueError, match="expected (the folder of )?a (CLIP )?tokenizer"):
            load_tokenizer(name, tiny_text_config())


def test_pictures_are_prepared_as_unicl_does():
    assert image_processor(224).size == {"shortest_edge": 256}
    processor = image_processor([64, 112])
    assert (processor.size, processor.crop_size) == ({"shortest_edge": 128}, {"height": 64, "width": 112})


def test_a_folder_has_to_be_empty(tmp_path: Path):
    assert new_folder(str(tmp_path)) == tmp_path
    assert new_folder(tmp_path / "new") == tmp_path / "new"
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file"):
        with pytest.raises(ValueError, match=f"expected a new or empty folder, got {path}"):
            new_folder(path)
