"""Batches of pretraining: of the corpus in memory from seed and step alone, of any sources by worker processes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pretrain_batches
import pretrain_unicl
from pretrain_arguments import PretrainArguments
from pretrain_batches import CorpusBatches, HeldOutSource, TripletBatches
from tests.tiny_corpus import write_tiny_corpus
from tests.tiny_florence import tiny_image_processor, tiny_model, tiny_processor, tiny_tokenizer
from tests.tiny_pretraining import BATCH, add_tiny_size, options, pretrain
from tests.tiny_shards import png, sentence, write_numbered
from transformers_florence import FlorenceProcessor
from transformers_florence.data.picture_corpus import PictureCorpus, load_split
from transformers_florence.data.prompts import DRAWING_TEMPLATES, PHOTO_TEMPLATES
from transformers_florence.data.sources import Source, text_label
from transformers_florence.training.arguments import parse_arguments


@pytest.fixture(scope="module", autouse=True)
def tiny_size():
    with pytest.MonkeyPatch.context() as patch:
        add_tiny_size(patch)
        yield


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_tiny_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def batches(corpus):
    """Makes the batches of a run with the given arguments."""
    rows = PictureCorpus(load_split(corpus, "train"), size=32, progress=False)

    class Flat(CorpusBatches):
        """With everything of a batch on one level."""

        def __call__(self, step: int) -> dict:
            batch = super().__call__(step)
            inputs, labels = batch.pop("inputs"), batch.pop("labels")
            return {**batch, **inputs, **labels}

    def make(*rank: int, **changes) -> Flat:
        arguments = parse_arguments(PretrainArguments, options(corpus, Path("unused"), **changes))
        config = pretrain_unicl.build_config(arguments)
        processor = pretrain_unicl.build_processor(arguments, config, rows)
        return Flat(arguments, rows, processor, torch.device("cpu"), *rank)

    return make


def test_a_batch_depends_on_seed_and_step_alone(batches):
    ordered, jumping = batches(), batches()
    first = [ordered(step) for step in range(4)]
    for step in (3, 0, 2):
        torch.manual_seed(step + 100)
        batch = jumping(step)
        for name, value in batch.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(first[step][name])), (step, name)
    assert not torch.equal(first[0]["pixel_values"], first[1]["pixel_values"])
    assert not torch.equal(batches(seed=1)(0)["pixel_values"], first[0]["pixel_values"])


def test_the_parts_of_all_processes_are_the_batch(batches):
    for step in range(3):
        whole, first, second = batches()(step), batches(0, 2)(step), batches(1, 2)(step)
        for name in ("pixel_values", "input_ids", "attention_mask", "labels", "class_labels", "samples"):
            parts = [torch.as_tensor(part[name]) for part in (first, second)]
            assert len(parts[0]) == BATCH // 2 and torch.equal(torch.cat(parts), torch.as_tensor(whole[name]))
    with pytest.raises(ValueError, match="batch_size: expected a multiple of 3 processes, got 16"):
        batches(0, 3)


def record_augmentation(monkeypatch, change: Callable) -> list[tuple[int, int, float]]:
    """Size, seed and strength of every augmentation from now on; `change` is done to the pixels instead."""
    taken = []

    class Recorder:
        def __init__(self, size):
            self.size = size

        def __call__(self, pixels, generator, strength):
            taken.append((self.size, generator.initial_seed(), strength))
            return change(pixels)

    monkeypatch.setattr(pretrain_batches, "BatchAugmentation", Recorder)
    return taken


def test_every_step_draws_anew(batches, monkeypatch):
    make = batches()
    taken = record_augmentation(monkeypatch, lambda pixels: pixels)
    for step in range(12):  # three epochs
        make(step)
    assert len({seed for _, seed, _ in taken}) == 12


def test_an_epoch_shows_every_picture_once_in_another_order_each_time(batches, monkeypatch):
    make = batches(category_batches=0, keyword_batches=0)
    monkeypatch.setattr(make.corpus, "labels", torch.arange(64))
    epochs = [torch.cat([make(4 * epoch + step)["labels"] for step in range(4)]) for epoch in range(3)]
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(64))
    assert not torch.equal(epochs[0], epochs[1]) and not torch.equal(epochs[1], epochs[2])


def test_labels_are_names_categories_or_the_pairs_themselves(batches):
    make = batches(category_batches=0, keyword_batches=0, context_length=96)  # so that no text is cut
    decode = make.tokenizer.batch_decode
    named = make(0)
    texts = decode(named["input_ids"], skip_special_tokens=True)
    for label, text in zip(named["labels"].tolist(), texts, strict=True):
        names = {make.corpus.names[row] for row in (make.corpus.labels == label).nonzero()[:, 0].tolist()}
        assert len(names) == 1 and names.pop() in " ".join(text.split())

    grouped = batches(category_batches=1, keyword_batches=0, context_length=96)(0)
    texts = decode(grouped["input_ids"], skip_special_tokens=True)
    words = dict(zip(make.corpus.categories.tolist(), make.corpus.category_names, strict=True))
    for label, text in zip(grouped["labels"].tolist(), texts, strict=True):
        wanted = {template.format(words[label]) for template in DRAWING_TEMPLATES}
        assert "".join(text.split()) in {"".join(sentence.split()) for sentence in wanted}

    paired = batches(category_batches=0, keyword_batches=0, context_length=96, objective="clip")(0)
    assert torch.equal(paired["labels"], torch.arange(BATCH))
    assert torch.equal(paired["pixel_values"], named["pixel_values"]), "the objective changes nothing but the labels"


def test_the_classifier_learns_names_whatever_the_batch_is_labelled_by(batches, monkeypatch):
    make = batches(category_batches=1, keyword_batches=0)
    record_augmentation(monkeypatch, lambda pixels: pixels)
    rows_as_colors = torch.arange(64, dtype=torch.uint8).view(64, 1, 1, 1).expand(-1, 3, 32, 32)
    monkeypatch.setattr(make.corpus, "pixels", rows_as_colors)
    batch = make(0)
    rows = ((batch["pixel_values"] * make.std + make.mean)[:, 0, 0, 0] * 255).round().long()
    assert torch.equal(batch["class_labels"], make.corpus.labels[rows])
    assert torch.equal(batch["labels"], make.corpus.categories[rows])
    assert batches(objective="clip")(0)["class_labels"] is None, "unique labels know of no names"


def test_the_first_part_has_smaller_pictures_and_shorter_texts(batches):
    make = batches(steps=10, small_part=0.6, context_length=9)
    shapes = [(make(step)["pixel_values"].shape[-1], make(step)["input_ids"].shape[1]) for step in range(10)]
    assert [side for side, _ in shapes] == [16] * 6 + [32] * 4
    assert max(tokens for _, tokens in shapes[:6]) == 6 and max(tokens for _, tokens in shapes[6:]) == 9
    assert {make(step)["input_ids"][:, -1].max().item() for step in range(10)} == {559}, "the end token must stay"
    assert batches(small_part=0)(0)["pixel_values"].shape[-1] == 32


def test_without_enough_categories_every_batch_is_of_names(batches):
    make = batches(category_batches=1, keyword_batches=0)
    make.with_category = make.with_category[: BATCH - 1]
    assert len(set(make(0)["labels"].tolist())) > len(set(make.corpus.category_names))


def test_the_second_stage_of_a_corpus_says_more_than_names(batches, monkeypatch):
    stage = {"leave_out_templated": True, "category_batches": 0, "keyword_batches": 0, "context_length": 96}
    monkeypatch.setattr(
        PictureCorpus, "has_more_than_a_name", lambda self, row: row % 2 == 0 and bool(self.keywords[row])
    )
    make = batches(**stage)
    drawn = [row for step in range(make.steps_of_epoch) for row in make(step)["samples"]]
    assert sorted(drawn) == list(range(0, 64, 2)), "an epoch is of the rows that have such texts"
    batch = make(0)
    for row, tokens in zip(batch["samples"], batch["input_ids"], strict=True):
        text = " ".join(make.tokenizer.decode(tokens, skip_special_tokens=True).split())
        name = make.corpus.names[row]
        assert text.startswith(name) and len(text) > len(name) + 2, "no template, and more than the name"


def test_keyword_batches_say_a_keyword_of_each_picture_and_no_other_picture_has_it(batches, monkeypatch):
    make = batches(category_batches=0, keyword_batches=1, context_length=96)
    record_augmentation(monkeypatch, lambda pixels: pixels)
    rows_as_colors = torch.arange(64, dtype=torch.uint8).view(64, 1, 1, 1).expand(-1, 3, 32, 32)
    monkeypatch.setattr(make.corpus, "pixels", rows_as_colors)
    words = ["round", "square", "flat", "deep"]
    rows_of = {word: np.arange(place, 64, 4) for place, word in enumerate(words)}
    monkeypatch.setattr(make.corpus, "general_words", [{words[row % 4]: None} for row in range(64)])
    monkeypatch.setattr(make.corpus, "keyword_names", words)
    monkeypatch.setattr(make.corpus, "keyword_rows", rows_of)
    batch = make(0)
    rows = ((batch["pixel_values"] * make.std + make.mean)[:, 0, 0, 0] * 255).round().long()
    assert batch["labels"].tolist() == [row % 4 for row in rows.tolist()]
    assert torch.equal(batch["class_labels"], make.corpus.labels[rows]) and batch["align_texts"] is False
    texts = make.tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)
    for label, text in zip(batch["labels"].tolist(), texts, strict=True):
        wanted = {template.format(words[label]) for template in DRAWING_TEMPLATES}
        assert "".join(text.split()).lower() in {"".join(sentence.split()).lower() for sentence in wanted}

    monkeypatch.setattr(make.corpus, "keyword_names", words[:3])
    monkeypatch.setattr(make.corpus, "keyword_rows", {word: rows_of[word] for word in words[:3]})
    assert make(0)["align_texts"] is True, "with too few keywords for a batch, it is one of names"


def test_augmentation_grows_over_its_ramp(batches, monkeypatch):
    make = batches(steps=100, augmentation_ramp=0.5)
    taken = record_augmentation(monkeypatch, lambda pixels: pixels)
    for step in (0, 25, 50, 99):
        make(step)
    assert [strength for _, _, strength in taken] == pytest.approx([0.0, 0.5, 1.0, 1.0])


def test_fewer_pictures_than_a_batch_are_refused(corpus, tmp_path):
    with pytest.raises(ValueError, match="at least batch_size=65 pictures, got 64"):
        pretrain(corpus, tmp_path, batch_size=65)


# Of sources


@pytest.fixture(scope="module")
def numbered(tmp_path_factory) -> str:
    """Twelve numbered pictures in four shards, as a source."""
    folder = write_numbered(tmp_path_factory.mktemp("numbered"), range(12), 4, bad=(2, 5))
    return json.dumps({"path": str(folder), "text": "text"})


@pytest.fixture(scope="module")
def classes(tmp_path_factory) -> str:
    """Two pictures of each of two classes, in folders of their names, as a source."""
    folder = tmp_path_factory.mktemp("classes")
    for number in range(4):
        own = folder / "train" / ("cat", "dog")[number % 2]
        own.mkdir(parents=True, exist_ok=True)
        (own / f"{number}.png").write_bytes(png(100 + number))
    return json.dumps({"path": str(folder), "label": "label"})


def triplets(sources: list[str], *rank: int, processor: FlorenceProcessor | None = None, **changes) -> TripletBatches:
    """Four pictures a batch, as they are unless `changes` say otherwise."""
    plain = {"augmentation": 0, "small_part": 0, "batch_size": 4, "bad_samples": "skip"}
    line = options(None, Path("unused"), sources=sources, **plain | changes)
    arguments = parse_arguments(PretrainArguments, line)
    return TripletBatches(arguments, processor or tiny_processor(), torch.device("cpu"), *rank)


def numbers_of(batch: dict[str, Any]) -> list[int]:
    """The numbers that `png` wrote into the pictures of a batch."""
    image_processor = tiny_image_processor()
    mean, std = (torch.tensor(values) for values in (image_processor.image_mean, image_processor.image_std))
    colors = ((batch["inputs"]["pixel_values"].mean(dim=(2, 3)) * std + mean) * 255).round().long()
    assert (colors[:, 2] == 7).all()
    return (colors[:, 0] * 256 + colors[:, 1]).tolist()


def test_a_batch_of_sources_holds_pictures_with_their_texts_and_labels(numbered):
    batches = triplets([numbered])
    for step in range(3):
        batch = batches(step)
        numbers = numbers_of(batch)
        assert batch["samples"] == [sentence(number) for number in numbers]
        assert batch["labels"]["labels"].tolist() == [text_label(sentence(number)) for number in numbers]
        texts = tiny_tokenizer().batch_decode(batch["inputs"]["input_ids"], skip_special_tokens=True)
        for text, number in zip(texts, numbers, strict=True):
            assert sentence(number).startswith(" ".join(text.split()))
    assert batches.skipped == 2, "an epoch has one broken picture and one empty text"
    assert batches.steps_of_epoch == 3 and str(batches) == "12 rows of 1 sources"


def test_bad_samples_are_refused_on_demand(numbered):
    batches = triplets([numbered], bad_samples="raise")
    with pytest.raises(ValueError, match=r"row \d+ \([25].png\): "):
        for step in range(3):
            batches(step)


def test_the_parts_of_all_ranks_are_the_batch_of_sources(numbered):
    whole, first, second = (triplets([numbered], *rank) for rank in ((0, 1), (0, 2), (1, 2)))
    for step in range(4):
        parts = [batches(step) for batches in (first, second)]
        samples = [sample for part in parts for sample in part["samples"]]
        assert samples == (batch := whole(step))["samples"]
        pixels = torch.cat([part["inputs"]["pixel_values"] for part in parts])
        assert torch.equal(pixels, batch["inputs"]["pixel_values"])


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_sources_go_on_where_a_checkpoint_was_taken(numbered, streaming, workers):
    """Through JSON, as a checkpoint holds it. With a buffer of one row a stream loses none."""
    changes = {"streaming": streaming, "shuffle_buffer": 1, "workers": workers, "augmentation": 1, "batch_size": 2}
    batches = triplets([numbered], **changes)
    taken = [batches(step) for step in range(4)]
    state = json.loads(json.dumps(batches.state_dict()))
    after = [batches(step) for step in range(4, 9)]
    other = triplets([numbered], **changes)
    other.load_state_dict(state)
    for step, expected in enumerate(after, start=4):
        batch = other(step)
        assert batch["samples"] == expected["samples"]
        assert torch.equal(batch["inputs"]["pixel_values"], expected["inputs"]["pixel_values"])
    assert other.skipped == batches.skipped > 0
    assert len({sample for batch in taken + after for sample in batch["samples"]}) == 10, "all that are not bad"


def test_a_step_out_of_turn_is_refused(numbered):
    batches = triplets([numbered])
    batches(0)
    with pytest.raises(ValueError, match="expected step 1, the next one of the data, got 3"):
        batches(3)


def test_mixtures_draw_by_weight_and_put_class_names_into_templates(numbered, classes):
    weighed = [
        json.dumps({**json.loads(source), "weight": weight}) for source, weight in ((numbered, 1), (classes, 3))
    ]
    batches = triplets(weighed, batch_size=8, templates="drawing")
    samples = [sample for step in range(6) for sample in batches(step)["samples"]]
    names = {template.format(name) for template in DRAWING_TEMPLATES for name in ("cat", "dog")}
    of_classes = [sample for sample in samples if sample in names]
    assert len(of_classes) == pytest.approx(0.75 * len(samples), abs=3) and len(set(of_classes)) > 12
    assert set(samples) - names <= {sentence(number) for number in range(12)}


def test_templated_texts_can_be_left_out(tmp_path, classes):
    folder = write_numbered(tmp_path / "numbered", range(4), 1)
    source = json.dumps({"path": str(folder), "text": "text"})
    assert triplets([source], leave_out_templated=True)(0)["samples"]
    with pytest.raises(ValueError, match="expected texts as templated ones are left out, got class labels only"):
        triplets([classes], leave_out_templated=True)


def test_the_first_part_of_sources_is_smaller_too(numbered):
    batches = triplets([numbered], steps=4, small_part=0.5, context_length=9)
    shapes = [
        (batch["inputs"]["pixel_values"].shape[-1], batch["inputs"]["input_ids"].shape[1])
        for batch in map(batches, range(4))
    ]
    assert shapes == [(16, 6), (16, 6), (32, 9), (32, 9)]


@pytest.mark.parametrize("length", [3, 5, 8, 12])
def test_a_shortened_text_is_what_the_tokenizer_gives_for_that_length(length):
    tokenizer = tiny_tokenizer()
    texts = ["a photo", "a photo of a cat sitting on a mat", "12 drawings of houses, mountains and rivers"]
    whole = tokenizer(texts, padding=True, return_tensors="pt", max_length=12, truncation=True)
    found = pretrain_batches.shorten(whole, length, tokenizer.eos_token_id)
    expected = tokenizer(texts, padding=True, return_tensors="pt", max_length=length, truncation=True)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_a_vocabulary_is_learnt_from_all_sources_in_turn_and_from_no_more_than_asked_for(numbered, classes):
    arguments = parse_arguments(
        PretrainArguments, options(None, Path("unused"), sources=[numbered, classes], vocabulary_texts=4)
    )
    texts = list(pretrain_batches.source_texts(arguments))
    first, second = texts[:4:2], texts[1:4:2]
    assert set(first) <= {sentence(number) for number in range(12)} and set(second) <= {"cat", "dog"}
    assert texts[4:] == list(PHOTO_TEMPLATES)


def test_a_held_out_source_of_texts_is_retrieved(tmp_path, monkeypatch):
    """With vectors of which we know what is near: pictures 0 and 1 are each other's, the others right."""
    folder = write_numbered(tmp_path / "pictures", range(5), 1)
    source = Source(str(folder), text="text")
    swapped = {0: 1, 1: 0}

    def of_pixels(model, pixels):
        colors = pixels.mean(dim=(2, 3))
        order = [numbers.index(number) for number in numbers_of({"inputs": {"pixel_values": pixels}})]
        assert len(colors) == len(order)
        return torch.eye(5)[[swapped.get(place, place) for place in order]]

    numbers = list(range(5))
    monkeypatch.setattr(pretrain_batches, "embed_pixels", of_pixels)
    monkeypatch.setattr(
        pretrain_batches,
        "embed_texts",
        lambda model, tokenizer, texts: torch.eye(5)[[int(text.rpartition(" ")[2]) for text in texts]],
    )
    found = HeldOutSource(tiny_processor(), source, PHOTO_TEMPLATES)(tiny_model(), 32)
    assert found == {
        "pictures_image_to_text_r1": pytest.approx(0.6),
        "pictures_text_to_image_r1": pytest.approx(0.6),
        "pictures_image_to_text_r5": 1.0,
        "pictures_text_to_image_r5": 1.0,
    }


def test_a_held_out_source_of_classes_is_named(classes, monkeypatch):
    monkeypatch.setattr(pretrain_batches, "embed_pixels", lambda model, pixels: torch.eye(2)[[0, 0, 0, 1]])
    seen = []

    def classifier(model, tokenizer, names, templates):
        seen.append((names, templates))
        return torch.eye(2)

    monkeypatch.setattr(pretrain_batches, "build_zero_shot_classifier", classifier)
    source = Source(**json.loads(classes))
    evaluator = HeldOutSource(tiny_processor(), source, DRAWING_TEMPLATES)
    assert evaluator.texts == ["cat", "cat", "dog", "dog"]
    name = Path(source.path).name
    assert evaluator(tiny_model(), 32) == {f"{name}_top1": 0.75, f"{name}_top5": 1.0}
    assert seen == [(["cat", "dog"], DRAWING_TEMPLATES)]


@pytest.mark.parametrize(
    ("bad", "message"),
    [(1, "expected at least one row with a text, got none"), (2, "pictures, row 0: cannot identify image file")],
)
def test_a_held_out_source_that_cannot_be_looked_at_is_refused_at_once(tmp_path, bad, message):
    folder = write_numbered(tmp_path / "pictures", range(bad, bad + 1), 1, bad=(bad,))
    with pytest.raises(ValueError, match=message):
        HeldOutSource(tiny_processor(), Source(str(folder), text="text"), PHOTO_TEMPLATES)
