"""Parameter groups: each trainable parameter in exactly one, only matrices decay, lower layers may learn slower."""

import re

import pytest
import torch
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_layer_decay
from torch import nn

from tests.tiny_florence import tiny_model, tiny_text_config, tiny_vision_config
from transformers_florence import FlorenceForImageClassification
from transformers_florence.training.optimization import layers_to_output, moving_average, parameter_groups


@pytest.fixture
def model():
    return tiny_model(vision_config=tiny_vision_config(layer_scale_init_value=0.1))


def settings_of(model: nn.Module, groups: list[dict]) -> dict[str, tuple[float, float | None]]:
    """Name -> weight decay and learning rate of its group (None for the optimizer's); none may be in two groups."""
    listed = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(listed) == len(set(listed))
    group_of = {id(parameter): group for group in groups for parameter in group["params"]}
    settings = {}
    for name, parameter in model.named_parameters():
        if id(parameter) in group_of:
            group = group_of[id(parameter)]
            settings[name] = (group["weight_decay"], group.get("lr"))
    assert len(settings) == len(listed), "a parameter that is not the model's"
    return settings


def bare_names(model: nn.Module) -> set[str]:
    """Biases, norms, bias tables, layer scales and the temperature, by the modules that own them."""
    owned = ("bias", "relative_position_bias_table", "layer_scale1", "layer_scale2", "logit_scale")
    return {
        f"{path}.{name}".lstrip(".")
        for path, module in model.named_modules()
        for name, _ in module.named_parameters(recurse=False)
        if isinstance(module, nn.LayerNorm) or name in owned
    }


def test_each_parameter_is_in_exactly_one_group_and_only_matrices_decay(model):
    groups = parameter_groups(model, 0.05)
    assert len(groups) == 2
    settings = settings_of(model, groups)
    bare = bare_names(model)
    assert settings == {name: (0.0 if name in bare else 0.05, None) for name, _ in model.named_parameters()}
    assert "logit_scale" in bare and sum("relative_position_bias_table" in name for name in bare) == 3
    assert sum("layer_scale" in name for name in bare) == 6
    for kind in ("q_proj.weight", "fc1.weight", "embeddings.projection.weight", "token_embedding.weight"):
        assert any(name.endswith(kind) and decay == 0.05 for name, (decay, _) in settings.items()), kind


def test_towers_take_their_own_rate_and_the_rest_the_optimizers(model):
    groups = parameter_groups(model, 0.05, {"text_model.": 0.1, "projection.": 0.2, "text_": 0.3})
    settings, bare = settings_of(model, groups), bare_names(model)
    assert set(settings) == {name for name, _ in model.named_parameters()}
    for name, (decay, rate) in settings.items():
        # `vision_model.embeddings.projection.weight` has a key in its middle, `text_projection.weight` has two.
        wanted = 0.1 if "text_model." in name else 0.2 if "projection." in name else None
        assert (decay, rate) == (0.0 if name in bare else 0.05, wanted), name
    optimizer = torch.optim.AdamW(groups, lr=0.7)
    assert {group["lr"] for group in optimizer.param_groups} == {0.1, 0.2, 0.7}


def test_named_matrices_can_be_kept_from_decaying(model):
    settings = settings_of(model, parameter_groups(model, 0.05, {"text_model.": 0.1}, no_decay=("token_embedding",)))
    spared = bare_names(model) | {"text_model.embeddings.token_embedding.weight"}
    for name, (decay, rate) in settings.items():
        assert (decay, rate) == (0.0 if name in spared else 0.05, 0.1 if "text_model." in name else None), name


def test_a_rate_of_nothing_freezes(model):
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW(parameter_groups(model, 0.5, {"text_model.": 0.0}), lr=0.1).step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.detach(), before[name]) == name.startswith("text_model."), name


def test_frozen_parameters_are_left_out(model):
    model.text_model.requires_grad_(False)
    settings = settings_of(model, parameter_groups(model, 0.05))
    assert set(settings) == {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert settings and not any(name.startswith("text_model") for name in settings)


def test_a_shared_weight_is_listed_once():
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    decayed, kept = sorted(
        parameter_groups(nn.Sequential(first, second), 0.05), key=lambda group: -group["weight_decay"]
    )
    assert [id(parameter) for parameter in decayed["params"]] == [id(first.weight)]
    assert len(kept["params"]) == 2


def test_without_a_gradient_adamw_shrinks_matrices_and_nothing_else(model):
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    torch.optim.AdamW(parameter_groups(model, 0.5), lr=0.1).step()
    bare = bare_names(model)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name] * (1.0 if name in bare else 0.95), msg=name)


def test_token_type_tables_do_not_decay():
    model = nn.ModuleDict({"token_type_embeddings": nn.Embedding(2, 3), "token_embedding": nn.Embedding(5, 3)})
    settings = settings_of(model, parameter_groups(model, 0.05))
    assert settings == {"token_type_embeddings.weight": (0.0, None), "token_embedding.weight": (0.05, None)}


def test_partitioned_matrices_decay():
    """ZeRO-3 leaves an empty vector in a parameter's place, and notes the shape."""
    model = nn.Linear(4, 3)
    for parameter in model.parameters():
        parameter.ds_shape = parameter.shape
        parameter.data = torch.empty(0)
    assert settings_of(model, parameter_groups(model, 0.05)) == {"weight": (0.05, None), "bias": (0.0, None)}
    with pytest.raises(ValueError, match="expected whole weights to average"):
        moving_average(model, 0.9)


# Layer-wise rates


def timm_scales(model: nn.Module, decay: float) -> dict[str, tuple[float, bool]]:
    """Name -> timm's factor of the learning rate, and whether the parameter decays."""
    no_decay = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    groups = param_groups_layer_decay(model, weight_decay=0.05, layer_decay=decay, no_weight_decay_list=no_decay)
    group_of = {id(parameter): group for group in groups for parameter in group["params"]}
    return {
        name: (group_of[id(parameter)]["lr_scale"], group_of[id(parameter)]["weight_decay"] > 0)
        for name, parameter in model.named_parameters()
    }


def by_unit(scales: dict[str, tuple[float, bool]], units: dict[str, str]) -> dict[str, set[float]]:
    """Embedding, layer, norm or head -> the factors of its parameters; `units` are patterns and what they become."""
    found: dict[str, set[float]] = {}
    for name, (scale, _) in scales.items():
        unit = next(re.sub(f"^{pattern}.*", to, name) for pattern, to in units.items() if re.match(pattern, name))
        found.setdefault(unit, set()).add(round(scale, 12))
    return found


def own_scales(model: nn.Module, decay: float) -> dict[str, tuple[float, bool]]:
    groups = parameter_groups(model, 0.05, learning_rate=1.0, layer_decay=decay)
    return {name: (rate, weight > 0) for name, (weight, rate) in settings_of(model, groups).items()}


def test_layer_wise_rates_of_the_image_tower_are_timms_for_swin():
    depths = [2, 1, 3]
    config = tiny_vision_config(depths=depths, num_heads=[1, 1, 2], window_size=2, embed_type="patch", num_labels=3)
    ours = own_scales(FlorenceForImageClassification(config), 0.7)
    swin = SwinTransformer(img_size=32, embed_dim=8, depths=depths, num_heads=[1, 1, 2], window_size=2, num_classes=3)
    theirs = timm_scales(swin, 0.7)
    units = by_unit(
        ours,
        {
            r"vision_model\.embeddings": "stem",
            r"vision_model\.encoder\.stages\.(\d)\.embed": r"merge \1",
            r"vision_model\.encoder\.stages\.(\d)\.layers\.(\d)": r"layer \1 \2",
            r"vision_model\.norm": "norm",
            "classifier": "head",
        },
    )
    assert units == by_unit(
        theirs,
        {
            "patch_embed": "stem",
            r"layers\.(\d)\.downsample": r"merge \1",
            r"layers\.(\d)\.blocks\.(\d)": r"layer \1 \2",
            "norm": "norm",
            "head": "head",
        },
    )
    assert len(units) == 1 + 2 + 6 + 1 + 1 and units["stem"] == {round(0.7**7, 12)} and units["head"] == {1.0}
    # The same parameters decay, too: qkv is one matrix there and three here.
    assert sum(decays for _, decays in ours.values()) == sum(decays for _, decays in theirs.values()) + 2 * 6


def test_layer_wise_rates_of_the_text_tower_are_timms_for_a_transformer(model):
    ours = own_scales(tiny_model(text_config=tiny_text_config(num_hidden_layers=3)), 0.6)
    ours = {name: scale for name, scale in ours.items() if name.startswith("text_")}
    vit = VisionTransformer(img_size=8, patch_size=4, embed_dim=16, depth=3, num_heads=2, num_classes=3)
    units = by_unit(
        ours,
        {
            r"text_model\.embeddings": "stem",
            r"text_model\.encoder\.layers\.(\d)": r"layer \1",
            r"text_model\.final_layer_norm": "norm",
            "text_projection": "head",
        },
    )
    patterns = {
        "(patch_embed|pos_embed|cls_token)": "stem",
        r"blocks\.(\d)": r"layer \1",
        "norm": "norm",
        "head": "head",
    }
    assert units == by_unit(timm_scales(vit, 0.6), patterns)
    assert units["stem"] == {round(0.6**4, 12)}


def test_each_tower_is_counted_by_its_own_depth_wherever_it_stands(model):
    wrapped = nn.ModuleDict({"objective": nn.ModuleDict({"model": model}), "head": nn.Linear(2, 2)})
    above = layers_to_output(wrapped)
    inner = {name.removeprefix("objective.model."): count for name, count in above.items()}
    assert inner == layers_to_output(model) | {"head.weight": 0, "head.bias": 0}
    for name, count in {  # 1 + 2 layers in the image tower, 2 in the text tower
        "vision_model.embeddings.projection.weight": 4,
        "vision_model.encoder.stages.0.layers.0.norm1.weight": 3,
        "vision_model.encoder.stages.1.embed.projection.weight": 2,
        "vision_model.encoder.stages.1.layers.0.mlp.fc1.weight": 2,
        "vision_model.encoder.stages.1.layers.1.attention.relative_position_bias_table": 1,
        "vision_model.norm.weight": 1,
        "text_model.embeddings.position_embedding.weight": 3,
        "text_model.encoder.layers.0.mlp.fc1.bias": 2,
        "text_model.encoder.layers.1.mlp.fc1.bias": 1,
        "text_model.final_layer_norm.bias": 1,
        "visual_projection.weight": 0,
        "text_projection.weight": 0,
        "logit_scale": 0,
    }.items():
        assert inner[name] == count, name
    tower = layers_to_output(model.vision_model)
    assert tower == {
        name.removeprefix("vision_model."): count for name, count in inner.items() if name.startswith("vision_model.")
    }


def test_layer_wise_rates_multiply_named_ones(model):
    groups = parameter_groups(model, 0.05, {"text_model.": 0.1}, learning_rate=0.7, layer_decay=0.5)
    above = layers_to_output(model)
    for name, (_, rate) in settings_of(model, groups).items():
        assert rate == (0.1 if "text_model." in name else 0.7) * 0.5 ** above[name], name
    schedule = torch.optim.lr_scheduler.LambdaLR(torch.optim.AdamW(groups), lambda step: 0.5)
    assert sorted(schedule.get_last_lr()) == sorted(
        0.5 * group["lr"]
        for group in parameter_groups(model, 0.05, {"text_model.": 0.1}, learning_rate=0.7, layer_decay=0.5)
    )


def test_one_rate_for_all_is_written_down_too(model):
    assert {rate for _, rate in settings_of(model, parameter_groups(model, 0.05, learning_rate=0.3)).values()} == {0.3}


def test_bad_layer_decays_are_refused(model):
    for decay in (0, -1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=f"layer_decay: expected a number above 0 and at most 1, got {decay}"):
            parameter_groups(model, 0.05, learning_rate=1.0, layer_decay=decay)
    with pytest.raises(ValueError, match="expected learning_rate together with layer_decay, got None"):
        parameter_groups(model, 0.05, layer_decay=0.9)


# The average


def test_the_average_is_the_weighted_sum_of_all_weights():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    average = moving_average(model, 0.75)
    seen = []
    for step in range(5):
        with torch.no_grad():
            model[0].weight.normal_()
            model[1].running_mean.fill_(step)
        average.update_parameters(model)
        seen.append(model[0].weight.detach().double())
    factors = [0.75**4] + [0.25 * 0.75 ** (4 - step) for step in range(1, 5)]  # the first is copied
    expected = sum(factor * weight for factor, weight in zip(factors, seen, strict=True))
    torch.testing.assert_close(average.module[0].weight.detach().double(), expected, rtol=0, atol=1e-6)
    assert average.module[1].running_mean.tolist() == [4, 4], "buffers are copied"
    assert not any(parameter is other for parameter in model.parameters() for other in average.parameters())


def test_bad_decays_of_the_average_are_refused():
    for decay in (0, 1, -0.1, float("nan")):
        with pytest.raises(ValueError, match=f"decay: expected a number above 0 and below 1, got {decay}"):
            moving_average(nn.Linear(1, 1), decay)
