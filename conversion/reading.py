"""Weight files of strangers, read as data: no code in them runs, and what is wrong with them is one type of error."""

import json
import re
import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from transformers_florence.loading import weight_files

Tensors = dict[str, torch.Tensor]

PICKLE_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")
CONTAINERS = ("model", "state_dict")  # under these, training scripts keep the weights beside the optimizer's state
# UniCL's training writes its yacs configuration into the checkpoint. torch's reader knows no such class, and gets a
# plain dictionary for its name: nothing of yacs is imported, nothing but data can come out.
PLAIN_DICTIONARIES = [(OrderedDict, "yacs.config.CfgNode")]


def _reason(error: Exception) -> str:
    """What a parser complains of, without torch's advice on how to load the file unsafely."""
    called = re.search(r"GLOBAL (\S+)", str(error))
    if called:
        return f"it would call {called[1]}"
    lines = (line.strip() for line in str(error).splitlines() if line.strip() and "weights_only" not in line)
    return f"{type(error).__name__}: {next(lines, 'no reason given')}"


def _plain(value: Any) -> Any:
    """Dictionaries of any kind as `dict`: a hostile file can plant attributes such as `items` on the others."""
    return {name: _plain(item) for name, item in dict.items(value)} if isinstance(value, dict) else value


def read_content(path: str | Path) -> dict[str, Any]:
    """The dictionary in a .safetensors, .pth, .pt or .bin file, tensors on the CPU.

    The suffix alone decides which reader is used; none of them runs code, and none steps in for another.

    Raises:
        ValueError: no such file, another suffix, truncated, renamed, corrupt, holding anything but tensors and plain
            data, or no dictionary. The message names the file.
    """
    path = Path(path)
    if path.suffix not in (".safetensors", *PICKLE_SUFFIXES):
        raise ValueError(f"expected a file ending in .safetensors, {', '.join(PICKLE_SUFFIXES)}, got {path}")
    if not path.is_file():
        raise ValueError(f"expected a file of weights, got {path}: no such file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(PLAIN_DICTIONARIES), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is refused anyway
            content = _plain(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # what a parser raises on a hostile file is not a closed set; here it is one type
        raise ValueError(
            f"expected weights and plain data in {path}, got a file that is truncated, renamed, corrupt or holds "
            f"something else ({_reason(error)})"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"expected a dictionary of tensors in {path}, got {type(content).__name__}")
    return content


def _is_whole(tensor: Any) -> bool:
    """A dense tensor of which the file really holds every number (an expanded one could claim terabytes)."""
    return (
        isinstance(tensor, torch.Tensor)
        and tensor.layout == torch.strided
        and not tensor.is_quantized
        and tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.element_size()
    )


def weights_in(content: dict[str, Any], origin: str | Path) -> tuple[Tensors, dict[str, Any]]:
    """The tensors of a file's content, and what lies beside them (optimizer, epoch, configuration, ...).

    Both may be the content itself or lie under one of `CONTAINERS`. A `module.` before every key, which distributed
    training leaves, is taken off.

    Raises:
        ValueError: nothing there, or entries that are no whole tensors, all of them listed.
    """
    container = next((name for name in CONTAINERS if isinstance(content.get(name), dict)), None)
    weights = content if container is None else content[container]
    beside = {} if container is None else {name: value for name, value in content.items() if name != container}
    bad = [str(name) for name, tensor in weights.items() if not isinstance(name, str) or not _is_whole(tensor)]
    if bad or not weights:
        raise ValueError(f"expected whole, dense tensors by name in {origin}, got {', '.join(bad) or 'nothing'}")
    if all(name.startswith("module.") for name in weights):
        weights = {name.removeprefix("module."): tensor for name, tensor in weights.items()}
    return dict(weights), beside


def read_weights(source: str | Path) -> tuple[Tensors, dict[str, Any]]:
    """`weights_in` a file, or the tensors of a folder that `save_pretrained` wrote, sharded or not.

    Raises:
        ValueError: see `read_content`, `weights_in` and `transformers_florence.loading.weight_files`.
    """
    if not Path(source).is_dir():
        return weights_in(read_content(source), source)
    tensors: Tensors = {}
    for file in weight_files(Path(source)):
        tensors |= read_content(file)
    return weights_in(tensors, source)


def config_beside(source: str | Path) -> dict[str, Any]:
    """`config.json` of a folder, or beside a file; empty if there is none.

    Raises:
        ValueError: it is no JSON object.
    """
    file = (Path(source) if Path(source).is_dir() else Path(source).parent) / "config.json"
    if not file.is_file():
        return {}
    try:
        fields = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"expected a JSON object in {file}, got something else: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"expected a JSON object in {file}, got {type(fields).__name__}")
    return fields
