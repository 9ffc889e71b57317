"""VQA's accuracy against a slow loop over annotators, and the way from a model's outputs to it."""

import random
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.oracles import randomize
from tests.tiny_fusion import ANSWERS, tiny_fusion_config, tiny_fusion_processor
from transformers_florence.data.answers import normalize_answer
from transformers_florence.data.question_answering import Question, read_questions
from transformers_florence.evaluation.question_answering import (
    evaluate_question_answering,
    predict_answers,
    score_answers,
    vqa_accuracy,
)
from transformers_florence.modeling_florence_fusion_heads import FlorenceForQuestionAnswering

SHARED = Path(__file__).parents[3] / "shared"


def slow_accuracy(answer: str, annotated: list[str]) -> float:
    """As the metric's page describes it: the mean over all choices of nine of the ten annotators."""
    if len(set(annotated)) > 1:
        answer, annotated = normalize_answer(answer), [normalize_answer(each) for each in annotated]
    values = []
    for left_out in range(len(annotated)):
        others = [each for number, each in enumerate(annotated) if number != left_out]
        values.append(min(1, others.count(answer) / 3))
    return sum(values) / len(values)


def test_accuracy_is_the_mean_over_annotators_left_out():
    generator = random.Random(0)
    pool = ["yes", "no", "The dog", "dog", "two", "2", "dont", "don't", "U.S.", "us"]
    for _ in range(300):
        said = generator.sample(pool, 3)
        annotated = [generator.choice(said) for _ in range(10)]
        answer = generator.choice(pool)
        assert vqa_accuracy(answer, annotated) == pytest.approx(slow_accuracy(answer, annotated), abs=1e-12)


@pytest.mark.parametrize(
    ("answer", "annotated", "expected"),
    [
        ("no", ["yes"] * 8 + ["no"] * 2, 0.6),  # both are worked out by the metric's author
        ("yes", ["yes"] * 8 + ["no"] * 2, 1.0),
        ("The two!", ["2"] * 9 + ["three"], 1.0),
        ("The two!", ["2"] * 10, 0.0),  # annotators who agree are taken by the letter
        ("2", ["2"] * 10, 1.0),
        ("a dog", ["cat"] * 9 + ["dog"], 0.3),
    ],
)
def test_accuracies_worked_by_hand(answer: str, annotated: list[str], expected: float):
    assert vqa_accuracy(answer, annotated) == pytest.approx(expected)


def question(number: int, *answers: str, answer_type: str = "", question_type: str = "") -> Question:
    return Question(Path("a.png"), number, "?", answers, answers[0] if answers else "", answer_type, question_type)


def test_scores_of_all_and_by_kind():
    questions = [
        question(1, *["yes"] * 10, answer_type="yes/no", question_type="is it"),
        question(2, *["red"] * 8, *["pink"] * 2, answer_type="other", question_type="what color"),
        question(3, *["2"] * 10, answer_type="number"),
    ]
    scores = score_answers({1: "yes", 2: "pink", 3: "3", 4: "of no question"}, questions)
    assert scores.accuracy == pytest.approx(1.6 / 3) and scores.questions == 3
    assert scores.by_answer_type == {"yes/no": (1, 1), "other": (pytest.approx(0.6), 1), "number": (0, 1)}
    assert scores.by_question_type == {"is it": (1, 1), "what color": (pytest.approx(0.6), 1)}
    assert scores.table().splitlines() == [
        "answers  questions  accuracy",
        "number           1      0.00",
        "other            1     60.00",
        "yes/no           1    100.00",
        "all              3     53.33",
    ]


def test_what_cannot_be_scored():
    with pytest.raises(ValueError, match="expected an answer to each of at least one question, got no question"):
        score_answers({}, [])
    with pytest.raises(ValueError, match="got none for 2, the first 1"):
        score_answers({3: "yes"}, [question(number, "yes") for number in (1, 2, 3)])
    with pytest.raises(ValueError, match="expected the answers of annotators, got none"):
        score_answers({1: "yes"}, [question(1)])


@pytest.fixture
def asked(tmp_path: Path) -> list[Question]:
    """Three questions about one picture and one about another, in a mixed order."""
    for name, color in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (32, 32), color).save(tmp_path / name)
    texts = ["a?", "is it red?", "what is this thing?", "or not?"]
    return [
        Question(tmp_path / ("b.png" if number == 1 else "a.png"), number, text, ("yes",) * 10, "yes")
        for number, text in enumerate(texts)
    ]


@torch.no_grad()
def test_a_batch_answers_as_single_questions_do_and_sees_each_picture_once(asked):
    model = randomize(FlorenceForQuestionAnswering(tiny_fusion_config())).eval()
    processor = tiny_fusion_processor()
    inputs = [processor(images=str(each.file), text=each.text, return_tensors="pt") for each in asked]
    logits = torch.cat([model(**each).logits for each in inputs])
    model.classifier[-1].bias -= logits.mean(dim=0)  # no answer is the best whatever is asked
    expected = {row: ANSWERS[number] for row, number in enumerate((logits - logits.mean(dim=0)).argmax(1).tolist())}
    assert len(set(expected.values())) > 1
    seen = []
    model.image_tower.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    for batch_size in (1, 2, 5):
        assert predict_answers(model, processor, asked, batch_size=batch_size) == expected
    assert seen == [1, 1, 2, 2]
    model.train()
    scores = evaluate_question_answering(model, processor, asked)
    assert scores.accuracy == sum(answer == "yes" for answer in expected.values()) / 4 and model.training


@pytest.mark.skipif(
    not (SHARED / "data" / "coco_mini").is_dir(),
    reason="needs the data sets in shared/data beside the project: run it where they are",
)
def test_real_questions_of_vqa_through_every_step():
    """Who answers as most annotators did scores high; who always answers yes, as a quarter of the questions want."""
    questions = read_questions(SHARED / "data" / "coco_mini")
    best = score_answers({each.question_id: each.major for each in questions}, questions)
    assert 0.85 < best.accuracy <= 1
    yes = score_answers({each.question_id: "Yes" for each in questions}, questions)
    slow = [slow_accuracy("Yes", list(each.answers)) for each in questions]
    assert yes.accuracy == pytest.approx(sum(slow) / len(slow))
    assert yes.by_answer_type["number"][0] < 0.05
