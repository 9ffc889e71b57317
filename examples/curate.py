"""Curate pictures with texts: filter, remove doubles, label, balance, and write shards with a report.

    python examples/curate.py --config examples/configs/curate.yaml --output curated

The sources and rules stand in the YAML file (`CurateArguments`, `CurationRules`); options of the command line win. An
interrupted run goes on when the same command is given again. The folder `--output` appears when all of it is there:

    data/train-*.parquet or .tar    what training reads: image, texts, labels
    labels.parquet                  the hash table: label, text, count
    dropped.parquet                 every row that went: source, row, reason
    report.json                     what was kept, what was dropped and why, labels, shared texts
"""

import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from datasets import Image, load_dataset
from tqdm.auto import tqdm
from transformers import AutoProcessor, HfArgumentParser

from transformers_florence import FlorenceModel, load_bundled, load_checkpoint
from transformers_florence.data.curation import (
    BLOCK_ROWS,
    KEPT,
    REASONS,
    CurationRules,
    Decision,
    Facts,
    LabelTable,
    PictureReader,
    Relevance,
    decide,
    hash_pictures,
    in_blocks,
    picture_bytes,
    scan,
)
from transformers_florence.data.shards import SHARD_KINDS, write_shards
from transformers_florence.data.sources import Source, make_sources, stream_rows
from transformers_florence.evaluation.zero_shot import embed_pixels, embed_texts


@dataclass
class CurateArguments:
    """What is written and how; the sources are `data.sources.Source`s, the rules those of `CurationRules`."""

    evaluation: list[str] = field(default_factory=list)  # folders of pictures that must not be among the kept
    output: str = "curated"
    model: str = "bundled"  # whose cosine is the relevance: bundled, or the folder of a checkpoint
    device: str = "cpu"
    kind: str = "parquet"  # or webdataset
    shards: int = 16  # at least as many as training has ranks x workers
    threads: int = 2

    def __post_init__(self) -> None:
        if self.kind not in SHARD_KINDS:
            raise ValueError(f"kind: expected one of {SHARD_KINDS}, got {self.kind!r}")
        if self.shards < 1 or self.threads < 1:
            raise ValueError(f"shards and threads: expected at least 1, got {self.shards} and {self.threads}")


def parse_arguments(argv: list[str]) -> tuple[list[Source], CurateArguments, CurationRules]:
    """Defaults, then the YAML file of `--config`, then the other options; the sources stand in the file."""
    parser = HfArgumentParser((CurateArguments, CurationRules))
    parser.add_argument("--config", required=True, help="a YAML file with the sources and any of the options")
    config = parser.parse_known_args(argv)[0].config
    values = yaml.safe_load(Path(config).read_text("utf-8"))
    if not isinstance(values, dict):
        raise ValueError(f"{config}: expected keys and values, got {values!r}")
    sources = make_sources(values.pop("sources", []))
    known = {own.name for own in (*fields(CurateArguments), *fields(CurationRules))}
    if unknown := sorted(map(str, set(values) - known)):
        raise ValueError(f"{config}: unknown keys {', '.join(unknown)}")
    parser.set_defaults(**values)
    options = vars(parser.parse_args(argv))

    def make(kind: type) -> Any:
        return kind(**{own.name: options[own.name] for own in fields(kind)})

    return sources, make(CurateArguments), make(CurationRules)


class ModelRelevance:
    """The cosine of pictures and their texts in a dual encoder's space."""

    def __init__(self, model: str, device: str, rules: CurationRules) -> None:
        if model == "bundled":
            self.model, self.processor = load_bundled()
        else:
            self.model, self.processor = load_checkpoint(FlorenceModel, model), AutoProcessor.from_pretrained(model)
        self.model.to(device)
        self.rules = rules

    def prepare(self, pixels: np.ndarray) -> torch.Tensor | None:
        """(3, height, width), uint8 -> the model's input; None for a picture that goes anyway."""
        height, width = pixels.shape[1:]
        if self.rules.is_small(width, height) or self.rules.is_narrow(width, height):
            return None
        image_processor = self.processor.image_processor
        own = {"max_aspect_ratio": max(self.rules.max_aspect, image_processor.max_aspect_ratio)}
        inputs = image_processor(pixels, input_data_format="channels_first", return_tensors="pt", **own)
        return inputs["pixel_values"][0]

    def __call__(self, prepared: list[torch.Tensor], texts: list[list[str]]) -> list[list[float]]:
        pictures = embed_pixels(self.model, torch.stack(prepared))
        words = embed_texts(self.model, self.processor.tokenizer, [text for own in texts for text in own])
        counts = torch.tensor([len(own) for own in texts])
        cosines = (pictures.repeat_interleave(counts.to(pictures.device), dim=0) * words).sum(dim=1).cpu()
        return [own.tolist() for own in cosines.split(counts.tolist())]


def files_of(folder: str) -> list[list]:
    """What tells whether a folder changed: name, size and time of each file."""
    files = sorted(file for file in Path(folder).rglob("*") if file.is_file())
    return [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def check_same_curation(work: Path, settings: dict) -> None:
    """Keep what an interrupted run scanned only if it scanned the same.

    Raises:
        ValueError: it did not.
    """
    work.mkdir(parents=True, exist_ok=True)
    file = work / "settings.json"
    text = json.dumps(settings, indent=1)
    if file.is_file() and file.read_text("utf-8") != text:
        raise ValueError(
            f"{work}: expected the scan of these files by these rules, got that of others; remove it to begin anew"
        )
    replace_file(file, text.encode())


def replace_file(file: Path, content: bytes) -> None:
    """Write a file so that it is there as a whole or not at all."""
    partial = file.with_name(file.name + ".partial")
    partial.write_bytes(content)
    partial.replace(file)


def scan_source(
    source: Source, number: int, work: Path, reader: PictureReader, relevance: Relevance | None
) -> Iterator[Facts]:
    """The facts of a source, block by block; a block that an earlier run scanned is read from its file."""
    done = sorted(work.glob(f"scan-{number:03}-*.npz"))
    parts = []
    for file in done:
        with np.load(file, allow_pickle=False) as saved:
            parts.append(Facts(saved["rows"], saved["texts"]))
    yield from parts
    if parts and len(parts[-1].rows) < BLOCK_ROWS:  # the last block is never full: it may be empty
        return
    rows = stream_rows(source).skip(len(parts) * BLOCK_ROWS)
    index, last = len(parts), BLOCK_ROWS
    for block in in_blocks(rows, BLOCK_ROWS):
        facts = scan(block, reader, relevance)
        save_facts(work / f"scan-{number:03}-{index:06}.npz", facts)
        index, last = index + 1, len(block)
        yield facts
    if last == BLOCK_ROWS:
        save_facts(work / f"scan-{number:03}-{index:06}.npz", Facts.join([]))


def save_facts(file: Path, facts: Facts) -> None:
    """As numpy's own format, whole or not at all."""
    partial = file.with_suffix(".partial")
    with partial.open("wb") as content:
        np.savez(content, rows=facts.rows, texts=facts.texts)
    partial.replace(file)


def scan_all(arguments: CurateArguments, rules: CurationRules, sources: list[Source], work: Path) -> list[Facts]:
    """The facts of each source."""
    relevance = ModelRelevance(arguments.model, arguments.device, rules) if rules.asks_for_relevance else None
    reader = PictureReader(arguments.threads, None if relevance is None else relevance.prepare)
    facts = []
    for number, source in enumerate(sources):
        parts = []
        with tqdm(desc=f"scanning {source.path}", unit="picture") as bar:
            for part in scan_source(source, number, work, reader, relevance):
                parts.append(part)
                bar.update(len(part.rows))
        facts.append(Facts.join(parts))
    return facts


def evaluation_hashes(folders: list[str], threads: int) -> tuple[np.ndarray, int]:
    """Hashes of all pictures of all splits, and how many cannot be read.

    Raises:
        ValueError: a folder without a column of pictures.
    """
    reader, hashes, corrupt = PictureReader(threads), [np.empty(0, np.uint64)], 0
    for folder in folders:
        if not Path(folder).is_dir():
            raise ValueError(f"evaluation: expected a folder of pictures, got {folder!r}")
        for name, rows in load_dataset(str(Path(folder).resolve()), streaming=True).items():
            if "image" not in rows.features:
                raise ValueError(f"{folder}, {name}: expected the column image, got {list(rows.features)}")
            images = rows.select_columns("image").cast_column("image", Image(decode=False))
            bar = tqdm((row["image"] for row in images), desc=f"hashing {folder}", unit="picture")
            own, unread = hash_pictures(bar, reader)
            hashes.append(own)
            corrupt += unread
    return np.concatenate(hashes), corrupt


def kept_rows(sources: list[Source], decision: Decision, facts: list[Facts], table: LabelTable) -> Iterator[dict]:
    """The rows to write, with the texts that are kept and their labels."""
    row_number = text_number = 0
    with tqdm(total=decision.report["kept"], desc="writing", unit="picture") as bar:
        for source, own in zip(sources, facts, strict=True):
            for row, known in zip(stream_rows(source), own.rows, strict=True):
                texts = row["texts"]
                keeps = decision.texts[text_number : text_number + len(texts)]
                if len(texts) != known["texts"]:
                    raise ValueError(f"{source.path}: expected the rows that were scanned, got others")
                if decision.rows[row_number] == KEPT:
                    kept = [text for text, keep in zip(texts, keeps, strict=True) if keep]
                    path = row["image"].get("path")
                    image = {"bytes": picture_bytes(row["image"]), "path": path and Path(path).name}
                    yield {"image": image, "texts": kept, "labels": [table.add(text) for text in kept]}
                    bar.update()
                row_number, text_number = row_number + 1, text_number + len(texts)


def write_tables(folder: Path, decision: Decision, facts: list[Facts], table: LabelTable) -> None:
    """`labels.parquet`, the most common first, and `dropped.parquet`."""
    common = table.counts.most_common()
    labels = {
        "label": pa.array([label for label, _ in common], pa.int64()),
        "text": pa.array([table.texts[label] for label, _ in common], pa.string()),
        "count": pa.array([count for _, count in common], pa.int64()),
    }
    pq.write_table(pa.table(labels), folder / "labels.parquet")
    source = np.repeat(np.arange(len(facts)), [len(own.rows) for own in facts])
    row = np.concatenate([np.arange(len(own.rows)) for own in facts])
    gone = decision.rows != KEPT
    reasons = pa.array([REASONS[fate] for fate in decision.rows[gone]], pa.string())
    pq.write_table(pa.table({"source": source[gone], "row": row[gone], "reason": reasons}), folder / "dropped.parquet")


def sync(folder: Path) -> None:
    """See that all files of a folder are on the disk before its name says that they are."""
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as content:
                os.fsync(content.fileno())


def print_report(report: dict) -> None:
    """The numbers as a table."""
    lines = [("rows read", report["rows"])]
    lines += [(f"  {reason}", count) for reason, count in report["dropped"].items() if count]
    lines += [("rows kept", report["kept"]), ("texts read", report["texts"])]
    lines += [(f"  {reason}", count) for reason, count in report["texts_dropped"].items() if count]
    lines += [("texts kept", report["texts_kept"]), ("labels", report["labels"])]
    lines += [("  of several texts", report["shared_labels"]), ("texts of these", report["texts_of_shared_labels"])]
    for name, count in lines:
        print(f"{name:<20}{count:>12,}")


def main(argv: list[str] | None = None) -> None:
    sources, arguments, rules = parse_arguments(sys.argv[1:] if argv is None else argv)
    output = Path(arguments.output)
    if output.exists():
        raise ValueError(f"output: expected a folder that is not there yet, got {arguments.output!r}")
    work = output.with_name(output.name + ".partial")
    scanned = ("min_side", "max_aspect") if rules.asks_for_relevance else ()
    settings = {
        "sources": [asdict(source) | {"files": files_of(source.path)} for source in sources],
        "model": files_of(arguments.model) or arguments.model if rules.asks_for_relevance else None,
        "rules": {name: getattr(rules, name) for name in scanned},
    }
    check_same_curation(work, settings)

    facts = scan_all(arguments, rules, sources, work)
    hashes, unread = evaluation_hashes(arguments.evaluation, arguments.threads)
    decision = decide(Facts.join(facts), rules, hashes)
    if decision.report["kept"] < arguments.shards:
        print_report(decision.report)
        raise ValueError(f"shards: expected at most the {decision.report['kept']} rows kept, got {arguments.shards}")

    result = work / "result"
    shutil.rmtree(result, ignore_errors=True)
    table = LabelTable()
    write_shards(kept_rows(sources, decision, facts, table), result, kind=arguments.kind, num_shards=arguments.shards)
    write_tables(result, decision, facts, table)
    report = decision.report | {
        "rows_by_source": {source.path: len(own.rows) for source, own in zip(sources, facts, strict=True)},
        "evaluation_pictures": len(hashes),
        "evaluation_corrupt": unread,
        "rules": asdict(rules),
        "arguments": asdict(arguments),
        "sources": [asdict(source) for source in sources],
    }
    replace_file(result / "report.json", json.dumps(report, indent=1).encode())
    sync(result)
    result.replace(output)
    shutil.rmtree(work)
    print_report(report)
    print(f"wrote {arguments.shards} shards to {output}")


if __name__ == "__main__":
    main()
