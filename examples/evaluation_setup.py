"""What the evaluating scripts share: arguments, the model, the sets, and the file that a result is written to."""

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import AutoConfig, AutoModel, AutoProcessor, PreTrainedModel
from transformers.utils import logging

from transformers_florence import bundled_checkpoint, load_checkpoint
from transformers_florence.data.image_sets import ImageSet, read_image_set
from transformers_florence.evaluation.embedding import embed_pictures
from transformers_florence.evaluation.results import Result, command_line, current_commit, hash_pictures
from transformers_florence.training.arguments import check_fields, parse_arguments


@dataclass
class EvaluationArguments:
    """What every evaluation is told.

    Raises:
        ValueError: no data, or a count below 1.
    """

    data: str = ""  # folder, datasets:NAME or KEY:FOLDER, see `read_image_set`
    model: str = ""  # checkpoint: Florence, or CLIP or SigLIP of transformers; the bundled one if empty
    random_weights: bool = False  # the model's shape with new weights: what the weights are worth
    batch_size: int = 64
    workers: int = 0  # processes that read
    output: str = "results"  # folder of the results
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.data:
            raise ValueError("data: expected a set of pictures, got none")
        check_fields(self, from_zero=("seed", "workers"))


Arguments = TypeVar("Arguments", bound=EvaluationArguments)


class Evaluation:
    """A model, and the way from sets to results.

    Attributes:
        arguments: of the script.
        model: in evaluation mode, on a GPU if there is one; processor: its own.
        name: what results call it.
    """

    def __init__(self, script: str, kind: type[Arguments], argv: Sequence[str] | None) -> None:
        logging.disable_progress_bar()
        self.argv = sys.argv[1:] if argv is None else list(argv)
        self.script = script
        self.arguments: Any = parse_arguments(kind, self.argv)
        self.started = time.monotonic()
        folder = self.arguments.model or bundled_checkpoint()
        self.name = Path(folder).name
        self.processor = AutoProcessor.from_pretrained(folder)
        model: PreTrainedModel
        if self.arguments.random_weights:
            self.name += " (random weights)"
            torch.manual_seed(self.arguments.seed)
            model = AutoModel.from_config(AutoConfig.from_pretrained(folder)).eval()
        else:
            model = load_checkpoint(AutoModel, folder, dtype=torch.float32)
        self.model = model.to("cuda" if torch.cuda.is_available() else "cpu")

    def read(self, split: str) -> ImageSet:
        """One split of the set; all of it if the split is empty."""
        return read_image_set(self.arguments.data, split or None)

    def embed(self, pictures: ImageSet, **options: Any) -> tuple[torch.Tensor, ImageSet]:
        """Vectors of the pictures that can be read, and the set of these; says how many cannot."""
        embeds, readable = embed_pictures(
            self.model,
            self.processor.image_processor,
            pictures.pictures,
            batch_size=self.arguments.batch_size,
            workers=self.arguments.workers,
            progress=True,
            **options,
        )
        if not readable.all():
            print(f"{pictures.name}: left out {int((~readable).sum())} of {len(readable)} pictures, unreadable")
        return embeds, pictures.select(readable.nonzero()[:, 0].tolist())

    def report(
        self, task: str, pictures: ImageSet, metrics: Mapping[str, float | int | None], **settings: Any
    ) -> Result:
        """The result, written to the output's folder, and printed."""
        told = {name: value for name, value in asdict(self.arguments).items() if name not in ("output", "workers")}
        result = Result(
            task=task,
            model=self.name,
            data=pictures.name,
            metrics=dict(metrics),
            command=command_line(self.script, self.argv),
            seed=self.arguments.seed,
            commit=current_commit(),
            data_hash=hash_pictures(pictures.pictures, [pictures.names, pictures.labels.tolist()]),
            settings={**told, **settings},
            seconds=round(time.monotonic() - self.started, 1),
        )
        file = result.save(self.arguments.output)
        shown = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items() if value is not None)
        print(f"{task}, {self.name} on {pictures.name}: {shown} -> {file}")
        return result


def check_same_classes(one: ImageSet, other: ImageSet) -> None:
    """Raises ValueError for sets whose class numbers do not mean the same."""
    if one.names != other.names:
        only = sorted(set(one.names) ^ set(other.names))
        raise ValueError(f"expected splits with the same classes, got {only[:5]} in one of them only")
