"""The objective of pretraining: the model's own loss and the prototypes' two terms beside it, in closed form."""

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from tests.tiny_florence import CONTEXT, VOCABULARY, random_pixels, tiny_config, tiny_model, tiny_vision_config
from transformers_florence import FlorenceModel
from transformers_florence.training.objectives import ContrastiveObjective, lock_image_tower
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


def loss_of(objective: ContrastiveObjective, inputs: dict[str, torch.Tensor], **more) -> torch.Tensor:
    """Forward, and the loss of what it returned."""
    parts = {name: value for name, value in inputs.items() if name != "labels"}
    return objective.loss(**objective(**parts), labels=inputs["labels"], **more)


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
    objective = ContrastiveObjective(
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
    loss = loss_of(objective, inputs, class_labels=class_labels, align_texts=align_texts)
    assert_close(loss, wanted, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("arguments", [{}, {"num_labels": 0}, {"num_labels": LABELS, "prototype_weight": 0.0}])
def test_without_labels_or_weight_there_are_no_prototypes(model, inputs, arguments):
    objective = ContrastiveObjective(model, **arguments).eval()
    assert {name for name, _ in objective.named_parameters()} == {
        f"model.{name}" for name, _ in model.named_parameters()
    }
    for class_labels in (None, torch.zeros(BATCH, dtype=torch.long)):
        assert_close(loss_of(objective, inputs, class_labels=class_labels), model(**inputs).loss)


@torch.no_grad()
def test_a_batch_without_class_labels_leaves_the_prototypes_out(model, inputs):
    objective = ContrastiveObjective(model, num_labels=LABELS).eval()
    assert_close(loss_of(objective, inputs), model(**inputs).loss)


def gradients_of(objective, inputs, **more) -> dict[str, torch.Tensor | None]:
    objective.zero_grad()
    loss_of(objective, inputs, **more).backward()
    return {name: weight.grad.clone() for name, weight in objective.named_parameters() if weight.grad is not None}


def test_pictures_move_the_prototypes_and_texts_follow_them(model, inputs):
    objective = ContrastiveObjective(model, num_labels=LABELS).eval()
    class_labels = torch.arange(BATCH)
    alone = gradients_of(objective, inputs)
    pictures = gradients_of(objective, inputs, class_labels=class_labels, align_texts=False)
    both = gradients_of(objective, inputs, class_labels=class_labels)
    assert not alone.pop("prototypes").any()
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
    objective = ContrastiveObjective(model, num_labels=LABELS).eval()
    class_labels = torch.arange(BATCH)
    exact = loss_of(objective, inputs, class_labels=class_labels)
    labels = inputs.pop("labels")
    rough = objective.loss(**Bfloat16Forward(objective)(**inputs), labels=labels, class_labels=class_labels)
    assert rough.dtype == torch.float32
    assert rough.item() == pytest.approx(exact.item(), rel=0.03)
    rough.backward()
    assert all(weight.grad is not None and weight.grad.dtype == torch.float32 for weight in objective.parameters())


@pytest.mark.parametrize(
    "arguments", [{"num_labels": -1}, {"num_labels": 3, "prototype_weight": -0.5}, {"alignment_weight": -1.0}]
)
def test_impossible_settings_are_refused(model, arguments):
    with pytest.raises(ValueError, match="expected num_labels, prototype_weight and alignment_weight of at least 0"):
        ContrastiveObjective(model, **arguments)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_objective_is_the_models_own_loss(inputs, reduction):
    model = tiny_model(loss_reduction=reduction)
    labels = inputs.pop("labels")
    for objective, expected in (
        ("unicl", model(**inputs, labels=labels).loss),
        ("clip", model(**inputs, return_loss=True).loss),
    ):
        module = ContrastiveObjective(model, objective=objective).eval()
        outputs = module(**inputs)
        assert set(outputs) == {"image_embeds", "text_embeds", *module.shared_outputs}
        assert_close(module.loss(**outputs, labels=labels), expected)


def test_the_sigmoid_objective_learns_its_bias(model, inputs):
    module = ContrastiveObjective(model, objective="sigmoid").eval()
    labels = inputs.pop("labels")
    outputs = module(**inputs)
    assert outputs["logit_bias"] is not module.logit_bias and outputs["logit_bias"].item() == -10
    logits = outputs["logit_scale"] * outputs["image_embeds"] @ outputs["text_embeds"].T - 10
    same = labels[:, None] == labels
    expected = F.binary_cross_entropy_with_logits(logits, same.float(), reduction="sum") / 6
    loss = module.loss(**outputs, labels=labels)
    assert_close(loss, expected)
    loss.backward()
    assert_close(module.logit_bias.grad, ((logits.sigmoid() - same.float()).sum() / 6).detach())
    assert set(module.shared_outputs) == {"logit_scale", "logit_bias"}
    with pytest.raises(ValueError, match="logit_bias as a floating-point tensor, got NoneType"):
        module.loss(**{**outputs, "logit_bias": None}, labels=labels)


def test_another_objective_is_refused():
    with pytest.raises(ValueError, match="unicl, clip, sigmoid, got 'siglip'"):
        ContrastiveObjective(tiny_model(), objective="siglip")


@pytest.mark.parametrize("projection", [True, False])
def test_a_locked_image_tower_neither_learns_nor_drops(inputs, projection):
    model = FlorenceModel(tiny_config(vision_config=tiny_vision_config(drop_path_rate=0.9)))
    labels = inputs.pop("labels")
    module = ContrastiveObjective(model).train()
    assert not torch.equal(module(**inputs)["image_embeds"], module(**inputs)["image_embeds"])
    lock_image_tower(model, projection=projection)
    module.train()
    assert torch.equal(module(**inputs)["image_embeds"], module(**inputs)["image_embeds"])
    assert model.text_model.training and not model.vision_model.training
    module.loss(**module(**inputs), labels=labels).backward()
    learning = {name for name, weight in model.named_parameters() if weight.grad is not None}
    assert all(weight.grad is None for weight in model.vision_model.parameters())
    assert ("visual_projection.weight" in learning) is not projection
    assert {"logit_scale", "text_projection.weight"} <= learning
    assert all(f"text_model.{name}" in learning for name, _ in model.text_model.named_parameters())
    model.vision_model.requires_grad_(True)
    assert module.train().model.vision_model.training  # unlocked again
    assert not module.eval().model.text_model.training


def test_locked_or_not_the_texts_get_the_same_gradient(model, inputs):
    objective = ContrastiveObjective(model).eval()
    free = gradients_of(objective, inputs)
    lock_image_tower(model)
    locked = gradients_of(objective, inputs)
    assert not any(name.startswith(("model.vision_model.", "model.visual_projection.")) for name in locked)
    assert_close(locked, {name: free[name] for name in locked}, rtol=0, atol=0)
    assert any(gradient.any() for name, gradient in locked.items() if name.startswith("model.text_model."))
