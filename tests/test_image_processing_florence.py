"""The image processors against transformers' CLIP ones, closed forms, every source, and their limits."""

import base64
import io
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from torch.testing import assert_close
from transformers import AutoImageProcessor, CLIPImageProcessor
from transformers.image_utils import load_image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from transformers_florence import FlorenceImageProcessor, FlorenceImageProcessorPil

BACKENDS = {"torchvision": FlorenceImageProcessor, "pil": FlorenceImageProcessorPil}
PEERS = {"torchvision": CLIPImageProcessor, "pil": CLIPImageProcessorPil}
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ONLY_READ = dict(do_resize=False, do_center_crop=False, do_normalize=False)
LEVELS = np.random.default_rng(0).integers(0, 256, (7, 5, 3), dtype=np.uint8)  # (height, width, channels)
GREY = LEVELS[..., 0]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def processor(backend: str) -> FlorenceImageProcessor | FlorenceImageProcessorPil:
    return BACKENDS[backend]()


def levels_of(processor: Any, picture: Any, **settings: Any) -> np.ndarray:
    """What the processor reads a picture as, before any resizing: 8-bit levels `(height, width, 3)` in float64."""
    pixel_values = processor(picture, return_tensors="np", **ONLY_READ, **settings)["pixel_values"]
    assert pixel_values.shape[0] == 1
    return pixel_values[0].transpose(1, 2, 0).astype(np.float64) * 255


def smooth_picture(height: int, width: int, seed: int = 0) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encoded(picture: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", **options)
    return buffer.getvalue()


# Defaults, parity, arithmetic


def test_defaults_are_those_of_unicls_evaluation(processor):
    settings = processor.to_dict()
    assert settings["size"] == {"shortest_edge": 256}
    assert settings["crop_size"] == {"height": 224, "width": 224}
    assert settings["resample"] == Image.Resampling.BICUBIC
    assert (settings["image_mean"], settings["image_std"]) == (IMAGENET_MEAN, IMAGENET_STD)
    assert all(settings[f"do_{step}"] for step in ("resize", "center_crop", "rescale", "normalize", "convert_rgb"))
    assert processor.model_input_names == ["pixel_values"]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"size": {"height": 40, "width": 60}, "do_center_crop": False},
        {"size": {"shortest_edge": 30}, "crop_size": {"height": 31, "width": 21}},
        {"size": 33, "crop_size": 32, "resample": Image.Resampling.BILINEAR, "image_mean": [0.5] * 3},
        {"do_normalize": False, "rescale_factor": 1 / 127.5},
    ],
)
def test_ordinary_pictures_equal_transformers_clip_processor(backend, settings):
    pictures = [smooth_picture(90, 120), smooth_picture(41, 57), smooth_picture(200, 64), Image.fromarray(LEVELS)]
    pictures += [pictures[0].convert("L"), np.array(pictures[1])]
    pictures += [torch.from_numpy(np.array(pictures[2])).permute(2, 0, 1)]
    peer_settings = dict(size={"shortest_edge": 256}, image_mean=IMAGENET_MEAN, image_std=IMAGENET_STD) | settings
    ours = BACKENDS[backend](**settings)(pictures, return_tensors="pt")
    theirs = PEERS[backend](**peer_settings)(pictures, return_tensors="pt")
    assert list(ours) == ["pixel_values"]
    assert_close(ours["pixel_values"], theirs["pixel_values"], rtol=0, atol=0)


def test_backends_agree_to_two_levels():
    # Both filters work in integers and round after each of the two passes, each its own way: at most a level a pass.
    pictures = [smooth_picture(90, 120), smooth_picture(41, 57), smooth_picture(400, 64), Image.fromarray(LEVELS)]
    torchvision, pil = (
        kind(do_normalize=False)(pictures, return_tensors="pt")["pixel_values"] for kind in BACKENDS.values()
    )
    assert torchvision.shape == pil.shape == (4, 3, 224, 224)
    assert torchvision.dtype == pil.dtype == torch.float32
    assert_close(torchvision, pil, rtol=0, atol=2.01 / 255)
    assert (torchvision - pil).abs().mean() < 0.05 / 255


def test_normalisation_in_closed_form(processor):
    settings = dict(do_resize=False, do_center_crop=False, return_tensors="np")
    expected = (LEVELS / 255 - np.array(IMAGENET_MEAN)) / np.array(IMAGENET_STD)
    assert_close(
        processor(Image.fromarray(LEVELS), **settings)["pixel_values"][0].transpose(1, 2, 0),
        expected.astype(np.float32),
        rtol=0,
        atol=2e-6,
    )


def test_resize_keeps_a_plain_colour_and_crops_the_middle(processor):
    pixels = np.zeros((300, 900, 3), dtype=np.uint8)
    pixels[:, 300:600] = (200, 100, 50)  # the middle third is wider than the crop
    values = processor(Image.fromarray(pixels), return_tensors="np")["pixel_values"][0]  # (3, 224, 224)
    expected = (np.array([200, 100, 50]) / 255 - np.array(IMAGENET_MEAN)) / np.array(IMAGENET_STD)
    assert_close(values, np.broadcast_to(expected[:, None, None], values.shape).astype(np.float32), rtol=0, atol=2e-6)


def test_a_batch_of_mixed_sizes_equals_its_pictures_one_by_one(processor):
    pictures = [smooth_picture(50, 70, 1), smooth_picture(70, 50, 2), smooth_picture(50, 70, 3), smooth_picture(9, 9)]
    batch = processor(pictures, return_tensors="pt")["pixel_values"]
    single = torch.cat([processor(picture, return_tensors="pt")["pixel_values"] for picture in pictures])
    assert_close(batch, single, rtol=0, atol=0)


def test_every_nesting_that_transformers_allows(processor):
    pictures = [Image.fromarray(np.roll(LEVELS, shift, axis=1)) for shift in range(4)]
    arrays = np.stack([np.asarray(picture) for picture in pictures])  # (4, height, width, 3)
    tensors = torch.from_numpy(arrays).permute(0, 3, 1, 2)
    expected = processor(pictures, return_tensors="np", **ONLY_READ)["pixel_values"]
    for batch in (
        tuple(pictures),
        [pictures[:3], pictures[3:]],
        [pictures, []],
        arrays,
        list(arrays),
        [arrays[:1], arrays[1:]],
        tensors,
        [list(tensors)],
    ):
        given = processor(batch, return_tensors="np", input_data_format=None, **ONLY_READ)["pixel_values"]
        assert np.array_equal(given, expected)


# Saving, loading, settings


def test_save_and_load_round_trip(processor, backend, tmp_path):
    changed = dict(size={"height": 48, "width": 32}, do_center_crop=False, image_std=[0.5, 0.25, 0.125])
    changed |= dict(max_pixels=5000, max_aspect_ratio=7.5, matte=[1, 2, 3])
    original = BACKENDS[backend](**changed)
    original.save_pretrained(tmp_path)
    for kind in BACKENDS.values():  # either backend loads what the other saved
        loaded = kind.from_pretrained(tmp_path)
        assert loaded.to_dict() == original.to_dict()
        assert (loaded.max_pixels, loaded.max_aspect_ratio, loaded.matte) == (5000, 7.5, (1, 2, 3))
    picture = Image.fromarray(np.full((60, 60, 4), 128, dtype=np.uint8))
    reread = BACKENDS[backend].from_pretrained(tmp_path)
    assert_close(
        reread(picture, return_tensors="pt")["pixel_values"],
        original(picture, return_tensors="pt")["pixel_values"],
        rtol=0,
        atol=0,
    )
    with pytest.raises(ValueError, match="expected at most 5000 pixels, got 80x70 = 5600"):
        reread(smooth_picture(70, 80))


def test_auto_image_processor_finds_both_backends(backend, tmp_path):
    FlorenceImageProcessor(matte=(9, 8, 7)).save_pretrained(tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path, backend=backend)
    assert type(loaded) is BACKENDS[backend]
    assert loaded.matte == (9, 8, 7)


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("max_pixels", 0, "max_pixels: expected a positive integer, got 0"),
        ("max_pixels", 1.5, "max_pixels.*1.5"),
        ("max_pixels", True, "max_pixels.*True"),
        ("max_aspect_ratio", 0.5, "max_aspect_ratio: expected a finite number >= 1, got 0.5"),
        ("max_aspect_ratio", float("nan"), "max_aspect_ratio.*nan"),
        ("max_aspect_ratio", float("inf"), "max_aspect_ratio.*inf"),
        ("max_aspect_ratio", "wide", "max_aspect_ratio.*wide"),
        ("matte", (0, 0), "matte: expected three integers in 0..255 .*got \\(0, 0\\)"),
        ("matte", (0, 0, 256), "matte.*256"),
        ("matte", (0, 0, -1), "matte.*-1"),
        ("matte", "white", "matte.*white"),
        ("size", {"shortest_edge": 0}, "size: expected positive integers .*got {'shortest_edge': 0}"),
        ("size", {"height": 8}, "size"),
        ("size", {"height": 8, "width": -8}, "size.*-8"),
        ("size", {"longest_edge": 8}, "size.*longest_edge"),
        ("size", "large", "size.*large"),
        ("crop_size", {"shortest_edge": 8}, "crop_size.*shortest_edge"),
        ("crop_size", {"height": 0, "width": 8}, "crop_size.*0"),
        ("image_mean", [0.5, 0.5], "image_mean: expected one finite number or three"),
        ("image_mean", [0.5, 0.5, float("nan")], "image_mean.*nan"),
        ("image_std", [1.0, 0.0, 1.0], "image_std: expected positive numbers"),
        ("rescale_factor", 0.0, "rescale_factor: expected a finite number other than 0, got 0.0"),
    ],
)
def test_impossible_settings_are_refused_at_construction_and_at_call(backend, setting, value, message):
    with pytest.raises(ValueError, match=message):
        BACKENDS[backend](**{setting: value})
    with pytest.raises(ValueError, match=setting):
        BACKENDS[backend]()(Image.fromarray(LEVELS), **{setting: value})


# Alpha, scale, limits


def on_matte(colours: np.ndarray, alpha: np.ndarray, matte: tuple[int, ...] = (255, 255, 255)) -> np.ndarray:
    """Alpha compositing by its definition; all in 8-bit levels, not rounded."""
    share = alpha[..., None] / 255
    return share * colours + (1 - share) * np.array(matte)


@pytest.mark.parametrize("matte", [(0, 0, 0), (255, 255, 255), (10, 200, 90)])
def test_transparent_pictures_lie_on_the_matte(backend, matte):
    alpha = np.ascontiguousarray(LEVELS[..., 1])
    rgba = np.dstack([LEVELS, alpha])
    expected = on_matte(LEVELS, alpha, matte)
    for picture in (Image.fromarray(rgba), rgba, torch.from_numpy(rgba).permute(2, 0, 1), rgba / 255):
        settings = {} if isinstance(picture, Image.Image | torch.Tensor) else {"input_data_format": "channels_last"}
        given = levels_of(BACKENDS[backend](matte=matte), picture, **settings)
        assert_close(given, expected, rtol=0, atol=1.0)


def test_values_that_the_caller_has_scaled_stay_as_they_are(processor):
    scaled = np.random.default_rng(3).uniform(0, 1, (6, 6, 3)).astype(np.float32)
    settings = dict(do_resize=False, do_center_crop=False, do_rescale=False, return_tensors="np")
    values = processor(scaled, **settings)["pixel_values"][0].transpose(1, 2, 0)
    assert_close(values, ((scaled - IMAGENET_MEAN) / IMAGENET_STD).astype(np.float32), rtol=0, atol=2e-6)
    shifted = scaled * 4 - 2  # normalised already: nothing is assumed about the range
    assert_close(processor(shifted, do_normalize=False, **settings)["pixel_values"][0].transpose(1, 2, 0), shifted)


def test_without_conversion_only_opaque_rgb_is_taken(backend):
    strict = BACKENDS[backend](do_convert_rgb=False)
    assert_close(levels_of(strict, Image.fromarray(LEVELS)), LEVELS.astype(float), rtol=0, atol=1e-3)
    assert_close(levels_of(strict, LEVELS), LEVELS.astype(float), rtol=0, atol=1e-3)
    content = encoded(Image.fromarray(LEVELS), transparency=(1, 2, 3))
    keyed = Image.open(io.BytesIO(content))  # RGB, one colour of which is transparent
    refused = [
        (Image.fromarray(GREY), "mode L"),
        (keyed, "mode RGB"),
        (GREY, "got 1"),
        (np.dstack([LEVELS, GREY]), "got 4"),
    ]
    for picture, got in refused:
        with pytest.raises(ValueError, match=f"as do_convert_rgb is off, .*{got}"):
            strict(picture)


def test_limits_can_be_moved(backend):
    long = Image.new("L", (150, 1), 255)
    wide = BACKENDS[backend](max_aspect_ratio=150, do_resize=False, crop_size=1)
    usual = BACKENDS[backend](do_resize=False, crop_size=1)
    white = (1 - np.array(IMAGENET_MEAN)) / np.array(IMAGENET_STD)
    for values in (wide(long), wide(long, max_aspect_ratio=None), usual(long, max_aspect_ratio=150.0)):
        assert_close(np.asarray(values["pixel_values"][0]).ravel(), white.astype(np.float32), rtol=0, atol=2e-6)
    with pytest.raises(ValueError, match="at most 100:1"):
        usual(long)
    with pytest.raises(ValueError, match="at most 149:1"):
        wide(long, max_aspect_ratio=149)
    with pytest.raises(ValueError, match="at most 149 pixels"):
        wide(long, max_pixels=149)


def test_an_extreme_picture_takes_neither_memory_nor_time(tmp_path):
    """20000x1 in 138 bytes took 13 seconds and 7 GB elsewhere; here the process may not grow by 200 MB at all."""
    pytest.importorskip("resource", reason="address space limits are a Unix thing")
    if not Path("/proc/self/statm").exists():
        pytest.skip("needs /proc to know the process's size: run it on Linux")
    path = tmp_path / "long.png"
    path.write_bytes(encoded(Image.new("L", (20_000, 1))))
    script = textwrap.dedent("""
        import resource, sys, time
        from pathlib import Path
        import torch
        from PIL import Image
        from transformers_florence import FlorenceImageProcessor, FlorenceImageProcessorPil

        torch.set_num_threads(1)
        processors = [FlorenceImageProcessor(), FlorenceImageProcessorPil()]
        for processor in processors:
            processor(Image.new("RGB", (300, 300)), return_tensors="pt")  # everything lazy is there now
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + 200 * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        start = time.process_time()
        for processor in processors:
            for source in (sys.argv[1], Image.open(sys.argv[1])):
                try:
                    processor(source, return_tensors="pt")
                except ValueError as error:
                    print(error)
        assert time.process_time() - start < 0.5, time.process_time() - start
        try:
            bytearray(200 * 2**20)
        except MemoryError:
            print("the limit holds")
    """)
    done = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == "the limit holds"
    assert len(lines) == 5
    assert all("expected sides of a ratio of at most 100:1, got 20000x1" in line for line in lines[:-1])


# Orientation, animation, sources

TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {  # stored -> upright, from the definition of the EXIF tag
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: stored[::-1, ::-1].swapaxes(0, 1),
    8: lambda stored: np.rot90(stored, 1),
}


@pytest.mark.parametrize("orientation", TURNS)
def test_exif_orientation_is_applied_from_every_source(processor, orientation, tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    path = tmp_path / "turned.png"
    Image.fromarray(LEVELS).save(path, exif=exif)
    expected = TURNS[orientation](LEVELS).astype(float)
    with Image.open(path) as opened:
        sources = [path, str(path), opened, load_image(str(path)), base64.b64encode(path.read_bytes()).decode()]
        for source in sources:
            assert_close(levels_of(processor, source), expected, rtol=0, atol=1e-3)


def test_an_unreadable_exif_block_costs_the_orientation_and_not_the_picture(processor, tmp_path):
    path = tmp_path / "odd.png"
    Image.fromarray(LEVELS).save(path, exif=b"Exif\0\0XX nothing of the kind")
    with pytest.warns(UserWarning, match="EXIF block cannot be read"):
        read = levels_of(processor, path)
    assert_close(read, LEVELS.astype(float), rtol=0, atol=1e-3)


@pytest.mark.parametrize("file_format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_an_animation_the_first_frame_is_used_with_one_warning(processor, file_format, tmp_path):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ((255, 0, 0), (0, 0, 255), (0, 255, 0))]
    path = tmp_path / "moving"
    frames[0].save(path, file_format, save_all=True, append_images=frames[1:], lossless=True)
    with Image.open(path) as opened:
        for source in (path, opened):
            with pytest.warns(UserWarning, match="several frames") as caught:
                read = levels_of(processor, source)
            assert len(caught) == 1
            assert_close(read, np.tile([255.0, 0.0, 0.0], (16, 16, 1)), rtol=0, atol=1e-3)


@pytest.fixture
def url():
    """A server on this machine that answers with a transparent PNG, and with 404 for /gone."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(404 if self.path == "/gone" else 200)
            self.end_headers()
            self.wfile.write(encoded(Image.fromarray(np.dstack([LEVELS, GREY]))))

        def log_message(self, *args):
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_path_url_and_base64_read_the_same(processor, url, tmp_path):
    picture = Image.fromarray(np.dstack([LEVELS, GREY]))  # transparent: load_image would show what is hidden
    path = tmp_path / "picture.png"
    picture.save(path)
    text = base64.encodebytes(path.read_bytes()).decode()  # with line breaks
    expected = levels_of(processor, picture)
    for source in (path, str(path), f"{url}/picture.png", text, f"data:image/png;base64,{text}"):
        assert_close(levels_of(processor, source), expected, rtol=0, atol=0)
        assert source is processor.fetch_images(source)


def test_a_url_that_does_not_answer_is_no_value_error(processor, url):
    with pytest.raises(Exception, match="404") as failure:
        processor(f"{url}/gone")
    assert not isinstance(failure.value, ValueError)  # the picture may be sound: the caller may try again
