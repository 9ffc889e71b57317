"""The notebooks: sound files without outputs, and, slowly, what a fresh kernel finds when it runs them."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch
from IPython.core.inputtransformer2 import TransformerManager
from nbclient import NotebookClient
from PIL import Image
from transformers import CLIPProcessor, pipeline

from tests.test_layering import path_complaints
from tests.tiny_clip import tiny_clip, tiny_clip_image_processor
from tests.tiny_sets import write_color_set
from transformers_florence import FlorenceModel, bundled_checkpoint, load_bundled

ROOT = Path(__file__).parents[1]
NOTEBOOKS = ROOT / "examples" / "notebooks"
GALLERY = ROOT / "examples" / "gallery"
LARGEST = 200_000  # bytes of a notebook


def read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOKS / name, as_version=nbformat.NO_CONVERT)


@pytest.mark.parametrize("name", sorted(path.name for path in NOTEBOOKS.glob("*.ipynb")))
def test_a_notebook_is_sound(name):
    notebook = read(name)
    nbformat.validate(notebook)
    assert (NOTEBOOKS / name).stat().st_size < LARGEST
    assert path_complaints((NOTEBOOKS / name).read_text("utf-8"), name) == []
    assert "PICTURES = None" in notebook.cells[1].source
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert not cell.outputs and cell.execution_count is None, "saved without outputs: they would grow old"
            compile(TransformerManager().transform_cell(cell.source), name, "exec")


def run(name: str, report: str, **settings: Any) -> dict[str, Any]:
    """Run a notebook in a fresh kernel.

    Args:
        report: an expression of what the notebook leaves, a dictionary that JSON can hold.
        settings: variables of the notebook's first cell.

    Returns:
        The report, and how many `pictures` the notebook has shown.
    """
    notebook = read(name)
    first = notebook.cells[1]
    for variable, value in settings.items():
        first.source, count = re.subn(rf"^{variable} = .*", f"{variable} = {value!r}", first.source, flags=re.M)
        assert count == 1, f"{name} has no setting {variable}"
    notebook.cells.append(nbformat.v4.new_code_cell(f"import json\n\nprint(json.dumps({report}))"))
    where = {"metadata": {"path": str(NOTEBOOKS)}}  # as Jupyter does
    client = NotebookClient(notebook, timeout=1200, startup_timeout=300, kernel_name="python3", resources=where)
    client.execute()
    shown = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    (said,) = notebook.cells[-1].outputs
    return {**json.loads(said["text"]), "pictures": sum("image/png" in output.get("data", {}) for output in shown)}


@pytest.fixture(scope="module", autouse=True)
def jupyter_folders(tmp_path_factory):
    """A reader's own kernels and settings neither help nor hinder."""
    folder = tmp_path_factory.mktemp("jupyter")
    names = ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR")
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setenv(name, str(folder / name.lower()))
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")])))
        yield


@pytest.fixture(scope="module")
def own_folder(tmp_path_factory) -> Path:
    """Somebody's pictures, `<split>/<class>/`, three plain colours; with two files that are no pictures."""
    source = write_color_set(tmp_path_factory.mktemp("colors"), train=16)
    folder = tmp_path_factory.mktemp("own")
    for line in (source / "metadata.jsonl").read_text().splitlines():
        row = json.loads(line)
        target = folder / {"train": "train", "test": "valid"}[row["split"]] / row["label"].replace(" ", "_")
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / row["file_name"], target)
    for place in ("train", "valid"):
        (folder / place / "house" / "a.jpg").write_bytes(b"no picture")  # the first of its class
    return folder


def gallery_keywords() -> dict[str, set[str]]:
    """File name -> keywords."""
    rows = map(json.loads, (GALLERY / "metadata.jsonl").read_text("utf-8").splitlines())
    return {Path(row["file_name"]).name: {word.lower() for word in row["keywords"]} for row in rows}


@pytest.mark.slow
def test_the_gallery_is_sorted_and_searched():
    report = '{"labels": LABELS, "files": [file.name for file in files], "answers": answers.tolist(), "found": '
    told = run("zero_shot_and_search.ipynb", report + "{q: [file.name for file in found[q]] for q in found}}")
    keywords, right = gallery_keywords(), []
    assert len(told["files"]) == 500
    for name, answer in zip(told["files"], told["answers"], strict=True):
        named = keywords[name] & set(told["labels"])
        if len(named) == 1:
            right.append(told["labels"][answer] in named)
    assert len(right) > 100 and sum(right) / len(right) > 0.6  # chance: 1/7
    model, processor = load_bundled("florence-nano")
    images = [Image.open(GALLERY / "gallery" / name) for name in told["files"]]
    with torch.no_grad():
        outputs = model(**processor(text=list(told["found"]), images=images, return_tensors="pt", padding=True))
    for names, similarity in zip(told["found"].values(), outputs.logits_per_text, strict=True):
        assert names == [told["files"][row] for row in similarity.topk(8).indices.tolist()]
    assert sum("bird" in keywords[name] for name in told["found"]["a bird"]) >= 2  # of the four that there are
    assert told["pictures"] >= 10


@pytest.mark.slow
def test_a_folder_of_ones_own_with_clip(own_folder, tmp_path):
    model, tokenizer = tiny_clip()
    model.save_pretrained(tmp_path)
    CLIPProcessor(tiny_clip_image_processor(), tokenizer).save_pretrained(tmp_path)
    settings = {"PICTURES": str(own_folder), "MODEL": str(tmp_path), "LABELS": ["house", "street"]}
    report = '{"files": len(files), "unreadable": len(readable) - len(files), "answers": answers.tolist()}'
    told = run("zero_shot_and_search.ipynb", report, **settings)
    assert (told["files"], told["unreadable"]) == (63, 2) and set(told["answers"]) <= {0, 1}


def pipeline_accuracy(model: Path, folder: Path) -> float:
    """Of the stock pipeline, on `<folder>/<class>/`, with one template."""
    names = sorted(path.name for path in folder.iterdir())
    classify = pipeline("zero-shot-image-classification", model=str(model))
    right = []
    for file in sorted(folder.rglob("*.png")):
        best = classify(str(file), candidate_labels=[name.replace("_", " ") for name in names])[0]["label"]
        right.append(best == file.parent.name.replace("_", " "))
    return sum(right) / len(right)


@pytest.mark.slow
def test_adapters_are_trained_and_merged(tmp_path):
    report = '{"metrics": dict(result.metrics), "held_out": len(held_out)}'
    told = run("lora_fine_tuning.ipynb", report, OUTPUT=str(tmp_path))
    metrics, best, held_out = told["metrics"], tmp_path / "run" / "best", tmp_path / "pictures" / "valid"
    assert told["held_out"] == len(list(held_out.rglob("*.png"))) > 40
    assert metrics["accuracy"] > max(0.85, metrics["accuracy_before"])
    before, after = pipeline_accuracy(Path(bundled_checkpoint()), held_out), pipeline_accuracy(best, held_out)
    assert after > max(0.8, before)
    assert FlorenceModel.from_pretrained(best).num_parameters() == load_bundled("florence-nano")[0].num_parameters()
    assert told["pictures"] == 4


@pytest.mark.slow
def test_adapters_on_a_folder_of_ones_own(own_folder, tmp_path):
    told = run(
        "lora_fine_tuning.ipynb", '{"metrics": dict(result.metrics)}', PICTURES=str(own_folder), OUTPUT=str(tmp_path)
    )
    assert told["metrics"]["accuracy"] == 1.0 == pipeline_accuracy(tmp_path / "run" / "best", own_folder / "valid")


PROBE = '{"names": names_alone, "probe": probed, "curves": curves, "classes": len(names)}'


@pytest.mark.slow
def test_pictures_are_worth_more_than_names_alone():
    told = run("probe_and_few_shot.ipynb", PROBE)
    from_zeros, from_names = (told["curves"][f"head from {start}"] for start in ("zeros", "class names"))
    assert told["probe"] > max(0.75, told["names"]) and told["classes"] == 5
    assert list(from_zeros) == list(from_names) == ["1", "2", "4", "8"]  # the smallest class has eight pictures
    assert from_zeros["8"] > from_zeros["1"] + 0.1 and from_names["1"] > from_zeros["1"]
    assert told["pictures"] == 3


@pytest.mark.slow
def test_pictures_of_ones_own_are_told_apart(own_folder):
    told = run("probe_and_few_shot.ipynb", PROBE, PICTURES=str(own_folder))
    assert told["probe"] == 1.0 and told["classes"] == 3
    for curve in told["curves"].values():
        assert list(curve) == ["1", "2", "4", "8", "16"] and curve["16"] > 0.9  # all pictures of each class
