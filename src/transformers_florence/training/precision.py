"""Half-precision computation with float32 master weights."""

from typing import Any

import torch
from accelerate.utils import parse_flag_from_env
from torch import nn
from torch.func import functional_call

KEPT = ("logit_scale", "logit_bias", "prototypes")


def cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware (AVX-512 BF16 or AMX)."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def computing_dtype(precision: str) -> torch.dtype:
    """What a model computes in.

    Args:
        precision: name of a dtype of torch; or "auto", bfloat16 where the processor has it and float32 elsewhere.
    """
    if precision != "auto":
        return getattr(torch, precision)
    with_accelerator = torch.accelerator.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")
    return torch.bfloat16 if with_accelerator or cpu_has_bfloat16() else torch.float32


class Bfloat16Forward(nn.Module):
    """Runs a model with bfloat16 copies of its float32 weights; gradients and updates stay in float32.

    Unlike autocast, activations are bfloat16 from end to end: norms and residuals move half the bytes, and no
    activation is cast twice. On a CPU a step of a small window tower takes about 0.6 times autocast's time. Not with
    activation checkpointing, which would compute a layer again with the weights as they are.

    Args:
        model: float32 weights; what logits are made of directly is left in float32, because rounding it would move
            all of them: the temperature, the bias, label prototypes.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What `model` returns for the same arguments."""
        weights = {
            name: weight if name.endswith(KEPT) else weight.to(torch.bfloat16)
            for name, weight in self.model.named_parameters()
        }
        return functional_call(self.model, weights, args, kwargs)


__all__ = ["Bfloat16Forward", "computing_dtype", "cpu_has_bfloat16"]
