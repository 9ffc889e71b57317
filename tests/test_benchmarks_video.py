"""The comparison of video models on a handful of filmstrips: each trains, is scored, and is not trained again."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import video_quality
from tests.tiny_florence import save_tiny, tiny_vision_config
from transformers_florence import FlorenceVideoConfig, FlorenceVideoModel

SIDE, STRIP = 32, 5


@pytest.fixture(scope="module")
def strips(tmp_path_factory) -> Path:
    """Four films of two classes, each with a text of its own, two to train on."""
    folder, rng, rows = tmp_path_factory.mktemp("strips"), np.random.default_rng(0), []
    for number, text in enumerate(("a red car", "two birds", "an old house", "the sea")):
        pixels = rng.integers(0, 256, (STRIP * SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        row = {"file_name": f"{number}.png", "frames": STRIP, "label": "ab"[number % 2], "text": text}
        rows.append(row | {"video": str(number), "split": "train" if number < 2 else "valid"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """What stands in for the bundled dual encoder."""
    folder = tmp_path_factory.mktemp("small")
    save_tiny(folder, vision_config=tiny_vision_config(depths=[1, 1, 1, 1], num_heads=[1, 2, 2, 4]))
    return folder


@pytest.fixture
def command(strips, small, tmp_path, monkeypatch):
    """A run of a fraction of a second: one step a model."""
    monkeypatch.setattr(video_quality, "bundled_checkpoint", lambda: small)
    sizes = {"seconds": "0.01", "side": str(SIDE), "frames": "4", "batch": "2", "picture_batch": "2", "seeds": "0"}
    options = [part for name, value in sizes.items() for part in (f"--{name}", value)]
    where = ["--data", str(strips), "--eval_split", "valid", "--output", str(tmp_path / "runs.jsonl")]

    def make(task: str, *more: str) -> list[str]:
        return [task, *where, *options, *(["--pictures", str(strips)] if task == "joint" else []), *more]

    return make


@pytest.mark.parametrize("task", ["actions", "retrieval"])
def test_models_are_trained_once(command, tmp_path, monkeypatch, capsys, task):
    results = video_quality.main(command(task))
    assert [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()] == results
    assert [result["model"] for result in results] == list(video_quality.MODELS[task])
    for result in results:
        assert result["steps"] == 1 and all(0 <= result[score] <= 1 for score in video_quality.SCORES[task])
    table = capsys.readouterr().out
    monkeypatch.setattr(video_quality, "train", None)
    assert video_quality.main(command(task)) == results
    assert capsys.readouterr().out == table


def test_the_peers_are_of_our_size():
    config = FlorenceVideoConfig.from_size("nano", **video_quality.WINDOWS)
    own = video_quality.count_parameters(FlorenceVideoModel(config))
    peers = [video_quality.make_r2plus1d(9), video_quality.make_mvit(config, 64, 8, 9), video_quality.Swin3d(config)]
    assert all(0.7 < video_quality.count_parameters(peer) / own < 1.7 for peer in peers)
    clips = torch.randn(1, 8, 3, 64, 64)
    assert [peer(clips.transpose(1, 2)).shape for peer in peers[:2]] == [(1, 9)] * 2
    assert peers[2](clips).pooler_output.shape == (1, config.hidden_size)


@pytest.mark.parametrize(
    "schedule, frames",
    [
        ("video", [4, 4, 4, 4]),
        ("joint", [4, 1, 4, 1]),
        ("image-then-video", [1, 1, 4, 4]),
        ("decoupled", [1, 1, 4, 1]),
    ],
)
def test_when_pictures_are_shown(command, monkeypatch, schedule, frames):
    """Two steps in the first half of the time and two in the second: a picture is a clip of one frame."""
    seen, real = [], video_quality.collate_clips

    def collate(*args):
        pixels = real(*args)
        seen.append(pixels.shape[1])
        return pixels

    def train(model, groups, loss, seconds):
        for step, done in enumerate((0.0, 0.4, 0.6, 0.9)):
            loss(done, step).backward()
        return 4

    monkeypatch.setattr(video_quality, "collate_clips", collate)
    monkeypatch.setattr(video_quality, "train", train)
    video_quality.main(command("joint", "--models", schedule))
    assert seen == frames


def test_training_ends_when_the_time_is_over():
    model = torch.nn.Linear(2, 1)
    done = []

    def loss(part: float, step: int) -> torch.Tensor:
        done.append(part)
        return model(torch.ones(1, 2)).square().mean()

    before = loss(0.0, 0).item()
    done.clear()
    steps = video_quality.train(model, [{"params": list(model.parameters()), "lr": 0.05}], loss, 0.05)
    assert steps == len(done) and done[0] == 0 and done == sorted(done) and done[-1] < 1
    assert loss(0.0, 0).item() < before and not model.training


def test_the_table_holds_mean_and_spread():
    shared = {"model": "florence", "parameters": 1200, "mean_class": 0.5}
    runs = [{**shared, "steps": 10, "top_1": 0.4}, {**shared, "steps": 12, "top_1": 0.6}]
    lines = video_quality.summarise(runs, "actions").splitlines()
    assert lines[0] == "| model | parameters | seeds | steps | top_1 | mean_class |"
    assert lines[2:] == ["| florence | 1,200 | 2 | 11 | 50.0 ± 14.1 | 50.0 ± 0.0 |"]


@pytest.mark.parametrize(
    "given, message",
    [
        (["actions", "--models", "swin3d"], "--models: expected some of florence, florence-random, r2plus1d, mvit"),
        (["retrieval", "--pictures", "x"], "--pictures: expected a folder for the task joint and no other, got x"),
    ],
)
def test_options_that_cannot_be(command, capsys, given, message):
    with pytest.raises(SystemExit):
        video_quality.main(command(*given))
    assert message in capsys.readouterr().err
