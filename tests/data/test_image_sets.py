"""Image sets: every layout gives the pictures that were written, under the names that they belong to."""

import inspect
import json
import re

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from torchvision import datasets
from torchvision.models._meta import _IMAGENET_CATEGORIES

from transformers_florence.data.image_sets import (
    ARCHIVES,
    IMAGENET_TEMPLATES,
    ImageSet,
    benchmarks,
    read_benchmark,
    read_image_set,
)
from transformers_florence.data.prompts import fill_template


def write_picture(path, shade: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((4, 4, 3), shade, np.uint8)).save(path)


def shades(found: ImageSet) -> list[tuple[int, str]]:
    """Of each picture: its grey level, and the name of its class."""
    opened = [item if isinstance(item, Image.Image) else Image.open(item) for item in found.pictures]
    levels = [round(float(np.asarray(picture).mean())) for picture in opened]
    return [(level, found.names[label]) for level, label in zip(levels, found.labels.tolist(), strict=True)]


def write_rows(folder, rows: list[dict]) -> None:
    for row in rows:
        write_picture(folder / row["file_name"], int(row["file_name"].split(".")[0]))
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_class_folders(tmp_path):
    for shade, name in ((10, "wild_cat"), (20, "dog"), (30, "wild_cat")):
        write_picture(tmp_path / "train" / name / f"{shade}.png", shade)
    write_picture(tmp_path / "test" / "dog" / "deep" / "40.PNG", 40)
    (tmp_path / "train" / "dog" / "notes.txt").write_text("no picture")
    train = read_image_set(tmp_path, "train")
    assert shades(train) == [(20, "dog"), (10, "wild cat"), (30, "wild cat")] and train.names == ("dog", "wild cat")
    assert shades(read_image_set(tmp_path / "test")) == [(40, "dog")]
    with pytest.raises(ValueError, match="valid: no such folder"):
        read_image_set(tmp_path, "valid")
    (tmp_path / "none" / "cat").mkdir(parents=True)
    with pytest.raises(ValueError, match="got 1 without any"):
        read_image_set(tmp_path, "none")


@pytest.mark.parametrize("numbered", [True, False])
def test_metadata_gives_all_splits_the_same_numbers(tmp_path, numbered):
    rows = [
        {"file_name": "10.png", "label": "zebra", "label_id": 0, "split": "train"},
        {"file_name": "20.png", "label": "ant", "label_id": 1, "split": "train"},
        {"file_name": "30.png", "label": "ant", "label_id": 1, "split": "test"},
    ]
    write_rows(tmp_path, rows if numbered else [{k: v for k, v in row.items() if k != "label_id"} for row in rows])
    names = ("zebra", "ant") if numbered else ("ant", "zebra")
    test = read_image_set(tmp_path, "test")
    assert test.names == names and shades(test) == [(30, "ant")] and test.empty_classes() == ["zebra"]
    assert shades(read_image_set(tmp_path)) == [(10, "zebra"), (20, "ant"), (30, "ant")]
    with pytest.raises(ValueError, match=r"rows of the split 'valid', got the splits \['test', 'train'\]"):
        read_image_set(tmp_path, "valid")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"label": "cat"}, "line 2: expected the name of a picture, got None"),
        ({"file_name": "../1.png", "label": "cat", "label_id": 0}, "line 2: expected a picture inside of"),
        ({"file_name": "1.png", "label": 3, "label_id": 0}, "line 2: expected a label as text"),
        ({"file_name": "1.png", "label": "cat", "label_id": 1}, "line 2: expected label_id 0 for 'cat', got 1"),
        ({"file_name": "1.png", "label": "dog", "label_id": 0}, "expected one label_id from 0 on for each label"),
        ({"file_name": "1.png", "label": "CAT", "label_id": 1}, "expected different names, got 'CAT'"),
    ],
)
def test_metadata_that_is_refused(tmp_path, row, message):
    first = {"file_name": "1.png", "label": "cat", "label_id": 0}
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, (first, row))))
    with pytest.raises(ValueError, match=message):
        read_image_set(tmp_path)


def test_a_set_of_the_hub_by_name(tmp_path, monkeypatch):
    """`datasets` reads a folder as it reads a repository; the name is one of the current directory."""
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=["wild_cat", "dog"])})
    rows = []
    for shade, label in ((50, 1), (60, 0)):
        write_picture(tmp_path / f"{shade}.png", shade)
        rows.append({"image": {"bytes": (tmp_path / f"{shade}.png").read_bytes(), "path": None}, "label": label})
    (tmp_path / "me" / "animals").mkdir(parents=True)
    Dataset.from_list(rows, features).to_parquet(tmp_path / "me" / "animals" / "test.parquet")
    monkeypatch.chdir(tmp_path)
    found = read_image_set("datasets:me/animals")
    assert shades(found) == [(50, "dog"), (60, "wild cat")]
    rows = Dataset.from_list([{"image": 1}])
    rows.to_parquet(tmp_path / "me" / "animals" / "test.parquet")
    with pytest.raises(ValueError, match="expected columns image and label"):
        read_image_set("datasets:me/animals")


def test_an_official_archive(tmp_path):
    """DTD's lists of files, and all its classes."""
    names = benchmarks()["dtd"].names
    root = tmp_path / "dtd" / "dtd"
    (root / "labels").mkdir(parents=True)
    lines = [f"{name}/{name}_0001.jpg" for name in names]
    (root / "labels" / "test1.txt").write_text("\n".join(lines))
    for number, line in enumerate(lines):
        write_picture(root / "images" / line, 5 * number)
    found = read_image_set(f"dtd:{tmp_path}")
    assert [name for _, name in shades(found)] == list(names)
    assert [abs(shade - 5 * number) <= 1 for number, (shade, _) in enumerate(shades(found))] == [True] * len(names)
    (root / "labels" / "train1.txt").write_text(lines[0])
    with pytest.raises(ValueError, match="dtd: expected 47 classes in .*, got 1"):
        read_benchmark("dtd", tmp_path, "train")
    with pytest.raises(ValueError, match="expected food101 with the split 'test'"):
        read_benchmark("food101", tmp_path)
    with pytest.raises(ValueError, match="expected one of the sets food101, cifar10"):
        read_benchmark("mnist", tmp_path)


def test_voc_has_several_classes_a_picture(tmp_path):
    base = tmp_path / "VOCdevkit" / "VOC2007"
    names = benchmarks()["voc2007"].names
    marks = {"dog": [1, 0], "dining table": [-1, 1]}
    (base / "ImageSets" / "Main").mkdir(parents=True)
    for name in names:
        first, second = marks.get(name, [-1, -1])
        (base / "ImageSets" / "Main" / f"{name.replace(' ', '')}_test.txt").write_text(
            f"000001 {first}\n000002 {second}\n"
        )
    found = read_image_set(f"voc2007:{tmp_path}")
    assert [path.name for path in found.pictures] == ["000001.jpg", "000002.jpg"]
    for name, column in zip(names, found.labels.T.tolist(), strict=True):
        assert column == marks.get(name, [-1, -1])
    assert set(found.empty_classes()) == set(names) - {"dog", "dining table"}
    (base / "ImageSets" / "Main" / "tvmonitor_test.txt").write_text("000001 1\n000003 1\n")
    with pytest.raises(ValueError, match="tvmonitor_test.txt: expected the pictures of the other classes"):
        read_benchmark("voc2007", tmp_path)


@pytest.mark.parametrize("key", ARCHIVES)
def test_torchvision_keeps_labels_where_we_look_for_them(key):
    """Names that are not public there: a release that moves them must not go unseen."""
    make, attribute = ARCHIVES[key]
    kind = getattr(datasets, re.search(r"official\.(\w+)\(", inspect.getsource(make).split(f'"{key}"')[1])[1])
    source = "".join(inspect.getsource(base) for base in kind.__mro__[:2])
    assert f"self.{attribute} " in source or f"self.{attribute}:" in source


def test_the_twelve_sets_of_the_paper():
    counts = {"food101": 101, "cifar10": 10, "cifar100": 100, "sun397": 397, "cars": 196, "aircraft": 100}
    counts |= {"voc2007": 20, "dtd": 47, "pets": 37, "caltech101": 101, "flowers": 102, "imagenet": 1000}
    assert {key: len(benchmark.names) for key, benchmark in benchmarks().items()} == counts
    for benchmark in benchmarks().values():
        assert len(set(map(str.lower, benchmark.names))) == len(benchmark.names)
        assert all(fill_template(text, "cat").count("cat") == 1 for text in benchmark.templates)
    assert set(benchmarks()["imagenet"].templates) == set(IMAGENET_TEMPLATES) and len(IMAGENET_TEMPLATES) == 80


def test_the_names_of_imagenet_are_in_its_order():
    """Three names in four share a word with torchvision's, which have the same order; shuffled ones would not."""
    ours, theirs = benchmarks()["imagenet"].names, _IMAGENET_CATEGORIES

    def shared(one, other) -> float:
        pairs = zip(one, other, strict=True)
        return sum(bool(set(a.lower().split()) & set(b.lower().split())) for a, b in pairs) / 1000

    assert shared(ours, theirs) > 0.75 > 0.2 > shared(ours, theirs[1:] + theirs[:1])


def test_splitting_off_a_part_of_each_class():
    labels = torch.tensor([0] * 10 + [1] * 4 + [2])
    whole = ImageSet("x", list(range(15)), labels, ("a", "b", "c"))
    rest, part = whole.split_off(0.5)
    assert part.labels.bincount(minlength=3).tolist() == [5, 2, 0]
    assert sorted([*rest.pictures, *part.pictures]) == list(range(15))
    assert [labels[row] for row in part.pictures] == part.labels.tolist()
    assert list(whole.split_off(0.5, seed=1)[1].pictures) != list(part.pictures)
    with pytest.raises(ValueError, match="expected a part between 0 and 1"):
        whole.split_off(1.0)
    with pytest.raises(ValueError, match="expected classes of several pictures"):
        ImageSet("x", [0, 1], torch.tensor([0, 1]), ("a", "b")).split_off(0.5)


@pytest.mark.parametrize(
    ("pictures", "labels", "names", "message"),
    [
        ([], [], ("a",), "at least one, got 0 labels and 0 pictures"),
        ([1, 2], [0], ("a",), "got 1 labels and 2 pictures"),
        ([1], [1], ("a",), r"expected labels of 1 classes, got \(1,\) with 1 to 1"),
        ([1], [-1], ("a",), "with -1 to -1"),
        ([1], [[1, 2]], ("a", "b"), "with 1 to 2"),
        ([1], [[1, 0]], ("a",), r"got \(1, 2\)"),
        ([1], [0], ("",), "expected names that are not empty"),
        ([1], [0], "a", "expected a list of at least one class name"),
    ],
)
def test_sets_that_are_refused(pictures, labels, names, message):
    with pytest.raises(ValueError, match=message):
        ImageSet("x", pictures, torch.tensor(labels, dtype=torch.long), names)


def test_what_is_no_set_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected a folder of pictures, datasets:NAME or KEY:FOLDER"):
        read_image_set(tmp_path / "absent")
