"""Pretrain a Florence dual encoder with UniCL's label-aware contrastive loss, on a laptop or on many nodes.

    python examples/build_picture_corpus.py --permissive --out corpus
    python examples/pretrain_unicl.py --config examples/configs/florence_nano.yaml --corpus corpus
    accelerate launch --config_file examples/configs/accelerate/zero2.yaml examples/pretrain_unicl.py --config ...
    ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 examples/pretrain_unicl.py --config ... --processes 2
    python examples/pretrain_unicl.py --config examples/configs/florence_huge_stage1.yaml --dry_run

It learns from a picture corpus in memory, or from any `sources`: parquet and tar files, pictures in folders, with one
text, several captions or a class label, mixed by weights. `examples/configs/` has the three stages of Florence: all
texts; without those that stand in templates; at 384 pixels. Each goes on from the model of the one before.

How many processes train together, and how, is Accelerate's configuration. `examples/configs/accelerate/` has
`one_gpu.yaml`, `eight_gpus.yaml` and `multi_node.yaml` (DDP), and `zero1.yaml`, `zero2.yaml` and `zero3.yaml`: these
shard by DeepSpeed as `zero1.json`, `zero2.json` and `zero3.json` of `examples/configs/deepspeed/` say, with CPU
offload, and clip to `--max_grad_norm`. A run prints what it found, and stops where that is not what was asked for.

Every field of `PretrainArguments` is an option of the command line and a key of the YAML file; the command line wins.
An interrupted run goes on from its last checkpoint when the same command is given again; every random choice of step
n depends on the seed and on n alone, so it ends as if it had not been interrupted (a stream's, but for what was in its
shuffle buffer). More `--steps` make a finished run longer; another seed or shape wants another `--output`. Several
processes share each batch, and contrast all of it.
"""

import json
import sys
import time
from dataclasses import asdict, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import parse_flag_from_env
from tqdm.auto import tqdm
from transformers import get_cosine_schedule_with_warmup

from pretrain_arguments import FIXED, PretrainArguments
from pretrain_batches import Batches, CorpusBatches, Evaluator, TripletBatches, corpus_texts, source_texts
from transformers_florence import (
    FlorenceConfig,
    FlorenceImageProcessor,
    FlorenceModel,
    FlorenceProcessor,
    FlorenceTextConfig,
    FlorenceTokenizer,
    FlorenceVisionConfig,
    load_checkpoint,
)
from transformers_florence.data.picture_corpus import PictureCorpus, load_split
from transformers_florence.evaluation.zero_shot import embed_texts
from transformers_florence.training.arguments import parse_arguments
from transformers_florence.training.budget import GIB, Plan, Shape, forward_flops, peak_flops, plan_training
from transformers_florence.training.checkpointing import resume_training, save_checkpoint
from transformers_florence.training.gradient_cache import checkpoint_activations
from transformers_florence.training.objectives import ContrastiveObjective, lock_image_tower
from transformers_florence.training.optimization import moving_average, parameter_groups
from transformers_florence.training.precision import Bfloat16Forward, computing_dtype
from transformers_florence.training.recipe import check_same_run
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

AVERAGE = "average"  # the running average of the weights: in checkpoints, in the log, and its folder


def build_config(arguments: PretrainArguments) -> FlorenceConfig:
    """Of the checkpoint to start from (of the size, while that is not there), as the arguments want it."""
    vision = {"image_size": arguments.image_size, "window_size": arguments.window_size}
    wanted = {name: value for name, value in vision.items() if value}
    if not arguments.init_from or not Path(arguments.init_from).is_dir():
        return FlorenceConfig.from_size(
            arguments.size,
            vision_config=FlorenceVisionConfig.from_size(arguments.size, **wanted),
            text_config=FlorenceTextConfig.from_size(arguments.size, max_position_embeddings=arguments.context_length),
        )
    config = FlorenceConfig.from_pretrained(arguments.init_from, vision_config=wanted)
    context = config.text_config.max_position_embeddings
    if arguments.context_length > context:
        raise ValueError(
            f"context_length: expected at most the {context} tokens of {arguments.init_from}, "
            f"got {arguments.context_length}"
        )
    return config


def build_processor(
    arguments: PretrainArguments, config: FlorenceConfig, corpus: PictureCorpus | None
) -> FlorenceProcessor:
    """A vocabulary learnt from the texts, or a given one, and an image processor for the model's size.

    A corpus's pictures are squares; those of sources are resized by their shorter side and cropped.
    """
    text = config.text_config
    if arguments.vocabulary:
        tokenizer = FlorenceProcessor.from_pretrained(arguments.vocabulary).tokenizer
        if len(tokenizer) != text.vocab_size:
            got = f"{len(tokenizer)} in {arguments.vocabulary}"
            raise ValueError(f"vocabulary: expected the {text.vocab_size} tokens of the model, got {got}")
        tokenizer.model_max_length = text.max_position_embeddings
    else:
        texts = source_texts(arguments) if corpus is None else corpus_texts(corpus)
        tokenizer = FlorenceTokenizer.train_new(
            texts, vocab_size=text.vocab_size, model_max_length=text.max_position_embeddings
        )
    side = config.vision_config.image_size
    square = {"height": side, "width": side}
    if corpus is None:
        image_processor = FlorenceImageProcessor(size={"shortest_edge": side}, crop_size=square)
    else:
        image_processor = FlorenceImageProcessor(size=square, do_center_crop=False, crop_size=square)
    return FlorenceProcessor(image_processor=image_processor, tokenizer=tokenizer)


def enlarge(model: FlorenceModel, processor: FlorenceProcessor, image_size: int, window_size: int) -> None:
    """Let a model and its processor take pictures of another side, and windows of another; 0 leaves one as it is."""
    if window_size:
        model.vision_model.resize_window_size(window_size)
    if image_size:
        model.config.vision_config.image_size = image_size
        image_processor = processor.image_processor
        square = {"height": image_size, "width": image_size}
        by_edge = "shortest_edge" in dict(image_processor.size)
        image_processor.size = {"shortest_edge": image_size} if by_edge else square
        image_processor.crop_size = square


def build_model(arguments: PretrainArguments, corpus: PictureCorpus | None) -> tuple[FlorenceModel, FlorenceProcessor]:
    """The checkpoint to start from, or new weights and a vocabulary learnt from the texts."""
    config = build_config(arguments)
    if not arguments.init_from:
        return FlorenceModel(config), build_processor(arguments, config, corpus)
    model = load_checkpoint(FlorenceModel, arguments.init_from, dtype=torch.float32)
    processor = FlorenceProcessor.from_pretrained(arguments.init_from)
    enlarge(model, processor, arguments.image_size, arguments.window_size)
    return model, processor


def make_batches(
    arguments: PretrainArguments, corpus: PictureCorpus | None, processor: FlorenceProcessor, accelerator: Accelerator
) -> Batches:
    """This process's part of every batch: of the corpus, or of the sources."""
    place = (processor, accelerator.device, accelerator.process_index, accelerator.num_processes)
    return TripletBatches(arguments, *place) if corpus is None else CorpusBatches(arguments, corpus, *place)


def evaluate(evaluators: list[Evaluator], model: FlorenceModel, side: int) -> dict[str, float]:
    """What all evaluators find, the model in evaluation mode meanwhile."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    found = {name: value for evaluator in evaluators for name, value in evaluator(model, side).items()}
    for module, before in training.items():
        module.training = before
    return found


def dry_run(arguments: PretrainArguments) -> Plan:
    """Print what a run would take; nothing is read, allocated or trained.

    Raises:
        ValueError: what cannot fit into the device's memory.
    """
    config = build_config(arguments)
    side, full = config.vision_config.image_size, arguments.context_length
    layout = Shape(
        batch_size=arguments.batch_size,
        chunk_size=arguments.chunk_size,
        image_size=side,
        tokens=full,
        devices=arguments.processes or 1,
        zero_stage=arguments.zero_stage,
        offload=arguments.offload,
        dtype=torch.bfloat16 if arguments.precision == "auto" else computing_dtype(arguments.precision),
        activation_checkpointing=arguments.activation_checkpointing,
        average=arguments.ema_decay > 0,
    )
    small_steps = round(arguments.small_part * arguments.steps)
    parts = [(small_steps, replace(layout, image_size=side // 2, tokens=full * 2 // 3))] if small_steps else []
    parts.append((arguments.steps - small_steps, layout))
    plan = plan_training(config, parts, arguments.device, arguments.peak_share)
    way = f"ZeRO-{layout.zero_stage}" if layout.zero_stage else "DDP" if layout.devices > 1 else "one process"
    print(f"{arguments.steps:,} steps of {layout.batch_size:,} pairs: {side} pixels, {full} tokens")
    print(f"{plan.parameters:,} parameters, {plan.flops:.3g} FLOP in {layout.passes} passes")
    print(f"{layout.devices} x {plan.device}, {way}, {layout.dtype}, {layout.chunk} of {layout.rows} pairs at once")
    print(f"memory of each, GiB: {plan.memory.total / GIB:.1f}")
    for name, size in vars(plan.memory).items():
        print(f"  {name:12}{size / GIB:6.1f}")
    share = f"with {arguments.peak_share:.0%} of the peak assumed"
    print(f"{plan.hours:,.1f} hours, {plan.device_hours:,.0f} device hours, {share}")
    plan.check()
    return plan


def positives(accelerator: Accelerator, labels: torch.Tensor) -> float:
    """How many pictures of the global batch a picture's text is true of, itself among them, in the mean."""
    labels = accelerator.gather(labels)
    return labels.unique(return_counts=True)[1].double().square().sum().item() / len(labels)


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(PretrainArguments, sys.argv[1:] if argv is None else argv)
    if arguments.dry_run:
        dry_run(arguments)
        return
    output = Path(arguments.output)
    output.mkdir(parents=True, exist_ok=True)
    dtype = computing_dtype(arguments.precision)
    # Rounding the weights once a step is faster than autocast, but layers that are computed again would not see it.
    rounds_weights = dtype == torch.bfloat16 and not arguments.activation_checkpointing
    with_deepspeed = parse_flag_from_env("ACCELERATE_USE_DEEPSPEED")  # which has an autocast of its own
    autocasts = dtype != torch.float32 and not rounds_weights and not with_deepspeed
    accelerator = make_accelerator(
        processes=arguments.processes,
        # Whatever Accelerate's own settings say: `precision` decides.
        mixed_precision={torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype] if autocasts else "no",
        log_with=make_trackers(arguments.report_to, output),
        project_dir=str(output),
        step_scheduler_with_optimizer=False,  # or the schedule would move once for each rank
    )
    rank, ranks, stage = accelerator.process_index, accelerator.num_processes, zero_stage(accelerator)
    torch.manual_seed(arguments.seed)

    corpus = None
    if not arguments.sources:
        corpus = PictureCorpus(load_split(arguments.corpus, "train"), size=arguments.stored_size)
    model, processor = build_model(arguments, corpus)
    if arguments.locked:
        lock_image_tower(model)
    if accelerator.device.type == "cpu":  # PyTorch's fused attention goes backwards slowly there: a quarter of a step
        model.set_attn_implementation({"text_config": "eager"})
    if arguments.activation_checkpointing:
        checkpoint_activations(model)
    parameters = sum(weight.numel() for weight in model.parameters())  # ZeRO-3 will leave none in the model
    batches = make_batches(arguments, corpus, processor, accelerator)
    evaluators = batches.evaluators()

    objective = ContrastiveObjective(
        model,
        objective=arguments.objective,
        num_labels=len(batches.label_names),
        prototype_weight=arguments.prototype_weight,
        alignment_weight=arguments.alignment_weight,
    )
    if objective.prototypes is not None and arguments.init_from:
        # Random ones would draw the trained texts away from where they are.
        names = embed_texts(model, processor.tokenizer, batches.label_names)
        objective.prototypes.data.copy_(names)
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
    configure_deepspeed(accelerator, arguments.batch_size, arguments.max_grad_norm, dtype)
    wrapped: torch.nn.Module = Bfloat16Forward(objective) if rounds_weights and stage is None else objective
    wrapped, optimizer, schedule = accelerator.prepare(wrapped, optimizer, schedule)
    running = check_running(accelerator, wrapped, dtype)
    average = moving_average(model, arguments.ema_decay) if arguments.ema_decay else None
    averages = {} if average is None else {AVERAGE: average}

    record = {**asdict(arguments), "texts": batches.identity}
    check_same_run(output, record, FIXED)
    update = GuardedUpdate(
        accelerator,
        optimizer,
        schedule,
        objective.parameters(),
        max_grad_norm=arguments.max_grad_norm,
        policy=arguments.non_finite,
    )
    first, progress = 0, resume_training(accelerator, output, modules=averages)
    if progress is not None:
        first = progress.step
        update.load_state_dict(progress.extra["update"])
        batches.load_state_dict(progress.data)
        accelerator.print(f"resumed from {progress.folder} at step {first}")
    if first > arguments.steps:
        raise ValueError(f"steps: {output} has taken {first}, expected as many or more, got {arguments.steps}")
    accelerator.init_trackers("florence", config=record)
    for tracker in accelerator.trackers:
        if isinstance(tracker, LocalTracker):
            tracker.go_on_after(first)
    if accelerator.is_main_process:
        (output / "arguments.json").write_text(json.dumps(record, indent=2), "utf-8")
    epoch = "" if batches.steps_of_epoch is None else f"{batches.steps_of_epoch} steps an epoch, "
    accelerator.print(f"{batches}, {parameters:,} parameters, {epoch}{running}")

    name = torch.cuda.get_device_name(accelerator.device) if accelerator.device.type == "cuda" else "CPU"
    peak = peak_flops(name, dtype)
    flops_of = cache(partial(forward_flops, model.config))
    started, seen, flops = time.monotonic(), 0, 0
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
            batch, rate = batches(step), schedule.get_last_lr()[image_group]
            # Drop path's choices depend on the step alone, and differ between processes.
            torch.manual_seed((arguments.seed << 32) + step * ranks + rank)
            found = guarded_step(
                update,
                wrapped,
                partial(objective.loss, **batch["labels"]),
                batch["inputs"],
                chunk_size,
                shared=objective.shared_outputs,
                step=step,
                samples=batch["samples"],
            )
            if average is not None and found.taken:
                average.update_parameters(model)
            seen += arguments.batch_size
            if peak is not None:
                flops += 3 * arguments.batch_size * flops_of(batches.side(step), batches.length(step))
            done = step + 1
            entry: dict[str, Any] = {}
            if done % arguments.log_every == 0:
                seconds = time.monotonic() - started
                speed = seen / seconds
                bad = accelerator.reduce(torch.tensor(batches.skipped, device=accelerator.device), "sum")
                entry = {
                    "loss": round(found.loss.item(), 6),
                    "gradient_norm": None if found.gradient_norm is None else round(found.gradient_norm, 3),
                    "learning_rate": rate,
                    "logit_scale": round(found.shared["logit_scale"].item(), 2),
                    "positives": round(positives(accelerator, batch["labels"]["labels"]), 2),
                    "pictures_per_second": round(speed, 1),
                    # Of the model's own arithmetic; what is computed again does not count.
                    "share_of_peak": None if peak is None else round(flops / (seconds * ranks * peak), 3),
                    "skipped_steps": update.skipped,
                    "skipped_samples": int(bad),
                }
                bar.set_postfix(loss=entry["loss"], speed=f"{speed:.0f}/s", refresh=False)
            evaluates = bool(evaluators) and (done % arguments.eval_every == 0 or done == arguments.steps)
            if evaluates and (accelerator.is_main_process or stage == 3):  # all gather the weights of ZeRO-3
                side = batches.side(step)
                entry |= evaluate(evaluators, model, side)
                if average is not None:
                    of_average = evaluate(evaluators, average.module, side)
                    entry |= {f"{AVERAGE}_{name}": value for name, value in of_average.items()}
            if entry:
                accelerator.log(entry, step=done)
            stopped = stop.requested(accelerator)
            if done % arguments.save_every == 0 or done == arguments.steps or stopped:
                save_checkpoint(
                    accelerator,
                    output,
                    done,
                    data=batches.state_dict(),
                    extra={"update": update.state_dict()},
                    modules=averages,
                    keep=arguments.keep,
                )
            if stopped and done < arguments.steps:
                accelerator.print(f"asked to stop: saved step {done}; the same command goes on from there")
                accelerator.end_training()
                return

    for name, own in {"model": model, **{name: module.module for name, module in averages.items()}}.items():
        save_whole(accelerator, wrapped, own, output / name)
        if accelerator.is_main_process:
            processor.save_pretrained(output / name)
        accelerator.print(f"saved {'the model' if own is model else 'its average'} to {output / name}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
