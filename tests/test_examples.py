"""The examples end to end on a tiny corpus: train, interrupt and go on, evaluate, build a gallery, run the demo."""

import base64
import hashlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file

import build_gallery
import bundle_checkpoint
import demo
import evaluate_pictures
import pretrain_unicl
from tests.tiny_corpus import COLORS, SHAPES, tiny_splits, write_tiny_corpus
from tests.tiny_florence import CONTEXT, save_tiny, tiny_vision_config
from transformers_florence import FlorenceModel, FlorenceProcessor, load_bundled, load_checkpoint
from transformers_florence import configuration_florence as sizes
from transformers_florence.data.picture_corpus import PictureCorpus, load_split
from transformers_florence.data.prompts import DRAWING_TEMPLATES
from transformers_florence.evaluation.zero_shot import build_zero_shot_classifier, embed_pixels
from transformers_florence.loading import BUNDLED
from transformers_florence.training import arguments as recipe_arguments
from transformers_florence.training import tracking

parse_arguments = partial(recipe_arguments.parse_arguments, pretrain_unicl.PretrainArguments)
STEPS, BATCH = 6, 16  # 64 pictures: an epoch ends within the run
CARD = Path(__file__).parents[1] / "MODEL_CARD.md"
SEEN = {f"{color} {shape}" for color in COLORS for shape in SHAPES} - {
    f"{COLORS[index // 3]} {SHAPES[index % 3]}" for index in range(3, 24, 7)
}


class Killed(BaseException):
    """Stands for the end of the process: nothing catches it."""


@pytest.fixture(scope="module", autouse=True)
def tiny_size():
    """A size named `test`, with everything in it that makes training random."""
    with pytest.MonkeyPatch.context() as patch:
        vision = {"image_size": 32, "embed_dim": 8, "depths": [1, 2], "num_heads": [1, 2], "window_size": 4}
        text = {"vocab_size": 560, "hidden_size": 16, "intermediate_size": 24}
        patch.setitem(sizes.VISION_SIZES, "test", {**vision, "drop_path_rate": 0.2})
        patch.setitem(sizes.TEXT_SIZES, "test", {**text, "num_hidden_layers": 1, "num_attention_heads": 2})
        patch.setitem(sizes.PROJECTION_DIMS, "test", 12)
        yield


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_tiny_corpus(tmp_path_factory.mktemp("corpus"))


def options(corpus: Path, output: Path, **changes) -> list[str]:
    values = {
        "corpus": corpus,
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
    } | changes
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


def pretrain(corpus: Path, output: Path, **changes) -> dict[str, torch.Tensor]:
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


def kill_at_step(patch: pytest.MonkeyPatch, last: int) -> None:
    """The process ends when step `last`, counted from 0, or a later one wants its batch."""
    take = pretrain_unicl.Batches.__call__

    def call(self, step):
        if step >= last:
            raise Killed
        return take(self, step)

    patch.setattr(pretrain_unicl.Batches, "__call__", call)


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory) -> Path:
    """A run in one go."""
    output = tmp_path_factory.mktemp("run")
    pretrain(corpus, output)
    return output


@pytest.fixture(scope="module")
def weights(run) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def batches(corpus):
    """Makes the batches of a run with the given arguments."""
    rows = PictureCorpus(load_split(corpus, "train"), size=32, progress=False)

    class Flat(pretrain_unicl.Batches):
        """With everything of a batch on one level."""

        def __call__(self, step: int) -> dict:
            batch = super().__call__(step)
            inputs, labels = batch.pop("inputs"), batch.pop("labels")
            return {**batch, **inputs, **labels}

    def make(*rank: int, **changes) -> Flat:
        arguments = parse_arguments(options(corpus, Path("unused"), **changes))
        text = sizes.FlorenceTextConfig.from_size("test", max_position_embeddings=arguments.context_length)
        config = sizes.FlorenceConfig.from_size("test", text_config=text)
        processor = pretrain_unicl.build_processor(arguments, rows, config)
        return Flat(arguments, rows, processor, torch.device("cpu"), *rank)

    return make


# Training


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
    take = pretrain_unicl.Batches.__call__
    monkeypatch.setattr(
        pretrain_unicl.Batches, "__call__", lambda self, step: (taken.append(step), take(self, step))[1]
    )
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
    take = pretrain_unicl.Batches.__call__

    def ask(self, step):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return take(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(pretrain_unicl.Batches, "__call__", ask)
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


def from_start(start: Path, **changes) -> dict:
    """A run that goes on from a checkpoint, small steps so that equal runs stay equal to the last digits."""
    return {"init_from": start, "context_length": CONTEXT, "learning_rate": 1e-4, "prototype_weight": 0.5, **changes}


def test_two_processes_are_one(corpus, start, tmp_path):
    """Each with half of every batch, in chunks of its own: the same losses, norms and weights as one process has."""
    changes = from_start(start, steps=4, save_every=4, category_batches=0.5, keyword_batches=0)
    alone = pretrain(corpus, tmp_path / "one", **changes)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        pretrain_unicl.__file__,
    ]
    changes |= {"chunk_size": 3, "processes": 2}
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *options(corpus, tmp_path / "two", **changes)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 x cpu, DistributedDataParallel" in done.stdout
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


# Batches


def test_a_batch_depends_on_seed_and_step_alone(batches):
    ordered, jumping = batches(), batches()
    first = [ordered(step) for step in range(4)]
    for step in (3, 0, 2):
        torch.manual_seed(step + 100)
        batch = jumping(step)
        for name, value in batch.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(first[step][name])), (step, name)
    assert not torch.equal(first[0]["pixel_values"], first[1]["pixel_values"])
    assert not torch.equal(batches(seed=1)(0)["pixel_values"], first[0]["pixel_values"])


def test_the_parts_of_all_processes_are_the_batch(batches):
    for step in range(3):
        whole, first, second = batches()(step), batches(0, 2)(step), batches(1, 2)(step)
        assert whole["positives"] == first["positives"] == second["positives"]
        equal = (whole["labels"][:, None] == whole["labels"]).sum(1).double().mean().item()
        assert whole["positives"] == pytest.approx(equal)
        for name in ("pixel_values", "input_ids", "attention_mask", "labels", "class_labels", "rows"):
            parts = [torch.as_tensor(part[name]) for part in (first, second)]
            assert len(parts[0]) == BATCH // 2 and torch.equal(torch.cat(parts), torch.as_tensor(whole[name]))
    with pytest.raises(ValueError, match="batch_size: expected a multiple of 3 processes, got 16"):
        batches(0, 3)


def record_augmentation(monkeypatch, change: Callable) -> list[tuple[int, int, float]]:
    """Size, seed and strength of every augmentation from now on; `change` is done to the pixels instead."""
    taken = []

    class Recorder:
        def __init__(self, size):
            self.size = size

        def __call__(self, pixels, generator, strength):
            taken.append((self.size, generator.initial_seed(), strength))
            return change(pixels)

    monkeypatch.setattr(pretrain_unicl, "BatchAugmentation", Recorder)
    return taken


def test_every_step_draws_anew(batches, monkeypatch):
    make = batches()
    taken = record_augmentation(monkeypatch, lambda pixels: pixels)
    for step in range(12):  # three epochs
        make(step)
    assert len({seed for _, seed, _ in taken}) == 12


def test_an_epoch_shows_every_picture_once_in_another_order_each_time(batches, monkeypatch):
    make = batches(category_batches=0, keyword_batches=0)
    monkeypatch.setattr(make.corpus, "labels", torch.arange(64))
    epochs = [torch.cat([make(4 * epoch + step)["labels"] for step in range(4)]) for epoch in range(3)]
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(64))
    assert not torch.equal(epochs[0], epochs[1]) and not torch.equal(epochs[1], epochs[2])


def test_labels_are_names_categories_or_the_pairs_themselves(batches):
    make = batches(category_batches=0, keyword_batches=0, context_length=96)  # so that no text is cut
    decode = make.tokenizer.batch_decode
    named = make(0)
    texts = decode(named["input_ids"], skip_special_tokens=True)
    for label, text in zip(named["labels"].tolist(), texts, strict=True):
        names = {make.corpus.names[row] for row in (make.corpus.labels == label).nonzero()[:, 0].tolist()}
        assert len(names) == 1 and names.pop() in " ".join(text.split())

    grouped = batches(category_batches=1, keyword_batches=0, context_length=96)(0)
    texts = decode(grouped["input_ids"], skip_special_tokens=True)
    words = dict(zip(make.corpus.categories.tolist(), make.corpus.category_names, strict=True))
    for label, text in zip(grouped["labels"].tolist(), texts, strict=True):
        wanted = {template.format(words[label]) for template in DRAWING_TEMPLATES}
        assert "".join(text.split()) in {"".join(sentence.split()) for sentence in wanted}

    paired = batches(category_batches=0, keyword_batches=0, context_length=96, objective="clip")(0)
    assert torch.equal(paired["labels"], torch.arange(BATCH))
    assert torch.equal(paired["pixel_values"], named["pixel_values"]), "the objective changes nothing but the labels"


def test_the_classifier_learns_names_whatever_the_batch_is_labelled_by(batches, monkeypatch):
    make = batches(category_batches=1, keyword_batches=0)
    record_augmentation(monkeypatch, lambda pixels: pixels)
    rows_as_colors = torch.arange(64, dtype=torch.uint8).view(64, 1, 1, 1).expand(-1, 3, 32, 32)
    monkeypatch.setattr(make.corpus, "pixels", rows_as_colors)
    batch = make(0)
    rows = ((batch["pixel_values"] * make.std + make.mean)[:, 0, 0, 0] * 255).round().long()
    assert torch.equal(batch["class_labels"], make.corpus.labels[rows])
    assert torch.equal(batch["labels"], make.corpus.categories[rows])
    assert batches(objective="clip")(0)["class_labels"] is None, "unique labels know of no names"


def test_the_first_part_has_smaller_pictures_and_shorter_texts(batches):
    make = batches(steps=10, small_part=0.6, context_length=9)
    shapes = [(make(step)["pixel_values"].shape[-1], make(step)["input_ids"].shape[1]) for step in range(10)]
    assert [side for side, _ in shapes] == [16] * 6 + [32] * 4
    assert max(tokens for _, tokens in shapes[:6]) == 6 and max(tokens for _, tokens in shapes[6:]) == 9
    assert {make(step)["input_ids"][:, -1].max().item() for step in range(10)} == {559}, "the end token must stay"
    assert batches(small_part=0)(0)["pixel_values"].shape[-1] == 32


def test_without_enough_categories_every_batch_is_of_names(batches):
    make = batches(category_batches=1, keyword_batches=0)
    make.with_category = make.with_category[: BATCH - 1]
    assert len(set(make(0)["labels"].tolist())) > len(set(make.corpus.category_names))


def test_keyword_batches_say_a_keyword_of_each_picture_and_no_other_picture_has_it(batches, monkeypatch):
    make = batches(category_batches=0, keyword_batches=1, context_length=96)
    record_augmentation(monkeypatch, lambda pixels: pixels)
    rows_as_colors = torch.arange(64, dtype=torch.uint8).view(64, 1, 1, 1).expand(-1, 3, 32, 32)
    monkeypatch.setattr(make.corpus, "pixels", rows_as_colors)
    words = ["round", "square", "flat", "deep"]
    rows_of = {word: np.arange(place, 64, 4) for place, word in enumerate(words)}
    monkeypatch.setattr(make.corpus, "general_words", [{words[row % 4]: None} for row in range(64)])
    monkeypatch.setattr(make.corpus, "keyword_names", words)
    monkeypatch.setattr(make.corpus, "keyword_rows", rows_of)
    batch = make(0)
    rows = ((batch["pixel_values"] * make.std + make.mean)[:, 0, 0, 0] * 255).round().long()
    assert batch["labels"].tolist() == [row % 4 for row in rows.tolist()]
    assert torch.equal(batch["class_labels"], make.corpus.labels[rows]) and batch["align_texts"] is False
    texts = make.tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)
    for label, text in zip(batch["labels"].tolist(), texts, strict=True):
        wanted = {template.format(words[label]) for template in DRAWING_TEMPLATES}
        assert "".join(text.split()).lower() in {"".join(sentence.split()).lower() for sentence in wanted}

    monkeypatch.setattr(make.corpus, "keyword_names", words[:3])
    monkeypatch.setattr(make.corpus, "keyword_rows", {word: rows_of[word] for word in words[:3]})
    assert make(0)["align_texts"] is True, "with too few keywords for a batch, it is one of names"


def test_augmentation_grows_over_its_ramp(batches, monkeypatch):
    make = batches(steps=100, augmentation_ramp=0.5)
    taken = record_augmentation(monkeypatch, lambda pixels: pixels)
    for step in (0, 25, 50, 99):
        make(step)
    assert [strength for _, _, strength in taken] == pytest.approx([0.0, 0.5, 1.0, 1.0])


def test_fewer_pictures_than_a_batch_are_refused(corpus, tmp_path):
    with pytest.raises(ValueError, match="at least batch_size=65 pictures, got 64"):
        pretrain(corpus, tmp_path, batch_size=65)


# Arguments


def test_the_command_line_wins_over_the_file_and_the_file_over_the_defaults(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("steps: 7\nlearning_rate: 1e-3\nobjective: clip\nmax_grad_norm: 2\n")  # YAML reads 1e-3 as text
    arguments = parse_arguments(["--config", str(config), "--steps", "9"])
    assert (arguments.steps, arguments.learning_rate, arguments.objective) == (9, 1e-3, "clip")
    assert arguments.batch_size == pretrain_unicl.PretrainArguments.batch_size


def test_the_shipped_recipe_is_complete():
    file = Path(pretrain_unicl.__file__).parent / "configs" / "florence_nano.yaml"
    arguments = parse_arguments(["--config", str(file)])
    assert (arguments.size, arguments.objective) == ("nano", "unicl")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: 5\nlearnig_rate: 0.1\nepochs: 3\n", "unknown keys epochs, learnig_rate"),
        ("", "expected keys and values, got None"),
        ("- steps\n", "expected keys and values"),
        ("objective: siglip\n", "objective: expected one of unicl, clip, sigmoid, got 'siglip'"),
        ("precision: float16\n", "precision: expected"),
        ("steps: 0\n", "steps: expected an integer >= 1, got 0"),
        ("steps: 2.5\n", "steps: expected an integer >= 1, got 2.5"),
        ("steps: true\n", "steps: expected an integer >= 1, got True"),
        ("batch_size: [16]\n", r"batch_size: expected an integer >= 1, got \[16\]"),
        ("warmup_steps: -1\n", "warmup_steps: expected an integer >= 0, got -1"),
        ("learning_rate: .nan\n", "learning_rate: expected a finite number >= 0, got nan"),
        ("weight_decay: -0.1\n", "weight_decay: expected a finite number >= 0"),
        ("keyword_batches: 1.01\n", "keyword_batches: expected a part from 0 to 1, got 1.01"),
        ("category_batches: 0.6\nkeyword_batches: 0.5\n", "expected at most 1 together, got 1.1"),
        ("category_batches: 1.5\n", "category_batches: expected a part from 0 to 1, got 1.5"),
        ("seed: -1\n", "seed: expected an integer >= 0"),
        ("seed: 5000000000\n", "seed: expected less than 2 to the power of 31"),
        ("corpus: 3\n", "corpus: expected a text, got 3"),
    ],
)
def test_a_file_with_wrong_values_is_refused_by_name(tmp_path, text, message):
    config = tmp_path / "config.yaml"
    config.write_text(text)
    with pytest.raises(ValueError, match=message):
        parse_arguments(["--config", str(config)])


def test_what_is_not_there_is_refused_by_name(tmp_path, corpus):
    with pytest.raises(ValueError, match="expected the folder of a picture corpus, got .*nowhere"):
        pretrain(tmp_path / "nowhere", tmp_path / "run")
    with pytest.raises(ValueError, match="`size`: expected one of"):
        pretrain(corpus, tmp_path / "run", size="gigantic")


# Evaluation


@pytest.fixture(scope="module")
def report(run, corpus, tmp_path_factory) -> dict:
    file = tmp_path_factory.mktemp("report") / "report.json"
    result = evaluate_pictures.main(["--model", str(run / "model"), "--corpus", str(corpus), "--output", str(file)])
    assert json.loads(file.read_text()) == result
    return result


def test_the_evaluation_reports_all_its_parts(report):
    assert list(report) == [
        "a_seen_concepts_noto",
        "a_seen_concepts_noto_v1",
        "b_unseen_concepts_noto",
        "b_unseen_concepts_all_styles",
        "c_clipart",
        "d_keywords_noto",
    ]
    counts = {
        part: (row["pictures"], row.get("names") or row.get("subgroups") or row.get("texts") or row.get("keywords"))
        for part, row in report.items()
    }
    assert counts == {
        "a_seen_concepts_noto": (21, 21),
        "a_seen_concepts_noto_v1": (11, 21),
        "b_unseen_concepts_noto": (3, 6),
        "b_unseen_concepts_all_styles": (10, 6),
        "c_clipart": (22, 22),
        "d_keywords_noto": (21, 4),
    }
    for row in report.values():
        numbers = {key: value for key, value in row.items() if isinstance(value, float)}
        assert numbers and all(0 <= value <= 1 for value in numbers.values()), row
        assert row.get("top1", 0) <= row.get("top5", 0)
    for way in ("image_to_text", "text_to_image"):
        recalls = [report["c_clipart"][f"{way}_r{k}"] for k in (1, 5, 10)]
        assert recalls == sorted(recalls)


def nearest_at_12_pixels(test: list[dict], train: list[dict], key: str) -> float:
    """Share of pictures whose nearest training picture has the same `key`: one at a time, in float64."""

    def pixels(row: dict) -> np.ndarray:
        return np.asarray(Image.open(BytesIO(row["image"])).resize((12, 12), Image.Resampling.BOX), np.float64)

    known = [pixels(row) for row in train]
    hits = 0
    for row in test:
        distances = [((pixels(row) - other) ** 2).sum() for other in known]
        hits += train[int(np.argmin(distances))][key] == row[key]
    return hits / len(test)


def test_the_floor_is_the_nearest_training_picture(report):
    splits = tiny_splits()
    train = [row for row in splits["train"] if row["source"] == "emoji"]
    noto = [row for row in splits["test_style"] if row["style"] == "noto"]
    found = report["a_seen_concepts_noto"]["floor_top1"]
    assert found == pytest.approx(nearest_at_12_pixels(noto, train, "name"), abs=1e-4)
    found = report["b_unseen_concepts_all_styles"]["floor_top1"]
    assert found == pytest.approx(nearest_at_12_pixels(splits["test_concept"], train, "subgroup"), abs=1e-4)


def test_the_evaluation_is_the_models_own_choice(run, report):
    """Part (a) again, one picture at a time through the model's forward."""
    model = load_checkpoint(FlorenceModel, run / "model")
    processor = FlorenceProcessor.from_pretrained(run / "model")
    names, hits = sorted(SEEN), 0
    classifier = build_zero_shot_classifier(model, processor.tokenizer, names, evaluate_pictures.TEMPLATES)
    noto = [row for row in tiny_splits()["test_style"] if row["style"] == "noto"]
    for row in noto:
        inputs = processor(images=Image.open(BytesIO(row["image"])), return_tensors="pt")
        with torch.no_grad():
            (embeds,) = model(**inputs).image_embeds
        hits += names[int((classifier @ embeds).argmax())] == row["name"]
    assert report["a_seen_concepts_noto"]["top1"] == pytest.approx(hits / len(noto), abs=1e-4)


def test_a_subgroup_without_training_pictures_is_a_choice_too(run, tmp_path, capsys):
    splits = tiny_splits()
    for row in splits["test_concept"]:
        if row["concept"] == 3:
            row["subgroup"] = "unheard-of"
    folder = write_tiny_corpus(tmp_path, splits=splits)
    result = evaluate_pictures.main(["--model", str(run / "model"), "--corpus", str(folder)])
    assert json.loads(capsys.readouterr().out) == result
    assert result["b_unseen_concepts_noto"]["subgroups"] == 7
    assert result["b_unseen_concepts_all_styles"]["pictures"] == 10


def test_a_part_that_the_corpus_lacks_is_named(run, tmp_path):
    splits = tiny_splits()
    splits["test_style"] = [row for row in splits["test_style"] if row["style"] == "noto"]
    folder = write_tiny_corpus(tmp_path / "style", splits=splits)
    with pytest.raises(ValueError, match="expected rows with {'style': 'noto-v1'}"):
        evaluate_pictures.main(["--model", str(run / "model"), "--corpus", str(folder)])
    del splits["test_clipart"]
    folder = write_tiny_corpus(tmp_path / "clipart", splits=splits)
    with pytest.raises(ValueError, match="split 'test_clipart'"):
        evaluate_pictures.main(["--model", str(run / "model"), "--corpus", str(folder)])


def test_a_model_with_missing_weights_is_not_evaluated(corpus, tmp_path):
    with pytest.raises(ValueError, match="expected the folder of a checkpoint"):
        evaluate_pictures.main(["--model", str(tmp_path / "nowhere"), "--corpus", str(corpus)])


# Gallery and demo


@pytest.fixture(scope="module")
def gallery(corpus, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gallery")
    with pytest.MonkeyPatch.context() as patch:
        for name, count in (("QUESTIONS", 3), ("NOTO", 6), ("CLIPART", 8)):
            patch.setattr(build_gallery, name, count)
        build_gallery.main(["--corpus", str(corpus), "--out", str(folder)])
    return folder


def test_the_gallery_holds_held_out_pictures_only(gallery):
    lines = [json.loads(line) for line in (gallery / "metadata.jsonl").read_text("utf-8").splitlines()]
    held_out = {
        (row["style"], row["name"]): row for split, rows in tiny_splits().items() if split != "train" for row in rows
    }
    assert len({line["file_name"] for line in lines}) == len(lines) == 3 + 6 + 8
    for line in lines:
        row = held_out[line["style"], line["name"]]
        assert line["style"] in ("noto", "openclipart") and line["license"] == row["license"] == "MIT"
        assert np.array_equal(
            np.array(Image.open(gallery / line["file_name"])), np.array(Image.open(BytesIO(row["image"])))
        )
    questions = [line for line in lines if line["file_name"].startswith("questions/")]
    subgroups = {row["name"]: row["subgroup"] for row in tiny_splits()["test_style"]}
    assert len({subgroups[line["name"]] for line in questions}) == len(questions) == 3
    assert not {line["name"] for line in questions} & {line["name"] for line in lines[3:]}
    assert (gallery / "names.txt").read_text("utf-8").splitlines() == sorted(SEEN)


def test_a_gallery_that_is_built_anew_has_no_pictures_of_the_old_one(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(build_gallery, "QUESTIONS", 2)
    listed = []
    for pictures in (6, 2):
        monkeypatch.setattr(build_gallery, "NOTO", pictures)
        monkeypatch.setattr(build_gallery, "CLIPART", pictures)
        build_gallery.main(["--corpus", str(corpus), "--out", str(tmp_path)])
        (tmp_path / "gallery" / "notes.txt").write_text("mine")
        lines = (tmp_path / "metadata.jsonl").read_text("utf-8").splitlines()
        listed.append({json.loads(line)["file_name"] for line in lines})
    assert listed[1] < listed[0] and len(listed[1]) == 6
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("*/*.png")} == listed[1]
    assert (tmp_path / "gallery" / "notes.txt").read_text() == "mine"


def test_a_corpus_with_too_few_subgroups_gives_no_gallery(corpus, tmp_path):
    with pytest.raises(ValueError, match="expected noto pictures of 12 subgroups in test_style, got 6"):
        build_gallery.main(["--corpus", str(corpus), "--out", str(tmp_path / "gallery")])
    assert not (tmp_path / "gallery").exists()


class Page(HTMLParser):
    """Pictures and open tags of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.pictures: dict[str, bytes] = {}
        self.words = ""
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        if tag == "img":
            values = dict(attributes)
            kind, _, payload = values["src"].partition(",")
            assert kind == "data:image/png;base64"
            self.pictures[values["alt"]] = base64.b64decode(payload, validate=True)
        elif tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += data


def test_the_demo_names_and_finds_pictures_and_reports(run, gallery, tmp_path, monkeypatch, capsys):
    def load_tiny(name):
        return load_checkpoint(FlorenceModel, run / "model"), FlorenceProcessor.from_pretrained(run / "model")

    def build_classifier(model, tokenizer, names, *args, **kwargs):
        """The first two questions' names are their own pictures' vectors, the third's is the opposite of its own."""
        classifier = build_zero_shot_classifier(model, tokenizer, names, *args, **kwargs)
        _, processor = load_tiny("florence-nano")
        for question, sign in zip(questions, (1, 1, -1), strict=True):
            pixels = processor(images=Image.open(gallery / question["file_name"]), return_tensors="pt")["pixel_values"]
            classifier[names.index(question["name"])] = sign * embed_pixels(model, pixels)[0]
        return classifier

    questions = [json.loads(line) for line in (gallery / "metadata.jsonl").read_text("utf-8").splitlines()][:3]
    monkeypatch.setattr(demo, "load_bundled", load_tiny)
    monkeypatch.setattr(demo, "build_zero_shot_classifier", build_classifier)
    monkeypatch.setattr(demo, "QUERIES", demo.QUERIES[:2])  # drawing more takes longer and tests nothing more
    demo.main(["--out", str(tmp_path / "out"), "--gallery", str(gallery)])

    said = capsys.readouterr().out
    for question, right in zip(questions, (True, True, False), strict=True):
        (line,) = [line for line in said.splitlines() if line[2:].startswith(question["name"] + " ")]
        assert line.count("%") == 5
        answers = [part.rpartition(" ")[0].strip() for part in line[30:].split(",")]
        assert set(answers) <= SEEN and len(set(answers)) == 5
        assert (line[0] == "+") == (answers[0] == question["name"]) == right
    assert "2 of 3 named right among 21 names" in said
    assert all(f"{query}: " in said for query in demo.QUERIES)

    page = Page((tmp_path / "out" / "report.html").read_text("utf-8"))
    assert page.open == []
    assert set(page.pictures) == {"named", "found"}
    for name, data in page.pictures.items():
        assert data == (tmp_path / "out" / f"{name}.png").read_bytes()
        pixels = np.array(Image.open(BytesIO(data)).convert("RGB"))
        assert min(pixels.shape[:2]) > 200
        assert (pixels != 255).any(axis=2).mean() > 0.02, f"{name}.png is blank"
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50
    assert all(question["name"] in page.words for question in questions)


def test_the_demo_without_its_pictures_says_how_to_build_them(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "load_bundled", lambda name: (None, None))
    with pytest.raises(ValueError, match="build them with examples/build_gallery.py"):
        demo.main(["--out", str(tmp_path / "out"), "--gallery", str(tmp_path)])
    (tmp_path / "metadata.jsonl").touch()
    (tmp_path / "names.txt").write_text("a cat\n")
    with pytest.raises(ValueError, match="expected 1 question, 8 pictures and 5 names at least"):
        demo.main(["--out", str(tmp_path / "out"), "--gallery", str(tmp_path)])


def test_bundling_stores_half_the_bytes_and_the_same_model(run, tmp_path):
    digest = bundle_checkpoint.main(["--model", str(run / "model"), "--name", "tiny", "--out", str(tmp_path)])
    file = tmp_path / "tiny" / "model.safetensors"
    assert hashlib.sha256(file.read_bytes()).hexdigest() == digest
    assert file.stat().st_size < 0.6 * (run / "model" / "model.safetensors").stat().st_size
    whole, bundled = (load_checkpoint(FlorenceModel, folder) for folder in (run / "model", tmp_path / "tiny"))
    for (name, weight), half in zip(whole.named_parameters(), bundled.parameters(), strict=True):
        assert half.dtype == torch.float32
        torch.testing.assert_close(half, weight, rtol=2**-11, atol=1e-7, msg=name)  # float16 has 11 bits
    assert len(FlorenceProcessor.from_pretrained(tmp_path / "tiny").tokenizer) == 560


# The bundled checkpoint

needs_checkpoint = pytest.mark.skipif(
    not (BUNDLED / "florence-nano" / "model.safetensors").is_file(),
    reason="needs the bundled checkpoint: examples/pretrain_unicl.py trains it, examples/bundle_checkpoint.py adds it",
)


@needs_checkpoint
def test_the_bundled_checkpoint_names_held_out_pictures():
    model, processor = load_bundled("florence-nano")
    questions, _, names = demo.read_gallery(demo.GALLERY)
    assert len(questions) == 12 and len(names) > 1000
    classifier = build_zero_shot_classifier(model, processor.tokenizer, names, ("{}",))
    pixels = processor(images=[row["image"] for row in questions], return_tensors="pt")["pixel_values"]
    best = (embed_pixels(model, pixels) @ classifier.T).topk(5).indices
    right = [
        row["name"] in [names[index] for index in line] for row, line in zip(questions, best.tolist(), strict=True)
    ]
    assert sum(right) >= 6, right


@needs_checkpoint
def test_the_bundled_weights_are_those_of_the_model_card():
    weights = BUNDLED / "florence-nano" / "model.safetensors"
    assert hashlib.sha256(weights.read_bytes()).hexdigest() in CARD.read_text("utf-8")
    assert weights.stat().st_size <= bundle_checkpoint.LIMIT
