"""What every fine-tuning script shares: its arguments, the batch of a step, and the loop over the steps."""

import copy
import json
import os
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import get_cosine_schedule_with_warmup

from .arguments import check_fields
from .checkpointing import SHARDED, resume_training, save_checkpoint
from .optimization import moving_average
from .sharding import make_accelerator
from .stability import GuardedUpdate, StopRequest
from .tracking import LocalTracker, make_trackers

ComputeLoss = Callable[[nn.Module, dict[str, Any]], tuple[torch.Tensor, Mapping[str, torch.Tensor]]]


@dataclass
class RecipeArguments:
    """What every fine-tuning run is told; two runs with equal arguments on one machine give equal weights.

    A recipe derives its own arguments from these. Numbers are checked at construction: integers are at least 1, or 0
    if named in `from_zero`; real numbers are finite and not negative; a text of `choices` is one of them.

    Attributes:
        free: arguments that may differ when a run goes on; a checkpoint belongs to all others.
        from_zero: integers that may be 0.
        choices: what a text may be.

    Raises:
        ValueError: a value out of these bounds, or of another type.
    """

    output: str = "runs/model"
    epochs: int = 10
    batch_size: int = 16  # samples of a step, on all processes together
    learning_rate: float = 5e-4
    weight_decay: float = 0.05
    warmup_steps: int = 50
    max_grad_norm: float = 1.0
    ema_decay: float = 0.0  # of a running average of the weights, which is then evaluated and kept; 0 for none
    precision: str = "auto"  # auto: bfloat16 autocast on a GPU, float32 on a CPU; float32; bfloat16
    workers: int = 0  # processes that read and augment
    log_every: int = 10  # steps
    eval_every: int = 1  # epochs
    keep: int = 1  # checkpoints, the newest ones, besides the best model
    non_finite: str = "raise"  # what a loss or a gradient that is not finite does: raise, or skip the step
    report_to: str = "local"  # local: log.csv and curves.png in the output; trackers of Accelerate's; none
    seed: int = 0

    free: ClassVar[tuple[str, ...]] = ("output", "workers", "log_every", "keep", "non_finite", "report_to")
    from_zero: ClassVar[tuple[str, ...]] = ("seed", "warmup_steps", "workers")
    choices: ClassVar[dict[str, Sequence[str]]] = {
        "precision": ("auto", "float32", "bfloat16"),
        "non_finite": ("raise", "skip"),
    }

    def __post_init__(self) -> None:
        check_fields(self, from_zero=self.from_zero, choices=self.choices)
        if self.ema_decay >= 1:
            raise ValueError(f"ema_decay: expected less than 1, got {self.ema_decay}")
        if self.seed >= 1 << 31:
            raise ValueError(f"seed: expected less than 2 to the power of 31, got {self.seed}")

    def make_accelerator(self) -> Accelerator:
        """The accelerator of the run, with its precision and its trackers; makes the output's folder, and seeds torch.

        Raises:
            ValueError: the processes would share the weights, as ZeRO and FSDP do: a model that is fine-tuned here
                gains nothing by it.
        """
        output = Path(self.output)
        output.mkdir(parents=True, exist_ok=True)
        autocast = self.precision == "bfloat16" or (self.precision == "auto" and torch.cuda.is_available())
        accelerator = make_accelerator(
            mixed_precision="bf16" if autocast else "no",
            log_with=make_trackers(self.report_to, output),
            project_dir=self.output,
            step_scheduler_with_optimizer=False,  # or the schedule would move once for each rank
        )
        if accelerator.distributed_type in SHARDED:
            got = accelerator.distributed_type.value
            raise ValueError(f"expected processes with all weights each, got {got}: launch without it")
        torch.manual_seed(self.seed)
        return accelerator


class StepBatches(Dataset, ABC):
    """The batch of a step, made of the seed and the step alone: a rank's part of it.

    An epoch is a new order of the set's rows; what does not fill the last batch is left out. Random choices of a
    sample come from torch's generator, seeded for each place in each batch, so that neither the number of ranks nor
    that of workers changes a batch.

    Args:
        arguments: of the run.
        count: rows in the set.
        rank, ranks: this process, and how many there are.

    Raises:
        ValueError: fewer rows than a batch has, or a batch that the ranks cannot share equally.
    """

    def __init__(self, arguments: RecipeArguments, count: int, rank: int = 0, ranks: int = 1) -> None:
        size = arguments.batch_size
        if size % ranks:
            raise ValueError(f"batch_size: expected a multiple of {ranks} processes, got {size}")
        if count < size:
            raise ValueError(f"expected at least batch_size={size} samples, got {count}")
        self.seed, self.batch_size, self.epochs, self.count = arguments.seed, size, arguments.epochs, count
        self.part = slice(rank * size // ranks, (rank + 1) * size // ranks)
        self.per_epoch = count // size

    def __len__(self) -> int:
        return self.per_epoch * self.epochs

    def rows(self, step: int) -> list[int]:
        """Rows of the set in this rank's part of a step."""
        epoch, place = divmod(step, self.per_epoch)
        order = torch.randperm(self.count, generator=torch.Generator().manual_seed((self.seed << 32) + epoch))
        return order[place * self.batch_size : (place + 1) * self.batch_size][self.part].tolist()

    def samples(self, step: int) -> list[Any]:
        """What `sample` makes of the rows of a step."""
        samples = []
        with torch.random.fork_rng(devices=[]):
            for number, row in enumerate(self.rows(step), start=self.part.start):
                torch.manual_seed((self.seed << 32) + step * self.batch_size + number)
                samples.append(self.sample(row))
        return samples

    def __getitem__(self, step: int) -> dict[str, Any]:
        """`inputs` of the model, and the `names` of the samples that they were made of."""
        return {"inputs": self.collate(self.samples(step)), "names": [self.name(row) for row in self.rows(step)]}

    def name(self, row: int) -> str:
        """What messages call a row."""
        return f"row {row}"

    @abstractmethod
    def sample(self, row: int) -> Any:
        """A row as a sample, augmented."""

    @abstractmethod
    def collate(self, samples: list[Any]) -> dict[str, Any]:
        """Samples as inputs of the model."""


def check_same_run(output: Path, record: Mapping[str, Any], names: Sequence[str]) -> None:
    """Refuse to go on with a run that was another one.

    Args:
        output: folder with the run's checkpoints and its `arguments.json`.
        record: what the run is made of now.
        names: what of it must not have changed; what the former run did not know is not compared.

    Raises:
        ValueError: the folder has checkpoints of a run with other values.
    """
    file = output / "arguments.json"
    if not any(output.glob("checkpoint-*")) or not file.is_file():
        return
    before = json.loads(file.read_text("utf-8"))
    changed = [name for name in names if name in before and before[name] != record[name]]
    if changed:
        got = ", ".join(f"{name} {before[name]!r} there and {record[name]!r} now" for name in changed)
        raise ValueError(f"{output} holds another run: expected equal arguments or another output, got {got}")


def plain_model(model: nn.Module) -> Any:
    """The model itself; PEFT's adapters are merged into a copy of its weights."""
    if not hasattr(model, "merge_and_unload"):
        return model
    adapted: Any = copy.deepcopy(model)
    return adapted.merge_and_unload()


def replace_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Write a folder beside the former one, and only then put it in its place.

    A process that is killed meanwhile leaves the former folder, or, for the moment between two renamings, none beside
    a complete `.former`, which the next call puts back before it begins.
    """
    partial, former = (folder.with_name(f"{folder.name}.{state}") for state in ("partial", "former"))
    if former.is_dir() and not folder.is_dir():
        os.replace(former, folder)
    for leftover in (partial, former):
        shutil.rmtree(leftover, ignore_errors=True)
    write(partial)
    if folder.is_dir():
        os.replace(folder, former)
    os.replace(partial, folder)
    shutil.rmtree(former, ignore_errors=True)


def loss_of_model(model: nn.Module, inputs: dict[str, Any]) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
    """The `loss` that the model computes of its inputs, and the parts of it in `loss_dict`, if it has them."""
    outputs = model(**inputs)
    return outputs.loss, getattr(outputs, "loss_dict", None) or {}


def fine_tune(
    arguments: RecipeArguments,
    accelerator: Accelerator,
    model: nn.Module,
    groups: list[dict[str, Any]],
    batches: StepBatches,
    *,
    save: Callable[[Any, Path], None],
    evaluate: Callable[[Any], Mapping[str, Any]] | None = None,
    best: str | None = None,
    record: Mapping[str, Any] | None = None,
    compute_loss: ComputeLoss = loss_of_model,
) -> dict[str, Any]:
    """Train a model, and keep the best one: AdamW, cosine schedule with warm-up, guarded updates, exact resumption.

    In the output's folder: `checkpoint-N`, from which the same command goes on after any interruption; `log.csv` and
    `curves.png`; `arguments.json`; `best`, the model of the highest score so far with its `scores.json`, or the last
    one without `evaluate`. SIGTERM and SIGINT save and end the run.

    Args:
        arguments: of the run.
        accelerator: made by `arguments.make_accelerator`.
        model: what is trained, with adapters or frozen parts as they should be.
        groups: of its parameters, for AdamW.
        batches: of this rank.
        save: writes a model into a new folder, with its processor; adapters are merged by then.
        evaluate: scores of a model in evaluation mode, called on the main process alone: numbers go into the log, all
            that JSON can hold into `scores.json`.
        best: which of the scores must grow; None there counts as no score.
        record: what else belongs to the run, such as the names of its classes; kept in `arguments.json`.
        compute_loss: of the prepared model and a batch's inputs, on their device: the loss, and parts for the log.

    Returns:
        The last scores; empty on processes that do not evaluate, or without `evaluate`.

    Raises:
        ValueError: the output holds a run with other arguments.
        NonFiniteError: a loss or a gradient that is not finite, if `non_finite` says raise.
    """
    output, steps = Path(arguments.output), len(batches)
    rank, ranks = accelerator.process_index, accelerator.num_processes
    record = {**asdict(arguments), **(record or {})}
    check_same_run(output, record, [name for name in record if name not in arguments.free])
    optimizer = torch.optim.AdamW(groups, lr=arguments.learning_rate)
    schedule = get_cosine_schedule_with_warmup(optimizer, arguments.warmup_steps, steps)
    wrapped, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    average = moving_average(model, arguments.ema_decay) if arguments.ema_decay else None
    modules = {} if average is None else {"average": average}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    update = GuardedUpdate(
        accelerator,
        optimizer,
        schedule,
        trained,
        max_grad_norm=arguments.max_grad_norm,
        policy=arguments.non_finite,
    )
    first, highest, progress = 0, None, resume_training(accelerator, output, modules=modules)
    if progress is not None:
        first, highest = progress.step, progress.extra["best"]
        update.load_state_dict(progress.extra["update"])
        accelerator.print(f"resumed from {progress.folder} at step {first}")
    accelerator.init_trackers(output.name, config={key: str(value) for key, value in record.items()})
    for tracker in accelerator.trackers:
        if isinstance(tracker, LocalTracker):
            tracker.go_on_after(first)
    if accelerator.is_main_process:
        (output / "arguments.json").write_text(json.dumps(record, indent=2), "utf-8")
    sizes = [sum(weight.numel() for weight in weights) for weights in (trained, model.parameters())]
    accelerator.print(f"{sizes[0]:,} of {sizes[1]:,} parameters are trained, {batches.per_epoch} steps an epoch")

    def score(done: int) -> dict[str, Any]:
        nonlocal highest
        plain = plain_model(accelerator.unwrap_model(wrapped) if average is None else average.module).eval()
        scores = dict(evaluate(plain)) if evaluate is not None else {}
        found = scores[best] if best is not None else None

        def write(folder: Path) -> None:
            save(plain, folder)
            (folder / "scores.json").write_text(json.dumps({"step": done, **scores}, indent=2), "utf-8")

        if best is None or (found is not None and (highest is None or found > highest)):
            highest = found
            replace_folder(output / "best", write)
        return scores

    # Its own generator: else it would draw from torch's, and a run that was interrupted would go another way.
    loader = DataLoader(
        batches,
        sampler=range(first, steps),
        batch_size=None,
        num_workers=arguments.workers,
        generator=torch.Generator().manual_seed(arguments.seed),
    )
    bar = tqdm(loader, initial=first, total=steps, desc="training", disable=not accelerator.is_main_process)
    started, seen, scores = time.monotonic(), 0, {}
    with StopRequest() as stop:
        for step, batch in enumerate(bar, start=first):
            wrapped.train()
            torch.manual_seed((arguments.seed << 32) + step * ranks + rank)  # of drop path and dropout
            loss, parts = compute_loss(wrapped, send_to_device(batch["inputs"], accelerator.device))
            accelerator.backward(loss)
            rate = max(schedule.get_last_lr())
            taken = update(loss, step=step, samples=batch["names"])
            if average is not None and taken.taken:
                average.update_parameters(model)
            seen, done, entry = seen + arguments.batch_size, step + 1, {}
            if done % arguments.log_every == 0:
                means = accelerator.reduce(torch.stack([loss, *parts.values()]).detach(), "mean").tolist()
                entry = {name: round(value, 4) for name, value in zip(["loss", *parts], means, strict=True)}
                speed = seen / (time.monotonic() - started)
                entry |= {"gradient_norm": taken.gradient_norm, "learning_rate": rate}
                entry |= {"samples_per_second": round(speed, 2), "skipped_steps": update.skipped}
                bar.set_postfix(loss=entry["loss"], refresh=False)
            ends_epoch = done % batches.per_epoch == 0
            evaluates = done == steps or (ends_epoch and done // batches.per_epoch % arguments.eval_every == 0)
            if evaluates and accelerator.is_main_process:
                scores = score(done)
                entry |= {name: value for name, value in scores.items() if isinstance(value, int | float)}
            if entry:
                accelerator.log(entry, step=done)
            stopped = stop.requested(accelerator)
            if ends_epoch or stopped:
                extra = {"update": update.state_dict(), "best": highest}
                save_checkpoint(accelerator, output, done, extra=extra, modules=modules, keep=arguments.keep)
            if stopped and done < steps:
                accelerator.print(f"asked to stop: saved step {done}; the same command goes on from there")
                break
    accelerator.end_training()
    accelerator.print(f"{output / 'best'}: {'the last model' if highest is None else f'{best} {highest:.4f}'}")
    return scores


__all__ = [
    "RecipeArguments",
    "StepBatches",
    "check_same_run",
    "fine_tune",
    "loss_of_model",
    "plain_model",
    "replace_folder",
]
