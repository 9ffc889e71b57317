"""Linear probes by CLIP's protocol, which Florence follows (section 3.2; Radford et al. 2021, appendix A.3).

Pictures have one class each, or several: VOC2007's, one logistic regression a class. Needs the extra `eval`.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from tqdm.auto import tqdm

from ..data.image_sets import DIFFICULT, NEGATIVE, POSITIVE
from .classification import accuracy, map_11_point
from .embedding import check_features

STEPS_PER_DECADE = 8
DECADES = 12  # of the strength, from LOWEST on
LOWEST = 1e-6
COARSE_STEP = 2 * STEPS_PER_DECADE
MAX_ITERATIONS = 1000

# Features, labels and a strength -> weight (classes, dim), bias (classes,), and how many fits ended at the limit.
Fit = Callable[[torch.Tensor, torch.Tensor, float], tuple[torch.Tensor, torch.Tensor, int]]


@dataclass(frozen=True)
class LinearProbe:
    """A linear classifier of features.

    Attributes:
        weight: (classes, dim), float32; bias: (classes,), float32.
        strength: of the L2 penalty, half of which times the weights' squares is added to the summed cross-entropy.
        sweep: each strength that was tried -> its score on the validation split.
        unconverged: how many of the fits ended at the limit of iterations.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    strength: float
    sweep: dict[float, float]
    unconverged: int

    def scores(self, features: torch.Tensor) -> torch.Tensor:
        """(pictures, dim) -> (pictures, classes), float32: of one class a picture logits, of several log odds of each.

        Raises:
            ValueError: features that are not finite.
        """
        check_features(features)
        return features.float() @ self.weight.T + self.bias


def _check(features: torch.Tensor, labels: torch.Tensor, num_classes: int, what: str) -> None:
    check_features(features, what)
    if labels.shape != features.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(f"{what}: expected {len(features)} int64 labels, got {labels.dtype} {tuple(labels.shape)}")
    if not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        got = f"{int(labels.min())} to {int(labels.max())}"
        raise ValueError(f"{what}: expected labels from 0 to {num_classes - 1}, got {got}")


def _logistic_regression(
    features: torch.Tensor, labels: torch.Tensor, strength: float, max_iterations: int
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """scikit-learn's, which has one row of two classes, the second's."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        fitted = LogisticRegression(C=1 / strength, max_iter=max_iterations).fit(features.numpy(), labels.numpy())
    weight, bias = torch.from_numpy(fitted.coef_).float(), torch.from_numpy(fitted.intercept_).float()
    return weight, bias, int(any(issubclass(warning.category, ConvergenceWarning) for warning in caught))


def _fit(
    features: torch.Tensor, labels: torch.Tensor, strength: float, *, max_iterations: int
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Of classes that exclude each other; labels: (pictures,)."""
    weight, bias, unconverged = _logistic_regression(features, labels, strength, max_iterations)
    if len(weight) == 1:
        weight, bias = torch.cat([-weight / 2, weight / 2]), torch.cat([-bias / 2, bias / 2])
    return weight, bias, unconverged


def _fit_each(
    features: torch.Tensor, marks: torch.Tensor, strength: float, *, max_iterations: int
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Of classes by themselves, each from the pictures where it is not difficult; marks: (pictures, classes)."""
    fits = []
    for column in marks.T:
        counted = column != DIFFICULT
        fits.append(_logistic_regression(features[counted], column[counted], strength, max_iterations))
    weights, biases, unconverged = zip(*fits, strict=True)
    return torch.cat(weights), torch.cat(biases), sum(unconverged)


def search_strength(score: Callable[[float], float]) -> dict[float, float]:
    """CLIP's parametric binary search: every second decade, then around the best one in ever smaller steps.

    Args:
        score: of a strength; the greater the better.

    Returns:
        Every strength that was tried, with its score, in the order of trial. Of equal scores the first is the best.
    """
    top = DECADES * STEPS_PER_DECADE
    tried: dict[int, float] = {}

    def best_of(places: list[int]) -> int:
        for place in places:
            if 0 <= place <= top and place not in tried:
                tried[place] = score(LOWEST * 10 ** (place / STEPS_PER_DECADE))
        return max(tried, key=lambda place: tried[place])

    step = COARSE_STEP
    peak = best_of(list(range(0, top + 1, step)))
    while step > 1:
        step //= 2
        peak = best_of([peak - step, peak + step])
    return {LOWEST * 10 ** (place / STEPS_PER_DECADE): value for place, value in tried.items()}


def _sweep(
    fit: Fit,
    train: tuple[torch.Tensor, torch.Tensor],
    validation: tuple[torch.Tensor, torch.Tensor],
    metric: Callable[[torch.Tensor, torch.Tensor], float],
    progress: bool,
) -> LinearProbe:
    """The strength that is best on the validation split, then a fit to both splits, each (features, labels)."""
    unconverged = 0
    bar = tqdm(desc="strengths", disable=not progress)

    def score(strength: float) -> float:
        nonlocal unconverged
        weight, bias, limited = fit(*train, strength)
        unconverged += limited
        bar.update()
        return metric(validation[0].float() @ weight.T + bias, validation[1])

    sweep = search_strength(score)
    bar.close()
    strength = max(sweep, key=lambda value: sweep[value])
    both = torch.cat([train[0], validation[0]]), torch.cat([train[1], validation[1]])
    weight, bias, limited = fit(*both, strength)
    return LinearProbe(weight, bias, strength, sweep, unconverged + limited)


def fit_linear_probe(
    features: torch.Tensor,
    labels: torch.Tensor,
    validation_features: torch.Tensor,
    validation_labels: torch.Tensor,
    num_classes: int,
    *,
    metric: Callable[[torch.Tensor, torch.Tensor], float] = accuracy,
    max_iterations: int = MAX_ITERATIONS,
    progress: bool = False,
) -> LinearProbe:
    """Logistic regression by L-BFGS, its strength swept on the validation split, then fitted to both splits.

    Args:
        features, validation_features: (pictures, dim), floating, of `embed_pictures(..., tower=True)`.
        labels, validation_labels: (pictures,), int64.
        metric: (scores, labels) -> what the sweep makes as large as it can.
        max_iterations: of each fit.

    Raises:
        ValueError: features that are not finite, labels that do not fit, fewer than two classes, or a class without
            pictures to train on.
    """
    _check(features, labels, num_classes, "features")
    _check(validation_features, validation_labels, num_classes, "validation_features")
    absent = [number for number, count in enumerate(labels.bincount(minlength=num_classes).tolist()) if not count]
    if absent or num_classes < 2:
        got = f"none of {', '.join(map(str, absent[:10]))}" if absent else f"{num_classes} class"
        raise ValueError(f"expected pictures of at least two classes, of every one, got {got}")
    fit = partial(_fit, max_iterations=max_iterations)
    return _sweep(fit, (features, labels), (validation_features, validation_labels), metric, progress)


def _check_marks(features: torch.Tensor, marks: torch.Tensor, what: str) -> None:
    check_features(features, what)
    if marks.ndim != 2 or marks.dtype != torch.int64 or len(marks) != len(features) or not marks.shape[1]:
        got = f"{marks.dtype} {tuple(marks.shape)}"
        raise ValueError(f"{what}: expected int64 marks of shape ({len(features)}, classes), got {got}")
    if not NEGATIVE <= int(marks.min()) <= int(marks.max()) <= POSITIVE:
        got = f"{int(marks.min())} to {int(marks.max())}"
        raise ValueError(f"{what}: expected marks from {NEGATIVE} to {POSITIVE}, got {got}")
    for mark, word in ((POSITIVE, "with"), (NEGATIVE, "without")):
        bare = (~(marks == mark).any(dim=0)).nonzero()[:, 0].tolist()
        if bare:
            listed = ", ".join(map(str, bare[:10]))
            raise ValueError(f"{what}: expected pictures {word} each class, got none {word} the classes {listed}")


def fit_multi_label_probe(
    features: torch.Tensor,
    marks: torch.Tensor,
    validation_features: torch.Tensor,
    validation_marks: torch.Tensor,
    *,
    max_iterations: int = MAX_ITERATIONS,
    progress: bool = False,
) -> LinearProbe:
    """As `fit_linear_probe` where a picture has several classes: one regression a class, one strength for all.

    The strength is that of the greatest mean average precision of VOC2007, see `classification.map_11_point`.

    Args:
        features, validation_features: (pictures, dim), floating, of `embed_pictures(..., tower=True)`.
        marks, validation_marks: (pictures, classes), int64, VOC's: 1 where the class is there, -1 where not, 0 where
            it is difficult to see; the last count neither in a fit nor in the score.
        max_iterations: of each fit.

    Raises:
        ValueError: features that are not finite, marks that do not fit, two numbers of classes, or a class without
            pictures, or without pictures that lack it, in either split.
    """
    _check_marks(features, marks, "features")
    _check_marks(validation_features, validation_marks, "validation_features")
    if marks.shape[1] != validation_marks.shape[1]:
        got = f"{marks.shape[1]} and {validation_marks.shape[1]}"
        raise ValueError(f"expected marks of the same classes in both splits, got {got} classes")
    fit = partial(_fit_each, max_iterations=max_iterations)
    return _sweep(fit, (features, marks), (validation_features, validation_marks), map_11_point, progress)


__all__ = ["LinearProbe", "fit_linear_probe", "fit_multi_label_probe", "search_strength"]
