"""Parameter groups: every trainable parameter in exactly one, only matrices decay, and towers may learn slower."""

import pytest
import torch
from torch import nn

from tests.tiny_florence import tiny_model, tiny_vision_config
from transformers_florence.training.optimization import parameter_groups


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
