"""Zero-shot classification: class names become a classifier, once for a whole label set (Florence section 3.1)."""

from collections.abc import Sequence

import torch
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.prompts import fill_template


def _check_texts(what: str, texts: Sequence[str]) -> None:
    if isinstance(texts, str) or len(texts) == 0:
        raise ValueError(f"expected a list of at least one of {what}, got {texts!r}")


@torch.no_grad()  # not inference_mode: class vectors may stand in a training step
def embed_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    batch_size: int = 256,
    progress: bool = False,
) -> torch.Tensor:
    """Unit vectors of texts: (texts, projection_dim), float32. Raises ValueError for an empty list."""
    _check_texts("texts", texts)
    chunks = []
    for start in tqdm(range(0, len(texts), batch_size), desc="texts", disable=not progress):
        tokens = tokenizer(
            list(texts[start : start + batch_size]), return_tensors="pt", padding=True, truncation=True
        ).to(model.device)
        chunks.append(F.normalize(model.get_text_features(**tokens).pooler_output.float(), dim=-1))
    return torch.cat(chunks)


@torch.no_grad()
def embed_pixels(
    model: PreTrainedModel, pixel_values: torch.Tensor, *, batch_size: int = 128, progress: bool = False
) -> torch.Tensor:
    """Unit vectors of pictures: (batch, channels, height, width), normalised -> (batch, projection_dim), float32.

    Raises:
        ValueError: an empty batch, or pixels that the model refuses.
    """
    if len(pixel_values) == 0:
        raise ValueError(f"expected at least one picture, got pixel_values of shape {tuple(pixel_values.shape)}")
    chunks = []
    for start in tqdm(range(0, len(pixel_values), batch_size), desc="pictures", disable=not progress):
        pixels = pixel_values[start : start + batch_size].to(model.device)
        chunks.append(F.normalize(model.get_image_features(pixels).pooler_output.float(), dim=-1))
    return torch.cat(chunks)


def build_zero_shot_classifier(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    labels: Sequence[str],
    templates: Sequence[str],
    *,
    batch_size: int = 256,
    progress: bool = False,
) -> torch.Tensor:
    """Class vectors (labels, projection_dim), float32, unit length: CLIP's prompt ensemble.

    Every template's text is normalised, their mean is taken, and the mean is normalised again.

    Raises:
        ValueError: no labels, no templates, one text instead of a list, or a template without exactly one `{}`.
    """
    _check_texts("labels", labels)
    _check_texts("templates", templates)
    texts = [fill_template(template, label) for label in labels for template in templates]
    embeds = embed_texts(model, tokenizer, texts, batch_size=batch_size, progress=progress)
    return F.normalize(embeds.view(len(labels), len(templates), -1).mean(dim=1), dim=-1)


def top_k_accuracy(scores: torch.Tensor, targets: torch.Tensor, k: int) -> float:
    """Part of rows whose target is among the k best columns. scores: (rows, columns); targets: (rows,), int64.

    Raises:
        ValueError: shapes that do not fit, no rows, or k not between 1 and the number of columns.
    """
    if scores.ndim != 2 or len(scores) == 0 or targets.shape != scores.shape[:1]:
        got = f"{tuple(scores.shape)} and {tuple(targets.shape)}"
        raise ValueError(f"expected scores (rows, columns) and targets (rows,), got {got}")
    if not 1 <= k <= scores.shape[1]:
        raise ValueError(f"expected k between 1 and {scores.shape[1]}, got {k}")
    best = scores.topk(k, dim=1).indices
    return (best == targets[:, None]).any(dim=1).float().mean().item()


__all__ = ["build_zero_shot_classifier", "embed_pixels", "embed_texts", "top_k_accuracy"]
