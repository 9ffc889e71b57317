"""What keeps a training run sound between its steps: no update from numbers that are not finite, and a clean stop."""

import logging
import math
import os
import signal
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object

POLICIES = ("raise", "skip")
LISTED_SAMPLES = 32  # of each rank, in a message

logger = logging.getLogger(__name__)


class NonFiniteError(RuntimeError):
    """A loss or a gradient was NaN or infinite, and the policy says stop; the message names the step and samples."""


@dataclass(frozen=True)
class Update:
    """What became of one step.

    taken: whether the weights were changed; never between two steps of gradient accumulation.
    gradient_norm: before clipping; None between two steps of gradient accumulation, or where nothing computed it.
    """

    taken: bool
    gradient_norm: float | None


class GuardedUpdate:
    """Clips the gradient and takes the optimizer's step, unless the loss or the gradient is not finite.

    A step that is not taken leaves weights, optimizer, schedule and loss scale as they were, on all ranks alike, and
    its gradient is thrown away. With gradient accumulation one bad batch costs the whole step.

    With fp16, a gradient that is too large for the loss scale is no fault: the scaler leaves the step out and halves
    the scale, whatever the policy says, until the scale is as small as it can be of use. DeepSpeed takes its step
    inside of `backward`, and clips by its own configuration: `admits` looks at the loss before and leaves a bad batch
    out, while a gradient that is not finite can only be reported.

    Args:
        accelerator: with `step_scheduler_with_optimizer=False` where there are several ranks, as otherwise Accelerate
            moves the schedule once for each of them.
        optimizer, schedule: as `accelerator.prepare` returns them; the schedule may be None.
        parameters: whose gradients are clipped together.
        max_grad_norm: L2 norm that gradients are clipped to; infinity for none.
        policy: "raise" stops at the first number that is not finite, "skip" goes on with the next batch.
        max_skips: how many steps in a row may be skipped; one more stops the run.

    Raises:
        ValueError: another policy, or a number out of range.

    Example:
        >>> update = GuardedUpdate(accelerator, optimizer, schedule, model.parameters(), max_grad_norm=1.0)
        >>> for step, batch in enumerate(batches):
        ...     with accelerator.accumulate(model):
        ...         loss = model(**batch).loss
        ...         if update.admits(loss, step=step, samples=batch["ids"]):
        ...             accelerator.backward(loss)
        ...             result = update(loss, step=step, samples=batch["ids"])
    """

    def __init__(
        self,
        accelerator: Accelerator,
        optimizer: Any,
        schedule: Any,
        parameters: Iterable[torch.nn.Parameter],
        *,
        max_grad_norm: float = math.inf,
        policy: str = "raise",
        max_skips: int = 10,
    ) -> None:
        if policy not in POLICIES:
            raise ValueError(f"policy: expected one of {', '.join(POLICIES)}, got {policy!r}")
        if not max_grad_norm > 0:
            raise ValueError(f"max_grad_norm: expected a number above 0, got {max_grad_norm}")
        if max_skips < 1:
            raise ValueError(f"max_skips: expected at least 1, got {max_skips}")
        self.accelerator, self.optimizer, self.schedule = accelerator, optimizer, schedule
        self.parameters = list(parameters)
        self.max_grad_norm, self.policy, self.max_skips = max_grad_norm, policy, max_skips
        self.skipped_in_a_row = self.skipped = 0
        self.pending: list[tuple[torch.Tensor, Sequence[Any]]] = []  # since the last step: losses and samples

    def state_dict(self) -> dict[str, int]:
        """The counts, for `extra` of `save_checkpoint`."""
        return {"skipped": self.skipped, "skipped_in_a_row": self.skipped_in_a_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on counting from what `state_dict` gave."""
        self.skipped, self.skipped_in_a_row = state["skipped"], state["skipped_in_a_row"]

    def _anywhere(self, flag: torch.Tensor) -> bool:
        """Whether a flag is set on any rank."""
        return bool(self.accelerator.reduce(flag.to(torch.int32), "sum").item())

    def _describe(self, step: int, gradient_norm: float | None) -> str:
        """What was found where, gathered from all ranks."""
        index, lines = self.accelerator.process_index, []
        for loss, samples in self.pending:
            names = ", ".join(str(sample) for sample in samples[:LISTED_SAMPLES])
            more = f" and {len(samples) - LISTED_SAMPLES} more" if len(samples) > LISTED_SAMPLES else ""
            lines.append((math.isfinite(loss), f"rank {index}: loss {loss.item()}, samples {names}{more}"))
        lines = gather_object(lines)
        # Of losses that differ from rank to rank the bad ones are told; a gradient is the sum of all.
        bad = [line for fine, line in lines if not fine] or [line for _, line in lines]
        norm = "" if gradient_norm is None else f"the gradient's norm is {gradient_norm}; "
        return f"step {step}: {norm}{'; '.join(bad)}"

    def _skip(self, step: int, gradient_norm: float | None) -> None:
        """Leave the step out, or stop, as the policy says.

        Raises:
            NonFiniteError: see the class.
        """
        found = self._describe(step, gradient_norm)
        self.pending.clear()
        self.optimizer.zero_grad()
        scaler = self.accelerator.scaler
        if scaler is not None and scaler.is_enabled():
            scaler.update(scaler.get_scale())  # forgets this gradient and leaves the scale as it is
        self.skipped += 1
        self.skipped_in_a_row += 1
        if self.policy == "raise":
            raise NonFiniteError(f"not finite at {found}")
        if self.skipped_in_a_row > self.max_skips:
            raise NonFiniteError(f"more than {self.max_skips} steps in a row were not finite, the last at {found}")
        if self.accelerator.is_main_process:
            logger.warning("left out, not finite at %s", found)

    def admits(self, loss: torch.Tensor, *, step: int, samples: Sequence[Any]) -> bool:
        """Whether `backward` may be called with a loss; every rank asks, and gets the same answer.

        Only DeepSpeed's backward cannot be undone, so anywhere else the answer is yes, and costs nothing.

        Args:
            loss: a scalar.
            step: number of the step, for the message.
            samples: what this rank's batch is made of: rows, file names or the like.

        Raises:
            NonFiniteError: the loss is not finite, and the policy or `max_skips` says stop.
        """
        if self.accelerator.distributed_type != DistributedType.DEEPSPEED:
            return True
        if not self._anywhere(~torch.isfinite(loss.detach())):
            return True
        self.pending.append((loss.detach(), samples))
        self._skip(step, None)
        return False

    def __call__(self, loss: torch.Tensor, *, step: int, samples: Sequence[Any]) -> Update:
        """After `backward`: take the step, or leave it out; every rank calls this.

        Args:
            loss, step, samples: as `admits` takes them.

        Raises:
            NonFiniteError: something is not finite, and the policy or `max_skips` says stop; or the loss scale has
                become too small to be of use; or DeepSpeed has taken a step with a gradient that is not finite.
        """
        self.pending.append((loss.detach(), samples))
        if not self.accelerator.sync_gradients:
            return Update(taken=False, gradient_norm=None)
        norm = self.accelerator.clip_grad_norm_(self.parameters, self.max_grad_norm)
        if norm is not None:  # FSDP's is a DTensor, DeepSpeed's a number
            norm = torch.as_tensor(norm.full_tensor() if hasattr(norm, "full_tensor") else norm, device=loss.device)
        bad_loss = ~torch.isfinite(torch.stack([loss for loss, _ in self.pending])).all()
        bad_norm = torch.zeros_like(bad_loss) if norm is None else ~torch.isfinite(norm)
        gradient_norm = None if norm is None else float(norm)
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            return self._after_deepspeed(step, gradient_norm, self._anywhere(bad_norm))
        scaler = self.accelerator.scaler
        scales = scaler is not None and scaler.is_enabled()
        if self._anywhere(bad_loss if scales else bad_loss | bad_norm):
            self._skip(step, gradient_norm)
            return Update(taken=False, gradient_norm=gradient_norm)
        self.optimizer.step()
        taken = not self.optimizer.step_was_skipped
        if taken and self.schedule is not None:
            self.schedule.step()
        if scales and not taken and scaler.get_scale() < 1:
            found = self._describe(step, gradient_norm)
            raise NonFiniteError(f"the loss scale fell to {scaler.get_scale()}, too small to be of use, at {found}")
        self._finish(taken)
        return Update(taken=taken, gradient_norm=gradient_norm)

    def _after_deepspeed(self, step: int, gradient_norm: float | None, bad: bool) -> Update:
        """DeepSpeed has taken its step, or its own loss scaler has left it out; see what became of it."""
        taken = not self.optimizer.step_was_skipped
        if bad and taken:
            found = self._describe(step, gradient_norm)
            raise NonFiniteError(f"not finite at {found}; DeepSpeed has taken the step: go back to a checkpoint")
        if taken and self.schedule is not None:
            self.schedule.step()
        self._finish(taken)
        return Update(taken=taken, gradient_norm=gradient_norm)

    def _finish(self, taken: bool) -> None:
        """Throw the gradient away and count afresh."""
        self.optimizer.zero_grad()
        self.pending.clear()
        if taken:
            self.skipped_in_a_row = 0


class StopRequest:
    """Notes a signal, so that a run can end its step, save, and leave by itself with the exit status 0.

    Further signals change nothing: schedulers and launchers often send several, and a save is not to be cut short.
    To be entered in the main thread.

    Args:
        signals: numbers of the signals; SIGTERM if none is given.

    Example:
        >>> with StopRequest() as stop:
        ...     for step in range(first, steps):
        ...         train(step)
        ...         if stop.requested(accelerator):
        ...             save_checkpoint(accelerator, folder, step + 1)
        ...             break
    """

    def __init__(self, *signals: int) -> None:
        self.signals = signals or (signal.SIGTERM,)
        self.received: int | None = None
        self.process = os.getpid()
        self.previous: dict[int, Any] = {}

    def _receive(self, number: int, frame: Any) -> None:
        if os.getpid() == self.process:
            self.received = number
        else:  # a child that inherited the handler ends as if there were none
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def __enter__(self) -> "StopRequest":
        self.previous = {number: signal.signal(number, self._receive) for number in self.signals}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def requested(self, accelerator: Accelerator) -> bool:
        """Whether any rank was asked to stop; every rank asks at the same step, and gets the same answer."""
        if self.received is not None:
            accelerator.set_trigger()
        return bool(accelerator.check_trigger())


__all__ = ["GuardedUpdate", "NonFiniteError", "StopRequest", "Update"]
