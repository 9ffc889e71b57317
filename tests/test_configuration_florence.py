"""Configurations refuse impossible values by name, before anything is built, and come back from a folder equal."""

import json
import math
import re
import tempfile
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.models import Swin_B_Weights, Swin_S_Weights, Swin_T_Weights
from torchvision.models.swin_transformer import SwinTransformer
from transformers import PreTrainedConfig

from transformers_florence.configuration_florence import (
    TEXT_SIZES,
    VISION_SIZES,
    FlorenceConfig,
    FlorenceTextConfig,
    FlorenceVisionConfig,
)
from transformers_florence.modeling_florence import FlorenceForImageClassification, FlorenceModel
from transformers_florence.modeling_florence_text import FlorenceTextModel
from transformers_florence.modeling_florence_vision import FlorenceBackbone, FlorenceVisionModel

NAN, INF, BOMB = math.nan, math.inf, 10**12
NO_LISTS = [[], 2, "2262", None, True, {2: 2}]
VISION = dict(image_size=32, embed_dim=16, depths=[1, 2], num_heads=[2, 4], window_size=4)
TEXT = dict(
    vocab_size=50,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    max_position_embeddings=8,
)

# The field that the message must name, and values that it must refuse.
BAD_VISION: dict[str, list[Any]] = {
    "image_size": [0, -224, True, 224.0, "224", None, BOMB, [224], [224, 0], [1, 2, 3], [224, "224"], {"height": 224}],
    "num_channels": [0, -3, False, 3.0, "3", None, BOMB],
    "embed_dim": [0, -96, True, 96.0, "96", None, BOMB, 10**400, [96], 3 << 16],
    "depths": [*NO_LISTS, [2, 0, 6, 2], [2, -2, 6, 2], [2, 2.0, 6, 2], [BOMB] * 4, [1] * 9, [250, 250, 250, 251]],
    "num_heads": [*NO_LISTS, [3, 6, 12], [3, 6, 12, 24, 48], [3, 6, 12, 0], [3, 6, 12, True]],
    "num_heads[0]": [[5, 6, 12, 24], [-3, 6, 12, 24], [192, 6, 12, 24]],
    "window_size": [0, -7, True, 7.0, "7", None, BOMB, 257, [7, 7], [7, 7, 7, 0], [7, 7, 7, 7.5], [7, 7, 7, 257], []],
    "window_padding": ["", "Clamp", "same", None, 0, ["clamp"]],
    "embed_type": ["", "CONV", "linear", None, 1, {"conv"}],
    "mlp_ratio": [0, -4, NAN, INF, -INF, "4", None, True, 65, 10**400, 0.01],
    "qkv_bias": [0, 1, None, "True"],
    "hidden_act": ["", "geLU ", None, 3, ["gelu"], "os.system"],
    "attention_dropout": [-0.1, 1.1, NAN, INF, "0", None, True],
    "drop_path_rate": [-0.1, 1, NAN, INF, "0.2", None, False],
    "layer_scale_init_value": [0, -1e-4, NAN, INF, "1e-4", True, 1e9],
    "layer_norm_eps": [0, -1e-5, NAN, INF, "1e-5", None, True, 2],
    "initializer_range": [0, -0.02, NAN, INF, "0.02", None, True],
    "out_features": [["stage5"], ["stage2", "stage1"], ["stem", "stem"], "stage1", [], [["stage1"]], [1], 1],
    "out_indices": [[5], [-6], [2, 1], [1, 1], 1, "1", [], ["stage1"], [1.0], [True], [None]],
    "dtype": ["float33", "load", "int64", "", 5, [], torch.int32],
    "num_labels": [0, -1, True, 2.0, "2", BOMB],
    "id2label": [{}, ["cat"], {"cat": 0}, {-1: "cat"}, "cat", 3],
    "problem_type": ["", "classification", 3, ["regression"]],
    "attn_implementation": ["evil/kernel", "evil/kernel:run@main", 3, True, ["sdpa"], {"vision_config": "evil/it"}],
    # Values that follow from others cannot be set to something else.
    "hidden_size": [1, 767, "768"],
    "num_layers": [1, 12],
    "num_hidden_layers": [1, 12],
    "stage_names": [["stage1"], "stem"],
    "embed_dims": [[96, 192]],
}
BAD_TEXT: dict[str, list[Any]] = {
    "vocab_size": [0, -1, True, 49408.0, "49408", None, BOMB],
    "hidden_size": [0, -512, True, 512.0, "512", None, BOMB, 1 << 19],
    "intermediate_size": [0, -1, True, 2048.0, None, BOMB],
    "num_hidden_layers": [0, -1, True, 12.0, "12", None, BOMB],
    "num_attention_heads": [0, -8, True, 8.0, None, BOMB, 7, 1024],
    "max_position_embeddings": [0, -76, True, 76.0, None, BOMB],
    "causal": [0, 1, None, "False"],
    "hidden_act": ["", None, "quickgelu", 1],
    "layer_norm_eps": [0, -1e-5, NAN, INF, "1e-5", None, 2],
    "attention_dropout": [-0.1, 1.1, NAN, INF, "0", None],
    "initializer_range": [0, NAN, INF, "0.02", None],
    "initializer_factor": [0, -1, NAN, INF, "1", None],
    "pad_token_id": [-1, 49408, 1.0, "1", True, BOMB],
    "bos_token_id": [-1, 49408, 1.0, "1", True],
    "eos_token_id": [-1, 49408, 1.0, "1", True, [1, 2]],
    "dtype": ["float33", "load"],
    "attn_implementation": ["evil/kernel"],
}
BAD_PAIR: dict[str, list[Any]] = {
    "vision_config": [[], [VISION], 1, "tiny", True, FlorenceTextConfig(), PreTrainedConfig(), FlorenceVisionConfig],
    "text_config": [[], 1, "tiny", FlorenceVisionConfig()],
    "projection_dim": [0, -512, True, 512.0, "512", None, BOMB],
    "logit_scale_init_value": [NAN, INF, -INF, 200, -100, 4.7, "2.6592", None, True],
    "max_logit_scale": [NAN, INF, 0, -1, 1e5, "100", True],
    "loss_reduction": ["", "none", "Mean", None, 1],
    "dtype": ["float33"],
    "attn_implementation": ["evil/kernel", {"text_config": "evil/kernel"}],
    "id2label": [{}, ["cat"]],
}
# A wrong field of a tower that is given as a dictionary is named too.
BAD_TOWERS: dict[str, dict[str, dict[str, Any]]] = {
    "vision_config.model_type": {"vision_config": {"model_type": "clip_vision_model"}},
    "text_config.model_type": {"text_config": {"model_type": "florence_vision_model"}},
    "embed_dim": {"vision_config": {"embed_dim": -1}},
    "num_heads[0]": {"vision_config": {**VISION, "num_heads": [3, 4]}},
    "window_size": {"vision_config": {**VISION, "window_size": [4]}},
    "vocab_size": {"text_config": {"vocab_size": True}},
    "eos_token_id": {"text_config": {**TEXT, "eos_token_id": 50}},
}
CASES = [
    pytest.param(config_class, name, {name.split("[")[0]: value}, id=f"{key}-{name}-{str(value)[:30]}")
    for key, config_class, table in (
        ("vision", FlorenceVisionConfig, BAD_VISION),
        ("text", FlorenceTextConfig, BAD_TEXT),
        ("pair", FlorenceConfig, BAD_PAIR),
    )
    for name, values in table.items()
    for value in values
] + [pytest.param(FlorenceConfig, name, fields, id=f"tower-{name}") for name, fields in BAD_TOWERS.items()]


@pytest.mark.parametrize("config_class, name, fields", CASES)
def test_an_impossible_value_is_refused_by_name(config_class, name, fields):
    with pytest.raises(ValueError, match=re.escape(name)) as raised:
        config_class(**fields)
    assert "got" in str(raised.value)


def test_there_are_enough_impossible_values():
    assert len(CASES) > 250


@pytest.mark.parametrize(
    "model_class, name, fields",
    [
        (FlorenceVisionModel, "embed_dim", {"embed_dim": BOMB}),
        (FlorenceVisionModel, "depths", {"depths": [100, 100, 100, 1000]}),
        (FlorenceVisionModel, "`embed_dim, depths", {"embed_dim": 1 << 16, "num_heads": [1, 1, 1, 1]}),
        (FlorenceTextModel, "vocab_size", {"vocab_size": BOMB}),
        (FlorenceTextModel, "num_hidden_layers", {"num_hidden_layers": "12"}),
        (FlorenceModel, "projection_dim", {"projection_dim": BOMB}),
        (FlorenceModel, "num_heads", {"vision_config": {**VISION, "num_heads": [3, 4]}}),
        (FlorenceForImageClassification, "num_labels", {"num_labels": BOMB}),
        (FlorenceBackbone, "out_indices", {"out_indices": [9]}),
    ],
)
def test_a_bad_file_is_refused_before_a_module_exists(tmp_path, monkeypatch, model_class, name, fields):
    def build(*_: object) -> None:
        raise AssertionError("a module was built from a configuration that should have been refused")

    monkeypatch.setattr(torch.nn.Module, "__init__", build)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_class.config_class.model_type, **fields}))
    with pytest.raises(ValueError, match=re.escape(name)):
        model_class.from_pretrained(tmp_path)


@pytest.mark.parametrize("config_class", [FlorenceVisionConfig, FlorenceTextConfig, FlorenceConfig])
@pytest.mark.parametrize("size", ["", "Tiny", "gigantic", None, 1, ["tiny"]])
def test_an_unknown_size_is_refused(config_class, size):
    with pytest.raises(ValueError, match="`size`: expected one of nano, tiny, small, base, large, huge, got"):
        config_class.from_size(size)


def test_positional_arguments_are_refused():
    with pytest.raises(ValueError, match="keyword"):
        FlorenceVisionConfig(224)


def reload(config: PreTrainedConfig) -> PreTrainedConfig:
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        return type(config).from_pretrained(folder)


def assert_round_trip(config: PreTrainedConfig) -> None:
    loaded = reload(config)
    assert loaded == config
    assert loaded.to_dict() == config.to_dict()


@st.composite
def vision_fields(draw: st.DrawFn) -> dict[str, Any]:
    stages = draw(st.integers(1, 5))
    heads = st.sampled_from([1, 2, 4, 8])
    windows = st.integers(1, 24)
    sides = st.integers(1, 2000)
    names = ["stem"] + [f"stage{index}" for index in range(1, stages + 1)]
    fields = dict(
        image_size=draw(sides | st.tuples(sides, sides) | st.lists(sides, min_size=2, max_size=2)),
        num_channels=draw(st.integers(1, 12)),
        embed_dim=8 * draw(st.integers(1, 32)),
        depths=draw(st.lists(st.integers(1, 24), min_size=stages, max_size=stages)),
        num_heads=draw(st.lists(heads, min_size=stages, max_size=stages)),
        window_size=draw(windows | st.lists(windows, min_size=stages, max_size=stages)),
        window_padding=draw(st.sampled_from(["clamp", "pad"])),
        embed_type=draw(st.sampled_from(["conv", "patch"])),
        mlp_ratio=draw(st.sampled_from([1, 2, 4.0, 2.6667])),
        qkv_bias=draw(st.booleans()),
        hidden_act=draw(st.sampled_from(["gelu", "quick_gelu", "relu"])),
        attention_dropout=draw(st.floats(0, 1)),
        drop_path_rate=draw(st.floats(0, 0.9)),
        layer_scale_init_value=draw(st.none() | st.floats(1e-6, 1)),
        layer_norm_eps=draw(st.sampled_from([1e-5, 1e-6, 1e-12])),
    )
    fields["depths"] = draw(st.sampled_from([list, tuple]))(fields["depths"])
    if draw(st.booleans()):
        fields["out_features"] = [name for name in names if draw(st.booleans())] or [names[-1]]
    if draw(st.booleans()):
        fields["num_labels"] = draw(st.integers(1, 12))
    if draw(st.booleans()):
        fields["dtype"] = draw(st.sampled_from(["float32", "bfloat16", torch.float16]))
    return fields


@st.composite
def text_fields(draw: st.DrawFn) -> dict[str, Any]:
    heads, vocab_size = draw(st.integers(1, 16)), draw(st.integers(1, 60_000))
    fields = dict(
        vocab_size=vocab_size,
        hidden_size=heads * draw(st.integers(1, 64)),
        intermediate_size=draw(st.integers(1, 4096)),
        num_hidden_layers=draw(st.integers(1, 24)),
        num_attention_heads=heads,
        max_position_embeddings=draw(st.integers(1, 512)),
        causal=draw(st.booleans()),
        hidden_act=draw(st.sampled_from(["gelu", "quick_gelu"])),
        layer_norm_eps=draw(st.sampled_from([1e-5, 1e-12])),
    )
    if draw(st.booleans()):
        fields["eos_token_id"] = draw(st.integers(0, vocab_size - 1))
    return fields


@settings(max_examples=100)
@given(vision_fields())
def test_vision_configurations_come_back_equal(fields):
    config = FlorenceVisionConfig(**fields)
    assert_round_trip(config)
    assert list(config.depths) == list(fields["depths"]) and config.num_layers == len(fields["depths"])
    assert config.hidden_size == fields["embed_dim"] * 2 ** (config.num_layers - 1)


@settings(max_examples=100)
@given(text_fields())
def test_text_configurations_come_back_equal(fields):
    assert_round_trip(FlorenceTextConfig(**fields))


@settings(max_examples=30)
@given(
    vision_fields(),
    text_fields(),
    st.integers(1, 4096),
    st.floats(-5, 4.6),
    st.sampled_from([100.0, 1000, None]),
    st.sampled_from(["mean", "sum"]),
)
def test_composite_configurations_come_back_equal(vision, text, projection_dim, logit_scale, bound, reduction):
    config = FlorenceConfig(
        vision_config=vision,
        text_config=FlorenceTextConfig(**text),
        projection_dim=projection_dim,
        logit_scale_init_value=logit_scale,
        max_logit_scale=bound,
        loss_reduction=reduction,
    )
    assert_round_trip(config)
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        assert FlorenceVisionConfig.from_pretrained(folder) == config.vision_config
        assert FlorenceTextConfig.from_pretrained(folder) == config.text_config


def test_equality_sees_every_field_and_the_class():
    base = FlorenceVisionConfig(**VISION)
    assert base == FlorenceVisionConfig(**VISION)
    changes = dict(embed_type="patch", window_padding="pad", window_size=[4, 2], out_features=["stem"], num_labels=3)
    for name, value in changes.items():
        assert base != FlorenceVisionConfig(**{**VISION, name: value}), name
    assert FlorenceConfig() != FlorenceConfig(vision_config={"drop_path_rate": 0.3})
    assert FlorenceTextConfig() != FlorenceVisionConfig() and FlorenceTextConfig() != {}


@pytest.mark.parametrize("model_class", [FlorenceModel, FlorenceVisionModel, FlorenceTextModel, FlorenceBackbone])
def test_a_loaded_model_has_the_saved_configuration(tmp_path, model_class):
    configs = {"vision_config": FlorenceVisionConfig(**VISION), "text_config": FlorenceTextConfig(**TEXT)}
    config = FlorenceConfig(**configs, projection_dim=8)
    configs[""] = config
    key = {FlorenceModel: "", FlorenceTextModel: "text_config"}.get(model_class, "vision_config")
    model = model_class(configs[key])
    model.save_pretrained(tmp_path)
    loaded = model_class.from_pretrained(tmp_path)
    assert type(model.config).from_pretrained(tmp_path) == model.config
    for sub_config in loaded.config.sub_configs:  # transformers gives the towers their dtype when it loads them
        getattr(loaded.config, sub_config).dtype = None
    assert loaded.config == model.config


def test_derived_values_follow_a_change_of_the_fields_they_come_from(tmp_path):
    config = FlorenceVisionConfig(**VISION)
    config.save_pretrained(tmp_path)
    assert FlorenceVisionConfig.from_pretrained(tmp_path, embed_dim=48).hidden_size == 96
    assert FlorenceVisionConfig(**{**config.to_dict(), "embed_dim": 32}).hidden_size == 64
    FlorenceConfig(vision_config=config).save_pretrained(tmp_path)
    wider = FlorenceConfig.from_pretrained(tmp_path, vision_config={"embed_dim": 32})
    assert wider.vision_config.hidden_size == 64 and wider.vision_config.num_heads == [2, 4]


def test_the_standard_names_read_and_set_our_fields():
    config = FlorenceVisionConfig(**{**VISION, "num_heads": [1, 1]}, num_attention_heads=[4, 8], num_hidden_layers=2)
    assert config.num_heads == config.num_attention_heads == [4, 8]
    assert config.num_hidden_layers == config.num_layers == 2
    assert config.stage_names == ["stem", "stage1", "stage2"] and config.out_features == ["stage2"]
    with pytest.raises(ValueError, match="num_heads"):
        FlorenceVisionConfig(**VISION, num_attention_heads=[3, 4])


def test_tuples_are_as_good_as_lists():
    lists = dict(image_size=[32, 64], depths=[1, 2], num_heads=[2, 4], window_size=[4, 2], out_indices=[1, 2])
    tuples = {name: tuple(value) for name, value in lists.items()}
    config = FlorenceVisionConfig(**tuples, embed_dim=16)
    assert config == FlorenceVisionConfig(**lists, embed_dim=16)
    assert {name: getattr(config, name) for name in lists} == lists  # as a loaded configuration has them


def test_special_tokens_stand_at_the_end_of_the_vocabulary():
    config = FlorenceTextConfig(vocab_size=50)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (48, 49, 49)
    config = FlorenceTextConfig(vocab_size=50, eos_token_id=2)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (48, 2, 2)
    assert FlorenceTextConfig(vocab_size=1).bos_token_id == 0


def test_a_hostile_file_chooses_no_code(tmp_path):
    """Keys that make other loaders import a file or fetch a kernel: none has an effect."""
    model = FlorenceModel(FlorenceConfig(vision_config=VISION, text_config=TEXT, projection_dim=8)).eval()
    model.save_pretrained(tmp_path)
    canary = tmp_path / "canary"
    (tmp_path / "evil.py").write_text(f"open({str(canary)!r}, 'w')\n")
    poison = {
        "trust_remote_code": True,
        "auto_map": dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForImageClassification"), "evil.Evil"),
        "_attn_implementation_internal": "evil/kernel",
        "_attn_implementation": "evil/kernel",
        "_experts_implementation_internal": "evil/kernel",
    }
    file = json.loads((tmp_path / "config.json").read_text()) | poison
    for tower in ("vision_config", "text_config"):
        file[tower] |= poison
    (tmp_path / "config.json").write_text(json.dumps(file))

    config = FlorenceConfig.from_pretrained(tmp_path)
    loaded = FlorenceModel.from_pretrained(tmp_path).eval()
    for part in (config, config.vision_config, config.text_config):
        assert part._attn_implementation is None and not hasattr(part, "trust_remote_code")
    for part in (loaded.config, loaded.vision_model.config, loaded.text_model.config):
        assert part._attn_implementation == "sdpa"
    inputs = dict(pixel_values=torch.rand(1, 3, 32, 32), input_ids=torch.tensor([[48, 3, 49]]))
    torch.testing.assert_close(loaded(**inputs).logits_per_image, model(**inputs).logits_per_image)
    assert not canary.exists()


# ---------------------------------------------------------------------------------------------------------- sizes


def parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def on_meta(model_class: type, config: PreTrainedConfig) -> torch.nn.Module:
    with torch.device("meta"):
        return model_class(config)


@pytest.mark.parametrize("size", ["tiny", "small", "base", "large"])
def test_swin_of_a_named_size_has_swins_parameters(size):
    """Exactly torchvision's model without its head; its released weights give the counts of the three it has."""
    shape = VISION_SIZES[size]
    with torch.device("meta"):
        peer = SwinTransformer([4, 4], shape["embed_dim"], shape["depths"], shape["num_heads"], [7, 7])
    ours = parameters(on_meta(FlorenceVisionModel, FlorenceVisionConfig.from_size(size, embed_type="patch")))
    assert ours == parameters(peer) - parameters(peer.head)
    released = {"tiny": Swin_T_Weights, "small": Swin_S_Weights, "base": Swin_B_Weights}.get(size)
    if released:
        assert ours + parameters(peer.head) == released.IMAGENET1K_V1.meta["num_params"]


@pytest.mark.parametrize("size", list(VISION_SIZES))
def test_convolutional_embeddings_cost_what_their_kernels_hold(size):
    config = FlorenceVisionConfig.from_size(size)
    dims = config.embed_dims
    stem = (7 * 7 - 4 * 4) * 3 * dims[0]
    # 3 x 3 kernels with bias and norm in place of a norm and a projection of four neighbours.
    steps = sum((9 * dim * 2 * dim + 2 * dim + 4 * dim) - (8 * dim + 8 * dim * dim) for dim in dims[:-1])
    patch = parameters(on_meta(FlorenceVisionModel, FlorenceVisionConfig.from_size(size, embed_type="patch")))
    assert parameters(on_meta(FlorenceVisionModel, config)) == patch + stem + steps


def test_huge_stands_within_one_percent_of_the_paper(capsys):
    """Florence section 2.3: 637M in the image tower, 256M in the text tower, 893M in all."""
    model = on_meta(FlorenceModel, FlorenceConfig.from_size("huge"))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    counts = {"vision": parameters(model.vision_model), "text": parameters(model.text_model), "all": parameters(model)}
    with capsys.disabled():
        print("\nhuge:", ", ".join(f"{name} {count / 1e6:.1f}M" for name, count in counts.items()))
    for name, published in {"vision": 637e6, "text": 256e6, "all": 893e6}.items():
        assert counts[name] == pytest.approx(published, rel=0.01), name


@pytest.mark.parametrize("size", list(VISION_SIZES))
def test_every_size_is_one_line_away(size):
    config = FlorenceConfig.from_size(size, loss_reduction="sum")
    assert config.loss_reduction == "sum"
    assert config.vision_config == FlorenceVisionConfig.from_size(size)
    assert config.text_config == FlorenceTextConfig.from_size(size)
    assert config.vision_config.embed_dim == VISION_SIZES[size]["embed_dim"]
    assert all(getattr(config.text_config, name) == value for name, value in TEXT_SIZES[size].items())
    assert FlorenceVisionConfig.from_size(size, embed_type="patch").embed_type == "patch"


def test_a_classifier_takes_its_labels_from_the_dual_encoder():
    config = FlorenceConfig(vision_config=VISION, text_config=TEXT, num_labels=5)
    model = on_meta(FlorenceForImageClassification, config)
    assert model.classifier.out_features == model.config.num_labels == 5
