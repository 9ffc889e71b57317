"""The detector's training script on a handful of drawn pictures: it learns, resumes, keeps the best, and draws."""

import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

pytest.importorskip(
    "torchmetrics", reason="needs the extra `detection`: pip install 'transformers_florence[detection]'"
)
pytest.importorskip("faster_coco_eval", reason="needs the extra `detection`")

import finetune_detection
from tests.tiny_florence import save_tiny
from transformers_florence import FlorenceDetectionImageProcessor, FlorenceForObjectDetection
from transformers_florence.evaluation.detection import evaluate_detector
from transformers_florence.training import arguments as recipe_arguments
from transformers_florence.training import recipe
from transformers_florence.training.tracking import read_log

parse_arguments = partial(recipe_arguments.parse_arguments, finetune_detection.DetectionArguments)

WIDTH, HEIGHT = 48, 32
COLORS = {"green": (0, 200, 0), "red": (220, 0, 0)}
TRAINED, HELD_OUT, BATCH = 6, 3, 2


class Killed(BaseException):
    """Stands for the end of the process: nothing catches it."""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Grey pictures, each with a red or a green rectangle, some with both; one box reaches over the edge."""
    folder, rows = tmp_path_factory.mktemp("pictures"), []
    random = torch.Generator().manual_seed(0)
    for number in range(TRAINED + HELD_OUT):
        image, boxes = Image.new("RGB", (WIDTH, HEIGHT), "gray"), []
        for place, name in enumerate(COLORS):
            if (number + place) % 3 == 0:
                continue
            left, top = (
                24 * place + int(torch.randint(8, (), generator=random)),
                int(torch.randint(10, (), generator=random)),
            )
            image.paste(COLORS[name], (left, top, left + 16, top + 20))
            boxes.append({"label": name, "bbox": [left, top, 16, 20]})
        if number == 0:
            boxes[0]["bbox"][2] = 60
        image.save(folder / f"{number}.png")
        split = "train" if number < TRAINED else "valid"
        rows.append({"file_name": f"{number}.png", "width": WIDTH, "height": HEIGHT, "split": split, "boxes": boxes})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def tower(tmp_path_factory) -> Path:
    """A tiny dual encoder on the disk."""
    folder = tmp_path_factory.mktemp("tower")
    save_tiny(folder)
    return folder


@pytest.fixture(scope="module")
def options(pictures, tower):
    """Arguments of the script for a run of 2 epochs of 3 steps, with changes."""

    def make(output: Path, **changes) -> list[str]:
        values = {
            "data": pictures,
            "output": output,
            "init_from": tower,
            "hidden_size": 32,
            "num_blocks": 1,
            "epochs": 2,
            "batch_size": BATCH,
            "warmup_steps": 1,
            "learning_rate": 2e-3,
            "shortest_edge": 32,
            "longest_edge": 48,
            "precision": "float32",
            "log_every": 1,
            "shown": 2,
        } | changes
        return [part for name, value in values.items() for part in (f"--{name}", str(value))]

    return make


@pytest.fixture(scope="module")
def run(options, tmp_path_factory):
    """A run in one go: its folder, and its last scores."""
    output = tmp_path_factory.mktemp("run")
    return output, finetune_detection.main(options(output))


def batches_of(argv: list[str], **ranks) -> finetune_detection.Batches:
    arguments = parse_arguments(argv)
    train, _ = finetune_detection.read_sets(arguments)
    size = {"shortest_edge": arguments.shortest_edge, "longest_edge": arguments.longest_edge}
    return finetune_detection.Batches(arguments, train.pictures, FlorenceDetectionImageProcessor(size=size), **ranks)


def test_what_a_run_leaves(run):
    output, scores = run
    rows = read_log(output / "log.csv")
    assert [row["step"] for row in rows] == [str(step) for step in range(1, 7)]
    assert [step for step, row in enumerate(rows, start=1) if "map" in row] == [3, 6]
    parts = ("loss_cls", "loss_box_reg", "loss_ctr")
    for row in rows:
        assert math.isclose(float(row["loss"]), sum(float(row[part]) for part in parts), abs_tol=2e-4)
    assert float(rows[-1]["map"]) == scores["map"]
    for name in ("curves.png", "predictions.png"):
        with Image.open(output / name) as picture:
            picture.verify()
    table = (output / "classes.txt").read_text().splitlines()
    assert [line.split()[0] for line in table] == ["class", "green", "red", "all"]
    assert table[-1].split()[2] == f"{100 * scores['map']:.1f}"
    assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-6"]
    assert not list(output.glob("*.partial"))


def test_the_best_model_scores_what_its_file_says(run, options):
    output, _ = run
    best = output / "best"
    content = json.loads((best / "scores.json").read_text())
    assert content["map"] == max(float(row["map"]) for row in read_log(output / "log.csv") if "map" in row)
    model = FlorenceForObjectDetection.from_pretrained(best)
    processor = FlorenceDetectionImageProcessor.from_pretrained(best)
    assert model.config.id2label == {0: "green", 1: "red"}
    _, held_out = finetune_detection.read_sets(parse_arguments(options(output)))
    again = evaluate_detector(model, processor, held_out.pictures, held_out.names, batch_size=BATCH)
    assert again.map == pytest.approx(content["map"], abs=1e-6)


def test_a_run_that_was_killed_goes_on_as_if_it_had_not_been(run, options, tmp_path, monkeypatch):
    take = finetune_detection.Batches.__getitem__

    def end_at_step_4(self, step: int):
        if step == 4:
            raise Killed
        return take(self, step)

    monkeypatch.setattr(finetune_detection.Batches, "__getitem__", end_at_step_4)
    with pytest.raises(Killed):
        finetune_detection.main(options(tmp_path))
    monkeypatch.undo()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]
    scores = finetune_detection.main(options(tmp_path))
    weights, others = (load_file(folder / "checkpoint-6" / "model.safetensors") for folder in (run[0], tmp_path))
    assert weights.keys() == others.keys() and all(torch.equal(weights[name], others[name]) for name in weights)
    assert scores == run[1]
    speed = "samples_per_second"
    logs = ([{**row, speed: ""} for row in read_log(folder / "log.csv")] for folder in (run[0], tmp_path))
    assert next(logs) == next(logs)


def test_a_run_that_is_asked_to_stop_saves_the_step_and_goes_on_from_there(run, options, tmp_path, monkeypatch):
    asked = iter([False, True])
    monkeypatch.setattr(recipe.StopRequest, "requested", lambda self, accelerator: next(asked))
    assert finetune_detection.main(options(tmp_path)) == {}  # in the middle of the first epoch
    monkeypatch.undo()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    finetune_detection.main(options(tmp_path))
    weights, others = (load_file(folder / "checkpoint-6" / "model.safetensors") for folder in (run[0], tmp_path))
    assert all(torch.equal(weights[name], others[name]) for name in weights)


def test_another_run_in_the_same_folder_is_refused(run, options):
    with pytest.raises(ValueError, match="holds another run.*learning_rate 0.002 there and 0.1 now"):
        finetune_detection.main(options(run[0], learning_rate=0.1))


@pytest.mark.slow
def test_a_detector_learns_pictures_by_heart(options, tmp_path):
    """Not a test of generalisation: after 45 steps on six pictures it finds what is in those."""
    changes = {"train_split": "train", "eval_split": "train", "augmentation": "none", "learning_rate": 5e-3}
    scores = finetune_detection.main(
        options(tmp_path, **changes, epochs=15, eval_every=15, warmup_steps=3, backbone_rate=1.0)
    )
    rows = read_log(tmp_path / "log.csv")
    assert float(rows[-1]["loss"]) < 0.6 * float(rows[0]["loss"])
    assert scores["map_50"] > 0.3


def tower_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Weights of the image tower, by their names in the tower."""
    weights = load_file(folder / "model.safetensors")
    return {name.split("vision_model.", 1)[1]: value for name, value in weights.items() if "vision_model." in name}


@pytest.mark.parametrize(
    ("changes", "moved"),
    [
        ({"freeze_backbone": True}, ()),
        (
            {"lora_rank": 2},
            tuple(f"{name}.weight" for name in ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")),
        ),
    ],
    ids=["frozen", "lora"],
)
def test_what_moves_in_the_tower(changes: dict, moved: tuple[str, ...], options, tower, tmp_path):
    finetune_detection.main(options(tmp_path, **changes, epochs=1, report_to="none"))
    before, after = tower_weights(tower), tower_weights(tmp_path / "best")
    for name, value in after.items():
        assert torch.equal(value, before[name]) != name.endswith(moved), name
    assert not any("lora" in name for name in load_file(tmp_path / "best" / "model.safetensors"))
    detector = FlorenceForObjectDetection.from_pretrained(tmp_path / "best")
    assert not torch.equal(
        detector.class_predictor.bias, torch.full_like(detector.class_predictor.bias, -math.log(99))
    )


def test_drawing_trains_nothing(options, tmp_path):
    assert finetune_detection.main(options(tmp_path, draw=5, augmentation="jitter", crop=0.5)) == {}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["draw"]
    drawn = sorted((tmp_path / "draw").iterdir())
    assert [path.name for path in drawn] == [f"{number:04d}.png" for number in range(5)]
    for path in drawn:
        with Image.open(path) as picture:
            assert max(picture.size) >= 320


def test_an_epoch_takes_each_picture_once_and_ranks_share_a_batch(options, tmp_path):
    argv = options(tmp_path)
    whole = batches_of(argv)
    epochs = [[name for step in range(3 * epoch, 3 * epoch + 3) for name in whole[step]["names"]] for epoch in (0, 1)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == [f"{number}.png" for number in range(TRAINED)]
    assert epochs[0] != epochs[1]
    parts = [batches_of(argv, rank=rank, ranks=2).samples(4) for rank in (0, 1)]
    for one, other in zip(whole.samples(4), [sample for part in parts for sample in part], strict=True):
        assert torch.equal(one["image"], other["image"]) and torch.equal(one["boxes"], other["boxes"])


def test_pictures_without_objects_are_no_evaluation(options, pictures, tmp_path):
    rows = [json.loads(line) for line in (pictures / "metadata.jsonl").read_text().splitlines()]
    for row in rows:
        row["boxes"] = row["boxes"] if row["split"] == "train" else []
        (tmp_path / row["file_name"]).symlink_to(pictures / row["file_name"])
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match="eval_data: expected pictures with objects"):
        finetune_detection.main(options(tmp_path / "run", data=tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"faults": "ignore"}, "faults: expected one of raise, clip, drop, got 'ignore'"),
        ({"faults": "raise"}, "1 x beyond_edge"),
        ({"augmentation": "mosaic"}, "augmentation: expected one of"),
        ({"epochs": 0}, "epochs: expected an integer >= 1, got 0"),
        ({"learning_rate": "nan"}, "learning_rate: expected a finite number >= 0, got nan"),
        ({"size": "nano"}, "expected size or init_from, got both"),
        ({"freeze_backbone": True, "lora_rank": 4}, "expected freeze_backbone or lora_rank, got both"),
        ({"batch_size": 7}, "expected at least batch_size=7 samples, got 6"),
        ({"train_split": "test"}, "expected rows of the split test"),
    ],
)
def test_arguments_that_are_refused(changes: dict, message: str, options, tmp_path):
    with pytest.raises(ValueError, match=message):
        finetune_detection.main(options(tmp_path, **changes))


def test_the_file_that_comes_along_is_read(options, tmp_path):
    file = Path(finetune_detection.__file__).parent / "configs" / "finetune_detection.yaml"
    arguments = parse_arguments(["--config", str(file), "--epochs", "3"])
    assert (arguments.epochs, arguments.num_blocks, arguments.data) == (3, 2, "pictures")
    (tmp_path / "a.yaml").write_text("epoch: 3\n")
    with pytest.raises(ValueError, match="unknown keys epoch"):
        parse_arguments(["--config", str(tmp_path / "a.yaml")])
