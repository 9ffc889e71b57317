"""The detection benchmarks on a handful of pictures: every model trains, is scored and is timed."""

import json

import pytest

pytest.importorskip("faster_coco_eval", reason="needs the extra `detection`")

from benchmarks import detection, detection_quality
from tests.test_finetune_detection import pictures  # noqa: F401


def test_quality(pictures, capsys):  # noqa: F811
    """A fraction of a second each: one step, and a line."""
    command = ["--data", str(pictures.parent), "--sets", pictures.name, "--seconds", "0.01", "--batch", "2"]
    command += ["--models", "florence", "florence-random", "retinanet", "fcos", "--blocks", "0", "1"]
    results = detection_quality.main([*command, "--channels", "32", "--shortest_edge", "32", "--longest_edge", "64"])
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == results
    names = [result["model"] for result in results]
    assert names == ["florence+0", "florence+1", "florence-random+0", "florence-random+1", "retinanet", "fcos"]
    assert all(result["steps"] == 1 and 0 <= result["map"] <= result["map_50"] <= 100 for result in results)
    assert results[0]["parameters"] == results[2]["parameters"] < results[1]["parameters"]
    with pytest.raises(SystemExit):
        detection_quality.main(["--data", str(pictures), "--sets", "nothing"])
    assert "expected the folders nothing in" in capsys.readouterr().err


def test_speed(capsys):
    """The naive head gives what ours gives, or it would raise."""
    rows = detection.main(["--sides", "160", "--batch", "1", "--channels", "32", "--blocks", "1", "--rounds", "1"])
    assert [row[0].split(",")[0] for row in rows] == [
        "Dynamic Head",
        "Dynamic Head",
        "RetinaNet's head",
        "florence nano",
        "RetinaNet",
        "RT-DETR",
    ]
    assert rows[0][2] == rows[1][2] and all(value > 0 for row in rows for value in row[3:])
    assert len(capsys.readouterr().out.splitlines()) == 8
    with pytest.raises(SystemExit):
        detection.main(["--sides", "200"])
    assert "expected multiples of 32 from 160 on" in capsys.readouterr().err
