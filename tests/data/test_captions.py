"""Pictures with captions: four forms, one list; what is refused."""

import json
from pathlib import Path

import pytest
from PIL import Image

from transformers_florence.data.captions import (
    CaptionedPicture,
    all_captions,
    read_captions,
    read_coco_captions,
    read_flickr8k,
    read_karpathy,
    read_metadata_captions,
)

SHARED = Path(__file__).parents[3] / "shared"
CAPTIONS = {"a.jpg": ("A dog .", "The dog runs"), "b.jpg": ("A cat",)}


def draw(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in CAPTIONS:
        Image.new("RGB", (8, 8), "teal").save(folder / name)


def write_coco(folder: Path) -> Path:
    draw(folder)
    ids = {"a.jpg": 7, "b.jpg": 3, "c.jpg": 9}  # the last one has no caption
    notes = [{"image_id": ids[name], "caption": text} for name, texts in CAPTIONS.items() for text in texts]
    content = {"images": [{"id": number, "file_name": name} for name, number in ids.items()], "annotations": notes}
    file = folder / "captions.json"
    file.write_text(json.dumps(content))
    return file


def write_karpathy(folder: Path) -> Path:
    draw(folder / "val2014")
    rows = [
        {
            "filepath": "val2014",
            "filename": name,
            "imgid": number,
            "split": split,
            "sentences": [{"raw": text, "tokens": text.lower().split()} for text in CAPTIONS[name]],
        }
        for number, (name, split) in enumerate((("a.jpg", "train"), ("b.jpg", "restval")))
    ]
    file = folder / "dataset_coco.json"
    file.write_text(json.dumps({"dataset": "coco", "images": rows}))
    return file


def write_flickr(folder: Path) -> Path:
    draw(folder)
    lines = [f"{name}#{number}\t{text}" for name, texts in CAPTIONS.items() for number, text in enumerate(texts)]
    file = folder / "Flickr8k.token.txt"
    file.write_text("\n".join(lines) + "\n")
    (folder / "train.txt").write_text("b.jpg\n")
    return file


def write_metadata(folder: Path) -> Path:
    draw(folder)
    rows = [
        {"file_name": "a.jpg", "captions": CAPTIONS["a.jpg"], "split": "train"},
        {"file_name": "b.jpg", "text": CAPTIONS["b.jpg"][0], "split": "dev"},
        {"file_name": "b.jpg", "captions": [], "split": "dev"},
    ]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize("write", [write_coco, write_karpathy, write_flickr, write_metadata])
def test_every_form_gives_the_same_captions(write, tmp_path: Path):
    found = read_captions(write(tmp_path))
    assert {picture.file.name: picture.captions for picture in found} == CAPTIONS
    assert len({picture.image_id for picture in found}) == 2 and all(picture.file.is_file() for picture in found)
    assert all_captions(found) == ["A dog .", "The dog runs", "A cat"]


def test_numbers_of_pictures_are_the_files_own(tmp_path: Path):
    assert [picture.image_id for picture in read_coco_captions(write_coco(tmp_path))] == [7, 3]
    (tmp_path / "pictures").mkdir()
    moved = read_coco_captions(tmp_path / "captions.json", tmp_path / "pictures")
    assert moved[1] == CaptionedPicture(tmp_path / "pictures" / "b.jpg", 3, ("A cat",))


def test_splits(tmp_path: Path):
    karpathy = write_karpathy(tmp_path / "karpathy")
    for split, count in (("train", 1), ("restval", 1), ("train+restval", 2), (None, 2)):
        assert len(read_captions(karpathy, split)) == count
    flickr = write_flickr(tmp_path / "flickr")
    [found] = read_captions(flickr, str(tmp_path / "flickr" / "train.txt"))
    assert found.captions == ("A cat",)
    metadata = write_metadata(tmp_path / "metadata")
    [found] = read_captions(metadata, "dev")
    assert found == CaptionedPicture(metadata / "b.jpg", 0, ("A cat",))
    with pytest.raises(ValueError, match="split test: expected pictures with captions, got none"):
        read_karpathy(karpathy, "test")
    with pytest.raises(ValueError, match="split: expected none for one file of COCO"):
        read_captions(write_coco(tmp_path / "coco"), "train")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"file_name": "a.jpg", "captions": [" "]}, "line 4: expected a caption as a text that is not empty"),
        ({"file_name": "a.jpg", "captions": [3]}, "line 4: expected a caption as a text"),
        ({"file_name": "a.jpg", "captions": 3}, "line 4: expected at least one caption, got 3"),
        ({"file_name": "a.jpg", "text": "half \ud800"}, "line 4: expected a caption in valid Unicode"),
        ({"file_name": "../a.jpg", "text": "a"}, "line 4: expected a picture inside of"),
    ],
)
def test_metadata_of_another_form(tmp_path: Path, row: dict, message: str):
    file = write_metadata(tmp_path) / "metadata.jsonl"
    file.write_text(file.read_text() + json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=message):
        read_metadata_captions(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "expected JSON"),
        ("{}", "expected Karpathy's images with sentences, got KeyError"),
        ('{"annotations": 3}', "expected COCO's images and annotations with captions"),
        ('{"annotations": [], "images": []}', "expected pictures with captions, got none"),
        ('{"images": [{"imgid": 1, "filename": "a.jpg", "sentences": []}]}', "expected at least one caption, got"),
        ('{"images": [{"imgid": 1, "filename": "../../a.jpg", "sentences": [{"raw": "a"}]}]}', "picture inside of"),
        ('{"annotations": [{"image_id": 1}], "images": []}', "got KeyError"),
    ],
)
def test_json_of_another_form(tmp_path: Path, content: str, message: str):
    file = tmp_path / "captions.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=f"captions.json.*{message}"):
        read_captions(file)


def test_what_cannot_be_read_at_all(tmp_path: Path):
    file = write_flickr(tmp_path)
    file.write_text("a.jpg\tA dog\n")
    with pytest.raises(ValueError, match="line 1: expected a picture, #, a number, a tab and a caption"):
        read_flickr8k(file)
    with pytest.raises(ValueError, match="expected a folder, a .json, .jsonl or .txt file"):
        read_captions(tmp_path / "a.csv")
    (tmp_path / "a.jpg").unlink()
    with pytest.raises(ValueError, match="expected 2 pictures, got none for 1 of them, such as .*a.jpg"):
        read_captions(write_coco_without_pictures(tmp_path))


def write_coco_without_pictures(folder: Path) -> Path:
    file = write_coco(folder)
    (folder / "a.jpg").unlink()
    return file


@pytest.mark.skipif(
    not (SHARED / "data" / "flickr8k").is_dir(),
    reason="needs the data sets in shared/data beside the project: run it where they are",
)
def test_flickr8k_as_it_is():
    found = read_captions(SHARED / "data" / "flickr8k", "dev")
    assert len(found) == 1000 and all(len(picture.captions) == 5 for picture in found)
