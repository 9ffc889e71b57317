"""Augmentation of batches: nothing at strength 0, and geometry and colour as closed forms say."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from torch.testing import assert_close

from transformers_florence.data.augmentation import BatchAugmentation, _rotation_about_grey

OFF = {"scale": 0, "aspect": 0, "rotation": 0, "shift": 0, "shear": 0, "color": 0, "hue": 0}
OFF |= {"grayscale": 0, "invert": 0, "erase": 0}
LUMA = torch.tensor([0.299, 0.587, 0.114])


def only(size: int = 32, **amounts) -> BatchAugmentation:
    """Nothing but the given amounts."""
    return BatchAugmentation(size, **{**OFF, **amounts})


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(batch: int = 4, height: int = 32, width: int = 32) -> torch.Tensor:
    return torch.rand(batch, 3, height, width, generator=generator(7))


def draw_limit(monkeypatch, sign: int = 1) -> None:
    """Every amount is drawn at its limit, so that the outcome is known."""
    monkeypatch.setattr(
        BatchAugmentation, "_uniform", lambda self, batch, generator, limit: torch.full((batch,), float(sign * limit))
    )


def blob(side: int, x: float, y: float) -> torch.Tensor:
    """A small bright spot at (x, y) on black, in coordinates from -1 to 1: (1, 3, side, side)."""
    axis = (torch.arange(side) + 0.5) / side * 2 - 1
    spot = torch.exp(-((axis[None, :] - x) ** 2 + (axis[:, None] - y) ** 2) / (2 * 0.05**2))
    return spot.expand(1, 3, -1, -1)


def centre(picture: torch.Tensor) -> tuple[float, float]:
    """Centre of mass (x, y) of a picture (3, side, side), in coordinates from -1 to 1."""
    axis = (torch.arange(picture.shape[-1]) + 0.5) / picture.shape[-1] * 2 - 1
    mass = picture.mean(dim=0)
    return float((mass.sum(dim=0) * axis).sum() / mass.sum()), float((mass.sum(dim=1) * axis).sum() / mass.sum())


@pytest.mark.parametrize("batch", [1, 4])
def test_strength_zero_at_the_same_size_changes_nothing(batch):
    pixels = pictures(batch)
    assert_close(BatchAugmentation(32)(pixels, generator(), 0.0), pixels, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("height", "width", "size"), [(40, 40, 32), (32, 32, 48), (20, 50, 32)])
def test_strength_zero_at_another_size_is_bilinear_resampling(height, width, size):
    pixels = pictures(2, height, width)
    resampled = F.interpolate(pixels, size=(size, size), mode="bilinear", align_corners=False)
    assert_close(BatchAugmentation(size)(pixels, generator(), 0.0), resampled, atol=1e-5, rtol=0)


@pytest.mark.parametrize("strength", [0.3, 1.0])
@pytest.mark.parametrize(("batch", "height", "width"), [(1, 40, 40), (8, 32, 24)])
def test_full_augmentation_keeps_pictures_pictures(batch, height, width, strength):
    pixels = pictures(batch, height, width)
    before = pixels.clone()
    output = BatchAugmentation(32, grayscale=0.5, invert=0.5, erase=0.5)(pixels, generator(), strength)
    assert output.shape == (batch, 3, 32, 32) and output.dtype == torch.float32
    assert output.min() >= 0 and output.max() <= 1
    assert torch.equal(pixels, before), "the input was changed"
    assert output.std() > 0.02


def test_the_generator_alone_decides():
    augment, pixels = BatchAugmentation(32), pictures()
    first = augment(pixels, generator(3))
    torch.manual_seed(99)  # the global state has no part in it
    assert torch.equal(augment(pixels, generator(3)), first)
    assert not torch.equal(augment(pixels, generator(4)), first)
    one = generator(3)
    augment(pixels, one)
    assert not torch.equal(augment(pixels, one), first), "a second batch of one generator must differ"


@pytest.mark.parametrize(
    ("name", "amount"),
    [
        ("scale", 0.3),
        ("aspect", 0.3),
        ("rotation", 20.0),
        ("shift", 0.2),
        ("shear", 0.3),
        ("color", 0.4),
        ("hue", 30.0),
        ("erase", 1.0),
    ],
)
def test_every_picture_has_its_own_parameters(name, amount):
    same = pictures(1).expand(6, -1, -1, -1)
    output = only(**{name: amount})(same, generator())
    assert torch.cdist(output.flatten(1), output.flatten(1)).fill_diagonal_(1.0).min() > 1e-3


def test_amounts_spread_over_both_sides_of_nothing_up_to_their_limit():
    shifts = torch.tensor(
        [centre(picture) for picture in only(shift=0.2)(blob(32, 0, 0).expand(64, -1, -1, -1), generator())]
    )
    assert shifts.abs().max() <= 0.4 + 1e-3  # a fifth of the side, in coordinates that are 2 wide
    assert (shifts.amax(dim=0) > 0.3).all() and (shifts.amin(dim=0) < -0.3).all()


def test_a_quarter_turn(monkeypatch):
    draw_limit(monkeypatch)
    pixels = pictures(2)
    assert_close(only(rotation=90)(pixels, generator()), torch.rot90(pixels, 1, (2, 3)), atol=1e-4, rtol=0)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_shift_by_a_quarter_repeats_the_border(monkeypatch, sign):
    draw_limit(monkeypatch, sign)
    pixels = pictures(2)
    wanted = (torch.arange(32) + sign * 8).clamp(0, 31)
    assert_close(only(shift=0.25)(pixels, generator()), pixels[:, :, wanted][:, :, :, wanted], atol=1e-4, rtol=0)


def test_doubling_the_scale_halves_what_is_drawn(monkeypatch):
    draw_limit(monkeypatch)
    x, y = centre(only(64, scale=1.0)(blob(64, 0.5, -0.25), generator())[0])
    assert (x, y) == pytest.approx((0.25, -0.125), abs=0.01)


def test_the_aspect_ratio_changes_by_its_amount_and_the_area_does_not(monkeypatch):
    draw_limit(monkeypatch)
    x, y = centre(only(64, aspect=1.0)(blob(64, 0.4, 0.4), generator())[0])
    assert x * y == pytest.approx(0.16, rel=0.03)
    assert y / x == pytest.approx(2.0, rel=0.03)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("spot", [(0.3, -0.2), (-0.1, 0.4), (0.0, 0.0)])
def test_a_spot_moves_where_the_whole_map_says(monkeypatch, spot, sign):
    draw_limit(monkeypatch, sign)
    amounts = {"scale": 0.25, "aspect": 0.21, "rotation": 30.0, "shift": 0.1, "shear": 0.2}
    output = only(96, **amounts)(blob(96, *spot), generator())[0]

    angle = sign * math.radians(30)
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    sheared = np.array([[1, sign * 0.2], [0, 1]])
    sides = np.diag([1.25**sign * 1.1**sign, 1.25**sign / 1.1**sign])
    move = np.full(2, sign * 0.2)
    wanted = np.linalg.solve(turn @ sheared @ sides, np.array(spot) - move)  # where this place of the input is seen
    assert centre(output) == pytest.approx(tuple(wanted), abs=0.01)


@pytest.mark.parametrize("degrees", [0.0, 20.0, -75.0, 120.0, 180.0])
def test_hue_is_a_rotation_about_the_grey_axis(degrees):
    angle = math.radians(degrees)
    (turn,) = _rotation_about_grey(torch.tensor([angle]))
    assert_close(turn @ turn.T, torch.eye(3), atol=1e-6, rtol=0)
    assert torch.linalg.det(turn).item() == pytest.approx(1, abs=1e-6)
    assert_close(turn @ torch.ones(3), torch.ones(3), atol=1e-6, rtol=0)
    assert turn.trace().item() == pytest.approx(1 + 2 * math.cos(angle), abs=1e-6)
    axis = torch.ones(3, dtype=torch.float64) / math.sqrt(3)
    cross = torch.linalg.cross(axis.expand(3, 3), torch.eye(3, dtype=torch.float64)).T  # cross @ v = axis x v
    assert_close(turn.double(), torch.linalg.matrix_exp(angle * cross), atol=1e-6, rtol=0)


def test_a_third_of_a_turn_makes_red_green():
    (turn,) = _rotation_about_grey(torch.tensor([2 * math.pi / 3]))
    assert_close(turn @ torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 1.0, 0.0]), atol=1e-6, rtol=0)


def test_grey_keeps_its_hue():
    grey = torch.rand(3, 1, 8, 8, generator=generator()).expand(-1, 3, -1, -1)
    assert_close(only(8, hue=90.0)(grey, generator()), grey, atol=1e-5, rtol=0)


@pytest.mark.parametrize("sign", [1, -1])
def test_colours_change_as_one_after_the_other(monkeypatch, sign):
    draw_limit(monkeypatch, sign)
    picture = pictures(1, 6, 6)
    output = only(6, color=0.3, hue=25.0)(picture, generator())[0]

    amount = 1 + sign * 0.3
    (turn,) = _rotation_about_grey(torch.tensor([sign * math.radians(25.0)]))
    colors = []
    for row in range(6):
        for column in range(6):
            color = turn @ picture[0, :, row, column]
            grey = float(LUMA @ color)
            colors.append(amount * (grey + amount * (color - grey)))  # saturation, then brightness
    changed = torch.stack(colors)
    mean = changed.mean()
    changed = (mean + amount * (changed - mean)).clamp(0, 1)  # contrast
    assert_close(output.flatten(1).T, changed, atol=1e-5, rtol=0)


def test_greyscale_is_the_luma_that_pillow_computes():
    picture = pictures(1, 8, 8)
    output = only(8, grayscale=1.0)(picture, generator())[0]
    assert_close(output[0], output[1], atol=1e-6, rtol=0)
    assert_close(output[0], output[2], atol=1e-6, rtol=0)
    levels = (picture[0] * 255).round().byte().permute(1, 2, 0).numpy()
    grey = torch.from_numpy(np.array(Image.fromarray(levels).convert("L"))).float() / 255
    assert_close(output[0], grey, atol=1.01 / 255, rtol=0)


def test_inversion_is_the_negative():
    pixels = pictures()
    assert_close(only(invert=1.0)(pixels, generator()), 1 - pixels, atol=1e-5, rtol=0)


@pytest.mark.parametrize("strength", [0.25, 1.0])
def test_probabilities_grow_with_strength(strength):
    pixels = pictures(1, 2, 2).expand(4000, -1, -1, -1)
    output = only(2, invert=0.4)(pixels, generator(), strength)
    inverted = (output - pixels).abs().amax(dim=(1, 2, 3)) > 1e-3
    assert inverted.float().mean().item() == pytest.approx(0.4 * strength, abs=0.03)


def test_an_erased_part_is_one_rectangle_of_one_colour_and_not_too_large():
    side, pixels = 40, pictures(64, 40, 40)
    output = only(side, erase=1.0)(pixels, generator())
    areas = []
    for before, after in zip(pixels, output, strict=True):
        changed = (before - after).abs().amax(dim=0) > 1e-4
        rows, columns = changed.any(dim=1).nonzero()[:, 0], changed.any(dim=0).nonzero()[:, 0]
        areas.append(int(changed.sum()))
        if areas[-1]:
            hole = after[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            assert torch.equal(hole, hole[:, :1, :1].expand_as(hole)), "more than one colour in the hole"
            assert len(rows) <= 0.4 * side + 1 and len(columns) <= 0.4 * side + 1
    assert max(areas) <= (0.4 * side + 1) ** 2
    assert sum(area >= (0.1 * side - 1) ** 2 for area in areas) > 48  # fewer only where the border cuts a hole


@pytest.mark.parametrize(
    "pixels",
    [torch.zeros(3, 8, 8), torch.zeros(2, 1, 8, 8), torch.zeros(2, 3, 8, 8, dtype=torch.uint8)],
    ids=["rank", "channels", "dtype"],
)
def test_what_is_no_batch_of_pictures_is_refused(pixels):
    with pytest.raises(ValueError, match=r"expected floating-point pixels \(batch, 3, height, width\)"):
        BatchAugmentation(8)(pixels, generator())


@pytest.mark.parametrize("strength", [-0.1, 1.5, float("nan")])
def test_strength_lies_between_nothing_and_all(strength):
    with pytest.raises(ValueError, match="strength from 0 to 1"):
        BatchAugmentation(8)(pictures(1, 8, 8), generator(), strength)
