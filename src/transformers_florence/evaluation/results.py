"""What was measured, as files that machines read: numbers with the command, seed, commit and data that gave them."""

import hashlib
import json
import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image

METADATA_COLUMNS = ("data", "seed", "commit", "data hash", "command")


@dataclass(frozen=True)
class Result:
    """One evaluation.

    Attributes:
        task: what was evaluated, such as "zero_shot"; results of one task stand in one table.
        model, data: names of both.
        metrics: name -> number, or None where there is none.
        command: what made it, as it is typed.
        seed: of everything random.
        commit: of the code, with "-dirty" where files differed from it; empty outside of a repository.
        data_hash: of pictures and labels or captions, see `hash_pictures`.
        settings: what else the numbers depend on.
        versions: of torch and transformers.
        seconds: how long it took.

    Raises:
        ValueError: no task, model, data, command or metric, or a metric that is no finite number.
    """

    task: str
    model: str
    data: str
    metrics: Mapping[str, float | int | None]
    command: str
    seed: int
    commit: str
    data_hash: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(
        default_factory=lambda: {"torch": torch.__version__, "transformers": transformers.__version__}
    )
    seconds: float = 0.0

    def __post_init__(self) -> None:
        empty = [name for name in ("task", "model", "data", "metrics", "command") if not getattr(self, name)]
        if empty:
            raise ValueError(f"expected a result with {', '.join(empty)}, got none")
        for name, value in self.metrics.items():
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if value is not None and not (is_number and math.isfinite(value)):
                raise ValueError(f"{name}: expected a finite number or None, got {value!r}")

    def file(self, folder: str | Path) -> Path:
        """Where it is, or would be, in a folder: under a name of task, model, data and command."""
        made_by = hashlib.blake2b(self.command.encode(), digest_size=4).hexdigest()
        return Path(folder) / f"{'--'.join(map(_slug, (self.task, self.model, self.data, made_by)))}.json"

    def save(self, folder: str | Path) -> Path:
        """Write JSON to `file`; a former result of the same name is replaced."""
        file = self.file(folder)
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(self), indent=2) + "\n", "utf-8")
        os.replace(partial, file)
        return file

    def markdown_row(self, columns: Sequence[str]) -> str:
        """The result as a row of a table in Markdown: model, metrics of these names, and where they come from."""
        cells = [self.model, *(_number(self.metrics.get(name)) for name in columns)]
        cells += [self.data, str(self.seed), self.commit[:12], self.data_hash[:12], f"`{self.command}`"]
        return _row(cells)


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "_", text).strip("_") or "none"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _number(value: float | int | None) -> str:
    return "-" if value is None else str(value) if isinstance(value, int) else f"{value:.4f}"


def markdown_table(results: Sequence[Result]) -> str:
    """Results of one task as a table in Markdown: a column for each metric that any of them has.

    Raises:
        ValueError: no result, or results of several tasks.
    """
    tasks = {result.task for result in results}
    if len(tasks) != 1:
        raise ValueError(f"expected results of one task, got {sorted(tasks)}")
    columns = list(dict.fromkeys(name for result in results for name in result.metrics))
    head = ["model", *columns, *METADATA_COLUMNS]
    lines = [_row(head), "|" + "---|" * len(head)]
    ordered = sorted(results, key=lambda result: (result.data, result.model, result.seed))
    return "\n".join(lines + [result.markdown_row(columns) for result in ordered])


def load_results(folder: str | Path) -> list[Result]:
    """All results in a folder, by the names of their files.

    Raises:
        ValueError: no such folder, or a file that holds no result.
    """
    if not Path(folder).is_dir():
        raise ValueError(f"expected a folder of results, got {str(folder)!r}")
    found = []
    known = {entry.name for entry in fields(Result)}
    for file in sorted(Path(folder).rglob("*.json")):
        try:
            content = json.loads(file.read_text("utf-8"))
            if not isinstance(content, dict) or set(content) != known:
                raise ValueError(f"other fields than {', '.join(sorted(known))}")
            found.append(Result(**content))
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"expected a result, got {file}: {error}") from error
    return found


def hash_pictures(pictures: Sequence[Any], about: Any) -> str:
    """A digest of pictures, in their order, and of what is known of them.

    Args:
        pictures: paths, hashed as they are stored (one that is missing counts as empty), or PIL images, by pixels.
        about: labels, names, captions: whatever JSON can hold.
    """
    digest = hashlib.blake2b(json.dumps(about).encode(), digest_size=16)
    for picture in pictures:
        if isinstance(picture, Image.Image):
            content = f"{picture.mode} {picture.size}".encode() + picture.tobytes()
        else:
            content = Path(picture).read_bytes() if Path(picture).is_file() else b""
        digest.update(len(content).to_bytes(8, "big"))
        digest.update(content)
    return digest.hexdigest()


def current_commit(folder: str | Path = Path(__file__).parent) -> str:
    """The commit of a folder, with "-dirty" where tracked files differ from it; empty without git or commit."""

    def git(*words: str) -> str:
        asked = ["git", "-C", str(folder), *words]
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def command_line(script: str | Path, argv: Sequence[str] | None = None) -> str:
    """How a script of `examples/` was called: `python examples/x.py ...`, from the repository's folder."""
    return shlex.join(["python", f"examples/{Path(script).name}", *(sys.argv[1:] if argv is None else argv)])


__all__ = ["Result", "command_line", "current_commit", "hash_pictures", "load_results", "markdown_table"]
