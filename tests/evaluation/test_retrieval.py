"""Recall at k against slow loops, with several relevant items and with ties."""

import pytest
import torch
from torch.nn import functional as F

from transformers_florence.evaluation.retrieval import precision_at_k, recall_at_k


def unit(count: int, dim: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


def slow_recall(queries: torch.Tensor, gallery: torch.Tensor, relevant: torch.Tensor, k: int) -> float:
    hits = 0
    for query, wanted in zip(queries.tolist(), relevant.tolist(), strict=True):
        scores = [sum(a * b for a, b in zip(query, item, strict=True)) for item in gallery.tolist()]
        nearest = sorted(range(len(scores)), key=lambda index: -scores[index])[:k]
        hits += any(wanted[index] for index in nearest)
    return hits / len(queries)


@pytest.mark.parametrize("k", [1, 2, 5, 12])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.4, 1.0])
def test_recall_equals_a_loop(k, share):
    queries, gallery = unit(30, 6, seed=1), unit(12, 6, seed=2)
    relevant = torch.rand(30, 12, generator=torch.Generator().manual_seed(3)) < share
    assert recall_at_k(queries, gallery, relevant, k) == pytest.approx(slow_recall(queries, gallery, relevant, k))


@pytest.mark.parametrize("k", [1, 5, 12])
def test_precision_equals_a_loop(k):
    queries, gallery = unit(30, 6, seed=1), unit(12, 6, seed=2)
    relevant = torch.rand(30, 12, generator=torch.Generator().manual_seed(3)) < 0.4
    hits = 0
    for query, wanted in zip(queries.tolist(), relevant.tolist(), strict=True):
        scores = [sum(a * b for a, b in zip(query, item, strict=True)) for item in gallery.tolist()]
        hits += sum(wanted[index] for index in sorted(range(12), key=lambda index: -scores[index])[:k])
    assert precision_at_k(queries, gallery, relevant, k) == pytest.approx(hits / 30 / k)


def test_each_finds_itself_and_recall_never_falls_with_k():
    gallery = unit(20, 8, seed=4)
    assert recall_at_k(gallery, gallery, torch.eye(20, dtype=torch.bool), 1) == 1.0
    noisy = F.normalize(gallery + 1.5 * unit(20, 8, seed=5), dim=1)
    recalls = [recall_at_k(noisy, gallery, torch.eye(20, dtype=torch.bool), k) for k in range(1, 21)]
    assert recalls == sorted(recalls) and recalls[0] < recalls[-1] == 1.0


def test_one_of_several_relevant_items_is_enough():
    queries = torch.eye(3)
    relevant = torch.tensor([[True, False, True], [True, False, True], [False, False, True]])
    assert recall_at_k(queries, torch.eye(3), relevant, 1) == pytest.approx(2 / 3)


def test_equal_items_are_found_whichever_of_them_comes_first():
    """Texts that come twice give equal vectors: all copies are relevant, so the order among them cannot matter."""
    gallery = torch.eye(3).repeat(2, 1)  # items i and i + 3 are equal
    relevant = torch.eye(3, dtype=torch.bool).repeat(1, 2)
    assert recall_at_k(torch.eye(3), gallery, relevant, 1) == 1.0
    for order in (torch.tensor([3, 4, 5, 0, 1, 2]), torch.tensor([5, 1, 3, 2, 4, 0])):
        assert recall_at_k(torch.eye(3), gallery[order], relevant[:, order], 1) == 1.0


def test_ties_never_give_more_than_k_chances():
    """Where all items are alike, a query finds its one relevant item among k of n at most."""
    gallery = torch.ones(10, 1)
    relevant = torch.eye(10, dtype=torch.bool)
    for k in (1, 3, 10):
        assert recall_at_k(torch.ones(10, 1), gallery, relevant, k) == pytest.approx(k / 10)


@pytest.mark.parametrize("k", [0, -1, 6])
def test_k_must_lie_within_the_gallery(k):
    with pytest.raises(ValueError, match=f"expected k between 1 and 5, got {k}"):
        recall_at_k(unit(2, 3, 0), unit(5, 3, 1), torch.ones(2, 5, dtype=torch.bool), k)


@pytest.mark.parametrize("shape", [(5, 2), (3, 5), (2, 6), (2,)])
def test_relevance_must_have_a_row_a_query_and_a_column_an_item(shape):
    with pytest.raises(ValueError, match=r"expected relevant of shape \(2, 5\)"):
        recall_at_k(unit(2, 3, 0), unit(5, 3, 1), torch.ones(shape, dtype=torch.bool), 1)


def test_no_query_is_refused():
    with pytest.raises(ValueError, match="at least one query"):
        recall_at_k(torch.zeros(0, 3), unit(5, 3, 1), torch.zeros(0, 5, dtype=torch.bool), 1)
