"""A second stage for retrieval: a fusion model's matching head orders anew what the dual encoder has found (ALBEF)."""

from collections.abc import Sequence
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import ProcessorMixin

from ..data.texts import tokenize_texts
from ..modeling_florence_fusion_heads import FlorenceForImageTextRetrieval


class ImageTextMatcher:
    """How well pictures and texts of a set go together: the `matching` of `evaluate_retrieval`.

    Every picture and every text has gone through its tower once, when this is made; a call is a matter of the fusion.

    Args:
        model: in evaluation mode.
        processor: of its pictures and texts.
        pictures: files, or what else the image processor takes.
        texts: of which tokens beyond the model's context are cut.
        batch_size: pictures, texts or pairs at a time.

    Raises:
        ValueError: pictures or texts that the processor refuses, or none.

    Example:
        >>> matcher = ImageTextMatcher(model, processor, files, captions)
        >>> evaluate_retrieval(image_embeds, text_embeds, picture_of_text, matching=matcher, top_k=32)
    """

    @torch.no_grad()
    def __init__(
        self,
        model: FlorenceForImageTextRetrieval,
        processor: ProcessorMixin,
        pictures: Sequence[Any],
        texts: Sequence[str],
        *,
        batch_size: int = 64,
        progress: bool = False,
    ) -> None:
        if not len(pictures) or not len(texts):
            raise ValueError(f"expected pictures and texts, got {len(pictures)} and {len(texts)}")
        self.model, self.batch_size = model, batch_size
        image_embeds = []
        for start in tqdm(range(0, len(pictures), batch_size), desc="pictures", disable=not progress):
            part = list(pictures[start : start + batch_size])
            pixels = processor.image_processor(part, return_tensors="pt")["pixel_values"]
            image_embeds.append(model.encode_images(pixels.to(model.device, model.dtype)))
        inputs = tokenize_texts(processor.tokenizer, texts, model.config.max_text_tokens).to(model.device)
        text_embeds = []
        for start in tqdm(range(0, len(texts), batch_size), desc="texts", disable=not progress):
            rows = {name: value[start : start + batch_size] for name, value in inputs.items()}
            text_embeds.append(model.model.encode_texts(**rows))
        self.image_embeds, self.text_embeds = torch.cat(image_embeds), torch.cat(text_embeds)
        self.attention_mask = inputs["attention_mask"]

    def __call__(self, pictures: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        """Numbers of pictures and of texts, (pairs,) each -> (pairs,), float32: log odds of a match."""
        device = self.image_embeds.device
        return self.model.score_pairs(
            self.image_embeds,
            self.text_embeds,
            self.attention_mask,
            pictures.to(device),
            texts.to(device),
            self.batch_size,
        )


__all__ = ["ImageTextMatcher"]
