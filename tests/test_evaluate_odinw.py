"""The runner on two drawn sets: few shots are drawn, trained on and evaluated, and nothing is measured twice."""

import json
import shutil

import pytest

pytest.importorskip("faster_coco_eval", reason="needs the extra `detection`")

import evaluate_odinw
from tests.test_finetune_detection import pictures, tower  # noqa: F401
from tests.test_modeling_florence_zero_shot_detection import registered, save_open_set  # noqa: F401
from transformers_florence.data.detection_readers import read_coco

SMALL = ["--hidden_size", "32", "--num_blocks", "1", "--shortest_edge", "32", "--longest_edge", "64"]


@pytest.fixture
def sets(pictures, tmp_path):  # noqa: F811
    for name in ("det_aquarium", "BCCD", "something else"):
        shutil.copytree(pictures, tmp_path / "sets" / name)
    return tmp_path / "sets"


def test_few_shots_and_full(sets, tower, tmp_path, capsys, monkeypatch):  # noqa: F811
    command = ["--data", str(sets), "--model", str(tower), "--output", str(tmp_path / "out"), "--split", "valid"]
    command += ["--batch_size", "4", "--steps", "2", "--seeds", "0", "1"]
    means = evaluate_odinw.main([*command, "--sets", "Aquarium", "Chess", "--shots", "1", "full", "--", *SMALL])
    printed = capsys.readouterr().out
    assert "Chess" in printed.splitlines()[0] and "Aquarium" not in printed.splitlines()[0]
    rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [(row["set"], row["shots"], row["seed"]) for row in rows] == [
        ("Aquarium", shots, seed) for shots in ("1", "full") for seed in (0, 1)
    ]
    for shots in ("1", "full"):
        values = [row["map"] for row in rows if row["shots"] == shots]
        assert means[shots] == pytest.approx(sum(values) / 2)
    assert "not the paper's mean of 11: without BCCD, Chess" in printed
    few, full = (
        read_coco(tmp_path / "out" / "Aquarium" / f"{shots}-0" / "data" / "annotations.json")
        for shots in ("1", "full")
    )
    assert few.names == full.names == ["green", "red"] and len(few.pictures) < len(full.pictures) == 6
    assert {each.name for picture in few.pictures for each in picture.objects} == {"green", "red"}

    def never(*arguments):
        raise AssertionError("measured twice")

    monkeypatch.setattr(evaluate_odinw, "score_by_shots", never)
    assert evaluate_odinw.main([*command, "--sets", "Aquarium", "--shots", "1", "full"]) == means


@pytest.mark.usefixtures("registered")
def test_without_training(sets, tmp_path, capsys):
    save_open_set(tmp_path / "open", "text_head")
    command = ["--data", str(sets), "--model", str(tmp_path / "open"), "--output", str(tmp_path / "out")]
    means = evaluate_odinw.main([*command, "--split", "valid", "--shots", "0"])
    assert 0 <= means["0"] <= 1
    assert "over 2 sets (Aquarium" in capsys.readouterr().out


def test_wrong_shots(sets, capsys):
    for shots, message in (
        (["many"], "expected numbers or full, got 'many'"),
        (["0"], "expected an open-set detector"),
    ):
        with pytest.raises(SystemExit):
            evaluate_odinw.main(["--data", str(sets), "--shots", *shots])
        assert message in capsys.readouterr().err
