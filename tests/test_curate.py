"""The curation script on planted corpora: everything planted is found, named and counted, and nothing else goes."""

import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from datasets import Dataset, Features, Value, load_dataset
from datasets import Image as ImageFeature
from PIL import Image

pytest.importorskip("imagededup", reason="needs the curation extra: pip install 'transformers_florence[curation]'")

import curate
from transformers_florence.data.curation import REASONS
from transformers_florence.data.sources import Source, text_label
from transformers_florence.data.triplet_loader import TripletLoader, TripletRows, TripletStream
from transformers_florence.data.triplets import PictureDecoder, TripletMaker
from transformers_florence.image_processing_florence import FlorenceImageProcessor

GALLERY = Path(curate.__file__).parent / "gallery"
GOOD = 24


def photo(seed: int, size: tuple[int, int] = (96, 72)) -> Image.Image:
    """A soft random pattern: no two seeds look alike."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def encode(picture: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def planted() -> list[tuple[str, bytes, str]]:
    """Of each row why it must go, its picture and its text; every fourth text is shared."""
    rows = [("", encode(photo(n)), "a shared text" if n % 4 == 0 else f"text number {n}") for n in range(GOOD)]
    rows += [("duplicate", encode(photo(0, (60, 45))), "smaller"), ("duplicate", encode(photo(1)), "the same")]
    rows += [("duplicate", encode(photo(2), "JPEG", quality=30), "compressed")]
    rows += [("small", encode(photo(50, (31, 40))), "tiny"), ("small", encode(photo(51, (8, 8))), "tinier")]
    rows += [("narrow", encode(photo(52, (500, 40))), "wide"), ("narrow", encode(photo(53, (40, 12_000))), "tall")]
    rows += [
        ("corrupt", b"no picture", "lost"),
        ("corrupt", encode(photo(54))[:300], "cut"),
        ("corrupt", b"", "empty"),
    ]
    rows += [("no text", encode(photo(55)), ""), ("no text", encode(photo(56)), " \n")]
    rows += [
        ("in evaluation", encode(photo(60, (48, 36))), "known"),
        ("in evaluation", encode(photo(61)), "known too"),
    ]
    return [rows[n] for n in np.random.default_rng(0).permutation(len(rows)) if rows[n][0] != "duplicate"] + [
        row for row in rows if row[0] == "duplicate"
    ]


PLANTED = planted()


def write_parquet(folder: Path) -> dict:
    features = Features({"image": ImageFeature(), "text": Value("string")})
    for shard in range(2):
        own = PLANTED[: len(PLANTED) // 2] if shard == 0 else PLANTED[len(PLANTED) // 2 :]
        rows = {"image": [{"bytes": b, "path": None} for _, b, _ in own], "text": [text for *_, text in own]}
        Dataset.from_dict(rows, features).to_parquet(folder / f"train-{shard:05}-of-00002.parquet")
    return {"text": "text"}


def write_folder(folder: Path) -> dict:
    lines = []
    for number, (_, content, text) in enumerate(PLANTED):
        (folder / f"{number:03}.png").write_bytes(content)
        lines.append(json.dumps({"file_name": f"{number:03}.png", "text": text}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return {"text": "text"}


def write_tar(folder: Path) -> dict:
    with tarfile.open(folder / "shard-000.tar", "w") as tar:
        for number, (_, image, text) in enumerate(PLANTED):
            for kind, content in (("png", image), ("txt", text.encode())):
                entry = tarfile.TarInfo(f"{number:03}.{kind}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    return {"text": "txt", "image": "png"}


def write_config(folder: Path, sources: list[dict], **options) -> list[str]:
    """The command line of a curation of these sources."""
    file = folder / "curate.yaml"
    file.write_text(yaml.safe_dump({"sources": sources, "shards": 2, "threads": 1, **options}))
    return ["--config", str(file), "--output", str(folder / "out")]


@pytest.fixture
def evaluation(tmp_path):
    """Pictures that must not be trained on, in formats and sizes of their own; one cannot be read."""
    folder = tmp_path / "evaluation"
    folder.mkdir()
    for seed in (60, 61, 62):
        (folder / f"{seed}.jpg").write_bytes(encode(photo(seed), "JPEG"))
    (folder / "63.jpg").write_bytes(b"no picture")
    return folder


@pytest.mark.parametrize("kind", ["parquet", "webdataset"])
@pytest.mark.parametrize("write", [write_parquet, write_folder, write_tar])
def test_all_that_was_planted_is_found_and_nothing_else(tmp_path, evaluation, capsys, write, kind):
    (tmp_path / "corpus").mkdir()
    columns = write(tmp_path / "corpus")
    source = {"path": str(tmp_path / "corpus"), **columns}
    curate.main([*write_config(tmp_path, [source], evaluation=[str(evaluation)], kind=kind), "--threads", "2"])

    out = tmp_path / "out"
    dropped = pq.read_table(out / "dropped.parquet").to_pylist()
    wanted = [{"source": 0, "row": n, "reason": why} for n, (why, *_) in enumerate(PLANTED) if why]
    assert dropped == wanted
    report = json.loads((out / "report.json").read_text())
    counts = {reason: sum(why == reason for why, *_ in PLANTED) for reason in REASONS}
    assert report["dropped"] == counts and report["kept"] == GOOD and report["rows"] == len(PLANTED)
    shared = GOOD // 4
    assert report["labels"] == GOOD - shared + 1
    assert (report["shared_labels"], report["texts_of_shared_labels"]) == (1, shared)
    assert (report["evaluation_pictures"], report["evaluation_corrupt"]) == (3, 1)
    printed = capsys.readouterr().out
    assert all(f"{reason:<18}{count:>12}" in printed for reason, count in counts.items() if count)

    labels = pq.read_table(out / "labels.parquet").to_pylist()
    assert labels[0] == {"label": text_label("a shared text"), "text": "a shared text", "count": shared}
    assert {entry["label"]: entry["text"] for entry in labels} == {
        text_label(text): text for why, _, text in PLANTED if not why
    }
    assert not (tmp_path / "out.partial").exists()

    kept = sorted((image, text) for why, image, text in PLANTED if not why)
    image, texts = ("image", "texts") if kind == "parquet" else ("jpg", "json.texts")
    rows = load_dataset(str(out), split="train", streaming=True).cast_column(image, ImageFeature(decode=False))
    read = [(row[image]["bytes"], row["texts"] if kind == "parquet" else row["json"]["texts"]) for row in rows]
    assert sorted((image, text) for image, (text,) in read) == kept, "bytes and texts are what they were"

    maker = TripletMaker(PictureDecoder(FlorenceImageProcessor(size={"height": 8, "width": 8}, do_center_crop=False)))
    again = Source(str(out), text=texts, image=image)
    for data, workers in ((TripletRows([again], maker, progress=False), 0), (TripletStream([again], maker), 2)):
        loader = TripletLoader(data, batch_size=GOOD // 2, num_workers=workers)
        batches = [batch for batch, _ in zip(loader, range(2), strict=False)]
        found = sorted(label for batch in batches for label in batch["labels"].tolist())
        assert found == sorted(text_label(text) for _, text in kept)


def test_pictures_with_other_texts_than_theirs_are_found_by_the_bundled_model(tmp_path):
    """Names of the gallery, three of them exchanged; and a second, wrong caption that goes alone."""
    names = {
        "1f4be": "floppy disk",
        "1f4b6": "euro banknote",
        "1f33f": "herb",
        "1f455": "t-shirt",
        "1f48c": "love letter",
        "1f3c0": "basketball",
        "1f43b": "bear",
        "27a1": "right arrow",
    }
    texts = {code: [name] for code, name in names.items()}
    texts["1f4be"], texts["1f33f"], texts["1f43b"] = [["herb"], ["bear"], ["floppy disk"]]
    texts["1f455"] = ["t-shirt", "bear"]
    (tmp_path / "corpus").mkdir()
    lines = []
    for code, own in texts.items():
        shutil.copy(GALLERY / f"gallery/{code}_noto.png", tmp_path / "corpus")
        lines.append(json.dumps({"file_name": f"{code}_noto.png", "captions": own}))
    (tmp_path / "corpus/metadata.jsonl").write_text("\n".join(lines))
    source = {"path": str(tmp_path / "corpus"), "text": "captions"}
    curate.main(write_config(tmp_path, [source], min_relevance=0.15, duplicate_distance=2))
    dropped = pq.read_table(tmp_path / "out/dropped.parquet").to_pylist()
    assert [(list(texts)[entry["row"]], entry["reason"]) for entry in dropped] == [
        ("1f4be", "mismatch"),
        ("1f33f", "mismatch"),
        ("1f43b", "mismatch"),
    ]
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["texts_dropped"] == {"mismatch": 4} and report["kept"] == 5
    rows = [row for file in (tmp_path / "out/data").iterdir() for row in pq.read_table(file).to_pylist()]
    assert {tuple(row["texts"]) for row in rows} == {(names[c],) for c in ("1f4b6", "1f455", "1f48c", "1f3c0", "27a1")}
    assert all(row["labels"] == [text_label(text) for text in row["texts"]] for row in rows)


def test_an_interrupted_curation_goes_on_and_ends_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(curate, "BLOCK_ROWS", 8)
    (tmp_path / "corpus").mkdir()
    source = {"path": str(tmp_path / "corpus"), **write_parquet(tmp_path / "corpus")}
    command = write_config(tmp_path, [source, source])
    scanned = []
    scan = curate.scan

    def scan_until(limit: int):
        def scan_some(block, *rest):
            if len(scanned) == limit:
                raise KeyboardInterrupt
            scanned.append(len(block))
            return scan(block, *rest)

        return scan_some

    monkeypatch.setattr(curate, "scan", scan_until(7))
    with pytest.raises(KeyboardInterrupt):
        curate.main(command)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="expected the scan of these files by these rules, got that of others"):
        curate.main(write_config(tmp_path, [source]))
    write_config(tmp_path, [source, source])
    monkeypatch.setattr(curate, "scan", scan_until(100))
    write_shards = curate.write_shards

    def write_half(rows, folder, **options):
        write_shards((row for row, _ in zip(rows, range(9), strict=False)), folder, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(curate, "write_shards", write_half)
    with pytest.raises(KeyboardInterrupt):
        curate.main(command)
    assert not (tmp_path / "out").exists() and sum(scanned) == 2 * len(PLANTED), "no block was scanned twice"
    monkeypatch.setattr(curate, "write_shards", write_shards)
    curate.main(command)
    assert sum(scanned) == 2 * len(PLANTED)
    (tmp_path / "out").rename(tmp_path / "first")
    curate.main(command)
    assert sum(scanned) == 4 * len(PLANTED)
    for file in sorted(path for path in (tmp_path / "first").rglob("*") if path.is_file()):
        assert file.read_bytes() == (tmp_path / "out" / file.relative_to(tmp_path / "first")).read_bytes(), file
    report = json.loads((tmp_path / "out/report.json").read_text())
    evaluated = sum(why == "in evaluation" for why, *_ in PLANTED)
    assert report["kept"] == GOOD + evaluated, "the second source is one large duplicate"


def test_labels_are_balanced(tmp_path):
    (tmp_path / "corpus").mkdir()
    source = {"path": str(tmp_path / "corpus"), **write_parquet(tmp_path / "corpus")}
    curate.main([*write_config(tmp_path, [source]), "--label_cap", "2"])
    labels = pq.read_table(tmp_path / "out/labels.parquet").to_pylist()
    assert labels[0]["text"] == "a shared text" and labels[0]["count"] == 2
    assert json.loads((tmp_path / "out/report.json").read_text())["dropped"]["over cap"] == GOOD // 4 - 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(kind="zip"), "kind: expected one of"),
        (dict(shards=0), "shards and threads: expected at least 1"),
        (dict(shards=100), "shards: expected at most the 26 rows kept, got 100"),
        (dict(min_side=0), "min_side: expected a value in range"),
        (dict(unknown=1), "unknown keys unknown"),
        (dict(evaluation=["nowhere"]), "evaluation: expected a folder of pictures, got 'nowhere'"),
        (dict(min_relevance=0.1, model="nowhere"), "expected the folder of a checkpoint, got 'nowhere'"),
        (dict(sources=[]), "sources: expected a list of mappings"),
        (dict(sources=["corpus"]), "sources: expected a list of mappings"),
        (dict(sources=[{"path": "corpus", "words": "a"}]), "sources: expected mappings with some of"),
        (dict(sources=[{"path": "nowhere", "text": "a"}]), "expected a folder of pictures with texts"),
    ],
)
def test_impossible_curations_are_refused(tmp_path, options, message):
    (tmp_path / "corpus").mkdir()
    columns = write_parquet(tmp_path / "corpus")
    sources = options.pop("sources", [{"path": str(tmp_path / "corpus"), **columns}])
    with pytest.raises(ValueError, match=message):
        curate.main(write_config(tmp_path, sources, **options))
    assert not (tmp_path / "out").exists()


def test_the_configuration_that_comes_along_is_possible():
    config = Path(curate.__file__).parent / "configs/curate.yaml"
    sources, arguments, rules = curate.parse_arguments(["--config", str(config), "--shards", "4"])
    assert sources == [Source("corpus", text="name")]
    assert (arguments.shards, rules.label_cap) == (4, yaml.safe_load(config.read_text())["label_cap"])


def test_an_output_that_is_there_is_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    command = write_config(tmp_path, [{"path": "corpus", "text": "text"}])
    with pytest.raises(ValueError, match="output: expected a folder that is not there yet"):
        curate.main(command)
    (tmp_path / "curate.yaml").write_text("- a list")
    with pytest.raises(ValueError, match="expected keys and values"):
        curate.main(command)
