"""PEFT: low-rank adapters on both towers and on every head, trained, saved, loaded, switched and merged."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn
from torch.testing import assert_close
from transformers import AutoModel, AutoModelForImageClassification, PreTrainedModel, pipeline

from tests.tiny_florence import (
    random_pixels,
    tiny_image_processor,
    tiny_model,
    tiny_processor,
    tiny_tokenizer,
    tiny_vision_config,
)
from transformers_florence import (
    FlorenceBackbone,
    FlorenceForImageClassification,
    FlorenceModel,
    FlorenceTextModel,
    FlorenceVisionModel,
)
from transformers_florence.training.lora import LORA_TARGETS, lora_targets

peft = pytest.importorskip("peft", reason="needs peft: pip install 'transformers_florence[train]'")

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*gradient_checkpointing.* is deprecated",  # PEFT still calls transformers by its old names
    "ignore:Already found a `peft_config` attribute",  # two adapters on one model are meant
)
HEADS = [FlorenceModel, FlorenceForImageClassification, FlorenceVisionModel, FlorenceTextModel, FlorenceBackbone]
NAMES = {0: "cat", 1: "dog", 2: "fox", 3: "owl"}


def texts() -> dict[str, torch.Tensor]:
    return dict(tiny_tokenizer()(["a cat", "a dog", "a red bicycle"], return_tensors="pt", padding=True))


def batch_for(head: type[PreTrainedModel]) -> dict[str, torch.Tensor]:
    if head is FlorenceTextModel:
        return texts()
    if head is FlorenceModel:
        return {**texts(), "pixel_values": random_pixels(3), "labels": torch.tensor([0, 1, 0])}
    labels = {"labels": torch.tensor([0, 1, 3])} if head is FlorenceForImageClassification else {}
    return {"pixel_values": random_pixels(3), **labels}


def result_of(output: Any) -> torch.Tensor:
    """What a model is for, as one tensor."""
    for name in ("logits_per_image", "logits", "pooler_output"):
        if name in output:
            return output[name]
    return torch.cat([feature_map.flatten(1) for feature_map in output.feature_maps], dim=1)


def loss_of(output: Any) -> torch.Tensor:
    """The head's own loss, or for a tower the distance of its result from one."""
    return output.loss if "loss" in output else (result_of(output) - 1).square().mean()


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[type, Path]:
    """A checkpoint of every head, without stochastic depth: two runs of a step are then the same."""
    root = tmp_path_factory.mktemp("bases")
    torch.manual_seed(0)
    tiny_model(vision_config=tiny_vision_config(drop_path_rate=0.0)).save_pretrained(root / "FlorenceModel")
    for head in HEADS[1:]:
        labels = {"id2label": NAMES} if head is FlorenceForImageClassification else {}
        head.from_pretrained(root / "FlorenceModel", **labels).save_pretrained(root / head.__name__)
    tiny_processor().save_pretrained(root / "FlorenceModel")
    tiny_image_processor().save_pretrained(root / "FlorenceForImageClassification")
    return {head: root / head.__name__ for head in HEADS}


def adapted(model: PreTrainedModel, **options: Any) -> Any:
    """The model with an adapter whose start is the identity, as PEFT's default is."""
    return peft.get_peft_model(model, peft.LoraConfig(**{"target_modules": LORA_TARGETS, "r": 4, **options}))


def train(model: nn.Module, batch: dict[str, torch.Tensor], steps: int = 4) -> list[float]:
    """A few steps of AdamW on one batch; returns the loss before each."""
    model.train()
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=3e-2)
    losses = []
    for _ in range(steps):
        loss = loss_of(model(**batch))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


@torch.no_grad()
def compute(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return result_of(model(**batch))


def test_the_default_targets_are_the_linear_layers_of_both_towers_and_nothing_else():
    model = tiny_model()
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    lora = adapted(model).base_model
    assert set(lora.targeted_module_names) == linear - {"visual_projection", "text_projection"}
    for tower, other in (("vision_model", "text_model"), ("text_model", "vision_model")):
        names = adapted(tiny_model(), target_modules=lora_targets(tower)).base_model.targeted_module_names
        assert names and set(names) == {name for name in lora.targeted_module_names if not name.startswith(other)}
    with pytest.raises(ValueError, match="expected a tower, one of vision_model, text_model, got 'image'"):
        lora_targets("image")


@pytest.mark.parametrize("head", HEADS)
def test_train_save_load_and_merge(head, folders, tmp_path):
    batch = batch_for(head)
    base = head.from_pretrained(folders[head])
    before = compute(base, batch)
    model = adapted(base)
    assert torch.equal(compute(model, batch), before), "an adapter starts as the identity"
    losses = train(model, batch)
    after = compute(model, batch)
    assert losses[-1] < losses[0] and not torch.allclose(after, before, atol=1e-3)
    still = {name: weight for name, weight in model.named_parameters() if not weight.requires_grad}
    assert all(weight.grad is None for weight in still.values())
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    # A backbone's last stage is normed for the features alone, so every adapter has a part in every result.
    assert all(weight.grad is not None and weight.grad.any() for weight in trained.values())

    model.save_pretrained(tmp_path / "adapter")
    assert not list((tmp_path / "adapter").glob("model*.safetensors")), "the base stays where it is"
    loaded = peft.PeftModel.from_pretrained(head.from_pretrained(folders[head]), tmp_path / "adapter")
    assert torch.equal(compute(loaded, batch), after)

    merged = loaded.merge_and_unload()
    assert type(merged) is head and not any("lora" in name for name, _ in merged.named_parameters())
    assert_close(compute(merged, batch), after, atol=1e-5, rtol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    assert_close(compute(head.from_pretrained(tmp_path / "merged"), batch), after, atol=1e-5, rtol=1e-5)


def test_a_merged_weight_is_the_sum_that_lora_defines(folders):
    """W + alpha / r * B A (LoRA, Hu et al. 2021, section 4.1), in a layer that computes through a convolution too."""
    model = adapted(FlorenceModel.from_pretrained(folders[FlorenceModel]), lora_alpha=6, init_lora_weights=False)
    for layer in ("vision_model.encoder.stages.1.layers.1.attention.q_proj", "text_model.encoder.layers.0.mlp.fc1"):
        module = model.base_model.model.get_submodule(layer)
        product = module.lora_B["default"].weight @ module.lora_A["default"].weight
        expected = module.base_layer.weight + 6 / 4 * product
        hidden_states = torch.randn(2, 3, 5, module.in_features)
        by_hand = hidden_states @ expected.T + module.base_layer.bias
        assert_close(module(hidden_states), by_hand, atol=1e-5, rtol=1e-5)
        module.merge()
        assert_close(module.base_layer.weight, expected, atol=1e-6, rtol=0)


def test_several_adapters_are_switched(folders, tmp_path):
    head = FlorenceModel
    batch = batch_for(head)
    other = {**batch, "labels": torch.tensor([0, 0, 1])}
    model = adapted(head.from_pretrained(folders[head]))
    before = compute(head.from_pretrained(folders[head]), batch)
    train(model, batch)
    model.add_adapter("other", peft.LoraConfig(target_modules=lora_targets("vision_model"), r=2))
    model.set_adapter("other")
    train(model, other)
    model.save_pretrained(tmp_path)
    results = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        results[name] = compute(model, batch)
    assert not torch.allclose(results["default"], results["other"], atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(compute(model, batch), before)

    loaded = peft.PeftModel.from_pretrained(head.from_pretrained(folders[head]), tmp_path)
    loaded.load_adapter(tmp_path / "other", adapter_name="other")
    for name in ("other", "default", "other"):
        loaded.set_adapter(name)
        assert torch.equal(compute(loaded, batch), results[name])
    loaded.set_adapter("default")
    loaded.delete_adapter("other")
    assert_close(compute(loaded.merge_and_unload(), batch), results["default"], atol=1e-5, rtol=1e-5)


def test_adapters_by_transformers_own_methods(folders, tmp_path):
    head, batch = FlorenceModel, batch_for(FlorenceModel)
    model = head.from_pretrained(folders[head])
    before = compute(model, batch)
    results = {}
    for name, targets in (("first", LORA_TARGETS), ("second", lora_targets("text_model"))):
        model.add_adapter(peft.LoraConfig(target_modules=targets, r=4), adapter_name=name)
        model.set_adapter(name)
        train(model, batch)
        results[name] = compute(model, batch)
        model.save_pretrained(tmp_path / name)
    assert not torch.allclose(results["first"], results["second"], atol=1e-3)
    plain = head.from_pretrained(folders[head])
    for name in results:
        plain.load_adapter(str(tmp_path / name), adapter_name=name)
    for name in results:
        plain.set_adapter(name)
        assert torch.equal(compute(plain, batch), results[name])
    plain.disable_adapters()
    assert torch.equal(compute(plain, batch), before)


def test_a_new_classifier_is_trained_and_saved_with_the_adapter(folders, tmp_path):
    head, batch = FlorenceForImageClassification, batch_for(FlorenceForImageClassification)

    def fresh() -> PreTrainedModel:
        torch.manual_seed(1)  # the classifier is new each time, and each time the same
        return head.from_pretrained(folders[FlorenceModel], num_labels=4)

    before = fresh().classifier.weight
    model = adapted(fresh(), modules_to_save=["classifier"])
    train(model, batch)
    after = compute(model, batch)
    wrapper = model.base_model.model.classifier
    assert torch.equal(wrapper.original_module.weight, before)
    assert not torch.allclose(wrapper.modules_to_save["default"].weight, before, atol=1e-3)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        another = fresh()
        another.classifier.weight.zero_()  # the file has the trained one
    loaded = peft.PeftModel.from_pretrained(another, tmp_path)
    assert torch.equal(compute(loaded, batch), after)
    merged = loaded.merge_and_unload()
    assert type(merged.classifier) is nn.Linear
    assert_close(compute(merged, batch), after, atol=1e-5, rtol=1e-5)


def test_the_temperature_stays_unless_it_is_freed_by_hand(folders):
    """`logit_scale` is a parameter, not a module: `modules_to_save` cannot name it."""
    base = FlorenceModel.from_pretrained(folders[FlorenceModel])
    before = base.logit_scale.item()
    model = adapted(base, modules_to_save=["logit_scale"])
    train(model, batch_for(FlorenceModel))
    assert base.logit_scale.item() == before and base.logit_scale.grad is None
    base.logit_scale.requires_grad_(True)
    train(model, batch_for(FlorenceModel))
    assert base.logit_scale.item() != before
    assert not [name for name in peft.get_peft_model_state_dict(model) if "logit_scale" in name]
    assert model.merge_and_unload().logit_scale.item() == base.logit_scale.item()  # the merged model has it


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("head", [FlorenceModel, FlorenceForImageClassification])
def test_activation_checkpointing_changes_no_adapters_gradient(head, use_reentrant, folders, monkeypatch):
    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = head.from_pretrained(folders[head])
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
        model = adapted(model, init_lora_weights=False).train()
        loss_of(model(**batch_for(head))).backward()
        return {name: each.grad for name, each in model.named_parameters() if each.requires_grad}

    expected = gradients(checkpointing=False)
    calls = []
    checkpoint: Callable = torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(
        "transformers.modeling_utils.checkpoint",
        lambda *args, **kwargs: calls.append(1) or checkpoint(*args, **kwargs),
    )
    got = gradients(checkpointing=True)
    assert len(calls) == 3 + 2 * (head is FlorenceModel), "each layer goes through a checkpoint"
    assert len(got) > 20 and all(gradient is not None and gradient.any() for gradient in got.values())
    assert_close(got, expected, atol=1e-6, rtol=1e-5)


@pytest.fixture(scope="module")
def adapters(folders, tmp_path_factory) -> dict[type, Path]:
    """Trained adapter folders, each with the processor that a pipeline looks for."""
    root = tmp_path_factory.mktemp("adapters")
    torch.manual_seed(0)
    for head in (FlorenceModel, FlorenceForImageClassification):
        options = {"modules_to_save": ["classifier"]} if head is FlorenceForImageClassification else {}
        model = adapted(head.from_pretrained(folders[head]), **options)
        train(model, batch_for(head))
        model.save_pretrained(root / head.__name__)
    tiny_processor().save_pretrained(root / "FlorenceModel")
    tiny_image_processor().save_pretrained(root / "FlorenceForImageClassification")
    return {head: root / head.__name__ for head in (FlorenceModel, FlorenceForImageClassification)}


def by_hand(head: type[PreTrainedModel], folders: dict[type, Path], adapters: dict[type, Path]) -> nn.Module:
    return peft.PeftModel.from_pretrained(head.from_pretrained(folders[head]), adapters[head])


PICTURE = Image.effect_mandelbrot((40, 48), (-2, -1.5, 1, 1.5), 100).convert("RGB")


def test_zero_shot_pipeline_on_an_adapter_folder(folders, adapters):
    labels = ["cat", "dog", "red bicycle"]
    pipe = pipeline("zero-shot-image-classification", model=str(adapters[FlorenceModel]))
    result = {entry["label"]: entry["score"] for entry in pipe(PICTURE, labels, hypothesis_template="a {}")}
    inputs = tiny_processor()(images=PICTURE, text=[f"a {label}" for label in labels], return_tensors="pt")
    expected = compute(by_hand(FlorenceModel, folders, adapters), inputs)[0].softmax(-1)
    base = compute(FlorenceModel.from_pretrained(folders[FlorenceModel]), inputs)[0].softmax(-1)
    assert_close([result[label] for label in labels], expected.tolist(), atol=1e-5, rtol=0)
    assert not torch.allclose(expected, base, atol=1e-2)


def test_classification_pipeline_on_an_adapter_folder(folders, adapters):
    pipe = pipeline("image-classification", model=str(adapters[FlorenceForImageClassification]))
    result = {entry["label"]: entry["score"] for entry in pipe(PICTURE, top_k=4)}
    inputs = tiny_image_processor()(PICTURE, return_tensors="pt")
    head = FlorenceForImageClassification
    expected = compute(by_hand(head, folders, adapters), inputs)[0].softmax(-1)
    base = compute(head.from_pretrained(folders[head]), inputs)[0].softmax(-1)
    assert_close([result[NAMES[index]] for index in range(4)], expected.tolist(), atol=1e-5, rtol=0)
    assert not torch.allclose(expected, base, atol=1e-2)


def test_auto_classes_follow_an_adapter_to_its_base(folders, adapters):
    for auto, head in (
        (AutoModel, FlorenceModel),
        (AutoModelForImageClassification, FlorenceForImageClassification),
    ):
        batch = batch_for(head)
        expected = compute(by_hand(head, folders, adapters), batch)
        found = auto.from_pretrained(adapters[head])
        assert type(found) is head and torch.equal(compute(found, batch), expected)
        with pytest.raises(
            ValueError, match=re.escape("import_allowlist=['transformers_florence.modeling_florence']")
        ):
            peft.AutoPeftModel.from_pretrained(adapters[head])
        found = peft.AutoPeftModel.from_pretrained(adapters[head], import_allowlist=["transformers_florence"])
        assert type(found.base_model.model) is head and torch.equal(compute(found, batch), expected)
