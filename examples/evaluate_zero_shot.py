"""Zero-shot classification of a set of pictures by its class names: Florence's table 1.

    python examples/evaluate_zero_shot.py --data pictures --split test
    python examples/evaluate_zero_shot.py --data /data --benchmarks true  # whichever of the twelve sets lies in /data
    python examples/evaluate_zero_shot.py --data pictures --validation_split valid  # also thresholds for each label

The text tower runs once for a label set: what it made is kept in the cache's folder. Every field of
`ZeroShotArguments` is an option and a key of the YAML file of `--config`. Each result is one JSON file of the output,
with a confusion matrix and a map of the pictures beside it. Needs the extras `eval` and `train`.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from assemble_results import PUBLISHED, published_table, with_ours
from evaluation_setup import Evaluation, EvaluationArguments, check_same_classes
from transformers_florence.data.image_sets import IMAGENET_TEMPLATES, ImageSet, benchmarks, read_benchmark
from transformers_florence.data.prompts import DRAWING_TEMPLATES
from transformers_florence.evaluation.classification import (
    METRICS,
    confusion_matrix,
    label_presence,
    macro_f1,
    mean_per_class_accuracy,
)
from transformers_florence.evaluation.plots import confusion_figure, map_figure, save_beside
from transformers_florence.evaluation.results import Result
from transformers_florence.evaluation.zero_shot import ZeroShotClassifier, top_k_accuracy

TEMPLATES = {"imagenet": IMAGENET_TEMPLATES, "drawing": DRAWING_TEMPLATES, "plain": ("a photo of a {}.",)}


@dataclass
class ZeroShotArguments(EvaluationArguments):
    """As `EvaluationArguments`, and which pictures and texts."""

    split: str = "test"  # empty for all
    templates: str = ""  # imagenet, drawing, plain, or a benchmark's key; the set's own or imagenet if empty
    benchmarks: bool = False  # `data` is a folder with official archives, each of which is evaluated
    validation_split: str = ""  # on which thresholds of single labels are calibrated
    cache: str = ""  # folder of the classifiers; none if empty

    def __post_init__(self) -> None:
        super().__post_init__()
        known = (*TEMPLATES, *benchmarks())
        if self.templates and self.templates not in known:
            raise ValueError(f"templates: expected one of {', '.join(known)}, got {self.templates!r}")
        if self.validation_split and self.split in ("", self.validation_split):
            raise ValueError(f"validation_split: expected none of the pictures of {self.split!r}, got a part of them")


def choose_templates(arguments: ZeroShotArguments, name: str) -> tuple[str, ...]:
    """The templates that are asked for, or else those of the benchmark of this name, or else ImageNet's."""
    wanted = arguments.templates or (name if name in benchmarks() else "imagenet")
    return TEMPLATES[wanted] if wanted in TEMPLATES else benchmarks()[wanted].templates


def evaluate(evaluation: Evaluation, pictures: ImageSet) -> Result:
    """One set."""
    arguments = evaluation.arguments
    templates = choose_templates(arguments, pictures.name)
    classifier = ZeroShotClassifier.build(
        evaluation.model,
        evaluation.processor.tokenizer,
        pictures.names,
        templates,
        cache=arguments.cache or None,
        progress=True,
    )
    embeds, read = evaluation.embed(pictures)
    scores, labels = classifier.logits(embeds), read.labels
    metrics: dict[str, Any] = {"pictures": len(labels), "classes": len(pictures.names)}
    if labels.ndim == 2:
        metrics["map_11_point"] = METRICS["map_11_point"](scores, labels)
    else:
        metrics["top1"] = top_k_accuracy(scores, labels, 1)
        metrics["top5"] = top_k_accuracy(scores, labels, min(5, len(pictures.names)))
        metrics["mean_per_class"] = mean_per_class_accuracy(scores, labels)
        metrics["chance"] = 1 / len(pictures.names)
    if arguments.validation_split:
        validation = evaluation.read(arguments.validation_split)
        check_same_classes(pictures, validation)
        held, held_out = evaluation.embed(validation)
        calibrated = classifier.calibrate(held, *label_presence(held_out.labels, len(pictures.names)))
        metrics["label_f1"] = macro_f1(calibrated.present(embeds), *label_presence(labels, len(pictures.names)))
    empty = pictures.empty_classes()
    if empty:
        print(
            f"{pictures.name}: {len(empty)} of {len(pictures.names)} classes have no picture: {', '.join(empty[:5])}"
        )
    result = evaluation.report("zero_shot", pictures, metrics, templates_used=len(templates))
    if labels.ndim == 1:
        save_beside(
            result.file(arguments.output),
            confusion=confusion_figure(confusion_matrix(scores, labels), pictures.names),
            map=map_figure(embeds, labels, pictures.names, seed=arguments.seed),
        )
    return result


def main(argv: list[str] | None = None) -> list[Result]:
    """Evaluate; returns the results."""
    evaluation = Evaluation(__file__, ZeroShotArguments, argv)
    arguments = evaluation.arguments
    if not arguments.benchmarks:
        return [evaluate(evaluation, evaluation.read(arguments.split))]
    results = []
    for key, benchmark in benchmarks().items():
        try:
            pictures = read_benchmark(key, arguments.data, "val" if key == "imagenet" else arguments.split)
        except ValueError as error:
            print(f"{benchmark.title}: {error}")
            continue
        results.append(evaluate(evaluation, pictures))
    if not results:
        raise ValueError(f"expected official archives in {Path(arguments.data)}, got none of the twelve")
    print(published_table(with_ours(json.loads(PUBLISHED.read_text("utf-8"))[0], results)))  # the paper's table 1
    return results


if __name__ == "__main__":
    main()
