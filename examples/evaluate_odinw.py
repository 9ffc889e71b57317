"""Object detection in the wild: Florence's eleven sets (table 7), without training, by few shots, and in full.

    python examples/evaluate_odinw.py --data odinw --model runs/open-set/best --shots 0
    python examples/evaluate_odinw.py --data odinw --shots 1 3 5 10 full --seeds 0 1 2 --steps 200
    python examples/evaluate_odinw.py --data odinw --sets BCCD --shots 5 -- --shortest_edge 320 --learning_rate 3e-4

Runs on those of the sets that are folders below `--data` and names the missing ones. With 0 shots the model is an
open-set detector (`examples/finetune_open_set.py`), which is asked for the sets' own class names; else it is what
`examples/finetune_detection.py` starts from, and options behind `--` go to that script. A few shots are pictures in a
random order until every class has as many objects; each seed draws its own and trains on them. Every result is a line
of `results.jsonl` in the output, and the same command goes on from there. The means over the sets come last. Needs the
extras `train` and `detection`.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoImageProcessor, AutoModelForZeroShotObjectDetection, AutoTokenizer

import finetune_detection
from transformers_florence import bundled_checkpoint
from transformers_florence.data.detection import DetectionSet
from transformers_florence.data.detection_writer import write_coco
from transformers_florence.evaluation.detection import evaluate_detector
from transformers_florence.evaluation.odinw import ODINW, SHOTS, average, few_shot_set, find_sets, read_split
from transformers_florence.evaluation.zero_shot import build_zero_shot_classifier

FULL, WITHOUT = "full", "0"


def read_results(file: Path) -> dict[tuple[str, str, int], dict[str, Any]]:
    """What earlier calls have measured: set, shots and seed -> row."""
    rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file.is_file() else []
    return {(row["set"], row["shots"], row["seed"]): row for row in rows}


def score_by_words(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """COCO's numbers of the open-set detector, asked for the set's classes."""
    names = read_split(folder, options.train_split).names
    held_out = read_split(folder, options.split, names)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForZeroShotObjectDetection.from_pretrained(options.model).to(device)
    processor, tokenizer = (auto.from_pretrained(options.model) for auto in (AutoImageProcessor, AutoTokenizer))
    embeds = build_zero_shot_classifier(model, tokenizer, names, options.template)
    return evaluate_detector(model, processor, held_out.pictures, names, class_embeds=embeds, progress=True).as_dict()


def score_by_shots(options: argparse.Namespace, folder: Path, place: Path, shots: str, seed: int) -> dict[str, Any]:
    """COCO's numbers of a detector that was fine-tuned on a few pictures, or on all."""
    train: DetectionSet = read_split(folder, options.train_split)
    if shots != FULL:
        train = few_shot_set(train, int(shots), seed)
    file = write_coco({"train": train.pictures}, train.names, place / "data", link=True)
    size = min(options.batch_size, len(train.pictures))
    settings = {
        "data": file,
        "train_split": "",
        "eval_data": folder,
        "eval_split": options.split,
        "init_from": options.model or bundled_checkpoint(),
        "output": place,
        "seed": seed,
        "batch_size": size,
        "epochs": math.ceil(options.steps / (len(train.pictures) // size)),
        "eval_every": options.steps,  # at the end alone: choosing the best epoch would be learning from the test
        "warmup_steps": options.steps // 20,
    }
    command = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    return finetune_detection.main([*command, *options.rest])


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Evaluate; returns the mean over the sets for each number of shots."""
    argv = sys.argv[1:] if argv is None else list(argv)
    cut = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds the sets")
    parser.add_argument("--sets", nargs="+", choices=ODINW, default=list(ODINW))
    parser.add_argument("--model", default="", help="an open-set detector, or what fine-tuning starts from")
    parser.add_argument("--shots", nargs="+", default=[*map(str, SHOTS), FULL], help="numbers, or full")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the shots and of training")
    parser.add_argument("--steps", type=int, default=200, help="of training")
    parser.add_argument("--batch_size", type=int, default=8, help="fewer where there are fewer pictures")
    parser.add_argument("--template", nargs="+", default=["{}"], help="sentences around a class, which are averaged")
    parser.add_argument("--train_split", default="train")
    parser.add_argument("--split", default="test", help="that is evaluated")
    parser.add_argument("--output", type=Path, default=Path("runs/odinw"))
    options = parser.parse_args(argv[:cut])
    options.rest = argv[cut + 1 :]
    for shots in options.shots:
        if shots != FULL and not shots.isdecimal():
            parser.error(f"--shots: expected numbers or {FULL}, got {shots!r}")
    if WITHOUT in options.shots and not options.model:
        parser.error("--shots 0: expected an open-set detector as --model, got none")
    folders = {name: folder for name, folder in find_sets(options.data).items() if name in options.sets}
    missing = [name for name, folder in folders.items() if folder is None]
    print(f"missing below {options.data}: {', '.join(missing) or 'none'}")
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / "results.jsonl"
    done = read_results(file)
    for name, folder in folders.items():
        for shots in options.shots if folder is not None else []:
            for seed in options.seeds if shots != WITHOUT else [0]:
                if (name, shots, seed) in done:
                    continue
                place = options.output / name / f"{shots}-{seed}"
                if shots == WITHOUT:
                    scores = score_by_words(options, folder)
                else:
                    scores = score_by_shots(options, folder, place, shots, seed)
                row = {"set": name, "shots": shots, "seed": seed, "map": scores["map"], "map_50": scores["map_50"]}
                done[name, shots, seed] = row
                with file.open("a", encoding="utf-8") as lines:
                    lines.write(json.dumps(row) + "\n")
    means = {}
    for shots in options.shots:
        scores = {
            name: [row["map"] for (of, kind, _), row in done.items() if (of, kind) == (name, shots)]
            for name in folders
            if any((of, kind) == (name, shots) for of, kind, _ in done)
        }
        if scores:
            means[shots], without = average(scores)
            listed = ", ".join(f"{name} {100 * sum(each) / len(each):.1f}" for name, each in scores.items())
            print(f"{shots} shots: mAP {100 * means[shots]:.1f} over {len(scores)} sets ({listed})")
            if without:
                print(f"  not the paper's mean of {len(ODINW)}: without {', '.join(without)}")
    return means


if __name__ == "__main__":
    main()
