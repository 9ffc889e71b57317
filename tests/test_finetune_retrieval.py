"""Fine-tuning for retrieval: the scores are the saved model's, and each picture gets its captions in turn."""

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import CLIPProcessor

import finetune_retrieval
from tests.tiny_clip import tiny_clip, tiny_clip_image_processor
from tests.tiny_florence import save_tiny
from tests.tiny_sets import write_color_set
from transformers_florence import FlorenceModel, FlorenceProcessor
from transformers_florence.data.captions import read_captions
from transformers_florence.losses_contrastive import unicl_loss
from transformers_florence.training import arguments as recipe_arguments
from transformers_florence.training.recipe import loss_of_model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_tiny(folder)
    return folder


@pytest.fixture
def options(checkpoint, tmp_path):
    def build(**changes) -> list[str]:
        values = {"data": write_color_set(tmp_path / "colors"), "model": checkpoint, "output": tmp_path / "run"}
        values |= {"results": tmp_path / "results", "epochs": 2, "batch_size": 8, "learning_rate": 3e-3}
        values |= {"warmup_steps": 1, "precision": "float32", "report_to": "none"}
        return [part for name, value in (values | changes).items() for part in (f"--{name}", str(value))]

    return build


def test_the_result_is_that_of_the_saved_model(options, tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(finetune_retrieval, "save_beside", lambda file, **figures: drawn.update(figures))
    found = finetune_retrieval.main(options(epochs=3))
    model = FlorenceModel.from_pretrained(tmp_path / "run" / "best").eval()
    processor = FlorenceProcessor.from_pretrained(tmp_path / "run" / "best")
    scores = finetune_retrieval.score(model, processor, read_captions(tmp_path / "colors", "test"))
    assert {name: found.metrics[name] for name in scores} == pytest.approx(scores)
    assert found.metrics["recall_sum"] > found.metrics["recall_sum_before"]
    assert (found.metrics["pictures"], found.metrics["texts"]) == (15, 45)
    assert found.settings["epochs"] == 3 and "results" not in found.settings
    for curve in drawn["recall"].axes[0].lines:
        asked, when = curve.get_label().split(" (")[0].split(", ")
        key = {"picture to text": "image_to_text", "text to picture": "text_to_image"}[asked]
        recalls = [found.metrics[f"{key}_recall_{k}" + {"before": "_before", "after": ""}[when]] for k in (1, 5, 10)]
        assert [curve.get_ydata()[k - 1] for k in (1, 5, 10)] == pytest.approx(recalls)


def test_a_model_is_scored_without_training(options, tmp_path, checkpoint):
    found = finetune_retrieval.main(options(evaluate_only=True))
    assert found.task == "retrieval" and not (tmp_path / "run" / "best").exists()
    written = sorted(file.name.split(".", 1) for file in (tmp_path / "results").iterdir())
    assert written[0][0] == written[1][0] and [written[0][1], written[1][1]] == ["json", "recall.png"]
    trained = finetune_retrieval.main(options(lora_rank=2, epochs=1))
    assert trained.metrics["recall_sum_before"] == found.metrics["recall_sum"]
    before, after = (load_file(path / "model.safetensors") for path in (checkpoint, tmp_path / "run" / "best"))
    moved = {name.rsplit(".", 2)[1] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}


def test_transformers_own_clip_is_scored(options, tmp_path):
    model, tokenizer = tiny_clip()
    model.save_pretrained(tmp_path / "clip")
    processor = CLIPProcessor(tiny_clip_image_processor(), tokenizer)
    processor.save_pretrained(tmp_path / "clip")
    found = finetune_retrieval.main(options(model=tmp_path / "clip", evaluate_only=True))
    wanted = finetune_retrieval.score(model, processor, read_captions(tmp_path / "colors", "test"))
    assert dict(found.metrics) == pytest.approx(wanted) and found.model == "clip"


def test_captions_are_drawn_anew_and_equal_ones_are_positives(options, tmp_path):
    argv = options(epochs=6)
    arguments = recipe_arguments.parse_arguments(finetune_retrieval.RetrievalArguments, argv)
    model, processor = arguments.load()
    pictures = read_captions(tmp_path / "colors", "train")
    batches = finetune_retrieval.Batches(arguments, pictures, processor)
    drawn = {picture.file.name: set() for picture in pictures}
    for step in range(len(batches)):
        captions = [caption for _, caption in batches.samples(step)]
        for name, caption in zip(batches[step]["names"], captions, strict=True):
            drawn[name].add(caption)
        labels = batches[step]["inputs"]["labels"]
        same = torch.tensor([[one == other for other in captions] for one in captions])
        assert torch.equal(labels[:, None] == labels, same)
    assert all(drawn[picture.file.name] <= set(picture.captions) for picture in pictures)
    assert sum(len(captions) > 1 for captions in drawn.values()) > len(pictures) / 2
    inputs = batches[0]["inputs"]
    with torch.no_grad():
        loss, _ = loss_of_model(model, inputs)
        outputs = model(**inputs)
    wanted = unicl_loss(
        outputs.image_embeds, outputs.text_embeds, inputs["labels"], outputs.logit_scale, model.config.loss_reduction
    )
    assert_close(loss, wanted)


def test_unreadable_pictures_are_left_out_with_their_captions(options, tmp_path, capsys):
    argv = options(evaluate_only=True)
    (tmp_path / "colors" / "test_1_1.png").write_bytes(b"no picture")
    found = finetune_retrieval.main(argv)
    assert (found.metrics["pictures"], found.metrics["texts"]) == (14, 42)
    assert "left out 1 of 15 pictures, unreadable" in capsys.readouterr().out
