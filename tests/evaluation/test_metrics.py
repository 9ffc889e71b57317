"""The `evaluate` classes: their examples, slow loops, and no network."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from transformers_florence.evaluation.classification import map_11_point
from transformers_florence.evaluation.metrics import (
    DetectionInTheWild,
    ElevenPointAveragePrecision,
    RetrievalRecall,
    VqaAccuracy,
)
from transformers_florence.evaluation.retrieval import evaluate_retrieval


def test_recall_with_several_right_answers():
    metric = RetrievalRecall()
    found = metric.compute(predictions=[[4, 1, 0], [2, 3, 1]], references=[[0, 1], [7]], ks=[1, 2])
    assert found == {"recall_at_1": 0.0, "recall_at_2": 0.5}


def test_recall_over_batches_is_that_of_embeddings():
    """The way from rankings and the way from vectors, five texts a picture."""
    images, texts = F.normalize(torch.randn(12, 6), dim=1), F.normalize(torch.randn(60, 6), dim=1)
    picture_of_text = torch.arange(60) // 5
    metric = RetrievalRecall()
    for rows in torch.arange(12).split(5):
        ranked = (images[rows] @ texts.T).argsort(dim=1, descending=True)
        right = [(picture_of_text == row).nonzero()[:, 0].tolist() for row in rows]
        metric.add_batch(predictions=ranked.tolist(), references=right)
    wanted = evaluate_retrieval(images, texts, picture_of_text).image_to_text
    assert metric.compute() == {f"recall_at_{k}": pytest.approx(wanted[f"recall_{k}"]) for k in (1, 5, 10)}


@pytest.mark.parametrize("ks", [[0], [1, 4], []])
def test_recall_needs_as_many_items_as_k(ks):
    with pytest.raises(ValueError, match=r"expected k from 1 to 3, the shortest ranking, got \["):
        RetrievalRecall().compute(predictions=[[1, 2, 3], [1, 2, 3, 4]], references=[[1], [2]], ks=ks)


def test_average_precision():
    scores, marks = np.random.default_rng(0).normal(size=(30, 4)), torch.randint(-1, 2, (30, 4))
    found = ElevenPointAveragePrecision().compute(predictions=scores.tolist(), references=marks.tolist())
    assert found["map_11_point"] == pytest.approx(map_11_point(torch.tensor(scores), marks))


def test_vqa_accuracy():
    """0.6 and 0.3 for two and one of ten annotators are the metric's author's; articles and case do not count."""
    metric = VqaAccuracy()
    metric.add_batch(predictions=["No", "yes"], references=[["yes"] * 8 + ["no"] * 2, ["yes"] * 8 + ["no"] * 2])
    metric.add_batch(predictions=["a dog"], references=[["cat"] * 9 + ["dog"]])
    assert metric.compute() == {"vqa_accuracy": pytest.approx((0.6 + 1 + 0.3) / 3)}
    with pytest.raises(ValueError, match="expected the answers of annotators, got none"):
        metric.compute(predictions=["yes"], references=[[]])


def test_the_detection_benchmarks_average():
    """A mean of means: three seeds of one set weigh as much as one of another."""
    names, values = ["Aquarium"] * 3 + ["PKLot", "BCCD"], [0.1, 0.2, 0.6, 0.5, 0.7]
    found = DetectionInTheWild().compute(predictions=values, references=names)
    assert found == {"average": pytest.approx((0.3 + 0.5 + 0.7) / 3), "sets": 3}
    with pytest.raises(ValueError, match="expected scores of Aquarium, BCCD.*, got COCO"):
        DetectionInTheWild().compute(predictions=[0.5], references=["COCO"])
