"""Dynamic Head against its definition, tap by tap, and against finite differences."""

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck
from torch.nn import functional as F
from torch.testing import assert_close
from torchvision.ops import deform_conv2d

from tests.oracles import randomize
from tests.oracles_detection import DyHeadBlock, deformable_convolution
from transformers_florence.configuration_florence_detection import FlorenceDetectionConfig
from transformers_florence.dynamic_head import (
    DynamicHead,
    DynamicHeadBlock,
    ModulatedDeformConv,
    ScaleAwareAttention,
    SpatialAwareAttention,
    TaskAwareAttention,
    read_offsets,
)

CHANNELS = 32
LAYOUTS = pytest.mark.parametrize("layout", ["crop", "official"])
PREFIXES = {  # a block of ours, and its authors'
    "spatial_attention.coarser.conv.": "DyConv.0.conv.",
    "spatial_attention.same.conv.": "DyConv.1.conv.",
    "spatial_attention.finer.conv.": "DyConv.2.conv.",
    "spatial_attention.coarser.norm.": "DyConv.0.bn.",
    "spatial_attention.same.norm.": "DyConv.1.bn.",
    "spatial_attention.finer.norm.": "DyConv.2.bn.",
    "spatial_attention.offset.": "offset.",
    "scale_attention.projection.": "AttnConv.1.",
    "task_attention.fc1.": "relu.fc.0.",
    "task_attention.fc2.": "relu.fc.2.",
}


def config(**fields) -> FlorenceDetectionConfig:
    return FlorenceDetectionConfig(**{"hidden_size": CHANNELS, "num_blocks": 1, **fields})


def maps_of(*grids: tuple[int, int], batch: int = 2) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(batch, CHANNELS, *grid, dtype=torch.float64) for grid in grids)


def definition_of(block: DynamicHeadBlock) -> DyHeadBlock:
    peer = DyHeadBlock(CHANNELS).double()
    tensors = {}
    for name, tensor in block.state_dict().items():
        prefix = next(prefix for prefix in PREFIXES if name.startswith(prefix))
        tensors[PREFIXES[prefix] + name.removeprefix(prefix)] = tensor
    peer.load_state_dict(tensors)
    return peer


@torch.no_grad()
def test_undeformed_it_is_a_convolution():
    for stride in (1, 2):
        conv = ModulatedDeformConv(config(), stride=stride).double()
        (hidden_states,) = maps_of((7, 5))
        expected = F.conv2d(hidden_states, conv.weight, conv.bias, stride, padding=1)
        grid = expected.shape[2:]
        offsets, mask = torch.zeros(2, 18, *grid), torch.ones(2, 9, *grid)
        assert_close(conv(hidden_states, offsets, mask), expected)
        # All taps one location down: the map moved up by one.
        offsets[:, 0::2] = stride
        moved = F.conv2d(F.pad(hidden_states, (1, 1, 1, 1 + stride))[:, :, stride:], conv.weight, conv.bias, stride)
        assert_close(conv(hidden_states, offsets, mask)[:, :, : grid[0]], moved[:, :, : grid[0]])


@LAYOUTS
@torch.no_grad()
def test_offsets_of_a_larger_map(layout):
    conv = ModulatedDeformConv(config()).double()
    (hidden_states,) = maps_of((3, 4), batch=1)
    offsets, mask = torch.randn(1, 18, 5, 7, dtype=torch.float64), torch.rand(1, 9, 5, 7, dtype=torch.float64)
    ours = conv(hidden_states, read_offsets(offsets, (3, 4), layout), read_offsets(mask, (3, 4), layout))
    theirs = deformable_convolution(
        hidden_states[0], offsets[0], mask[0], conv.weight, conv.bias, 1, layout == "official"
    )
    assert_close(ours[0], theirs)
    assert read_offsets(offsets, (5, 7), layout) is offsets


@LAYOUTS
@pytest.mark.parametrize("grids", [[(4, 6), (2, 3)], [(5, 3), (3, 2), (2, 1), (1, 1)], [(3, 3)], [(1, 1), (1, 1)]])
@torch.no_grad()
def test_a_block_is_its_definition(layout, grids):
    """Even and odd sides, a single level, a single location."""
    block = randomize(DynamicHeadBlock(config(offset_layout=layout)).double())
    maps = maps_of(*grids)
    expected = definition_of(block)(list(maps), layout == "official")
    for ours, theirs in zip(block(*maps), expected, strict=True):
        assert_close(ours, theirs)


@torch.no_grad()
def test_the_layouts_differ_where_a_coarser_level_is_smaller():
    maps = maps_of((4, 6), (2, 3))
    blocks = [randomize(DynamicHeadBlock(config(offset_layout=layout)).double()) for layout in ("crop", "official")]
    (crop, crop_last), (official, official_last) = (block(*maps) for block in blocks)
    assert (crop - official).abs().max() > 0.01
    assert_close(crop_last, official_last)


@torch.no_grad()
def test_blocks_follow_each_other():
    head = randomize(DynamicHead(config(num_blocks=2)).double())
    maps = maps_of((5, 6), (3, 3))
    expected = list(maps)
    for block in head.blocks:
        expected = definition_of(block)(expected, False)
    assert_close(head(maps), tuple(expected))
    assert DynamicHead(config(num_blocks=0))(maps) is maps


@torch.no_grad()
def test_no_level_is_ever_switched_off():
    """The weights of scales lie between a half and one, whatever the maps hold."""
    attention = randomize(ScaleAwareAttention(config()).double())
    branch = torch.ones(1, CHANNELS, 2, 2, dtype=torch.float64)
    for size in (-1e4, -1.0, 0.0, 1.0, 1e4):
        ratio = attention([size * branch, torch.zeros_like(branch)]) / (size * branch) if size else torch.ones(1)
        assert ((ratio >= 0.25) & (ratio <= 0.5)).all() or size == 0


@torch.no_grad()
def test_before_training_the_rectifier_is_nearly_a_rectifier():
    attention = TaskAwareAttention(config())
    for layer in (attention.fc1, attention.fc2):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    (hidden_states,) = maps_of((3, 3))
    assert_close(attention(hidden_states.float()), hidden_states.float().relu())


BRICKS = {  # the brick, how it is called with maps, and their sizes
    "scale": (ScaleAwareAttention, lambda *maps: (list(maps),), [(3, 2), (3, 2), (3, 2)]),
    "task": (TaskAwareAttention, lambda *maps: maps, [(3, 2)]),
    "space": (SpatialAwareAttention, lambda *maps: (*maps, None), [(2, 2), (4, 3)]),
}


@pytest.mark.parametrize("name", BRICKS)
def test_gradients_by_finite_differences(name):
    """Of the maps, and of the weights along one random direction."""
    make, arguments, grids = BRICKS[name]
    brick = randomize(make(config()).double())
    weights = dict(brick.named_parameters())
    direction = {key: torch.randn_like(each) for key, each in weights.items()}
    maps = [each[:1].requires_grad_() for each in maps_of(*grids)]
    step = torch.zeros((), dtype=torch.float64, requires_grad=True)

    def along(step: torch.Tensor, *maps: torch.Tensor) -> tuple[torch.Tensor, ...]:
        moved = {key: each.detach() + step * direction[key] for key, each in weights.items()}
        outputs = torch.func.functional_call(brick, moved, arguments(*maps))
        return tuple(outputs) if isinstance(outputs, list) else (outputs,)

    assert gradcheck(along, (step, *maps), fast_mode=True)


@LAYOUTS
def test_gradients_of_a_block_by_finite_differences(layout):
    block = randomize(DynamicHeadBlock(config(offset_layout=layout)).double())
    inputs = [each.requires_grad_() for each in maps_of((4, 3), (2, 2), (1, 1), batch=1)]
    assert gradcheck(block, inputs, fast_mode=True)


def test_every_weight_has_a_gradient():
    head = randomize(DynamicHead(config(num_blocks=2)).double())
    sum(each.sin().sum() for each in head(maps_of((4, 4), (2, 2), (1, 1)))).backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad.abs().max() > 0, name


@torch.no_grad()
def test_half_precision_deforms_in_single():
    """Under autocast the convolution gives float32's own numbers; as a whole, half precision stays near."""
    head = randomize(DynamicHead(config())).float()
    maps = tuple(each.float() for each in maps_of((6, 7), (3, 4)))
    conv = head.blocks[0].spatial_attention.same.conv
    offsets, mask = torch.randn(2, 18, 6, 7), torch.rand(2, 9, 6, 7)
    expected = conv(maps[0], offsets, mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(conv(maps[0], offsets, mask), expected, rtol=0, atol=0)
        halves = head(maps)
    whole = head(maps)
    low = head.bfloat16()(tuple(each.bfloat16() for each in maps))
    assert low[0].dtype == torch.bfloat16
    for outputs in (halves, low):
        for ours, theirs in zip(outputs, whole, strict=True):
            assert (ours.float() - theirs).abs().mean() < 0.03 * theirs.abs().mean()


def test_what_is_no_pyramid_is_refused():
    head = DynamicHead(config())
    with pytest.raises(ValueError, match="expected at least one level, got none"):
        head(())
    with pytest.raises(ValueError, match=r"expected a map of \(3, 2\) at level 1, got \(2, 2\)"):
        head(tuple(each.float() for each in maps_of((5, 4), (2, 2))))


@pytest.mark.parametrize(("size", "stride"), [((9, 7), 1), ((9, 8), 2), ((1, 1), 1), ((1, 5), 2)])
def test_on_the_processor_it_is_torchvisions_convolution(size, stride):
    """Offsets far beyond the map too; torchvision's kernel is what other devices and exporters use."""
    conv = randomize(ModulatedDeformConv(config(), stride=stride)).double()
    grid = [(side - 1) // stride + 1 for side in size]
    hidden_states = torch.randn(2, CHANNELS, *size, dtype=torch.float64, requires_grad=True)
    offsets = (4 * torch.randn(2, 18, *grid, dtype=torch.float64)).requires_grad_()
    mask = torch.rand(2, 9, *grid, dtype=torch.float64, requires_grad=True)
    weights = (hidden_states, offsets, mask, conv.weight, conv.bias)
    output = conv(hidden_states, offsets, mask)
    expected = deform_conv2d(hidden_states, offsets, conv.weight, conv.bias, stride, 1, mask=mask)
    assert_close(output, expected, rtol=1e-9, atol=1e-9)
    ours, theirs = (torch.autograd.grad(each.square().sum(), weights) for each in (output, expected))
    for one, other in zip(ours, theirs, strict=True):
        assert_close(one, other, rtol=1e-7, atol=1e-7)
