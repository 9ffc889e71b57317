"""Contrastive pretraining with a classifier beside it: both terms by hand, and what each reaches."""

import pytest
import torch
from torch.testing import assert_close

from tests.tiny_florence import VOCABULARY, random_pixels, tiny_config, tiny_vision_config
from transformers_florence import FlorenceModel
from transformers_florence.training.objectives import ContrastivePretraining

LABELS = torch.tensor([0, 2, 2, 1])
NUM_LABELS = 5


@pytest.fixture
def model() -> FlorenceModel:
    return FlorenceModel(tiny_config(vision_config=tiny_vision_config(drop_path_rate=0.0)))


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    tokens = torch.randint(VOCABULARY - 2, (len(LABELS), 6))
    tokens[:, -1] = VOCABULARY - 1
    return {
        "pixel_values": random_pixels(len(LABELS)),
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "labels": LABELS,
    }


def smoothed_cross_entropy(logits: torch.Tensor, labels: torch.Tensor, smoothing: float) -> torch.Tensor:
    """Written out: the right label weighs 1 - smoothing, and every label smoothing / number more."""
    log_probabilities = (logits.exp() / logits.exp().sum(dim=1, keepdim=True)).log()
    right = log_probabilities[torch.arange(len(labels)), labels]
    return -((1 - smoothing) * right + smoothing * log_probabilities.mean(dim=1)).mean()


@pytest.mark.parametrize(("weight", "smoothing"), [(1.0, 0.1), (0.25, 0.0)])
def test_the_loss_is_the_sum_of_both(model, batch, weight, smoothing):
    objective = ContrastivePretraining(
        model, num_labels=NUM_LABELS, classifier_weight=weight, label_smoothing=smoothing
    )
    pooled = model.vision_model(batch["pixel_values"]).pooler_output
    logits = pooled @ objective.classifier.weight.T + objective.classifier.bias
    expected = model(**batch).loss + weight * smoothed_cross_entropy(logits, LABELS, smoothing)
    assert_close(objective(**batch, class_labels=LABELS), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("options", [{}, {"num_labels": NUM_LABELS, "classifier_weight": 0.0}])
def test_without_a_classifier_it_is_the_contrastive_loss(model, batch, options):
    objective = ContrastivePretraining(model, **options)
    assert objective.classifier is None
    assert torch.equal(objective(**batch, class_labels=LABELS), model(**batch).loss)
    assert sum(p.numel() for p in objective.parameters()) == sum(p.numel() for p in model.parameters())


def test_without_class_labels_the_classifier_is_left_out(model, batch):
    objective = ContrastivePretraining(model, num_labels=NUM_LABELS)
    loss = objective(**batch)
    assert torch.equal(loss, model(**batch).loss)
    loss.backward()
    assert objective.classifier.weight.grad is None


def test_the_classifier_teaches_the_image_tower_only(model, batch):
    objective = ContrastivePretraining(model, num_labels=NUM_LABELS)
    model(**batch).loss.backward()
    alone = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    objective(**batch, class_labels=LABELS).backward()
    changed = {name for name, p in model.named_parameters() if not torch.allclose(p.grad, alone[name], atol=1e-7)}
    assert changed and all(name.startswith("vision_model.") for name in changed)
    assert objective.classifier.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("wrong", [{"num_labels": -1}, {"num_labels": 3, "classifier_weight": -0.5}])
def test_bad_arguments(model, wrong):
    with pytest.raises(ValueError, match="at least 0"):
        ContrastivePretraining(model, **wrong)
