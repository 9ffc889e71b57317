"""A detector under Dynamic Head's names, computed by its definition: the same numbers from ours, or a clear error."""

import re
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from transformers import SwinBackbone, SwinConfig

from conversion import convert_dyhead
from conversion.convert_dyhead import class_names, convert, convert_file
from conversion.convert_swin import convert as convert_swin
from tests.conversion.sources import Tensors, random_weights, write
from tests.oracles import fuse_qkv
from tests.oracles_detection import Detector
from transformers_florence.image_processing_florence_detection import FlorenceDetectionImageProcessor
from transformers_florence.modeling_florence_detection import FlorenceForObjectDetection

DIM, CHANNELS, CLASSES = 4, 32, 3
BODY = "backbone.backbone.bottom_up."


def source(blocks: int = 1) -> tuple[SwinBackbone, Detector, Tensors]:
    """A Swin of transformers, the pyramid and head by their definition, and all tensors under the release's names."""
    fields = {"embed_dim": DIM, "depths": [2, 2, 2, 2], "num_heads": [1, 1, 2, 4], "window_size": 2}
    config = SwinConfig(**fields, image_size=64, drop_path_rate=0.0, out_features=["stage2", "stage3", "stage4"])
    swin = random_weights(SwinBackbone(config).double(), 1)
    detector = random_weights(Detector([2 * DIM, 4 * DIM, 8 * DIM], CHANNELS, blocks, CLASSES).double(), 2)
    ours = convert_swin(swin.state_dict(), "here")[0].state_dict()
    body: Tensors = {}
    for name, tensor in fuse_qkv(ours).items():
        name = name.removeprefix("vision_model.").replace("embeddings.", "patch_embed.").replace("encoder.", "")
        name = re.sub(r"feature_norms\.stage(\d)\.", lambda match: f"norm{int(match[1]) - 1}.", name)
        name = re.sub(r"stages\.(\d)\.layers\.", r"layers.\1.blocks.", name).replace(".attention.", ".attn.")
        name = re.sub(r"stages\.(\d)\.embed\.", lambda match: f"layers.{int(match[1]) - 1}.downsample.", name).replace(
            "patch_embed.projection.", "patch_embed.proj."
        )
        body[BODY + name] = tensor
    body[BODY + "layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(4, 4, dtype=torch.long)
    return swin, detector, {"pixel_mean": torch.zeros(3, 1, 1), **body, **detector.state_dict()}


@pytest.mark.parametrize("size", [(64, 64), (70, 41)])
@torch.no_grad()
def test_predictions_are_those_of_the_source(size):
    swin, detector, tensors = source()
    model, conversion = convert(tensors, "here")
    assert model.dtype == torch.float64 and model.config.offset_layout == "official"
    assert model.config.vision_config.window_padding == "pad"
    pixels = torch.randn(1, 3, *size, dtype=torch.float64)
    levels = detector(list(swin(pixels).feature_maps), official=True)
    classes, deltas, centerness = (
        torch.cat([each.flatten(2).transpose(1, 2) for each in kind], dim=1) for kind in zip(*levels, strict=True)
    )
    output = model(pixels)
    assert classes.std() > 0.01
    assert_close(output.class_logits, classes, rtol=0, atol=1e-9)
    assert_close(output.centerness_logits, centerness.squeeze(-1), rtol=0, atol=1e-9)
    maps = model.pyramid(dict(zip("abc", model.backbone(pixels).feature_maps, strict=True)))
    assert_close(model.predict(model.dynamic_head(tuple(maps.values())))[1], deltas, rtol=0, atol=1e-9)
    assert set(conversion.left_out) == {"pixel_mean", BODY + "layers.0.blocks.0.attn.relative_position_index"}
    assert len(conversion.tensors) == len(model.state_dict())


def test_a_file_becomes_a_folder(tmp_path: Path, capsys):
    _, _, tensors = source(blocks=2)
    tensors = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    file = write(tmp_path / "release.pth", {"model": tensors, "iteration": 90000})
    (tmp_path / "names.txt").write_text("cat\ndog\nbird\n", "utf-8")
    convert_dyhead.main([str(file), str(tmp_path / "out"), "--names", str(tmp_path / "names.txt")])
    assert "pixel_mean: the image processor's" in capsys.readouterr().out
    model = FlorenceForObjectDetection.from_pretrained(tmp_path / "out")
    assert_close(model.state_dict(), convert(tensors, "here")[0].state_dict(), rtol=0, atol=0)
    assert model.config.id2label == {0: "cat", 1: "dog", 2: "bird"} and model.config.num_blocks == 2
    processor = FlorenceDetectionImageProcessor.from_pretrained(tmp_path / "out")
    assert processor.size_divisor == 128 and dict(processor.size) == {"shortest_edge": 800, "longest_edge": 1333}


def test_names_of_classes():
    assert class_names(3) == {0: "0", 1: "1", 2: "2"}
    coco = class_names(80)
    assert (len(coco), coco[0], coco[1], coco[79]) == (80, "person", "bicycle", "toothbrush")
    with pytest.raises(ValueError, match="expected the names of 3 classes, got 1"):
        convert(source()[2], "here", ["cat"])


def test_every_key_is_accounted_for():
    _, _, tensors = source()
    known = set(tensors) - {"pixel_mean", BODY + "layers.0.blocks.0.attn.relative_position_index"}
    taken = dict(tensors)
    taken["backbone.backbone.bottom_up.res2.0.conv1.weight"] = torch.ones(1)
    taken["head.cls_tower.0.weight"] = taken.pop("head.scales.4.scale")
    del taken["backbone.dyhead_tower.0.offset.bias"]
    taken["head.bbox_pred.weight"] = torch.ones(4, CHANNELS, 3, 3)
    with pytest.raises(ValueError) as caught:
        convert(taken, "here")
    message = str(caught.value)
    assert "not consumed: backbone.backbone.bottom_up.res2.0.conv1.weight, head.cls_tower.0.weight" in message
    assert "not filled: box_scales.4, dynamic_head.blocks.0.spatial_attention.offset.bias" in message
    assert "head.bbox_pred.weight (expected (4, 32, 1, 1), got (4, 32, 3, 3))" in message
    assert len(known) > 100


def test_what_is_no_detector_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"not consumed: res2.weight; not filled: class_predictor.weight"):
        convert({"res2.weight": torch.ones(1)}, "here")
    with pytest.raises(ValueError, match="expected a new or empty folder"):
        convert_file(write(tmp_path / "a.pth", {"model": source()[2]}), tmp_path)
