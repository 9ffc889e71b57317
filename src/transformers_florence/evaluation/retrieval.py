"""Retrieval between pictures and texts (Florence section 3.5)."""

import torch


def recall_at_k(queries: torch.Tensor, gallery: torch.Tensor, relevant: torch.Tensor, k: int) -> float:
    """Part of queries that find something relevant among their k nearest; one with nothing relevant never does.

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
    nearest = (queries @ gallery.T).topk(k, dim=1).indices
    return relevant.gather(1, nearest).any(dim=1).float().mean().item()


__all__ = ["recall_at_k"]
