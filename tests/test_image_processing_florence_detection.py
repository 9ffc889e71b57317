"""The detector's image processor against DETR's, and boxes there and back."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from torchvision.ops import box_convert
from transformers import DetrImageProcessor
from transformers.utils import ModelOutput

from transformers_florence.image_processing_florence_detection import FlorenceDetectionImageProcessor

SIZES = [(48, 64), (63, 41), (57, 57), (200, 31)]  # height, width
SMALL = {"shortest_edge": 40, "longest_edge": 70}


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def annotated(height: int, width: int, image_id: int = 3) -> dict:
    """Whole, partly outside, outside, empty, and a crowd."""
    boxes = [
        [1.5, 2.25, width / 2, height / 3],
        [width - 4, height - 5, 10, 10],
        [width + 1, 0, 4, 4],
        [3, 3, 0, 5],
        [0, 0, width, height],
    ]
    rows = [
        {"bbox": box, "category_id": number, "area": 10.0 * number + 7, "iscrowd": int(number == 4)}
        for number, box in enumerate(boxes)
    ]
    return {"image_id": image_id, "annotations": rows}


@pytest.mark.parametrize("size", [SMALL, {"height": 50, "width": 37}, {"max_height": 45, "max_width": 60}])
@pytest.mark.parametrize("extent", SIZES)
def test_one_picture_is_what_detr_makes_of_it(size, extent):
    ours = FlorenceDetectionImageProcessor(size=size, size_divisor=1)
    theirs = DetrImageProcessor(size=size)
    arguments = (picture(*extent), annotated(*extent))
    result, expected = (each(*arguments, return_tensors="pt") for each in (ours, theirs))
    for name in ("pixel_values", "pixel_mask"):
        assert_close(result[name], expected[name], rtol=0, atol=1e-6)
    (label,), (peer,) = result["labels"], expected["labels"]
    assert set(label) == set(peer)
    for name in label:
        assert_close(label[name], peer[name], rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
    assert label["class_labels"].tolist() == [0, 1]


def test_a_batch_is_padded_at_the_right_and_below():
    processor = FlorenceDetectionImageProcessor(size=SMALL)
    pictures = [picture(*size) for size in SIZES]
    batch = processor(pictures, [annotated(*size) for size in SIZES], return_tensors="pt")
    assert batch["pixel_values"].shape == (4, 3, 96, 64)  # multiples of 32 with room for 70 x 10 and 40 x 53
    assert batch["pixel_values"].dtype == torch.float32 and batch["pixel_mask"].dtype == torch.int64
    for number, (each, size) in enumerate(zip(pictures, SIZES, strict=True)):
        alone = processor(each, annotated(*size), return_tensors="pt", size_divisor=1)
        height, width = alone["pixel_values"].shape[2:]
        assert_close(batch["pixel_values"][number, :, :height, :width], alone["pixel_values"][0])
        assert_close(batch["pixel_values"][number].abs().sum(), alone["pixel_values"].abs().sum())
        assert batch["pixel_mask"][number, :height, :width].all()
        assert batch["pixel_mask"][number].sum() == height * width
        assert batch["labels"][number]["size"].tolist() == [height, width]
        for name, value in alone["labels"][0].items():  # relative to the picture, not to its padding
            assert_close(batch["labels"][number][name], value)


def test_padding_to_a_given_size_or_none():
    processor = FlorenceDetectionImageProcessor(size=SMALL, pad_size={"height": 70, "width": 71})
    assert processor([picture(48, 64)], return_tensors="pt")["pixel_mask"].shape == (1, 70, 71)
    with pytest.raises(ValueError, match="pad_size: expected room for pictures of"):
        processor([picture(48, 64)], pad_size={"height": 39, "width": 71})
    plain = FlorenceDetectionImageProcessor(size=SMALL, do_pad=False)
    result = plain([picture(48, 64)] * 2, return_tensors="pt")
    assert set(result) == {"pixel_values"} and result["pixel_values"].shape == (2, 3, 40, 53)
    with pytest.raises(ValueError, match=r"expected pictures of one size as do_pad is off, got .*\(40, 53\)"):
        plain([picture(48, 64), picture(64, 48)])


def test_what_coco_leaves_out():
    processor = FlorenceDetectionImageProcessor(do_resize=False, size_divisor=1)
    target = {"image_id": np.int64(5), "annotations": [{"bbox": (2, 4, 10, 20), "category_id": 3}]}
    (label,) = processor(picture(40, 30), target, return_tensors="pt")["labels"]
    assert label["area"].tolist() == [200.0] and label["iscrowd"].tolist() == [0] and label["image_id"].tolist() == [5]
    assert_close(label["boxes"], torch.tensor([[7 / 30, 14 / 40, 10 / 30, 20 / 40]]))
    (empty,) = processor(picture(40, 30), {"image_id": 1, "annotations": []}, return_tensors="pt")["labels"]
    assert empty["boxes"].shape == (0, 4) and empty["class_labels"].dtype == torch.int64


def perfect(labels: list[dict[str, torch.Tensor]], classes: int = 5) -> ModelOutput:
    """The output of a model that knows its labels: one box an object, as many for each picture."""
    count = max(len(label["boxes"]) for label in labels)
    logits, boxes = torch.full((len(labels), count, classes), -20.0), torch.zeros(len(labels), count, 4)
    for number, label in enumerate(labels):
        for place, (box, category) in enumerate(zip(label["boxes"], label["class_labels"], strict=True)):
            logits[number, place, category], boxes[number, place] = 3.0 - place, box
    return ModelOutput(logits=logits, pred_boxes=boxes)


def test_boxes_come_back_to_the_pixel():
    """Odd and oblong pictures, resized and padded together."""
    processor = FlorenceDetectionImageProcessor(size=SMALL)
    targets = [annotated(*size) for size in SIZES]
    batch = processor([picture(*size) for size in SIZES], targets, return_tensors="pt")
    sizes = torch.stack([label["orig_size"] for label in batch["labels"]])
    assert sizes.tolist() == [list(size) for size in SIZES]
    for form in (sizes, SIZES):
        for (height, width), target, found in zip(
            SIZES,
            targets,
            processor.post_process_object_detection(perfect(batch["labels"]), 0.5, form),
            strict=True,
        ):
            expected = box_convert(torch.tensor([item["bbox"] for item in target["annotations"][:2]]), "xywh", "xyxy")
            expected = torch.minimum(expected, torch.tensor([width, height] * 2))
            assert_close(found["boxes"], expected, rtol=0, atol=1e-3)
            assert found["labels"].tolist() == [0, 1]
            assert_close(found["scores"], torch.tensor([3.0, 2.0]).sigmoid())
    relative = processor.post_process_object_detection(perfect(batch["labels"]))[0]["boxes"]
    assert_close(relative, box_convert(batch["labels"][0]["boxes"], "cxcywh", "xyxy"))


def test_settings_of_post_processing():
    """Two boxes that overlap by a third, in two classes; one in the padding, and one that reaches into it."""
    corners = torch.tensor([[0.0, 0.0, 0.2, 0.3], [0.1, 0.0, 0.3, 0.3], [1.2, 0.2, 1.4, 0.6], [0.9, 0.2, 1.4, 0.6]])
    probabilities = torch.tensor([[0.9, 0.6], [0.8, 0.1], [0.95, 0.0], [0.5, 0.3]])
    output = ModelOutput(
        logits=probabilities.logit(eps=1e-6)[None], pred_boxes=box_convert(corners, "xyxy", "cxcywh")[None]
    )
    process = FlorenceDetectionImageProcessor().post_process_object_detection

    def scores(**settings) -> list[float]:
        (found,) = process(output, target_sizes=[(100, 100)], **settings)
        return [round(score, 2) for score in found["scores"].tolist()]

    assert scores(threshold=0.2) == [0.9, 0.8, 0.6, 0.5, 0.3]
    assert scores(threshold=0.2, nms_threshold=0.3) == [0.9, 0.6, 0.3]
    assert scores(threshold=0.55) == [0.9, 0.8, 0.6]
    assert scores(threshold=0.2, top_k=3) == [0.9, 0.8]  # the best of all lies outside of the picture
    (found,) = process(output, 0.45, [(100, 200)])
    assert found["boxes"][-1].tolist() == pytest.approx([180.0, 20.0, 200.0, 60.0], abs=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threshold": 1.5}, "threshold: expected a number from 0 to 1, got 1.5"),
        ({"nms_threshold": -0.1}, "nms_threshold: expected a number from 0 to 1, got -0.1"),
        ({"top_k": 0}, "top_k: expected a positive integer, got 0"),
        ({"target_sizes": [(3, 3)]}, "expected the target_sizes of 2 pictures, got 1"),
    ],
)
def test_wrong_settings_of_post_processing(arguments, message):
    output = ModelOutput(logits=torch.zeros(2, 1, 1), pred_boxes=torch.ones(2, 1, 4))
    with pytest.raises(ValueError, match=message):
        FlorenceDetectionImageProcessor().post_process_object_detection(output, **arguments)


ROW = {"bbox": [1, 1, 2, 2], "category_id": 0}


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ([], "expected the annotations of 1 pictures, got 0"),
        (7, "expected the annotations of 1 pictures, got int"),
        ([7], "annotations of picture 0: expected a dictionary with 'image_id' and 'annotations', got int"),
        ({"boxes": []}, r"'image_id' and 'annotations', got \['boxes'\]"),
        ({"image_id": 1, "annotations": [{"bbox": [1, 2, 3, 4]}]}, "expected annotations as COCO's.*category_id"),
        ({"image_id": 1, "annotations": [ROW | {"bbox": [1, 2, 3]}]}, "expected annotations as COCO's"),
        ({"image_id": 1, "annotations": [ROW | {"bbox": ["a", 2, 3, 4]}]}, "expected annotations as COCO's"),
        ({"image_id": 1, "annotations": [ROW | {"bbox": [1, 2, float("nan"), 4]}]}, "expected finite boxes"),
        ({"image_id": 1, "annotations": [ROW | {"category_id": -1}]}, "class numbers from 0 on"),
        ({"image_id": 1, "annotations": ["x"]}, "expected annotations as COCO's"),
        ({"image_id": None, "annotations": []}, "whole numbers as ids, got something else.*NoneType"),
        (
            {"image_id": 1, "annotations": [ROW | {"category_id": 1.5}]},
            "whole numbers as ids, got something else.*float",
        ),
    ],
)
def test_wrong_annotations(target, message):
    with pytest.raises(ValueError, match=message):
        FlorenceDetectionImageProcessor(size=SMALL)(picture(20, 20), target)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": {"longest_edge": 5}}, "size: expected positive integers under"),
        ({"size": {"shortest_edge": 0, "longest_edge": 5}}, "size: expected positive integers"),
        ({"pad_size": {"shortest_edge": 5}}, "pad_size: expected positive integers"),
        ({"size_divisor": 0}, "size_divisor: expected a positive integer, got 0"),
        ({"do_center_crop": True}, "do_center_crop: expected False"),
        ({"image_std": 0.0}, "image_std: expected positive numbers"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        FlorenceDetectionImageProcessor(**settings)
    with pytest.raises(ValueError, match=message):
        FlorenceDetectionImageProcessor()(picture(20, 20), **settings)


def test_the_door_is_that_of_the_other_processors():
    """Transparency on the matte, limits, refusals by name."""
    processor = FlorenceDetectionImageProcessor(do_resize=False, do_normalize=False, size_divisor=1)
    clear = Image.new("RGBA", (5, 4), (0, 0, 0, 0))
    assert processor(clear, return_tensors="pt")["pixel_values"].unique().tolist() == [1.0]
    with pytest.raises(ValueError, match="picture 1: expected at most 10 pixels"):
        processor([picture(2, 2), picture(9, 9)], max_pixels=10)


def test_saved_and_loaded(tmp_path):
    processor = FlorenceDetectionImageProcessor(size=SMALL, size_divisor=16, pad_size={"height": 80, "width": 96})
    processor.save_pretrained(tmp_path)
    loaded = FlorenceDetectionImageProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == processor.to_dict()
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text("utf-8"))
    assert (saved["size"], saved["size_divisor"]) == (SMALL, 16)
    each = (each(picture(30, 50), return_tensors="pt")["pixel_values"] for each in (processor, loaded))
    assert_close(*each, rtol=0, atol=0)
