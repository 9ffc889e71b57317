"""Pictures of plain colours with noise, in classes that a model can learn at once, and captions for them."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

COLORS = {"red bicycle": (220, 40, 40), "green street": (40, 200, 60), "house": (50, 60, 210)}


def write_color_set(folder: Path, train: int = 8, test: int = 5, side: int = 24) -> Path:
    """A metadata.jsonl with `label`, `label_id` and three `captions` a picture, splits train and test."""
    rng = np.random.default_rng(0)
    rows = []
    for split, count in (("train", train), ("test", test)):
        for number in range(count):
            for label_id, (label, color) in enumerate(COLORS.items()):
                name = f"{split}_{label_id}_{number}.png"
                noise = rng.integers(-30, 31, (side, side, 3))
                pixels = np.clip(np.array(color) + noise, 0, 255).astype(np.uint8)
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(folder / name)
                captions = [f"a {label}", f"some {label} in drawing {number}", f"the same {label}"]
                rows.append(
                    {"file_name": name, "label": label, "label_id": label_id, "split": split, "captions": captions}
                )
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def write_voc(root: Path, names: Sequence[str], count: int = 20, side: int = 24) -> None:
    """VOC2007's layout: pictures of two classes each, on either half, one of them difficult in every tenth."""
    rng = np.random.default_rng(0)
    base = root / "VOCdevkit" / "VOC2007"
    (base / "ImageSets" / "Main").mkdir(parents=True)
    (base / "JPEGImages").mkdir()
    colors = rng.integers(0, 256, (len(names), 3))
    for part, split in enumerate(("train", "val", "test")):
        marks = np.full((count, len(names)), -1)
        for row in range(count):
            left, right = row % len(names), (row + 7 * (part + 1)) % len(names)
            pixels = np.concatenate([np.full((side, side // 2, 3), colors[half]) for half in (left, right)], axis=1)
            noisy = np.clip(pixels + rng.integers(-30, 31, pixels.shape), 0, 255).astype(np.uint8)
            Image.fromarray(noisy).save(base / "JPEGImages" / f"{part}{row:05}.jpg")
            marks[row, left], marks[row, right] = 1, 0 if row % 10 == 0 else 1
        for number, name in enumerate(names):
            lines = [f"{part}{row:05} {mark:2}\n" for row, mark in enumerate(marks[:, number])]
            (base / "ImageSets" / "Main" / f"{name.replace(' ', '')}_{split}.txt").write_text("".join(lines))
