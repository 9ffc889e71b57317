# Copyright 2026 The transformers_florence authors. Licensed under the Apache License, Version 2.0.
"""UniCL, the label-aware contrastive loss of Florence (section 2.2, equations 1 to 3), as functions of tensors.

Beside it the sigmoid loss of SigLIP (Zhai et al. 2023) with UniCL's idea of a positive. Both exist for a whole batch
and as rows: a part of the queries against all keys, which is what a rank, or a block of rows, has of a larger batch.
"""

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


def check_pairs(image_embeds: Any, text_embeds: Any, labels: Any, reduction: Any, **scalars: Any) -> None:
    """Refuse what a contrastive loss cannot read, but an empty batch: it may be one rank's part of a larger one.

    Args:
        scalars: `logit_scale`, and `logit_bias` where the loss has one.

    Raises:
        ValueError: see `unicl_loss`.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"expected reduction 'mean' or 'sum', got {reduction!r}")
    for name, value in {"image_embeds": image_embeds, "text_embeds": text_embeds, **scalars}.items():
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
    if labels.shape != (batch,):
        raise ValueError(f"the contrastive loss expected labels of shape ({batch},), got {tuple(labels.shape)}")
    for name, value in scalars.items():
        if value.numel() != 1:
            raise ValueError(f"the contrastive loss expected a scalar {name}, got shape {tuple(value.shape)}")


def check_not_empty(pairs: int) -> None:
    """Refuse a batch without pairs, of which no loss can be a mean.

    Raises:
        ValueError: `pairs` is 0.
    """
    if pairs == 0:
        raise ValueError("the contrastive loss expected at least one image-text pair, got an empty batch")


def similarities(queries: torch.Tensor, keys: torch.Tensor, logit_scale: torch.Tensor) -> torch.Tensor:
    """Scaled cosines in float32: half precision would round a logit of 100 by up to 0.25.

    Args:
        queries: (rows, dim), unit length.
        keys: (columns, dim), unit length.
        logit_scale: scalar.

    Returns:
        (rows, columns), float32 (or float64).
    """
    dtype = torch.promote_types(queries.dtype, torch.float32)
    return logit_scale.to(dtype) * (queries.to(dtype) @ keys.to(dtype).T)


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
    check_pairs(image_embeds, text_embeds, labels, reduction, logit_scale=logit_scale)
    check_not_empty(len(labels))
    with maybe_autocast(image_embeds.device.type, enabled=False):  # a trainer's would bring half precision back
        logits = similarities(image_embeds, text_embeds, logit_scale)
        positives = labels[:, None] == labels[None, :]
        image_to_text = positive_cross_entropy(logits, positives)
        text_to_image = positive_cross_entropy(logits.T, positives)
        if reduction == "sum":
            return image_to_text.sum() + text_to_image.sum()
        return (image_to_text.mean() + text_to_image.mean()) / 2


def unicl_rows(
    queries: torch.Tensor,
    keys: torch.Tensor,
    query_labels: torch.Tensor,
    key_labels: torch.Tensor,
    logit_scale: torch.Tensor,
) -> torch.Tensor:
    """One direction of UniCL for some rows of a batch. Summed over all rows of both directions: `unicl_loss`'s sum.

    Args:
        queries: (rows, dim), unit length: some of the images (or texts).
        keys: (batch, dim), unit length: all texts (or images), the partners of the queries among them.
        query_labels: (rows,), integers; key_labels: (batch,), integers.
        logit_scale: scalar.

    Returns:
        (rows,), float32 (or float64).
    """
    with maybe_autocast(queries.device.type, enabled=False):
        positives = query_labels[:, None] == key_labels[None, :]
        return positive_cross_entropy(similarities(queries, keys, logit_scale), positives)


def sigmoid_rows(
    queries: torch.Tensor,
    keys: torch.Tensor,
    query_labels: torch.Tensor,
    key_labels: torch.Tensor,
    logit_scale: torch.Tensor,
    logit_bias: torch.Tensor,
) -> torch.Tensor:
    """The sigmoid loss of some images against all texts. Summed over all images: `sigmoid_loss`'s sum.

    Arguments as for `unicl_rows`, and logit_bias: scalar.

    Returns:
        (rows,), float32 (or float64).
    """
    with maybe_autocast(queries.device.type, enabled=False):
        logits = similarities(queries, keys, logit_scale)
        logits = logits + logit_bias.to(logits.dtype)
        positives = query_labels[:, None] == key_labels[None, :]
        return -F.logsigmoid(torch.where(positives, logits, -logits)).sum(dim=1)


def sigmoid_loss(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    labels: torch.Tensor,
    logit_scale: torch.Tensor,
    logit_bias: torch.Tensor,
    reduction: str = "mean",
) -> torch.Tensor:
    """Every image with every text a question of its own, yes where the labels are equal (SigLIP, algorithm 1).

    Unique labels give SigLIP's loss exactly.

    Args:
        image_embeds, text_embeds, labels, logit_scale: as for `unicl_loss`.
        logit_bias: scalar, added to every logit; SigLIP learns it from -10, with the scale from 10, so that the many
            negatives of the first steps cost little.
        reduction: `"sum"` adds over all pairs of an image and a text, `"mean"` divides that by the batch (SigLIP).

    Returns:
        A float32 (or float64) scalar.

    Raises:
        ValueError: as `unicl_loss`; the bias must be a scalar as the scale must.
    """
    check_pairs(image_embeds, text_embeds, labels, reduction, logit_scale=logit_scale, logit_bias=logit_bias)
    check_not_empty(len(labels))
    rows = sigmoid_rows(image_embeds, text_embeds, labels, labels, logit_scale, logit_bias)
    return rows.sum() if reduction == "sum" else rows.mean()


__all__ = [
    "check_not_empty",
    "check_pairs",
    "positive_cross_entropy",
    "sigmoid_loss",
    "sigmoid_rows",
    "similarities",
    "unicl_loss",
    "unicl_rows",
]
