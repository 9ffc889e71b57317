"""The open-set detector: what names boxes, losses, folders, stock pipelines, remote code."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from torch.testing import assert_close
from torchvision.ops import box_convert
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForZeroShotObjectDetection,
    AutoProcessor,
    pipeline,
)

from tests.oracles import randomize
from tests.tiny_florence import DIM, SIDE, save_tiny, tiny_text_config, tiny_tokenizer, tiny_vision_config
from transformers_florence import FlorenceConfig, FlorenceForObjectDetection, FlorenceModel, FlorenceTokenizer
from transformers_florence.box_ops import select_detections
from transformers_florence.configuration_florence_detection import FlorenceDetectionConfig
from transformers_florence.configuration_florence_zero_shot_detection import FlorenceZeroShotDetectionConfig
from transformers_florence.evaluation.zero_shot import build_zero_shot_classifier
from transformers_florence.image_processing_florence_detection import FlorenceDetectionImageProcessor
from transformers_florence.modeling_florence_zero_shot_detection import (
    PROPOSAL_NMS,
    FlorenceForZeroShotObjectDetection,
    log_odds,
    object_boxes,
)
from transformers_florence.processing_florence_zero_shot_detection import FlorenceZeroShotDetectionProcessor

NAMINGS = ("crop", "region", "text_head")
CLASSES = ["a cat", "a dog", "a red bicycle"]


def tiny_config(**fields) -> FlorenceZeroShotDetectionConfig:
    """Stages of strides 4 and 8, so levels of strides 4, 8, 16 and 32."""
    own = {
        "vision_config": tiny_vision_config(out_features=["stage1", "stage2"], drop_path_rate=0.1),
        "text_config": tiny_text_config(),
        "projection_dim": DIM,
        "hidden_size": 32,
        "num_blocks": 1,
        "num_proposals": 6,
    }
    return FlorenceZeroShotDetectionConfig(**{**own, **fields})


def tiny_open_set(**fields) -> FlorenceForZeroShotObjectDetection:
    """In evaluation mode, with weights of which every one matters."""
    return randomize(FlorenceForZeroShotObjectDetection(tiny_config(**fields)))


def pixels(count: int = 2, height: int = 64, width: int = 64) -> torch.Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(1))


def vectors(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, DIM, generator=torch.Generator().manual_seed(2))


def objects(*boxes: tuple[float, float, float, float]) -> dict[str, torch.Tensor]:
    """Boxes as centre, width and height over the picture's size; the classes in turn."""
    return {"class_labels": torch.arange(len(boxes)) % len(CLASSES), "boxes": torch.tensor(boxes).reshape(-1, 4)}


SOMETHING = objects((0.5, 0.5, 0.4, 0.3), (0.2, 0.7, 0.2, 0.2))
NOTHING = objects()


def plain_detector(model: FlorenceForZeroShotObjectDetection, classes: int) -> FlorenceForObjectDetection:
    """A detector of a fixed number of classes with the same weights, but for its class predictor."""
    fields = {"hidden_size": 32, "num_blocks": 1, "num_labels": classes}
    peer = FlorenceForObjectDetection(FlorenceDetectionConfig(vision_config=model.config.vision_config, **fields))
    wanted = peer.state_dict().keys()
    shared = {name: each for name, each in model.state_dict().items() if name in wanted}
    if classes > 1:
        shared = {name: each for name, each in shared.items() if not name.startswith("class_predictor.")}
    missing, unexpected = peer.load_state_dict(shared, strict=False)
    assert not unexpected and all(name.startswith("class_predictor.") for name in missing)
    return peer.eval()


def dual_encoder(model: FlorenceForZeroShotObjectDetection) -> FlorenceModel:
    """A dual encoder with the same weights."""
    towers = {name: getattr(model.config, name).to_dict() for name in ("vision_config", "text_config")}
    dual = FlorenceModel(FlorenceConfig(**towers, projection_dim=DIM))
    names = {"backbone.vision_model.": "vision_model.", "tower_norm.": "vision_model.norm."}
    weights = {}
    for name, each in model.state_dict().items():
        for ours, theirs in names.items():
            name = theirs + name.removeprefix(ours) if name.startswith(ours) else name
        weights[name] = each
    dual.load_state_dict({name: weights[name] for name in dual.state_dict()})
    return dual.eval()


# ---------------------------------------------------------------------------------------------- the dual encoder names


def test_log_odds_are_those_of_the_softmax():
    logits, others = 4 * vectors(3)[:, :5], 4 * vectors(3)[:, 5:7]
    shares = torch.cat((logits, others), dim=-1).double().softmax(dim=-1)[:, :5]
    assert_close(log_odds(logits, others).double(), (shares / (1 - shares)).log(), rtol=1e-4, atol=1e-4)
    certain = log_odds(torch.tensor([[500.0, 0.0]]), torch.zeros(1, 1))
    assert 15 < certain[0, 0] < 17 and certain[0, 1] == -500


def test_squares_around_boxes():
    boxes = torch.tensor([[10.0, 20.0, 30.0, 28.0], [0.0, 0.0, 4.0, 8.0]])
    assert object_boxes(boxes, 0.5).tolist() == [[5.0, 9.0, 35.0, 39.0], [-4.0, -2.0, 8.0, 10.0]]


@torch.no_grad()
def test_a_crop_is_what_the_dual_encoder_sees_of_the_picture():
    """Where a square lies on whole pixels, cutting is slicing, and halving is the mean of four pixels."""
    model = tiny_open_set(crop_margin=0.0)
    dual, pixel_values = dual_encoder(model), pixels(2, 80, 96)
    whole = torch.tensor([[8.0, 16, 8 + SIDE, 16 + SIDE], [4.0, 10, 68, 70]])
    edge = torch.tensor([[80.0, 50, 80 + SIDE, 50 + SIDE]])  # leaves the picture at the right and below
    ours = model.embed_boxes(pixel_values, [whole, edge], model.predict_anchors(pixel_values, None))
    squares = [
        pixel_values[:1, :, 16 : 16 + SIDE, 8 : 8 + SIDE],
        F.avg_pool2d(pixel_values[:1, :, 8:72, 4:68], 2),  # as high as it is wide
    ]
    expected = torch.cat([dual.get_image_features(square).pooler_output for square in squares])
    assert_close(ours[:2], F.normalize(expected, dim=-1), rtol=1e-4, atol=1e-5)
    assert len(ours) == 3 and torch.isfinite(ours[2]).all()


@torch.no_grad()
def test_a_region_of_the_whole_picture_is_the_picture_to_the_dual_encoder():
    """Of seven cells a side, as many as there are bins: each bin is a cell."""
    model = tiny_open_set(naming="region")
    dual, pixel_values = dual_encoder(model), pixels(2, 56, 56)
    found = model.predict_anchors(pixel_values, None, output_hidden_states=True)
    whole = torch.tensor([[0.0, 0.0, 56.0, 56.0]])
    ours = model.embed_boxes(pixel_values, [whole, whole], found)
    assert_close(ours, F.normalize(dual.get_image_features(pixel_values).pooler_output, dim=-1), rtol=1e-4, atol=1e-5)
    left = model.embed_boxes(pixel_values, [whole / torch.tensor([1.0, 1, 2, 1]), whole[:0]], found)
    assert len(left) == 1 and (left - ours[:1]).abs().max() > 0.01


@pytest.mark.parametrize("naming", ["crop", "region"])
@torch.no_grad()
def test_scores_are_those_of_the_box_times_those_of_the_name(naming):
    model = tiny_open_set(naming=naming, background_texts=["nothing", "a wall"])
    pixel_values, embeds = pixels(2, 48, 64), vectors(3)
    mask = torch.ones(2, 48, 64, dtype=torch.long)
    mask[1, :, 40:] = 0
    output = model(pixel_values, mask, class_embeds=embeds)
    peer = plain_detector(model, 1)
    plain = peer(pixel_values, mask)
    size = torch.tensor([[[64.0, 48, 64, 48]], [[40.0, 48, 40, 48]]])
    corners = box_convert(plain.pred_boxes, "cxcywh", "xyxy").clamp(0, 1) * size
    areas = (corners[..., 2:] - corners[..., :2]).prod(dim=-1)
    best = select_detections(plain.logits.sigmoid() * (areas > 0)[..., None], corners, 0.0, 6, PROPOSAL_NMS)
    assert output.logits.shape == (2, 6, 3) and output.class_embeds.shape == (2, 3, DIM)
    for number, proposals in enumerate(best):
        boxes = box_convert(output.pred_boxes[number], "cxcywh", "xyxy") * size[number]
        assert_close(boxes, proposals["boxes"], rtol=1e-4, atol=1e-3)
        found = model.predict_anchors(pixel_values, mask, output_hidden_states=True)
        seen = model.embed_boxes(pixel_values, [each["boxes"] for each in best], found)[6 * number : 6 * number + 6]
        texts = torch.cat((F.normalize(embeds, dim=-1), model.background_embeds))
        shares = (model.logit_scale.exp() * seen @ texts.T).softmax(dim=-1)[:, :3]
        assert_close(output.class_logits[number].sigmoid(), shares, rtol=1e-3, atol=1e-5)
        assert_close(output.logits[number].sigmoid(), shares * proposals["scores"][:, None], rtol=1e-3, atol=1e-5)


@torch.no_grad()
def test_pictures_with_fewer_proposals_are_filled_up(monkeypatch):
    model = tiny_open_set(naming="region")
    choose = select_detections

    def uneven(*arguments):
        first, second = choose(*arguments)
        return [{name: each[:2] for name, each in first.items()}, second]

    place = "transformers_florence.modeling_florence_zero_shot_detection.select_detections"
    whole = model(pixels(), class_embeds=vectors(3))
    monkeypatch.setattr(place, uneven)
    output = model(pixels(), class_embeds=vectors(3))
    assert_close(output.logits[0, :2], whole.logits[0, :2])
    assert_close(output.logits[1], whole.logits[1])
    assert not output.logits[0, 2:].sigmoid().any()
    process = FlorenceDetectionImageProcessor().post_process_object_detection
    assert [len(each["scores"]) for each in process(output, 0.0, nms_threshold=1.0)] == [6, 18]
    monkeypatch.setattr(place, lambda *arguments: [{n: e[:0] for n, e in each.items()} for each in choose(*arguments)])
    output = model(pixels(), class_embeds=vectors(3))
    assert output.logits.shape == (2, 0, 3)
    assert [len(each["scores"]) for each in process(output, 0.0)] == [0, 0]


# ------------------------------------------------------------------------------------------------------- the text head


def test_the_text_head_is_a_class_predictor_made_of_texts():
    """A detector whose class predictor is the product of both: same predictions, same losses, same gradients."""
    model, embeds = tiny_open_set(naming="text_head"), vectors(3)
    peer, unit = plain_detector(model, 3), F.normalize(embeds, dim=-1)
    with torch.no_grad():
        peer.class_predictor.weight.copy_(torch.einsum("cd,dxyz->cxyz", unit, model.class_predictor.weight))
        peer.class_predictor.bias.copy_(unit @ model.class_predictor.bias + model.class_bias)
    mask = torch.ones(2, 64, 64, dtype=torch.long)
    mask[1, :, 48:] = 0
    ours = model(pixels(), mask, class_embeds=embeds, labels=[SOMETHING, NOTHING])
    theirs = peer(pixels(), mask, labels=[SOMETHING, NOTHING])
    for name in ("loss", "loss_dict", "logits", "pred_boxes", "class_logits", "centerness_logits"):
        assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5)
    ours.loss.backward()
    theirs.loss.backward()
    gradients = {name: each.grad for name, each in model.named_parameters()}
    for name, each in peer.named_parameters():
        if not name.startswith("class_predictor."):
            assert_close(gradients[name], each.grad, rtol=1e-3, atol=1e-5)


@torch.no_grad()
def test_each_picture_may_have_its_own_classes():
    model, embeds = tiny_open_set(naming="text_head"), vectors(2, 3)
    together = model(pixels(), class_embeds=embeds)
    for number in range(2):
        alone = model(pixels()[number : number + 1], class_embeds=embeds[number])
        assert_close(together.logits[number], alone.logits[0], rtol=1e-4, atol=1e-5)
    tokens = tiny_tokenizer()([*CLASSES, "a house", "mountains", "a cat"], return_tensors="pt", padding=True)
    by_text = model(pixels(), **tokens)
    dual_vectors = model.get_text_features(**tokens).pooler_output
    assert_close(by_text.logits, model(pixels(), class_embeds=dual_vectors.view(2, 3, DIM)).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_weight_of_the_text_head_has_a_gradient(dtype):
    torch.manual_seed(0)
    model = FlorenceForZeroShotObjectDetection(tiny_config(naming="text_head")).train().to(dtype)
    tokens = tiny_tokenizer()([*CLASSES, *CLASSES], return_tensors="pt", padding=True)
    output = model(pixels().to(dtype), **tokens, labels=[SOMETHING, NOTHING])
    assert output.loss.dtype == torch.float32 and output.logits.dtype == torch.float32
    assert_close(output.class_logits.sigmoid(), torch.full_like(output.class_logits, 0.01), rtol=0, atol=5e-3)
    output.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name


def test_boxes_and_names_of_one_batch_can_be_learnt():
    model = FlorenceForZeroShotObjectDetection(tiny_config(naming="text_head")).train()
    labels = [objects((0.4, 0.5, 0.5, 0.6)), objects((0.6, 0.4, 0.4, 0.5), (0.25, 0.75, 0.3, 0.3))]
    labels[1]["class_labels"] = torch.tensor([2, 1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    embeds = vectors(4)
    for _ in range(50):
        optimizer.zero_grad()
        model(pixels(2, 32, 32), class_embeds=embeds[:3], labels=labels).loss.backward()
        optimizer.step()
    # The other way round, and with a class that was never there: what was learnt is the vectors, not their places.
    with torch.no_grad():
        output = model.eval()(pixels(2, 32, 32), class_embeds=embeds.flip(0))
    process = FlorenceDetectionImageProcessor().post_process_object_detection
    for found, label in zip(process(output, 0.0, top_k=2), labels, strict=True):
        for box, category in zip(label["boxes"], label["class_labels"], strict=True):
            best = found["boxes"][found["labels"] == 3 - category][:1]
            assert len(best), f"expected class {3 - category} among the best two, got {found['labels'].tolist()}"
            assert_close(best[0], box_convert(box, "cxcywh", "xyxy"), rtol=0, atol=0.12)


# ----------------------------------------------------------------------------------------- proposals, without classes


@pytest.mark.parametrize("naming", ["crop", "region"])
def test_proposals_are_trained_without_classes(naming):
    model = tiny_open_set(naming=naming)
    labels = [SOMETHING, objects((0.5, 0.5, 0.9, 0.9))]
    ours = model(pixels(), labels=labels)
    peer = plain_detector(model, 1)
    blind = [{**label, "class_labels": torch.zeros_like(label["class_labels"])} for label in labels]
    theirs = peer(pixels(), labels=blind)
    for name in ("loss", "loss_dict", "logits", "pred_boxes"):
        assert_close(ours[name], theirs[name])
    assert ours.class_embeds is None
    with_names = model(pixels(), labels=labels, class_embeds=vectors(3))
    assert_close(with_names.loss, theirs.loss)
    assert with_names.logits.shape == (2, 6, 3)
    assert labels[0]["class_labels"].tolist() == [0, 1]


def test_a_frozen_dual_encoder_stays_as_it_is():
    model = tiny_open_set().train()
    model.freeze_backbone()
    model(pixels(), labels=[SOMETHING, NOTHING]).loss.backward()
    towers = ("backbone.", "text_model.", "text_projection.", "tower_norm.", "visual_projection.", "logit_scale")
    for name, parameter in model.named_parameters():
        frozen = name.startswith((*towers, "background_embeds"))
        assert (parameter.grad is None) == frozen and parameter.requires_grad != frozen, name
    model.unfreeze_backbone()
    trained = {name for name, each in model.named_parameters() if each.requires_grad}
    assert {name for name, _ in model.named_parameters()} - trained == {"background_embeds"}


# ------------------------------------------------------------------------------------------------------------- doors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "expected classes as input_ids or class_embeds, got neither"),
        ({"class_embeds": vectors(3), "input_ids": torch.ones(2, 3, dtype=torch.long)}, "got both"),
        ({"class_embeds": vectors(3)[:, :5]}, r"class_embeds \(classes, 12\) or \(2, classes, 12\).* got \(3, 5\)"),
        ({"class_embeds": vectors(3, 2)}, r"got \(3, 2, 12\)"),
        ({"class_embeds": vectors(0)}, r"at least one class, got \(0, 12\)"),
        ({"class_embeds": [1.0]}, "got list"),
        ({"input_ids": torch.ones(3, 4, dtype=torch.long)}, r"as many classes for each of 2 pictures, got \(3, 4\)"),
        ({"labels": 3}, "expected a list of 2 labels"),
        ({"labels": [NOTHING, {"boxes": torch.zeros(1, 4)}]}, r"labels\[1\]: expected a dictionary"),
        ({"labels": [NOTHING, 3]}, r"labels\[1\].* got int"),
    ],
)
def test_wrong_classes_and_labels(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_open_set()(pixels(), **arguments)


def test_wrong_classes_of_the_text_head():
    model = tiny_open_set(naming="text_head")
    with pytest.raises(ValueError, match="expected classes as input_ids or class_embeds, got neither"):
        model(pixels(), labels=[SOMETHING, NOTHING])
    with pytest.raises(ValueError, match="class numbers from 0 to 0, got 1"):
        model(pixels(), labels=[SOMETHING, NOTHING], class_embeds=vectors(1))
    with pytest.raises(ValueError, match=r"naming by 'crop' or 'region', got \['a wall'\], 'text_head'"):
        model.set_background(tiny_tokenizer(), ["a wall"])
    with pytest.raises(ValueError, match="expected texts, for naming by 'crop' or 'region', got 'a wall'"):
        tiny_open_set().set_background(tiny_tokenizer(), "a wall")


# ------------------------------------------------------------------------------------------------ folders, pipelines


@pytest.mark.parametrize("naming", NAMINGS)
def test_on_the_towers_of_a_dual_encoder(naming, tmp_path):
    dual = save_tiny(tmp_path)
    model = FlorenceForZeroShotObjectDetection.from_pretrained_backbone(
        tmp_path, naming=naming, hidden_size=32, num_blocks=1
    )
    assert not model.training and model.config.vision_config.window_padding == "clamp"
    ours, theirs = model.state_dict(), dual.state_dict()
    expected = {f"backbone.{name}": each for name, each in theirs.items() if name.startswith("vision_model.")}
    expected |= {name: each for name, each in theirs.items() if name.startswith("text_")}
    norm = {name: expected.pop(f"backbone.vision_model.norm.{name}") for name in ("weight", "bias")}
    if naming != "text_head":
        expected |= {f"tower_norm.{name}": each for name, each in norm.items()}
        expected |= {name: theirs[name] for name in ("visual_projection.weight", "logit_scale")}
    assert_close({name: ours[name] for name in expected}, expected, rtol=0, atol=0)
    new = {name.split(".")[0] for name in ours.keys() - expected.keys()}
    head = {"pyramid", "dynamic_head", "class_predictor", "box_predictor", "centerness_predictor", "box_scales"}
    assert new == head | {"backbone", "class_bias" if naming == "text_head" else "background_embeds"}


def test_what_is_no_dual_encoder(tmp_path):
    dual = save_tiny(tmp_path / "dual")
    dual.vision_model.save_pretrained(tmp_path / "tower")
    (tmp_path / "tower" / "config.json").write_text((tmp_path / "dual" / "config.json").read_text("utf-8"), "utf-8")
    with pytest.raises(ValueError, match="expected the weights of a dual encoder in .*, missing are: logit_scale"):
        FlorenceForZeroShotObjectDetection.from_pretrained_backbone(tmp_path / "tower", hidden_size=32, num_blocks=1)


@torch.no_grad()
def test_names_are_embedded_as_for_the_dual_encoder():
    """Templates by the dual encoder's own function, on the open-set detector."""
    model, tokenizer = tiny_open_set(), tiny_tokenizer()
    dual = dual_encoder(model)
    templates = ("{}", "a photo of a {}")
    ours, theirs = (build_zero_shot_classifier(each, tokenizer, ["cat", "dog"], templates) for each in (model, dual))
    assert_close(ours, theirs)
    assert model(pixels(), class_embeds=ours).logits.shape == (2, 6, 2)


@pytest.fixture
def registered() -> None:
    """What importing the package does; here, so that these tests stand alone."""
    config = FlorenceZeroShotDetectionConfig
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModelForZeroShotObjectDetection.register(config, FlorenceForZeroShotObjectDetection, exist_ok=True)
    processors = {"torchvision": FlorenceDetectionImageProcessor}
    AutoImageProcessor.register(config, image_processor_classes=processors, exist_ok=True)
    AutoProcessor.register(config, FlorenceZeroShotDetectionProcessor, exist_ok=True)


def tiny_processor(**fields) -> FlorenceZeroShotDetectionProcessor:
    size = {"shortest_edge": 32, "longest_edge": 64}
    return FlorenceZeroShotDetectionProcessor(FlorenceDetectionImageProcessor(size=size, **fields), tiny_tokenizer())


def save_open_set(folder: Path, naming: str) -> FlorenceForZeroShotObjectDetection:
    model = tiny_open_set(naming=naming)
    with torch.no_grad():
        model.class_predictor.bias.add_(1.0)
        model.centerness_predictor.bias.add_(3.0)
    if naming != "text_head":
        model.set_background(tiny_tokenizer(), ["nothing", "a wall"])
    model.save_pretrained(folder)
    tiny_processor(pad_size={"height": 64, "width": 64}).save_pretrained(folder)
    return model


def scenes() -> list[Image.Image]:
    generator = np.random.default_rng(0)
    sizes = [(40, 61), (61, 40), (33, 33)]
    return [Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]


@pytest.mark.parametrize("naming", NAMINGS)
def test_saved_and_loaded(naming, tmp_path, registered):
    save_open_set(tmp_path, naming)
    model = FlorenceForZeroShotObjectDetection.from_pretrained(tmp_path)
    again = AutoModelForZeroShotObjectDetection.from_pretrained(tmp_path)
    assert type(again) is FlorenceForZeroShotObjectDetection and again.config == model.config
    assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)
    if naming == "crop":
        assert again.background_embeds.norm(dim=-1).tolist() == pytest.approx([1.0, 1.0])
        other = FlorenceForZeroShotObjectDetection.from_pretrained(tmp_path, naming="region")
        assert other.config.naming == "region"
        assert_close(other.state_dict(), model.state_dict(), rtol=0, atol=0)
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert type(processor) is FlorenceZeroShotDetectionProcessor
    assert type(processor.image_processor) is FlorenceDetectionImageProcessor
    assert type(processor.tokenizer) is FlorenceTokenizer


@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_stock_pipeline(naming, dtype, tmp_path, registered):
    """It gives one class at a time; alone and in batches of pictures of different sizes."""
    save_open_set(tmp_path, naming)
    detector = pipeline("zero-shot-object-detection", model=str(tmp_path), dtype=dtype)
    assert detector.model.dtype == dtype
    pictures = scenes()
    alone = [detector(picture, candidate_labels=CLASSES, threshold=0.02) for picture in pictures]
    processor, model = detector.image_processor, detector.model
    for picture, found in zip(pictures, alone, strict=True):
        expected = []
        for name in CLASSES:
            inputs = processor(picture, return_tensors="pt")
            with torch.no_grad():
                output = model(
                    inputs["pixel_values"].to(dtype),
                    inputs["pixel_mask"],
                    **detector.tokenizer(name, return_tensors="pt"),
                )
            (each,) = processor.post_process_object_detection(output, 0.02, [picture.size[::-1]])
            expected += zip(each["scores"].tolist(), [name] * 999, each["boxes"].int().tolist(), strict=False)
        assert len(found) == len(expected) > 3
        expected.sort(key=lambda row: row[0], reverse=True)
        for each, (score, name, box) in zip(found, expected, strict=True):
            assert each["score"] == pytest.approx(score) and each["label"] == name
            assert list(each["box"].values()) == box
    if dtype == torch.float32:
        rows = [{"image": picture, "candidate_labels": CLASSES} for picture in pictures]
        together = list(detector(rows, threshold=0.02, batch_size=2))
        for batch, found in zip(together, alone, strict=True):
            assert [each["score"] for each in batch] == pytest.approx([each["score"] for each in found], abs=1e-4)
            assert {each["label"] for each in batch} == {each["label"] for each in found}


CHILD = """
import sys

sys.modules["transformers_florence"] = None  # even where it is installed, importing it fails

from PIL import Image
from transformers import AutoProcessor, pipeline

folder = sys.argv[1]
detector = pipeline("zero-shot-object-detection", model=folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
for loaded in (detector.model, detector.tokenizer, detector.image_processor, processor):
    assert type(loaded).__module__.startswith("transformers_modules."), type(loaded)
picture = Image.effect_mandelbrot((48, 40), (-2, -1.5, 1, 1.5), 100).convert("RGB")
for row in detector(picture, candidate_labels=["a cat", "a dog"], threshold=0.02):
    print(f"{row['score']:.4f}", row["label"], *row["box"].values())
"""


def test_a_folder_with_code_needs_no_package(tmp_path, monkeypatch, registered):
    doors = {
        FlorenceZeroShotDetectionConfig: "AutoConfig",
        FlorenceForZeroShotObjectDetection: "AutoModelForZeroShotObjectDetection",
        FlorenceTokenizer: "AutoTokenizer",
        FlorenceDetectionImageProcessor: "AutoImageProcessor",
        FlorenceZeroShotDetectionProcessor: "AutoProcessor",
    }
    for ours, auto in doors.items():
        monkeypatch.setattr(ours, "_auto_class", None)
        ours.register_for_auto_class(auto)
    folder = tmp_path / "saved"
    save_open_set(folder, "crop")
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", CHILD, str(folder)]
    child = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert child.returncode == 0, child.stderr
    detector = pipeline("zero-shot-object-detection", model=str(folder))
    picture = Image.effect_mandelbrot((48, 40), (-2, -1.5, 1, 1.5), 100).convert("RGB")
    found = detector(picture, candidate_labels=["a cat", "a dog"], threshold=0.02)
    expected = [" ".join(map(str, (f"{row['score']:.4f}", row["label"], *row["box"].values()))) for row in found]
    assert child.stdout.splitlines() == expected and len(expected) > 2


@torch.no_grad()
def test_recorded_states():
    model = FlorenceForZeroShotObjectDetection._from_config(tiny_config(), attn_implementation="eager").eval()
    output = model(pixels(), class_embeds=vectors(3), output_hidden_states=True, output_attentions=True)
    assert [tuple(each.shape) for each in output.hidden_states] == [(2, 16, 16, 8), (2, 16, 16, 8), (2, 8, 8, 16)]
    assert_close(output.attentions[0].sum(-1), torch.ones_like(output.attentions[0][..., 0]))
    assert model(pixels(), class_embeds=vectors(3)).hidden_states is None
    logits, boxes, *_ = model(pixels(), class_embeds=vectors(3), return_dict=False)
    assert_close(logits, output.logits)
    assert_close(boxes, output.pred_boxes)
