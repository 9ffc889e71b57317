"""How well video models learn in a given time of the processor: ours, torchvision's, and four ways to use pictures.

    python benchmarks/video_quality.py actions --data fir_action --output runs.jsonl
    python benchmarks/video_quality.py retrieval --data emoji_video --eval_split valid --output runs.jsonl
    python benchmarks/video_quality.py joint --data emoji_video --eval_split valid --pictures stills --output ...

`--data` is a folder of filmstrips (`data.video.read_filmstrips`). Without `--eval_split` a quarter of its clips is
held out, by films and by the seed. All models of a task see frames of one size, augmented alike, in batches of one
size, and are trained by AdamW with one cosine over the time that they have. Time is processor time, so that a busy
machine does not count; reading the clips and the evaluation are not in it.

- actions: top-1 and mean class accuracy. `florence` is inflated from the bundled image tower, `florence-random` begins
  with new weights; `r2plus1d` is torchvision's R(2+1)D-18 with half its channels, `mvit` its MViTv2 with the depths
  and widths of ours: similar numbers of parameters, from new weights.
- retrieval: each row's `text` finds its clip among the held-out ones, and back. `florence` is the bundled dual
  encoder, inflated; `pooled` the same with its image tower on each frame and the mean over them; `swin3d` has
  torchvision's Swin3D-T with the width of ours, from new weights, in the video tower's place: the text tower and the
  loss are the same.
- joint: the same task from new weights in both towers, with pictures (`--pictures`, `data.captions.read_captions`) as
  clips of one frame. `video`: clips alone; `joint`: steps of both in turns; `image-then-video`: pictures for half of
  the time, then clips; `decoupled`: pictures for half of the time, then both in turns (OmniVL, Wang et al. 2022).

Appends a JSON line for each run to `--output`, where runs that it holds already are not made again, and prints mean
and standard deviation over the seeds. `--seconds 0` scores what has not been trained.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models.video.mvit import MSBlockConfig, MViT
from torchvision.models.video.resnet import BasicBlock, Conv2Plus1D, R2Plus1dStem, VideoResNet
from torchvision.models.video.swin_transformer import SwinTransformer3d
from transformers.modeling_outputs import BaseModelOutputWithPooling

from transformers_florence import (
    FlorenceForVideoClassification,
    FlorenceForVideoTextRetrieval,
    FlorenceImageProcessor,
    FlorenceTokenizer,
    FlorenceVideoConfig,
    FlorenceVideoProcessor,
    bundled_checkpoint,
)
from transformers_florence.data.captions import read_captions
from transformers_florence.data.sources import text_label
from transformers_florence.data.video import Clip, class_names, read_filmstrips, split_by_film
from transformers_florence.data.video_transforms import (
    augment_clip,
    collate_clips,
    make_views,
    open_clip,
    training_transforms,
)
from transformers_florence.evaluation.video import evaluate_video_retrieval, recognition_scores
from transformers_florence.training.optimization import parameter_groups
from transformers_florence.video_processing_florence import sample_frame_indices

MODELS = {
    "actions": ("florence", "florence-random", "r2plus1d", "mvit"),
    "retrieval": ("florence", "pooled", "swin3d"),
    "joint": ("video", "joint", "image-then-video", "decoupled"),
}
SCORES = {
    "actions": ("top_1", "mean_class"),
    "retrieval": ("text_to_video_recall_1", "text_to_video_recall_5", "text_to_video_recall_10"),
}
SCORES["joint"] = SCORES["retrieval"]
SETTINGS = ("task", "seconds", "side", "frames", "batch", "picture_batch", "rate", "backbone_rate", "peer_rate")
HELD_OUT = 0.25  # share of the clips
WARM_UP = 0.05  # part of the time in which the learning rate rises
MAX_NORM = 1.0  # of the gradient
CROPS = (0.5, 1.0)  # of the area that a random crop keeps
SMOOTHING = 0.1  # of the labels
VIEWS = 2  # clips over time, whose probabilities are averaged
DECAY = 0.05
TABLE_RATE = 10.0  # of position tables, relative to the others', as in the recipes
SCHEDULES = {"joint": (0.0, True), "image-then-video": (0.5, False), "decoupled": (0.5, True)}
WINDOWS = {"temporal_stride": 2, "temporal_window_size": 4}
FRAMES_ALONE = {"temporal_stride": 1, "temporal_window_size": 1}  # the image tower on each frame


class NarrowVideoResNet(VideoResNet):
    """torchvision's with half the channels in its four layers."""

    def _make_layer(self, block: Any, conv_builder: Any, planes: int, blocks: int, stride: int = 1) -> nn.Sequential:
        return super()._make_layer(block, conv_builder, planes // 2, blocks, stride)


def make_r2plus1d(classes: int) -> nn.Module:
    """R(2+1)D-18 (Tran et al. 2018) with half its channels."""
    net = NarrowVideoResNet(BasicBlock, [Conv2Plus1D] * 4, [2, 2, 2, 2], R2Plus1dStem)
    net.fc = nn.Linear(net.fc.in_features // 2, classes)
    return net


def make_mvit(config: FlorenceVideoConfig, side: int, frames: int, classes: int) -> nn.Module:
    """MViTv2 (Li et al. 2022) as torchvision builds its small one, with the depths and widths of our tower."""
    blocks, before = [], config.embed_dim
    for stage, (depth, dim) in enumerate(zip(config.depths, config.embed_dims, strict=True)):
        for number in range(depth):
            stride = 2 if stage and not number else 1
            keys = max(1, 8 >> stage)
            fields = {"kernel_q": [3, 3, 3], "kernel_kv": [3, 3, 3], "stride_q": [1, stride, stride]}
            blocks.append(MSBlockConfig(2**stage, before, dim, **fields, stride_kv=[1, keys, keys]))
            before = dim
    how = {"residual_pool": True, "residual_with_cls_embed": False, "rel_pos_embed": True, "proj_after_attn": True}
    return MViT((side, side), frames, blocks, **how, num_classes=classes)


class Swin3d(nn.Module):
    """torchvision's Swin3D-T with another width, in the place of a video tower: (batch, frames, 3, side, side)."""

    def __init__(self, config: FlorenceVideoConfig) -> None:
        super().__init__()
        heads, window = list(config.num_heads), list(config.windows[0][1:])
        self.net = SwinTransformer3d([2, 4, 4], config.embed_dim, [2, 2, 6, 2], heads, [8, *window])
        self.net.head = nn.Identity()

    def forward(self, pixel_values_videos: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        return BaseModelOutputWithPooling(pooler_output=self.net(pixel_values_videos.transpose(1, 2)))


def count_parameters(model: nn.Module) -> int:
    return sum(weight.numel() for weight in model.parameters())


class Source:
    """Clips in memory, drawn in endless orders that depend on the seed alone, and augmented."""

    def __init__(self, clips: Sequence[Clip], processor: FlorenceVideoProcessor, seed: int) -> None:
        self.clips, self.processor = clips, processor
        self.frames = [open_clip(clip, processor) for clip in clips]
        self.transforms = training_transforms(processor.crop_size["height"], scale=CROPS)
        self.random = np.random.default_rng(seed)
        self.rows = self.order()

    def order(self) -> Iterator[int]:
        while True:
            yield from self.random.permutation(len(self.clips)).tolist()

    def draw(self, count: int) -> tuple[list[Clip], torch.Tensor]:
        """Clips and their pixels, (count, frames, 3, side, side), normalised."""
        rows = [next(self.rows) for _ in range(count)]
        how = (self.processor.num_frames, self.processor.sampling, self.processor.frame_stride)
        pixels = []
        for row in rows:
            chosen = sample_frame_indices(len(self.frames[row]), *how, generator=self.random)[0]
            frames = torch.from_numpy(self.frames[row][chosen]).permute(0, 3, 1, 2)
            pixels.append(augment_clip(self.transforms, frames))
        return [self.clips[row] for row in rows], collate_clips(pixels, self.processor)


def train(
    model: nn.Module, groups: list[dict[str, Any]], loss: Callable[[float, int], torch.Tensor], seconds: float
) -> int:
    """Train a model for so long; returns the number of steps. loss: from the part of the time and the step."""
    optimizer = torch.optim.AdamW(groups)
    highest = [group["lr"] for group in optimizer.param_groups]
    model.train()
    steps, spent = 0, 0.0
    while spent < seconds:
        started, done = time.process_time(), spent / seconds
        factor = min(1.0, done / WARM_UP) * (1 + math.cos(math.pi * done)) / 2
        for group, rate in zip(optimizer.param_groups, highest, strict=True):
            group["lr"] = max(factor, 1e-3) * rate
        optimizer.zero_grad()
        loss(done, steps).backward()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        steps, spent = steps + 1, spent + time.process_time() - started
        print(f"step {steps}, {spent:.0f} of {seconds:.0f} s", end="\r", file=sys.stderr, flush=True)
    model.eval()
    return steps


def make_processor(options: argparse.Namespace, frames: int) -> FlorenceVideoProcessor:
    """Squares of so many frames, normalised as the bundled tower's pictures are."""
    side = {"height": options.side, "width": options.side}
    sizes = {"size": {"shortest_edge": options.side}, "crop_size": side, "do_center_crop": True}
    former = FlorenceImageProcessor.from_pretrained(bundled_checkpoint())
    return FlorenceVideoProcessor.from_image_processor(former, **sizes, num_frames=frames, sampling="segment")


def read_sets(options: argparse.Namespace, seed: int) -> tuple[list[Clip], list[Clip]]:
    """Clips to train on, and those that are held out."""
    if options.eval_split:
        return read_filmstrips(options.data, "train"), read_filmstrips(options.data, options.eval_split)
    return split_by_film(read_filmstrips(options.data), HELD_OUT, seed)


def run_actions(name: str, options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """One classifier, trained and scored."""
    clips, held_out = read_sets(options, seed)
    names = class_names([*clips, *held_out])
    fields = {"id2label": dict(enumerate(names)), "num_frames": options.frames, **WINDOWS}
    model: nn.Module = FlorenceForVideoClassification.from_pretrained_image(bundled_checkpoint(), **fields)
    rates = {"relative_position_bias_table": TABLE_RATE * options.rate}
    if name == "florence":
        rates["_model."] = options.backbone_rate * options.rate
    elif name == "florence-random":
        model = FlorenceForVideoClassification(model.config)
    else:
        makers = {"r2plus1d": make_r2plus1d, "mvit": partial(make_mvit, model.config, options.side, options.frames)}
        model, rates = makers[name](len(names)), {"": options.peer_rate}
    groups = parameter_groups(model, DECAY, rates, learning_rate=options.rate)
    processor = make_processor(options, options.frames)
    source = Source(clips, processor, seed)

    def logits_of(pixels: torch.Tensor) -> torch.Tensor:
        return model(pixels).logits if name.startswith("florence") else model(pixels.transpose(1, 2))

    def loss(done: float, step: int) -> torch.Tensor:
        drawn, pixels = source.draw(options.batch)
        labels = torch.tensor([names.index(clip.label) for clip in drawn])
        return F.cross_entropy(logits_of(pixels), labels, label_smoothing=SMOOTHING)

    steps = train(model, groups, loss, options.seconds)
    with torch.no_grad():
        views = [make_views([clip], processor, VIEWS)[0] for clip in held_out]  # (views, frames, 3, side, side)
        probabilities = torch.stack([logits_of(each).softmax(dim=1).mean(dim=0) for each in views])
    scores = recognition_scores(probabilities, torch.tensor([names.index(clip.label) for clip in held_out]), names)
    return {"parameters": count_parameters(model), "steps": steps, **scores.as_dict()}


def run_retrieval(name: str, options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """One dual encoder, trained and scored; of pictures too where the task is joint."""
    clips, held_out = read_sets(options, seed)
    shape = FRAMES_ALONE if name == "pooled" else WINDOWS
    folder = bundled_checkpoint()
    model = FlorenceForVideoTextRetrieval.from_pretrained_image(folder, num_frames=options.frames, **shape)
    rates = {
        "relative_position_bias_table": TABLE_RATE * options.rate,
        "_model.": options.backbone_rate * options.rate,
    }
    first, both = SCHEDULES.get(name, (0.0, False))
    if options.task == "joint":
        model = FlorenceForVideoTextRetrieval(model.config)
        del rates["_model."]
    elif name == "swin3d":
        model.video_model = Swin3d(model.config.video_config)
        rates = {"video_model.": options.peer_rate, **rates}
    groups = parameter_groups(model, DECAY, rates, learning_rate=options.rate)
    tokenizer, processor = FlorenceTokenizer.from_pretrained(folder), make_processor(options, options.frames)
    source, pictures = Source(clips, processor, seed), None
    if first or both:
        found = read_captions(options.pictures)
        stills = [Clip(each.file, str(each.file), texts=each.captions, strip=1) for each in found]
        pictures = Source(stills, make_processor(options, 1), seed)

    def loss(done: float, step: int) -> torch.Tensor:
        if pictures is not None and (done < first or (both and step % 2)):
            drawn, pixels = pictures.draw(options.picture_batch)
        else:
            drawn, pixels = source.draw(options.batch)
        texts = [str(source.random.choice(clip.texts)) for clip in drawn]
        tokens = tokenizer(texts, return_tensors="pt", padding=True)
        labels = torch.tensor([text_label(text) for text in texts])
        return model(pixel_values_videos=pixels, labels=labels, **tokens).loss

    steps = train(model, groups, loss, options.seconds)
    scores = evaluate_video_retrieval(model, processor, tokenizer, held_out, batch_size=options.batch)
    return {"parameters": count_parameters(model), "steps": steps, **scores}


def summarise(results: list[dict[str, Any]], task: str) -> str:
    """A row a model: mean and standard deviation of the scores over the seeds, in percent."""
    lines = [
        "| model | parameters | seeds | steps | " + " | ".join(SCORES[task]) + " |",
        "|---" * (4 + len(SCORES[task])) + "|",
    ]
    for name in dict.fromkeys(result["model"] for result in results):
        own = [result for result in results if result["model"] == name]
        steps = statistics.mean(result["steps"] for result in own)
        cells = [name, f"{own[0]['parameters']:,}", str(len(own)), f"{steps:.0f}"]
        for score in SCORES[task]:
            values = [100 * result[score] for result in own]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Make the runs that the output lacks; returns all that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=list(MODELS))
    parser.add_argument("--data", type=Path, required=True, help="folder of filmstrips")
    parser.add_argument("--eval_split", default="", help="its clips that are held out; films of it if empty")
    parser.add_argument("--pictures", type=Path, help="of the task joint: pictures with texts")
    parser.add_argument("--output", type=Path, required=True, help="file of JSON lines")
    parser.add_argument("--models", nargs="+", help="all of the task's if left out")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, default=120.0, help="of the processor, for each run")
    parser.add_argument("--side", type=int, default=64, help="of the frames, pixels")
    parser.add_argument("--frames", type=int, default=8, help="of a clip")
    parser.add_argument("--batch", type=int, default=8, help="clips of a step")
    parser.add_argument("--picture_batch", type=int, default=32, help="pictures of a step")
    parser.add_argument("--rate", type=float, default=5e-4, help="our learning rate")
    parser.add_argument("--backbone_rate", type=float, default=0.4, help="of pretrained towers, times ours")
    parser.add_argument("--peer_rate", type=float, default=1e-3, help="the peers' learning rate")
    options = parser.parse_args(argv)
    models = options.models or MODELS[options.task]
    if strange := sorted(set(models) - set(MODELS[options.task])):
        parser.error(f"--models: expected some of {', '.join(MODELS[options.task])}, got {', '.join(strange)}")
    if (options.task == "joint") != (options.pictures is not None):
        parser.error(f"--pictures: expected a folder for the task joint and no other, got {options.pictures}")
    there = options.output.read_text("utf-8").splitlines() if options.output.is_file() else []
    made = [json.loads(line) for line in there]
    settings = {name: getattr(options, name) for name in SETTINGS}
    run = run_actions if options.task == "actions" else run_retrieval
    results = []
    for seed in options.seeds:
        for name in models:
            key = {**settings, "model": name, "seed": seed}
            result = next((line for line in made if key.items() <= line.items()), None)
            if result is None:
                torch.manual_seed(seed)
                result = {**key, **run(name, options, seed)}
                with options.output.open("a", encoding="utf-8") as out:
                    out.write(json.dumps(result) + "\n")
            results.append(result)
    print(summarise(results, options.task))
    return results


if __name__ == "__main__":
    main()
