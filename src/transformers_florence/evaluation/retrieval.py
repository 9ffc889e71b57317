"""Retrieval between pictures and texts (Florence section 3.5)."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tqdm.auto import tqdm

from .embedding import check_features

RECALLS = (1, 5, 10)
# Similarities that are in memory at a time, 256 MiB of them: 134 queries against a gallery of 500,000.
BLOCK = 1 << 26

# Numbers of pictures and of texts, (pairs,) each -> how well each pair goes together, (pairs,).
Matching = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


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


@dataclass(frozen=True)
class RetrievalScores:
    """Recalls in 0..1 and median ranks from 1, of texts for pictures and of pictures for texts.

    `recall_sum`: of all six recalls, the field's one number for a model (here at most 6).
    """

    image_to_text: dict[str, float]
    text_to_image: dict[str, float]
    pictures: int
    texts: int

    @property
    def recall_sum(self) -> float:
        sides = (self.image_to_text, self.text_to_image)
        return sum(side[f"recall_{k}"] for side in sides for k in RECALLS)

    def as_dict(self) -> dict[str, float]:
        """For a result: `image_to_text_recall_1` and so on, the counts, and `recall_sum`."""
        content = asdict(self)
        sides = {
            f"{side}_{name}": value
            for side in ("image_to_text", "text_to_image")
            for name, value in content[side].items()
        }
        return {**sides, "recall_sum": self.recall_sum, "pictures": self.pictures, "texts": self.texts}


def check_captions(picture_of_text: torch.Tensor, pictures: int, texts: int) -> None:
    """Refuse texts that belong to no picture, and pictures without a text.

    Args:
        picture_of_text: (texts,), int64: the number of each text's picture.

    Raises:
        ValueError: another number of texts, numbers of no picture, or a picture without a text.
    """
    if picture_of_text.shape != (texts,) or picture_of_text.dtype != torch.int64:
        got = f"{picture_of_text.dtype} {tuple(picture_of_text.shape)}"
        raise ValueError(f"expected the picture of each of {texts} texts, int64, got {got}")
    if texts == 0 or not 0 <= int(picture_of_text.min()) <= int(picture_of_text.max()) < pictures:
        got = f"{int(picture_of_text.min())} to {int(picture_of_text.max())}" if texts else "no text"
        raise ValueError(f"expected numbers of pictures from 0 to {pictures - 1}, got {got}")
    bare = (picture_of_text.bincount(minlength=pictures) == 0).nonzero()[:, 0].tolist()
    if bare:
        listed = ", ".join(map(str, bare[:5]))
        raise ValueError(f"expected a text for each picture, got none for {len(bare)} of {pictures}: {listed}")


def first_ranks(
    queries: torch.Tensor,
    gallery: torch.Tensor,
    query_groups: torch.Tensor,
    gallery_groups: torch.Tensor,
    *,
    matching: Matching | None = None,
    top_k: int = 0,
    block: int = BLOCK,
    progress: bool = False,
) -> torch.Tensor:
    """The rank of the first item of a query's own group: (queries,), int64, from 1.

    A foreign item that is exactly as similar stands before it: a model that gives everything one vector finds nothing.

    Args:
        queries: (queries, dim); gallery: (items, dim): unit vectors, on one device.
        query_groups: (queries,), int64; gallery_groups: (items,), int64. Each query's group has an item.
        matching: with it the `top_k` most similar items of a query are put in a new order, by (numbers of queries,
            numbers of items) -> the greater the better; the others follow as they were.
        top_k: how many items are put in a new order, at most all; 0 for none.
        block: similarities that are in memory at a time.
    """
    rows, ranks = max(1, block // len(gallery)), []
    for start in tqdm(range(0, len(queries), rows), desc="ranking", disable=not progress):
        similarities = queries[start : start + rows] @ gallery.T  # (rows, items)
        own = query_groups[start : start + rows, None] == gallery_groups
        foreign = similarities.masked_fill(own, -torch.inf)
        best = similarities.masked_fill(~own, -torch.inf).amax(dim=1, keepdim=True)
        rank = 1 + (foreign >= best).sum(dim=1)
        if matching is not None and top_k:
            nearest = similarities.topk(min(top_k, len(gallery)), dim=1).indices  # (rows, k)
            numbers = torch.arange(start, start + len(nearest), device=nearest.device)[:, None].expand_as(nearest)
            matches = matching(numbers.flatten(), nearest.flatten())
            if matches.shape != (nearest.numel(),) or not torch.isfinite(matches).all():
                got = f"shape {tuple(matches.shape)}, {int((~torch.isfinite(matches)).sum())} not finite"
                raise ValueError(
                    f"expected a finite number of the second stage for {nearest.numel()} pairs, got {got}"
                )
            matches = matches.view(nearest.shape)
            right = own.gather(1, nearest)
            best = matches.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
            again = 1 + ((matches >= best) & ~right).sum(dim=1)
            rank = torch.where(right.any(dim=1), again, rank)  # else all of the shortlist stands before, as it did
        ranks.append(rank)
    return torch.cat(ranks)


def evaluate_retrieval(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    picture_of_text: torch.Tensor,
    *,
    matching: Matching | None = None,
    top_k: int = 0,
    block: int = BLOCK,
    progress: bool = False,
) -> RetrievalScores:
    """Recall at 1, 5 and 10 and median rank in both directions, with any number of texts for a picture.

    A picture is right at k if one of its texts is among the k texts found for it, a text if its picture is among the k
    pictures (Karpathy and Fei-Fei 2015). The similarities are never all in memory.

    Args:
        image_embeds: (pictures, dim); text_embeds: (texts, dim): unit vectors.
        picture_of_text: (texts,), int64: the number of each text's picture.
        matching: a second stage, such as a fusion model's head: (numbers of pictures, numbers of texts), each
            (pairs,) -> (pairs,), how well they go together. It re-ranks the `top_k` of each query.
        top_k: how many; with as many as there are, the second stage alone ranks.
        block: similarities that are in memory at a time.

    Raises:
        ValueError: vectors that are not finite or of two lengths; texts that `check_captions` refuses; a second stage
            without a positive `top_k`, or the reverse; or other than finite numbers of it.
    """
    check_features(image_embeds, "image_embeds")
    check_features(text_embeds, "text_embeds")
    if image_embeds.shape[1] != text_embeds.shape[1]:
        raise ValueError(f"expected vectors of one length, got {image_embeds.shape[1]} and {text_embeds.shape[1]}")
    check_captions(picture_of_text, len(image_embeds), len(text_embeds))
    if top_k < 0 or (matching is None) != (top_k == 0):
        given = "none" if matching is None else "one"
        raise ValueError(f"expected a second stage with a positive top_k, or neither, got {given} and {top_k}")
    picture_of_text = picture_of_text.to(image_embeds.device)
    own = torch.arange(len(image_embeds), device=image_embeds.device)
    reverse = None if matching is None else lambda texts, pictures: matching(pictures, texts)
    options: dict[str, Any] = {"top_k": top_k, "block": block, "progress": progress}
    sides = []
    for ranks in (
        first_ranks(image_embeds, text_embeds, own, picture_of_text, matching=matching, **options),
        first_ranks(text_embeds, image_embeds, picture_of_text, own, matching=reverse, **options),
    ):
        recalls = {f"recall_{k}": (ranks <= k).double().mean().item() for k in RECALLS}
        sides.append({**recalls, "median_rank": ranks.double().quantile(0.5).item()})
    return RetrievalScores(sides[0], sides[1], len(image_embeds), len(text_embeds))


__all__ = [
    "RetrievalScores",
    "check_captions",
    "evaluate_retrieval",
    "first_ranks",
    "precision_at_k",
    "recall_at_k",
    "relevant_among_nearest",
]
