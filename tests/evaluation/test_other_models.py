"""Every evaluating script on transformers' own CLIP and SigLIP: what they say of these is what the models say."""

import json

import pytest
import torch
from PIL import Image

import evaluate_zero_shot
import few_shot
import finetune_retrieval
import linear_probe
from tests.tiny_clip import save_peer
from tests.tiny_sets import write_color_set
from transformers_florence.data.captions import all_captions, read_captions
from transformers_florence.data.image_sets import read_image_set


@pytest.fixture(params=["clip", "siglip"])
def peer(request, tmp_path):
    """The kind of a model, the model, its processor, its folder, and that of a set of pictures."""
    folder = tmp_path / request.param
    return request.param, *save_peer(request.param, folder), folder, write_color_set(tmp_path / "colors")


@pytest.fixture
def options(peer, tmp_path):
    def build(**changes) -> list[str]:
        values = {"data": peer[4], "model": peer[3], "output": tmp_path / "results"} | changes
        return [part for name, value in values.items() for part in (f"--{name}", str(value))]

    return build


@torch.no_grad()
def logits_of_the_model(peer, files, texts) -> torch.Tensor:
    """(pictures, texts), in one call of the model itself. SigLIP has always seen texts padded to its context."""
    kind, model, processor = peer[:3]
    padding = "max_length" if kind == "siglip" else True
    pictures = [Image.open(file) for file in files]
    inputs = processor(images=pictures, text=texts, return_tensors="pt", padding=padding, truncation=True)
    return model(**inputs).logits_per_image


def test_zero_shot(peer, options):
    found = evaluate_zero_shot.main(options(templates="plain"))[0]
    test = read_image_set(peer[4], "test")
    logits = logits_of_the_model(peer, test.pictures, [f"a photo of a {name}." for name in test.names])
    assert found.metrics["top1"] == pytest.approx((logits.argmax(dim=1) == test.labels).float().mean().item())
    assert found.model == peer[0]


def test_linear_probe(peer, options):
    """Colours are told apart by any tower."""
    found = linear_probe.main(options())
    assert found.metrics["accuracy"] == 1.0 and found.settings["features"] == peer[1].config.vision_config.hidden_size


@pytest.mark.parametrize("tune_tower", [False, True])
def test_few_shot(options, tune_tower, monkeypatch):
    if tune_tower:
        monkeypatch.setitem(few_shot.tune_episode.__kwdefaults__, "epochs", 2)
    argv = options(ways=3, queries=3, episodes=2, split="train", test_split="test", tune_tower=tune_tower)
    episodes, by_class = few_shot.main([*argv, "--shots", "5", "--shots_per_class", "1"])
    assert episodes.metrics["5_shot"] > (0.3 if tune_tower else 0.8)
    assert by_class.metrics["1_zeros"] == by_class.metrics["1_text"] == 1.0


def test_retrieval(peer, options, tmp_path):
    file = peer[4] / "metadata.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for number, row in enumerate(rows):
        row["captions"] = [f"{number} cat", f"dog {number}"]  # no two alike: ties would be broken by rounding
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = finetune_retrieval.main(options(evaluate_only=True, results=tmp_path / "results", report_to="none"))
    pictures = read_captions(peer[4], "test")
    logits = logits_of_the_model(peer, [one.file for one in pictures], all_captions(pictures))
    own = torch.arange(len(pictures)).repeat_interleave(2)
    for k in (1, 5, 10):
        hits = own[logits.topk(k, dim=1).indices] == torch.arange(len(pictures))[:, None]
        assert found.metrics[f"image_to_text_recall_{k}"] == pytest.approx(hits.any(dim=1).float().mean().item())
        hits = logits.T.topk(k, dim=1).indices == own[:, None]
        assert found.metrics[f"text_to_image_recall_{k}"] == pytest.approx(hits.any(dim=1).float().mean().item())
