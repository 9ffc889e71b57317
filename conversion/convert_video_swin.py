"""Video Swin weights of its authors (mmaction) and of torchvision as Florence's video tower, number for number.

    python -m conversion.convert_video_swin swin_tiny_patch244_window877_kinetics400_1k.pth video-swin-tiny
    python -m conversion.convert_video_swin swin3d_t-7615ae03.pth swin3d-tiny --labels kinetics400.txt

The file's keys tell whose it is. With a classifier (`cls_head.fc_cls` or `head`) the folder loads as
`FlorenceForVideoClassification`, without one as `FlorenceVideoModel`. The tower computes what the source computes, at
every size and number of frames: each axis of a window is clamped by itself, a clamped window reads the first rows of
its bias, and frames of zeros fill up a clip. Every key has to find its place, and every weight its key.

Weights of pictures become a video tower by `from_pretrained_image`, after `conversion.convert_swin` if need be.
"""

import argparse
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from transformers_florence.configuration_florence import VISION_SIZES
from transformers_florence.configuration_florence_video import FlorenceVideoConfig
from transformers_florence.modeling_florence_video import FlorenceForVideoClassification, FlorenceVideoModel
from transformers_florence.video_processing_florence import FlorenceVideoProcessor

from .key_tables import (
    BUFFERS,
    SWIN,
    Conversion,
    KeyTable,
    Row,
    apply_table,
    build_model,
    check_agreement,
    find_layout,
    new_folder,
    prefixed,
    torchvision_layers,
)
from .reading import Tensors, read_weights


def _stage(part: str, following: int = 0) -> Callable[[re.Match], str]:
    """torchvision counts layers and merging in one list, two entries a stage; merging opens the next stage in ours."""
    return lambda match: f"encoder.stages.{int(match[1]) // 2 + following}.{match.expand(part)}"


LIST_BLOCK = r"features\.(\d*[02468])\.(\d+)\."
TORCHVISION: KeyTable = [
    *BUFFERS,
    Row(r"patch_embed\.proj\.", "embeddings.projection."),
    Row(r"patch_embed\.norm\.", "embeddings.norm."),
    *torchvision_layers(LIST_BLOCK, _stage),
    Row(r"features\.(\d*[13579])\.(norm|reduction)\.", _stage(r"embed.\2.", following=1)),
    Row(r"norm\.", "norm."),
]
TABLES: dict[str, KeyTable] = {
    # The tower as a part of mmaction's recogniser, and by itself.
    "mmaction": [*prefixed(SWIN, r"backbone\.", "video_model."), Row(r"cls_head\.fc_cls\.", "classifier.")],
    "Video Swin": prefixed([row for row in SWIN if row.source != r"head\."], "", "video_model."),
    "torchvision": [Row(r"head\.", "classifier."), *prefixed(TORCHVISION, "", "video_model.")],
}
MARKS = {
    r"backbone\.patch_embed\.proj\.weight$": "mmaction",
    r"features\.0\.0\.attn\.qkv\.weight$": "torchvision",
    r"patch_embed\.proj\.weight$": "Video Swin",
}
TOWER = "video_model."
# What Video Swin does where a map is smaller than a window or a clip no multiple of one.
CONVENTIONS = {"window_padding": "clamp_axes", "temporal_padding": "zeros", "clamped_bias": "slice"}
# How the sources prepare clips: 32 frames, every second, from frames of this shortest edge.
SHORTEST_EDGES = {"mmaction": 224, "Video Swin": 224, "torchvision": 256}
DROPOUTS = {"mmaction": 0.5}  # before the classifier, for who trains on


def window_of(conversion: Conversion, tensors: Tensors, name: str) -> tuple[int, int]:
    """Time and side of a window: the table has (2 * time - 1) * (2 * side - 1) ** 2 rows, its index tells the area.

    Raises:
        ValueError: the index was not saved, or no window over a square fits both.
    """
    (rows, _), source = conversion.shape(name, 2), conversion.sources[name]
    index = tensors.get(source.replace("relative_position_bias_table", "relative_position_index"))
    if index is None or index.ndim not in (1, 2):
        conversion.refuse("Video Swin", [], [f"{source} (expected beside it the index that tells its window)"])
        raise AssertionError("refused above")
    area = index.shape[0] if index.ndim == 2 else math.isqrt(index.numel())
    for side in range(1, math.isqrt(area) + 1):
        time = area // side**2
        if time * side**2 == area and (2 * time - 1) * (2 * side - 1) ** 2 == rows:
            return time, side
    conversion.refuse(
        "Video Swin", [], [f"{source} (expected a window over a square of {area} tokens, got {rows} rows)"]
    )
    raise AssertionError("refused above")


def video_fields(conversion: Conversion, tensors: Tensors) -> dict[str, Any]:
    """Fields of a `FlorenceVideoConfig`, read off the shapes of the tensors under our names; tensors: the source's.

    Raises:
        ValueError: a tensor that tells one is missing or misshapen.
    """
    stem = TOWER + "embeddings.projection.weight"
    embed_dim, num_channels, stride, *patch = conversion.shape(stem, 5)
    if patch != [4, 4]:
        conversion.refuse("Video Swin", [], [f"{conversion.sources[stem]} (expected patches of 4 x 4, got {patch})"])
    depths, heads, times, sides = [], [], [], []
    layer = re.compile(re.escape(TOWER) + r"encoder\.stages\.(\d+)\.layers\.(\d+)\.")
    numbers = [(int(match[1]), int(match[2])) for name in conversion.tensors if (match := layer.match(name))]
    for stage in range(len({number for number, _ in numbers})):
        name = f"{TOWER}encoder.stages.{stage}.layers.0.attention.relative_position_bias_table"
        heads.append(conversion.shape(name, 2)[1])
        time, side = window_of(conversion, tensors, name)
        depths.append(1 + max(depth for number, depth in numbers if number == stage))
        times.append(time)
        sides.append(side)
    hidden_dim, _ = conversion.shape(TOWER + "encoder.stages.0.layers.0.mlp.fc1.weight", 2)
    published = (size for size in VISION_SIZES.values() if (size["embed_dim"], size["depths"]) == (embed_dim, depths))
    return {
        "embed_dim": embed_dim,
        "depths": depths,
        "num_channels": num_channels,
        "num_heads": heads,
        "window_size": sides[0] if len(set(sides)) == 1 else sides,
        "temporal_window_size": times[0] if len(set(times)) == 1 else times,
        "temporal_stride": stride,
        "embed_type": "patch",
        "mlp_ratio": hidden_dim / embed_dim,
        "qkv_bias": any(name.endswith(".attention.q_proj.bias") for name in conversion.tensors),
        "drop_path_rate": next(published, {}).get("drop_path_rate", 0.1),  # for who trains on
    }


def convert(
    tensors: Tensors, origin: str | Path, settings: dict[str, Any] | None = None
) -> tuple[FlorenceVideoModel | FlorenceForVideoClassification, Conversion]:
    """A Video Swin's tensors as a model in evaluation mode, and the account of all keys.

    Args:
        tensors: as one of `TABLES` names them.
        origin: where they come from, for messages.
        settings: other fields of the configuration, such as `image_size`, `num_frames` and `id2label`, that no shape
            tells; those that one tells have to agree.

    Raises:
        ValueError: no known layout, another number of labels than the classifier has, or see `build_model`.
    """
    layout = find_layout(tensors, MARKS, f"Video Swin's keys as {', '.join(TABLES)} name them", origin)
    conversion = apply_table(tensors, TABLES[layout], origin)
    fields, settings = video_fields(conversion, tensors), settings or {}
    check_agreement(fields, settings, origin)
    fields |= {**CONVENTIONS, "classifier_dropout": DROPOUTS.get(layout, 0.0), **settings}
    if "classifier.weight" not in conversion.tensors:
        conversion.rename(re.escape(TOWER), "")
        return build_model(FlorenceVideoModel, FlorenceVideoConfig(**fields), conversion), conversion
    num_labels = conversion.shape("classifier.weight", 2)[0]
    labels = fields.setdefault("id2label", {number: f"LABEL_{number}" for number in range(num_labels)})
    if len(labels) != num_labels:
        raise ValueError(f"expected the names of {num_labels} classes for {origin}, got {len(labels)}")
    return build_model(FlorenceForVideoClassification, FlorenceVideoConfig(**fields), conversion), conversion


def video_processor(config: FlorenceVideoConfig, layout: str) -> FlorenceVideoProcessor:
    """Clips as the source's evaluation prepares them."""
    sizes: Sequence[int] = [config.image_size] * 2 if isinstance(config.image_size, int) else config.image_size
    return FlorenceVideoProcessor(
        size={"shortest_edge": SHORTEST_EDGES[layout] * max(sizes) // 224},
        crop_size={"height": sizes[0], "width": sizes[1]},
        resample=Image.Resampling.BILINEAR,
        num_frames=config.num_frames,
        sampling="dense",
        frame_stride=2,
    )


def read_labels(path: str | Path) -> dict[int, str]:
    """One name a line -> the configuration's `id2label`.

    Raises:
        ValueError: no such file, no text, or names that are empty or there twice.
    """
    try:
        names = Path(path).read_text("utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise ValueError(f"expected a text file with the name of a class on each line, got {path}: {error}") from error
    if not names or not all(names) or len(set(names)) != len(names):
        raise ValueError(f"expected a different name of a class on each line of {path}, got empty or equal ones")
    return dict(enumerate(names))


def convert_file(
    source: str | Path,
    output: str | Path,
    labels: str | Path | None = None,
    image_size: int | None = None,
    num_frames: int | None = None,
) -> Conversion:
    """One file of weights -> one folder with model and video processor.

    Raises:
        ValueError: a file, its keys or the output folder are not what they should be.
    """
    folder = new_folder(output)
    tensors, _ = read_weights(source)
    settings: dict[str, Any] = {"image_size": image_size, "num_frames": num_frames}
    settings = {name: value for name, value in settings.items() if value is not None}
    if labels is not None:
        settings["id2label"] = read_labels(labels)
    model, conversion = convert(tensors, source, settings)
    model.save_pretrained(folder)
    video_processor(model.config, find_layout(tensors, MARKS, "Video Swin", source)).save_pretrained(folder)
    return conversion


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="weights (.safetensors, .pth, .bin)")
    parser.add_argument("output", help="folder to write, new or empty")
    parser.add_argument("--labels", help="text file with the name of a class on each line")
    parser.add_argument("--image-size", type=int, help="pixels of the training clips (default: 224)")
    parser.add_argument("--num-frames", type=int, help="frames of the training clips (default: 32)")
    options = parser.parse_args(argv)
    print(convert_file(**vars(options)))
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
