"""The zero-shot script: its numbers are those made by hand, with our checkpoints and transformers' own CLIP."""

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import f1_score
from transformers import CLIPProcessor

import evaluate_zero_shot
from tests.tiny_clip import tiny_clip, tiny_clip_image_processor
from tests.tiny_florence import save_tiny, tiny_processor
from tests.tiny_sets import COLORS, write_color_set, write_voc
from transformers_florence.data.image_sets import IMAGENET_TEMPLATES, benchmarks, read_image_set
from transformers_florence.evaluation.classification import map_11_point
from transformers_florence.evaluation.embedding import embed_pictures
from transformers_florence.evaluation.plots import save_beside
from transformers_florence.evaluation.results import load_results
from transformers_florence.evaluation.zero_shot import build_zero_shot_classifier


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_color_set(tmp_path_factory.mktemp("pictures") / "colors")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    return save_tiny(folder), folder


@pytest.fixture
def options(pictures, checkpoint, tmp_path):
    def build(**changes) -> list[str]:
        values = {"data": pictures, "model": checkpoint[1], "output": tmp_path / "results", "templates": "plain"}
        return [part for name, value in (values | changes).items() for part in (f"--{name}", str(value))]

    return build


@torch.no_grad()
def scores_by_hand(model, folder, templates, split="test") -> tuple[torch.Tensor, torch.Tensor]:
    found = read_image_set(folder, split)
    processor = tiny_processor()
    pixels = processor(images=[Image.open(path) for path in found.pictures], return_tensors="pt")["pixel_values"]
    embeds = model.get_image_features(pixels).pooler_output
    classifier = build_zero_shot_classifier(model, processor.tokenizer, found.names, templates)
    return torch.nn.functional.normalize(embeds, dim=1) @ classifier.T, found.labels


def test_the_result_is_that_of_the_model(options, checkpoint, pictures, tmp_path):
    found = evaluate_zero_shot.main(options())
    scores, labels = scores_by_hand(checkpoint[0], pictures, ["a photo of a {}."])
    right = (scores.argmax(dim=1) == labels).float()
    assert found[0].metrics["top1"] == pytest.approx(right.mean().item())
    assert found[0].metrics["pictures"] == 15 and found[0].metrics["top5"] == 1.0
    per_class = [right[labels == number].mean().item() for number in range(len(COLORS))]
    assert found[0].metrics["mean_per_class"] == pytest.approx(sum(per_class) / 3)
    assert load_results(tmp_path / "results") == found
    assert found[0].command.startswith("python examples/evaluate_zero_shot.py --data ")


def test_figures_show_what_is_taken_for_what(options, checkpoint, pictures, tmp_path, monkeypatch):
    drawn = {}

    def keep(file, **figures):
        drawn.update(figures)
        return save_beside(file, **figures)

    monkeypatch.setattr(evaluate_zero_shot, "save_beside", keep)
    evaluate_zero_shot.main(options())
    scores, labels = scores_by_hand(checkpoint[0], pictures, ["a photo of a {}."])
    guesses = scores.argmax(dim=1)
    shares = [[(guesses[labels == true] == guess).float().mean().item() for guess in range(3)] for true in range(3)]
    assert np.allclose(drawn["confusion"].axes[0].images[0].get_array(), shares)
    assert [len(points.get_offsets()) for points in drawn["map"].axes[0].collections] == [5, 5, 5]
    assert {file.name.split(".", 1)[1] for file in (tmp_path / "results").iterdir()} == {
        "json",
        "confusion.png",
        "map.png",
    }


def test_thresholds_of_labels_are_calibrated_on_the_validation_split(options, checkpoint, pictures):
    found = evaluate_zero_shot.main(options(validation_split="train"))[0]
    held, held_labels = scores_by_hand(checkpoint[0], pictures, ["a photo of a {}."], "train")
    scores, labels = scores_by_hand(checkpoint[0], pictures, ["a photo of a {}."])
    f1 = []
    for number in range(len(COLORS)):
        truth = held_labels == number
        best = max(held[:, number].tolist(), key=lambda value: f1_score(truth, held[:, number] >= value))
        lower = held[:, number][held[:, number] < best]  # half-way to the next one below
        threshold = (best + lower.max().item()) / 2 if len(lower) else best - 1
        f1.append(f1_score(labels == number, scores[:, number] >= threshold))
    assert found.metrics["label_f1"] == pytest.approx(sum(f1) / 3, abs=1e-4)


def test_several_labels_a_picture(options, checkpoint, tmp_path):
    """VOC2007's folder: thresholds of each label from the pictures where it is not difficult, and F1 on such."""
    benchmark = benchmarks()["voc2007"]
    write_voc(tmp_path, benchmark.names)
    source = f"voc2007:{tmp_path}"
    found = evaluate_zero_shot.main(options(data=source, validation_split="val"))[0]
    held, held_marks = scores_by_hand(checkpoint[0], source, benchmark.templates, "val")
    scores, marks = scores_by_hand(checkpoint[0], source, benchmark.templates)

    def slow_f1(truth: torch.Tensor, found: torch.Tensor) -> float:
        return 2 * int((truth & found).sum()) / (int(truth.sum()) + int(found.sum()))

    f1 = []
    for number in range(20):
        rows = held_marks[:, number] != 0
        column, truth = held[rows, number], held_marks[rows, number] == 1
        best = max(column.tolist(), key=lambda value, c=column, t=truth: (slow_f1(t, c >= value), value))
        lower = held[:, number][held[:, number] < best]
        threshold = (best + lower.max().item()) / 2 if len(lower) else best - 1
        rows = marks[:, number] != 0
        f1.append(slow_f1(marks[rows, number] == 1, scores[rows, number] >= threshold))
    assert found.metrics["label_f1"] == pytest.approx(sum(f1) / 20, abs=1e-4)
    assert found.metrics["map_11_point"] == pytest.approx(map_11_point(scores, marks), abs=1e-4)
    assert "top1" not in found.metrics


def test_transformers_own_clip_and_new_weights(options, tmp_path, pictures):
    model, tokenizer = tiny_clip()
    model.save_pretrained(tmp_path / "clip")
    CLIPProcessor(tiny_clip_image_processor(), tokenizer).save_pretrained(tmp_path / "clip")
    options_of_clip = {"model": tmp_path / "clip", "cache": tmp_path / "cache"}
    found = evaluate_zero_shot.main(options(**options_of_clip))[0]
    test = read_image_set(pictures, "test")
    embeds, _ = embed_pictures(model, tiny_clip_image_processor(), test.pictures)
    classifier = build_zero_shot_classifier(model, tokenizer, test.names, ["a photo of a {}."])
    wanted = ((embeds @ classifier.T).argmax(dim=1) == test.labels).float().mean().item()
    assert found.metrics["top1"] == pytest.approx(wanted) and found.model == "clip"
    assert len(list((tmp_path / "cache").iterdir())) == 1
    other = evaluate_zero_shot.main(options(**options_of_clip, random_weights=True, seed=1))[0]
    assert other.model == "clip (random weights)" and len(list((tmp_path / "cache").iterdir())) == 2


def test_archives_that_are_there_are_evaluated(options, tmp_path, capsys):
    names = benchmarks()["dtd"].names
    root = tmp_path / "archives" / "dtd" / "dtd"
    (root / "labels").mkdir(parents=True)
    (root / "labels" / "test1.txt").write_text("\n".join(f"{name}/{name}_0001.jpg" for name in names))
    for number, name in enumerate(names):
        (root / "images" / name).mkdir(parents=True)
        Image.new("RGB", (32, 32), (5 * number, 100, 50)).save(root / "images" / name / f"{name}_0001.jpg")
    found = evaluate_zero_shot.main(options(data=tmp_path / "archives", benchmarks=True))
    assert [(one.data, one.metrics["pictures"]) for one in found] == [("dtd", 47)]
    printed = capsys.readouterr().out
    assert "Food101: expected food101 with the split 'test'" in printed
    ours = f"{100 * found[0].metrics['top1']:.1f}"
    assert f"| tiny, here | - | - | - | - | - | - | - | {ours} | - | - | - | - |" in printed
    assert printed.index("| Florence, 384 px | 95.1 |") < printed.index("| tiny, here |")
    with pytest.raises(ValueError, match="expected official archives in .*, got none of the twelve"):
        evaluate_zero_shot.main(options(benchmarks=True))


def test_pictures_that_cannot_be_read_are_told(options, tmp_path, capsys):
    folder = write_color_set(tmp_path / "broken")
    (folder / "test_0_0.png").write_bytes(b"no picture")
    assert evaluate_zero_shot.main(options(data=folder))[0].metrics["pictures"] == 14
    assert "broken: left out 1 of 15 pictures, unreadable" in capsys.readouterr().out


def test_classes_without_pictures_are_told(options, tmp_path, capsys):
    file = write_color_set(tmp_path / "partial") / "metadata.jsonl"
    rows = [row for row in file.read_text().splitlines() if '"label": "house"' not in row or '"train"' in row]
    file.write_text("\n".join(rows))
    found = evaluate_zero_shot.main(options(data=tmp_path / "partial"))[0]
    assert (found.metrics["pictures"], found.metrics["classes"]) == (10, 3)
    assert "partial: 1 of 3 classes have no picture: house" in capsys.readouterr().out


def test_templates_are_the_benchmarks_own():
    arguments = evaluate_zero_shot.ZeroShotArguments(data="x")
    assert evaluate_zero_shot.choose_templates(arguments, "pets") == benchmarks()["pets"].templates
    assert evaluate_zero_shot.choose_templates(arguments, "my folder") == IMAGENET_TEMPLATES


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": ""}, "data: expected a set of pictures, got none"),
        ({"templates": "poems"}, "templates: expected one of imagenet, drawing, plain, food101"),
        ({"validation_split": "test"}, "validation_split: expected none of the pictures of 'test'"),
        ({"batch_size": 0}, "batch_size: expected an integer >= 1, got 0"),
        ({"split": "valid"}, "expected rows of the split 'valid'"),
    ],
)
def test_arguments_that_are_refused(options, changes, message):
    with pytest.raises(ValueError, match=message):
        evaluate_zero_shot.main(options(**changes))
