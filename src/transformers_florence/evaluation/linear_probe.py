"""Linear probe by CLIP's protocol, which Florence follows (section 3.2; Radford et al. 2021, appendix A.3).

Needs the extra `eval`.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from tqdm.auto import tqdm

from .classification import accuracy
from .embedding import check_features

STEPS_PER_DECADE = 8
DECADES = 12  # of the strength, from LOWEST on
LOWEST = 1e-6
COARSE_STEP = 2 * STEPS_PER_DECADE
MAX_ITERATIONS = 1000


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
        """(pictures, dim) -> (pictures, classes), float32. Raises ValueError for features that are not finite."""
        check_features(features)
        return features.float() @ self.weight.T + self.bias


def _check(features: torch.Tensor, labels: torch.Tensor, num_classes: int, what: str) -> None:
    check_features(features, what)
    if labels.shape != features.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(f"{what}: expected {len(features)} int64 labels, got {labels.dtype} {tuple(labels.shape)}")
    if not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        got = f"{int(labels.min())} to {int(labels.max())}"
        raise ValueError(f"{what}: expected labels from 0 to {num_classes - 1}, got {got}")


def _fit(
    features: torch.Tensor, labels: torch.Tensor, strength: float, max_iterations: int
) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """Weight, bias, and whether the optimizer came to its end."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        fitted = LogisticRegression(C=1 / strength, max_iter=max_iterations).fit(features.numpy(), labels.numpy())
    weight, bias = torch.from_numpy(fitted.coef_).float(), torch.from_numpy(fitted.intercept_).float()
    if len(weight) == 1:  # of two classes scikit-learn keeps the second one's
        weight, bias = torch.cat([-weight / 2, weight / 2]), torch.cat([-bias / 2, bias / 2])
    return weight, bias, not any(issubclass(warning.category, ConvergenceWarning) for warning in caught)


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
    unconverged = 0
    bar = tqdm(desc="strengths", disable=not progress)

    def score(strength: float) -> float:
        nonlocal unconverged
        weight, bias, converged = _fit(features, labels, strength, max_iterations)
        unconverged += not converged
        bar.update()
        return metric(validation_features.float() @ weight.T + bias, validation_labels)

    sweep = search_strength(score)
    bar.close()
    strength = max(sweep, key=lambda value: sweep[value])
    both = torch.cat([features, validation_features]), torch.cat([labels, validation_labels])
    weight, bias, converged = _fit(*both, strength, max_iterations)
    return LinearProbe(weight, bias, strength, sweep, unconverged + (not converged))


__all__ = ["LinearProbe", "fit_linear_probe", "search_strength"]
