"""Adapters to public harnesses: what they hand over is what our own evaluators compute, and the harnesses agree.

The slow tests run the harnesses themselves on pictures of `examples/gallery`, each with the interpreter that
`FLORENCE_CLIP_BENCHMARK_PYTHON`, `FLORENCE_MTEB_PYTHON` or `FLORENCE_DATA_JUICER_PYTHON` names, else with this one.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tarfile
from io import BytesIO
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from sklearn.metrics.pairwise import cosine_similarity
from torch.nn import functional as F
from torch.testing import assert_close

from harnesses import clip_benchmark_model, mteb_model
from tests.tiny_clip import save_peer
from tests.tiny_florence import SIDE, save_tiny, tiny_processor
from transformers_florence import bundled_checkpoint, load_bundled
from transformers_florence.evaluation.classification import accuracy
from transformers_florence.evaluation.embedding import embed_pictures
from transformers_florence.evaluation.retrieval import evaluate_retrieval
from transformers_florence.evaluation.zero_shot import ZeroShotClassifier, build_zero_shot_classifier, embed_texts

ROOT = Path(__file__).parents[1]
ADAPTERS = ROOT / "examples" / "harnesses"
GALLERY = ROOT / "examples" / "gallery"
NAMES = ["cat", "a dog on a mat", "house"]


def checkpoint_of(kind: str, folder: Path):
    """A tiny "florence", "clip" or "siglip" in a folder, and its processor."""
    if kind == "florence":
        return save_tiny(folder), tiny_processor()
    return save_peer(kind, folder)


def some_pictures(count: int = 4) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (40, 36, 3), dtype=np.uint8)) for _ in range(count)]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["florence", "clip", "siglip"])
def test_clip_benchmark_gets_our_own_vectors(kind, tmp_path):
    """Its recipes of classes and pictures with what it is handed, beside ours."""
    model, processor = checkpoint_of(kind, tmp_path / kind)
    judged, transform, tokenizer = clip_benchmark_model.load(
        pretrained=str(tmp_path / kind), device="cpu", model_name="x", cache_dir=None
    )
    assert not judged.eval().training
    for name, wanted in zip(
        NAMES, build_zero_shot_classifier(model, processor.tokenizer, NAMES, ["{}", "a {}."]), strict=True
    ):
        tokens = tokenizer([name, f"a {name}."]).to("cpu")
        mean = F.normalize(judged.encode_text(tokens), dim=-1).mean(dim=0)
        assert_close(mean / mean.norm(), wanted, atol=1e-5, rtol=0)
    pictures = some_pictures()
    found = F.normalize(judged.encode_image(torch.stack([transform(picture) for picture in pictures])), dim=-1)
    assert_close(found, embed_pictures(model, processor.image_processor, pictures)[0], atol=1e-5, rtol=0)


def test_clip_benchmark_learns_of_our_type_before_it_reads_its_command_line(monkeypatch):
    seen = []
    models = SimpleNamespace(TYPE2FUNC={"open_clip": None}, MODEL_TYPES=["open_clip"])
    cli = SimpleNamespace(main=lambda: seen.append((list(models.MODEL_TYPES), models.TYPE2FUNC["florence"])))
    package = ModuleType("clip_benchmark")
    package.models, package.cli = models, cli
    monkeypatch.setitem(sys.modules, "clip_benchmark", package)
    clip_benchmark_model.main()
    assert seen == [(["open_clip", "florence"], clip_benchmark_model.load)]


@pytest.mark.parametrize("kind", ["florence", "clip", "siglip"])
def test_mteb_gets_our_own_vectors(kind, tmp_path):
    model, processor = checkpoint_of(kind, tmp_path / kind)
    encoder = mteb_model.DualEncoder(str(tmp_path / kind), "main", device="cpu")
    task = {"task_metadata": None, "hf_split": "test", "hf_subset": "default", "prompt_type": None, "batch_size": 2}
    pictures = some_pictures(3)
    images = embed_pictures(model, processor.image_processor, pictures)[0]
    texts = embed_texts(model, processor.tokenizer, NAMES)
    batches = [{"text": NAMES[:2], "image": pictures[:2]}, {"text": NAMES[2:], "image": pictures[2:]}]
    for columns, wanted in ((["text"], texts), (["image"], images), (["text", "image"], texts + images)):
        part = [{column: batch[column] for column in columns} for batch in batches]
        found = encoder.encode(part, show_progress_bar=False, **task)
        assert_close(found, wanted, atol=1e-5, rtol=0)
    cosines = cosine_similarity(3 * images, texts)
    assert_close(encoder.similarity(3 * images, texts.numpy()).numpy(), cosines, atol=1e-6, rtol=0)
    assert_close(encoder.similarity_pairwise(3 * images.numpy(), texts).numpy(), cosines.diagonal(), atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="expected batches with text or image, got audio"):
        encoder.encode([{"audio": [1]}])


def test_mteb_knows_a_checkpoint_from_its_former_self(tmp_path):
    """Its results are kept by name and revision: the same files have the same, other weights another one."""
    save_tiny(tmp_path / "one")
    before = mteb_model.digest_of(tmp_path / "one")
    assert mteb_model.digest_of(tmp_path / "one") == before
    save_tiny(tmp_path / "one")  # new weights, the same configuration
    assert mteb_model.digest_of(tmp_path / "one") != before


def test_the_mteb_script_evaluates_tasks_by_name(tmp_path, monkeypatch, capsys):
    save_tiny(tmp_path / "tiny")
    asked = {}

    def evaluate(model, tasks, **options):
        asked.update(model=model, tasks=tasks, **options)
        return SimpleNamespace(task_results=[SimpleNamespace(task_name="A", get_score=lambda: 0.25)])

    mteb = ModuleType("mteb")
    mteb.evaluate, mteb.get_tasks, mteb.ResultCache = evaluate, lambda tasks: list(tasks), Path
    monkeypatch.setitem(sys.modules, "mteb", mteb)
    mteb_model.main(["--model", str(tmp_path / "tiny"), "--tasks", "A", "B", "--batch_size", "3", "--output", "out"])
    assert asked.pop("model").folder == tmp_path / "tiny"
    assert asked == {"tasks": ["A", "B"], "cache": Path("out"), "encode_kwargs": {"batch_size": 3}}
    assert capsys.readouterr().out == "A: 0.2500\n"
    with pytest.raises(ValueError, match="tasks: expected names of MTEB's tasks, got none"):
        mteb_model.main([])


@pytest.fixture
def data_juicer(monkeypatch):
    """Data-Juicer's names that the adapter imports: the registry, and what is said to the filter it stands on."""

    class Filter:
        def __init__(self, hf_clip: str = "openai/clip-vit-base-patch32", min_score: float = 0.1, **options) -> None:
            self.said, self.model_key = {"hf_clip": hf_clip, "min_score": min_score, **options}, None

    operators: dict[str, type] = {}
    registry = SimpleNamespace(register_module=lambda name: lambda kind: operators.setdefault(name, kind))
    for name, content in (
        ("data_juicer.ops.base_op", {"OPERATORS": registry}),
        ("data_juicer.ops.op_fusion", {"LOADED_IMAGES": registry}),
        ("data_juicer.ops.filter.image_text_similarity_filter", {"ImageTextSimilarityFilter": Filter}),
    ):
        parts = name.split(".")
        for count in range(1, len(parts) + 1):
            monkeypatch.setitem(sys.modules, ".".join(parts[:count]), ModuleType(".".join(parts[:count])))
        vars(sys.modules[name]).update(content)
    spec = importlib.util.spec_from_file_location("data_juicer_filter", ADAPTERS / "data_juicer_filter.py")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    return operators


@torch.no_grad()
def test_data_juicer_gets_a_filter_whose_scores_are_cosines(data_juicer, tmp_path):
    """What Data-Juicer computes with model and processor, to the letter, beside the model's cosines."""
    whole = save_tiny(tmp_path)
    made = data_juicer["florence_image_text_similarity_filter"](hf_clip=str(tmp_path), min_score=0.3, any_or_all="all")
    assert made.said == {"hf_clip": str(tmp_path), "min_score": 0.3, "any_or_all": "all"}
    model, processor = made.model_key(device="cpu")
    pictures, text = some_pictures(2), "a photo of a cat sitting on a mat " * 5
    inputs = processor(
        text=text,
        images=pictures,
        return_tensors="pt",
        truncation=True,
        max_length=model.config.text_config.max_position_embeddings,
        padding=True,
    ).to(model.device)
    scores = model(**inputs).logits_per_text / 100.0
    images = embed_pictures(whole, tiny_processor().image_processor, pictures)[0]
    cosines = embed_texts(whole, tiny_processor().tokenizer, [text]) @ images.T
    assert_close(scores, cosines, atol=1e-5, rtol=0)
    assert inputs["pixel_values"].shape == (2, 3, SIDE, SIDE)


# The harnesses themselves


def interpreter(harness: str, program: str, packages: str) -> str:
    """One that runs a program which imports what the harness needs; without one the test skips."""
    variable = f"FLORENCE_{harness}_PYTHON"
    python = os.environ.get(variable, sys.executable)
    if subprocess.run([python, "-c", program], capture_output=True).returncode:
        pytest.skip(f"pip install {packages} beside this package; {variable} may name another interpreter")
    return python


def run(command: list) -> str:
    """What a command prints; its errors are told if it fails."""
    path = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
    # Data-Juicer installs what it misses while it runs: not in a test.
    offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": os.devnull, "UV_OFFLINE": "1"}
    environment = {**os.environ, **offline, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return done.stdout


@pytest.fixture(scope="module")
def gallery() -> tuple[list[Path], list[str]]:
    """Pictures and their names, all different."""
    rows = [json.loads(line) for line in (GALLERY / "metadata.jsonl").read_text("utf-8").splitlines()]
    chosen = {row["name"]: GALLERY / row["file_name"] for row in rows if row["file_name"].startswith("gallery/")}
    return list(chosen.values())[::15], list(chosen)[::15]


@pytest.fixture(scope="module")
def ours(gallery) -> dict[str, float]:
    """What our own evaluators say of the bundled checkpoint."""
    files, names = gallery
    model, processor = load_bundled()
    images, _ = embed_pictures(model, processor.image_processor, files)
    classifier = ZeroShotClassifier.build(model, processor.tokenizer, names, ["a photo of a {}."])
    texts = embed_texts(model, processor.tokenizer, names)
    found = evaluate_retrieval(images, texts, torch.arange(len(files))).as_dict()
    found["accuracy"] = accuracy(classifier.logits(images), torch.arange(len(files)))
    assert 0.1 < found["accuracy"] < 1 and 0.1 < found["text_to_image_recall_1"] < 1
    return found


def write_shard(folder: Path, files: list[Path], suffix: str, contents: list[str]) -> None:
    """The test split of a webdataset: `test/0.tar` and how many such there are."""
    (folder / "test").mkdir(parents=True)
    (folder / "test" / "nshards.txt").write_text("1")
    with tarfile.open(folder / "test" / "0.tar", "w") as tar:
        for number, (file, content) in enumerate(zip(files, contents, strict=True)):
            for name, data in ((f"{number:04}.png", file.read_bytes()), (f"{number:04}.{suffix}", content.encode())):
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                tar.addfile(entry, BytesIO(data))


@pytest.mark.slow
@pytest.mark.parametrize("task", ["zeroshot_classification", "zeroshot_retrieval"])
def test_clip_benchmark_itself(task, gallery, ours, tmp_path):
    # clip-benchmark makes numbers of arrays with one element, which newer releases of numpy refuse.
    program = "import clip_benchmark.cli, numpy, webdataset; float(numpy.ones(1))"
    python = interpreter("CLIP_BENCHMARK", program, "clip-benchmark 'numpy<2.4'")
    files, names = gallery
    if task == "zeroshot_classification":
        write_shard(tmp_path, files, "cls", [str(number) for number in range(len(files))])
        (tmp_path / "classnames.txt").write_text("\n".join(names))
        (tmp_path / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.")
    else:
        write_shard(tmp_path, files, "txt", names)
        (tmp_path / "dataset_type.txt").write_text("retrieval")
    command = [python, ADAPTERS / "clip_benchmark_model.py", "eval", "--model_type", "florence", "--model", "nano"]
    command += ["--pretrained", bundled_checkpoint(), "--task", task, "--dataset", "wds/gallery", "--recall_k", 1, 5]
    command += ["--dataset_root", tmp_path, "--output", tmp_path / "found.json", "--no_amp", "--num_workers", 1]
    run(command)
    found = json.loads((tmp_path / "found.json").read_text())["metrics"]
    if task == "zeroshot_classification":
        assert found["acc1"] == pytest.approx(ours["accuracy"])
        return
    for k in (1, 5):
        assert found[f"image_retrieval_recall@{k}"] == pytest.approx(ours[f"text_to_image_recall_{k}"])
        assert found[f"text_retrieval_recall@{k}"] == pytest.approx(ours[f"image_to_text_recall_{k}"])


@pytest.mark.slow
def test_mteb_itself(gallery, ours, tmp_path):
    python = interpreter("MTEB", "import mteb", "'mteb[image]'")
    files, names = gallery
    rows = [[str(file), number, name] for number, (file, name) in enumerate(zip(files, names, strict=True))]
    for name, content in (("rows", rows), ("names", names)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    command = [python, Path(__file__).with_name("mteb_program.py"), ADAPTERS / "mteb_model.py", bundled_checkpoint()]
    told = [line for line in run([*command, tmp_path]).splitlines() if line.startswith("scores: ")]
    found = json.loads(told[0].removeprefix("scores: "))
    assert found["FolderZeroShot"]["accuracy"] == pytest.approx(ours["accuracy"])
    for k in (1, 5):  # MTEB rounds to five places
        assert found["FolderRetrieval"][f"recall_at_{k}"] == pytest.approx(ours[f"text_to_image_recall_{k}"], abs=1e-5)
    assert found["revision"] == mteb_model.digest_of(bundled_checkpoint())


@pytest.mark.slow
def test_data_juicer_itself(gallery, tmp_path):
    """A text each for two pictures, right and wrong ones: what is kept, and the scores it is kept by."""
    python = interpreter("DATA_JUICER", "import data_juicer.tools.process_data, ray", "py-data-juicer ray")
    files, names = gallery
    wrong = names[1:] + names[:1]
    texts = [name if number % 2 else other for number, (name, other) in enumerate(zip(names, wrong, strict=True))]
    rows = [{"text": f"<__dj__image> {text}", "images": [str(file)]} for text, file in zip(texts, files, strict=True)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model, processor = load_bundled()
    images, _ = embed_pictures(model, processor.image_processor, files)
    cosines = (images * embed_texts(model, processor.tokenizer, texts)).sum(dim=1)
    limit = cosines.median().item() + 1e-4
    options = {"hf_clip": bundled_checkpoint(), "min_score": limit}
    config = {
        "dataset_path": str(tmp_path / "pairs.jsonl"),
        "export_path": str(tmp_path / "out" / "kept.jsonl"),
        "custom_operator_paths": [str(ADAPTERS / "data_juicer_filter.py")],
        "process": [{"florence_image_text_similarity_filter": options}],
        "np": 1,
        "keep_stats_in_res_ds": True,
        "skip_op_error": False,
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    run([python, "-m", "data_juicer.tools.process_data", "--config", tmp_path / "config.yaml"])
    kept = [json.loads(line) for line in (tmp_path / "out" / "kept.jsonl").read_text("utf-8").splitlines()]
    found = {row["images"][0]: row["__dj__stats__"]["image_text_similarity"] for row in kept}
    wanted = {str(file): [value] for file, value in zip(files, cosines.tolist(), strict=True) if value >= limit}
    assert found.keys() == wanted.keys() and 0 < len(wanted) < len(files)
    for name, scores in found.items():
        assert scores == pytest.approx(wanted[name], abs=1e-5)
