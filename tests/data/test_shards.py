"""Shards: what was written is what `datasets` reads, dealt out evenly."""

import json

import pyarrow.parquet as pq
import pytest
from datasets import Image, load_dataset

from tests.tiny_shards import png
from transformers_florence.data.shards import ROW_GROUP, write_shards


def rows_of(count: int) -> list[dict]:
    return [
        {"image": {"bytes": png(n), "path": f"{n}.png"}, "texts": [f"number {n}", "été"], "labels": [n, 2**62 + n]}
        for n in range(count)
    ]


@pytest.mark.parametrize(("kind", "image"), [("parquet", "image"), ("webdataset", "jpg")])
def test_rows_come_back_dealt_out_in_turn(tmp_path, kind, image):
    rows = rows_of(2 * ROW_GROUP + 11)
    files = write_shards(iter(rows), tmp_path, kind=kind, num_shards=2)
    assert sorted((tmp_path / "data").iterdir()) == files
    read = list(load_dataset(str(tmp_path), split="train", streaming=True).cast_column(image, Image(decode=False)))
    assert len(read) == len(rows)
    for row, wanted in zip(read, rows[0::2] + rows[1::2], strict=True):
        texts = row if kind == "parquet" else row["json"]
        assert row[image]["bytes"] == wanted["image"]["bytes"]
        assert (texts["texts"], texts["labels"]) == (wanted["texts"], wanted["labels"])
    if kind == "parquet":
        groups = pq.ParquetFile(files[0]).metadata
        assert [groups.row_group(n).num_rows for n in range(groups.num_row_groups)] == [ROW_GROUP, 6]


@pytest.mark.parametrize("kind", ["parquet", "webdataset"])
def test_equal_rows_make_equal_files(tmp_path, kind):
    first, second = (write_shards(rows_of(7), tmp_path / name, kind=kind, num_shards=3) for name in ("a", "b"))
    assert [file.read_bytes() for file in first] == [file.read_bytes() for file in second]


def test_json_holds_texts_as_they_are(tmp_path):
    (file,) = write_shards(rows_of(1), tmp_path, kind="webdataset", num_shards=1)
    assert json.dumps(["number 0", "été"], ensure_ascii=False).encode() in file.read_bytes()


@pytest.mark.parametrize("options", [dict(kind="zip", num_shards=2), dict(kind="parquet", num_shards=0)])
def test_impossible_shards_are_refused(tmp_path, options):
    with pytest.raises(ValueError, match="expected one of .* and at least 1 shard, got"):
        write_shards([], tmp_path, **options)
