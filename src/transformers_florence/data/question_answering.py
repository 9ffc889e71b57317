"""Questions about pictures with their answers: VQA's JSON files, easy-VQA, metadata.jsonl, each to `Question`s."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .answers import ANNOTATORS, normalize_answer
from .files import check_pictures, check_text, load_json, metadata_rows

PICTURE_NAME = "COCO_{split}_{image_id:012d}.jpg"  # of VQA's pictures


@dataclass(frozen=True)
class Question:
    """One question about one picture.

    Attributes:
        file: the picture.
        question_id: its number, by which predictions and answers meet.
        text: the question.
        answers: what each annotator said; none where that is unknown, as in a test split. A set with one answer to
            each question has annotators who all agree.
        major: the answer that most of them gave, as the file has it; empty without answers.
        answer_type, question_type: kinds that scores are told by, such as "yes/no" and "what color is the"; empty if
            the set has none.
    """

    file: Path
    question_id: int
    text: str
    answers: tuple[str, ...] = ()
    major: str = ""
    answer_type: str = ""
    question_type: str = ""


@dataclass(frozen=True)
class AnswerableQuestions:
    """What can be learnt with a vocabulary.

    Attributes:
        questions: those with an answer in it.
        dropped: how many had none.
        lost: how many answers of annotators, of all questions, are outside of it.
    """

    questions: list[Question]
    dropped: int
    lost: int

    def __str__(self) -> str:
        total = len(self.questions) + self.dropped
        return f"{len(self.questions)} of {total} questions kept, {self.lost} answers are outside of the vocabulary"


def _answers(values: Any, where: str) -> tuple[str, ...]:
    """What annotators said, as texts or as dictionaries with `answer`; one answer stands for annotators who agree."""
    if not isinstance(values, Sequence) or isinstance(values, str) or not values:
        raise ValueError(f"{where}: expected a list of answers, got {values!r}")
    given = [value.get("answer") if isinstance(value, Mapping) else value for value in values]
    answers = [answer if answer == "" else check_text(answer, where, "an answer") for answer in given]
    return tuple(answers) * (ANNOTATORS if len(answers) == 1 else 1)


def _unique(questions: list[Question], where: str) -> list[Question]:
    """The questions, if there are any and their numbers differ."""
    if not questions:
        raise ValueError(f"{where}: expected questions, got none")
    if len({question.question_id for question in questions}) < len(questions):
        raise ValueError(f"{where}: expected different numbers of questions, got equal ones")
    return questions


def read_vqa(
    questions: str | os.PathLike,
    annotations: str | os.PathLike | None = None,
    images: str | os.PathLike | None = None,
    *,
    picture_name: str = PICTURE_NAME,
) -> list[Question]:
    """VQA's official files, such as `v2_OpenEnded_mscoco_train2014_questions.json`.

    Args:
        questions: the file with the questions.
        annotations: the file with their answers; None for a test split.
        images: folder of the pictures; that of `questions` if None.
        picture_name: of each picture, from the split's name (`data_subtype`; of test-dev: test) and `image_id`.

    Raises:
        ValueError: not of this form, no question, an empty one, or one without an annotation; OSError: not readable.
    """
    questions = Path(questions)
    folder = questions.parent if images is None else Path(images)
    try:
        content = load_json(questions)
        split = str(content.get("data_subtype", "")).replace("-dev", "")
        notes = [] if annotations is None else load_json(Path(annotations))["annotations"]
        known = {note["question_id"]: note for note in notes}
        found = []
        for row in content["questions"]:
            number = row["question_id"]
            where = f"{questions}, question {number}"
            text = check_text(row["question"], where, "a question")
            file = folder / picture_name.format(split=split, image_id=int(row["image_id"]))
            if annotations is None:
                found.append(Question(file, number, text))
                continue
            if number not in known or known[number]["image_id"] != row["image_id"]:
                raise ValueError(f"{where}: expected its annotation in {annotations}, got none about its picture")
            note = known[number]
            found.append(
                Question(
                    file=file,
                    question_id=number,
                    text=text,
                    answers=_answers(note["answers"], where),
                    major=check_text(note["multiple_choice_answer"], where, "multiple_choice_answer"),
                    answer_type=note.get("answer_type", ""),
                    question_type=note.get("question_type", ""),
                )
            )
    except (AttributeError, KeyError, OverflowError, TypeError) as error:
        raise ValueError(f"{questions}: expected VQA's questions and annotations, got {error!r}") from error
    return _unique(found, str(questions))


def read_easy_vqa(folder: str | os.PathLike, split: str = "train") -> list[Question]:
    """easy-VQA (Zhou, 2019): 64-pixel pictures of one shape each, thirteen answers.

    Args:
        folder: the data of the package `easy-vqa`: `easy_vqa/data`, or a folder that it lies in.
        split: "train" or "test".

    Raises:
        ValueError: no such file below the folder, or not of this form; OSError: not readable.
    """
    parts = ("", "data", "easy_vqa/data")
    files = [Path(folder) / part / split / "questions.json" for part in parts]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise ValueError(f"{folder}: expected {split}/questions.json of easy-VQA there or in easy_vqa/data, got none")
    found = []
    for number, row in enumerate(load_json(file)):
        where = f"{file}, question {number}"
        try:
            text, answer, image_id = row
            picture = file.parent / "images" / f"{int(image_id)}.png"
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: expected question, answer and number of a picture, got {row!r}") from error
        found.append(
            Question(
                file=picture,
                question_id=number,
                text=check_text(text, where, "a question"),
                answers=_answers([answer], where),
                major=answer,
                answer_type="yes/no" if answer in ("yes", "no") else "other",
            )
        )
    return _unique(found, str(file))


def read_metadata_questions(folder: str | os.PathLike, split: str | None = None) -> list[Question]:
    """A metadata.jsonl: a row a picture, with `file_name` and `vqa`, a list of questions.

    A question has `question`, and `answers` of annotators or one `answer`; or else it is of a test split. It may have
    `question_id` (its place in the file if not), `answer_type` and `question_type`. With both, `answer` is the one
    that most annotators gave.

    Args:
        folder: the file, or its folder.
        split: rows whose `split` says so; None for all.

    Raises:
        ValueError: not of this form, or no question; OSError: not readable.
    """
    found: list[Question] = []
    for where, file, row in metadata_rows(Path(folder), split):
        try:
            for note in row.get("vqa") or ():
                values = note.get("answers") or ([note["answer"]] if note.get("answer") else [])
                answers = _answers(values, where) if values else ()
                common = max(sorted(set(answers)), key=answers.count, default="")
                found.append(
                    Question(
                        file=file,
                        question_id=note.get("question_id", len(found)),
                        text=check_text(note["question"], where, "a question"),
                        answers=answers,
                        major=note.get("answer") or common,
                        answer_type=note.get("answer_type", ""),
                        question_type=note.get("question_type", ""),
                    )
                )
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"{where}: expected a row with vqa, a list of questions, got {error!r}") from error
    return _unique(found, f"{folder}, split {split}")


def read_questions(
    path: str | os.PathLike,
    split: str | None = None,
    *,
    annotations: str | os.PathLike | None = None,
    images: str | os.PathLike | None = None,
) -> list[Question]:
    """Read a set in whichever of the three forms it is.

    Args:
        path: VQA's JSON file of questions; a metadata.jsonl or its folder; or the folder of easy-VQA.
        split: "train", "test" or another; None for one file of VQA, which holds one split, and for all of
            metadata.jsonl.
        annotations, images: see `read_vqa`.

    Raises:
        ValueError: none of these, not of its form, or pictures are missing; OSError: not readable.
    """
    path = Path(path)
    if path.suffix == ".json" and split is not None:
        raise ValueError(f"split: expected none for one file of VQA, as it holds one split, got {split!r}")
    if path.suffix == ".json":
        found = read_vqa(path, annotations, images)
    elif path.suffix == ".jsonl" or (path / "metadata.jsonl").is_file():
        found = read_metadata_questions(path, split)
    elif path.is_dir():
        found = read_easy_vqa(path, split or "train")
    else:
        raise ValueError(f"expected a folder, a .json or a .jsonl file, got {path}")
    check_pictures(question.file for question in found)
    return found


def answerable(questions: Iterable[Question], numbers: Mapping[str, int]) -> AnswerableQuestions:
    """The questions that can be learnt from: those with at least one answer of the vocabulary.

    Args:
        numbers: normalised answer -> its place in the vocabulary.

    Raises:
        ValueError: there is no such question.
    """
    kept, dropped, lost = [], 0, 0
    for question in questions:
        known = sum(normalize_answer(answer) in numbers for answer in question.answers)
        lost += len(question.answers) - known
        dropped += not known
        if known:
            kept.append(question)
    if not kept:
        raise ValueError(f"expected questions with an answer of the vocabulary, got {dropped} without one")
    return AnswerableQuestions(kept, dropped, lost)


__all__ = [
    "AnswerableQuestions",
    "Question",
    "answerable",
    "read_easy_vqa",
    "read_metadata_questions",
    "read_questions",
    "read_vqa",
]
