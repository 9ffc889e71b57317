"""Merge several sets of annotated pictures into one with one vocabulary, as FLOD-9M was made of its parts.

    python examples/merge_detection_sets.py coco=coco/train.json pets=pets:train --output merged
    python examples/merge_detection_sets.py a=first b=second --aliases words.yaml --link --output merged

A set is `name=path`, or `name=path:split`; the path is a folder or file of COCO JSON, Pascal VOC, YOLO or
metadata.jsonl. The output holds `annotations.json` in COCO's form and the pictures, each set's in a folder of its own:
`examples/finetune_detection.py --data merged/annotations.json --train_split ""` trains on it. Names that differ in
case, spaces, underscores or hyphens are one class; what else is one class stands in a YAML file, a name and its other
words: `{person: [human, man, woman]}`. Needs the extra `detection`.
"""

import argparse
from pathlib import Path

import yaml
from tqdm.auto import tqdm

from transformers_florence.data.detection import MODES, validate_annotations
from transformers_florence.data.detection_merge import MergedSets, merge_sets
from transformers_florence.data.detection_readers import read_annotations
from transformers_florence.data.detection_writer import write_coco


def parse_set(text: str) -> tuple[str, Path, str | None]:
    """`name=path` or `name=path:split` -> its parts."""
    name, equals, rest = text.partition("=")
    if not name or not equals or not rest:
        raise ValueError(f"expected name=path or name=path:split, got {text!r}")
    path, colon, split = rest.rpartition(":")
    return (name, Path(path), split) if colon and not Path(rest).exists() else (name, Path(rest), None)


def read_aliases(file: Path | None) -> dict[str, list[str]]:
    """Name -> other words, from YAML."""
    content = {} if file is None else yaml.safe_load(file.read_text("utf-8"))
    if not isinstance(content, dict) or not all(isinstance(words, list) for words in content.values()):
        raise ValueError(f"{file}: expected names, each with a list of other words, got {content!r}")
    return {str(name): [str(word) for word in words] for name, words in content.items()}


def main(argv: list[str] | None = None) -> MergedSets:
    """Merge; returns what was written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="+", help="name=path or name=path:split")
    parser.add_argument("--output", type=Path, default=Path("merged"))
    parser.add_argument("--aliases", type=Path, help="YAML file of names with their other words")
    parser.add_argument("--faults", choices=MODES, default="clip", help="what faulty annotations do")
    parser.add_argument("--link", action="store_true", help="symbolic links to the pictures instead of copies")
    options = parser.parse_args(argv)
    parsed = [parse_set(text) for text in options.sets]
    if len({name for name, _, _ in parsed}) < len(parsed):
        raise ValueError(f"expected a name of its own for each set, got {[name for name, _, _ in parsed]}")
    sets = {}
    for name, path, split in tqdm(parsed, desc="reading"):
        sets[name] = validate_annotations(read_annotations(path, split), options.faults)
        tqdm.write(f"{name}: {sets[name].report}")
    merged = merge_sets(sets, read_aliases(options.aliases))
    file = write_coco(merged.pictures, merged.names, options.output, link=options.link)
    print(f"{merged.table()}\nwrote {file}")
    return merged


if __name__ == "__main__":
    main()
