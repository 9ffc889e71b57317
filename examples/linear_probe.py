"""Linear probe of an image tower by CLIP's protocol: Florence's table 2.

    python examples/linear_probe.py --data pictures --split train --test_split test

Features before the projection, logistic regression by L-BFGS, its strength swept on a validation split, a last fit to
both. Every field of `ProbeArguments` is an option and a key of the YAML file of `--config`. The result is one JSON
file of the output. Needs the extras `eval` and `train`.
"""

from dataclasses import dataclass

from evaluation_setup import Evaluation, EvaluationArguments, check_same_classes
from transformers_florence.evaluation.classification import accuracy, mean_per_class_accuracy
from transformers_florence.evaluation.linear_probe import MAX_ITERATIONS, fit_linear_probe
from transformers_florence.evaluation.results import Result

METRICS = {"accuracy": accuracy, "mean_per_class": mean_per_class_accuracy}


@dataclass
class ProbeArguments(EvaluationArguments):
    """As `EvaluationArguments`, and which pictures."""

    split: str = "train"
    test_split: str = "test"  # if empty, half of each class's pictures of `split`
    validation_split: str = ""  # if empty, a part of `split`
    validation_part: float = 0.2  # of each class, without a validation split
    metric: str = "accuracy"  # or mean_per_class: what the sweep makes large
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
    probe = fit_linear_probe(
        *parts[0],
        *parts[1],
        len(train.names),
        metric=METRICS[arguments.metric],
        max_iterations=arguments.max_iterations,
        progress=True,
    )
    features, labels = parts[2]
    scores = probe.scores(features)
    found = {name: metric(scores, labels) for name, metric in METRICS.items()}
    counts = {"trained_on": len(parts[0][1]) + len(parts[1][1]), "pictures": len(labels), "classes": len(train.names)}
    return evaluation.report(
        "linear_probe",
        test,
        {**found, **counts, "strength": probe.strength, "unconverged": probe.unconverged},
        features=features.shape[1],
    )


if __name__ == "__main__":
    main()
