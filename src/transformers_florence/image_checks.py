# Copyright 2026 The transformers_florence authors. Licensed under the Apache License, Version 2.0.
"""What counts as a picture, and how each kind of it becomes upright 8-bit RGB, or is refused."""

import base64
import math
import os
import warnings
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.utils import httpx  # whichever of httpx and httpx2 the hub stands on
from PIL import ExifTags, Image, ImageOps
from transformers.image_utils import ChannelDimension

# What is opened from files, URLs and base64: plain raster formats. EPS (it starts Ghostscript), PSD, FITS and the like
# are left out; who needs one opens it and hands over the `PIL.Image.Image`. JPEG covers MPO, BMP covers DIB.
PICTURE_FORMATS = ("AVIF", "BMP", "GIF", "ICO", "JPEG", "JPEG2000", "PNG", "PPM", "QOI", "TIFF", "WEBP")
ARRAY_CHANNELS = (1, 3, 4)  # grey, RGB, RGBA
MAX_NESTING = 2  # transformers takes a picture, a list of pictures, and a list of lists
SIXTEEN_BIT_STEP = 257  # 65535 / 255: the width of one 8-bit level in 16-bit ones
URL_TIMEOUT_SECONDS = 60


def check_extent(height: int, width: int, max_pixels: int, max_aspect_ratio: float) -> None:
    """Refuse a picture by its size in pixels, before anything of that size is allocated."""
    if min(height, width) < 1:
        raise ValueError(f"expected at least one pixel, got {width}x{height}")
    if height * width > max_pixels:
        raise ValueError(f"expected at most {max_pixels} pixels, got {width}x{height} = {height * width}")
    if max(height, width) > max_aspect_ratio * min(height, width):
        raise ValueError(f"expected sides of a ratio of at most {max_aspect_ratio}:1, got {width}x{height}")


def flatten_pictures(images: Any, depth: int = 0) -> list[Any]:
    """A picture, a batch, or lists of them -> the flat list of single pictures, none of them opened yet.

    Args:
        images: a `PIL.Image.Image`, an array or tensor of two or three axes (one picture) or of four (a batch), a
            path, an http(s) URL or base64; or lists or tuples of these, nested at most twice.

    Raises:
        ValueError: there is no picture at all, or something among them is none (None, a number, a deeper list).
    """
    if isinstance(images, list | tuple) and depth < MAX_NESTING:
        pictures = [picture for item in images for picture in flatten_pictures(item, depth + 1)]
    elif isinstance(images, np.ndarray | torch.Tensor) and images.ndim == 4:
        pictures = list(images)
    elif isinstance(images, np.ndarray | torch.Tensor | Image.Image | str | Path):
        pictures = [images]
    else:
        raise ValueError(
            "expected pictures (PIL image, numpy array, torch tensor, path, URL or base64), in lists nested at most "
            f"twice, got {type(images).__name__}"
        )
    if depth == 0 and not pictures:
        raise ValueError("expected at least one picture, got an empty batch")
    return pictures


def to_eight_bits(pixels: torch.Tensor, do_rescale: bool = True) -> torch.Tensor:
    """Pixel values of any real dtype and any shape -> uint8 of the same shape, by one rule for each kind of dtype.

    - uint8: as it is; bool: 0 and 255;
    - other integers: 8-bit levels, so 0..255;
    - floating point: 0..1 when the largest value is at most 1, else levels in 0..255; rounded to the nearest level.
      A largest value between 1 and 2 fits neither (a picture in 0..1 that overshoots, a nearly black one): refused.
      With `do_rescale=False` the caller has set the scale himself: float32 comes back, unchanged.

    Raises:
        ValueError: NaN, infinity, complex numbers, or values outside those ranges.
    """
    if pixels.dtype == torch.uint8:
        return pixels
    if pixels.dtype == torch.bool:
        return pixels.to(torch.uint8) * 255
    if pixels.is_complex():
        raise ValueError(f"expected real pixel values, got dtype {pixels.dtype}")
    # float8 and the wide unsigned dtypes have no minimum and maximum of their own
    pixels = pixels.float() if pixels.is_floating_point() else pixels.long()
    low, high = (bound.item() for bound in pixels.aminmax())
    if not pixels.is_floating_point():
        if low < 0 or high > 255:
            raise ValueError(f"expected integer values in 0..255, got {low}..{high}; 16-bit levels are 257 to one")
        return pixels.to(torch.uint8)
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError("expected finite pixel values, got NaN or infinity")
    if not do_rescale:
        return pixels
    scale = 255 if round(255 * high) <= 255 else 1
    if round(scale * low) < 0 or round(scale * high) > 255 or (scale == 1 and high < 2):
        raise ValueError(
            "expected floating-point values in 0..1, or in 0..255 with a largest one of at least 2, "
            f"got {low:g}..{high:g}"
        )
    return (scale * pixels).round().to(torch.uint8)


def lay_on_matte(image: Image.Image, matte: tuple[int, ...]) -> Image.Image:
    """A picture with transparency of any kind -> RGB, composited on the colour `matte`."""
    background = Image.new("RGBA", image.size, (*matte, 255))
    return Image.alpha_composite(background, image.convert("RGBA")).convert("RGB")


def grey_to_eight_bits(image: Image.Image) -> Image.Image:
    """Greyscale of more than 8 bits (modes I;16 and kin, I, F) -> mode L, or LA where one level is transparent.

    Pillow would cut everything above 255 to white. 16-bit levels are scaled, 65535 to 255. Mode I is what Pillow makes
    of 16-bit PPM, but no depth comes with it: a largest value above 255 tells 16-bit levels, else they are 8-bit.
    Mode F follows the rule for floating-point arrays.
    """
    levels = np.array(image)
    levels = levels.astype(levels.dtype.newbyteorder("="), copy=False)
    if image.mode == "F" or (image.mode == "I" and not (levels.min() >= 0 and 255 < levels.max() <= 65535)):
        return Image.fromarray(to_eight_bits(torch.from_numpy(levels)).numpy())
    grey = Image.fromarray(((levels.astype(np.uint32) + SIXTEEN_BIT_STEP // 2) // SIXTEEN_BIT_STEP).astype(np.uint8))
    transparent_level = image.info.get("transparency")
    if transparent_level is None:
        return grey
    return Image.merge("LA", (grey, Image.fromarray(np.where(levels == transparent_level, 0, 255).astype(np.uint8))))


def turn_upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation, as transformers' `load_image` does; a block that cannot be read is left aside."""
    try:
        if image.getexif().get(ExifTags.Base.Orientation, 1) == 1:
            return image  # exif_transpose would copy the picture
        return ImageOps.exif_transpose(image)
    except Exception as error:  # bytes from anywhere: the parser raises whatever it likes
        warnings.warn(f"the EXIF block cannot be read, so the picture is taken as upright: {error}", stacklevel=2)
        return image


def pil_to_rgb(
    image: Image.Image, matte: tuple[int, ...], do_convert_rgb: bool, max_pixels: int, max_aspect_ratio: float
) -> torch.Tensor:
    """A `PIL.Image.Image` of any mode, not necessarily loaded -> uint8 `(3, height, width)`, upright."""
    check_extent(image.height, image.width, max_pixels, max_aspect_ratio)  # known from the file's header
    if getattr(image, "is_animated", False):
        warnings.warn("a picture has several frames; only one is used, the first of a file just opened", stacklevel=2)
    image.load()
    check_extent(image.height, image.width, max_pixels, max_aspect_ratio)  # ICO learns its size while loading
    image = turn_upright(image)
    if not do_convert_rgb and (image.mode != "RGB" or image.has_transparency_data):
        raise ValueError(f"expected an opaque RGB picture as do_convert_rgb is off, got mode {image.mode}")
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = grey_to_eight_bits(image)
    elif image.mode == "La":
        image = image.convert("LA")  # the only conversion that Pillow has for grey with premultiplied alpha
    image = lay_on_matte(image, matte) if image.has_transparency_data else image.convert("RGB")
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)  # (height, width, 3) -> (3, height, width)


def channel_axis(shape: tuple[int, ...], input_data_format: str | ChannelDimension | None) -> int:
    """Where the channels of a picture of three axes are: 0 or 2.

    Raises:
        ValueError: neither end can be the channels, or both can and `input_data_format` does not say which.
    """
    if input_data_format is None:
        axes = [axis for axis in (0, 2) if shape[axis] in ARRAY_CHANNELS]
        if len(axes) == 2:
            raise ValueError(
                "expected input_data_format='channels_first' or 'channels_last' where the first and the last axis can "
                f"both be the channels, got None for shape {tuple(shape)}"
            )
    else:
        axis = 0 if ChannelDimension(input_data_format) is ChannelDimension.FIRST else 2
        axes = [axis] if shape[axis] in ARRAY_CHANNELS else []
    if not axes:
        raise ValueError(
            f"expected 1, 3 or 4 channels, got shape {tuple(shape)} with input_data_format={input_data_format!r}"
        )
    return axes[0]


def array_to_rgb(
    image: np.ndarray | torch.Tensor,
    matte: tuple[int, ...],
    do_convert_rgb: bool,
    max_pixels: int,
    max_aspect_ratio: float,
    do_rescale: bool,
    input_data_format: str | ChannelDimension | None,
) -> torch.Tensor:
    """An array or tensor -> uint8 `(3, height, width)` on its own device; float32 where `to_eight_bits` leaves it.

    Args:
        image: `(height, width)` grey, or three axes with 1 (grey), 3 (RGB) or 4 channels (RGBA), first or last.
        input_data_format: `"channels_first"` or `"channels_last"`; needed where the shape alone does not tell.
    """
    if image.ndim not in (2, 3):
        raise ValueError(f"expected a picture of 2 or 3 axes, got shape {tuple(image.shape)}")
    axis = channel_axis(tuple(image.shape), input_data_format) if image.ndim == 3 else None
    height, width = (side for position, side in enumerate(image.shape) if position != axis)
    check_extent(height, width, max_pixels, max_aspect_ratio)
    if isinstance(image, np.ndarray):
        if image.dtype.kind not in "buif":
            raise ValueError(f"expected an array of booleans, integers or real numbers, got dtype {image.dtype}")
        dtype = np.dtype(np.float64) if image.dtype == np.longdouble else image.dtype.newbyteorder("=")
        # torch knows neither foreign byte orders nor negative strides, and warns about read-only memory
        image = torch.from_numpy(np.require(image, dtype, ["C", "W"]))
    pixels = to_eight_bits(image.detach(), do_rescale)
    pixels = pixels[None] if axis is None else pixels.movedim(axis, 0)  # (channels, height, width)
    channels = pixels.shape[0]
    if channels != 3 and not do_convert_rgb:
        raise ValueError(f"expected 3 channels as do_convert_rgb is off, got {channels}")
    if channels == 1:
        return pixels.expand(3, -1, -1)
    if channels == 4:
        if pixels.dtype != torch.uint8:
            raise ValueError("expected at most 3 channels of floating-point values as do_rescale is off, got 4")
        rgba = Image.fromarray(pixels.movedim(0, 2).contiguous().cpu().numpy())
        return torch.from_numpy(np.array(lay_on_matte(rgba, matte))).permute(2, 0, 1).to(pixels.device)
    return pixels


def source_bytes(source: str | Path) -> str | Path | BytesIO:
    """A path as it is; the bytes behind an http(s) URL, a `data:image/` URL, or base64, as transformers reads them.

    Raises:
        httpx.HTTPError: the URL does not answer: the network's fault, not the picture's.
        ValueError: a text that is none of these.
    """
    if isinstance(source, Path) or os.path.isfile(source):
        return source
    if source.startswith(("http://", "https://")):
        response = httpx.get(source, follow_redirects=True, timeout=URL_TIMEOUT_SECONDS)
        return BytesIO(response.raise_for_status().content)
    payload = source.split(",", 1)[-1] if source.startswith("data:image/") else source
    try:
        return BytesIO(base64.b64decode("".join(payload.split()), validate=True))
    except ValueError as error:
        raise ValueError(
            f"expected the path of a file, an http(s) URL or base64, got {source[:200]!r}: no such file"
        ) from error


def read_picture(
    image: Any,
    name: str,
    *,
    matte: tuple[int, ...],
    do_convert_rgb: bool,
    max_pixels: int,
    max_aspect_ratio: float,
    do_rescale: bool,
    input_data_format: str | ChannelDimension | None,
) -> torch.Tensor:
    """One picture, as `flatten_pictures` gives it -> uint8 `(3, height, width)`, upright RGB on the matte.

    Only floating-point arrays with `do_rescale=False` come back as float32 instead.

    Raises:
        ValueError: the picture is refused; the message starts with `name`, the decoder's own error is its cause.
    """
    if isinstance(image, np.ndarray | torch.Tensor):
        try:
            return array_to_rgb(
                image, matte, do_convert_rgb, max_pixels, max_aspect_ratio, do_rescale, input_data_format
            )
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    opened = image if isinstance(image, Image.Image) else source_bytes(image)
    try:
        if isinstance(opened, Image.Image):
            return pil_to_rgb(opened, matte, do_convert_rgb, max_pixels, max_aspect_ratio)
        with Image.open(opened, formats=PICTURE_FORMATS) as opened:
            return pil_to_rgb(opened, matte, do_convert_rgb, max_pixels, max_aspect_ratio)
    except Exception as error:  # bytes from anywhere: decoders raise whatever they like, the door raises one type
        raise ValueError(f"{name}: {error}") from error


def picture_name(image: Any, position: int) -> str:
    """What an error calls a picture: its path where there is one, else its place in the batch, from 0."""
    source = getattr(image, "filename", None) if isinstance(image, Image.Image) else image
    return f"picture {str(source)[:200]!r}" if isinstance(source, str | Path) and source else f"picture {position}"


__all__ = ["check_extent", "flatten_pictures", "picture_name", "read_picture", "to_eight_bits"]
