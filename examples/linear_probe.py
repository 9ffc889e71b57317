"""Linear probe of an image tower by CLIP's protocol: Florence's table 2.

    python examples/linear_probe.py --data pictures --split train --test_split test
    python examples/linear_probe.py --data voc2007:/data --split train --validation_split val --test_split test

Features before the projection, logistic regression by L-BFGS, its strength swept on a validation split, a last fit to
both; where a picture has several classes one regression a class, by VOC2007's mean average precision. Every field of
`ProbeArguments` is an option and a key of the YAML file of `--config`. The result is one JSON file of the output, with
a confusion matrix and a map of the test pictures beside it where they have one class each. Needs the extras `eval` and
`train`.
"""

from dataclasses import dataclass

from evaluation_setup import Evaluation, EvaluationArguments, check_same_classes
from transformers_florence.evaluation.classification import (
    accuracy,
    confusion_matrix,
    map_11_point,
    mean_per_class_accuracy,
)
from transformers_florence.evaluation.linear_probe import MAX_ITERATIONS, fit_linear_probe, fit_multi_label_probe
from transformers_florence.evaluation.plots import confusion_figure, map_figure, save_beside
from transformers_florence.evaluation.results import Result

METRICS = {"accuracy": accuracy, "mean_per_class": mean_per_class_accuracy}


@dataclass
class ProbeArguments(EvaluationArguments):
    """As `EvaluationArguments`, and which pictures."""

    split: str = "train"
    test_split: str = "test"  # if empty, half of each class's pictures of `split`
    validation_split: str = ""  # if empty, a part of `split`
    validation_part: float = 0.2  # of each class, without a validation split
    metric: str = "accuracy"  # or mean_per_class: what the sweep makes large where a picture has one class
    max_iterations: int = MAX_ITERATIONS

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.metric not in METRICS:
            raise ValueError(f"metric: expected one of {', '.join(METRICS)}, got {self.metric!r}")
        splits = [split for split in (self.split, self.validation_split, self.test_split) if split]
        if len(set(splits)) < len(splits):  # the last fit sees the validation split
            raise ValueError(f"expected different splits to train, validate and test on, got {', '.join(splits)}")


def main(argv: list[str] | None = None) -> Result:
    """Fit and evaluate; returns the result."""
    evaluation = Evaluation(__file__, ProbeArguments, argv)
    arguments = evaluation.arguments
    train = evaluation.read(arguments.split)
    if arguments.test_split:
        test = evaluation.read(arguments.test_split)
    else:
        train, test = train.split_off(0.5, arguments.seed)
    if arguments.validation_split:
        validation = evaluation.read(arguments.validation_split)
    else:
        train, validation = train.split_off(arguments.validation_part, arguments.seed)
    check_same_classes(train, test)
    check_same_classes(train, validation)
    embedded = [evaluation.embed(part, tower=True) for part in (train, validation, test)]
    parts = [(features, read.labels) for features, read in embedded]
    options = {"max_iterations": arguments.max_iterations, "progress": True}
    if train.labels.ndim == 2:
        metrics = {"map_11_point": map_11_point}
        probe = fit_multi_label_probe(*parts[0], *parts[1], **options)
    else:
        metrics = METRICS
        probe = fit_linear_probe(*parts[0], *parts[1], len(train.names), metric=METRICS[arguments.metric], **options)
    features, labels = parts[2]
    scores = probe.scores(features)
    found = {name: metric(scores, labels) for name, metric in metrics.items()}
    counts = {"trained_on": len(parts[0][1]) + len(parts[1][1]), "pictures": len(labels), "classes": len(train.names)}
    result = evaluation.report(
        "linear_probe",
        test,
        {**found, **counts, "strength": probe.strength, "unconverged": probe.unconverged},
        features=features.shape[1],
    )
    if labels.ndim == 1:
        save_beside(
            result.file(arguments.output),
            confusion=confusion_figure(confusion_matrix(scores, labels), test.names),
            map=map_figure(features, labels, test.names, seed=arguments.seed),
        )
    return result


if __name__ == "__main__":
    main()
