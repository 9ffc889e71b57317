"""Speed and memory of the image tower beside timm, transformers and torchvision: one shape, one set of weights.

    python benchmarks/vision_tower.py
    python benchmarks/vision_tower.py --rounds 3 --precisions bfloat16 --modes forward

Every tower is Swin-T with the same random weights; that all four give the same features is checked first. Then each
lives in a process of its own, as it does for a user: what one leaves behind in the memory allocator is no help and no
burden to another. The processes run in turns, one tower after the other in every round while the others wait, so that
a busy machine slows all of them alike. A process is fast or slow for its whole life by up to a fifth, as its memory
happens to lie: so all of this is done over with new processes, and the table holds the medians of their medians, with
the fastest and the slowest process beside. Processor time is the second clock, which other programs hardly touch.
Memory is how far the first runs raise the resident set of yet another process above its size before them: one of its
own, because the measurement empties the allocator's lists, which slows what runs next.
"""

import argparse
import contextlib
import ctypes
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers import SwinConfig, SwinModel

from transformers_florence import FlorenceVisionConfig, FlorenceVisionModel

OURS = "florence"
PEERS = ("timm", "transformers", "torchvision")
TOWERS = (OURS, *PEERS)
MODES = ("forward", "step")
# `autocast` keeps float32 weights and computes in bfloat16 where torch thinks it safe, as mixed precision does.
PRECISIONS = ("float32", "bfloat16", "autocast")
TOLERANCE = 1e-4
MATRIX_SIDE = 2048
MEMORY_RUNS = 2
WARM_UPS = 3
MATRIX = "matmul"  # the process that multiplies two matrices, beside those of the towers
PAUSE = 0.05  # seconds before a run: the threads of the process before it stop waiting for more work

# What a peer calls our `encoder.stages.N.embed` and `encoder.stages.N.layers`.
STAGE_NAMES: dict[str, Callable[[int], tuple[str, str]]] = {
    "timm": lambda stage: (f"layers.{stage}.downsample", f"layers.{stage}.blocks"),
    "transformers": lambda stage: (f"encoder.layers.{stage - 1}.downsample", f"encoder.layers.{stage}.blocks"),
    "torchvision": lambda stage: (f"features.{2 * stage}", f"features.{2 * stage + 1}"),
}
# Other parts of our names and of theirs, replaced from left to right.
PART_NAMES: dict[str, dict[str, str]] = {
    "timm": {
        "embeddings.projection": "patch_embed.proj",
        "embeddings.norm": "patch_embed.norm",
        "attention.": "attn.",
        "out_proj": "proj",
    },
    "transformers": {
        "embeddings.projection": "embeddings.patch_embeddings.projection",
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "out_proj": "o_proj",
        "relative_position_bias_table": "relative_position_bias.relative_position_bias_table",
    },
    "torchvision": {
        "embeddings.projection": "features.0.0",
        "embeddings.norm": "features.0.2",
        "attention.": "attn.",
        "out_proj": "proj",
        "mlp.fc1": "mlp.0",
        "mlp.fc2": "mlp.3",
    },
}


class TransformersSwin(nn.Module):
    """transformers' Swin, from pixels to pooled features like the others."""

    def __init__(self) -> None:
        super().__init__()
        self.swin = SwinModel(SwinConfig(drop_path_rate=0.0))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(batch, 3, height, width) -> (batch, 768)."""
        return self.swin(pixel_values).pooler_output


class FlorenceSwin(nn.Module):
    """Our tower at Swin-T's shape, from pixels to pooled features."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = FlorenceVisionModel(FlorenceVisionConfig(embed_type="patch", drop_path_rate=0.0))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(batch, 3, height, width) -> (batch, 768)."""
        return self.tower(pixel_values).pooler_output


def random_weights(seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights in our names: none is zero or one, so that no parameter can be lost on the way to a peer."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, tensor in FlorenceSwin().tower.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        if "norm" in name:
            weights[name] = 0.1 * noise + float(name.endswith("weight"))
        elif "bias" in name:  # of a projection, or a relative position table
            weights[name] = 0.1 * noise
        else:
            weights[name] = noise * tensor[0].numel() ** -0.5
    return weights


def peer_weights(peer: str, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our weights under a peer's names; timm and torchvision hold query, key and value as one matrix."""
    renamed = {}
    for name, tensor in weights.items():
        if peer != "transformers":
            if ".k_proj." in name or ".v_proj." in name:
                continue
            if ".q_proj." in name:
                tensor = torch.cat([weights[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"])
                name = name.replace("q_proj", "qkv")
        elif name.startswith("norm."):
            name = name.replace("norm.", "layernorm.")
        if name.startswith("encoder.stages."):
            _, _, stage, part, rest = name.split(".", 4)
            embed, layers = STAGE_NAMES[peer](int(stage))
            name = f"{embed if part == 'embed' else layers}.{rest}"
        for old, new in PART_NAMES[peer].items():
            name = name.replace(old, new)
        renamed[name] = tensor
    return renamed


def build_tower(name: str, weights: dict[str, torch.Tensor]) -> nn.Module:
    """One of `TOWERS` with these weights (in our names): a module from pixels to (batch, 768), in evaluation mode.

    Raises:
        ValueError: a parameter got no weight, or a weight found no parameter.
    """
    if name == OURS:
        tower: nn.Module = FlorenceSwin()
        tower.tower.load_state_dict(weights)
        return tower.eval()
    if name == "timm":
        tower = target = timm.create_model("swin_tiny_patch4_window7_224", num_classes=0, drop_path_rate=0.0)
    elif name == "transformers":
        tower = TransformersSwin()
        target = tower.swin
    else:
        tower = target = torchvision.models.SwinTransformer(
            patch_size=[4, 4],
            embed_dim=96,
            depths=[2, 2, 6, 2],
            num_heads=[3, 6, 12, 24],
            window_size=[7, 7],
            stochastic_depth_prob=0.0,
        )
        target.head = nn.Identity()
    keys = target.load_state_dict(peer_weights(name, weights), strict=False)
    missing = [key for key in keys.missing_keys if not key.endswith("relative_position_index")]  # made from the shape
    if missing or keys.unexpected_keys:
        raise ValueError(f"expected every weight of {name}, got {missing=} and {keys.unexpected_keys=}")
    return tower.eval()


def check_equal(towers: dict[str, nn.Module], pixel_values: torch.Tensor) -> float:
    """Largest absolute difference between our features and a peer's.

    Raises:
        ValueError: it is above `TOLERANCE`.
    """
    with torch.inference_mode():
        features = {name: tower(pixel_values) for name, tower in towers.items()}
    worst = max((features[peer] - features[OURS]).abs().max().item() for peer in towers)
    if not worst < TOLERANCE:
        raise ValueError(f"expected equal features within {TOLERANCE}, got a difference of {worst}")
    return worst


def make_run(tower: nn.Module, mode: str, precision: str, pixel_values: torch.Tensor) -> Callable[[], None]:
    """A function that runs the tower once: a forward without gradients, or a whole training step with AdamW."""
    tower = tower.to(torch.bfloat16 if precision == "bfloat16" else torch.float32)
    pixel_values = pixel_values.to(next(tower.parameters()).dtype)

    def compute() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16) if precision == "autocast" else contextlib.nullcontext():
            return tower(pixel_values)

    if mode == "forward":
        return torch.inference_mode()(compute)

    tower.train()
    optimizer = torch.optim.AdamW(tower.parameters(), lr=1e-5, fused=True)
    target = torch.randn(len(pixel_values), 768, generator=torch.Generator().manual_seed(1))

    def step() -> None:
        loss = (compute().float() - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def matrix_product(precision: str) -> Callable[[], None]:
    """A function that multiplies two large matrices: what the machine does at best."""
    dtype = torch.float32 if precision == "float32" else torch.bfloat16
    left, right = torch.randn(2, MATRIX_SIDE, MATRIX_SIDE).to(dtype)
    return lambda: left @ right


@dataclass
class Clock:
    """Seconds of one run: the median over the processes, and each process's own median."""

    wall: float
    processor: float
    walls: list[float]


def resident_bytes(field: str) -> int:
    """`VmRSS` (resident now) or `VmHWM` (its highest since the last reset) of this process. Linux only."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise ValueError(f"expected {field} in /proc/self/status")


def measure_memory(run: Callable[[], None]) -> float:
    """MiB by which a few runs raise this process's resident set; NaN where the system does not tell."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        return float("nan")
    with contextlib.suppress(AttributeError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)  # memory that the construction freed must not hide what the runs take
    Path("/proc/self/clear_refs").write_text("5")  # and its high-water mark is forgotten
    before = resident_bytes("VmRSS")
    for _ in range(MEMORY_RUNS):
        run()
    return (resident_bytes("VmHWM") - before) / 2**20


def serve(options: argparse.Namespace) -> None:
    """Life of a child process: tells its memory and ends, or runs once for each line it gets and tells two clocks."""
    mode, precision = options.modes[0], options.precisions[0]
    if options.serve == MATRIX:
        run = matrix_product(precision)
    else:
        built, pixel_values = build_tower(options.serve, random_weights()), pictures(options)
        make_run(built, "forward", precision, pixel_values[:1])()  # loads the code of the libraries, some 100 MiB
        run = make_run(built, mode, precision, pixel_values)
        if options.memory:
            print(measure_memory(run))
            return
    for _ in range(WARM_UPS):
        run()
    print("ready", flush=True)
    for _ in sys.stdin:
        wall, processor = time.perf_counter(), time.process_time()
        run()
        print(time.perf_counter() - wall, time.process_time() - processor, flush=True)


class Child:
    """A tower in a process of its own, which runs when it is told to."""

    def __init__(self, tower: str, mode: str, precision: str, options: argparse.Namespace) -> None:
        self.command = [sys.executable, __file__, "--serve", tower, "--modes", mode, "--precisions", precision]
        self.command += [f"--batch={options.batch}", f"--size={options.size}", f"--threads={options.threads}"]
        self.seconds: list[tuple[float, float]] = []

    def memory(self) -> float:
        """MiB, of a process that does nothing else."""
        return float(subprocess.run([*self.command, "--memory"], capture_output=True, text=True, check=True).stdout)

    def start(self) -> None:
        """Until it has built its tower and warmed up."""
        self.process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.answer()

    def answer(self) -> list[str]:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{' '.join(self.command)} ended with code {self.process.wait()}")
        return line.split()

    def run(self) -> None:
        self.process.stdin.write("run\n")
        self.process.stdin.flush()
        wall, processor = self.answer()
        self.seconds.append((float(wall), float(processor)))

    def close(self) -> tuple[float, float]:
        """Ends the process. Returns the medians of its two clocks."""
        self.process.stdin.close()
        self.process.wait()
        wall, processor = map(statistics.median, zip(*self.seconds, strict=True))
        return wall, processor


def interleave(names: Sequence[str], mode: str, precision: str, options: argparse.Namespace) -> dict[str, Clock]:
    """Time all in turns, each in a process of its own, and all of it again with new processes.

    Each round starts with another one.
    """
    medians: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for _ in tqdm(range(options.processes), desc=f"{precision} {mode}", leave=False):
        children = {name: Child(name, mode, precision, options) for name in names}
        for child in children.values():
            child.start()
        for index in range(options.rounds):
            for name in (*names[index % len(names) :], *names[: index % len(names)]):
                time.sleep(PAUSE)
                children[name].run()
        for name, child in children.items():
            medians[name].append(child.close())
    clocks = {}
    for name, pairs in medians.items():
        walls, processors = (list(values) for values in zip(*pairs, strict=True))
        clocks[name] = Clock(statistics.median(walls), statistics.median(processors), walls)
    return clocks


def pictures(options: argparse.Namespace) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(options.batch, 3, options.size, options.size, generator=generator)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8, help="pictures in a batch")
    parser.add_argument("--size", type=int, default=224, help="side of the pictures in pixels")
    parser.add_argument("--processes", type=int, default=5, help="processes of each tower, one after the other")
    parser.add_argument("--rounds", type=int, default=5, help="timed runs in each process")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    parser.add_argument("--towers", nargs="+", choices=TOWERS, default=TOWERS)
    parser.add_argument(
        "--serve", choices=(*TOWERS, MATRIX), help="be the process of one tower; for this script's use"
    )
    parser.add_argument("--memory", action="store_true", help="with --serve: measure memory and end")
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    torch.set_num_threads(options.threads)
    if options.serve:
        serve(options)
        return

    pixel_values = pictures(options)
    weights = random_weights()
    towers = {name: build_tower(name, weights) for name in options.towers}
    print(f"Largest difference between the features of the towers: {check_equal(towers, pixel_values[:2]):.1e}")
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        towers[OURS](pixel_values[:1])
    flops = counter.get_total_flops() * options.batch
    print(f"{flops / options.batch / 1e9:.2f} GFLOP a picture and forward, {options.threads} threads.\n")
    columns = ("", "tower", "ms a picture", "fastest to slowest process", "processor ms", "times the best peer")
    columns = (*columns, "processor", "peak MiB", "matrix rate")
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for precision in options.precisions:
        for mode in options.modes:
            label = f"{precision} {mode}"
            memory = {
                name: Child(name, mode, precision, options).memory()
                for name in tqdm(towers, desc=f"{label}, memory", leave=False)
            }
            clocks = interleave((MATRIX, *towers), mode, precision, options)
            rate = 2 * MATRIX_SIDE**3 / clocks[MATRIX].wall
            peers = [clocks[name] for name in towers if name != OURS] or [clocks[OURS]]
            for name in towers:
                clock = clocks[name]
                share = flops * (1 if mode == "forward" else 3) / clock.wall / rate  # backward is two forwards
                walls = [wall / options.batch * 1e3 for wall in clock.walls]
                print(
                    f"| {label} | {name} | {clock.wall / options.batch * 1e3:.1f} "
                    f"| {min(walls):.1f} to {max(walls):.1f} "
                    f"| {clock.processor / options.batch * 1e3:.1f} "
                    f"| {min(peer.wall for peer in peers) / clock.wall:.2f} "
                    f"| {min(peer.processor for peer in peers) / clock.processor:.2f} "
                    f"| {memory[name]:.0f} | {share:.0%} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
