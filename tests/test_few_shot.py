"""The few-shot script: episodes with fixed and with learning towers, and k pictures of each class."""

import pytest

import few_shot
from tests.tiny_florence import save_tiny
from tests.tiny_sets import write_color_set
from transformers_florence.evaluation.results import load_results


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_tiny(folder)
    return folder


@pytest.fixture
def options(checkpoint, tmp_path):
    def build(**changes) -> list[str]:
        data = write_color_set(tmp_path / "colors")
        values = {"data": data, "model": checkpoint, "output": tmp_path / "results", "ways": 3, "queries": 4}
        values |= {"episodes": 4, "templates": "plain"}
        argv = [part for name, value in (values | changes).items() for part in (f"--{name}", str(value))]
        return [*argv, "--shots", "1", "5", "50", "--shots_per_class", "1", "2", "20"]

    return build


def test_episodes_and_shots_per_class(options, tmp_path, capsys, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        few_shot, "save_beside", lambda file, **figures: drawn.append((file, figures["shots"].axes[0]))
    )
    found = few_shot.main(options(split="train", test_split="test", queries=3))
    episodes, by_class = found
    assert episodes.metrics["5_shot"] > 0.9 and episodes.metrics["5_shot_interval"] is not None
    assert list(episodes.metrics) == ["1_shot", "1_shot_interval", "5_shot", "5_shot_interval"]
    assert list(by_class.metrics) == ["0_text", "1_zeros", "1_text", "2_zeros", "2_text"]
    assert by_class.metrics["2_zeros"] == by_class.metrics["2_text"] == 1.0
    printed = capsys.readouterr().out
    assert "50 shots: expected 3 classes of at least 50 + 3 pictures" in printed
    assert "20 a class: expected 20 pictures of each class, got 8 of class 0" in printed
    assert {one.task for one in load_results(tmp_path / "results")} == {"few_shot", "shots_per_class"}

    def curves_of(axes) -> list[dict]:
        return [dict(zip(*container.lines[0].get_data(), strict=True)) for container in axes.containers]

    (first, of_episodes), (second, of_classes) = drawn
    assert first.name.startswith("few_shot--") and second.name.startswith("shots_per_class--")
    assert curves_of(of_episodes) == [{shots: episodes.metrics[f"{shots}_shot"] for shots in (1, 5)}]
    assert curves_of(of_classes) == [
        {shots: by_class.metrics[f"{shots}_{start}"] for shots in (1, 2)} for start in ("zeros", "text")
    ]
    levels = {line.get_label(): line.get_ydata()[0] for line in of_classes.lines}
    assert levels["class names alone"] == by_class.metrics["0_text"] and levels["chance"] == 1 / 3


def test_a_tower_that_learns(options, tmp_path, monkeypatch):
    epochs = few_shot.tune_episode.__kwdefaults__
    monkeypatch.setitem(epochs, "epochs", 3)
    argv = options(tune_tower=True, episodes=1)
    (tmp_path / "colors" / "train_0_0.png").write_bytes(b"no picture")  # the numbers of the others move
    found = few_shot.main(argv)
    assert [one.task for one in found] == ["few_shot_tuned"]
    assert found[0].metrics["5_shot"] > 0.5 and found[0].metrics["5_shot_interval"] is None


def test_what_cannot_be_measured_is_refused(options):
    with pytest.raises(ValueError, match="expected classes of 101 pictures, got smaller ones"):
        few_shot.main(options(queries=100))
    with pytest.raises(ValueError, match="test_split: expected none of the pictures of ''"):
        few_shot.main(options(test_split="test"))
    with pytest.raises(ValueError, match="templates: expected one of"):
        few_shot.main(options(templates="poems"))
