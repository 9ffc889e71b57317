"""The captioning script on drawn pictures: it learns, resumes, and leaves a working folder and captions to look at."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import pipeline

pytest.importorskip(
    "pycocoevalcap.cider.cider", reason="needs the extra `captioning`: pip install 'transformers_florence[captioning]'"
)

import finetune_captioning
from tests.tiny_florence import save_tiny
from tests.tiny_fusion import tiny_fusion_config
from transformers_florence import FlorenceTokenizer
from transformers_florence.losses_fusion import IGNORED_TOKEN
from transformers_florence.modeling_florence_captioning import FlorenceForImageCaptioning
from transformers_florence.modeling_florence_fusion_heads import FlorenceForPreTraining
from transformers_florence.training import arguments as recipe_arguments
from transformers_florence.training.tracking import read_log

parse_arguments = partial(recipe_arguments.parse_arguments, finetune_captioning.CaptioningArguments)

COLORS = ("red", "green")
TRAINED, HELD_OUT, BATCH = 8, 4, 4


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder, rows = tmp_path_factory.mktemp("pictures"), []
    for number in range(TRAINED + HELD_OUT):
        name = COLORS[number % 2]
        Image.new("RGB", (32, 32), name).save(folder / f"{number}.png")
        split = "train" if number < TRAINED else "dev"
        rows.append({"file_name": f"{number}.png", "split": split, "captions": [f"it is {name} now"]})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def tower(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tower")
    save_tiny(folder)
    return folder


@pytest.fixture(scope="module")
def options(pictures, tower):
    """Arguments of the script for a run of 2 epochs of 2 steps, with changes."""

    def make(output: Path, **changes) -> list[str]:
        values = {
            "data": pictures,
            "output": output,
            "init_from": tower,
            "vocab_size": 520,
            "max_tokens": 12,
            "hidden_size": 32,
            "num_layers": 1,
            "num_heads": 4,
            "dropout": 0.0,
            "epochs": 2,
            "batch_size": BATCH,
            "warmup_steps": 1,
            "learning_rate": 3e-3,
            "num_beams": 1,
            "precision": "float32",
            "log_every": 1,
        } | changes
        return [part for name, value in values.items() for part in (f"--{name}", str(value))]

    return make


@pytest.fixture(scope="module")
def run(options, tmp_path_factory):
    """A run in one go: its folder, and its last scores."""
    output = tmp_path_factory.mktemp("run")
    return output, finetune_captioning.main(options(output))


def test_what_a_run_leaves(run, pictures):
    output, scores = run
    rows = read_log(output / "log.csv")
    assert [number for number, row in enumerate(rows, start=1) if row.get("cider")] == [2, 4]
    captions = json.loads((output / "captions.json").read_text())
    assert [row["file"] for row in captions] == [f"{number}.png" for number in range(TRAINED, TRAINED + HELD_OUT)]
    assert captions[0]["people"] == ["it is red now"] and scores["pictures"] == HELD_OUT
    best = output / "best"
    model, tokenizer = FlorenceForImageCaptioning.from_pretrained(best), FlorenceTokenizer.from_pretrained(best)
    assert model.config.vocab_size == len(tokenizer) == 520 and model.config.eos_token_id == tokenizer.eos_token_id
    pipe = pipeline("image-text-to-text", model=str(best))
    assert pipe(str(pictures / "0.png"), text="it is", generate_kwargs={"max_new_tokens": 2})[0]["generated_text"]


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(run, options, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    take = finetune_captioning.Batches.__getitem__

    def end_at_step_3(self, step: int):
        if step == 3:
            raise Killed
        return take(self, step)

    monkeypatch.setattr(finetune_captioning.Batches, "__getitem__", end_at_step_3)
    with pytest.raises(Killed):
        finetune_captioning.main(options(tmp_path))
    monkeypatch.undo()
    finetune_captioning.main(options(tmp_path))
    files = [folder / "checkpoint-4" / "model.safetensors" for folder in (run[0], tmp_path)]
    assert_close(load_file(files[1]), load_file(files[0]), rtol=0, atol=0)


def test_it_learns(options, tmp_path):
    """Two captions, told apart by one word: both right is CIDEr's best for them."""
    scores = finetune_captioning.main(options(tmp_path, epochs=20, eval_every=20, learning_rate=8e-3))
    captions = json.loads((tmp_path / "captions.json").read_text())
    assert [row["caption"] for row in captions] == [row["people"][0] for row in captions]
    assert scores["bleu_4"] == pytest.approx(1, abs=1e-6)


def test_batches(options, tmp_path):
    arguments = parse_arguments(options(tmp_path, flip=1.0, image_size=48))
    train, _ = finetune_captioning.read_sets(arguments)
    processor = finetune_captioning.build_processor(arguments, arguments.init_from, train)
    batches = finetune_captioning.Batches(arguments, train, processor, 12)
    batch = batches[1]["inputs"]
    assert batch["pixel_values"].shape == (BATCH, 3, 48, 48)
    kept = batch["attention_mask"] == 1
    assert (batch["labels"][kept] == batch["input_ids"][kept]).all()
    assert (batch["labels"][~kept] == IGNORED_TOKEN).all() and not kept.all()
    for pixels, text in zip(batch["pixel_values"], batch["input_ids"], strict=True):
        name = COLORS[int(pixels[1].mean() > pixels[0].mean())]
        assert processor.tokenizer.decode(text, skip_special_tokens=True).strip() == f"it is {name} now"
    plain = finetune_captioning.Batches(parse_arguments(options(tmp_path, flip=0.0)), train, processor, 12)
    assert_close(batches.sample(0)[0], plain.sample(0)[0].flip(-1))


def test_where_a_model_comes_from(tower, tmp_path):
    """A captioning model goes on; a pretrained fusion brings its decoder; another vocabulary is refused."""
    pretrained = FlorenceForPreTraining(tiny_fusion_config(num_decoder_layers=1))
    pretrained.save_pretrained(tmp_path / "fusion")
    arguments = parse_arguments(["--freeze_vision", "true"])
    tokenizer = FlorenceTokenizer.train_new(["a red car", "a green car"], vocab_size=514)
    with pytest.raises(ValueError, match="expected a tokenizer of 261 tokens, got 514"):
        finetune_captioning.build_model(arguments, str(tmp_path / "fusion"), tokenizer)
    new = finetune_captioning.build_model(arguments, str(tower), tokenizer)
    assert new.config.vocab_size == 514 and new.config.max_position_embeddings == 40
    assert not any(weight.requires_grad for weight in new.vision_model.parameters())
    new.save_pretrained(tmp_path / "captions")
    again = finetune_captioning.build_model(arguments, str(tmp_path / "captions"), tokenizer)
    assert_close(again.state_dict(), new.state_dict(), rtol=0, atol=0)
    decoder = FlorenceForImageCaptioning.from_pretraining(tmp_path / "fusion").decoder
    assert torch.equal(decoder.word_embeddings.weight, pretrained.decoder.word_embeddings.weight)
    with pytest.raises(ValueError, match="flip: expected a part of at most 1, got 3"):
        parse_arguments(["--flip", "3"])
