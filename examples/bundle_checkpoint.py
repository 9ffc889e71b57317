"""Put a trained model into the package: weights stored in float16, computed in float32, SHA-256 printed.

    python examples/bundle_checkpoint.py --model runs/florence-nano/model --name florence-nano

float16 halves the file; its rounding moves no unit vector of `florence-nano` by more than the printed amount.
"""

import argparse
import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import transformers_florence
from transformers_florence import FlorenceModel, FlorenceProcessor, load_checkpoint, write_manifest

LIMIT = 20_000_000  # bytes of weights that the wheel may carry


def main(argv: list[str] | None = None) -> str:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder that a training saved")
    parser.add_argument("--name", default="florence-nano")
    parser.add_argument("--out", type=Path, default=Path(transformers_florence.__file__).parent / "checkpoints")
    arguments = parser.parse_args(argv)
    target = arguments.out / arguments.name
    target.mkdir(parents=True, exist_ok=True)

    model = load_checkpoint(FlorenceModel, arguments.model, dtype=torch.float32)
    model.save_pretrained(target)
    FlorenceProcessor.from_pretrained(arguments.model).save_pretrained(target)
    weights = target / "model.safetensors"
    half = {name: tensor.half() for name, tensor in load_file(weights).items()}
    save_file(half, weights, metadata={"format": "pt"})
    write_manifest(target)

    config = json.loads((target / "config.json").read_text())
    if config["dtype"] != "float32":
        raise ValueError(f"expected a float32 model in {arguments.model}, got {config['dtype']}")
    bundled = load_checkpoint(FlorenceModel, target)
    side = model.config.vision_config.image_size
    pixels = torch.randn(16, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        moved = (model(pixel_values=pixels).image_embeds - bundled(pixel_values=pixels).image_embeds).norm(dim=1).max()
    size = weights.stat().st_size
    if size > LIMIT:
        raise ValueError(f"expected weights of at most {LIMIT} bytes, got {size}")
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    print(f"{weights}: {size:,} bytes, SHA-256 {digest}, unit vectors move by at most {moved:.1e}")
    return digest


if __name__ == "__main__":
    main()
