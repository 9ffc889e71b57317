"""Parameter groups for AdamW as the originals use them, layer-wise rates, and a running average of the weights."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..modeling_florence_text import FlorenceTextModel
from ..modeling_florence_video import FlorenceVideoModel
from ..modeling_florence_vision import FlorenceVisionModel

# Matrices that are added like a bias, one row a position or a kind of token: they never decay.
BIAS_TABLES = ("relative_position_bias_table", "token_type_embeddings")
VISION_LAYER = re.compile(r"encoder\.stages\.(\d+)\.(?:layers\.(\d+)|embed)\.")
TEXT_LAYER = re.compile(r"encoder\.layers\.(\d+)\.")


def _level_in_tower(name: str, tower: FlorenceTextModel | FlorenceVideoModel | FlorenceVisionModel) -> tuple[int, int]:
    """Level of a parameter of a tower, from 0 for its embeddings, and the tower's highest level.

    A stage's token embedding belongs to the first layer of the stage, and the final norm to the last layer.
    """
    if isinstance(tower, FlorenceVideoModel | FlorenceVisionModel):
        depths = tower.config.depths
        match = VISION_LAYER.match(name)
        top = sum(depths)
        level = None if match is None else sum(depths[: int(match[1])]) + int(match[2] or 0) + 1
    else:
        match = TEXT_LAYER.match(name)
        top = tower.config.num_hidden_layers
        level = None if match is None else int(match[1]) + 1
    if level is None:
        level = 0 if name.startswith("embeddings.") else top
    return level, top


def layers_to_output(model: nn.Module) -> dict[str, int]:
    """How many layers lie between each parameter and the output, for rates that fall layer by layer.

    0 for whatever lies outside of the towers (projections, temperature, heads), 1 for a tower's last layer and its
    final norm, one more for each layer below; a stage's token embedding counts with the stage's first layer, and the
    embeddings come last. These are timm's groups for Swin, and BEiT's (Bao et al. 2022) but for the final norm, which
    is a new layer there. Each tower is counted by its own depth.

    Args:
        model: a tower, or anything that holds towers.

    Returns:
        Name of the parameter -> number of layers.
    """
    kinds = (FlorenceTextModel, FlorenceVideoModel, FlorenceVisionModel)
    towers = {path: module for path, module in model.named_modules() if isinstance(module, kinds)}
    above = {}
    for name, _ in model.named_parameters():
        above[name] = 0
        for path, tower in towers.items():
            prefix = f"{path}." if path else ""
            if name.startswith(prefix):
                level, top = _level_in_tower(name.removeprefix(prefix), tower)
                above[name] = top + 1 - level
    return above


def parameter_groups(
    model: nn.Module,
    weight_decay: float,
    learning_rates: Mapping[str, float] | None = None,
    no_decay: Sequence[str] = (),
    *,
    learning_rate: float | None = None,
    layer_decay: float = 1.0,
) -> list[dict[str, Any]]:
    """Matrices decay; vectors and scalars (biases, norms, temperature) and `BIAS_TABLES` do not.

    UniCL spells the names of its exceptions so that they never match and its relative position tables decay;
    Swin, whose tower it is, leaves them out, and so does this.

    Args:
        model: parameters that need no gradient are left out.
        weight_decay: of the matrices.
        learning_rates: rates of the parameters whose names contain the key, such as `{"text_model.": 1e-4}`; the first
            key that fits counts.
        no_decay: matrices whose names contain one of these do not decay either, such as `("token_embedding",)`.
        learning_rate: of the parameters that no key fits; without it they take the optimizer's rate.
        layer_decay: factor of a parameter's rate for each of its `layers_to_output`; 1 for equal rates.

    Returns:
        One group of decaying and one of other parameters for each rate that is used.

    Raises:
        ValueError: a layer decay that is not above 0 and at most 1, or one below 1 without a learning rate.
    """
    if not 0 < layer_decay <= 1:
        raise ValueError(f"layer_decay: expected a number above 0 and at most 1, got {layer_decay}")
    if layer_decay < 1 and learning_rate is None:
        raise ValueError("expected learning_rate together with layer_decay, got None")
    above = layers_to_output(model) if layer_decay < 1 else {}
    groups: dict[tuple[float | None, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        rate = next((rate for key, rate in (learning_rates or {}).items() if key in name), learning_rate)
        if rate is not None:
            rate *= layer_decay ** above.get(name, 0)
        exempt = any(key in name for key in (*BIAS_TABLES, *no_decay))
        # ZeRO-3 keeps a part of each matrix, as a vector, and its shape beside it.
        decays = len(getattr(parameter, "ds_shape", parameter.shape)) >= 2 and not exempt
        group = groups.setdefault((rate, decays), {"params": [], "weight_decay": weight_decay if decays else 0.0})
        group["params"].append(parameter)
        if rate is not None:
            group["lr"] = rate
    return list(groups.values())


def moving_average(model: nn.Module, decay: float, device: torch.device | None = None) -> AveragedModel:
    """An exponential moving average of a model's weights, often better than the weights themselves.

    Call its `update_parameters(model)` after each step; the first call copies. `.module` is the averaged model, and
    `save_checkpoint` takes the whole under `modules`. Buffers are copied, not averaged. The weights must be whole on
    each rank: not with ZeRO-3 or FSDP.

    Args:
        decay: how much of the average stays at each step.
        device: where the average is kept; the model's if None.

    Raises:
        ValueError: a decay that is not above 0 and below 1, or a model whose weights are partitioned.
    """
    if not 0 < decay < 1:
        raise ValueError(f"decay: expected a number above 0 and below 1, got {decay}")
    if any(hasattr(parameter, "ds_shape") for parameter in model.parameters()):
        raise ValueError("expected whole weights to average, got weights that ZeRO-3 has partitioned")
    return AveragedModel(model, device=device, multi_avg_fn=get_ema_multi_avg_fn(decay))


__all__ = ["layers_to_output", "moving_average", "parameter_groups"]
