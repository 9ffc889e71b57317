"""Pictures of plain colours with noise, in classes that a model can learn at once, and captions for them."""

import json
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
