# Copyright 2026 The transformers_florence authors. Licensed under the Apache License, Version 2.0.
"""Florence's tokenizer: CLIP's byte-level vocabulary, with texts cut to the context length unless told otherwise."""

import json
from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import BatchEncoding, CLIPTokenizer
from transformers.tokenization_utils_base import LARGE_INTEGER
from transformers.utils import logging

from .integrity import ManifestMixin

logger = logging.get_logger(__name__)

START, END, WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"


def base_vocabulary() -> list[str]:
    """CLIP's first 512 tokens: every byte inside a word, then every byte at the end of one."""
    # Printable bytes stand for themselves and come first, the others under substitutes from U+0100 on.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return alphabet + [symbol + WORD_END for symbol in alphabet]


class FlorenceTokenizer(ManifestMixin, CLIPTokenizer):
    """CLIP's tokenizer with one difference: without a word on `truncation`, texts are cut to `model_max_length`.

    A text that is cut keeps its end token. The first cut to `model_max_length` logs one warning; who chooses a
    `max_length` or passes `verbose=False` gets none. `truncation=False` leaves texts whole. Texts are normalised
    (NFC), lower-cased, and their white space collapsed. Padding takes the end token; none is added unless asked for.

    Raises:
        ValueError: an empty list of texts, or something that is not text.

    Example:
        >>> texts = ["a photo of a cat", "a photo of a dog"] * 4
        >>> tokenizer = FlorenceTokenizer.train_new(texts, vocab_size=520, model_max_length=6)
        >>> len(tokenizer("a photo of a very small cat")["input_ids"])
        6
    """

    def _get_padding_truncation_strategies(
        self,
        padding: Any = False,
        truncation: Any = None,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        **kwargs: Any,
    ) -> tuple:
        if truncation is None and self.model_max_length < LARGE_INTEGER:
            truncation = True
            if max_length is None and padding is not False and pad_to_multiple_of:
                # The longest text that, once padded to the multiple, still fits the context.
                max_length = self.model_max_length - self.model_max_length % pad_to_multiple_of or None
        return super()._get_padding_truncation_strategies(
            padding=padding,
            truncation=truncation,
            max_length=max_length,
            pad_to_multiple_of=pad_to_multiple_of,
            **kwargs,
        )

    def _encode_plus(self, text: Any, *args: Any, **kwargs: Any) -> BatchEncoding:
        if isinstance(text, list | tuple) and not text and not kwargs.get("is_split_into_words"):
            raise ValueError("expected a text or a list of at least one text, got an empty list")
        try:
            encoded = super()._encode_plus(text, *args, **kwargs)
        except TypeError as error:  # how the backend refuses what is not text
            raise ValueError(f"expected texts as str or a list of str: {error}") from error
        at_limit = kwargs.get("max_length") == self.model_max_length
        if at_limit and kwargs.get("verbose", True) and any(encoding.overflowing for encoding in encoded.encodings):
            logger.warning_once(
                f"Texts longer than {self.model_max_length} tokens, the context length (`model_max_length`), are cut."
            )
        return encoded

    def _save_pretrained(self, *args: Any, **kwargs: Any) -> tuple[str, ...]:
        # What was tokenized last leaves its padding and truncation in the backend; they are no part of the tokenizer.
        self.backend_tokenizer.no_padding()
        self.backend_tokenizer.no_truncation()
        return super()._save_pretrained(*args, **kwargs)

    @classmethod
    def train_new(
        cls, texts: Iterable[str], vocab_size: int = 3072, model_max_length: int = 32
    ) -> "FlorenceTokenizer":
        """Learn a vocabulary in CLIP's format: 512 byte tokens, merges by frequency, then the start and end tokens.

        The same texts, in any order, give the same vocabulary.

        Args:
            texts: what to learn from; pass raw texts, they are normalised as in use.
            vocab_size: how many tokens there will be, at least 514; the end token is the last of them.
            model_max_length: the context length in tokens, both special tokens included.

        Raises:
            ValueError: sizes out of range, or texts that are too few for as many tokens.
        """
        base = base_vocabulary()
        if isinstance(vocab_size, bool) or not isinstance(vocab_size, int) or vocab_size < len(base) + 2:
            raise ValueError(f"`vocab_size`: expected an integer of at least {len(base) + 2}, got {vocab_size!r}.")
        if isinstance(model_max_length, bool) or not isinstance(model_max_length, int) or model_max_length < 3:
            raise ValueError(f"`model_max_length`: expected an integer of at least 3, got {model_max_length!r}.")
        # Normalised and split by the very pipeline that will be used.
        pipeline = cls(vocab={token: index for index, token in enumerate([*base, START, END])}, merges=[])
        learner = Tokenizer(models.BPE())
        learner.normalizer = pipeline.backend_tokenizer.normalizer
        learner.pre_tokenizer = pipeline.backend_tokenizer.pre_tokenizer
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - 2,
            special_tokens=base,  # fixes their ids, by which ties are broken
            end_of_word_suffix=WORD_END,
            show_progress=False,
        )
        learner.train_from_iterator(texts, trainer=trainer)
        learnt = learner.get_vocab(with_added_tokens=False)
        if len(learnt) != vocab_size - 2:
            raise ValueError(
                f"`vocab_size`: expected at most {len(learnt) + 2}, all that can be learnt from these texts, "
                f"got {vocab_size}."
            )
        merges = [tuple(merge) for merge in json.loads(learner.to_str())["model"]["merges"]]
        vocab = {**learnt, START: vocab_size - 2, END: vocab_size - 1}
        return cls(vocab=vocab, merges=merges, model_max_length=model_max_length)


__all__ = ["FlorenceTokenizer"]
