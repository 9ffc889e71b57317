"""Builds the free image-text-label picture corpus (emoji, clip art, stamps) from registry packages.

    python examples/build_picture_corpus.py --out data/corpus --permissive

The pictures come out of packages that the ordinary clients fetch (`npm pack`, `apt-get download`), rendered on white
squares by resvg (`pip install resvg-py`). What was fetched and rendered stays in the cache, so an interrupted run goes
on where it was, and the same packages give the same bytes on every run. The result loads by any of

    datasets.load_dataset("data/corpus")
    datasets.load_dataset("parquet", data_files={"train": "data/corpus/data/train-*.parquet"})
    datasets.load_dataset("imagefolder", data_dir="data/corpus/data/train")  # after --format imagefolder

Columns: image, file_name, source, style, license (SPDX), name, keywords, description, group, subgroup, concept,
hexcode and split. `concept` is the index of an emoji's meaning, equal in all styles, and -1 elsewhere. Splits:

- `test_concept`: every style of the concepts whose index modulo 7 is 3;
- `test_style`: the styles noto and noto-v1 of all other concepts;
- `test_clipart`: an eighth of the clip art, drawn by a hash of the title;
- `train`: the rest, without any picture that equals a test picture in every pixel, and without clip art that is called
  exactly what a concept of `test_concept` is called.

Texts are from emojibase (MIT) and Unicode CLDR (Unicode-3.0). Beside this script, `picture_packages.py` fetches and
opens the packages, `picture_sources.py` says what is in them, and `picture_rendering.py` draws it.
"""

import argparse
import hashlib
import json
import shutil
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features, Image, List, Value
from tqdm.auto import tqdm

from picture_packages import Unavailable, fetch_deb, fetch_npm, readable
from picture_rendering import render_picture, resvg_py
from picture_sources import (
    CLIPART_PACKAGE,
    EMOJI_STYLES,
    STAMPS_PACKAGE,
    EmojiTexts,
    clipart_jobs,
    emoji_jobs,
    rename_series,
    stamp_jobs,
)
from transformers_florence.data.prompts import normalize_text

# Raise it when the same package would give other pictures or texts, by a change here or in the files that this one
# imports: finished shards are then redone.
RECIPE_VERSION = 1
SOURCES = ("emoji", "clipart", "stamps")
SPLITS = ("train", "test_style", "test_concept", "test_clipart")
PERMISSIVE = {"Apache-2.0", "MIT", "CC-BY-4.0", "CC-PDDC"}
MARKER = ".picture_corpus"  # tells that a folder may be replaced

TEXT_FEATURES = {
    "file_name": Value("string"),
    "source": Value("string"),
    "style": Value("string"),
    "license": Value("string"),
    "name": Value("string"),
    "keywords": List(Value("string")),
    "description": Value("string"),
    "group": Value("string"),
    "subgroup": Value("string"),
    "concept": Value("int64"),
    "hexcode": Value("string"),
}
FEATURES = Features({"image": Image(), **TEXT_FEATURES, "split": Value("string")})
SHARD_FEATURES = Features({"image": Value("binary"), **TEXT_FEATURES, "pixels": Value("string")})


def say(line: str) -> None:
    tqdm.write(line, file=sys.stderr)


# Shards: the rendered pictures and texts of one style, kept in the cache


@dataclass(frozen=True)
class Part:
    """One style to build: `origin` names the packages that decide its content, `make_jobs` reads them."""

    label: str
    origin: tuple[str, ...]
    make_jobs: Callable[[], list[tuple[dict, bytes]]]


def emoji_parts(cache: Path, permissive: bool) -> Iterator[Part]:
    try:
        with readable("the packages with the texts"):
            texts = EmojiTexts(cache)
    except Unavailable as error:
        say(f"emoji are left out: {error}")
        return
    for style, source in EMOJI_STYLES.items():
        if permissive and source.license not in PERMISSIVE:
            continue
        try:
            package = fetch_npm(source.package, cache)
        except Unavailable as error:
            say(f"emoji/{style} is left out: {error}")
            continue
        yield Part(f"emoji/{style}", (*texts.packages, source.package), partial(emoji_jobs, style, package, texts))


def debian_parts(label: str, name: str, make_jobs: Callable, cache: Path) -> Iterator[Part]:
    try:
        package = fetch_deb(name, cache)
    except Unavailable as error:
        say(f"{label} is left out: {error} (`apt-get update` may be needed first)")
        return
    yield Part(label, (package.name,), partial(make_jobs, package))


def parts(sources: Iterable[str], permissive: bool, cache: Path) -> Iterator[Part]:
    """What can be had of the sources. What cannot is told in one line."""
    if "emoji" in sources:
        yield from emoji_parts(cache, permissive)
    if "clipart" in sources:
        yield from debian_parts("clipart", CLIPART_PACKAGE, clipart_jobs, cache)
    if "stamps" in sources and not permissive:
        yield from debian_parts("stamps", STAMPS_PACKAGE, stamp_jobs, cache)


def build_shard(part: Part, cache: Path, size: int, render: Callable) -> list[dict]:
    """The rows of one style: from its finished shard, or else rendered by `render`, a `map`, and kept as a shard."""
    versions = (metadata.version("pillow"), metadata.version("resvg-py"), unicodedata.unidata_version)
    key = hashlib.sha256(json.dumps([RECIPE_VERSION, size, *versions, *part.origin]).encode()).hexdigest()[:16]
    path = cache / "rendered" / f"{part.label.replace('/', '-')}-{key}.parquet"
    if not path.exists():
        with readable(f"the package of {part.label}"):
            tasks = [(*job, size) for job in part.make_jobs()]
        rows = [row for row in tqdm(render(render_picture, tasks), part.label, len(tasks), unit="picture") if row]
        if unusable := len(tasks) - len(rows):
            say(f"{part.label}: {unusable} of {len(tasks)} pictures cannot be used (empty, damaged or not free)")
        rename_series([row for row in rows if "path" in row])
        path.parent.mkdir(exist_ok=True)
        partial_path = path.with_suffix(".partial")
        write_table(rows, SHARD_FEATURES, partial_path)
        partial_path.replace(path)
    return pq.read_table(path).to_pylist()


def build_rows(sources: Iterable[str], permissive: bool, cache: Path, size: int, num_jobs: int) -> list[dict]:
    """The rows of every style that can be had, rendered by `num_jobs` processes."""
    cache.mkdir(parents=True, exist_ok=True)
    rows = []
    executor = ProcessPoolExecutor(num_jobs) if num_jobs > 1 else None  # its processes start with the first task
    render = partial(executor.map, chunksize=16) if executor else map
    try:
        for part in parts(sources, permissive, cache):
            try:
                rows += build_shard(part, cache, size, render)
            except Unavailable as error:
                say(f"{part.label} is left out: {error}")
    finally:
        if executor:
            executor.shutdown(cancel_futures=True)
    return rows


# The corpus


def split_of(row: dict) -> str:
    if row["concept"] >= 0 and row["concept"] % 7 == 3:
        return "test_concept"
    if row["style"] in ("noto", "noto-v1"):
        return "test_style"
    if row["source"] == "clipart":
        title = normalize_text(row["name"]).encode()
        return "test_clipart" if int(hashlib.sha256(title).hexdigest(), 16) % 8 == 0 else "train"
    return "train"


def keep_first(rows: list[dict], taken: set[str] | None = None) -> list[dict]:
    """The rows whose pixels are neither in `taken` nor those of an earlier row."""
    first = {}
    for row in rows:
        first.setdefault(row["pixels"], row)
    return [row for pixels, row in first.items() if pixels not in (taken or ())]


def assign_splits(rows: list[dict]) -> dict[str, list[dict]]:
    """Split -> rows in their order. Of pictures equal in every pixel one stays in train, and none that is in a test.

    Clip art of train that has the name of an unseen concept would show the concept: it is left out.

    The emoji of a test stay as they are, since one drawing may stand for two concepts there as well as anywhere.
    """
    splits = {name: [row | {"split": name} for row in rows if split_of(row) == name] for name in SPLITS}
    counts = {name: len(members) for name, members in splits.items()}
    splits["test_clipart"] = keep_first(splits["test_clipart"])
    test = {row["pixels"] for name in SPLITS[1:] for row in splits[name]}
    unseen = {normalize_text(row["name"]) for row in splits["test_concept"]}
    unnamed = [row for row in splits["train"] if normalize_text(row["name"]) not in unseen]
    distinct = keep_first(unnamed)
    splits["train"] = keep_first(distinct, test)
    say(f"test_clipart: {counts['test_clipart'] - len(splits['test_clipart'])} pictures that come twice are left out")
    say(f"train: {counts['train'] - len(unnamed)} pictures with the name of an unseen concept are left out")
    say(f"train: {len(unnamed) - len(distinct)} pictures that come twice are left out")
    say(f"train: {len(distinct) - len(splits['train'])} pictures that equal a test picture are left out")
    return {name: members for name, members in splits.items() if members}


def write_table(rows: list[dict], features: Features, path: Path) -> None:
    schema = features.arrow_schema
    table = pa.Table.from_pylist([{name: row[name] for name in schema.names} for row in rows], schema=schema)
    pq.write_table(table, path, row_group_size=256)


def write_parquet(splits: dict[str, list[dict]], directory: Path) -> None:
    """One file a split, named so that `datasets` finds the splits by itself."""
    for split, rows in splits.items():
        pictures = [{**row, "image": {"bytes": row["image"], "path": row["file_name"]}} for row in rows]
        write_table(pictures, FEATURES, directory / f"{split}-00000-of-00001.parquet")


def write_imagefolder(splits: dict[str, list[dict]], directory: Path) -> None:
    """One folder a split, each with its metadata.jsonl."""
    names = [name for name in FEATURES if name != "image"]
    for split, rows in splits.items():
        for style in {row["style"] for row in rows}:
            (directory / split / style).mkdir(parents=True)
        for row in tqdm(rows, desc=f"writing {split}", unit="picture"):
            (directory / split / row["file_name"]).write_bytes(row["image"])
        lines = (json.dumps({name: row[name] for name in names}, ensure_ascii=False) + "\n" for row in rows)
        (directory / split / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")


WRITERS = {"parquet": write_parquet, "imagefolder": write_imagefolder}


def count_table(splits: dict[str, list[dict]]) -> str:
    """A Markdown table: pictures by source, style and licence, in each split."""
    counts = Counter()
    for split, rows in splits.items():
        counts.update(((row["source"], row["style"], row["license"]), split) for row in rows)
    lines = [["source", "style", "license", *splits, "all"]]
    lines.append(["---"] * 3 + ["---:"] * (len(splits) + 1))
    for origin in dict.fromkeys(origin for origin, _ in counts):
        numbers = [counts[origin, split] for split in splits]
        lines.append([*origin, *map(str, numbers), str(sum(numbers))])
    totals = [len(rows) for rows in splits.values()]
    lines.append(["**all**", "", "", *map(str, totals), str(sum(totals))])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def card(splits: dict[str, list[dict]], file_format: str, size: int) -> str:
    """The dataset card: what `datasets.load_dataset(folder)` needs to find the splits, and the counts."""
    end = "-*.parquet" if file_format == "parquet" else "/**"
    files = "".join(f"  - split: {split}\n    path: data/{split}{end}\n" for split in splits)
    return (
        f"---\nconfigs:\n- config_name: default\n  data_files:\n{files}---\n\n# Picture corpus\n\n"
        f"Emoji, clip art and stamps at {size}x{size} pixels with their names, built by `build_picture_corpus.py`.\n"
        f"Each picture has its own licence, in the column `license`.\n\n{count_table(splits)}\n"
    )


def write_corpus(splits: dict[str, list[dict]], out: Path, file_format: str, size: int) -> None:
    """Writes out/data and out/README.md; a corpus that was there is replaced once the new one is complete."""
    new, old = out / ".new", out / ".old"
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    new.mkdir(parents=True)
    WRITERS[file_format](splits, new)
    (out / MARKER).touch()
    if (out / "data").exists():
        (out / "data").rename(old)
    new.rename(out / "data")
    shutil.rmtree(old, ignore_errors=True)
    (out / "README.md").write_text(card(splits, file_format, size), encoding="utf-8")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the corpus")
    parser.add_argument("--format", choices=sorted(WRITERS), default="parquet")
    parser.add_argument("--permissive", action="store_true", help="leave share-alike and GPL pictures out")
    parser.add_argument("--size", type=int, default=128, help="side of the square pictures in pixels")
    parser.add_argument("--cache", type=Path, help="downloads and rendered pictures (default: OUT/.cache)")
    parser.add_argument("--sources", nargs="+", default=SOURCES, choices=SOURCES, help="default: all")
    parser.add_argument("--jobs", type=int, default=2, help="processes that render")
    args = parser.parse_args(argv)
    if not 16 <= args.size <= 1024:
        parser.error(f"expected --size from 16 to 1024, got {args.size}")
    if args.jobs < 1:
        parser.error(f"expected --jobs of at least 1, got {args.jobs}")
    if (args.out / "data").exists() and not (args.out / MARKER).exists():
        parser.error(f"expected {args.out} to be new or a corpus of this script, got a folder with other data")
    return args


def main(argv: list[str] | None = None) -> int:
    """Builds the corpus. Returns the exit code: 1 if there is nothing to build it from."""
    args = parse_args(argv)
    if resvg_py is None:
        say("nothing is built: the renderer is not installed (pip install resvg-py)")
        return 1
    rows = build_rows(args.sources, args.permissive, args.cache or args.out / ".cache", args.size, args.jobs)
    if not rows:
        say("nothing is built: no source could be had")
        return 1
    splits = assign_splits(rows)
    write_corpus(splits, args.out, args.format, args.size)
    print(count_table(splits))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
