# Copyright 2026 The transformers_florence authors. Licensed under the Apache License, Version 2.0.
"""The open-set detector's processor: pictures and names of classes in, named boxes out."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers.image_processing_utils import BatchFeature

from .processing_florence import FlorenceProcessor


def class_lists(text: Any, pictures: int | None) -> list[list[str]]:
    """Each picture's classes, from one list for all of them or a list of lists.

    pictures: how many there are; None if they are not known.

    Raises:
        ValueError: no classes, not as many lists as pictures, or lists of different lengths.
    """
    text = [text] if isinstance(text, str) else text
    if not isinstance(text, Sequence) or not text:
        raise ValueError(f"expected the names of classes, got {text!r}")
    if all(isinstance(each, str) for each in text):
        return [list(text)] * (1 if pictures is None else pictures)
    lists = [list(each) for each in text if isinstance(each, Sequence) and not isinstance(each, str)]
    if len(lists) != len(text) or pictures not in (None, len(lists)) or len({len(each) for each in lists}) != 1:
        counts = [len(each) for each in lists]
        raise ValueError(
            f"expected one list of classes, or one of equal length for each of {pictures} pictures, got {counts} names"
        )
    if not lists[0] or not all(isinstance(name, str) for each in lists for name in each):
        raise ValueError(f"expected names of classes as texts, got {text!r}")
    return lists


class FlorenceZeroShotDetectionProcessor(FlorenceProcessor):
    """A detector's image processor and a tokenizer as one.

    Args:
        image_processor: a `FlorenceDetectionImageProcessor`.
        tokenizer: a `FlorenceTokenizer`.

    Example:
        >>> inputs = processor(picture, text=["a fish", "a shark"], return_tensors="pt")
        >>> found = processor.post_process_grounded_object_detection(
        ...     model(**inputs), threshold=0.2, target_sizes=[picture.size[::-1]], text_labels=["a fish", "a shark"]
        ... )
        >>> found[0]["text_labels"][:1]
        ['a shark']
    """

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> BatchFeature:
        """
        Args:
            images: a picture or a list of them, as `FlorenceDetectionImageProcessor` takes them.
            text: the classes, for all pictures alike; or a list of classes for each picture, of equal lengths.
            kwargs: settings of either side, such as `return_tensors="pt"`; `annotations` for the labels.

        Returns:
            pixel_values, pixel_mask and, with annotations, labels, if there are images.
            input_ids, attention_mask: (pictures * classes, tokens), int64, if there are texts.

        Raises:
            ValueError: neither pictures nor texts, or what `class_lists` or either side refuses.
        """
        if text is not None:
            pictures = None if images is None else len(images) if isinstance(images, list | tuple) else 1
            if isinstance(images, torch.Tensor) and images.ndim == 4:
                pictures = len(images)
            text = [name for names in class_lists(text, pictures) for name in names]
        return super().__call__(images=images, text=text, **kwargs)

    def post_process_grounded_object_detection(
        self,
        outputs: Any,
        threshold: float = 0.1,
        target_sizes: torch.Tensor | Sequence[tuple[int, int]] | None = None,
        text_labels: Sequence[str] | Sequence[Sequence[str]] | None = None,
        **kwargs: Any,
    ) -> list[dict[str, Any]]:
        """Predictions -> the detections of each picture, the best first.

        Args:
            outputs, threshold, target_sizes, kwargs: as in
                `FlorenceDetectionImageProcessor.post_process_object_detection`.
            text_labels: names of the classes, as they were given to the processor.

        Returns:
            for each picture `scores (n,)`, `labels (n,)`, `boxes (n, 4)` as corners, and `text_labels`, a list of n
            names, or None.

        Raises:
            ValueError: as that method, or not as many names as classes.
        """
        found = self.image_processor.post_process_object_detection(outputs, threshold, target_sizes, **kwargs)
        if text_labels is None:
            return [each | {"text_labels": None} for each in found]
        lists, count = class_lists(text_labels, len(found)), outputs.logits.shape[-1]
        if len(lists[0]) != count:
            raise ValueError(f"expected the names of {count} classes, got {len(lists[0])}")
        return [
            each | {"text_labels": [names[number] for number in each["labels"].tolist()]}
            for each, names in zip(found, lists, strict=True)
        ]


__all__ = ["FlorenceZeroShotDetectionProcessor"]
