"""The main job, on the bundled checkpoint: name pictures, find pictures by text, find pictures by picture.

    python examples/demo.py --out demo

Writes `named.png`, `found.png` and `report.html` to the folder, and prints the names to the terminal. All pictures are
held out from training: a drawing style (Noto) that the model has never seen, and clip art set aside.
"""

import argparse
import base64
import html
import json
import textwrap
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from PIL import Image
from tqdm.auto import tqdm
from transformers.utils import logging

from transformers_florence import FlorenceModel, FlorenceProcessor, load_bundled
from transformers_florence.evaluation.zero_shot import build_zero_shot_classifier, embed_pixels, embed_texts

GALLERY = Path(__file__).parent / "gallery"
TEMPLATES = ("{}", "a picture of {}", "an emoji of {}", "an icon of {}", "{} icon")
QUERIES = (
    "a bird",
    "fruit",
    "a musical instrument",
    "a flag",
    "a red heart",
    "a building",
    "a person at work",
    "a car",
)
SHOWN = 8  # pictures found for each query
NAMED = 5  # best names told of each question


def read_gallery(folder: Path) -> tuple[list[dict], list[dict], list[str]]:
    """Rows of the questions and of the gallery, and the names to choose from.

    Raises:
        ValueError: the folder is not there (the message says how to build it), or holds too few pictures.
    """
    if not (folder / "metadata.jsonl").is_file():
        raise ValueError(f"expected the demo's pictures in {folder}: build them with examples/build_gallery.py")
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text("utf-8").splitlines()]
    parts: dict[str, list[dict]] = {"questions": [], "gallery": []}
    for row in rows:
        row["image"] = Image.open(folder / row["file_name"]).convert("RGB")
        parts[row["file_name"].split("/")[0]].append(row)
    names = (folder / "names.txt").read_text("utf-8").splitlines()
    counts = [len(parts["questions"]), len(parts["gallery"]), len(names)]
    if any(count < least for count, least in zip(counts, (1, SHOWN, NAMED), strict=True)):
        raise ValueError(
            f"expected 1 question, {SHOWN} pictures and {NAMED} names at least in {folder}, got {counts}: "
            "build them with examples/build_gallery.py"
        )
    return parts["questions"], parts["gallery"], names


def embed_rows(model: FlorenceModel, processor: FlorenceProcessor, rows: list[dict], title: str) -> torch.Tensor:
    """Unit vectors of the rows' pictures, (rows, projection_dim)."""
    chunks = []
    for start in tqdm(range(0, len(rows), 64), desc=title):
        images = [row["image"] for row in rows[start : start + 64]]
        chunks.append(embed_pixels(model, processor(images=images, return_tensors="pt")["pixel_values"]))
    return torch.cat(chunks)


def draw_named(questions: list[dict], answers: list[list[tuple[str, float]]], path: Path) -> None:
    """A panel of the questions, each with its best names as bars; the right name is green."""
    lines = -(-len(questions) // 3)  # three questions a line
    figure, axes = plt.subplots(lines, 6, figsize=(17, 1 + 2 * lines), width_ratios=[1, 1.6] * 3, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for row, best, (left, right) in zip(questions, answers, axes.reshape(-1, 2), strict=False):
        left.imshow(row["image"])
        left.set_title(row["name"], fontsize=10)
        colors = ["#2a9d4a" if name == row["name"] else "#9aa5b1" for name, _ in best]
        right.barh(range(len(best)), [score for _, score in best], color=colors)
        for position, (name, score) in enumerate(best):
            right.text(0.02, position, f"{name}  {score:.0%}", va="center", fontsize=9)
        right.set_xlim(0, 1)
        right.invert_yaxis()
    figure.suptitle("Held-out style, named by florence-nano (title: right name; green: found)", fontsize=13)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)


def draw_found(searches: list[tuple[str | Image.Image, list[tuple[dict, float]]]], path: Path) -> None:
    """One line a search: what was asked, then the pictures that were found, best first."""
    figure, axes = plt.subplots(len(searches), SHOWN + 1, figsize=(1.5 * (SHOWN + 1), 1.85 * len(searches)))
    for (question, found), line in zip(searches, axes, strict=True):
        if isinstance(question, str):
            line[0].text(0.5, 0.5, question, ha="center", va="center", fontsize=12, wrap=True)
        else:
            line[0].imshow(question)
            line[0].set_title("like this one", fontsize=8, color="#1d5fbf")
        for axis, (row, score) in zip(line[1:], found, strict=True):
            axis.imshow(row["image"])
            name = textwrap.fill(row["name"], 20, max_lines=2, placeholder=" …")
            axis.set_title(f"{name}\n{score:.2f}", fontsize=7)
        for axis in line:
            axis.axis("off")
    figure.suptitle("Found by text, and by picture (cosine similarity)", fontsize=13)
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)


def write_report(path: Path, pictures: list[Path], lines: list[str]) -> None:
    """One HTML page that needs no other file."""
    shown = "".join(
        f'<h2>{html.escape(picture.stem.capitalize())}</h2><img alt="{html.escape(picture.stem)}" '
        f'src="data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}">'
        for picture in pictures
    )
    path.write_text(
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>florence-nano</title>'
        "<style>body{font:16px/1.5 system-ui,sans-serif;max-width:80rem;margin:2rem auto;padding:0 1rem}"
        "img{max-width:100%}pre{background:#f4f6f8;padding:1rem;overflow:auto}</style>"
        "<h1>florence-nano on held-out pictures</h1>"
        "<p>The model has never seen this style of drawing (Noto, Apache-2.0), nor the clip art (public domain). "
        "It chooses among all names that occurred in its training.</p>"
        f"{shown}<h2>In words</h2><pre>{html.escape(chr(10).join(lines))}</pre></html>",
        "utf-8",
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo"))
    parser.add_argument("--gallery", type=Path, default=GALLERY)
    arguments = parser.parse_args(argv)
    arguments.out.mkdir(parents=True, exist_ok=True)
    logging.disable_progress_bar()
    started = time.monotonic()

    model, processor = load_bundled("florence-nano")
    questions, gallery, names = read_gallery(arguments.gallery)
    classifier = build_zero_shot_classifier(model, processor.tokenizer, names, TEMPLATES, progress=True)
    question_embeds = embed_rows(model, processor, questions, "pictures to name")
    gallery_embeds = embed_rows(model, processor, gallery, "pictures to search")

    probabilities = (model.logit_scale.exp().item() * question_embeds @ classifier.T).softmax(dim=1)
    answers, lines = [], []
    for row, scores in zip(questions, probabilities, strict=True):
        best = scores.topk(NAMED)
        answer = [
            (names[index], score) for index, score in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]
        answers.append(answer)
        mark = "+" if answer[0][0] == row["name"] else " "
        lines.append(f"{mark} {row['name'][:28]:28}  " + ", ".join(f"{name} {score:.0%}" for name, score in answer))
    right = sum(answer[0][0] == row["name"] for row, answer in zip(questions, answers, strict=True))
    lines.append(f"{right} of {len(questions)} named right among {len(names)} names (marked +)")
    print("\n".join(lines))

    searches: list[tuple[str | Image.Image, torch.Tensor]] = []
    text_embeds = embed_texts(model, processor.tokenizer, QUERIES)
    searches += zip(QUERIES, text_embeds @ gallery_embeds.T, strict=True)
    searches += zip((row["image"] for row in questions[:4]), question_embeds[:4] @ gallery_embeds.T, strict=True)
    found = []
    for question, similarity in searches:
        best = similarity.topk(SHOWN)
        hits = [
            (gallery[index], score) for index, score in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]
        found.append((question, hits))
        if isinstance(question, str):
            lines.append(f"{question}: " + ", ".join(f"{row['name']} {score:.2f}" for row, score in hits))
            print(lines[-1])

    named, grid = arguments.out / "named.png", arguments.out / "found.png"
    draw_named(questions, answers, named)
    draw_found(found, grid)
    write_report(arguments.out / "report.html", [named, grid], lines)
    print(f"wrote {named}, {grid} and {arguments.out / 'report.html'} in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
