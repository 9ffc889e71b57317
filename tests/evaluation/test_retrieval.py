"""Recall at k against slow loops, with several relevant items and with ties."""

import statistics

import pytest
import torch
from torch.nn import functional as F

from tests.tiny_fusion import tiny_fusion_config
from transformers_florence import FlorenceForImageTextRetrieval
from transformers_florence.evaluation.retrieval import evaluate_retrieval, precision_at_k, recall_at_k


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


PICTURES, TEXTS = 9, 26


def captioned() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Vectors of pictures and of two to three texts each, in no order."""
    picture_of_text = (torch.arange(TEXTS) % PICTURES)[
        torch.randperm(TEXTS, generator=torch.Generator().manual_seed(7))
    ]
    images = unit(PICTURES, 6, seed=8)
    return images, F.normalize(images[picture_of_text] + 0.6 * unit(TEXTS, 6, seed=9), dim=1), picture_of_text


def slow_ranks(scores: torch.Tensor, own: torch.Tensor) -> list[int]:
    """Place of the first item of a query's own, by sorting."""
    ranks = []
    for row, right in zip(scores.tolist(), own.tolist(), strict=True):
        order = sorted(range(len(row)), key=lambda item: -row[item])
        ranks.append(1 + min(order.index(item) for item in range(len(row)) if right[item]))
    return ranks


def assert_scores(scores, image_ranks: list[int], text_ranks: list[int]) -> None:
    for side, ranks in ((scores.image_to_text, image_ranks), (scores.text_to_image, text_ranks)):
        for k in (1, 5, 10):
            assert side[f"recall_{k}"] == pytest.approx(sum(rank <= k for rank in ranks) / len(ranks))
        assert side["median_rank"] == pytest.approx(statistics.median(ranks))


@pytest.mark.parametrize("block", [1, 60, 1 << 20])
def test_both_directions_with_several_texts_a_picture(block):
    images, texts, picture_of_text = captioned()
    own = torch.arange(PICTURES)[:, None] == picture_of_text
    scores = evaluate_retrieval(images, texts, picture_of_text, block=block)
    assert_scores(scores, slow_ranks(images @ texts.T, own), slow_ranks(texts @ images.T, own.T))
    assert 0.3 < scores.image_to_text["recall_1"] < 1 and (scores.pictures, scores.texts) == (PICTURES, TEXTS)
    content = scores.as_dict()
    assert content["recall_sum"] == pytest.approx(sum(content[name] for name in content if "_recall_" in name))
    assert content["text_to_image_recall_5"] == scores.text_to_image["recall_5"] and len(content) == 11


def test_a_model_that_gives_everything_one_vector_finds_nothing():
    scores = evaluate_retrieval(torch.ones(20, 2), torch.ones(40, 2), torch.arange(40) // 2)
    assert scores.recall_sum == 0 and scores.text_to_image["median_rank"] == 20


def test_similarities_are_never_all_in_memory(monkeypatch):
    images, texts = unit(300, 4, seed=1), unit(900, 4, seed=2)
    sizes: list[int] = []
    fill = torch.Tensor.masked_fill

    def watched(self, mask, value):
        sizes.append(self.numel())
        return fill(self, mask, value)

    monkeypatch.setattr(torch.Tensor, "masked_fill", watched)
    evaluate_retrieval(images, texts, torch.arange(900) // 3, block=5000)
    assert max(sizes) <= 5000 and sum(sizes) == 4 * 300 * 900


@pytest.mark.parametrize("top_k", [1, 3, PICTURES, TEXTS, 100])
def test_the_second_stage_puts_the_nearest_in_its_own_order(top_k):
    """Against sorting by both keys; with as many as there are, it alone ranks."""
    images, texts, picture_of_text = captioned()
    table = torch.randn(PICTURES, TEXTS)  # what the second stage makes of each pair
    own = torch.arange(PICTURES)[:, None] == picture_of_text
    scores = evaluate_retrieval(
        images, texts, picture_of_text, matching=lambda i, t: table[i, t], top_k=top_k, block=50
    )

    def two_stages(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """One number a pair that sorts as both stages do."""
        nearest = torch.zeros_like(first, dtype=torch.bool)
        nearest.scatter_(1, first.topk(min(top_k, first.shape[1]), dim=1).indices, True)
        return torch.where(nearest, 1000 + second, first)

    image_ranks = slow_ranks(two_stages(images @ texts.T, table), own)
    assert_scores(scores, image_ranks, slow_ranks(two_stages(texts @ images.T, table.T), own.T))
    if top_k >= TEXTS:
        assert image_ranks == slow_ranks(table, own)


def test_a_fusion_model_as_the_second_stage():
    """Its own head on single pairs, and through `score_shortlists`."""
    model = FlorenceForImageTextRetrieval(tiny_fusion_config()).eval()
    tokens, channels = 5, model.config.vision_config.hidden_size
    grids = torch.randn(4, tokens, channels)
    ids = torch.randint(3, model.config.text_config.vocab_size, (8, 6))
    pictures, texts, picture_of_text = unit(4, 3, 1), unit(8, 3, 2), torch.arange(8) % 4

    def matching(rows, columns):
        return model.score_shortlists(grids[rows], ids, None, columns[:, None])[:, 0]

    with torch.no_grad():
        table = torch.stack(
            [model(ids, image_embeds=grids[row].expand(8, -1, -1)).logits.diff(dim=1)[:, 0] for row in range(4)]
        )
    own = torch.arange(4)[:, None] == picture_of_text
    scores = evaluate_retrieval(pictures, texts, picture_of_text, matching=matching, top_k=8)
    assert_scores(scores, slow_ranks(table, own), slow_ranks(table.T, own.T))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"picture_of_text": torch.arange(TEXTS - 1) % PICTURES}, "expected the picture of each of 26 texts"),
        ({"picture_of_text": torch.zeros(TEXTS)}, "int64, got torch.float32"),
        ({"picture_of_text": torch.arange(TEXTS)}, "expected numbers of pictures from 0 to 8, got 0 to 25"),
        ({"picture_of_text": torch.arange(TEXTS) % 7}, "expected a text for each picture, got none for 2 of 9: 7, 8"),
        ({"text_embeds": torch.zeros(TEXTS, 5)}, "expected vectors of one length, got 6 and 5"),
        ({"text_embeds": torch.zeros(0, 6)}, "expected text_embeds of shape"),
        ({"image_embeds": torch.full((PICTURES, 6), torch.nan)}, "expected finite image_embeds, got NaN .* in 9 of 9"),
        ({"top_k": 3}, "expected a second stage with a positive top_k, or neither, got none and 3"),
        ({"matching": lambda i, t: i.float()}, "got one and 0"),
        ({"matching": lambda i, t: i[:1].float(), "top_k": 2}, "for 18 pairs, got shape"),
        ({"matching": lambda i, t: i / 0 * 0, "top_k": 2}, "18 not finite"),
    ],
)
def test_what_is_refused(changes, message):
    images, texts, picture_of_text = captioned()
    options = {"image_embeds": images, "text_embeds": texts, "picture_of_text": picture_of_text} | changes
    with pytest.raises(ValueError, match=message):
        evaluate_retrieval(**options)
