"""Train CoSwin with UniCL, or a ViT of the same size with CLIP's loss, for the same time on the same pictures.

    python examples/train_peers.py --tower coswin --captions flickr8k coco_mini --labels tiny_imagenet --seconds 3600
    python examples/train_peers.py --tower vit    --captions flickr8k coco_mini --labels tiny_imagenet --seconds 3600

Both have the bundled checkpoint's text tower, tokenizer, picture size and number of parameters, all weights new, and
see the same batches. A few steps are timed first: the run gets as many as fit into `--seconds`. Pictures with captions
give one caption, drawn anew; pictures with a class its name in a template. What comes out is evaluated like any model:

    python examples/evaluate_zero_shot.py --data pictures --model runs/coswin-0/best

Every field of `PeerArguments` is an option and a key of the YAML file of `--config`. Needs the extra `train`.
"""

import json
import sys
import time
from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import AutoConfig, AutoProcessor, CLIPConfig, CLIPModel, PreTrainedModel

from finetune_setup import TrainingViews, save_model
from transformers_florence import FlorenceConfig, FlorenceModel, bundled_checkpoint
from transformers_florence.data.captions import read_captions
from transformers_florence.data.image_sets import read_image_set
from transformers_florence.data.prompts import PHOTO_TEMPLATES, fill_template
from transformers_florence.data.sources import text_label
from transformers_florence.training.arguments import parse_arguments
from transformers_florence.training.optimization import parameter_groups
from transformers_florence.training.recipe import RecipeArguments, StepBatches, fine_tune

HEAD_DIM = 32
PATCHES_A_SIDE = 8
DEPTHS, WIDTHS = (4, 6, 8, 10, 12), range(HEAD_DIM, 1025, HEAD_DIM)  # of the ViT
TIMED_STEPS, WARM_STEPS = 6, 2


@dataclass
class PeerArguments(RecipeArguments):
    """As `RecipeArguments`; `epochs` does not count, as time does."""

    output: str = ""  # runs/<tower>-<seed> if empty
    tower: str = "coswin"  # or vit
    captions: list[str] = field(default_factory=list)  # sets as `read_captions` takes them
    labels: list[str] = field(default_factory=list)  # sets as `read_image_set` takes them
    split: str = "train"
    seconds: int = 3600
    batch_size: int = 128
    learning_rate: float = 1e-3
    min_scale: float = 0.5

    choices: ClassVar = {**RecipeArguments.choices, "tower": ("coswin", "vit")}

    def __post_init__(self) -> None:
        self.output = self.output or f"runs/{self.tower}-{self.seed}"
        super().__post_init__()
        if not self.captions and not self.labels:
            raise ValueError("expected sets of pictures in captions, labels or both, got none")


def number_of_parameters(model_class: type[PreTrainedModel], config: Any) -> int:
    """Without allocating them."""
    with torch.device("meta"):
        return sum(weight.numel() for weight in model_class(config).parameters())


def peer_config(config: FlorenceConfig) -> CLIPConfig:
    """CLIP with the same text tower, and the ViT whose depth and width bring it closest to as many parameters."""
    text = config.text_config
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("max_position_embeddings", "hidden_act", "bos_token_id", "eos_token_id", "pad_token_id")
    shared = {name: getattr(text, name) for name in names}
    side = config.vision_config.image_size

    def of_shape(depth: int, width: int) -> CLIPConfig:
        vision = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": depth}
        vision |= {"num_attention_heads": width // HEAD_DIM, "image_size": side, "patch_size": side // PATCHES_A_SIDE}
        return CLIPConfig(text_config=shared, vision_config=vision, projection_dim=config.projection_dim)

    def count_of_shape(depth: int, width: int) -> int:
        return number_of_parameters(CLIPModel, of_shape(depth, width))

    wanted, nearest = number_of_parameters(FlorenceModel, config), []
    for depth in DEPTHS:
        count_of = partial(count_of_shape, depth)
        above = bisect(WIDTHS, wanted, key=count_of)
        for width in WIDTHS[max(0, above - 1) : above + 1]:
            nearest.append((abs(count_of(width) - wanted), depth, width))
    _, depth, width = min(nearest)
    return of_shape(depth, width)


class Mixture(StepBatches):
    """Pictures of several sets, each with a text; the same for both towers. `steps` is how many batches there are."""

    def __init__(self, arguments: PeerArguments, processor: Any, rank: int = 0, ranks: int = 1) -> None:
        self.items: list[tuple[Any, tuple[str, ...], bool]] = []  # picture, its texts, and whether they are names
        for source in arguments.captions:
            self.items += [(row.file, row.captions, False) for row in read_captions(source, arguments.split)]
        for source in arguments.labels:
            pictures = read_image_set(source, arguments.split)
            rows = zip(pictures.pictures, pictures.labels.tolist(), strict=True)
            self.items += [(picture, (pictures.names[label],), True) for picture, label in rows]
        super().__init__(arguments, len(self.items), rank, ranks)
        self.views = TrainingViews(processor.image_processor, arguments.min_scale, flip=True)
        self.tokenizer, self.steps = processor.tokenizer, self.per_epoch

    def __len__(self) -> int:
        return self.steps

    def sample(self, row: int) -> tuple[torch.Tensor, str, int]:
        picture, texts, are_names = self.items[row]
        text = texts[int(torch.randint(len(texts), ()))]
        template = PHOTO_TEMPLATES[int(torch.randint(len(PHOTO_TEMPLATES), ()))] if are_names else "{}"
        return self.views.view(picture, row), fill_template(template, text), text_label(text)

    def collate(self, samples: list[tuple[torch.Tensor, str, int]]) -> dict[str, Any]:
        views, texts, labels = zip(*samples, strict=True)
        tokens = self.tokenizer(list(texts), return_tensors="pt", padding=True, truncation=True)
        return {"pixel_values": self.views.batch(list(views)), **tokens, "labels": torch.tensor(labels)}


def contrastive_loss(model: nn.Module, inputs: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Each tower's own: UniCL over texts that mean the same, CLIP over pairs."""
    plain = getattr(model, "module", model)
    if isinstance(plain, FlorenceModel):
        return model(**inputs).loss, {}
    others = {name: value for name, value in inputs.items() if name != "labels"}
    return model(**others, return_loss=True).loss, {}


def steps_within(model: nn.Module, batches: Mixture, seconds: float, device: torch.device) -> int:
    """How many steps fit into the time, judged by a few of them that change no weight."""
    started = 0.0
    for step in range(WARM_STEPS + TIMED_STEPS):
        if step == WARM_STEPS:
            started = time.monotonic()
        inputs = {name: value.to(device) for name, value in batches[step % batches.per_epoch]["inputs"].items()}
        contrastive_loss(model, inputs)[0].backward()
    model.zero_grad()
    return max(1, round(seconds * TIMED_STEPS / (time.monotonic() - started)))


def main(argv: Sequence[str] | None = None) -> Path:
    """Train; returns the folder of the model."""
    arguments = parse_arguments(PeerArguments, sys.argv[1:] if argv is None else argv)
    accelerator = arguments.make_accelerator()
    folder, output = bundled_checkpoint(), Path(arguments.output)
    config, processor = AutoConfig.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    model = (FlorenceModel(config) if arguments.tower == "coswin" else CLIPModel(peer_config(config))).train()
    model.to(accelerator.device)
    batches = Mixture(arguments, processor, accelerator.process_index, accelerator.num_processes)
    budget = output / "steps.json"  # a run that goes on has the length that it began with
    if budget.is_file():
        batches.steps = json.loads(budget.read_text("utf-8"))
    else:
        batches.steps = steps_within(model, batches, arguments.seconds, accelerator.device)
        budget.write_text(json.dumps(batches.steps), "utf-8")
    accelerator.print(
        f"{arguments.tower}: {batches.steps} steps in {arguments.seconds} s, {len(batches.items)} pictures"
    )
    fine_tune(
        arguments,
        accelerator,
        model,
        parameter_groups(model, arguments.weight_decay, no_decay=("token_embedding", "position_embedding")),
        batches,
        save=lambda plain, to: save_model(plain, processor, to),
        record={"steps": batches.steps, "pictures": batches.count},
        compute_loss=contrastive_loss,
    )
    return output / "best"


if __name__ == "__main__":
    main()
