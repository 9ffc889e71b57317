"""A training's budget against closed forms, against what a small model really takes, and against the paper's size."""

import weakref
from collections.abc import Iterable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from tests.tiny_florence import random_pixels, tiny_config, tiny_text_config, tiny_vision_config
from transformers_florence import FlorenceConfig, FlorenceModel
from transformers_florence.training.budget import (
    DEVICES,
    GIB,
    RESERVED,
    Shape,
    forward_flops,
    kept_activations,
    memory_of,
    peak_flops,
    plan_training,
)
from transformers_florence.training.gradient_cache import cached_backward, checkpoint_activations
from transformers_florence.training.objectives import ContrastiveObjective

SHAPE = Shape(batch_size=16, chunk_size=0, image_size=32, tokens=12, devices=1, dtype=torch.float32)


def whole_windows() -> FlorenceConfig:
    """Grids of 8 and 4 tokens with windows of 4: nothing is padded."""
    return tiny_config(vision_config=tiny_vision_config(window_size=4, drop_path_rate=0.0))


def test_flops_are_those_of_the_matrices():
    config, image_size, tokens = whole_windows(), 32, 12
    vision, text = config.vision_config, config.text_config
    expected, side, channels = 0, image_size // 4, vision.num_channels
    for stage, (dim, depth, kernel) in enumerate(zip(vision.embed_dims, vision.depths, (7, 3), strict=True)):
        area = (side // 2**stage) ** 2
        expected += 2 * area * kernel**2 * channels * dim  # the embedding
        linear = (4 + 2 * vision.mlp_ratio) * dim**2
        attention = 2 * vision.window_sizes[stage] ** 2 * dim  # scores, and their sum of values
        expected += depth * 2 * area * (linear + attention)
        channels = dim
    width = text.hidden_size
    layer = 4 * width**2 + 2 * width * text.intermediate_size + 2 * tokens * width
    expected += text.num_hidden_layers * 2 * tokens * layer
    expected += 2 * config.projection_dim * (vision.hidden_size + width + 1)  # both projections, and one logit
    assert forward_flops(config, image_size, tokens) == expected


class LiveBytes(TorchDispatchMode):
    """The most bytes that were alive at once, of all tensors that are made in it, whoever keeps them."""

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.storages = WeakIdKeyDictionary({tensor.untyped_storage(): True for tensor in known})
        self.live = self.peak = 0

    def free(self, size: int) -> None:
        self.live -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage()) not in self.storages:
                self.storages[storage] = True
                self.live += storage.nbytes()
                weakref.finalize(storage, self.free, storage.nbytes())
                self.peak = max(self.peak, self.live)
        return result


def measured(config: FlorenceConfig, shape: Shape) -> tuple[int, int, int, int]:
    """Bytes of a real step on this processor: weights, gradients, optimizer; and the peak of all else."""
    torch.manual_seed(0)
    model = FlorenceModel(config).train()
    model.set_attn_implementation("eager")  # sdpa takes a path of its own on a CPU
    if shape.activation_checkpointing:
        checkpoint_activations(model)
    objective = ContrastiveObjective(model)
    optimizer = torch.optim.AdamW(model.parameters())
    inputs = {
        "pixel_values": random_pixels(shape.rows),
        "input_ids": torch.randint(0, 99, (shape.rows, shape.tokens)),
    }
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    gradients = [weight.grad for weight in model.parameters()]
    with LiveBytes([*model.parameters(), *gradients, *model.buffers(), *inputs.values()]) as tracker:
        cached_backward(objective, partial(objective.loss, labels=torch.arange(shape.rows)), inputs, shape.chunk)
    optimizer.step()
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    sizes = [sum(tensor.nbytes for tensor in tensors) for tensors in (list(model.parameters()), gradients, moments)]
    return sizes[0], sizes[1], sizes[2], tracker.peak


@pytest.mark.parametrize("chunk", [0, 4])
def test_the_memory_is_what_a_step_takes(chunk):
    """Weights and states to the byte; the rest, which depends on kernels too, hardly more than said nor far below."""
    vision = tiny_vision_config(depths=[2, 4], drop_path_rate=0.1)
    config = tiny_config(vision_config=vision, text_config=tiny_text_config(num_hidden_layers=4))
    taken = {}
    for checkpointing in (False, True):
        shape = replace(SHAPE, activation_checkpointing=checkpointing, chunk_size=chunk)
        memory = memory_of(config, shape)
        weights, gradients, optimizer, taken[checkpointing] = measured(config, shape)
        assert (memory.weights, memory.gradients, memory.optimizer) == (weights, gradients, optimizer)
        inputs = shape.chunk * (3 * 32 * 32 * 4 + 12 * 8)
        assert 0.95 < (memory.activations - inputs + memory.workspace) / taken[checkpointing] < 1.3
    assert taken[True] < taken[False] / 3


def test_layers_that_are_computed_again_keep_what_enters_them():
    config = whole_windows()
    with torch.device("meta"):
        model = FlorenceModel(config).train()
    inputs = {
        "pixel_values": torch.empty(4, 3, 32, 32, device="meta"),
        "input_ids": torch.zeros(4, 12, dtype=torch.int64, device="meta"),
    }
    kept = kept_activations(model, inputs)
    grids = 1 * 64 * 8 + 2 * 16 * 16  # layers, tokens and channels of the stages
    texts = 2 * 12 * 16
    assert kept.entering == 4 * 4 * (grids + texts)
    assert kept.outside < kept.checkpointed < kept.whole


def test_zero_shares_what_its_stage_says():
    config = whole_windows()
    parameters = sum(weight.numel() for weight in FlorenceModel(config).parameters())
    one = memory_of(config, replace(SHAPE, devices=1))
    ddp = memory_of(config, replace(SHAPE, devices=4))
    assert (one.exchange, ddp.exchange) == (0, 4 * parameters)
    assert ddp.activations * 4 == pytest.approx(one.activations, rel=0.05)
    found = [memory_of(config, replace(SHAPE, devices=4, zero_stage=stage)) for stage in (1, 2, 3)]
    part = -(-4 * parameters // 4)
    assert [memory.optimizer for memory in found] == [-(-12 * parameters // 4)] * 3
    assert [memory.gradients for memory in found] == [4 * parameters, part, part]
    assert [memory.weights for memory in found] == [4 * parameters, 4 * parameters, part + 4 * parameters]
    assert memory_of(config, replace(SHAPE, devices=4, zero_stage=2, offload=True)).optimizer == 0
    assert memory_of(config, replace(SHAPE, average=True)).average == 4 * parameters
    half = memory_of(config, replace(SHAPE, dtype=torch.bfloat16))
    assert half.copies == 2 * parameters and half.weights == one.weights
    assert 0.45 < half.activations / one.activations < 0.65


def test_hours_follow_from_the_arithmetic():
    config = whole_windows()
    flops = forward_flops(config, 32, 12)
    shape = replace(SHAPE, devices=2, chunk_size=4, activation_checkpointing=True, dtype=torch.bfloat16)
    assert (shape.rows, shape.chunk, shape.passes) == (8, 4, 5)
    small = replace(shape, image_size=16, tokens=8)
    plan = plan_training(config, [(1000, small), (2000, shape)], "v100-32gb", 0.25)
    total = 5 * 16 * (1000 * forward_flops(config, 16, 8) + 2000 * flops)
    assert plan.flops == pytest.approx(total)
    assert plan.device_hours == pytest.approx(total / (125e12 * 0.25) / 3600) == pytest.approx(2 * plan.hours)
    single = plan_training(config, [(10, SHAPE)], "v100-32gb", 1.0)
    assert single.hours == pytest.approx(3 * 10 * 16 * flops / 15.7e12 / 3600)


@pytest.mark.slow
def test_the_papers_batch_fits_where_it_was_trained_and_not_without_what_it_took():
    """48 pairs on each of 512 A100 with 40 GB (sections 2.3 and 2.7); the whole of stage 1 in days, not weeks."""
    config = FlorenceConfig.from_size("huge")
    shape = Shape(
        batch_size=24576, chunk_size=0, image_size=224, tokens=76, devices=512, activation_checkpointing=True
    )
    plan = plan_training(config, [(1_000_000, shape)], "a100-40gb", 0.35)
    plan.check()
    assert 3 < plan.hours / 24 < 10
    plain = plan_training(config, [(1, replace(shape, activation_checkpointing=False))], "a100-40gb", 0.35)
    with pytest.raises(ValueError, match=r"a100-40gb: expected at most 37 GiB .*, got [456]\d\.\d \(activations"):
        plain.check()
    chunks = replace(shape, activation_checkpointing=False, chunk_size=16)
    plan_training(config, [(1, chunks)], "a100-40gb", 0.35).check()
    room = DEVICES["a100-40gb"][1] - RESERVED
    assert plan.memory.total < room < plain.memory.total and room == 37 * GIB


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"devices": 3}, "batch_size: expected a multiple of 3 devices, got 16"),
        ({"devices": 0}, "expected a multiple of 0 devices"),
        ({"zero_stage": 4}, "zero_stage: expected 0 to 3, got 4"),
        ({"offload": True}, "offload: expected a stage of ZeRO, got none"),
        ({"zero_stage": 1, "dtype": torch.float16}, "expected float32 or bfloat16 with DeepSpeed, got float16"),
        ({"zero_stage": 3, "average": True}, "expected whole weights to average"),
    ],
)
def test_layouts_that_cannot_be_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(SHAPE, **changes)


def test_unknown_devices_and_impossible_shares_are_refused():
    with pytest.raises(ValueError, match="device: expected one of t4-16gb, .*, got 'abacus'"):
        plan_training(whole_windows(), [(1, SHAPE)], "abacus", 0.5)
    for share in (0, 1.5):
        with pytest.raises(ValueError, match="peak_share: expected a number above 0 and at most 1"):
            plan_training(whole_windows(), [(1, SHAPE)], "t4-16gb", share)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA A10", 125e12),
        ("Tesla V100-SXM2-32GB", 125e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("CPU", None),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_peaks_are_found_by_the_devices_name(name, peak):
    assert peak_flops(name, torch.bfloat16) == peak
    assert peak is None or peak_flops(name, torch.float32) < peak
