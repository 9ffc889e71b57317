"""The eleven sets: found by their names, cut to few shots, averaged."""

import math
from collections import Counter
from pathlib import Path

import pytest
import torch

pytest.importorskip("faster_coco_eval", reason="needs the extra `detection`")

from transformers_florence.data.detection import AnnotatedPicture
from transformers_florence.evaluation.odinw import ODINW, SHOTS, average, few_shot, find_sets


def pictures(*labels: list[int], crowd: bool = False) -> list[AnnotatedPicture]:
    rows = []
    for number, each in enumerate(labels):
        boxes = torch.tensor([[0.0, 0, 4, 4]] * len(each), dtype=torch.float64).reshape(-1, 4)
        flags = torch.full((len(each),), crowd)
        rows.append(AnnotatedPicture(Path(f"{number}.png"), number, (8, 8), boxes, torch.tensor(each).long(), flags))
    return rows


def test_sets_are_found_by_their_names(tmp_path):
    for name in ("det_aquarium", "Oxford Pets", "thermal-dogs-and-people", "raccoon", "PKLot"):
        (tmp_path / name).mkdir()
    (tmp_path / "bccd").write_text("a file")
    found = find_sets(tmp_path)
    assert len(found) == 11 and list(found) == list(ODINW)
    there = {name: folder.name for name, folder in found.items() if folder is not None}
    assert there == {
        "Aquarium": "det_aquarium",
        "Pets": "Oxford Pets",
        "PKLot": "PKLot",
        "Thermal": "thermal-dogs-and-people",
    }
    (tmp_path / "AquariumCombined").mkdir()
    with pytest.raises(ValueError, match="expected one folder of Aquarium in"):
        find_sets(tmp_path)
    with pytest.raises(ValueError, match="expected a folder of sets, got .*: no such folder"):
        find_sets(tmp_path / "nowhere")


@pytest.mark.parametrize("shots", SHOTS)
def test_every_class_has_its_shots_and_no_picture_is_there_for_nothing(shots):
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(5, (number % 4,), generator=generator).tolist() for number in range(60)]
    everything = pictures(*rows, [7], [7, 7])  # a class that has three objects in all
    chosen = few_shot(everything, shots, seed=1)
    available = Counter(label for picture in everything for label in picture.labels.tolist())
    counts: Counter = Counter()
    for picture in chosen:
        labels = picture.labels.tolist()
        assert any(counts[label] < shots for label in labels)
        counts.update(labels)
    assert all(counts[label] >= min(shots, available[label]) for label in available)
    assert len({picture.image_id for picture in chosen}) == len(chosen) < 60
    again, other = few_shot(everything, shots, seed=1), few_shot(everything, shots, seed=2)
    assert [each.image_id for each in again] == [each.image_id for each in chosen]
    assert [each.image_id for each in other] != [each.image_id for each in chosen]


def test_what_gives_no_shots():
    with pytest.raises(ValueError, match="expected pictures with objects, got none among 2"):
        few_shot(pictures([], [1], crowd=True), 1, 0)
    for shots in (0, True, 1.5):
        with pytest.raises(ValueError, match="shots: expected an integer >= 1"):
            few_shot(pictures([1]), shots, 0)


def test_the_mean_over_sets_is_that_of_their_means_over_seeds():
    mean, missing = average({"Aquarium": [0.2, 0.4, 0.6], "BCCD": 0.1})
    assert mean == pytest.approx(0.25) and missing == list(ODINW)[2:]
    # The paper's table 7, Florence's row: its average is the mean of the eleven numbers.
    row = [43.1, 15.3, 13.4, 15.0, 68.9, 79.6, 41.4, 31.4, 53.3, 46.9, 48.7]
    mean, missing = average(dict(zip(ODINW, row, strict=True)))
    assert mean == pytest.approx(math.fsum(row) / 11) and not missing
    for scores, message in (
        ({}, "got none"),
        ({"Raccoon": 0.5}, "got Raccoon"),
        ({"BCCD": []}, r"BCCD: expected finite scores, got \[\]"),
        ({"BCCD": [math.nan]}, "BCCD: expected finite scores"),
    ):
        with pytest.raises(ValueError, match=message):
            average(scores)
