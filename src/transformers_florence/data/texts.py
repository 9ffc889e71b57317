"""Texts that people wrote as tensors, for models with a fusion or a decoder."""

from collections.abc import Sequence
from typing import Any

from transformers import BatchEncoding, PreTrainedTokenizerBase


def tokenize_texts(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_tokens: int, **options: Any
) -> BatchEncoding:
    """Texts as tensors (texts, tokens), padded to the longest, cut with their end token; what is written is text.

    Special tokens in a text have no effect, as in the pipeline.

    Args:
        max_tokens: of the model; a tokenizer with a shorter limit keeps to that.
        options: of the tokenizer, such as `return_special_tokens_mask`.
    """
    return tokenizer(
        list(texts),
        padding=True,
        truncation=True,
        max_length=min(tokenizer.model_max_length, max_tokens),
        split_special_tokens=True,
        return_tensors="pt",
        verbose=False,
        **options,
    )


__all__ = ["tokenize_texts"]
