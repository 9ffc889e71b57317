"""Zero-shot classification: class names become a classifier, once for a whole label set (Florence section 3.1)."""

from collections.abc import Sequence

import torch
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.prompts import fill_template


@torch.inference_mode()
def embed_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    batch_size: int = 256,
    progress: bool = False,
) -> torch.Tensor:
    """Unit vectors of texts: (texts, projection_dim), float32."""
    if not texts:
        raise ValueError("expected at least one text, got an empty list")
    chunks = []
    for start in tqdm(range(0, len(texts), batch_size), desc="texts", disable=not progress):
        tokens = tokenizer(
            list(texts[start : start + batch_size]), return_tensors="pt", padding=True, truncation=True
        ).to(model.device)
        chunks.append(F.normalize(model.get_text_features(**tokens).pooler_output.float(), dim=-1))
    return torch.cat(chunks)


@torch.inference_mode()
def embed_pixels(
    model: PreTrainedModel, pixel_values: torch.Tensor, *, batch_size: int = 128, progress: bool = False
) -> torch.Tensor:
    """Unit vectors of pictures: (batch, channels, height, width), normalised -> (batch, projection_dim), float32."""
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
        ValueError: no labels, no templates, or a template without exactly one `{}`.
    """
    if not labels or not templates:
        raise ValueError(f"expected labels and templates, got {len(labels)} labels and {len(templates)} templates")
    texts = [fill_template(template, label) for label in labels for template in templates]
    embeds = embed_texts(model, tokenizer, texts, batch_size=batch_size, progress=progress)
    return F.normalize(embeds.view(len(labels), len(templates), -1).mean(dim=1), dim=-1)


def top_k_accuracy(scores: torch.Tensor, targets: torch.Tensor, k: int) -> float:
    """Part of rows whose target is among the k best columns. scores: (rows, columns); targets: (rows,), int64."""
    best = scores.topk(k, dim=1).indices
    return (best == targets[:, None]).any(dim=1).float().mean().item()


__all__ = ["build_zero_shot_classifier", "embed_pixels", "embed_texts", "top_k_accuracy"]
