"""Fine-tune Florence's image tower with a decoder to describe pictures.

    python examples/finetune_captioning.py --data flickr8k --eval_split dev --output runs/captions
    python examples/finetune_captioning.py --data dataset_coco.json --train_split train+restval --eval_split val \
        --images coco --image_size 384
    accelerate launch --num_processes 8 examples/finetune_captioning.py --config ... --batch_size 256

The data are COCO's or Karpathy's JSON, Flickr8k's text file, or a metadata.jsonl: see `data.captions.read_captions`.
Each step shows a picture with one of its captions, drawn anew. Every field of `CaptioningArguments` is an option of
the command line and a key of the YAML file; the command line wins. The output holds `best`, the model and processor
with the highest CIDEr so far, ready for `pipeline("image-text-to-text")`; `captions.json`, the newest captions beside
people's; `log.csv` and `curves.png`; and checkpoints, from which an interrupted run goes on when the same command is
given again. Needs the extras `train` and `captioning`.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from transformers_florence import (
    FlorenceForImageCaptioning,
    FlorenceForPreTraining,
    FlorenceImageProcessor,
    FlorenceProcessor,
    FlorenceTokenizer,
    bundled_checkpoint,
    load_checkpoint,
)
from transformers_florence.data.captions import CaptionedPicture, all_captions, read_captions
from transformers_florence.data.texts import tokenize_texts
from transformers_florence.evaluation.captioning import evaluate_captioning
from transformers_florence.losses_fusion import IGNORED_TOKEN
from transformers_florence.training.arguments import parse_arguments
from transformers_florence.training.optimization import parameter_groups
from transformers_florence.training.recipe import RecipeArguments, StepBatches, fine_tune

SHOWN = 5  # captions that are printed after an evaluation


@dataclass
class CaptioningArguments(RecipeArguments):
    """What a run is made of besides what every recipe is told."""

    output: str = "runs/captions"
    batch_size: int = 32  # pictures
    data: str = "flickr8k"  # folder, or file of captions
    images: str = ""  # folder of its pictures, if it is not that of the file
    eval_data: str = ""  # the same two for evaluation; `data` if empty
    eval_images: str = ""
    train_split: str = "train"  # empty for a file that holds one split
    eval_split: str = "dev"
    eval_pictures: int = 0  # of the evaluation, the first ones; 0 for all
    flip: float = 0.5  # part of the pictures that are mirrored
    init_from: str = ""  # checkpoint with an image tower, of captioning, or of the fusion; the bundled one if empty
    image_size: int = 0  # side of the pictures in pixels; that of `init_from` if 0
    vocab_size: int = 0  # of a tokenizer that is learnt from the captions; that of `init_from` if 0
    max_tokens: int = 40  # the longest caption, start and end included; of a new decoder
    hidden_size: int = 256  # of a new decoder
    num_layers: int = 2
    num_heads: int = 8
    dropout: float = 0.1
    freeze_vision: bool = False
    vision_rate: float = 0.2  # learning rate of the image tower, relative to the decoder's
    num_beams: int = 3  # of the captions that are scored

    from_zero: ClassVar = (*RecipeArguments.from_zero, "eval_pictures", "image_size", "vocab_size")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.flip > 1:
            raise ValueError(f"flip: expected a part of at most 1, got {self.flip}")


def read_sets(arguments: CaptioningArguments) -> tuple[list[CaptionedPicture], list[CaptionedPicture]]:
    """Pictures to train on and to evaluate on."""
    train = read_captions(arguments.data, arguments.train_split or None, images=arguments.images or None)
    held_out = read_captions(
        arguments.eval_data or arguments.data,
        arguments.eval_split or None,
        images=(arguments.eval_images if arguments.eval_data else arguments.images) or None,
    )
    return train, held_out[: arguments.eval_pictures or None]


def build_processor(arguments: CaptioningArguments, source: str, train: list[CaptionedPicture]) -> FlorenceProcessor:
    """The pictures' part of `source`, and its tokenizer or one that is learnt from the captions."""
    size = {"height": arguments.image_size, "width": arguments.image_size}
    sizes = {"size": size, "crop_size": size} if arguments.image_size else {}
    pictures = FlorenceImageProcessor.from_pretrained(source, **sizes)
    if arguments.vocab_size:
        tokenizer = FlorenceTokenizer.train_new(all_captions(train), arguments.vocab_size, arguments.max_tokens)
    else:
        tokenizer = AutoTokenizer.from_pretrained(source)
    return FlorenceProcessor(pictures, tokenizer)


def build_model(
    arguments: CaptioningArguments, source: str, tokenizer: PreTrainedTokenizerBase
) -> FlorenceForImageCaptioning:
    """A captioning model to go on with, a pretrained fusion's decoder, or a new one on a checkpoint's image tower.

    Raises:
        ValueError: a decoder with another vocabulary than the tokenizer's.
    """
    kind = json.loads((Path(source) / "config.json").read_text("utf-8"))["model_type"]
    if kind == FlorenceForImageCaptioning.config_class.model_type:
        model = load_checkpoint(FlorenceForImageCaptioning, source, dtype=torch.float32)
    elif kind == FlorenceForPreTraining.config_class.model_type:
        model = FlorenceForImageCaptioning.from_pretraining(source)
    else:
        model = FlorenceForImageCaptioning.from_pretrained_vision(
            source,
            vocab_size=len(tokenizer),
            hidden_size=arguments.hidden_size,
            num_hidden_layers=arguments.num_layers,
            num_attention_heads=arguments.num_heads,
            max_position_embeddings=arguments.max_tokens,
            hidden_dropout=arguments.dropout,
            attention_dropout=arguments.dropout,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    if model.config.vocab_size != len(tokenizer):
        raise ValueError(f"expected a tokenizer of {model.config.vocab_size} tokens, got {len(tokenizer)}")
    if arguments.freeze_vision:
        model.freeze_vision()
    return model


class Batches(StepBatches):
    """Pictures, each with one of its captions."""

    def __init__(
        self,
        arguments: CaptioningArguments,
        pictures: list[CaptionedPicture],
        processor: FlorenceProcessor,
        max_tokens: int,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        super().__init__(arguments, len(pictures), rank, ranks)
        self.pictures, self.processor, self.max_tokens = pictures, processor, max_tokens
        self.flip = arguments.flip

    def name(self, row: int) -> str:
        return self.pictures[row].file.name

    def sample(self, row: int) -> tuple[torch.Tensor, str]:
        """Pixels (channels, height, width), normalised, and a caption."""
        picture = self.pictures[row]
        pixels = self.processor.image_processor(str(picture.file), return_tensors="pt")["pixel_values"][0]
        if torch.rand(()) < self.flip:
            pixels = pixels.flip(-1)
        return pixels, picture.captions[int(torch.randint(len(picture.captions), ()))]

    def collate(self, samples: list[tuple[torch.Tensor, str]]) -> dict[str, Any]:
        texts = tokenize_texts(self.processor.tokenizer, [caption for _, caption in samples], self.max_tokens)
        labels = texts["input_ids"].masked_fill(texts["attention_mask"] == 0, IGNORED_TOKEN)
        return {"pixel_values": torch.stack([pixels for pixels, _ in samples]), "labels": labels, **texts}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train; returns the scores of the last evaluation in this process."""
    arguments = parse_arguments(CaptioningArguments, sys.argv[1:] if argv is None else argv)
    accelerator, source = arguments.make_accelerator(), arguments.init_from or bundled_checkpoint()
    output = Path(arguments.output)
    train, held_out = read_sets(arguments)
    accelerator.print(f"training: {len(train)} pictures; evaluation: {len(held_out)} pictures")
    processor = build_processor(arguments, source, train)
    model = build_model(arguments, source, processor.tokenizer)
    ranks = (accelerator.process_index, accelerator.num_processes)
    batches = Batches(arguments, train, processor, model.config.max_position_embeddings, *ranks)

    def evaluate(model: FlorenceForImageCaptioning) -> dict[str, Any]:
        options = {"num_beams": arguments.num_beams, "max_new_tokens": model.config.max_position_embeddings - 1}
        scores, captions = evaluate_captioning(model, processor, held_out, **options)
        rows = [
            {"file": picture.file.name, "caption": captions[picture.image_id], "people": picture.captions}
            for picture in held_out
        ]
        (output / "captions.json").write_text(json.dumps(rows, indent=1), "utf-8")
        for row in rows[:SHOWN]:
            tqdm.write(f"{row['file']}: {row['caption']} (people: {row['people'][0]})")
        tqdm.write(f"CIDEr {scores.cider:.3f}, BLEU-4 {scores.bleu_4:.3f}, ROUGE-L {scores.rouge_l:.3f}")
        return scores.as_dict()

    def save(model: FlorenceForImageCaptioning, folder: Path) -> None:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)

    rate = arguments.learning_rate
    rates = {"vision_model.": arguments.vision_rate * rate}
    groups = parameter_groups(model, arguments.weight_decay, rates, ("embeddings.",), learning_rate=rate)
    return fine_tune(
        arguments,
        accelerator,
        model,
        groups,
        batches,
        save=save,
        evaluate=evaluate,
        best="cider",
        record={"vocabulary": len(processor.tokenizer)},
    )


if __name__ == "__main__":
    main()
