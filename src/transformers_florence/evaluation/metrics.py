"""Metrics that no library carries, as `evaluate.Metric` classes that need no network. Needs the extra `train`."""

from typing import Any

import datasets
import evaluate
import numpy as np
import torch

from .classification import map_11_point
from .odinw import average
from .question_answering import vqa_accuracy

RECALL_CITATION = """@inproceedings{karpathy2015deep,
  title={Deep visual-semantic alignments for generating image descriptions},
  author={Karpathy, Andrej and Fei-Fei, Li},
  booktitle={CVPR},
  year={2015}
}"""
VQA_CITATION = """@inproceedings{antol2015vqa,
  title={{VQA}: Visual question answering},
  author={Antol, Stanislaw and Agrawal, Aishwarya and Lu, Jiasen and Mitchell, Margaret and Batra, Dhruv and
    Zitnick, C. Lawrence and Parikh, Devi},
  booktitle={ICCV},
  year={2015}
}"""
FLORENCE_CITATION = """@article{yuan2021florence,
  title={Florence: A new foundation model for computer vision},
  author={Yuan, Lu and Chen, Dongdong and Chen, Yi-Ling and others},
  journal={arXiv preprint arXiv:2111.11432},
  year={2021}
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


class VqaAccuracy(evaluate.Metric):
    """VQA's official accuracy of answers, see `question_answering.vqa_accuracy`.

    Example:
        >>> metric = VqaAccuracy()
        >>> metric.compute(predictions=["no", "a dog"], references=[["yes"] * 8 + ["no"] * 2, ["cat"] * 9 + ["dog"]])
        {'vqa_accuracy': 0.45}
    """

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description="Mean over questions of how many annotators gave the answer; three are enough.",
            citation=VQA_CITATION,
            inputs_description="predictions: answers; references: what each annotator answered.",
            features=datasets.Features({"predictions": text, "references": datasets.Sequence(text)}),
        )

    def _compute(self, predictions: list[str], references: list[list[str]]) -> dict[str, float]:
        """Raises ValueError for a question without annotators."""
        pairs = zip(predictions, references, strict=True)
        return {"vqa_accuracy": float(np.mean([vqa_accuracy(answer, annotated) for answer, annotated in pairs]))}


class DetectionInTheWild(evaluate.Metric):
    """The mean average precision over Florence's detection sets (table 7), see `odinw.average`.

    Example:
        >>> metric = DetectionInTheWild()
        >>> metric.compute(predictions=[0.25, 0.75, 0.25], references=["Packages", "Packages", "Pothole"])
        {'average': 0.375, 'sets': 2}
    """

    def _info(self) -> evaluate.MetricInfo:
        features = {"predictions": datasets.Value("float64"), "references": datasets.Value("string")}
        return evaluate.MetricInfo(
            description="Mean over sets of the mean over seeds of a detector's average precision.",
            citation=FLORENCE_CITATION,
            inputs_description="predictions: average precisions, one a set and seed; references: names of the sets.",
            features=datasets.Features(features),
        )

    def _compute(self, predictions: list[float], references: list[str]) -> dict[str, float | int]:
        """Raises ValueError for a set that is none of the paper's, or a score that is not finite."""
        scores: dict[str, list[float]] = {}
        for name, value in zip(references, predictions, strict=True):
            scores.setdefault(name, []).append(float(value))
        return {"average": average(scores)[0], "sets": len(scores)}


__all__ = ["DetectionInTheWild", "ElevenPointAveragePrecision", "RetrievalRecall", "VqaAccuracy"]
