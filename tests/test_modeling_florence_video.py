"""The video tower against torchvision's and against the image tower it is inflated from; its classifier's losses."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from torchvision.models.video.swin_transformer import ShiftedWindowAttention3d, SwinTransformer3d
from transformers import AutoConfig, AutoModel, AutoModelForVideoClassification

from tests.oracles import fuse_qkv, randomize, rename
from tests.tiny_florence import save_tiny
from transformers_florence import layers, video_layers
from transformers_florence.configuration_florence import FlorenceVisionConfig
from transformers_florence.configuration_florence_video import FlorenceVideoConfig
from transformers_florence.layers import FeedForward
from transformers_florence.loading import bundled_checkpoint
from transformers_florence.modeling_florence import FlorenceForImageClassification
from transformers_florence.modeling_florence_video import (
    FlorenceForVideoClassification,
    FlorenceVideoModel,
    inflate_from_image,
)
from transformers_florence.modeling_florence_vision import FlorenceVisionModel

TOLERANCES = pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-9)])
BOTH_PADDINGS = pytest.mark.parametrize("padding", ["clamp", "pad"])
BOTH_EMBEDS = pytest.mark.parametrize("embed_type", ["conv", "patch"])
BOTH_MODES = pytest.mark.parametrize("mode", ["windows", "divided"])
VIDEO_SWIN = {"embed_type": "patch", "window_padding": "clamp_axes", "temporal_padding": "zeros"}
STAGE, LAYER = r"encoder\.stages\.(\d+)\.", r"encoder\.stages\.(\d+)\.layers\.(\d+)\."


def video_config(**fields: Any) -> FlorenceVideoConfig:
    """Two stages of Video CoSwin with a shifted layer in each."""
    shape = dict(image_size=32, embed_dim=8, depths=[2, 2], num_heads=[2, 2], window_size=4, drop_path_rate=0.0)
    return FlorenceVideoConfig(**{**shape, "temporal_window_size": 2, **fields})


def image_tower(**fields: Any) -> FlorenceVisionModel:
    shape = dict(image_size=32, embed_dim=8, depths=[2, 2], num_heads=[2, 2], window_size=4, drop_path_rate=0.0)
    return randomize(FlorenceVisionModel(FlorenceVisionConfig(**{**shape, **fields}))).double()


def tower(config: FlorenceVideoConfig, dtype: torch.dtype = torch.float32) -> FlorenceVideoModel:
    return randomize(FlorenceVideoModel(config)).to(dtype)


def torchvision_swin3d(model: FlorenceVideoModel) -> SwinTransformer3d:
    """torchvision's Video Swin with the model's weights and each stage's windows; it returns the pooled output."""
    config = model.config
    patch, windows = [config.temporal_stride, 4, 4], [list(window) for window in config.windows]
    peer = SwinTransformer3d(patch, config.embed_dim, config.depths, config.num_heads, windows[0], num_classes=1)
    peer.patch_embed.norm, peer.head = nn.LayerNorm(config.embed_dim), nn.Identity()
    for stage, (dim, window) in enumerate(zip(config.embed_dims, windows, strict=True)):
        for depth, block in enumerate(peer.features[2 * stage]):
            shift = [side // 2 if depth % 2 else 0 for side in window]
            block.attn = ShiftedWindowAttention3d(dim, window, shift, config.num_heads[stage])
    table = [
        (r"embeddings\.projection\.", "patch_embed.proj."),
        (r"embeddings\.norm\.", "patch_embed.norm."),
        (STAGE + r"embed\.", lambda match: f"features.{2 * int(match[1]) - 1}."),
        (LAYER + r"mlp\.fc1\.", lambda match: f"features.{2 * int(match[1])}.{match[2]}.mlp.0."),
        (LAYER + r"mlp\.fc2\.", lambda match: f"features.{2 * int(match[1])}.{match[2]}.mlp.3."),
        (LAYER + r"attention\.", lambda match: f"features.{2 * int(match[1])}.{match[2]}.attn."),
        (LAYER, lambda match: f"features.{2 * int(match[1])}.{match[2]}."),
        (r"norm\.", "norm."),
    ]
    tensors = fuse_qkv({rename(key, table): value for key, value in model.state_dict().items()})
    buffers = {key: value for key, value in peer.state_dict().items() if key.endswith("relative_position_index")}
    peer.load_state_dict(tensors | buffers)
    return peer.to(model.dtype).eval()


# -------------------------------------------------------------------------------------------------------- equality


@TOLERANCES
@pytest.mark.parametrize(
    "frames, size, windows, bias",
    [
        (8, (64, 64), 4, "offsets"),  # maps of 16 and 8: nothing clamped but no shift along time in windows of 4
        (11, (67, 83), 4, "offsets"),  # padding on every axis, of pixels and of windows
        (5, (64, 96), [2, 3], "offsets"),  # windows that grow from stage to stage
        (4, (40, 24), 4, "slice"),  # maps of 10 x 6 and 5 x 3: one side alone is clamped
        (1, (9, 30), 4, "slice"),  # 3 x 8 and 2 x 4
        (3, (1, 3), 4, "slice"),  # one token
    ],
)
@torch.no_grad()
def test_the_tower_is_torchvisions_swin3d(frames, size, windows, bias, dtype, tolerance):
    config = video_config(**VIDEO_SWIN, temporal_window_size=windows, clamped_bias=bias)
    model = tower(config, dtype)
    clips = torch.randn(2, frames, 3, *size, dtype=dtype)
    expected = torchvision_swin3d(model)(clips.transpose(1, 2))
    assert expected.std() > 0.1
    assert_close(model(clips).pooler_output, expected, rtol=0, atol=tolerance)


@torch.no_grad()
def test_a_clamped_window_reads_the_middle_of_the_table():
    """On maps of 4 x 4, then 2 x 2, of 2 tokens of time: as a tower made for these windows, with these tables."""
    model = tower(video_config(**VIDEO_SWIN, temporal_window_size=4), torch.float64)
    small = FlorenceVideoModel(video_config(**VIDEO_SWIN, temporal_window_size=2, window_size=[4, 2])).double().eval()
    tensors = model.state_dict()
    for key in small.state_dict():
        if key.endswith("relative_position_bias_table"):
            rows = slice(2, 5) if ".stages.1." in key else slice(None)
            tensors[key] = tensors[key].view(7, 7, 7, -1)[2:5, rows, rows].flatten(0, 2)
    small.load_state_dict(tensors)
    clips = torch.randn(2, 4, 3, 16, 16, dtype=torch.float64)
    expected = torchvision_swin3d(small)(clips.transpose(1, 2))
    assert_close(model(clips).pooler_output, expected, rtol=0, atol=1e-9)
    model.encoder.stages[1].clamped_bias = "slice"
    assert (model(clips).pooler_output - expected).abs().max() > 1e-3


@pytest.mark.parametrize("length, step", [(2, 2), (1, 1), (3, 2), (3, 1)])
def test_a_convolution_of_tubes_is_torchs(length, step):
    fields = (4, 6, (length, 3, 5), (step, 2, 1), (0, 1, 2))
    ours, theirs = video_layers.TubeConv(*fields).double(), nn.Conv3d(*fields).double()
    theirs.load_state_dict(ours.state_dict())
    clips = torch.randn(2, 4, 6, 7, 8, dtype=torch.float64)
    results = [module(clips) for module in (ours, theirs)]
    assert_close(*results)
    for result in results:
        result.square().sum().backward()
    assert_close(ours.weight.grad, theirs.weight.grad)


# ------------------------------------------------------------------------------------------------------- inflation


def still(pictures: torch.Tensor, frames: int) -> torch.Tensor:
    """(batch, channels, height, width) -> the same picture `frames` times, (batch, frames, ...)."""
    return pictures[:, None].expand(-1, frames, -1, -1, -1)


@BOTH_PADDINGS
@BOTH_EMBEDS
@pytest.mark.parametrize(
    "fields",
    [
        {"temporal_window_size": 8},
        {"temporal_window_size": [2, 3]},
        {"temporal_stride": 1, "temporal_window_size": 2},
        {"temporal_stride": 3, "temporal_mode": "divided", "temporal_window_size": 2},
    ],
    ids=str,
)
@torch.no_grad()
def test_a_clip_of_one_picture_is_the_picture(padding, embed_type, fields):
    image = image_tower(window_padding=padding, embed_type=embed_type)
    video = inflate_from_image(image, **fields)
    for size in ((32, 32), (29, 70)):
        pictures = torch.randn(2, 3, *size, dtype=torch.float64)
        expected = image(pictures).pooler_output
        assert expected.std() > 0.1
        for frames in (1, 2, 3, 4, 5, 8, 11):
            assert_close(video(still(pictures, frames)).pooler_output, expected, rtol=0, atol=1e-9)


@torch.no_grad()
def test_kernels_that_overlap_in_time_need_frames_at_the_ends():
    """Frames that go on leave a clip of one picture as it is, zeros do not, and less so the longer the clip."""
    image = image_tower()
    pictures = torch.randn(8, 3, 32, 32, dtype=torch.float64)
    expected = image(pictures).pooler_output
    for kernels in ([3, 1], [3, 3], [5, 3]):
        video = inflate_from_image(image, temporal_kernel_size=kernels)
        for frames in (1, 2, 5, 8):
            assert_close(video(still(pictures, frames)).pooler_output, expected, rtol=0, atol=1e-9)
        zeros = inflate_from_image(image, temporal_kernel_size=kernels, temporal_padding="zeros")
        outputs = [zeros(still(pictures, frames)).pooler_output for frames in (4, 16)]
        distances = [((output - expected).norm() / expected.norm()).item() for output in outputs]
        assert 0.01 < distances[1] < distances[0] < 1, (kernels, distances)


@pytest.mark.parametrize(
    "kernels, documented", [([3, 1, 1, 1], (0.11, 0.05, 0.01)), ([3, 3, 3, 3], (0.19, 0.03, 0.01))], ids=str
)
@torch.no_grad()
def test_how_far_zeros_move_a_trained_tower(kernels, documented):
    """The numbers that `inflate_from_image` documents, on smooth noise."""
    image = FlorenceVisionModel.from_pretrained(bundled_checkpoint())
    noise = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    pictures = F.interpolate(noise, size=64, mode="bicubic")
    expected = image(pictures).pooler_output
    video = inflate_from_image(image, temporal_kernel_size=kernels, temporal_padding="zeros")
    for frames, share in zip((2, 8, 32), documented, strict=True):
        moved = video(still(pictures, frames)).pooler_output - expected
        assert (moved.norm(dim=1) / expected.norm(dim=1)).mean().item() == pytest.approx(share, rel=0.5)


@BOTH_EMBEDS
@torch.no_grad()
def test_zeros_change_nothing_where_nothing_is_padded_in_time(embed_type):
    image = image_tower(embed_type=embed_type)
    video = inflate_from_image(image, temporal_padding="zeros", temporal_window_size=2)
    pictures = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    expected = image(pictures).pooler_output
    for frames, equal in ((2, True), (4, True), (8, True), (5, False), (6, False)):
        distance = (video(still(pictures, frames)).pooler_output - expected).abs().max()
        assert (distance < 1e-9) == equal, (frames, distance)


@torch.no_grad()
def test_inflation_resizes_tables_in_space_and_repeats_them_in_time():
    image = image_tower()
    before = copy.deepcopy(image.state_dict())
    video = inflate_from_image(image, window_size=[2, 6], temporal_window_size=[3, 2], temporal_kernel_size=[4, 3])
    resized = copy.deepcopy(image)
    resized.resize_window_size([2, 6])
    inflated = video.state_dict()
    assert inflated.keys() == before.keys()
    for name, tensor in resized.state_dict().items():
        if "bias_table" in name:
            times = 5 if ".stages.0." in name else 3
            each = inflated[name].view(times, *tensor.shape)
            assert_close(each, tensor.expand_as(each), rtol=0, atol=0)
        elif "projection.weight" in name:
            kernel = inflated[name]
            assert kernel.shape[2] == (4 if name.startswith("embeddings") else 3)
            assert_close(kernel.sum(dim=2), tensor)
            assert_close(kernel, kernel[:, :, :1].expand_as(kernel), rtol=0, atol=0)
        else:
            assert_close(inflated[name], tensor, rtol=0, atol=0)
    for parameter in video.parameters():
        parameter.zero_()
    assert_close(image.state_dict(), before, rtol=0, atol=0)  # nothing is shared with the image tower


@BOTH_MODES
def test_windows_change_with_their_tables(tmp_path, mode):
    """An inflated tower with new windows is the tower that the resized image tower is inflated to."""
    images = image_tower()
    model = inflate_from_image(images, temporal_window_size=2, temporal_mode=mode)
    model.resize_window_size([6, 3], [3, 5])
    images.resize_window_size([6, 3])
    expected = inflate_from_image(images, temporal_window_size=[3, 5], temporal_mode=mode)
    own = {name: tensor for name, tensor in model.state_dict().items() if ".temporal_" not in name}
    assert_close(own, {name: expected.state_dict()[name] for name in own}, atol=1e-12, rtol=1e-12)
    assert model.config.windows == expected.config.windows
    randomize(model).save_pretrained(tmp_path)
    loaded = FlorenceVideoModel.from_pretrained(tmp_path)
    clips = torch.randn(1, 9, 3, 45, 50, dtype=torch.float64)
    assert_close(model(clips).last_hidden_state, loaded(clips).last_hidden_state)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_tables_along_time_by_hand():
    """Of offsets -1, 0, 1, the line through them at the places of -2 to 2; the middle and sums of signs stay."""
    table = torch.tensor([[0.0, 3.0], [1.0, 1.0], [2.0, -1.0]])  # (offsets, heads)
    found = video_layers.resize_video_table(table, (2,), (3,))
    assert_close(found, torch.tensor([[0.0, 3.0], [0.4, 2.2], [1.0, 1.0], [1.6, -0.2], [2.0, -1.0]]))
    random = torch.randn(3 * 7 * 7, 2)
    assert video_layers.resize_video_table(random, (2, 4, 4), (2, 4, 4)).equal(random)
    both = video_layers.resize_video_table(random, (2, 4, 4), (3, 6, 6))
    in_turns = video_layers.resize_video_table(random, (2, 4, 4), (2, 6, 6))
    assert_close(both, video_layers.resize_video_table(in_turns, (2, 6, 6), (3, 6, 6)))
    mirrored = random.unflatten(0, (3, 7, 7)).flip(0).flatten(0, 2)  # time backwards
    backwards = video_layers.resize_video_table(mirrored, (2, 4, 4), (3, 6, 6))
    assert_close(backwards, both.unflatten(0, (5, 11, 11)).flip(0).flatten(0, 2))


@pytest.mark.parametrize("sizes", [{"window_size": 0}, {"temporal_window_size": [4]}, {"temporal_window_size": "4"}])
def test_an_impossible_window_leaves_the_tower_as_it_was(sizes):
    model = tower(video_config())
    tensors, config = copy.deepcopy(model.state_dict()), model.config.to_dict()
    with pytest.raises(ValueError, match="window_size"):
        model.resize_window_size(**sizes)
    assert_close(model.state_dict(), tensors, rtol=0, atol=0)
    assert model.config.to_dict() == config


def test_inflation_keeps_precision_and_refuses_another_shape():
    image = image_tower().to(torch.bfloat16)
    video = inflate_from_image(image)
    assert video.dtype == torch.bfloat16 and not video.training
    with pytest.raises(ValueError, match=r"of the video tower's shape, got another, in encoder.stages.1.layers.1.att"):
        inflate_from_image(image, depths=[2, 1])
    with pytest.raises(ValueError, match="temporal_padding"):
        inflate_from_image(image, temporal_padding="ones")


@torch.no_grad()
def test_divided_attention_starts_as_the_image_tower_on_every_frame():
    image = image_tower()
    video = inflate_from_image(image, temporal_mode="divided", temporal_stride=1, temporal_window_size=2)
    clips = torch.randn(2, 5, 3, 24, 40, dtype=torch.float64)
    frames = image(clips.flatten(0, 1)).last_hidden_state.unflatten(0, (2, 5))
    assert_close(video(clips).last_hidden_state, frames.flatten(1, 2), rtol=0, atol=1e-9)
    with torch.enable_grad():
        video(clips).pooler_output.square().sum().backward()
    projection = video.encoder.stages[0].layers[0].temporal_attention.out_proj
    assert projection.weight.grad.abs().max() > 0  # it can leave zero
    for layer in video.encoder.stages[0].layers:
        layer.temporal_attention.out_proj.weight.normal_()
    assert (video(clips).last_hidden_state - frames.flatten(1, 2)).abs().max() > 1e-3


@torch.no_grad()
def test_attention_along_time_by_a_loop_over_places():
    config = video_config(temporal_mode="divided", temporal_window_size=6)
    layer = tower(config, torch.float64).encoder.stages[0].layers[1]
    attention = layer.temporal_attention
    grid = torch.randn(2, 4, 3, 5, 8, dtype=torch.float64)
    result = layer.attend_along_time(attention, grid)
    table = attention.relative_position_bias_table  # (11, heads), offsets from -5 to 5
    bias = torch.stack([table[5 + i - torch.arange(4)] for i in range(4)]).permute(2, 0, 1)
    for batch, row, column in ((0, 0, 0), (1, 2, 4), (1, 1, 3)):
        line = grid[batch, :, row, column]  # (time, channels)
        parts = [part(line).view(4, 2, 4).transpose(0, 1) for part in (attention.q_proj, attention.k_proj)]
        weights = (parts[0] @ parts[1].transpose(1, 2) / math.sqrt(4) + bias).softmax(dim=-1)
        value = attention.v_proj(line).view(4, 2, 4).transpose(0, 1)
        expected = attention.out_proj((weights @ value).transpose(0, 1).reshape(4, 8))
        assert_close(result[batch, :, row, column], expected)


# -------------------------------------------------------------------------------------------- any size, any order


@BOTH_MODES
@BOTH_EMBEDS
@torch.no_grad()
def test_any_clip_works_in_any_order(mode, embed_type):
    config = video_config(temporal_mode=mode, embed_type=embed_type)
    used = tower(config)
    shapes = [(1, 1, 1), (5, 33, 20), (2, 3, 40), (7, 32, 32), (1, 64, 9)]
    clips = [torch.randn(1, frames, 3, *size) for frames, *size in shapes]
    state = copy.deepcopy(used.state_dict())
    for clip in [*clips, *reversed(clips)]:
        output = used(clip).last_hidden_state
        assert torch.isfinite(output).all()
        assert_close(output, tower(config)(clip).last_hidden_state, rtol=0, atol=0)
    assert_close(used.state_dict(), state, rtol=0, atol=0)
    assert not list(used.buffers())


@BOTH_MODES
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_a_batch_is_its_clips_in_slices_of_any_size(mode, attention, monkeypatch):
    """The CPU works on a few clips, windows and frames at a time; the result does not show it."""
    model = tower(video_config(temporal_mode=mode, attn_implementation=attention), torch.float64)
    clips = torch.randn(3, 7, 3, 40, 27, dtype=torch.float64)
    expected = torch.cat([model(clip[None]).last_hidden_state for clip in clips])
    for elements in (1, 3000, 10**9):
        monkeypatch.setattr(layers, "SLICE_ELEMENTS", elements)
        assert_close(model(clips).last_hidden_state, expected)


@pytest.mark.parametrize("elements", [1, 10**5, 10**9])
def test_windows_of_many_tokens_by_every_route(elements, monkeypatch):
    """128 tokens a window: in slices or at once, by torch's fused kernel or with a gradient, shifted and padded."""
    fields = {"temporal_window_size": 8, "temporal_stride": 1}
    model = tower(video_config(**fields), torch.float64)
    assert layers.FUSED_TOKENS <= 8 * 4 * 4
    written_out = tower(video_config(**fields, attn_implementation="eager"), torch.float64)
    clips = torch.randn(2, 11, 3, 40, 27, dtype=torch.float64)
    expected = written_out(clips).last_hidden_state
    monkeypatch.setattr(layers, "SLICE_ELEMENTS", elements)
    output = model(clips).last_hidden_state
    assert_close(output, expected)
    with torch.no_grad():
        assert_close(model(clips).last_hidden_state, expected)
    for each in (output, expected):
        each.square().sum().backward()
    gradients = [dict(each.named_parameters()) for each in (model, written_out)]
    for name, parameter in gradients[0].items():
        assert_close(parameter.grad, gradients[1][name].grad, msg=name)


@BOTH_MODES
@torch.no_grad()
def test_the_order_of_frames_counts(mode):
    model = tower(video_config(temporal_mode=mode))
    clips = torch.randn(2, 6, 3, 32, 32)
    assert (model(clips).pooler_output - model(clips.flip(1)).pooler_output).abs().max() > 1e-2


@pytest.mark.parametrize(
    "clips", [None, torch.zeros(2, 3, 8, 8), torch.zeros(1, 4, 2, 8, 8), torch.zeros(1, 0, 3, 8, 8)]
)
def test_clips_that_are_none(clips):
    with pytest.raises(ValueError, match=r"expected floating-point pixel_values_videos of shape \(batch, frames, 3, "):
        tower(video_config())(clips)


def test_pixels_that_are_no_numbers():
    with pytest.raises(ValueError, match="got torch.uint8 of shape"):
        tower(video_config())(torch.zeros(1, 2, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match="expected finite pixel_values_videos"):
        tower(video_config())(torch.full((1, 2, 3, 8, 8), math.nan))


# ------------------------------------------------------------------------------------------------ recorded outputs


@torch.no_grad()
def test_hidden_states_and_attentions():
    """6 frames of 24 x 20 pixels: 3 tokens of time by 6 x 5, then 3 x 3 places; windows of 2 x 4 x 4, 2 x 3 x 3."""
    model = tower(video_config(attn_implementation="eager"))
    clips = torch.randn(2, 6, 3, 24, 20)
    output = model(clips, output_hidden_states=True, output_attentions=True)
    assert [tuple(state.shape) for state in output.hidden_states] == [(2, 3, 6, 5, 8)] * 2 + [(2, 3, 3, 3, 16)]
    assert_close(output.hidden_states[0], model.embeddings(clips))
    assert_close(model.norm(output.hidden_states[-1]).flatten(1, 3), output.last_hidden_state)
    assert_close(output.last_hidden_state.mean(dim=1), output.pooler_output)
    shapes = [(2 * 8, 2, 32, 32)] * 2 + [(2 * 2, 2, 18, 18)] * 2
    assert [tuple(weights.shape) for weights in output.attentions] == shapes
    for weights in output.attentions:
        assert_close(weights.sum(dim=-1), torch.ones(weights.shape[:-1]))
    divided = tower(video_config(attn_implementation="eager", temporal_mode="divided"))
    attentions = divided(clips, output_attentions=True).attentions
    first = [(2 * 30 * 2, 2, 2, 2), (2 * 3 * 4, 2, 16, 16)]
    assert [tuple(weights.shape) for weights in attentions[:2]] == first and len(attentions) == 8


@BOTH_MODES
def test_eager_and_sdpa_agree(mode):
    clips = torch.randn(2, 5, 3, 40, 28)
    outputs, gradients = [], []
    for implementation in ("eager", "sdpa"):
        model = tower(video_config(temporal_mode=mode, attn_implementation=implementation))
        outputs.append(model(clips).pooler_output)
        outputs[-1].square().mean().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert_close(*outputs, rtol=1e-4, atol=1e-5)
    assert_close(*gradients, rtol=1e-3, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@BOTH_MODES
def test_checkpointing_gives_the_same_gradients(mode):
    clips = torch.randn(3, 4, 3, 32, 32)
    gradients, calls = {}, {True: 0, False: 0}
    for checkpointing in (False, True):
        model = tower(video_config(temporal_mode=mode, drop_path_rate=0.5)).train()
        if checkpointing:
            model.gradient_checkpointing_enable()

        def count(*_: object, checkpointing: bool = checkpointing) -> None:
            calls[checkpointing] += 1

        for module in model.modules():
            if isinstance(module, FeedForward):
                module.register_forward_pre_hook(count)
        torch.manual_seed(3)
        model(clips).pooler_output.square().sum().backward()
        gradients[checkpointing] = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert calls == {False: 4, True: 8}  # each layer ran again for the backward pass
    assert_close(gradients[True], gradients[False], rtol=1e-5, atol=1e-6)


@BOTH_MODES
@BOTH_EMBEDS
def test_every_parameter_learns(mode, embed_type):
    fields = {"temporal_kernel_size": [3, 2]} if embed_type == "conv" else {}
    model = tower(video_config(temporal_mode=mode, embed_type=embed_type, layer_scale_init_value=0.5, **fields))
    model(torch.randn(2, 7, 3, 40, 32)).pooler_output.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name
        # A bias of the keys moves all scores of a query alike, so softmax gives it no gradient.
        assert parameter.grad.abs().max() > 0 or name.endswith("k_proj.bias"), name


@torch.no_grad()
def test_the_exported_tower_gives_the_same_for_any_batch():
    model = tower(video_config(depths=[2], num_heads=[2]))
    sizes = {"pixel_values_videos": {0: torch.export.Dim.AUTO}}
    inputs = {"pixel_values_videos": torch.randn(2, 5, 3, 32, 24)}
    program = torch.export.export(model, (), inputs, dynamic_shapes=sizes).module()
    for batch in (1, 3):
        clips = torch.randn(batch, 5, 3, 32, 24)
        assert_close(program(pixel_values_videos=clips).pooler_output, model(clips).pooler_output)


def test_fresh_weights_follow_the_configuration():
    model = FlorenceVideoModel(video_config(embed_dim=64, initializer_range=0.05, temporal_mode="divided"))
    for name, parameter in model.named_parameters():
        if "temporal_attention.out_proj" in name:
            assert (parameter == 0).all(), name
        elif parameter.numel() > 100 and parameter.ndim > 1:
            assert parameter.std().item() == pytest.approx(0.05, rel=0.3), name
        elif parameter.ndim == 1:
            assert (parameter == (1 if "norm" in name and name.endswith("weight") else 0)).all(), name


# -------------------------------------------------------------------------------------------------- classification


def classifier(**fields: Any) -> FlorenceForVideoClassification:
    return randomize(
        FlorenceForVideoClassification(video_config(**{"num_labels": len(fields.get("id2label", range(4))), **fields}))
    )


@torch.no_grad()
def test_the_classifier_is_linear_on_the_pooled_output():
    model, clips = classifier(), torch.randn(3, 5, 3, 32, 24)
    pooled = model.video_model(clips).pooler_output
    expected = pooled @ model.classifier.weight.T + model.classifier.bias
    output = model(clips, output_hidden_states=True)
    assert_close(output.logits, expected)
    assert output.loss is None and len(output.hidden_states) == 3
    assert_close(model.train()(clips).logits, expected)  # no dropout unless the configuration asks
    dropped = classifier(classifier_dropout=0.5).train()
    assert not torch.equal(dropped(clips).logits, dropped(clips).logits)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_loss_with_label_smoothing_by_its_definition(smoothing):
    model, clips = classifier(label_smoothing=smoothing), torch.randn(3, 4, 3, 16, 16)
    output = model(clips, labels=torch.tensor([2, 0, -100]))
    target = torch.full((2, 4), smoothing / 4)
    target[0, 2] += 1 - smoothing
    target[1, 0] += 1 - smoothing
    expected = -(target * output.logits[:2].log_softmax(dim=-1)).sum(dim=-1).mean()  # the third has no class
    assert_close(output.loss, expected)
    assert model.config.problem_type is None  # forward changes nothing


def test_labels_that_mix_two_clips():
    model, clips = classifier(problem_type="single_label_classification"), torch.randn(2, 4, 3, 16, 16)
    labels = torch.tensor([[0.7, 0.0, 0.3, 0.0], [0.0, 1.0, 0.0, 0.0]])
    output = model(clips, labels=labels)
    assert_close(output.loss, -(labels * output.logits.log_softmax(dim=-1)).sum(dim=-1).mean())


def test_several_classes_and_numbers():
    clips = torch.randn(2, 4, 3, 16, 16)
    several, labels = (
        classifier(problem_type="multi_label_classification"),
        torch.tensor([[1.0, 0, 1, 0], [0, 0, 0, 1]]),
    )
    output = several(clips, labels=labels)
    probabilities = output.logits.sigmoid()
    expected = -(labels * probabilities.log() + (1 - labels) * (1 - probabilities).log()).mean()
    assert_close(output.loss, expected)
    value = classifier(num_labels=1)
    output = value(clips, labels=torch.tensor([0.5, -1.0]))
    assert_close(output.loss, (output.logits[:, 0] - torch.tensor([0.5, -1.0])).square().mean())


@pytest.mark.parametrize("labels", [torch.tensor([0, 4]), torch.tensor([0]), [0, 1], torch.zeros(2, 3)])
def test_labels_that_do_not_fit(labels):
    with pytest.raises(ValueError, match="expected (labels of shape|class numbers from 0 to 3)"):
        classifier()(torch.zeros(2, 2, 3, 8, 8), labels=labels)


@pytest.mark.parametrize("problem", [None, "multi_label_classification", "regression"])
def test_views_are_averaged(problem):
    model = classifier(problem_type=problem)
    views = torch.randn(2, 3, 4, 3, 16, 24)
    logits = torch.stack([model(clip).logits for clip in views])  # (batch, views, num_labels)
    each = logits if problem == "regression" else logits.softmax(dim=-1) if problem is None else logits.sigmoid()
    for count in (1, 4, 100):
        assert_close(model.classify_views(views, views_at_a_time=count), each.mean(dim=1))
    with pytest.raises(ValueError, match=r"expected \(batch, views, frames, channels, height, width\), got"):
        model.classify_views(views[0])
    with pytest.raises(ValueError, match="views_at_a_time of at least 1, got 0"):
        model.classify_views(views, views_at_a_time=0)


# --------------------------------------------------------------------------------------------- saving and loading


@BOTH_MODES
@torch.no_grad()
def test_a_saved_classifier_comes_back_by_the_auto_classes(tmp_path, mode):
    AutoConfig.register(FlorenceVideoConfig.model_type, FlorenceVideoConfig, exist_ok=True)
    AutoModel.register(FlorenceVideoConfig, FlorenceVideoModel, exist_ok=True)
    AutoModelForVideoClassification.register(FlorenceVideoConfig, FlorenceForVideoClassification, exist_ok=True)
    model = classifier(temporal_mode=mode, temporal_kernel_size=(4, 3), id2label={0: "waving", 1: "nodding"})
    model.save_pretrained(tmp_path)
    clips = torch.randn(1, 5, 3, 20, 31)
    loaded, report = AutoModelForVideoClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()) and isinstance(loaded, FlorenceForVideoClassification)
    assert loaded.config.id2label == {0: "waving", 1: "nodding"} and loaded.config == model.config
    assert_close(loaded(clips).logits, model(clips).logits)
    video, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()) and isinstance(video, FlorenceVideoModel)
    assert_close(video(clips).pooler_output, model.video_model(clips).pooler_output)
    # A tower alone starts a classifier.
    video.save_pretrained(tmp_path / "tower")
    started, report = FlorenceForVideoClassification.from_pretrained(tmp_path / "tower", output_loading_info=True)
    assert report["missing_keys"] == {"classifier.weight", "classifier.bias"} and not report["unexpected_keys"]
    assert_close(started.video_model.state_dict(), video.state_dict(), rtol=0, atol=0)


@torch.no_grad()
def test_the_image_tower_of_a_florence_folder(tmp_path):
    """From a dual encoder, from its tower alone and from a classifier of pictures; a still clip is the picture."""
    florence = save_tiny(tmp_path / "dual")
    florence.vision_model.save_pretrained(tmp_path / "tower")
    FlorenceForImageClassification.from_pretrained(tmp_path / "dual").save_pretrained(tmp_path / "pictures")
    pictures = torch.randn(2, 3, 32, 32)
    expected = florence.vision_model(pictures).pooler_output
    for folder in ("dual", "tower", "pictures"):
        video = FlorenceVideoModel.from_pretrained_image(tmp_path / folder, num_frames=4)
        assert_close(video(still(pictures, 4)).pooler_output, expected, rtol=1e-5, atol=1e-5)
    names = {0: "waving", 1: "nodding", 2: "jumping"}
    model = FlorenceForVideoClassification.from_pretrained_image(
        tmp_path / "dual", id2label=names, temporal_mode="divided", drop_path_rate=0.5
    )
    assert model.config.id2label == names and model.config.drop_path_rate == 0.5 and not model.training
    assert_close(model.video_model(still(pictures, 3)).pooler_output, expected, rtol=1e-5, atol=1e-5)
    assert model(still(pictures, 3)).logits.shape == (2, 3)


def test_folders_that_hold_no_image_tower(tmp_path):
    florence = save_tiny(tmp_path / "dual")
    florence.text_model.save_pretrained(tmp_path / "text")
    florence.vision_model.config.save_pretrained(tmp_path / "text")
    with pytest.raises(ValueError, match="expected the weights of an image tower in .*text, missing are: embeddings"):
        FlorenceVideoModel.from_pretrained_image(tmp_path / "text")
    with pytest.raises(ValueError, match="got 'florence': `from_pretrained_image` of the video models makes a video"):
        FlorenceVideoModel.from_pretrained(tmp_path / "dual")
