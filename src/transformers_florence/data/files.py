"""What readers of annotations do with files: JSON, rows of a metadata.jsonl, and names of pictures, all checked."""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


def load_json(file: Path) -> Any:
    """The content of a JSON file.

    Raises:
        ValueError: no UTF-8 or no JSON; OSError: not readable.
    """
    try:
        return json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: expected JSON, got {error}") from error


def metadata_rows(path: Path, split: str | None = None) -> Iterator[tuple[str, Path, dict[str, Any]]]:
    """The rows of a metadata.jsonl, one a picture: where it stands, its picture, and the row.

    Args:
        path: the file, or its folder.
        split: rows whose `split` says so; None for all.

    Raises:
        ValueError: a line that is no row with a `file_name` inside of the folder; OSError: not readable.
    """
    file = path / "metadata.jsonl" if path.is_dir() else path
    try:
        lines = file.read_text("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: expected UTF-8, got {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where}: expected JSON, got {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{where}: expected a row with file_name, got {row!r}")
        if split is None or row.get("split") == split:
            yield where, picture_inside(file.parent, row.get("file_name"), where), row


def picture_inside(root: Path, name: Any, where: str) -> Path:
    """A file below `root`, however its name is written. Raises ValueError for a name that leads out of it."""
    if not isinstance(name, str) or not name:
        raise ValueError(f"{where}: expected the name of a picture, got {name!r}")
    path = os.path.normpath(name.replace("\\", "/"))
    if os.path.isabs(path) or path.split(os.sep)[0] == ".." or ":" in path:
        raise ValueError(f"{where}: expected a picture inside of {root}, got {name!r}")
    return root / path


def check_text(value: Any, where: str, meaning: str) -> str:
    """A text that says something. Raises ValueError for anything else, half of a surrogate pair among it."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}: expected {meaning} as a text that is not empty, got {value!r}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: expected {meaning} in valid Unicode, got {value!r}: {error}") from error
    return value


def check_pictures(files: Iterable[Path]) -> None:
    """Raises ValueError if pictures are missing; the message names the first."""
    files = set(files)
    missing = sorted(file for file in files if not file.is_file())
    if missing:
        raise ValueError(f"expected {len(files)} pictures, got none for {len(missing)} of them, such as {missing[0]}")


__all__ = ["check_pictures", "check_text", "load_json", "metadata_rows", "picture_inside"]
