"""Fine-tuning for classes: by names and with a new layer, with adapters, between models, and with a guard."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

import finetune_classification
from finetune_setup import ADAPTERS
from tests.tiny_florence import save_tiny
from tests.tiny_sets import write_color_set
from transformers_florence import FlorenceForImageClassification, FlorenceModel, FlorenceProcessor
from transformers_florence.data.image_sets import read_image_set
from transformers_florence.evaluation.results import load_results
from transformers_florence.training import arguments as recipe_arguments


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_tiny(folder)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_color_set(tmp_path_factory.mktemp("pictures") / "colors")


@pytest.fixture
def options(checkpoint, pictures, tmp_path):
    def build(*lists: str, **changes) -> list[str]:
        values = {"data": pictures, "eval_split": "test", "model": checkpoint, "output": tmp_path / "run"}
        values |= {"results": tmp_path / "results", "epochs": 2, "batch_size": 8, "learning_rate": 3e-3}
        values |= {"warmup_steps": 1, "precision": "float32", "report_to": "none"}
        return [part for name, value in (values | changes).items() for part in (f"--{name}", str(value))] + [*lists]

    return build


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_colours_are_learnt_by_their_names(options, checkpoint, tmp_path):
    argv = options("--wise_parts", "0.5", "0", "1", epochs=3, guard_data=tmp_path / "guard")
    write_color_set(tmp_path / "guard", side=20)
    found = finetune_classification.main(argv)
    assert found.metrics["accuracy"] == 1.0 > found.metrics["accuracy_before"]
    assert found.metrics["guard_accuracy"] > found.metrics["guard_accuracy_before"]  # the same classes, here
    assert load_results(tmp_path / "results") == [found]
    before, best = weights_of(checkpoint), weights_of(tmp_path / "run" / "best")
    for part, wanted in (("0", before), ("1", best)):
        between = weights_of(tmp_path / "run" / f"wise-{part}")
        assert all(torch.equal(between[name], wanted[name]) for name in wanted)
    middle = weights_of(tmp_path / "run" / "wise-0.5")
    assert_close(middle["logit_scale"], (before["logit_scale"] + best["logit_scale"]) / 2)
    scores = json.loads((tmp_path / "run" / "wise.json").read_text())
    assert scores["0"]["accuracy"] == found.metrics["accuracy_before"] and scores["1"]["accuracy"] == 1.0
    assert found.metrics["wise_0.5_accuracy"] == scores["0.5"]["accuracy"]
    FlorenceModel.from_pretrained(tmp_path / "run" / "wise-0.5")
    FlorenceProcessor.from_pretrained(tmp_path / "run" / "wise-0.5")


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_adapters_are_all_that_is_trained_and_are_merged(options, checkpoint, tmp_path, monkeypatch, adapter):
    drawn = []
    monkeypatch.setattr(finetune_classification, "save_beside", lambda file, **figures: drawn.extend(figures.values()))
    found = finetune_classification.main(options(lora_rank=2, epochs=1, adapter=adapter))
    before, after = weights_of(checkpoint), weights_of(tmp_path / "run" / "best")
    assert before.keys() == after.keys()
    moved = {name.rsplit(".", 2)[1] for name in before if not torch.equal(before[name], after[name])}
    scaled = {"k_proj", "v_proj", "fc2"}
    assert moved == (scaled if adapter == "ia3" else scaled | {"q_proj", "out_proj", "fc1"})
    (figure,) = drawn
    assert figure.axes[0].get_title() == f"{round(15 * found.metrics['accuracy'])} of 15 pictures right"
    whole = sum(weight.numel() for weight in before.values())
    assert 0 < found.metrics["trained_parameters"] < whole / 2


def test_a_new_layer_that_begins_as_a_probe(options, tmp_path):
    argv = options(head="linear", probe_first=True, learning_rate=1e-6, epochs=1, guard_data=tmp_path / "guard")
    write_color_set(tmp_path / "guard", side=20)
    found = finetune_classification.main(argv)
    assert found.metrics["accuracy"] == 1.0  # of the probe: the rate moves nothing
    assert found.metrics["guard_accuracy"] == found.metrics["guard_accuracy_before"]
    assert [file.name.split(".", 1)[1] for file in sorted((tmp_path / "results").iterdir())] == [
        "confusion.png",
        "json",
    ]
    model = FlorenceForImageClassification.from_pretrained(tmp_path / "run" / "best")
    assert list(model.config.id2label.values()) == ["red bicycle", "green street", "house"]


def test_a_new_layer_with_mixed_pictures_and_adapters(options, tmp_path):
    changes = {"mixup": 0.2, "cutmix": 1.0, "label_smoothing": 0.1, "lora_rank": 2, "ema_decay": 0.5}
    found = finetune_classification.main(options(head="linear", epochs=5, learning_rate=1e-2, **changes))
    assert found.metrics["accuracy"] > 0.6 and "guard_accuracy" not in found.metrics
    FlorenceForImageClassification.from_pretrained(tmp_path / "run" / "best")


def batches_of(argv: list[str], **ranks) -> finetune_classification.Batches:
    arguments = recipe_arguments.parse_arguments(finetune_classification.ClassificationArguments, argv)
    model, processor = arguments.load()
    pictures = read_image_set(arguments.data, "train")
    return finetune_classification.Batches(arguments, pictures, model, processor, **ranks)


def test_names_stand_in_templates_drawn_anew(options):
    batches = batches_of(options(templates="drawing"))
    samples = [sample for step in range(len(batches)) for sample in batches.samples(step)]
    texts = {text for _, text, _ in samples}
    assert len(texts) > 20 and all(name in text for _, text, label in samples for name in [batches.names[label]])
    inputs = batches[0]["inputs"]
    assert inputs["labels"].tolist() == [label for _, _, label in batches.samples(0)]
    assert inputs["pixel_values"].shape == (8, 3, 32, 32) and inputs["input_ids"].shape[0] == 8
    again = batches_of(options(templates="drawing"))[0]["inputs"]
    assert all(torch.equal(again[name], inputs[name]) for name in inputs)


def test_mixed_batches_depend_on_the_step_alone(options):
    argv = options(head="linear", mixup=1.0, cutmix=1.0)
    batches, again, plain = batches_of(argv), batches_of(argv), batches_of(options(head="linear"))
    kinds = set()
    for step in range(len(batches)):
        mixed, pixels = batches[step]["inputs"], plain[step]["inputs"]["pixel_values"]
        assert torch.equal(again[step]["inputs"]["pixel_values"], mixed["pixel_values"])
        assert_close(mixed["targets"].sum(dim=1), torch.ones(8))
        rolled = pixels.roll(1, dims=0)
        same = (mixed["pixel_values"] == pixels) | (mixed["pixel_values"] == rolled)
        kinds.add("cutmix" if same.all() else "mixup")
    assert kinds == {"cutmix", "mixup"}


def test_unreadable_pictures_are_left_out_and_told(options, tmp_path, capsys):
    folder = write_color_set(tmp_path / "broken")
    (folder / "train_1_2.png").write_bytes(b"no picture")
    finetune_classification.main(options(data=folder, epochs=1))
    assert "broken: left out 1 of 24 pictures, unreadable" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head": "cosine"}, "head: expected one of names, linear, got 'cosine'"),
        ({"mixup": 0.2}, "expected head 'linear' with mixup, got 'names'"),
        ({"probe_first": True, "label_smoothing": 0.1}, "expected head 'linear' with probe_first, label_smoothing"),
        ({"min_scale": 0.0}, "min_scale: expected a number above 0"),
        ({"eval_split": "valid"}, "expected rows of the split 'valid'"),
    ],
)
def test_arguments_that_are_refused(options, changes, message):
    with pytest.raises(ValueError, match=message):
        finetune_classification.main(options(**changes))


def test_parts_between_models_are_checked(options):
    with pytest.raises(ValueError, match=r"wise_parts: expected numbers from 0 to 1, got \[1.5\]"):
        finetune_classification.main(options("--wise_parts", "1.5"))
    with pytest.raises(ValueError, match="wise_parts: expected head 'names'"):
        finetune_classification.main(options("--wise_parts", "0.5", head="linear"))


def test_a_class_without_pictures_is_refused(options, tmp_path):
    folder = write_color_set(tmp_path / "colors")
    rows = [line for line in (folder / "metadata.jsonl").read_text().splitlines() if "train_2" not in line]
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    with pytest.raises(ValueError, match=r"expected pictures of every class, got none of \['house'\]"):
        finetune_classification.main(options(data=folder))
