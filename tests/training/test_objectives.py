"""The objective of pretraining: the model's own loss and the prototypes' two terms beside it, in closed form."""

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
@pytest.mark.parametrize(("weight", "alignment", "smoothing"), [(1.0, 5.0, 0.1), (0.25, 0.0, 0.0), (3.0, 0.5, 0.3)])
@pytest.mark.parametrize("align_texts", [True, False])
def test_the_loss_is_the_models_the_classification_and_the_alignment(
    model, inputs, weight, alignment, smoothing, align_texts
):
    objective = ContrastivePretraining(
        model,
        num_labels=LABELS,
        prototype_weight=weight,
        alignment_weight=alignment,
        prototype_scale=7.0,
        label_smoothing=smoothing,
    ).eval()
    class_labels = torch.tensor([8, 0, 8, 3, 3, 1])
    output = model(**inputs)
    prototypes = objective.prototypes
    assert prototypes.shape == (LABELS, model.config.projection_dim)
    wanted = output.loss + weight * slow_cross_entropy(7 * output.image_embeds @ prototypes.T, class_labels, smoothing)
    if align_texts:
        own = prototypes[class_labels]
        cosines = (output.text_embeds * own).sum(dim=1) / own.norm(dim=1)  # the embedding's norm is 1
        wanted = wanted + alignment * (1 - cosines).mean()
    loss = objective(**inputs, class_labels=class_labels, align_texts=align_texts)
    assert_close(loss, wanted, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("arguments", [{}, {"num_labels": 0}, {"num_labels": LABELS, "prototype_weight": 0.0}])
def test_without_labels_or_weight_there_are_no_prototypes(model, inputs, arguments):
    objective = ContrastivePretraining(model, **arguments).eval()
    assert {name for name, _ in objective.named_parameters()} == {
        f"model.{name}" for name, _ in model.named_parameters()
    }
    for class_labels in (None, torch.zeros(BATCH, dtype=torch.long)):
        assert torch.equal(objective(**inputs, class_labels=class_labels), model(**inputs).loss)


@torch.no_grad()
def test_a_batch_without_class_labels_leaves_the_prototypes_out(model, inputs):
    objective = ContrastivePretraining(model, num_labels=LABELS).eval()
    assert torch.equal(objective(**inputs), model(**inputs).loss)


def gradients_of(objective, inputs, **more) -> dict[str, torch.Tensor | None]:
    objective.zero_grad()
    objective(**inputs, **more).backward()
    return {name: weight.grad.clone() for name, weight in objective.named_parameters() if weight.grad is not None}


def test_pictures_move_the_prototypes_and_texts_follow_them(model, inputs):
    objective = ContrastivePretraining(model, num_labels=LABELS).eval()
    class_labels = torch.arange(BATCH)
    alone = gradients_of(objective, inputs)
    pictures = gradients_of(objective, inputs, class_labels=class_labels, align_texts=False)
    both = gradients_of(objective, inputs, class_labels=class_labels)
    assert "prototypes" not in alone
    assert pictures["prototypes"].abs().sum() > 0
    assert_close(both["prototypes"], pictures["prototypes"])  # the alignment leaves them where they are
    for name in alone:
        of_text, of_image = name.startswith("model.text_"), name.startswith(("model.vision_", "model.visual_"))
        by_pictures = not torch.allclose(pictures[name], alone[name], rtol=1e-4, atol=1e-7)
        by_texts = not torch.allclose(both[name], pictures[name], rtol=1e-4, atol=1e-7)
        assert not (by_pictures and not of_image), name
        assert not (by_texts and not of_text), name
    assert not torch.allclose(pictures["model.visual_projection.weight"], alone["model.visual_projection.weight"])
    assert not torch.allclose(both["model.text_projection.weight"], alone["model.text_projection.weight"])


def test_in_bfloat16_the_loss_is_float32_and_near(model, inputs):
    objective = ContrastivePretraining(model, num_labels=LABELS).eval()
    class_labels = torch.arange(BATCH)
    exact = objective(**inputs, class_labels=class_labels)
    rough = Bfloat16Forward(objective)(**inputs, class_labels=class_labels)
    assert rough.dtype == torch.float32
    assert rough.item() == pytest.approx(exact.item(), rel=0.03)
    rough.backward()
    assert all(weight.grad is not None and weight.grad.dtype == torch.float32 for weight in objective.parameters())


@pytest.mark.parametrize(
    "arguments", [{"num_labels": -1}, {"num_labels": 3, "prototype_weight": -0.5}, {"alignment_weight": -1.0}]
)
def test_impossible_settings_are_refused(model, arguments):
    with pytest.raises(ValueError, match="expected num_labels, prototype_weight and alignment_weight of at least 0"):
        ContrastivePretraining(model, **arguments)
