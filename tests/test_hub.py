"""The Hub at a loopback address, spoken to by `huggingface_hub` itself: push, load, remote code, offline mode."""

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from torch.testing import assert_close

from tests.hub_client import DUAL, HEADS, MODEL_DOORS, RESULT
from tests.hub_server import TOKEN, Hub
from tests.tiny_florence import TEXTS
from transformers_florence import verify_checkpoint
from transformers_florence.integrity import is_covered

ROOT = Path(__file__).parents[1]
WITH_CODE = [f"{name}-with-code" for name in ("dual", *HEADS)]

STRANGER = """
import sys

sys.modules["transformers_florence"] = None  # even where it is installed, importing it fails

import torch
import transformers
from safetensors.torch import load_file, save_file

folder, result, *doors = sys.argv[1:]
ids = transformers.AutoProcessor.from_pretrained("me/dual-with-code", trust_remote_code=True)(
    text=open(f"{folder}/texts").read().splitlines(), return_tensors="pt"
)
computed = {}
for line in doors:
    key, door, name = line.split()
    model = getattr(transformers, door).from_pretrained(f"me/{name}-with-code", trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    given = load_file(f"{folder}/{name}.given")
    if name == "dual":
        assert all(torch.equal(given[key], ids[key]) for key in ids)
    with torch.no_grad():
        first = model(**given)[0]
    computed[key] = (first[-1] if isinstance(first, tuple) else first).contiguous()
save_file(computed, result)
"""


def run_python(hub: Hub, home: Path, *command: str, token: str = "", offline: bool = False) -> None:
    """In a process that knows no other Hub."""
    environment = {
        **{name: value for name, value in os.environ.items() if name not in ("HF_TOKEN", "HF_HUB_CACHE")},
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": str(int(offline)),
        "HF_HUB_DISABLE_XET": "1",  # weights take the LFS door instead, which is open HTTP
        "NO_PROXY": "127.0.0.1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")])),
    }
    if token:
        environment["HF_TOKEN"] = token
    child = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert child.returncode == 0, child.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def hub(folder) -> Iterator[Hub]:
    """A Hub to which everything was pushed; what it should hold lies in `folder`."""
    with Hub() as server:
        run_python(server, folder / "pusher", "-m", "tests.hub_client", "push", str(folder))
        yield server


@pytest.fixture(scope="module")
def home(hub, folder) -> Path:
    """The cache of someone who loaded everything."""
    run_python(hub, folder / "loader", "-m", "tests.hub_client", "load", str(folder), token=TOKEN)
    return folder / "loader"


@pytest.mark.parametrize("name", [*DUAL, *HEADS, *WITH_CODE])
def test_what_was_pushed_is_in_the_manifest(hub, name, tmp_path):
    """After each push: what it brought and what others had, but nothing that was overwritten or never pushed."""
    commits = hub.repositories[f"me/{name}"].commits
    for number, files in enumerate(commits.values()):
        folder = tmp_path / str(number)
        folder.mkdir()
        for file, content in files.items():
            (folder / file).write_bytes(content)
        if number:  # the first one is the empty repository
            expected = {file: hashlib.sha256(content) for file, content in files.items() if is_covered(file)}
            assert verify_checkpoint(folder) == {file: digest.hexdigest() for file, digest in expected.items()}
    parts = {"tokenizer.json", "processor_config.json"} if name in (*DUAL, "dual-with-code") else set()
    assert {"config.json", *parts} <= set(expected) and len(commits) > (2 if name in DUAL[:3] else 1)
    assert len(list(folder.glob("*.safetensors"))) == (5 if name == "in-shards" else 1)
    assert (folder / "configuration_florence.py").exists() == (name in WITH_CODE)


def test_a_push_to_a_new_branch_leaves_the_others(hub):
    branches = hub.repositories["me/processor-first"].branches
    assert sorted(branches) == ["main", "next"] and branches["main"] != branches["next"]


def test_weights_are_uploaded_once(hub):
    """The same weights are in seven repositories; only their digest travels again."""
    uploads = [request for request in hub.requests if request.startswith("PUT /lfs/")]
    assert len(uploads) == len(set(uploads)) == len(hub.large) == 5 + 1 + 1 + len(HEADS)


def test_cards_outlive_the_push_of_a_model(hub):
    card = ModelCard(hub.repositories["me/processor-first"].files["README.md"].decode()).data
    assert card.pipeline_tag == "zero-shot-image-classification" and card.library_name == "transformers"
    assert card.eval_results == [RESULT] and card.tags == ["florence", "tiny"]
    assert ModelCard(hub.repositories["me/vision"].files["README.md"].decode()).data.library_name == "transformers"


def test_everything_loads_by_name_into_an_empty_cache(home):
    assert {path.name for path in (home / "hub").glob("models--*")} == {
        f"models--me--{name}" for name in (*DUAL, *HEADS)
    }


def test_offline_everything_loads_without_a_request(hub, home, folder):
    """From the cache, and from a folder; the child process counts its connections as well."""
    before = len(hub.requests)
    run_python(hub, home, "-m", "tests.hub_client", "load", str(folder), offline=True)
    assert len(hub.requests) == before


def test_code_from_the_hub_needs_no_package(hub, folder):
    """Each head through its door; the dual encoder through two."""
    expected = load_file(folder / "computed")
    (folder / "texts").write_text("\n".join(TEXTS), "utf-8")
    doors = [f"{name} {MODEL_DOORS[head]} {name}" for name, head in HEADS.items()]
    doors += ["dual AutoModel dual", "zero-shot AutoModelForZeroShotImageClassification dual"]
    run_python(hub, folder / "stranger", "-c", STRANGER, str(folder), str(folder / "result"), *doors)
    found = load_file(folder / "result")
    assert_close(found, {**expected, "zero-shot": expected["dual"]}, rtol=1e-6, atol=1e-6)
