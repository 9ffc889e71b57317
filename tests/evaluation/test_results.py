"""Results: what was written is read again, tables hold it, and hashes and commits change with what they stand for."""

import json
import subprocess

import pytest
from PIL import Image

from transformers_florence.evaluation.results import (
    Result,
    command_line,
    current_commit,
    hash_pictures,
    load_results,
    markdown_table,
)


def result(**changes) -> Result:
    fields = {
        "task": "zero_shot",
        "model": "nano",
        "data": "pets",
        "metrics": {"top1": 0.123456, "pictures": 12},
        "command": "python examples/evaluate_zero_shot.py --data pets",
        "seed": 3,
        "commit": "0123456789abcdef",
        "data_hash": "fedcba9876543210",
    }
    return Result(**(fields | changes))


def test_results_are_read_as_they_were_written(tmp_path):
    first, other = result(), result(model="a/b c", metrics={"top1": None}, settings={"templates": ["{}"]}, seconds=1.5)
    files = [first.save(tmp_path), other.save(tmp_path / "deep")]
    assert sorted(load_results(tmp_path), key=lambda one: one.model) == [other, first]
    assert json.loads(files[0].read_text())["versions"].keys() == {"torch", "transformers"}
    result(metrics={"top1": 0.5}).save(tmp_path)  # the same command again
    result(command="python examples/evaluate_zero_shot.py --data pets --templates plain").save(tmp_path)
    found = load_results(tmp_path)
    assert len(found) == 3 and sum(one.metrics.get("top1") == 0.5 for one in found) == 1


def test_a_table_has_a_column_for_each_metric():
    rows = [result(), result(model="CLIP | tiny", data="birds", metrics={"top5": 1.0, "top1": None})]
    lines = markdown_table(rows).splitlines()
    assert lines[0] == "| model | top1 | pictures | top5 | data | seed | commit | data hash | command |"
    assert lines[2].startswith("| CLIP \\| tiny | - | - | 1.0000 | birds | 3 | 0123456789ab | fedcba987654 | `python ")
    assert lines[3].startswith("| nano | 0.1235 | 12 | - | pets |") and len(lines) == 4
    with pytest.raises(ValueError, match=r"expected results of one task, got \['other', 'zero_shot'\]"):
        markdown_table([result(), result(task="other")])
    with pytest.raises(ValueError, match=r"got \[\]"):
        markdown_table([])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metrics": {"top1": float("nan")}}, "top1: expected a finite number or None, got nan"),
        ({"metrics": {"top1": True}}, "got True"),
        ({"metrics": {"top1": "0.5"}}, "got '0.5'"),
        ({"metrics": {}, "command": ""}, "expected a result with metrics, command, got none"),
    ],
)
def test_what_is_no_result_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        result(**changes)


@pytest.mark.parametrize("text", ["[]", "{", '{"task": "zero_shot"}'])
def test_files_that_hold_no_result_are_refused(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match="expected a result, got .*a.json"):
        load_results(tmp_path)
    with pytest.raises(ValueError, match="expected a folder of results"):
        load_results(tmp_path / "absent")


def test_the_hash_changes_with_pictures_order_and_labels(tmp_path):
    files = [tmp_path / "a.png", tmp_path / "b.png"]
    for shade, file in enumerate(files):
        Image.new("L", (2, 2), shade).save(file)
    opened = [Image.open(file) for file in files]
    hashes = [hash_pictures(files, [0, 1]), hash_pictures(files, [1, 0]), hash_pictures(files[::-1], [0, 1])]
    hashes += [hash_pictures(opened, [0, 1]), hash_pictures([files[0], tmp_path / "absent"], [0, 1])]
    assert hashes[0] == hash_pictures(list(files), [0, 1])
    files[1].write_bytes(files[1].read_bytes() + b" ")
    assert len({*hashes, hash_pictures(files, [0, 1])}) == 6


def test_the_commit_of_a_repository(tmp_path):
    def git(*words: str) -> str:
        asked = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *words]
        return subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip()

    git("init")
    assert current_commit(tmp_path) == ""
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-m", "a")
    assert current_commit(tmp_path) == git("rev-parse", "HEAD") and len(current_commit(tmp_path)) == 40
    (tmp_path / "a").write_text("2")
    assert current_commit(tmp_path) == git("rev-parse", "HEAD") + "-dirty"


def test_a_command_can_be_typed_again():
    line = command_line("/somewhere/else/few_shot.py", ["--split", "", "--data", "my pictures"])
    assert line == "python examples/few_shot.py --split '' --data 'my pictures'"
