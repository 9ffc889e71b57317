# Copyright 2026 The transformers_florence authors. Licensed under the Apache License, Version 2.0.
"""UniCL, the label-aware contrastive loss of Florence (section 2.2, equations 1 to 3), as functions of tensors."""

from typing import Any

import torch
from torch.nn import functional as F
from transformers.utils.generic import maybe_autocast

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def positive_cross_entropy(logits: torch.Tensor, positives: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood of each row's positives.

    Args:
        logits: (rows, columns), floating.
        positives: (rows, columns), bool; each row has at least one positive.

    Returns:
        (rows,): `-1 / |P(i)| * sum over P(i) of log softmax(logits[i])`, in the dtype of `logits`.
    """
    log_probabilities = F.log_softmax(logits, dim=1)
    counts = positives.sum(dim=1)
    return -log_probabilities.masked_fill(~positives, 0.0).sum(dim=1) / counts


def _kind(value: Any) -> str:
    return str(value.dtype) if isinstance(value, torch.Tensor) else type(value).__name__


def _check_pairs(image_embeds: Any, text_embeds: Any, labels: Any, logit_scale: Any) -> None:
    """Refuse what `unicl_loss` cannot read."""
    for name, value in (("image_embeds", image_embeds), ("text_embeds", text_embeds), ("logit_scale", logit_scale)):
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            raise ValueError(f"the contrastive loss expected {name} as a floating-point tensor, got {_kind(value)}")
    if not isinstance(labels, torch.Tensor) or labels.dtype not in INTEGERS:
        raise ValueError(f"the contrastive loss expected labels as an integer tensor, got {_kind(labels)}")
    if image_embeds.ndim != 2 or text_embeds.shape != image_embeds.shape:
        raise ValueError(
            "the contrastive loss expected as many texts as images, both (batch, dim), got "
            f"{tuple(image_embeds.shape)} image and {tuple(text_embeds.shape)} text embeddings"
        )
    batch = image_embeds.shape[0]
    if batch == 0:
        raise ValueError("the contrastive loss expected at least one image-text pair, got an empty batch")
    if labels.shape != (batch,):
        raise ValueError(f"the contrastive loss expected labels of shape ({batch},), got {tuple(labels.shape)}")
    if logit_scale.numel() != 1:
        raise ValueError(f"the contrastive loss expected a scalar logit_scale, got shape {tuple(logit_scale.shape)}")


def unicl_loss(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    labels: torch.Tensor,
    logit_scale: torch.Tensor,
    reduction: str = "mean",
) -> torch.Tensor:
    """Label-aware contrastive loss: every image and every text that carry the same label are positives.

    Unique labels give CLIP's loss exactly.

    Args:
        image_embeds: (batch, dim), unit length.
        text_embeds: (batch, dim), unit length; row i belongs to image i.
        labels: (batch,), integers; equal numbers mean equal meaning.
        logit_scale: scalar, the factor on the cosine similarities (the exponential of the learnt logarithm).
        reduction: `"mean"` averages over the batch and over both directions (UniCL's pseudo-code); `"sum"` adds
            over the batch and over both directions (the paper), so it is `2 * batch` times the mean.

    Returns:
        A float32 (or float64) scalar.

    Raises:
        ValueError: shapes that do not match, an empty batch, embeddings that are not floating-point, labels that are
            not integers, a scale that is not a scalar, another reduction.
    """
    _check_pairs(image_embeds, text_embeds, labels, logit_scale)
    if reduction not in ("mean", "sum"):
        raise ValueError(f"expected reduction 'mean' or 'sum', got {reduction!r}")
    # Half precision would round a logit of 100 by up to 0.25: similarities and softmax run in float32, also where
    # a trainer's autocast would turn the product back to half precision.
    dtype = torch.promote_types(image_embeds.dtype, torch.float32)
    with maybe_autocast(image_embeds.device.type, enabled=False):
        logits = logit_scale.to(dtype) * (image_embeds.to(dtype) @ text_embeds.to(dtype).T)
        positives = labels[:, None] == labels[None, :]
        image_to_text = positive_cross_entropy(logits, positives)
        text_to_image = positive_cross_entropy(logits.T, positives)
        if reduction == "sum":
            return image_to_text.sum() + text_to_image.sum()
        return (image_to_text.mean() + text_to_image.mean()) / 2


__all__ = ["positive_cross_entropy", "unicl_loss"]
