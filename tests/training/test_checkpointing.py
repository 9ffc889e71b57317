"""Checkpoints: killed at any moment, out of space, damaged or stopped, a run goes on as if nothing had happened."""

import errno
import json
import logging
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from safetensors.torch import load_file
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tests.training.processes import die, fork_server, run_ranks, wait_for
from transformers_florence.training import checkpointing
from transformers_florence.training.checkpointing import (
    CheckpointError,
    check_checkpoint,
    find_latest_checkpoint,
    resume_training,
    save_checkpoint,
)
from transformers_florence.training.stability import StopRequest

ROWS, BATCH, SAVE_EVERY = 12, 4, 3
FILES = {
    "average.safetensors",
    "model.safetensors",
    "optimizer.bin",
    "progress.json",
    "random_states_0.pkl",
    "scheduler.bin",
}

# What changes the disk
CALLS = [
    (torch, "save"),
    (os, "fsync"),
    (Path, "mkdir"),
    (Path, "rename"),
    (Path, "write_text"),
    (shutil, "rmtree"),
]

# The training that is interrupted


def parts(accelerator: Accelerator) -> tuple[nn.Module, torch.optim.Optimizer, object, AveragedModel]:
    """A model with dropout, its optimizer and schedule, and an average of the weights."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Tanh(), nn.Linear(8, 1))
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=500)
    return (*accelerator.prepare(model, optimizer, schedule), average)


def train(folder: Path, steps: int, tell: Callable[[str], None] = str, stop: StopRequest | None = None) -> list[int]:
    """Train to the end or until asked to stop, from the last checkpoint on, drawing from every random generator.

    Returns:
        The steps that were taken this time.
    """
    accelerator = Accelerator(cpu=True)
    model, optimizer, schedule, average = parts(accelerator)
    table = torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(1))
    progress = resume_training(accelerator, folder, modules={"average": average})
    first, (epoch, batch), seen = 0, (0, 0), []
    if progress is not None:
        first, (epoch, batch), seen = progress.step, progress.data, progress.extra["seen"]
    taken = []
    for step in range(first, steps):
        tell("step")
        order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(epoch))
        rows = order[batch * BATCH : (batch + 1) * BATCH]
        inputs = table[rows] + 0.1 * torch.randn(BATCH, 4) + random.random() + float(np.random.rand())
        loss = (model(inputs) - inputs.sum(dim=1, keepdim=True)).square().mean()
        accelerator.backward(loss)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        average.update_parameters(model)
        seen.append([rows.tolist(), loss.item()])
        taken.append(step)
        batch += 1
        if batch == ROWS // BATCH:
            epoch, batch = epoch + 1, 0
        stopped = stop is not None and stop.requested(accelerator)
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps or stopped:
            save_checkpoint(
                accelerator,
                folder,
                step + 1,
                data=(epoch, batch),
                extra={"seen": seen},
                modules={"average": average},
            )
        if stopped:
            break
    return taken


def content(checkpoint: Path) -> dict[str, bytes]:
    """Name -> bytes of each file: weights, their average, optimizer, schedule, random states, data and losses."""
    return {path.name: path.read_bytes() for path in checkpoint.iterdir()}


def assert_same_end(folder: Path, other: Path, steps: int) -> None:
    ends = [content(path / f"checkpoint-{steps}") for path in (folder, other)]
    assert ends[0].keys() == ends[1].keys() == FILES | {"training.sha256"}
    for name in ends[0]:
        assert ends[0][name] == ends[1][name], name


def save_two(folder: Path) -> None:
    """Checkpoints of the steps 3 and 6."""
    train(folder, 2 * SAVE_EVERY)
    assert names(folder) == ["checkpoint-3", "checkpoint-6"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def two_saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    save_two(folder)
    return folder


@pytest.fixture
def two(two_saved, tmp_path) -> Path:
    """A folder with checkpoints of the steps 3 and 6, to be spoilt."""
    return Path(shutil.copytree(two_saved, tmp_path / "two"))


def trained(folder: Path) -> Accelerator:
    """An accelerator with something to save."""
    accelerator = Accelerator(cpu=True)
    parts(accelerator)
    return accelerator


# Kills


def intercept(place: object, name: str, before: Callable[[], None], set_attribute: Callable) -> None:
    """Have `before` called before each call of a function."""
    original = getattr(place, name)

    def call(*arguments, **options):
        before()
        return original(*arguments, **options)

    set_attribute(place, name, call)


def report(tell: Callable[[str], None]) -> None:
    """From now on in this process, tell of each write, flush, renaming and removal before it happens."""
    for place, name in CALLS:
        intercept(place, name, lambda name=name: tell(name), setattr)


def train_and_die(folder: Path, steps: int, kind: str, count: int) -> None:
    """Train, until the `count`-th event of a kind."""
    counts = Counter()

    def tell(event: str) -> None:
        counts[event] += 1
        if event == kind and counts[event] == count:
            die()

    torch.set_num_threads(1)
    report(tell)
    train(folder, steps, tell)


def train_and_tell(folder: Path, steps: int, pipe: Connection, with_stop: bool = False) -> None:
    """Train, and write a byte for each event."""

    def tell(event: str) -> None:
        pipe.send_bytes(b".")

    torch.set_num_threads(1)
    report(tell)
    with StopRequest() as stop:
        train(folder, steps, tell, stop if with_stop else None)


def start(target: Callable, *arguments: object):
    """A child and the end of a pipe that it writes to."""
    context = fork_server()
    reader, writer = context.Pipe(duplex=False)
    process = context.Process(target=target, args=(*arguments, writer))
    process.start()
    writer.close()
    return process, reader


def newest(folder: Path) -> int:
    path, _ = find_latest_checkpoint(folder)
    return 0 if path is None else int(path.name.removeprefix("checkpoint-"))


def test_killed_within_steps_writes_flushes_renamings_and_removals_a_run_ends_bit_identical(tmp_path):
    steps = 14
    train(tmp_path / "whole", steps)
    folder = tmp_path / "killed"
    kills = [("step", 2), ("save", 2), ("fsync", 5), ("rename", 1), ("step", 5), ("rmtree", 5), ("write_text", 2)]
    reached = []
    for kind, count in kills:
        process = fork_server().Process(target=train_and_die, args=(folder, steps, kind, count))
        process.start()
        assert wait_for(process) == -signal.SIGKILL, f"no {kind} number {count}"
        reached.append(newest(folder))
    assert reached == sorted(reached) and 0 < reached[-1] < steps
    assert train(folder, steps)[-1] == steps - 1
    assert_same_end(folder, tmp_path / "whole", steps)
    assert not [name for name in names(folder) if name.endswith(".partial")]


@pytest.mark.slow
def test_killed_at_fifty_random_moments_a_run_ends_bit_identical(tmp_path):
    steps, kills, generator = 240, 50, random.Random(0)
    train(tmp_path / "whole", steps)
    folder = tmp_path / "killed"
    reached, while_saving = [0], 0
    for _ in range(kills):
        process, reader = start(train_and_tell, folder, steps)
        for _ in range(generator.randint(1, 45)):
            reader.recv_bytes()
        time.sleep(generator.choice([0, 0.01 * generator.random()]))
        process.kill()
        assert wait_for(process) == -signal.SIGKILL
        while_saving += any(path.name.endswith(".partial") for path in folder.glob("*"))
        reached.append(newest(folder))
    assert reached == sorted(reached), "a later checkpoint was lost"
    assert reached[-1] < steps and 0 < while_saving < kills, (reached, while_saving)
    train(folder, steps)
    assert_same_end(folder, tmp_path / "whole", steps)


def test_asked_to_stop_a_run_saves_leaves_with_success_and_goes_on_bit_identical(tmp_path):
    folder = tmp_path / "stopped"
    process, reader = start(train_until_stopped, folder, 400)
    for _ in range(30):
        reader.recv_bytes()
    process.terminate()  # SIGTERM
    assert wait_for(process) == 0
    step = newest(folder)
    assert 0 < step < 400
    assert not [name for name in names(folder) if name.endswith(".partial")]
    train(folder, step + 4)
    train(tmp_path / "whole", step + 4)
    assert_same_end(folder, tmp_path / "whole", step + 4)


def train_until_stopped(folder: Path, steps: int, pipe: Connection) -> None:
    train_and_tell(folder, steps, pipe, with_stop=True)


# Damage


def test_the_newest_checkpoint_is_taken(two, tmp_path):
    assert find_latest_checkpoint(two) == (two / "checkpoint-6", {})
    assert find_latest_checkpoint(tmp_path / "nowhere") == (None, {})
    for name in ("checkpoint-x", "model", "checkpoint-09"):
        (two / name).mkdir()
    (two / "checkpoint-10").write_text("a file")
    found, skipped = find_latest_checkpoint(two)
    assert found == two / "checkpoint-6" and list(skipped) == ["checkpoint-09"]


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_flipped_bit_costs_the_checkpoint_and_is_told(two, name, caplog):
    file = two / "checkpoint-6" / name
    whole = file.read_bytes()
    for _ in range(5):
        place = random.randrange(len(whole))
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << random.randrange(8)]) + whole[place + 1 :])
        assert find_latest_checkpoint(two) == (two / "checkpoint-3", {"checkpoint-6": f"{name} was changed"})
    assert f"passed over {two / 'checkpoint-6'}: {name} was changed" in caplog.text


@pytest.mark.parametrize("name", sorted(FILES - {"progress.json"}))
def test_a_truncated_file_costs_the_checkpoint_and_is_told(two, name):
    file = two / "checkpoint-6" / name
    whole = file.read_bytes()
    for size in (0, 1, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        found, skipped = find_latest_checkpoint(two)
        assert found == two / "checkpoint-3"
        assert skipped == {"checkpoint-6": f"{name} is truncated to {size} of {len(whole)} bytes"}


@pytest.mark.parametrize("name", [*sorted(FILES), "training.sha256"])
def test_a_missing_file_costs_the_checkpoint_and_is_told(two, name):
    (two / "checkpoint-6" / name).unlink()
    found, skipped = find_latest_checkpoint(two)
    assert found == two / "checkpoint-3" and f"{name} is missing" in skipped["checkpoint-6"]


def test_every_flipped_bit_and_every_cut_of_the_manifest_is_found(two):
    manifest = two / "checkpoint-6" / "training.sha256"
    whole = manifest.read_bytes()
    for place in range(len(whole)):
        manifest.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :])
        with pytest.raises(ValueError):
            check_checkpoint(two / "checkpoint-6")
        manifest.write_bytes(whole[:place])
        with pytest.raises(ValueError):
            check_checkpoint(two / "checkpoint-6")
    manifest.write_bytes(whole)
    assert check_checkpoint(two / "checkpoint-6")["step"] == 6


def test_what_was_added_is_told_and_all_complaints_come_together(two):
    folder = two / "checkpoint-6"
    (folder / "custom_checkpoint_0.pkl").write_bytes(b"")
    (folder / "model.safetensors").unlink()
    (folder / "scheduler.bin").write_bytes(b"x" * 9999)
    with pytest.raises(ValueError) as error:
        check_checkpoint(folder)
    assert str(error.value) == (
        "model.safetensors is missing; scheduler.bin was changed; custom_checkpoint_0.pkl was added"
    )


def test_without_a_complete_checkpoint_a_run_starts_anew(two):
    for step in (3, 6):
        (two / f"checkpoint-{step}" / "optimizer.bin").unlink()
    assert find_latest_checkpoint(two)[0] is None
    assert train(two, 7) == list(range(7))
    assert names(two) == ["checkpoint-6", "checkpoint-7"], "the damaged ones were replaced or rotated out"
    assert newest(two) == 7


def test_a_run_goes_on_behind_a_damaged_checkpoint_and_replaces_it(two, tmp_path):
    (two / "checkpoint-6" / "model.safetensors").write_bytes(b"")
    assert train(two, 7) == [3, 4, 5, 6]
    train(tmp_path / "whole", 7)
    assert_same_end(two, tmp_path / "whole", 6)
    assert_same_end(two, tmp_path / "whole", 7)


def test_what_is_left_of_a_save_is_told_and_swept_up(two):
    shutil.copytree(two / "checkpoint-6", two / "checkpoint-9.partial")
    found, skipped = find_latest_checkpoint(two)
    assert found == two / "checkpoint-6" and skipped == {"checkpoint-9.partial": "a save or a removal was interrupted"}
    train(two, 7)
    assert names(two) == ["checkpoint-6", "checkpoint-7"]


def test_the_manifest_is_one_that_sha256sum_reads(two):
    if shutil.which("sha256sum") is None:
        pytest.skip("needs sha256sum of the GNU coreutils to compare with")
    folder = two / "checkpoint-6"
    lines = (folder / "training.sha256").read_text().splitlines()
    assert lines == [f"{sha256((folder / name).read_bytes()).hexdigest()}  {name}" for name in sorted(FILES)]
    subprocess.run(["sha256sum", "--check", "--strict", "training.sha256"], cwd=folder, check=True)


# Failing disks


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Every write beyond this many bytes of a file fails, in Python and in C++, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_costs_no_checkpoint_and_leaves_no_half(two, tmp_path):
    accelerator, extra = trained(two), {"text": "x" * 5000}
    largest = max(map(len, content(save_checkpoint(accelerator, tmp_path / "other", 9, extra=extra)).values()))
    before = {path.name: content(path) for path in two.iterdir()}
    for size in (0, 1, 64, 300, 700, 1500, largest - 1):
        with files_of_at_most(size), pytest.raises(CheckpointError, match="could not save .*checkpoint-9: rank 0: "):
            save_checkpoint(accelerator, two, 9, extra=extra, keep=1)
        assert {path.name: content(path) for path in two.iterdir()} == before, size
    with files_of_at_most(largest):
        save_checkpoint(accelerator, two, 9, extra=extra, keep=1)
    assert names(two) == ["checkpoint-9"] and newest(two) == 9


def test_whatever_call_fails_a_complete_checkpoint_is_left(two_saved, tmp_path, monkeypatch):
    """The first, the second, ... of all calls that write, flush, rename or remove says that the disk is full."""
    accelerator = trained(tmp_path)
    failed, successes, left = 0, 0, 0

    def fail() -> None:
        nonlocal left
        left -= 1
        if left == -1:
            raise OSError(errno.ENOSPC, "No space left on device")

    while successes == 0:
        folder = Path(shutil.copytree(two_saved, tmp_path / f"run-{failed}"))
        left = failed
        with monkeypatch.context() as patch:
            for place, name in CALLS[:-1]:  # an `rmtree` that fails says so only if it is asked to
                intercept(place, name, fail, patch.setattr)
            try:
                save_checkpoint(accelerator, folder, 9, keep=1)
            except CheckpointError as error:
                assert "No space left on device" in str(error)
            else:
                successes += left >= 0  # else it was a removal of an old one that failed
        found, skipped = find_latest_checkpoint(folder)
        assert skipped == {}, "half a checkpoint"
        assert found is not None and int(found.name.removeprefix("checkpoint-")) >= 6
        assert not list(folder.glob("*.partial"))
        failed += 1
    assert failed > 15, "the calls were not intercepted"
    assert names(folder) == ["checkpoint-9"]


def test_too_little_space_is_seen_before_anything_is_written(two, monkeypatch):
    accelerator, before = trained(two), names(two)
    usage = shutil.disk_usage(two)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(CheckpointError, match=r"expected [\d,]+ free bytes, got 100"):
        save_checkpoint(accelerator, two, 9)
    assert names(two) == before


def test_files_are_on_the_disk_before_the_name_and_old_ones_go_after_it(two, monkeypatch):
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("needs Linux's list of open files to see what is flushed")
    accelerator, calls = trained(two), []
    fsync, rename = os.fsync, Path.rename

    def record_fsync(descriptor: int) -> None:
        calls.append(("fsync", os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))))
        fsync(descriptor)

    def record_rename(path: Path, target: Path) -> Path:
        calls.append(("rename", path.name))
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(Path, "rename", record_rename)
    save_checkpoint(accelerator, two, 9, keep=1)
    end = calls.index(("rename", "checkpoint-9.partial"))
    files = FILES - {"average.safetensors"} | {"training.sha256"}
    assert {name for _, name in calls[:end]} == files | {"checkpoint-9.partial"}
    assert calls[end - 1] == ("fsync", "checkpoint-9.partial"), "a folder is flushed behind its files"
    assert calls[end + 1 :] == [("fsync", two.name), ("rename", "checkpoint-6"), ("rename", "checkpoint-3")]


# Saving and resuming


def test_everything_comes_back(tmp_path):
    accelerator = Accelerator(cpu=True)
    model, optimizer, schedule, average = parts(accelerator)
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    schedule.step()
    average.update_parameters(model)
    average.module[0].weight.data.mul_(2)
    save_checkpoint(
        accelerator, tmp_path, 1, data={"shard": 3, "row": [1]}, extra={"best": 0.5}, modules={"average": average}
    )
    states = [torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()]
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    moments = [{key: value.clone() for key, value in state.items()} for state in optimizer.state.values()]

    accelerator = Accelerator(cpu=True)
    again, optimizer, schedule, another = parts(accelerator)
    torch.rand(1), random.random(), np.random.rand()
    progress = resume_training(accelerator, tmp_path, modules={"average": another})
    assert (progress.step, progress.folder) == (1, tmp_path / "checkpoint-1")
    assert progress.data == {"shard": 3, "row": [1]} and progress.extra == {"best": 0.5}
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
    for state, expected in zip(optimizer.state.values(), moments, strict=True):
        assert all(torch.equal(state[key], expected[key]) for key in expected)
    assert schedule.state_dict()["last_epoch"] == 1
    assert torch.equal(another.module[0].weight, 2 * weights["0.weight"]) and int(another.n_averaged) == 1


def test_weights_are_safetensors_and_nothing_needs_more_than_weights_only(two):
    folder = two / "checkpoint-6"
    assert set(load_file(folder / "model.safetensors")) == {"0.weight", "0.bias", "3.weight", "3.bias"}
    for name in ("optimizer.bin", "scheduler.bin"):
        assert torch.load(folder / name, weights_only=True)


def test_only_so_many_are_kept(tmp_path):
    accelerator = trained(tmp_path)
    for step in (10, 2, 9, 30):  # 10 counts for less than 9 until the run has come past it
        save_checkpoint(accelerator, tmp_path, step, keep=2)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-30"]
    save_checkpoint(accelerator, tmp_path, 31, keep=1)
    assert names(tmp_path) == ["checkpoint-31"]


def test_a_checkpoint_of_a_later_step_is_no_reason_to_remove_the_one_just_saved(two):
    (two / "checkpoint-6" / "model.safetensors").unlink()
    accelerator = trained(two)
    save_checkpoint(accelerator, two, 4, keep=1)
    assert names(two) == ["checkpoint-4", "checkpoint-6"] and newest(two) == 4


def test_what_cannot_be_removed_stays_and_is_told(two, monkeypatch, caplog):
    rename = Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if path.name == "checkpoint-3":
            raise PermissionError("not yours")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    save_checkpoint(trained(two), two, 9, keep=1)
    assert names(two) == ["checkpoint-3", "checkpoint-9"]
    assert "could not remove" in caplog.text and "not yours" in caplog.text


def test_a_complete_checkpoint_of_the_same_step_is_left(two):
    before = content(two / "checkpoint-6")
    assert save_checkpoint(trained(two), two, 6, extra={"other": 1}) == two / "checkpoint-6"
    assert content(two / "checkpoint-6") == before


def test_a_checkpoint_that_cannot_be_read_is_passed_over_and_not_replaced(two, monkeypatch):
    def fail(file: Path) -> str:
        raise OSError(errno.EIO, "Input/output error", str(file))

    before, accelerator = content(two / "checkpoint-6"), trained(two)
    with monkeypatch.context() as patch:
        patch.setattr(checkpointing, "sha256", fail)
        found, skipped = find_latest_checkpoint(two)
        assert found is None and all("Input/output error" in reason for reason in skipped.values())
        with pytest.raises(CheckpointError, match="Input/output error"):
            save_checkpoint(accelerator, two, 6)
    assert content(two / "checkpoint-6") == before and newest(two) == 6


def test_what_the_caller_adds_is_vouched_for_too(tmp_path):
    def write(folder: Path) -> None:
        (folder / "model").mkdir()
        (folder / "model" / "config.json").write_text("{}")

    folder = save_checkpoint(trained(tmp_path), tmp_path, 1, write=write)
    assert check_checkpoint(folder)["bytes"]["model/config.json"] == 2
    (folder / "model" / "config.json").write_text("[]")
    assert find_latest_checkpoint(tmp_path) == (None, {"checkpoint-1": "model/config.json was changed"})


def test_what_the_caller_adds_may_fail(two):
    def write(folder: Path) -> None:
        raise RuntimeError("no model today")

    with pytest.raises(CheckpointError, match="no model today"):
        save_checkpoint(trained(two), two, 9, write=write)
    assert names(two) == ["checkpoint-3", "checkpoint-6"]


def test_bad_arguments_are_refused_before_anything_is_written(tmp_path):
    accelerator = trained(tmp_path)
    for step, keep in ((-1, 1), (1, 0)):
        with pytest.raises(ValueError, match=f"expected step >= 0 and keep >= 1, got {step} and {keep}"):
            save_checkpoint(accelerator, tmp_path, step, keep=keep)
    for options in ({"data": {1, 2}}, {"extra": {"a": torch.zeros(1)}}):
        with pytest.raises(
            ValueError, match="expected data and extra that JSON can hold, got .*not JSON serializable"
        ):
            save_checkpoint(accelerator, tmp_path, 1, **options)
    for name in ("model", "model_1", "../average", "a b"):
        with pytest.raises(ValueError, match=f"identifiers that do not begin with model, got {name}"):
            save_checkpoint(accelerator, tmp_path, 1, modules={name: nn.Linear(1, 1)})
    accelerator.register_for_checkpointing(
        torch.optim.lr_scheduler.LambdaLR(accelerator._optimizers[0].optimizer, abs)
    )
    with pytest.raises(ValueError, match="read back by pickle, got 1: pass them as modules or extra"):
        save_checkpoint(accelerator, tmp_path, 1)
    naming = ProjectConfiguration(project_dir=str(tmp_path), automatic_checkpoint_naming=True)
    with pytest.raises(ValueError, match="without automatic_checkpoint_naming"):
        save_checkpoint(Accelerator(cpu=True, project_config=naming), tmp_path, 1)
    assert names(tmp_path) == []


def test_another_model_or_other_modules_cannot_go_on(two):
    accelerator = trained(two)
    with pytest.raises(ValueError, match=r"expected the modules of .*checkpoint-6, \['average'\], got \[\]"):
        resume_training(accelerator, two)
    accelerator = Accelerator(cpu=True)
    model = nn.Linear(4, 1)
    accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    average = AveragedModel(nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Tanh(), nn.Linear(8, 1)))
    with pytest.raises(ValueError, match="expected a checkpoint of this model and optimizer, got .*checkpoint-6"):
        resume_training(accelerator, two, modules={"average": average})


def test_random_states_that_cannot_be_set_are_no_secret(two, monkeypatch):
    """Accelerate only logs it."""

    def fail(state: torch.Tensor) -> None:
        raise RuntimeError("no such generator")

    accelerator = Accelerator(cpu=True)
    *_, average = parts(accelerator)
    monkeypatch.setattr(torch, "set_rng_state", fail)
    with pytest.raises(ValueError, match="the random states could not be set"):
        resume_training(accelerator, two, modules={"average": average})


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("name", ["optimizer.bin", "scheduler.bin", "random_states_0.pkl"])
def test_no_pickle_is_executed_even_if_the_manifest_vouches_for_it(two, name):
    folder, canary = two / "checkpoint-6", two / "canary"
    torch.save(Payload(canary), folder / name)
    lines = [f"{sha256((folder / file).read_bytes()).hexdigest()}  {file}\n" for file in sorted(FILES)]
    (folder / "training.sha256").write_text("".join(lines))
    check_checkpoint(folder)
    accelerator = Accelerator(cpu=True)
    *_, average = parts(accelerator)
    with pytest.raises(ValueError, match="expected a checkpoint of this model and optimizer"):
        resume_training(accelerator, two, modules={"average": average})
    assert not canary.exists()


# Two ranks


def save_on_two_ranks(folder: Path) -> dict:
    """What one of two ranks sees."""
    accelerator = Accelerator(cpu=True)
    parts(accelerator)
    rank, seen = accelerator.process_index, {}
    torch.manual_seed(100 + rank)
    path = save_checkpoint(accelerator, folder, 5, data={"rank": rank}, extra={"note": "both"})
    state = torch.get_rng_state()
    torch.rand(1)
    progress = resume_training(accelerator, folder)
    seen["processes"], seen["path"] = accelerator.num_processes, path.name
    seen["data"], seen["extra"] = progress.data, progress.extra
    seen["random state"] = torch.equal(torch.get_rng_state(), state)

    for bad_rank, place, name in ((0, os, "fsync"), (1, torch, "save"), (0, Path, "mkdir")):
        original = getattr(place, name)

        def fail(*arguments, **options):
            raise OSError(errno.ENOSPC, "No space left on device")

        if rank == bad_rank:
            setattr(place, name, fail)
        try:
            save_checkpoint(accelerator, folder, 7)
        except CheckpointError as error:
            seen[f"{name} fails on {bad_rank}"] = str(error)
        setattr(place, name, original)
    accelerator.wait_for_everyone()
    seen["left"] = names(folder)

    private = folder.parent / f"of-rank-{rank}"  # as on two nodes that share no disk
    try:
        save_checkpoint(accelerator, private, 7)
    except CheckpointError as error:
        seen["private"] = str(error)

    with StopRequest(signal.SIGUSR1) as stop:
        seen["asked before"] = stop.requested(accelerator)
        if rank == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        seen["asked"] = [stop.requested(accelerator) for _ in range(2)]
    return seen


def test_two_ranks_save_fail_and_stop_together(tmp_path):
    seen = run_ranks(save_on_two_ranks, tmp_path / "run")
    for rank, one in enumerate(seen):
        assert one["processes"] == 2 and one["path"] == "checkpoint-5"
        assert one["data"] == {"rank": rank} and one["extra"] == {"note": "both"}
        assert one["random state"] is True
        for fault in ("fsync fails on 0", "save fails on 1", "mkdir fails on 0"):
            assert f"rank {fault[-1]}: OSError(28, 'No space left on device')" in one[fault]
        assert one["left"] == ["checkpoint-5"]
        assert "rank 1: " in one["private"] and "expected a folder that all ranks see" in one["private"]
        assert one["asked before"] is False and one["asked"] == [True, True]
    assert {f"random_states_{rank}.pkl" for rank in (0, 1)} < set(os.listdir(tmp_path / "run" / "checkpoint-5"))

    accelerator = Accelerator(cpu=True)
    parts(accelerator)
    with pytest.raises(ValueError, match="expected 2 ranks as .*checkpoint-5 was saved by, got 1"):
        resume_training(accelerator, tmp_path / "run")


# A request to stop is in tests/training/test_stability.py as far as it needs no checkpoint.


def test_nothing_is_logged_when_nothing_is_wrong(two, caplog):
    with caplog.at_level(logging.WARNING, logger=checkpointing.__name__):
        train(two, 7)
    assert caplog.text == ""
    assert json.loads((two / "checkpoint-7" / "progress.json").read_text())["processes"] == 1
