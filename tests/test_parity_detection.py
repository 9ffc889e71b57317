"""Weights, inputs and outputs of Dynamic Head's own code: the same numbers from our bricks and our detector.

The file lies in the folder `shared` beside the clone, under `parity`; without it these tests skip.
"""

from typing import Any

import pytest
import torch
from torch.testing import assert_close
from torchvision.ops import box_convert

from conversion.convert_dyhead import DYNAMIC_HEAD, convert
from conversion.key_tables import apply_table
from transformers_florence.box_ops import decode_boxes, grid_anchors, select_detections
from transformers_florence.configuration_florence_detection import FlorenceDetectionConfig
from transformers_florence.dynamic_head import DynamicHead, ModulatedDeformConv, TaskAwareAttention, read_offsets
from transformers_florence.image_processing_florence_detection import FlorenceDetectionImageProcessor
from transformers_florence.losses_detection import detection_targets
from transformers_florence.modeling_florence_detection import FlorenceForObjectDetection

Tensors = dict[str, torch.Tensor]
TOWER_CASES = pytest.mark.parametrize("name", ["tower_1block_2lvl", "tower_odd_sizes"])


@pytest.fixture(scope="module")
def parity(parity_file) -> dict[str, Any]:
    return parity_file("dyhead.pt")


def config_of(channels: int, blocks: int = 1, **fields: Any) -> FlorenceDetectionConfig:
    return FlorenceDetectionConfig(hidden_size=channels, num_blocks=blocks, **fields)


# ------------------------------------------------------------------------------------------------------------ bricks


@pytest.mark.parametrize("number", range(3))
@torch.no_grad()
def test_deformable_convolution(parity, number):
    """The third case has an output smaller than the map of its offsets: the authors' reading of it."""
    case = parity["dcn"]["cases"][number]
    conv = ModulatedDeformConv(config_of(16), stride=case["stride"])
    conv.weight, conv.bias = (torch.nn.Parameter(case[name]) for name in ("weight", "bias"))
    grid = tuple(case["output"].shape[2:])
    offsets, mask = (read_offsets(case[name], grid, "official") for name in ("offset", "mask"))
    assert_close(conv(case["input"], offsets, mask), case["output"], rtol=0, atol=1e-5)
    if number == 2:
        cut = (read_offsets(case[name], grid, "crop") for name in ("offset", "mask"))
        assert (conv(case["input"], *cut) - case["output"]).abs().max() > 0.1


@pytest.mark.parametrize("number", range(6))
@torch.no_grad()
def test_dynamic_rectifier(parity, number):
    case = parity["dyrelu"]["cases"][number]
    options = dict(case["kwargs"])
    names = {"use_bias": "use_bias", "reduction": "reduction", "use_spatial": "use_spatial"}
    fields: dict[str, Any] = {names[key]: options.pop(key) for key in list(options) if key in names}
    if "K2" in options:
        fields["num_slopes"] = 2 if options.pop("K2") else 1
    assert not options
    brick = TaskAwareAttention(config_of(16), **fields).eval()
    renamed = {"fc.0": "fc1", "fc.2": "fc2", "spa.": "spatial."}
    tensors: Tensors = {}
    for key, tensor in case["state_dict"].items():
        source = next(start for start in renamed if key.startswith(start))
        tensors[renamed[source] + key.removeprefix(source)] = tensor
    brick.load_state_dict(tensors)
    assert_close(brick(case["input"]), case["output"], rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------ towers


def tower(case: dict[str, Any], layout: str) -> DynamicHead:
    config = case["config"]
    assert config["in_channels"] == config["channels"]
    head = DynamicHead(config_of(config["channels"], config["num_convs"], offset_layout=layout))
    converted = apply_table(
        {f"backbone.{key}": each for key, each in case["state_dict"].items()}, DYNAMIC_HEAD, "here"
    )
    assert converted.unknown == []
    head.load_state_dict({key.removeprefix("dynamic_head."): each for key, each in converted.tensors.items()})
    return head.eval()


@TOWER_CASES
@pytest.mark.parametrize(
    ("layout", "key", "dtype", "tolerance"),
    [
        ("official", "outputs", torch.float32, 1e-5),
        ("official", "outputs64", torch.float64, 1e-9),
        ("crop", "outputs_mmdet_crop", torch.float32, 1e-5),
    ],
)
@torch.no_grad()
def test_towers_in_both_conventions(parity, name, layout, key, dtype, tolerance):
    case = parity[name]
    maps = tuple(each.to(dtype) for each in case["inputs"].values())
    outputs = tower(case, layout).to(dtype)(maps)
    for output, expected in zip(outputs, case[key].values(), strict=True):
        assert_close(output, expected, rtol=0, atol=tolerance)


# ---------------------------------------------------------------------------------------------------------- detector


@pytest.fixture(scope="module")
def case(parity) -> dict[str, Any]:
    return parity["detector"]


@pytest.fixture(scope="module")
def model(case) -> FlorenceForObjectDetection:
    return convert(case["state_dict"], "here")[0]


def inputs_of(case: dict[str, Any]) -> dict[str, Any]:
    """Pictures and labels through our own processor, as the release prepares them: normalised, padded to 128."""
    processor = FlorenceDetectionImageProcessor(
        size_divisor=128,
        do_resize=False,
        do_rescale=False,
        image_mean=[123.675, 116.28, 103.53],
        image_std=[58.395, 57.12, 57.375],
    )
    annotations = [
        {
            "image_id": number,
            "annotations": [
                {"bbox": box, "category_id": label}
                for box, label in zip(box_convert(boxes, "xyxy", "xywh").tolist(), labels.tolist(), strict=True)
            ],
        }
        for number, (boxes, labels) in enumerate(zip(case["inputs"]["boxes"], case["inputs"]["classes"], strict=True))
    ]
    return processor(case["inputs"]["images"], annotations, return_tensors="pt")


def test_pictures_are_prepared_alike(case):
    inputs = inputs_of(case)
    assert_close(inputs["pixel_values"], case["outputs"]["batched"], rtol=0, atol=1e-5)
    assert [tuple(label["orig_size"].tolist()) for label in inputs["labels"]] == case["outputs"]["image_sizes"]


@torch.no_grad()
def test_every_map_of_the_detector(case, model):
    expected = case["outputs"]
    body = model.backbone(expected["batched"]).feature_maps
    pyramid = model.pyramid({str(level): each for level, each in enumerate(body)})
    maps = model.dynamic_head(tuple(pyramid.values()))
    for ours, key in ((body, "body"), (tuple(pyramid.values()), "fpn"), (maps, "dyhead")):
        for each, theirs in zip(ours, expected[key].values(), strict=True):
            assert_close(each, theirs, rtol=0, atol=2e-5)
    grids = [tuple(each.shape[2:]) for each in maps]
    assert_close(grid_anchors(grids, model.config.strides), torch.cat(expected["anchors"]), rtol=0, atol=0)
    for ours, key in zip(model.predict(maps), ("logits", "deltas", "centerness"), strict=True):
        theirs = torch.cat([each.flatten(2).transpose(1, 2) for each in expected[key]], dim=1)
        assert_close(ours, theirs.squeeze(-1) if key == "centerness" else theirs, rtol=0, atol=2e-5)


def test_the_anchors_of_every_object(case):
    """Class numbers begin with 1 there, and 0 is background; targets are deltas."""
    expected = case["outputs"]
    anchors = torch.cat(expected["anchors"])
    sizes = [len(each) for each in expected["anchors"]]
    targets = detection_targets(anchors, sizes, case["inputs"]["boxes"], case["inputs"]["classes"])
    for picture, theirs in enumerate(expected["labels"]):
        assert_close(targets.labels[picture] + 1, theirs)
        positive = theirs > 0
        boxes = decode_boxes(expected["reg_targets"][picture], anchors)[positive]
        assert_close(targets.boxes[picture][positive], boxes, rtol=0, atol=1e-3)


def test_losses_and_gradients(case, model):
    inputs = inputs_of(case)
    model.zero_grad()
    output = model(**inputs)
    for name, value in case["outputs"]["losses"].items():
        assert output.loss_dict[name].item() == pytest.approx(value.item(), rel=2e-6)
    assert output.loss.item() == pytest.approx(sum(case["outputs"]["losses"].values()).item(), rel=2e-6)
    output.loss.backward()
    converted = apply_table(case["grads"], DYNAMIC_HEAD, "gradients")
    assert converted.unknown == [] and len(converted.tensors) == len(case["grads"]) == 7
    parameters = dict(model.named_parameters())
    for name, expected in converted.tensors.items():
        scale = expected.abs().max().item()
        assert_close(
            parameters[name].grad, expected, rtol=1e-4, atol=1e-5 * scale, msg=lambda text, n=name: f"{n}: {text}"
        )


@torch.no_grad()
def test_detections(case, model):
    inputs = inputs_of(case)
    output = model(inputs["pixel_values"], inputs["pixel_mask"])
    sizes = torch.tensor(case["outputs"]["image_sizes"])
    factors = sizes.flip(1).repeat(1, 2)[:, None]
    boxes = box_convert(output.pred_boxes, "cxcywh", "xyxy") * factors
    found = select_detections(output.logits.sigmoid(), boxes, 0.05, 100, 0.6)
    processor = FlorenceDetectionImageProcessor()
    finished = processor.post_process_object_detection(output, 0.05, sizes)
    for ours, ready, theirs, (height, width) in zip(
        found, finished, case["outputs"]["detections"], sizes.tolist(), strict=True
    ):
        assert_close(ours["scores"], theirs["scores"], rtol=0, atol=1e-5)
        # Scores that differ in their last digits may change places: each of theirs is one of ours within three places.
        near = (torch.arange(len(theirs["scores"]))[:, None] - torch.arange(len(ours["scores"]))).abs() <= 3
        same = (ours["labels"] == theirs["classes"][:, None]) & near
        same &= (ours["boxes"] - theirs["boxes"][:, None]).abs().amax(dim=-1) <= 1e-3
        same &= (ours["scores"] - theirs["scores"][:, None]).abs() <= 1e-5
        assert (same.sum(dim=0) == 1).all() and (same.sum(dim=1) == 1).all()
        # The last step of the original: cut boxes at the picture's edge, drop what lies outside.
        cut = torch.minimum(theirs["boxes"].clamp(min=0), torch.tensor([width, height] * 2))
        inside = (cut[:, 2:] > cut[:, :2]).all(dim=1)
        assert not inside.all()
        assert_close(ready["boxes"], cut[inside], rtol=0, atol=1e-3)
        assert_close(ready["scores"], theirs["scores"][inside], rtol=0, atol=1e-5)
