"""Fine-tune Video CoSwin, inflated from an image tower, to recognise actions in clips.

    python examples/finetune_video.py --data videos --output runs/video  # a folder of videos for each class
    python examples/finetune_video.py --data_format kinetics --data train.csv --eval_data val.csv --root clips
    python examples/finetune_video.py --data_format filmstrips --data fir_action --size nano  # random weights
    accelerate launch --num_processes 8 examples/finetune_video.py --config ... --batch_size 64

Every field of `RecognitionArguments` is an option of the command line and a key of the YAML file; the command line
wins. The output holds `best`, the model and video processor of the best epoch with its `scores.json`; `log.csv` and
`curves.png`; and checkpoints, from which an interrupted run goes on when the same command is given again: every random
choice of step n depends on the seed and on n alone. Needs the extras `train` and `video`.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from tqdm.auto import tqdm

from transformers_florence import FlorenceForVideoClassification, FlorenceVideoConfig, FlorenceVideoProcessor
from transformers_florence.data.video import Clip, class_names
from transformers_florence.data.video_transforms import collate_clips, mix_clips
from transformers_florence.evaluation.video import evaluate_recognition
from transformers_florence.training.arguments import parse_arguments
from transformers_florence.training.optimization import parameter_groups
from transformers_florence.training.recipe import fine_tune
from video_recipes import ClipBatches, VideoArguments, make_processor, read_sets


@dataclass
class RecognitionArguments(VideoArguments):
    """What a run is made of besides what both video recipes are told."""

    output: str = "runs/video"
    label_smoothing: float = 0.1
    mixup: float = 0.0  # parameter of its beta distribution; 0 for none
    eval_clips: int = 1  # views of a clip in evaluation: clips over time, times
    eval_crops: int = 1  # crops of each, 1 or 3 (the paper: 4 and 3)

    free: ClassVar = (*VideoArguments.free, "eval_clips", "eval_crops")


class Batches(ClipBatches):
    """Clips with the numbers of their classes, mixed if the arguments say so."""

    def __init__(
        self,
        arguments: RecognitionArguments,
        clips: Sequence[Clip],
        names: list[str],
        processor: FlorenceVideoProcessor,
        **ranks: int,
    ) -> None:
        super().__init__(arguments, clips, processor, **ranks)
        self.names, self.mixup = names, arguments.mixup

    def sample(self, row: int) -> dict[str, Any]:
        clip = self.clips[row]
        frames = self.frames(clip)
        return {"frames": frames, "label": self.names.index(str(clip.label)), "seed": int(torch.randint(1 << 31, ()))}

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        pixels = collate_clips([sample["frames"] for sample in samples], self.processor)
        labels = torch.tensor([sample["label"] for sample in samples])
        if self.mixup:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(samples[0]["seed"])
                pixels, labels = mix_clips(pixels, labels, len(self.names), self.mixup)
        return {"pixel_values_videos": pixels, "labels": labels}


def build_model(arguments: RecognitionArguments, names: list[str]) -> FlorenceForVideoClassification:
    """A classifier of these classes: new, inflated from an image tower, or going on from one with the same classes."""
    fields: dict[str, Any] = {"id2label": dict(enumerate(names)), "label_smoothing": arguments.label_smoothing}
    fields["problem_type"] = "single_label_classification"  # also for labels that are mixed
    if arguments.size:
        config = FlorenceVideoConfig.from_size(arguments.size, **arguments.shape, **fields)
        return FlorenceForVideoClassification(config)
    kind = json.loads((arguments.source / "config.json").read_text("utf-8")).get("model_type")
    if kind != FlorenceVideoConfig.model_type:
        return FlorenceForVideoClassification.from_pretrained_image(arguments.source, **arguments.shape, **fields)
    model = FlorenceForVideoClassification.from_pretrained(arguments.source, dtype=torch.float32)
    if list(model.config.id2label.values()) != names:
        there = list(model.config.id2label.values())
        raise ValueError(f"expected the classes of {arguments.source}, {there}, got {names}")
    return model


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train; returns the scores of the last evaluation in this process."""
    arguments = parse_arguments(RecognitionArguments, sys.argv[1:] if argv is None else argv)
    accelerator = arguments.make_accelerator()
    train, held_out = read_sets(arguments)
    names = class_names(train)
    accelerator.print(f"{len(train)} clips to train on, {len(held_out)} to evaluate on, {len(names)} classes")
    model = build_model(arguments, names)
    processor = make_processor(arguments, model.config.image_size)
    ranks = {"rank": accelerator.process_index, "ranks": accelerator.num_processes}
    batches = Batches(arguments, train, names, processor, **ranks)

    def evaluate(plain: FlorenceForVideoClassification) -> dict[str, Any]:
        views = {"num_clips": arguments.eval_clips, "num_crops": arguments.eval_crops}
        scores = evaluate_recognition(plain, processor, held_out, **views, batch_size=arguments.batch_size)
        tqdm.write(f"top-1 {scores.top_1:.1%}, top-5 {scores.top_5:.1%}, mean class {scores.mean_class:.1%}")
        return scores.as_dict()

    def save(plain: FlorenceForVideoClassification, folder: Path) -> None:
        plain.save_pretrained(folder)
        processor.save_pretrained(folder)

    groups = parameter_groups(model, arguments.weight_decay, arguments.rates, learning_rate=arguments.learning_rate)
    record = {"names": names, "clips": len(train)}
    options = {"save": save, "evaluate": evaluate, "best": "top_1", "record": record}
    return fine_tune(arguments, accelerator, model, groups, batches, **options)


if __name__ == "__main__":
    main()
