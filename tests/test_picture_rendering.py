"""Rendering: pictures are drawn whole on white, at the size their files tell; extreme ones are refused."""

import io
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("resvg_py", reason="needs the renderer: pip install resvg-py")

import picture_rendering as rendering
from tests.tiny_packages import clipart_of, png_of, svg_of

STAMP = {"source": "stamps", "style": "tuxpaint"}
CLIPART = {"source": "clipart", "style": "openclipart", "path": "food/apple.svg"}
WHITE = (255, 255, 255)


def drawn(row: dict, data: str | bytes, size: int = 32) -> Image.Image:
    done = rendering.render_picture((row, data if isinstance(data, bytes) else data.encode(), size))
    image = Image.open(io.BytesIO(done["image"]))
    assert image.size == (size, size) and image.mode == "RGB"
    return image


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ('viewBox="1 2 30 40" width="9" height="9"', (1, 2, 30, 40)),
        ('viewBox="1,2,30,40"', (1, 2, 30, 40)),
        ('width="10" height="20px"', (0, 0, 10, 20)),
        ('width="4in" height="2pc"', (0, 0, 360, 30)),
        ('width="25.4mm" height="2.54cm"', (0, 0, 90, 90)),
        ('width="100%" height="5e1pt"', (0, 0, 1000, 1000)),
        ('viewBox="0 0 0 0" width="3" height="4"', (0, 0, 3, 4)),
    ],
)
def test_view_box(attributes: str, expected: tuple) -> None:
    assert rendering.view_box(rendering.parse_svg(svg_of("red", attributes).encode())) == pytest.approx(expected)


def test_an_emoji_keeps_its_margin() -> None:
    image = drawn({"source": "emoji", "style": "twemoji"}, svg_of("#328280"))  # the middle half of its box
    assert image.getpixel((16, 16)) == image.getpixel((9, 22)) == (50, 130, 128)
    assert image.getpixel((6, 16)) == image.getpixel((25, 16)) == WHITE


def test_a_drawing_loses_its_page() -> None:
    image = drawn(CLIPART, clipart_of("Apple", "#000700"))
    assert [image.getpixel(corner) for corner in ((1, 1), (30, 30))] == [(0, 7, 0), (0, 7, 0)]


def test_a_small_drawing_on_a_large_page_is_drawn_closer() -> None:
    disc = '<circle cx="300" cy="300" r="20" fill="#00f8f8"/>'
    image = drawn(STAMP, svg_of("none", 'viewBox="0 0 800 800"', more=disc))
    edges = [image.getpixel(edge) for edge in ((1, 16), (16, 1), (30, 16), (16, 30))]
    assert all(red < 5 and min(green, blue) > 240 for red, green, blue in edges)
    assert [image.getpixel(corner) for corner in ((1, 1), (30, 30))] == [WHITE] * 2


@pytest.mark.parametrize("file_format", ["PNG", "WEBP"])
def test_a_raster_fills_the_square(file_format: str) -> None:
    image = drawn(STAMP, png_of("blue", file_format))  # 8 pixels wide, its middle black
    for corner in ((0, 0), (31, 0), (0, 31), (31, 31)):
        red, green, blue = image.getpixel(corner)
        assert max(red, green) < 5 and blue > 250
    assert image.getpixel((16, 16))[2] < 50


def test_a_drawing_cannot_show_a_file_of_the_reader(tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(png_of("red"))
    leak = f'<image xlink:href="{secret}" x="8" y="8" width="200" height="200"/>'
    image = drawn(CLIPART, clipart_of("Leak", "#0000aa", more=leak))
    assert image.tobytes() == drawn(CLIPART, clipart_of("Leak", "#0000aa")).tobytes()
    assert image.getpixel((16, 16)) == (0, 0, 170)


def test_extreme_pictures_are_refused_without_the_memory_they_ask_for(monkeypatch: pytest.MonkeyPatch) -> None:
    endless = svg_of("red", 'viewBox="0 0 4000000 1"', 'width="4000000" height="1"')
    assert rendering.render_picture((STAMP, endless.encode(), 16)) is None
    entities = "".join(f'<!ENTITY e{index} "{f"&e{index - 1};" * 10}">' for index in range(1, 12))
    bomb = f'<!DOCTYPE svg [<!ENTITY e0 "ten bytes!">{entities}]>' + svg_of("red", more="<desc>&e11;</desc>")
    assert rendering.render_picture((STAMP, bomb.encode(), 16)) is None
    assert rendering.render_picture((STAMP, png_of("red"), 16)) is not None
    monkeypatch.setattr(rendering, "MAX_PIXELS", 63)
    assert rendering.render_picture((STAMP, png_of("red"), 16)) is None
