"""Pretrain the fusion of pictures and texts on captions: image-text matching, masked words and, if wanted, captioning.

    python examples/pretrain_fusion.py --data flickr8k --eval_split dev --output runs/fusion
    python examples/pretrain_fusion.py --data dataset_coco.json --images coco --text roberta-base --image_size 384
    accelerate launch --num_processes 8 examples/pretrain_fusion.py --config ... --batch_size 1024

The data are COCO's or Karpathy's JSON, Flickr8k's text file, or a metadata.jsonl: see `data.captions.read_captions`.
False pairs come from the batch; the dual encoder of `init_from` says which are hard to tell from the right ones.
Every field of `FusionArguments` is an option of the command line and a key of the YAML file; the command line wins.
The output holds `best`, the newest model and processor with its `scores.json`, from which `finetune_vqa.py` and
`finetune_captioning.py` go on (`--init_from`); `log.csv` and `curves.png`; and checkpoints, from which an interrupted
run goes on when the same command is given again. Needs the extra `train`.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import AutoTokenizer, DataCollatorForLanguageModeling, PreTrainedTokenizerBase

from transformers_florence import (
    FlorenceForPreTraining,
    FlorenceImageProcessor,
    FlorenceModel,
    FlorenceProcessor,
    bundled_checkpoint,
    load_checkpoint,
)
from transformers_florence.configuration_florence_fusion import FUSION_TYPES
from transformers_florence.data.captions import CaptionedPicture, read_captions
from transformers_florence.data.texts import tokenize_texts
from transformers_florence.losses_fusion import IGNORED_TOKEN
from transformers_florence.modeling_florence_fusion_heads import NO_DECAY, fusion_learning_rates
from transformers_florence.training.arguments import parse_arguments
from transformers_florence.training.optimization import parameter_groups
from transformers_florence.training.recipe import RecipeArguments, StepBatches, fine_tune

HEAD_FACTOR = 5.0  # METER's, of the learning rate of heads in pretraining


@dataclass
class FusionArguments(RecipeArguments):
    """What a run is made of besides what every recipe is told. METER's rate is 1e-5 at 4096 pairs a step."""

    output: str = "runs/fusion"
    batch_size: int = 32  # pairs
    learning_rate: float = 1e-4
    data: str = "flickr8k"  # folder, or file of captions
    images: str = ""  # folder of its pictures, if it is not that of the file
    train_split: str = "train"  # empty for a file that holds one split
    eval_split: str = "dev"
    eval_batches: int = 8  # of the evaluation, the first ones
    init_from: str = ""  # checkpoint of a dual encoder; the bundled one if empty
    text: str = ""  # checkpoint of a RoBERTa or BERT with its tokenizer; the text tower of `init_from` if empty
    image_size: int = 0  # side of the pictures in pixels; that of `init_from` if 0
    hidden_size: int = 192
    num_layers: int = 2
    num_heads: int = 6
    fusion_type: str = "co_attention"
    num_decoder_layers: int = 0  # of a decoder that learns captioning; 0 for none
    masked: float = 0.15  # part of the tokens
    hard_negatives: bool = True
    freeze_vision: bool = False
    fusion_factor: float = 5.0  # learning rate of the fusion, relative to that of the towers

    from_zero: ClassVar = (*RecipeArguments.from_zero, "image_size", "num_layers", "num_decoder_layers")
    choices: ClassVar = {**RecipeArguments.choices, "fusion_type": FUSION_TYPES}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.masked < 1:
            raise ValueError(f"masked: expected a part above 0 and below 1, got {self.masked}")


def build_masker(tokenizer: PreTrainedTokenizerBase, part: float) -> DataCollatorForLanguageModeling:
    """BERT's masking; random tokens stand for the mask where a tokenizer (CLIP's) has none."""
    if tokenizer.mask_token is not None:
        return DataCollatorForLanguageModeling(tokenizer, mlm_probability=part)
    lender = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    lender.mask_token = tokenizer.unk_token  # the collator wants one, and never uses it
    return DataCollatorForLanguageModeling(
        lender, mlm_probability=part, mask_replace_prob=0.0, random_replace_prob=0.9
    )


class Batches(StepBatches):
    """Pictures, each with one of its captions, of which some tokens are masked."""

    def __init__(
        self,
        arguments: FusionArguments,
        pictures: list[CaptionedPicture],
        processor: FlorenceProcessor,
        guide: PreTrainedTokenizerBase,
        max_tokens: int,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        super().__init__(arguments, len(pictures), rank, ranks)
        self.pictures, self.processor, self.guide, self.max_tokens = pictures, processor, guide, max_tokens
        self.masker = build_masker(processor.tokenizer, arguments.masked)

    def name(self, row: int) -> str:
        return self.pictures[row].file.name

    def sample(self, row: int) -> dict[str, Any]:
        """Pixels (channels, height, width), normalised; a caption; its tokens, masked ones among them, and labels."""
        picture = self.pictures[row]
        pixels = self.processor.image_processor(str(picture.file), return_tensors="pt")["pixel_values"][0]
        caption = picture.captions[int(torch.randint(len(picture.captions), ()))]
        texts = tokenize_texts(self.processor.tokenizer, [caption], self.max_tokens, return_special_tokens_mask=True)
        ids, labels = self.masker.torch_mask_tokens(texts["input_ids"], texts["special_tokens_mask"])
        return {"pixels": pixels, "caption": caption, "input_ids": ids[0], "labels": labels[0]}

    def collate(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        def pad(name: str, value: int) -> torch.Tensor:
            return nn.utils.rnn.pad_sequence([sample[name] for sample in samples], True, value)

        mask = [torch.ones_like(sample["input_ids"]) for sample in samples]
        guide = tokenize_texts(self.guide, [sample["caption"] for sample in samples], self.guide.model_max_length)
        return {
            "pixel_values": torch.stack([sample["pixels"] for sample in samples]),
            "input_ids": pad("input_ids", self.processor.tokenizer.pad_token_id),
            "labels": pad("labels", IGNORED_TOKEN),
            "attention_mask": nn.utils.rnn.pad_sequence(mask, True, 0),
            "guide_ids": guide["input_ids"],
            "guide_mask": guide["attention_mask"],
        }


class LossWithGuide:
    """The model's losses, for which a dual encoder, if there is one, says which false pairs are hard."""

    def __init__(self, guide: FlorenceModel | None) -> None:
        self.guide = guide

    @torch.no_grad()
    def similarities(self, pixel_values: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor | None:
        """(pictures, texts), or None for an even draw."""
        if self.guide is None:
            return None
        self.guide.to(pixel_values.device)
        return self.guide(input_ids=ids, attention_mask=mask, pixel_values=pixel_values).logits_per_image.float()

    def outputs(self, model: nn.Module, inputs: dict[str, Any]) -> Any:
        """What the model makes of a batch."""
        own = {name: value for name, value in inputs.items() if not name.startswith("guide_")}
        alike = self.similarities(inputs["pixel_values"], inputs["guide_ids"], inputs["guide_mask"])
        return model(**own, similarities=alike)

    def __call__(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
        """The loss and its parts, see `fine_tune`."""
        found = self.outputs(model, inputs)
        parts = {name: found[name] for name in ("itm_loss", "mlm_loss", "caption_loss") if found.get(name) is not None}
        return found.loss, parts


@torch.no_grad()
def evaluate_pretraining(
    model: FlorenceForPreTraining, loss: LossWithGuide, batches: StepBatches, count: int
) -> dict[str, float]:
    """Means over the first batches of a held-out set: losses, parts of pairs and of masked tokens told right."""
    totals: dict[str, list[float]] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # of the draw of false pairs: each evaluation has the same
        for step in range(min(count, batches.per_epoch)):
            inputs = {name: value.to(model.device) for name, value in batches[step]["inputs"].items()}
            found = loss.outputs(model, inputs)
            numbers = {name: found[name] for name in ("itm_loss", "mlm_loss", "caption_loss")}
            for name, logits, labels in (
                ("itm_accuracy", found.itm_logits, found.itm_labels),
                ("mlm_accuracy", found.mlm_logits, inputs["labels"]),
            ):
                right = (logits.argmax(dim=-1) == labels)[labels != IGNORED_TOKEN]
                numbers[name] = right.sum() / max(1, right.numel())
            for name, value in numbers.items():
                if value is not None:
                    totals.setdefault(name, []).append(float(value))
    return {f"held_out_{name}": sum(values) / len(values) for name, values in totals.items()}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train; returns the scores of the last evaluation in this process."""
    arguments = parse_arguments(FusionArguments, sys.argv[1:] if argv is None else argv)
    accelerator, source = arguments.make_accelerator(), arguments.init_from or bundled_checkpoint()
    images = arguments.images or None
    train = read_captions(arguments.data, arguments.train_split or None, images=images)
    held_out = read_captions(arguments.data, arguments.eval_split or None, images=images)
    accelerator.print(f"training: {len(train)} pictures; evaluation: {len(held_out)} pictures")
    model = FlorenceForPreTraining.from_pretrained_towers(
        source,
        text=arguments.text or None,
        freeze_vision=arguments.freeze_vision,
        hidden_size=arguments.hidden_size,
        num_hidden_layers=arguments.num_layers,
        num_attention_heads=arguments.num_heads,
        fusion_type=arguments.fusion_type,
        num_decoder_layers=arguments.num_decoder_layers,
    )
    size = {"height": arguments.image_size, "width": arguments.image_size}
    sizes = {"size": size, "crop_size": size} if arguments.image_size else {}
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (arguments.text or source, source)]
    processor = FlorenceProcessor(FlorenceImageProcessor.from_pretrained(source, **sizes), tokenizers[0])
    guide = load_checkpoint(FlorenceModel, source, dtype=torch.float32) if arguments.hard_negatives else None
    loss, max_tokens = LossWithGuide(guide), model.config.max_text_tokens
    ranks = (accelerator.process_index, accelerator.num_processes)
    batches = Batches(arguments, train, processor, tokenizers[1], max_tokens, *ranks)
    shown = Batches(arguments, held_out, processor, tokenizers[1], max_tokens)

    def save(model: FlorenceForPreTraining, folder: Path) -> None:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)

    rate = arguments.learning_rate
    rates = fusion_learning_rates(rate, fusion_factor=arguments.fusion_factor, head_factor=HEAD_FACTOR)
    groups = parameter_groups(model, arguments.weight_decay, rates, NO_DECAY, learning_rate=rate)
    return fine_tune(
        arguments,
        accelerator,
        model,
        groups,
        batches,
        save=save,
        evaluate=lambda model: evaluate_pretraining(model, loss, shown, arguments.eval_batches),
        compute_loss=loss,
    )


if __name__ == "__main__":
    main()
