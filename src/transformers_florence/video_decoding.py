# Copyright 2026 The transformers_florence authors. Licensed under the Apache License, Version 2.0.
"""Frames of video files, decoded in a process of its own that has so much time and so much memory and no more."""

import contextlib
import json
import math
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub.utils import httpx  # whichever of httpx and httpx2 the hub stands on
from transformers.video_utils import VideoMetadata

from .image_checks import URL_TIMEOUT_SECONDS, check_extent
from .video_worker import WORKER_FILE

BACKENDS = ("pyav", "torchcodec")
DECODE_SECONDS = 30.0
DECODE_BYTES = 1 << 30


class FlorenceVideoError(ValueError):
    """A video file that cannot be read, whatever is wrong with it; the message says which and what."""


def _end(process: subprocess.Popen, owner: int) -> None:
    """Stop a decoding process, unless this process was forked off the one that it works for."""
    if os.getpid() != owner:
        return
    process.kill()
    for channel in (process.stdin, process.stdout):
        try:
            channel.close()
        except OSError:  # what was still to be written has no reader any more
            continue
    process.wait()


class DecodingProcess:
    """A process that runs `video_worker`, for one film after the other, until it is stopped or this one ends.

    Args:
        backend: one of `BACKENDS`.
        max_bytes: what it may have in memory beside itself.

    Raises:
        ImportError: the backend is not installed, or not usable.
    """

    def __init__(self, backend: str, max_bytes: int) -> None:
        self.settings = (backend, max_bytes)
        self.expired = False
        self.process = subprocess.Popen(
            [sys.executable, "-P", WORKER_FILE],  # -P: the modules beside it must not hide others
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            start_new_session=True,  # Ctrl-C is for the process that it works for
        )
        self.stop = weakref.finalize(self, _end, self.process, os.getpid())
        ready = self.ask({"backend": backend, "memory": max_bytes})
        if "error" in ready:
            self.stop()
            raise ImportError(
                f"videos cannot be decoded by {backend}: {ready['error']}. PyAV comes with "
                "pip install 'transformers_florence[video]'; torchcodec needs FFmpeg beside it"
            )

    def ask(self, request: dict[str, Any], content: bytes = b"") -> dict[str, Any]:
        """The answer to a request, with `frames` if it brings any; of a process that broke off, an `error`."""
        try:
            with contextlib.suppress(BrokenPipeError):  # it ended in the middle of the film, and has said why
                self.process.stdin.write(json.dumps(request).encode() + b"\n" + content)
                self.process.stdin.flush()
            answer = json.loads(self.process.stdout.readline())
            if "shape" in answer:
                frames = np.empty(answer["shape"], np.uint8)
                if self.process.stdout.readinto(frames.data.cast("B")) < frames.nbytes:
                    raise EOFError
                answer["frames"] = frames
            if "last" in answer:
                self.stop()
            return answer
        except (OSError, EOFError, json.JSONDecodeError):
            self.stop()
            return {"error": f"the decoder broke off with exit code {self.process.returncode}"}

    def expire(self) -> None:
        """End the process because its time is up."""
        self.expired = True
        self.process.kill()


class _Slot:
    """The decoding process of this process, and who is using it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.worker: DecodingProcess | None = None

    def get(self, *settings: Any) -> DecodingProcess:
        worker = self.worker
        if worker is None or worker.expired or worker.settings != settings or worker.process.poll() is not None:
            if worker is not None:
                worker.stop()
            self.worker = worker = DecodingProcess(*settings)
        return worker


_SLOTS: dict[int, _Slot] = {}  # by process: one that was forked off starts its own


def check_decoding(backend: Any, max_seconds: Any, max_bytes: Any) -> None:
    """Refuse a backend that is none of `BACKENDS`, and limits that are not positive; errors name them."""
    if backend not in BACKENDS:
        raise ValueError(f"decode_backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    for name, value in (("decode_seconds", max_seconds), ("decode_bytes", max_bytes)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ValueError(f"{name}: expected a positive, finite number, got {value!r}")


def _source(video: str | Path | bytes, max_bytes: int) -> tuple[str | None, bytes]:
    """Where a video is: a path, or its bytes, those behind a URL included."""
    if isinstance(video, bytes):
        return None, video
    if isinstance(video, str) and video.startswith(("http://", "https://")):
        content = bytearray()
        with httpx.stream("GET", video, follow_redirects=True, timeout=URL_TIMEOUT_SECONDS) as response:
            for part in response.raise_for_status().iter_bytes():
                content += part
                if len(content) > max_bytes:
                    raise FlorenceVideoError(f"{video[:200]!r}: expected at most {max_bytes} bytes, got more")
        return None, bytes(content)
    if not os.path.isfile(video):
        raise FlorenceVideoError(f"{str(video)[:200]!r}: expected the path of a video or an http(s) URL, no such file")
    return os.path.abspath(video), b""


def read_video(
    video: str | Path | bytes,
    choose: Callable[[VideoMetadata], np.ndarray],
    *,
    max_pixels: int,
    max_aspect_ratio: float,
    backend: str = "pyav",
    max_seconds: float = DECODE_SECONDS,
    max_bytes: int = DECODE_BYTES,
) -> tuple[np.ndarray, VideoMetadata]:
    """Frames of a video file, counted from its first one whatever their times are, upright.

    A file is taken whole or not at all: a damaged frame before the last one wanted, or one that ends before the
    duration that it announces, is an error.

    Args:
        video: path, http(s) URL, or the file's bytes.
        choose: from what is known of the video to the frames to take, integers (frames,) from 0 to
            `total_num_frames - 1`. It is asked again if fewer can be decoded than the file has.
        max_pixels, max_aspect_ratio: of a frame.
        backend: `"pyav"` or `"torchcodec"`. PyAV is kept from opening playlists, which name other files and
            addresses; torchcodec is for files that can be trusted.
        max_seconds: for this video.
        max_bytes: what the decoder may have in memory for it, the frames that are taken included. Kept to on Linux.

    Returns:
        uint8 (frames, height, width, 3), and the metadata, with `frames_indices`.

    Raises:
        FlorenceVideoError: anything is wrong with the file, or it is beyond a limit.
        ImportError: the backend is not installed.
        ValueError: another backend, or a limit that is not positive.
        httpx.HTTPError: the URL does not answer: the network's fault, not the video's.
    """
    check_decoding(backend, max_seconds, max_bytes)
    path, content = _source(video, max_bytes)
    name = f"a video of {len(video)} bytes" if isinstance(video, bytes) else repr(str(video)[:200])
    slot = _SLOTS.setdefault(os.getpid(), _Slot())
    with slot.lock:
        worker = slot.get(backend, int(max_bytes))

        def ask(request: dict[str, Any], content: bytes = b"") -> dict[str, Any]:
            answer = worker.ask(request, content)
            if worker.expired:
                raise FlorenceVideoError(f"{name}: decoding takes more than {max_seconds:g} seconds")
            if "error" in answer:
                raise FlorenceVideoError(f"{name}: {answer['error']}")
            return answer

        timer = threading.Timer(max_seconds, worker.expire)
        timer.start()
        try:
            about = ask({"open": path, "size": len(content)}, content)
            total, fps, height, width = (about[key] for key in ("total", "fps", "height", "width"))
            try:
                check_extent(height, width, max_pixels, max_aspect_ratio)
            except ValueError as error:
                raise FlorenceVideoError(f"{name}: {error}") from error
            while True:
                metadata = VideoMetadata(total, fps=fps, height=height, width=width, video_backend=backend)
                metadata.duration = total / fps if fps else None
                metadata.frames_indices = choose(metadata)
                taken = ask({"take": metadata.frames_indices.tolist()})
                if "frames" in taken:
                    return taken["frames"], metadata
                if not 0 < taken["total"] < total:
                    raise FlorenceVideoError(f"{name}: expected {total} frames, got {taken['total']}")
                total = taken["total"]
        finally:
            timer.cancel()


__all__ = ["BACKENDS", "DECODE_BYTES", "DECODE_SECONDS", "FlorenceVideoError", "check_decoding", "read_video"]
