"""Writing pictures with texts and labels as shards that `datasets` reads: parquet, or tar files (webdataset)."""

import io
import json
import tarfile
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Features, Image, List, Value
from pyarrow.parquet import ParquetWriter

SHARD_KINDS = ("parquet", "webdataset")
SHARD_FEATURES = Features({"image": Image(), "texts": List(Value("string")), "labels": List(Value("int64"))})
ROW_GROUP = 100  # rows of a parquet shard that are written, and can be read, at a time


class ParquetShard:
    """One parquet file with the columns of `SHARD_FEATURES`, which `datasets` recognises."""

    def __init__(self, file: Path) -> None:
        self.writer = ParquetWriter(file, SHARD_FEATURES.arrow_schema)
        self.rows: list[dict[str, Any]] = []

    def __enter__(self) -> "ParquetShard":
        return self

    def add(self, number: int, row: dict[str, Any]) -> None:
        self.rows.append(row)
        if len(self.rows) == ROW_GROUP:
            self._flush()

    def _flush(self) -> None:
        if self.rows:
            self.writer.write_table(pa.Table.from_pylist(self.rows, SHARD_FEATURES.arrow_schema))
            self.rows = []

    def __exit__(self, *error: Any) -> None:
        with self.writer:
            self._flush()


class TarShard:
    """One tar file with `NUMBER.jpg` and `NUMBER.json` for each row.

    The picture's bytes are what they were, whatever its format: readers look at them and not at the name, and expect
    one name in all shards.
    """

    def __init__(self, file: Path) -> None:
        self.tar = tarfile.open(file, "w")  # noqa: SIM115  # closed by __exit__

    def __enter__(self) -> "TarShard":
        return self

    def add(self, number: int, row: dict[str, Any]) -> None:
        texts = json.dumps({"texts": row["texts"], "labels": row["labels"]}, ensure_ascii=False)
        for kind, content in (("jpg", row["image"]["bytes"]), ("json", texts.encode())):
            entry = tarfile.TarInfo(f"{number:09}.{kind}")  # without a time: equal rows make equal files
            entry.size = len(content)
            self.tar.addfile(entry, io.BytesIO(content))

    def __exit__(self, *error: Any) -> None:
        self.tar.close()


def write_shards(rows: Iterable[dict[str, Any]], folder: Path, *, kind: str, num_shards: int) -> list[Path]:
    """Deal rows out to shards in turn, so that each is a sample of all; they differ by one row at most.

    Args:
        rows: `{"image": {"bytes", "path"}, "texts": [...], "labels": [...]}`; of each shard `ROW_GROUP` are in memory.
        folder: where the shards come, in its `data/`; it is made.
        kind: one of `SHARD_KINDS`.
        num_shards: how many. Fewer rows than that leave empty shards, which no worker can read.

    Returns:
        The files: `datasets` finds them as the split `train` of the folder.

    Raises:
        ValueError: another kind, or no shards.
    """
    if kind not in SHARD_KINDS or num_shards < 1:
        raise ValueError(f"expected one of {SHARD_KINDS} and at least 1 shard, got {kind!r} and {num_shards}")
    (folder / "data").mkdir(parents=True, exist_ok=True)
    ending = "parquet" if kind == "parquet" else "tar"
    files = [folder / "data" / f"train-{n:05}-of-{num_shards:05}.{ending}" for n in range(num_shards)]
    with ExitStack() as stack:
        shards: list[ParquetShard | TarShard] = []
        for file in files:
            shard: ParquetShard | TarShard = ParquetShard(file) if kind == "parquet" else TarShard(file)
            stack.enter_context(shard)
            shards.append(shard)
        for number, row in enumerate(rows):
            shards[number % num_shards].add(number, row)
    return files


__all__ = ["SHARD_FEATURES", "SHARD_KINDS", "write_shards"]
