# Copyright 2026 The transformers_florence authors. Licensed under the Apache License, Version 2.0.
"""What both image processors share: their settings, the checks of these, and the way from a batch to RGB pictures."""

import math
import numbers
from collections.abc import Iterable
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    ChannelDimension,
    PILImageResampling,
    SizeDict,
)
from transformers.processing_utils import ImagesKwargs

from .image_checks import flatten_pictures, picture_name, read_picture
from .integrity import ManifestMixin


class FlorenceImageProcessorKwargs(ImagesKwargs, total=False):  # type: ignore[call-arg]  # seen as an untyped class
    """Settings of both image processors: those of transformers, and these; all are saved with the processor.

    Attributes:
        max_pixels: a picture of more pixels (height * width) is refused. Raising it above Pillow's own limit takes
            `PIL.Image.MAX_IMAGE_PIXELS` as well.
        max_aspect_ratio: a picture whose long side is more than this many times its short side is refused. Resizing
            by the shortest edge multiplies the long side too: a PNG of 20000x1 in 138 bytes would become gigabytes.
        matte: the colour (red, green, blue), each 0 to 255, on which transparent pictures are laid.
    """

    max_pixels: int | None
    max_aspect_ratio: float | int | None
    matte: list[int] | tuple[int, ...] | None


OWN_SETTINGS = ("max_pixels", "max_aspect_ratio", "matte")


def is_count(value: Any) -> bool:
    """Whether it is a positive integer."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_finite(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def check_size(name: str, size: SizeDict | None, *allowed: set[str]) -> None:
    """Refuse a size with other keys than one of the allowed sets, or with values that are no positive integers."""
    given = {} if size is None else dict(size)
    if size is not None and (set(given) not in allowed or not all(map(is_count, given.values()))):
        keys = " or ".join(str(sorted(keys)) for keys in allowed)
        raise ValueError(f"{name}: expected positive integers under {keys}, got {given}")


def _three_numbers(name: str, value: float | Iterable[float] | None) -> tuple[float, ...] | None:
    """One number for all channels, or one for each -> one for each."""
    if value is None:
        return None
    values = tuple(value) if isinstance(value, Iterable) else (value,) * 3
    if len(values) != 3 or not all(map(_is_finite, values)):
        raise ValueError(f"{name}: expected one finite number or three, got {value}")
    return tuple(map(float, values))


def check_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a processor, with means and deviations as three numbers and the matte as a tuple.

    Raises:
        ValueError: a setting is impossible; the message names it, what was expected and what came.
    """
    check_size("size", settings["size"], {"shortest_edge"}, {"height", "width"})
    check_size("crop_size", settings["crop_size"], {"height", "width"})
    mean = _three_numbers("image_mean", settings["image_mean"])
    std = _three_numbers("image_std", settings["image_std"])
    if std is not None and min(std) <= 0:
        raise ValueError(f"image_std: expected positive numbers, got {std}")
    factor = settings.get("rescale_factor")
    if factor is not None and not (_is_finite(factor) and factor != 0):
        raise ValueError(f"rescale_factor: expected a finite number other than 0, got {factor}")
    if not is_count(settings["max_pixels"]):
        raise ValueError(f"max_pixels: expected a positive integer, got {settings['max_pixels']!r}")
    if not (_is_finite(settings["max_aspect_ratio"]) and settings["max_aspect_ratio"] >= 1):
        raise ValueError(f"max_aspect_ratio: expected a finite number >= 1, got {settings['max_aspect_ratio']!r}")
    matte = settings["matte"]
    levels = range(256)
    if not isinstance(matte, list | tuple) or len(matte) != 3 or not all(level in levels for level in matte):
        raise ValueError(f"matte: expected three integers in 0..255 (red, green, blue), got {matte!r}")
    return settings | {"image_mean": mean, "image_std": std, "matte": tuple(map(int, matte))}


class PictureDoor(ManifestMixin, BaseImageProcessor):
    """What both backends share: the defaults of UniCL's evaluation, the checks, and the reading of pictures."""

    valid_kwargs = FlorenceImageProcessorKwargs
    model_input_names = ["pixel_values"]
    resample = PILImageResampling.BICUBIC
    image_mean = IMAGENET_DEFAULT_MEAN
    image_std = IMAGENET_DEFAULT_STD
    size = {"shortest_edge": 256}
    default_to_square = False
    crop_size = {"height": 224, "width": 224}
    do_resize = True
    do_center_crop = True
    do_rescale = True
    do_normalize = True
    do_convert_rgb = True
    max_pixels = 89_478_485  # where Pillow begins to warn of a decompression bomb: 256 MiB of RGB
    max_aspect_ratio = 100
    matte = (255, 255, 255)

    def _standardize_kwargs(self, **kwargs: Any) -> dict[str, Any]:
        settings = super()._standardize_kwargs(**kwargs)
        for own in OWN_SETTINGS:  # None asks for the processor's own
            if settings.get(own) is None:
                settings[own] = getattr(self, own)
        return check_settings(settings)

    def preprocess(self, images: Any, *args: Any, **kwargs: Any) -> BatchFeature:
        """As in transformers, but a setting of the wrong type is a `ValueError`, as at construction."""
        try:
            return super().preprocess(images, *args, **kwargs)
        except StrictDataclassError as error:
            raise ValueError(str(error)) from error

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Leaves paths and URLs as they are: each is opened when its turn comes, under the limits of the call."""
        return image_url_or_urls

    def read_picture(
        self,
        image: Any,
        name: str,
        do_convert_rgb: bool | None = True,
        do_rescale: bool | None = True,
        input_data_format: str | ChannelDimension | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """One picture under all the settings of a call -> uint8 `(3, height, width)`; errors call it `name`."""
        return read_picture(
            image,
            name,
            do_convert_rgb=bool(do_convert_rgb),
            do_rescale=bool(do_rescale),
            input_data_format=input_data_format,
            **{own: kwargs.get(own, getattr(self, own)) for own in OWN_SETTINGS},
        )

    def _prepare_image_like_inputs(self, images: Any, *args: Any, expected_ndims: int = 3, **kwargs: Any) -> list[Any]:
        """Each picture of the batch through `process_image`, in the backend's own type."""
        return [
            self.process_image(image, picture_name(image, position), *args, **kwargs)
            for position, image in enumerate(flatten_pictures(images))
        ]


__all__ = ["FlorenceImageProcessorKwargs", "PictureDoor", "check_size", "is_count"]
