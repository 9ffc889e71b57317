"""Metrics against scikit-learn, slow loops and closed forms; weights on a line."""

import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, f1_score
from sklearn.metrics import confusion_matrix as sklearn_confusion
from torch.testing import assert_close
from torchmetrics.functional.classification import binary_precision_at_fixed_recall

from tests.tiny_florence import random_pixels, tiny_model
from transformers_florence.data.image_sets import benchmarks
from transformers_florence.evaluation.classification import (
    METRICS,
    accuracy,
    confusion_matrix,
    interpolate_weights,
    label_presence,
    macro_f1,
    map_11_point,
    mean_per_class_accuracy,
)


@pytest.fixture
def answers():
    """Scores and labels of classes of very different sizes, one of them without pictures."""
    labels = torch.tensor([0] * 20 + [1] * 5 + [3])
    return torch.randn(26, 4) + 2 * torch.eye(4)[labels], labels


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
def test_accuracies_are_scikit_learns(answers):
    scores, labels = answers
    guesses = scores.argmax(dim=1)
    assert mean_per_class_accuracy(scores, labels) == pytest.approx(balanced_accuracy_score(labels, guesses))
    assert accuracy(scores, labels) == pytest.approx((guesses == labels).float().mean().item())
    assert accuracy(scores, labels) != pytest.approx(mean_per_class_accuracy(scores, labels))
    assert confusion_matrix(scores, labels).tolist() == sklearn_confusion(labels, guesses, labels=range(4)).tolist()


def slow_average_precision(scores: list[float], marks: list[int]) -> float:
    """VOC2007's development kit, written out."""
    ranked = sorted((item for item in zip(scores, marks, strict=True) if item[1] != 0), key=lambda item: -item[0])
    positives, hits, points = sum(mark == 1 for _, mark in ranked), 0, []
    for place, (_, mark) in enumerate(ranked, start=1):
        hits += mark == 1
        points.append((hits, hits / place))
    best = [max((p for hits, p in points if 10 * hits >= level * positives), default=0.0) for level in range(11)]
    return sum(best) / 11


def test_voc_average_precision_is_that_of_a_loop():
    scores = torch.randn(60, 3)
    marks = torch.randint(-1, 2, (60, 3))
    marks[:10] = 1  # ten and more: recalls fall on the levels
    wanted = [slow_average_precision(scores[:, n].tolist(), marks[:, n].tolist()) for n in range(3)]
    assert map_11_point(scores, marks) == pytest.approx(sum(wanted) / 3)
    assert map_11_point(marks.float(), marks) == pytest.approx(1.0)


def test_voc_average_precision_at_a_recall_of_three_tenths():
    """3 of 10 reach 0.3 exactly: hits are at places 1, 2, 3 and from 11 on."""
    marks = torch.tensor([1] * 3 + [-1] * 7 + [1] * 7)[:, None]
    scores = -torch.arange(17.0)[:, None]
    wanted = (4 * 1.0 + 7 * 10 / 17) / 11  # levels 0 to 0.3, then the best later precision, 10 of 17
    assert map_11_point(scores, marks) == pytest.approx(wanted)


def test_voc_average_precision_is_the_mean_of_torchmetrics_precisions_at_fixed_recalls():
    """Where the best score is a hit: torchmetrics' curve has a precision of 1 at a recall of 0 in any case."""
    scores, marks = torch.rand(70, 3), torch.where(torch.rand(70, 3) < 0.4, 1, -1)
    marks[scores.argmax(dim=0), torch.arange(3)] = 1
    wanted = [
        binary_precision_at_fixed_recall(scores[:, number], (marks[:, number] == 1).long(), min_recall=level / 10)[0]
        for number in range(3)
        for level in range(11)
    ]
    hits = (marks == 1).sum(dim=0)
    assert (hits % 10 > 0).all()  # else a recall of three tenths is a matter of rounding there
    assert map_11_point(scores, marks) == pytest.approx(torch.stack(wanted).mean().item())
    assert map_11_point(scores, marks) < 0.8


def test_classes_of_pictures_as_masks():
    """One class each, several with difficult ones, and scikit-learn's F1 of those that count."""
    present, counted = label_presence(torch.tensor([2, 0]), 3)
    assert present.tolist() == [[False, False, True], [True, False, False]] and counted.all()
    marks = torch.randint(-1, 2, (40, 3))
    present, counted = label_presence(marks, 3)
    assert torch.equal(present, marks == 1) and torch.equal(counted, marks != 0)
    found = torch.rand(40, 3) < 0.5
    wanted = [f1_score(marks[rows, n] == 1, found[rows, n]) for n, rows in enumerate((marks != 0).T)]
    assert macro_f1(found, present, counted) == pytest.approx(sum(wanted) / 3)
    assert macro_f1(found, present, torch.ones_like(counted)) != pytest.approx(sum(wanted) / 3)
    assert macro_f1(*torch.zeros(3, 5, 2, dtype=torch.bool)) == 0


def test_marks_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="expected scores and marks of one shape"):
        map_11_point(torch.zeros(3, 2), torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="expected pictures of every class, got none of class 1"):
        map_11_point(torch.zeros(3, 2), torch.tensor([[1, -1], [1, 0], [-1, -1]]))


def test_every_benchmark_has_its_metric():
    assert {benchmark.metric for benchmark in benchmarks().values()} == set(METRICS)


def test_weights_between_two_models():
    """Ends are the models; of a linear part the middle's output is the mean of the outputs."""
    one, other = tiny_model(), tiny_model()
    start, end = one.state_dict(), other.state_dict()
    for part, wanted in ((0, start), (1, end)):
        found = interpolate_weights(start, end, part)
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    middle = tiny_model()
    middle.load_state_dict(interpolate_weights(start, end, 0.25))
    hidden = random_pixels(2).flatten(1)[:, : one.visual_projection.in_features]
    mean = 0.75 * one.visual_projection(hidden) + 0.25 * other.visual_projection(hidden)
    assert_close(middle.visual_projection(hidden), mean, atol=1e-5, rtol=1e-5)
    assert torch.equal(start["logit_scale"], one.logit_scale)  # the models stay as they are


@pytest.mark.parametrize("part", [-0.1, 1.1, float("nan")])
def test_weights_lie_between_the_models(part):
    with pytest.raises(ValueError, match="expected a part from 0 to 1"):
        interpolate_weights({}, {}, part)


def test_models_of_two_shapes_have_nothing_between_them():
    with pytest.raises(ValueError, match="got others: a, b"):
        interpolate_weights({"a": torch.zeros(2), "b": torch.zeros(1)}, {"a": torch.zeros(3)}, 0.5)
