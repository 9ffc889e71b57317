"""Rendering: the SVG, PNG or WebP of a job, of any size and shape, becomes a square PNG on white."""

import hashlib
import io
import re
import xml.etree.ElementTree as ElementTree

from PIL import Image, ImageOps

from picture_sources import clipart_texts

try:
    import resvg_py
except ImportError:  # reported by main, in one line
    resvg_py = None

MAX_PIXELS = 64 * 2**20
PIXELS_PER_UNIT = {"": 1.0, "px": 1.0, "pt": 1.25, "pc": 15.0, "mm": 90 / 25.4, "cm": 90 / 2.54, "in": 90.0}  # 90 dpi


def parse_svg(data: bytes) -> ElementTree.Element:
    """The root of an SVG without its references to files and addresses, which the renderer would follow."""
    root = ElementTree.fromstring(data)
    for element in root.iter():
        for key, value in list(element.attrib.items()):
            if key.rpartition("}")[2] == "href" and not value.strip().startswith(("#", "data:")):
                del element.attrib[key]
    return root


def view_box(root: ElementTree.Element) -> tuple[float, float, float, float]:
    """(left, top, width, height) of an SVG; from its width and height, in any unit, if it has no viewBox."""
    numbers = [float(number) for number in re.split(r"[\s,]+", root.get("viewBox", "").strip()) if number]
    if len(numbers) == 4 and min(numbers[2:]) > 0:
        return tuple(numbers)
    sides = []
    for side in ("width", "height"):
        match = re.fullmatch(r"\s*([\d.]+(?:[eE][+-]?\d+)?)\s*([a-z]*)\s*", root.get(side, ""))
        known = match is not None and match.group(2) in PIXELS_PER_UNIT and float(match.group(1)) > 0
        sides.append(float(match.group(1)) * PIXELS_PER_UNIT[match.group(2)] if known else 0.0)
    return (0.0, 0.0, *sides) if all(sides) else (0.0, 0.0, 1000.0, 1000.0)


def rasterize(root: ElementTree.Element, box: tuple[float, float, float, float], side: int) -> Image.Image:
    """The part `box` of an SVG in RGBA, its longer side `side` pixels."""
    root.attrib.pop("preserveAspectRatio", None)
    root.set("viewBox", " ".join(f"{number:.6g}" for number in box))
    root.set("width", f"{box[2]:.6g}")
    root.set("height", f"{box[3]:.6g}")
    text = ElementTree.tostring(root, encoding="unicode")
    png = resvg_py.svg_to_bytes(svg_string=text, width=side, height=side, skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(png))).convert("RGBA")


def rasterize_cropped(root: ElementTree.Element, side: int) -> Image.Image:
    """What is drawn in an SVG, without the empty page around it, in RGBA. Raises ValueError if nothing is."""
    box = view_box(root)
    image = rasterize(root, box, 2 * side)
    drawn = image.getbbox()
    if drawn is None:
        raise ValueError("expected an SVG that draws something, got an empty page")
    if max(drawn[2] - drawn[0], drawn[3] - drawn[1]) < side:  # a small drawing on a large page: render it closer
        unit = box[2] / image.width
        corner = (box[0] + drawn[0] * unit, box[1] + drawn[1] * unit)
        box = (*corner, (drawn[2] - drawn[0]) * unit, (drawn[3] - drawn[1]) * unit)
        image = rasterize(root, box, 2 * side)
        drawn = image.getbbox()
    return image.crop(drawn)


def open_raster(data: bytes) -> Image.Image:
    """A PNG or WebP in RGBA. Raises ValueError for one with more than MAX_PIXELS."""
    image = Image.open(io.BytesIO(data), formats=("PNG", "WEBP"))
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"expected at most {MAX_PIXELS} pixels, got {image.width}x{image.height}")
    return image.convert("RGBA")


def on_white(image: Image.Image, size: int) -> Image.Image:
    """An RGBA picture of any shape -> RGB (size, size), fitted and centred on white."""
    image = ImageOps.contain(image, (size, size), Image.Resampling.LANCZOS)
    square = Image.new("RGBA", (size, size), "white")
    square.alpha_composite(image, ((size - image.width) // 2, (size - image.height) // 2))
    return square.convert("RGB")


def render_picture(job: tuple[dict, bytes, int]) -> dict | None:
    """(text columns, picture file, size) -> the columns of a shard, or None for a picture that cannot be used."""
    row, data, size = job
    try:
        if data.startswith((b"\x89PNG", b"RIFF")):
            image = open_raster(data)
            if row["source"] != "emoji" and (drawn := image.getbbox()):
                image = image.crop(drawn)
        else:
            root = parse_svg(data)
            if row["source"] == "clipart":
                texts = clipart_texts(root, row["path"])
                if texts is None:
                    return None
                row = {**row, **texts}
            # The margin of an emoji belongs to its style; the page around a drawing belongs to nothing.
            cropped = row["source"] != "emoji"
            image = rasterize_cropped(root, size) if cropped else rasterize(root, view_box(root), size)
        image = on_white(image, size)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # whatever is wrong with one picture; a panic of resvg is no Exception
        return None
    if max(high - low for low, high in image.getextrema()) < 12:
        return None  # one colour all over shows nothing
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return {**row, "image": buffer.getvalue(), "pixels": hashlib.sha256(image.tobytes()).hexdigest()}
