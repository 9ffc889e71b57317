"""The linear-probe script on colours that any tower tells apart, beside labels that say nothing."""

import json

import pytest

import linear_probe
from tests.tiny_florence import save_tiny
from tests.tiny_sets import write_color_set


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_tiny(folder)
    return folder


@pytest.fixture
def options(checkpoint, tmp_path):
    def build(**changes) -> list[str]:
        values = {"data": write_color_set(tmp_path / "colors"), "model": checkpoint, "output": tmp_path / "results"}
        return [part for name, value in (values | changes).items() for part in (f"--{name}", str(value))]

    return build


def test_colours_are_told_apart(options):
    found = linear_probe.main(options(metric="mean_per_class"))
    assert found.metrics["accuracy"] == found.metrics["mean_per_class"] == 1.0
    assert (found.metrics["trained_on"], found.metrics["pictures"], found.metrics["unconverged"]) == (24, 15, 0)
    assert found.settings["features"] == 16 and found.task == "linear_probe"


def test_without_a_test_split_half_of_each_class_is_held_out(options):
    found = linear_probe.main(options(test_split="", validation_part=0.5))
    assert (found.metrics["trained_on"], found.metrics["pictures"]) == (12, 12)
    assert found.metrics["accuracy"] == 1.0


def test_labels_that_say_nothing_are_not_learnt(options, tmp_path):
    argv = options()
    file = tmp_path / "colors" / "metadata.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    labels = ["a", "b", "c", "b", "c", "a", "c", "a", "b"]  # each colour has each label equally often
    for number, row in enumerate(rows):
        row["label"], row["label_id"] = labels[number % 9], "abc".index(labels[number % 9])
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert linear_probe.main(argv).metrics["accuracy"] < 0.8


def test_arguments_that_are_refused(options):
    with pytest.raises(ValueError, match="metric: expected one of accuracy, mean_per_class, got 'f1'"):
        linear_probe.main(options(metric="f1"))
    with pytest.raises(
        ValueError, match="expected different splits to train, validate and test on, got train, test, test"
    ):
        linear_probe.main(options(validation_split="test"))
    with pytest.raises(ValueError, match="expected a part between 0 and 1"):
        linear_probe.main(options(validation_part=1.0))
