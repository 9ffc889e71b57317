"""The objective of pretraining: the model's own loss, and a smoothed cross-entropy beside it, in closed form."""

import pytest
import torch
from torch.testing import assert_close

from tests.tiny_florence import CONTEXT, VOCABULARY, random_pixels, tiny_model
from transformers_florence.training.objectives import ContrastivePretraining
from transformers_florence.training.precision import Bfloat16Forward

BATCH, LABELS = 6, 9


@pytest.fixture
def model():
    return tiny_model()  # in evaluation mode: no stochastic depth


@pytest.fixture
def inputs() -> dict[str, torch.Tensor]:
    tokens = torch.randint(VOCABULARY - 2, (BATCH, CONTEXT))
    tokens[:, 0], tokens[:, -1] = VOCABULARY - 2, VOCABULARY - 1
    return {
        "pixel_values": random_pixels(BATCH),
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "labels": torch.tensor([0, 1, 0, 2, 1, 3]),
    }


def slow_cross_entropy(logits: torch.Tensor, targets: torch.Tensor, smoothing: float) -> torch.Tensor:
    """Against a target that has `smoothing` spread evenly over all labels: (rows, labels), (rows,) -> scalar."""
    log_probabilities = logits - torch.logsumexp(logits, dim=1, keepdim=True)
    wanted = torch.full_like(logits, smoothing / logits.shape[1])
    for row, target in enumerate(targets.tolist()):
        wanted[row, target] += 1 - smoothing
    return -(wanted * log_probabilities).sum() / len(logits)


@torch.no_grad()
@pytest.mark.parametrize(("weight", "smoothing"), [(1.0, 0.1), (0.25, 0.0), (3.0, 0.3)])
def test_the_loss_is_the_models_and_the_weighted_classifiers(model, inputs, weight, smoothing):
    objective = ContrastivePretraining(
        model, num_labels=LABELS, classifier_weight=weight, label_smoothing=smoothing
    ).eval()
    class_labels = torch.tensor([8, 0, 8, 3, 3, 1])
    pooled = model.vision_model(inputs["pixel_values"]).pooler_output
    logits = pooled @ objective.classifier.weight.T + objective.classifier.bias
    wanted = model(**inputs).loss + weight * slow_cross_entropy(logits, class_labels, smoothing)
    assert_close(objective(**inputs, class_labels=class_labels), wanted, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("arguments", [{}, {"num_labels": 0}, {"num_labels": LABELS, "classifier_weight": 0.0}])
def test_without_labels_or_weight_there_is_no_classifier(model, inputs, arguments):
    objective = ContrastivePretraining(model, **arguments).eval()
    assert {name for name, _ in objective.named_parameters()} == {
        f"model.{name}" for name, _ in model.named_parameters()
    }
    for class_labels in (None, torch.zeros(BATCH, dtype=torch.long)):
        assert torch.equal(objective(**inputs, class_labels=class_labels), model(**inputs).loss)


@torch.no_grad()
def test_a_batch_without_class_labels_leaves_the_classifier_out(model, inputs):
    objective = ContrastivePretraining(model, num_labels=LABELS).eval()
    assert torch.equal(objective(**inputs), model(**inputs).loss)


def test_the_classifier_teaches_the_image_tower_and_not_the_text_tower(model, inputs):
    objective = ContrastivePretraining(model, num_labels=LABELS).eval()
    class_labels = torch.arange(BATCH)

    def gradients(**more) -> dict[str, torch.Tensor]:
        objective.zero_grad()
        objective(**inputs, **more).backward()
        return {name: weight.grad.clone() for name, weight in model.named_parameters()}

    alone, both = gradients(), gradients(class_labels=class_labels)
    assert objective.classifier.weight.grad.abs().sum() > 0
    for name, gradient in both.items():
        changed = not torch.allclose(gradient, alone[name], rtol=1e-4, atol=1e-7)
        if name.startswith("text_") or name in ("logit_scale", "visual_projection.weight"):
            assert not changed, name
    assert not torch.allclose(both["vision_model.norm.bias"], alone["vision_model.norm.bias"], rtol=1e-2)


def test_in_bfloat16_the_loss_is_float32_and_near(model, inputs):
    objective = ContrastivePretraining(model, num_labels=LABELS).eval()
    class_labels = torch.arange(BATCH)
    exact = objective(**inputs, class_labels=class_labels)
    rough = Bfloat16Forward(objective)(**inputs, class_labels=class_labels)
    assert rough.dtype == torch.float32
    assert rough.item() == pytest.approx(exact.item(), rel=0.03)
    rough.backward()
    assert all(weight.grad is not None and weight.grad.dtype == torch.float32 for weight in objective.parameters())


@pytest.mark.parametrize("arguments", [{"num_labels": -1}, {"num_labels": 3, "classifier_weight": -0.5}])
def test_impossible_settings_are_refused(model, arguments):
    with pytest.raises(ValueError, match="expected num_labels and classifier_weight of at least 0"):
        ContrastivePretraining(model, **arguments)
