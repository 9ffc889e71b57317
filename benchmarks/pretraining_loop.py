"""Pictures a second of our pretraining beside open_clip's: the steps alone, the data alone, and both together.

    pip install open_clip_torch
    python benchmarks/pretraining_loop.py
    python benchmarks/pretraining_loop.py --side 32 --layers 1 --pictures 64 --batch 16 --steps 2 --rounds 1

Both train Swin-T with a text tower of CLIP's shape, new weights, AdamW with clipping, on the same pictures and texts:
ours by the steps of `examples/pretrain_unicl.py` (UniCL, guarded), open_clip by `train_one_epoch` of its own training
package (CLIP's loss). `step` has its batch in memory; `data` reads, decodes, resizes, normalises and tokenises the
same JPEG files, ours by `TripletLoader`, open_clip's by a `DataLoader` with its transform and its tokenizer, as its
CSV data set does; `training` is both. Every run has a process of its own, and they take turns, so that a busy machine
slows both alike; the table holds medians. Processor time is the process's own: that of decoding is in it with
`--workers 0`.
"""

import argparse
import io
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import open_clip
import timm
import torch
from accelerate import Accelerator
from open_clip_train.train import train_one_epoch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import get_cosine_schedule_with_warmup

from transformers_florence import (
    FlorenceConfig,
    FlorenceImageProcessor,
    FlorenceModel,
    FlorenceTextConfig,
    FlorenceTokenizer,
    FlorenceVisionConfig,
)
from transformers_florence.data.sources import Source
from transformers_florence.data.triplet_loader import TripletLoader, TripletRows
from transformers_florence.data.triplets import PictureDecoder, PixelNormalizer, TripletMaker
from transformers_florence.training.objectives import ContrastiveObjective
from transformers_florence.training.optimization import parameter_groups
from transformers_florence.training.precision import Bfloat16Forward
from transformers_florence.training.sharding import guarded_step
from transformers_florence.training.stability import GuardedUpdate

OURS, THEIRS = "florence", "open_clip"
WHAT = ("step", "data", "training")
DRAWN_SIZE = (480, 360)
CONTEXT, VOCABULARY, WIDTH, DIM = 77, 49408, 512, 512
WARM_UPS = 2  # steps, or batches a worker, that are not timed
SETTINGS = ("side", "layers", "pictures", "batch", "steps", "workers", "precision", "threads")


def draw_pictures(folder: Path, count: int) -> None:
    """Soft patterns with some grain, as JPEG of quality 90, and a sentence about each; about as photographs are."""
    rng = np.random.default_rng(0)
    lines = []
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8))
        grain = rng.normal(0, 6, (DRAWN_SIZE[1], DRAWN_SIZE[0], 1))
        pixels = np.asarray(coarse.resize(DRAWN_SIZE, Image.Resampling.BICUBIC)) + grain
        buffer = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
        (folder / f"{number}.jpg").write_bytes(buffer.getvalue())
        text = f"a drawn pattern of many soft colours that has the number {number}"
        lines.append(json.dumps({"file_name": f"{number}.jpg", "text": text}))
    (folder / "metadata.jsonl").write_text("\n".join(lines), "utf-8")


class OurRun:
    """Our data and our steps."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        square = {"height": options.side, "width": options.side}
        processor = FlorenceImageProcessor(size={"shortest_edge": options.side}, crop_size=square)
        self.options, self.normalize = options, PixelNormalizer(processor)
        texts = [json.loads(line)["text"] for line in (folder / "metadata.jsonl").read_text("utf-8").splitlines()]
        tokenizer = FlorenceTokenizer.train_new(texts, vocab_size=520, model_max_length=CONTEXT)
        data = TripletRows([Source(str(folder), text="text")], TripletMaker(PictureDecoder(processor)), progress=False)
        self.loader = TripletLoader(
            data,
            batch_size=options.batch,
            num_workers=options.workers,
            tokenize=partial(tokenizer, padding="max_length", max_length=CONTEXT, return_tensors="pt"),
        )
        torch.manual_seed(0)
        config = FlorenceConfig(
            vision_config=FlorenceVisionConfig.from_size(
                "tiny", image_size=options.side, embed_type="patch", drop_path_rate=0.0
            ),
            text_config=FlorenceTextConfig(
                num_hidden_layers=options.layers,
                max_position_embeddings=CONTEXT,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            ),
            projection_dim=DIM,
        )
        model = FlorenceModel(config)
        model.set_attn_implementation({"text_config": "eager"})  # as `examples/pretrain_unicl.py` trains on a CPU
        self.objective = ContrastiveObjective(model).train()
        self.parameters = sum(weight.numel() for weight in model.parameters())

    def batches(self) -> Iterator[dict[str, Any]]:
        """Without end, from the disk."""
        for batch in self.loader:
            yield {
                "inputs": {"pixel_values": self.normalize(batch["pixels"]), "input_ids": batch["input_ids"]},
                "labels": batch["labels"],
            }

    def stepper(self) -> Callable[[Iterator[dict[str, Any]], int], None]:
        """What takes a number of steps on batches."""
        accelerator = Accelerator(cpu=True, step_scheduler_with_optimizer=False)
        optimizer = torch.optim.AdamW(parameter_groups(self.objective, 0.1), lr=1e-4, fused=True)
        schedule = get_cosine_schedule_with_warmup(optimizer, 10, 1000)
        half = self.options.precision == "bfloat16"
        model: torch.nn.Module = Bfloat16Forward(self.objective) if half else self.objective
        wrapped, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
        update = GuardedUpdate(accelerator, optimizer, schedule, self.objective.parameters(), max_grad_norm=1.0)

        def take(batches: Iterator[dict[str, Any]], steps: int) -> None:
            for step, batch in enumerate(islice(batches, steps)):
                loss = partial(self.objective.loss, labels=batch["labels"])
                guarded_step(
                    update,
                    wrapped,
                    loss,
                    batch["inputs"],
                    self.options.batch,
                    shared=self.objective.shared_outputs,
                    step=step,
                    samples=[],
                )

        return take


class Pictures(Dataset):
    """Files and texts of a folder, as open_clip's CSV data set gives them."""

    def __init__(self, folder: Path, transform: Callable, tokenize: Callable) -> None:
        self.folder, self.transform, self.tokenize = folder, transform, tokenize
        self.rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text("utf-8").splitlines()]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        row = self.rows[number]
        return self.transform(Image.open(self.folder / row["file_name"])), self.tokenize([row["text"]])[0]


class TheirBatches:
    """What `train_one_epoch` calls a loader: so many batches."""

    def __init__(self, batches: Iterator[Any], steps: int, batch: int) -> None:
        self.batches, self.num_batches, self.num_samples = batches, steps, steps * batch

    def __iter__(self) -> Iterator[Any]:
        return islice(self.batches, self.num_batches)


class TheirRun:
    """open_clip's data and steps."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self.options = options
        transform = open_clip.image_transform(
            options.side, is_train=False, mean=open_clip.OPENAI_DATASET_MEAN, std=open_clip.OPENAI_DATASET_STD
        )
        tokenizer = open_clip.SimpleTokenizer(context_length=CONTEXT)
        self.loader = DataLoader(
            Pictures(folder, transform, tokenizer),
            batch_size=options.batch,
            shuffle=True,
            drop_last=True,
            num_workers=options.workers,
            persistent_workers=options.workers > 0,
        )
        torch.manual_seed(0)
        name = "swin_tiny_patch4_window7_224"
        vision = {"timm_model_name": name, "timm_pool": "avg", "timm_proj": "linear", "image_size": options.side}
        text = {"layers": options.layers, "context_length": CONTEXT, "vocab_size": VOCABULARY, "width": WIDTH}
        self.model = open_clip.CustomTextCLIP(DIM, vision, text, output_dict=True)
        self.model.visual.trunk = timm.create_model(name, img_size=options.side, num_classes=0, drop_path_rate=0.0)
        self.parameters = sum(weight.numel() for weight in self.model.parameters())

    def batches(self) -> Iterator[Any]:
        """Without end, from the disk."""
        while True:
            yield from self.loader

    def stepper(self) -> Callable[[Iterator[Any], int], None]:
        """What takes a number of steps on batches."""
        gains = [weight for weight in self.model.parameters() if weight.ndim < 2]
        matrices = [weight for weight in self.model.parameters() if weight.ndim >= 2]
        groups = [{"params": gains, "weight_decay": 0.0}, {"params": matrices, "weight_decay": 0.1}]
        optimizer = torch.optim.AdamW(groups, lr=1e-4, fused=True)
        settings = SimpleNamespace(
            device="cpu",
            precision="amp_bf16" if self.options.precision == "bfloat16" else "fp32",
            distill=False,
            accum_freq=1,
            skip_scheduler=True,
            horovod=False,
            grad_clip_norm=1.0,
            log_every_n_steps=1000,
            batch_size=self.options.batch,
            world_size=1,
            rank=0,
            wandb=False,
        )
        loss = open_clip.ClipLoss()

        def take(batches: Iterator[Any], steps: int) -> None:
            loader = TheirBatches(batches, steps, self.options.batch)
            data = {"train": SimpleNamespace(dataloader=loader, set_epoch=lambda epoch: None)}
            train_one_epoch(self.model, data, loss, 0, optimizer, None, None, None, settings)

        return take


def repeat(batch: Any) -> Iterator[Any]:
    """The same batch without end."""
    while True:
        yield batch


def measure(options: argparse.Namespace) -> dict[str, float]:
    """One measurement of this process: who it is and what is measured."""
    torch.set_num_threads(options.threads)
    run = (OurRun if options.who == OURS else TheirRun)(Path(options.folder), options)
    batches: Iterator[Any] = run.batches()
    if options.what == "step":
        batches = repeat(next(batches))
    take = (lambda batches, steps: list(islice(batches, steps))) if options.what == "data" else run.stepper()
    take(batches, WARM_UPS * max(1, options.workers))
    wall, processor = time.perf_counter(), sum(os.times()[:2])
    take(batches, options.steps)
    pictures = options.steps * options.batch
    seconds = time.perf_counter() - wall
    return {
        "rate": pictures / seconds,
        "processor": 1e3 * (sum(os.times()[:2]) - processor) / pictures,
        "parameters": run.parameters,
    }


def in_a_process(who: str, what: str, folder: str, options: argparse.Namespace) -> dict[str, float]:
    """`measure` in a process of its own."""
    command = [sys.executable, __file__, "--who", who, "--what", what, "--folder", folder]
    command += [f"--{name}={getattr(options, name)}" for name in SETTINGS]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=224, help="of the pictures in pixels")
    parser.add_argument("--layers", type=int, default=12, help="of the text tower")
    parser.add_argument("--pictures", type=int, default=512, help="in the folder")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=8, help="timed steps of a process")
    parser.add_argument("--workers", type=int, default=1, help="processes that decode")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each kind")
    parser.add_argument("--kinds", nargs="+", choices=WHAT, default=list(WHAT))
    parser.add_argument("--who", choices=(OURS, THEIRS), help="be one measurement; for this script's use")
    parser.add_argument("--what", choices=WHAT, help="what that measures")
    parser.add_argument("--folder", help="and its pictures")
    options = parser.parse_args()
    if min(options.layers, options.batch, options.steps, options.rounds, options.threads) < 1 or options.workers < 0:
        parser.error("expected positive numbers")
    if options.side % 32 or options.pictures < options.batch:
        parser.error("expected a side that is a multiple of 32, and at least a batch of pictures")
    return options


def main() -> None:
    options = parse_options()
    if options.who:
        print(json.dumps(measure(options)))
        return
    with tempfile.TemporaryDirectory() as folder:
        draw_pictures(Path(folder), options.pictures)
        found: dict[tuple[str, str], list[dict[str, float]]] = {}
        turns = [(what, who) for _ in range(options.rounds) for what in options.kinds for who in (OURS, THEIRS)]
        for what, who in tqdm(turns, desc="processes", leave=False):
            found.setdefault((what, who), []).append(in_a_process(who, what, folder, options))
    sizes = {who: found[options.kinds[0], who][0]["parameters"] for who in (OURS, THEIRS)}
    if not math.isclose(*sizes.values(), rel_tol=1e-3):
        raise ValueError(f"expected towers of one size, got {sizes}")
    print(f"Swin-T at {options.side} pixels, {options.layers} text layers, {sizes[OURS]:,.0f} parameters;", end=" ")
    print(f"batch {options.batch}, {options.precision}, {options.threads} threads, {options.workers} workers.\n")
    print("| what | who | pictures/s | times | slowest to fastest | processor ms a picture | times |")
    print("|---|---|---|---|---|---|---|")
    for what in options.kinds:
        rates, processors = (
            {who: [run[name] for run in found[what, who]] for who in (OURS, THEIRS)} for name in ("rate", "processor")
        )
        for who in (OURS, THEIRS):
            rate, processor = statistics.median(rates[who]), statistics.median(processors[who])
            print(
                f"| {what} | {who} | {rate:.1f} | {rate / statistics.median(rates[THEIRS]):.2f} "
                f"| {min(rates[who]):.1f} to {max(rates[who]):.1f} "
                f"| {processor:.2f} | {processor / statistics.median(processors[THEIRS]):.2f} |"
            )


if __name__ == "__main__":
    main()
