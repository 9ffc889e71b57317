"""Weight files of strangers: whatever is in them, data comes out or one type of error, and nothing runs."""

import json
import os
import pathlib
import pickle
import sys
import types
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from conversion import convert_clip_text, convert_swin, convert_unicl
from conversion.reading import config_beside, read_content, read_weights, weights_in
from tests.conversion.sources import write
from transformers_florence import FlorenceVisionConfig, FlorenceVisionModel

TENSORS = {"a.weight": torch.arange(600.0).view(20, 30), "b": torch.ones(7)}


class Payload:
    """Unpickling it calls a function."""

    def __init__(self, function: Callable, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple:
        return self.call


class State:
    """Unpickling it calls a method with what it was saved with."""

    def __setstate__(self, state: dict) -> None:
        Path(state["canary"]).touch()


def state_of(canary: Path) -> State:
    state = State()
    state.canary = str(canary)
    return state


HOSTILE: dict[str, Callable[[Path], Any]] = {
    "as a weight": lambda canary: {**TENSORS, "c": Payload(open, str(canary), "w")},
    "as the whole file": lambda canary: Payload(os.system, f"touch {canary}"),
    "beside the weights": lambda canary: {"model": TENSORS, "config": Payload(pathlib.Path.touch, canary)},
    "evaluated": lambda canary: {"model": TENSORS, "epoch": Payload(eval, f"open({str(canary)!r}, 'w').close() or 1")},
    "as a state": lambda canary: {"model": TENSORS, "lr_scheduler": state_of(canary)},
    "as a key": lambda canary: {"state_dict": {Payload(open, str(canary), "w"): torch.ones(1)}},
}
FORMATS: dict[str, Callable[[Any, Path], Any]] = {
    "torch.pth": torch.save,
    "legacy.bin": lambda content, path: torch.save(content, path, _use_new_zipfile_serialization=False),
    "pickle.pt": lambda content, path: path.write_bytes(pickle.dumps(content)),
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("payload", HOSTILE)
def test_a_payload_never_runs(payload: str, name: str, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # for callers who do not say what they want
    file, canary = tmp_path / name, tmp_path / "canary"
    FORMATS[name](HOSTILE[payload](canary), file)
    # The payload is a real one: what loads it unsafely runs it.
    loaded = pickle.loads(file.read_bytes()) if name == "pickle.pt" else torch.load(file, weights_only=False)
    assert canary.exists()
    del loaded
    canary.unlink()

    renamed = tmp_path / "renamed.safetensors"
    renamed.write_bytes(file.read_bytes())
    for source in (file, renamed):
        arguments = [str(source), str(tmp_path / "out")]
        for read in (
            lambda source=source: read_content(source),
            lambda arguments=arguments: convert_unicl.main([*arguments, "--tokenizer", "folder"]),
            lambda source=source: convert_unicl.main(["--verify", str(source)]),
            lambda arguments=arguments: convert_swin.main(arguments),
            lambda arguments=arguments: convert_clip_text.main(arguments),
        ):
            with pytest.raises(ValueError, match=f"expected weights and plain data in .*{source.name}"):
                read()
    assert not canary.exists()
    assert not (tmp_path / "out").exists()


def test_a_refusal_gives_no_advice_to_load_unsafely(tmp_path: Path):
    file = write(tmp_path / "a.pth", {"a": Payload(os.system, "true")})
    with pytest.raises(ValueError, match=r"it would call \w+\.system") as caught:
        read_content(file)
    file.write_bytes(b"\x80\x02I1\n.")
    with pytest.raises(ValueError, match="a.pth, got .*UnpicklingError") as other:
        read_content(file)
    assert "weights_only" not in f"{caught.value} {other.value}"


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".legacy.bin"])
def test_a_truncated_file_is_one_error(suffix: str, tmp_path: Path):
    file = tmp_path / f"cut{suffix}"
    if "legacy" in suffix:
        torch.save(TENSORS, file, _use_new_zipfile_serialization=False)
    else:
        write(file, TENSORS)
    assert_close(read_content(file), TENSORS)
    content = file.read_bytes()
    for cut in (*(len(content) * part // 11 for part in range(11)), len(content) - 1):
        file.write_bytes(content[:cut])
        with pytest.raises(ValueError, match=rf"expected .*cut{suffix}"):
            read_content(file)


@pytest.mark.parametrize(("old", "new"), [("a.pth", "b.safetensors"), ("a.safetensors", "b.pth"), ("a.pth", "b.onnx")])
def test_a_renamed_file_is_refused(old: str, new: str, tmp_path: Path):
    file = write(tmp_path / old, TENSORS).rename(tmp_path / new)
    with pytest.raises(ValueError, match=f"expected .*{new}"):
        read_content(file)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace")
def test_what_is_no_checkpoint_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="gone.pth: no such file"):
        read_content(tmp_path / "gone.pth")
    (tmp_path / "folder.pth").mkdir()
    with pytest.raises(ValueError, match="expected a file of weights, got .*folder.pth"):
        read_content(tmp_path / "folder.pth")
    with pytest.raises(ValueError, match="expected model.safetensors or .* got neither"):
        read_weights(tmp_path / "folder.pth")
    with pytest.raises(ValueError, match="expected a dictionary of tensors in .*list.pth, got list"):
        read_content(write(tmp_path / "list.pth", [torch.ones(1)]))
    # TorchScript, as which OpenAI's CLIP was first published, is code.
    torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)).save(tmp_path / "script.pt")
    with pytest.raises(ValueError, match="script.pt"):
        read_content(tmp_path / "script.pt")


@pytest.mark.parametrize(
    "entry",
    [1.0, torch.ones(3).to_sparse(), torch.ones(1).expand(10**12)],
    ids=["a number", "sparse", "expanded"],
)
def test_every_entry_is_a_whole_tensor(entry: Any):
    content = {**TENSORS, "first": entry, "second": entry}
    with pytest.raises(ValueError, match="expected whole, dense tensors by name in here, got first, second"):
        weights_in(content, "here")


def test_a_file_without_weights_is_refused():
    for content in ({}, {"model": {}}):
        with pytest.raises(ValueError, match="in here, got nothing"):
            weights_in(content, "here")


@pytest.mark.parametrize(
    ("container", "suffix"),
    [(None, ".safetensors"), (None, ".pth"), (None, ".bin"), ("model", ".pth"), ("state_dict", ".pt")],
)
def test_every_container_and_format_gives_the_same_tensors(container: str | None, suffix: str, tmp_path: Path):
    content: dict[str, Any] = {"module." + name: tensor for name, tensor in TENSORS.items()}
    beside = {"epoch": 3, "optimizer": {"state": {0: torch.ones(2)}}}
    if container is not None:
        content = {**beside, container: OrderedDict(content)}
    tensors, rest = read_weights(write(tmp_path / f"a{suffix}", content))
    assert_close(tensors, TENSORS, rtol=0, atol=0)
    assert (rest == {}) if container is None else (rest["epoch"] == 3)


def test_the_configuration_of_yacs_is_read_as_data(tmp_path: Path, monkeypatch):
    """As UniCL's training wrote it, with yacs installed; it is not installed here."""
    assert "yacs" not in sys.modules

    class CfgNode(dict):
        def __init__(self, values: dict) -> None:
            super().__init__(values)
            self.__dict__.update({"__immutable__": True, "__deprecated_keys__": {"OLD"}, "__renamed_keys__": {}})

    CfgNode.__module__, CfgNode.__qualname__ = "yacs.config", "CfgNode"
    for name in ("yacs", "yacs.config"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["yacs.config"].CfgNode = CfgNode
    config = CfgNode({"MODEL": CfgNode({"NAME": "unicl", "DEPTHS": [2, 2], "BETAS": (0.9, 0.999)}), "SEED": 0})
    file = write(tmp_path / "a.pth", {"model": TENSORS, "config": config})
    monkeypatch.undo()
    assert "yacs" not in sys.modules
    tensors, beside = read_weights(file)
    assert_close(tensors, TENSORS)
    assert beside["config"] == {"MODEL": {"NAME": "unicl", "DEPTHS": [2, 2], "BETAS": (0.9, 0.999)}, "SEED": 0}
    assert type(beside["config"]) is type(beside["config"]["MODEL"]) is dict
    # Beyond the reading of this one file nothing is allowed.
    with pytest.raises(pickle.UnpicklingError, match="yacs.config.CfgNode"):
        torch.load(file, weights_only=True)


class Planted:
    """Unpickled as a dictionary with attributes of the file's choice."""

    def __reduce__(self) -> tuple:
        names = ("items", "keys", "get", "__iter__")
        return OrderedDict, (), dict.fromkeys(names, "not callable"), None, iter(TENSORS.items())


def test_attributes_planted_on_dictionaries_do_nothing(tmp_path: Path):
    file = write(tmp_path / "a.pth", {"state_dict": Planted(), "extra": Counter("ab")})
    with pytest.raises(TypeError, match="not callable"):
        torch.load(file, weights_only=True)["state_dict"].items()
    assert_close(read_weights(file)[0], TENSORS)


def test_a_folder_in_shards_is_read_whole(tmp_path: Path):
    config = FlorenceVisionConfig(embed_dim=8, depths=[1, 1], num_heads=[1, 1], window_size=3)
    model = FlorenceVisionModel(config)
    model.save_pretrained(tmp_path, max_shard_size="4KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    tensors, _ = read_weights(tmp_path)
    assert_close(tensors, dict(model.state_dict()), rtol=0, atol=0)
    assert config_beside(tmp_path) == json.loads((tmp_path / "config.json").read_text())


def test_a_configuration_beside_a_file(tmp_path: Path):
    file = write(tmp_path / "a.pth", TENSORS)
    assert config_beside(file) == {}
    (tmp_path / "config.json").write_text('{"model_type": "swin"}')
    assert config_beside(file) == config_beside(tmp_path) == {"model_type": "swin"}
    for text in ("", "[]", '{"a": ', "\x00"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match="expected a JSON object in .*config.json"):
            config_beside(file)
