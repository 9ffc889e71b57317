"""Parameter groups for AdamW as the originals use them."""

from torch import nn


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups: matrices decay; vectors and scalars (biases, norms, temperature) and bias tables do not.

    UniCL spells the names of its exceptions so that they never match and its relative position tables decay;
    Swin, whose tower it is, leaves them out, and so does this.
    """
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        bare = parameter.ndim < 2 or name.endswith("relative_position_bias_table")
        (kept if bare else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]


__all__ = ["parameter_groups"]
