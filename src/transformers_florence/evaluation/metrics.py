"""Metrics that no library carries, as `evaluate.Metric` classes that need no network. Needs the extra `train`."""

from typing import Any

import datasets
import evaluate
import numpy as np
import torch

from .classification import map_11_point

RECALL_CITATION = """@inproceedings{karpathy2015deep,
  title={Deep visual-semantic alignments for generating image descriptions},
  author={Karpathy, Andrej and Fei-Fei, Li},
  booktitle={CVPR},
  year={2015}
}"""
VOC_CITATION = """@article{everingham2010pascal,
  title={The Pascal visual object classes (VOC) challenge},
  author={Everingham, Mark and Van Gool, Luc and Williams, Christopher and Winn, John and Zisserman, Andrew},
  journal={International journal of computer vision},
  year={2010}
}"""


class RetrievalRecall(evaluate.Metric):
    """Recall at k where a query may have several right answers, one of which is enough: Flickr30K's and COCO's.

    Example:
        >>> RetrievalRecall().compute(predictions=[[4, 1, 0], [2, 3, 1]], references=[[0, 1], [7]], ks=[1, 2])
        {'recall_at_1': 0.0, 'recall_at_2': 0.5}
    """

    def _info(self) -> evaluate.MetricInfo:
        numbers = datasets.Sequence(datasets.Value("int64"))
        return evaluate.MetricInfo(
            description="Part of the queries that find something right among their k best.",
            citation=RECALL_CITATION,
            inputs_description="predictions: numbers of items, best first; references: numbers of the right ones.",
            features=datasets.Features({"predictions": numbers, "references": numbers}),
        )

    def _compute(
        self, predictions: list[list[int]], references: list[list[int]], ks: tuple[int, ...] = (1, 5, 10)
    ) -> dict[str, float]:
        """`recall_at_k` for each k. Raises ValueError for a ranking shorter than a k, or a k below 1."""
        shortest = min(map(len, predictions))
        if not ks or min(ks) < 1 or max(ks) > shortest:
            raise ValueError(f"expected k from 1 to {shortest}, the shortest ranking, got {list(ks)}")
        pairs = [(ranked, set(right)) for ranked, right in zip(predictions, references, strict=True)]
        return {
            f"recall_at_{k}": float(np.mean([not right.isdisjoint(ranked[:k]) for ranked, right in pairs])) for k in ks
        }


class ElevenPointAveragePrecision(evaluate.Metric):
    """VOC2007's mean average precision over classes, see `classification.map_11_point`.

    Example:
        >>> metric = ElevenPointAveragePrecision()
        >>> metric.compute(predictions=[[0.9, 0.2], [0.1, 0.8]], references=[[1, -1], [-1, 1]])
        {'map_11_point': 1.0}
    """

    def _info(self) -> evaluate.MetricInfo:
        features = {
            "predictions": datasets.Sequence(datasets.Value("float32")),
            "references": datasets.Sequence(datasets.Value("int64")),
        }
        return evaluate.MetricInfo(
            description="Mean over classes of the precision at eleven recalls.",
            citation=VOC_CITATION,
            inputs_description="predictions: scores of a picture's classes; references: 1, -1, or 0 if difficult.",
            features=datasets.Features(features),
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {"map_11_point": map_11_point(torch.tensor(predictions), torch.tensor(references))}


__all__ = ["ElevenPointAveragePrecision", "RetrievalRecall"]
