# Copyright 2026 The transformers_florence authors. Licensed under the Apache License, Version 2.0.
"""Loading that refuses what `from_pretrained` forgives, and the checkpoints that lie inside the package."""

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoProcessor, PreTrainedModel
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .integrity import MANIFEST, verify_checkpoint
from .modeling_florence import FlorenceModel

BUNDLED = Path(__file__).parent / "checkpoints"
# Under these a dual encoder keeps its parts; a tower passes over the other parts of a dual encoder's checkpoint.
DUAL_ENCODER_PARTS = ("vision_model.", "text_model.", "visual_projection.", "text_projection.", "logit_scale")
# What a weight may be stored in, beside the dtype that config.json names: no integers, no float8 without its scales.
STORED_DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
CONFIG_DTYPES = {**STORED_DTYPES, "float64": "F64"}

Model = TypeVar("Model", bound=PreTrainedModel)


def check_config_file(folder: Path, model_class: type) -> dict[str, Any]:
    """See that `config.json` is there and holds a configuration of `model_class`, or of a model that has one inside.

    Without this, `from_pretrained` would build the class's default model first, large or not.

    Returns:
        Its fields.

    Raises:
        ValueError: it is missing, corrupt, or of another kind of model.
    """
    file = folder / CONFIG_NAME
    try:
        fields = json.loads(file.read_text("utf-8"))
        kind = fields["model_type"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"expected a model's configuration, got {file}, missing or corrupt: {error!r}") from error
    config_class = getattr(model_class, "config_class", None)  # None: an Auto class, which takes any
    if config_class is not None and kind != config_class.model_type and config_class.base_config_key not in fields:
        raise ValueError(
            f"expected a checkpoint of {model_class.__name__} (model_type {config_class.model_type!r}), "
            f"got {folder} with model_type {kind!r}"
        )
    return fields


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: one, or those that its index names.

    Raises:
        ValueError: there are none, or the index is no index, or a file that it names is missing.
    """
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if (folder / SAFE_WEIGHTS_NAME).is_file():
        return [folder / SAFE_WEIGHTS_NAME]
    if not index.is_file():
        raise ValueError(f"expected {SAFE_WEIGHTS_NAME} or {SAFE_WEIGHTS_INDEX_NAME} in {folder}, got neither")
    try:
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        if any(Path(name).name != name for name in names):
            raise ValueError("it names files outside of its folder")
        files = [folder / name for name in names]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"expected an index of weight files, got {index}, which is corrupt: {error!r}") from error
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        raise ValueError(f"expected the weight files that {index} names, but missing are: {', '.join(missing)}")
    return files


def stored_dtypes(folder: Path) -> list[tuple[str, str]]:
    """Name and dtype, as safetensors calls it ("F32"), of each tensor in the tables of contents of a checkpoint.

    Raises:
        ValueError: a file is missing, truncated or no safetensors file; the message names it.
    """
    dtypes = []
    for file in weight_files(folder):
        try:
            with safe_open(file, "pt") as weights:
                dtypes += [(name, weights.get_slice(name).get_dtype()) for name in weights.keys()]  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(f"expected whole weights, got {file}, which is truncated or corrupt: {error}") from error
    return dtypes


def load_checkpoint(
    model_class: type[Model], path: str | os.PathLike, *, new: tuple[str, ...] = (), **kwargs: Any
) -> Model:
    """`model_class.from_pretrained(path)`, but every weight must be there, once, fit, be known and be finite.

    Only safetensors files are read, never pickles. A folder with a manifest is verified against it first, see
    `verify_checkpoint`. Weights may be stored in float16, bfloat16, float32 or the dtype that `config.json` names, in
    any mixture; the model gets the one that `config.json` or `dtype` asks for. Anything else (integers, float64 where
    the configuration says float32) would be converted in silence, and is refused.

    Args:
        model_class: a model class of this package, or one of transformers' Auto classes.
        path: the folder of a checkpoint on this machine.
        new: beginnings of the names of weights that the checkpoint may lack, such as `("classifier.",)` for a head
            that is yet to be trained.
        kwargs: what `from_pretrained` takes, such as `dtype`, `attn_implementation` and `quantization_config`.

    Returns:
        The model, in evaluation mode.

    Raises:
        ValueError: no such folder; files that are not those of the manifest; `config.json` missing, corrupt or of
            another kind of model; a weight file missing or corrupt; or weights that are missing, unexpected, stored
            twice, of another shape or dtype, or not finite, all in one message.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"expected the folder of a checkpoint, got {str(path)!r}: no such folder")
    if (folder / MANIFEST).is_file():
        verify_checkpoint(folder)
    fields = check_config_file(folder, model_class)
    stored = stored_dtypes(folder)
    allowed = {*STORED_DTYPES.values(), CONFIG_DTYPES.get(str(fields.get("dtype")))}
    try:
        model, info = model_class.from_pretrained(
            folder, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"expected a checkpoint of {model_class.__name__}, got {folder}: {error}") from error
    own = () if isinstance(model, FlorenceModel) else (model.base_model_prefix,)
    foreign = tuple(part for part in DUAL_ENCODER_PARTS if own and not part.startswith(own))
    complaints = {
        "missing": [name for name in info["missing_keys"] if not name.startswith(new)],
        "unexpected": [name for name in info["unexpected_keys"] if not name.startswith(foreign)],
        "stored twice": [name for name, count in Counter(name for name, _ in stored).items() if count > 1],
        "of another dtype": [f"{name} ({dtype})" for name, dtype in stored if dtype not in allowed],
        "of another shape": [
            f"{name} (expected {tuple(expected)}, got {tuple(got)})" for name, got, expected in info["mismatched_keys"]
        ],
        "not finite": [  # quantised weights, of classes of their own, are integers
            name
            for name, tensor in model.state_dict().items()
            if type(tensor) is torch.Tensor and not torch.isfinite(tensor).all()
        ],
    }
    found = [f"{kind}: {', '.join(sorted(names))}" for kind, names in complaints.items() if names]
    if found:
        raise ValueError(
            f"expected a whole checkpoint of {model_class.__name__}, got {folder} with weights " + "; ".join(found)
        )
    return model


def bundled_checkpoint(name: str = "florence-nano") -> str:
    """The folder of a checkpoint that comes with this package, for `from_pretrained` and `pipeline(model=...)`.

    Raises:
        ValueError: no checkpoint of this name; the message lists those there are.

    Example:
        >>> from transformers import AutoProcessor
        >>> processor = AutoProcessor.from_pretrained(bundled_checkpoint("florence-nano"))
    """
    names = sorted(folder.name for folder in BUNDLED.iterdir() if folder.is_dir()) if BUNDLED.is_dir() else []
    if name not in names:
        listed = ", ".join(names) or "there is none"
        raise ValueError(f"expected the name of a bundled checkpoint ({listed}), got {name!r}")
    return str(BUNDLED / name)


def load_bundled(name: str = "florence-nano", **kwargs: Any) -> tuple[FlorenceModel, Any]:
    """The model, in evaluation mode, and the processor of a checkpoint that comes with this package.

    Args:
        name: see `bundled_checkpoint`.
        kwargs: what `FlorenceModel.from_pretrained` takes.

    Raises:
        ValueError: no checkpoint of this name, or a damaged one.

    Example:
        >>> model, processor = load_bundled("florence-nano")
    """
    folder = bundled_checkpoint(name)
    return load_checkpoint(FlorenceModel, folder, **kwargs), AutoProcessor.from_pretrained(folder)


__all__ = ["bundled_checkpoint", "load_bundled", "load_checkpoint"]
