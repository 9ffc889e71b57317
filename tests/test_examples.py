"""What comes after pretraining, on a tiny corpus: evaluate, build a gallery, run the demo, bundle the checkpoint."""

import base64
import hashlib
import json
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import build_gallery
import bundle_checkpoint
import demo
import evaluate_pictures
from tests.tiny_corpus import COLORS, SHAPES, tiny_splits, write_tiny_corpus
from tests.tiny_pretraining import add_tiny_size, pretrain
from transformers_florence import FlorenceModel, FlorenceProcessor, load_bundled, load_checkpoint
from transformers_florence.evaluation.zero_shot import build_zero_shot_classifier, embed_pixels
from transformers_florence.loading import BUNDLED

CARD = Path(__file__).parents[1] / "MODEL_CARD.md"
SEEN = {f"{color} {shape}" for color in COLORS for shape in SHAPES} - {
    f"{COLORS[index // 3]} {SHAPES[index % 3]}" for index in range(3, 24, 7)
}


@pytest.fixture(scope="module", autouse=True)
def tiny_size():
    with pytest.MonkeyPatch.context() as patch:
        add_tiny_size(patch)
        yield


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_tiny_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory) -> Path:
    """A run in one go."""
    output = tmp_path_factory.mktemp("run")
    pretrain(corpus, output)
    return output


# Evaluation


@pytest.fixture(scope="module")
def report(run, corpus, tmp_path_factory) -> dict:
    file = tmp_path_factory.mktemp("report") / "report.json"
    result = evaluate_pictures.main(["--model", str(run / "model"), "--corpus", str(corpus), "--output", str(file)])
    assert json.loads(file.read_text()) == result
    return result


def test_the_evaluation_reports_all_its_parts(report):
    assert list(report) == [
        "a_seen_concepts_noto",
        "a_seen_concepts_noto_v1",
        "b_unseen_concepts_noto",
        "b_unseen_concepts_all_styles",
        "c_clipart",
        "d_keywords_noto",
    ]
    counts = {
        part: (row["pictures"], row.get("names") or row.get("subgroups") or row.get("texts") or row.get("keywords"))
        for part, row in report.items()
    }
    assert counts == {
        "a_seen_concepts_noto": (21, 21),
        "a_seen_concepts_noto_v1": (11, 21),
        "b_unseen_concepts_noto": (3, 6),
        "b_unseen_concepts_all_styles": (10, 6),
        "c_clipart": (22, 22),
        "d_keywords_noto": (21, 4),
    }
    for row in report.values():
        numbers = {key: value for key, value in row.items() if isinstance(value, float)}
        assert numbers and all(0 <= value <= 1 for value in numbers.values()), row
        assert row.get("top1", 0) <= row.get("top5", 0)
    for way in ("image_to_text", "text_to_image"):
        recalls = [report["c_clipart"][f"{way}_r{k}"] for k in (1, 5, 10)]
        assert recalls == sorted(recalls)


def nearest_at_12_pixels(test: list[dict], train: list[dict], key: str) -> float:
    """Share of pictures whose nearest training picture has the same `key`: one at a time, in float64."""

    def pixels(row: dict) -> np.ndarray:
        return np.asarray(Image.open(BytesIO(row["image"])).resize((12, 12), Image.Resampling.BOX), np.float64)

    known = [pixels(row) for row in train]
    hits = 0
    for row in test:
        distances = [((pixels(row) - other) ** 2).sum() for other in known]
        hits += train[int(np.argmin(distances))][key] == row[key]
    return hits / len(test)


def test_the_floor_is_the_nearest_training_picture(report):
    splits = tiny_splits()
    train = [row for row in splits["train"] if row["source"] == "emoji"]
    noto = [row for row in splits["test_style"] if row["style"] == "noto"]
    found = report["a_seen_concepts_noto"]["floor_top1"]
    assert found == pytest.approx(nearest_at_12_pixels(noto, train, "name"), abs=1e-4)
    found = report["b_unseen_concepts_all_styles"]["floor_top1"]
    assert found == pytest.approx(nearest_at_12_pixels(splits["test_concept"], train, "subgroup"), abs=1e-4)


def test_the_evaluation_is_the_models_own_choice(run, report):
    """Part (a) again, one picture at a time through the model's forward."""
    model = load_checkpoint(FlorenceModel, run / "model")
    processor = FlorenceProcessor.from_pretrained(run / "model")
    names, hits = sorted(SEEN), 0
    classifier = build_zero_shot_classifier(model, processor.tokenizer, names, evaluate_pictures.TEMPLATES)
    noto = [row for row in tiny_splits()["test_style"] if row["style"] == "noto"]
    for row in noto:
        inputs = processor(images=Image.open(BytesIO(row["image"])), return_tensors="pt")
        with torch.no_grad():
            (embeds,) = model(**inputs).image_embeds
        hits += names[int((classifier @ embeds).argmax())] == row["name"]
    assert report["a_seen_concepts_noto"]["top1"] == pytest.approx(hits / len(noto), abs=1e-4)


def test_a_subgroup_without_training_pictures_is_a_choice_too(run, tmp_path, capsys):
    splits = tiny_splits()
    for row in splits["test_concept"]:
        if row["concept"] == 3:
            row["subgroup"] = "unheard-of"
    folder = write_tiny_corpus(tmp_path, splits=splits)
    result = evaluate_pictures.main(["--model", str(run / "model"), "--corpus", str(folder)])
    assert json.loads(capsys.readouterr().out) == result
    assert result["b_unseen_concepts_noto"]["subgroups"] == 7
    assert result["b_unseen_concepts_all_styles"]["pictures"] == 10


def test_a_part_that_the_corpus_lacks_is_named(run, tmp_path):
    splits = tiny_splits()
    splits["test_style"] = [row for row in splits["test_style"] if row["style"] == "noto"]
    folder = write_tiny_corpus(tmp_path / "style", splits=splits)
    with pytest.raises(ValueError, match="expected rows with {'style': 'noto-v1'}"):
        evaluate_pictures.main(["--model", str(run / "model"), "--corpus", str(folder)])
    del splits["test_clipart"]
    folder = write_tiny_corpus(tmp_path / "clipart", splits=splits)
    with pytest.raises(ValueError, match="split 'test_clipart'"):
        evaluate_pictures.main(["--model", str(run / "model"), "--corpus", str(folder)])


def test_a_model_with_missing_weights_is_not_evaluated(corpus, tmp_path):
    with pytest.raises(ValueError, match="expected the folder of a checkpoint"):
        evaluate_pictures.main(["--model", str(tmp_path / "nowhere"), "--corpus", str(corpus)])


# Gallery and demo


@pytest.fixture(scope="module")
def gallery(corpus, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gallery")
    with pytest.MonkeyPatch.context() as patch:
        for name, count in (("QUESTIONS", 3), ("NOTO", 6), ("CLIPART", 8)):
            patch.setattr(build_gallery, name, count)
        build_gallery.main(["--corpus", str(corpus), "--out", str(folder)])
    return folder


def test_the_gallery_holds_held_out_pictures_only(gallery):
    lines = [json.loads(line) for line in (gallery / "metadata.jsonl").read_text("utf-8").splitlines()]
    held_out = {
        (row["style"], row["name"]): row for split, rows in tiny_splits().items() if split != "train" for row in rows
    }
    assert len({line["file_name"] for line in lines}) == len(lines) == 3 + 6 + 8
    for line in lines:
        row = held_out[line["style"], line["name"]]
        assert line["style"] in ("noto", "openclipart") and line["license"] == row["license"] == "MIT"
        assert np.array_equal(
            np.array(Image.open(gallery / line["file_name"])), np.array(Image.open(BytesIO(row["image"])))
        )
    questions = [line for line in lines if line["file_name"].startswith("questions/")]
    subgroups = {row["name"]: row["subgroup"] for row in tiny_splits()["test_style"]}
    assert len({subgroups[line["name"]] for line in questions}) == len(questions) == 3
    assert not {line["name"] for line in questions} & {line["name"] for line in lines[3:]}
    assert (gallery / "names.txt").read_text("utf-8").splitlines() == sorted(SEEN)


def test_a_gallery_that_is_built_anew_has_no_pictures_of_the_old_one(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(build_gallery, "QUESTIONS", 2)
    listed = []
    for pictures in (6, 2):
        monkeypatch.setattr(build_gallery, "NOTO", pictures)
        monkeypatch.setattr(build_gallery, "CLIPART", pictures)
        build_gallery.main(["--corpus", str(corpus), "--out", str(tmp_path)])
        (tmp_path / "gallery" / "notes.txt").write_text("mine")
        lines = (tmp_path / "metadata.jsonl").read_text("utf-8").splitlines()
        listed.append({json.loads(line)["file_name"] for line in lines})
    assert listed[1] < listed[0] and len(listed[1]) == 6
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("*/*.png")} == listed[1]
    assert (tmp_path / "gallery" / "notes.txt").read_text() == "mine"


def test_a_corpus_with_too_few_subgroups_gives_no_gallery(corpus, tmp_path):
    with pytest.raises(ValueError, match="expected noto pictures of 12 subgroups in test_style, got 6"):
        build_gallery.main(["--corpus", str(corpus), "--out", str(tmp_path / "gallery")])
    assert not (tmp_path / "gallery").exists()


class Page(HTMLParser):
    """Pictures and open tags of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.pictures: dict[str, bytes] = {}
        self.words = ""
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        if tag == "img":
            values = dict(attributes)
            kind, _, payload = values["src"].partition(",")
            assert kind == "data:image/png;base64"
            self.pictures[values["alt"]] = base64.b64decode(payload, validate=True)
        elif tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += data


def test_the_demo_names_and_finds_pictures_and_reports(run, gallery, tmp_path, monkeypatch, capsys):
    def load_tiny(name):
        return load_checkpoint(FlorenceModel, run / "model"), FlorenceProcessor.from_pretrained(run / "model")

    def build_classifier(model, tokenizer, names, *args, **kwargs):
        """The first two questions' names are their own pictures' vectors, the third's is the opposite of its own."""
        classifier = build_zero_shot_classifier(model, tokenizer, names, *args, **kwargs)
        _, processor = load_tiny("florence-nano")
        for question, sign in zip(questions, (1, 1, -1), strict=True):
            pixels = processor(images=Image.open(gallery / question["file_name"]), return_tensors="pt")["pixel_values"]
            classifier[names.index(question["name"])] = sign * embed_pixels(model, pixels)[0]
        return classifier

    questions = [json.loads(line) for line in (gallery / "metadata.jsonl").read_text("utf-8").splitlines()][:3]
    monkeypatch.setattr(demo, "load_bundled", load_tiny)
    monkeypatch.setattr(demo, "build_zero_shot_classifier", build_classifier)
    monkeypatch.setattr(demo, "QUERIES", demo.QUERIES[:2])  # drawing more takes longer and tests nothing more
    demo.main(["--out", str(tmp_path / "out"), "--gallery", str(gallery)])

    said = capsys.readouterr().out
    for question, right in zip(questions, (True, True, False), strict=True):
        (line,) = [line for line in said.splitlines() if line[2:].startswith(question["name"] + " ")]
        assert line.count("%") == 5
        answers = [part.rpartition(" ")[0].strip() for part in line[30:].split(",")]
        assert set(answers) <= SEEN and len(set(answers)) == 5
        assert (line[0] == "+") == (answers[0] == question["name"]) == right
    assert "2 of 3 named right among 21 names" in said
    assert all(f"{query}: " in said for query in demo.QUERIES)

    page = Page((tmp_path / "out" / "report.html").read_text("utf-8"))
    assert page.open == []
    assert set(page.pictures) == {"named", "found"}
    for name, data in page.pictures.items():
        assert data == (tmp_path / "out" / f"{name}.png").read_bytes()
        pixels = np.array(Image.open(BytesIO(data)).convert("RGB"))
        assert min(pixels.shape[:2]) > 200
        assert (pixels != 255).any(axis=2).mean() > 0.02, f"{name}.png is blank"
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50
    assert all(question["name"] in page.words for question in questions)


def test_the_demo_without_its_pictures_says_how_to_build_them(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "load_bundled", lambda name: (None, None))
    with pytest.raises(ValueError, match="build them with examples/build_gallery.py"):
        demo.main(["--out", str(tmp_path / "out"), "--gallery", str(tmp_path)])
    (tmp_path / "metadata.jsonl").touch()
    (tmp_path / "names.txt").write_text("a cat\n")
    with pytest.raises(ValueError, match="expected 1 question, 8 pictures and 5 names at least"):
        demo.main(["--out", str(tmp_path / "out"), "--gallery", str(tmp_path)])


def test_bundling_stores_half_the_bytes_and_the_same_model(run, tmp_path):
    digest = bundle_checkpoint.main(["--model", str(run / "model"), "--name", "tiny", "--out", str(tmp_path)])
    file = tmp_path / "tiny" / "model.safetensors"
    assert hashlib.sha256(file.read_bytes()).hexdigest() == digest
    assert file.stat().st_size < 0.6 * (run / "model" / "model.safetensors").stat().st_size
    whole, bundled = (load_checkpoint(FlorenceModel, folder) for folder in (run / "model", tmp_path / "tiny"))
    for (name, weight), half in zip(whole.named_parameters(), bundled.parameters(), strict=True):
        assert half.dtype == torch.float32
        torch.testing.assert_close(half, weight, rtol=2**-11, atol=1e-7, msg=name)  # float16 has 11 bits
    assert len(FlorenceProcessor.from_pretrained(tmp_path / "tiny").tokenizer) == 560


# The bundled checkpoint

needs_checkpoint = pytest.mark.skipif(
    not (BUNDLED / "florence-nano" / "model.safetensors").is_file(),
    reason="needs the bundled checkpoint: examples/pretrain_unicl.py trains it, examples/bundle_checkpoint.py adds it",
)


@needs_checkpoint
def test_the_bundled_checkpoint_names_held_out_pictures():
    model, processor = load_bundled("florence-nano")
    questions, _, names = demo.read_gallery(demo.GALLERY)
    assert len(questions) == 12 and len(names) > 1000
    classifier = build_zero_shot_classifier(model, processor.tokenizer, names, ("{}",))
    pixels = processor(images=[row["image"] for row in questions], return_tensors="pt")["pixel_values"]
    best = (embed_pixels(model, pixels) @ classifier.T).topk(5).indices
    right = [
        row["name"] in [names[index] for index in line] for row, line in zip(questions, best.tolist(), strict=True)
    ]
    assert sum(right) >= 6, right


@needs_checkpoint
def test_the_bundled_weights_are_those_of_the_model_card():
    weights = BUNDLED / "florence-nano" / "model.safetensors"
    assert hashlib.sha256(weights.read_bytes()).hexdigest() in CARD.read_text("utf-8")
    assert weights.stat().st_size <= bundle_checkpoint.LIMIT
