"""Each kind of picture against what its mode, dtype or format means, and everything that is no picture refused."""

import base64
import functools
import io
import re
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from transformers_florence import FlorenceImageProcessor, FlorenceImageProcessorPil

BACKENDS = {"torchvision": FlorenceImageProcessor, "pil": FlorenceImageProcessorPil}
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


def encoded(picture: Image.Image, file_format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, file_format, **options)
    return buffer.getvalue()


def reopened(picture: Image.Image, file_format: str = "PNG", **options: Any) -> Image.Image:
    return Image.open(io.BytesIO(encoded(picture, file_format, **options)))


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_of_zeros(width: int, height: int, rows: int | None = None) -> bytes:
    """A valid greyscale PNG, written by hand; with `rows` fewer than `height` it is truncated."""
    body = zlib.compress(bytes((width + 1) * (height if rows is None else rows)), 9)
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", body) + png_chunk(b"IEND", b"")


# What each kind of picture becomes


def palette_picture() -> tuple[Image.Image, np.ndarray]:
    """A picture in mode P of four colours, and its colours `(height, width, 3)`."""
    indices = GREY % 4
    colours = np.array([[10, 20, 30], [250, 0, 0], [0, 240, 5], [90, 91, 92]], dtype=np.uint8)
    picture = Image.fromarray(indices)
    picture.putpalette(colours.tobytes())  # turns L into P
    assert picture.mode == "P"
    return picture, colours[indices]


def on_matte(colours: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Alpha compositing on white by its definition; all in 8-bit levels, not rounded."""
    share = alpha[..., None] / 255
    return share * colours + (1 - share) * 255


def pil_rows() -> dict[str, tuple[Image.Image, np.ndarray]]:
    """Name -> a PIL image, and the levels that it should be read as, from definitions and not from Pillow."""
    grey3 = GREY[..., None].repeat(3, axis=-1)
    alpha = np.ascontiguousarray(LEVELS[..., 1])
    indexed, indexed_colours = palette_picture()
    with_alpha = indexed.convert("PA")
    with_alpha.putalpha(Image.fromarray(alpha))
    assert with_alpha.mode == "PA"
    sixteen = np.random.default_rng(1).integers(0, 65536, (7, 5), dtype=np.uint16)
    sixteen[0] = (0, 128, 129, 65406, 65535)  # on either side of half a level at both ends
    sixteen_levels = np.round(sixteen / 257)[..., None].repeat(3, axis=-1)
    cmyk = np.dstack([LEVELS, LEVELS[::-1, :, 0]])
    cmyk_levels = (255 - cmyk[..., :3].astype(float)) * (255 - cmyk[..., 3:].astype(float)) / 255
    lab = np.zeros((2, 2, 3), dtype=np.uint8)
    lab[0, :, 0] = 255  # white above, black below; a and b are signed, so 0 is no colour
    hsv = np.array([[[0, 255, 255], [85, 255, 255], [170, 255, 255], [0, 0, 77]]], dtype=np.uint8)
    premultiplied = np.dstack([np.where(GREY > 99, 180, 0), np.where(GREY > 99, 255, 0)]).astype(np.uint8)
    la_clear = Image.frombytes("La", (5, 7), premultiplied.tobytes())
    hard_alpha = np.where(GREY > 99, 255, 0).astype(np.uint8)
    rgba_clear = Image.fromarray(np.dstack([LEVELS, hard_alpha])).convert("RGBa")
    key = tuple(int(level) for level in LEVELS[2, 3])
    keyed = np.where(np.equal(LEVELS, key).all(axis=-1), 0, 255)
    keyed_grey = np.where(np.equal(GREY, GREY[0, 0]), 0, 255)
    return {
        "RGB": (Image.fromarray(LEVELS), LEVELS),
        "1": (Image.fromarray(GREY > 99), np.where(grey3 > 99, 255, 0)),
        "L": (Image.fromarray(GREY), grey3),
        "L with a transparent level": (
            reopened(Image.fromarray(GREY), transparency=int(GREY[0, 0])),
            on_matte(grey3, keyed_grey),
        ),
        "RGB with a transparent colour": (
            reopened(Image.fromarray(LEVELS), transparency=key),
            on_matte(LEVELS, keyed),
        ),
        "LA": (Image.fromarray(np.dstack([GREY, alpha]), "LA"), on_matte(grey3, alpha)),
        "La": (la_clear, np.where(grey3 > 99, 180, 255)),
        "P": (indexed, indexed_colours),
        "P with one transparent colour": (
            reopened(indexed, transparency=1),
            on_matte(indexed_colours, np.where(GREY % 4 == 1, 0, 255)),
        ),
        "P with an alpha for each colour": (
            reopened(indexed, transparency=bytes([255, 0, 128, 64])),
            on_matte(indexed_colours, np.array([255, 0, 128, 64])[GREY % 4]),
        ),
        "PA": (with_alpha, on_matte(indexed_colours, alpha)),
        "RGBA": (Image.fromarray(np.dstack([LEVELS, alpha])), on_matte(LEVELS, alpha)),
        "RGBa": (rgba_clear, on_matte(LEVELS, hard_alpha)),
        "RGBX": (Image.fromarray(LEVELS).convert("RGBX"), LEVELS),
        "CMYK": (Image.frombytes("CMYK", (5, 7), cmyk.tobytes()), cmyk_levels),
        "CMYK in a JPEG": (
            reopened(Image.new("CMYK", (5, 7), (0, 255, 0, 51)), "JPEG"),
            np.broadcast_to([204, 0, 204], LEVELS.shape),
        ),
        "YCbCr": (
            Image.frombytes("YCbCr", (2, 1), bytes([76, 85, 255, 150, 44, 21])),  # JFIF's red and green
            np.array([[[254, 0, 0], [0, 255, 1]]]),
        ),
        "HSV": (
            Image.frombytes("HSV", (4, 1), hsv.tobytes()),
            np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255], [77, 77, 77]]]),
        ),
        "LAB": (Image.frombytes("LAB", (2, 2), lab.tobytes()), np.where(lab[..., :1] == 255, 255, 0).repeat(3, -1)),
        "I;16": (Image.fromarray(sixteen), sixteen_levels),
        "I;16 from a PNG": (reopened(Image.fromarray(sixteen)), sixteen_levels),
        "I;16 from a TIFF": (reopened(Image.fromarray(sixteen), "TIFF"), sixteen_levels),
        "I;16 with a transparent level": (
            reopened(Image.fromarray(sixteen), transparency=int(sixteen[3, 3])),
            on_matte(sixteen_levels, np.where(sixteen == sixteen[3, 3], 0, 255)),
        ),
        "I;16B": (Image.frombytes("I;16B", (5, 7), sixteen.astype(">u2").tobytes()), sixteen_levels),
        "I of 16-bit levels": (Image.fromarray(sixteen.astype(np.int32)), sixteen_levels),
        "I from a PPM": (Image.open(io.BytesIO(b"P5 5 7 65535\n" + sixteen.astype(">u2").tobytes())), sixteen_levels),
        "I of 8-bit levels": (Image.fromarray(GREY.astype(np.int32)), grey3),
        "F in 0..1": (Image.fromarray((GREY / 255).astype(np.float32)), grey3),
        "F in 0..255": (Image.fromarray(GREY.astype(np.float32)), grey3),
        "1x1": (Image.new("RGB", (1, 1), (3, 2, 1)), np.array([[[3, 2, 1]]])),
        "1x100": (Image.fromarray(np.tile(LEVELS[:1, :1], (100, 1, 1))), np.tile(LEVELS[:1, :1], (100, 1, 1))),
        "a part that was cut out": (Image.fromarray(LEVELS).crop((1, 2, 4, 5)), LEVELS[2:5, 1:4]),
    }


PIL_ROWS = pil_rows()
# Levels by which Pillow's integer arithmetic may differ from the definition; every other row must be exact.
ROUNDING = {"CMYK": 1, "YCbCr": 1, "LAB": 2} | {
    row: 1 for row in PIL_ROWS if "alpha" in row or row in ("LA", "PA", "RGBA")
}


@pytest.mark.parametrize("row", PIL_ROWS)
def test_every_mode_is_read_by_its_definition(processor, row):
    picture, expected = PIL_ROWS[row]
    read = levels_of(processor, picture)
    assert_close(read, expected.astype(np.float64), rtol=0, atol=ROUNDING.get(row, 0) + 1e-3)
    values = processor(picture, return_tensors="pt")["pixel_values"]  # and the whole way runs
    assert values.shape == (1, 3, 224, 224)
    assert values.isfinite().all()


@pytest.mark.parametrize("row", PIL_ROWS)
def test_both_backends_read_the_same(row):
    picture, _ = PIL_ROWS[row]
    torchvision, pil = (levels_of(kind(), picture, do_rescale=True) for kind in BACKENDS.values())
    assert_close(torchvision, pil, rtol=0, atol=1e-4)


def array_rows() -> dict[str, tuple[np.ndarray | torch.Tensor, np.ndarray]]:
    """Name -> an array or tensor, and the levels that it should be read as."""
    grey3 = GREY[..., None].repeat(3, axis=-1)
    frozen = LEVELS.copy()
    frozen.setflags(write=False)
    first = torch.from_numpy(LEVELS).permute(2, 0, 1)  # channels first
    return {
        "uint8, channels last": (LEVELS, LEVELS),
        "uint8, channels first": (LEVELS.transpose(2, 0, 1), LEVELS),
        "one channel, last": (GREY[..., None], grey3),
        "one channel, first": (GREY[None], grey3),
        "two axes": (GREY, grey3),
        "two axes, tensor": (torch.from_numpy(GREY), grey3),
        "bool": (GREY > 99, np.where(grey3 > 99, 255, 0)),
        "bool tensor": (torch.from_numpy(GREY > 99), np.where(grey3 > 99, 255, 0)),
        "int64": (LEVELS.astype(np.int64), LEVELS),
        "uint16 of 8-bit levels": (LEVELS.astype(np.uint16), LEVELS),
        "uint64 of 8-bit levels": (LEVELS.astype(np.uint64), LEVELS),
        "uint16 tensor": (first.to(torch.uint16), LEVELS),
        "foreign byte order": (LEVELS.astype(">i4"), LEVELS),
        "mirrored view": (LEVELS[:, ::-1], LEVELS[:, ::-1]),
        "BGR turned": (LEVELS[..., ::-1], LEVELS[..., ::-1]),
        "read-only": (frozen, LEVELS),
        "float32 in 0..1": ((LEVELS / 255).astype(np.float32), LEVELS),
        "float64 in 0..1": (LEVELS / 255, LEVELS),
        "float16 in 0..1": ((LEVELS / 255).astype(np.float16), LEVELS),
        "bfloat16 in 0..255": (first.to(torch.bfloat16), LEVELS),  # bfloat16 holds every integer up to 256
        "long double": ((LEVELS / 255).astype(np.longdouble), LEVELS),
        "float32 in 0..255": (LEVELS.astype(np.float32), LEVELS),
        "float between the levels": (LEVELS * 0.5 + 0.2, np.round(LEVELS * 0.5 + 0.2)),
        "float a rounding error past 1": (np.full((5, 5), 1 + 1e-6), np.full((5, 5, 3), 255)),
        "float of nothing but 1": (np.ones((5, 5)), np.full((5, 5, 3), 255)),
        "float of nothing but 0": (np.zeros((5, 5)), np.zeros((5, 5, 3))),
        "with a gradient": ((first / 255).requires_grad_(), LEVELS),
    }


ARRAY_ROWS = array_rows()


@pytest.mark.parametrize("row", ARRAY_ROWS)
def test_every_kind_of_array_is_read_by_one_rule(processor, row):
    picture, expected = ARRAY_ROWS[row]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read = levels_of(processor, [picture])
    assert_close(read, expected.astype(np.float64), rtol=0, atol=1e-3)


def test_input_data_format_decides_what_the_shape_does_not(processor):
    ambiguous = np.random.default_rng(2).integers(0, 256, (3, 6, 3), dtype=np.uint8)
    last = levels_of(processor, ambiguous, input_data_format="channels_last")
    first = levels_of(processor, torch.from_numpy(ambiguous), input_data_format="channels_first")
    assert_close(last, ambiguous.astype(float), rtol=0, atol=1e-3)
    assert_close(first, ambiguous.transpose(1, 2, 0).astype(float), rtol=0, atol=1e-3)


# What is refused


def refused_rows() -> dict[str, tuple[Any, str]]:
    """Name -> something that is no picture, and what the error must say."""
    first = torch.from_numpy(LEVELS).permute(2, 0, 1)
    nan, infinite = LEVELS / 255, LEVELS / 255
    nan[3, 2, 1], infinite[3, 2, 1] = np.nan, np.inf
    deep: list[Any] = []
    deep.append(deep)
    return {
        "None": (None, "expected pictures .*got NoneType"),
        "empty list": ([], "expected at least one picture, got an empty batch"),
        "empty tuple": ((), "expected at least one picture"),
        "list of empty lists": ([[], []], "expected at least one picture"),
        "empty batch array": (np.zeros((0, 8, 8, 3), np.uint8), "expected at least one picture"),
        "None in a list": ([LEVELS, None], "expected pictures .*got NoneType"),
        "None in a nested list": ([[LEVELS], [None]], "expected pictures .*got NoneType"),
        "three deep": ([[[LEVELS]]], "nested at most twice, got list"),
        "a list that holds itself": (deep, "nested at most twice, got list"),
        "number": (7, "expected pictures .*got int"),
        "numbers": ([[1, 2], [3, 4]], "expected pictures .*got int"),
        "bytes": (b"\x89PNG", "expected pictures .*got bytes"),
        "dict": ({"path": "a.png"}, "expected pictures .*got dict"),
        "empty text": ("", "picture"),
        "text that is no path": ("nothing/of the kind.png", "expected the path of a file.*nothing/of the kind.png"),
        "missing Path": (Path("nothing") / "here.png", "picture '.*here.png': .*No such file"),
        "base64 of no picture": (base64.b64encode(b"<html></html>").decode(), "cannot identify image file"),
        "one axis": ([np.zeros(9, np.uint8)], "picture 0: expected a picture of 2 or 3 axes, got shape \\(9,\\)"),
        "no axis": ([np.array(3)], "expected a picture of 2 or 3 axes, got shape \\(\\)"),
        "five axes": (np.zeros((1, 1, 3, 4, 5), np.uint8), "2 or 3 axes"),
        "two channels": ([LEVELS[..., :2]], "expected 1, 3 or 4 channels, got shape \\(7, 5, 2\\)"),
        "five channels": ([np.zeros((9, 9, 5), np.uint8)], "expected 1, 3 or 4 channels, got shape \\(9, 9, 5\\)"),
        "five channels first": (torch.zeros(5, 9, 9), "expected 1, 3 or 4 channels, got shape \\(5, 9, 9\\)"),
        "3 at both ends": (np.zeros((3, 9, 3), np.uint8), "expected input_data_format=.*got None for shape"),
        "1x1 array": (np.zeros((1, 1, 3), np.uint8), "expected input_data_format=.*got None for shape"),
        "no rows": ([np.zeros((0, 5, 3), np.uint8)], "expected at least one pixel, got 5x0"),
        "no columns, tensor": (torch.zeros(3, 5, 0), "expected at least one pixel, got 0x5"),
        "PIL image without pixels": (Image.new("RGB", (0, 5)), "expected at least one pixel, got 0x5"),
        "NaN": (nan, "expected finite pixel values"),
        "infinity": (infinite, "expected finite pixel values"),
        "NaN tensor": (torch.from_numpy(nan).permute(2, 0, 1), "expected finite pixel values"),
        "NaN in mode F": (Image.fromarray(nan[..., 1].astype(np.float32)), "expected finite pixel values"),
        "float below 0": (LEVELS / 255 - 0.5, "floating-point values in 0..1, or in 0..255"),
        "float above 255": (LEVELS * 2.0, "floating-point values in 0..1, or in 0..255"),
        "float that overshoots 1": (np.linspace(0, 1.05, 25).reshape(5, 5), "got 0\\.\\.1.05"),
        "mode F above 255": (Image.fromarray(GREY * np.float32(300)), "floating-point values"),
        "uint16 above 255": (LEVELS.astype(np.uint16) * 257, "expected integer values in 0..255, got .*16-bit"),
        "uint64 above all": (np.full((5, 5), 2**64 - 1, np.uint64), "expected integer values in 0..255"),
        "negative integers": (-LEVELS.astype(np.int16), "expected integer values in 0..255, got -"),
        "mode I above 16 bits": (Image.fromarray(np.full((5, 5), 70000, np.int32)), "integer values .*70000"),
        "mode I below 0": (Image.fromarray(np.full((5, 5), -1, np.int32)), "integer values .*-1"),
        "complex": (np.zeros((5, 5), complex), "got dtype complex128"),
        "complex tensor": (torch.zeros(3, 5, 5, dtype=torch.complex64), "got dtype torch.complex64"),
        "array of text": (np.full((5, 5), "a"), "got dtype <U1"),
        "array of objects": (np.full((5, 5), None), "got dtype object"),
        "1x1000": (Image.new("L", (1, 1000)), "expected sides of a ratio of at most 100:1, got 1x1000"),
        "20000x1": (Image.new("L", (20000, 1)), "expected sides of a ratio of at most 100:1, got 20000x1"),
        "101x1 array": (np.zeros((1, 101), np.uint8), "expected sides of a ratio of at most 100:1, got 101x1"),
        "a view of 10^10 pixels": (
            np.broadcast_to(np.uint8(0), (100_000, 100_000)),
            "expected at most 89478485 pixels, got 100000x100000 = 10000000000",
        ),
        "the second of three": ([LEVELS, first[:2], LEVELS], "picture 1: expected 1, 3 or 4 channels"),
    }


REFUSED_ROWS = refused_rows()


@pytest.mark.parametrize("row", REFUSED_ROWS)
def test_what_is_no_picture_is_refused_with_one_clear_error(row):
    images, message = REFUSED_ROWS[row]
    errors = []
    for kind in BACKENDS.values():
        with pytest.raises(ValueError, match=f"(?s){message}") as failure:
            kind()(images, return_tensors="pt")
        errors.append(str(failure.value))
        assert len(errors[-1]) < 600  # no array is printed
    assert re.sub("0x[0-9a-f]+", "", errors[0]) == re.sub("0x[0-9a-f]+", "", errors[1])  # but for an object's address


def test_a_wrong_channel_axis_is_refused(processor):
    with pytest.raises(ValueError, match="expected 1, 3 or 4 channels, got shape .* with input_data_format='channels"):
        processor(LEVELS, input_data_format="channels_first")
    with pytest.raises(ValueError, match="sideways"):
        processor(LEVELS, input_data_format="sideways")


def file_rows() -> dict[str, bytes]:
    """Name -> the bytes of a file that is no whole picture."""
    picture = smooth_picture(64, 64)
    rows = {"zero bytes": b"", "HTML": b"<!DOCTYPE html><html><body>404</body></html>"}
    for file_format in ("JPEG", "PNG", "GIF", "WEBP", "BMP"):
        content = encoded(picture, file_format)
        rows[f"half a {file_format}"] = content[: len(content) // 2]
        rows[f"the first bytes of a {file_format}"] = content[:10]
    header_only = png_of_zeros(100_000, 100_000, rows=1)
    return rows | {"PNG that claims 10^10 pixels": header_only}


FILE_ROWS = file_rows()


@pytest.mark.parametrize("row", FILE_ROWS)
def test_a_broken_file_is_refused_with_its_path_and_cause(processor, row, tmp_path):
    path = tmp_path / "broken.jpg"
    path.write_bytes(FILE_ROWS[row])
    for source in (path, str(path)):
        with pytest.raises(ValueError, match=re.escape(str(path))) as failure:
            processor([Image.fromarray(LEVELS), source])
        assert isinstance(failure.value.__cause__, OSError | Image.DecompressionBombError)
    path.unlink()  # no handle is left open where that would matter


@pytest.mark.parametrize("file_format", ["EPS", "PCX", "TGA", "SGI"])
def test_only_the_listed_formats_are_opened_but_the_caller_may_open_more(processor, file_format, tmp_path):
    path = tmp_path / "picture"
    Image.fromarray(LEVELS).save(path, file_format)
    with pytest.raises(ValueError, match="cannot identify image file"):  # EPS would start Ghostscript
        processor(path)
    if file_format != "EPS":
        with Image.open(path) as opened:
            assert_close(levels_of(processor, opened), LEVELS.astype(float), rtol=0, atol=1e-3)


def test_a_truncated_picture_that_the_caller_opened_is_refused(processor, tmp_path):
    path = tmp_path / "half.png"
    path.write_bytes(FILE_ROWS["half a PNG"])
    with Image.open(path) as opened, pytest.raises(ValueError, match="half.png.*truncated"):
        processor(opened)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("width", "height", "message"),
    [
        (20_000, 1, "expected sides of a ratio of at most 100:1, got 20000x1"),
        (1, 101, "expected sides of a ratio of at most 100:1, got 1x101"),
        (9_500, 9_500, "expected at most 89478485 pixels, got 9500x9500 = 90250000"),
    ],
)
def test_size_is_judged_before_anything_is_decoded(processor, width, height, message, tmp_path):
    path = tmp_path / "bomb.png"
    path.write_bytes(png_of_zeros(width, height, rows=0))  # decoding it would say "truncated"
    with pytest.raises(ValueError, match=message):
        processor(path)


@functools.cache
def seed_file(file_format: str) -> bytes:
    picture = smooth_picture(24, 20)
    options = {"save_all": True, "append_images": [smooth_picture(24, 20, 1)]} if file_format == "GIF" else {}
    return encoded(picture, file_format, **options)


def mutant(content: bytes, rng: np.random.Generator) -> bytes:
    """A few random edits: bytes changed, a stretch left out, doubled or zeroed, the end cut off."""
    mutated = bytearray(content)
    for _ in range(rng.integers(1, 6)):
        place, length = int(rng.integers(0, len(mutated))), int(rng.integers(1, 24))
        kind = int(rng.integers(0, 5))
        if kind == 0:
            mutated[place] = int(rng.integers(0, 256))
        elif kind == 1:
            del mutated[place : place + length]
        elif kind == 2:
            mutated[place:place] = mutated[place : place + length]
        elif kind == 3:
            mutated[place : place + length] = bytes(len(mutated[place : place + length]))
        elif place > 8:
            del mutated[place:]
    return bytes(mutated)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "GIF", "WEBP", "BMP"])
def test_mutants_are_read_or_refused_and_nothing_else(file_format, tmp_path):
    rng = np.random.default_rng(list(file_format.encode()))
    processor = FlorenceImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    path = tmp_path / "mutant"
    read = refused = 0
    for _ in range(40):
        path.write_bytes(mutant(seed_file(file_format), rng))
        try:
            values = processor(path, return_tensors="pt")["pixel_values"]
        except ValueError as error:
            assert str(path) in str(error)
            refused += 1
        else:
            assert values.shape == (1, 3, 16, 16)
            assert values.isfinite().all()
            read += 1
    assert read + refused == 40
    assert refused > 0
