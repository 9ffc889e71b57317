"""Small video files for tests, written by PyAV, most of them so that every pixel comes back as it was."""

import functools
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

LOSSLESS = {
    "mp4": ("libx264rgb", "rgb24"),
    "matroska": ("ffv1", "bgr0"),
    "mov": ("png", "rgb24"),
    "avi": ("rawvideo", "bgr24"),
}


def require_av() -> ModuleType:
    """PyAV, or the test is skipped with the reason."""
    return pytest.importorskip("av", reason="videos need PyAV: pip install 'transformers_florence[video]'")


@functools.cache
def frames(count: int = 6, height: int = 30, width: int = 40, seed: int = 0) -> np.ndarray:
    """(count, height, width, 3), uint8, smooth enough to be resized alike everywhere, no two frames the same."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (count, -(-height // 10), -(-width // 10), 3), dtype=np.uint8)
    return coarse.repeat(10, axis=1).repeat(10, axis=2)[:, :height, :width]


def write_video(
    file: Path,
    pixels: np.ndarray,
    *,
    container: str = "mp4",
    codec: str = "",
    pix_fmt: str = "",
    options: dict[str, str] | None = None,
    times: list[int] | None = None,
    rotation: int = 0,
    rate: int = 10,
    mux: dict[str, str] | None = None,
) -> Path:
    """Write frames (count, height, width, 3), uint8; without a codec, lossless. `times`: of each, in 1 / rate."""
    av = require_av()
    own_codec, own_format = LOSSLESS.get(container, ("", ""))
    if not codec:
        codec, pix_fmt, options = own_codec, own_format, {"qp": "0"} if own_codec == "libx264rgb" else None
    with av.open(str(file), "w", format=container, options=mux or {}) as out:
        stream: Any = out.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width, stream.pix_fmt = *pixels.shape[1:3], pix_fmt
        if rotation:
            stream.set_display_rotation(rotation)
        for number, picture in enumerate(pixels):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame.pts = number if times is None else times[number]
            frame.time_base = Fraction(1, rate)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return file


def write_sound(file: Path) -> Path:
    """A file with sound and no pictures."""
    av = require_av()
    with av.open(str(file), "w", format="mp4") as out:
        stream = out.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 16000, 0
        out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return file
