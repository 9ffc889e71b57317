"""The linear probes against scikit-learn by hand, and their search against a walk over all strengths."""

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch.nn import functional as F
from torch.testing import assert_close

from transformers_florence.evaluation.classification import map_11_point
from transformers_florence.evaluation.linear_probe import fit_linear_probe, fit_multi_label_probe, search_strength

DIM = 6


def clouds(count: int, classes: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points around one centre a class."""
    centres = torch.randn(classes, DIM, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    return centres[labels] + 1.2 * torch.randn(count, DIM, generator=generator), labels


@pytest.mark.parametrize("classes", [2, 4])
def test_the_probe_is_scikit_learns_on_both_splits(classes):
    train, validation = clouds(40, classes, 1), clouds(24, classes, 2)
    probe = fit_linear_probe(*train, *validation, classes)
    both = np.concatenate([train[0], validation[0]]), np.concatenate([train[1], validation[1]])
    wanted = LogisticRegression(C=1 / probe.strength, max_iter=1000).fit(*both)
    unseen = clouds(50, classes, 3)[0]
    assert_close(
        probe.scores(unseen).softmax(dim=1).numpy(),
        wanted.predict_proba(unseen.numpy()).astype(np.float32),
        atol=1e-4,
        rtol=0,
    )
    assert probe.unconverged == 0


def test_the_probe_minimises_the_penalised_loss():
    """The gradient of what the docstring says vanishes."""
    train, validation = clouds(40, 3, 1), clouds(24, 3, 2)
    probe = fit_linear_probe(*train, *validation, 3)
    weight, bias = probe.weight.double().requires_grad_(True), probe.bias.double()
    inputs, labels = torch.cat([train[0], validation[0]]).double(), torch.cat([train[1], validation[1]])
    loss = F.cross_entropy(inputs @ weight.T + bias, labels, reduction="sum")
    (loss + probe.strength / 2 * weight.square().sum()).backward()
    assert weight.grad.abs().max() < 1e-2 * inputs.abs().sum() / len(inputs)


def test_the_strength_is_the_best_of_the_sweep_on_the_validation_split():
    train, validation = clouds(40, 4, 1), clouds(60, 4, 2)
    probe = fit_linear_probe(*train, *validation, 4)
    for strength, score in probe.sweep.items():
        fitted = LogisticRegression(C=1 / strength, max_iter=1000).fit(*(part.numpy() for part in train))
        assert score == pytest.approx(fitted.score(*(part.numpy() for part in validation)), abs=1 / 60 + 1e-6)
    assert probe.sweep[probe.strength] == max(probe.sweep.values())
    assert len(set(probe.sweep.values())) > 1


@pytest.mark.parametrize("peak", [-6.0, -2.3, 0.1, 3.14, 6.0])
def test_the_search_finds_the_peak_among_eight_a_decade(peak):
    places = -6 + np.arange(97) / 8
    tried = search_strength(lambda strength: -abs(math.log10(strength) - peak))
    best = max(tried, key=lambda strength: tried[strength])
    assert math.log10(best) == pytest.approx(places[np.abs(places - peak).argmin()])
    assert list(tried)[:7] == pytest.approx([1e-6, 1e-4, 1e-2, 1, 1e2, 1e4, 1e6])
    assert len(tried) <= 7 + 2 * 4


def test_fits_that_do_not_end_are_counted():
    train, validation = clouds(40, 4, 1), clouds(24, 4, 2)
    assert fit_linear_probe(*train, *validation, 4, max_iterations=1).unconverged > 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[0].__setitem__((3, 2), float("nan")), "expected finite features, got NaN .* in 1 of 40"),
        (lambda data: data[2].__setitem__((0, 0), float("inf")), "expected finite validation_features"),
        (lambda data: data[1].__setitem__(0, 4), "features: expected labels from 0 to 3, got 0 to 4"),
        (lambda data: data[1].__setitem__(data[1] == 2, 1), "got none of 2"),
        (lambda data: data.__setitem__(1, data[1][:-1]), "expected 40 int64 labels"),
    ],
)
def test_what_is_refused(change, message):
    data = [*clouds(40, 4, 1), *clouds(24, 4, 2)]
    change(data)
    with pytest.raises(ValueError, match=message):
        fit_linear_probe(*data, 4)


def test_one_class_is_no_classification():
    with pytest.raises(ValueError, match="at least two classes, of every one, got 1 class"):
        fit_linear_probe(*clouds(8, 1, 1), *clouds(8, 1, 2), 1)


def marked(count: int, classes: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points on either side of a plane a class, near to which some are difficult."""
    planes = torch.randn(DIM, classes, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(count, DIM, generator=generator)
    sides = features @ planes + torch.randn(count, classes, generator=generator)
    return features, torch.where(sides.abs() < 0.3, 0, sides.sign().long())


def test_each_of_several_classes_has_a_regression_of_its_own():
    """scikit-learn's of one class at a time, without the pictures where it is difficult."""
    train, validation = marked(60, 3, 1), marked(40, 3, 2)
    assert all((marks == value).any(dim=0).all() for _, marks in (train, validation) for value in (-1, 0, 1))
    probe = fit_multi_label_probe(*train, *validation)
    features, marks = (torch.cat(parts) for parts in zip(train, validation, strict=True))
    unseen = marked(50, 3, 3)[0]
    for number, scores in enumerate(probe.scores(unseen).T):
        counted = marks[:, number] != 0
        wanted = LogisticRegression(C=1 / probe.strength, max_iter=1000)
        wanted.fit(features[counted].numpy(), (marks[counted, number] == 1).numpy())
        assert_close(scores.sigmoid(), torch.from_numpy(wanted.predict_proba(unseen)[:, 1]), atol=1e-4, rtol=0)
    assert probe.unconverged == 0 and probe.weight.shape == (3, DIM)


def test_the_probe_of_several_classes_minimises_the_penalised_loss():
    train, validation = marked(60, 3, 1), marked(40, 3, 2)
    probe = fit_multi_label_probe(*train, *validation)
    features, marks = (torch.cat(parts) for parts in zip(train, validation, strict=True))
    weight = probe.weight.double().requires_grad_(True)
    logits = features.double() @ weight.T + probe.bias.double()
    loss = (F.softplus(-marks * logits) * (marks != 0)).sum()  # log(1 + exp(-mark * logit))
    (loss + probe.strength / 2 * weight.square().sum()).backward()
    assert weight.grad.abs().max() < 1e-2 * features.abs().sum() / len(features)


def test_the_strength_of_several_classes_is_that_of_the_best_mean_precision():
    train, validation = marked(30, 3, 1), marked(60, 3, 2)
    probe = fit_multi_label_probe(*train, *validation)
    for strength, score in probe.sweep.items():
        columns = []
        for number in range(3):
            counted = train[1][:, number] != 0
            fitted = LogisticRegression(C=1 / strength, max_iter=1000)
            fitted.fit(train[0][counted].numpy(), train[1][counted, number].numpy())
            columns.append(torch.from_numpy(fitted.decision_function(validation[0].numpy())))
        assert score == pytest.approx(map_11_point(torch.stack(columns, dim=1), validation[1]), abs=0.01)
    assert probe.sweep[probe.strength] == max(probe.sweep.values())
    assert len(set(probe.sweep.values())) > 1
    assert fit_multi_label_probe(*train, *validation, max_iterations=1).unconverged > 15  # fits of single classes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[0].__setitem__((3, 2), float("nan")), "expected finite features, got NaN .* in 1 of 60"),
        (lambda data: data.__setitem__(1, data[1][:, 0]), r"features: expected int64 marks of shape \(60, classes\)"),
        (lambda data: data.__setitem__(1, data[1].float()), "got torch.float32"),
        (lambda data: data.__setitem__(3, data[3][:-1]), "validation_features: expected int64 marks of shape"),
        (lambda data: data[3].__setitem__((0, 0), 2), "validation_features: expected marks from -1 to 1, got -1 to 2"),
        (lambda data: data[1].__setitem__((slice(None), 1), -1), "features: expected .* got none with the classes 1"),
        (lambda data: data[3].clamp_(min=0), "validation_features: .* got none without the classes 0, 1, 2"),
        (lambda data: data.__setitem__(3, data[3][:, :2]), "in both splits, got 3 and 2 classes"),
    ],
)
def test_marks_that_are_refused(change, message):
    data = [*marked(60, 3, 1), *marked(40, 3, 2)]
    change(data)
    with pytest.raises(ValueError, match=message):
        fit_multi_label_probe(*data)
