"""Checkpoints of a training run: whole or not there at all, and found again newest first."""

import errno
import json
import logging
import os
import random
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import RNG_STATE_NAME, DistributedType, gather_object
from accelerate.utils import load as load_state_file
from safetensors.torch import load_model, save_model
from torch import nn

from ..integrity import manifest_text, sha256

PROGRESS = "progress.json"  # what a run knows beside its tensors
MANIFEST = "training.sha256"  # of every file, as `sha256sum --check training.sha256` reads it; the last file to come
LINE = re.compile(r"^([0-9a-f]{64})  ([^\\\r\n]+)\n", re.MULTILINE)
NAME = re.compile(r"checkpoint-(\d+)")
PARTIAL = ".partial"  # the name's end of what is being written or removed
# Each rank writes a part of model and optimizer, with collectives in between.
SHARDED = (DistributedType.DEEPSPEED, DistributedType.FSDP, DistributedType.MEGATRON_LM)

logger = logging.getLogger(__name__)
Result = TypeVar("Result")


class CheckpointError(OSError):
    """A checkpoint could not be written, on any rank; those that were there before are untouched."""


@dataclass(frozen=True)
class Progress:
    """Where a run goes on.

    step: how many steps its checkpoint has behind it.
    folder: the checkpoint.
    data: this rank's position in the data, as `save_checkpoint` was given it.
    extra: what else it was given.
    """

    step: int
    folder: Path
    data: Any
    extra: dict[str, Any]


def _together(
    accelerator: Accelerator,
    action: Callable[[], Result],
    failure: Callable[[str], Exception],
    at_once: bool = False,
) -> Result:
    """Run `action` on every rank: either all return what rank 0 got, or all raise what failed on any of them.

    at_once: a failing rank raises without waiting for the others, which may be inside a collective of the action's
    and would never come; whoever launched the ranks ends them.
    """
    result, error = None, None
    try:
        result = action()
    except Exception as caught:
        if at_once:
            raise failure(f"rank {accelerator.process_index}: {caught!r}") from caught
        error = caught
    text = None if error is None else f"rank {accelerator.process_index}: {error!r}"
    outcomes = gather_object([(result, text)])
    failed = [text for _, text in outcomes if text is not None]
    if failed:
        raise failure("; ".join(failed)) from error
    return outcomes[0][0]


def files_of(folder: Path) -> dict[str, Path]:
    """Relative name, with `/` -> path of each file in a checkpoint and the folders in it, but for the manifest."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: files[name] for name in sorted(files) if name != MANIFEST}


def _flush(path: str | os.PathLike) -> None:
    """Wait until a file's content, or a folder's names, are on the disk."""
    if os.name == "nt" and os.path.isdir(path):  # Windows opens no folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_to_disk(folder: Path) -> None:
    """Wait until every file in a folder, and every folder in it, would survive a power failure."""
    for root, _, names in os.walk(folder, topdown=False):
        for name in names:
            _flush(os.path.join(root, name))
        _flush(root)


def check_checkpoint(folder: Path) -> dict[str, Any]:
    """Compare every file of a checkpoint with the SHA-256 of when it was saved.

    Returns:
        What its `progress.json` holds.

    Raises:
        ValueError: the manifest is missing or corrupt, or files were changed, truncated, removed or added; the
            message lists all of them.
        OSError: a file cannot be read.
    """
    try:
        content = (folder / MANIFEST).read_bytes().decode("utf-8")
    except (FileNotFoundError, UnicodeDecodeError) as error:
        raise ValueError(f"{MANIFEST} is missing or corrupt: {error!r}") from error
    expected = {name: digest for digest, name in LINE.findall(content)}
    if PROGRESS not in expected or manifest_text(expected) != content:
        raise ValueError(f"{MANIFEST} is corrupt")
    found = files_of(folder)
    changed = [name for name in expected if name in found and sha256(found[name]) != expected[name]]
    progress: dict[str, Any] = {"bytes": {}}
    if PROGRESS in found and PROGRESS not in changed:
        progress = json.loads(found[PROGRESS].read_text("utf-8"))
    complaints = [f"{name} is missing" for name in expected if name not in found]
    for name in changed:
        size, saved = found[name].stat().st_size, progress["bytes"].get(name)
        shorter = saved is not None and size < saved
        complaints.append(f"{name} is truncated to {size} of {saved} bytes" if shorter else f"{name} was changed")
    complaints += [f"{name} was added" for name in found if name not in expected]
    if complaints:
        raise ValueError("; ".join(complaints))
    return progress


def checkpoints_of(folder: Path) -> dict[int, Path]:
    """Step -> folder of what is named as a checkpoint, newest first, complete or not."""
    found = {}
    for path in folder.iterdir() if folder.is_dir() else ():
        name = NAME.fullmatch(path.name)
        if name is not None and path.is_dir():
            found[int(name[1])] = path
    return {step: found[step] for step in sorted(found, reverse=True)}


def find_latest_checkpoint(folder: str | os.PathLike) -> tuple[Path | None, dict[str, str]]:
    """The newest complete checkpoint of a run.

    Args:
        folder: where `save_checkpoint` put them; it need not exist.

    Returns:
        Its folder, None if there is none, and name -> reason of each newer one that was passed over: a save or a
        removal that was interrupted, or a checkpoint whose files are not those of its manifest. Each is logged too.
    """
    root, newest = Path(folder), None
    skipped = {path.name: "a save or a removal was interrupted" for path in root.glob(f"checkpoint-*{PARTIAL}")}
    for path in checkpoints_of(root).values():
        try:
            check_checkpoint(path)
        except (ValueError, OSError) as error:
            skipped[path.name] = str(error)
        else:
            newest = path
            break
    for name, reason in skipped.items():
        logger.warning("passed over %s: %s", root / name, reason)
    return newest, skipped


def _remove(path: Path) -> None:
    """Delete a folder; killed in the middle, what is left of it no longer has a checkpoint's name."""
    aside = path if path.name.endswith(PARTIAL) else path.with_name(f"{path.name}.old{PARTIAL}")
    if aside != path:
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def _prepare(folder: Path, partial: Path, target: Path) -> bool:
    """Clear what interrupted saves left and make an empty folder; False if the checkpoint is there and whole."""
    folder.mkdir(parents=True, exist_ok=True)
    if target.is_dir():
        try:
            check_checkpoint(target)
        except ValueError:  # damaged; one that merely cannot be read now is not to be lost
            _remove(target)
        else:
            return False
    for left in folder.glob(f"checkpoint-*{PARTIAL}"):
        _remove(left)
    before = next(iter(checkpoints_of(folder).values()), None)
    if before is not None:  # the next one will be about as large
        needed = sum(file.stat().st_size for file in files_of(before).values())
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise OSError(errno.ENOSPC, f"expected {needed:,} free bytes, got {free:,}", str(folder))
    partial.mkdir()
    return True


def _complete(partial: Path, target: Path, progress: dict[str, Any]) -> None:
    """Vouch for what was written, put it on the disk, and only then give it its name."""
    progress["bytes"] = {name: file.stat().st_size for name, file in files_of(partial).items()}
    (partial / PROGRESS).write_text(json.dumps(progress, indent=1), "utf-8")
    digests = {name: sha256(file) for name, file in files_of(partial).items()}
    (partial / MANIFEST).write_text(manifest_text(digests), "utf-8", newline="\n")
    flush_to_disk(partial)
    partial.rename(target)
    _flush(target.parent)


def _rotate(folder: Path, step: int, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints up to `step`; what cannot be removed is logged and stays."""
    for path in [path for number, path in checkpoints_of(folder).items() if number <= step][keep:]:
        try:
            _remove(path)
        except OSError as error:
            logger.warning("could not remove %s: %s", path, error)


def save_checkpoint(
    accelerator: Accelerator,
    folder: str | os.PathLike,
    step: int,
    *,
    data: Any = None,
    extra: Mapping[str, Any] | None = None,
    modules: Mapping[str, nn.Module] | None = None,
    write: Callable[[Path], None] | None = None,
    keep: int = 2,
) -> Path:
    """Save everything that a run needs to go on as `folder`/checkpoint-`step`; every rank calls this.

    `Accelerator.save_state` writes the state of what was prepared: weights (safetensors), optimizer, schedule, fp16
    scaler, and each rank's random states of Python, NumPy, torch and its devices. It writes into a folder beside the
    checkpoint, which is given its name when all files are on the disk and a manifest vouches for them. Only then
    older checkpoints go. Killed at any moment, or with a full disk, a run still has the last complete one.

    Args:
        folder: of the run; all ranks must see the same one.
        step: how many steps the run has behind it. Its checkpoint, if there already and whole, is left as it is.
        data: this rank's position in its data: an epoch and a batch, or a data set's `state_dict()`. JSON.
        extra: what else the run wants back, alike on all ranks. JSON.
        modules: name, an identifier that does not begin with "model" -> a module that was not prepared, such as an
            average of the weights; rank 0's is saved.
        write: called on every rank with the unfinished folder, to add other files, such as the model in the form
            that `from_pretrained` reads.
        keep: how many checkpoints stay, this one among them.

    Returns:
        The checkpoint's folder.

    Raises:
        ValueError: a step or a `keep` out of range, another name of a module, data or extra that are no JSON, or an
            accelerator that names its checkpoints itself or holds objects that it would read back by pickle.
        CheckpointError: it could not be written; no half of it is left, and the others are untouched. All ranks
            raise it, except where model and optimizer are sharded (DeepSpeed, FSDP): there a rank that fails in the
            middle ends alone, and the launcher ends the others.
    """
    if step < 0 or keep < 1:
        raise ValueError(f"expected step >= 0 and keep >= 1, got {step} and {keep}")
    bad = [name for name in modules or () if not name.isidentifier() or name.startswith("model")]
    if bad:  # Accelerate writes model.safetensors, model_1.safetensors, ...
        raise ValueError(f"expected modules named by identifiers that do not begin with model, got {', '.join(bad)}")
    if accelerator.project_configuration.automatic_checkpoint_naming:
        raise ValueError("expected an accelerator without automatic_checkpoint_naming, got one with it")
    if accelerator._custom_objects:
        raise ValueError(
            "expected no objects of `register_for_checkpointing`, which are read back by pickle, got "
            f"{len(accelerator._custom_objects)}: pass them as modules or extra"
        )
    try:
        json.dumps([data, dict(extra or {})])
    except (TypeError, ValueError) as error:
        raise ValueError(f"expected data and extra that JSON can hold, got {error}") from error
    root, main = Path(folder), accelerator.is_main_process
    target = root / f"checkpoint-{step}"
    partial = target.with_name(target.name + PARTIAL)

    def failure(text: str) -> CheckpointError:
        return CheckpointError(f"could not save {target}: {text}")

    def write_states() -> None:
        if not partial.is_dir():
            raise OSError(errno.ENOENT, "expected a folder that all ranks see, got one that rank 0 alone has")
        accelerator.save_state(str(partial))
        if main:
            for name, module in (modules or {}).items():
                save_model(module, str(partial / f"{name}.safetensors"))
        if write is not None:
            write(partial)

    try:
        if not _together(accelerator, lambda: main and _prepare(root, partial, target), failure):
            return target
        positions = gather_object([data])
        _together(accelerator, write_states, failure, at_once=accelerator.distributed_type in SHARDED)
        progress = {
            "step": step,
            "processes": accelerator.num_processes,
            "modules": sorted(modules or {}),
            "data": positions,
            "extra": dict(extra or {}),
        }
        _together(accelerator, lambda: _complete(partial, target, progress) if main else None, failure)
    finally:
        if main:
            shutil.rmtree(partial, ignore_errors=True)
    if main:
        _rotate(root, step, keep)
    return target


def _check_random_states(file: Path) -> None:
    """See that the random states are those of a file: `Accelerator.load_state` only logs that it could not set them.

    Raises:
        ValueError: they are not.
    """
    states = load_state_file(file, weights_only=True)
    same = torch.equal(states["torch_manual_seed"], torch.get_rng_state())
    same &= states["random_state"] == random.getstate()
    if torch.cuda.is_available():
        saved, current = states.get("torch_cuda_manual_seed", []), torch.cuda.get_rng_state_all()
        same &= len(saved) == len(current) and all(map(torch.equal, saved, current))
    if not same:
        raise ValueError("the random states could not be set: expected the devices that there were at saving")


def resume_training(
    accelerator: Accelerator, folder: str | os.PathLike, *, modules: Mapping[str, nn.Module] | None = None
) -> Progress | None:
    """Load the newest complete checkpoint of a run into what was prepared; every rank calls this.

    Afterwards each random generator stands where it stood. A `DataLoader` draws from torch's as soon as it is
    iterated: give it a generator of its own, or the run will differ from an uninterrupted one.

    Everything is read as safetensors, JSON or with `weights_only=True`, except by DeepSpeed, which unpickles: go on
    with a DeepSpeed run of your own only.

    Args:
        folder: of the run.
        modules: those that `save_checkpoint` was given, by the same names.

    Returns:
        Where to go on; None if there is no complete checkpoint. Rank 0 logs what it passed over, and why.

    Raises:
        ValueError: the checkpoint is of another number of ranks, of other modules, or of another model or optimizer.
    """
    root, modules = Path(folder), dict(modules or {})

    def find() -> tuple[str, dict[str, Any]] | None:
        path = find_latest_checkpoint(root)[0] if accelerator.is_main_process else None
        return None if path is None else (path.name, json.loads((path / PROGRESS).read_text("utf-8")))

    found = _together(accelerator, find, ValueError)
    if found is None:
        return None
    path, progress = root / found[0], found[1]
    if progress["processes"] != accelerator.num_processes:
        raise ValueError(
            f"expected {progress['processes']} ranks as {path} was saved by, got {accelerator.num_processes}: each "
            "has its own random states and its own position in the data"
        )
    if progress["modules"] != sorted(modules):
        raise ValueError(f"expected the modules of {path}, {progress['modules']}, got {sorted(modules)}")

    def load() -> None:
        for name, module in modules.items():
            load_model(module, path / f"{name}.safetensors")
        accelerator.load_state(str(path))
        _check_random_states(path / f"{RNG_STATE_NAME}_{accelerator.process_index}.pkl")

    def failure(text: str) -> ValueError:
        return ValueError(f"expected a checkpoint of this model and optimizer, got {path}: {text}")

    _together(accelerator, load, failure, at_once=accelerator.distributed_type in SHARDED)
    return Progress(progress["step"], path, progress["data"][accelerator.process_index], progress["extra"])


__all__ = [
    "SHARDED",
    "CheckpointError",
    "Progress",
    "check_checkpoint",
    "find_latest_checkpoint",
    "resume_training",
    "save_checkpoint",
]
