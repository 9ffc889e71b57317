"""Losses of vision and language against loops and closed forms; false pairs that are never true ones."""

import math

import pytest
import torch
from torch.testing import assert_close

from transformers_florence.losses_fusion import (
    IGNORED_TOKEN,
    answer_loss,
    draw_false_partners,
    false_pairs,
    matching_loss,
    token_loss,
)


def test_answers_by_the_formula():
    logits, scores = torch.randn(3, 4, dtype=torch.float64), torch.rand(3, 4, dtype=torch.float64)
    total = 0.0
    for row, targets in zip(logits.tolist(), scores.tolist(), strict=True):
        for logit, target in zip(row, targets, strict=True):
            right = 1 / (1 + math.exp(-logit))
            total -= target * math.log(right) + (1 - target) * math.log(1 - right)
    assert answer_loss(logits, scores).item() == pytest.approx(total / 3)


def test_all_answers_unknown_is_a_loss_like_any_other():
    logits = torch.zeros(2, 5)
    assert answer_loss(logits, torch.zeros(2, 5)).item() == pytest.approx(5 * math.log(2))


def test_matching_by_the_formula():
    logits, labels = torch.randn(4, 2, dtype=torch.float64), torch.tensor([1, 0, 1, 1])
    losses = [-logits.log_softmax(1)[row, label].item() for row, label in enumerate(labels.tolist())]
    assert matching_loss(logits, labels).item() == pytest.approx(sum(losses) / 4)
    counted = torch.tensor([True, True, False, True])
    assert matching_loss(logits, labels, counted).item() == pytest.approx((losses[0] + losses[1] + losses[3]) / 3)


def test_tokens_by_a_loop_and_none_at_all():
    logits, labels = torch.randn(2, 3, 7, dtype=torch.float64), torch.full((2, 3), IGNORED_TOKEN)
    logits.requires_grad_()
    nothing = token_loss(logits, labels)
    nothing.backward()
    assert nothing.item() == 0 and logits.grad.abs().sum() == 0
    labels[0, 1], labels[1, 2] = 4, 6
    expected = -(logits[0, 1].log_softmax(0)[4] + logits[1, 2].log_softmax(0)[6]) / 2
    assert_close(token_loss(logits, labels), expected)


@pytest.mark.parametrize("loss", ["answers", "matching", "tokens"])
def test_half_precision_is_raised(loss):
    """float32 of the very numbers: 1e-3, not 1e-2."""
    logits = torch.randn(6, 5).bfloat16() * 5
    functions = {
        "answers": lambda values: answer_loss(values, torch.zeros(6, 5)),
        "matching": lambda values: matching_loss(values[:, :2], torch.zeros(6, dtype=torch.long)),
        "tokens": lambda values: token_loss(values[None], torch.ones(1, 6, dtype=torch.long)),
    }
    result = functions[loss](logits)
    assert result.dtype == torch.float32
    assert_close(result, functions[loss](logits.double()).float(), rtol=1e-5, atol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(functions[loss](logits), result, rtol=0, atol=0)


def test_equal_texts_and_equal_labels_are_no_false_pairs():
    ids = torch.tensor([[0, 5, 2, 9], [0, 5, 2, 7], [0, 5, 8, 2], [0, 6, 2, 1]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 0]])
    expected = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1], [1, 1, 0, 1], [1, 1, 1, 0]]).bool()
    assert torch.equal(false_pairs(ids, mask), expected)  # what padding holds does not count
    assert torch.equal(false_pairs(ids), ~torch.eye(4).bool())
    labels = torch.tensor([3, 4, 4, 4])
    expected = torch.tensor([[0, 0, 1, 1], [0, 0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0]]).bool()
    assert torch.equal(false_pairs(ids, mask, labels), expected)


def test_a_longer_text_is_another_text():
    ids, mask = torch.tensor([[0, 5, 2, 1], [0, 5, 2, 1]]), torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    assert false_pairs(ids, mask)[0, 1]


@pytest.mark.parametrize("hard", [False, True])
def test_the_draw_keeps_to_what_is_allowed(hard):
    generator = torch.Generator().manual_seed(0)
    allowed = torch.tensor([[0, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 0]]).bool()
    similarities = 50 * torch.randn(4, 4, generator=generator) if hard else None
    for _ in range(50):
        columns, found = draw_false_partners(allowed, similarities, generator)
        assert found.tolist() == [True, True, False, True]
        assert allowed[torch.arange(4), columns][found].all() and columns[2] == 0


def test_how_often_which_partner_is_drawn():
    """10000 draws at once: rows of the softmax over what is allowed, within four standard deviations."""
    count = 10000
    logits = torch.tensor([9.0, 0.0, 1.0, -1.0]).expand(count, 4)
    allowed = torch.tensor([False, True, True, True]).expand(count, 4)
    generator = torch.Generator().manual_seed(0)
    columns, _ = draw_false_partners(allowed, logits, generator)
    expected = torch.tensor([0.0, 1.0, math.e, 1 / math.e])
    expected = expected / expected.sum()
    frequencies = columns.bincount(minlength=4) / count
    assert ((frequencies - expected).abs() <= 4 * (expected * (1 - expected) / count).sqrt()).all()
    even, _ = draw_false_partners(allowed, None, generator)
    assert ((even.bincount(minlength=4)[1:] / count - 1 / 3).abs() < 0.02).all()


def test_similarities_get_no_gradient():
    similarities = torch.randn(3, 3, requires_grad=True)
    columns, _ = draw_false_partners(~torch.eye(3).bool(), similarities)
    assert not columns.requires_grad
