"""Speed and memory of the video tower beside torchvision's Video Swin, and of the decoding of video files.

    python benchmarks/video.py                          # forward and step at two sizes
    python benchmarks/video.py --sides 112 --rounds 3 --precisions float32
    python benchmarks/video.py --checkpointing          # peak memory of a training step without and with it
    python benchmarks/video.py --decoding 1000          # memory while so many clips of a file are decoded

Both towers are Swin3D-T with the same random weights; that they give the same outputs is checked first. They run in
turns in one process, so that a busy machine slows both alike; the table holds the medians of wall and of processor
time, which other programs hardly touch. Memory is told by a process of its own for each line.
"""

import argparse
import gc
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torchvision.models.video import swin3d_t
from vision_tower import measure_memory, peer_weights, resident_bytes

from transformers_florence import FlorenceForVideoClassification, FlorenceVideoConfig
from transformers_florence.video_decoding import read_video

PRECISIONS = ("float32", "bfloat16")
TOLERANCE = 1e-4


def torchvision_weights(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A classifier's weights under torchvision's names, which are those of its image tower but for the stem."""
    renamed = {}
    tower = {name.removeprefix("video_model."): tensor for name, tensor in weights.items()}
    for name, tensor in peer_weights("torchvision", tower).items():
        name = name.replace("features.0.0.", "patch_embed.proj.").replace("features.0.2.", "patch_embed.norm.")
        name = re.sub(r"^features\.(\d+)\.", lambda match: f"features.{int(match[1]) - 1}.", name)
        renamed[name.replace("classifier.", "head.")] = tensor
    return renamed


def both_towers() -> dict[str, nn.Module]:
    """Ours and torchvision's, with one set of random weights, in evaluation mode.

    Raises:
        ValueError: a parameter got no weight, or a weight found no parameter.
    """
    torch.manual_seed(0)
    fields = {"embed_type": "patch", "window_padding": "clamp_axes", "temporal_padding": "zeros"}
    config = FlorenceVideoConfig.from_size("tiny", **fields, clamped_bias="slice", num_labels=400)
    model = FlorenceForVideoClassification(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "bias" in name:  # of a projection, or a relative position table
                weight.normal_(std=0.1)
    peer = swin3d_t(progress=False).eval()
    keys = peer.load_state_dict(torchvision_weights(model.state_dict()), strict=False)
    missing = [key for key in keys.missing_keys if not key.endswith("relative_position_index")]  # made from the shape
    if missing or keys.unexpected_keys:
        raise ValueError(f"expected every weight of torchvision's, got {missing=} and {keys.unexpected_keys=}")
    return {"florence": model, "torchvision": peer}


def logits_of(name: str, tower: nn.Module, clips: torch.Tensor) -> torch.Tensor:
    """clips: (batch, frames, 3, height, width) -> (batch, classes)."""
    return tower(clips).logits if name == "florence" else tower(clips.transpose(1, 2))


def make_run(name: str, tower: nn.Module, mode: str, clips: torch.Tensor) -> Callable[[], None]:
    """A function that runs the tower once: a forward without gradients, or a whole training step with AdamW."""
    if mode == "forward":
        return torch.inference_mode()(lambda: logits_of(name, tower, clips))
    optimizer = torch.optim.AdamW(tower.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        logits_of(name, tower, clips).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def compare(options: argparse.Namespace) -> None:
    """Print the table of times."""
    print("| clip | | tower | ms | processor ms | times torchvision | processor |\n|---|---|---|---|---|---|---|")
    for side in options.sides:
        towers = both_towers()  # anew, as the steps train them
        clips = torch.randn(options.batch, options.frames, 3, side, side)
        with torch.inference_mode():
            ours, theirs = (logits_of(name, tower.float(), clips) for name, tower in towers.items())
        worst = (ours - theirs).abs().max().item()
        if not worst < TOLERANCE * max(1.0, theirs.abs().max().item()):
            raise ValueError(f"expected equal outputs within {TOLERANCE}, got a difference of {worst}")
        for precision in options.precisions:
            dtype = getattr(torch, precision)
            for mode in ("forward", "step"):
                runs = {name: make_run(name, tower.to(dtype), mode, clips.to(dtype)) for name, tower in towers.items()}
                clocks: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
                for number in range(options.rounds + 1):
                    for name in sorted(runs, reverse=bool(number % 2)):
                        wall, processor = time.perf_counter(), time.process_time()
                        runs[name]()
                        clocks[name].append((time.perf_counter() - wall, time.process_time() - processor))
                medians = {name: [statistics.median(own) for own in zip(*pairs[1:], strict=True)]
                           for name, pairs in clocks.items()}  # fmt: skip
                for name, (wall, processor) in medians.items():
                    ratios = [peer / own for peer, own in zip(medians["torchvision"], (wall, processor), strict=True)]
                    shown = f"{1000 * wall:.0f} | {1000 * processor:.0f} | {ratios[0]:.2f} | {ratios[1]:.2f}"
                    print(f"| {options.frames}x{side}x{side} | {precision} {mode} | {name} | {shown} |", flush=True)


def checkpointing(options: argparse.Namespace) -> None:
    """Print by how much a training step raises the memory, without and with activation checkpointing."""
    if options.serve:
        model = both_towers()["florence"].train()
        assert isinstance(model, FlorenceForVideoClassification)
        if options.serve == "with":
            model.gradient_checkpointing_enable()
        make_run("florence", model, "step", torch.randn(1, 2, 3, 32, 32))()  # the optimizer's state, and loaded code
        clips = torch.randn(options.batch, options.frames, 3, options.sides[0], options.sides[0])
        print(measure_memory(make_run("florence", model, "step", clips)))
        return
    for side in options.sides:
        peaks = {}
        for kind in ("without", "with"):
            fields = {"batch": options.batch, "frames": options.frames, "sides": side, "serve": kind}
            arguments = [part for name, value in fields.items() for part in (f"--{name}", str(value))]
            command = [sys.executable, __file__, "--checkpointing", *arguments]
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            peaks[kind] = float(output.splitlines()[-1])
        less = 1 - peaks["with"] / peaks["without"]
        print(f"{options.batch} x {options.frames}x{side}x{side}: peak {peaks['without']:.0f} MiB without, "
              f"{peaks['with']:.0f} MiB with activation checkpointing, {less:.0%} less", flush=True)  # fmt: skip


def decoding(options: argparse.Namespace) -> None:
    """Print the resident memory of this process and of the decoding one, while clips are decoded."""
    import av  # an extra

    pixels = np.random.default_rng(0).integers(0, 256, (60, 15, 20, 3), dtype=np.uint8).repeat(16, 1).repeat(16, 2)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "clip.mp4"
        with av.open(str(file), "w") as out:
            stream = out.add_stream("libx264", rate=25)
            stream.height, stream.width, stream.pix_fmt = *pixels.shape[1:3], "yuv420p"
            for picture in pixels:
                out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            out.mux(stream.encode())
        started, first = time.perf_counter(), None
        for number in range(1, options.decoding + 1):
            frames, _ = read_video(
                file, lambda about: np.linspace(0, about.total_num_frames - 1, 16).astype(int),
                max_pixels=1 << 24, max_aspect_ratio=100,
            )  # fmt: skip
            assert frames.shape == (16, 240, 320, 3)
            if number in (50, options.decoding) or number % 250 == 0:
                gc.collect()
                child = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
                pages = [int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in child]
                sizes = [resident_bytes("VmRSS"), sum(pages) * os.sysconf("SC_PAGE_SIZE")]
                first = first or sizes
                growth = [(now - then) / 2**20 for now, then in zip(sizes, first, strict=True)]
                speed = number / (time.perf_counter() - started)
                shown = f"{growth[0]:+.1f} MiB here, {growth[1]:+.1f} MiB in the decoding process"
                print(f"{number} clips of 60 frames of 320x240, {speed:.0f} a second: {shown}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1, help="clips in a batch")
    parser.add_argument("--frames", type=int, default=8, help="frames of a clip")
    parser.add_argument("--sides", type=int, nargs="+", default=(112, 224), help="side of the pictures in pixels")
    parser.add_argument("--rounds", type=int, default=5, help="timed runs")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of torch")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    parser.add_argument("--checkpointing", action="store_true", help="measure the memory of a training step instead")
    parser.add_argument("--decoding", type=int, default=0, help="measure the memory of decoding so many clips instead")
    parser.add_argument("--serve", choices=("without", "with"), help="be one process of --checkpointing")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.checkpointing:
        checkpointing(options)
    elif options.decoding:
        decoding(options)
    else:
        compare(options)


if __name__ == "__main__":
    main()
