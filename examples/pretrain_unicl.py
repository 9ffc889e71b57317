"""Pretrain a Florence dual encoder on a picture corpus with UniCL's label-aware contrastive loss.

    python examples/build_picture_corpus.py --permissive --out corpus
    python examples/pretrain_unicl.py --config examples/configs/florence_nano.yaml --corpus corpus
    accelerate launch --config_file examples/configs/accelerate/zero2.yaml examples/pretrain_unicl.py --config ...
    ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 examples/pretrain_unicl.py --config ... --processes 2

How many processes train together, and how, is Accelerate's configuration. `examples/configs/accelerate/` has
`one_gpu.yaml`, `eight_gpus.yaml` and `multi_node.yaml` (DDP), and `zero1.yaml`, `zero2.yaml` and `zero3.yaml`: these
shard by DeepSpeed as `zero1.json`, `zero2.json` and `zero3.json` of `examples/configs/deepspeed/` say, with CPU
offload, and clip to `--max_grad_norm`. A run prints what it found, and stops where that is not what was asked for.

Every field of `PretrainArguments` is an option of the command line and a key of the YAML file; the command line wins.
An interrupted run goes on from its last checkpoint when the same command is given again; every random choice of step
n depends on the seed and on n alone, so it ends as if it had not been interrupted. More `--steps` make a finished run
longer; another seed or shape wants another `--output`. Several processes share each batch, and contrast all of it.
"""

import hashlib
import json
import math
import sys
import time
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import get_cosine_schedule_with_warmup

from transformers_florence import (
    FlorenceConfig,
    FlorenceImageProcessor,
    FlorenceModel,
    FlorenceProcessor,
    FlorenceTextConfig,
    FlorenceTokenizer,
    load_checkpoint,
)
from transformers_florence.data.augmentation import BatchAugmentation
from transformers_florence.data.picture_corpus import PictureCorpus, load_split
from transformers_florence.data.prompts import DRAWING_TEMPLATES
from transformers_florence.evaluation.zero_shot import build_zero_shot_classifier, embed_pixels, top_k_accuracy
from transformers_florence.training.arguments import parse_arguments
from transformers_florence.training.checkpointing import resume_training, save_checkpoint
from transformers_florence.training.objectives import OBJECTIVES, ContrastiveObjective, lock_image_tower
from transformers_florence.training.optimization import parameter_groups
from transformers_florence.training.precision import Bfloat16Forward, cpu_has_bfloat16
from transformers_florence.training.sharding import (
    check_running,
    configure_deepspeed,
    guarded_step,
    keep_scalars_as_vectors,
    make_accelerator,
    save_whole,
    zero_stage,
)
from transformers_florence.training.stability import GuardedUpdate, StopRequest
from transformers_florence.training.tracking import LocalTracker, make_trackers

# A checkpoint belongs to these; every other argument may differ when its run goes on.
FIXED = (
    "size",
    "init_from",
    "locked",
    "objective",
    "batch_size",
    "learning_rate",
    "text_rate",
    "token_rate",
    "prototype_rate",
    "weight_decay",
    "context_length",
    "prototype_weight",
    "alignment_weight",
    "seed",
    "texts",
)


@dataclass
class PretrainArguments:
    """What a run is made of; two runs with equal arguments on one machine give equal weights."""

    corpus: str = "corpus"
    output: str = "runs/florence-nano"
    size: str = "nano"
    init_from: str = ""  # folder of a checkpoint to go on from, instead of new weights of that size
    locked: bool = False  # whether the image tower of `init_from` stays as it is (LiT)
    objective: str = "unicl"  # unicl; clip: every pair its own label; sigmoid: SigLIP's loss with UniCL's labels
    steps: int = 4000
    batch_size: int = 256  # pictures of a step, on all processes together
    chunk_size: int = 0  # pictures that are in a process's memory at once (gradient cache); 0 for all
    processes: int = 0  # how many must share the batches; 0 for as many as there are
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    warmup_steps: int = 200
    max_grad_norm: float = 1.0
    text_rate: float = 1.0  # learning rate of the text tower, relative to the image tower's
    token_rate: float = 20.0  # the same of its token embeddings, of which a batch moves only its own words'
    prototype_rate: float = 5.0  # the same of the label prototypes
    prototype_weight: float = 1.0  # of the label prototypes beside the contrastive loss; 0 for none (UniCL alone)
    alignment_weight: float = 5.0  # of the texts' distance to their prototypes
    augmentation_ramp: float = 0.4  # part of the run over which augmentation grows from nothing to full strength
    small_part: float = 0.6  # first part of the run, with pictures of half the side and texts of two thirds the length
    category_batches: float = 0.1  # part of the batches whose texts and labels are categories
    keyword_batches: float = 0.15  # part of the batches whose texts and labels are single keywords
    stored_size: int = 80  # side of the pictures in memory, pixels
    context_length: int = 24  # tokens
    precision: str = "auto"  # auto: bfloat16 where the processor has it; float32; bfloat16
    log_every: int = 20
    eval_every: int = 500
    save_every: int = 250
    keep: int = 2  # checkpoints, the newest ones
    non_finite: str = "raise"  # what a loss or a gradient that is not finite does: raise, or skip the step
    report_to: str = "local"  # local: log.csv and curves.png in the output; trackers of Accelerate's; none
    seed: int = 0

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective: expected one of {', '.join(OBJECTIVES)}, got {self.objective!r}")
        if self.locked and not self.init_from:
            raise ValueError("locked: expected init_from with a trained image tower, got none")
        if self.precision not in ("auto", "float32", "bfloat16"):
            raise ValueError(f"precision: expected 'auto', 'float32' or 'bfloat16', got {self.precision!r}")
        least = {"seed": 0, "warmup_steps": 0, "chunk_size": 0, "processes": 0}  # of the integers; 1 for the others
        for field in fields(self):
            value = getattr(self, field.name)
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if field.type is int and not (isinstance(value, int) and is_number and value >= least.get(field.name, 1)):
                raise ValueError(f"{field.name}: expected an integer >= {least.get(field.name, 1)}, got {value!r}")
            if field.type is float and not (is_number and 0 <= value < math.inf):
                raise ValueError(f"{field.name}: expected a finite number >= 0, got {value!r}")
            if field.type is str and not isinstance(value, str):
                raise ValueError(f"{field.name}: expected a text, got {value!r}")
        if self.seed >= 1 << 31:
            raise ValueError(f"seed: expected less than 2 to the power of 31, got {self.seed}")
        for name in ("category_batches", "keyword_batches", "small_part"):
            if getattr(self, name) > 1:
                raise ValueError(f"{name}: expected a part from 0 to 1, got {getattr(self, name)}")
        if self.category_batches + self.keyword_batches > 1:
            got = self.category_batches + self.keyword_batches
            raise ValueError(f"category_batches and keyword_batches: expected at most 1 together, got {got}")


def training_texts(corpus: PictureCorpus) -> list[str]:
    """What the vocabulary is learnt from: every text of the training pictures, and the templates."""
    return [corpus.full_text(row) for row in range(len(corpus))] + corpus.category_names + list(DRAWING_TEMPLATES)


def build_model(arguments: PretrainArguments, corpus: PictureCorpus) -> tuple[FlorenceModel, FlorenceProcessor]:
    """The checkpoint to start from, or new weights and a vocabulary learnt from the corpus."""
    if arguments.init_from:
        model = load_checkpoint(FlorenceModel, arguments.init_from, dtype=torch.float32)
        context = model.config.text_config.max_position_embeddings
        if arguments.context_length > context:
            raise ValueError(
                f"context_length: expected at most the {context} tokens of {arguments.init_from}, "
                f"got {arguments.context_length}"
            )
        return model, FlorenceProcessor.from_pretrained(arguments.init_from)
    config = FlorenceConfig.from_size(
        arguments.size,
        text_config=FlorenceTextConfig.from_size(arguments.size, max_position_embeddings=arguments.context_length),
    )
    return FlorenceModel(config), build_processor(arguments, corpus, config)


def build_processor(arguments: PretrainArguments, corpus: PictureCorpus, config: FlorenceConfig) -> FlorenceProcessor:
    """A vocabulary learnt from the corpus, and an image processor for the model's size."""
    text = config.text_config
    tokenizer = FlorenceTokenizer.train_new(
        training_texts(corpus), vocab_size=text.vocab_size, model_max_length=text.max_position_embeddings
    )
    side = config.vision_config.image_size
    size = {"height": side, "width": side}
    image_processor = FlorenceImageProcessor(size=size, do_center_crop=False, crop_size=size)
    return FlorenceProcessor(image_processor=image_processor, tokenizer=tokenizer)


class Batches:
    """A process's part of the batch of any step, from the seed and the step's number alone.

    Every process draws the whole batch and keeps its part, so that the batch does not depend on their number.
    """

    def __init__(
        self,
        arguments: PretrainArguments,
        corpus: PictureCorpus,
        processor: FlorenceProcessor,
        device: torch.device,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self.arguments, self.corpus, self.tokenizer, self.device = arguments, corpus, processor.tokenizer, device
        if arguments.batch_size % ranks:
            raise ValueError(f"batch_size: expected a multiple of {ranks} processes, got {arguments.batch_size}")
        local = arguments.batch_size // ranks
        self.part = slice(rank * local, (rank + 1) * local)
        self.full_side = processor.image_processor.size["height"]
        image_processor = processor.image_processor
        self.mean = torch.tensor(image_processor.image_mean, device=device).view(1, 3, 1, 1)
        self.std = torch.tensor(image_processor.image_std, device=device).view(1, 3, 1, 1)
        self.with_category = (corpus.categories >= 0).nonzero()[:, 0].numpy()
        self.per_epoch = len(corpus) // arguments.batch_size
        if self.per_epoch == 0:
            raise ValueError(f"expected at least batch_size={arguments.batch_size} pictures, got {len(corpus)}")

    def is_small(self, step: int) -> bool:
        """Whether a step belongs to the first part of the run."""
        return step < self.arguments.small_part * self.arguments.steps

    def side(self, step: int) -> int:
        """Side of the pictures at a step, in pixels."""
        return self.full_side // 2 if self.is_small(step) else self.full_side

    def draw_names(self, step: int, rng: np.random.Generator) -> tuple[np.ndarray, list[str], torch.Tensor]:
        """Rows in the epoch's order, a text of each, and the numbers of their names."""
        epoch, position = divmod(step, self.per_epoch)
        size = self.arguments.batch_size
        order = np.random.default_rng([self.arguments.seed, 1 << 32, epoch]).permutation(len(self.corpus))
        rows = order[position * size : (position + 1) * size]
        return rows, [self.corpus.draw_text(row, DRAWING_TEMPLATES, rng) for row in rows], self.corpus.labels[rows]

    def draw_categories(self, rng: np.random.Generator) -> tuple[np.ndarray, list[str], torch.Tensor] | None:
        """Rows, the words of their categories and the categories' numbers; None if too few rows have one."""
        if len(self.with_category) < self.arguments.batch_size:
            return None
        rows = rng.choice(self.with_category, size=self.arguments.batch_size, replace=False)
        texts = [self.corpus.draw_category_text(row, DRAWING_TEMPLATES, rng) for row in rows]
        return rows, texts, self.corpus.categories[rows]

    def draw_keywords(self, rng: np.random.Generator) -> tuple[np.ndarray, list[str], torch.Tensor] | None:
        """Rows, a keyword of each and the keywords' numbers; None if there are too few."""
        rows, numbers = self.corpus.draw_keyword_rows(self.arguments.batch_size, rng)
        if len(rows) < self.arguments.batch_size:
            return None
        texts = [self.corpus.draw_keyword_text(number, DRAWING_TEMPLATES, rng) for number in numbers]
        return rows, texts, torch.from_numpy(numbers)

    def __call__(self, step: int) -> dict[str, Any]:
        """At a step: `inputs` of the model, `labels` of its loss, the `rows` of the corpus that they are made of, and
        the `positives` of a picture, itself among them, in the mean over the whole batch.
        """
        arguments, corpus = self.arguments, self.corpus
        side, small = self.side(step), self.is_small(step)
        rng = np.random.default_rng([arguments.seed, step])
        kind, wider = rng.random(), None
        if kind < arguments.category_batches:
            wider = self.draw_categories(rng)
        elif kind < arguments.category_batches + arguments.keyword_batches:
            wider = self.draw_keywords(rng)
        rows, texts, labels = wider or self.draw_names(step, rng)
        strength = min(1.0, step / max(1.0, arguments.augmentation_ramp * arguments.steps))
        generator = torch.Generator().manual_seed(int(rng.integers(1 << 62)))
        pixels = BatchAugmentation(size=side)(corpus.pixels[rows].to(self.device).float() / 255, generator, strength)
        length = arguments.context_length * 2 // 3 if small else arguments.context_length
        tokens = self.tokenizer(
            texts, return_tensors="pt", padding=True, truncation=True, max_length=length, verbose=False
        ).to(self.device)
        if arguments.objective == "clip":
            labels = torch.arange(len(rows))
        inputs = {
            "pixel_values": (pixels - self.mean) / self.std,
            "input_ids": tokens["input_ids"],
            "attention_mask": tokens["attention_mask"],
        }
        class_labels = None if arguments.objective == "clip" else corpus.labels[rows][self.part].to(self.device)
        return {
            "inputs": {name: value[self.part] for name, value in inputs.items()},
            "labels": {
                "labels": labels[self.part].to(self.device),
                "class_labels": class_labels,
                "align_texts": wider is None,
            },
            "rows": rows[self.part].tolist(),
            "positives": labels.unique(return_counts=True)[1].double().square().sum().item() / len(labels),
        }


def evaluate(
    objective: ContrastiveObjective,
    processor: FlorenceProcessor,
    corpus: PictureCorpus,
    names: list[str],
    side: int,
) -> dict[str, float]:
    """Pictures of a held-out style named among all training names, at the side that is being trained."""
    model = objective.eval().model
    classifier = build_zero_shot_classifier(model, processor.tokenizer, names, ("{}", "an emoji of {}"))
    pixels = processor.image_processor(list(corpus.pixels), size={"height": side, "width": side}, return_tensors="pt")[
        "pixel_values"
    ]
    scores = embed_pixels(model, pixels) @ classifier.T
    column = {name: index for index, name in enumerate(names)}
    targets = torch.tensor([column[name] for name in corpus.names], device=scores.device)
    objective.train()
    return {f"top{k}": top_k_accuracy(scores, targets, min(k, len(names))) for k in (1, 5)}


def check_same_run(output: Path, record: dict) -> None:
    """Refuse to go on with a run that was another one.

    Raises:
        ValueError: an argument of `FIXED`, or the texts that the vocabulary is learnt from, are not those of the run
            whose checkpoints are in `output`.
    """
    if not any(output.glob("checkpoint-*")):
        return
    file = output / "arguments.json"
    before = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    changed = [name for name in FIXED if name in before and before[name] != record[name]]
    if changed:
        got = ", ".join(f"{name} {before[name]!r} there and {record[name]!r} now" for name in changed)
        raise ValueError(f"{output} holds another run: expected equal arguments or another output, got {got}")


def held_out_style(arguments: PretrainArguments, names: list[str]) -> PictureCorpus | None:
    """The pictures of the held-out style whose names occur in training, if the corpus has such a split."""
    try:
        rows = load_split(arguments.corpus, "test_style")
    except ValueError:
        return None
    known = set(names)
    keep = [index for index, name in enumerate(rows["name"]) if name in known]
    return PictureCorpus(rows.select(keep), size=arguments.stored_size) if keep else None


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(PretrainArguments, sys.argv[1:] if argv is None else argv)
    output = Path(arguments.output)
    output.mkdir(parents=True, exist_ok=True)
    accelerator = make_accelerator(
        processes=arguments.processes,
        mixed_precision="no",  # whatever Accelerate's own settings say: `precision` decides
        log_with=make_trackers(arguments.report_to, output),
        project_dir=str(output),
        step_scheduler_with_optimizer=False,  # or the schedule would move once for each rank
    )
    rank, ranks, stage = accelerator.process_index, accelerator.num_processes, zero_stage(accelerator)
    torch.manual_seed(arguments.seed)

    rows = load_split(arguments.corpus, "train")
    corpus = PictureCorpus(rows, size=arguments.stored_size)
    model, processor = build_model(arguments, corpus)
    if arguments.locked:
        lock_image_tower(model)
    if accelerator.device.type == "cpu":  # PyTorch's fused attention goes backwards slowly there: a quarter of a step
        model.set_attn_implementation({"text_config": "eager"})
    sources = rows["source"] if "source" in rows.column_names else ["emoji"] * len(corpus)
    names = sorted({name for name, source in zip(corpus.names, sources, strict=True) if source == "emoji"})
    style = held_out_style(arguments, names)
    parameters = sum(weight.numel() for weight in model.parameters())  # ZeRO-3 will leave none in the model

    has_bfloat16 = accelerator.device.type != "cpu" or cpu_has_bfloat16()
    use_bfloat16 = arguments.precision == "bfloat16" or (arguments.precision == "auto" and has_bfloat16)
    dtype = torch.bfloat16 if use_bfloat16 else torch.float32
    num_labels = int(corpus.labels.max()) + 1 if arguments.objective != "clip" else 0
    objective = ContrastiveObjective(
        model,
        objective=arguments.objective,
        num_labels=num_labels,
        prototype_weight=arguments.prototype_weight,
        alignment_weight=arguments.alignment_weight,
    )
    if stage is not None:
        keep_scalars_as_vectors(objective)
    rates = {
        "token_embedding": arguments.token_rate,
        "text_model.": arguments.text_rate,
        "text_projection.": arguments.text_rate,
        "prototypes": arguments.prototype_rate,
    }
    groups = parameter_groups(
        objective,
        arguments.weight_decay,
        {name: rate * arguments.learning_rate for name, rate in rates.items()},
        no_decay=("token_embedding", "prototypes"),
    )
    image_group = next(index for index, group in enumerate(groups) if "lr" not in group)
    optimizer = torch.optim.AdamW(groups, lr=arguments.learning_rate, betas=(0.9, 0.98), fused=True)
    schedule = get_cosine_schedule_with_warmup(optimizer, arguments.warmup_steps, arguments.steps)
    batches = Batches(arguments, corpus, processor, accelerator.device, rank, ranks)
    configure_deepspeed(accelerator, arguments.batch_size, arguments.max_grad_norm, dtype)
    wrapped: torch.nn.Module = Bfloat16Forward(objective) if use_bfloat16 and stage is None else objective
    wrapped, optimizer, schedule = accelerator.prepare(wrapped, optimizer, schedule)
    running = check_running(accelerator, wrapped, dtype)

    digest = hashlib.sha256("\n".join(training_texts(corpus)).encode()).hexdigest()
    record = {**asdict(arguments), "texts": digest}
    check_same_run(output, record)
    update = GuardedUpdate(
        accelerator,
        optimizer,
        schedule,
        objective.parameters(),
        max_grad_norm=arguments.max_grad_norm,
        policy=arguments.non_finite,
    )
    first, progress = 0, resume_training(accelerator, output)
    if progress is not None:
        first = progress.step
        update.load_state_dict(progress.extra["update"])
        accelerator.print(f"resumed from {progress.folder} at step {first}")
    if first > arguments.steps:
        raise ValueError(f"steps: {output} has taken {first}, expected as many or more, got {arguments.steps}")
    accelerator.init_trackers("florence", config=record)
    for tracker in accelerator.trackers:
        if isinstance(tracker, LocalTracker):
            tracker.go_on_after(first)
    if accelerator.is_main_process:
        (output / "arguments.json").write_text(json.dumps(record, indent=2), "utf-8")
    sizes = f"{len(corpus)} pictures, {len(names)} names, {parameters:,} parameters"
    accelerator.print(f"{sizes}, {batches.per_epoch} steps an epoch, {running}")

    started, seen = time.monotonic(), 0
    chunk_size = arguments.chunk_size or arguments.batch_size
    bar = tqdm(
        range(first, arguments.steps),
        initial=first,
        total=arguments.steps,
        desc="training",
        mininterval=10,
        disable=not accelerator.is_main_process,
    )
    objective.train()
    with StopRequest() as stop:
        for step in bar:
            # Drop path's choices depend on the step alone, and differ between processes.
            torch.manual_seed((arguments.seed << 32) + step * ranks + rank)
            batch, rate = batches(step), schedule.get_last_lr()[image_group]
            found = guarded_step(
                update,
                wrapped,
                partial(objective.loss, **batch["labels"]),
                batch["inputs"],
                chunk_size,
                shared=objective.shared_outputs,
                step=step,
                samples=batch["rows"],
            )
            seen += arguments.batch_size
            done = step + 1
            entry: dict = {}
            if done % arguments.log_every == 0:
                speed = seen / (time.monotonic() - started)
                entry = {
                    "loss": round(found.loss.item(), 6),
                    "gradient_norm": None if found.gradient_norm is None else round(found.gradient_norm, 3),
                    "learning_rate": rate,
                    "logit_scale": round(found.shared["logit_scale"].item(), 2),
                    "positives": round(batch["positives"], 2),
                    "pictures_per_second": round(speed, 1),
                    "skipped_steps": update.skipped,
                }
                bar.set_postfix(loss=entry["loss"], speed=f"{speed:.0f}/s", refresh=False)
            evaluates = style is not None and (done % arguments.eval_every == 0 or done == arguments.steps)
            if evaluates and (accelerator.is_main_process or stage == 3):  # all gather the weights of ZeRO-3
                entry |= evaluate(objective, processor, style, names, batches.side(step))
            if entry:
                accelerator.log(entry, step=done)
            stopped = stop.requested(accelerator)
            if done % arguments.save_every == 0 or done == arguments.steps or stopped:
                save_checkpoint(accelerator, output, done, extra={"update": update.state_dict()}, keep=arguments.keep)
            if stopped and done < arguments.steps:
                accelerator.print(f"asked to stop: saved step {done}; the same command goes on from there")
                accelerator.end_training()
                return

    final = output / "model"
    save_whole(accelerator, wrapped, model, final)
    if accelerator.is_main_process:
        processor.save_pretrained(final)
    accelerator.end_training()
    accelerator.print(f"saved the model to {final}")


if __name__ == "__main__":
    main()
