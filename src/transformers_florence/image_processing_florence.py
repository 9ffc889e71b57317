# Copyright 2026 The transformers_florence authors. Licensed under the Apache License, Version 2.0.
"""Florence's image processor on torchvision: pictures in, `pixel_values` out."""

from typing import Any

import torch
from transformers.image_processing_backends import TorchvisionBackend
from transformers.processing_utils import Unpack

from .image_processing_shared import FlorenceImageProcessorKwargs, PictureDoor


class FlorenceImageProcessor(PictureDoor, TorchvisionBackend):
    """Turns pictures into `pixel_values (batch, 3, height, width)` float32: resize, centre crop, rescale, normalise.

    The defaults are those of UniCL's evaluation: shortest edge to 256 (bicubic), the middle 224x224, values to 0..1,
    ImageNet's mean and deviation. `FlorenceImageProcessorPil` takes and refuses the same pictures.

    A picture is a `PIL.Image.Image`, an array or tensor, a path, an http(s) URL or base64. It is first made upright
    8-bit RGB, or refused with a `ValueError` that says which one it is, what was expected and what came:

    - The EXIF orientation is always applied. Embedded colour profiles are not.
    - Transparency of any kind (RGBA, LA, palette, one transparent colour) is laid on `matte`. Note that transformers'
      pipelines convert pictures by `load_image` before they get here, which drops transparency instead.
    - Bilevel, grey, palette, CMYK, YCbCr, HSV and LAB are converted. 16-bit grey is scaled, not cut.
    - Of an animation one frame is used, with a warning: the first of a file just opened.
    - Arrays have 2 axes (grey) or 3, with 1, 3 or 4 channels; `input_data_format` must say which axis the channels are
      where first and last both can be. Integers are levels in 0..255; floating-point values lie in 0..1, or in 0..255.
      With `do_rescale=False` floating-point values are taken as already scaled and stay as they are.
    - Truncated or empty files, NaN, infinity, other channel counts, more than `max_pixels` pixels and sides more
      unequal than `max_aspect_ratio` are refused; the last two before the picture is decoded.

    Args:
        kwargs: see `FlorenceImageProcessorKwargs`. `size` is `{"shortest_edge": n}` or `{"height": n, "width": n}`.
    """

    def __init__(self, **kwargs: Unpack[FlorenceImageProcessorKwargs]):
        super().__init__(**kwargs)

    def process_image(
        self, image: Any, name: str = "picture", device: str | torch.device | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """One picture -> uint8 `(3, height, width)` at its own size, on `device` or else where it was."""
        pixels = self.read_picture(image, name, **kwargs).contiguous()
        return pixels if device is None else pixels.to(device)


__all__ = ["FlorenceImageProcessor", "FlorenceImageProcessorKwargs"]
