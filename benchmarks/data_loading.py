"""Pictures a second of the data pipeline alone: reading, decoding, resizing, drawing texts, making batches.

    python benchmarks/data_loading.py --folder curated --text texts
    python benchmarks/data_loading.py                        # drawn pictures, 480x360 JPEG

One line for each side in pixels, way of reading and number of worker processes. The first batches, while workers start
and the buffer fills, are not timed.
"""

import argparse
import io
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from transformers_florence import FlorenceImageProcessor
from transformers_florence.data.shards import write_shards
from transformers_florence.data.sources import Source
from transformers_florence.data.triplet_loader import TripletLoader, TripletRows, TripletStream
from transformers_florence.data.triplets import PictureDecoder, TripletMaker

DRAWN_SIZE = (480, 360)
READERS = {
    "rows": lambda source, maker: TripletRows([source], maker, progress=False),
    "stream": lambda source, maker: TripletStream([source], maker),
}


def draw_corpus(folder: Path, count: int, shards: int) -> None:
    """Soft patterns with some grain, as JPEG of quality 90: about as many bytes as photographs have."""
    rng = np.random.default_rng(0)
    width, height = DRAWN_SIZE
    rows = []
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8))
        pixels = np.asarray(coarse.resize(DRAWN_SIZE, Image.Resampling.BICUBIC)) + rng.normal(0, 6, (height, width, 1))
        buffer = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
        image = {"bytes": buffer.getvalue(), "path": None}
        rows.append({"image": image, "texts": [f"a drawn pattern that has the number {number}"], "labels": [number]})
    write_shards(rows, folder, kind="parquet", num_shards=shards)


def measure(loader: TripletLoader, warm_up: int, batches: int) -> tuple[float, float]:
    """Pictures a second over all timed batches, and this process's milliseconds of computing for each."""
    iterator = iter(loader)
    for _ in range(warm_up):
        next(iterator)
    started, computing = time.perf_counter(), time.process_time()
    for _ in range(batches):
        next(iterator)
    seconds, computing = time.perf_counter() - started, time.process_time() - computing
    iterator.close()
    count = loader.batch_size * batches
    return count / seconds, 1e3 * computing / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="a folder of pictures with texts; without it, pictures are drawn")
    parser.add_argument("--image", default="image", help="its column of pictures")
    parser.add_argument("--text", default="texts", help="its column of texts")
    parser.add_argument("--sides", type=int, nargs="+", default=[64, 224], help="pixels")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--readers", nargs="+", choices=READERS, default=list(READERS))
    parser.add_argument("--batch", type=int, default=128, help="pictures in a batch")
    parser.add_argument("--batches", type=int, default=20, help="timed batches")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as drawn:
        if options.folder is None:
            draw_corpus(Path(drawn), 1024, max(1, *options.workers))
        source = Source(options.folder or drawn, image=options.image, text=options.text)
        print("| side | reading | workers | pictures/s | per worker | processor ms a picture, this process |")
        print("|---|---|---|---|---|---|")
        runs = [
            (side, name, workers) for side in options.sides for name in options.readers for workers in options.workers
        ]
        for side, name, workers in tqdm(runs, desc="runs", leave=False):
            square = {"height": side, "width": side}
            processor = FlorenceImageProcessor(size={"shortest_edge": side}, crop_size=square)
            data = READERS[name](source, TripletMaker(PictureDecoder(processor)))
            loader = TripletLoader(data, batch_size=options.batch, num_workers=workers)
            rate, computing = measure(loader, max(1, 2 * workers), options.batches)
            own = rate / max(1, workers)
            print(f"| {side} | {name} | {workers} | {rate:.0f} | {own:.0f} | {computing:.2f} |", flush=True)


if __name__ == "__main__":
    main()
