"""How well a detector learns in a given time: ours from the bundled tower, torchvision's from scratch, in one loop.

    python benchmarks/detection_quality.py --data folder-of-sets --sets det_raccoon det_bccd --seconds 180
    python benchmarks/detection_quality.py --data ... --models florence --blocks 0 2 6  # ablation of the Dynamic Head
    python benchmarks/detection_quality.py --data ... --models florence florence-random  # what pretraining gives

A set is a folder that `data.detection_readers.read_annotations` reads, with the splits train and valid. All models of
a set see the same pictures of the same size with the same augmentation, in the same order, in batches of one size, and
are trained by AdamW with the same cosine over the time that they have. Time is processor time, so that a busy machine
does not count, and the models take turns of a few seconds, so that what the machine does besides hits all alike. The
peers are torchvision's RetinaNet and FCOS on a ResNet-18 with batch norm, trained whole, of as many channels as ours.

Prints one JSON line for each set, model and seed: COCO's mAP and mAP50 on the valid split at the end, parameters,
steps, and pictures a second in training and in evaluation. Needs the extra `detection`.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchvision.models import resnet18
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops.feature_pyramid_network import LastLevelP6P7
from torchvision.transforms.v2.functional import to_dtype

from transformers_florence import (
    FlorenceDetectionImageProcessor,
    FlorenceForObjectDetection,
    FlorenceImageProcessor,
    bundled_checkpoint,
)
from transformers_florence.data.detection import AnnotatedPicture, DetectionSet, validate_annotations
from transformers_florence.data.detection_readers import read_annotations
from transformers_florence.data.detection_transforms import SCALES, collate_samples, read_sample, training_transforms
from transformers_florence.evaluation.detection import DetectionEvaluator, DetectionScores
from transformers_florence.training.optimization import parameter_groups

MODELS = ("florence", "florence-random", "retinanet", "fcos")
SETS = ("det_raccoon", "det_pothole", "det_aquarium", "det_packages", "det_bccd", "det_kangaroo")
STAGES = [2, 3, 4]  # of the ResNet, strides 8 to 32
THRESHOLD = 0.01  # of the scores that are evaluated
CANDIDATES = 300  # of a level, that the peers suppress; torchvision's 1000 take seconds while nothing is learnt yet
TURN = 5.0  # seconds of the processor that a model is trained for before the next one's turn
WARM_UP = 0.05  # part of the time in which the learning rate rises
MAX_NORM = 1.0  # of the gradient


class Florence:
    """Our detector: the recipe of examples/finetune_detection.py."""

    def __init__(self, options: argparse.Namespace, names: list[str], blocks: int, pretrained: bool) -> None:
        folder = bundled_checkpoint()
        self.model = FlorenceForObjectDetection.from_pretrained_backbone(
            folder, hidden_size=options.channels, num_blocks=blocks, id2label=dict(enumerate(names))
        )
        if not pretrained:
            self.model = FlorenceForObjectDetection(self.model.config)
        tower = FlorenceImageProcessor.from_pretrained(folder)
        self.processor = FlorenceDetectionImageProcessor(image_mean=tower.image_mean, image_std=tower.image_std)
        rate = options.rate
        below = 0.2 * rate if pretrained else rate
        own = {"feature_norms.": rate, "backbone.": below}
        layer_decay = 0.9 if pretrained else 1.0
        self.groups = parameter_groups(self.model, 0.05, own, learning_rate=rate, layer_decay=layer_decay)

    def loss(self, samples: list[dict[str, Any]]) -> torch.Tensor:
        return self.model(**collate_samples(samples, self.processor)).loss

    def detect(self, samples: list[dict[str, Any]]) -> list[dict[str, torch.Tensor]]:
        """Boxes as corners in the pixels of each sample."""
        batch = collate_samples(samples, self.processor)
        outputs = self.model(batch["pixel_values"], batch["pixel_mask"])
        sizes = [tuple(sample["image"].shape[-2:]) for sample in samples]
        return self.processor.post_process_object_detection(outputs, THRESHOLD, target_sizes=sizes)


class Torchvision:
    """A detector of torchvision's on a ResNet-18 from scratch, with batch norm instead of frozen statistics."""

    def __init__(self, options: argparse.Namespace, names: list[str], kind: str) -> None:
        body, channels = resnet18(norm_layer=nn.BatchNorm2d), options.channels
        widths = [body.inplanes // 2 ** (STAGES[-1] - stage) for stage in STAGES]
        layers = {f"layer{stage}": str(level) for level, stage in enumerate(STAGES)}
        extra = LastLevelP6P7(channels, channels)
        backbone = BackboneWithFPN(body, layers, widths, channels, extra_blocks=extra)
        # The samples have their final size, and the pictures of a batch are padded alike for all models.
        settings: dict[str, Any] = {"score_thresh": THRESHOLD, "detections_per_img": 100, "_skip_resize": True}
        settings["topk_candidates"] = CANDIDATES
        if kind == "retinanet":
            self.model: nn.Module = RetinaNet(backbone, len(names), **settings)
        else:
            anchors = AnchorGenerator(((8,), (16,), (32,), (64,), (128,)), ((1.0,),) * 5)
            self.model = FCOS(backbone, len(names), anchor_generator=anchors, **settings)
        self.groups = parameter_groups(self.model, 0.05, {}, learning_rate=options.peer_rate)

    def pictures(self, samples: list[dict[str, Any]]) -> list[torch.Tensor]:
        return [to_dtype(sample["image"].as_subclass(torch.Tensor), torch.float32, scale=True) for sample in samples]

    def loss(self, samples: list[dict[str, Any]]) -> torch.Tensor:
        plain = torch.Tensor
        targets = [{name: sample[name].as_subclass(plain) for name in ("boxes", "labels")} for sample in samples]
        return torch.stack(list(self.model(self.pictures(samples), targets).values())).sum()

    def detect(self, samples: list[dict[str, Any]]) -> list[dict[str, torch.Tensor]]:
        """Boxes as corners in the pixels of each sample."""
        return self.model(self.pictures(samples))


def make_detector(name: str, options: argparse.Namespace, names: list[str]) -> Any:
    """`florence`, `florence-random`, each with the Dynamic Head's blocks behind a plus, `retinanet` or `fcos`."""
    kind, _, blocks = name.partition("+")
    if kind in ("retinanet", "fcos"):
        return Torchvision(options, names, kind)
    return Florence(options, names, int(blocks), kind == "florence")


def shrink(sample: dict[str, Any], shortest: int, longest: int) -> dict[str, Any]:
    """No larger than augmentation asks for, so that reading pictures does not take the time of learning from them."""
    return training_transforms("none", math.ceil(SCALES[1] * shortest), math.ceil(SCALES[1] * longest))(sample)


class Run:
    """One model in training, a turn at a time."""

    def __init__(self, name: str, options: argparse.Namespace, seed: int, samples: list, names: list[str]) -> None:
        torch.manual_seed(seed)
        self.name, self.options, self.seed, self.samples = name, options, seed, samples
        self.detector = make_detector(name, options, names)
        self.optimizer = torch.optim.AdamW(self.detector.groups)
        self.highest = [group["lr"] for group in self.optimizer.param_groups]
        self.transforms = training_transforms(
            "multiscale", options.shortest_edge, options.longest_edge, crop=options.crop
        )
        self.steps, self.spent, self.random = 0, 0.0, torch.get_rng_state()

    def rows(self) -> Iterator[int]:
        """The set again and again, in orders that depend on the seed alone."""
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            yield from torch.randperm(len(self.samples), generator=generator).tolist()

    def step(self, rows: Iterator[int]) -> None:
        done = min(1.0, self.spent / self.options.seconds)
        factor = min(1.0, done / WARM_UP) * (1 + math.cos(math.pi * done)) / 2
        for group, highest in zip(self.optimizer.param_groups, self.highest, strict=True):
            group["lr"] = max(factor, 1e-3) * highest
        batch = [self.transforms(self.samples[next(rows)]) for _ in range(self.options.batch)]
        self.optimizer.zero_grad()
        self.detector.loss(batch).backward()
        nn.utils.clip_grad_norm_(self.detector.model.parameters(), MAX_NORM)
        self.optimizer.step()
        self.steps += 1

    def train(self) -> Iterator[None]:
        """Trains for the time that there is, with a pause after each turn."""
        rows, turn = self.rows(), 0.0
        self.detector.model.train()
        while self.spent < self.options.seconds:
            started = time.process_time()
            torch.set_rng_state(self.random)
            self.step(rows)
            self.random = torch.get_rng_state()
            taken = time.process_time() - started
            self.spent, turn = self.spent + taken, turn + taken
            if turn > TURN:
                turn = 0.0
                yield

    @torch.no_grad()
    def evaluate(self, held_out: DetectionSet, samples: list) -> tuple[DetectionScores, float]:
        """Scores on the held-out pictures, and the pictures a second of the processor."""
        evaluator, size = DetectionEvaluator(held_out.names), self.options.batch
        self.detector.model.eval()
        spent = 0.0
        for start in range(0, len(samples), size):
            part, pictures = samples[start : start + size], held_out.pictures[start : start + size]
            started = time.process_time()
            found = self.detector.detect(part)
            spent += time.process_time() - started
            evaluator.update(
                [full_size(each, *pair) for each, *pair in zip(found, part, pictures, strict=True)], pictures
            )
        return evaluator.compute(), len(samples) / spent

    def result(self, held_out: DetectionSet, samples: list) -> dict[str, Any]:
        scores, speed = self.evaluate(held_out, samples)
        return {
            "model": self.name,
            "seed": self.seed,
            "map": round(100 * scores.map, 1),
            "map_50": round(100 * scores.map_50, 1),
            "parameters": sum(weight.numel() for weight in self.detector.model.parameters()),
            "steps": self.steps,
            "training_pictures_per_second": round(self.steps * self.options.batch / self.spent, 2),
            "evaluation_pictures_per_second": round(speed, 2),
        }


def full_size(found: dict[str, torch.Tensor], sample: dict[str, Any], picture: AnnotatedPicture) -> dict[str, Any]:
    """Boxes in the pixels of the picture as it was."""
    height, width = (full / side for full, side in zip(picture.size, sample["image"].shape[-2:], strict=True))
    return found | {"boxes": found["boxes"] * found["boxes"].new_tensor([width, height, width, height])}


def compare(folder: Path, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The result of each model and seed on one set."""
    train = validate_annotations(read_annotations(folder, "train"), "clip")
    held_out = validate_annotations(read_annotations(folder, "valid"), "clip", train.names)
    processor = FlorenceDetectionImageProcessor()
    sides = (options.shortest_edge, options.longest_edge)
    samples = [shrink(read_sample(picture, processor), *sides) for picture in train.pictures]
    resized = training_transforms("none", *sides)
    tests = [resized(read_sample(picture, processor)) for picture in held_out.pictures]
    names = []
    for name in options.models:
        names += [f"{name}+{blocks}" for blocks in options.blocks] if name.startswith("florence") else [name]
    for seed in options.seeds:
        runs = [Run(name, options, seed, samples, train.names) for name in names]
        turns = [run.train() for run in runs]
        while turns:
            turns = [turn for turn in turns if next(turn, StopIteration) is not StopIteration]
            print(
                f"{folder.name}: {[round(run.spent) for run in runs]} seconds", end="\r", file=sys.stderr, flush=True
            )
        for run in runs:
            yield {"set": folder.name, "seconds": options.seconds, **run.result(held_out, tests)}


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Compare; returns what is printed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds the sets")
    parser.add_argument("--sets", nargs="+", default=list(SETS), help="folders in it")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["florence", "retinanet"])
    parser.add_argument("--blocks", type=int, nargs="+", default=[2], help="of our Dynamic Head")
    parser.add_argument("--channels", type=int, default=128, help="of every pyramid and head")
    parser.add_argument("--seconds", type=float, default=180.0, help="of the processor, for each model on each set")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rate", type=float, default=5e-4, help="our learning rate")
    parser.add_argument("--peer_rate", type=float, default=5e-4, help="the peers'")
    parser.add_argument("--crop", type=float, default=0.0, help="part of the pictures that are cut around objects")
    parser.add_argument("--shortest_edge", type=int, default=224, help="of the pictures, pixels")
    parser.add_argument("--longest_edge", type=int, default=320)
    options = parser.parse_args(argv)
    missing = [name for name in options.sets if not (options.data / name).is_dir()]
    if missing:
        parser.error(f"expected the folders {', '.join(missing)} in {options.data}, got none")
    results = []
    for name in options.sets:
        for result in compare(options.data / name, options):
            results.append(result)
            print(json.dumps(result), flush=True)
    return results


if __name__ == "__main__":
    main()
