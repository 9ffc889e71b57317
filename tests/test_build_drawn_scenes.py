"""Drawn scenes: drawings are cut out along their outlines, boxes are exact, equal seeds give equal scenes."""

import json

import numpy as np
import pytest
from PIL import Image, ImageDraw

import build_drawn_scenes
from tests.tiny_corpus import tiny_splits, write_tiny_corpus
from transformers_florence.data.detection import validate_annotations
from transformers_florence.data.detection_readers import read_annotations


def test_a_drawing_is_cut_out_along_its_outline():
    picture = Image.new("RGB", (20, 20), "white")
    pen = ImageDraw.Draw(picture)
    pen.rectangle((4, 6, 13, 17), outline="black", fill="white")  # white inside belongs to it
    drawing = build_drawn_scenes.cut_out(picture)
    assert drawing.size == (10, 12) and np.asarray(drawing.getchannel("A")).min() == 255
    pen.rectangle((8, 17, 9, 19), fill="red")  # and sticks out at the bottom, to the picture's edge
    drawing = build_drawn_scenes.cut_out(picture)
    alpha = np.asarray(drawing.getchannel("A"))
    assert drawing.size == (10, 14) and alpha[13].tolist() == [0] * 4 + [255] * 2 + [0] * 4
    assert build_drawn_scenes.cut_out(Image.new("RGB", (20, 20), (250, 250, 250))) is None


def test_places_are_free():
    others = [(0, 0, 10, 10)]
    assert build_drawn_scenes.is_free((10, 0, 20, 10), others)
    assert build_drawn_scenes.is_free((9, 0, 19, 10), others)  # a tenth of either
    assert not build_drawn_scenes.is_free((8, 0, 18, 10), others)
    assert not build_drawn_scenes.is_free((2, 2, 4, 4), others)  # little of the larger one, all of the smaller


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    write_tiny_corpus(folder / "corpus")
    command = ["--corpus", str(folder / "corpus"), "--train", "4", "--valid", "2", "--side", "64", "--labels", "name"]
    return folder, command, build_drawn_scenes.main([*command, "--out", str(folder / "out")])


def test_scenes_have_exact_boxes(scenes, monkeypatch):
    """Where the ground is black, what is not black lies inside of the boxes and touches each of their sides."""
    folder, command, _ = scenes
    monkeypatch.setattr(build_drawn_scenes, "draw_ground", lambda rng, side: Image.new("RGB", (side, side), "black"))
    monkeypatch.setattr(build_drawn_scenes, "OVERLAP", 0.0)
    file = build_drawn_scenes.main([*command, "--out", str(folder / "black"), "--seed", "3"])
    seen = 0
    for line in map(json.loads, file.read_text().splitlines()):
        pixels = np.asarray(Image.open(file.parent / line["file_name"])).max(axis=2) > 8
        for box, drawing in zip(line["boxes"], line["drawings"], strict=True):
            left, top, width, height = box["bbox"]
            part = pixels[top : top + height, left : left + width]
            if "black" not in drawing["name"]:
                rows, columns = np.flatnonzero(part.any(axis=1)), np.flatnonzero(part.any(axis=0))
                assert rows[0] <= 1 and rows[-1] >= height - 2 and columns[0] <= 1 and columns[-1] >= width - 2
                seen += 1
            pixels[top : top + height, left : left + width] = False
        assert not pixels.any()
    assert seen > 5


def test_scenes_are_read_as_any_other_set(scenes):
    folder, command, file = scenes
    known = {split: {row["name"] for row in rows} for split, rows in tiny_splits().items()}
    for split, source, count in (("train", "train", 4), ("valid", "test_style", 2)):
        data = validate_annotations(read_annotations(file.parent, split), "raise")
        assert len(data.pictures) == count and {picture.size for picture in data.pictures} == {(64, 64)}
        assert set(data.names) <= known[source]
        assert all(1 <= len(picture.labels) <= 6 for picture in data.pictures)
    again = build_drawn_scenes.main([*command, "--out", str(folder / "again")])
    assert again.read_text() == file.read_text()
    assert (again.parent / "train/00003.png").read_bytes() == (file.parent / "train/00003.png").read_bytes()
    other = build_drawn_scenes.main([*command, "--out", str(folder / "other"), "--seed", "1"])
    assert other.read_text() != file.read_text()
    line = json.loads(file.read_text().splitlines()[0])
    assert {tuple(sorted(each)) for each in line["drawings"]} == {("license", "name", "style")}


def test_wrong_sizes(scenes, capsys):
    _, command, _ = scenes
    with pytest.raises(SystemExit):
        build_drawn_scenes.main([*command, "--smallest", "0.6"])
    assert "expected 0 < smallest <= largest <= 1" in capsys.readouterr().err
