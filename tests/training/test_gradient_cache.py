"""The gradient cache against plain large batches, the published algorithm and open_clip's accumulation."""

import copy
import random
import weakref
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.utils import InitProcessGroupKwargs
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize
from torch.testing import assert_close

from tests.gloo_ranks import run_ranks
from tests.tiny_florence import (
    CONTEXT,
    VOCABULARY,
    random_pixels,
    tiny_config,
    tiny_model,
    tiny_text_config,
    tiny_vision_config,
)
from transformers_florence import FlorenceModel
from transformers_florence.losses_contrastive import unicl_loss
from transformers_florence.training.distributed import global_unicl_loss
from transformers_florence.training.gradient_cache import RandomState, cached_backward
from transformers_florence.training.objectives import ContrastiveObjective, lock_image_tower

ROWS = 8
LABELS = torch.tensor([0, 1, 0, 2, 3, 1, 0, 4])
CHUNKS = [1, 3, ROWS, 2 * ROWS]
# How many rows each of two ranks has; in chunks of two the second has fewer chunks.
COUNTS = (5, 3)


def inputs_of(rows: int = ROWS, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    tokens = torch.randint(VOCABULARY - 2, (rows, CONTEXT), generator=torch.Generator().manual_seed(6))
    tokens[:, 0], tokens[:, -1] = VOCABULARY - 2, VOCABULARY - 1
    return {
        "pixel_values": random_pixels(rows).to(dtype),
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
    }


def still_model(dtype: torch.dtype = torch.float64) -> FlorenceModel:
    """Without random choices; the same each time."""
    torch.manual_seed(5)
    return tiny_model().to(dtype)


def dropping_model() -> FlorenceModel:
    """With stochastic depth in one tower and dropout in the other; the same each time."""
    torch.manual_seed(5)
    config = tiny_config(
        vision_config=tiny_vision_config(drop_path_rate=0.5), text_config=tiny_text_config(attention_dropout=0.3)
    )
    return FlorenceModel(config).double().train()


def gradients_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.grad for name, weight in module.named_parameters() if weight.grad is not None}


def cached(model: nn.Module, chunk: int, inputs: dict | None = None, **options: Any) -> torch.Tensor:
    return cached_backward(model, partial(global_unicl_loss, labels=LABELS), inputs or inputs_of(), chunk, **options)


def whole(model: nn.Module, inputs: dict | None = None) -> torch.Tensor:
    """The plain step: one forward, one backward."""
    loss = model(**(inputs or inputs_of()), labels=LABELS).loss
    loss.backward()
    return loss.detach()


def chunks_of(inputs: dict, size: int) -> list[dict[str, torch.Tensor]]:
    return [{name: value[start : start + size] for name, value in inputs.items()} for start in range(0, ROWS, size)]


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-6)])
def test_any_chunk_is_the_whole_batch(chunk, dtype, tolerance):
    ours, plain = still_model(dtype), still_model(dtype)
    inputs = inputs_of(dtype=dtype)
    assert_close(cached(ours, chunk, inputs), whole(plain, inputs), rtol=tolerance, atol=tolerance)
    assert set(gradients_of(ours)) == set(gradients_of(plain)) == {name for name, _ in plain.named_parameters()}
    found, expected = (
        torch.cat([gradient.flatten() for gradient in gradients_of(model).values()]) for model in (ours, plain)
    )
    assert (found - expected).norm() <= tolerance * expected.norm()
    assert_close(ours.logit_scale.grad, plain.logit_scale.grad, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_random_choices_are_made_twice_alike(chunk):
    """Against all chunks in one graph, which draw in the same order; with other random states it could not agree."""
    ours, plain, other = dropping_model(), dropping_model(), dropping_model()
    torch.manual_seed(11)
    outputs = [plain(**piece) for piece in chunks_of(inputs_of(), chunk)]
    images, texts = (torch.cat([output[name] for output in outputs]) for name in ("image_embeds", "text_embeds"))
    loss = unicl_loss(images, texts, LABELS, outputs[0].logit_scale)
    loss.backward()
    drawn_next = torch.rand(3)
    torch.manual_seed(11)
    assert_close(cached(ours, chunk), loss.detach(), rtol=1e-10, atol=1e-10)
    assert torch.equal(torch.rand(3), drawn_next)  # whatever follows draws what it would have drawn
    expected = gradients_of(plain)
    assert set(gradients_of(ours)) == set(expected)
    assert_close(gradients_of(ours), expected, rtol=1e-9, atol=1e-10)
    torch.manual_seed(12)
    cached(other, chunk)
    assert not torch.allclose(other.visual_projection.weight.grad, ours.visual_projection.weight.grad)


def test_gradients_add_up_over_calls_and_only_torchs_generator_is_touched():
    once, twice = still_model(), still_model()
    cached(once, 3)
    state = random.getstate()
    for _ in range(2):
        cached(twice, 3)
    assert random.getstate() == state
    expected = {name: 2 * gradient for name, gradient in gradients_of(once).items()}
    assert_close(gradients_of(twice), expected, rtol=1e-12, atol=1e-12)


def published_algorithm(model: FlorenceModel, size: int) -> None:
    """Gao et al.'s steps 1 to 4, one tower after the other as in their package; the temperature is the loss's own."""
    inputs = inputs_of()
    pixels = [{"pixel_values": part} for part in inputs["pixel_values"].split(size)]
    tokens = [{"input_ids": part} for part in inputs["input_ids"].split(size)]
    towers = [(pixels, "image_embeds"), (tokens, "text_embeds")]
    with torch.no_grad():
        representations = [torch.cat([model(**part)[name] for part in parts]) for parts, name in towers]
    leaves = [representation.requires_grad_() for representation in representations]
    unicl_loss(*leaves, LABELS, model.logit_scale.exp()).backward()
    for (parts, name), leaf in zip(towers, leaves, strict=True):
        for part, gradient in zip(parts, leaf.grad.split(size), strict=True):
            torch.dot(model(**part)[name].flatten(), gradient.flatten()).backward()


@pytest.mark.parametrize("chunk", [1, 3])
def test_it_is_the_published_algorithm(chunk):
    ours, theirs = still_model(), still_model()
    cached(ours, chunk)
    published_algorithm(theirs, chunk)
    assert_close(gradients_of(ours), gradients_of(theirs), rtol=1e-10, atol=1e-12)


def test_open_clips_accumulation_agrees_but_for_its_temperature():
    """open_clip puts each chunk, with its graph, among the cached others; every loss then moves the temperature."""
    ours, theirs = still_model(), still_model()
    parts = chunks_of(inputs_of(), 2)
    with torch.no_grad():
        features = [theirs(**part) for part in parts]
    for index, part in enumerate(parts):
        output = theirs(**part)
        images, texts = (
            torch.cat([output[name] if other == index else features[other][name] for other in range(len(parts))])
            for name in ("image_embeds", "text_embeds")
        )
        unicl_loss(images, texts, LABELS, output.logit_scale).backward()
    cached(ours, 2)
    expected, found = gradients_of(theirs), gradients_of(ours)
    temperature = expected.pop("logit_scale")
    assert_close(temperature, len(parts) * found.pop("logit_scale"), rtol=1e-10, atol=1e-12)
    assert_close(found, expected, rtol=1e-9, atol=1e-12)


class Saved:
    """A tensor that a graph keeps for its way back."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def test_only_one_chunk_is_held_at_a_time():
    model, graphs, held = still_model(), weakref.WeakSet(), []

    def pack(tensor: torch.Tensor) -> Saved:
        saved = Saved(tensor)
        graphs.add(saved)
        return saved

    model.register_forward_pre_hook(lambda *_: held.append(len(graphs)))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        cached(model, 2)
        cached(model, ROWS)
        assert held == [0] * 8 + [0]  # twice four chunks, and the whole at once
        loss = model(**inputs_of(), labels=LABELS).loss
    assert len(graphs) > 100, "nothing was counted"
    del loss


def test_under_autocast_the_cache_is_float32_and_the_gradients_those_of_the_whole_batch():
    ours, plain = still_model(torch.float32), still_model(torch.float32)
    inputs, seen = inputs_of(dtype=torch.float32), []

    def loss(**outputs: torch.Tensor) -> torch.Tensor:
        seen.extend(value.dtype for value in outputs.values())
        return global_unicl_loss(**outputs, labels=LABELS)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ours.visual_projection(torch.ones(1, 16)).dtype == torch.bfloat16
        value = cached_backward(ours, loss, inputs, 3)
        expected = whole(plain, inputs)
    assert seen == [torch.float32] * 3 and value.dtype == torch.float32
    assert_close(value, expected, rtol=1e-5, atol=1e-5)
    flat = [torch.cat([gradient.flatten() for gradient in gradients_of(model).values()]) for model in (ours, plain)]
    assert set(gradients_of(ours)) == set(gradients_of(plain))
    assert_close(flat[0], flat[1], rtol=0, atol=0.02 * flat[1].abs().max().item())


def test_bfloat16_embeddings_are_cached_in_float32():
    model, seen = still_model(torch.bfloat16), []

    def loss(**outputs: torch.Tensor) -> torch.Tensor:
        seen.extend(value.dtype for value in outputs.values())
        return global_unicl_loss(**outputs, labels=LABELS)

    cached_backward(model, loss, inputs_of(dtype=torch.bfloat16), 3)
    assert seen == [torch.float32] * 3
    assert all(gradient.dtype == torch.bfloat16 for gradient in gradients_of(model).values())


@pytest.mark.parametrize("chunk", [3, ROWS])
def test_the_sigmoids_bias_and_the_prototypes_are_counted_once_too(chunk):
    plain = ContrastiveObjective(still_model(), objective="sigmoid", num_labels=int(LABELS.max()) + 1).double()
    ours = copy.deepcopy(plain)
    inputs = inputs_of()
    loss = plain.loss(**plain(**inputs), labels=LABELS, class_labels=LABELS)
    loss.backward()
    whole_loss = partial(ours.loss, labels=LABELS, class_labels=LABELS)
    value = cached_backward(ours, whole_loss, inputs, chunk, shared=ours.shared_outputs)
    assert_close(value, loss.detach(), rtol=1e-10, atol=1e-10)
    assert all(gradients_of(plain)[name].abs().sum() > 1e-6 for name in ("logit_bias", "prototypes"))
    assert_close(gradients_of(ours), gradients_of(plain), rtol=1e-9, atol=1e-12)


def test_a_locked_tower_goes_through_the_cache():
    ours, plain = still_model(), still_model()
    for model in (ours, plain):
        lock_image_tower(model)
    cached(ours, 3)
    whole(plain)
    assert not any(name.startswith("visi") for name in gradients_of(ours))
    assert_close(gradients_of(ours), gradients_of(plain), rtol=1e-9, atol=1e-12)


def test_accelerate_synchronises_at_the_end_only():
    """A scaler's factor is in the gradients once; what is not the last chunk is told to wait."""
    ours, plain, told = still_model(), still_model(), []
    real = Accelerator(cpu=True)

    def backward(loss: torch.Tensor) -> None:
        told.append(accelerator.sync_gradients)
        (1024 * loss).backward()

    accelerator = SimpleNamespace(sync_gradients=True, backward=backward, no_sync=real.no_sync)
    cached(ours, 3, accelerator=accelerator)
    assert told == [False, False, True] and accelerator.sync_gradients is True
    whole(plain)
    expected = {name: 1024 * gradient for name, gradient in gradients_of(plain).items()}
    assert_close(gradients_of(ours), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("chunk", [3, ROWS])
def test_a_prepared_model_goes_through_accelerate(chunk):
    accelerator = Accelerator(cpu=True)
    ours, plain = still_model(torch.float32), still_model(torch.float32)
    inputs = inputs_of(dtype=torch.float32)
    wrapped, optimizer = accelerator.prepare(ours, torch.optim.SGD(ours.parameters(), lr=0.5))
    cached(wrapped, chunk, inputs, accelerator=accelerator)
    optimizer.step()
    before = {name: weight.detach().clone() for name, weight in plain.named_parameters()}
    whole(plain, inputs)
    for name, weight in ours.named_parameters():
        assert_close(weight.detach(), before[name] - 0.5 * plain.get_parameter(name).grad, rtol=1e-5, atol=1e-5)


BAD_INPUTS = {
    "no rows to a chunk": (dict(chunk_size=0), "chunk_size, an integer of at least 1, got 0"),
    "half a row": (dict(chunk_size=1.5), "chunk_size, an integer of at least 1, got 1.5"),
    "a truth value": (dict(chunk_size=True), "chunk_size, an integer of at least 1, got True"),
    "no inputs": (dict(inputs={}), "the same number of rows, got no tensor"),
    "a scalar": (dict(inputs={"pixel_values": torch.tensor(1.0)}), r"number of rows, got {'pixel_values': \(\)}"),
    "fewer texts": (
        dict(inputs={"pixel_values": random_pixels(3), "input_ids": torch.zeros(2, CONTEXT, dtype=torch.long)}),
        r"number of rows, got {'pixel_values': \(3, 3, 32, 32\), 'input_ids': \(2, 12\)}",
    ),
    "no rows": (dict(inputs={"pixel_values": random_pixels(3)[:0]}), r"at least one row on every rank, got \[0\]"),
    "pictures alone": (dict(inputs={"pixel_values": random_pixels(3)}), "by name, got no text_embeds"),
    "an output that is not there": (dict(shared=("logit_scale", "logit_bias")), "by name, got no logit_bias"),
    "a tuple": (dict(model=nn.Identity(), inputs={"input": torch.ones(3)}), "by name, got no image_embeds, text"),
    "one embedding for all": (
        dict(model=nn.ModuleDict(), inputs={"input": torch.ones(3)}),
        "expected 2 rows of image_embeds, one an input, got 1",
    ),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_input_is_refused(case):
    changes, message = BAD_INPUTS[case]
    arguments = dict(model=still_model(torch.float32), inputs=inputs_of(3, torch.float32), chunk_size=2, **{})
    arguments |= changes
    if case == "one embedding for all":
        output = {"image_embeds": torch.ones(1, 2), "text_embeds": torch.ones(1, 2), "logit_scale": torch.ones(())}
        arguments["model"].forward = lambda input: output
    with pytest.raises(ValueError, match=message):
        cached_backward(loss=partial(global_unicl_loss, labels=LABELS[:3]), **arguments)


def test_the_random_state_comes_back():
    state = RandomState([torch.zeros(1)])
    first = torch.rand(4)
    assert not torch.equal(torch.rand(4), first)
    state.restore()
    assert torch.equal(torch.rand(4), first)


# Two processes ----------------------------------------------------------------------------------------------------


def own_rows(rank: int) -> slice:
    return slice(sum(COUNTS[:rank]), sum(COUNTS[: rank + 1]))


class Exchanges:
    """Counts how often DDP averages a bucket of gradients."""

    def __init__(self) -> None:
        self.count = 0

    def hook(self, state: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        self.count += 1
        work = dist.all_reduce(bucket.buffer().div_(dist.get_world_size()), async_op=True)
        return work.get_future().then(lambda future: future.value()[0])


def work_of_a_rank(rank: int) -> dict[str, Any]:
    inputs = {name: value[own_rows(rank)] for name, value in inputs_of().items()}
    loss = partial(global_unicl_loss, labels=LABELS[own_rows(rank)])
    results: dict[str, Any] = {}
    for chunk in (1, 2, ROWS):
        model, exchanges = still_model(), Exchanges()
        wrapped = DistributedDataParallel(model)
        wrapped.register_comm_hook(None, exchanges.hook)
        forwards: list[int] = []
        model.register_forward_pre_hook(lambda *_, forwards=forwards: forwards.append(1))
        value = cached_backward(wrapped, loss, inputs, chunk)
        results[f"ddp {chunk}"] = {
            "loss": value,
            "gradients": gradients_of(model),
            "exchanges": exchanges.count,
            "forwards": len(forwards),
        }

    accelerator = Accelerator(cpu=True)
    model = still_model()
    wrapped = accelerator.prepare(model)
    value = cached_backward(wrapped, loss, inputs, 2, accelerator=accelerator)
    results["accelerate"] = {"loss": value, "gradients": gradients_of(model)}
    results["wrapper"] = f"{accelerator.num_processes} {type(wrapped).__name__}"

    try:
        cached_backward(model, loss, {name: value[: 1 - rank] for name, value in inputs.items()}, 2)
    except ValueError as error:
        results["empty"] = str(error)
    return results


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, Any]]:
    """What each of two processes found; started once."""
    return run_ranks(work_of_a_rank, len(COUNTS), tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", ["ddp 1", "ddp 2", f"ddp {ROWS}", "accelerate"])
def test_two_ranks_with_different_rows_are_one(ranks, case):
    plain = still_model()
    loss = whole(plain)
    for result in ranks:
        assert_close(result[case]["loss"], loss, rtol=1e-10, atol=1e-10)
        assert_close(result[case]["gradients"], gradients_of(plain), rtol=1e-9, atol=1e-11)


def test_ranks_exchange_gradients_as_often_as_in_a_plain_step(ranks):
    assert [result["ddp 1"]["exchanges"] for result in ranks] == [
        result[f"ddp {ROWS}"]["exchanges"] for result in ranks
    ]
    assert all(result["ddp 1"]["exchanges"] == result["ddp 2"]["exchanges"] >= 1 for result in ranks)


@pytest.mark.parametrize(("chunk", "forwards"), [(1, 2 * 5), (2, 2 * 3), (ROWS, 1)])
def test_ranks_go_forward_equally_often(ranks, chunk, forwards):
    """As sharded weights are gathered in every forward: a rank that has done would leave the other waiting."""
    assert [result[f"ddp {chunk}"]["forwards"] for result in ranks] == [forwards, forwards]


def test_accelerate_had_wrapped_the_model(ranks):
    assert {result["wrapper"] for result in ranks} == {"2 DistributedDataParallel"}


def test_a_rank_without_rows_is_refused_on_all(ranks):
    assert {result["empty"] for result in ranks} == {"expected at least one row on every rank, got [1, 0]"}


# DeepSpeed --------------------------------------------------------------------------------------------------------


class ScalarOfOne(nn.Module):
    """Keeps a scalar weight as a vector of one: DeepSpeed 0.19 broadcasts weights as bytes, which have no 0-d view."""

    def forward(self, vector: torch.Tensor) -> torch.Tensor:
        return vector.reshape(())

    def right_inverse(self, scalar: torch.Tensor) -> torch.Tensor:
        return scalar.reshape(1)


def steps_with_zero(rank: int, stage: int) -> dict[str, Any]:
    """Three steps of SGD in chunks of two under ZeRO, through Accelerate."""
    config = {
        "zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True},
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    model = still_model(torch.float32)  # before the plugin, after which ZeRO-3 builds transformers' models in pieces
    parametrize.register_parametrization(model, "logit_scale", ScalarOfOne())
    accelerator = Accelerator(
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config),
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")],
    )
    wrapped, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.01))
    inputs = {name: value[own_rows(rank)] for name, value in inputs_of(dtype=torch.float32).items()}
    losses = []
    for _ in range(3):
        loss = partial(global_unicl_loss, labels=LABELS[own_rows(rank)])
        losses.append(cached_backward(wrapped, loss, inputs, 2, accelerator=accelerator).item())
        optimizer.step()  # has been taken by then: with DeepSpeed this does nothing
        optimizer.zero_grad()
    weights = accelerator.get_state_dict(wrapped) or {}  # with ZeRO-3 the first rank's alone
    weights = {name.removeprefix("parametrizations."): value for name, value in weights.items()}
    if weights:
        weights["logit_scale"] = weights.pop("logit_scale.original").reshape(())
    return {"losses": losses, "weights": weights, "wrapper": type(wrapped).__name__}


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_takes_the_steps_of_one_process(stage, tmp_path):
    pytest.importorskip("deepspeed", reason="needs DeepSpeed: pip install 'transformers_florence[deepspeed]'")
    plain = still_model(torch.float32)
    start = {name: value.clone() for name, value in plain.state_dict().items()}
    optimizer, losses = torch.optim.SGD(plain.parameters(), lr=0.01), []
    for _ in range(3):
        losses.append(whole(plain, inputs_of(dtype=torch.float32)).item())
        optimizer.step()
        optimizer.zero_grad()
    results = run_ranks(partial(steps_with_zero, stage=stage), len(COUNTS), tmp_path)
    assert {result["wrapper"] for result in results} == {"DeepSpeedEngine"}
    assert all(result["losses"] == pytest.approx(losses, rel=1e-5) for result in results)
    weights = results[0]["weights"]
    assert set(weights) == set(start)
    moved, expected = (
        torch.cat([(state[name] - start[name]).flatten() for name in start]) for state in (weights, plain.state_dict())
    )
    assert (moved - expected).norm() <= 2e-5 * expected.norm()  # three steps of float32
