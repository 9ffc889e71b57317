"""Contrastive losses over the batches of all ranks: UniCL, its case CLIP, and the sigmoid loss.

Every pair of the global batch is a negative (or, with an equal label, a positive) of every other, whichever rank it
came from. A rank holds its own rows of the logits only, and of those a block at a time, so that memory grows with
neither the ranks nor the batch; what it gathers are embeddings and labels.

Gradients are those of one process with the whole batch, once they are averaged over the ranks as
`DistributedDataParallel`, DeepSpeed's ZeRO and FSDP average them. Ranks may have different numbers of rows, as in the
last batch of an epoch, and a rank may have none: the mean is over all pairs there are, each with the same weight.
Without an initialised process group, or in a group of one, nothing is communicated.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..losses_contrastive import check_not_empty, check_pairs, sigmoid_rows, unicl_rows

BLOCK_LOGITS = 2**21  # as many logits are held at once, a few times: 8 MiB in float32


def ranks_in(group: dist.ProcessGroup | None = None) -> int:
    """How many ranks share a batch: those of the group, of all if it is None; 1 where nothing is initialised."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def rows_of_ranks(rows: int, device: torch.device, group: dist.ProcessGroup | None = None) -> list[int]:
    """How many rows each rank of the group has, this one `rows`; `device` is one that the group communicates from."""
    ranks = ranks_in(group)
    if ranks == 1:
        return [rows]
    counts = torch.empty(ranks, dtype=torch.int64, device=device)
    dist.all_gather_into_tensor(counts, torch.tensor([rows], device=device), group=group)
    return counts.tolist()


class _AllGather(torch.autograd.Function):
    """Equal parts of all ranks, one below the other; the gradient of a part is the sum of what all ranks have for it.

    torch has this, but torch.distributed.nn.all_gather is deprecated for a function of a private module that has
    another name in each of the releases we support.
    """

    @staticmethod
    def forward(ctx: Any, part: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
        ctx.group = group
        whole = part.new_empty((ranks_in(group) * part.shape[0], *part.shape[1:]))
        dist.all_gather_into_tensor(whole, part.contiguous(), group=group)
        return whole

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        (whole,) = gradients
        part = whole.new_empty((whole.shape[0] // ranks_in(ctx.group), *whole.shape[1:]))
        dist.reduce_scatter_tensor(part, whole.contiguous(), group=ctx.group)
        return part, None


def gather_rows(rows: torch.Tensor, counts: list[int], group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """The rows of all ranks, in the order of the ranks, with gradient.

    Args:
        rows: (counts[rank], ...), this rank's.
        counts: of `rows_of_ranks`.

    Returns:
        (sum(counts), ...). Its gradient reaches every rank's rows, summed over the ranks.
    """
    if len(counts) == 1:
        return rows
    longest = max(counts)
    padding = (0, 0) * (rows.ndim - 1) + (0, longest - rows.shape[0])
    whole = _AllGather.apply(F.pad(rows, padding), group)  # (ranks * longest, ...)
    if min(counts) == longest:
        return whole
    return torch.cat([part[:count] for part, count in zip(whole.split(longest), counts, strict=True)])


def _sum_of_rows(
    row_loss: Callable[..., torch.Tensor],
    queries: torch.Tensor,
    keys: torch.Tensor,
    query_labels: torch.Tensor,
    key_labels: torch.Tensor,
    *scalars: torch.Tensor,
) -> torch.Tensor:
    """`row_loss` summed over the queries, in blocks of rows whose logits are made again on the way back."""
    rows = max(1, BLOCK_LOGITS // keys.shape[0])
    if queries.shape[0] <= rows:
        return row_loss(queries, keys, query_labels, key_labels, *scalars).sum()

    def sum_of_block(block: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return row_loss(block, keys, labels, key_labels, *scalars).sum()

    sums = [
        checkpoint(sum_of_block, block, labels, use_reentrant=False, preserve_rng_state=False)
        for block, labels in zip(queries.split(rows), query_labels.split(rows), strict=True)
    ]
    return torch.stack(sums).sum()


def _checked_counts(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    labels: torch.Tensor | None,
    reduction: str,
    group: dist.ProcessGroup | None,
    **scalars: torch.Tensor,
) -> list[int]:
    """How many pairs each rank has, if all of the loss's arguments are what it can read."""
    if labels is None and isinstance(image_embeds, torch.Tensor):
        labels = torch.zeros(image_embeds.shape[:1], dtype=torch.int64)
    check_pairs(image_embeds, text_embeds, labels, reduction, **scalars)
    counts = rows_of_ranks(image_embeds.shape[0], image_embeds.device, group)
    check_not_empty(sum(counts))
    return counts


def _labels_of_all(
    labels: torch.Tensor | None, counts: list[int], device: torch.device, group: dist.ProcessGroup | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's labels and those of all ranks; None stands for labels of which each occurs once."""
    if labels is not None:
        return labels, gather_rows(labels.to(torch.int64), counts, group)
    everything = torch.arange(sum(counts), device=device)
    return everything.split(counts)[dist.get_rank(group) if len(counts) > 1 else 0], everything


def _over_ranks(share: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """The sum of all ranks' shares, on each; its gradient is the one whose average over the ranks is the sum's."""
    ranks = ranks_in(group)
    if ranks == 1:
        return share
    total = share.detach().clone()
    dist.all_reduce(total, group=group)
    return total + ranks * (share - share.detach())


def global_unicl_loss(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    labels: torch.Tensor | None,
    logit_scale: torch.Tensor,
    *,
    reduction: str = "mean",
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """`unicl_loss` of the pairs of all ranks, equal on all of them. A collective: every rank of the group calls it.

    Args:
        image_embeds: (rows, dim), unit length: this rank's, any number of them.
        text_embeds: (rows, dim), unit length; row i belongs to image i.
        labels: (rows,), integers that mean the same on all ranks; None on all of them for CLIP's loss, in which every
            pair is its own meaning.
        logit_scale: scalar, equal on all ranks.
        reduction: `"mean"` or `"sum"`, over the global batch, as in `unicl_loss`.
        group: the ranks that share the batch and average their gradients; None for all.

    Returns:
        A float32 (or float64) scalar, the loss of the global batch.

    Raises:
        ValueError: as `unicl_loss`; of batches, only the global one must not be empty.
    """
    counts = _checked_counts(image_embeds, text_embeds, labels, reduction, group, logit_scale=logit_scale)
    dtype = torch.promote_types(image_embeds.dtype, torch.float32)  # sums over ranks, too, are not for half precision
    images, texts = image_embeds.to(dtype), text_embeds.to(dtype)
    # Side by side, so that there is one exchange each way.
    all_images, all_texts = gather_rows(torch.cat([images, texts], dim=1), counts, group).chunk(2, dim=1)
    own, everything = _labels_of_all(labels, counts, images.device, group)
    share = _sum_of_rows(unicl_rows, images, all_texts, own, everything, logit_scale)
    share = share + _sum_of_rows(unicl_rows, texts, all_images, own, everything, logit_scale)
    return _over_ranks(share / (2 * sum(counts)) if reduction == "mean" else share, group)


def global_sigmoid_loss(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    labels: torch.Tensor | None,
    logit_scale: torch.Tensor,
    logit_bias: torch.Tensor,
    *,
    reduction: str = "mean",
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """`sigmoid_loss` of the pairs of all ranks, equal on all of them; arguments and errors as `global_unicl_loss`.

    A rank asks its own images about all texts, so only texts and labels are gathered.
    """
    scalars = {"logit_scale": logit_scale, "logit_bias": logit_bias}
    counts = _checked_counts(image_embeds, text_embeds, labels, reduction, group, **scalars)
    dtype = torch.promote_types(image_embeds.dtype, torch.float32)
    all_texts = gather_rows(text_embeds.to(dtype), counts, group)
    own, everything = _labels_of_all(labels, counts, image_embeds.device, group)
    share = _sum_of_rows(sigmoid_rows, image_embeds.to(dtype), all_texts, own, everything, logit_scale, logit_bias)
    return _over_ranks(share / sum(counts) if reduction == "mean" else share, group)


def mean_over_ranks(values: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """The mean of the values of all ranks, equal on all of them. A collective.

    Args:
        values: (rows,), this rank's, any number of them.

    Returns:
        A scalar. Averaged over the ranks, its gradient is that of one process with all values.
    """
    return _over_ranks(values.sum() / sum(rows_of_ranks(values.shape[0], values.device, group)), group)


__all__ = [
    "gather_rows",
    "global_sigmoid_loss",
    "global_unicl_loss",
    "mean_over_ranks",
    "ranks_in",
    "rows_of_ranks",
]
