"""Plots: what stands in the axes is what a slow loop finds, and what is written is a picture."""

import importlib
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from transformers_florence.evaluation import plots
from transformers_florence.evaluation.classification import confusion_matrix
from transformers_florence.evaluation.plots import (
    confusion_figure,
    map_figure,
    recall_figure,
    save_beside,
    shots_figure,
)
from transformers_florence.evaluation.retrieval import evaluate_retrieval, first_ranks


def words(labels) -> list[str]:
    return [label.get_text() for label in labels]


def random_counts(classes: int, pictures: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Counts, and the true classes and guesses that they count; half of the guesses are right."""
    labels = torch.randint(classes, (pictures,))
    guesses = torch.where(torch.rand(pictures) < 0.5, labels, torch.randint(classes, (pictures,)))
    return confusion_matrix(torch.eye(classes)[guesses], labels), labels, guesses


def test_a_confusion_matrix_shows_shares_of_each_class():
    labels = torch.tensor([0] * 4 + [1] * 3)
    guesses = torch.tensor([0, 0, 0, 2, 1, 0, 0])
    counts = confusion_matrix(torch.eye(3)[guesses], labels)
    matrix, mistakes = confusion_figure(counts, ["cat", "dog", "a very long name of a class"]).axes
    wanted = [[0.75, 0, 0.25], [2 / 3, 1 / 3, 0], [0, 0, 0]]
    assert np.allclose(matrix.images[0].get_array(), wanted)
    assert words(matrix.get_xticklabels()) == ["cat", "dog", "a very long name of a c…"]
    assert words(matrix.get_yticklabels()) == ["cat (4)", "dog (3)", "a very long name of a c… (0)"]
    shown = {text.get_position(): text.get_text() for text in matrix.texts if text.get_visible()}
    assert shown == {(0, 0): "75%", (2, 0): "25%", (0, 1): "67%", (1, 1): "33%"}
    assert matrix.get_title() == "4 of 7 pictures right"
    assert words(mistakes.get_yticklabels()) == ["dog → cat", "cat → a very long name of a c…"]
    assert [bar.get_width() for bar in mistakes.patches] == [2, 1]


def test_the_most_frequent_mistakes_are_listed():
    counts, labels, guesses = random_counts(100, 3000)
    names = [f"class {number}" for number in range(100)]
    matrix, mistakes = confusion_figure(counts, names).axes
    pairs = [pair for pair in zip(labels.tolist(), guesses.tolist(), strict=True) if pair[0] != pair[1]]
    listed = [bar.get_width() for bar in mistakes.patches]
    most = sorted((pairs.count(pair) for pair in set(pairs)), reverse=True)[: len(listed)]
    assert listed == most and len(listed) > 30
    for text, count in zip(words(mistakes.get_yticklabels()), most, strict=True):
        true, guess = (names.index(name) for name in text.split(" → "))
        assert pairs.count((true, guess)) == count
    assert words(matrix.get_xticklabels()) == names and not matrix.texts


def test_very_many_classes_are_counted_and_no_mistakes_take_no_room():
    (matrix,) = confusion_figure(torch.eye(130).long(), [f"class {number}" for number in range(130)]).axes
    assert words(matrix.get_yticklabels()) == [str(number) for number in range(0, 130, 10)]
    assert matrix.get_title() == "130 of 130 pictures right"


def test_recall_is_what_a_loop_finds_and_what_the_evaluator_reports():
    pictures, texts = (torch.nn.functional.normalize(torch.randn(count, 4), dim=1) for count in (40, 80))
    of_text = torch.arange(40).repeat(2)
    ranks = {
        "one": first_ranks(pictures, texts, torch.arange(40), of_text),
        "other": first_ranks(texts, pictures, of_text, torch.arange(40)),
    }
    (axes,) = recall_figure(ranks).axes
    reported = evaluate_retrieval(pictures, texts, of_text)
    for curve, values, side in zip(
        axes.lines, ranks.values(), (reported.image_to_text, reported.text_to_image), strict=True
    ):
        found = dict(zip(*curve.get_data(), strict=True))
        assert found == {k: pytest.approx(sum(v <= k for v in values.tolist()) / len(values)) for k in found}
        assert {k: found[k] for k in (1, 5, 10)} == pytest.approx({k: side[f"recall_{k}"] for k in (1, 5, 10)})
        assert max(found) == max(int(values.max()) for values in ranks.values())
        assert f"median rank {side['median_rank']:g}" in curve.get_label()


def test_recall_ends_where_a_reader_stops_looking():
    (axes,) = recall_figure({"far": torch.tensor([1, 3, 5000])}).axes
    k, recall = axes.lines[0].get_data()
    assert (k[0], k[-1]) == (1, plots.LAST_RANK) and recall[-1] == pytest.approx(2 / 3)
    (axes,) = recall_figure({"near": torch.tensor([1, 2])}).axes
    assert axes.lines[0].get_ydata().tolist() == [0.5] + [1.0] * 9  # to 10 in any case


def test_accuracy_over_shots():
    curves = {"zeros": {1: 0.2, 4: 0.5}, "names": {1: 0.6, 4: 0.7, 16: 0.8}}
    figure = shots_figure(curves, intervals={"names": {1: 0.1, 4: 0.05}}, levels={"chance": 0.125})
    (axes,) = figure.axes
    drawn = {container.get_label(): container for container in axes.containers}
    for name, points in curves.items():
        x, y = drawn[name].lines[0].get_data()
        assert dict(zip(x, y, strict=True)) == points
    (bars,) = drawn["names"].lines[2]
    assert np.allclose([segment[:, 1] for segment in bars.get_segments()], [[0.5, 0.7], [0.65, 0.75], [0.8, 0.8]])
    assert not drawn["zeros"].has_yerr
    assert [line.get_ydata()[0] for line in axes.lines if line.get_label() == "chance"] == [0.125]
    assert words(axes.get_xticklabels()) == ["1", "4", "16"]


def points_of(figure) -> tuple[np.ndarray, np.ndarray]:
    """Places (points, 2) and the class of each, by the order of the classes."""
    groups = [group.get_offsets() for group in figure.axes[0].collections]
    return np.concatenate(groups), np.repeat(np.arange(len(groups)), [len(group) for group in groups])


def test_a_map_keeps_neighbours_together():
    labels = torch.tensor([0, 2, 3]).repeat(20)
    vectors = 5 * torch.eye(8)[labels] + 0.3 * torch.randn(60, 8)
    figure = map_figure(vectors, labels, ["red", "unused", "green", "blue"])
    places, classes = points_of(figure)
    assert len(places) == 60
    distances = np.linalg.norm(places[:, None] - places, axis=2) + 1e9 * np.eye(60)
    assert (classes[distances.argmin(axis=1)] == classes).mean() > 0.95
    assert words(figure.legends[0].get_texts()) == ["red", "green", "blue"]
    again, _ = points_of(map_figure(vectors, labels, list("abcd")))
    assert np.array_equal(again, places)


def test_a_map_of_many_classes_names_each_at_its_median(monkeypatch):
    monkeypatch.setattr(plots, "_places", lambda vectors, seed: vectors[:, :2])
    labels = torch.arange(90) % 30
    vectors = torch.randn(90, 4)
    (axes,) = map_figure(vectors, labels, [f"class {number}" for number in range(30)]).axes
    for number, text in enumerate(axes.texts):
        assert text.get_text() == f"class {number}"
        assert text.get_position() == pytest.approx(np.median(vectors[labels == number, :2], axis=0))


def test_a_map_of_very_many_pictures_shows_some(monkeypatch):
    monkeypatch.setattr(plots, "MAPPED", 10)
    vectors, labels = torch.randn(50, 4), torch.arange(50) % 2
    figure = map_figure(vectors, labels, ["a", "b"])
    assert len(points_of(figure)[0]) == 10 and figure.axes[0].get_title().startswith("10 of 50 pictures")


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_a_map_of_hardly_any_pictures(count):
    places, _ = points_of(map_figure(torch.randn(count, 4), torch.zeros(count).long(), ["a"]))
    assert places.shape == (count, 2) and np.isfinite(places).all()
    places, _ = points_of(map_figure(torch.ones(count, 4), torch.zeros(count).long(), ["a"]))
    assert not places.any()


def test_figures_are_written_beside_their_result(tmp_path):
    names = ["costs $1 or $2", "two \n words", "_^{"]
    figures = {
        "confusion": confusion_figure(torch.tensor([[2, 1, 0], [0, 1, 0], [1, 0, 3]]), names),
        "map": map_figure(torch.randn(6, 4), torch.arange(6) % 3, names),
        "recall": recall_figure({"a": torch.tensor([1, 2, 30])}),
        "shots": shots_figure({"a": {1: 0.5}}),
    }
    written = save_beside(tmp_path / "zero_shot--tiny--a.b--12.json", **figures)
    assert [file.name for file in written] == [f"zero_shot--tiny--a.b--12.{name}.png" for name in figures]
    assert sorted(written) == sorted(tmp_path.iterdir())
    for file, figure in zip(written, figures.values(), strict=True):
        with Image.open(file) as picture:
            assert picture.size == tuple((figure.get_size_inches() * plots.DPI).astype(int))
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 10


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (
            lambda: confusion_figure(torch.eye(3).long(), ["a", "b"]),
            r"expected integers \(2, 2\).*got torch.int64 \(3",
        ),
        (lambda: confusion_figure(torch.eye(2), ["a", "b"]), "expected integers .* got torch.float32"),
        (lambda: recall_figure({}), "expected ranks from 1 on for each curve, got the curves none"),
        (lambda: recall_figure({"a": torch.tensor([0, 1])}), "got the curves a"),
        (lambda: shots_figure({"a": {}}), "expected curves with a point at least"),
        (lambda: map_figure(torch.randn(3, 2), torch.tensor([0, 1]), ["a", "b"]), r"expected 3 labels .* got \(2,\)"),
        (lambda: map_figure(torch.randn(2, 2), torch.tensor([0, 2]), ["a", "b"]), "expected 2 labels of 2 classes"),
        (
            lambda: map_figure(torch.full((2, 2), torch.nan), torch.tensor([0, 1]), ["a", "b"]),
            "expected finite vectors",
        ),
    ],
)
def test_what_cannot_be_drawn_is_refused(draw, message):
    with pytest.raises(ValueError, match=message):
        draw()


def test_without_the_libraries_only_drawing_fails(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] in ("matplotlib", "sklearn")]:
        monkeypatch.setitem(sys.modules, name, None)
    importlib.reload(plots)
    with pytest.raises(ImportError, match=r"plots need matplotlib: pip install 'transformers_florence\[eval\]'"):
        plots.shots_figure({"a": {1: 0.5}})
    with pytest.raises(ImportError, match="plots need scikit-learn"):
        plots.map_figure(torch.randn(4, 2), torch.arange(4), list("abcd"))
