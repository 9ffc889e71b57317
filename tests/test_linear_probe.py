"""The linear-probe script on colours that any tower tells apart, beside labels that say nothing."""

import json

import pytest
import torch
from sklearn.linear_model import LogisticRegression

import linear_probe
from tests.tiny_florence import save_tiny, tiny_image_processor
from tests.tiny_sets import write_color_set, write_voc
from transformers_florence import FlorenceModel, load_checkpoint
from transformers_florence.data.image_sets import benchmarks, read_image_set
from transformers_florence.evaluation.classification import map_11_point
from transformers_florence.evaluation.embedding import embed_pictures

SPLITS = ("train", "val", "test")


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


def test_colours_are_told_apart(options, monkeypatch):
    drawn = {}
    monkeypatch.setattr(linear_probe, "save_beside", lambda file, **figures: drawn.update(figures))
    found = linear_probe.main(options(metric="mean_per_class"))
    assert found.metrics["accuracy"] == found.metrics["mean_per_class"] == 1.0
    assert (found.metrics["trained_on"], found.metrics["pictures"], found.metrics["unconverged"]) == (24, 15, 0)
    assert found.settings["features"] == 16 and found.task == "linear_probe"
    assert drawn["confusion"].axes[0].images[0].get_array().tolist() == torch.eye(3).tolist()
    assert [len(points.get_offsets()) for points in drawn["map"].axes[0].collections] == [5, 5, 5]


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


def test_pictures_of_several_classes(options, checkpoint, tmp_path):
    """VOC2007's folder: mean average precision of scikit-learn's regressions, with the script's strength."""
    names = benchmarks()["voc2007"].names
    write_voc(tmp_path, names)
    source = f"voc2007:{tmp_path}"
    found = linear_probe.main(options(data=source, validation_split="val", max_iterations=30))
    assert list(found.metrics)[:4] == ["map_11_point", "trained_on", "pictures", "classes"]
    assert (found.metrics["trained_on"], found.metrics["pictures"], found.metrics["classes"]) == (40, 20, 20)
    model, sets = load_checkpoint(FlorenceModel, checkpoint), [read_image_set(source, split) for split in SPLITS]
    embeds = [embed_pictures(model, tiny_image_processor(), part.pictures, tower=True)[0] for part in sets]
    features, marks = torch.cat(embeds[:2]).numpy(), torch.cat([part.labels for part in sets[:2]]).numpy()
    scores = torch.zeros(20, 20)
    for number in range(20):
        rows = marks[:, number] != 0
        fitted = LogisticRegression(C=1 / found.metrics["strength"], max_iter=30)
        scores[:, number] = torch.from_numpy(
            fitted.fit(features[rows], marks[rows, number]).decision_function(embeds[2].numpy())
        )
    assert found.metrics["map_11_point"] == pytest.approx(map_11_point(scores, sets[2].labels), abs=0.01)
    assert found.metrics["map_11_point"] > 0.3  # of 0.1 for pictures in no order
    with pytest.raises(ValueError, match=r"one class each, got 0.2 of labels of shape \(20, 20\)"):
        linear_probe.main(options(data=source))


def test_arguments_that_are_refused(options):
    with pytest.raises(ValueError, match="metric: expected one of accuracy, mean_per_class, got 'f1'"):
        linear_probe.main(options(metric="f1"))
    with pytest.raises(
        ValueError, match="expected different splits to train, validate and test on, got train, test, test"
    ):
        linear_probe.main(options(validation_split="test"))
    with pytest.raises(ValueError, match="expected a part between 0 and 1"):
        linear_probe.main(options(validation_part=1.0))
