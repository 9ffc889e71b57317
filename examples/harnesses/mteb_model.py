"""Dual encoders under MTEB's image tasks (MIEB).

    python examples/harnesses/mteb_model.py --tasks CIFAR10ZeroShot Flickr30kT2IRetrieval

`--model` is the folder of a checkpoint, Florence, or CLIP or SigLIP of transformers; the bundled one if it is empty.
Needs `pip install "mteb[image]"` beside this package. Tasks fetch their pictures from the Hub. In Python:

    mteb.evaluate(DualEncoder("runs/florence-nano/model"), mteb.get_tasks(["CIFAR10ZeroShot"]))
"""

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import AutoModel, AutoProcessor

from transformers_florence import bundled_checkpoint, load_checkpoint
from transformers_florence.evaluation.zero_shot import embed_pixels, embed_texts
from transformers_florence.training.arguments import check_fields, parse_arguments


@dataclass
class HarnessArguments:
    """What is evaluated on what.

    Raises:
        ValueError: no task, or a count below 1.
    """

    model: str = ""  # checkpoint; the bundled one if empty
    tasks: list[str] = field(default_factory=list)  # by their names in MTEB
    output: str = "results/mteb"  # MTEB's folder of results, which are kept
    batch_size: int = 64

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.tasks:
            raise ValueError("tasks: expected names of MTEB's tasks, got none")


def digest_of(folder: str | Path) -> str:
    """Of the files of a checkpoint: MTEB keeps results by a model's name and revision."""
    digest = hashlib.blake2b(digest_size=8)
    for file in sorted(path for path in Path(folder).iterdir() if path.suffix in (".json", ".safetensors")):
        with file.open("rb") as content:
            digest.update(file.name.encode() + hashlib.file_digest(content, "blake2b").digest())
    return digest.hexdigest()


class DualEncoder:
    """A checkpoint as an encoder of MTEB (its `EncoderProtocol`).

    Args:
        model_name: folder of the checkpoint.
        revision: for MTEB, which says it; a folder has none.
        device: a GPU if there is one, unless it is named.

    Raises:
        ValueError: no such folder, or a checkpoint that is not whole, see `load_checkpoint`.
    """

    def __init__(
        self, model_name: str, revision: str | None = None, *, device: str | None = None, **kwargs: Any
    ) -> None:
        self.folder = Path(model_name)
        model = load_checkpoint(AutoModel, model_name, dtype=torch.float32)
        self.model = model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.processor = AutoProcessor.from_pretrained(model_name)

    @property
    def mteb_model_meta(self) -> Any:
        """Name, size and digest, which MTEB writes beside the results."""
        from mteb.models import ModelMeta  # not an extra: only who runs MTEB needs it

        unknown = ("release_date", "languages", "memory_usage_mb", "license", "open_weights", "training_datasets")
        return ModelMeta(
            loader=DualEncoder,
            name=f"transformers_florence/{self.folder.resolve().name}",
            revision=digest_of(self.folder),
            n_parameters=self.model.num_parameters(),
            max_tokens=self.processor.tokenizer.model_max_length,
            embed_dim=getattr(self.model.config, "projection_dim", None),
            modalities=["image", "text"],
            framework=["PyTorch", "Transformers"],
            similarity_fn_name="cosine",
            use_instructions=False,
            public_training_code=None,
            public_training_data=None,
            **dict.fromkeys(unknown),
        )

    def encode(self, inputs: Any, *, show_progress_bar: bool = True, **kwargs: Any) -> torch.Tensor:
        """Batches of MTEB -> (rows, projection_dim), float32, on the CPU.

        Args:
            inputs: batches with `text`, a list of texts, `image`, a list of PIL pictures, or both, which are added.
            kwargs: what MTEB says of the task, its split and its prompts, of which a dual encoder needs nothing.

        Returns:
            Unit vectors; of rows with a text and a picture the sum of both.

        Raises:
            ValueError: a batch with neither.
        """
        chunks = []
        for batch in tqdm(inputs, desc="batches", disable=not show_progress_bar):
            parts = []
            if "text" in batch:
                parts.append(embed_texts(self.model, self.processor.tokenizer, batch["text"]))
            if "image" in batch:
                pixels = self.processor.image_processor(images=list(batch["image"]), return_tensors="pt")
                parts.append(embed_pixels(self.model, pixels["pixel_values"]))
            if not parts:
                raise ValueError(f"expected batches with text or image, got {', '.join(map(str, batch))}")
            chunks.append(torch.stack(parts).sum(dim=0).cpu())
        return torch.cat(chunks)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> torch.Tensor:
        """Cosines: (rows, dim) and (columns, dim), tensors or arrays -> (rows, columns)."""
        first, second = (F.normalize(torch.as_tensor(part), dim=-1) for part in (embeddings1, embeddings2))
        return first @ second.T

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> torch.Tensor:
        """Cosines of each row with its own: twice (rows, dim), tensors or arrays -> (rows,)."""
        return F.cosine_similarity(torch.as_tensor(embeddings1), torch.as_tensor(embeddings2), dim=-1)


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate; prints the main score of each task."""
    arguments = parse_arguments(HarnessArguments, sys.argv[1:] if argv is None else argv)
    import mteb  # not an extra: only who runs this script needs it

    found = mteb.evaluate(
        DualEncoder(arguments.model or bundled_checkpoint()),
        mteb.get_tasks(tasks=arguments.tasks),
        cache=mteb.ResultCache(arguments.output),
        encode_kwargs={"batch_size": arguments.batch_size},
    )
    for result in found.task_results:
        print(f"{result.task_name}: {result.get_score():.4f}")


if __name__ == "__main__":
    main()
