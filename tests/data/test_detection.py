"""Pictures with boxes: four kinds of files, one form; every fault found, counted, and healed or refused."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from transformers_florence.data.detection import (
    FAULTS,
    DetectionSet,
    RawAnnotations,
    RawObject,
    RawPicture,
    picture_size,
    validate_annotations,
)
from transformers_florence.data.detection_readers import (
    read_annotations,
    read_coco,
    read_metadata,
    read_voc,
    read_yolo,
)

SHARED = Path(__file__).parents[3] / "shared"
WIDTH, HEIGHT = 40, 20
NAMES = ["bird", "cat"]
# Left, top, right, bottom in pixels: one object of each class in a.png, none in b.png.
OBJECTS = {"a.png": [("cat", (4.0, 2.0, 14.0, 18.0)), ("bird", (20.0, 0.0, 40.0, 5.0))], "b.png": []}


def draw(folder: Path, *names: str, size: tuple[int, int] = (WIDTH, HEIGHT)) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names or OBJECTS:
        Image.new("RGB", size, "teal").save(folder / name)


def left_top_width_height(box: tuple[float, ...]) -> list[float]:
    return [box[0], box[1], box[2] - box[0], box[3] - box[1]]


def write_coco(folder: Path) -> Path:
    draw(folder)
    ids = {"bird": 3, "cat": 7}
    rows = [
        {"id": number, "image_id": image, "category_id": ids[name], "bbox": left_top_width_height(box)}
        for image, objects in enumerate(OBJECTS.values(), start=10)
        for number, (name, box) in enumerate(objects)
    ]
    content = {
        "images": [
            {"id": image, "file_name": name, "width": WIDTH, "height": HEIGHT}
            for image, name in enumerate(OBJECTS, start=10)
        ],
        "annotations": rows,
        "categories": [{"id": ids[name], "name": name} for name in ("cat", "bird")],
    }
    file = folder / "instances.json"
    file.write_text(json.dumps(content))
    return file


def write_voc(folder: Path) -> Path:
    draw(folder / "JPEGImages")
    (folder / "Annotations").mkdir()
    for name, objects in OBJECTS.items():
        inner = "".join(
            f"<object><name>{label}</name><bndbox><xmin>{box[0] + 1:g}</xmin><ymin>{box[1] + 1:g}</ymin>"
            f"<xmax>{box[2]:g}</xmax><ymax>{box[3]:g}</ymax></bndbox></object>"
            for label, box in objects
        )
        size = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height><depth>3</depth></size>"
        text = f"<annotation><filename>{name}</filename>{size}{inner}</annotation>"
        (folder / "Annotations" / name).with_suffix(".xml").write_text(text)
    return folder


def write_yolo(folder: Path) -> Path:
    draw(folder / "images" / "train")
    (folder / "labels" / "train").mkdir(parents=True)
    lines = [
        f"{NAMES.index(name)} {(box[0] + box[2]) / 2 / WIDTH} {(box[1] + box[3]) / 2 / HEIGHT} "
        f"{(box[2] - box[0]) / WIDTH} {(box[3] - box[1]) / HEIGHT}"
        for name, box in OBJECTS["a.png"]
    ]
    (folder / "labels" / "train" / "a.txt").write_text("\n".join(lines))
    (folder / "data.yaml").write_text("path: .\ntrain: images/train\nnames: {0: bird, 1: cat}\n")
    return folder / "data.yaml"


def write_metadata(folder: Path) -> Path:
    draw(folder)
    rows = [
        {
            "file_name": name,
            "split": "train",
            "boxes": [{"label": label, "bbox": left_top_width_height(box)} for label, box in objects],
        }
        for name, objects in OBJECTS.items()
    ]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


WRITERS = {"coco": write_coco, "voc": write_voc, "yolo": write_yolo, "metadata": write_metadata}


def check_objects(found: DetectionSet) -> None:
    """Those of OBJECTS, and nothing else."""
    assert found.names == NAMES
    assert [picture.file.name for picture in found.pictures] == list(OBJECTS)
    for picture, objects in zip(found.pictures, OBJECTS.values(), strict=True):
        assert picture.size == (HEIGHT, WIDTH)
        assert [found.names[label] for label in picture.labels] == [name for name, _ in objects]
        wanted = torch.tensor([box for _, box in objects], dtype=torch.float64).reshape(-1, 4)
        assert_close(picture.boxes, wanted, atol=1e-9, rtol=0)
        assert not picture.crowd.any()


# One form


@pytest.mark.parametrize("form", WRITERS)
def test_every_form_gives_the_same_pixels(form: str, tmp_path: Path):
    found = validate_annotations(read_annotations(WRITERS[form](tmp_path)), "raise")
    check_objects(found)
    assert found.report.counts == {} and found.report.objects == (2, 2) and found.report.pictures == (2, 2)


def test_metadata_in_the_columns_of_imagefolder(tmp_path: Path):
    draw(tmp_path)
    rows = [
        {
            "file_name": name,
            "objects": {
                "bbox": [left_top_width_height(box) for _, box in objects],
                "categories": [label for label, _ in objects],
            },
        }
        for name, objects in OBJECTS.items()
    ]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    check_objects(validate_annotations(read_metadata(tmp_path), "raise"))


def test_a_polygon_of_yolo_becomes_its_box(tmp_path: Path):
    file = write_yolo(tmp_path)
    (tmp_path / "labels" / "train" / "b.txt").write_text("1 0.5 0.25 0.25 0.5 0.75 0.75\n")
    found = validate_annotations(read_yolo(file), "raise")
    assert found.pictures[1].boxes.tolist() == [[10.0, 5.0, 30.0, 15.0]]


def test_the_layout_that_roboflow_exports(tmp_path: Path):
    """`../train/images` beside `train`, and the validation split under the key `val` in the folder `valid`."""
    write_yolo(tmp_path / "old")
    for split in ("train", "valid"):
        (tmp_path / "new" / split).mkdir(parents=True)
        for kind in ("images", "labels"):
            (tmp_path / "old" / kind / "train").rename(tmp_path / "new" / split / kind)
        if split == "train":
            write_yolo(tmp_path / "old2")
            (tmp_path / "old").rename(tmp_path / "used")
            (tmp_path / "old2").rename(tmp_path / "old")
    file = tmp_path / "new" / "data.yaml"
    file.write_text("train: ../train/images\nval: ../valid/images\nnc: 2\nnames: ['bird', 'cat']\n")
    for split in ("train", "val", "valid", "validation"):
        check_objects(validate_annotations(read_annotations(tmp_path / "new", split), "raise"))


def test_splits_by_rows_folders_and_lists(tmp_path: Path):
    rows = write_metadata(tmp_path / "rows") / "metadata.jsonl"
    rows.write_text(rows.read_text() + json.dumps({"file_name": "a.png", "split": "val", "boxes": []}) + "\n")
    assert len(read_annotations(rows.parent).pictures) == 3
    assert len(read_annotations(rows.parent, "train").pictures) == 2
    assert len(read_annotations(rows.parent, "valid").pictures) == 1
    with pytest.raises(ValueError, match=r"split test, got the splits \['train', 'val'\]"):
        read_annotations(rows.parent, "test")
    write_coco(tmp_path / "coco" / "valid").rename(tmp_path / "coco" / "valid" / "_annotations.coco.json")
    assert len(read_annotations(tmp_path / "coco", "validation").pictures) == 2
    lists = write_voc(tmp_path / "voc") / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (lists / "val.txt").write_text("b\n")
    assert [picture.file.name for picture in read_voc(tmp_path / "voc", "val").pictures] == ["b.png"]


def test_difficult_objects_of_voc_are_neither_learnt_nor_to_be_found(tmp_path: Path):
    file = write_voc(tmp_path) / "Annotations" / "a.xml"
    before = read_voc(tmp_path).pictures[0].objects
    text = file.read_text().replace("</name>", "</name><difficult>0</difficult>")
    file.write_text(text.replace("<difficult>0</difficult>", "<difficult>1</difficult>", 1))
    found = read_voc(tmp_path)
    assert [each.crowd for each in found.pictures[0].objects] == [True] + [False] * (len(before) - 1)
    assert [each.box for each in found.pictures[0].objects] == [each.box for each in before]
    picture = validate_annotations(found).pictures[0]
    assert picture.crowd.tolist()[0] and picture.coco()["annotations"][0]["iscrowd"] == 1
    file.write_text(text.replace("<difficult>0", "<difficult>yes"))
    with pytest.raises(ValueError, match="expected an annotation of Pascal VOC"):
        read_voc(tmp_path)


def test_corners_of_voc_without_the_shift(tmp_path: Path):
    found = read_voc(write_voc(tmp_path), one_based=False)
    assert found.pictures[0].objects[0].box == (5.0, 3.0, 14.0, 18.0)


def test_ids_of_coco_become_numbers_without_gaps(tmp_path: Path):
    found = validate_annotations(read_coco(write_coco(tmp_path)), "raise")
    assert found.report.id_gaps == [4, 5, 6] and found.pictures[0].labels.tolist() == [1, 0]
    assert "4, 5, 6" in str(found.report)


def test_a_crowd_stays_a_crowd(tmp_path: Path):
    file = write_coco(tmp_path)
    content = json.loads(file.read_text())
    content["annotations"][1]["iscrowd"] = 1
    file.write_text(json.dumps(content))
    picture = validate_annotations(read_coco(file), "raise").pictures[0]
    assert picture.crowd.tolist() == [False, True]
    assert picture.coco() == {
        "image_id": 0,
        "annotations": [
            {"bbox": [4.0, 2.0, 10.0, 16.0], "category_id": 1, "iscrowd": 0},
            {"bbox": [20.0, 0.0, 20.0, 5.0], "category_id": 0, "iscrowd": 1},
        ],
    }


# Faults


def faulty(tmp_path: Path) -> tuple[RawAnnotations, dict[str, int]]:
    """A set with every fault, and how many of each."""
    draw(tmp_path, "a.png", "tall.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    nan, inf = float("nan"), float("inf")
    boxes = {
        "sound": [(0.0, 0.0, 40.0, 20.0), (-1.0, 3.0, 41.0, 21.0)],  # the second one by rounding
        "not_finite": [(nan, 0.0, 5.0, 5.0), (0.0, 0.0, inf, 5.0)],
        "negative_size": [(9.0, 1.0, 5.0, 5.0)],
        "zero_area": [(5.0, 1.0, 5.0, 5.0)],
        "outside": [(50.0, 1.0, 60.0, 5.0), (-9.0, 1.0, 0.0, 5.0)],
        "beyond_edge": [(30.0, 10.0, 45.0, 20.0), (-2.0, -3.0, 6.0, 7.0), (0.0, 0.0, 40.0, 22.0)],
    }
    objects = [RawObject("cat", box) for group in boxes.values() for box in group]
    objects += [RawObject("dog", (1.0, 1.0, 5.0, 5.0)), RawObject(None, (1.0, 1.0, nan, 5.0))]
    pictures = [
        RawPicture(tmp_path / "a.png", (HEIGHT, WIDTH), objects),
        RawPicture(tmp_path / "tall.png", (WIDTH, HEIGHT), [RawObject("cat", (1.0, 1.0, 5.0, 5.0))]),
        RawPicture(tmp_path / "broken.png", None, [RawObject("cat", (1.0, 1.0, 5.0, 5.0))]),
        RawPicture(tmp_path / "missing.png", None, []),
    ]
    counts = {kind: len(group) for kind, group in boxes.items() if kind != "sound"}
    counts |= {"orphan": 1, "no_picture": 2, "wrong_size": 1, "unknown_class": 2}
    return RawAnnotations(NAMES, pictures, [], ["annotation 9 of picture 4"]), counts


@pytest.mark.parametrize("mode", ["clip", "drop"])
def test_every_fault_is_counted_once(mode: str, tmp_path: Path):
    raw, counts = faulty(tmp_path)
    found = validate_annotations(raw, mode)
    assert set(counts) == set(FAULTS) and found.report.counts == counts
    assert found.report.pictures == (1, 4) and found.report.objects[1] == 16
    kept = [[0.0, 0.0, 40.0, 20.0], [0.0, 3.0, 40.0, 20.0]]
    if mode == "clip":
        kept += [[30.0, 10.0, 40.0, 20.0], [0.0, 0.0, 6.0, 7.0], [0.0, 0.0, 40.0, 20.0]]
    assert found.pictures[0].boxes.tolist() == kept
    assert found.report.objects[0] == len(kept)


def test_raising_names_every_fault_and_where(tmp_path: Path):
    raw, counts = faulty(tmp_path)
    with pytest.raises(ValueError, match="without a fault") as caught:
        validate_annotations(raw, "raise")
    text = str(caught.value)
    assert all(f"{count} x {kind}" in text for kind, count in counts.items())
    assert "tall.png (40x20, annotated as 20x40)" in text and "a.png object 4" in text


def test_other_names_than_the_files_make_other_classes_unknown(tmp_path: Path):
    found = validate_annotations(read_coco(write_coco(tmp_path)), names=["cat", "dog"])
    assert found.report.counts == {"unknown_class": 1}
    assert found.names == ["cat", "dog"] and found.pictures[0].labels.tolist() == [0]


def test_a_picture_on_its_side_has_the_size_that_it_is_seen_in(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "a.jpg", exif=exif)
    assert picture_size(tmp_path / "a.jpg") == (WIDTH, HEIGHT)


def test_ids_that_names_skip_are_unknown_classes(tmp_path: Path):
    file = write_yolo(tmp_path)
    file.write_text(file.read_text().replace("1: cat", "2: cat"))
    found = validate_annotations(read_yolo(file))
    assert found.report.counts == {"unknown_class": 1} and found.report.id_gaps == [1]


# What is refused whatever the mode


def break_coco(file: Path, **changes: object) -> None:
    content = json.loads(file.read_text())
    content["annotations"][0] |= changes
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "changes",
    [
        {"bbox": [1, 2, 3]},
        {"bbox": ["1", "2", "3", "4"]},
        {"bbox": None},
        {"bbox": [True, 2, 3, 4]},
        {"bbox": [0, 0, 10**400, 5]},
        {"category_id": [1]},
        {"image_id": {}},
    ],
)
def test_annotations_of_another_form(changes: dict, tmp_path: Path):
    file = write_coco(tmp_path)
    break_coco(file, **changes)
    with pytest.raises(ValueError, match="instances.json.*expected"):
        read_coco(file)


@pytest.mark.parametrize("name", ["../a.png", "/etc/a.png", "x/../../a.png", "..\\a.png", "C:\\a.png", "", None, 3])
def test_a_picture_outside_of_the_folder(name: object, tmp_path: Path):
    draw(tmp_path, "a.png")
    folder = tmp_path / "inner"
    folder.mkdir()
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": name, "boxes": []}) + "\n")
    with pytest.raises(ValueError, match="line 1: expected"):
        read_metadata(folder)


@pytest.mark.parametrize(
    "head",
    ['<!DOCTYPE a [<!ENTITY b "c">]>', '<!DOCTYPE a SYSTEM "file:///etc/hostname">', "<!DOCTYPE annotation>"],
)
def test_xml_with_a_document_type(head: str, tmp_path: Path):
    file = write_voc(tmp_path) / "Annotations" / "a.xml"
    file.write_text(head + file.read_text())
    with pytest.raises(ValueError, match="a.xml: .*without a document type"):
        read_voc(tmp_path)


@pytest.mark.parametrize("text", ["<annotation>", "", "<annotation><object><name>cat</name></object></annotation>"])
def test_xml_of_another_form(text: str, tmp_path: Path):
    (write_voc(tmp_path) / "Annotations" / "a.xml").write_text(text)
    with pytest.raises(ValueError, match="a.xml: expected"):
        read_voc(tmp_path)


@pytest.mark.parametrize("line", ["0 0.5 0.5 0.1", "cat 0.5 0.5 0.1 0.1", "0 0.1 0.2 0.3 0.4 0.5"])
def test_lines_of_another_form(line: str, tmp_path: Path):
    file = write_yolo(tmp_path)
    (tmp_path / "labels" / "train" / "b.txt").write_text(f"\n{line}\n")
    with pytest.raises(ValueError, match=r"b.txt, line 2: expected"):
        read_yolo(file)


@pytest.mark.parametrize(
    "content", [b"", b"[1]", b"{", b"\xff\xfe{}", b'{"names": 3}', b'{"images": 1}', b"a: [", b"null"]
)
@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.yaml"])
def test_files_of_another_form(content: bytes, name: str, tmp_path: Path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}.*expected"):
        read_annotations(tmp_path / name)


def test_ids_that_are_far_apart_cost_no_memory(tmp_path: Path):
    file = write_coco(tmp_path)
    content = json.loads(file.read_text())
    content["categories"].append({"id": 10**15, "name": "elk"})
    file.write_text(json.dumps(content))
    assert read_coco(file).id_gaps[:4] == [4, 5, 6, 8]


def test_a_picture_under_the_name_of_its_xml(tmp_path: Path):
    """As after a conversion to another format; the folders have the names that such sets often give them."""
    write_voc(tmp_path)
    (tmp_path / "Annotations").rename(tmp_path / "annots")
    (tmp_path / "JPEGImages").rename(tmp_path / "images")
    for file in (tmp_path / "annots").iterdir():
        file.write_text(file.read_text().replace(".png", ".bmp"))
    check_objects(validate_annotations(read_annotations(tmp_path), "raise"))


def test_what_cannot_be_read_at_all(tmp_path: Path):
    file = write_coco(tmp_path / "coco")
    with pytest.raises(ValueError, match="expected none for one COCO file"):
        read_annotations(file, "train")
    with pytest.raises(ValueError, match="expected a folder, or a .json"):
        read_annotations(tmp_path / "a.csv")
    with pytest.raises(ValueError, match="expected XML files, got none"):
        read_annotations(tmp_path)
    with pytest.raises(ValueError, match="mode: expected one of raise, clip, drop, got 'fix'"):
        validate_annotations(read_coco(file), "fix")
    with pytest.raises(ValueError, match="names: expected different names"):
        validate_annotations(read_coco(file), names=["cat", "cat"])
    with pytest.raises(ValueError, match="expected pictures, got none"):
        validate_annotations(RawAnnotations(NAMES, [RawPicture(tmp_path / "no.png", None, [])]))


@pytest.mark.skipif(
    not (SHARED / "data").is_dir(),
    reason="needs the data sets in shared/data beside the project: run it where they are",
)
@pytest.mark.parametrize(("name", "rows", "classes"), [("det_raccoon", 160, 1), ("det_packages", 19, 1)])
def test_sets_from_the_world(name: str, rows: int, classes: int):
    found = validate_annotations(read_annotations(SHARED / "data" / name, "train"))
    assert found.report.pictures[1] == rows and len(found.names) == classes
    assert found.report.objects[0] > 0
