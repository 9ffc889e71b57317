"""bfloat16 computation on float32 weights: the forward of a bfloat16 model, the gradients of a float32 one."""

import copy
import math
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F

from tests.tiny_florence import CONTEXT, VOCABULARY, random_pixels, tiny_config, tiny_vision_config
from transformers_florence import FlorenceModel, load_checkpoint
from transformers_florence.training import precision
from transformers_florence.training.precision import Bfloat16Forward, computing_dtype, cpu_has_bfloat16

BATCH = 8


@pytest.fixture
def model() -> FlorenceModel:
    """Without stochastic depth, so that two forwards can be compared."""
    return FlorenceModel(tiny_config(vision_config=tiny_vision_config(drop_path_rate=0.0)))


@pytest.fixture
def inputs() -> dict[str, torch.Tensor]:
    tokens = torch.randint(VOCABULARY - 2, (BATCH, CONTEXT))
    tokens[:, 0], tokens[:, -1] = VOCABULARY - 2, VOCABULARY - 1
    return {"pixel_values": random_pixels(BATCH), "input_ids": tokens, "labels": torch.arange(BATCH) // 2}


def gradients(model: nn.Module, wrapped: nn.Module, inputs: dict) -> dict[str, torch.Tensor]:
    model.zero_grad()
    wrapped(**inputs).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_the_forward_is_that_of_a_bfloat16_model(model, inputs):
    reference = copy.deepcopy(model).to(torch.bfloat16)
    reference.logit_scale.data = model.logit_scale.detach().clone()  # the one weight that stays float32
    with torch.no_grad():
        ours, theirs = Bfloat16Forward(model)(**inputs), reference(**inputs)
    assert ours.image_embeds.dtype == ours.text_embeds.dtype == torch.bfloat16
    for name in ("image_embeds", "text_embeds", "logits_per_image", "loss", "logit_scale"):
        assert torch.equal(ours[name], theirs[name]), name
    assert ours.vision_model_output.last_hidden_state.dtype == torch.bfloat16


def test_the_weights_stay_as_they_are(model, inputs):
    before = copy.deepcopy(model.state_dict())
    wrapped = Bfloat16Forward(model)
    wrapped(**inputs).loss.backward()
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, before[name]), name
    with torch.no_grad():
        assert model(**inputs).image_embeds.dtype == torch.float32, "the model itself must be left in float32"


def test_the_temperature_is_not_rounded(model, inputs):
    value = 3.0 + 2**-12  # bfloat16 has 8 bits: it would become 3
    model.logit_scale.data.fill_(value)
    assert float(torch.tensor(value).bfloat16()) == 3.0
    output = Bfloat16Forward(model)(**inputs)
    assert output.logit_scale.dtype == torch.float32
    assert output.logit_scale.item() == pytest.approx(math.exp(value), rel=1e-6)


def test_gradients_are_float32_and_point_where_float32_ones_do(model, inputs):
    model.logit_scale.data.fill_(1.0)
    exact = gradients(model, model, inputs)
    rough = gradients(model, Bfloat16Forward(model), inputs)
    assert exact.keys() == rough.keys()
    for name, gradient in rough.items():
        assert gradient.dtype == torch.float32, name
        assert torch.isfinite(gradient).all(), name
    assert any(not torch.equal(exact[name], rough[name]) for name in exact), "bfloat16 had no effect at all"
    flat = [torch.cat([tensor.flatten() for tensor in table.values()]) for table in (exact, rough)]
    assert F.cosine_similarity(*flat, dim=0).item() > 0.99
    assert flat[1].norm().item() == pytest.approx(flat[0].norm().item(), rel=0.05)


def test_steps_of_adamw_reduce_the_loss(model, inputs):
    wrapped = Bfloat16Forward(model).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        loss = wrapped(**inputs).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0], losses


@torch.no_grad()
def test_updates_smaller_than_bfloat16_can_hold_add_up(model, inputs):
    """The point of float32 weights: each of these steps alone is lost in bfloat16, 32 of them are not."""
    wrapped, weight = Bfloat16Forward(model), model.vision_model.norm.weight
    optimizer = torch.optim.SGD([weight], lr=2**-12)
    weight.grad = torch.zeros_like(weight)
    weight.grad[0] = 1.0
    first = wrapped(**inputs).image_embeds
    optimizer.step()
    assert torch.equal(wrapped(**inputs).image_embeds, first)
    for _ in range(31):
        optimizer.step()
    assert weight[0].item() == 1 - 2**-7
    assert not torch.equal(wrapped(**inputs).image_embeds, first)


def test_frozen_weights_get_no_gradient(model, inputs):
    model.text_model.requires_grad_(False)
    Bfloat16Forward(model)(**inputs).loss.backward()
    assert all(parameter.grad is None for parameter in model.text_model.parameters())
    assert all(parameter.grad is not None for parameter in model.vision_model.parameters())


def test_what_accelerate_unwraps_saves_the_model_under_its_own_names(model, inputs, tmp_path):
    accelerator = Accelerator(cpu=True)
    names = set(model.state_dict())
    wrapped, optimizer = accelerator.prepare(Bfloat16Forward(model), torch.optim.AdamW(model.parameters(), lr=0.01))
    accelerator.backward(wrapped(**inputs).loss)
    optimizer.step()
    inner = accelerator.unwrap_model(wrapped).model
    assert inner is model and set(inner.state_dict()) == names
    assert set(accelerator.get_state_dict(wrapped)) == {f"model.{name}" for name in names}
    inner.save_pretrained(tmp_path)
    loaded = load_checkpoint(FlorenceModel, tmp_path)
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, model.state_dict()[name]), name


def test_the_processor_tells_whether_it_multiplies_bfloat16():
    information = Path("/proc/cpuinfo")
    if not information.is_file() or "flags" not in information.read_text():
        pytest.skip("needs Linux's list of the processor's flags to compare with")
    flags = set(information.read_text().partition("flags")[2].splitlines()[0].split())
    if "avx512_bf16" in flags:
        assert cpu_has_bfloat16() is True
    elif not flags & {"avx512_bf16", "amx_tile"}:
        assert cpu_has_bfloat16() is False


def test_what_is_computed_in_is_asked_for_or_what_the_processor_has(monkeypatch):
    assert computing_dtype("float16") == torch.float16
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    for has, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(precision, "cpu_has_bfloat16", lambda has=has: has)
        assert computing_dtype("auto") == dtype
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert computing_dtype("auto") == torch.bfloat16
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert computing_dtype("auto") == torch.float32, "the accelerator is there, and not wanted"
