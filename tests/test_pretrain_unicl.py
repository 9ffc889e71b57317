"""Pretraining end to end on a tiny corpus: train, interrupt and go on, in one process and in two."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from datasets import Dataset, Features, List, Value
from datasets import Image as DatasetImage
from PIL import Image
from safetensors.torch import load_file

import pretrain_unicl
from pretrain_arguments import PretrainArguments
from pretrain_batches import CorpusBatches, TripletBatches
from tests.tiny_corpus import COLORS, SHAPES, draw, tiny_splits, write_tiny_corpus
from tests.tiny_florence import CONTEXT, save_tiny, tiny_vision_config
from tests.tiny_pretraining import (
    STEPS,
    add_tiny_size,
    assert_same_weights,
    checkpoints,
    from_start,
    options,
    pretrain,
    read_log,
)
from tests.tiny_shards import BROKEN, sentence
from transformers_florence import FlorenceModel, FlorenceProcessor, load_checkpoint
from transformers_florence import configuration_florence as sizes
from transformers_florence.data.picture_corpus import PictureCorpus, load_split
from transformers_florence.training import tracking
from transformers_florence.training.budget import forward_flops
from transformers_florence.training.objectives import ContrastiveObjective


class Killed(BaseException):
    """Stands for the end of the process: nothing catches it."""


@pytest.fixture(scope="module", autouse=True)
def tiny_size():
    with pytest.MonkeyPatch.context() as patch:
        add_tiny_size(patch)
        yield


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_tiny_corpus(tmp_path_factory.mktemp("corpus"))


def kill_at_step(patch: pytest.MonkeyPatch, last: int) -> None:
    """The process ends when step `last`, counted from 0, or a later one wants its batch."""
    take = CorpusBatches.__call__

    def call(self, step):
        if step >= last:
            raise Killed
        return take(self, step)

    patch.setattr(CorpusBatches, "__call__", call)


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory) -> Path:
    """A run in one go."""
    output = tmp_path_factory.mktemp("run")
    pretrain(corpus, output)
    return output


@pytest.fixture(scope="module")
def weights(run) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


def test_a_run_leaves_a_log_a_checkpoint_and_a_model(run):
    log = read_log(run)
    assert [entry["step"] for entry in log] == list(range(1, STEPS + 1))
    assert all(np.isfinite(entry["loss"]) and entry["gradient_norm"] > 0 for entry in log)
    assert [entry["step"] for entry in log if "top1" in entry] == [3, 6]
    assert all(0 <= entry["top1"] <= entry["top5"] <= 1 for entry in log if "top1" in entry)
    assert [entry["learning_rate"] for entry in log[:3]] == pytest.approx([0, 5e-4, 1e-3])  # two steps of warm-up
    assert log[-1]["learning_rate"] < log[3]["learning_rate"] < 1e-3

    assert checkpoints(run) == ["checkpoint-3", "checkpoint-6"]
    arguments = json.loads((run / "arguments.json").read_text())
    assert arguments["size"] == "test" and arguments["steps"] == STEPS

    model = load_checkpoint(FlorenceModel, run / "model")
    processor = FlorenceProcessor.from_pretrained(run / "model")
    assert model.config.text_config.max_position_embeddings == processor.tokenizer.model_max_length == 16
    assert len(processor.tokenizer) == model.config.text_config.vocab_size
    assert processor.image_processor.size["height"] == model.config.vision_config.image_size == 32
    inputs = processor(images=Image.new("RGB", (50, 40)), text=["red square"], return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 32, 32)
    assert torch.isfinite(model(**inputs).logits_per_image).all()


def test_every_weight_was_trained(corpus, weights):
    torch.manual_seed(0)
    text = sizes.FlorenceTextConfig.from_size("test", max_position_embeddings=16)
    start = FlorenceModel(sizes.FlorenceConfig.from_size("test", text_config=text)).state_dict()
    assert weights.keys() == start.keys()
    for name, tensor in weights.items():
        assert not torch.equal(tensor, start[name]) and torch.isfinite(tensor).all(), name


def test_equal_arguments_give_equal_weights_and_another_seed_does_not(corpus, run, weights, tmp_path):
    assert_same_weights(pretrain(corpus, tmp_path / "again"), weights)
    assert read_log(tmp_path / "again") == read_log(run)
    other = pretrain(corpus, tmp_path / "other", seed=1)
    assert not torch.equal(other["visual_projection.weight"], weights["visual_projection.weight"])


def test_a_run_that_was_killed_ends_as_if_it_had_not_been(corpus, run, weights, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at_step(patch, 5)
        pretrain(corpus, tmp_path)
    assert checkpoints(tmp_path) == ["checkpoint-3"] and not (tmp_path / "model").exists()
    assert read_log(tmp_path)[-1]["step"] == 5, "two steps behind the checkpoint were logged"
    taken = []
    take = CorpusBatches.__call__
    monkeypatch.setattr(CorpusBatches, "__call__", lambda self, step: (taken.append(step), take(self, step))[1])
    assert_same_weights(pretrain(corpus, tmp_path), weights)
    assert taken == [3, 4, 5]
    assert read_log(tmp_path) == read_log(run)
    assert checkpoints(tmp_path) == ["checkpoint-3", "checkpoint-6"]


def test_a_run_that_was_killed_while_saving_goes_on_from_the_checkpoint_before(corpus, weights, tmp_path, monkeypatch):
    rename = Path.rename

    def end_before(path, target):
        if Path(target).name == f"checkpoint-{STEPS}":
            shutil.copytree(path, tmp_path / "left")  # an exception clears up, which a kill does not
            raise Killed
        return rename(path, target)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Path, "rename", end_before)
        pretrain(corpus, tmp_path)
    (tmp_path / "left").rename(tmp_path / f"checkpoint-{STEPS}.partial")
    assert_same_weights(pretrain(corpus, tmp_path), weights)
    assert checkpoints(tmp_path) == ["checkpoint-3", "checkpoint-6"]


def test_a_run_goes_on_from_the_newest_checkpoint_that_is_whole(corpus, run, weights, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    file = tmp_path / "run" / f"checkpoint-{STEPS}" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert_same_weights(pretrain(corpus, tmp_path / "run"), weights)


def test_a_run_that_is_asked_to_stop_saves_and_goes_on(corpus, run, weights, tmp_path, monkeypatch):
    take = CorpusBatches.__call__

    def ask(self, step):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return take(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(CorpusBatches, "__call__", ask)
        pretrain_unicl.main(options(corpus, tmp_path))
    assert checkpoints(tmp_path) == ["checkpoint-3", "checkpoint-4"] and not (tmp_path / "model").exists()
    assert_same_weights(pretrain(corpus, tmp_path), weights)
    assert read_log(tmp_path) == read_log(run)


def test_a_finished_run_given_again_changes_nothing(corpus, run, weights, monkeypatch):
    log = (run / "log.csv").read_text()
    with monkeypatch.context() as patch:
        kill_at_step(patch, 0)  # no step is taken
        assert_same_weights(pretrain(corpus, run), weights)
    assert (run / "log.csv").read_text() == log


def test_a_finished_run_can_be_made_longer(corpus, tmp_path):
    pretrain(corpus, tmp_path, steps=2, save_every=1)
    pretrain(corpus, tmp_path, steps=4)
    assert [entry["step"] for entry in read_log(tmp_path)] == [1, 2, 3, 4]
    assert checkpoints(tmp_path) == ["checkpoint-3", "checkpoint-4"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "seed 0 there and 1 now"),
        ({"objective": "clip"}, "objective 'unicl' there and 'clip' now"),
        ({"text_rate": 0.5}, "text_rate 1.0 there and 0.5 now"),
        ({"learning_rate": 0.5, "batch_size": 8}, "batch_size 16 there and 8 now, learning_rate"),
        ({"steps": 5}, "has taken 6, expected as many or more, got 5"),
    ],
)
def test_another_run_does_not_go_on_from_this_ones_checkpoint(corpus, run, changes, message):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=message):
        pretrain(corpus, run, **changes)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_run_does_not_go_on_with_other_texts(run, tmp_path):
    """They would give another vocabulary, under which the text tower's weights mean nothing."""
    splits = tiny_splits()
    splits["train"][0]["keywords"] = ["something", "else"]
    with pytest.raises(ValueError, match="holds another run: .* texts"):
        pretrain(write_tiny_corpus(tmp_path / "corpus", splits=splits), run)


def test_nothing_held_out_reaches_training(weights, tmp_path):
    """Without the held-out pictures, and so without evaluation, the same weights come out."""
    folder = write_tiny_corpus(tmp_path / "corpus", splits={"train": tiny_splits()["train"]})
    assert_same_weights(pretrain(folder, tmp_path / "run"), weights)
    assert not any("top1" in entry for entry in read_log(tmp_path / "run"))


def test_what_evaluation_draws_at_random_changes_nothing(corpus, weights, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain_unicl, "evaluate", lambda *arguments: {"top1": torch.rand(5).max().item()})
    assert_same_weights(pretrain(corpus, tmp_path), weights)


def test_clip_is_another_objective(corpus, weights, tmp_path):
    other = pretrain(corpus, tmp_path, objective="clip")
    assert all(np.isfinite(entry["loss"]) for entry in read_log(tmp_path))
    assert not torch.equal(other["visual_projection.weight"], weights["visual_projection.weight"])


def test_the_prototypes_and_the_towers_rates_are_choices(corpus, weights, tmp_path):
    plain = pretrain(corpus, tmp_path / "plain", prototype_weight=0, steps=3)
    frozen = pretrain(corpus, tmp_path / "frozen", text_rate=0, token_rate=0, steps=3)
    torch.manual_seed(0)
    text = sizes.FlorenceTextConfig.from_size("test", max_position_embeddings=16)
    start = FlorenceModel(sizes.FlorenceConfig.from_size("test", text_config=text)).state_dict()
    assert plain.keys() == frozen.keys() == weights.keys(), "the prototypes serve the training only"
    assert read_log(tmp_path / "plain")[0]["loss"] < read_log(tmp_path / "frozen")[0]["loss"] - 1
    for name, tensor in frozen.items():
        assert torch.equal(tensor, start[name]) == name.startswith("text_"), name


def test_bfloat16_saves_float32_weights_near_those_of_float32(corpus, run, weights, tmp_path):
    rough = pretrain(corpus, tmp_path, precision="bfloat16")
    assert all(tensor.dtype == torch.float32 for tensor in rough.values())
    assert not torch.equal(rough["visual_projection.weight"], weights["visual_projection.weight"])
    losses, exact = ([entry["loss"] for entry in read_log(output)] for output in (tmp_path, run))
    assert losses == pytest.approx(exact, rel=0.03)


def test_a_loss_that_is_no_number_stops_the_run_before_it_spoils_the_weights(corpus, tmp_path, monkeypatch):
    loss_of, steps = pretrain_unicl.ContrastiveObjective.loss, []

    def diverge(self, **parts):
        steps.append(loss_of(self, **parts))
        return steps[-1] * (float("nan") if len(steps) == 5 else 1.0)

    monkeypatch.setattr(pretrain_unicl.ContrastiveObjective, "loss", diverge)
    with pytest.raises(RuntimeError, match="not finite at step 4: .*rank 0: loss nan, samples "):
        pretrain(corpus, tmp_path)
    assert checkpoints(tmp_path) == ["checkpoint-3"]
    saved = load_file(tmp_path / "checkpoint-3" / "model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in saved.values())


def assert_nearly(weights: dict, expected: dict, before: dict, tolerance: float = 0.005) -> None:
    """All weights together moved as far as expected, and in the same direction.

    Each alone may not: Adam's first steps are about as long for a gradient that is rounding alone.
    """
    assert weights.keys() == expected.keys() == before.keys()
    assert all(weights[name].shape == expected[name].shape for name in expected)
    moved, right = (
        torch.cat([(state[name] - before[name]).flatten() for name in expected]) for state in (weights, expected)
    )
    assert right.norm() > 0
    assert (moved - right).norm() <= tolerance * right.norm()


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """A checkpoint without stochastic depth, whose choices would depend on the number of processes."""
    folder = tmp_path_factory.mktemp("start")
    torch.manual_seed(0)
    save_tiny(folder, vision_config=tiny_vision_config(drop_path_rate=0.0))
    return folder


def launch_two(arguments: list[str]) -> str:
    """Two processes on this machine by PyTorch's launcher; what they printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, pretrain_unicl.__file__, *arguments], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_two_processes_are_one(corpus, start, tmp_path):
    """Each with half of every batch, in chunks of its own: the same losses, norms and weights as one process has."""
    changes = from_start(start, steps=4, save_every=4, category_batches=0.5, keyword_batches=0)
    alone = pretrain(corpus, tmp_path / "one", **changes)
    said = launch_two(options(corpus, tmp_path / "two", chunk_size=3, processes=2, **changes))
    assert "2 x cpu, DistributedDataParallel" in said
    for one, two in zip(read_log(tmp_path / "one"), read_log(tmp_path / "two"), strict=True):
        assert one.keys() == two.keys()
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert two == pytest.approx(one, rel=1e-4, abs=1e-4)  # as many digits as the log has
    together = load_file(tmp_path / "two" / "model" / "model.safetensors")
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    before = load_file(start / "model.safetensors")
    assert any((alone[name] - before[name]).abs().max() > 1e-4 for name in alone)


def test_the_chunks_of_a_batch_change_nothing(corpus, start, tmp_path):
    whole = pretrain(corpus, tmp_path / "whole", **from_start(start, steps=3))
    chunks = pretrain(corpus, tmp_path / "chunks", **from_start(start, steps=3, chunk_size=5))
    torch.testing.assert_close(chunks, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("objective", ["unicl", "sigmoid"])
def test_a_locked_tower_stays_as_it_was(corpus, start, tmp_path, objective):
    weights = pretrain(corpus, tmp_path, **from_start(start, steps=3, locked=True, objective=objective))
    before = load_file(start / "model.safetensors")
    for name, weight in weights.items():
        of_pictures = name.startswith(("vision_model.", "visual_projection."))
        assert torch.equal(weight, before[name]) is of_pictures, name
    assert FlorenceProcessor.from_pretrained(tmp_path / "model").tokenizer.model_max_length == CONTEXT


def test_a_start_with_a_shorter_context_is_refused(corpus, start, tmp_path):
    with pytest.raises(ValueError, match=f"context_length: expected at most the {CONTEXT} tokens of .*, got 16"):
        pretrain(corpus, tmp_path, init_from=start)


# Any sources, and the three stages


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> list[str]:
    """Pictures with a sentence and a word each, two of them bad; and pictures of two classes."""
    folder = tmp_path_factory.mktemp("sources")
    (folder / "captioned" / "data").mkdir(parents=True)
    features = Features({"image": DatasetImage(), "captions": List(Value("string"))})
    for shard in range(2):
        numbers = range(shard, 24, 2)
        rows = {
            "image": [{"bytes": BROKEN if n == 4 else draw_numbered(n), "path": None} for n in numbers],
            "captions": [[" "] if n == 7 else [sentence(n), f"number {n}"] for n in numbers],
        }
        file = folder / "captioned" / "data" / f"train-{shard:05}-of-00002.parquet"
        Dataset.from_dict(rows, features).to_parquet(file)
    for number in range(8):
        own = folder / "classes" / "train" / ("cat", "dog")[number % 2]
        own.mkdir(parents=True, exist_ok=True)
        (own / f"{number}.png").write_bytes(draw_numbered(30 + number))
    captioned = {"path": str(folder / "captioned"), "text": "captions"}
    classes = {"path": str(folder / "classes"), "label": "label"}
    return [json.dumps({**captioned, "weight": 3}), json.dumps({**classes, "weight": 1})]


def draw_numbered(number: int) -> bytes:
    return draw(SHAPES[number % 3], COLORS[number % 8], 2 + number % 7)


@pytest.mark.parametrize(("streaming", "ranks_workers"), [(False, 1), (True, 2)])
def test_a_run_on_sources_that_was_killed_ends_as_if_it_had_not_been(
    sources, tmp_path, monkeypatch, streaming, ranks_workers
):
    """Of the stream, whose classes lie in one shard, the captions alone."""
    own = sources[:1] if streaming else sources
    changes = {"sources": own, "batch_size": 8, "streaming": streaming, "shuffle_buffer": 1, "workers": ranks_workers}
    changes |= {"held_out": sources[1], "eval_every": 6}
    weights = pretrain(None, tmp_path / "whole", **changes)
    take = TripletBatches.__call__

    def call(self, step):
        if step == 5:
            raise Killed
        return take(self, step)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(TripletBatches, "__call__", call)
        pretrain(None, tmp_path / "killed", **changes)
    assert checkpoints(tmp_path / "killed") == ["checkpoint-3"]
    assert_same_weights(pretrain(None, tmp_path / "killed", **changes), weights)
    log = read_log(tmp_path / "whole")
    assert read_log(tmp_path / "killed") == log
    assert log[-1]["skipped_samples"] >= 2 and log[0]["skipped_samples"] < log[-1]["skipped_samples"]
    assert 0 <= log[-1]["classes_top1"] <= log[-1]["classes_top5"] == 1


@pytest.mark.slow
def test_two_processes_on_sources_are_one(sources, start, tmp_path):
    """With worker processes, chunks, layers that are computed again, and a running average."""
    changes = {"sources": sources, "held_out": sources[1], "steps": 4, "save_every": 4, "batch_size": 8, "workers": 1}
    changes |= {"augmentation": 0, "small_part": 0, "ema_decay": 0.9, "activation_checkpointing": True}
    changes = from_start(start, **changes)
    alone = pretrain(None, tmp_path / "one", **changes)
    said = launch_two(options(None, tmp_path / "two", processes=2, chunk_size=3, **changes))
    assert "2 x cpu, DistributedDataParallel" in said
    for one, two in zip(read_log(tmp_path / "one"), read_log(tmp_path / "two"), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert [two[name] for name in ("positives", "skipped_samples")] == [
            one[name] for name in ("positives", "skipped_samples")
        ]
    together = load_file(tmp_path / "two" / "model" / "model.safetensors")
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    averages = [load_file(tmp_path / name / "average" / "model.safetensors") for name in ("one", "two")]
    torch.testing.assert_close(averages[1], averages[0], rtol=1e-4, atol=1e-5)


def test_other_sources_are_another_run(sources, tmp_path):
    pretrain(None, tmp_path, sources=sources, batch_size=8, steps=1)
    with pytest.raises(ValueError, match="holds another run: .* texts"):
        pretrain(None, tmp_path, sources=sources[:1], batch_size=8, steps=2)


def test_prototypes_of_a_trained_model_are_where_its_texts_are(corpus, run, tmp_path, monkeypatch):
    made = []

    class Recorded(ContrastiveObjective):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(pretrain_unicl, "ContrastiveObjective", Recorded)
    pretrain(corpus, tmp_path, init_from=run / "model", steps=1, learning_rate=0, size=None)
    rows = PictureCorpus(load_split(corpus, "train"), size=32, progress=False)
    names = [rows.names[rows.labels.tolist().index(label)] for label in range(int(rows.labels.max()) + 1)]
    model = load_checkpoint(FlorenceModel, run / "model")
    tokens = FlorenceProcessor.from_pretrained(run / "model")(text=names, return_tensors="pt", padding=True)
    with torch.no_grad():
        wanted = torch.nn.functional.normalize(model.get_text_features(**tokens).pooler_output, dim=-1)
    torch.testing.assert_close(made[0].prototypes.detach(), wanted)


def test_the_three_stages_go_on_from_each_other(sources, tmp_path, monkeypatch):
    """All texts; without the templated ones; larger pictures, with larger windows."""
    changes = {"batch_size": 8, "steps": 2, "augmentation": 0, "small_part": 0, "learning_rate": 1e-4}
    taken = []
    take = TripletBatches.__call__
    monkeypatch.setattr(
        TripletBatches, "__call__", lambda self, step: (taken.append(batch := take(self, step)), batch)[1]
    )
    folders = [tmp_path / f"stage{number}" for number in (1, 2, 3)]
    pretrain(None, folders[0], sources=sources, **changes)
    texts = [text for batch in taken for text in batch["samples"]]
    assert any(text not in map(sentence, range(24)) for text in texts)

    taken.clear()
    later = {"sources": sources[:1], "leave_out_templated": True, "context_length": 12, "size": None}
    pretrain(None, folders[1], init_from=folders[0] / "model", **later, **changes)
    assert {text for batch in taken for text in batch["samples"]} <= set(map(sentence, range(24)))
    losses = [float(log["loss"]) for log in (read_log(folder)[0] for folder in folders[:2])]
    assert losses[0] != losses[1]

    taken.clear()
    larger = {"image_size": 48, "window_size": 6}
    weights = pretrain(None, folders[2], init_from=folders[1] / "model", **larger, **later, **changes)
    assert {batch["inputs"]["pixel_values"].shape[-1] for batch in taken} == {48}
    tables = {tuple(weight.shape) for name, weight in weights.items() if "bias_table" in name}
    assert tables == {(11 * 11, 1), (11 * 11, 2)}
    model = load_checkpoint(FlorenceModel, folders[2] / "model")
    processor = FlorenceProcessor.from_pretrained(folders[2] / "model")
    assert model.config.vision_config.image_size == 48 and model.config.vision_config.window_size == 6
    inputs = processor(images=Image.new("RGB", (90, 70)), text=["a picture"], return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 48, 48)
    assert torch.isfinite(model(**inputs).logits_per_image).all()
    before = load_checkpoint(FlorenceModel, folders[1] / "model")
    distance = (weights["visual_projection.weight"] - before.visual_projection.weight).abs().max()
    assert 0 < distance < 1e-3, "two small steps from where stage 2 ended"


def test_a_new_model_takes_a_side_windows_and_a_vocabulary(sources, run, tmp_path):
    changes = {"sources": sources, "batch_size": 8, "steps": 1, "vocabulary": run / "model"}
    pretrain(None, tmp_path / "run", image_size=40, window_size=5, **changes)
    model = load_checkpoint(FlorenceModel, tmp_path / "run" / "model")
    assert (model.config.vision_config.image_size, model.config.vision_config.window_size) == (40, 5)
    tokenizers = [FlorenceProcessor.from_pretrained(f / "model").tokenizer for f in (run, tmp_path / "run")]
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()
    with pytest.raises(ValueError, match=r"vocabulary: expected the 3072 tokens of the model, got 560 in "):
        pretrain(None, tmp_path / "nano", size="nano", **changes)


# Memory and precision


def test_activations_that_are_computed_again_change_nothing(corpus, weights, tmp_path):
    again = pretrain(corpus, tmp_path, activation_checkpointing=True)
    torch.testing.assert_close(again, weights, rtol=1e-5, atol=1e-6)


@pytest.fixture
def fresh_accelerator():
    """Accelerate keeps one precision for each process."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.mark.parametrize(("precision", "checkpointing"), [("float16", False), ("float16", True), ("bfloat16", True)])
def test_half_precision_is_near_float32_and_goes_on_with_its_loss_scale(
    corpus, run, tmp_path, monkeypatch, fresh_accelerator, precision, checkpointing
):
    """From a loss scale that does not overflow, or float16 would leave out its first steps."""
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=64.0))
    changes = {"precision": precision, "activation_checkpointing": checkpointing}
    weights = pretrain(corpus, tmp_path / "whole", **changes)
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())
    log = read_log(tmp_path / "whole")
    exact = [entry["loss"] for entry in read_log(run)]
    assert [entry["loss"] for entry in log] == pytest.approx(exact, rel=0.05)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at_step(patch, 4)
        pretrain(corpus, tmp_path / "killed", **changes)
    scaler = tmp_path / "killed" / "checkpoint-3" / "scaler.pt"
    assert scaler.is_file() is (precision == "float16")
    assert_same_weights(pretrain(corpus, tmp_path / "killed", **changes), weights)


def test_the_running_average_is_exact_evaluated_and_resumed(corpus, run, weights, tmp_path, monkeypatch):
    decay, seen = 0.75, []
    take = pretrain_unicl.guarded_step

    def step(update, wrapped, *arguments, **options):
        found = take(update, wrapped, *arguments, **options)
        seen.append({name: weight.detach().clone() for name, weight in wrapped.model.named_parameters()})
        return found

    with monkeypatch.context() as patch:
        patch.setattr(pretrain_unicl, "guarded_step", step)
        assert_same_weights(pretrain(corpus, tmp_path / "whole", ema_decay=decay), weights)
    expected = seen[0]
    for state in seen[1:]:
        expected = {name: decay * value + (1 - decay) * state[name] for name, value in expected.items()}
    average = load_checkpoint(FlorenceModel, tmp_path / "whole" / "average")
    torch.testing.assert_close(dict(average.named_parameters()), expected, rtol=1e-5, atol=1e-7)
    log = read_log(tmp_path / "whole")
    assert [entry["step"] for entry in log if "average_top1" in entry] == [3, 6]
    assert [{k: v for k, v in entry.items() if "average" not in k} for entry in log] == read_log(run)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at_step(patch, 5)
        pretrain(corpus, tmp_path / "killed", ema_decay=decay)
    pretrain(corpus, tmp_path / "killed", ema_decay=decay)
    files = [tmp_path / name / "average" / "model.safetensors" for name in ("whole", "killed")]
    assert_same_weights(*map(load_file, files))
    assert read_log(tmp_path / "killed") == log


def test_the_share_of_the_peak_is_the_models_arithmetic_over_time(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain_unicl, "peak_flops", lambda name, dtype: 1e3)
    pretrain(corpus, tmp_path, steps=2, small_part=0)
    row = tracking.read_log(tmp_path / "log.csv")[-1]
    config = load_checkpoint(FlorenceModel, tmp_path / "model").config
    flops = 3 * forward_flops(config, 32, 16) * float(row["pictures_per_second"])
    assert float(row["share_of_peak"]) == pytest.approx(flops / 1e3, rel=0.02)  # of a speed with one decimal


def test_a_dry_run_prints_what_a_run_would_take_and_touches_nothing(tmp_path, capsys):
    line = ["--dry_run", "true", "--processes", "2", "--zero_stage", "1", "--chunk_size", "4", "--device", "l4-24gb"]
    line += ["--config", str(Path(pretrain_unicl.__file__).parent / "configs" / "florence_nano.yaml")]
    pretrain_unicl.main([*line, "--size", "test", "--output", str(tmp_path / "run")])
    said = capsys.readouterr().out
    config = sizes.FlorenceConfig.from_size(
        "test", text_config=sizes.FlorenceTextConfig.from_size("test", max_position_embeddings=24)
    )
    parameters = sum(weight.numel() for weight in FlorenceModel(config).parameters())
    assert "5,600 steps of 256 pairs: 32 pixels, 24 tokens" in said and f"{parameters:,} parameters" in said
    assert "2 x l4-24gb, ZeRO-1, torch.bfloat16, 4 of 128 pairs at once" in said and "in 4 passes" in said
    assert "device hours, with 35% of the peak assumed" in said
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_refuses_what_cannot_fit_and_knows_the_stage_before(tmp_path, start):
    """Of a checkpoint that is not there yet the size tells; of one that is, its own configuration."""
    changes = {"dry_run": True, "batch_size": 1 << 20, "device": "t4-16gb", "init_from": tmp_path / "not-yet"}
    with pytest.raises(ValueError, match=r"t4-16gb: expected at most 13 GiB .* \(activations .*take a smaller chunk"):
        pretrain_unicl.main(options(None, tmp_path, **changes))
    changes |= {"init_from": start, "batch_size": 16, "image_size": 48, "context_length": CONTEXT}
    plan = pretrain_unicl.dry_run(
        pretrain_unicl.parse_arguments(PretrainArguments, options(None, tmp_path, **changes))
    )
    assert plan.parameters == sum(weight.numel() for weight in load_checkpoint(FlorenceModel, start).parameters())


def test_a_launcher_that_dropped_the_other_processes_is_noticed(corpus, tmp_path):
    with pytest.raises(ValueError, match="expected 2 processes that train together, got 1; on CPUs launch"):
        pretrain(corpus, tmp_path, processes=2)


# A script that calls `main` with a loss of NaN at the second step.
DIVERGING = """
import pretrain_unicl

loss_of, calls = pretrain_unicl.ContrastiveObjective.loss, []


def diverge(self, **parts):
    calls.append(1)
    return loss_of(self, **parts) * (float("nan") if len(calls) == 2 else 1.0)


pretrain_unicl.ContrastiveObjective.loss = diverge
pretrain_unicl.main()
"""


def launch_zero(stage: int, script: Path, options: list[str], folder: Path) -> str:
    """Two processes through Accelerate's own launcher, with the files of `examples/configs`; what they printed."""
    configs = Path(pretrain_unicl.__file__).parent / "configs"
    values = json.loads((configs / "deepspeed" / f"zero{stage}.json").read_text("utf-8"))
    if stage == 3:
        values["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # or weights this small stay whole
    (folder / "deepspeed.json").write_text(json.dumps(values), "utf-8")
    launcher = ["--config_file", str(configs / "accelerate" / f"zero{stage}.yaml"), "--num_processes", "2"]
    launcher += ["--deepspeed_config_file", str(folder / "deepspeed.json"), "--main_process_port", "0"]
    path = os.pathsep.join([str(configs.parent), str(configs.parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *launcher, str(script), *options],
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="needs DeepSpeed: pip install 'transformers_florence[deepspeed]'",
)


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize(("stage", "chunk_size"), [(1, 0), (1, 3), (2, 0), (2, 3), (3, 0), (3, 3)])
def test_zero_is_one_process_and_goes_on_from_a_checkpoint(corpus, start, tmp_path, stage, chunk_size):
    changes = from_start(start, steps=20, save_every=10, eval_every=10, category_batches=0.5, keyword_batches=0)
    changes["max_grad_norm"] = 1e6  # clips nothing
    alone = pretrain(corpus, tmp_path / "one", **changes)
    two = tmp_path / "two"
    script = Path(pretrain_unicl.__file__)
    arguments = options(corpus, two, chunk_size=chunk_size, **changes)
    assert f"2 x cpu, DeepSpeedEngine with ZeRO-{stage}\n" in launch_zero(stage, script, arguments, tmp_path)
    for one, row in zip(read_log(tmp_path / "one"), read_log(two), strict=True):
        assert row["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert row == pytest.approx(one, rel=1e-4, abs=1e-4)
    model = load_checkpoint(FlorenceModel, two / "model")
    assert_nearly(model.state_dict(), alone, load_file(start / "model.safetensors"))
    assert FlorenceProcessor.from_pretrained(two / "model").tokenizer.model_max_length == CONTEXT

    first = load_file(two / "model" / "model.safetensors")
    shutil.rmtree(two / "checkpoint-20")
    shutil.rmtree(two / "model")
    assert "checkpoint-10 at step 10\n" in launch_zero(stage, script, arguments, tmp_path)
    assert_same_weights(load_file(two / "model" / "model.safetensors"), first)


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize(("stage", "chunk_size"), [(2, 0), (3, 3)])
def test_zero_clips_and_leaves_a_bad_step_out_as_one_process_does(corpus, start, tmp_path, stage, chunk_size):
    changes = from_start(start, steps=4, category_batches=0.5, keyword_batches=0, non_finite="skip")
    changes["max_grad_norm"] = 0.7  # of a norm of about 20
    script = tmp_path / "diverging.py"
    script.write_text(DIVERGING, "utf-8")
    loss_of, calls = pretrain_unicl.ContrastiveObjective.loss, []

    def diverge(self, **parts):
        calls.append(1)
        return loss_of(self, **parts) * (float("nan") if len(calls) == 2 else 1.0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain_unicl.ContrastiveObjective, "loss", diverge)
        alone = pretrain(corpus, tmp_path / "one", **changes)
    launch_zero(stage, script, options(corpus, tmp_path / "two", chunk_size=chunk_size, **changes), tmp_path)
    rows = [read_log(tmp_path / name) for name in ("one", "two")]
    assert [row["skipped_steps"] for row in rows[1]] == [0, 1, 1, 1]
    losses = [[row["loss"] for row in log] for log in rows]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5, nan_ok=True)
    assert np.isnan(losses[1][1])
    together = load_file(tmp_path / "two" / "model" / "model.safetensors")
    assert_nearly(together, alone, load_file(start / "model.safetensors"))


def test_an_infinite_gradient_stops_the_run(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(Accelerator, "clip_grad_norm_", lambda *args, **kwargs: torch.tensor(float("inf")))
    with pytest.raises(RuntimeError, match="step 0: the gradient's norm is inf"):
        pretrain(corpus, tmp_path)


def test_what_is_not_there_is_refused_by_name(tmp_path, corpus):
    with pytest.raises(ValueError, match="expected the folder of a picture corpus, got .*nowhere"):
        pretrain(tmp_path / "nowhere", tmp_path / "run")
    with pytest.raises(ValueError, match="`size`: expected one of"):
        pretrain(corpus, tmp_path / "run", size="gigantic")


def test_positives_are_the_pictures_that_a_text_is_true_of():
    labels = torch.tensor([3, 5, 3, 3, 9])
    equal = (labels[:, None] == labels).sum(1).double().mean().item()
    assert pretrain_unicl.positives(Accelerator(), labels) == pytest.approx(equal) == pytest.approx(11 / 5)
