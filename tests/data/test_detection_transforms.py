"""Augmentation with boxes: what is drawn into a picture stays inside of its box whatever happens to the picture."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from torchvision import tv_tensors
from torchvision.ops import box_convert

from transformers_florence import FlorenceDetectionImageProcessor
from transformers_florence.data.detection import AnnotatedPicture
from transformers_florence.data.detection_transforms import (
    AUGMENTATIONS,
    CropToSize,
    collate_samples,
    draw_objects,
    make_mosaic,
    read_sample,
    training_transforms,
)

HEIGHT, WIDTH = 90, 140
BOXES = [(10, 20, 50, 60), (80, 30, 130, 85)]  # corners of a red and a green rectangle on black
COLORS = [(255, 0, 0), (0, 255, 0)]


def processor(**settings) -> FlorenceDetectionImageProcessor:
    return FlorenceDetectionImageProcessor(**{"size": {"shortest_edge": 90}, **settings})


@pytest.fixture
def picture(tmp_path: Path) -> AnnotatedPicture:
    image = Image.new("RGB", (WIDTH, HEIGHT))
    for box, color in zip(BOXES, COLORS, strict=True):
        image.paste(color, box)
    image.save(tmp_path / "a.png")
    boxes = torch.tensor(BOXES, dtype=torch.float64)
    return AnnotatedPicture(
        tmp_path / "a.png", 0, (HEIGHT, WIDTH), boxes, torch.tensor([0, 1]), torch.zeros(2, dtype=torch.bool)
    )


def extents(image: torch.Tensor) -> dict[int, torch.Tensor]:
    """Class -> corners of the pixels that have its colour, found by looking."""
    found = {}
    for label in range(len(COLORS)):
        other = 1 - label
        rows, columns = ((image[label] > 128) & (image[other] < 128)).nonzero().unbind(1)
        if len(rows):
            found[label] = torch.stack((columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)).float()
    return found


def check_boxes(sample: dict) -> None:
    """Each box is where its rectangle is seen, to the pixel that resizing blurs."""
    seen = extents(sample["image"].as_subclass(torch.Tensor).int())
    for label, box in zip(sample["labels"].tolist(), sample["boxes"].as_subclass(torch.Tensor), strict=True):
        assert_close(box, seen[label], atol=1.5, rtol=0)
    height, width = sample["image"].shape[1:]
    limit = torch.tensor([width, height, width, height])
    boxes = sample["boxes"].as_subclass(torch.Tensor)
    assert (boxes >= 0).all() and (boxes <= limit).all() and len(sample["crowd"]) == len(boxes)


@pytest.mark.parametrize("kind", AUGMENTATIONS)
@pytest.mark.parametrize("crop", [0.0, 1.0])
def test_boxes_follow_their_objects(kind: str, crop: float, picture: AnnotatedPicture):
    torch.manual_seed(0)
    transforms = training_transforms(kind, 64, 96, crop=crop)
    sizes, kept = set(), 0
    for _ in range(12):
        sample = transforms(read_sample(picture, processor()))
        # A rectangle of which a crop left a sliver is blurred away: only what can be seen is compared.
        boxes = sample["boxes"].as_subclass(torch.Tensor)
        large = ((boxes[:, 2:] - boxes[:, :2]) > 4).all(dim=1)
        check_boxes(sample | {name: sample[name][large] for name in ("boxes", "labels", "crowd")})
        sizes.add(tuple(sample["image"].shape[1:]))
        kept += len(boxes)
    assert kept >= 8
    assert max(max(size) for size in sizes) <= 96
    if crop == 0 and kind in ("none", "flip"):
        assert sizes == {(61, 96)}  # 64 pixels for the shorter side would be more than 96 for the longer
    else:
        assert len(sizes) > 3


def test_mirrored_half_of_the_time(picture: AnnotatedPicture):
    torch.manual_seed(0)
    transforms = training_transforms("flip", HEIGHT, WIDTH)
    lefts = [transforms(read_sample(picture, processor()))["boxes"][0, 0].item() for _ in range(60)]
    assert set(lefts) == {10.0, WIDTH - 50.0} and 18 <= lefts.count(10.0) <= 42


def test_colour_leaves_boxes_alone(picture: AnnotatedPicture):
    torch.manual_seed(0)
    sample = training_transforms("none", HEIGHT, WIDTH, color=1.0)(read_sample(picture, processor()))
    plain = read_sample(picture, processor())
    assert torch.equal(sample["boxes"], plain["boxes"]) and not torch.equal(sample["image"], plain["image"])


def test_the_same_seed_gives_the_same_picture(picture: AnnotatedPicture):
    transforms, samples = training_transforms("jitter", 64, 96, crop=0.5, color=0.5), []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        samples.append(transforms(read_sample(picture, processor())))
    assert torch.equal(samples[0]["image"], samples[1]["image"]) and torch.equal(
        samples[0]["boxes"], samples[1]["boxes"]
    )
    assert samples[0]["image"].shape != samples[2]["image"].shape


def test_objects_that_a_crop_leaves_out_are_gone(picture: AnnotatedPicture):
    torch.manual_seed(0)
    seen = set()
    for _ in range(40):
        sample = training_transforms("jitter", 16, 24)(read_sample(picture, processor()))
        seen.add(tuple(sample["labels"].tolist()))
    assert (0,) in seen and (1,) in seen  # each without the other


def test_crop_to_size_leaves_small_pictures_alone():
    image = tv_tensors.Image(torch.arange(3 * 5 * 7).reshape(3, 5, 7))
    assert torch.equal(CropToSize((9, 9))(image), image)
    torch.manual_seed(0)
    corners = {tuple(CropToSize((9, 4))(image)[0, 0].tolist()) for _ in range(40)}
    assert corners == {tuple(range(left, left + 4)) for left in range(4)}


def test_a_picture_without_objects(picture: AnnotatedPicture):
    none = torch.zeros(0, dtype=torch.long)
    bare = AnnotatedPicture(picture.file, 0, picture.size, torch.zeros(0, 4), none, none.bool())
    torch.manual_seed(0)
    for kind in AUGMENTATIONS:
        sample = training_transforms(kind, 64, 96, crop=1.0)(read_sample(bare, processor()))
        assert sample["boxes"].shape == (0, 4) and sample["image"].numel()
    label = collate_samples([sample], processor())["labels"][0]
    assert label["boxes"].shape == (0, 4) and label["class_labels"].shape == (0,)


def test_a_batch_is_what_the_processor_makes_of_the_annotations(picture: AnnotatedPicture, tmp_path: Path):
    """Two sizes, padded together: pixels, masks and labels as by the other way, from COCO's annotations."""
    small = AnnotatedPicture(
        tmp_path / "b.png",
        1,
        (50, 40),
        torch.tensor([[5.0, 6.0, 25.0, 46.0]]).double(),
        torch.tensor([1]),
        torch.zeros(1) > 0,
    )
    Image.new("RGB", (40, 50), "blue").save(small.file)
    ours = processor(do_resize=False)
    batch = collate_samples([read_sample(each, ours) for each in (picture, small)], ours)
    wanted = ours(
        [str(picture.file), str(small.file)], annotations=[picture.coco(), small.coco()], return_tensors="pt"
    )
    assert torch.equal(batch["pixel_values"], wanted["pixel_values"])
    assert torch.equal(batch["pixel_mask"], wanted["pixel_mask"]) and batch["pixel_values"].shape[2:] == (96, 160)
    for label, other in zip(batch["labels"], wanted["labels"], strict=True):
        assert torch.equal(label["class_labels"], other["class_labels"])
        assert_close(label["boxes"], other["boxes"], atol=1e-6, rtol=0)
    back = box_convert(batch["labels"][0]["boxes"], "cxcywh", "xyxy") * torch.tensor([WIDTH, HEIGHT, WIDTH, HEIGHT])
    assert_close(back, torch.tensor(BOXES).float(), atol=1e-4, rtol=0)


def test_a_picture_that_changed_is_refused(picture: AnnotatedPicture):
    Image.new("RGB", (30, 20)).save(picture.file)
    with pytest.raises(ValueError, match=r"a.png: expected \(height, width\) \(90, 140\), got \(20, 30\)"):
        read_sample(picture, processor())


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        (("mosaic", 64, 96), {}, "augmentation: expected one of none, flip, multiscale, jitter, got 'mosaic'"),
        (("flip", 64, 32), {}, "got 64 and 32"),
        (("flip", 0, 32), {}, "got 0 and 32"),
        (("flip", 32, 32), {"crop": 1.5}, "crop: expected a part from 0 to 1, got 1.5"),
        (("flip", 32, 32), {"color": -1}, "color: expected a part from 0 to 1, got -1"),
    ],
)
def test_what_is_refused(arguments: tuple, settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        training_transforms(*arguments, **settings)


# Pictures of pictures


def test_boxes_are_drawn_where_they_are():
    image = torch.zeros(3, 100, 120, dtype=torch.uint8)
    drawn = draw_objects(image, torch.tensor([[20.0, 40.0, 70.0, 90.0]]), torch.tensor([1]), ["cat", "dog"], side=240)
    assert drawn.shape == (3, 200, 240) and not image.any()
    coloured = drawn.any(dim=0)
    assert coloured[80:180, 40].all() and coloured[180, 40:140].all()  # left and lower edge
    assert not coloured[190:].any() and not coloured[:, 150:].any() and not coloured[120:175, 46:134].any()
    bare = draw_objects(image, torch.zeros(0, 4), torch.zeros(0, dtype=torch.long), ["cat"], side=100)
    assert torch.equal(bare, image)


def test_a_mosaic_has_a_tile_for_each_picture():
    pictures = [torch.full((3, 10 * n, 20), 10 * n, dtype=torch.uint8) for n in (1, 2, 4)]
    mosaic = make_mosaic(pictures, columns=2, side=40)
    assert mosaic.shape == (3, 2 * 42 + 2, 2 * 42 + 2)
    assert mosaic[0, 2 + 10, 2 + 20] == 10 and mosaic[0, 2 + 10, 44 + 20] == 20 and mosaic[0, 44 + 20, 2 + 10] == 40
    assert mosaic[0, 44 + 20, 2 + 30] == 255  # beside a tall picture
    with pytest.raises(ValueError, match="at least one picture"):
        make_mosaic([])
