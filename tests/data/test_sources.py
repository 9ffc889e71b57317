"""Sources: every kind of folder and column gives the same rows, and equal texts the same label."""

import io
import json
import tarfile
from functools import partial

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image, List, Value

from tests.tiny_shards import MAKER, numbers_of, png, sentence, take, write_numbered
from transformers_florence.data.prompts import normalize_text
from transformers_florence.data.sources import Source, text_label, texts_of
from transformers_florence.data.triplet_loader import TripletLoader, TripletRows, TripletStream


def test_labels_are_the_first_63_bits_of_the_hash():
    # `printf 'a cat' | b2sum -l 64` of GNU coreutils: labels are part of written data and must never change.
    assert text_label("a cat") == text_label("  A\tCAT ") == 0x67F5DFB40B23DDA2 >> 1
    labels = [text_label(sentence(number)) for number in range(20_000)]
    assert len(set(labels)) == 20_000 and min(labels) >= 0 and max(labels) < 2**63
    ones = np.unpackbits(np.array(labels).astype(">u8").view(np.uint8)).reshape(-1, 64).mean(axis=0)
    assert ones[0] == 0 and ones[1:] == pytest.approx(0.5, abs=0.02), "every bit is as often one as zero"
    assert normalize_text("A cat") != normalize_text("a cats") and text_label("A cat") != text_label("a cats")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_numbered(tmp_path_factory.mktemp("shards"), range(8), 2)


def test_the_same_words_are_the_same_label_in_every_kind_of_set(tmp_path):
    """Captions, class numbers with names, class labels of `datasets`, and folders named after classes."""
    image = {"bytes": png(1), "path": "1.png"}
    numbered = Features({"image": Image(), "class": Value("int64")})
    labelled = Features({"image": Image(), "class": ClassLabel(names=["dog", "wild cat"])})
    captioned = Features({"image": Image(), "captions": List(Value("string"))})
    for name, features, row in (
        ("numbered", numbered, {"image": image, "class": 1}),
        ("labelled", labelled, {"image": image, "class": 1}),
        ("captioned", captioned, {"image": image, "captions": ["Wild cat"]}),
    ):
        (tmp_path / name).mkdir()
        Dataset.from_list([row], features).to_parquet(tmp_path / name / "train.parquet")
    for name in ("dog", "wild cat"):
        (tmp_path / "folders" / name).mkdir(parents=True)
        (tmp_path / "folders" / name / "1.png").write_bytes(png(1))
    sources = [
        Source(str(tmp_path / "numbered"), label="class", names=["dog", "wild cat"]),
        Source(str(tmp_path / "labelled"), label="class"),
        Source(str(tmp_path / "captioned"), text="captions"),
        Source(str(tmp_path / "folders"), label="label"),
    ]
    for source in sources:
        rows = TripletRows([source], MAKER, progress=False)
        labels = {rows[number]["label"] for number in range(rows.epoch_length)}
        assert text_label("wild cat") in labels, source
        assert labels <= {text_label("wild cat"), text_label("dog")}


def test_webdataset_shards_are_read_with_texts_and_json(tmp_path):
    for shard in range(2):
        with tarfile.open(tmp_path / f"shard-{shard}.tar", "w") as tar:
            for number in range(shard * 4, shard * 4 + 4):
                captions = json.dumps({"captions": [sentence(number)]})
                for kind, content in (("png", png(number)), ("json", captions.encode()), ("txt", b"a short text")):
                    entry = tarfile.TarInfo(f"{number:04}.{kind}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
    for text, wanted in (("json.captions", {sentence(n) for n in range(8)}), ("txt", {"a short text"})):
        source = Source(str(tmp_path), image="png", text=text)
        for data in (TripletRows([source], MAKER, progress=False), TripletStream([source], MAKER)):
            (batch,) = take(TripletLoader(data, batch_size=8), 1)
            assert sorted(numbers_of(batch)) == list(range(8))
            assert {text_label(text) for text in wanted} == set(batch["labels"].tolist())


def test_impossible_sources_are_refused(tmp_path, shards):
    for options in ({}, {"text": "a", "label": "b"}):
        with pytest.raises(ValueError, match="expected either a text or a label column"):
            Source("x", **options)
    for weight in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="positive, finite weight"):
            Source("x", text="text", weight=weight)
    (tmp_path / "empty").mkdir()
    for opening in (partial(TripletRows, progress=False), TripletStream):
        with pytest.raises(ValueError, match="expected .*folder"):
            opening([Source(str(tmp_path / "nowhere"), text="text")], MAKER)
        with pytest.raises(ValueError, match="empty"):
            opening([Source(str(tmp_path / "empty"), text="text")], MAKER)
        with pytest.raises(ValueError, match="expected the columns image and caption, got"):
            opening([Source(str(shards), text="caption")], MAKER)
        with pytest.raises(ValueError, match="validation"):
            opening([Source(str(shards), text="text", split="validation")], MAKER)
        with pytest.raises(ValueError, match="at least one source"):
            opening([], MAKER)


def test_a_class_number_without_a_name_is_refused(tmp_path):
    rows = [{"image": {"bytes": png(1), "path": None}, "class": 2}]
    features = Features({"image": Image(), "class": Value("int64")})
    Dataset.from_list(rows, features).to_parquet(tmp_path / "train.parquet")
    data = TripletRows([Source(str(tmp_path), label="class", names=["a", "b"])], MAKER, progress=False)
    with pytest.raises(ValueError, match="class: expected the number of one of 2 named classes, got 2"):
        data[0]


def test_every_text_of_a_source_is_read_without_its_pictures(tmp_path):
    captioned = Features({"image": Image(), "captions": List(Value("string"))})
    rows = [{"image": {"bytes": b"no picture", "path": None}, "captions": texts} for texts in (["a b", " "], ["c"])]
    Dataset.from_list(rows, captioned).to_parquet(tmp_path / "train.parquet")
    assert list(texts_of(Source(str(tmp_path), text="captions"))) == ["a b", "c"]
