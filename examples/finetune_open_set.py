"""Train an open-set detector: boxes by the Dynamic Head, classes by their names, on both towers of a dual encoder.

    python examples/finetune_open_set.py --data pictures --output runs/open-set                     # boxes and names
    python examples/finetune_open_set.py --data pictures --naming crop --output runs/proposals      # boxes alone
    python examples/finetune_open_set.py --data pictures --init_from runs/open-set/best --epochs 0  # evaluate only

What `examples/finetune_detection.py` says holds here too; these options are new. With `naming` text_head a class
predictor in the space of the texts learns boxes and names together, from names that are put into the prompts and
embedded once; the text tower stays as it is. With crop or region the boxes are learnt without classes on the frozen
tower, as Florence does (section 3.6), and the dual encoder names them; the classes then serve the evaluation alone.
`best` serves transformers' zero-shot-object-detection pipeline with any classes. Needs the extras `train` and
`detection`.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from finetune_detection import Batches, DetectionArguments, detection_processor, draw_predictions, read_sets
from transformers_florence import FlorenceDetectionImageProcessor, bundled_checkpoint
from transformers_florence.configuration_florence_zero_shot_detection import NAMINGS, FlorenceZeroShotDetectionConfig
from transformers_florence.data.prompts import DRAWING_TEMPLATES, PHOTO_TEMPLATES
from transformers_florence.evaluation.detection import evaluate_detector
from transformers_florence.evaluation.zero_shot import build_zero_shot_classifier
from transformers_florence.modeling_florence_zero_shot_detection import FlorenceForZeroShotObjectDetection
from transformers_florence.processing_florence_zero_shot_detection import FlorenceZeroShotDetectionProcessor
from transformers_florence.training.arguments import parse_arguments
from transformers_florence.training.optimization import parameter_groups
from transformers_florence.training.recipe import fine_tune, loss_of_model

PROMPTS = {"plain": ("{}",), "photos": PHOTO_TEMPLATES, "drawings": DRAWING_TEMPLATES}


@dataclass
class OpenSetArguments(DetectionArguments):
    """What a run is made of besides what `finetune_detection.py` is told."""

    output: str = "runs/open-set"
    naming: str = "text_head"  # text_head, crop or region: see `FlorenceZeroShotDetectionConfig`
    prompts: str = "plain"  # sentences around the classes' names: plain, photos or drawings
    background: str = "background, nothing"  # what a box may show beside the classes (crop, region), by commas

    from_zero: ClassVar = (*DetectionArguments.from_zero, "epochs")
    choices: ClassVar = {**DetectionArguments.choices, "naming": NAMINGS, "prompts": tuple(PROMPTS)}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size or self.lora_rank:
            raise ValueError(f"expected a dual encoder without adapters, got {self.size!r} and rank {self.lora_rank}")


def build_open_set(
    arguments: OpenSetArguments,
) -> tuple[FlorenceForZeroShotObjectDetection, FlorenceDetectionImageProcessor, PreTrainedTokenizerBase]:
    """A new detector on a dual encoder, or one that was trained before."""
    size = {"shortest_edge": arguments.shortest_edge, "longest_edge": arguments.longest_edge}
    source = arguments.init_from or bundled_checkpoint()
    tokenizer = AutoTokenizer.from_pretrained(source)
    kind = json.loads((Path(source) / "config.json").read_text("utf-8")).get("model_type")
    if kind == FlorenceZeroShotDetectionConfig.model_type:
        model = FlorenceForZeroShotObjectDetection.from_pretrained(source, dtype=torch.float32)
        return model, FlorenceDetectionImageProcessor.from_pretrained(source, size=size), tokenizer
    shape = {"hidden_size": arguments.hidden_size, "num_blocks": arguments.num_blocks, "naming": arguments.naming}
    model = FlorenceForZeroShotObjectDetection.from_pretrained_backbone(source, **shape)
    if arguments.naming != "text_head":
        model.set_background(tokenizer, [text.strip() for text in arguments.background.split(",")])
    return model, detection_processor(source, size), tokenizer


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train; returns the scores of the last evaluation in this process."""
    arguments = parse_arguments(OpenSetArguments, sys.argv[1:] if argv is None else argv)
    output, accelerator = Path(arguments.output), arguments.make_accelerator()
    train, held_out = read_sets(arguments)
    accelerator.print(f"training: {train.report}\nevaluation: {held_out.report}")
    model, processor, tokenizer = build_open_set(arguments)
    model.to(accelerator.device).freeze_backbone()
    embeds = build_zero_shot_classifier(model, tokenizer, train.names, PROMPTS[arguments.prompts])
    by_head = model.config.naming == "text_head"
    if by_head and not arguments.freeze_backbone:
        model.backbone.requires_grad_(True)

    def evaluate(model: FlorenceForZeroShotObjectDetection) -> dict[str, Any]:
        size = arguments.batch_size
        scores = evaluate_detector(
            model, processor, held_out.pictures, held_out.names, batch_size=size, class_embeds=embeds
        )
        draw_predictions(arguments, model, processor, held_out, output / "predictions.png", embeds)
        (output / "classes.txt").write_text(scores.table() + "\n", "utf-8")
        tqdm.write(scores.table())
        return scores.as_dict()

    def save(model: FlorenceForZeroShotObjectDetection, folder: Path) -> None:
        model.save_pretrained(folder)
        FlorenceZeroShotDetectionProcessor(processor, tokenizer).save_pretrained(folder)

    def compute_loss(model: Any, inputs: dict[str, Any]) -> Any:
        return loss_of_model(model, {**inputs, "class_embeds": embeds} if by_head else inputs)

    if arguments.epochs == 0:
        return evaluate(model.eval()) if accelerator.is_main_process else {}
    batches = Batches(arguments, train.pictures, processor, accelerator.process_index, accelerator.num_processes)
    rate = arguments.learning_rate
    groups = parameter_groups(
        model,
        arguments.weight_decay,
        {"feature_norms.": rate, "backbone.": arguments.backbone_rate * rate},
        learning_rate=rate,
        layer_decay=arguments.layer_decay,
    )
    return fine_tune(
        arguments,
        accelerator,
        model,
        groups,
        batches,
        save=save,
        evaluate=evaluate,
        best="map",
        record={"names": train.names, "pictures": len(train.pictures)},
        compute_loss=compute_loss,
    )


if __name__ == "__main__":
    main()
