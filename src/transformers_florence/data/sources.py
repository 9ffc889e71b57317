"""Folders and shards of pictures with texts or class labels, read by `datasets` into one form of row.

A row is `{"image": {"bytes", "path"}, "texts": [...], "is_label": bool}`: the picture is not decoded, the texts are as
they were written, and the name of a class is a text like any other.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, Features, Image, IterableDataset, List, Value, load_dataset
from datasets.exceptions import DatasetsError

from .picture_corpus import load_split
from .prompts import normalize_text

ROW_FEATURES = Features({"image": Image(decode=False), "texts": List(Value("string")), "is_label": Value("bool")})
LABEL_BITS = 63  # of the 64 of the hash: labels are non-negative in int64


def text_label(text: str) -> int:
    """The label of a description: the same number for the same `normalize_text`, in every set, process and run.

    Florence's hash table (section 2.1) without the table: 63 bits of BLAKE2. Among n different descriptions two get
    the same number with a probability of about n^2 / 2^64: 5 in a million for the 9.7 million of the paper's corpus.
    `curation.count_labels`, which sees all texts of a corpus, refuses such a pair.
    """
    digest = hashlib.blake2b(normalize_text(text).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> (64 - LABEL_BITS)


@dataclass(frozen=True)
class Source:
    """One set of pictures: where it lies and which of its columns are what.

    Attributes:
        path: a folder that `datasets` reads: parquet files, tar files (webdataset), or pictures with a metadata.jsonl
            or metadata.csv (imagefolder), or pictures in one folder for each class.
        text: the column of the texts: a text, or a list of captions of which each epoch draws one. A dot leads into
            the parts of a column: `json.texts`.
        label: the column of a class instead of `text`: a name, or a number with `names`, or one of `datasets`' own
            class labels, which bring their names.
        names: names of the classes by their numbers.
        image: the column of the pictures, as encoded bytes or as paths.
        split: the split to read.
        weight: how often rows of this set are drawn, relative to other sets; None for as often as it has rows.

    Raises:
        ValueError: not exactly one of `text` and `label`, or a weight that is not positive and finite.
    """

    path: str
    text: str | None = None
    label: str | None = None
    names: Sequence[str] | None = None
    image: str = "image"
    split: str = "train"
    weight: float | None = None

    def __post_init__(self) -> None:
        if (self.text is None) == (self.label is None):
            raise ValueError(
                f"{self.path}: expected either a text or a label column, got {self.text!r}, {self.label!r}"
            )
        if self.weight is not None and not 0 < self.weight < float("inf"):
            raise ValueError(f"{self.path}: expected a positive, finite weight, got {self.weight!r}")


def make_sources(values: Any, name: str = "sources") -> list[Source]:
    """The sources of a YAML file: mappings, or texts of JSON with one mapping each, as a command line has them.

    Raises:
        ValueError: no list of mappings, or a key that no source has, or none that it needs; the message names `name`.
    """
    try:
        mappings = [json.loads(value) if isinstance(value, str) else value for value in values]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: expected a list of mappings with a path and a text, got {values!r}") from error
    if not mappings or not all(isinstance(value, dict) for value in mappings):
        raise ValueError(f"{name}: expected a list of mappings with a path and a text, got {values!r}")
    try:
        return [Source(**value) for value in mappings]
    except TypeError as error:
        known = [own.name for own in fields(Source)]
        raise ValueError(f"{name}: expected mappings with some of {known}: {error}") from error


def _first_part(column: str, columns: Sequence[str]) -> str:
    """The column that holds `column`: itself, or what stands before its first dot."""
    return column if column in columns else column.split(".")[0]


def _look_up(row: Mapping[str, Any], column: str) -> Any:
    """A column of a row, or a part of one."""
    if column in row:
        return row[column]
    value: Any = row
    for part in column.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


@dataclass(frozen=True)
class RowReader:
    """Turns a row of a source into the common form. An object of plain values, so that workers can have it."""

    image: str
    column: str
    names: tuple[str, ...] | None
    is_label: bool

    def texts(self, row: Mapping[str, Any]) -> list[str]:
        """The texts of a row that say something, stripped; none is an empty list.

        Raises:
            ValueError: a value that is no text, or a class number without a name.
        """
        value = _look_up(row, self.column)
        if self.is_label and isinstance(value, int) and not isinstance(value, bool):
            if self.names is None or not 0 <= value < len(self.names):
                known = 0 if self.names is None else len(self.names)
                raise ValueError(f"{self.column}: expected the number of one of {known} named classes, got {value}")
            value = self.names[value]
        values = value if isinstance(value, list) else [value]
        for text in values:
            if text is not None and not isinstance(text, str):
                raise ValueError(f"{self.column}: expected a text or a list of texts, got {text!r}")
        return [text.strip() for text in values if text is not None and text.strip()]

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        return {"image": row[self.image], "texts": self.texts(row), "is_label": self.is_label}


def open_source(source: Source, *, streaming: bool) -> tuple[Dataset | IterableDataset, RowReader]:
    """The rows of a source as they are stored, pictures undecoded, and what reads them.

    Raises:
        ValueError: no such folder, nothing in it that `datasets` reads, no such split or column, or a column of
            pictures that holds none.
    """
    if streaming:
        folder = Path(source.path)
        if not folder.is_dir():
            raise ValueError(f"expected a folder of pictures with texts, got {source.path!r}")
        try:
            rows: Dataset | IterableDataset = load_dataset(str(folder.resolve()), split=source.split, streaming=True)
        except (ValueError, FileNotFoundError, DatasetsError) as error:
            raise ValueError(f"expected pictures, split {source.split!r}, in {source.path!r}: {error}") from error
    else:
        rows = load_split(source.path, source.split)
    if rows.features is None:
        raise ValueError(f"{source.path}: expected at least one row in the split {source.split!r}, got none")
    columns = list(rows.features)
    wanted = source.text if source.text is not None else source.label
    column = _first_part(str(wanted), columns)
    for name in (source.image, column):
        if name not in columns:
            raise ValueError(f"{source.path}: expected the columns {source.image} and {column}, got {columns}")
    names = source.names
    feature = rows.features[column]
    if names is None and isinstance(feature, ClassLabel):
        names = feature.names
    rows = rows.select_columns(list(dict.fromkeys((source.image, column)))).cast_column(
        source.image, Image(decode=False)
    )
    reader = RowReader(source.image, str(wanted), None if names is None else tuple(names), source.label is not None)
    return rows, reader


def texts_of(source: Source) -> Iterator[str]:
    """Every text of a source, as its rows have them, without looking at a picture.

    Raises:
        ValueError: as `open_source`.
    """
    rows, reader = open_source(source, streaming=True)
    for row in rows.remove_columns([source.image]):
        yield from reader.texts(row)


def stream_rows(source: Source) -> IterableDataset:
    """A source as a stream of rows in the common form; its `num_shards` is how many processes can share it.

    Raises:
        ValueError: as `open_source`.
    """
    rows, reader = open_source(source, streaming=True)
    return rows.map(reader, remove_columns=list(rows.features), features=ROW_FEATURES)


__all__ = [
    "ROW_FEATURES",
    "RowReader",
    "Source",
    "make_sources",
    "open_source",
    "stream_rows",
    "text_label",
    "texts_of",
]
