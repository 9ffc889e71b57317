"""Few-shot classification: episodes as in Florence's table 4, and k pictures of every class with a text-made head.

    python examples/few_shot.py --data pictures --split ""
    python examples/few_shot.py --data pictures --shots 5 20 --tune_tower true --episodes 20  # the tower learns too

Episodes: a few classes and a few pictures of each, a linear head on the image tower, mean accuracy over many of them.
Per class: k pictures of each class of `split`, a head that starts from zeros or from the class names' vectors, judged
on `test_split`. Every field of `FewShotArguments` is an option and a key of the YAML file of `--config`. Each result
is one JSON file of the output, with a curve of accuracy over shots beside it. Needs the extra `train`.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from matplotlib.figure import Figure
from tqdm.auto import tqdm

from evaluate_zero_shot import TEMPLATES
from evaluation_setup import Evaluation, EvaluationArguments, check_same_classes
from transformers_florence.data.image_sets import ImageSet
from transformers_florence.evaluation.classification import accuracy
from transformers_florence.evaluation.embedding import ProcessedPictures
from transformers_florence.evaluation.few_shot import (
    QUERIES,
    EpisodeScores,
    choose_strength,
    draw_episodes,
    draw_shots,
    evaluate_episodes,
    fit_head,
    tune_episode,
)
from transformers_florence.evaluation.plots import save_beside, shots_figure
from transformers_florence.evaluation.results import Result
from transformers_florence.evaluation.zero_shot import ZeroShotClassifier


@dataclass
class FewShotArguments(EvaluationArguments):
    """As `EvaluationArguments`, and which pictures and how many."""

    split: str = ""  # of the episodes, and of the pictures to learn from; all if empty
    test_split: str = ""  # on which k pictures a class are judged; only episodes if empty
    ways: int = 5
    shots: list[int] = field(default_factory=lambda: [5, 20, 50])  # those that the classes are too small for are told
    queries: int = QUERIES
    episodes: int = 600
    tune_tower: bool = False
    shots_per_class: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16])
    templates: str = "imagenet"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.templates not in TEMPLATES:
            raise ValueError(f"templates: expected one of {', '.join(TEMPLATES)}, got {self.templates!r}")
        if self.test_split and self.split in ("", self.test_split):
            raise ValueError(f"test_split: expected none of the pictures of {self.split!r}, got a part of them")


def tune_episodes(evaluation: Evaluation, pictures: ImageSet, episodes: list) -> EpisodeScores:
    """The episodes with a tower that learns: their pictures' pixels are read anew for each."""
    pixels_of = ProcessedPictures(pictures.pictures, evaluation.processor.image_processor)
    model, found = evaluation.model, []
    for number, episode in enumerate(tqdm(episodes, desc="episodes")):
        rows = torch.cat([episode.support, episode.query], dim=1)
        pixels = torch.stack([pixels_of[row] for row in rows.flatten().tolist()]).to(model.device)
        places = torch.arange(rows.numel()).view_as(rows).split([episode.support.shape[1], episode.query.shape[1]], 1)
        own = type(episode)(*places)
        found.append(tune_episode(model.vision_model, pixels, own, seed=evaluation.arguments.seed + number))
    return EpisodeScores(torch.tensor(found))


def evaluate_in_episodes(evaluation: Evaluation, pictures: ImageSet) -> dict[str, Any]:
    """Accuracy and interval for each number of shots that the classes are large enough for."""
    arguments, metrics = evaluation.arguments, {}
    features, read = evaluation.embed(pictures, tower=True)
    flipped, _ = evaluation.embed(pictures, tower=True, flip=True)
    for shots in arguments.shots:
        try:
            drawn = draw_episodes(
                read.labels,
                ways=arguments.ways,
                shots=shots,
                queries=arguments.queries,
                episodes=arguments.episodes,
                seed=arguments.seed,
            )
        except ValueError as error:
            print(f"{shots} shots: {error}")
            continue
        if arguments.tune_tower:
            scores = tune_episodes(evaluation, read, drawn)
        else:
            scores = evaluate_episodes(features, flipped, drawn, seed=arguments.seed, progress=True)
        content = scores.as_dict()
        metrics[f"{shots}_shot"], metrics[f"{shots}_shot_interval"] = content["accuracy"], content["interval_95"]
    return metrics


def evaluate_by_class(evaluation: Evaluation, pictures: ImageSet, test: ImageSet) -> dict[str, Any]:
    """Accuracy of k pictures a class, with a head from zeros and with one from the class names, beside no picture."""
    arguments = evaluation.arguments
    check_same_classes(pictures, test)
    classifier = ZeroShotClassifier.build(
        evaluation.model, evaluation.processor.tokenizer, pictures.names, TEMPLATES[arguments.templates]
    )
    embeds, read = evaluation.embed(pictures)
    held, held_out = evaluation.embed(test)
    labels, wanted = read.labels, held_out.labels
    metrics: dict[str, Any] = {"0_text": accuracy(classifier.logits(held), wanted)}
    inputs = classifier.scale * embeds
    for shots in arguments.shots_per_class:
        try:
            rows = draw_shots(labels, shots, len(pictures.names), arguments.seed)
        except ValueError as error:
            print(f"{shots} a class: {error}")
            continue
        for name, start in (("zeros", torch.zeros_like(classifier.weight)), ("text", classifier.weight)):
            strength = choose_strength(inputs[rows], labels[rows], start)
            head = fit_head(inputs[rows], labels[rows], start, strength)
            metrics[f"{shots}_{name}"] = accuracy(held @ head.T, wanted)
    return metrics


def episodes_figure(metrics: dict[str, Any], arguments: FewShotArguments) -> Figure:
    """What `evaluate_in_episodes` found, over shots."""
    name = ("head", "tower and head")[arguments.tune_tower] + f", {arguments.ways} classes, 95% interval"
    curve, interval = {}, {}
    for shots in arguments.shots:
        if f"{shots}_shot" in metrics:
            curve[shots], interval[shots] = metrics[f"{shots}_shot"], metrics[f"{shots}_shot_interval"] or 0.0
    return shots_figure({name: curve}, intervals={name: interval}, levels={"chance": 1 / arguments.ways})


def by_class_figure(metrics: dict[str, Any], classes: int) -> Figure:
    """What `evaluate_by_class` found, over shots."""
    curves: dict[str, dict[int, float]] = {}
    for key, value in metrics.items():
        shots, start = key.split("_")
        if int(shots):
            curves.setdefault(f"head from {start}", {})[int(shots)] = value
    levels = {"class names alone": metrics["0_text"], "chance": 1 / classes}
    return shots_figure(curves, levels=levels)


def main(argv: list[str] | None = None) -> list[Result]:
    """Evaluate; returns the results."""
    evaluation = Evaluation(__file__, FewShotArguments, argv)
    arguments = evaluation.arguments
    pictures = evaluation.read(arguments.split)
    results = []
    metrics = evaluate_in_episodes(evaluation, pictures)
    if metrics:
        task = "few_shot_tuned" if arguments.tune_tower else "few_shot"
        results.append(evaluation.report(task, pictures, metrics))
        save_beside(results[-1].file(arguments.output), shots=episodes_figure(metrics, arguments))
    if arguments.test_split:
        test = evaluation.read(arguments.test_split)
        metrics = evaluate_by_class(evaluation, pictures, test)
        results.append(evaluation.report("shots_per_class", test, metrics))
        if len(metrics) > 1:  # the classes were large enough for some number of shots
            save_beside(results[-1].file(arguments.output), shots=by_class_figure(metrics, len(test.names)))
    if not results:
        raise ValueError(f"expected classes of {min(arguments.shots) + arguments.queries} pictures, got smaller ones")
    return results


if __name__ == "__main__":
    main()
