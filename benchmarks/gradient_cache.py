"""What the gradient cache costs: a large batch in chunks beside a plain step of one chunk, in memory and in time; and
what a plain step saves, and costs, that computes the activations of both towers again (float32 only).

    python benchmarks/gradient_cache.py
    python benchmarks/gradient_cache.py --batch 512 --chunk 64 --sides 32 --rounds 1

The model is `florence-nano` with random weights, training, with the loss of its configuration over the whole batch. A
step is forward, loss and backward: there is no optimizer, of which a large batch has fewer steps. "Times" compares a
pair's share of the large step with its share of plain steps of one chunk, which is what the large batch would take if
it fitted without a cache. Every measurement has a process of its own, and those of time run in turns, so that a busy
machine slows both alike; the table holds medians. Memory is how far steps raise the resident set above its size
before: weights and the batch itself are there by then, the batch's size stands in the last column (Linux only). It is
measured twice: "live", with every tensor's pages given back when it dies, as an accelerator's allocator counts; and
"resident", with what glibc's allocator keeps for later on top of that.
"""

import argparse
import contextlib
import ctypes
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from transformers_florence import FlorenceConfig, FlorenceModel, bundled_checkpoint
from transformers_florence.training.gradient_cache import cached_backward, checkpoint_activations
from transformers_florence.training.objectives import ContrastiveObjective
from transformers_florence.training.precision import Bfloat16Forward

PLAIN, RECOMPUTED, CACHED = KINDS = "plain", "recomputed", "cached"  # the first two are of one chunk
PLAIN_STEPS = 8  # timed in a row in one process; the first one warms up and does not count
MEMORY_STEPS = 2  # the second finds the allocator as the first left it
# Bytes from which glibc takes an allocation from the system and gives it back at once; unset, it raises that itself.
LIVE = {"MALLOC_MMAP_THRESHOLD_": "65536"}
SHARED_LABELS = 4  # pairs of a batch that mean the same


def resident_bytes(field: str) -> int:
    """`VmRSS` (resident now) or `VmHWM` (its highest since the last reset) of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise ValueError(f"expected {field} in /proc/self/status")


def measure_memory(run: Callable[[], None], times: int) -> float:
    """MiB by which the runs raise this process's resident set; NaN where the system does not tell."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        return float("nan")
    with contextlib.suppress(AttributeError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)  # what the construction freed must not hide what the runs take
    Path("/proc/self/clear_refs").write_text("5")  # and its high-water mark is forgotten
    before = resident_bytes("VmRSS")
    for _ in range(times):
        run()
    return (resident_bytes("VmHWM") - before) / 2**20


def build(rows: int, side: int, precision: str) -> tuple[ContrastiveObjective, torch.nn.Module, dict, torch.Tensor]:
    """The objective, what is called for its forward, a random batch of `rows` pairs, and its labels."""
    torch.manual_seed(0)
    config = FlorenceConfig.from_pretrained(bundled_checkpoint("florence-nano"))
    model = FlorenceModel(config)
    model.set_attn_implementation({"text_config": "eager"})  # as `examples/pretrain_unicl.py` trains on a CPU
    objective = ContrastiveObjective(model).train()
    text = config.text_config
    tokens = torch.randint(text.bos_token_id, (rows, text.max_position_embeddings))
    tokens[:, 0], tokens[:, -1] = text.bos_token_id, text.eos_token_id
    inputs = {"pixel_values": torch.randn(rows, 3, side, side), "input_ids": tokens}
    wrapped = Bfloat16Forward(objective) if precision == "bfloat16" else objective
    return objective, wrapped, inputs, torch.arange(rows) // SHARED_LABELS


def measure(options: argparse.Namespace) -> dict[str, float]:
    """One measurement of this process: `kind` of step, `what` is measured."""
    (side,), rows = options.sides, options.batch if options.kind == CACHED else options.chunk
    objective, wrapped, inputs, labels = build(rows, side, options.precision)
    if options.kind == RECOMPUTED:
        checkpoint_activations(objective.model)

    def step(rows: int) -> None:
        some = {name: value[:rows] for name, value in inputs.items()}
        cached_backward(wrapped, partial(objective.loss, labels=labels[:rows]), some, options.chunk)
        objective.zero_grad()

    step(2)  # loads the code of the libraries
    if options.what != "time":
        return {"mib": measure_memory(partial(step, rows), MEMORY_STEPS)}
    clocks = []
    for _ in range(1 if options.kind == CACHED else PLAIN_STEPS):
        wall, processor = time.perf_counter(), time.process_time()
        step(rows)
        clocks.append((time.perf_counter() - wall, time.process_time() - processor))
    wall, processor = map(statistics.median, zip(*(clocks[1:] or clocks), strict=True))
    return {"wall": wall / rows, "processor": processor / rows}


def in_a_process(what: str, kind: str, side: int, options: argparse.Namespace) -> dict[str, float]:
    """`measure` in a process of its own."""
    command = [sys.executable, __file__, "--what", what, "--kind", kind, "--sides", str(side)]
    command += [f"--{name}={getattr(options, name)}" for name in ("batch", "chunk", "precision", "threads")]
    environment = {**os.environ, **(LIVE if what == "live" else {})}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4096, help="pairs of the large batch")
    parser.add_argument("--chunk", type=int, default=128, help="pairs of a chunk, and of the plain step")
    parser.add_argument("--sides", type=int, nargs="+", default=[32, 64], help="sides of the pictures in pixels")
    parser.add_argument("--rounds", type=int, default=3, help="processes that time each kind of step")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    parser.add_argument(
        "--what", choices=("live", "resident", "time"), help="be one measurement; for this script's use"
    )
    parser.add_argument("--kind", choices=KINDS, help="the kind of step of that")
    options = parser.parse_args()
    if min(options.batch, options.chunk, options.rounds, *options.sides) < 1 or options.chunk >= options.batch:
        parser.error("expected positive numbers and a chunk smaller than the batch")
    return options


def main() -> None:
    options = parse_options()
    torch.set_num_threads(options.threads)
    if options.what:
        print(json.dumps(measure(options)))
        return

    print(f"florence-nano, {options.precision}, {options.threads} threads.\n")
    columns = (
        "side",
        "step",
        "live MiB",
        "times",
        "resident MiB",
        "times",
        "ms a pair",
        "times",
        "processor ms",
        "times",
    )
    print(f"| {' | '.join((*columns, 'batch MiB'))} |")
    print("|---" * (len(columns) + 1) + "|")
    # Layers that are computed again would not see the weights that `Bfloat16Forward` rounds.
    kinds = [kind for kind in KINDS if kind != RECOMPUTED or options.precision == "float32"]
    for side in options.sides:
        live, resident = (
            {kind: in_a_process(what, kind, side, options)["mib"] for kind in kinds} for what in ("live", "resident")
        )
        clocks: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
        for _ in tqdm(range(options.rounds), desc=f"{side} pixels", leave=False):
            for kind, found in clocks.items():
                found.append(in_a_process("time", kind, side, options))
        wall, processor = (
            {kind: statistics.median(clock[name] for clock in found) for kind, found in clocks.items()}
            for name in ("wall", "processor")
        )
        for kind in kinds:
            rows = options.batch if kind == CACHED else options.chunk
            name = f"{kind}, {rows}" + (f" in chunks of {options.chunk}" if kind == CACHED else "")
            print(
                f"| {side} | {name} | {live[kind]:.0f} | {live[kind] / live[PLAIN]:.2f} "
                f"| {resident[kind]:.0f} | {resident[kind] / resident[PLAIN]:.2f} "
                f"| {wall[kind] * 1e3:.2f} | {wall[kind] / wall[PLAIN]:.2f} "
                f"| {processor[kind] * 1e3:.2f} | {processor[kind] / processor[PLAIN]:.2f} "
                f"| {rows * 3 * side * side * 4 / 2**20:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
