# Copyright 2026 The transformers_florence authors. Licensed under the Apache License, Version 2.0.
"""Losses of vision and language (METER, as in Florence section 2.5), and the draw of false pairs, of tensors only."""

from typing import Any

import torch
from torch.nn import functional as F
from transformers.utils.generic import maybe_autocast

IGNORED_TOKEN = -100  # cross entropy's mark of a token that is not to be predicted


def _precise(logits: torch.Tensor) -> torch.Tensor:
    """In float32 at least: the losses of half-precision logits would be as coarse as they are."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def check_labels(labels: Any, shape: tuple[int, ...], *, floating: bool, meaning: str) -> None:
    """Refuse labels of another shape or kind: the door of the losses.

    Raises:
        ValueError: no tensor, another shape, floating where integers belong or the reverse.
    """
    expected = f"{meaning} of shape {shape}, {'floating' if floating else 'integers'}"
    if not isinstance(labels, torch.Tensor):
        raise ValueError(f"expected {expected}, got {type(labels).__name__}")
    if tuple(labels.shape) != shape or labels.is_floating_point() != floating:
        raise ValueError(f"expected {expected}, got {labels.dtype} of shape {tuple(labels.shape)}")


def check_range(values: torch.Tensor, low: float, high: float, meaning: str) -> None:
    """Refuse values out of range, looked at on the CPU only: elsewhere that would wait for the device.

    Raises:
        ValueError: a value below `low`, above `high`, or NaN.
    """
    if values.device.type != "cpu" or torch.compiler.is_compiling() or not values.numel():
        return
    least, most = (value.item() for value in values.aminmax())
    if not low <= least <= most <= high:
        raise ValueError(f"expected {meaning} from {low} to {high}, got {least if not least >= low else most}")


def answer_loss(logits: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Binary cross entropy against soft scores: summed over the answers, averaged over the questions (METER).

    Args:
        logits: (batch, answers), floating.
        scores: (batch, answers), from 0 to 1; how right each answer is. All zeros where every right answer is unknown.

    Returns:
        A float32 (or float64) scalar.
    """
    with maybe_autocast(logits.device.type, enabled=False):
        logits = _precise(logits)
        return F.binary_cross_entropy_with_logits(logits, scores.to(logits.dtype)) * logits.shape[1]


def matching_loss(logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Cross entropy of "no match" (0) and "match" (1), a mean over pairs.

    Args:
        logits: (pairs, 2), floating.
        labels: (pairs,), integers.
        weights: (pairs,), of each pair in the mean; None for equal ones. At least one must not be 0.

    Returns:
        A float32 (or float64) scalar.
    """
    with maybe_autocast(logits.device.type, enabled=False):
        losses = F.cross_entropy(_precise(logits), labels.long(), reduction="none")
        if weights is None:
            return losses.mean()
        weights = weights.to(losses.dtype)
        return (losses * weights).sum() / weights.sum()


def token_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross entropy of the tokens that `labels` name, a mean over them; 0 if they name none.

    Args:
        logits: (batch, tokens, vocabulary), floating.
        labels: (batch, tokens), integers; `IGNORED_TOKEN` where nothing is to be predicted.

    Returns:
        A float32 (or float64) scalar.
    """
    with maybe_autocast(logits.device.type, enabled=False):
        logits, labels = _precise(logits).flatten(0, 1), labels.flatten().long()
        total = F.cross_entropy(logits, labels, ignore_index=IGNORED_TOKEN, reduction="sum")
        return total / (labels != IGNORED_TOKEN).sum().clamp(min=1)  # the mean of nothing would be NaN


def false_pairs(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, labels: torch.Tensor | None = None
) -> torch.Tensor:
    """Which pictures of a batch do not go with which texts: another text, and another label where there are labels.

    Args:
        input_ids: (batch, tokens), integers; text i goes with picture i.
        attention_mask: (batch, tokens), 0 for padding, which does not tell texts apart.
        labels: (batch,), integers; pairs with equal numbers mean the same, as in UniCL, or show the same picture.

    Returns:
        (batch, batch), bool, symmetric.
    """
    texts = input_ids if attention_mask is None else input_ids.masked_fill(attention_mask == 0, -1)
    allowed = (texts[:, None] != texts[None, :]).any(dim=-1)
    return allowed if labels is None else allowed & (labels[:, None] != labels[None, :])


def draw_false_partners(
    allowed: torch.Tensor, similarities: torch.Tensor | None = None, generator: torch.Generator | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """One false partner for each row, the likelier the more it looks like the right one (ALBEF, section 3.2).

    Args:
        allowed: (batch, batch), bool, see `false_pairs`.
        similarities: (batch, batch), logits of a dual encoder, row by row; None for an even draw.
        generator: of the draw; torch's own if None.

    Returns:
        (batch,) columns, int64, and (batch,) bool, whether the row has any partner; where not, the column is 0.
    """
    found = allowed.any(dim=1)
    if similarities is None:
        weights = allowed.float()
    else:
        logits = similarities.detach().float().masked_fill(~allowed, -torch.inf)
        weights = torch.where(found[:, None], logits, 0.0).softmax(dim=1)
    first = torch.zeros_like(weights)
    first[:, 0] = 1.0  # something to draw where nothing is allowed
    weights = torch.where(found[:, None], weights, first)
    return torch.multinomial(weights, 1, generator=generator).squeeze(1), found


__all__ = [
    "IGNORED_TOKEN",
    "answer_loss",
    "check_labels",
    "check_range",
    "draw_false_partners",
    "false_pairs",
    "matching_loss",
    "token_loss",
]
