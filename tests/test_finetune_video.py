"""The video recipes on a handful of drawn filmstrips: they learn, go on where they stopped, and keep the best."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.testing import assert_close

import finetune_video
import train_video_retrieval
import video_recipes
from tests.tiny_florence import CONTEXT, SIDE, TEXTS, save_tiny, tiny_tokenizer
from transformers_florence import (
    FlorenceForVideoClassification,
    FlorenceModel,
    FlorenceTokenizer,
    FlorenceVideoProcessor,
)
from transformers_florence.data.sources import text_label
from transformers_florence.data.video import Clip, read_filmstrips
from transformers_florence.evaluation.video import evaluate_recognition, evaluate_video_retrieval
from transformers_florence.losses_contrastive import unicl_loss
from transformers_florence.modeling_florence_video_retrieval import FlorenceForVideoTextRetrieval
from transformers_florence.training import recipe
from transformers_florence.training.arguments import parse_arguments

FILMS, BATCH = 8, 4


class Killed(BaseException):
    """Stands for the end of the process: nothing catches it."""


@pytest.fixture(scope="module")
def strips(tmp_path_factory) -> Path:
    """A bar that moves down or up through six frames: each film forwards and backwards, the same frames."""
    folder, rows = tmp_path_factory.mktemp("strips"), []
    rng = np.random.default_rng(0)
    for film in range(FILMS):
        color, left = rng.integers(100, 256, 3), int(rng.integers(0, 8))
        down = np.full((6, SIDE, SIDE, 3), 30, np.uint8)
        for number in range(6):
            down[number, 5 * number : 5 * number + 6, left : left + 20] = color
        for label, pixels in (("down", down), ("up", down[::-1])):
            name = f"{film}_{label}.png"
            Image.fromarray(pixels.reshape(-1, SIDE, 3)).save(folder / name)
            split = "train" if film < 6 else "valid"
            row = {"file_name": name, "frames": 6, "label": label, "video": str(film), "split": split}
            rows.append(row | ({"text": TEXTS[film % 4]} if label == "down" else {}))
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def tower(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tower")
    save_tiny(folder)
    return folder


@pytest.fixture
def options(strips, tower, tmp_path):
    """Arguments for 2 epochs of 3 steps, with changes."""

    def make(**changes: Any) -> list[str]:
        values = {
            "data": strips,
            "data_format": "filmstrips",
            "train_split": "train",
            "eval_split": "valid",
            "output": tmp_path / "run",
            "init_from": tower,
            "num_frames": 6,
            "temporal_window_size": 3,
            "epochs": 2,
            "batch_size": BATCH,
            "learning_rate": 2e-3,
            "warmup_steps": 1,
            "precision": "float32",
            "log_every": 1,
            "report_to": "none",
        } | changes
        return [part for name, value in values.items() for part in (f"--{name}", str(value))]

    return make


def recognition(options, **changes: Any) -> finetune_video.RecognitionArguments:
    return parse_arguments(finetune_video.RecognitionArguments, options(**changes))


def test_time_is_learnt_where_single_frames_cannot_tell(options, tmp_path, strips):
    """Down is up backwards: inflated, the tower tells them apart; frame by frame, it says the same of both."""
    settings = {"epochs": 24, "backbone_rate": 1.0, "eval_every": 6, "flip": False, "crop_scale": 0.9}
    scores = finetune_video.main(options(**settings))
    assert scores["top_1"] == 1.0
    best = tmp_path / "run" / "best"
    model, processor = (
        kind.from_pretrained(best) for kind in (FlorenceForVideoClassification, FlorenceVideoProcessor)
    )
    held_out = read_filmstrips(parse_arguments(finetune_video.RecognitionArguments, options()).data, "valid")
    assert (
        evaluate_recognition(model, processor, held_out).top_1
        == json.loads((best / "scores.json").read_text())["top_1"]
    )
    pooled = options(output=tmp_path / "pooled", temporal_stride=1, temporal_window_size=1, epochs=2, flip=False)
    assert finetune_video.main(pooled)["top_1"] == 0.5


@pytest.mark.parametrize("mixup", [0.0, 0.4])
def test_an_interrupted_run_goes_on_as_if_nothing_had_been(options, tmp_path, monkeypatch, mixup):
    changes = {"mixup": mixup, "rand_augment": 1}
    finetune_video.main(options(output=tmp_path / "whole", **changes))
    real, calls = recipe.GuardedUpdate.__call__, []

    def update(self, *args: Any, **fields: Any) -> Any:
        if len(calls) == 4:
            raise Killed
        calls.append(0)
        return real(self, *args, **fields)

    with monkeypatch.context() as patch:
        patch.setattr(recipe.GuardedUpdate, "__call__", update)
        with pytest.raises(Killed):
            finetune_video.main(options(**changes))
    assert len(list((tmp_path / "run").glob("checkpoint-*"))) == 1
    finetune_video.main(options(**changes))
    whole, parts = (load_file(tmp_path / name / "checkpoint-6" / "model.safetensors") for name in ("whole", "run"))
    for name, tensor in whole.items():
        assert torch.equal(tensor, parts[name]), name


def test_batches_are_the_same_on_any_number_of_ranks(options):
    arguments = recognition(options, rand_augment=1)
    clips, _ = video_recipes.read_sets(arguments)
    make = partial(
        finetune_video.Batches, arguments, clips, ["down", "up"], video_recipes.make_processor(arguments, SIDE)
    )
    whole = make()[2]["inputs"]
    parts = [make(rank=rank, ranks=2)[2]["inputs"] for rank in range(2)]
    for name in ("pixel_values_videos", "labels"):
        assert_close(torch.cat([part[name] for part in parts]), whole[name])
    assert whole["pixel_values_videos"].shape == (BATCH, 6, 3, SIDE, SIDE)
    assert not torch.equal(make()[1]["inputs"]["pixel_values_videos"], whole["pixel_values_videos"])


def test_mixed_labels_are_shares(options):
    arguments = recognition(options, mixup=0.8)
    clips, _ = video_recipes.read_sets(arguments)
    processor = video_recipes.make_processor(arguments, SIDE)
    batch = finetune_video.Batches(arguments, clips, ["down", "up"], processor)[0]["inputs"]
    assert batch["labels"].shape == (BATCH, 2) and batch["labels"].dtype == torch.float32
    assert_close(batch["labels"].sum(dim=1), torch.ones(BATCH))
    model = finetune_video.build_model(arguments, ["down", "up"])
    model.eval()
    logs = model(batch["pixel_values_videos"]).logits.log_softmax(dim=1)
    soft = 0.9 * batch["labels"] + 0.1 / 2
    assert_close(model(**batch).loss, -(soft * logs).sum(dim=1).mean())


def test_films_are_held_out_where_no_set_is_named(options):
    arguments = recognition(options, train_split="", eval_split="", held_out=0.3)
    train, held_out = video_recipes.read_sets(arguments)
    assert len(train) + len(held_out) == 2 * FILMS
    assert not {clip.film for clip in train} & {clip.film for clip in held_out}


def test_new_weights_and_going_on_from_a_former_run(options, tmp_path):
    names = ["down", "up"]
    new = finetune_video.build_model(recognition(options, size="nano", init_from=""), names)
    assert new.config.embed_dim == 64 and new.config.num_frames == 6
    inflated = finetune_video.build_model(recognition(options), names)
    inflated.save_pretrained(tmp_path / "former")
    FlorenceVideoProcessor(image_mean=[0.1, 0.2, 0.3]).save_pretrained(tmp_path / "former")
    arguments = recognition(options, init_from=tmp_path / "former")
    assert_close(finetune_video.build_model(arguments, names).state_dict(), inflated.state_dict())
    processor = video_recipes.make_processor(arguments, SIDE)
    assert tuple(processor.image_mean) == (0.1, 0.2, 0.3) and processor.num_frames == 6
    with pytest.raises(ValueError, match=r"expected the classes of .*former, \['down', 'up'\], got \['sit'\]"):
        finetune_video.build_model(recognition(options, init_from=tmp_path / "former"), ["sit"])


def test_tables_of_positions_learn_faster_than_the_pretrained_rest(options):
    arguments = recognition(options, learning_rate=1e-3, time_rate=4.0, backbone_rate=0.1, temporal_mode="divided")
    model = finetune_video.build_model(arguments, ["down", "up"])
    groups = finetune_video.parameter_groups(model, 0.05, arguments.rates, learning_rate=arguments.learning_rate)
    rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        kinds = {"bias_table": 4e-3, "temporal_": 1e-3, "classifier": 1e-3}
        expected = next((rate for part, rate in kinds.items() if part in name), 1e-4)
        assert rates[id(parameter)] == pytest.approx(expected), name


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"size": "nano"}, "expected size or init_from, got both"),
        ({"sampling": "best"}, "sampling: expected one of uniform, dense, segment, got 'best'"),
        ({"data_format": "zip"}, "data_format: expected one of folders, kinetics"),
        ({"num_frames": 0}, "num_frames: expected an integer >= 1, got 0"),
        ({"mixup": -1.0}, "mixup: expected a finite number >= 0, got -1.0"),
    ],
)
def test_arguments_that_cannot_be(options, changes, message):
    with pytest.raises(ValueError, match=message):
        recognition(options, **changes)


@pytest.mark.parametrize(
    "name, kind",
    [
        ("finetune_video", finetune_video.RecognitionArguments),
        ("train_video_retrieval", train_video_retrieval.RetrievalArguments),
        ("train_video_joint", train_video_retrieval.RetrievalArguments),
    ],
)
def test_the_yaml_files_are_arguments(name, kind):
    file = Path(finetune_video.__file__).parent / "configs" / f"{name}.yaml"
    assert parse_arguments(kind, ["--config", str(file)]).num_frames == 8


# ------------------------------------------------------------------------------------------------------ retrieval


@pytest.fixture(scope="module")
def captioned(tmp_path_factory, strips) -> Path:
    """Four of the films, each with a text of its own; two to train on."""
    folder = tmp_path_factory.mktemp("captioned")
    rows = [json.loads(line) for line in (strips / "metadata.jsonl").read_text().splitlines()]
    rows = [row | {"split": "train" if int(row["video"]) < 2 else "valid"} for row in rows if "text" in row][:4]
    for row in rows:
        (folder / row["file_name"]).write_bytes((strips / row["file_name"]).read_bytes())
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Five pictures of one colour each, each with a text."""
    folder, rows = tmp_path_factory.mktemp("pictures"), []
    for number, text in enumerate(TEXTS):
        Image.new("RGB", (SIDE, SIDE), (50 * number, 90, 250 - 50 * number)).save(folder / f"{number}.png")
        rows.append({"file_name": f"{number}.png", "captions": [text]})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize("joint", [False, True])
def test_retrieval_leaves_what_it_was_scored_with(options, tmp_path, captioned, pictures, joint):
    beside = {"image_data": pictures, "image_share": 0.5, "epochs": 2} if joint else {"epochs": 1}
    scores = train_video_retrieval.main(options(data=captioned, batch_size=2, **beside))
    best = tmp_path / "run" / "best"
    model = FlorenceForVideoTextRetrieval.from_pretrained(best)
    processor, tokenizer = FlorenceVideoProcessor.from_pretrained(best), FlorenceTokenizer.from_pretrained(best)
    assert evaluate_video_retrieval(model, processor, tokenizer, read_filmstrips(captioned, "valid")) == scores
    if not joint:  # else the best epoch need not be the last
        assert json.loads((best / "scores.json").read_text()) == {"step": 1, **scores}


def test_what_has_no_text_is_described_by_its_class(strips):
    held_out = train_video_retrieval.with_texts(read_filmstrips(strips, "valid"))
    assert [clip.texts for clip in held_out] == [(TEXTS[2],), ("up",), (TEXTS[3],), ("up",)]
    with pytest.raises(ValueError, match="x: expected a text or a class, got neither"):
        train_video_retrieval.with_texts([Clip(Path("x"), "x")])


def test_zero_shot_is_scored_without_training(options, captioned):
    settings = {"data": captioned, "epochs": 0}
    scores = train_video_retrieval.main(options(**settings))
    arguments = parse_arguments(train_video_retrieval.RetrievalArguments, options(**settings))
    tokenizer, processor = tiny_tokenizer(), video_recipes.make_processor(arguments, SIDE)
    model = train_video_retrieval.build_model(arguments, tokenizer)
    assert scores == evaluate_video_retrieval(model, processor, tokenizer, read_filmstrips(captioned, "valid"))
    assert (scores["clips"], scores["texts"]) == (2, 2)


def test_the_loss_is_unicl_over_triplets(options, strips):
    arguments = parse_arguments(train_video_retrieval.RetrievalArguments, options(batch_size=6))
    model = train_video_retrieval.build_model(arguments, tiny_tokenizer())
    clips = train_video_retrieval.with_texts(read_filmstrips(strips, "train"))
    processor = video_recipes.make_processor(arguments, SIDE)
    batches = train_video_retrieval.Batches(arguments, clips, processor, model, tiny_tokenizer())
    inputs = batches[0]["inputs"]
    texts = [clips[row].texts[0] for row in batches.rows(0)]
    assert inputs["labels"].tolist() == [text_label(text) for text in texts] and len(set(texts)) < 6
    assert inputs["input_ids"].shape == (6, CONTEXT)
    loss, parts = train_video_retrieval.contrast(model, dict(inputs))
    outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
    assert_close(loss, unicl_loss(outputs.video_embeds, outputs.text_embeds, inputs["labels"], outputs.logit_scale))
    assert_close(parts["logit_scale"], outputs.logit_scale)


# -------------------------------------------------------------------------------------------- pictures beside clips


def retrieval_batches(options, **changes: Any) -> train_video_retrieval.Batches:
    """Eight steps of three of the twelve clips, or pictures."""
    given = options(**{"batch_size": 3, "epochs": 2} | changes)
    arguments = parse_arguments(train_video_retrieval.RetrievalArguments, given)
    clips, _ = map(train_video_retrieval.with_texts, video_recipes.read_sets(arguments))
    processor, tokenizer = video_recipes.make_processor(arguments, SIDE), tiny_tokenizer()
    model = train_video_retrieval.build_model(arguments, tokenizer)
    return train_video_retrieval.make_batches(arguments, clips, processor, model, tokenizer)


@pytest.mark.parametrize(
    "first, share, kinds",
    [(0.0, 0.5, "cpcpcpcp"), (0.5, 0.0, "ppppcccc"), (0.5, 0.5, "ppppcpcp"), (0.25, 0.75, "ppcpppcp")],
)
def test_pictures_come_first_and_then_beside_the_clips(options, pictures, first, share, kinds):
    """The four schedules that OmniVL compares are these, and clips alone; each set goes on where it was left."""
    joint = retrieval_batches(options, image_data=pictures, image_first=first, image_share=share)
    clips, steps = retrieval_batches(options), {"c": 0, "p": 0}
    assert len(joint) == len(clips) == len(kinds)
    shown = []
    for step, kind in enumerate(kinds):
        batch, number = joint[step], steps[kind]
        steps[kind] += 1
        if kind == "c":
            expected = clips[number]
            assert batch["names"] == expected["names"]
            assert_close(batch["inputs"], expected["inputs"])
        else:
            assert batch["inputs"]["pixel_values_videos"].shape == (3, 1, 3, SIDE, SIDE)
            files = [Path(name) for name in batch["names"]]
            shown.append([file.name for file in files])
            labels = [text_label(TEXTS[int(file.stem)]) for file in files]
            assert batch["inputs"]["labels"].tolist() == labels
    assert all(len(set(names)) == 3 for names in shown) and len({tuple(names) for names in shown}) > 1


def test_a_picture_is_to_the_inflated_tower_what_it_is_to_the_image_tower(options, pictures, tower):
    batch = retrieval_batches(options, image_data=pictures, image_first=1.0)[0]["inputs"]
    video = FlorenceForVideoTextRetrieval.from_pretrained_image(tower, num_frames=6, temporal_window_size=3)
    image = FlorenceModel.from_pretrained(tower)
    with torch.no_grad():
        found = video.get_video_features(batch["pixel_values_videos"]).pooler_output
        expected = image.get_image_features(batch["pixel_values_videos"][:, 0]).pooler_output
    assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_new_weights_take_the_tokens_of_the_tokenizer(options):
    arguments = parse_arguments(train_video_retrieval.RetrievalArguments, options(size="nano", init_from=""))
    model, tokenizer = train_video_retrieval.build_model(arguments, tiny_tokenizer()), tiny_tokenizer()
    text = model.config.text_config
    assert (text.vocab_size, text.eos_token_id) == (len(tokenizer), tokenizer.eos_token_id)
    assert (model.config.video_config.num_frames, model.config.video_config.embed_dim) == (6, 64)
    assert arguments.rates == {"relative_position_bias_table": 2e-2, "temporal_": 2e-3}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"image_share": 1.5}, "image_share: expected at most 1, got 1.5"),
        ({"image_first": 0.5}, "expected image_data with a part of the steps, got '' with image_first 0.5"),
        ({"image_data": "x"}, "expected image_data with a part of the steps, got 'x' with image_first 0.0"),
    ],
)
def test_schedules_that_cannot_be(options, changes, message):
    with pytest.raises(ValueError, match=message):
        parse_arguments(train_video_retrieval.RetrievalArguments, options(**changes))
