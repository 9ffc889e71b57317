"""Choose the pictures that `make demo` shows: held-out ones only, by a hash and not by how well a model does on them.

    python examples/build_picture_corpus.py --permissive --out corpus
    python examples/build_gallery.py --corpus corpus --out examples/gallery

Writes `questions/` (pictures to name, each of another subgroup), `gallery/` (pictures to find), `metadata.jsonl` with
name, source and licence of each, and `names.txt`, the names among which the demo chooses.
"""

import argparse
import hashlib
import json
from pathlib import Path

from transformers_florence.data.picture_corpus import load_split

QUESTIONS, NOTO, CLIPART = 12, 420, 80  # how many pictures of each kind


def order(row: dict) -> str:
    """A number that has nothing to do with what a picture shows."""
    return hashlib.sha256(row["file_name"].encode()).hexdigest()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", default="corpus")
    parser.add_argument("--out", type=Path, default=Path("examples/gallery"))
    arguments = parser.parse_args(argv)
    style = load_split(arguments.corpus, "test_style")
    clipart = load_split(arguments.corpus, "test_clipart")
    emoji = load_split(arguments.corpus, "train").remove_columns("image")
    names = sorted({row["name"] for row in emoji if row["source"] == "emoji"})
    seen = set(names)

    noto = [
        {**row, "rows": style, "index": index}
        for index, row in enumerate(style.remove_columns("image"))
        if row["style"] == "noto" and row["name"] in seen
    ]
    noto.sort(key=order)
    questions, subgroups = [], set()
    for row in noto:  # one of a subgroup, so that the twelve differ
        if len(questions) < QUESTIONS and row["subgroup"] not in subgroups:
            questions.append(row)
            subgroups.add(row["subgroup"])
    if len(questions) < QUESTIONS:
        raise ValueError(f"expected noto pictures of {QUESTIONS} subgroups in test_style, got {len(questions)}")
    chosen = {row["file_name"] for row in questions}
    drawings = sorted(
        ({**row, "rows": clipart, "index": index} for index, row in enumerate(clipart.remove_columns("image"))),
        key=order,
    )
    gallery = [row for row in noto if row["file_name"] not in chosen][:NOTO] + drawings[:CLIPART]

    metadata = arguments.out / "metadata.jsonl"
    if metadata.is_file():  # pictures of an earlier gallery would lie there unlisted
        for line in metadata.read_text("utf-8").splitlines():
            old = Path(json.loads(line)["file_name"])
            if old.parts[0] in ("questions", "gallery") and len(old.parts) == 2:
                (arguments.out / old).unlink(missing_ok=True)
    with_folder = [("questions", row) for row in questions] + [("gallery", row) for row in gallery]
    lines = []
    for folder, row in with_folder:
        target = arguments.out / folder / (Path(row["file_name"]).stem + f"_{row['style']}.png")
        target.parent.mkdir(parents=True, exist_ok=True)
        row["rows"][row["index"]]["image"].convert("RGB").save(target, optimize=True)
        keys = ("name", "keywords", "source", "style", "license")
        lines.append({"file_name": target.relative_to(arguments.out).as_posix(), **{key: row[key] for key in keys}})
    metadata.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    (arguments.out / "names.txt").write_text("".join(name + "\n" for name in names), "utf-8")
    print(f"{len(questions)} questions and {len(gallery)} pictures in {arguments.out}, {len(names)} names")


if __name__ == "__main__":
    main()
