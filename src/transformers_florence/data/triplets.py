"""Florence's image-text-label triplets (section 2.1): pictures decoded, texts drawn and labelled, batches made."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers.image_transforms import get_resize_output_image_size
from transformers.image_utils import ChannelDimension

from ..image_checks import PICTURE_FORMATS
from ..image_processing_pil_florence import FlorenceImageProcessorPil
from ..image_processing_shared import OWN_SETTINGS, PictureDoor
from .prompts import PHOTO_TEMPLATES, fill_random_template, fill_template, is_short
from .sources import text_label

Tokenize = Callable[[list[str]], Mapping[str, torch.Tensor]]


class BadSampleError(ValueError):
    """A picture that cannot be read, or a row without a text."""


class PictureDecoder:
    """Encoded pictures -> uint8 (3, height, width): what an image processor has in hand before it normalises.

    Args:
        image_processor: whose settings are taken; resizing is Pillow's, as in `FlorenceImageProcessorPil`.

    Raises:
        ValueError: the settings do not bring every picture to one size.
    """

    def __init__(self, image_processor: PictureDoor) -> None:
        names = ("do_resize", "size", "resample", "do_center_crop", "crop_size", *OWN_SETTINGS)
        settings = {name: getattr(image_processor, name) for name in names}
        fixed = settings["do_center_crop"] or (settings["do_resize"] and "height" in dict(settings["size"]))
        if not fixed:
            raise ValueError(
                "expected an image processor that crops, or resizes to a height and a width, "
                f"got do_center_crop={settings['do_center_crop']} and size={dict(settings['size'])}"
            )
        self.processor = FlorenceImageProcessorPil(**settings, do_rescale=False, do_normalize=False)
        self.size = dict(settings["size"])

    def _resize(self, pixels: np.ndarray) -> np.ndarray:
        """As the image processor does, without its checks of settings and values, which small pictures would feel."""
        if "shortest_edge" in self.size:
            edge = self.size["shortest_edge"]
            height, width = get_resize_output_image_size(
                pixels, edge, default_to_square=False, input_data_format=ChannelDimension.FIRST
            )
        else:
            height, width = self.size["height"], self.size["width"]
        picture = Image.fromarray(pixels.transpose(1, 2, 0))
        return np.asarray(picture.resize((width, height), self.processor.resample)).transpose(2, 0, 1)

    def __call__(self, image: Any, name: str = "picture") -> torch.Tensor:
        """image: `{"bytes", "path"}` as `datasets` has it undecoded -> (3, height, width), uint8.

        Raises:
            BadSampleError: no picture, or one that the image processor refuses; the message starts with `name`.
        """
        if not isinstance(image, Mapping) or (image.get("bytes") is None and image.get("path") is None):
            raise BadSampleError(f"{name}: expected a picture, got none")
        try:
            if image["bytes"] is None:
                pixels = self.processor.process_image(Path(image["path"]))
            else:
                with Image.open(BytesIO(image["bytes"]), formats=PICTURE_FORMATS) as opened:
                    pixels = self.processor.process_image(opened)
            if self.processor.do_resize:
                pixels = self._resize(pixels)
            if self.processor.do_center_crop:
                pixels = self.processor.center_crop(pixels, self.processor.crop_size)
        except Exception as error:  # bytes from anywhere: decoders raise whatever they like
            raise BadSampleError(f"{name}: {error}") from error
        return torch.from_numpy(np.ascontiguousarray(pixels))


class PixelNormalizer(nn.Module):
    """An image processor's rescaling and normalisation as a module, for a whole batch on its device."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, image_processor: PictureDoor) -> None:
        super().__init__()
        normalizes = image_processor.do_normalize
        mean = torch.tensor(image_processor.image_mean if normalizes else (0.0,) * 3)
        std = torch.tensor(image_processor.image_std if normalizes else (1.0,) * 3)
        self.factor = image_processor.rescale_factor if image_processor.do_rescale else 1.0
        self.register_buffer("mean", mean.view(3, 1, 1), persistent=False)
        self.register_buffer("std", std.view(3, 1, 1), persistent=False)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """pixels: (batch, 3, height, width), uint8 -> same shape, float32."""
        return (pixels.to(self.mean) * self.factor - self.mean) / self.std


@dataclass(frozen=True)
class TripletMaker:
    """How a row becomes a triplet.

    Attributes:
        decoder: encoded picture and name -> (3, height, width), uint8.
        templates: of which one is drawn for the name of a class and for any other short text.
        short_words: a text of at most so many words is short.
        leave_out_templated: the paper's second stage: short texts are not drawn at all, and rows that have no other
            do not occur. They are not bad: nobody counts them.
        skip_bad: pass over bad samples and tell of them in the batch, instead of raising `BadSampleError`.

    Raises:
        ValueError: no templates, one without exactly one `{}`, or a negative number of words.
    """

    decoder: Callable[[Any, str], torch.Tensor]
    templates: Sequence[str] = PHOTO_TEMPLATES
    short_words: int = 3
    leave_out_templated: bool = False
    skip_bad: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.templates, str) or not self.templates:
            raise ValueError(f"expected a list of at least one template, got {self.templates!r}")
        for template in self.templates:
            fill_template(template, "")
        if self.short_words < 0:
            raise ValueError(f"expected short_words of at least 0, got {self.short_words}")

    def drawable(self, texts: Sequence[str], is_label: bool) -> list[str]:
        """The texts of a row that may be drawn."""
        if not self.leave_out_templated:
            return list(texts)
        return [] if is_label else [text for text in texts if not is_short(text, self.short_words)]

    def __call__(self, row: Mapping[str, Any], rng: np.random.Generator, name: str) -> dict[str, Any]:
        """A row in the common form (`sources`) -> one triplet; `name` is what an error calls it.

        Raises:
            BadSampleError: no text, or a picture that cannot be read.
        """
        texts = self.drawable(row["texts"], row["is_label"])
        if not texts:
            raise BadSampleError(f"{name}: expected a text, got none")
        text = texts[int(rng.integers(len(texts)))]
        label = text_label(text)
        templated = row["is_label"] or is_short(text, self.short_words)
        if templated:
            text = fill_random_template(self.templates, text, rng)
        return {"pixels": self.decoder(row["image"], name), "text": text, "label": label, "templated": templated}


def collate(samples: Sequence[dict[str, Any]], bad: Sequence[str], tokenize: Tokenize | None) -> dict[str, Any]:
    """Triplets -> a batch, as the module describes it."""
    texts = [sample["text"] for sample in samples]
    return {
        "pixels": torch.stack([sample["pixels"] for sample in samples]),
        "texts": texts,
        "labels": torch.tensor([sample["label"] for sample in samples]),
        "templated": torch.tensor([sample["templated"] for sample in samples]),
        "bad": list(bad),
        **({} if tokenize is None else tokenize(texts)),
    }


__all__ = ["BadSampleError", "PictureDecoder", "PixelNormalizer", "Tokenize", "TripletMaker", "collate"]
