"""Every save leaves a manifest that is right; every changed bit, cut file and stray weight is found against it."""

import hashlib
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoProcessor

from tests.tiny_florence import (
    save_tiny,
    tiny_image_processor,
    tiny_model,
    tiny_processor,
    tiny_text_config,
    tiny_tokenizer,
    tiny_vision_config,
)
from transformers_florence import (
    FlorenceBackbone,
    FlorenceForImageClassification,
    FlorenceImageProcessorPil,
    FlorenceModel,
    FlorenceTextModel,
    FlorenceVisionModel,
    integrity,
    load_checkpoint,
    verify_checkpoint,
    write_manifest,
)
from transformers_florence.integrity import MANIFEST

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
MODEL = {"config.json", WEIGHTS}
TEXT = {"tokenizer.json", "tokenizer_config.json"}
PICTURES = {"preprocessor_config.json"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    save_tiny(folder)
    return folder


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def digests(folder: Path) -> dict[str, str]:
    """Of all files but the manifest, by the plainest means."""
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir() if file.name != MANIFEST
    }


@pytest.mark.parametrize(
    ("parts", "names"),
    [
        ([tiny_model, tiny_processor], MODEL | TEXT | {"processor_config.json"}),
        ([tiny_processor, tiny_model], MODEL | TEXT | {"processor_config.json"}),
        ([lambda: FlorenceTextModel(tiny_text_config()), tiny_tokenizer], MODEL | TEXT),
        ([lambda: FlorenceVisionModel(tiny_vision_config()), tiny_image_processor], MODEL | PICTURES),
        ([FlorenceImageProcessorPil, lambda: FlorenceBackbone(tiny_vision_config())], MODEL | PICTURES),
        ([lambda: FlorenceForImageClassification(tiny_vision_config())], MODEL),
        ([tiny_processor], TEXT | {"processor_config.json"}),
    ],
)
def test_a_save_leaves_the_digests_of_all_files(parts, names, tmp_path):
    for part in parts:
        part().save_pretrained(tmp_path)
    assert verify_checkpoint(tmp_path) == digests(tmp_path)
    assert set(digests(tmp_path)) == names
    lines = (tmp_path / MANIFEST).read_text("utf-8").splitlines()
    assert lines == [f"{digest}  {name}" for name, digest in sorted(digests(tmp_path).items())]


def test_the_manifest_follows_what_is_saved_over_and_removed(copy):
    before = verify_checkpoint(copy)
    model = tiny_model()
    model.logit_scale.data += 1
    model.save_pretrained(copy)
    changed = verify_checkpoint(copy)
    assert {name for name in changed if changed[name] != before[name]} == {WEIGHTS}

    (copy / WEIGHTS).unlink()
    model.save_pretrained(copy, max_shard_size="20KB")
    shards = {file.name for file in copy.glob("model-*.safetensors")}
    assert verify_checkpoint(copy) == digests(copy) and len(shards) > 3 and {INDEX, *shards} <= set(digests(copy))
    model.save_pretrained(copy, max_shard_size="60KB")
    fewer = {file.name for file in copy.glob("model-*.safetensors")}
    assert verify_checkpoint(copy) == digests(copy) and 1 < len(fewer) < len(shards)

    (copy / "tokenizer.json").unlink()
    tiny_image_processor().save_pretrained(copy)
    assert verify_checkpoint(copy) == digests(copy) and "tokenizer.json" not in digests(copy)


def test_one_process_writes_once(copy, tmp_path, monkeypatch):
    written = []
    store = integrity.store_manifest
    monkeypatch.setattr(integrity, "store_manifest", lambda *arguments: written.append(store(*arguments)))
    tiny_processor().save_pretrained(copy)  # saves its tokenizer, too
    assert len(written) == 1
    tiny_model().save_pretrained(tmp_path / "other", is_main_process=False)
    assert len(written) == 1 and not (tmp_path / "other" / MANIFEST).exists()


def flip(file: Path, bit: int) -> None:
    with file.open("r+b") as stream:
        stream.seek(bit // 8)
        byte = stream.read(1)[0]
        stream.seek(bit // 8)
        stream.write(bytes([byte ^ (1 << bit % 8)]))


def test_a_thousand_flipped_bits_are_found(copy):
    chance = random.Random(0)
    files = sorted(copy.iterdir())
    assert MANIFEST in [file.name for file in files] and len(files) == 6
    for _ in range(1000):
        file = chance.choice(files)
        bit = chance.randrange(8 * file.stat().st_size)
        flip(file, bit)
        with pytest.raises(ValueError) as caught:
            verify_checkpoint(copy)
        flip(file, bit)
        assert file.name in str(caught.value), (file.name, bit)
    verify_checkpoint(copy)


def test_a_file_cut_anywhere_is_named(copy):
    content = (copy / WEIGHTS).read_bytes()
    size, header = len(content), 8 + int.from_bytes(content[:8], "little")
    cuts = [0, 1, 7, 8, 9, header // 2, header - 1, header, header + 1, (header + size) // 2, size - 4, size - 1]
    assert len(set(cuts)) == 12
    listed = (copy / MANIFEST).read_bytes()
    for cut in cuts:
        (copy / WEIGHTS).write_bytes(content[:cut])
        (copy / MANIFEST).write_bytes(listed)
        with pytest.raises(ValueError, match=f"changed: {WEIGHTS} "):
            verify_checkpoint(copy)
        with pytest.raises(ValueError, match=f"changed: {WEIGHTS} "):
            load_checkpoint(FlorenceModel, copy)
        (copy / MANIFEST).unlink()  # without it, the file's own table of contents tells
        with pytest.raises(ValueError, match=f"{WEIGHTS}, which is truncated"):
            load_checkpoint(FlorenceModel, copy)


@pytest.mark.parametrize("name", ["config.json", "processor_config.json", *sorted(TEXT), MANIFEST])
@pytest.mark.parametrize("keep", [0.0, 0.5, 0.999])
def test_other_files_are_found_cut(copy, name, keep):
    file = copy / name
    file.write_bytes(file.read_bytes()[: int(keep * file.stat().st_size)])
    with pytest.raises(ValueError, match=name):
        verify_checkpoint(copy)


def test_all_that_is_wrong_is_listed(copy):
    for name in ("config.json", WEIGHTS):
        with (copy / name).open("ab") as stream:
            stream.write(b" ")
    for name in TEXT:
        (copy / name).unlink()
    for name in ("modeling_new.py", INDEX, "generation_config.json", "pytorch_model.bin", "README.md"):
        (copy / name).write_bytes(b"{}")
    with pytest.raises(ValueError) as caught:
        verify_checkpoint(copy)
    assert str(caught.value).split(", got ")[1].split(" (if")[0] == (
        f"changed: config.json, {WEIGHTS}; missing: tokenizer.json, tokenizer_config.json; "
        f"not in {MANIFEST}: generation_config.json, {INDEX}, modeling_new.py, pytorch_model.bin"
    )
    with pytest.raises(ValueError, match="changed: config.json"):
        load_checkpoint(FlorenceModel, copy)
    write_manifest(copy)
    assert set(verify_checkpoint(copy)) == set(digests(copy)) - {"README.md"}


def test_what_is_no_part_of_the_checkpoint_may_lie_beside_it(copy):
    listed = verify_checkpoint(copy)
    shutil.copytree(copy, copy / "checkpoint-100")  # as a trainer leaves it
    (copy / "checkpoint-100" / WEIGHTS).write_bytes(b"")
    (copy / ".git").mkdir()
    (copy / "old.safetensors").mkdir()
    for name in ("README.md", ".gitattributes", "trainer_state.json", "training_args.bin", "optimizer.pt", "cat.png"):
        (copy / name).write_bytes(b"anything")
    assert verify_checkpoint(copy) == listed
    tiny_tokenizer().save_pretrained(copy)
    assert set(verify_checkpoint(copy)) == set(listed)


DIGEST = "0" * 64


@pytest.mark.parametrize(
    "content",
    [
        None,
        b"",
        b"\xff",
        b"<html>404</html>\n",
        f"{DIGEST}  config.json".encode(),  # cut by one byte
        f"{DIGEST}  config.json\r\n".encode(),
        f"{DIGEST}  ../config.json\n".encode(),
        f"{DIGEST[1:]}  config.json\n".encode(),
        f"{DIGEST}  config.json\n{DIGEST}  config.json\n".encode(),
        f"{DIGEST}  model.safetensors\n{DIGEST}  config.json\n".encode(),
        f"{DIGEST}  config.json\n\n".encode(),
    ],
)
def test_a_bad_manifest_is_refused(copy, content):
    (copy / MANIFEST).unlink()
    if content is not None:
        (copy / MANIFEST).write_bytes(content)
    with pytest.raises(ValueError, match=f"expected a manifest, got .*{MANIFEST}"):
        verify_checkpoint(copy)


@pytest.mark.parametrize("function", [verify_checkpoint, write_manifest])
def test_a_folder_that_is_no_checkpoint(function, tmp_path):
    (tmp_path / "README.md").touch()
    for folder in (tmp_path, tmp_path / "nowhere", tmp_path / "README.md"):
        with pytest.raises(ValueError, match=f"got .?{folder}"):
            function(folder)
    assert not (tmp_path / MANIFEST).exists()


def test_an_interrupted_manifest_leaves_the_old_one(copy, monkeypatch):
    before, files = (copy / MANIFEST).read_bytes(), sorted(os.listdir(copy))
    (copy / "merges.txt").write_text("#version: 0.2\n")

    def fail(*arguments):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space left"):
        write_manifest(copy)
    assert (copy / MANIFEST).read_bytes() == before and sorted(os.listdir(copy)) == sorted([*files, "merges.txt"])


def test_an_interrupted_save_is_found(copy, monkeypatch):
    """The new configuration is there, the new weights are not: a manifest that followed would hide it."""

    def fail(*arguments, **options):
        raise OSError("no space left")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", fail)
    model = FlorenceForImageClassification(tiny_vision_config())
    with pytest.raises(OSError, match="no space left"):
        model.save_pretrained(copy)
    with pytest.raises(ValueError, match="changed: config.json"):
        load_checkpoint(FlorenceModel, copy)


def test_saving_takes_and_returns_what_transformers_does(tmp_path):
    (file,) = tiny_processor().save_pretrained(str(tmp_path))
    assert file == str(tmp_path / "processor_config.json")
    assert AutoProcessor.from_pretrained(tmp_path)(text="a cat")["input_ids"]
    tiny_tokenizer().save_pretrained(tmp_path / "prefixed", filename_prefix="own")
    assert (tmp_path / "prefixed").is_dir()
    model = tiny_model()
    model.save_pretrained(tmp_path, variant="half", state_dict=dict(model.half().state_dict()))
    assert "model.half.safetensors" in verify_checkpoint(tmp_path)
    loaded = FlorenceModel.from_pretrained(tmp_path, variant="half")
    assert torch.equal(loaded.visual_projection.weight.half(), model.visual_projection.weight)
