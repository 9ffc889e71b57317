"""The local tracker: a table that survives kills and resumes, curves of what is in it, and names for `--report_to`."""

import math
import os

import pandas
import pytest
from accelerate import Accelerator, PartialState
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType, LoggerType
from PIL import Image

from transformers_florence.training.tracking import LocalTracker, make_trackers, read_log


@pytest.fixture
def tracker(tmp_path) -> LocalTracker:
    tracker = LocalTracker(tmp_path)
    tracker.start()
    return tracker


def table(tracker: LocalTracker) -> pandas.DataFrame:
    return pandas.read_csv(tracker.log_file)


def test_what_is_logged_through_accelerate_reads_back_exactly(tmp_path):
    accelerator = Accelerator(cpu=True, log_with=make_trackers("local", tmp_path / "run"))
    accelerator.init_trackers("florence", config={"seed": 0})
    losses = [math.pi / 3**step for step in range(5)]
    for step, loss in enumerate(losses):
        accelerator.log({"loss": loss, "stage": "one, or two"}, step=step + 1)
    frame = pandas.read_csv(tmp_path / "run" / "log.csv")
    assert list(frame.columns) == ["step", "loss", "stage"]
    assert [float(row["loss"]) for row in read_log(tmp_path / "run" / "log.csv")] == losses
    assert frame["loss"].tolist() == pytest.approx(losses) and frame["step"].tolist() == [1, 2, 3, 4, 5]
    assert set(frame["stage"]) == {"one, or two"}
    assert not (tmp_path / "run" / "curves.png").exists()
    accelerator.end_training()
    assert (tmp_path / "run" / "curves.png").is_file()


def test_columns_grow_and_one_step_has_one_row(tracker):
    tracker.log({"loss": 3.0}, step=10)
    tracker.log({"loss": 2.0, "step": 7}, step=20)
    tracker.log({"top1": 0.5, "note": None}, step=20)
    tracker.log({"loss": 1.0}, step=30)
    tracker.log({"top1": 0.75}, step=40)
    frame = table(tracker)
    assert list(frame.columns) == ["step", "loss", "top1"]
    assert frame.fillna(-1).values.tolist() == [[10, 3, -1], [20, 2, 0.5], [30, 1, -1], [40, -1, 0.75]]
    assert tracker.tracker == read_log(tracker.log_file)


def test_a_plain_row_is_appended_and_not_written_anew(tracker, monkeypatch):
    tracker.log({"loss": 3.0}, step=1)
    before = tracker.log_file.read_bytes()
    monkeypatch.setattr(LocalTracker, "_rewrite", lambda self: pytest.fail("the whole table was written"))
    tracker.log({"loss": 2.5}, step=2)
    assert tracker.log_file.read_bytes() == before + b"2,2.5\n"


def test_a_resumed_run_leaves_the_table_of_an_uninterrupted_one(tmp_path):
    def run(folder, first: int, last: int) -> None:
        tracker = LocalTracker(folder)
        tracker.start()
        tracker.go_on_after(first)
        for step in range(first + 1, last + 1):
            tracker.log({"loss": 1 / step, **({"top1": step / 10} if step % 4 == 0 else {})}, step=step)

    run(tmp_path / "whole", 0, 9)
    run(tmp_path / "broken", 0, 5)
    run(tmp_path / "broken", 3, 7)  # back before `top1` appeared
    run(tmp_path / "broken", 7, 9)
    assert (tmp_path / "broken" / "log.csv").read_bytes() == (tmp_path / "whole" / "log.csv").read_bytes()
    run(tmp_path / "whole", 0, 2)
    assert [row["step"] for row in read_log(tmp_path / "whole" / "log.csv")] == ["1", "2"], "a run from the start"


@pytest.mark.parametrize("cut", range(1, 8))
def test_a_line_that_was_cut_off_is_forgotten(tracker, cut):
    for step in (1, 2):
        tracker.log({"loss": 0.125, "norm": 2}, step=step)
    tracker.log_file.write_bytes(tracker.log_file.read_bytes()[:-cut])  # of "2,0.125,2\n"
    again = LocalTracker(tracker.folder)
    again.start()
    again.log({"loss": 0.5, "norm": 4}, step=2)
    assert table(again).values.tolist() == [[1, 0.125, 2], [2, 0.5, 4]]


def test_a_write_that_fails_leaves_the_table_as_it_was(tracker, monkeypatch):
    tracker.log({"loss": 3.0}, step=1)
    before = tracker.log_file.read_bytes()

    def fail(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(tracker.log_file), "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        tracker.log({"top1": 3.0}, step=2)
    assert tracker.log_file.read_bytes() == before and os.listdir(tracker.folder) == ["log.csv"]


def test_curves_are_the_columns_of_numbers(tracker):
    tracker.log({"loss": 3.0, "stage": "one", "scale": "7"}, step=1)
    tracker.log({"loss": float("nan"), "stage": "two", "top1": True}, step=5)
    curves = tracker.curves()
    assert curves["loss"][0] == [1, 5] and curves["loss"][1][0] == 3.0 and math.isnan(curves["loss"][1][1])
    assert curves["scale"] == ([1], [7.0])
    assert "stage" not in curves and "top1" not in curves


def test_curves_are_drawn_every_so_often_and_at_the_end(tmp_path):
    tracker = LocalTracker(tmp_path, draw_every=3)
    tracker.start()
    tracker.finish()
    assert not tracker.curves_file.exists(), "there is nothing to draw"
    seen = []
    for step in range(1, 5):
        tracker.log({"loss": 1 / step}, step=step)
        seen.append(tracker.curves_file.read_bytes() if tracker.curves_file.exists() else b"")
    assert seen[0] == seen[1] == b"" and seen[2] != b"" and seen[3] == seen[2]
    tracker.finish()
    assert tracker.curves_file.read_bytes() != seen[3]
    with Image.open(tracker.curves_file) as picture:
        assert picture.format == "PNG" and picture.width > 300
        ink = sum(picture.convert("L").histogram()[:200])
    assert ink > 500, "nothing was drawn"
    assert sorted(os.listdir(tmp_path)) == ["curves.png", "log.csv"]


def test_one_process_of_several_writes(tmp_path, monkeypatch):
    Accelerator(cpu=True)
    rank_1_of_2 = {"process_index": 1, "num_processes": 2, "distributed_type": DistributedType.MULTI_CPU}
    for name, value in rank_1_of_2.items():
        monkeypatch.setitem(PartialState._shared_state, name, value)
    tracker = LocalTracker(tmp_path / "run")
    tracker.start()
    tracker.go_on_after(1)
    tracker.log({"loss": 1.0}, step=1)
    tracker.finish()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("loss,step\n1,2\n", "expected a table with the columns step"),
        ("step,loss,loss\n1,2,3\n", "expected a table with the columns step"),
        ("step,loss\n1\n", "line 2: expected a step and 1 values, got"),
        ("step,loss\n1,2\nx,2\n", "line 3: expected a step and 1 values, got"),
    ],
)
def test_another_file_of_that_name_is_refused_and_kept(tmp_path, content, message):
    (tmp_path / "log.csv").write_text(content)
    with pytest.raises(ValueError, match=message):
        LocalTracker(tmp_path).start()
    assert (tmp_path / "log.csv").read_text() == content


def test_steps_must_go_forward(tracker):
    tracker.log({"loss": 1}, step=4)
    for step in (None, 3):
        with pytest.raises(ValueError, match=f"expected a step from 4 on, got {step}"):
            tracker.log({"loss": 1}, step=step)
    with pytest.raises(ValueError, match="draw_every: expected at least 1, got 0"):
        LocalTracker(tracker.folder, draw_every=0)


def test_names_of_trackers(tmp_path, monkeypatch):
    assert make_trackers("none", tmp_path) == []
    (local,) = make_trackers("local", tmp_path)
    assert isinstance(local, LocalTracker) and local.folder == tmp_path
    monkeypatch.setattr(
        "transformers_florence.training.tracking.get_available_trackers",
        lambda: [LoggerType.TENSORBOARD, LoggerType.TRACKIO],
    )
    local, *others = make_trackers("local, tensorboard,trackio,local", tmp_path)
    assert isinstance(local, LocalTracker) and others == ["tensorboard", "trackio"]
    assert make_trackers(["trackio"], tmp_path) == ["trackio"]
    for names in ("tensorbord", "", "none,local", "all"):
        with pytest.raises(ValueError, match="report_to: expected none, or some of local, aim"):
            make_trackers(names, tmp_path)
    with pytest.raises(ValueError, match="expected trackers that are installed, got wandb, aim: not installed"):
        make_trackers("local,wandb,tensorboard,aim", tmp_path)


def test_a_tracker_that_is_installed_is_one_that_accelerate_takes(tmp_path):
    for name in get_available_trackers():
        assert make_trackers(str(name.value), tmp_path) == [name.value]
    if not get_available_trackers():
        with pytest.raises(ValueError, match="not installed"):
            make_trackers("tensorboard", tmp_path)
