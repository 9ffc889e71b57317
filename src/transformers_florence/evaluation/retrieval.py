"""Retrieval between pictures and texts (Florence section 3.5)."""

import torch


def recall_at_k(queries: torch.Tensor, gallery: torch.Tensor, relevant: torch.Tensor, k: int) -> float:
    """Part of queries that find something relevant among their k nearest.

    Args:
        queries: (queries, dim), unit length.
        gallery: (items, dim), unit length.
        relevant: (queries, items), bool.
        k: how many of the nearest count.

    Raises:
        ValueError: k is not between 1 and the number of items.
    """
    if not 1 <= k <= gallery.shape[0]:
        raise ValueError(f"expected k between 1 and {gallery.shape[0]}, got {k}")
    nearest = (queries @ gallery.T).topk(k, dim=1).indices
    return relevant.gather(1, nearest).any(dim=1).float().mean().item()


__all__ = ["recall_at_k"]
