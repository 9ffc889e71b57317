"""VQA's official accuracy, and a model's answers to questions about pictures (Florence section 3.7)."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import ProcessorMixin

from ..data.answers import agreement, normalize_together
from ..data.question_answering import Question
from ..data.texts import tokenize_texts
from ..modeling_florence_fusion_heads import FlorenceForQuestionAnswering


@dataclass(frozen=True)
class AnswerScores:
    """Accuracies, 0..1, and how many questions there are.

    Attributes:
        accuracy, questions: of all.
        by_answer_type, by_question_type: kind -> (accuracy, questions), of those kinds that the set names.
    """

    accuracy: float
    questions: int
    by_answer_type: dict[str, tuple[float, int]]
    by_question_type: dict[str, tuple[float, int]]

    def table(self) -> str:
        """Kinds of answers with their questions and accuracies in per cent, all last, as text in columns."""
        rows = [*sorted(self.by_answer_type.items()), ("all", (self.accuracy, self.questions))]
        width = max(len("answers"), *(len(name) for name, _ in rows))
        lines = [f"{'answers':<{width}}  questions  accuracy"]
        return "\n".join(lines + [f"{name:<{width}}  {count:>9}  {100 * value:8.2f}" for name, (value, count) in rows])


def vqa_accuracy(answer: str, annotated: Sequence[str]) -> float:
    """VQA's accuracy of one answer: 0, 0.3, 0.6, 0.9 or 1 for 0, 1, 2, 3 or more of ten annotators who gave it.

    Raises:
        ValueError: no annotator.
    """
    if not annotated:
        raise ValueError("expected the answers of annotators, got none")
    answer, annotated = normalize_together(answer, annotated)
    return agreement(annotated.count(answer), len(annotated))


def score_answers(predictions: Mapping[int, str], questions: Sequence[Question]) -> AnswerScores:
    """The accuracy of predicted answers.

    Args:
        predictions: number of a question -> answer; others than those of `questions` do not matter.

    Raises:
        ValueError: no question, one without annotators, or one without a prediction.
    """
    missing = [question.question_id for question in questions if question.question_id not in predictions]
    if missing or not questions:
        got = f"none for {len(missing)}, the first {missing[0]}" if missing else "no question"
        raise ValueError(f"expected an answer to each of at least one question, got {got}")
    scores: dict[tuple[str, str], list[float]] = defaultdict(list)
    for question in questions:
        value = vqa_accuracy(predictions[question.question_id], question.answers)
        for kind in {("", ""), ("answer", question.answer_type), ("question", question.question_type)}:
            scores[kind].append(value)
    means = {kind: (sum(values) / len(values), len(values)) for kind, values in scores.items()}
    by_answer, by_question = (
        {name: value for (which, name), value in means.items() if which == side and name}
        for side in ("answer", "question")
    )
    return AnswerScores(*means["", ""], by_answer, by_question)


@torch.no_grad()
def predict_answers(
    model: FlorenceForQuestionAnswering,
    processor: ProcessorMixin,
    questions: Sequence[Question],
    *,
    batch_size: int = 32,
    progress: bool = False,
) -> dict[int, str]:
    """The model's best answer to each question, in its present mode; each picture goes through the tower once.

    Args:
        batch_size: pictures at a time, with all of their questions.

    Returns:
        Number of the question -> answer of the model's vocabulary.

    Raises:
        ValueError: a picture or a question that the model refuses.
    """
    by_picture: dict[Path, list[Question]] = defaultdict(list)
    for question in questions:
        by_picture[question.file].append(question)
    pictures = list(by_picture.items())
    answers: dict[int, str] = {}
    for start in tqdm(range(0, len(pictures), batch_size), desc="answering", disable=not progress):
        part = pictures[start : start + batch_size]
        pixels = processor.image_processor([str(file) for file, _ in part], return_tensors="pt")["pixel_values"]
        asked = [(row, question) for row, (_, group) in enumerate(part) for question in group]
        texts = [question.text for _, question in asked]
        inputs = tokenize_texts(processor.tokenizer, texts, model.config.max_text_tokens).to(model.device)
        rows = torch.tensor([row for row, _ in asked], device=model.device)
        logits = model(**inputs, pixel_values=pixels.to(model.device, model.dtype), image_rows=rows).logits
        best = [model.config.id2label[number] for number in logits.argmax(dim=-1).tolist()]
        answers |= {question.question_id: answer for (_, question), answer in zip(asked, best, strict=True)}
    return answers


def evaluate_question_answering(
    model: FlorenceForQuestionAnswering,
    processor: ProcessorMixin,
    questions: Sequence[Question],
    *,
    batch_size: int = 32,
    progress: bool = False,
) -> AnswerScores:
    """VQA's accuracy of a model; it is in its former mode afterwards.

    Raises:
        ValueError: see `predict_answers` and `score_answers`.
    """
    training = model.training
    model.eval()
    try:
        predictions = predict_answers(model, processor, questions, batch_size=batch_size, progress=progress)
    finally:
        model.train(training)
    return score_answers(predictions, questions)


__all__ = [
    "AnswerScores",
    "evaluate_question_answering",
    "predict_answers",
    "score_answers",
    "vqa_accuracy",
]
