"""Pseudo labels: what the detector finds is written, a call goes on where the last one ended, words choose classes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("torchmetrics", reason="needs the extra `detection`")
pytest.importorskip("faster_coco_eval", reason="needs the extra `detection`")

import pseudo_label
from tests.oracles import randomize
from tests.test_modeling_florence_detection import tiny_detector
from tests.test_modeling_florence_detection import tiny_processor as detection_processor
from tests.test_modeling_florence_zero_shot_detection import registered, save_open_set  # noqa: F401
from transformers_florence import FlorenceForObjectDetection
from transformers_florence.data.detection import validate_annotations
from transformers_florence.data.detection_readers import read_coco

THRESHOLD = 0.3


@pytest.fixture
def pictures(tmp_path) -> Path:
    """Four of them in two folders, and a file that is none."""
    generator = np.random.default_rng(0)
    for number, size in enumerate([(40, 61), (61, 40), (33, 33), (32, 48)]):
        folder = tmp_path / "pictures" / ("a" if number < 2 else "b")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    (tmp_path / "pictures" / "broken.png").write_bytes(b"no picture")
    return tmp_path / "pictures"


@pytest.fixture
def detector(tmp_path) -> Path:
    model = randomize(tiny_detector())
    with torch.no_grad():
        model.class_predictor.bias.add_(1.0)
        model.centerness_predictor.bias.add_(3.0)
    model.save_pretrained(tmp_path / "detector")
    detection_processor().save_pretrained(tmp_path / "detector")
    return tmp_path / "detector"


def test_what_is_found_is_written(detector, pictures, tmp_path, capsys):
    command = ["--model", str(detector), "--pictures", str(pictures), "--output", str(tmp_path / "out")]
    command += ["--threshold", str(THRESHOLD), "--batch", "1"]  # padding a batch changes what is found a little
    file = pseudo_label.main(command)
    assert "broken.png" in capsys.readouterr().out
    found = validate_annotations(read_coco(file), "raise")
    model, processor = FlorenceForObjectDetection.from_pretrained(detector), detection_processor()
    assert found.names == list(model.config.id2label.values()) and len(found.pictures) == 4
    for picture in found.pictures:
        with torch.no_grad():
            output = model(**processor(str(picture.file), return_tensors="pt"))
        (expected,) = processor.post_process_object_detection(output, THRESHOLD, [picture.size])
        assert picture.labels.tolist() == expected["labels"].tolist() and len(picture.labels) > 0
        assert (picture.boxes - expected["boxes"]).abs().max() < 0.02
    scores = [row["score"] for row in json.loads(file.read_text())["annotations"]]
    assert all(THRESHOLD < score <= 1 for score in scores)


def test_a_call_goes_on_where_the_last_one_ended(detector, pictures, tmp_path, monkeypatch, capsys):
    command = ["--model", str(detector), "--pictures", str(pictures), "--threshold", str(THRESHOLD), "--batch", "1"]
    whole = json.loads(pseudo_label.main([*command, "--output", str(tmp_path / "whole")]).read_text())
    detect, broken = pseudo_label.detect, [*command, "--output", str(tmp_path / "broken")]

    def killed(*arguments, **settings):
        for number, part in enumerate(detect(*arguments, **settings)):
            if number == 2:
                raise KeyboardInterrupt
            yield part

    monkeypatch.setattr(pseudo_label, "detect", killed)
    with pytest.raises(KeyboardInterrupt):
        pseudo_label.main(broken)
    journal = tmp_path / "broken" / "found.jsonl"
    journal.write_text(journal.read_text()[:-20])  # the last line was being written
    monkeypatch.setattr(pseudo_label, "detect", detect)
    assert json.loads(pseudo_label.main(broken).read_text()) == whole
    assert "1 pictures were labelled before, 3 are left" in capsys.readouterr().out
    with pytest.raises(ValueError, match="expected the settings .* or another output"):
        pseudo_label.main([*broken, "--threshold", "0.4"])


@pytest.mark.usefixtures("registered")
def test_words_choose_the_classes_of_an_open_set_detector(detector, pictures, tmp_path):
    save_open_set(tmp_path / "open", "text_head")
    command = ["--pictures", str(pictures), "--output", str(tmp_path / "out"), "--threshold", "0.02", "--link"]
    words = ["--classes", "a dog", "a cat", "--template", "{}", "a photo of {}"]
    file = pseudo_label.main(["--model", str(tmp_path / "open"), *command, *words])
    found = read_coco(file)
    assert found.names == ["a dog", "a cat"] and all(picture.file.is_symlink() for picture in found.pictures)
    assert {each.name for picture in found.pictures for each in picture.objects} == {"a dog", "a cat"}
    with pytest.raises(ValueError, match=r"expected classes for an open-set detector, and no others, got \[\]"):
        pseudo_label.main(["--model", str(tmp_path / "open"), *command])
    with pytest.raises(ValueError, match="and no others, got"):
        pseudo_label.main(["--model", str(detector), *command, *words])


def test_nothing_to_label(detector, tmp_path):
    (tmp_path / "empty").mkdir()
    command = ["--model", str(detector), "--output", str(tmp_path / "out")]
    with pytest.raises(ValueError, match="expected pictures below .*, got none that can be opened"):
        pseudo_label.main([*command, "--pictures", str(tmp_path / "empty")])
    Image.new("RGB", (40, 40)).save(tmp_path / "empty" / "black.png")
    with pytest.raises(ValueError, match="expected a detection above 0.999 on one of 1 pictures, got none"):
        pseudo_label.main([*command, "--pictures", str(tmp_path / "empty"), "--threshold", "0.999"])
    file = pseudo_label.main([*command, "--pictures", str(tmp_path / "empty"), "--threshold", "0.999", "--keep_empty"])
    assert [len(picture.objects) for picture in read_coco(file).pictures] == [0]
