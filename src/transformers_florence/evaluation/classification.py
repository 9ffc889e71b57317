"""What is reported of a classifier, and weights between a pretrained and a fine-tuned one."""

from collections.abc import Callable, Mapping

import torch

from ..data.image_sets import DIFFICULT, POSITIVE
from .zero_shot import top_k_accuracy

RECALL_LEVELS = 11  # of VOC2007's average precision: 0, 0.1 .. 1


def accuracy(scores: torch.Tensor, labels: torch.Tensor) -> float:
    """Part of the pictures whose highest score is their class's. Arguments and errors are `top_k_accuracy`'s."""
    return top_k_accuracy(scores, labels, 1)


def mean_per_class_accuracy(scores: torch.Tensor, labels: torch.Tensor) -> float:
    """Mean over the classes that have pictures of the part of their pictures that are right.

    scores: (pictures, classes); labels: (pictures,), int64. Raises ValueError as `top_k_accuracy`.
    """
    accuracy(scores, labels)  # the checks
    right = (scores.argmax(dim=1) == labels).double()
    counts = labels.bincount(minlength=scores.shape[1])
    hits = torch.zeros(scores.shape[1], dtype=torch.float64).index_add_(0, labels, right)
    return (hits[counts > 0] / counts[counts > 0]).mean().item()


def label_presence(labels: torch.Tensor, num_classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which picture has which class, and where that counts: two masks (pictures, classes), bool.

    labels: (pictures,), int64, class numbers; or (pictures, classes), VOC's marks, of which 0 does not count.
    """
    if labels.ndim == 2:
        return labels == POSITIVE, labels != DIFFICULT
    present = labels[:, None] == torch.arange(num_classes, device=labels.device)
    return present, torch.ones_like(present)


def macro_f1(found: torch.Tensor, present: torch.Tensor, counted: torch.Tensor) -> float:
    """Mean over labels of F1 where it counts, 0 where nothing was found and nothing is there.

    All three: (pictures, labels), bool.
    """
    found, present = found & counted, present & counted
    both = 2 * (found & present).sum(dim=0)
    return (both / (found.sum(dim=0) + present.sum(dim=0)).clamp(min=1)).mean().item()


def map_11_point(scores: torch.Tensor, marks: torch.Tensor) -> float:
    """VOC2007's mean average precision: precision at eleven recalls, each the best at that recall or above.

    Args:
        scores: (pictures, classes).
        marks: (pictures, classes), int64: 1 where the class is there, -1 where not, 0 where it is difficult to see;
            the last do not count.

    Raises:
        ValueError: other shapes, or a class without pictures.
    """
    if scores.ndim != 2 or scores.shape != marks.shape:
        raise ValueError(f"expected scores and marks of one shape, got {tuple(scores.shape)} and {tuple(marks.shape)}")
    precisions = []
    for number in range(scores.shape[1]):
        counted = marks[:, number] != DIFFICULT
        present = marks[counted, number] == POSITIVE
        if not present.any():
            raise ValueError(f"expected pictures of every class, got none of class {number}")
        hits = present[scores[counted, number].argsort(descending=True, stable=True)].double().cumsum(dim=0)
        precision = hits / torch.arange(1, len(hits) + 1)
        best_from_here = precision.flip(0).cummax(dim=0).values.flip(0)
        for level in range(RECALL_LEVELS):
            reached = hits * (RECALL_LEVELS - 1) >= level * hits[-1]  # in integers: 0.3 is no floating-point number
            precisions.append(best_from_here[reached.int().argmax()])
    return torch.stack(precisions).mean().item()


# What the paper's table reports of each set, by the names in `data/benchmark_sets.json`.
METRICS: dict[str, Callable[[torch.Tensor, torch.Tensor], float]] = {
    "accuracy": accuracy,
    "mean_per_class": mean_per_class_accuracy,
    "map_11_point": map_11_point,
}


def confusion_matrix(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """(classes, classes), int64: pictures of the row's class whose highest score is the column's."""
    accuracy(scores, labels)  # the checks
    classes = scores.shape[1]
    return (labels * classes + scores.argmax(dim=1)).bincount(minlength=classes**2).view(classes, classes)


def interpolate_weights(
    start: Mapping[str, torch.Tensor], end: Mapping[str, torch.Tensor], part: float
) -> dict[str, torch.Tensor]:
    """Weights on the line between two models of one shape (WiSE-FT, Wortsman et al. 2022).

    Half-way between the pretrained and the fine-tuned model, much of what fine-tuning forgets is still there.

    Args:
        start, end: state dictionaries, of the pretrained and of the fine-tuned model.
        part: 0 for the start, 1 for the end.

    Raises:
        ValueError: a part outside of 0 to 1, or weights of other names or shapes.
    """
    if not 0 <= part <= 1:
        raise ValueError(f"expected a part from 0 to 1, got {part}")
    names = {name for name in start.keys() | end.keys() if name not in start or name not in end}
    names |= {name for name in start.keys() & end.keys() if start[name].shape != end[name].shape}
    if names:
        raise ValueError(f"expected weights of the same names and shapes, got others: {', '.join(sorted(names)[:5])}")
    return {
        name: torch.lerp(value, end[name].to(value), part) if value.is_floating_point() else end[name].clone()
        for name, value in start.items()
    }


__all__ = [
    "METRICS",
    "accuracy",
    "confusion_matrix",
    "interpolate_weights",
    "label_presence",
    "macro_f1",
    "map_11_point",
    "mean_per_class_accuracy",
]
