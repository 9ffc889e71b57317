# Copyright 2026 The transformers_florence authors. Licensed under the Apache License, Version 2.0.
"""Florence's image processor on PIL and numpy, for machines without torchvision."""

from typing import Any

import numpy as np
from transformers.image_processing_backends import PilBackend
from transformers.processing_utils import Unpack

from .image_processing_shared import FlorenceImageProcessorKwargs, PictureDoor


class FlorenceImageProcessorPil(PictureDoor, PilBackend):
    """`FlorenceImageProcessor` with PIL's resize and numpy's arithmetic: same settings, same pictures, same refusals.

    Pixel values differ from the torchvision backend's by the rounding of the resize, two 8-bit levels at most.

    Args:
        kwargs: see `FlorenceImageProcessorKwargs`; `device` has no effect.
    """

    def __init__(self, **kwargs: Unpack[FlorenceImageProcessorKwargs]):
        super().__init__(**kwargs)

    def process_image(self, image: Any, name: str = "picture", **kwargs: Any) -> np.ndarray:
        """One picture -> uint8 `(3, height, width)` at its own size."""
        return self.read_picture(image, name, **kwargs).cpu().numpy()


__all__ = ["FlorenceImageProcessorKwargs", "FlorenceImageProcessorPil"]
