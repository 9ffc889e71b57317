"""Parameter groups for AdamW as the originals use them."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn


def parameter_groups(
    model: nn.Module,
    weight_decay: float,
    learning_rates: Mapping[str, float] | None = None,
    no_decay: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Matrices decay; vectors and scalars (biases, norms, temperature) and bias tables do not.

    UniCL spells the names of its exceptions so that they never match and its relative position tables decay;
    Swin, whose tower it is, leaves them out, and so does this.

    Args:
        model: parameters that need no gradient are left out.
        weight_decay: of the matrices.
        learning_rates: rates of the parameters whose names contain the key, such as `{"text_model.": 1e-4}`; the first
            key that fits counts, and parameters that none fits take the optimizer's rate.
        no_decay: matrices whose names contain one of these do not decay either.

    Returns:
        One group of decaying and one of other parameters for each rate that is used.
    """
    groups: dict[tuple[float | None, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        rate = next((rate for key, rate in (learning_rates or {}).items() if key in name), None)
        exempt = name.endswith("relative_position_bias_table") or any(key in name for key in no_decay)
        decays = parameter.ndim >= 2 and not exempt
        group = groups.setdefault((rate, decays), {"params": [], "weight_decay": weight_decay if decays else 0.0})
        group["params"].append(parameter)
        if rate is not None:
            group["lr"] = rate
    return list(groups.values())


__all__ = ["parameter_groups"]
