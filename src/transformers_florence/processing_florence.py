# Copyright 2026 The transformers_florence authors. Licensed under the Apache License, Version 2.0.
"""Florence's processor: pictures and texts in, what `FlorenceModel` takes out."""

from typing import Any

from transformers import PreTrainedTokenizerBase, ProcessorMixin
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature

from .integrity import ManifestMixin


class FlorenceProcessor(ManifestMixin, ProcessorMixin):
    """An image processor and a tokenizer as one: saved, loaded and called together.

    Texts are padded to the longest of the batch and cut to the context length unless the call says otherwise.

    Args:
        image_processor: a `FlorenceImageProcessor` or a `FlorenceImageProcessorPil`.
        tokenizer: a `FlorenceTokenizer`.

    Raises:
        TypeError: something else than an image processor and a tokenizer, in this order.

    Example:
        >>> tokenizer = FlorenceTokenizer.train_new(["a cat", "a dog"], vocab_size=514)
        >>> processor = FlorenceProcessor(FlorenceImageProcessor(), tokenizer)
        >>> sorted(processor(text=["a cat", "a dog"], return_tensors="pt"))
        ['attention_mask', 'input_ids']
    """

    text_kwargs = {"padding": True, "truncation": True}

    def __init__(self, image_processor: BaseImageProcessor, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(image_processor, tokenizer)

    def __call__(self, images: Any = None, text: str | list[str] | None = None, **kwargs: Any) -> BatchFeature:
        """
        Args:
            images: a picture or a list of them, as `FlorenceImageProcessor` takes them.
            text: a text or a list of texts; they need not be as many as the pictures.
            kwargs: settings of either side, such as `return_tensors="pt"`; those that both sides know go to both,
                `text_kwargs` and `images_kwargs` hold settings for one.

        Returns:
            pixel_values: (images, 3, height, width), float32, if there are images.
            input_ids, attention_mask: (texts, tokens), int64, if there are texts.

        Raises:
            ValueError: neither pictures nor texts, other modalities, an empty list, or what either side refuses.
        """
        foreign = sorted(name for name in ("audio", "videos") if kwargs.get(name) is not None)
        if foreign:
            raise ValueError(f"expected images, text or both, got {' and '.join(foreign)}")
        return super().__call__(images=images, text=text, **kwargs)


__all__ = ["FlorenceProcessor"]
