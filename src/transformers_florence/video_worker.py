# Copyright 2026 The transformers_florence authors. Licensed under the Apache License, Version 2.0.
"""The program that decodes video files, run by `video_decoding` as a process of its own; it imports nothing of ours.

It reads requests from its standard input and answers on its standard output, a line of JSON each. A request to open is
followed by the file's bytes where it names no path, an answer with frames by theirs.
"""

import importlib
import json
import os
import sys
from io import BytesIO
from typing import Any, BinaryIO

import numpy as np

WORKER_FILE = __file__  # a name to import: what is imported travels with a checkpoint
# What FFmpeg may read: films and animations. Playlists (HLS, concat, DASH, SDP) are left out, as they open other files
# and addresses; so are devices, and pictures by number.
CONTAINERS = "apng,asf,avi,flv,gif,h264,hevc,ivf,m4v,matroska,mov,mpeg,mpegts,mpegvideo,nut,ogg,webm,yuv4mpegpipe"
MISSING_SHARE = 0.1  # of its announced duration, that a film may end too early
MISSING_FRAMES = 1.5  # or so many frames: durations are rounded


def announced_seconds(container: Any, stream: Any) -> float:
    """How long a film's pictures last by its own account; 0 if it gives none."""
    if stream.duration is not None:
        return float(stream.duration * stream.time_base)
    parts = stream.metadata.get("DURATION", "").split(":")  # Matroska's, hours:minutes:seconds
    if len(parts) == 3 and all(part.replace(".", "", 1).isdecimal() for part in parts):
        return sum(float(part) * unit for part, unit in zip(parts, (3600, 60, 1), strict=True))
    return container.duration / 1e6 if len(container.streams) == 1 and container.duration else 0.0  # microseconds


class PyAvFilm:
    """A film through PyAV, from its beginning each time: frames are counted, not found by their time.

    Attributes:
        about: total (frames), fps (None if unknown), height, width (0 if unknown).
    """

    def __init__(self, source: str | bytes) -> None:
        self.source = source
        count, end, last = 0, 0.0, 0.0
        with self.open() as container:
            if not container.streams.video:
                raise ValueError("expected a film, got a file without pictures")
            stream = container.streams.video[0]
            announced = announced_seconds(container, stream)
            fps, codec = stream.average_rate, stream.codec_context
            for packet in container.demux(stream):
                if packet.is_corrupt:
                    raise ValueError(f"expected whole frames, got a damaged one after {count}")
                if packet.size and not packet.is_discard:
                    count += 1
                    last = float((packet.duration or 0) * packet.time_base)
                    time = packet.dts if packet.pts is None else packet.pts
                    end = max(end, float((time or 0) * packet.time_base) + last)
        if not count:
            raise ValueError("expected at least one frame, got none")
        if last and announced - end > max(MISSING_SHARE * announced, MISSING_FRAMES * last):
            raise ValueError(f"truncated: expected {announced:.2f} seconds, as it says, got {end:.2f}")
        size = {"height": codec.height, "width": codec.width}
        self.about = {"total": count, "fps": float(fps) if fps else None, **size}

    def open(self) -> Any:
        """The container, at its beginning."""
        file = open(self.source, "rb") if isinstance(self.source, str) else BytesIO(self.source)  # noqa: SIM115
        av = importlib.import_module("av")  # an extra
        return av.open(file, mode="r", metadata_errors="replace", options={"format_whitelist": CONTAINERS})

    def take(self, indices: list[int]) -> np.ndarray | int:
        """Frames, uint8 (len(indices), height, width, 3), upright; or how many there are, if fewer than were counted.

        Raises:
            ValueError: a damaged frame, or frames of several sizes.
        """
        places: dict[int, list[int]] = {}
        for place, index in enumerate(indices):
            places.setdefault(index, []).append(place)
        frames: np.ndarray | None = None
        with self.open() as container:
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1  # processes decode beside each other, not threads
            number = -1
            for number, frame in enumerate(container.decode(stream)):
                if frame.is_corrupt:
                    raise ValueError(f"expected whole frames, got a damaged one, number {number}")
                if number in places:
                    picture = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
                    if frames is None:
                        frames = np.empty((len(indices), *picture.shape), np.uint8)
                    if picture.shape != frames.shape[1:]:
                        sizes = f"{frames.shape[1:3]} and {picture.shape[:2]}"
                        raise ValueError(f"expected frames of one size (height, width), got {sizes}")
                    frames[places.pop(number)] = picture
                if not places:
                    return frames  # type: ignore[return-value]  # made by the first frame that was taken
        return number + 1


class TorchcodecFilm:
    """A film through torchcodec, whose exact mode has looked at every packet; attributes as `PyAvFilm`."""

    def __init__(self, source: str | bytes) -> None:
        decoders = importlib.import_module("torchcodec.decoders")  # optional, and useless without a system's FFmpeg
        self.decoder = decoders.VideoDecoder(source, dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="exact")
        about = self.decoder.metadata
        if not len(self.decoder):
            raise ValueError("expected at least one frame, got none")
        size = {"height": about.height, "width": about.width}
        self.about = {"total": len(self.decoder), "fps": about.average_fps, **size}

    def take(self, indices: list[int]) -> np.ndarray | int:
        """As `PyAvFilm.take`."""
        return self.decoder.get_frames_at(indices).data.numpy()


FILMS = {"pyav": (PyAvFilm, ("av",)), "torchcodec": (TorchcodecFilm, ("torch", "torchcodec.decoders"))}


def limit_memory(extra: int) -> None:
    """Let this process have so many bytes more than it has now. Where the system has no such limit, there is none."""
    try:
        resource: Any = importlib.import_module("resource")
        with open("/proc/self/statm") as file:
            held = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + extra, held + extra))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, OSError, ValueError):
        return


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer requests until there are no more.

    `{"backend": name, "memory": bytes}` comes first, then for each film `{"open": path or null, "size": bytes}` and,
    as often as is wanted, `{"take": numbers of frames}`. Whatever fails answers `{"error": text}`, with `"last": true`
    if this process ends with it.
    """

    def answer(message: dict[str, Any], frames: np.ndarray | None = None) -> None:
        answers.write(json.dumps(message).encode() + b"\n")
        if frames is not None:
            answers.write(np.ascontiguousarray(frames).data)
        answers.flush()

    film: Any = None
    kind: Any = None
    for line in requests:
        request = json.loads(line)
        try:
            if "backend" in request:
                kind, modules = FILMS[request["backend"]]
                for module in modules:
                    importlib.import_module(module)
                limit_memory(request["memory"])
                answer({"ready": True})
            elif "open" in request:
                film = None
                path, content = request["open"], requests.read(request["size"])
                film = kind(content if path is None else path)
                answer(film.about)
            else:
                taken = film.take(request["take"])
                if isinstance(taken, int):
                    answer({"total": taken})
                else:
                    answer({"shape": taken.shape}, taken)
        except MemoryError:
            answer({"error": "more memory is needed than it may have", "last": True})
            return  # what is left of the request would be taken for the next one
        except Exception as error:  # bytes from anywhere: libraries raise whatever they like
            answer({"error": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    # What a library prints must not come between the answers.
    channel = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    serve(sys.stdin.buffer, channel)


__all__ = ["WORKER_FILE"]
