"""Compose scenes of drawings, with exact boxes, from a picture corpus: what a detector can be trained on for free.

    python examples/build_drawn_scenes.py --corpus corpus --out scenes --train 2000 --valid 200
    python examples/finetune_open_set.py --data scenes --naming crop --output runs/scenes

The corpus is what `examples/build_picture_corpus.py` writes: drawings on white. Each is cut out along its outline,
drawn at a random place in a random size on a coloured ground, and hides at most a small part of another. Training
scenes are made of the corpus's training split, those of `valid` of drawings in a style that it holds out. The output
has `metadata.jsonl` with the boxes and, for each scene, its drawings' names, styles and licences, and the folders
`train` and `valid`. Scene n depends on the seed and on n alone. Needs the extra `data`.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter
from tqdm.auto import tqdm

from transformers_florence.data.picture_corpus import load_split

SPLITS = {"train": "train", "valid": "test_style"}
LABELS = {"object": lambda row: "object", "name": lambda row: row["name"], "group": lambda row: row["group"]}
WHITE = 16  # a drawing's ground may differ so much from white, of 255
MARGIN = 1  # pixels of white around a drawing, so that its ground is one piece
OVERLAP = 0.15  # of the smaller of two boxes, at most
TRIES = 30  # of places for a drawing, before it is left out


def cut_out(picture: Image.Image) -> Image.Image | None:
    """A drawing on white -> the drawing alone, cropped, with transparency outside of its outline; None for nothing."""
    size = (picture.width + 2 * MARGIN, picture.height + 2 * MARGIN)
    framed = Image.new("RGB", size, "white")
    framed.paste(picture.convert("RGB"), (MARGIN, MARGIN))
    darkness = ImageChops.invert(framed).convert("L").point(lambda value: 255 if value > WHITE else 0)
    ImageDraw.floodfill(darkness, (0, 0), 128)
    mask = darkness.point(lambda value: 0 if value == 128 else 255)  # white inside of the outline belongs to it
    box = mask.getbbox()
    if box is None:
        return None
    framed.putalpha(mask)
    return framed.crop(box)


def draw_ground(rng: np.random.Generator, side: int) -> Image.Image:
    """A soft pattern of colours."""
    cells = int(rng.integers(1, 5))
    pattern = rng.integers(60, 256, (cells, cells, 3), np.uint8)
    ground = Image.fromarray(pattern).resize((side, side), Image.Resampling.BICUBIC)
    return ground.filter(ImageFilter.GaussianBlur(float(rng.uniform(0, 2))))


def is_free(box: tuple[int, ...], others: list[tuple[int, ...]]) -> bool:
    """Whether a box hides little of others, and they little of it."""
    for other in others:
        width = min(box[2], other[2]) - max(box[0], other[0])
        height = min(box[3], other[3]) - max(box[1], other[1])
        areas = [(each[2] - each[0]) * (each[3] - each[1]) for each in (box, other)]
        if min(width, height) > 0 and width * height > OVERLAP * min(areas):
            return False
    return True


def draw_scene(rows: Any, rng: np.random.Generator, options: argparse.Namespace) -> tuple[Image.Image, list[dict]]:
    """A scene and its objects: `row` of the corpus, and `bbox` (left, top, width, height) of what shows of it."""
    scene = draw_ground(rng, options.side)
    boxes: list[tuple[int, ...]] = []
    objects = []
    for row in rng.integers(len(rows), size=int(rng.integers(1, options.objects + 1))).tolist():
        drawing = cut_out(rows[row]["image"])
        if drawing is None:
            continue
        longest = options.side * float(rng.uniform(options.smallest, options.largest))
        scale = longest / max(drawing.size)
        size = [max(2, round(side * scale)) for side in drawing.size]
        drawing = drawing.resize(size, Image.Resampling.LANCZOS)
        if rng.random() < 0.5:
            drawing = drawing.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        for _ in range(TRIES):
            left, top = (int(rng.integers(options.side - side + 1)) for side in size)
            box = (left, top, left + size[0], top + size[1])
            if is_free(box, boxes):
                scene.paste(drawing, (left, top), drawing)
                boxes.append(box)
                objects.append({"row": row, "bbox": [left, top, *size]})
                break
    return scene, objects


def main(argv: list[str] | None = None) -> Path:
    """Build; returns the file of annotations."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", required=True, help="folder of a picture corpus")
    parser.add_argument("--out", type=Path, default=Path("scenes"))
    parser.add_argument("--train", type=int, default=2000, help="scenes")
    parser.add_argument("--valid", type=int, default=200, help="scenes")
    parser.add_argument("--side", type=int, default=192, help="of a scene, pixels")
    parser.add_argument("--objects", type=int, default=6, help="in a scene, at most")
    parser.add_argument("--smallest", type=float, default=0.12, help="longer side of a drawing over the scene's")
    parser.add_argument("--largest", type=float, default=0.5)
    parser.add_argument("--labels", choices=LABELS, default="object", help="what a box is called")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    if not 0 < options.smallest <= options.largest <= 1 or options.objects < 1 or options.side < 16:
        parser.error("expected 0 < smallest <= largest <= 1, objects >= 1 and side >= 16")
    lines = []
    for number, (split, source) in enumerate(SPLITS.items()):
        rows = load_split(options.corpus, source)
        folder = options.out / split
        folder.mkdir(parents=True, exist_ok=True)
        for place in tqdm(range(getattr(options, split)), desc=split):
            rng = np.random.default_rng([options.seed, number, place])
            scene, objects = draw_scene(rows, rng, options)
            file = folder / f"{place:05d}.png"
            scene.save(file)
            used = [rows[each["row"]] for each in objects]
            names = [LABELS[options.labels](row) for row in used]
            boxes = [{"label": name, "bbox": each["bbox"]} for name, each in zip(names, objects, strict=True)]
            line = {"file_name": f"{split}/{file.name}", "width": options.side, "height": options.side, "split": split}
            drawings = [{name: row[name] for name in ("name", "style", "license")} for row in used]
            lines.append({**line, "boxes": boxes, "drawings": drawings})
    result = options.out / "metadata.jsonl"
    result.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    print(f"{len(lines)} scenes with {sum(len(line['boxes']) for line in lines)} drawings, in {options.out}")
    return result


if __name__ == "__main__":
    main()
