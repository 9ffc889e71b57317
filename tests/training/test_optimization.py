"""Parameter groups: every trainable parameter in exactly one, and only matrices decay."""

import pytest
import torch
from torch import nn

from tests.tiny_florence import tiny_model, tiny_vision_config
from transformers_florence.training.optimization import parameter_groups


def names_of(model: nn.Module, group: dict) -> set[str]:
    chosen = {id(parameter) for parameter in group["params"]}
    return {name for name, parameter in model.named_parameters() if id(parameter) in chosen}


@pytest.fixture
def model():
    return tiny_model(vision_config=tiny_vision_config(layer_scale_init_value=0.1))


def test_each_parameter_is_in_exactly_one_group(model):
    decayed, kept = parameter_groups(model, 0.05)
    listed = [id(parameter) for parameter in decayed["params"] + kept["params"]]
    assert len(listed) == len(set(listed))
    assert set(listed) == {id(parameter) for parameter in model.parameters()}
    assert decayed["weight_decay"] == 0.05 and kept["weight_decay"] == 0.0


def test_biases_norms_tables_scales_and_the_temperature_do_not_decay(model):
    decayed, kept = (names_of(model, group) for group in parameter_groups(model, 0.05))
    bare = set()
    for name, module in model.named_modules():
        for own in dict(module.named_parameters(recurse=False)):
            is_bare = isinstance(module, nn.LayerNorm) or own in (
                "bias",
                "relative_position_bias_table",
                "layer_scale1",
                "layer_scale2",
                "logit_scale",
            )
            if is_bare:
                bare.add(f"{name}.{own}".lstrip("."))
    assert kept == bare
    assert "logit_scale" in kept and sum("relative_position_bias_table" in name for name in kept) == 3
    assert sum("layer_scale" in name for name in kept) == 6
    for kind in ("q_proj.weight", "fc1.weight", "embeddings.projection.weight", "visual_projection.weight"):
        assert any(name.endswith(kind) for name in decayed), kind
    assert "text_model.embeddings.token_embedding.weight" in decayed


def test_frozen_parameters_are_left_out(model):
    model.text_model.requires_grad_(False)
    groups = [names_of(model, group) for group in parameter_groups(model, 0.05)]
    assert not any(name.startswith("text_model") for group in groups for name in group)
    assert set.union(*groups) == {name for name, weight in model.named_parameters() if weight.requires_grad}


def test_a_shared_weight_is_listed_once():
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    decayed, kept = parameter_groups(nn.Sequential(first, second), 0.05)
    assert [id(parameter) for parameter in decayed["params"]] == [id(first.weight)]
    assert len(kept["params"]) == 2


def test_without_a_gradient_adamw_shrinks_matrices_and_nothing_else(model):
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    torch.optim.AdamW(parameter_groups(model, 0.5), lr=0.1).step()
    for name, parameter in model.named_parameters():
        decays = parameter.ndim > 1 and "bias_table" not in name
        torch.testing.assert_close(parameter.detach(), before[name] * (0.95 if decays else 1.0), msg=name)
