"""transformers' Trainer on every kind of head: accumulation, evaluation, saving and resuming."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from torch.utils.data import Dataset
from transformers import EvalPrediction, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from tests.tiny_florence import (
    CONTEXT,
    random_pixels,
    tiny_config,
    tiny_model,
    tiny_tokenizer,
    tiny_vision_config,
)
from tests.tiny_heads import HEADS, TABLE, batch_for, tiny_head
from transformers_florence import (
    FlorenceForImageCaptioning,
    FlorenceForImageClassification,
    FlorenceForImageTextRetrieval,
    FlorenceForQuestionAnswering,
    FlorenceForVideoClassification,
    FlorenceModel,
    load_checkpoint,
)

pytest.importorskip("accelerate", reason="needs accelerate: pip install 'transformers_florence[train]'")

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT's calls

CLASSES = ["cat", "dog", "mountain", "red bicycle"]


class Pictures(Dataset):
    """Noise with a class each; `texts` adds the class's name, as the dual encoder wants it."""

    def __init__(self, count: int, *, texts: bool) -> None:
        self.labels = torch.arange(count) % len(CLASSES)
        self.pixel_values = random_pixels(count) + 0.5 * self.labels[:, None, None, None]
        names = [CLASSES[label] for label in self.labels]
        encoded = tiny_tokenizer()(names, return_tensors="pt", padding="max_length", max_length=CONTEXT)
        self.encoded = dict(encoded) if texts else {}

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        texts = {name: values[index] for name, values in self.encoded.items()}
        return {"pixel_values": self.pixel_values[index], "labels": self.labels[index], **texts}

    def batch(self, start: int, stop: int) -> dict[str, torch.Tensor]:
        rows = [self[index] for index in range(start, stop)]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


class KeepGradients(TrainerCallback):
    """The gradients of the last step, as the optimizer got them."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients = {name: each.grad.clone() for name, each in model.named_parameters()}


def classifier(**overrides: Any) -> FlorenceForImageClassification:
    return FlorenceForImageClassification(tiny_vision_config(num_labels=len(CLASSES), **overrides))


def dual_encoder() -> FlorenceModel:
    return tiny_model(vision_config=tiny_vision_config(drop_path_rate=0.0))


def train(model: PreTrainedModel, data: Dataset, folder: Path, callbacks=(), resume: str | None = None, **options):
    """What the Trainer did; pictures come in their order, without stochastic choices other than the model's."""
    fixed = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no", "max_grad_norm": 0.0}
    arguments = TrainingArguments(str(folder), **{**fixed, "train_sampling_strategy": "sequential", **options})
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=list(callbacks))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def trainers_gradients(model: PreTrainedModel, data: Dataset, folder: Path, size: int, steps: int):
    keep = KeepGradients()
    options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "max_steps": 1}
    trainer = train(model, data, folder, [keep], **options)
    assert not trainer.model_accepts_loss_kwargs, "the Trainer has to divide the sum of the losses itself"
    return keep.gradients


def gradients(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of the model's loss on one batch, without the Trainer."""
    model.zero_grad()
    model.train()(**batch).loss.backward()
    return {name: each.grad.clone() for name, each in model.named_parameters()}


def copy_of(model: PreTrainedModel) -> PreTrainedModel:
    copy = type(model)(model.config)
    copy.load_state_dict(model.state_dict())
    return copy


@pytest.mark.parametrize(("size", "steps"), [(8, 1), (4, 2), (2, 4), (1, 8)])
def test_accumulated_classification_has_the_gradients_of_the_large_batch(size, steps, tmp_path):
    """The mean over equal parts' means is the mean over all: exact wherever every picture has a class."""
    model, data = classifier(drop_path_rate=0.0), Pictures(8, texts=False)
    expected = gradients(copy_of(model), data.batch(0, 8))
    assert_close(trainers_gradients(model, data, tmp_path, size, steps), expected, atol=1e-6, rtol=1e-4)


class Rows(Dataset):
    """The samples of a batch, one by one."""

    def __init__(self, batch: dict[str, torch.Tensor]) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return len(self.batch["labels"])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: values[index] for name, values in self.batch.items()}


@pytest.mark.parametrize(
    "head",
    [
        FlorenceForVideoClassification,
        FlorenceForQuestionAnswering,
        FlorenceForImageTextRetrieval,
        FlorenceForImageCaptioning,  # where every text has as many words to predict, as here
    ],
)
def test_accumulated_gradients_of_other_heads_are_those_of_the_large_batch(head, tmp_path):
    model, batch = tiny_head(head), batch_for(head, 4, labels=True)
    expected = gradients(copy_of(model), batch)
    assert_close(trainers_gradients(model, Rows(batch), tmp_path, 2, 2), expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("head", HEADS)
def test_the_trainer_divides_every_heads_loss(head, tmp_path):
    """All losses are means over what a batch holds; transformers would take them for sums over all accumulated."""
    trainer = Trainer(tiny_head(head), TrainingArguments(str(tmp_path), use_cpu=True, report_to=[]))
    assert TABLE[head].labels is None or not trainer.model_accepts_loss_kwargs


def test_accumulated_contrast_is_the_mean_of_small_contrasts(tmp_path):
    """Each part is contrasted within itself, so its negatives are fewer: never the gradients of the large batch."""
    model, data = dual_encoder(), Pictures(8, texts=True)
    halves = [gradients(copy_of(model), data.batch(start, start + 4)) for start in (0, 4)]
    whole = gradients(copy_of(model), data.batch(0, 8))
    assert_close(trainers_gradients(copy_of(model), data, tmp_path, 8, 1), whole, atol=1e-6, rtol=1e-4)
    accumulated = trainers_gradients(model, data, tmp_path, 4, 2)
    expected = {name: (halves[0][name] + halves[1][name]) / 2 for name in whole}
    assert_close(accumulated, expected, atol=1e-6, rtol=1e-4)
    name = "visual_projection.weight"
    assert (accumulated[name] - whole[name]).norm() > 0.05 * whole[name].norm()


def test_the_trainer_divides_an_adapted_models_loss_too(tmp_path):
    peft = pytest.importorskip("peft", reason="needs peft: pip install 'transformers_florence[train]'")
    model = peft.get_peft_model(dual_encoder(), peft.LoraConfig(target_modules=["q_proj"]))
    trainer = Trainer(model, TrainingArguments(str(tmp_path), use_cpu=True, report_to=[]))
    assert not trainer.model_accepts_loss_kwargs


def test_evaluation_of_a_classifier(tmp_path):
    model, data = classifier(), Pictures(10, texts=False)

    def accuracy(prediction: EvalPrediction) -> dict[str, float]:
        return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], per_device_eval_batch_size=4)
    measured = Trainer(model, arguments, eval_dataset=data, compute_metrics=accuracy).evaluate()
    batch = data.batch(0, 10)
    with torch.no_grad():
        output = model.eval()(**batch)
    assert measured["eval_accuracy"] == (output.logits.argmax(-1) == batch["labels"]).double().mean().item()
    assert measured["eval_loss"] == pytest.approx(output.loss.item(), abs=1e-6)


def test_evaluation_of_a_dual_encoder(tmp_path):
    """The metric sees the embeddings of the whole set, in order; the states of single tokens are not collected."""
    model, data, seen = dual_encoder(), Pictures(10, texts=True), []

    def recall(prediction: EvalPrediction) -> dict[str, float]:
        seen.append(prediction.predictions)
        _, _, image_embeds, text_embeds = prediction.predictions
        nearest = (image_embeds @ text_embeds.T).argmax(1)
        return {"recall": float((prediction.label_ids[nearest] == prediction.label_ids).mean())}

    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], per_device_eval_batch_size=4)
    measured = Trainer(model, arguments, eval_dataset=data, compute_metrics=recall).evaluate()
    with torch.no_grad():
        output = model(**data.batch(0, 10))
        losses = [model(**data.batch(start, min(start + 4, 10))).loss.item() for start in (0, 4, 8)]
    assert len(seen[0]) == 4 and all(isinstance(each, np.ndarray) for each in seen[0])
    assert_close(torch.from_numpy(seen[0][2]), output.image_embeds, atol=1e-5, rtol=0)
    assert_close(torch.from_numpy(seen[0][3]), output.text_embeds, atol=1e-5, rtol=0)
    nearest = output.logits_per_image.argmax(1)
    assert measured["eval_recall"] == (data.labels[nearest] == data.labels).double().mean().item()
    assert measured["eval_loss"] == pytest.approx(np.average(losses, weights=[4, 4, 2]), abs=1e-5)


@pytest.mark.parametrize("kind", ["classifier", "dual encoder"])
def test_a_training_is_saved_and_resumed(kind, tmp_path):
    """Four steps, or two, and two more by a model that knows only the checkpoint: the same weights to the last bit."""
    texts = kind == "dual encoder"
    torch.manual_seed(1)
    # Stochastic depth is on: the state of the random numbers has to come back too.
    model = FlorenceModel(tiny_config()) if texts else classifier(drop_path_rate=0.5)
    data = Pictures(8, texts=texts)
    options = {"per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2}
    options |= {"num_train_epochs": 2, "lr_scheduler_type": "constant", "save_only_model": False}
    start = {name: weight.clone() for name, weight in model.state_dict().items()}
    straight = train(model, data, tmp_path, **options).model.state_dict()
    assert any(not torch.equal(straight[name], start[name]) for name in start)

    checkpoint = tmp_path / "checkpoint-2"
    halfway = load_checkpoint(type(model), checkpoint)
    assert any(not torch.equal(straight[name], weight) for name, weight in halfway.state_dict().items())
    resumed = train(type(model)(model.config), data, tmp_path / "again", resume=str(checkpoint), **options)
    assert resumed.state.global_step == 4
    assert_close(dict(resumed.model.state_dict()), dict(straight), atol=0, rtol=0)

    resumed.save_model(tmp_path / "final")
    final = load_checkpoint(type(model), tmp_path / "final")
    assert_close(dict(final.state_dict()), dict(straight), atol=0, rtol=0)


def test_a_classifier_takes_the_dual_encoders_choices_over():
    """Built from a `FlorenceConfig`, as `AutoModelForImageClassification` does with a dual encoder's folder."""
    choices = {"output_hidden_states": True, "gradient_checkpointing": True}
    model = FlorenceForImageClassification(tiny_config(**choices)).train()
    assert model.is_activation_checkpointing and not FlorenceForImageClassification(
        tiny_config()
    ).config.to_dict().get("output_hidden_states")
    output = model(random_pixels(2), labels=torch.tensor([0, 1]))
    assert len(output.hidden_states) == 3
    output.loss.backward()
    assert all(weight.grad is not None for weight in model.parameters())
