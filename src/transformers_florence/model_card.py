# Copyright 2026 The transformers_florence authors. Licensed under the Apache License, Version 2.0.
"""Model cards: what a checkpoint is, how it loads and what was measured, in the form that the Hub reads."""

from collections.abc import Sequence
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedModel

from .modeling_florence import FlorenceForImageClassification, FlorenceModel
from .modeling_florence_captioning import FlorenceForImageCaptioning
from .modeling_florence_detection import FlorenceForObjectDetection
from .modeling_florence_fusion import FlorenceFusionModel
from .modeling_florence_fusion_heads import (
    FlorenceForImageTextRetrieval,
    FlorenceForPreTraining,
    FlorenceForQuestionAnswering,
)
from .modeling_florence_text import FlorenceTextModel
from .modeling_florence_video import FlorenceForVideoClassification, FlorenceVideoModel
from .modeling_florence_video_retrieval import FlorenceForVideoTextRetrieval
from .modeling_florence_vision import FlorenceBackbone, FlorenceVisionModel
from .modeling_florence_zero_shot_detection import FlorenceForZeroShotObjectDetection

# The task under which the Hub lists each class.
PIPELINE_TAGS: dict[type[PreTrainedModel], str] = {
    FlorenceModel: "zero-shot-image-classification",
    FlorenceForImageClassification: "image-classification",
    FlorenceForZeroShotObjectDetection: "zero-shot-object-detection",
    FlorenceForObjectDetection: "object-detection",
    FlorenceForQuestionAnswering: "visual-question-answering",
    FlorenceForImageCaptioning: "image-text-to-text",
    FlorenceForVideoClassification: "video-classification",
    FlorenceVisionModel: "image-feature-extraction",
    FlorenceBackbone: "image-feature-extraction",
    FlorenceTextModel: "feature-extraction",
    FlorenceVideoModel: "feature-extraction",
    FlorenceFusionModel: "feature-extraction",
    FlorenceForImageTextRetrieval: "feature-extraction",
    FlorenceForVideoTextRetrieval: "feature-extraction",
    FlorenceForPreTraining: "feature-extraction",
}

BODY = """
# {title}

{description}A `{kind}` with {parameters:,} parameters: Florence as in
[Yuan et al., 2021](https://arxiv.org/abs/2111.11432), not Florence-2, by
`transformers_florence`.

```python
from transformers_florence import {kind}

model = {kind}.from_pretrained("{name}")
```
"""


def results_table(results: Sequence[EvalResult]) -> str:
    """What was measured, as a table in Markdown; nothing of nothing."""
    if not results:
        return ""
    rows = [
        f"| {result.dataset_name} | {result.dataset_split or ''} | {result.metric_name or result.metric_type} "
        f"| {result.metric_value} |"
        for result in results
    ]
    return "\n".join(["", "## Results", "", "| data | split | metric | value |", "|---|---|---|---|", *rows, ""])


def create_model_card(
    model: PreTrainedModel, name: str, *, results: Sequence[EvalResult] = (), description: str = "", **metadata: Any
) -> ModelCard:
    """A model card with the Hub's metadata: task, library, tags, metrics and results.

    Save it as `README.md`, or push it. A push of the model keeps the card that the repository has, and makes an empty
    one of transformers' where it has none: push the card first.

    Args:
        model: a model of this package.
        name: of the repository ("me/florence-tiny"), or a folder's: what `from_pretrained` is given in the example.
        results: what was measured; `huggingface_hub.EvalResult` names task, data set, metric and value.
        description: a paragraph on what the checkpoint is and what it was trained on.
        metadata: other fields of `huggingface_hub.ModelCardData`, such as `license`, `language`, `datasets`, `tags`.

    Raises:
        ValueError: a model of another package, no name, or results of another type.

    Example:
        >>> card = create_model_card(FlorenceModel(FlorenceConfig.from_size("nano")), "me/nano", license="apache-2.0")
        >>> card.data.pipeline_tag
        'zero-shot-image-classification'
    """
    tag = next((PIPELINE_TAGS[base] for base in type(model).__mro__ if base in PIPELINE_TAGS), None)
    if tag is None:
        known = ", ".join(kind.__name__ for kind in PIPELINE_TAGS)
        raise ValueError(f"expected a model among {known}, got {type(model).__name__}")
    if not isinstance(name, str) or not name:
        raise ValueError(f"expected the name of a repository or folder, got {name!r}")
    wrong = [type(result).__name__ for result in results if not isinstance(result, EvalResult)]
    if wrong:
        raise ValueError(f"expected results of type huggingface_hub.EvalResult, got {', '.join(wrong)}")
    title = name.rstrip("/").split("/")[-1]
    metrics = sorted({result.metric_type for result in results})
    fields = {
        "library_name": "transformers",
        "pipeline_tag": tag,
        "model_name": title,
        "eval_results": list(results) or None,
        "metrics": metrics or None,
        **metadata,
        "tags": ["florence", *metadata.get("tags", ())],
    }
    body = BODY.format(
        title=title,
        description=f"{description.strip()}\n\n" if description else "",
        kind=type(model).__name__,
        parameters=model.num_parameters(),
        name=name,
    )
    return ModelCard(f"---\n{ModelCardData(**fields).to_yaml()}\n---\n{body}{results_table(results)}")


__all__ = ["create_model_card"]
