"""Weights, inputs and outputs of Video Swin's own code: the same numbers from our models.

The file lies in the folder `shared` beside the clone, under `parity`; without it these tests skip.
"""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from transformers_florence.configuration_florence import FlorenceVisionConfig
from transformers_florence.configuration_florence_video import FlorenceVideoConfig
from transformers_florence.modeling_florence_video import FlorenceForVideoClassification, inflate_from_image
from transformers_florence.modeling_florence_vision import FlorenceVisionModel

Tensors = dict[str, torch.Tensor]

# (pattern of the source's key, our key); the fused projection becomes three.
TOWER: list[tuple[str, str]] = [
    (r"patch_embed\.proj\.", "embeddings.projection."),
    (r"patch_embed\.norm\.", "embeddings.norm."),
    (r"layers\.(\d+)\.blocks\.(\d+)\.attn\.qkv\.", r"encoder.stages.\1.layers.\2.attention.[qkv]_proj."),
    (r"layers\.(\d+)\.blocks\.(\d+)\.attn\.proj\.", r"encoder.stages.\1.layers.\2.attention.out_proj."),
    (r"layers\.(\d+)\.blocks\.(\d+)\.attn\.", r"encoder.stages.\1.layers.\2.attention."),
    (r"layers\.(\d+)\.blocks\.(\d+)\.", r"encoder.stages.\1.layers.\2."),
    (r"layers\.(\d+)\.downsample\.", r"encoder.stages.NEXT(\1).embed."),
    (r"norm\.", "norm."),
]


def convert(tensors: Tensors) -> Tensors:
    """The source's tensors under our keys; a key that no pattern fits is an error."""
    converted: Tensors = {}
    for key, value in tensors.items():
        if key.endswith(("relative_position_index", "attn_mask")):
            continue
        source, target = next(row for row in TOWER if re.match(row[0], key))
        name = re.sub(r"NEXT\((\d+)\)", lambda match: str(int(match[1]) + 1), re.sub("^" + source, target, key))
        if "[qkv]" in name:
            converted |= {name.replace("[qkv]", part): rows for part, rows in zip("qkv", value.chunk(3), strict=True)}
        else:
            converted[name] = value
    return converted


def fields(config: dict[str, Any], **others: Any) -> dict[str, Any]:
    """Of a `FlorenceVideoConfig` with Video Swin's conventions."""
    time, height, width = config["window_size"]
    assert height == width and config["patch_size"][1:] == (4, 4)
    own = dict(
        embed_dim=config["embed_dim"],
        depths=config["depths"],
        num_heads=config["num_heads"],
        drop_path_rate=config["drop_path_rate"],
        embed_type="patch",
        window_size=height,
        temporal_window_size=time,
        temporal_stride=config["patch_size"][0],
        window_padding="clamp_axes",
        temporal_padding="zeros",
        clamped_bias="slice",
    )
    return {**own, **others}


@pytest.fixture(scope="module")
def parity(parity_file) -> Callable[[str], dict[str, Any]]:
    """One case of `../shared/parity/videoswin.pt`."""
    return lambda case: parity_file("videoswin.pt")[case]


def classifier(case: dict[str, Any], **others: Any) -> FlorenceForVideoClassification:
    head = {f"classifier.{name.removeprefix('fc_cls.')}": value for name, value in case["head_state_dict"].items()}
    config = FlorenceVideoConfig(**fields(case["config"], num_labels=len(head["classifier.bias"]), **others))
    model = FlorenceForVideoClassification(config).eval()
    tower = {f"video_model.{name}": value for name, value in convert(case["state_dict"]).items()}
    model.load_state_dict({**tower, **head})
    return model


@pytest.mark.parametrize("number", [0, 1], ids=["even", "odd"])
@torch.no_grad()
def test_video_swin(parity, number):
    """Stages and logits; the second clip needs padding on every axis, and both have maps smaller than a window."""
    case = parity("w233")
    model, expected = classifier(case), case["cases"][number]
    clip = expected["video"].transpose(1, 2)  # (batch, frames, channels, height, width)
    output = model(clip, output_hidden_states=True)
    grids = [state.permute(0, 4, 1, 2, 3) for state in output.hidden_states]
    assert_close(grids[0], expected["patch_embed"], rtol=0, atol=1e-5)
    # Video Swin's stages end with the next one's merging; the last ends with its layers, before the norm.
    tower = model.video_model
    merged = [*(stage.embed for stage in tower.encoder.stages[1:]), lambda state: state]
    for embed, state, stage in zip(merged, output.hidden_states[1:], expected["stages"], strict=True):
        assert_close(embed(state).permute(0, 4, 1, 2, 3), stage, rtol=0, atol=3e-5)
    last = tower.norm(output.hidden_states[-1]).permute(0, 4, 1, 2, 3)
    assert_close(last, expected["output"], rtol=0, atol=1e-5)
    assert_close(output.logits, expected["logits"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("number", [0, 1], ids=["even", "odd"])
@torch.no_grad()
def test_video_swin_in_double_precision(parity, number):
    case = parity("w233")
    model, expected = classifier(case).double().video_model, case["cases"][number]
    last = model(expected["video"].transpose(1, 2).double()).last_hidden_state
    assert_close(last, expected["output64"].flatten(2).transpose(1, 2), rtol=0, atol=1e-9)


@pytest.mark.parametrize("number", [0, 1], ids=["even", "odd"])
@pytest.mark.parametrize(
    "other", [{"clamped_bias": "offsets"}, {"temporal_padding": "repeat"}, {"window_padding": "pad"}], ids=str
)
@torch.no_grad()
def test_the_other_conventions_give_other_numbers(parity, number, other):
    """So that parity shows what the fields do: padding along time is met by the odd clip alone."""
    case = parity("w233")
    expected = case["cases"][number]
    last = classifier(case, **other).video_model(expected["video"].transpose(1, 2)).last_hidden_state
    distance = (last - expected["output"].flatten(2).transpose(1, 2)).abs().max()
    assert (distance > 1e-3) == (number == 1 or "temporal_padding" not in other), distance


@torch.no_grad()
def test_inflation_is_video_swins(parity):
    """The same tensors from the 2D weights, and the same output."""
    case = parity("inflate_same_window")
    video = fields(case["config"])
    own = ("embed_dim", "depths", "num_heads", "drop_path_rate", "embed_type", "window_size")
    image = FlorenceVisionModel(FlorenceVisionConfig(**{name: video[name] for name in own}))
    image.load_state_dict(convert(case["state_dict_2d"]))
    time = {name: value for name, value in video.items() if name not in own}
    model = inflate_from_image(image, **time)
    assert_close(model.state_dict(), convert(case["state_dict"]), rtol=0, atol=1e-7)
    for expected in case["cases"]:
        last = model(expected["video"].transpose(1, 2)).last_hidden_state
        assert_close(last, expected["output"].flatten(2).transpose(1, 2), rtol=0, atol=1e-5)
