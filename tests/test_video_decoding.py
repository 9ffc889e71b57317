"""Decoding of video files: against the frames that were written, and everything that can be wrong with a file."""

import http.server
import importlib.util
import os
import signal
import struct
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers.utils import is_torchcodec_usable
from transformers.video_utils import VideoMetadata

from tests.tiny_videos import frames, require_av, write_sound, write_video
from transformers_florence import video_decoding
from transformers_florence.video_decoding import FlorenceVideoError, read_video
from transformers_florence.video_processing_florence import sample_frame_indices

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("av") is None, reason="videos need PyAV: pip install 'transformers_florence[video]'"
)
LIMITS = {"max_pixels": 1 << 24, "max_aspect_ratio": 100}


def all_frames(metadata: VideoMetadata) -> np.ndarray:
    return np.arange(metadata.total_num_frames)


def read(video: Any, choose: Any = all_frames, **limits: Any) -> np.ndarray:
    return read_video(video, choose, **{**LIMITS, **limits})[0]


def reference(file: Path) -> np.ndarray:
    """Every frame of a file, decoded here, one after the other."""
    with require_av().open(str(file)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.fixture(scope="module")
def film(tmp_path_factory) -> Path:
    """30 frames, of which some are stored in another order than they are shown (B-frames)."""
    file = tmp_path_factory.mktemp("film") / "film.mp4"
    options = {"crf": "4", "bf": "3", "x264-params": "b-adapt=0:scenecut=0"}
    return write_video(file, frames(30), codec="libx264", pix_fmt="yuv444p", options=options)


@pytest.fixture(scope="module")
def every(film) -> np.ndarray:
    """The film's frames by a plain decoder, which are those that were written but for a little."""
    pixels = reference(film)
    assert np.abs(pixels.astype(int) - frames(30)).mean() < 1
    return pixels


# ------------------------------------------------------------------------------------------------- frame by frame


@pytest.mark.parametrize("container", ["mp4", "matroska", "mov", "avi"])
def test_every_frame_comes_back_as_it_was_written(tmp_path, container):
    written = frames(7, 31, 43)  # odd sizes
    file = write_video(tmp_path / "film", written, container=container)
    for video in (file, str(file), file.read_bytes()):
        np.testing.assert_array_equal(read(video), written)


def test_the_film_has_frames_in_another_order(film):
    with require_av().open(str(film)) as container:
        stored = [packet.pts for packet in container.demux(video=0) if packet.size]
    assert stored != sorted(stored)


@pytest.mark.parametrize(
    "sampling, stride, clips, seed",
    [
        ("uniform", 1, 1, None),
        ("segment", 1, 3, None),
        ("dense", 2, 1, None),
        ("dense", 5, 4, None),
        ("segment", 1, 1, 0),
    ],
)
def test_sampled_frames_are_those_of_a_plain_decoder(film, every, sampling, stride, clips, seed):
    def choose(metadata: VideoMetadata) -> np.ndarray:
        generator = None if seed is None else np.random.default_rng(seed)
        return sample_frame_indices(metadata.total_num_frames, 8, sampling, stride, clips, generator).flatten()

    found, metadata = read_video(film, choose, **LIMITS)
    expected = choose(VideoMetadata(total_num_frames=len(every)))
    np.testing.assert_array_equal(found, every[expected])
    assert metadata.frames_indices.tolist() == expected.tolist()
    assert (metadata.total_num_frames, metadata.fps, metadata.height, metadata.width) == (30, 10.0, 30, 40)
    assert metadata.duration == 3.0


def test_frames_in_any_order_and_more_than_once(film, every):
    indices = np.array([20, 3, 3, 29, 0, 20])
    np.testing.assert_array_equal(read(film, lambda metadata: indices), every[indices])


@pytest.mark.parametrize(
    "container, codec, pix_fmt",
    [
        ("mp4", "libx264", "yuv420p"),
        ("webm", "libvpx-vp9", "yuv420p"),
        ("avi", "mpeg4", "yuv420p"),
        ("matroska", "mjpeg", "yuvj420p"),
        ("gif", "gif", "rgb8"),
        ("mpegts", "mpeg2video", "yuv420p"),
    ],
)
def test_common_formats_are_what_a_plain_decoder_gives(tmp_path, container, codec, pix_fmt):
    file = write_video(
        tmp_path / "film", frames(6, 32, 48), container=container, codec=codec, pix_fmt=pix_fmt, rate=25
    )
    np.testing.assert_array_equal(read(file), reference(file))
    assert len(reference(file)) == 6


def test_frames_are_counted_whatever_their_times_are(tmp_path):
    """Variable frame rate, and a first frame that is late."""
    file = write_video(tmp_path / "film.mkv", frames(5), container="matroska", times=[40, 41, 50, 51, 52])
    np.testing.assert_array_equal(read(file), frames(5))


@pytest.mark.parametrize("angle, turns", [(90, 1), (180, 2), (-90, -1)])
def test_films_are_turned_upright(tmp_path, angle, turns):
    """The display matrix of a telephone's film says by how much it has to be turned against the clock."""
    file = write_video(tmp_path / "film.mp4", frames(3), rotation=angle)
    np.testing.assert_array_equal(read(file), np.rot90(frames(3), turns, axes=(1, 2)))


def test_of_sound_and_pictures_only_pictures_are_read(tmp_path):
    av = require_av()
    file = tmp_path / "film.mp4"
    with av.open(str(file), "w") as out:
        sound, pictures = out.add_stream("aac", rate=16000), out.add_stream("libx264rgb", rate=10, options={"qp": "0"})
        pictures.height, pictures.width, pictures.pix_fmt = 30, 40, "rgb24"
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        silence.sample_rate, silence.pts = 16000, 0  # longer than the pictures, which are no less whole for it
        for packet in (*sound.encode(silence), *sound.encode()):
            out.mux(packet)
        for picture in frames(4):
            out.mux(pictures.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        out.mux(pictures.encode())
    np.testing.assert_array_equal(read(file), frames(4))


@pytest.mark.skipif(not is_torchcodec_usable(decode="video"), reason="torchcodec is not installed, or finds no FFmpeg")
def test_torchcodec_gives_the_same_frames(film, tmp_path, every):
    for indices in (np.arange(30), np.array([7, 2, 2, 29])):
        found, metadata = read_video(film, lambda _, taken=indices: taken, backend="torchcodec", **LIMITS)
        np.testing.assert_array_equal(found, every[indices])
        assert (metadata.total_num_frames, metadata.height, metadata.width, metadata.fps) == (30, 30, 40, 10.0)
    np.testing.assert_array_equal(read(film.read_bytes(), backend="torchcodec"), every)
    for bad in (b"no film", write_sound(tmp_path / "sound.mp4")):
        with pytest.raises(FlorenceVideoError):
            read(bad, backend="torchcodec")


def test_over_http(film, every):
    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(film.parent))

        def log_message(self, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/film.mp4"
        np.testing.assert_array_equal(read(address), every)
        with pytest.raises(FlorenceVideoError, match=r"film.mp4': expected at most 1000 bytes, got more"):
            read(address, max_bytes=1000)
        server.shutdown()


# ------------------------------------------------------------------------------------------------- wrong files


def cut(file: Path, part: float) -> bytes:
    content = file.read_bytes()
    return content[: int(len(content) * part)]


def header_of_many_frames(folder: Path) -> bytes:
    """An AVI file whose header announces a million frames, where there are six."""
    content = write_video(folder / "film.avi", frames(6), container="avi").read_bytes()
    million = struct.pack("<I", 1_000_000)
    main, stream = content.index(b"avih") + 24, content.index(b"strh") + 40
    return content[:main] + million + content[main + 4 : stream] + million + content[stream + 4 :]


def header_of_many_pixels(folder: Path) -> bytes:
    """A film in an AVI file whose header announces 6000x6000 pixels."""
    content = write_video(folder / "film.avi", frames(2), container="avi").read_bytes()
    place, side = content.index(b"strf") + 12, struct.pack("<i", 6000)
    return content[:place] + side + side + content[place + 8 :]


def two_sizes(folder: Path) -> bytes:
    """Two films in a format without a header of the whole, one after the other."""
    kind: dict[str, Any] = {"container": "mpeg2video", "codec": "mpeg2video", "pix_fmt": "yuv420p", "rate": 25}
    return b"".join(write_video(folder / "part", frames(3, 32, side), **kind).read_bytes() for side in (32, 64))


def damaged(folder: Path) -> bytes:
    """The second frame of a film is noise."""
    file = write_video(folder / "film.mov", frames(3), container="mov")
    with require_av().open(str(file)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    content, (place, size) = bytearray(file.read_bytes()), packets[1]
    content[place : place + size] = bytes(size)
    return bytes(content)


def no_frames(folder: Path) -> bytes:
    """The header of an AVI file with a stream of pictures, and no picture."""
    content = write_video(folder / "film.avi", frames(1), container="avi").read_bytes()
    return content[: content.index(b"movi") + 4]


MP4_IN_FRONT = {"movflags": "faststart"}  # the index comes first, so that a beginning can be opened
WRONG = {
    "empty": (lambda folder: b"", "Invalid data"),
    "text": (lambda folder: b"no film at all" * 99, "Invalid data"),
    "png": (lambda folder: b"\x89PNG\r\n\x1a\n" + bytes(99), "Invalid"),
    "playlist": (lambda folder: b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/passwd\n", "Invalid data"),
    "concat": (lambda folder: b"ffconcat version 1.0\nfile film.mp4\n", "Invalid"),
    "sound": (lambda folder: write_sound(folder / "sound.mp4").read_bytes(), "a film, got a file without pictures"),
    "index cut off": (
        lambda folder: cut(write_video(folder / "film.mp4", frames(9)), 0.9),
        "Invalid data|without pictures",
    ),
    "mp4 half": (
        lambda folder: cut(write_video(folder / "f.mp4", frames(9), mux=MP4_IN_FRONT), 0.6),
        "Invalid|damaged",
    ),
    "mkv half": (
        lambda folder: cut(write_video(folder / "film.mkv", frames(9), container="matroska"), 0.5),
        "truncated: expected 0.90 seconds, as it says, got 0.[345]0",
    ),
    "avi half": (
        lambda folder: cut(write_video(folder / "f.avi", frames(9), container="avi"), 0.6),
        "damaged|truncated",
    ),
    "million frames": (header_of_many_frames, "truncated: expected 100000.00 seconds, as it says, got 0.60"),
    "huge frames": (header_of_many_pixels, "expected at most 16777216 pixels, got 6000x6000 = 36000000"),
    "no frames": (no_frames, "expected at least one frame, got none|Invalid data"),
    "two sizes": (two_sizes, r"expected frames of one size \(height, width\), got \(32, 32\) and \(32, 64\)"),
    "damaged frame": (damaged, "Invalid data|damaged"),
    "long": (
        lambda folder: write_video(folder / "long.avi", frames(1, 2, 400), container="avi").read_bytes(),
        "100:1",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_wrong_with_a_file_is_one_error(tmp_path, kind):
    make, message = WRONG[kind]
    content = make(tmp_path)
    file = tmp_path / "wrong.bin"
    file.write_bytes(content)
    with pytest.raises(FlorenceVideoError, match=message) as caught:
        read(file)
    assert str(file) in str(caught.value)
    with pytest.raises(FlorenceVideoError, match=f"a video of {len(content)} bytes: "):
        read(content)


@pytest.mark.parametrize(
    "path", ["nowhere.mp4", Path("nowhere.mp4"), os.curdir, "concat:a.mp4|b.mp4", "rtsp://host/film"]
)
def test_what_is_no_file(path):
    with pytest.raises(FlorenceVideoError, match="expected the path of a video or an http.s. URL, no such file"):
        read(path)


def test_random_damage_gives_frames_or_that_error(film):
    """100 files with some bytes changed: never another error, never fewer frames than were asked for."""
    rng = np.random.default_rng(0)
    content = np.frombuffer(film.read_bytes(), np.uint8)
    outcomes = {"frames": 0, "error": 0}
    for _ in range(100):
        mutant = content.copy()
        places = rng.integers(0, len(mutant), rng.integers(1, 4))
        mutant[places] = rng.integers(0, 256, len(places), dtype=np.uint8)
        try:
            indices = lambda about: sample_frame_indices(about.total_num_frames, 8)[0]  # noqa: E731
            assert read(mutant.tobytes(), indices, max_seconds=10).shape[0] == 8
            outcomes["frames"] += 1
        except FlorenceVideoError:
            outcomes["error"] += 1
    assert min(outcomes.values()) > 0, outcomes


@pytest.mark.parametrize(
    "limits, message",
    [
        ({"backend": "opencv"}, "decode_backend: expected one of pyav, torchcodec, got 'opencv'"),
        ({"max_seconds": 0}, "decode_seconds: expected a positive, finite number, got 0"),
        ({"max_seconds": float("nan")}, "decode_seconds: expected a positive, finite number, got nan"),
        ({"max_bytes": "1GB"}, "decode_bytes: expected a positive, finite number, got '1GB'"),
    ],
)
def test_impossible_limits(film, limits, message):
    with pytest.raises(ValueError, match=message):
        read(film, **limits)


# ------------------------------------------------------------------------------------------------- the process


def worker() -> Any:
    return video_decoding._SLOTS[os.getpid()].worker


def test_time_is_bounded(film, every):
    read(film)

    def choose(metadata: VideoMetadata) -> np.ndarray:
        os.kill(worker().process.pid, signal.SIGSTOP)  # a decoder that never comes back
        return np.arange(4)

    before = time.monotonic()
    with pytest.raises(FlorenceVideoError, match="film.mp4': decoding takes more than 0.3 seconds"):
        read(film, choose, max_seconds=0.3)
    assert time.monotonic() - before < 20
    np.testing.assert_array_equal(read(film), every)  # the next film has a new process


@pytest.mark.skipif(sys.platform != "linux", reason="the limit of memory is Linux's")
def test_memory_is_bounded(tmp_path):
    """A film in kilobytes whose frames are more than it may have."""
    picture = np.zeros((1, 1080, 1920, 3), np.uint8)
    file = write_video(tmp_path / "film.mov", np.repeat(picture, 24, axis=0), container="mov")  # 149 MB of frames
    assert file.stat().st_size < 1 << 20
    with pytest.raises(FlorenceVideoError, match="more memory is needed than it may have|Cannot allocate memory"):
        read(file, max_bytes=100 << 20)
    assert read(file, lambda metadata: np.array([0, 23]), max_bytes=100 << 20).shape == (2, 1080, 1920, 3)
    with pytest.raises(FlorenceVideoError, match="a video of 157286400 bytes: more memory is needed"):
        read(bytes(150 << 20), max_bytes=100 << 20)
    assert read(file, lambda metadata: np.array([5]), max_bytes=100 << 20).shape == (1, 1080, 1920, 3)


def test_a_decoder_that_breaks_off(film, every):
    read(film)

    def choose(metadata: VideoMetadata) -> np.ndarray:
        worker().process.kill()
        worker().process.wait()
        return np.arange(4)

    with pytest.raises(FlorenceVideoError, match="film.mp4': the decoder broke off with exit code -9"):
        read(film, choose)
    np.testing.assert_array_equal(read(film), every)


def test_one_process_serves_all_films(film):
    read(film)
    first = worker().process.pid
    with pytest.raises(FlorenceVideoError):
        read(b"no film")
    read(film.read_bytes())
    assert worker().process.pid == first


def test_threads_and_forked_processes(film, every):
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(read, [film] * 8):
            np.testing.assert_array_equal(found, every)
    own = worker().process.pid
    with get_context("fork").Pool(1) as pool:
        np.testing.assert_array_equal(pool.apply(read, (film,)), every)
    read(film)
    assert worker().process.pid == own  # the one that was forked off had a process of its own, and left this one alone


def test_a_backend_that_is_missing(film, monkeypatch, tmp_path):
    (tmp_path / "av.py").write_text("raise ImportError('not here')")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    with pytest.raises(
        ImportError, match=r"cannot be decoded by pyav: ImportError: not here. PyAV comes with pip install"
    ):
        read(film, max_bytes=123 << 20)  # another limit: a new process


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_memory_stays_flat(tmp_path):
    """As `benchmarks/video.py --memory` measures over 1,000 clips."""

    def resident(pid: int) -> int:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    small = write_video(tmp_path / "film.mp4", frames(6))
    for _ in range(20):
        read(small)
    before = [resident(os.getpid()), resident(worker().process.pid)]
    for _ in range(60):
        read(small)
    growth = [
        now - then for now, then in zip([resident(os.getpid()), resident(worker().process.pid)], before, strict=True)
    ]
    assert max(growth) < 1 << 20, growth  # 60 clips of 6 frames of 3.6 kB are 1.3 MB
