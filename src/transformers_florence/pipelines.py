"""Pipelines for tasks that transformers 5 no longer has: questions about pictures."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoModelForVisualQuestionAnswering, Pipeline
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.utils import logging

logger = logging.get_logger(__name__)

VISUAL_QUESTION_ANSWERING = "florence-visual-question-answering"  # transformers refuses the name without a prefix
DEFAULT_TOP_K = 5


def check_question(question: Any) -> str:
    """The question, if a tokenizer can read it.

    Raises:
        ValueError: no text, nothing but white space, or half of a surrogate pair, which is no Unicode text.
    """
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"expected a question as a text that is not empty, got {question!r}")
    try:
        question.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"expected a question in valid Unicode, got {question!r}: {error}") from error
    return question


def pair_up(pictures: Any, questions: Any) -> Any:
    """Pictures and questions as the dictionaries that the pipeline works on.

    One of either goes with all of the other; two lists go together one by one.

    Returns:
        One dictionary for one picture and one question, else a list of them.

    Raises:
        ValueError: lists of different lengths, or empty ones.
    """
    if not isinstance(pictures, list | tuple) and not isinstance(questions, list | tuple):
        return {"image": pictures, "question": questions}
    counts = [len(part) for part in (pictures, questions) if isinstance(part, list | tuple)]
    if 0 in counts or len(set(counts)) != 1:
        raise ValueError(f"expected as many pictures as questions, or one of either, got {counts}")
    pictures = pictures if isinstance(pictures, list | tuple) else [pictures] * counts[0]
    questions = questions if isinstance(questions, list | tuple) else [questions] * counts[0]
    return [{"image": image, "question": question} for image, question in zip(pictures, questions, strict=True)]


class FlorenceVisualQuestionAnsweringPipeline(Pipeline):
    """Answers questions about pictures out of the model's vocabulary, with scores.

    What users type is text: special tokens in it have no effect. Questions that are too long are cut, with one
    warning; they keep their end token.

    Example:
        >>> pipe = pipeline("florence-visual-question-answering", model="folder")
        >>> pipe("kitchen.jpg", "How many chairs are there?", top_k=2)
        [{'score': 0.91, 'answer': '2'}, {'score': 0.08, 'answer': '3'}]
    """

    _load_processor = False
    _load_image_processor = True
    _load_feature_extractor = False
    _load_tokenizer = True

    def __call__(self, image: Any, question: str | list[str] | None = None, **kwargs: Any) -> Any:
        """
        Args:
            image: a picture (path, URL, PIL image, array) or a list of them; or a dictionary with `image` and
                `question`, a list of such, or an iterable that yields them.
            question: a question or a list of them: one for every picture, or one by one.
            kwargs: `top_k`, how many answers at most (5); `batch_size`, `num_workers` of transformers.

        Returns:
            A list of dictionaries with `score`, from 0 to 1, and `answer`, best first; for many inputs a list of
            such lists.

        Raises:
            ValueError: a question that `check_question` refuses, a picture that the image processor refuses, lists
                of different lengths, a top_k below 1.
        """
        inputs = image if question is None else pair_up(image, question)
        if isinstance(inputs, list | tuple) and not inputs:
            raise ValueError("expected at least one picture with a question, got an empty list")
        return super().__call__(inputs, **kwargs)

    def _sanitize_parameters(self, top_k: int | None = None, **kwargs: Any) -> tuple[dict, dict, dict]:
        if kwargs:
            raise ValueError(f"expected no options but top_k, got {', '.join(sorted(kwargs))}")
        if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1):
            raise ValueError(f"`top_k`: expected an integer of at least 1, got {top_k!r}")
        return {}, {}, {} if top_k is None else {"top_k": top_k}

    def preprocess(self, inputs: Any) -> dict[str, torch.Tensor]:
        """A dictionary with `image` and `question` -> the model's tensors, a batch of one."""
        if not isinstance(inputs, Mapping) or not {"image", "question"} <= inputs.keys():
            got = sorted(map(str, inputs)) if isinstance(inputs, Mapping) else type(inputs).__name__
            raise ValueError(f"expected a dictionary with 'image' and 'question', or both as arguments, got {got}")
        limit = min(self.tokenizer.model_max_length, self.model.config.max_text_tokens)
        texts = self.tokenizer(
            check_question(inputs["question"]),
            truncation=True,
            max_length=limit,
            split_special_tokens=True,  # a user's "<mask>" is five letters and signs
            return_tensors="pt",
            verbose=False,
        )
        if any(encoding.overflowing for encoding in texts.encodings or ()):
            logger.warning_once(f"Questions longer than {limit} tokens are cut.")
        pictures = self.image_processor(images=inputs["image"], return_tensors="pt").to(self.dtype)
        return {**texts, **pictures}

    def _forward(self, model_inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"logits": self.model(**model_inputs).logits}

    def postprocess(self, model_outputs: dict[str, torch.Tensor], top_k: int = DEFAULT_TOP_K) -> list[dict[str, Any]]:
        """logits (1, answers) -> the best answers with their scores."""
        scores = model_outputs["logits"][0].float().sigmoid()
        best = scores.topk(min(top_k, len(scores)))
        names = self.model.config.id2label
        return [
            {"score": score, "answer": names[number]}
            for score, number in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]


def register_pipelines() -> None:
    """Tell transformers' `pipeline` about the tasks here; a second call changes nothing."""
    if VISUAL_QUESTION_ANSWERING in PIPELINE_REGISTRY.get_supported_tasks():
        return
    PIPELINE_REGISTRY.register_pipeline(
        VISUAL_QUESTION_ANSWERING,
        pipeline_class=FlorenceVisualQuestionAnsweringPipeline,
        pt_model=AutoModelForVisualQuestionAnswering,
        type="multimodal",
    )


__all__ = ["FlorenceVisualQuestionAnsweringPipeline", "register_pipelines"]
