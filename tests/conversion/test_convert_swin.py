"""Swins of four projects with random weights: the same numbers from our tower, or an error that says what is wrong."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from torchvision.models.swin_transformer import SwinTransformer
from transformers import (
    AutoModel,
    SwinBackbone,
    SwinConfig,
    SwinForImageClassification,
    SwinModel,
    Swinv2Config,
    Swinv2Model,
    pipeline,
)

from conversion import convert_swin
from conversion.convert_swin import TABLES, convert, convert_file
from conversion.key_tables import apply_table
from conversion.reading import config_beside, read_content, read_weights
from tests.conversion.sources import (
    DEPTHS,
    DIM,
    HEADS,
    PRECISIONS,
    SIDE,
    WINDOW,
    Tensors,
    microsoft_keys,
    pixels,
    random_weights,
    torchvision_swin,
    write,
)
from transformers_florence import FlorenceBackbone, FlorenceVisionModel, load_checkpoint


def transformers_config(**fields: Any) -> SwinConfig:
    shape = {"embed_dim": DIM, "depths": DEPTHS, "num_heads": HEADS, "window_size": WINDOW, "image_size": SIDE}
    return SwinConfig(**{**shape, "drop_path_rate": 0.0, **fields})


class Pooled(nn.Module):
    """transformers' Swin from pixels to pooled features."""

    def __init__(self, always_partition: bool | None = None) -> None:
        super().__init__()
        self.swin = random_weights(SwinModel(transformers_config()), 1)
        self.options = {} if always_partition is None else {"always_partition": always_partition}

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.swin(pixel_values, **self.options).pooler_output


def timm_swin() -> nn.Module:
    shape = {"embed_dim": DIM, "depths": DEPTHS, "num_heads": HEADS, "window_size": WINDOW, "img_size": SIDE}
    return random_weights(
        timm.create_model("swin_tiny_patch4_window7_224", num_classes=0, drop_path_rate=0.0, **shape), 1
    )


# The layout, the module whose output is pooled features, and what turns the names of its tensors into the file's.
SOURCES: dict[str, tuple[Callable[[], nn.Module], Callable[[Tensors], Tensors]]] = {
    "timm": (timm_swin, dict),
    "torchvision": (torchvision_swin, dict),
    "transformers": (Pooled, dict),
    "Microsoft": (torchvision_swin, microsoft_keys),
}


@PRECISIONS
@pytest.mark.parametrize("layout", SOURCES)
def test_features_and_gradients_are_those_of_the_source(layout: str, dtype: torch.dtype, tolerance: float):
    make, rename = SOURCES[layout]
    source = make().to(dtype)
    model, conversion = convert(rename(source.state_dict()), "here")
    assert isinstance(model, FlorenceVisionModel)
    assert (model.dtype, model.config.embed_type) == (dtype, "patch")
    pictures = pixels().to(dtype)
    expected, features = source(pictures), model(pictures).pooler_output
    assert features.std() > 0.01
    assert_close(features, expected, rtol=0, atol=tolerance)

    weights = torch.randn(features.shape, dtype=dtype, generator=torch.Generator().manual_seed(6))
    for output in (expected, features):
        (output * weights).sum().backward()
    gradients = rename({name: parameter.grad for name, parameter in source.named_parameters()})
    converted = apply_table(gradients, TABLES[layout], "gradients")
    assert converted.unknown == []
    ours = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert_close(ours, converted.tensors, rtol=0, atol=tolerance)
    assert len(conversion.sources) == len(ours)


@PRECISIONS
@pytest.mark.parametrize("size", [(SIDE, SIDE), (96, 130), (61, 75)])
def test_detections_windows_are_those_of_transformers(size: tuple[int, int], dtype: torch.dtype, tolerance: float):
    source = Pooled(always_partition=True).to(dtype)
    model, _ = convert(source.swin.state_dict(), "here", window_padding="pad")
    pictures = pixels(side=size).to(dtype)
    with torch.no_grad():
        assert_close(model(pictures).pooler_output, source(pictures), rtol=0, atol=tolerance)


def test_both_conventions_differ():
    tensors = Pooled().swin.double().state_dict()
    with torch.no_grad():
        outputs = [
            convert(tensors, "here", None, padding)[0](pixels()).pooler_output for padding in ("clamp", "pad", None)
        ]
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3
    assert_close(outputs[0], outputs[2], rtol=0, atol=0)


def save_as_its_project_does(name: str, path: Path) -> tuple[nn.Module, Tensors]:
    """A file or folder, with a classifier where it can have one; the tower, and its tensors under their names."""
    head = {"head.fc.weight": torch.ones(3, 32), "head.fc.bias": torch.ones(3)}
    old_head = {key.replace("fc.", ""): value for key, value in head.items()}
    if name.startswith("timm"):
        tower, tensors = timm_swin(), timm_swin().state_dict()
        write(path, tensors | head)
    elif name.startswith("torchvision"):
        tower, tensors = torchvision_swin(), torchvision_swin().state_dict()
        write(path, tensors | old_head)
    elif name.startswith("microsoft"):
        tower, tensors = torchvision_swin(), microsoft_keys(torchvision_swin().state_dict())
        write(path, {"model": tensors | old_head | {"layers.0.blocks.1.attn_mask": torch.zeros(16, 49, 49)}})
    else:
        tower, tensors = Pooled(), Pooled().swin.state_dict()
        classifier = SwinForImageClassification(transformers_config(num_labels=3))
        classifier.swin.load_state_dict(tensors)
        (classifier if name == "classifier" else tower.swin).save_pretrained(path)
        assert any("attention.self.query" in key for key in read_weights(path)[0])  # the names of the Hub's files
    return tower, tensors


@pytest.mark.parametrize(
    "name", ["timm.safetensors", "timm.bin", "torchvision.pth", "microsoft.pt", "transformers", "classifier"]
)
def test_a_file_becomes_a_folder_bit_for_bit(name: str, tmp_path: Path, capsys):
    source, output = tmp_path / name, tmp_path / "out"
    tower, tensors = save_as_its_project_does(name, source)
    convert_swin.main([str(source), str(output), "--image-size", str(SIDE)])
    printed = capsys.readouterr().out
    assert ("a classifier; the tower ends at the pooled features" in printed) == (name != "transformers")
    expected, _ = convert(tensors, "here")
    for loaded in (AutoModel.from_pretrained(output), load_checkpoint(FlorenceVisionModel, output)):
        assert_close(loaded.state_dict(), expected.state_dict(), rtol=0, atol=0)
    assert loaded.config.image_size == SIDE
    with torch.no_grad():
        pictures = pixels().float()
        assert_close(loaded(pictures).pooler_output, tower(pictures), rtol=0, atol=1e-5)


def test_the_folder_serves_the_pipeline(tmp_path: Path):
    convert_file(write(tmp_path / "a.pth", timm_swin().state_dict()), tmp_path / "out", image_size=SIDE)
    features = pipeline("image-feature-extraction", model=str(tmp_path / "out"))(Image.new("RGB", (150, 128), "red"))
    assert len(features[0]) == 49 and len(features[0][0]) == 32


def test_half_precision_keeps_its_numbers_and_computes_in_float32():
    halves = {name: tensor.half() for name, tensor in timm_swin().state_dict().items()}
    model, _ = convert(halves, "here")
    assert model.dtype == torch.float32
    assert_close(model.norm.weight, halves["norm.weight"].float(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("changes", "shape"),
    [
        ({"depths": (1, 1), "num_heads": (1, 2), "img_size": 32}, {"window_size": [7, 4]}),  # a last map of 4 x 4
        ({"mlp_ratio": 2.5, "in_chans": 1}, {"mlp_ratio": 2.5, "num_channels": 1}),
    ],
)
def test_the_configuration_is_read_off_the_shapes(changes: dict[str, Any], shape: dict[str, Any]):
    options = {"img_size": 224, "embed_dim": DIM, "depths": (1, 2), "num_heads": (1, 2)} | changes
    source = timm.create_model("swin_tiny_patch4_window7_224", num_classes=0, drop_path_rate=0.0, **options)
    random_weights(source)
    model, _ = convert(source.state_dict(), "here")
    for name, expected in shape.items():
        assert getattr(model.config, name) == expected
    pictures = torch.randn(1, model.config.num_channels, options["img_size"], options["img_size"])
    with torch.no_grad():
        assert_close(model(pictures).pooler_output, source(pictures), rtol=0, atol=1e-5)


def test_without_biases_of_queries_keys_and_values():
    source = random_weights(SwinModel(transformers_config(qkv_bias=False)), 1)
    model, _ = convert(source.state_dict(), "here")
    assert model.config.qkv_bias is False
    with torch.no_grad():
        assert_close(model(pixels().float())[0], source(pixels().float())[0], rtol=0, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------- backbones


@PRECISIONS
def test_transformers_backbone(dtype: torch.dtype, tolerance: float, tmp_path: Path):
    source = random_weights(SwinBackbone(transformers_config(out_features=["stage1", "stage3"])), 1).to(dtype)
    source.save_pretrained(tmp_path / "in")
    conversion = convert_file(tmp_path / "in", tmp_path / "out")
    assert conversion.left_out["swin.layernorm.weight"] == "a backbone has a norm behind each stage"
    model = FlorenceBackbone.from_pretrained(tmp_path / "out")
    assert (model.out_features, model.config.window_padding) == (["stage1", "stage3"], "pad")
    pictures = pixels(side=(61, 75)).to(dtype)
    with torch.no_grad():
        expected, maps = source(pictures).feature_maps, model(pictures).feature_maps
    assert_close(maps, expected, rtol=0, atol=tolerance)


@pytest.fixture(scope="session")
def coswin(parity_path) -> dict[str, Any]:
    return read_content(parity_path("coswin.pt"))


@pytest.mark.parametrize("case", ["conv_w4_layerscale", "swin_v1_padded"])
def test_glips_towers_at_every_size(case: str, coswin, tmp_path: Path):
    """Detection's convention: layer scale, odd sizes, maps smaller than the window."""
    case = coswin[case]
    source = write(tmp_path / "glip.pth", {"model": case["state_dict"]})
    convert_file(source, tmp_path / "out")
    model = load_checkpoint(FlorenceBackbone, tmp_path / "out")
    conv = case["config"]["cls"] == "swint_v2"
    assert model.config.embed_type == ("conv" if conv else "patch")
    assert model.config.layer_scale_init_value == (1e-4 if case["config"].get("layer_scale") else None)
    assert model.config.window_size == case["config"]["window_size"]
    for dtype, key, tolerance in ((torch.float32, "stages", 1e-5), (torch.float64, "stages64", 1e-9)):
        model = model.to(dtype)
        for picture in case["cases"]:
            image = picture["image"].to(dtype)
            if conv:  # GLIP's own quirk
                height, width = image.shape[2:]
                image = F.pad(image, (0, -width % 7, 0, -height % 7))
            with torch.no_grad():
                maps = model(image).feature_maps
            assert_close(list(maps), list(picture[key]), rtol=0, atol=tolerance)


@PRECISIONS
def test_glips_swin_in_classifications_convention(coswin, dtype: torch.dtype, tolerance: float):
    """The same weights in torchvision's Swin, which clamps its windows."""
    state = {
        name: value.to(dtype) for name, value in coswin["swin_v1_padded"]["state_dict"].items() if "index" not in name
    }
    state = {
        name.replace("norm3.", "norm."): value for name, value in state.items() if not re.match("norm[012]", name)
    }
    model, _ = convert(state, "here")
    assert model.config.window_padding == "clamp"
    peer = SwinTransformer([4, 4], 16, [2] * 4, [2, 4, 8, 16], [7, 7], stochastic_depth_prob=0.0)
    peer.head = nn.Identity()
    names = microsoft_keys({name: torch.zeros(49 * 49) for name in peer.state_dict()})
    own = {theirs: name for name, theirs in zip(peer.state_dict(), names, strict=True)}
    result = peer.load_state_dict({own[name]: value for name, value in state.items()}, strict=False)
    assert result.unexpected_keys == [] and all("index" in key for key in result.missing_keys)
    peer = peer.to(dtype).eval()
    pictures = pixels(1, 224).to(dtype)
    with torch.no_grad():
        assert_close(model(pictures).pooler_output, peer(pictures), rtol=0, atol=tolerance)


# ------------------------------------------------------------------------------------------------- a start for CoSwin


@pytest.mark.parametrize("layout", SOURCES)
def test_a_start_for_coswin(layout: str, tmp_path: Path, capsys):
    make, rename = SOURCES[layout]
    source = make()
    tensors = rename(source.state_dict())
    exact, _ = convert(tensors, "here")
    file, output = write(tmp_path / "a.pth", tensors), tmp_path / "out"
    convert_swin.main([str(file), str(output), "--embed-type", "conv"])
    printed = capsys.readouterr().out.splitlines()
    model = load_checkpoint(FlorenceVisionModel, output)
    assert model.config.embed_type == "conv"

    # Taken: everything but the embeddings between stages, number for number.
    other = re.compile(r"encoder\.stages\.\d\.embed|embeddings\.projection\.weight")
    taken = {name for name in exact.state_dict() if not other.match(name)}
    for name in taken:
        assert_close(model.state_dict()[name], exact.state_dict()[name], rtol=0, atol=0)
    # The first convolution gives the tokens of the patches.
    pictures = pixels(side=(64, 96)).float()
    assert_close(model.embeddings(pictures), exact.embeddings(pictures), rtol=0, atol=1e-5)
    # New, and the same each time: what is between the stages.
    new = set(model.state_dict()) - taken - {"embeddings.projection.weight"}
    assert new == {
        f"encoder.stages.{stage}.embed.{part}.{kind}"
        for stage in (1, 2)
        for part in ("projection", "norm")
        for kind in ("weight", "bias")
    }
    again, conversion = convert(tensors, "here", embed_type="conv")
    assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert model.encoder.stages[1].embed.projection.weight.std().item() == pytest.approx(0.02, rel=0.1)

    # The account says all of it, and why.
    assert set(conversion.sources) == taken | {"embeddings.projection.weight"}
    assert set(conversion.new) == new
    kinds = ("taken", "left out", "new", "note")
    lines = {kind: [line for line in printed if line.startswith(kind)] for kind in kinds}
    assert any("-> embeddings.norm.*" in line for line in lines["taken"])
    left = [line for line in lines["left out"] if "Swin normalises four neighbours and projects them" in line]
    assert sum(int(line.split()[2]) for line in left) == 6
    assert [int(line.split()[1]) for line in lines["new"]] == [4, 4]
    assert all("CvT's embedding, which Swin does not have" in line for line in lines["new"])
    assert "the patch's kernel in the middle" in lines["note"][0]
    assert re.search(r"FlorenceVisionModel of 0\.\d\d million parameters", lines["note"][1])


def test_a_backbone_as_a_start_for_coswin():
    source = random_weights(SwinBackbone(transformers_config(out_features=["stage2", "stage3"])), 1)
    model, conversion = convert(source.state_dict(), "here", embed_type="conv")
    assert isinstance(model, FlorenceBackbone)
    assert len(conversion.new) == 8 and all(name.startswith("vision_model.encoder.") for name in conversion.new)
    assert_close(model.feature_norms["stage2"].weight, source.hidden_states_norms["stage2"].weight)


# ------------------------------------------------------------------------------------------------------------ refusals


def test_other_transformers_are_refused():
    fields = transformers_config().to_dict()
    swin2 = Swinv2Model(Swinv2Config(**{name: fields[name] for name in ("embed_dim", "depths", "num_heads")}))
    with pytest.raises(ValueError, match="here, got keys not consumed: encoder.layers.0.blocks.0.att.*logit_scale"):
        convert(swin2.state_dict(), "here")
    with pytest.raises(ValueError, match="expected Swin's keys as Microsoft, timm, .* in here, got a, ..."):
        convert({"a": torch.ones(1)}, "here")
    positions = SwinModel(transformers_config(use_absolute_embeddings=True)).state_dict()
    with pytest.raises(ValueError, match="here, got keys not consumed: embeddings.position_embeddings$"):
        convert(positions, "here")


def test_misshapen_towers_are_refused():
    tensors = timm_swin().state_dict()
    table = "layers.0.blocks.0.attn.relative_position_bias_table"
    for name, tensor, message in (
        (table, torch.ones(168, 1), rf"unfit: {table} \(expected a square window, got 168 rows\)"),
        (table, torch.ones(3), rf"unfit: {table} \(expected rank 2, got shape \(3,\)\)"),
        ("patch_embed.proj.weight", torch.ones(8, 3, 0, 4), r"patch_embed.proj.weight \(expected rank 4, got shape"),
        (
            "patch_embed.proj.weight",
            torch.ones(8, 3, 2, 2),
            r"unfit: patch_embed.proj.weight \(expected \(8, 3, 4, 4\)",
        ),
        ("layers.2.blocks.1.mlp.fc1.bias", torch.ones(5), r"fc1.bias \(expected \(128,\), got \(5,\)\)"),
    ):
        with pytest.raises(ValueError, match=message):
            convert(tensors | {name: tensor}, "here")
    with pytest.raises(ValueError, match=r"patch_embed.proj.weight \(expected 4 x 4, got \(8, 3, 2, 2\)\)"):
        convert(tensors | {"patch_embed.proj.weight": torch.ones(8, 3, 2, 2)}, "here", embed_type="conv")
    # A few bytes that claim a tower of terabytes.
    far = {re.sub(r"layers\.2\.blocks\.1", "layers.2.blocks.999999999", key): value for key, value in tensors.items()}
    with pytest.raises(ValueError, match="depths"):
        convert(far, "here")


@pytest.mark.parametrize(
    "key", ["layers.2.downsample.norm.bias", "layers.0.downsample.reduction.bias", "norm7.weight"]
)
def test_known_names_in_the_wrong_place_are_refused(key: str):
    tensors = microsoft_keys(torchvision_swin().state_dict()) | {key: torch.ones(8)}
    with pytest.raises(ValueError, match=f"FlorenceVisionModel in here, got keys not consumed: {key}$"):
        convert(tensors, "here")
    if "downsample" in key:  # left out with the rest of the merging, and told
        assert key in convert(tensors, "here", "conv")[1].left_out


def test_patches_cannot_be_made_of_convolutions():
    tensors = timm_swin().state_dict() | {"patch_embed.proj.weight": torch.ones(DIM, 3, 7, 7)}
    with pytest.raises(ValueError, match="expected patch embeddings in here, got convolutional ones"):
        convert(tensors, "here", embed_type="patch")


def test_the_configuration_beside_transformers_weights_counts(tmp_path: Path):
    random_weights(SwinModel(transformers_config(hidden_act="relu")), 1).save_pretrained(tmp_path / "in")
    convert_file(tmp_path / "in" / "model.safetensors", tmp_path / "out")
    config = load_checkpoint(FlorenceVisionModel, tmp_path / "out").config
    assert (config.hidden_act, config.image_size) == ("relu", SIDE)
    # Weights of a part of the layers are told by it.
    tensors = {key: value for key, value in read_weights(tmp_path / "in")[0].items() if ".2.blocks.1." not in key}
    write(tmp_path / "in" / "part.bin", tensors)
    with pytest.raises(ValueError, match=r"in .*part.bin, by its configuration, depths: \[1, 2, 2\], got \[1, 2, 1\]"):
        convert_file(tmp_path / "in" / "part.bin", tmp_path / "part")
    # transformers' Swin reads this for some of its norms only: no setting of ours is the same.
    file = tmp_path / "in" / "config.json"
    file.write_text(json.dumps(config_beside(tmp_path / "in") | {"layer_norm_eps": 1e-6}))
    with pytest.raises(ValueError, match="layer_norm_eps: expected 1e-5 beside .*in, got 1e-06"):
        convert_file(tmp_path / "in", tmp_path / "other")
    file.write_text('{"model_type": "something"}')
    convert_file(tmp_path / "in", tmp_path / "other")
    assert load_checkpoint(FlorenceVisionModel, tmp_path / "other").config.hidden_act == "gelu"


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path):
    source = write(tmp_path / "a.pth", timm_swin().state_dict())
    with pytest.raises(ValueError, match="expected a new or empty folder"):
        convert_file(source, tmp_path)
    with pytest.raises(ValueError, match="expected a new or empty folder"):
        convert_file(source, source)
