"""What the scripts share that fine-tune a dual encoder: arguments, adapters, views of pictures, the result."""

import json
import resource
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import IA3Config, LoHaConfig, LoKrConfig, LoraConfig, PeftConfig, get_peft_model
from torch import nn
from torchvision.transforms import v2
from transformers import AutoProcessor

from transformers_florence import FlorenceModel, bundled_checkpoint, load_checkpoint
from transformers_florence.evaluation.results import Result, command_line, current_commit
from transformers_florence.image_checks import picture_name
from transformers_florence.training.lora import LORA_TARGETS
from transformers_florence.training.recipe import RecipeArguments

ADAPTERS = ("lora", "dora", "loha", "lokr", "ia3")
# What IA3 scales (Liu et al. 2022): keys, values, and what goes into the second layer of a feed-forward block.
IA3_TARGETS, IA3_FEEDFORWARD = ["k_proj", "v_proj", "fc2"], ["fc2"]


@dataclass
class DualEncoderArguments(RecipeArguments):
    """As `RecipeArguments`, and what fine-tuning of a dual encoder is told in any case."""

    data: str = "pictures"
    eval_data: str = ""  # `data` if empty
    train_split: str = "train"  # empty for all
    eval_split: str = "valid"
    model: str = ""  # checkpoint; the bundled one if empty
    learning_rate: float = 2e-5  # the paper's
    layer_decay: float = 1.0  # factor of the rate for each layer further down
    lora_rank: int = 0  # of adapters, which then are all that is trained but for new layers; 0 for none
    adapter: str = "lora"  # their kind, where there is a rank: dora, loha, lokr, or ia3, where it does not matter
    min_scale: float = 0.5  # smallest part of a picture that a training view shows
    flip: bool = True  # whether a training view may be mirrored
    results: str = "results"  # folder of the file that tells what came out

    free: ClassVar = (*RecipeArguments.free, "results")
    from_zero: ClassVar = (*RecipeArguments.from_zero, "lora_rank")
    choices: ClassVar = {**RecipeArguments.choices, "adapter": ADAPTERS}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.min_scale <= 1:
            raise ValueError(f"min_scale: expected a number above 0 and at most 1, got {self.min_scale}")

    def load(self, kind: type = FlorenceModel) -> tuple[Any, Any]:
        """The dual encoder, in float32, and its processor; transformers' CLIP and SigLIP too with `AutoModel`."""
        folder = self.model or bundled_checkpoint()
        return load_checkpoint(kind, folder, dtype=torch.float32), AutoProcessor.from_pretrained(folder)


def adapt(model: nn.Module, arguments: DualEncoderArguments, *, new: list[str] | None = None) -> nn.Module:
    """The model with the adapters that are asked for, all that is trained but for `new` parts; as it is without."""
    rank, kind = arguments.lora_rank, arguments.adapter
    if not rank:
        return model
    config: PeftConfig
    if kind == "ia3":
        config = IA3Config(target_modules=IA3_TARGETS, feedforward_modules=IA3_FEEDFORWARD, modules_to_save=new)
    elif kind in ("loha", "lokr"):
        kinds = {"loha": LoHaConfig, "lokr": LoKrConfig}
        config = kinds[kind](r=rank, alpha=2 * rank, target_modules=LORA_TARGETS, modules_to_save=new)
    else:
        config = LoraConfig(
            r=rank,
            lora_alpha=2 * rank,
            use_dora=kind == "dora",
            target_modules=LORA_TARGETS,
            modules_to_save=new,
        )
    return get_peft_model(model, config)


class TrainingViews:
    """Pictures cut at random, as the model's image processor normalises them.

    Args:
        image_processor: the model's.
        min_scale: smallest part of the area that a view shows.
        flip: whether half of the views are mirrored.
    """

    def __init__(self, image_processor: Any, min_scale: float, flip: bool) -> None:
        self.image_processor = image_processor
        size = image_processor.crop_size if image_processor.do_center_crop else image_processor.size
        edge = size.get("shortest_edge")
        shape = [edge or size["height"], edge or size["width"]]
        steps: list[nn.Module] = [v2.RandomResizedCrop(shape, (min_scale, 1.0), antialias=True)]
        self.transform = v2.Compose(steps + [v2.RandomHorizontalFlip()] * flip)

    def view(self, picture: Any, number: int) -> torch.Tensor:
        """uint8 (3, height, width). Raises ValueError for a picture that cannot be read."""
        return self.transform(self.image_processor.read_picture(picture, picture_name(picture, number)))

    def batch(self, views: list[torch.Tensor]) -> torch.Tensor:
        """Normalised pixel values, (batch, 3, height, width)."""
        plain = {"do_resize": False, "do_center_crop": False, "input_data_format": "channels_first"}
        return self.image_processor(images=views, return_tensors="pt", **plain)["pixel_values"]


def save_model(model: Any, processor: Any, folder: Path) -> None:
    """A model with its processor, as `from_pretrained` loads them."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def report_run(
    task: str, script: str, argv: Sequence[str], arguments: DualEncoderArguments, data: tuple[str, str], metrics: dict
) -> Result:
    """What the best model of a run was worth, written to `arguments.results` and printed.

    Args:
        data: name and digest of what it was evaluated on.
    """
    result = Result(
        task=task,
        model=Path(arguments.model or bundled_checkpoint()).name,
        data=data[0],
        metrics={name: value for name, value in metrics.items() if value is None or isinstance(value, int | float)},
        command=command_line(script, argv),
        seed=arguments.seed,
        commit=current_commit(),
        data_hash=data[1],
        settings={name: value for name, value in asdict(arguments).items() if name not in arguments.free},
    )
    shown = ", ".join(f"{name} {value:.4g}" for name, value in result.metrics.items() if value is not None)
    print(f"{task}: {shown} -> {result.save(arguments.results)}")
    return result


def best_scores(output: str | Path) -> dict[str, Any]:
    """The scores of a run's best model; nothing if the run was stopped before its first evaluation."""
    file = Path(output) / "best" / "scores.json"
    return json.loads(file.read_text("utf-8")) if file.is_file() else {}


def cost_of(model: nn.Module) -> dict[str, int]:
    """How many parameters are trained, and the most memory that this process has held, in MiB."""
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    if torch.cuda.is_available():
        return {"trained_parameters": trained, "peak_memory_mib": torch.cuda.max_memory_allocated() >> 20}
    return {"trained_parameters": trained, "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10}
