"""Numbered pictures in shards: small enough for a test, and each picture tells which one it is."""

import io
import itertools
from pathlib import Path

from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage

from transformers_florence.data.triplet_loader import TripletLoader
from transformers_florence.data.triplets import PictureDecoder, TripletMaker
from transformers_florence.image_processing_florence import FlorenceImageProcessor

SIDE = 8
DECODER = PictureDecoder(FlorenceImageProcessor(size={"height": SIDE, "width": SIDE}, do_center_crop=False))
BROKEN = b"\x89PNG no picture"
MAKER = TripletMaker(DECODER)


def png(number: int, size: tuple[int, int] = (SIDE, SIDE)) -> bytes:
    """A picture of one colour that tells its number."""
    buffer = io.BytesIO()
    PILImage.new("RGB", size, (number // 256, number % 256, 7)).save(buffer, "PNG")
    return buffer.getvalue()


def numbers_of(batch: dict) -> list[int]:
    """The numbers that `png` wrote into the pictures of a batch."""
    assert (batch["pixels"][:, 2] == 7).all()
    return (batch["pixels"][:, 0, 0, 0].long() * 256 + batch["pixels"][:, 1, 0, 0].long()).tolist()


def sentence(number: int) -> str:
    return f"a sentence about picture number {number}"


def write_numbered(folder: Path, numbers: range, shards: int, column: str = "text", bad: tuple[int, ...] = ()) -> Path:
    """Parquet shards of numbered pictures; a bad one has a broken picture or, if its number is odd, no text."""
    (folder / "data").mkdir(parents=True)
    features = {"image": Image(), column: Value("string")}
    for shard in range(shards):
        own = numbers[shard::shards]
        rows = {
            "image": [{"bytes": BROKEN if n in bad and n % 2 == 0 else png(n), "path": f"{n}.png"} for n in own],
            column: [" " if n in bad and n % 2 else sentence(n) for n in own],
        }
        Dataset.from_dict(rows, Features(features)).to_parquet(
            folder / f"data/train-{shard:05}-of-{shards:05}.parquet"
        )
    return folder


def take(loader: TripletLoader, count: int) -> list[dict]:
    return list(itertools.islice(loader, count))
