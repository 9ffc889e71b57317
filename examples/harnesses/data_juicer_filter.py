"""Data-Juicer's filter of pictures with texts, with a Florence as the judge of how well they go together.

In Data-Juicer's configuration, which `dj-process --config` reads:

    custom_operator_paths: [examples/harnesses/data_juicer_filter.py]
    process:
      - florence_image_text_similarity_filter: {hf_clip: runs/florence-nano/model, min_score: 0.2}

Options and rules are those of its own `image_text_similarity_filter`; scores are cosines, -1..1. Needs `pip install
py-data-juicer ray` beside this package, in an environment of its own: it pins older `dill` and `multiprocess`, and
installs by itself, while it runs, what it misses.
"""

import math
from functools import partial
from typing import Any

import torch
from data_juicer.ops.base_op import OPERATORS
from data_juicer.ops.filter.image_text_similarity_filter import ImageTextSimilarityFilter
from data_juicer.ops.op_fusion import LOADED_IMAGES
from transformers import AutoProcessor

from transformers_florence import FlorenceModel, load_checkpoint

OP_NAME = "florence_image_text_similarity_filter"
SCALE = 100.0  # by which the filter divides logits: CLIP's, so that its scores are cosines


def load_judge(folder: str, device: str = "cpu") -> tuple[FlorenceModel, Any]:
    """A checkpoint, of which the logits are cosines times what the filter divides them by, and its processor.

    Raises:
        ValueError: no such folder, or a checkpoint that is not whole, see `load_checkpoint`.
    """
    model = load_checkpoint(FlorenceModel, folder, dtype=torch.float32).to(device)
    with torch.no_grad():
        model.logit_scale.fill_(math.log(SCALE))
    return model, AutoProcessor.from_pretrained(folder)


@OPERATORS.register_module(OP_NAME)
@LOADED_IMAGES.register_module(OP_NAME)
class FlorenceImageTextSimilarityFilter(ImageTextSimilarityFilter):
    """`ImageTextSimilarityFilter` with a Florence.

    Args:
        hf_clip: folder of the checkpoint.
        args, kwargs: what the filter takes: `min_score`, `max_score`, `any_or_all`, `reduce_mode` and more.
    """

    def __init__(self, hf_clip: str, *args: Any, **kwargs: Any) -> None:
        super().__init__(hf_clip, *args, **kwargs)
        self.model_key = partial(load_judge, hf_clip)  # called with the device, once in each process
