"""Where a run's numbers go: a table and curves in its own folder, or a tracker that Accelerate knows."""

import csv
import io
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

from accelerate.tracking import GeneralTracker, get_available_trackers, on_main_process
from accelerate.utils import LoggerType
from matplotlib.figure import Figure

LOCAL = "local"
STEP = "step"
CURVES_PER_ROW = 3


def _replace(file: Path, content: bytes) -> None:
    """Write a file in one step: whoever reads meanwhile gets the old one or the new one, whole."""
    temporary = file.with_name(f".{file.name}.{uuid4().hex}")
    try:
        temporary.write_bytes(content)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def _as_line(values: Sequence[Any]) -> str:
    """One line of a CSV table."""
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(values)
    return line.getvalue()


def read_log(file: str | os.PathLike) -> list[dict[str, str]]:
    """The rows of a `log.csv`, column -> text, without the columns that a row has nothing for.

    A last line that was cut off, as its writer was killed, is left out.

    Raises:
        ValueError: a file that is no such table.
    """
    text = Path(file).read_text("utf-8")
    lines = list(csv.reader(io.StringIO(text[: text.rfind("\n") + 1], newline="")))
    if not lines:
        return []
    header, rows = lines[0], []
    if header[:1] != [STEP] or len(set(header)) != len(header):
        raise ValueError(f"{file}: expected a table with the columns {STEP}, ..., got {', '.join(header)}")
    for number, values in enumerate(lines[1:], start=2):
        if len(values) != len(header) or not values[0].isdecimal():
            raise ValueError(f"{file}, line {number}: expected a step and {len(header) - 1} values, got {values}")
        rows.append({column: value for column, value in zip(header, values, strict=True) if value})
    return rows


class LocalTracker(GeneralTracker):
    """Writes `log.csv`, a row for each step that something is logged for, and `curves.png`, a curve for each number.

    Columns appear when they are first logged. A row is appended as it comes; the table is written anew, in one step,
    for a new column and for more numbers of the last row's step. Only the main process writes.

    Args:
        folder: of the run; made if it does not exist.
        draw_every: after how many logged steps the curves are drawn anew; at the end they are in any case.

    Raises:
        ValueError: `draw_every` below 1, or a `log.csv` in the folder that is no such table.
    """

    name = LOCAL
    requires_logging_directory = False
    main_process_only = True

    def __init__(self, folder: str | os.PathLike, *, draw_every: int = 50) -> None:
        super().__init__()
        if draw_every < 1:
            raise ValueError(f"draw_every: expected at least 1, got {draw_every}")
        self.folder = Path(folder)
        self.draw_every = draw_every
        self.log_file, self.curves_file = self.folder / "log.csv", self.folder / "curves.png"
        self.columns: list[str] = [STEP]
        self.rows: list[dict[str, str]] = []

    @property
    def tracker(self) -> list[dict[str, str]]:
        """The rows so far, column -> text."""
        return self.rows

    @on_main_process
    def start(self) -> None:
        """Read what is there already: new rows go behind it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.log_file.is_file():
            self._keep(read_log(self.log_file))  # without a line that was cut off

    @on_main_process
    def go_on_after(self, step: int) -> None:
        """Forget the rows of later steps: the run has gone back to its checkpoint of `step` and takes them again.

        To be called between `Accelerator.init_trackers`, which starts the tracker, and the first `log`.
        """
        self._keep([row for row in self.rows if int(row[STEP]) <= step])

    @on_main_process
    def log(self, values: Mapping[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Add numbers or texts of a step.

        Args:
            values: column -> number or text; numbers are written so that reading gives them back exactly.
            step: of this or a later row's; each row needs one.

        Raises:
            ValueError: no step, or one before the last row's.
        """
        last = int(self.rows[-1][STEP]) if self.rows else -1
        if step is None or step < max(last, 0):
            raise ValueError(f"expected a step from {max(last, 0)} on, got {step}")
        texts = {column: str(value) for column, value in values.items() if value is not None and column != STEP}
        added = [column for column in texts if column not in self.columns]
        self.columns += added
        if step == last:
            self.rows[-1] |= texts
        else:
            self.rows.append({STEP: str(step), **texts})
        if added or step == last:
            self._rewrite()
        else:
            with self.log_file.open("a", encoding="utf-8", newline="") as log:
                log.write(_as_line([self.rows[-1].get(column, "") for column in self.columns]))
        if step != last and len(self.rows) % self.draw_every == 0:
            self.draw()

    @on_main_process
    def finish(self) -> None:
        """Draw the curves of all rows."""
        self.draw()

    def _keep(self, rows: list[dict[str, str]]) -> None:
        """Have these rows and their columns and no others, in the file too."""
        self.rows = rows
        self.columns = list(dict.fromkeys([STEP, *(column for row in rows for column in row)]))
        self._rewrite()

    def _rewrite(self) -> None:
        lines = [self.columns, *([row.get(column, "") for column in self.columns] for row in self.rows)]
        _replace(self.log_file, "".join(map(_as_line, lines)).encode())

    def curves(self) -> dict[str, tuple[list[int], list[float]]]:
        """Column -> steps and values, of the columns in which all values are numbers."""
        curves: dict[str, tuple[list[int], list[float]]] = {}
        for column in self.columns[1:]:
            try:
                points = [(int(row[STEP]), float(row[column])) for row in self.rows if column in row]
            except ValueError:
                continue
            curves[column] = ([step for step, _ in points], [value for _, value in points])
        return curves

    def draw(self) -> None:
        """Write `curves.png` in one step; nothing if there is no number yet."""
        curves = self.curves()
        if not curves:
            return
        across = min(len(curves), CURVES_PER_ROW)
        down = math.ceil(len(curves) / across)
        figure = Figure(figsize=(4 * across, 2.6 * down), layout="constrained")  # inches
        for index, (column, (steps, values)) in enumerate(curves.items()):
            axes = figure.add_subplot(down, across, index + 1)
            axes.plot(steps, values, marker="." if len(steps) < 40 else "", linewidth=1)
            axes.set_title(column)
            axes.set_xlabel(STEP)
            axes.grid(alpha=0.3)
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=100)
        _replace(self.curves_file, picture.getvalue())


def make_trackers(report_to: str | Sequence[str], folder: str | os.PathLike) -> list[str | GeneralTracker]:
    """What `--report_to` names, as `log_with` of `Accelerator`.

    Args:
        report_to: names, or one text with commas between them: "local" for `LocalTracker`, those that Accelerate
            knows ("tensorboard", "trackio", "wandb", ...), or "none" alone.
        folder: of the run, for the local tracker.

    Raises:
        ValueError: a name that is not known, or one whose package is not installed, which Accelerate would pass over.
    """
    names = report_to.split(",") if isinstance(report_to, str) else list(report_to)
    names = list(dict.fromkeys(name.strip() for name in names))
    if names == ["none"]:
        return []
    known = [kind for kind in LoggerType.list() if kind != LoggerType.ALL.value]
    unknown = [name for name in names if name != LOCAL and name not in known]
    if unknown or not names:
        raise ValueError(f"report_to: expected none, or some of {', '.join([LOCAL, *known])}; got {report_to!r}")
    missing = [name for name in names if name != LOCAL and LoggerType(name) not in get_available_trackers()]
    if missing:
        raise ValueError(f"report_to: expected trackers that are installed, got {', '.join(missing)}: not installed")
    return [LocalTracker(folder) if name == LOCAL else name for name in names]


__all__ = ["LocalTracker", "make_trackers", "read_log"]
