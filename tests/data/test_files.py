"""Files at the readers' door: JSON, rows, names of pictures that stay in their folder, texts that say something."""

import json
from pathlib import Path

import pytest

from transformers_florence.data.files import check_pictures, check_text, load_json, metadata_rows, picture_inside


@pytest.mark.parametrize(
    ("name", "expected"),
    [("a.png", "a.png"), ("x/a.png", "x/a.png"), ("x\\a.png", "x/a.png"), ("./x/../a.png", "a.png")],
)
def test_names_inside(name: str, expected: str):
    assert picture_inside(Path("root"), name, "row 1") == Path("root") / expected


@pytest.mark.parametrize("name", ["../a.png", "/etc/a.png", "x/../../a.png", "..\\a.png", "C:\\a.png", "", None, 3])
def test_names_that_lead_out(name: object):
    with pytest.raises(ValueError, match="row 1: expected (a picture inside of root|the name of a picture), got"):
        picture_inside(Path("root"), name, "row 1")


def test_rows_of_a_split(tmp_path: Path):
    rows = [{"file_name": f"{number}.png", "split": split} for number, split in enumerate(("train", "dev", "train"))]
    file = tmp_path / "metadata.jsonl"
    file.write_text("\n\n".join(json.dumps(row) for row in rows))
    expected = [(f"{file}, line {line}", tmp_path / f"{row}.png", rows[row]) for line, row in ((1, 0), (5, 2))]
    for path in (file, tmp_path):
        assert list(metadata_rows(path, "train")) == expected
    assert len(list(metadata_rows(file))) == 3
    with pytest.raises(OSError, match="No such file"):
        list(metadata_rows(tmp_path / "none.jsonl"))


@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe"])
def test_no_json(tmp_path: Path, content: bytes):
    file = tmp_path / "a.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match="a.json: expected JSON, got"):
        load_json(file)
    file.write_text('{"a": [1]}')
    assert load_json(file) == {"a": [1]}


@pytest.mark.parametrize(
    ("value", "message"),
    [("", "not empty, got ''"), ("\n ", "not empty"), (3, "not empty, got 3"), ("\udc80", "valid Unicode")],
)
def test_texts(value: object, message: str):
    with pytest.raises(ValueError, match=f"row 1: expected a caption .*{message}"):
        check_text(value, "row 1", "a caption")
    assert check_text(" a\u00e9 ", "row 1", "a caption") == " a\u00e9 "


def test_missing_pictures_are_counted_once(tmp_path: Path):
    (tmp_path / "a.png").touch()
    check_pictures([tmp_path / "a.png"] * 2)
    with pytest.raises(ValueError, match="expected 3 pictures, got none for 2 of them, such as .*b.png"):
        check_pictures([tmp_path / name for name in ("c.png", "a.png", "b.png", "b.png")])
