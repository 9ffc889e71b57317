"""The image tower against torchvision's and transformers' Swin in both conventions, and what any tower must keep."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import SwinBackbone, SwinConfig

from tests.oracles import TRANSFORMERS_SWIN, randomize, rename, torchvision_swin, transformers_swin
from transformers_florence.configuration_florence import FlorenceConfig, FlorenceVisionConfig
from transformers_florence.layers import DropPath, FeedForward
from transformers_florence.modeling_florence import FlorenceModel
from transformers_florence.modeling_florence_vision import FlorenceBackbone, FlorenceVisionModel
from transformers_florence.window_ops import resize_relative_position_table

TOLERANCES = [(torch.float32, 1e-5), (torch.float64, 1e-9)]
BOTH_PADDINGS = pytest.mark.parametrize("padding", ["clamp", "pad"])
BOTH_EMBEDS = pytest.mark.parametrize("embed_type", ["conv", "patch"])


def swin_config(**fields: Any) -> FlorenceVisionConfig:
    """Four stages of plain Swin; `window_size=4` and 128 pixels make the last map as large as the window."""
    shape = dict(image_size=128, embed_dim=8, depths=[2, 2, 2, 2], num_heads=[2, 2, 4, 4], window_size=4)
    return FlorenceVisionConfig(**{**shape, "embed_type": "patch", "drop_path_rate": 0.0, **fields})


def tiny_config(**fields: Any) -> FlorenceVisionConfig:
    """Two stages of CoSwin with a shifted layer in each; 32 pixels give maps of 8 and 4."""
    shape = dict(image_size=32, embed_dim=8, depths=[2, 2], num_heads=[2, 2], window_size=4, drop_path_rate=0.0)
    return FlorenceVisionConfig(**{**shape, **fields})


def tower(config: FlorenceVisionConfig, dtype: torch.dtype = torch.float32) -> FlorenceVisionModel:
    return randomize(FlorenceVisionModel(config)).to(dtype)


# -------------------------------------------------------------------------------------------------------- equality


@pytest.mark.parametrize("dtype, tolerance", TOLERANCES)
@pytest.mark.parametrize(
    "size, depths, padding",
    [
        ((128, 128), [2, 2, 2, 2], "clamp"),  # the last map is one window: unshifted
        ((160, 160), [2, 2, 2, 2], "clamp"),  # it is padded from 5 to 8
        ((160, 224), [2, 2, 2, 2], "pad"),
        ((84, 132), [2, 3, 1], "clamp"),  # odd maps at every merging
        ((84, 132), [2, 3, 1], "pad"),
    ],
)
@torch.no_grad()
def test_the_tower_is_torchvisions_swin(size, depths, padding, dtype, tolerance):
    heads = [2, 2, 4, 4][: len(depths)]
    model = tower(swin_config(depths=depths, num_heads=heads, window_padding=padding), dtype)
    pixel_values = torch.randn(2, 3, *size, dtype=dtype)
    expected = torchvision_swin(model)(pixel_values)
    assert expected.std() > 0.1
    assert_close(model(pixel_values).pooler_output, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype, tolerance", TOLERANCES)
@pytest.mark.parametrize(
    "size, padding",
    [
        ((128, 128), "clamp"),
        ((101, 131), "clamp"),
        ((128, 256), "clamp"),  # the last map is 4 x 8: no layer shifts, on neither side
        ((128, 128), "pad"),
        ((96, 160), "pad"),
        ((53, 71), "pad"),
        ((64, 64), "pad"),  # the last map, 2 x 2, is padded to a window
        ((7, 3), "pad"),
        ((1, 100), "pad"),
    ],
)
@torch.no_grad()
def test_the_tower_is_transformers_swin(size, padding, dtype, tolerance):
    model = tower(swin_config(window_padding=padding), dtype)
    pixel_values = torch.randn(2, 3, *size, dtype=dtype)
    expected = transformers_swin(model)(pixel_values, always_partition=padding == "pad")
    output = model(pixel_values)
    assert_close(output.last_hidden_state, expected.last_hidden_state, rtol=0, atol=tolerance)
    assert_close(output.pooler_output, expected.pooler_output, rtol=0, atol=tolerance)


@torch.no_grad()
def test_a_map_smaller_than_the_window_reads_the_middle_of_the_table():
    """At 64 pixels the last map is 2 x 2: UniCL's tower has a window of 2 there, and a table for it."""
    model = tower(swin_config(), torch.float64)
    small = FlorenceVisionModel(swin_config(window_size=[4, 4, 4, 2])).double().eval()
    tensors = model.state_dict()
    for key in small.state_dict():
        if key.startswith("encoder.stages.3.") and key.endswith("relative_position_bias_table"):
            tensors[key] = tensors[key].view(7, 7, -1)[2:5, 2:5].flatten(0, 1)  # offsets from -1 to 1
    small.load_state_dict(tensors)
    pixel_values = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    expected = torchvision_swin(small)(pixel_values)
    assert_close(small(pixel_values).pooler_output, expected, rtol=0, atol=1e-9)
    assert_close(model(pixel_values).pooler_output, expected, rtol=0, atol=1e-9)


@torch.no_grad()
def test_the_two_conventions_differ_where_a_map_is_no_larger_than_the_window():
    """Also at the training size, where it is exactly one window: the switch decides whether that window shifts."""
    clamp, pad = (tower(swin_config(window_padding=padding)) for padding in ("clamp", "pad"))
    for size, differ in ((128, True), (64, True), (160, False)):
        pixel_values = torch.randn(1, 3, size, size)
        distance = (clamp(pixel_values).pooler_output - pad(pixel_values).pooler_output).abs().max()
        assert (distance > 1e-3) == differ, (size, distance)


# -------------------------------------------------------------------------------------------- any size, any order


@BOTH_PADDINGS
@BOTH_EMBEDS
@torch.no_grad()
def test_any_size_works_in_any_order(padding, embed_type):
    """A tower that has seen other sizes answers as one that has seen none."""
    config = tiny_config(window_padding=padding, embed_type=embed_type)
    used = tower(config)
    pictures = [torch.randn(1, 3, *size) for size in [(1, 1), (64, 48), (1, 100), (33, 7), (2, 2), (32, 32), (64, 48)]]
    for pixel_values in [*pictures, *reversed(pictures)]:
        output = used(pixel_values)
        assert torch.isfinite(output.last_hidden_state).all()
        assert_close(output.last_hidden_state, tower(config)(pixel_values).last_hidden_state, rtol=0, atol=0)


def attributes(model: nn.Module) -> dict[str, Any]:
    """Everything that a module holds besides parameters, hooks and submodules."""
    return {
        f"{name}.{key}": copy.deepcopy(value)
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if not key.startswith("_") and key != "config"
    }


@BOTH_PADDINGS
def test_forward_changes_nothing_in_the_model(padding):
    model = tower(tiny_config(window_padding=padding))
    before, tensors, config = attributes(model), copy.deepcopy(model.state_dict()), model.config.to_dict()
    for size in ((16, 16), (64, 40), (5, 90)):
        model(torch.randn(1, 3, *size), output_hidden_states=True).pooler_output.sum().backward()
    assert attributes(model) == before and model.config.to_dict() == config
    assert_close(model.state_dict(), tensors, rtol=0, atol=0)


def test_nothing_but_parameters_is_stored():
    """A buffer that is not saved would come back from a checkpoint as garbage."""
    model = tower(tiny_config(layer_scale_init_value=1e-4))
    assert not list(model.buffers())
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}


@BOTH_PADDINGS
@pytest.mark.parametrize("size", [(32, 32), (30, 51)])
@torch.no_grad()
def test_a_batch_is_its_pictures(padding, size):
    model = tower(tiny_config(window_padding=padding))
    pixel_values = torch.randn(5, 3, *size)
    singles = torch.cat([model(picture[None]).last_hidden_state for picture in pixel_values])
    assert_close(model(pixel_values).last_hidden_state, singles, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_channels", [1, 4])
@BOTH_EMBEDS
@torch.no_grad()
def test_other_numbers_of_channels(num_channels, embed_type):
    model = tower(tiny_config(num_channels=num_channels, embed_type=embed_type))
    pixel_values = torch.randn(2, num_channels, 32, 32)
    changed = pixel_values.clone()
    changed[:, -1] += 1
    assert (model(pixel_values).pooler_output - model(changed).pooler_output).abs().max() > 1e-3


# ------------------------------------------------------------------------------------------------ recorded outputs


@BOTH_PADDINGS
@torch.no_grad()
def test_hidden_states_are_the_stem_and_each_stage(padding):
    model = tower(tiny_config(window_padding=padding, depths=[1, 2, 1], num_heads=[2, 2, 4]))
    pixel_values = torch.randn(2, 3, 48, 30)
    output = model(pixel_values, output_hidden_states=True)
    shapes = [(2, 12, 7, 8), (2, 12, 7, 8), (2, 6, 4, 16), (2, 3, 2, 32)]
    assert [tuple(state.shape) for state in output.hidden_states] == shapes
    assert_close(output.hidden_states[0], model.embeddings(pixel_values))
    assert_close(model.norm(output.hidden_states[-1]).flatten(1, 2), output.last_hidden_state)
    assert_close(output.pooler_output, output.last_hidden_state.mean(dim=1))
    assert model(pixel_values).hidden_states is None


@pytest.mark.parametrize("padding, last", [("clamp", (4, 3)), ("pad", (2, 4))])
@torch.no_grad()
def test_attentions_are_one_for_each_layer_and_window(padding, last):
    """On a map of 6 x 4, then 3 x 2: two windows of 4, then six of 2 or, padded, one of 4."""
    config = tiny_config(window_padding=padding, depths=[2, 1], num_heads=[2, 4], attn_implementation="eager")
    attentions = tower(config)(torch.randn(2, 3, 24, 17), output_attentions=True).attentions
    first = (2 * 2, 2, 16, 16)
    second = (2 * 2, 4, 4, 4) if padding == "clamp" else (2, 4, 16, 16)
    assert [tuple(weights.shape) for weights in attentions] == [first, first, second]
    for weights in attentions:
        assert weights.min() >= 0
        assert_close(weights.sum(dim=-1), torch.ones(weights.shape[:-1]))
    assert attentions[0].std() > 0.01


@torch.no_grad()
def test_outputs_as_a_tuple():
    model = tower(tiny_config())
    pixel_values = torch.randn(1, 3, 32, 32)
    last_hidden_state, pooled = model(pixel_values, return_dict=False)
    output = model(pixel_values=pixel_values)
    assert torch.equal(last_hidden_state, output[0]) and torch.equal(pooled, output["pooler_output"])


# -------------------------------------------------------------------------------------- the same by another route


@BOTH_PADDINGS
@pytest.mark.parametrize("dtype, atol, rtol", [(torch.float32, 1e-5, 1e-4), (torch.bfloat16, 5e-2, 5e-2)])
def test_eager_and_sdpa_agree(padding, dtype, atol, rtol):
    pixel_values = torch.randn(2, 3, 40, 28)
    outputs, gradients = [], []
    for implementation in ("eager", "sdpa"):
        model = tower(tiny_config(window_padding=padding, attn_implementation=implementation), dtype)
        assert model.config._attn_implementation == implementation
        outputs.append(model(pixel_values).pooler_output)
        outputs[-1].float().square().mean().backward()
        gradients.append(model.encoder.stages[0].layers[1].attention.relative_position_bias_table.grad)
    assert_close(*outputs, atol=atol, rtol=rtol)
    assert gradients[0].abs().max() > 0
    assert (gradients[0] - gradients[1]).norm() < 10 * rtol * gradients[0].norm()


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_checkpointing_gives_the_same_gradients_with_stochastic_depth():
    pixel_values = torch.randn(4, 3, 32, 32)
    gradients, calls = {}, {True: 0, False: 0}
    for checkpointing in (False, True):
        model = tower(tiny_config(drop_path_rate=0.5, attention_dropout=0.1)).train()
        if checkpointing:
            model.gradient_checkpointing_enable()

        def count(*_: object, checkpointing: bool = checkpointing) -> None:
            calls[checkpointing] += 1

        for module in model.modules():
            if isinstance(module, FeedForward):
                module.register_forward_pre_hook(count)
        torch.manual_seed(3)
        model(pixel_values).pooler_output.square().sum().backward()
        gradients[checkpointing] = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert calls == {False: 4, True: 8}  # each layer ran again for the backward pass
    assert_close(gradients[True], gradients[False], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "padding, depths",
    [("pad", [2]), pytest.param("clamp", [2, 2], marks=pytest.mark.slow)],  # tracing takes seconds for each layer
)
def test_the_compiled_tower_gives_the_same_in_one_graph(padding, depths):
    torch.compiler.reset()
    model = tower(tiny_config(window_padding=padding, depths=depths, num_heads=[2] * len(depths)))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    pixel_values = torch.randn(2, 3, 32, 24)
    outputs, gradients = [], []
    for call in (compiled, model):
        outputs.append(call(pixel_values).pooler_output)
        outputs[-1].square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
        model.zero_grad()
    assert_close(*outputs)
    assert_close(*gradients, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_exported_tower_gives_the_same_for_any_batch():
    model = tower(tiny_config(depths=[2], num_heads=[2]))
    sizes = {"pixel_values": {0: torch.export.Dim.AUTO}}
    inputs = {"pixel_values": torch.randn(2, 3, 32, 32)}
    program = torch.export.export(model, (), inputs, dynamic_shapes=sizes).module()
    for batch in (1, 2, 5):
        pixel_values = torch.randn(batch, 3, 32, 32)
        assert_close(program(pixel_values=pixel_values).pooler_output, model(pixel_values).pooler_output)


# -------------------------------------------------------------------------------------------------------- training


def test_drop_path_grows_linearly_over_the_layers():
    model = FlorenceVisionModel(tiny_config(depths=[2, 3], drop_path_rate=0.4))
    rates = [module.rate for module in model.modules() if isinstance(module, DropPath)]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])


def test_drop_path_acts_on_both_branches():
    """Many copies of one picture leave a layer in four ways: with attention, feed-forward, both or neither."""
    model = tower(tiny_config(depths=[2], num_heads=[2], drop_path_rate=0.5)).train()
    seen = {}
    for place, layer in enumerate(model.encoder.stages[0].layers):
        layer.register_forward_hook(lambda _, __, output, place=place: seen.update({place: output.detach()}))
    with torch.no_grad():
        model(torch.randn(1, 3, 16, 16).expand(800, -1, -1, -1))
    before, after = seen[0].flatten(1), seen[1].flatten(1)
    assert_close(before, before[:1].expand_as(before))  # the first layer's rate is zero
    ways, counts = torch.unique((after * 1e3).round(), dim=0, return_counts=True)
    assert len(ways) == 4 and ((after - before).abs().amax(dim=1) == 0).sum() in counts
    assert (counts - 200).abs().max() < 5 * (800 * 0.25 * 0.75) ** 0.5


@BOTH_EMBEDS
@pytest.mark.parametrize("size", [(32, 32), (40, 64)])
def test_every_parameter_learns(embed_type, size):
    model = tower(tiny_config(embed_type=embed_type, layer_scale_init_value=0.5, window_padding="pad")).train()
    model(torch.randn(3, 3, *size)).pooler_output.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        # A bias of the keys moves all scores of a query alike, so softmax gives it no gradient.
        assert parameter.grad.abs().max() > 0 or name.endswith("k_proj.bias"), name


@BOTH_PADDINGS
@BOTH_EMBEDS
def test_gradients_are_finite_differences_along_a_direction(padding, embed_type):
    """Through padding, roll, mask, crop and merging of odd maps, over all parameters and the pixels at once."""
    model = tower(tiny_config(window_padding=padding, embed_type=embed_type), torch.float64)
    pixel_values = torch.randn(2, 3, 27, 22, dtype=torch.float64, requires_grad=True)
    tensors = {"pixel_values": pixel_values, **dict(model.named_parameters())}
    direction = {name: torch.randn_like(tensor) for name, tensor in tensors.items()}

    def loss(step: float) -> torch.Tensor:
        moved = {name: tensor + step * direction[name] for name, tensor in tensors.items()}
        output = torch.func.functional_call(model, moved, (moved.pop("pixel_values"),))
        return output.pooler_output.square().sum()

    gradients = torch.autograd.grad(loss(0.0), list(tensors.values()))
    slope = sum((gradient * direction[name]).sum() for name, gradient in zip(tensors, gradients, strict=True))
    with torch.no_grad():
        difference = (loss(1e-5) - loss(-1e-5)) / 2e-5
    assert slope.item() == pytest.approx(difference.item(), rel=1e-6)


def test_fresh_weights_follow_the_configuration():
    config = tiny_config(embed_dim=64, initializer_range=0.05, layer_scale_init_value=1e-3)
    model = FlorenceVisionModel(config)
    for name, parameter in model.named_parameters():
        if "layer_scale" in name:
            assert_close(parameter.detach(), torch.full_like(parameter, 1e-3))
        elif parameter.ndim > 1:
            assert parameter.std().item() == pytest.approx(0.05, rel=0.25), name
        else:
            assert (parameter == (1 if "norm" in name and name.endswith("weight") else 0)).all(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@torch.no_grad()
def test_pixels_are_cast_to_the_weights(dtype):
    """Processors give float32; a tower in another precision must take it."""
    pixel_values = torch.randn(2, 3, 32, 32)
    exact = tower(tiny_config())(pixel_values).pooler_output
    pooled = tower(tiny_config(), dtype)(pixel_values).pooler_output
    assert pooled.dtype == dtype
    assert_close(pooled.float(), exact, rtol=0.05, atol=0.05)


def test_autocast_trains():
    model = tower(tiny_config(drop_path_rate=0.2)).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(torch.randn(2, 3, 40, 32)).pooler_output.float().square().mean()
    loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


# --------------------------------------------------------------------------------------------- saving and windows


@pytest.mark.parametrize(
    "fields", [{}, {"embed_type": "patch", "window_size": [4, 2]}, {"layer_scale_init_value": 0.1}]
)
@torch.no_grad()
def test_a_saved_tower_comes_back(tmp_path, fields):
    model = tower(tiny_config(**fields))
    model.save_pretrained(tmp_path)
    loaded, report = FlorenceVisionModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    pixel_values = torch.randn(1, 3, 50, 31)
    assert_close(loaded(pixel_values).pooler_output, model(pixel_values).pooler_output)


@torch.no_grad()
def test_windows_can_be_changed(tmp_path):
    model = tower(tiny_config())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.resize_window_size([6, 3])
    for name, tensor in model.state_dict().items():
        expected = before[name]
        if name.endswith("relative_position_bias_table"):
            new_window = (6, 6) if "stages.0" in name else (3, 3)
            expected = resize_relative_position_table(expected, (4, 4), new_window)
        assert_close(tensor, expected, rtol=0, atol=0)
    # A tower that was built with the new windows and given these weights is the same tower.
    rebuilt = FlorenceVisionModel(tiny_config(window_size=[6, 3])).eval()
    rebuilt.load_state_dict(model.state_dict())
    model.save_pretrained(tmp_path)
    loaded = FlorenceVisionModel.from_pretrained(tmp_path)
    assert loaded.config.window_sizes == model.config.window_sizes == [6, 3]
    pixel_values = torch.randn(2, 3, 48, 64)
    for other in (rebuilt, loaded):
        assert_close(model(pixel_values).last_hidden_state, other(pixel_values).last_hidden_state)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_windows_of_a_dual_encoders_tower_are_saved_with_it(tmp_path):
    text = dict(vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    model = FlorenceModel(FlorenceConfig(vision_config=tiny_config(), text_config=text, projection_dim=4)).eval()
    model.vision_model.resize_window_size(8)
    model.save_pretrained(tmp_path)
    loaded = FlorenceModel.from_pretrained(tmp_path)
    pixel_values = torch.randn(1, 3, 64, 64)
    assert_close(loaded(pixel_values=pixel_values).image_embeds, model(pixel_values=pixel_values).image_embeds)


@pytest.mark.parametrize("window_size", [0, -1, [4], [4, 0], "7", 1000, None, 4.0])
def test_an_impossible_window_leaves_the_tower_as_it_was(window_size):
    model = tower(tiny_config())
    tensors, config = copy.deepcopy(model.state_dict()), model.config.to_dict()
    with pytest.raises(ValueError, match="window_size"):
        model.resize_window_size(window_size)
    assert_close(model.state_dict(), tensors, rtol=0, atol=0)
    assert model.config.to_dict() == config


# --------------------------------------------------------------------------------------------------------- backbone


ALL_STAGES = ["stage1", "stage2", "stage3", "stage4"]


@pytest.mark.parametrize("size", [(128, 128), (75, 61)])
@torch.no_grad()
def test_the_backbone_is_transformers_swin_backbone(size):
    """Four feature maps, (batch, channels, height, width), each behind its own norm, in detection's convention."""
    config = swin_config(window_padding="pad", out_features=ALL_STAGES)
    model = randomize(FlorenceBackbone(config)).double()
    shape = dict(embed_dim=8, depths=[2] * 4, num_heads=[2, 2, 4, 4], window_size=4)
    peer = SwinBackbone(SwinConfig(**shape, out_features=ALL_STAGES)).double().eval()
    tower_tensors, norm_tensors = model.vision_model.state_dict(), model.feature_norms.state_dict()
    tensors = {"swin." + rename(key, TRANSFORMERS_SWIN): value for key, value in tower_tensors.items()}
    tensors |= {f"hidden_states_norms.{key}": value for key, value in norm_tensors.items()}
    report = peer.load_state_dict(tensors, strict=False)
    assert report.missing_keys == ["swin.layernorm.weight", "swin.layernorm.bias"] and not report.unexpected_keys
    pixel_values = torch.randn(2, 3, *size, dtype=torch.float64)
    maps, expected = model(pixel_values).feature_maps, peer(pixel_values).feature_maps
    assert [feature.shape[1] for feature in maps] == model.channels == [8, 16, 32, 64]
    assert_close(maps, expected, rtol=0, atol=1e-9)


@torch.no_grad()
def test_the_backbone_gives_the_stages_that_were_asked_for():
    config = tiny_config(depths=[1, 2, 1], num_heads=[2, 2, 2], out_features=["stem", "stage2"])
    model = randomize(FlorenceBackbone(config))
    output = model(torch.randn(2, 3, 40, 24), output_hidden_states=True)
    assert len(output.hidden_states) == 4
    for place, stage, feature in zip((0, 2), config.out_features, output.feature_maps, strict=True):
        expected = model.feature_norms[stage](output.hidden_states[place]).permute(0, 3, 1, 2)
        assert_close(feature, expected)
    assert model(torch.randn(1, 3, 40, 24)).hidden_states is None
    assert len(model(torch.randn(1, 3, 40, 24), return_dict=False)[0]) == 2


def test_every_parameter_of_a_backbone_learns():
    model = randomize(FlorenceBackbone(tiny_config(out_features=["stage1", "stage2"]))).train()
    sum(feature.square().sum() for feature in model(torch.randn(1, 3, 32, 32)).feature_maps).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@torch.no_grad()
def test_the_backbone_takes_a_towers_and_a_dual_encoders_weights(tmp_path):
    model = tower(tiny_config())
    text = dict(vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    pair = FlorenceModel(FlorenceConfig(vision_config=tiny_config(), text_config=text, projection_dim=4))
    pair.vision_model.load_state_dict(model.state_dict())
    pair.save_pretrained(tmp_path / "pair")
    model.save_pretrained(tmp_path / "tower")
    for folder in ("tower", "pair"):
        backbone, report = FlorenceBackbone.from_pretrained(
            tmp_path / folder, out_features=["stage1", "stage2"], output_loading_info=True
        )
        assert backbone.out_features == ["stage1", "stage2"]
        assert all(name.startswith("feature_norms.") for name in report["missing_keys"])
        expected = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("norm.")}
        assert_close(backbone.vision_model.state_dict(), expected, rtol=0, atol=0)
        loaded = FlorenceVisionModel.from_pretrained(tmp_path / folder)
        assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)


# -------------------------------------------------------------------------------------------------------- bad input


PIXELS = torch.zeros(2, 3, 8, 8)
BAD_PIXELS = {
    "nothing": (None, "got NoneType"),
    "an array": (PIXELS.numpy(), "got ndarray"),
    "a list": (PIXELS.tolist(), "got list"),
    "one picture": (PIXELS[0], r"shape \(3, 8, 8\)"),
    "a video": (PIXELS[None], r"shape \(1, 2, 3, 8, 8\)"),
    "grey": (PIXELS[:, :1], r"shape \(2, 1, 8, 8\)"),
    "alpha": (torch.zeros(2, 4, 8, 8), r"shape \(2, 4, 8, 8\)"),
    "channels last": (PIXELS.permute(0, 2, 3, 1), r"shape \(2, 8, 8, 3\)"),
    "bytes": (PIXELS.to(torch.uint8), "got torch.uint8"),
    "integers": (PIXELS.long(), "got torch.int64"),
    "truth values": (PIXELS.bool(), "got torch.bool"),
    "complex": (PIXELS.to(torch.complex64), "got torch.complex64"),
    "an empty batch": (PIXELS[:0], r"at least one picture .* shape \(0, 3, 8, 8\)"),
    "no height": (PIXELS[:, :, :0], r"shape \(2, 3, 0, 8\)"),
    "no width": (PIXELS[..., :0], r"shape \(2, 3, 8, 0\)"),
    "not a number": (PIXELS.index_fill(3, torch.tensor(1), float("nan")), "NaN or infinity"),
    "infinity": (PIXELS.index_fill(3, torch.tensor(1), float("inf")), "NaN or infinity"),
    "both infinities": (torch.tensor([1.0, -1.0]).repeat(2, 3, 8, 4) / 0, "NaN or infinity"),
    "a half-precision infinity": (torch.full((1, 3, 4, 4), float("-inf"), dtype=torch.bfloat16), "NaN or infinity"),
}


@pytest.mark.parametrize("case", BAD_PIXELS)
@pytest.mark.parametrize("model_class", [FlorenceVisionModel, FlorenceBackbone])
def test_bad_pixels_are_refused_at_the_door(case, model_class):
    pixel_values, message = BAD_PIXELS[case]
    model = model_class(tiny_config())
    model.encoder = None  # nothing behind the door may be reached
    with pytest.raises(ValueError, match=message):
        model(pixel_values)


@torch.no_grad()
def test_large_finite_pixels_are_not_taken_for_infinity():
    pixel_values = torch.full((1, 3, 64, 64), torch.finfo(torch.float16).max, dtype=torch.float16)
    assert torch.isfinite(tower(tiny_config())(pixel_values).pooler_output).all()


def test_the_input_embedding_is_a_module_that_gives_a_tensor():
    """Activation checkpointing with adapters hooks it and asks its output for a gradient."""
    for model in (tower(tiny_config()), FlorenceBackbone(tiny_config())):
        assert isinstance(model.get_input_embeddings(), nn.Conv2d)
