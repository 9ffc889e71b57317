"""Two towers on equal terms: as many parameters, the same batches, each its own loss, and steps that fit the time."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch.testing import assert_close
from transformers import AutoConfig, AutoModel, CLIPModel, CLIPTextModel

import evaluate_zero_shot
import train_peers
from tests.tiny_clip import tiny_clip
from tests.tiny_florence import random_pixels, save_tiny, tiny_model, tiny_processor
from tests.tiny_sets import COLORS, write_color_set
from transformers_florence import FlorenceModel, FlorenceTextModel, bundled_checkpoint
from transformers_florence.losses_contrastive import unicl_loss
from transformers_florence.training import arguments as recipe_arguments


@pytest.fixture
def options(tmp_path, monkeypatch):
    save_tiny(tmp_path / "tiny")
    monkeypatch.setattr(train_peers, "bundled_checkpoint", lambda: str(tmp_path / "tiny"))
    colors = str(write_color_set(tmp_path / "colors"))

    def build(**changes) -> list[str]:
        values = {"output": tmp_path / "run", "batch_size": 8, "warmup_steps": 1, "precision": "float32"}
        values |= {"report_to": "none", "seconds": 1, "captions": colors, "labels": colors}
        return [part for name, value in (values | changes).items() for part in (f"--{name}", str(value))]

    return build


def shapes_of(file: Path) -> list[list[int]]:
    """Of all tensors in a safetensors file."""
    with safe_open(file, "pt") as weights:
        return [weights.get_slice(name).get_shape() for name in weights.keys()]  # noqa: SIM118


def test_the_peer_has_as_many_parameters_and_the_same_text_tower():
    config = AutoConfig.from_pretrained(bundled_checkpoint())
    peer = train_peers.peer_config(config)
    ours = train_peers.number_of_parameters(FlorenceModel, config)
    assert ours == sum(math.prod(shape) for shape in shapes_of(Path(bundled_checkpoint()) / "model.safetensors"))
    assert train_peers.number_of_parameters(CLIPModel, peer) / ours == pytest.approx(1, abs=0.03)
    texts = (FlorenceTextModel, config.text_config), (CLIPTextModel, peer.text_config)
    assert len({train_peers.number_of_parameters(kind, own) for kind, own in texts}) == 1


@pytest.mark.parametrize("tower", ["coswin", "vit"])
def test_a_run_has_as_many_steps_as_the_time_allows_and_its_model_is_evaluated(options, tower, tmp_path, monkeypatch):
    monkeypatch.setattr(train_peers, "steps_within", lambda *of: 3)
    best = train_peers.main(options(tower=tower))
    assert json.loads((tmp_path / "run" / "steps.json").read_text()) == 3
    assert json.loads((best / "scores.json").read_text())["step"] == 3
    model = AutoModel.from_pretrained(best)
    assert isinstance(model, FlorenceModel if tower == "coswin" else CLIPModel)
    argv = [
        "--data",
        str(tmp_path / "colors"),
        "--model",
        str(best),
        "--output",
        str(tmp_path),
        "--templates",
        "plain",
    ]
    assert evaluate_zero_shot.main(argv)[0].metrics["pictures"] == 15


def test_steps_are_counted_by_the_clock(options, monkeypatch):
    arguments = recipe_arguments.parse_arguments(train_peers.PeerArguments, options())
    batches, model = train_peers.Mixture(arguments, tiny_processor()), tiny_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    now = iter([100.0, 112.0])  # six steps in twelve seconds
    monkeypatch.setattr(train_peers.time, "monotonic", lambda: next(now))
    assert train_peers.steps_within(model, batches, 60.0, torch.device("cpu")) == 30
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(weight.grad is None for weight in model.parameters())


def test_the_mixture_has_captions_and_names_in_templates(options):
    arguments = recipe_arguments.parse_arguments(train_peers.PeerArguments, options())
    batches = train_peers.Mixture(arguments, tiny_processor())
    assert batches.count == 48 and len(batches) == 6
    texts = [text for step in range(len(batches)) for _, text, _ in batches.samples(step)]
    assert sum("drawing" in text or text.startswith("the same") for text in texts) > 5  # captions as they are
    assert len({text for text in texts if any(name in text for name in COLORS)}) > 20  # names in many templates
    labels = {label for step in range(len(batches)) for _, text, label in batches.samples(step)}
    assert len(labels) < len(set(texts)), "a name means the same in every template"
    again = train_peers.Mixture(arguments, tiny_processor())
    one, other = batches[2]["inputs"], again[2]["inputs"]
    assert all(torch.equal(one[name], other[name]) for name in one)


@torch.no_grad()
def test_each_tower_has_its_own_loss():
    ids = tiny_processor().tokenizer(["a cat", "a dog", "a cat", "a house"], padding=True, return_tensors="pt")
    inputs = {"pixel_values": random_pixels(4), **ids, "labels": torch.tensor([5, 6, 5, 7])}
    ours, peer = tiny_model(), tiny_clip()[0]
    outputs = ours(pixel_values=inputs["pixel_values"], **ids)
    wanted = unicl_loss(
        outputs.image_embeds, outputs.text_embeds, inputs["labels"], outputs.logit_scale, ours.config.loss_reduction
    )
    assert_close(train_peers.contrastive_loss(ours, inputs)[0], wanted)
    logits = peer(pixel_values=inputs["pixel_values"], **ids).logits_per_text
    both = [torch.nn.functional.cross_entropy(side, torch.arange(4)) for side in (logits, logits.T)]
    assert_close(train_peers.contrastive_loss(peer, inputs)[0], sum(both) / 2)


def test_arguments_that_are_refused(options):
    with pytest.raises(ValueError, match="tower: expected one of coswin, vit, got 'resnet'"):
        train_peers.main(options(tower="resnet"))
    with pytest.raises(ValueError, match="expected sets of pictures in captions, labels or both, got none"):
        train_peers.PeerArguments()
    assert train_peers.PeerArguments(labels=["x"], tower="vit", seed=3).output == "runs/vit-3"
