"""Sets merged into one vocabulary, and written so that the reader of COCO's form gives them back."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.testing import assert_close

import merge_detection_sets
from transformers_florence.data.detection import (
    AnnotatedPicture,
    AnnotationReport,
    DetectionSet,
    validate_annotations,
)
from transformers_florence.data.detection_merge import merge_sets
from transformers_florence.data.detection_readers import read_annotations, read_coco
from transformers_florence.data.detection_writer import write_coco

SIZE = (30, 40)  # height and width


def draw(folder: Path, name: str, color: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", SIZE[::-1], color).save(folder / name)
    return folder / name


def annotated(file: Path, *objects: tuple[int, list[float]], crowd: int = 0) -> AnnotatedPicture:
    boxes = torch.tensor([box for _, box in objects], dtype=torch.float64).reshape(-1, 4)
    labels = torch.tensor([label for label, _ in objects], dtype=torch.long)
    return AnnotatedPicture(file, 0, SIZE, boxes, labels, torch.arange(len(labels)) < crowd)


def make_set(names: list[str], *pictures: AnnotatedPicture) -> DetectionSet:
    report = AnnotationReport("clip", (len(pictures),) * 2, (0, 0), {}, [])
    return DetectionSet(names, list(pictures), report)


@pytest.fixture
def sets(tmp_path) -> dict[str, DetectionSet]:
    """One class is spelt in two ways, one has another word."""
    first = draw(tmp_path / "a", "same.png", "red"), draw(tmp_path / "a" / "deep", "same.png", "green")
    second = draw(tmp_path / "b", "same.png", "blue")
    return {
        "one": make_set(
            ["Traffic_Light", "man"],
            annotated(first[0], (0, [1, 2, 11, 12]), (1, [5.5, 6.25, 20, 30]), crowd=1),
            annotated(first[1]),
        ),
        "two": make_set(["dog", "human", "traffic  light"], annotated(second, (2, [0, 0, 4, 4]), (1, [1, 1, 9, 9]))),
    }


def test_one_vocabulary(sets):
    merged = merge_sets(sets, {"Person": ["MAN", "human", "woman"]})
    assert merged.names == ["dog", "person", "traffic light"]
    assert [each.labels.tolist() for each in merged.pictures["one"]] == [[2, 1], []]
    assert merged.pictures["two"][0].labels.tolist() == [2, 1]
    assert merged.origins["traffic light"] == {"one": ["Traffic_Light"], "two": ["traffic  light"]}
    table = merged.table().splitlines()
    assert table[1].split() == ["one", "2", "2", "2", "0"] and table[2].split() == ["two", "1", "2", "3", "1"]
    assert table[3].split() == ["all", "3", "4", "3"]
    assert "shared: person: one (man), two (human)" in table and not any("dog" in line for line in table)
    assert merge_sets(sets).names == ["dog", "human", "man", "traffic light"]
    two_words = make_set(["man", "human"], sets["one"].pictures[0])
    assert merge_sets({"x": two_words}, {"person": ["man", "human"]}).pictures["x"][0].labels.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("aliases", "message"),
    [
        ({"person": ["man"], "worker": ["man"]}, "expected 'man' under one name, got 'person' and 'worker'"),
        ({"person": ["man"], "human": ["person"]}, "expected 'person' under one name, got 'person' and 'human'"),
        ({"person": "man"}, "aliases of 'person': expected a list of words, got 'man'"),
    ],
)
def test_ambiguous_words(sets, aliases, message):
    with pytest.raises(ValueError, match=message):
        merge_sets(sets, aliases)
    with pytest.raises(ValueError, match="expected at least one set"):
        merge_sets({})


@pytest.mark.parametrize("link", [False, True])
def test_what_is_written_is_read_back(sets, link, tmp_path):
    merged = merge_sets(sets)
    scores = [torch.tensor([0.25, 0.5]), torch.zeros(0), torch.tensor([0.125, 1.0])]
    file = write_coco(merged.pictures, merged.names, tmp_path / "out", scores=scores, link=link)
    again = validate_annotations(read_coco(file), "raise")
    assert again.names == merged.names
    before = [picture for pictures in merged.pictures.values() for picture in pictures]
    for ours, theirs in zip(again.pictures, before, strict=True):
        assert_close(ours.boxes, theirs.boxes)
        assert torch.equal(ours.labels, theirs.labels) and torch.equal(ours.crowd, theirs.crowd)
        assert ours.size == theirs.size and ours.file.read_bytes() == theirs.file.read_bytes()
        assert ours.file.is_symlink() == link
    assert [picture.file.name for picture in again.pictures] == ["same.png", "same-2.png", "same.png"]
    content = json.loads(file.read_text())
    assert [row["score"] for row in content["annotations"]] == [0.25, 0.5, 0.125, 1.0]
    assert [row["source"] for row in content["images"]] == ["one", "one", "two"]
    write_coco(merged.pictures, merged.names, tmp_path / "out", link=not link)  # over what is there
    assert "score" not in json.loads(file.read_text())["annotations"][0]


def test_what_cannot_be_written(sets, tmp_path):
    pictures = sets["one"].pictures
    for arguments, message in (
        (({}, ["a"]), "expected pictures, and scores for each, got 0"),
        (({"../up": pictures}, ["a", "b"]), "expected the name of a folder as a source, got '../up'"),
        (({"one": pictures}, ["a"]), r"expected classes from 0 to 0, got \[0, 1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            write_coco(*arguments, tmp_path / "out")
    with pytest.raises(ValueError, match="scores for each, got 2 and"):
        write_coco({"one": pictures}, ["a", "b"], tmp_path / "out", scores=[torch.zeros(2)])
    assert not (tmp_path / "out" / "annotations.json").exists()


def test_the_script(sets, tmp_path, capsys):
    for name, data in sets.items():
        write_coco({"train": data.pictures}, data.names, tmp_path / name)
    (tmp_path / "words.yaml").write_text("person: [man, human]\n")
    one, two = (f"{name}={tmp_path / name / 'annotations.json'}" for name in sets)
    output = tmp_path / "merged"
    merged = merge_detection_sets.main([one, two, "--output", str(output), "--aliases", str(tmp_path / "words.yaml")])
    assert merged.names == read_annotations(output / "annotations.json").names == ["dog", "person", "traffic light"]
    assert "3 of 3 pictures" not in (printed := capsys.readouterr().out) and "all" in printed
    assert merge_detection_sets.parse_set("a=b:train") == ("a", Path("b"), "train")
    for wrong in ("folder", "=folder", "a="):
        with pytest.raises(ValueError, match="expected name=path or name=path:split"):
            merge_detection_sets.main([wrong])
    with pytest.raises(ValueError, match="expected a name of its own for each set"):
        merge_detection_sets.main([one, one])
    (tmp_path / "words.yaml").write_text("person: man\n")
    with pytest.raises(ValueError, match="expected names, each with a list of other words"):
        merge_detection_sets.main([one, "--aliases", str(tmp_path / "words.yaml")])
