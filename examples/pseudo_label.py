"""Label pictures that nobody has labelled, by a detector: what FLOD-9M did with ImageNet (Florence section 2.4).

    python examples/pseudo_label.py --model runs/detector/best --pictures unlabelled --output pseudo
    python examples/pseudo_label.py --model open-set --classes fish shark --template "a photo of a {}" --pictures ...

The pictures are all those below a folder. An open-set detector takes the classes from the command line, any other has
its own. What exceeds `--threshold` becomes an object; a picture without one is left out unless `--keep_empty` says
otherwise. The output holds `annotations.json` in COCO's form, scores included, and the pictures, so that
`examples/finetune_detection.py --data pseudo/annotations.json --train_split ""` trains on it. What was found so far
stands in `found.jsonl`, and the same command goes on from there. Needs the extra `detection`.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForObjectDetection,
    AutoModelForZeroShotObjectDetection,
    AutoTokenizer,
    PreTrainedModel,
)

from transformers_florence import FlorenceDetectionConfig
from transformers_florence.data.detection import AnnotatedPicture, picture_size
from transformers_florence.data.detection_readers import SUFFIXES
from transformers_florence.data.detection_writer import write_coco
from transformers_florence.evaluation.detection import detect
from transformers_florence.evaluation.zero_shot import build_zero_shot_classifier

DECIMALS = 2  # of a pixel


def list_pictures(folder: Path) -> list[AnnotatedPicture]:
    """Every picture below a folder that can be opened, without objects.

    Raises:
        ValueError: there is none.
    """
    pictures, nothing = [], torch.zeros(0)
    for file in sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES):
        try:
            size = picture_size(file)
        except ValueError as error:
            print(f"left out: {error}")
            continue
        parts = (nothing.double().reshape(0, 4), nothing.long(), nothing.bool())
        pictures.append(AnnotatedPicture(file, len(pictures), size, *parts))
    if not pictures:
        raise ValueError(f"expected pictures below {folder}, got none that can be opened")
    return pictures


def load_detector(options: argparse.Namespace) -> tuple[PreTrainedModel, list[str], torch.Tensor | None]:
    """The detector, its classes, and their vectors if they were given as words.

    Raises:
        ValueError: classes for a detector that has its own, or none for one that has not.
    """
    has_own = AutoConfig.from_pretrained(options.model).model_type == FlorenceDetectionConfig.model_type
    if has_own == bool(options.classes):
        raise ValueError(f"expected classes for an open-set detector, and no others, got {options.classes}")
    if has_own:
        model = AutoModelForObjectDetection.from_pretrained(options.model)
        return model, [model.config.id2label[number] for number in range(model.config.num_labels)], None
    model = AutoModelForZeroShotObjectDetection.from_pretrained(options.model)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    return model, options.classes, build_zero_shot_classifier(model, tokenizer, options.classes, options.template)


def read_found(file: Path, settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What an earlier call has found: name of the picture -> row.

    Raises:
        ValueError: with other settings.
    """
    lines = file.read_text("utf-8").splitlines() if file.is_file() else []
    if lines and json.loads(lines[0]) != settings:
        raise ValueError(f"{file}: expected the settings {settings} or another output, got {lines[0]}")
    rows: dict[str, dict[str, Any]] = {}
    for line in lines[1:]:
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break  # the last line of a call that was interrupted
        rows[row["file"]] = row
    text = "".join(json.dumps(row) + "\n" for row in [settings, *rows.values()])
    file.write_text(text, "utf-8")
    return rows


def main(argv: list[str] | None = None) -> Path:
    """Label; returns the file of annotations."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a detector, with its processor")
    parser.add_argument("--pictures", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("pseudo"))
    parser.add_argument("--classes", nargs="+", default=[], help="for an open-set detector")
    parser.add_argument("--template", nargs="+", default=["{}"], help="sentences around a class, which are averaged")
    parser.add_argument("--threshold", type=float, default=0.5, help="what a score must exceed")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--keep_empty", action="store_true", help="keep pictures on which nothing was found")
    parser.add_argument("--link", action="store_true", help="symbolic links to the pictures instead of copies")
    options = parser.parse_args(argv)
    pictures = list_pictures(options.pictures)
    model, names, embeds = load_detector(options)
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    processor = AutoImageProcessor.from_pretrained(options.model)
    options.output.mkdir(parents=True, exist_ok=True)
    settings = {name: getattr(options, name) for name in ("model", "classes", "template", "threshold")}
    file = options.output / "found.jsonl"
    rows = read_found(file, settings)
    left = [picture for picture in pictures if str(picture.file) not in rows]
    if rows:
        print(f"{len(rows)} pictures were labelled before, {len(left)} are left")
    with file.open("a", encoding="utf-8") as journal:
        found_in = detect(
            model,
            processor,
            left,
            batch_size=options.batch,
            threshold=options.threshold,
            class_embeds=embeds,
            progress=True,
        )
        for part, detections in found_in:
            for picture, found in zip(part, detections, strict=True):
                row = {"file": str(picture.file), **{name: each.tolist() for name, each in found.items()}}
                rows[row["file"]] = row
                journal.write(json.dumps(row) + "\n")
            journal.flush()
    labelled, scores = [], []
    for picture in pictures:
        row = rows[str(picture.file)]
        if row["labels"] or options.keep_empty:
            boxes = torch.tensor(row["boxes"], dtype=torch.float64).reshape(-1, 4).round(decimals=DECIMALS)
            labels = torch.tensor(row["labels"], dtype=torch.long)
            crowd = torch.zeros(len(labels), dtype=torch.bool)
            labelled.append(AnnotatedPicture(picture.file, picture.image_id, picture.size, boxes, labels, crowd))
            scores.append(torch.tensor(row["scores"]))
    if not labelled:
        raise ValueError(
            f"expected a detection above {options.threshold} on one of {len(pictures)} pictures, got none"
        )
    name = options.pictures.resolve().name or "pictures"
    result = write_coco({name: labelled}, names, options.output, scores=scores, link=options.link)
    counts = torch.bincount(torch.cat([picture.labels for picture in labelled]), minlength=len(names)).tolist()
    print(f"{len(labelled)} of {len(pictures)} pictures with objects: {dict(zip(names, counts, strict=True))}")
    print(f"wrote {result}")
    return result


if __name__ == "__main__":
    main()
