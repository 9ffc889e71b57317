"""Retrieval between pictures and texts (Florence section 3.5)."""

import torch


def relevant_among_nearest(
    queries: torch.Tensor, gallery: torch.Tensor, relevant: torch.Tensor, k: int
) -> torch.Tensor:
    """Whether each of the k items nearest to a query is relevant: (queries, k), bool, nearest first.

    Args:
        queries: (queries, dim), unit length.
        gallery: (items, dim), unit length.
        relevant: (queries, items), bool.
        k: how many of the nearest count.

    Raises:
        ValueError: shapes that do not fit, no query, or k not between 1 and the number of items.
    """
    if relevant.shape != (queries.shape[0], gallery.shape[0]) or relevant.shape[0] == 0:
        expected = f"relevant of shape ({queries.shape[0]}, {gallery.shape[0]}) with at least one query"
        raise ValueError(f"expected {expected}, got {tuple(relevant.shape)}")
    if not 1 <= k <= gallery.shape[0]:
        raise ValueError(f"expected k between 1 and {gallery.shape[0]}, got {k}")
    return relevant.gather(1, (queries @ gallery.T).topk(k, dim=1).indices)


def recall_at_k(queries: torch.Tensor, gallery: torch.Tensor, relevant: torch.Tensor, k: int) -> float:
    """Part of queries that find something relevant among their k nearest; one with nothing relevant never does.

    Arguments and errors are those of `relevant_among_nearest`.
    """
    return relevant_among_nearest(queries, gallery, relevant, k).any(dim=1).float().mean().item()


def precision_at_k(queries: torch.Tensor, gallery: torch.Tensor, relevant: torch.Tensor, k: int) -> float:
    """Part of the k nearest that is relevant, over all queries.

    Arguments and errors are those of `relevant_among_nearest`.
    """
    return relevant_among_nearest(queries, gallery, relevant, k).float().mean().item()


__all__ = ["precision_at_k", "recall_at_k"]
