"""The open-set detector's training script on a handful of drawn pictures: boxes and names, or boxes alone."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import pipeline

pytest.importorskip("faster_coco_eval", reason="needs the extra `detection`")

import finetune_open_set
from tests.test_finetune_detection import pictures, tower  # noqa: F401
from tests.test_modeling_florence_zero_shot_detection import registered  # noqa: F401

pytestmark = pytest.mark.usefixtures("registered")
EDGES = ["--shortest_edge", "32", "--longest_edge", "64"]


def command(pictures, tower, output, *more: str) -> list[str]:  # noqa: F811
    shape = ["--hidden_size", "32", "--num_blocks", "1", "--batch_size", "2", "--warmup_steps", "1", *EDGES]
    return ["--data", str(pictures), "--init_from", str(tower), "--output", str(output), *shape, *more]


def test_names_and_boxes(pictures, tower, tmp_path):  # noqa: F811
    scores = finetune_open_set.main(command(pictures, tower, tmp_path, "--epochs", "2", "--learning_rate", "2e-3"))
    assert 0 <= scores["map"] <= 1 and {row["name"] for row in scores["classes"]} == {"green", "red"}
    assert (tmp_path / "predictions.png").is_file() and "green" in (tmp_path / "classes.txt").read_text()
    trained, before = (load_file(folder / "model.safetensors") for folder in (tmp_path / "best", tower))
    assert torch.equal(trained["text_projection.weight"], before["text_projection.weight"])  # texts stay as they are
    name = "vision_model.encoder.stages.0.layers.0.mlp.fc1.weight"
    assert not torch.equal(trained[f"backbone.{name}"], before[name])
    again = finetune_open_set.main(command(pictures, tmp_path / "best", tmp_path / "again", "--epochs", "0"))
    assert again["map"] == pytest.approx(max(scores["map"], again["map"]))
    detector = pipeline("zero-shot-object-detection", model=str(tmp_path / "best"))
    found = detector(str(pictures / "0.png"), candidate_labels=["red", "a blue house"], threshold=0.0)
    assert {row["label"] for row in found} == {"red", "a blue house"}


@pytest.mark.parametrize("naming", ["crop", "region"])
def test_boxes_alone_on_a_frozen_dual_encoder(naming, pictures, tower, tmp_path):  # noqa: F811
    options = ["--naming", naming, "--epochs", "1", "--prompts", "drawings", "--background", "grey, nothing at all"]
    finetune_open_set.main(command(pictures, tower, tmp_path, *options))
    trained, before = (load_file(folder / "model.safetensors") for folder in (tmp_path / "best", tower))
    for name, weight in before.items():
        ours = name.replace("vision_model.norm.", "tower_norm.").replace("vision_model.", "backbone.vision_model.")
        assert torch.equal(trained[ours], weight), name
    assert trained["background_embeds"].norm(dim=-1).tolist() == pytest.approx([1.0, 1.0])


def test_what_does_not_go_together():
    parse = finetune_open_set.OpenSetArguments
    with pytest.raises(ValueError, match="naming: expected one of crop, region, text_head, got 'words'"):
        parse(naming="words")
    with pytest.raises(ValueError, match="prompts: expected one of plain, photos, drawings, got 'none'"):
        parse(prompts="none")
    with pytest.raises(ValueError, match="expected a dual encoder without adapters, got '' and rank 4"):
        parse(lora_rank=4)
