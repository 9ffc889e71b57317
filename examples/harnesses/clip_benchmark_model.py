"""Dual encoders under clip-benchmark: its own command line, which then knows the model type `florence`.

    python examples/harnesses/clip_benchmark_model.py eval --model_type florence --model florence-nano \
        --pretrained src/transformers_florence/checkpoints/florence-nano --dataset cifar10 --dataset_root cifar10

`--pretrained` is the folder of a checkpoint, Florence, or CLIP or SigLIP of transformers; `--model` is what results
call it. Needs `pip install clip-benchmark 'numpy<2.4'` beside this package; its linear probe needs a GPU as well.
"""

from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, AutoProcessor, PreTrainedModel

from transformers_florence import load_checkpoint
from transformers_florence.evaluation.embedding import tokenize

MODEL_TYPE = "florence"


class BenchmarkModel(nn.Module):
    """What clip-benchmark takes for a model.

    Args:
        model: with the interface of transformers' CLIP.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def encode_image(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(pictures, 3, height, width) -> (pictures, projection_dim), of any length."""
        return self.model.get_image_features(pixel_values).pooler_output

    def encode_text(self, tokens: dict[str, torch.Tensor]) -> torch.Tensor:
        """What the tokenizer makes of texts -> (texts, projection_dim), of any length."""
        return self.model.get_text_features(**tokens).pooler_output


def to_pixels(image_processor: Any, picture: Any) -> torch.Tensor:
    """A PIL picture -> (3, height, width), as the model's own image processor makes it."""
    return image_processor(images=picture, return_tensors="pt")["pixel_values"][0]


def load(pretrained: str, device: str | torch.device = "cpu", **other: Any) -> tuple[BenchmarkModel, Any, Any]:
    """A checkpoint as clip-benchmark's loading functions return one: model, transform of a picture, tokenizer.

    Args:
        pretrained: folder of the checkpoint.
        other: what clip-benchmark says to each loading function, of which a folder needs nothing.

    Raises:
        ValueError: no such folder, or a checkpoint that is not whole, see `load_checkpoint`.
    """
    model = load_checkpoint(AutoModel, pretrained, dtype=torch.float32).to(device)
    processor = AutoProcessor.from_pretrained(pretrained)
    # Partial functions rather than closures: the transform travels to the processes that read.
    return (
        BenchmarkModel(model),
        partial(to_pixels, processor.image_processor),
        partial(tokenize, model, processor.tokenizer),
    )


def main() -> None:
    """clip-benchmark's command line, with one more model type."""
    from clip_benchmark import cli, models  # not an extra: only who runs this script needs it

    models.TYPE2FUNC[MODEL_TYPE] = load
    models.MODEL_TYPES.append(MODEL_TYPE)
    cli.main()


if __name__ == "__main__":
    main()
