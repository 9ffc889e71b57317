"""Pretraining small enough for a test: a size named `test`, options of a run, and what the run leaves."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import pretrain_unicl
from tests.tiny_florence import CONTEXT
from transformers_florence import configuration_florence as sizes
from transformers_florence.training import tracking

STEPS, BATCH = 6, 16  # 64 pictures: an epoch ends within the run


def add_tiny_size(patch: pytest.MonkeyPatch) -> None:
    """A size named `test`, with everything in it that makes training random."""
    vision = {"image_size": 32, "embed_dim": 8, "depths": [1, 2], "num_heads": [1, 2], "window_size": 4}
    text = {"vocab_size": 560, "hidden_size": 16, "intermediate_size": 24}
    patch.setitem(sizes.VISION_SIZES, "test", {**vision, "drop_path_rate": 0.2})
    patch.setitem(sizes.TEXT_SIZES, "test", {**text, "num_hidden_layers": 1, "num_attention_heads": 2})
    patch.setitem(sizes.PROJECTION_DIMS, "test", 12)


def options(corpus: Path | None, output: Path, **changes) -> list[str]:
    """The command line of a run; without a corpus, `changes` name the sources. None takes an option away."""
    values = {
        "output": output,
        "size": "test",
        "steps": STEPS,
        "batch_size": BATCH,
        "warmup_steps": 2,
        "category_batches": 0.3,
        "keyword_batches": 0.2,
        "stored_size": 32,
        "context_length": 16,
        "precision": "float32",
        "log_every": 1,
        "eval_every": 3,
        "save_every": 3,
    }
    values |= ({} if corpus is None else {"corpus": corpus}) | changes
    line = []
    for name, value in values.items():
        if value is not None:
            line += [f"--{name}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return line


def pretrain(corpus: Path | None, output: Path, **changes) -> dict[str, torch.Tensor]:
    """The weights that a run ends with."""
    pretrain_unicl.main(options(corpus, output, **changes))
    return load_file(output / "model" / "model.safetensors")


def read_log(output: Path) -> list[dict]:
    """What a run logged, but for its speed."""
    rows = tracking.read_log(output / "log.csv")
    return [
        {key: (int if key == "step" else float)(value) for key, value in row.items() if key != "pictures_per_second"}
        for row in rows
    ]


def checkpoints(output: Path) -> list[str]:
    return sorted(path.name for path in output.glob("checkpoint-*"))


def assert_same_weights(weights: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> None:
    assert weights.keys() == others.keys()
    for name, tensor in weights.items():
        assert torch.equal(tensor, others[name]), name


def from_start(start: Path, **changes) -> dict:
    """A run that goes on from a checkpoint, small steps so that equal runs stay equal to the last digits."""
    return {"init_from": start, "context_length": CONTEXT, "learning_rate": 1e-4, "prototype_weight": 0.5, **changes}
