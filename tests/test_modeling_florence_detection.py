"""The detector as a whole: predictions, losses in every situation, folders, pipelines, and transformers' tools."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.testing import assert_close
from torchvision.ops import box_convert
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForObjectDetection,
    Trainer,
    TrainingArguments,
    pipeline,
)

from tests.oracles import randomize
from tests.tiny_florence import save_tiny, tiny_vision_config
from transformers_florence import FlorenceBackbone, FlorenceTextModel, FlorenceVisionModel
from transformers_florence.box_ops import decode_boxes, grid_anchors
from transformers_florence.configuration_florence_detection import FlorenceDetectionConfig
from transformers_florence.image_processing_florence_detection import FlorenceDetectionImageProcessor
from transformers_florence.losses_detection import atss_losses, detection_targets
from transformers_florence.modeling_florence_detection import (
    FlorenceForObjectDetection,
    fuse_centerness,
    mean_over_processes,
    picture_sizes,
)

NAMES = {0: "cat", 1: "dog", 2: "bird"}


def tiny_config(**fields) -> FlorenceDetectionConfig:
    """Stages of strides 4 and 8, so levels of strides 4, 8, 16 and 32."""
    vision = tiny_vision_config(window_padding="pad", out_features=["stage1", "stage2"], drop_path_rate=0.1)
    return FlorenceDetectionConfig(
        **{"vision_config": vision, "hidden_size": 32, "num_blocks": 1, "id2label": NAMES, **fields}
    )


def tiny_detector(**fields) -> FlorenceForObjectDetection:
    """In evaluation mode, with weights of which every one matters."""
    return randomize(FlorenceForObjectDetection(tiny_config(**fields)))


def pixels(count: int = 2, height: int = 64, width: int = 64) -> torch.Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(1))


def objects(*boxes: tuple[float, float, float, float]) -> dict[str, torch.Tensor]:
    """Boxes as centre, width and height over the picture's size; the classes in turn."""
    return {
        "class_labels": torch.arange(len(boxes)) % len(NAMES),
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
    }


NOTHING = objects()
SOMETHING = objects((0.5, 0.5, 0.4, 0.3), (0.2, 0.7, 0.2, 0.2))


# ------------------------------------------------------------------------------------------------------- predictions


@pytest.mark.parametrize("size", [(64, 64), (50, 77), (5, 9)])
@torch.no_grad()
def test_predictions_are_decoded_from_the_maps(size):
    model = tiny_detector()
    pixel_values = pixels(2, *size)
    output = model(pixel_values)
    features = model.backbone(pixel_values).feature_maps
    maps = model.dynamic_head(tuple(model.pyramid({"0": features[0], "1": features[1]}).values()))
    grids = [tuple(each.shape[2:]) for each in maps]
    for finer, coarser in itertools.pairwise(grids):
        assert coarser == tuple(math.ceil(side / 2) for side in finer)
    start, anchors = 0, grid_anchors(grids, [4, 8, 16, 32])
    for each, scale in zip(maps, model.box_scales.parameters(), strict=True):
        places = each.flatten(2).transpose(1, 2)  # (batch, locations, channels)

        def linear(predictor: nn.Conv2d, places: torch.Tensor = places) -> torch.Tensor:
            return places @ predictor.weight[:, :, 0, 0].T + predictor.bias

        part = slice(start, start + places.shape[1])
        start = part.stop
        classes, centers = linear(model.class_predictor), linear(model.centerness_predictor)
        boxes = decode_boxes(scale * linear(model.box_predictor), anchors[part])
        assert_close(output.class_logits[:, part], classes)
        assert_close(output.centerness_logits[:, part], centers.squeeze(-1))
        assert_close(output.logits[:, part].sigmoid(), classes.sigmoid() * centers.sigmoid())
        ours = box_convert(output.pred_boxes[:, part], "cxcywh", "xyxy") * torch.tensor([*size[::-1]] * 2)
        assert_close(ours, boxes, rtol=1e-4, atol=1e-4)
    assert start == output.logits.shape[1]


def test_the_product_of_two_probabilities():
    values = torch.tensor([-200.0, -30.0, -1.0, 0.0, 2.0, 30.0, 200.0], requires_grad=True)
    fused = fuse_centerness(values[:, None, None].expand(7, 7, 1), values[None].expand(7, 7)).squeeze(-1)
    exact = values.detach().double().sigmoid()
    assert_close(fused.sigmoid().double(), exact[:, None] * exact[None], rtol=1e-6, atol=1e-30)
    assert_close(fused, fused.T)
    assert fused[0, 0].item() == pytest.approx(-400) and fused[6, 6].item() == pytest.approx(200 - math.log(2))
    fused.sum().backward()
    assert torch.isfinite(values.grad).all()


@torch.no_grad()
def test_predictions_are_relative_to_the_picture_without_padding():
    model = tiny_detector()
    pixel_values = pixels(2, 48, 64)
    mask = torch.zeros(2, 48, 64, dtype=torch.long)
    mask[0, :48, :32], mask[1, :12, :64] = 1, 1
    plain, masked = model(pixel_values), model(pixel_values, mask)
    assert_close(masked.pred_boxes[0], plain.pred_boxes[0] * torch.tensor([2.0, 1.0, 2.0, 1.0]))
    assert_close(masked.pred_boxes[1], plain.pred_boxes[1] * torch.tensor([1.0, 4.0, 1.0, 4.0]))
    assert_close(masked.logits, plain.logits, rtol=0, atol=0)
    assert picture_sizes(pixel_values, mask).tolist() == [[32, 48], [64, 12]]
    assert_close(picture_sizes(pixel_values, mask.bool()), picture_sizes(pixel_values, mask.float()))


def test_before_training_nearly_everything_is_background():
    model = FlorenceForObjectDetection(tiny_config()).eval()
    with torch.no_grad():
        output = model(pixels())
    assert_close(output.class_logits.sigmoid(), torch.full_like(output.class_logits, 0.01), rtol=0, atol=3e-3)
    offsets = model.dynamic_head.blocks[0].spatial_attention.offset
    assert not offsets.weight.any() and not offsets.bias.any()
    for conv in [each for each in model.pyramid.modules() if isinstance(each, nn.Conv2d)]:
        bound = math.sqrt(3 / conv.weight[0].numel())
        assert 0.9 * bound < conv.weight.abs().max() <= bound and not conv.bias.any()


# ------------------------------------------------------------------------------------------------------------ losses


def test_the_loss_is_that_of_the_predictions():
    """Labels to pixels by hand; crowds are left out; more than one picture counts once."""
    model = tiny_detector()
    mask = torch.ones(2, 64, 64, dtype=torch.long)
    mask[1, :, 48:] = 0
    crowd = {**objects((0.5, 0.5, 0.9, 0.9), (0.3, 0.4, 0.3, 0.3)), "iscrowd": torch.tensor([1, 0])}
    output = model(pixels(), mask, [SOMETHING, crowd])
    corners = [box_convert(label["boxes"], "cxcywh", "xyxy") for label in (SOMETHING, crowd)]
    boxes = [corners[0] * 64, corners[1][1:] * torch.tensor([48.0, 64.0, 48.0, 64.0])]
    grids = [(16, 16), (8, 8), (4, 4), (2, 2)]
    classes = [torch.tensor([0, 1]), torch.tensor([1])]
    targets = detection_targets(grid_anchors(grids, [4, 8, 16, 32]), [256, 64, 16, 4], boxes, classes)
    factors = torch.tensor([[[64.0] * 4], [[48.0, 64.0, 48.0, 64.0]]])
    predicted = box_convert(output.pred_boxes, "cxcywh", "xyxy") * factors
    expected = atss_losses(
        output.class_logits,
        predicted,
        output.centerness_logits,
        targets,
        (targets.labels >= 0).sum(),
        targets.centerness.sum(),
    )
    assert (targets.labels >= 0).sum() > 3
    for name, value in expected.items():
        assert output.loss_dict[name].item() == pytest.approx(value.item(), rel=1e-4)
    assert output.loss.item() == pytest.approx(sum(expected.values()).item(), rel=1e-4)
    assert list(output.keys())[:4] == ["loss", "loss_dict", "logits", "pred_boxes"]  # as stock scripts count


torch.manual_seed(0)
MANY = objects(*(0.1 + 0.8 * torch.rand(500, 4)).tolist())
SITUATIONS = {
    "nothing": [NOTHING, NOTHING],
    "one of two": [SOMETHING, NOTHING],
    "smaller than a stride": [objects((0.5, 0.5, 0.02, 0.02)), NOTHING],
    "without an area": [objects((0.3, 0.3, 0.0, 0.0)), NOTHING],
    "larger than the picture": [objects((0.5, 0.5, 3.0, 3.0)), SOMETHING],
    "five hundred": [MANY, SOMETHING],
    "identical": [objects(*[(0.5, 0.5, 0.4, 0.3)] * 20), NOTHING],
    "a crowd alone": [{**SOMETHING, "iscrowd": torch.tensor([1, 1])}, NOTHING],
}


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_are_finite_and_every_weight_has_a_gradient(situation, dtype):
    torch.manual_seed(0)
    model = FlorenceForObjectDetection(tiny_config()).train().to(dtype)
    output = model(pixels().to(dtype), labels=SITUATIONS[situation])
    assert output.loss.dtype == torch.float32 and torch.isfinite(output.loss)
    output.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
    some = any(len(label["boxes"]) and "iscrowd" not in label for label in SITUATIONS[situation])
    small = situation in ("smaller than a stride", "without an area")
    assert (output.loss_dict["loss_box_reg"] > 0) == (some and not small)


def test_autocast_leaves_losses_in_single_precision():
    model = tiny_detector()
    plain = model(pixels(), labels=[SOMETHING, NOTHING])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(pixels(), labels=[SOMETHING, NOTHING])
    for value in (output.logits, output.pred_boxes, output.loss, *output.loss_dict.values()):
        assert value.dtype == torch.float32
    assert output.loss.item() == pytest.approx(plain.loss.item(), rel=0.05)
    output.loss.backward()
    assert all(torch.isfinite(each.grad).all() for each in model.parameters())


def test_totals_are_means_over_processes(monkeypatch):
    """In training only: an evaluation may have more batches in one process than in another."""
    values = torch.tensor([3.0, 1.0])
    assert mean_over_processes(values) is values
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: tensor.add_(torch.tensor([5.0, 0.0])))
    assert mean_over_processes(values).tolist() == [4.0, 0.5] and values.tolist() == [3.0, 1.0]
    model = tiny_detector()
    labels = [SOMETHING, NOTHING]
    alone = model(pixels(), labels=labels).loss_dict["loss_cls"]
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: tensor.mul_(4))  # the other had three times it
    assert_close(model(pixels(), labels=labels).loss_dict["loss_cls"], alone)
    model.backbone.requires_grad_(False)  # keeps the tower's stochastic depth off
    assert_close(model.train()(pixels(), labels=labels).loss_dict["loss_cls"], alone / 2)


def test_two_processes_have_the_mean_gradient_of_one(monkeypatch):
    """One picture each, with very different numbers of objects."""
    model = tiny_detector().train()
    model.freeze_backbone()  # no stochastic depth
    totals: list[torch.Tensor] = []
    place = "transformers_florence.modeling_florence_detection.mean_over_processes"
    monkeypatch.setattr(place, lambda values: totals.append(values) or values)
    labels = [SOMETHING, objects((0.8, 0.3, 0.3, 0.4))]
    weights = [each for each in model.parameters() if each.requires_grad]
    expected = torch.autograd.grad(model(pixels(), labels=labels).loss, weights)
    monkeypatch.setattr(place, lambda values: totals[0] / 2)
    halves = [
        torch.autograd.grad(model(pixels()[part], labels=labels[part]).loss, weights)
        for part in (slice(0, 1), slice(1, 2))
    ]
    assert len(totals) == 1 and totals[0][0] > 5
    for first, second, whole in zip(*halves, expected, strict=True):
        assert_close((first + second) / 2, whole, rtol=1e-4, atol=1e-5)


def test_one_batch_can_be_learnt():
    model = FlorenceForObjectDetection(tiny_config(num_labels=3)).train()
    labels = [objects((0.4, 0.5, 0.5, 0.6)), objects((0.6, 0.4, 0.4, 0.5), (0.25, 0.75, 0.3, 0.3))]
    labels[1]["class_labels"] = torch.tensor([2, 1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    for _ in range(50):
        optimizer.zero_grad()
        model(pixels(2, 32, 32), labels=labels).loss.backward()
        optimizer.step()
    with torch.no_grad():
        output = model.eval()(pixels(2, 32, 32))
    process = FlorenceDetectionImageProcessor().post_process_object_detection
    for found, label in zip(process(output, 0.0, top_k=2), labels, strict=True):
        for number, (box, category) in enumerate(zip(label["boxes"], label["class_labels"], strict=True)):
            best = found["boxes"][found["labels"] == category][:1]
            assert len(best), f"object {number} was not found"
            assert_close(best[0], box_convert(box, "cxcywh", "xyxy"), rtol=0, atol=0.12)


# ------------------------------------------------------------------------------------------------------------- doors


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([SOMETHING], "expected a list of 2 labels, one a picture, got 1 of them"),
        (torch.zeros(2), "expected a list of 2 labels, one a picture, got Tensor"),
        ([NOTHING, {"boxes": torch.zeros(1, 4)}], r"labels\[1\]: expected a dictionary.*got \['boxes'\]"),
        ([NOTHING, 3], r"labels\[1\]: expected a dictionary with tensors 'class_labels' and 'boxes', got int"),
        ([NOTHING, SOMETHING | {"boxes": torch.zeros(3, 4)}], r"expected class_labels .* got \(2,\).*\(3, 4\)"),
        ([NOTHING, SOMETHING | {"class_labels": torch.zeros(2)}], r"integers.* got \(2,\), torch.float32"),
        ([NOTHING, SOMETHING | {"class_labels": torch.tensor([0, 3])}], "class numbers from 0 to 2, got 3"),
        ([NOTHING, SOMETHING | {"class_labels": torch.tensor([0, -1])}], "class numbers from 0 to 2, got -1"),
        ([NOTHING, SOMETHING | {"boxes": torch.full((2, 4), math.nan)}], "expected finite boxes"),
        ([NOTHING, SOMETHING | {"boxes": -torch.ones(2, 4)}], "positive width and height"),
    ],
)
def test_wrong_labels(labels, message):
    with pytest.raises(ValueError, match=message):
        tiny_detector()(pixels(), labels=labels)


def test_wrong_pictures_and_masks():
    model = tiny_detector()
    with pytest.raises(ValueError, match="expected floating-point pixel_values"):
        model(None)
    with pytest.raises(ValueError, match=r"pixel_mask of shape \(2, 64, 64\), got \(2, 64\)"):
        model(pixels(), torch.ones(2, 64))
    with pytest.raises(ValueError, match=r"pixel_mask of shape \(2, 64, 64\), got list"):
        model(pixels(), [1])
    with pytest.raises(ValueError, match="1 from the upper left corner on, got sizes"):
        model(pixels(), torch.zeros(2, 64, 64))
    config = tiny_config()
    config.hidden_size = 33
    with pytest.raises(ValueError, match="`hidden_size`: expected a multiple of 16, got 33"):
        FlorenceForObjectDetection(config)


# --------------------------------------------------------------------------------------- training, as a user does it


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(use_reentrant):
    model = tiny_detector(num_blocks=2).train()
    model.freeze_backbone()  # no stochastic depth
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
        assert model.dynamic_head.blocks[1].gradient_checkpointing is checkpointing
        model.zero_grad()
        model(pixels(), labels=[SOMETHING, NOTHING]).loss.backward()
        gradients.append({name: each.grad for name, each in model.named_parameters() if each.grad is not None})
    assert len(gradients[0]) > 20
    assert_close(gradients[1], gradients[0])


def test_a_frozen_backbone_stays_as_it_is():
    model = tiny_detector().train()
    model.freeze_backbone()
    assert model.training and model.pyramid.training and not model.backbone.training
    assert not model.train().backbone.training
    model(pixels(), labels=[SOMETHING, NOTHING]).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == name.startswith("backbone."), name
    model.unfreeze_backbone()
    assert model.backbone.training and not model.eval().backbone.training
    model(pixels(), labels=[SOMETHING, NOTHING]).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def collate(rows: list[dict]) -> dict:
    """What transformers' own example of object detection does."""
    batch = {name: torch.stack([row[name] for row in rows]) for name in ("pixel_values", "pixel_mask")}
    return {**batch, "labels": [row["labels"] for row in rows]}


def test_transformers_trainer_trains_and_evaluates(tmp_path):
    processor = tiny_processor()
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))
    target = {"image_id": 1, "annotations": [{"bbox": [10, 8, 30, 24], "category_id": 2, "area": 720, "iscrowd": 0}]}
    features = processor([picture] * 4, [target] * 4, return_tensors="pt")
    rows = [{name: features[name][number] for name in features} for number in range(4)]
    arguments = TrainingArguments(
        tmp_path,
        max_steps=2,
        per_device_train_batch_size=2,
        use_cpu=True,
        remove_unused_columns=False,
        eval_do_concat_batches=False,
        report_to=[],
        disable_tqdm=True,
    )
    seen = []
    trainer = Trainer(
        model=tiny_detector(),
        args=arguments,
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=collate,
        compute_metrics=lambda results: seen.append(results) or {"count": 1},
    )
    assert trainer.train().training_loss > 0
    assert math.isfinite(trainer.evaluate()["eval_loss"])
    losses, logits, boxes = seen[0].predictions[0]  # of the first batch, and nothing else
    assert set(losses) == {"loss_cls", "loss_box_reg", "loss_ctr"}
    assert logits.shape[2] == 3 and boxes.shape == (*logits.shape[:2], 4)


# ------------------------------------------------------------------------------------------------ folders, pipelines


@pytest.mark.parametrize("source", [None, FlorenceVisionModel, FlorenceBackbone])
def test_the_image_tower_of_a_checkpoint(source, tmp_path):
    """A dual encoder's, an image tower's, a backbone's."""
    dual = save_tiny(tmp_path / "dual")
    folder = tmp_path / "dual"
    if source is not None:
        fields = {"out_features": ["stage1", "stage2"]} if source is FlorenceBackbone else {}
        tower = source.from_pretrained(folder, **fields)
        if fields:
            nn.init.constant_(tower.feature_norms["stage1"].weight, 3.0)
        folder = tmp_path / "tower"
        tower.save_pretrained(folder)
    model = FlorenceForObjectDetection.from_pretrained_backbone(folder, hidden_size=32, num_blocks=1, id2label=NAMES)
    assert not model.training and model.dtype == torch.float32 and model.config.id2label == NAMES
    assert model.config.vision_config.window_padding == "pad"
    expected = {f"vision_model.{name}": each for name, each in dual.vision_model.state_dict().items()}
    ours = model.backbone.state_dict()
    shared = [name for name in expected if not name.startswith("vision_model.norm.")]
    assert {name for name in ours if not name.startswith("feature_norms.")} == set(shared)
    for name in shared:
        assert_close(ours[name], expected[name], rtol=0, atol=0)
    first = model.backbone.feature_norms["stage1"].weight
    assert_close(first, torch.full_like(first, 3.0 if source is FlorenceBackbone else 1.0))
    assert torch.isfinite(model(pixels()).logits).all()


def test_a_checkpoint_without_an_image_tower(tmp_path):
    save_tiny(tmp_path / "dual")
    FlorenceTextModel.from_pretrained(tmp_path / "dual").save_pretrained(tmp_path / "text")
    (tmp_path / "text" / "config.json").write_text(tiny_vision_config().to_json_string(), "utf-8")
    with pytest.raises(
        ValueError, match="expected the weights of an image tower in .*text, missing are: vision_model"
    ):
        FlorenceForObjectDetection.from_pretrained_backbone(tmp_path / "text", hidden_size=32, num_blocks=1)


def tiny_processor(**fields) -> FlorenceDetectionImageProcessor:
    return FlorenceDetectionImageProcessor(**{"size": {"shortest_edge": 32, "longest_edge": 64}, **fields})


@pytest.fixture
def registered() -> None:
    """What importing the package does; here, so that these tests stand alone."""
    AutoConfig.register(FlorenceDetectionConfig.model_type, FlorenceDetectionConfig, exist_ok=True)
    AutoModelForObjectDetection.register(FlorenceDetectionConfig, FlorenceForObjectDetection, exist_ok=True)
    AutoImageProcessor.register(
        FlorenceDetectionConfig,
        image_processor_classes={"torchvision": FlorenceDetectionImageProcessor},
        exist_ok=True,
    )


@pytest.fixture
def folder(tmp_path, registered) -> Path:
    model = tiny_detector()
    with torch.no_grad():
        model.class_predictor.bias.add_(1.0)
        model.centerness_predictor.bias.add_(3.0)
    model.save_pretrained(tmp_path)
    tiny_processor(pad_size={"height": 64, "width": 64}).save_pretrained(tmp_path)
    return tmp_path


def test_saved_and_loaded(folder):
    model = FlorenceForObjectDetection.from_pretrained(folder)
    again = AutoModelForObjectDetection.from_pretrained(folder)
    assert type(again) is FlorenceForObjectDetection and again.config == model.config
    assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert type(AutoImageProcessor.from_pretrained(folder)) is FlorenceDetectionImageProcessor
    fresh = FlorenceForObjectDetection.from_pretrained(
        folder, id2label={0: "a", 1: "b"}, label2id={"a": 0, "b": 1}, ignore_mismatched_sizes=True
    )
    assert_close(fresh.box_predictor.weight, model.box_predictor.weight, rtol=0, atol=0)
    assert fresh.class_predictor.weight.shape[0] == 2 and fresh.class_predictor.weight.std() < 0.02
    assert_close(fresh.class_predictor.bias, torch.full((2,), -math.log(99)))


def scenes() -> list[Image.Image]:
    generator = np.random.default_rng(0)
    sizes = [(40, 61), (61, 40), (33, 33)]
    return [Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_pipeline(folder, dtype):
    """Alone and in batches of pictures of different sizes; nothing of a tokenizer is looked for."""
    detector = pipeline("object-detection", model=str(folder), dtype=dtype)
    assert detector.tokenizer is None and detector.model.dtype == dtype
    assert type(detector.image_processor) is FlorenceDetectionImageProcessor
    pictures = scenes()
    alone = [detector(picture, threshold=0.3) for picture in pictures]
    processor, model = detector.image_processor, detector.model
    for picture, found in zip(pictures, alone, strict=True):
        inputs = processor(picture, return_tensors="pt")
        with torch.no_grad():
            output = model(inputs["pixel_values"].to(dtype), inputs["pixel_mask"])
        (expected,) = processor.post_process_object_detection(output, 0.3, [picture.size[::-1]])
        assert len(found) == len(expected["scores"]) > 3
        for each, score, label, box in zip(found, *expected.values(), strict=True):
            assert each["score"] == pytest.approx(score.item()) and each["label"] == NAMES[label.item()]
            assert list(each["box"].values()) == box.int().tolist()
            assert 0 <= each["box"]["xmin"] <= each["box"]["xmax"] <= picture.width
            assert 0 <= each["box"]["ymin"] <= each["box"]["ymax"] <= picture.height
    if dtype == torch.float32:
        for together, found in zip(detector(pictures, threshold=0.3, batch_size=3), alone, strict=True):
            assert [each["label"] for each in together] == [each["label"] for each in found]
            assert [each["score"] for each in together] == pytest.approx([each["score"] for each in found], abs=1e-4)


@torch.no_grad()
def test_recorded_states_and_tuples():
    model = FlorenceForObjectDetection._from_config(tiny_config(), attn_implementation="eager").eval()
    output = model(pixels(), output_hidden_states=True, output_attentions=True)
    assert [tuple(each.shape) for each in output.hidden_states] == [(2, 16, 16, 8), (2, 16, 16, 8), (2, 8, 8, 16)]
    assert_close(output.attentions[0].sum(-1), torch.ones_like(output.attentions[0][..., 0]))
    assert model(pixels()).hidden_states is None
    model.config.output_hidden_states = True
    assert len(model(pixels()).hidden_states) == 3
    model.config.output_hidden_states = False
    logits, boxes, *_ = model(pixels(), return_dict=False)
    assert_close(logits, output.logits)
    assert_close(boxes, output.pred_boxes)
    assert model.get_input_embeddings() is model.backbone.get_input_embeddings()
