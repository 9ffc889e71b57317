"""Questions with answers: three forms, one list; what is refused, what is dropped and counted."""

import json
from pathlib import Path

import pytest
from PIL import Image

from transformers_florence.data.question_answering import (
    Question,
    answerable,
    read_easy_vqa,
    read_metadata_questions,
    read_questions,
    read_vqa,
)

SHARED = Path(__file__).parents[3] / "shared"
ANSWERS = ["red"] * 6 + ["dark red"] * 3 + [""]


def draw(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("RGB", (8, 8), "teal").save(folder / name)


def write_vqa(folder: Path, subtype: str = "val2014") -> tuple[Path, Path]:
    """VQA v2's two files, of two questions about picture 42."""
    draw(folder, "COCO_val2014_000000000042.jpg")
    questions = [
        {"image_id": 42, "question": "What color is it?", "question_id": 42000},
        {"image_id": 42, "question": "Is it red?", "question_id": 42001},
    ]
    notes = [
        {
            "question_type": kind,
            "multiple_choice_answer": answers[0],
            "answers": [
                {"answer": answer, "answer_confidence": "yes", "answer_id": number}
                for number, answer in enumerate(answers, start=1)
            ],
            "image_id": 42,
            "answer_type": answer_type,
            "question_id": number,
        }
        for number, kind, answer_type, answers in (
            (42001, "is it", "yes/no", ["yes"] * 10),
            (42000, "what color is", "other", ANSWERS),
        )
    ]
    files = folder / "questions.json", folder / "annotations.json"
    files[0].write_text(json.dumps({"data_subtype": subtype, "questions": questions}))
    files[1].write_text(json.dumps({"data_subtype": subtype, "annotations": notes}))
    return files


def write_easy(folder: Path) -> Path:
    for split, rows in {"train": [["is it red?", "yes", 1]], "test": [["what is it?", "circle", 0]]}.items():
        draw(folder / split / "images", "0.png", "1.png")
        (folder / split / "questions.json").write_text(json.dumps(rows))
    return folder


def write_metadata(folder: Path, **changes) -> Path:
    draw(folder, "a.png")
    note = {"question_id": 7, "question": "What color is it?", "answers": ANSWERS, "answer_type": "other"} | changes
    rows = [{"file_name": "a.png", "split": "train", "vqa": [note]}, {"file_name": "a.png", "split": "dev"}]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_official_files(tmp_path: Path):
    questions, annotations = write_vqa(tmp_path)
    found = read_questions(questions, annotations=annotations)
    file = tmp_path / "COCO_val2014_000000000042.jpg"
    assert found == [
        Question(file, 42000, "What color is it?", tuple(ANSWERS), "red", "other", "what color is"),
        Question(file, 42001, "Is it red?", ("yes",) * 10, "yes", "yes/no", "is it"),
    ]


def test_a_test_split_has_questions_only(tmp_path: Path):
    questions, _ = write_vqa(tmp_path, subtype="test-dev2015")
    found = read_vqa(questions, images=tmp_path / "pictures")
    assert found[1] == Question(tmp_path / "pictures" / "COCO_test2015_000000000042.jpg", 42001, "Is it red?")


def test_easy_vqa_wherever_it_lies(tmp_path: Path):
    write_easy(tmp_path / "site" / "easy_vqa" / "data")
    for folder in ("site", "site/easy_vqa", "site/easy_vqa/data"):
        data = tmp_path / "site" / "easy_vqa" / "data"
        [train] = read_questions(tmp_path / folder, "train")
        assert train == Question(data / "train/images/1.png", 0, "is it red?", ("yes",) * 10, "yes", "yes/no")
        [test] = read_easy_vqa(tmp_path / folder, "test")
        assert test == Question(data / "test/images/0.png", 0, "what is it?", ("circle",) * 10, "circle", "other")


@pytest.mark.parametrize(
    ("changes", "answers", "major"),
    [
        ({}, tuple(ANSWERS), "red"),
        ({"answer": "dark red"}, tuple(ANSWERS), "dark red"),
        ({"answers": None, "answer": "red"}, ("red",) * 10, "red"),
        ({"answers": ["red"]}, ("red",) * 10, "red"),
        ({"answers": []}, (), ""),
    ],
)
def test_metadata(tmp_path: Path, changes: dict, answers: tuple, major: str):
    [found] = read_questions(write_metadata(tmp_path, **changes), "train")
    assert found == Question(tmp_path / "a.png", 7, "What color is it?", answers, major, "other")


def test_answers_outside_of_the_vocabulary_are_dropped_and_counted():
    questions = [
        Question(Path("a.png"), 0, "?", ("The red",) * 7 + ("pink",) * 3),
        Question(Path("a.png"), 1, "?", ("pink",) * 10),
        Question(Path("a.png"), 2, "?", ("blue",) * 10),
    ]
    found = answerable(questions, {"red": 0, "blue": 1})
    assert [question.question_id for question in found.questions] == [0, 2]
    assert (found.dropped, found.lost) == (1, 13)
    assert str(found) == "2 of 3 questions kept, 13 answers are outside of the vocabulary"
    with pytest.raises(ValueError, match="expected questions with an answer of the vocabulary, got 3 without one"):
        answerable(questions, {"green": 0})


def edit(file: Path, key: str, number: int, **changes) -> None:
    content = json.loads(file.read_text())
    content[key][number] |= changes
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"question": " "}, "question 42000: expected a question as a text that is not empty, got ' '"),
        ({"question": "is it \ud800?"}, "question 42000: expected a question in valid Unicode"),
        ({"question": None}, "expected a question as a text that is not empty, got None"),
        ({"question_id": 5}, "question 5: expected its annotation in .*annotations.json, got none"),
        ({"question_id": 42001}, "expected different numbers of questions, got equal ones"),
        ({"image_id": 43}, "question 42000: expected its annotation .* got none about its picture"),
        ({"image_id": None}, "expected VQA's questions and annotations, got TypeError"),
        ({"question_id": []}, "expected VQA's questions and annotations, got TypeError"),
    ],
)
def test_questions_of_another_form(tmp_path: Path, changes: dict, message: str):
    questions, annotations = write_vqa(tmp_path)
    edit(questions, "questions", 0, **changes)
    with pytest.raises(ValueError, match=message):
        read_vqa(questions, annotations)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answers": []}, "question 42001: expected a list of answers, got"),
        ({"answers": "yes"}, "expected a list of answers, got 'yes'"),
        ({"answers": [{"answer": 3}]}, "expected an answer as a text that is not empty, got 3"),
        ({"multiple_choice_answer": ""}, "expected multiple_choice_answer as a text that is not empty"),
    ],
)
def test_annotations_of_another_form(tmp_path: Path, changes: dict, message: str):
    questions, annotations = write_vqa(tmp_path)
    edit(annotations, "annotations", 0, **changes)
    with pytest.raises(ValueError, match=message):
        read_vqa(questions, annotations)


@pytest.mark.parametrize("content", ["[]", "{}", "null", "{", '{"questions": 3}', '{"questions": []}'])
def test_files_of_another_form(tmp_path: Path, content: str):
    file = tmp_path / "questions.json"
    file.write_text(content)
    with pytest.raises(ValueError, match="questions.json: expected"):
        read_vqa(file)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([["is it red?", "yes"]], "question 0: expected question, answer and number of a picture, got"),
        ([["is it red?", "yes", "../0"]], "expected question, answer and number of a picture"),
        ([3], "expected question, answer and number of a picture, got 3"),
        ([["", "yes", 0]], "question 0: expected a question as a text"),
        ([["is it red?", 1, 0]], "question 0: expected an answer as a text"),
        ([], "expected questions, got none"),
    ],
)
def test_easy_vqa_of_another_form(tmp_path: Path, rows: list, message: str):
    (write_easy(tmp_path) / "train" / "questions.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match=message):
        read_easy_vqa(tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 3: expected JSON"),
        ("[1]", "line 3: expected a row with file_name, got"),
        ('{"file_name": "../a.png"}', "line 3: expected a picture inside of"),
        ('{"vqa": []}', "line 3: expected the name of a picture, got None"),
        ('{"file_name": "a.png", "vqa": [{"answer": "red"}]}', r"line 3: expected a row with vqa.*KeyError"),
        (
            '{"file_name": "a.png", "vqa": [{"question": "", "answer": "red"}]}',
            "line 3: expected a question as a text",
        ),
        ('{"file_name": "a.png", "vqa": ["is it?"]}', "line 3: expected a row with vqa"),
    ],
)
def test_metadata_of_another_form(tmp_path: Path, line: str, message: str):
    file = write_metadata(tmp_path) / "metadata.jsonl"
    file.write_text(file.read_text() + line + "\n")
    with pytest.raises(ValueError, match=message):
        read_metadata_questions(tmp_path)


def test_what_cannot_be_read_at_all(tmp_path: Path):
    questions, annotations = write_vqa(tmp_path / "vqa")
    with pytest.raises(ValueError, match="split: expected none for one file of VQA, as it holds one split"):
        read_questions(questions, "train", annotations=annotations)
    with pytest.raises(ValueError, match="expected a folder, a .json or a .jsonl file, got"):
        read_questions(tmp_path / "a.csv")
    with pytest.raises(ValueError, match="expected train/questions.json of easy-VQA there or in easy_vqa/data"):
        read_questions(tmp_path)
    with pytest.raises(ValueError, match="expected 1 pictures, got none for 1 of them, such as .*_000000000042.jpg"):
        read_questions(questions, annotations=annotations, images=tmp_path)
    write_metadata(tmp_path / "rows")
    with pytest.raises(ValueError, match="split dev: expected questions, got none"):
        read_questions(tmp_path / "rows", "dev")
    (tmp_path / "rows" / "metadata.jsonl").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="expected UTF-8"):
        read_questions(tmp_path / "rows")


@pytest.mark.skipif(
    not (SHARED / "data" / "coco_mini").is_dir(),
    reason="needs the data sets in shared/data beside the project: run it where they are",
)
def test_real_questions_of_vqa():
    found = read_questions(SHARED / "data" / "coco_mini")
    assert len(found) == 102 and all(len(question.answers) == 10 for question in found)
    assert {question.answer_type for question in found} == {"yes/no", "number", "other"}
