"""Fine-tune a dual encoder to tell classes of pictures apart, by their names or with a new linear head.

    python examples/finetune_classification.py --data pictures --output runs/classes
    python examples/finetune_classification.py --data pictures --lora_rank 8 --learning_rate 5e-4
    python examples/finetune_classification.py --data pictures --head linear --probe_first true --mixup 0.2
    python examples/finetune_classification.py --data pictures --guard_data others --wise_parts 0.25 0.5 0.75

With `--head names`, the paper's way (section 3.3), there is no new layer: UniCL's loss over pictures and templated
names of their classes, and the result is a dual encoder. With `--head linear` it is an image classifier. A guard is
another set of pictures, classified zero-shot after each epoch: it shows what fine-tuning forgets. WiSE-FT saves models
between the pretrained and the best one. Every field of `ClassificationArguments` is an option and a key of the YAML
file of `--config`. The output holds what `training.recipe.fine_tune` writes, and `wise.json`; the result is one JSON
file of `results`, with a confusion matrix beside it. Needs the extras `train` and `eval`.
"""

import copy
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F
from torchvision.transforms import v2

from evaluate_zero_shot import TEMPLATES
from evaluation_setup import check_same_classes
from finetune_setup import (
    DualEncoderArguments,
    TrainingViews,
    adapt,
    best_scores,
    cost_of,
    report_run,
    save_model,
)
from transformers_florence import FlorenceForImageClassification, FlorenceModel
from transformers_florence.data.detection import picture_size
from transformers_florence.data.image_sets import ImageSet, read_image_set
from transformers_florence.data.prompts import fill_template
from transformers_florence.evaluation.classification import (
    accuracy,
    confusion_matrix,
    interpolate_weights,
    mean_per_class_accuracy,
)
from transformers_florence.evaluation.embedding import embed_pictures
from transformers_florence.evaluation.linear_probe import fit_linear_probe
from transformers_florence.evaluation.plots import confusion_figure, save_beside
from transformers_florence.evaluation.results import Result, hash_pictures
from transformers_florence.evaluation.zero_shot import ZeroShotClassifier
from transformers_florence.image_checks import picture_name
from transformers_florence.training.arguments import parse_arguments
from transformers_florence.training.optimization import parameter_groups
from transformers_florence.training.recipe import StepBatches, fine_tune, loss_of_model

PROBE_VALIDATION = 0.2  # part of the training pictures on which the probe's strength is chosen


@dataclass
class ClassificationArguments(DualEncoderArguments):
    """As `DualEncoderArguments`, and what is particular to classes. Data as `read_image_set` takes it."""

    output: str = "runs/classification"
    head: str = "names"  # names: UniCL's loss on class names; linear: a new layer on the image tower
    head_rate: float = 10.0  # learning rate of the new layer, relative to the others'
    probe_first: bool = False  # the new layer begins as a linear probe (LP-FT)
    templates: str = "plain"  # plain, imagenet or drawing: of names in evaluation, and drawn at random in training
    mixup: float = 0.0  # of pictures and targets, with the new layer only: the Beta distribution's parameter
    cutmix: float = 0.0
    label_smoothing: float = 0.0  # with the new layer only
    guard_data: str = ""  # a set that is classified zero-shot after each epoch
    guard_split: str = "test"
    wise_parts: list[float] = field(default_factory=list)  # between 0 (pretrained) and 1 (fine-tuned), names only

    free: ClassVar = (*DualEncoderArguments.free, "wise_parts")
    choices: ClassVar = {**DualEncoderArguments.choices, "head": ("names", "linear"), "templates": tuple(TEMPLATES)}

    def __post_init__(self) -> None:
        super().__post_init__()
        of_linear = ("probe_first", "mixup", "cutmix", "label_smoothing")
        wrong = [name for name in of_linear if self.head == "names" and getattr(self, name)]
        if wrong:
            raise ValueError(f"expected head 'linear' with {', '.join(wrong)}, got 'names'")
        if self.head == "linear" and self.wise_parts:
            raise ValueError("wise_parts: expected head 'names', as the pretrained model has no other, got 'linear'")
        if any(not 0 <= part <= 1 for part in self.wise_parts):
            raise ValueError(f"wise_parts: expected numbers from 0 to 1, got {self.wise_parts}")


def without_unreadable(pictures: ImageSet) -> ImageSet:
    """The pictures that open; says how many do not. Raises ValueError if none does."""
    rows = []
    for row, picture in enumerate(pictures.pictures):
        try:
            if isinstance(picture, Path):
                picture_size(picture)
            rows.append(row)
        except ValueError:
            continue
    if len(rows) < len(pictures):
        print(f"{pictures.name}: left out {len(pictures) - len(rows)} of {len(pictures)} pictures, unreadable")
    return pictures.select(rows)


def read_sets(arguments: ClassificationArguments) -> tuple[ImageSet, ImageSet]:
    """Pictures to train on, of every class, and to evaluate on.

    Raises:
        ValueError: sets that cannot be read, with other classes, or with a class that has no picture to train on.
    """
    train = without_unreadable(read_image_set(arguments.data, arguments.train_split or None))
    held_out = read_image_set(arguments.eval_data or arguments.data, arguments.eval_split or None)
    check_same_classes(train, held_out)
    if train.empty_classes():
        raise ValueError(f"{train.name}: expected pictures of every class, got none of {train.empty_classes()[:5]}")
    return train, held_out


class Batches(StepBatches):
    """Views of pictures, with the templated names of their classes or with targets of the new layer.

    Mixed pictures (mixup, CutMix: one of them, if both are asked for) are mixed among those of one process.
    """

    def __init__(
        self,
        arguments: ClassificationArguments,
        pictures: ImageSet,
        model: FlorenceModel,
        processor: Any,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        super().__init__(arguments, len(pictures), rank, ranks)
        self.pictures, self.labels = pictures.pictures, pictures.labels
        self.names, self.templates = pictures.names, TEMPLATES[arguments.templates]
        self.views = TrainingViews(processor.image_processor, arguments.min_scale, arguments.flip)
        self.config, self.tokenizer = model.config, processor.tokenizer
        self.has_names = arguments.head == "names"
        kinds = ((v2.MixUp, arguments.mixup), (v2.CutMix, arguments.cutmix))
        mixes = [kind(alpha=alpha, num_classes=len(self.names)) for kind, alpha in kinds if alpha]
        self.mix = v2.RandomChoice(mixes) if mixes else None

    def name(self, row: int) -> str:
        return picture_name(self.pictures[row], row)

    def sample(self, row: int) -> tuple[torch.Tensor, str, int]:
        label = int(self.labels[row])
        template = self.templates[int(torch.randint(len(self.templates), ()))]
        return self.views.view(self.pictures[row], row), fill_template(template, self.names[label]), label

    def collate(self, samples: list[tuple[torch.Tensor, str, int]]) -> dict[str, Any]:
        views, texts, labels = zip(*samples, strict=True)
        pixels, targets = self.views.batch(list(views)), torch.tensor(labels)
        if self.has_names:
            tokens = self.tokenizer(list(texts), return_tensors="pt", padding=True, truncation=True)
            return {"pixel_values": pixels, **tokens, "labels": targets}
        if self.mix is not None:
            pixels, targets = self.mix(pixels, targets)
        return {"pixel_values": pixels, "targets": targets}

    def __getitem__(self, step: int) -> dict[str, Any]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed((self.seed << 32) + (1 << 31) + step)  # of the mixing: no seed of a sample
            return super().__getitem__(step)


def classify_by_names(
    model: FlorenceModel, processor: Any, pictures: ImageSet, templates: tuple[str, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Zero-shot logits of a dual encoder, (readable pictures, classes), and the pictures' labels."""
    classifier = ZeroShotClassifier.build(model, processor.tokenizer, pictures.names, templates)
    embeds, readable = embed_pictures(model, processor.image_processor, pictures.pictures)
    return classifier.logits(embeds), pictures.labels[readable]


def start_from_probe(
    arguments: ClassificationArguments, model: FlorenceForImageClassification, processor: Any, train: ImageSet
) -> None:
    """Make the new layer a linear probe of the tower as it is (LP-FT, Kumar et al. 2022)."""
    parts = []
    for part in train.split_off(PROBE_VALIDATION, arguments.seed):
        features, readable = embed_pictures(model, processor.image_processor, part.pictures, tower=True, progress=True)
        parts += [features, part.labels[readable]]
    probe = fit_linear_probe(*parts, len(train.names), progress=True)
    with torch.no_grad():
        model.classifier.weight.copy_(probe.weight)
        model.classifier.bias.copy_(probe.bias)


class Scorer:
    """Scores of a model in training: on the held-out pictures, and zero-shot on the guard's.

    Args:
        dual: the dual encoder as it was; an image classifier borrows its text tower for the guard.
    """

    def __init__(
        self, arguments: ClassificationArguments, dual: FlorenceModel, processor: Any, held_out: ImageSet
    ) -> None:
        self.processor, self.held_out, self.templates = processor, held_out, TEMPLATES[arguments.templates]
        self.dual = copy.deepcopy(dual).eval()
        guard = arguments.guard_data
        self.guard = read_image_set(guard, arguments.guard_split or None) if guard else None

    def classify(self, model: FlorenceModel | FlorenceForImageClassification) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of the held-out pictures that can be read, (pictures, classes), and their labels."""
        if not isinstance(model, FlorenceForImageClassification):
            return classify_by_names(model, self.processor, self.held_out, self.templates)
        features, readable = embed_pictures(model, self.processor.image_processor, self.held_out.pictures, tower=True)
        with torch.no_grad():
            return model.classifier(features.to(model.device)).cpu(), self.held_out.labels[readable]

    def __call__(self, model: FlorenceModel | FlorenceForImageClassification) -> dict[str, float]:
        logits, labels = self.classify(model)
        scores = {"accuracy": accuracy(logits, labels), "mean_per_class": mean_per_class_accuracy(logits, labels)}
        if self.guard is not None:
            dual = model
            if isinstance(model, FlorenceForImageClassification):
                dual = self.dual.to(model.device)
                dual.vision_model = model.vision_model
            found = classify_by_names(dual, self.processor, self.guard, self.templates)
            scores["guard_accuracy"] = accuracy(*found)
        return scores


def save_between(
    arguments: ClassificationArguments, before: FlorenceModel, processor: Any, scorer: Scorer
) -> dict[str, dict[str, float]]:
    """WiSE-FT: models between the pretrained and the best one, each saved and scored; their scores by their parts."""
    best = FlorenceModel.from_pretrained(Path(arguments.output) / "best", dtype=torch.float32).eval()
    start, end, found = before.state_dict(), copy.deepcopy(best.state_dict()), {}
    for part in arguments.wise_parts:
        best.load_state_dict(interpolate_weights(start, end, part))
        found[f"{part:g}"] = scorer(best)
        save_model(best, processor, Path(arguments.output) / f"wise-{part:g}")
    (Path(arguments.output) / "wise.json").write_text(json.dumps(found, indent=2), "utf-8")
    return found


def main(argv: list[str] | None = None) -> Result | None:
    """Train; returns the result of the best model, None in processes that do not evaluate and for stopped runs."""
    argv = sys.argv[1:] if argv is None else argv
    arguments = parse_arguments(ClassificationArguments, argv)
    accelerator = arguments.make_accelerator()
    train, held_out = read_sets(arguments)
    dual, processor = arguments.load()
    before = copy.deepcopy(dual)
    scorer = Scorer(arguments, dual, processor, held_out)
    batches = Batches(arguments, train, dual, processor, accelerator.process_index, accelerator.num_processes)
    has_names = arguments.head == "names"
    if has_names:
        model, groups_of = adapt(dual, arguments), {}
    else:
        names = dict(enumerate(train.names))
        dual.config.id2label, dual.config.label2id = names, {name: number for number, name in names.items()}
        classifier = FlorenceForImageClassification(dual.config)
        classifier.vision_model.load_state_dict(dual.vision_model.state_dict())
        if arguments.probe_first:
            start_from_probe(arguments, classifier, processor, train)
        model = adapt(classifier, arguments, new=["classifier"])
        groups_of = {"classifier.": arguments.head_rate * arguments.learning_rate}
    groups = parameter_groups(
        model,
        arguments.weight_decay,
        groups_of,
        learning_rate=arguments.learning_rate,
        layer_decay=arguments.layer_decay,
    )

    def classification_loss(wrapped: nn.Module, inputs: dict[str, Any]) -> tuple[torch.Tensor, dict]:
        logits = wrapped(pixel_values=inputs["pixel_values"]).logits.float()  # bfloat16's softmax would be coarse
        return F.cross_entropy(logits, inputs["targets"], label_smoothing=arguments.label_smoothing), {}

    fine_tune(
        arguments,
        accelerator,
        model,
        groups,
        batches,
        save=lambda plain, folder: save_model(plain, processor, folder),
        evaluate=scorer,
        best="accuracy",
        record={"names": list(train.names), "pictures": len(train)},
        compute_loss=loss_of_model if has_names else classification_loss,
    )
    scores = best_scores(arguments.output)
    if not accelerator.is_main_process or not scores:
        return None
    start = {f"{name}_before": value for name, value in scorer(before).items()}
    if arguments.wise_parts:
        for part, between in save_between(arguments, before, processor, scorer).items():
            scores |= {f"wise_{part}_{name}": value for name, value in between.items()}
    metrics = {**scores, **start, **cost_of(model), "pictures": len(held_out)}
    data = held_out.name, hash_pictures(held_out.pictures, [held_out.names, held_out.labels.tolist()])
    result = report_run("finetune_classification", __file__, argv, arguments, data, metrics)
    kind = FlorenceModel if has_names else FlorenceForImageClassification
    best = kind.from_pretrained(Path(arguments.output) / "best", dtype=torch.float32).eval()
    counts = confusion_matrix(*scorer.classify(best.to(accelerator.device)))
    save_beside(result.file(arguments.results), confusion=confusion_figure(counts, held_out.names))
    return result


if __name__ == "__main__":
    main()
