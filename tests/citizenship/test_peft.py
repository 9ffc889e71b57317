"""PEFT: low-rank adapters on every part of every head, trained, saved, loaded, switched and merged."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.testing import assert_close
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoModelForObjectDetection,
    AutoModelForPreTraining,
    AutoModelForVideoClassification,
    AutoModelForVisualQuestionAnswering,
    AutoModelForZeroShotObjectDetection,
    PreTrainedModel,
    pipeline,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from tests.tiny_heads import (
    FRAMES,
    HEADS,
    Tensors,
    batch_for,
    processor_for,
    result_of,
    save_heads,
    tiny_head,
)
from transformers_florence import (
    FlorenceForImageCaptioning,
    FlorenceForImageClassification,
    FlorenceForImageTextRetrieval,
    FlorenceForObjectDetection,
    FlorenceForPreTraining,
    FlorenceForQuestionAnswering,
    FlorenceForVideoClassification,
    FlorenceForVideoTextRetrieval,
    FlorenceForZeroShotObjectDetection,
    FlorenceFusionModel,
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
# The same weights: the last bit of a matrix product hangs on where in memory its operands lie.
EXACT = {"atol": 1e-6, "rtol": 1e-5}
# What is trained whole beside the adapters, of each class that has something of its own on the towers.
DETECTION_PARTS = ["pyramid", "class_predictor", "box_predictor", "centerness_predictor", "box_scales"]
NEW_PARTS = {
    FlorenceForImageClassification: ["classifier"],
    FlorenceForObjectDetection: DETECTION_PARTS,
    FlorenceForZeroShotObjectDetection: DETECTION_PARTS,
    FlorenceFusionModel: ["text_transform", "image_transform", "text_pooler", "image_pooler"],
    FlorenceForQuestionAnswering: ["classifier"],
    FlorenceForImageTextRetrieval: ["itm_head"],
    FlorenceForPreTraining: ["itm_head", "mlm_head"],
    FlorenceForImageCaptioning: ["image_transform"],
    FlorenceForVideoClassification: ["classifier"],
}
# Linear layers between the parts, and those of heads, which come with the class.
BETWEEN = (
    "visual_projection",
    "text_projection",
    "_transform",
    "_pooler",
    "classifier",
    "itm_head",
    "mlm_head",
    "lm_head",
)


def loss_of(output: Any) -> torch.Tensor:
    """The head's own loss, or for a tower the distance of its result from one."""
    return output.loss if "loss" in output else (result_of(output) - 1).square().mean()


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[type, Path]:
    """A checkpoint of every head, with what makes its inputs."""
    found = save_heads(tmp_path_factory.mktemp("bases"))
    for head, folder in found.items():
        processor_for(head).save_pretrained(folder)
    return found


def adapted(model: PreTrainedModel, **options: Any) -> Any:
    """The model with an adapter whose start is the identity, as PEFT's default is."""
    return peft.get_peft_model(model, peft.LoraConfig(**{"target_modules": LORA_TARGETS, "r": 4, **options}))


def train(model: nn.Module, head: type[PreTrainedModel], steps: int = 4) -> list[float]:
    """A few steps of AdamW on one batch; returns the loss before each."""
    model.train()
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=3e-2)
    losses = []
    for _ in range(steps):
        torch.manual_seed(0)  # of the false pairs that pretraining draws
        loss = loss_of(model(**batch_for(head, labels=True)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses


@torch.no_grad()
def compute(model: nn.Module, batch: Tensors) -> torch.Tensor:
    return result_of(model(**batch))


@pytest.mark.parametrize("head", HEADS)
def test_the_default_targets_are_the_linear_layers_inside_all_parts_and_nothing_else(head):
    model = tiny_head(head)
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    between = {name for name in linear if any(part in name for part in BETWEEN)}
    names = set(adapted(model).base_model.targeted_module_names)
    joined = {FlorenceModel, FlorenceForVideoTextRetrieval, *NEW_PARTS} - {FlorenceForObjectDetection}
    assert names == linear - between and bool(between) == (head in joined)


@pytest.mark.parametrize(
    ("head", "parts"),
    [
        (FlorenceModel, {"vision_model": "vision_model.", "text_model": "text_model."}),
        (FlorenceForObjectDetection, {"backbone": "backbone.", "dynamic_head": "dynamic_head."}),
        (
            FlorenceForQuestionAnswering,
            {"vision_model": "model.vision_model.", "text_model": "model.text_model.", "fusion": "model.fusion."},
        ),
        (FlorenceForImageCaptioning, {"vision_model": "vision_model.", "decoder": "decoder."}),
        (FlorenceForVideoClassification, {"video_model": "video_model."}),
    ],
)
def test_the_targets_of_all_parts_are_the_default_ones(head, parts):
    everything = set(adapted(tiny_head(head)).base_model.targeted_module_names)
    for part, beginning in parts.items():
        names = set(adapted(tiny_head(head), target_modules=lora_targets(part)).base_model.targeted_module_names)
        assert names == {name for name in everything if name.startswith(beginning)} != set()
    assert all(name.startswith(tuple(parts.values())) for name in everything)


def test_no_other_part_has_targets():
    with pytest.raises(ValueError, match="expected a part, one of vision_model, .*, dynamic_head, got 'image'"):
        lora_targets("image")


@pytest.mark.parametrize("head", HEADS)
def test_train_save_load_and_merge(head, folders, tmp_path):
    batch = batch_for(head)
    base = head.from_pretrained(folders[head])
    before = compute(base, batch)
    model = adapted(base)
    assert_close(compute(model, batch), before, **EXACT, msg="an adapter starts as the identity")
    losses = train(model, head)
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
    assert_close(compute(loaded, batch), after, **EXACT)

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


@pytest.mark.parametrize("head", HEADS)
def test_several_adapters_are_switched(head, folders, tmp_path):
    """One on everything, one on attention alone; both are saved under their names."""
    batch = batch_for(head)
    model = adapted(head.from_pretrained(folders[head]))
    before = compute(head.from_pretrained(folders[head]), batch)
    train(model, head)
    model.add_adapter("other", peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
    model.set_adapter("other")
    train(model, head)
    model.save_pretrained(tmp_path)
    results = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        results[name] = compute(model, batch)
    assert not torch.allclose(results["default"], results["other"], atol=1e-3)
    with model.disable_adapter():
        assert_close(compute(model, batch), before, **EXACT)

    loaded = peft.PeftModel.from_pretrained(head.from_pretrained(folders[head]), tmp_path)
    loaded.load_adapter(tmp_path / "other", adapter_name="other")
    for name in ("other", "default", "other"):
        loaded.set_adapter(name)
        assert_close(compute(loaded, batch), results[name], **EXACT)
    loaded.set_adapter("default")
    loaded.delete_adapter("other")
    assert_close(compute(loaded.merge_and_unload(), batch), results["default"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("head", HEADS)
def test_adapters_by_transformers_own_methods(head, folders, tmp_path):
    batch = batch_for(head)
    model = head.from_pretrained(folders[head])
    before = compute(model, batch)
    results = {}
    for name, targets in (("first", LORA_TARGETS), ("second", ["fc1"])):
        model.add_adapter(peft.LoraConfig(target_modules=targets, r=4), adapter_name=name)
        model.set_adapter(name)
        train(model, head)
        results[name] = compute(model, batch)
        model.save_pretrained(tmp_path / name)
    assert not torch.allclose(results["first"], results["second"], atol=1e-3)
    plain = head.from_pretrained(folders[head])
    for name in results:
        plain.load_adapter(str(tmp_path / name), adapter_name=name)
    for name in results:
        plain.set_adapter(name)
        assert_close(compute(plain, batch), results[name], **EXACT)
    plain.disable_adapters()
    assert_close(compute(plain, batch), before, **EXACT)


@pytest.mark.parametrize("head", NEW_PARTS)
def test_new_parts_are_trained_and_saved_with_the_adapter(head, folders, tmp_path):
    """As when a head is new on towers that are not: the adapter's folder brings what the base does not have."""
    batch, parts = batch_for(head), NEW_PARTS[head]
    before = {name: weight.clone() for name, weight in head.from_pretrained(folders[head]).named_parameters()}
    model = adapted(head.from_pretrained(folders[head]), modules_to_save=parts)
    losses = train(model, head)
    assert losses[-1] < losses[0]
    after = compute(model, batch)
    saved = peft.get_peft_model_state_dict(model)
    modules = model.base_model.model.named_modules()
    wrappers = {name: each for name, each in modules if isinstance(each, peft.utils.ModulesToSaveWrapper)}
    assert {name.rpartition(".")[2] for name in wrappers} == set(parts)
    for part, wrapper in wrappers.items():
        for name, weight in wrapper.original_module.named_parameters():
            assert torch.equal(weight, before[f"{part}.{name}"])
            trained = wrapper.modules_to_save["default"].get_parameter(name)
            assert not torch.equal(trained, weight)
            assert torch.equal(saved[f"base_model.model.{part}.{name}"], trained)
    model.save_pretrained(tmp_path)
    another = head.from_pretrained(folders[head])
    with torch.no_grad():
        for part in wrappers:  # the file has the trained ones
            for weight in another.get_submodule(part).parameters():
                weight.zero_()
    loaded = peft.PeftModel.from_pretrained(another, tmp_path)
    assert_close(compute(loaded, batch), after, **EXACT)
    merged = loaded.merge_and_unload()
    assert not any("modules_to_save" in name for name, _ in merged.named_modules())
    assert_close(compute(merged, batch), after, atol=1e-5, rtol=1e-5)


def test_the_temperature_stays_unless_it_is_freed_by_hand(folders):
    """`logit_scale` is a parameter, not a module: `modules_to_save` cannot name it."""
    base = FlorenceModel.from_pretrained(folders[FlorenceModel])
    before = base.logit_scale.item()
    model = adapted(base, modules_to_save=["logit_scale"])
    train(model, FlorenceModel)
    assert base.logit_scale.item() == before and base.logit_scale.grad is None
    base.logit_scale.requires_grad_(True)
    train(model, FlorenceModel)
    assert base.logit_scale.item() != before
    assert not [name for name in peft.get_peft_model_state_dict(model) if "logit_scale" in name]
    assert model.merge_and_unload().logit_scale.item() == base.logit_scale.item()  # the merged model has it


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("head", HEADS)
def test_activation_checkpointing_changes_no_adapters_gradient(head, use_reentrant, folders, monkeypatch):
    layers, seen = set(), set()

    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = head.from_pretrained(folders[head])
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
        model = adapted(model, init_lora_weights=False).train()
        layers.update(
            each for each in model.modules() if checkpointing and isinstance(each, GradientCheckpointingLayer)
        )
        torch.manual_seed(0)
        loss_of(model(**batch_for(head, labels=True))).backward()
        return {name: each.grad for name, each in model.named_parameters() if each.requires_grad}

    expected = gradients(checkpointing=False)
    checkpoint: Callable = torch.utils.checkpoint.checkpoint

    def counted(function, *args, **kwargs):
        seen.add(function.args[0])  # the layer whose call this is
        return checkpoint(function, *args, **kwargs)

    monkeypatch.setattr("transformers.modeling_utils.checkpoint", counted)
    got = gradients(checkpointing=True)
    assert seen == layers != set(), "each layer goes through a checkpoint"
    assert len(got) > 20 and all(gradient is not None and gradient.any() for gradient in got.values())
    assert_close(got, expected, atol=1e-6, rtol=1e-5)


PICTURE = Image.effect_mandelbrot((40, 48), (-2, -1.5, 1, 1.5), 100).convert("RGB")
CLIP = np.random.default_rng(0).integers(0, 256, (FRAMES, 40, 48, 3), dtype=np.uint8)
# The pipeline of each class that has one: its task, what it is called with, what it is called with besides.
PIPELINES: dict[type, tuple[str, Any, dict[str, Any]]] = {
    FlorenceModel: (
        "zero-shot-image-classification",
        PICTURE,
        {"candidate_labels": ["cat", "dog", "red bicycle"], "hypothesis_template": "a {}"},
    ),
    FlorenceForImageClassification: ("image-classification", PICTURE, {"top_k": 4}),
    FlorenceVisionModel: ("image-feature-extraction", PICTURE, {}),
    FlorenceTextModel: ("feature-extraction", "a photo of a cat", {}),
    FlorenceForObjectDetection: ("object-detection", PICTURE, {"threshold": 0.05}),
    FlorenceForQuestionAnswering: ("florence-visual-question-answering", PICTURE, {"question": "is it red?"}),
    FlorenceForImageCaptioning: (
        "image-text-to-text",
        PICTURE,
        {"text": "a", "generate_kwargs": {"max_new_tokens": 6, "do_sample": False}},
    ),
    FlorenceForVideoClassification: ("video-classification", CLIP, {}),
    FlorenceForZeroShotObjectDetection: (
        "zero-shot-object-detection",
        PICTURE,
        {"candidate_labels": ["cat", "dog"], "threshold": 0.0},
    ),
}
AUTO_CLASSES = {
    FlorenceModel: AutoModel,
    FlorenceForImageClassification: AutoModelForImageClassification,
    FlorenceForObjectDetection: AutoModelForObjectDetection,
    FlorenceForQuestionAnswering: AutoModelForVisualQuestionAnswering,
    FlorenceForPreTraining: AutoModelForPreTraining,
    FlorenceForImageCaptioning: AutoModelForImageTextToText,
    FlorenceForVideoClassification: AutoModelForVideoClassification,
    FlorenceForVideoTextRetrieval: AutoModel,
    FlorenceForZeroShotObjectDetection: AutoModelForZeroShotObjectDetection,
}


@pytest.fixture(scope="module")
def adapters(folders, tmp_path_factory) -> dict[type, Path]:
    """Trained adapter folders, each with the processor that a pipeline looks for."""
    root = tmp_path_factory.mktemp("adapters")
    torch.manual_seed(0)
    for head in {**PIPELINES, **AUTO_CLASSES}:
        model = adapted(head.from_pretrained(folders[head]), modules_to_save=NEW_PARTS.get(head))
        train(model, head)
        model.save_pretrained(root / head.__name__)
        processor_for(head).save_pretrained(root / head.__name__)
    return {head: root / head.__name__ for head in {**PIPELINES, **AUTO_CLASSES}}


def by_hand(head: type[PreTrainedModel], folders: dict[type, Path], adapters: dict[type, Path]) -> Any:
    return peft.PeftModel.from_pretrained(head.from_pretrained(folders[head]), adapters[head])


def leaves(result: Any) -> tuple[list[str], list[float]]:
    """The texts and the numbers of a pipeline's result, in their order."""
    if isinstance(result, str):
        return [result], []
    if not isinstance(result, dict | list):
        return [], [float(result)]
    parts = [leaves(each) for each in (result.values() if isinstance(result, dict) else result)]
    return [text for texts, _ in parts for text in texts], [number for _, numbers in parts for number in numbers]


@pytest.mark.parametrize("head", PIPELINES)
def test_pipeline_on_an_adapter_folder(head, folders, adapters):
    """It gives what the model gives whose adapter was merged by hand, and not what the base gives."""
    task, example, options = PIPELINES[head]
    if head is FlorenceForVideoClassification:
        pytest.importorskip("av", reason="needs PyAV: pip install 'transformers_florence[video]'")
    pipe = pipeline(task, model=str(adapters[head]))
    assert type(pipe.model) is head

    def run(pipe: Any) -> tuple[list[str], list[float]]:
        result = pipe(example, **options)
        # Of an untrained detector's many equal boxes, rounding chooses the survivors; their scores it does not change.
        return leaves([found["score"] for found in result[:5]] if "object-detection" in task else result)

    texts, numbers = run(pipe)
    pipe.model = by_hand(head, folders, adapters).merge_and_unload()
    expected_texts, expected_numbers = run(pipe)
    assert texts == expected_texts and len(texts) + len(numbers) > 0
    assert_close(numbers, expected_numbers, atol=1e-5, rtol=1e-5)
    base_texts, base_numbers = run(pipeline(task, model=str(folders[head])))
    assert texts != base_texts or not np.allclose(numbers, base_numbers, atol=1e-2)


@pytest.mark.parametrize("head", AUTO_CLASSES)
def test_auto_classes_follow_an_adapter_to_its_base(head, folders, adapters):
    batch = batch_for(head)
    expected = compute(by_hand(head, folders, adapters), batch)
    found = AUTO_CLASSES[head].from_pretrained(adapters[head])
    assert type(found) is head
    assert_close(compute(found, batch), expected, **EXACT)
    with pytest.raises(ValueError, match=re.escape(f"import_allowlist=['{head.__module__}']")):
        peft.AutoPeftModel.from_pretrained(adapters[head])
    found = peft.AutoPeftModel.from_pretrained(adapters[head], import_allowlist=["transformers_florence"])
    assert type(found.base_model.model) is head
    assert_close(compute(found, batch), expected, **EXACT)
