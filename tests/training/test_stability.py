"""Steps that are left out change nothing, are named, and are left out on all ranks; a signal ends a run in order."""

import copy
import logging
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import nn

from tests.training.processes import fork_server, run_ranks, wait_for
from transformers_florence.training.stability import GuardedUpdate, NonFiniteError, StopRequest

BATCH = 4


class Setting:
    """A small model in training, with its guard."""

    def __init__(self, accelerator: Accelerator | None = None, **options) -> None:
        self.accelerator = accelerator or Accelerator(cpu=True, step_scheduler_with_optimizer=False)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        self.model, self.optimizer, self.schedule = self.accelerator.prepare(model, optimizer, schedule)
        self.update = GuardedUpdate(
            self.accelerator,
            self.optimizer,
            self.schedule,
            self.model.parameters(),
            **{"max_grad_norm": 0.5, **options},
        )

    def take(self, step: int, loss_factor: float = 1.0, gradient_factor: float = 1.0):
        """One step on the batch of its number and rank, with its loss or one of its gradients multiplied."""
        batch = step + self.accelerator.process_index
        inputs = torch.randn(BATCH, 3, generator=torch.Generator().manual_seed(batch))
        samples = [f"{batch}-{row}" for row in range(BATCH)]
        with self.accelerator.accumulate(self.model):
            loss = loss_factor * (self.model(inputs) - 1).square().mean()
            weight = next(self.model.parameters())
            hook = weight.register_hook(lambda gradient: gradient_factor * gradient)
            self.accelerator.backward(loss)
            hook.remove()
            return self.update(loss, step=step, samples=samples)

    def state(self) -> list[torch.Tensor | float]:
        """Everything that a step changes, copied."""
        optimizer = [value for state in self.optimizer.state.values() for value in state.values()]
        tensors = [tensor.detach().clone() for tensor in (*self.model.parameters(), *optimizer)]
        return [*tensors, self.schedule.get_last_lr()[0], self.schedule.state_dict()["last_epoch"]]


def same(state: list, other: list) -> bool:
    return len(state) == len(other) and all(
        torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two
        for one, two in zip(state, other, strict=True)
    )


BAD = {
    "loss nan": {"loss_factor": math.nan},
    "loss infinite": {"loss_factor": math.inf},
    "gradient nan": {"gradient_factor": math.nan},
    "gradient infinite": {"gradient_factor": -math.inf},
}


def test_finite_steps_are_those_of_a_plain_loop():
    setting = Setting()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    for step in range(4):
        result = setting.take(step)
        inputs = torch.randn(BATCH, 3, generator=torch.Generator().manual_seed(step))
        (model(inputs) - 1).square().mean().backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        assert result.taken and result.gradient_norm == norm.item()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        for ours, theirs in zip(setting.model.parameters(), model.parameters(), strict=True):
            assert torch.equal(ours, theirs) and ours.grad is None
    assert setting.schedule.get_last_lr() == schedule.get_last_lr()


@pytest.mark.parametrize("bad", BAD)
def test_a_step_that_is_left_out_changes_nothing_and_is_named(bad, caplog):
    setting = Setting(policy="skip")
    for step in range(2):
        setting.take(step)
    before = setting.state()
    result = setting.take(7, **BAD[bad])
    assert not result.taken and same(setting.state(), before)
    assert all(parameter.grad is None for parameter in setting.model.parameters())
    assert "left out, not finite at step 7: " in caplog.text and "samples 7-0, 7-1, 7-2, 7-3" in caplog.text
    assert setting.update.state_dict() == {"skipped": 1, "skipped_in_a_row": 1}
    setting.take(2)
    without = Setting(policy="skip")
    for step in range(3):
        without.take(step)
    assert same(setting.state(), without.state()), "the run is the one that never saw the batch"


@pytest.mark.parametrize("bad", BAD)
def test_by_default_the_run_stops_and_tells_where(bad):
    setting = Setting()
    setting.take(0)
    before = setting.state()
    with pytest.raises(
        NonFiniteError, match=r"not finite at step 12: .*rank 0: loss .*, samples 12-0, 12-1, "
    ) as error:
        setting.take(12, **BAD[bad])
    assert same(setting.state(), before)
    assert ("loss nan" in str(error.value)) == (bad == "loss nan")
    assert "the gradient's norm is" in str(error.value)


def test_long_lists_of_samples_are_cut():
    setting = Setting()
    loss = setting.model(torch.ones(1, 3)).sum() * math.nan
    setting.accelerator.backward(loss)
    with pytest.raises(NonFiniteError, match=r"samples 0, 1, .*, 30, 31 and 4064 more$"):
        setting.update(loss, step=0, samples=range(4096))


def test_after_too_many_in_a_row_the_run_stops():
    setting = Setting(policy="skip", max_skips=2)
    for step, factor in enumerate([math.nan, math.nan, 1.0, math.nan, math.nan]):
        assert setting.take(step, factor).taken == (factor == 1.0)
    assert setting.update.state_dict() == {"skipped": 4, "skipped_in_a_row": 2}
    resumed = Setting(policy="skip", max_skips=2)
    resumed.update.load_state_dict(setting.update.state_dict())
    for run in (setting, resumed):
        before = run.state()
        with pytest.raises(NonFiniteError, match="more than 2 steps in a row were not finite, the last at step 5: "):
            run.take(5, math.nan)
        assert same(run.state(), before)


def test_one_bad_batch_of_an_accumulated_step_leaves_it_out_and_is_named():
    def accumulating(**options) -> Setting:
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, step_scheduler_with_optimizer=False)
        return Setting(accelerator, **options)

    setting = accumulating(policy="skip")
    for step in range(2):
        result = setting.take(step)
    assert result.taken
    before = setting.state()
    first, second = setting.take(2, math.nan), setting.take(3)
    assert first.gradient_norm is None and not first.taken and not second.taken
    assert same(setting.state(), before) and setting.update.skipped == 1
    assert [setting.take(step).taken for step in (4, 5)] == [False, True], "the next step is whole again"

    setting = accumulating()
    setting.take(2)
    with pytest.raises(NonFiniteError) as error:
        setting.take(3, math.nan)
    assert "samples 3-0" in str(error.value) and "2-0" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "ignore"}, "policy: expected one of raise, skip, got 'ignore'"),
        ({"max_grad_norm": 0}, "max_grad_norm: expected a number above 0, got 0"),
        ({"max_grad_norm": math.nan}, "max_grad_norm: expected a number above 0, got nan"),
        ({"max_skips": 0}, "max_skips: expected at least 1, got 0"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Setting(**options)


# fp16's loss scale


@pytest.fixture
def half(monkeypatch) -> Iterator[Callable[..., Setting]]:
    """Settings that compute in float16 and scale their loss, as Accelerate has them on a GPU."""
    AcceleratorState._reset_state(True)

    def make(init_scale: float, **options) -> Setting:
        accelerator = Accelerator(cpu=True, mixed_precision="fp16", step_scheduler_with_optimizer=False)
        accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler("cpu", init_scale=init_scale)
        return Setting(accelerator, **options)

    yield make
    AcceleratorState._reset_state(True)


def test_an_overflow_lowers_the_scale_until_the_step_is_taken(half):
    setting = half(2.0**24)  # too large: the gradients of these losses overflow in float16
    before, scaler, overflows = setting.state(), setting.accelerator.scaler, 0
    while not (result := setting.take(0)).taken:
        overflows += 1
        assert same(setting.state(), before) and not math.isfinite(result.gradient_norm)
        assert scaler.get_scale() == 2.0 ** (24 - overflows)
    assert overflows > 3 and setting.update.skipped == 0, "an overflow is no fault, whatever the policy"
    without = half(2.0 ** (24 - overflows))
    assert without.take(0) == result
    assert same(setting.state(), without.state())
    assert setting.take(1) == without.take(1)


def test_a_bad_loss_leaves_the_scale_alone(half):
    setting, without = half(16.0, policy="skip"), half(16.0)
    for run in (setting, without):
        assert run.take(0).taken
    before, scale = setting.state(), copy.deepcopy(setting.accelerator.scaler.state_dict())
    assert not setting.take(1, math.nan).taken
    assert same(setting.state(), before) and setting.accelerator.scaler.state_dict() == scale
    assert setting.take(2) == without.take(2)
    assert same(setting.state(), without.state())
    with pytest.raises(NonFiniteError, match="not finite at step 3"):
        without.take(3, math.nan)


def test_a_gradient_that_is_never_finite_stops_the_run(half):
    setting = half(4.0, policy="skip")
    before = setting.state()
    for scale in (2.0, 1.0):
        assert not setting.take(5, gradient_factor=math.nan).taken
        assert setting.accelerator.scaler.get_scale() == scale
    with pytest.raises(NonFiniteError, match=r"the loss scale fell to 0.5, .* at step 5: .*samples 5-0, 5-1"):
        setting.take(5, gradient_factor=math.nan)
    assert same(setting.state(), before)


# DeepSpeed, whose backward takes the step


class LikeDeepSpeed:
    """As much of Accelerate's side of DeepSpeed as the guard sees."""

    distributed_type = DistributedType.DEEPSPEED
    process_index, is_main_process, sync_gradients, scaler = 0, True, True, None

    def __init__(self, norm: float | None) -> None:
        self.norm = norm

    def reduce(self, tensor: torch.Tensor, reduction: str) -> torch.Tensor:
        return tensor

    def clip_grad_norm_(self, parameters: list, max_norm: float) -> float | None:
        return self.norm


def deepspeed_guard(norm: float | None, overflow: bool = False, **options) -> tuple[GuardedUpdate, list[str]]:
    calls: list[str] = []
    optimizer = SimpleNamespace(
        step=lambda: calls.append("step"), zero_grad=lambda: None, step_was_skipped=overflow, param_groups=[]
    )
    schedule = SimpleNamespace(step=lambda: calls.append("schedule"))
    return GuardedUpdate(LikeDeepSpeed(norm), optimizer, schedule, [], **options), calls


def test_under_deepspeed_a_bad_loss_is_seen_before_backward():
    update, calls = deepspeed_guard(1.0, policy="skip", max_skips=1)
    assert update.admits(torch.tensor(1.0), step=0, samples=["a"])
    assert update(torch.tensor(1.0), step=0, samples=["a"]).taken and calls == ["schedule"]
    assert not update.admits(torch.tensor(math.nan), step=1, samples=["b"])
    assert calls == ["schedule"]
    with pytest.raises(NonFiniteError, match="more than 1 steps in a row .* step 2: rank 0: loss inf, samples c"):
        update.admits(torch.tensor(math.inf), step=2, samples=["c"])
    with pytest.raises(NonFiniteError, match="not finite at step 0: rank 0: loss nan, samples a"):
        deepspeed_guard(1.0)[0].admits(torch.tensor(math.nan), step=0, samples=["a"])


def test_under_deepspeed_a_bad_gradient_is_told_unless_its_scaler_left_it_out():
    loss, options = torch.tensor(1.0), {"step": 3, "samples": ["a"]}
    update, calls = deepspeed_guard(math.inf, policy="skip")
    with pytest.raises(NonFiniteError, match="step 3: the gradient's norm is inf; .*go back to a checkpoint"):
        update(loss, **options)
    update, calls = deepspeed_guard(math.inf, overflow=True)
    assert not update(loss, **options).taken and calls == [], "the schedule waits with the optimizer"
    update, calls = deepspeed_guard(None)
    assert update(loss, **options).gradient_norm is None and calls == ["schedule"]


def test_anywhere_else_backward_is_always_admitted():
    setting = Setting()
    assert setting.update.admits(torch.tensor(math.nan), step=0, samples=[])


# Two ranks


def leave_out_on_two_ranks() -> dict:
    """What one of two ranks sees when the other's, or its own, loss is bad."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("transformers_florence").addHandler(handler)
    setting = Setting(policy="skip", max_skips=1)
    rank = setting.accelerator.process_index
    setting.take(10)  # of the batches 10 and 11
    before = setting.state()
    taken = [setting.take(20, math.nan if rank == 1 else 1.0).taken]
    untouched = same(setting.state(), before)
    taken.append(setting.take(30).taken)
    setting.take(40, math.nan if rank == 0 else 1.0)
    try:
        setting.take(50, gradient_factor=math.inf if rank == 0 else 1.0)
    except NonFiniteError as error:
        messages.append(str(error))
    weights = [parameter.tolist() for parameter in setting.model.parameters()]
    return {
        "processes": setting.accelerator.num_processes,
        "taken": taken,
        "untouched": untouched,
        "messages": messages,
        "weights": weights,
        "rate": setting.schedule.get_last_lr(),
    }


def test_two_ranks_leave_out_the_same_steps():
    first, second = run_ranks(leave_out_on_two_ranks)
    assert first["processes"] == second["processes"] == 2
    assert first["taken"] == second["taken"] == [False, True]
    assert first["untouched"] and second["untouched"]
    assert first["weights"] == second["weights"]
    assert first["rate"] == second["rate"] == [pytest.approx(0.1 * 0.9**2)], "one move of the schedule a step"
    skip, other, stop = first["messages"]  # rank 0 alone logs, both raise
    assert "rank 1: loss nan, samples 21-0, 21-1" in skip and "20-0" not in skip
    assert "rank 0: loss nan, samples 40-0" in other and "41-0" not in other
    assert "rank 0: loss" in stop and "samples 50-0" in stop and "samples 51-0" in stop
    assert second["messages"] == [stop]


# Stopping


def test_a_signal_is_noted_and_the_handler_put_back():
    accelerator, previous = Accelerator(cpu=True), signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        assert not stop.requested(accelerator)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.requested(accelerator) and stop.received == signal.SIGTERM
        assert stop.requested(accelerator), "it stays asked"
    assert signal.getsignal(signal.SIGTERM) is previous
    with StopRequest(signal.SIGUSR1, signal.SIGUSR2) as stop:
        assert signal.getsignal(signal.SIGTERM) is previous
        os.kill(os.getpid(), signal.SIGUSR2)
        assert stop.requested(accelerator) and stop.received == signal.SIGUSR2


def fork_within_a_stop_request() -> None:
    """Ends with the exit status of a child that was sent SIGTERM."""
    reader, writer = os.pipe()
    with StopRequest():
        child = os.fork()
        if child == 0:
            os.write(writer, b".")
            while True:
                time.sleep(0.01)
        os.read(reader, 1)  # a signal would be lost before the child has come out of the fork
        os.kill(child, signal.SIGTERM)
        _, status = os.waitpid(child, 0)
    os._exit(os.waitstatus_to_exitcode(status) + 100)


def test_children_end_at_the_signal_as_they_would_without():
    process = fork_server().Process(target=fork_within_a_stop_request)
    process.start()
    assert wait_for(process) == 100 - signal.SIGTERM
