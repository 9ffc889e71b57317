"""Fine-tune a Florence detector (CoSwin, FPN, Dynamic Head, ATSS) on a folder of annotated pictures.

    python examples/finetune_detection.py --data pictures --output runs/detector
    python examples/finetune_detection.py --data train.json --eval_data val.json --train_split "" --eval_split ""
    python examples/finetune_detection.py --data pictures --draw 16  # look at the augmented pictures, train nothing
    accelerate launch --num_processes 8 examples/finetune_detection.py --config ... --batch_size 64

The folder holds COCO JSON, Pascal VOC, YOLO or metadata.jsonl: see `data.detection_readers.read_annotations`. Every
field of `DetectionArguments` is an option of the command line and a key of the YAML file; the command line wins. The
output holds `best`, the model and image processor of the best epoch with its `scores.json`; `log.csv` and
`curves.png`; `predictions.png`, the newest detections beside the annotations; and checkpoints, from which an
interrupted run goes on when the same command is given again: every random choice of step n depends on the seed and on
n alone. Needs the extras `train` and `detection`.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torchvision.transforms.v2.functional import to_pil_image
from tqdm.auto import tqdm

from transformers_florence import (
    FlorenceDetectionConfig,
    FlorenceDetectionImageProcessor,
    FlorenceForObjectDetection,
    FlorenceImageProcessor,
    bundled_checkpoint,
)
from transformers_florence.data.detection import MODES, AnnotatedPicture, DetectionSet, validate_annotations
from transformers_florence.data.detection_readers import read_annotations
from transformers_florence.data.detection_transforms import (
    AUGMENTATIONS,
    collate_samples,
    draw_objects,
    make_mosaic,
    read_sample,
    training_transforms,
)
from transformers_florence.evaluation.detection import detect, evaluate_detector
from transformers_florence.training.arguments import parse_arguments
from transformers_florence.training.lora import LORA_TARGETS
from transformers_florence.training.optimization import parameter_groups
from transformers_florence.training.recipe import RecipeArguments, StepBatches, fine_tune


@dataclass
class DetectionArguments(RecipeArguments):
    """What a run is made of besides what every recipe is told."""

    output: str = "runs/detector"
    epochs: int = 12
    batch_size: int = 8
    data: str = "pictures"  # folder, or annotation file
    eval_data: str = ""  # the same for evaluation; `data` if empty
    train_split: str = "train"  # empty for all of `data`
    eval_split: str = "valid"  # empty for all of `eval_data`
    faults: str = "clip"  # what faulty annotations do: raise, clip, or drop
    init_from: str = ""  # checkpoint with an image tower, or a detector's; the bundled one if empty
    size: str = ""  # of new weights, instead of a checkpoint
    hidden_size: int = 128  # channels of a new pyramid and head
    num_blocks: int = 2  # of a new Dynamic Head
    freeze_backbone: bool = False
    lora_rank: int = 0  # of adapters in the image tower, which else stays as it is; 0 for none
    backbone_rate: float = 0.2  # learning rate of the image tower, relative to the others'
    layer_decay: float = 0.9  # factor of the rate for each layer of the tower further down
    shortest_edge: int = 256  # of the pictures, pixels
    longest_edge: int = 416
    augmentation: str = "multiscale"  # none, flip, multiscale or jitter: see `training_transforms`
    crop: float = 0.0  # part of the pictures that are cut around some of their objects
    color: float = 0.0  # part of the pictures whose colours are changed
    shown: int = 8  # pictures in predictions.png
    threshold: float = 0.3  # of the detections in it
    draw: int = 0  # write so many augmented training pictures with their boxes to the output, and train nothing

    free: ClassVar = (*RecipeArguments.free, "draw", "shown", "threshold")
    from_zero: ClassVar = (*RecipeArguments.from_zero, "lora_rank", "num_blocks", "draw", "shown")
    choices: ClassVar = {**RecipeArguments.choices, "faults": MODES, "augmentation": AUGMENTATIONS}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size and self.init_from:
            raise ValueError(f"expected size or init_from, got both, {self.size!r} and {self.init_from!r}")
        if self.freeze_backbone and self.lora_rank:
            raise ValueError(f"expected freeze_backbone or lora_rank, got both, the rank {self.lora_rank}")


def read_sets(arguments: DetectionArguments) -> tuple[DetectionSet, DetectionSet]:
    """The pictures to train on and those to evaluate on, with the same classes.

    Raises:
        ValueError: annotations that are refused, or no object in one of the two.
    """
    raw = read_annotations(arguments.data, arguments.train_split or None)
    train = validate_annotations(raw, arguments.faults)
    raw = read_annotations(arguments.eval_data or arguments.data, arguments.eval_split or None)
    held_out = validate_annotations(raw, arguments.faults, names=train.names)
    for name, pictures in (("data", train.pictures), ("eval_data", held_out.pictures)):
        if not any(len(picture.labels) > picture.crowd.sum() for picture in pictures):
            raise ValueError(f"{name}: expected pictures with objects, got none")
    return train, held_out


def detection_processor(source: str, size: dict[str, int]) -> FlorenceDetectionImageProcessor:
    """For a detector on the image tower of a checkpoint, with the normalisation that the tower was trained with."""
    tower = FlorenceImageProcessor.from_pretrained(source)
    return FlorenceDetectionImageProcessor(size=size, image_mean=tower.image_mean, image_std=tower.image_std)


def build_model(
    arguments: DetectionArguments, names: list[str]
) -> tuple[FlorenceForObjectDetection, FlorenceDetectionImageProcessor]:
    """A detector with these classes: new, on a pretrained tower, or going on from one with the same classes."""
    shape: dict[str, Any] = {"hidden_size": arguments.hidden_size, "num_blocks": arguments.num_blocks}
    shape["id2label"] = dict(enumerate(names))
    size = {"shortest_edge": arguments.shortest_edge, "longest_edge": arguments.longest_edge}
    if arguments.size:
        config = FlorenceDetectionConfig.from_size(arguments.size, **shape)
        return FlorenceForObjectDetection(config), FlorenceDetectionImageProcessor(size=size)
    source = arguments.init_from or bundled_checkpoint()
    kind = json.loads((Path(source) / "config.json").read_text("utf-8")).get("model_type")
    if kind == FlorenceDetectionConfig.model_type:
        model = FlorenceForObjectDetection.from_pretrained(source, dtype=torch.float32)
        if list(model.config.id2label.values()) != names:
            raise ValueError(f"expected the classes of {source}, {list(model.config.id2label.values())}, got {names}")
        return model, FlorenceDetectionImageProcessor.from_pretrained(source, size=size)
    model = FlorenceForObjectDetection.from_pretrained_backbone(source, **shape)
    return model, detection_processor(source, size)


def choose_trained(arguments: DetectionArguments, model: FlorenceForObjectDetection) -> nn.Module:
    """Freeze the image tower, put adapters into it, or leave all to be trained."""
    if arguments.freeze_backbone:
        model.freeze_backbone()
    if not arguments.lora_rank:
        return model
    targets = rf"backbone\..+\.({'|'.join(LORA_TARGETS)})"
    adapted = get_peft_model(
        model, LoraConfig(r=arguments.lora_rank, lora_alpha=2 * arguments.lora_rank, target_modules=targets)
    )
    for name, parameter in adapted.named_parameters():
        if ".backbone." not in name or ".feature_norms." in name:
            parameter.requires_grad_(True)
    return adapted


class Batches(StepBatches):
    """Augmented pictures with their objects."""

    def __init__(
        self,
        arguments: DetectionArguments,
        pictures: list[AnnotatedPicture],
        processor: FlorenceDetectionImageProcessor,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        super().__init__(arguments, len(pictures), rank, ranks)
        self.pictures, self.processor = pictures, processor
        self.transforms = training_transforms(
            arguments.augmentation,
            arguments.shortest_edge,
            arguments.longest_edge,
            crop=arguments.crop,
            color=arguments.color,
        )

    def name(self, row: int) -> str:
        return self.pictures[row].file.name

    def sample(self, row: int) -> dict[str, Any]:
        return self.transforms(read_sample(self.pictures[row], self.processor))

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        return collate_samples(samples, self.processor)


def draw_samples(batches: Batches, names: list[str], folder: Path, count: int) -> None:
    """Write the first augmented pictures with their boxes, as PNG."""
    folder.mkdir(parents=True, exist_ok=True)
    done = 0
    for step in range(len(batches)):
        for sample in batches.samples(step):
            if done == count:
                return
            picture = draw_objects(sample["image"], sample["boxes"], sample["labels"], names)
            to_pil_image(picture).save(folder / f"{done:04d}.png")
            done += 1


def draw_predictions(
    arguments: DetectionArguments,
    model: FlorenceForObjectDetection,
    processor: FlorenceDetectionImageProcessor,
    held_out: DetectionSet,
    file: Path,
    class_embeds: torch.Tensor | None = None,
) -> None:
    """A mosaic: pictures with their annotations, each beside the same picture with its detections.

    class_embeds: vectors of the classes, for an open-set detector.
    """
    tiles, shown = [], held_out.pictures[: arguments.shown]
    for part, detections in detect(model, processor, shown, threshold=arguments.threshold, class_embeds=class_embeds):
        for picture, found in zip(part, detections, strict=True):
            pixels = processor.process_image(picture.file)
            tiles.append(draw_objects(pixels, picture.boxes, picture.labels, held_out.names))
            found = {name: value.cpu() for name, value in found.items()}
            tiles.append(draw_objects(pixels, found["boxes"], found["labels"], held_out.names, found["scores"]))
    if tiles:
        to_pil_image(make_mosaic(tiles)).save(file)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train; returns the scores of the last evaluation in this process."""
    arguments = parse_arguments(DetectionArguments, sys.argv[1:] if argv is None else argv)
    output, accelerator = Path(arguments.output), arguments.make_accelerator()
    train, held_out = read_sets(arguments)
    accelerator.print(f"training: {train.report}\nevaluation: {held_out.report}")
    detector, processor = build_model(arguments, train.names)
    batches = Batches(arguments, train.pictures, processor, accelerator.process_index, accelerator.num_processes)
    if arguments.draw:
        if accelerator.is_main_process:
            draw_samples(batches, train.names, output / "draw", arguments.draw)
        accelerator.print(f"drew augmented pictures into {output / 'draw'}")
        return {}

    def evaluate(model: FlorenceForObjectDetection) -> dict[str, Any]:
        scores = evaluate_detector(
            model, processor, held_out.pictures, held_out.names, batch_size=arguments.batch_size
        )
        draw_predictions(arguments, model, processor, held_out, output / "predictions.png")
        (output / "classes.txt").write_text(scores.table() + "\n", "utf-8")
        tqdm.write(scores.table())
        return scores.as_dict()

    def save(model: FlorenceForObjectDetection, folder: Path) -> None:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)

    model, rate = choose_trained(arguments, detector), arguments.learning_rate
    groups = parameter_groups(
        model,
        arguments.weight_decay,
        {"feature_norms.": rate, "lora_": rate, "backbone.": arguments.backbone_rate * rate},  # the first that fits
        learning_rate=rate,
        layer_decay=arguments.layer_decay,
    )
    record = {"names": train.names, "pictures": len(train.pictures)}
    return fine_tune(
        arguments, accelerator, model, groups, batches, save=save, evaluate=evaluate, best="map", record=record
    )


if __name__ == "__main__":
    main()
