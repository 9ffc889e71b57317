"""The fusion's pretraining script on drawn pictures: masking, hard pairs, losses, resumption, what goes on from it."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.testing import assert_close

import finetune_vqa
import pretrain_fusion
from tests.tiny_florence import save_tiny
from tests.tiny_fusion import tiny_roberta_tokenizer
from transformers_florence import FlorenceModel, FlorenceTokenizer
from transformers_florence.losses_fusion import IGNORED_TOKEN
from transformers_florence.modeling_florence_captioning import FlorenceForImageCaptioning
from transformers_florence.training import arguments as recipe_arguments
from transformers_florence.training.tracking import read_log

parse_arguments = partial(recipe_arguments.parse_arguments, pretrain_fusion.FusionArguments)

COLORS = ("red", "green", "blue", "white")
TRAINED, HELD_OUT, BATCH = 8, 4, 4


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder, rows = tmp_path_factory.mktemp("pictures"), []
    for number in range(TRAINED + HELD_OUT):
        name = COLORS[number % len(COLORS)]
        Image.new("RGB", (32, 32), name).save(folder / f"{number}.png")
        split = "train" if number < TRAINED else "dev"
        rows.append({"file_name": f"{number}.png", "split": split, "captions": [name, f"all {name}"]})
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
            "hidden_size": 16,
            "num_layers": 1,
            "num_heads": 2,
            "num_decoder_layers": 1,
            "masked": 0.4,
            "epochs": 2,
            "batch_size": BATCH,
            "eval_batches": 1,
            "warmup_steps": 1,
            "precision": "float32",
            "log_every": 1,
        } | changes
        return [part for name, value in values.items() for part in (f"--{name}", str(value))]

    return make


@pytest.fixture(scope="module")
def run(options, tmp_path_factory):
    """A run in one go: its folder, and its last scores."""
    output = tmp_path_factory.mktemp("run")
    return output, pretrain_fusion.main(options(output))


def make_batches(argv: list[str], tokenizer=None, **ranks) -> pretrain_fusion.Batches:
    arguments = parse_arguments(argv)
    own = FlorenceTokenizer.from_pretrained(arguments.init_from)
    processor = pretrain_fusion.FlorenceProcessor(
        pretrain_fusion.FlorenceImageProcessor.from_pretrained(arguments.init_from), tokenizer or own
    )
    train = pretrain_fusion.read_captions(arguments.data, "train")
    return pretrain_fusion.Batches(arguments, train, processor, own, 16, **ranks)


def test_what_a_run_leaves(run):
    output, scores = run
    rows = read_log(output / "log.csv")
    assert [row["step"] for row in rows] == ["1", "2", "3", "4"]
    for row in rows:
        parts = sum(float(row[name]) for name in ("itm_loss", "mlm_loss", "caption_loss"))
        assert float(row["loss"]) == pytest.approx(parts, abs=3e-4)
    names = ["caption_loss", "itm_accuracy", "itm_loss", "mlm_accuracy", "mlm_loss"]
    assert sorted(scores) == [f"held_out_{name}" for name in names]
    assert 0 <= scores["held_out_itm_accuracy"] <= 1 and 0 <= scores["held_out_mlm_accuracy"] <= 1
    assert json.loads((output / "best" / "scores.json").read_text()) == {"step": 4, **scores}


def test_the_other_scripts_go_on_from_it(run):
    output, _ = run
    weights = load_file(output / "best" / "model.safetensors")
    model = finetune_vqa.build_model(finetune_vqa.VqaArguments(), str(output / "best"), ["yes", "no"])
    name = "model.fusion.text_layers.0.mlp.fc1.weight"
    assert_close(model.state_dict()[name], weights[name], rtol=0, atol=0)
    captioning = FlorenceForImageCaptioning.from_pretraining(output / "best")
    name = "decoder.layers.0.mlp.fc1.weight"
    assert_close(captioning.state_dict()[name], weights[name], rtol=0, atol=0)


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(run, options, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    take = pretrain_fusion.Batches.__getitem__

    def end_at_step_3(self, step: int):
        if step == 3:
            raise Killed
        return take(self, step)

    monkeypatch.setattr(pretrain_fusion.Batches, "__getitem__", end_at_step_3)
    with pytest.raises(Killed):
        pretrain_fusion.main(options(tmp_path))
    monkeypatch.undo()
    pretrain_fusion.main(options(tmp_path))
    weights = [load_file(folder / "best" / "model.safetensors") for folder in (run[0], tmp_path)]
    assert_close(weights[1], weights[0], rtol=0, atol=0)


def test_batches_with_and_without_a_mask_token(options, tmp_path):
    for tokenizer in (None, tiny_roberta_tokenizer()):
        batches = make_batches(options(tmp_path), tokenizer)
        own, seen = batches.processor.tokenizer, 0
        for step in range(len(batches)):
            batch = batches[step]["inputs"]
            ids, labels, mask = batch["input_ids"], batch["labels"], batch["attention_mask"]
            whole = torch.where(labels == IGNORED_TOKEN, ids, labels)
            captions = own.batch_decode(whole, skip_special_tokens=True)
            assert all(text.strip().removeprefix("all ") in COLORS for text in captions)
            assert (labels[mask == 0] == IGNORED_TOKEN).all() and (ids[mask == 0] == own.pad_token_id).all()
            for special in (own.bos_token_id, own.eos_token_id):
                assert special not in labels
            if tokenizer is not None:
                seen += int((ids == own.mask_token_id).sum())
            guide = batches.guide.batch_decode(batch["guide_ids"], skip_special_tokens=True)
            assert [text.strip() for text in guide] == [text.strip() for text in captions]
        assert tokenizer is None or seen > 5
    again = make_batches(options(tmp_path), tiny_roberta_tokenizer())[1]["inputs"]
    assert_close(again, make_batches(options(tmp_path), tiny_roberta_tokenizer())[1]["inputs"])


@torch.no_grad()
def test_the_guide_is_the_dual_encoder(options, tower, tmp_path):
    batch = make_batches(options(tmp_path))[0]["inputs"]
    guide = FlorenceModel.from_pretrained(tower)
    expected = guide(
        input_ids=batch["guide_ids"], attention_mask=batch["guide_mask"], pixel_values=batch["pixel_values"]
    ).logits_per_image
    got = {}

    def model(**inputs):
        got.update(inputs)

    pretrain_fusion.LossWithGuide(guide).outputs(model, batch)
    assert_close(got.pop("similarities"), expected)
    assert sorted(got) == ["attention_mask", "input_ids", "labels", "pixel_values"]
    pretrain_fusion.LossWithGuide(None).outputs(model, batch)
    assert got["similarities"] is None


def test_what_is_refused():
    with pytest.raises(ValueError, match="masked: expected a part above 0 and below 1, got 1"):
        parse_arguments(["--masked", "1.0"])
    with pytest.raises(ValueError, match="fusion_type: expected one of co_attention, merged_attention, got 'late'"):
        parse_arguments(["--fusion_type", "late"])
