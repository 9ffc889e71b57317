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

import copy
import json
import math
import shutil
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2.functional import to_pil_image
from tqdm.auto import tqdm
from transformers import get_cosine_schedule_with_warmup

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
from transformers_florence.evaluation.detection import DetectionScores, detect, evaluate_detector
from transformers_florence.training.arguments import parse_arguments
from transformers_florence.training.checkpointing import SHARDED, resume_training, save_checkpoint
from transformers_florence.training.lora import LORA_TARGETS
from transformers_florence.training.optimization import parameter_groups
from transformers_florence.training.sharding import make_accelerator
from transformers_florence.training.stability import GuardedUpdate, StopRequest
from transformers_florence.training.tracking import LocalTracker, make_trackers

# These may differ when a run goes on; a checkpoint belongs to all others.
FREE = ("output", "workers", "log_every", "keep", "non_finite", "report_to", "draw", "shown", "threshold")


@dataclass
class DetectionArguments:
    """What a run is made of; two runs with equal arguments on one machine give equal weights."""

    data: str = "pictures"  # folder, or annotation file
    eval_data: str = ""  # the same for evaluation; `data` if empty
    train_split: str = "train"  # empty for all of `data`
    eval_split: str = "valid"  # empty for all of `eval_data`
    faults: str = "clip"  # what faulty annotations do: raise, clip, or drop
    output: str = "runs/detector"
    init_from: str = ""  # checkpoint with an image tower, or a detector's; the bundled one if empty
    size: str = ""  # of new weights, instead of a checkpoint
    hidden_size: int = 128  # channels of a new pyramid and head
    num_blocks: int = 2  # of a new Dynamic Head
    freeze_backbone: bool = False
    lora_rank: int = 0  # of adapters in the image tower, which else stays as it is; 0 for none
    epochs: int = 12
    batch_size: int = 8  # pictures of a step, on all processes together
    learning_rate: float = 5e-4
    backbone_rate: float = 0.2  # learning rate of the image tower, relative to the others'
    layer_decay: float = 0.9  # factor of the rate for each layer of the tower further down
    weight_decay: float = 0.05
    warmup_steps: int = 50
    max_grad_norm: float = 1.0
    shortest_edge: int = 256  # of the pictures, pixels
    longest_edge: int = 416
    augmentation: str = "multiscale"  # none, flip, multiscale or jitter: see `training_transforms`
    crop: float = 0.0  # part of the pictures that are cut around some of their objects
    color: float = 0.0  # part of the pictures whose colours are changed
    precision: str = "auto"  # auto: bfloat16 autocast on a GPU, float32 on a CPU; float32; bfloat16
    workers: int = 0  # processes that read and augment
    log_every: int = 10
    eval_every: int = 1  # epochs
    keep: int = 1  # checkpoints, the newest ones, besides the best model
    shown: int = 8  # pictures in predictions.png
    threshold: float = 0.3  # of the detections in it
    non_finite: str = "raise"  # what a loss or a gradient that is not finite does: raise, or skip the step
    report_to: str = "local"  # local: log.csv and curves.png in the output; trackers of Accelerate's; none
    draw: int = 0  # write so many augmented training pictures with their boxes to the output, and train nothing
    seed: int = 0

    def __post_init__(self) -> None:
        choices = {
            "faults": MODES,
            "augmentation": AUGMENTATIONS,
            "precision": ("auto", "float32", "bfloat16"),
            "non_finite": ("raise", "skip"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        from_zero = ("seed", "warmup_steps", "lora_rank", "num_blocks", "workers", "draw", "shown")
        for field in fields(self):
            value, least = getattr(self, field.name), 0 if field.name in from_zero else 1
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if field.type is int and not (isinstance(value, int) and is_number and value >= least):
                raise ValueError(f"{field.name}: expected an integer >= {least}, got {value!r}")
            if field.type is float and not (is_number and 0 <= value < math.inf):
                raise ValueError(f"{field.name}: expected a finite number >= 0, got {value!r}")
            if field.type in (str, bool) and not isinstance(value, field.type):
                raise ValueError(f"{field.name}: expected a {field.type.__name__}, got {value!r}")
        if self.size and self.init_from:
            raise ValueError(f"expected size or init_from, got both, {self.size!r} and {self.init_from!r}")
        if self.freeze_backbone and self.lora_rank:
            raise ValueError(f"expected freeze_backbone or lora_rank, got both, the rank {self.lora_rank}")
        if self.seed >= 1 << 31:
            raise ValueError(f"seed: expected less than 2 to the power of 31, got {self.seed}")


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
    tower = FlorenceImageProcessor.from_pretrained(
        source
    )  # a tower expects the normalisation that it was trained with
    return model, FlorenceDetectionImageProcessor(size=size, image_mean=tower.image_mean, image_std=tower.image_std)


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


def plain_detector(model: nn.Module) -> FlorenceForObjectDetection:
    """The detector itself; adapters are merged into a copy of its weights."""
    return copy.deepcopy(model).merge_and_unload() if isinstance(model, PeftModel) else model


class Batches(Dataset):
    """The batch of a step, made of the seed and the step alone: a rank's part of it."""

    def __init__(
        self,
        arguments: DetectionArguments,
        pictures: list[AnnotatedPicture],
        processor: FlorenceDetectionImageProcessor,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        size = arguments.batch_size
        if size % ranks:
            raise ValueError(f"batch_size: expected a multiple of {ranks} processes, got {size}")
        if len(pictures) < size:
            raise ValueError(f"expected at least batch_size={size} pictures, got {len(pictures)}")
        self.arguments, self.pictures, self.processor = arguments, pictures, processor
        self.part = slice(rank * size // ranks, (rank + 1) * size // ranks)
        self.per_epoch = len(pictures) // size
        self.transforms = training_transforms(
            arguments.augmentation,
            arguments.shortest_edge,
            arguments.longest_edge,
            crop=arguments.crop,
            color=arguments.color,
        )

    def __len__(self) -> int:
        return self.per_epoch * self.arguments.epochs

    def samples(self, step: int) -> tuple[list[dict[str, Any]], list[str]]:
        """Augmented pictures with their objects, and the names of their files."""
        epoch, place = divmod(step, self.per_epoch)
        seed, size = self.arguments.seed, self.arguments.batch_size
        order = torch.randperm(len(self.pictures), generator=torch.Generator().manual_seed((seed << 32) + epoch))
        rows = order[place * size : (place + 1) * size].tolist()
        samples = []
        with torch.random.fork_rng(devices=[]):
            for number, row in list(enumerate(rows))[self.part]:
                torch.manual_seed((seed << 32) + step * size + number)
                samples.append(self.transforms(read_sample(self.pictures[row], self.processor)))
        return samples, [self.pictures[row].file.name for row in rows[self.part]]

    def __getitem__(self, step: int) -> dict[str, Any]:
        """`inputs` of the model, and `files` that they were made of."""
        samples, files = self.samples(step)
        return {"inputs": collate_samples(samples, self.processor), "files": files}


def draw_samples(batches: Batches, names: list[str], folder: Path, count: int) -> None:
    """Write the first augmented pictures with their boxes, as PNG."""
    folder.mkdir(parents=True, exist_ok=True)
    done = 0
    for step in range(len(batches)):
        for sample in batches.samples(step)[0]:
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
) -> None:
    """A mosaic: pictures with their annotations, each beside the same picture with its detections."""
    tiles = []
    for part, detections in detect(
        model, processor, held_out.pictures[: arguments.shown], threshold=arguments.threshold
    ):
        for picture, found in zip(part, detections, strict=True):
            pixels = processor.process_image(picture.file)
            tiles.append(draw_objects(pixels, picture.boxes, picture.labels, held_out.names))
            found = {name: value.cpu() for name, value in found.items()}
            tiles.append(draw_objects(pixels, found["boxes"], found["labels"], held_out.names, found["scores"]))
    if tiles:
        to_pil_image(make_mosaic(tiles)).save(file)


def save_best(
    model: FlorenceForObjectDetection, processor: FlorenceDetectionImageProcessor, scores: dict[str, Any], folder: Path
) -> None:
    """Write the model beside the former best one, and only then put it in its place."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    processor.save_pretrained(partial)
    (partial / "scores.json").write_text(json.dumps(scores, indent=2), "utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def check_same_run(output: Path, record: dict[str, Any]) -> None:
    """Raises ValueError if the output holds checkpoints of a run with other arguments."""
    file = output / "arguments.json"
    if not any(output.glob("checkpoint-*")) or not file.is_file():
        return
    before = json.loads(file.read_text("utf-8"))
    changed = [name for name in record if name not in FREE and before.get(name) != record[name]]
    if changed:
        got = ", ".join(f"{name} {before.get(name)!r} there and {record[name]!r} now" for name in changed)
        raise ValueError(f"{output} holds another run: expected equal arguments or another output, got {got}")


def check_not_sharded(accelerator: Accelerator) -> None:
    """Raises ValueError where the processes would share the weights: a small detector gains nothing by it."""
    if accelerator.distributed_type in SHARDED:
        got = accelerator.distributed_type.value
        raise ValueError(f"expected processes with all weights each, got {got}: launch without it")


def main(argv: list[str] | None = None) -> DetectionScores | None:
    """Train; returns the scores of the last evaluation in this process."""
    arguments = parse_arguments(DetectionArguments, sys.argv[1:] if argv is None else argv)
    output = Path(arguments.output)
    output.mkdir(parents=True, exist_ok=True)
    autocast = arguments.precision == "bfloat16" or (arguments.precision == "auto" and torch.cuda.is_available())
    accelerator = make_accelerator(
        mixed_precision="bf16" if autocast else "no",
        log_with=make_trackers(arguments.report_to, output),
        project_dir=str(output),
        step_scheduler_with_optimizer=False,  # or the schedule would move once for each rank
    )
    rank, ranks = accelerator.process_index, accelerator.num_processes
    check_not_sharded(accelerator)
    torch.manual_seed(arguments.seed)
    train, held_out = read_sets(arguments)
    accelerator.print(f"training: {train.report}\nevaluation: {held_out.report}")
    detector, processor = build_model(arguments, train.names)
    batches = Batches(arguments, train.pictures, processor, rank, ranks)
    if arguments.draw:
        if accelerator.is_main_process:
            draw_samples(batches, train.names, output / "draw", arguments.draw)
        accelerator.print(f"drew augmented pictures into {output / 'draw'}")
        return None
    record = {**asdict(arguments), "names": train.names, "pictures": len(train.pictures)}
    check_same_run(output, record)

    trained = choose_trained(arguments, detector)
    steps = len(batches)
    rate = arguments.learning_rate
    groups = parameter_groups(
        trained,
        arguments.weight_decay,
        {"feature_norms.": rate, "lora_": rate, "backbone.": arguments.backbone_rate * rate},  # the first that fits
        learning_rate=rate,
        layer_decay=arguments.layer_decay,
    )
    optimizer = torch.optim.AdamW(groups, lr=rate)
    schedule = get_cosine_schedule_with_warmup(optimizer, arguments.warmup_steps, steps)
    model, optimizer, schedule = accelerator.prepare(trained, optimizer, schedule)
    update = GuardedUpdate(
        accelerator,
        optimizer,
        schedule,
        [parameter for parameter in trained.parameters() if parameter.requires_grad],
        max_grad_norm=arguments.max_grad_norm,
        policy=arguments.non_finite,
    )
    first, best, progress = 0, -1.0, resume_training(accelerator, output)
    if progress is not None:
        first, best = progress.step, progress.extra["best"]
        update.load_state_dict(progress.extra["update"])
        accelerator.print(f"resumed from {progress.folder} at step {first}")
    accelerator.init_trackers("florence-detection", config={key: str(value) for key, value in record.items()})
    for tracker in accelerator.trackers:
        if isinstance(tracker, LocalTracker):
            tracker.go_on_after(first)
    if accelerator.is_main_process:
        (output / "arguments.json").write_text(json.dumps(record, indent=2), "utf-8")
    sizes = [sum(p.numel() for p in trained.parameters() if p.requires_grad or not only) for only in (True, False)]
    accelerator.print(f"{sizes[0]:,} of {sizes[1]:,} parameters are trained, {batches.per_epoch} steps an epoch")

    # Its own generator: else it would draw from torch's, and a run that was interrupted would go another way.
    loader = DataLoader(
        batches,
        sampler=range(first, steps),
        batch_size=None,
        num_workers=arguments.workers,
        generator=torch.Generator().manual_seed(arguments.seed),
    )
    bar = tqdm(loader, initial=first, total=steps, desc="training", disable=not accelerator.is_main_process)
    started, seen, scores = time.monotonic(), 0, None
    model.train()
    with StopRequest() as stop:
        for step, batch in enumerate(bar, start=first):
            torch.manual_seed((arguments.seed << 32) + step * ranks + rank)  # of drop path
            inputs = {name: value for name, value in batch["inputs"].items() if name != "labels"}
            inputs = {name: value.to(accelerator.device) for name, value in inputs.items()}
            inputs["labels"] = [
                {name: value.to(accelerator.device) for name, value in label.items()}
                for label in batch["inputs"]["labels"]
            ]
            outputs = model(**inputs)
            accelerator.backward(outputs.loss)
            highest = max(schedule.get_last_lr())
            norm = update(outputs.loss, step=step, samples=batch["files"]).gradient_norm
            seen, done, entry = seen + arguments.batch_size, step + 1, {}
            if done % arguments.log_every == 0:
                losses = torch.stack([outputs.loss, *outputs.loss_dict.values()]).detach()
                means = accelerator.reduce(losses, "mean").tolist()
                names = ["loss", *outputs.loss_dict]
                entry = {name: round(value, 4) for name, value in zip(names, means, strict=True)}
                speed = seen / (time.monotonic() - started)
                entry |= {"gradient_norm": norm, "learning_rate": highest, "pictures_per_second": round(speed, 2)}
                bar.set_postfix(loss=entry["loss"], refresh=False)
            ends_epoch = done % batches.per_epoch == 0
            evaluates = done == steps or (ends_epoch and done // batches.per_epoch % arguments.eval_every == 0)
            if evaluates and accelerator.is_main_process:
                plain = plain_detector(accelerator.unwrap_model(model)).eval()
                scores = evaluate_detector(
                    plain, processor, held_out.pictures, held_out.names, batch_size=arguments.batch_size
                )
                draw_predictions(arguments, plain, processor, held_out, output / "predictions.png")
                table = scores.table()
                (output / "classes.txt").write_text(table + "\n", "utf-8")
                tqdm.write(f"step {done}\n{table}")
                entry |= scores.numbers()
                if scores.map > best:
                    best = scores.map
                    save_best(plain, processor, {"step": done, **scores.as_dict()}, output / "best")
            model.train()
            if entry:
                accelerator.log(entry, step=done)
            stopped = stop.requested(accelerator)
            if ends_epoch or stopped:
                extra = {"update": update.state_dict(), "best": best}
                save_checkpoint(accelerator, output, done, extra=extra, keep=arguments.keep)
            if stopped and done < steps:
                accelerator.print(f"asked to stop: saved step {done}; the same command goes on from there")
                break
    accelerator.end_training()
    accelerator.print(f"best mean average precision {best:.4f}, in {output / 'best'}")
    return scores


if __name__ == "__main__":
    main()
