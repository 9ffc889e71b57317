"""The question answering script on a handful of drawn pictures: it learns, resumes, and leaves a working folder."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import pipeline

import finetune_vqa
from tests.tiny_florence import save_tiny
from tests.tiny_fusion import tiny_fusion_config, tiny_fusion_processor
from transformers_florence.data.question_answering import read_questions
from transformers_florence.evaluation.question_answering import evaluate_question_answering
from transformers_florence.modeling_florence_fusion_heads import FlorenceForPreTraining, FlorenceForQuestionAnswering
from transformers_florence.training import arguments as recipe_arguments
from transformers_florence.training.tracking import read_log

parse_arguments = partial(recipe_arguments.parse_arguments, finetune_vqa.VqaArguments)

COLORS = {"red": (220, 0, 0), "green": (0, 200, 0)}
TRAINED, HELD_OUT, BATCH = 8, 4, 4


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> Path:
    """One-coloured pictures with two questions each, one answer too rare for the vocabulary."""
    folder, rows = tmp_path_factory.mktemp("questions"), []
    for number in range(TRAINED + HELD_OUT):
        name = list(COLORS)[number % 2]
        Image.new("RGB", (32, 32), COLORS[name]).save(folder / f"{number}.png")
        notes = [
            {"question": "is it red?", "answer": "yes" if name == "red" else "no", "answer_type": "yes/no"},
            {"question": "which color is it?", "answer": name, "answer_type": "other"},
        ]
        if number == 0:
            notes.append({"question": "what is it?", "answer": "a rare thing"})
        rows.append({"file_name": f"{number}.png", "split": "train" if number < TRAINED else "test", "vqa": notes})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def tower(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tower")
    save_tiny(folder)
    return folder


@pytest.fixture(scope="module")
def options(questions, tower):
    """Arguments of the script for a run of 2 epochs of 2 steps, with changes."""

    def make(output: Path, **changes) -> list[str]:
        values = {
            "data": questions,
            "output": output,
            "init_from": tower,
            "hidden_size": 16,
            "num_layers": 1,
            "num_heads": 2,
            "min_count": 2,
            "epochs": 2,
            "batch_size": BATCH,
            "warmup_steps": 1,
            "learning_rate": 2e-3,
            "head_factor": 5.0,
            "precision": "float32",
            "log_every": 1,
        } | changes
        return [part for name, value in values.items() for part in (f"--{name}", str(value))]

    return make


@pytest.fixture(scope="module")
def run(options, tmp_path_factory):
    """A run in one go: its folder, and its last scores."""
    output = tmp_path_factory.mktemp("run")
    return output, finetune_vqa.main(options(output))


def make_batches(argv: list[str], **ranks) -> finetune_vqa.Batches:
    arguments = parse_arguments(argv)
    train, _ = finetune_vqa.read_sets(arguments)
    numbers = {"red": 0, "green": 1, "yes": 2, "no": 3}
    processor = finetune_vqa.build_processor(arguments, arguments.init_from, train)
    return finetune_vqa.Batches(arguments, train, numbers, processor, 16, **ranks)


def test_what_a_run_leaves(run, questions):
    output, scores = run
    rows = read_log(output / "log.csv")
    assert [row["step"] for row in rows] == ["1", "2", "3", "4"]
    assert [number for number, row in enumerate(rows, start=1) if row.get("accuracy")] == [2, 4]
    assert float(rows[-1]["accuracy"]) == scores["accuracy"]
    assert json.loads((output / "arguments.json").read_text())["answers"] == ["green", "no", "red", "yes"]
    best = json.loads((output / "best" / "scores.json").read_text())
    model = FlorenceForQuestionAnswering.from_pretrained(output / "best")
    processor = finetune_vqa.build_processor(parse_arguments([]), str(output / "best"), [])
    held_out = read_questions(questions, "test")
    again = evaluate_question_answering(model, processor, held_out)
    assert again.accuracy == pytest.approx(best["accuracy"]) and best["questions"] == again.questions == 2 * HELD_OUT
    pipe = pipeline("florence-visual-question-answering", model=str(output / "best"))
    found = pipe(str(questions / "0.png"), "which color is it?", top_k=9)
    assert {answer["answer"] for answer in found} == {"red", "green", "yes", "no"}


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(run, options, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    take = finetune_vqa.Batches.__getitem__

    def end_at_step_3(self, step: int):
        if step == 3:
            raise Killed
        return take(self, step)

    monkeypatch.setattr(finetune_vqa.Batches, "__getitem__", end_at_step_3)
    with pytest.raises(Killed):
        finetune_vqa.main(options(tmp_path))
    monkeypatch.undo()
    finetune_vqa.main(options(tmp_path))
    weights = [load_file(folder / "best" / "model.safetensors") for folder in (run[0], tmp_path)]
    assert_close(weights[1], weights[0], rtol=0, atol=0)


def test_it_learns(options, tmp_path):
    rates = {"learning_rate": 2e-3, "fusion_factor": 1.0, "head_factor": 1.0}
    scores = finetune_vqa.main(options(tmp_path, epochs=30, eval_every=30, hidden_size=32, **rates))
    assert scores["accuracy"] == 1 and scores["accuracy_yes/no"] == 1


def test_batches(options, tmp_path):
    batches = make_batches(options(tmp_path))
    assert len(batches) == 4 and batches.per_epoch == 2
    batch = batches[1]["inputs"]
    rows = batch["image_rows"].tolist()
    assert sorted(set(rows)) == list(range(BATCH)) and len(rows) == len(batch["labels"]) == len(batch["input_ids"])
    for row, text, labels in zip(rows, batch["input_ids"], batch["labels"], strict=True):
        red = batch["pixel_values"][row, 0].mean() > batch["pixel_values"][row, 1].mean()
        asked = batches.processor.tokenizer.decode(text, skip_special_tokens=True).replace(
            " ", ""
        )  # cut, in a tiny one
        answers = {"isitred?": [0, 0, red, not red], "whichcolorisit?": [red, not red, 0, 0], "whatisit?": [0] * 4}
        [expected] = [scores for question, scores in answers.items() if question.startswith(asked)]
        assert labels.tolist() == expected
    parts = [make_batches(options(tmp_path), rank=rank, ranks=2)[1]["inputs"] for rank in range(2)]
    assert_close(torch.cat([part["pixel_values"] for part in parts]), batch["pixel_values"])
    assert_close(torch.cat([part["labels"] for part in parts]), batch["labels"])


def test_fewer_questions_and_mirrored_pictures(options, tmp_path):
    [batch] = {tuple(make_batches(options(tmp_path, max_questions=1))[0]["inputs"]["image_rows"].tolist())}
    assert batch == (0, 1, 2, 3)
    plain, mirrored = (make_batches(options(tmp_path, flip=flip)).sample(0)[0] for flip in (0.0, 1.0))
    assert_close(mirrored, plain.flip(-1))
    big = make_batches(options(tmp_path, image_size=48)).sample(0)[0]
    assert big.shape == (3, 48, 48)


def test_models_from_checkpoints_with_a_fusion(tmp_path):
    """A pretrained fusion gets a new classifier; one with answers keeps its own, and takes no others."""
    pretrained = FlorenceForPreTraining(tiny_fusion_config())
    pretrained.save_pretrained(tmp_path / "pretrained")
    arguments = parse_arguments([])
    model = finetune_vqa.build_model(arguments, str(tmp_path / "pretrained"), ["red", "blue", "pink"])
    assert_close(model.model.state_dict(), pretrained.model.state_dict())
    assert model.classifier[-1].out_features == 3 and model.config.id2label == {0: "red", 1: "blue", 2: "pink"}
    model.save_pretrained(tmp_path / "answers")
    again = finetune_vqa.build_model(arguments, str(tmp_path / "answers"), ["red", "blue", "pink"])
    assert_close(again.state_dict(), model.state_dict())
    with pytest.raises(ValueError, match="expected the answers of .*, got"):
        finetune_vqa.build_model(arguments, str(tmp_path / "answers"), ["red", "blue"])


def test_another_text_encoder_and_a_frozen_tower(tower, tmp_path):
    text = FlorenceForQuestionAnswering(tiny_fusion_config()).model.text_model
    text.save_pretrained(tmp_path)
    tiny_fusion_processor().tokenizer.save_pretrained(tmp_path)
    arguments = parse_arguments(["--text", str(tmp_path), "--num_heads", "4", "--freeze_vision", "true"])
    model = finetune_vqa.build_model(arguments, str(tower), ["yes", "no"])
    assert_close(model.model.text_model.state_dict(), text.state_dict())
    assert not any(weight.requires_grad for weight in model.image_tower.parameters())
    assert finetune_vqa.build_processor(arguments, str(tower), []).tokenizer.vocab_size == text.config.vocab_size


def test_a_text_encoder_of_its_own(options, tower, tmp_path):
    """Its tokenizer knows the questions' words as single tokens; it is as wide as the fusion, and not causal."""
    arguments = parse_arguments(options(tmp_path, vocab_size=526, text_layers=1))
    train, _ = finetune_vqa.read_sets(arguments)
    processor = finetune_vqa.build_processor(arguments, str(tower), train)
    assert len(processor.tokenizer) == 526 and "which</w>" in processor.tokenizer.tokenize("which color is it?")
    config = finetune_vqa.build_model(arguments, str(tower), ["yes", "no"]).config.text_config
    assert (config.vocab_size, config.hidden_size, config.num_hidden_layers, config.causal) == (526, 16, 1, False)


def test_what_is_refused(options, tmp_path, questions):
    with pytest.raises(ValueError, match="flip: expected a part of at most 1, got 2"):
        parse_arguments(["--flip", "2"])
    with pytest.raises(ValueError, match="expected text or vocab_size, got both, 'bert' and 600"):
        parse_arguments(["--text", "bert", "--vocab_size", "600"])
    rows = [json.loads(line) for line in (questions / "metadata.jsonl").read_text().splitlines()]
    del rows[-1]["vqa"][0]["answer"]
    file = questions / "unknown.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match="eval_data: expected the answers of all questions"):
        finetune_vqa.main(options(tmp_path, eval_data=file))
    with pytest.raises(ValueError, match="expected answers that occur at least 99 times, got none above 4"):
        finetune_vqa.main(options(tmp_path, min_count=99))
