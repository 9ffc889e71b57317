"""Fine-tune Florence with METER's fusion to answer questions about pictures out of a vocabulary.

    python examples/finetune_vqa.py --data easy_vqa/data --output runs/vqa  # of `pip download easy-vqa`, unpacked
    python examples/finetune_vqa.py --config examples/configs/finetune_vqa.yaml --data train_questions.json
    accelerate launch --num_processes 8 examples/finetune_vqa.py --config ... --batch_size 512

The data are VQA's official JSON files, easy-VQA, or a metadata.jsonl: see `data.question_answering.read_questions`.
The vocabulary is built from the answers of the training split; questions without an answer in it are left out, and
counted. Every field of `VqaArguments` is an option of the command line and a key of the YAML file; the command line
wins. The output holds `best`, the model and processor of the best epoch with its `scores.json`, ready for
`pipeline("florence-visual-question-answering")`; `log.csv` and `curves.png`; and checkpoints, from which an
interrupted run goes on when the same command is given again. Needs the extra `train`.
"""

import json
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from tqdm.auto import tqdm
from transformers import AutoTokenizer

from transformers_florence import (
    FlorenceForQuestionAnswering,
    FlorenceImageProcessor,
    FlorenceProcessor,
    FlorenceTextConfig,
    FlorenceTokenizer,
    bundled_checkpoint,
    load_checkpoint,
)
from transformers_florence.data.answers import MIN_COUNT, build_vocabulary, soft_scores
from transformers_florence.data.question_answering import Question, answerable, read_questions
from transformers_florence.data.texts import tokenize_texts
from transformers_florence.evaluation.question_answering import evaluate_question_answering
from transformers_florence.modeling_florence_fusion_heads import NO_DECAY, fusion_learning_rates
from transformers_florence.training.arguments import parse_arguments
from transformers_florence.training.optimization import parameter_groups
from transformers_florence.training.recipe import RecipeArguments, StepBatches, fine_tune

MAX_TOKENS = 32  # of a question, for a tokenizer that is learnt


@dataclass
class VqaArguments(RecipeArguments):
    """What a run is made of besides what every recipe is told. METER's rates are 5e-6 with factors 5 and 50."""

    output: str = "runs/vqa"
    batch_size: int = 16  # pictures of a step, each with its questions, on all processes together
    learning_rate: float = 1e-4
    data: str = "easy_vqa/data"  # folder, or VQA's file of questions
    annotations: str = ""  # VQA's file of their answers
    images: str = ""  # folder of its pictures
    eval_data: str = ""  # the same three for evaluation; `data` if empty
    eval_annotations: str = ""
    eval_images: str = ""
    train_split: str = "train"  # empty for a file of VQA, which holds one split
    eval_split: str = "test"
    min_count: int = MIN_COUNT  # how often an answer occurs to be in the vocabulary
    max_questions: int = 0  # of a picture in a step, drawn anew each time; 0 for all
    flip: float = 0.0  # part of the pictures that are mirrored: only where no question knows left from right
    init_from: str = ""  # checkpoint of a dual encoder, or one with a fusion; the bundled one if empty
    text: str = ""  # checkpoint of a RoBERTa or BERT with its tokenizer; the text tower of `init_from` if empty
    vocab_size: int = 0  # of a tokenizer learnt from the questions, for a new text encoder as wide as the fusion
    text_layers: int = 2  # of that encoder
    image_size: int = 0  # side of the pictures in pixels; that of `init_from` if 0
    hidden_size: int = 192  # of a new fusion
    num_layers: int = 2
    num_heads: int = 6
    freeze_vision: bool = False
    fusion_factor: float = 5.0  # learning rate of the fusion, relative to that of the towers
    head_factor: float = 50.0

    from_zero: ClassVar = (*RecipeArguments.from_zero, "max_questions", "vocab_size", "image_size", "num_layers")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.flip > 1:
            raise ValueError(f"flip: expected a part of at most 1, got {self.flip}")
        if self.text and self.vocab_size:
            raise ValueError(f"expected text or vocab_size, got both, {self.text!r} and {self.vocab_size}")


def read_sets(arguments: VqaArguments) -> tuple[list[Question], list[Question]]:
    """Questions to train on and to evaluate on."""
    train = read_questions(
        arguments.data,
        arguments.train_split or None,
        annotations=arguments.annotations or None,
        images=arguments.images or None,
    )
    held_out = read_questions(
        arguments.eval_data or arguments.data,
        arguments.eval_split or None,
        annotations=arguments.eval_annotations or None,
        images=arguments.eval_images or None,
    )
    if not all(question.answers for question in held_out):
        raise ValueError("eval_data: expected the answers of all questions, got questions without any")
    return train, held_out


def build_processor(arguments: VqaArguments, source: str, questions: list[Question]) -> FlorenceProcessor:
    """The pictures' part of `source`, and the tokenizer of the text encoder."""
    size = {"height": arguments.image_size, "width": arguments.image_size}
    sizes = {"size": size, "crop_size": size} if arguments.image_size else {}
    pictures = FlorenceImageProcessor.from_pretrained(source, **sizes)
    if not arguments.vocab_size:
        return FlorenceProcessor(pictures, AutoTokenizer.from_pretrained(arguments.text or source))
    texts = [question.text for question in questions]
    return FlorenceProcessor(pictures, FlorenceTokenizer.train_new(texts, arguments.vocab_size, MAX_TOKENS))


def new_text_config(arguments: VqaArguments) -> FlorenceTextConfig:
    """A text encoder for the tokenizer that is learnt, in which every token sees every other."""
    return FlorenceTextConfig(
        vocab_size=arguments.vocab_size,
        hidden_size=arguments.hidden_size,
        intermediate_size=4 * arguments.hidden_size,
        num_hidden_layers=arguments.text_layers,
        num_attention_heads=arguments.num_heads,
        max_position_embeddings=MAX_TOKENS,
        causal=False,
    )


def build_model(arguments: VqaArguments, source: str, names: list[str]) -> FlorenceForQuestionAnswering:
    """A model with these answers: on a checkpoint with a fusion, or new on the towers of one.

    Raises:
        ValueError: a checkpoint whose fusion has answers, and other ones.
    """
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: row for row, name in enumerate(names)}}
    fields = json.loads((Path(source) / "config.json").read_text("utf-8"))
    if fields["model_type"] == FlorenceForQuestionAnswering.config_class.model_type:
        known = list(fields.get("id2label", {}).values())
        if FlorenceForQuestionAnswering.__name__ not in (fields.get("architectures") or ()):
            new = ("classifier.",)
        elif known != names:
            raise ValueError(f"expected the answers of {source}, {known}, got {names}")
        else:
            new = ()
        model = load_checkpoint(FlorenceForQuestionAnswering, source, new=new, dtype=torch.float32, **labels)
    else:
        model = FlorenceForQuestionAnswering.from_pretrained_towers(
            source,
            text=new_text_config(arguments) if arguments.vocab_size else arguments.text or None,
            hidden_size=arguments.hidden_size,
            num_hidden_layers=arguments.num_layers,
            num_attention_heads=arguments.num_heads,
            **labels,
        )
    if arguments.freeze_vision:
        model.freeze_vision()
    return model


class Batches(StepBatches):
    """Pictures, each with its questions and how right every answer of the vocabulary is."""

    def __init__(
        self,
        arguments: VqaArguments,
        questions: list[Question],
        numbers: dict[str, int],
        processor: FlorenceProcessor,
        max_tokens: int,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        by_picture = defaultdict(list)
        for question in questions:
            by_picture[question.file].append(question)
        super().__init__(arguments, len(by_picture), rank, ranks)
        self.pictures = list(by_picture.items())
        self.numbers, self.processor, self.max_tokens = numbers, processor, max_tokens
        self.flip, self.max_questions = arguments.flip, arguments.max_questions

    def name(self, row: int) -> str:
        return self.pictures[row][0].name

    def sample(self, row: int) -> tuple[torch.Tensor, list[Question]]:
        """Pixels (channels, height, width), normalised, and questions."""
        file, questions = self.pictures[row]
        pixels = self.processor.image_processor(str(file), return_tensors="pt")["pixel_values"][0]
        if torch.rand(()) < self.flip:
            pixels = pixels.flip(-1)
        order = torch.randperm(len(questions))[: self.max_questions or None].tolist()
        return pixels, [questions[place] for place in order]

    def collate(self, samples: list[tuple[torch.Tensor, list[Question]]]) -> dict[str, Any]:
        asked = [question for _, questions in samples for question in questions]
        counts = torch.tensor([len(questions) for _, questions in samples])
        return {
            "pixel_values": torch.stack([pixels for pixels, _ in samples]),
            "image_rows": torch.arange(len(samples)).repeat_interleave(counts),
            "labels": torch.stack([soft_scores(question.answers, self.numbers) for question in asked]),
            **tokenize_texts(self.processor.tokenizer, [question.text for question in asked], self.max_tokens),
        }


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train; returns the scores of the last evaluation in this process."""
    arguments = parse_arguments(VqaArguments, sys.argv[1:] if argv is None else argv)
    accelerator, source = arguments.make_accelerator(), arguments.init_from or bundled_checkpoint()
    train, held_out = read_sets(arguments)
    names = build_vocabulary((question.major for question in train if question.major), arguments.min_count)
    numbers = {name: row for row, name in enumerate(names)}
    kept = answerable(train, numbers)
    accelerator.print(f"{len(names)} answers; training: {kept}; evaluation: {len(held_out)} questions")
    model, processor = build_model(arguments, source, names), build_processor(arguments, source, train)
    ranks = (accelerator.process_index, accelerator.num_processes)
    batches = Batches(arguments, kept.questions, numbers, processor, model.config.max_text_tokens, *ranks)

    def evaluate(model: FlorenceForQuestionAnswering) -> dict[str, Any]:
        scores = evaluate_question_answering(model, processor, held_out)
        tqdm.write(scores.table())
        kinds = {f"accuracy_{kind}": value for kind, (value, _) in scores.by_answer_type.items()}
        return {"accuracy": scores.accuracy, "questions": scores.questions, **kinds}

    def save(model: FlorenceForQuestionAnswering, folder: Path) -> None:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)

    rate = arguments.learning_rate
    rates = fusion_learning_rates(rate, fusion_factor=arguments.fusion_factor, head_factor=arguments.head_factor)
    groups = parameter_groups(model, arguments.weight_decay, rates, NO_DECAY, learning_rate=rate)
    return fine_tune(
        arguments,
        accelerator,
        model,
        groups,
        batches,
        save=save,
        evaluate=evaluate,
        best="accuracy",
        record={"answers": names},
    )


if __name__ == "__main__":
    main()
