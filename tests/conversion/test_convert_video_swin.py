"""Video Swin in torchvision's and mmaction's layouts: the same numbers from what is converted, and every key told."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torchvision.models.video.swin_transformer import SwinTransformer3d

from conversion.convert_video_swin import convert, convert_file, main
from tests.conversion.sources import PRECISIONS, Tensors, random_weights, write
from transformers_florence.loading import load_checkpoint
from transformers_florence.modeling_florence_video import FlorenceForVideoClassification, FlorenceVideoModel
from transformers_florence.video_processing_florence import FlorenceVideoProcessor

DIM, DEPTHS, HEADS, WINDOW, CLASSES = 8, [1, 2, 2], [1, 2, 4], [2, 3, 3], 5
SIZES = ((8, 48, 48), (5, 50, 37), (1, 16, 90))


def torchvision_swin3d(window: list[int] = WINDOW, patch: list[int] | None = None) -> SwinTransformer3d:
    """Small and random, from (batch, 3, frames, height, width) to CLASSES logits."""
    patch = patch or [2, 4, 4]
    swin = SwinTransformer3d(patch, DIM, DEPTHS, HEADS, window, num_classes=CLASSES, norm_layer=nn.LayerNorm)
    return random_weights(swin, 1)


def mmaction_keys(tensors: Tensors, prefix: str = "backbone.") -> Tensors:
    """torchvision's tensors under the names of Video Swin's own code; without a prefix, without the classifier."""
    renamed = {}
    for key, tensor in tensors.items():
        key = key.replace("mlp.0.", "mlp.fc1.").replace("mlp.3.", "mlp.fc2.")
        match = re.match(r"features\.(\d+)\.", key)
        if match:
            index, rest = int(match[1]), key[match.end() :]
            key = f"layers.{index // 2}.downsample.{rest}" if index % 2 else f"layers.{index // 2}.blocks.{rest}"
        if key.startswith("head."):
            key = key.replace("head.", "cls_head.fc_cls.") if prefix else ""
        elif key:
            key = prefix + key
        renamed[key] = tensor
    renamed.pop("", None)
    return renamed


@PRECISIONS
@pytest.mark.parametrize("layout", ["torchvision", "mmaction"])
@torch.no_grad()
def test_the_classifier_says_what_its_source_says(layout, dtype, tolerance):
    source = torchvision_swin3d().to(dtype)
    tensors = source.state_dict() if layout == "torchvision" else mmaction_keys(source.state_dict())
    model, conversion = convert(tensors, "here")
    assert isinstance(model, FlorenceForVideoClassification) and model.dtype == dtype and not model.training
    assert model.config.classifier_dropout == (0.5 if layout == "mmaction" else 0.0)
    assert (model.config.temporal_window_size, model.config.window_size) == (2, 3)
    for frames, height, width in SIZES:
        clips = torch.randn(2, frames, 3, height, width, dtype=dtype)
        assert_close(model(clips).logits, source(clips.transpose(1, 2)), rtol=0, atol=tolerance)
    # Every key is told of: taken, or left out with the reason.
    assert set(conversion.sources.values()) | set(conversion.left_out) == set(tensors)
    assert all("relative_position_index" in key for key in conversion.left_out) and not conversion.new
    assert set(conversion.sources) == set(model.state_dict())


@torch.no_grad()
def test_a_tower_alone(tmp_path):
    source = torchvision_swin3d([4, 2, 2], [1, 4, 4])
    tensors = mmaction_keys(source.state_dict(), prefix="")
    source.head = nn.Identity()
    file = write(tmp_path / "tower.pth", {"state_dict": {f"module.{key}": value for key, value in tensors.items()}})
    convert_file(file, tmp_path / "out")
    model = load_checkpoint(FlorenceVideoModel, tmp_path / "out")
    assert model.config.windows == [(4, 2, 2)] * 3 and model.config.temporal_stride == 1
    clips = torch.randn(1, 6, 3, 30, 44)
    assert_close(model(clips).pooler_output, source(clips.transpose(1, 2)), rtol=0, atol=1e-5)


def test_a_folder_with_processor_and_names(tmp_path: Path, capsys: pytest.CaptureFixture):
    source = torchvision_swin3d()
    file = write(tmp_path / "swin3d.safetensors", source.state_dict())
    names = ["waving", "nodding", "jumping", "sitting down", "standing up"]
    (tmp_path / "names.txt").write_text("\n".join(names) + "\n")
    options = ["--labels", str(tmp_path / "names.txt"), "--image-size", "112", "--num-frames", "16"]
    main([str(file), str(tmp_path / "out"), *options])
    printed = capsys.readouterr().out
    assert "features.*.*.attn.qkv.* -> video_model.encoder.stages.*.layers.*.attention.[qkv]_proj.*" in printed
    assert re.search(r"FlorenceForVideoClassification of 0\.\d\d million parameters", printed)
    model = load_checkpoint(FlorenceForVideoClassification, tmp_path / "out")
    assert list(model.config.id2label.values()) == names
    assert (model.config.image_size, model.config.num_frames) == (112, 16)
    processor = FlorenceVideoProcessor.from_pretrained(tmp_path / "out")
    assert (processor.num_frames, processor.frame_stride, processor.sampling) == (16, 2, "dense")
    assert dict(processor.size) == {"shortest_edge": 128} and processor.crop_size["height"] == 112
    assert convert_file(write(tmp_path / "a.pth", mmaction_keys(source.state_dict())), tmp_path / "other").notes
    assert FlorenceVideoProcessor.from_pretrained(tmp_path / "other").size["shortest_edge"] == 224


# ------------------------------------------------------------------------------------------------------------ refusals


def test_keys_that_have_no_place_are_refused():
    tensors = torchvision_swin3d().state_dict()
    for key in ("features.4.0.norm3.weight", "extra.weight", "features.1.reduction.bias", "patch_embed.norm.scale"):
        with pytest.raises(ValueError, match=f"keys not consumed: {re.escape(key)}"):
            convert(tensors | {key: torch.ones(8)}, "here")
    with pytest.raises(ValueError, match="not filled: video_model.embeddings.norm.bias$"):
        convert({key: value for key, value in tensors.items() if key != "patch_embed.norm.bias"}, "here")
    with pytest.raises(ValueError, match="expected Video Swin's keys as mmaction, Video Swin, torchvision name them"):
        convert({"a": torch.ones(1)}, "here")
    tower = mmaction_keys(tensors, prefix="")
    with pytest.raises(ValueError, match="not consumed: head.weight"):
        convert(tower | {"head.weight": torch.ones(2, 32)}, "here")


def test_misshapen_towers_are_refused():
    tensors = torchvision_swin3d().state_dict()
    table, index = (f"features.0.0.attn.relative_position_{kind}" for kind in ("bias_table", "index"))
    for name, tensor, message in (
        ("patch_embed.proj.weight", torch.ones(8, 3, 4, 4), r"patch_embed.proj.weight \(expected rank 5, got shape"),
        ("patch_embed.proj.weight", torch.ones(8, 3, 2, 7, 7), r"expected patches of 4 x 4, got \[7, 7\]"),
        (table, torch.ones(74, 1), r"bias_table \(expected a window over a square of 18 tokens, got 74 rows\)"),
        (table, torch.full((75, 1), torch.nan), r"bias_table \(expected finite floating-point numbers\)"),
        (index, torch.ones(12, 12).long(), "expected a window over a square of 12 tokens, got 75 rows"),
        ("head.bias", torch.ones(3), r"head.bias \(expected \(5,\), got \(3,\)\)"),
    ):
        with pytest.raises(ValueError, match=message):
            convert(tensors | {name: tensor}, "here")
    without = {key: value for key, value in tensors.items() if key != index}
    with pytest.raises(ValueError, match=r"bias_table \(expected beside it the index that tells its window\)"):
        convert(without, "here")
    oblong = torchvision_swin3d([2, 3, 5]).state_dict()
    with pytest.raises(ValueError, match="expected a window over a square of 30 tokens, got 135 rows"):
        convert(oblong, "here")


def test_settings_that_do_not_fit(tmp_path):
    tensors = torchvision_swin3d().state_dict()
    with pytest.raises(
        ValueError, match=r"expected in here, by its configuration, depths: \[2, 2, 2\], got \[1, 2, 2\]"
    ):
        convert(tensors, "here", {"depths": [2, 2, 2]})
    with pytest.raises(ValueError, match="expected the names of 5 classes for here, got 2"):
        convert(tensors, "here", {"id2label": {0: "a", 1: "b"}})
    file = write(tmp_path / "swin3d.pth", tensors)
    (tmp_path / "twice.txt").write_text("a\na\n")
    for labels, message in (("twice.txt", "expected a different name"), ("none.txt", "expected a text file with")):
        with pytest.raises(ValueError, match=message):
            convert_file(file, tmp_path / "out", labels=tmp_path / labels)
    with pytest.raises(ValueError, match="expected a new or empty folder"):
        convert_file(file, tmp_path)
