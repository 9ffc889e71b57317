"""Dynamic Head's released detector on Swin (ATSS) as `FlorenceForObjectDetection`, number for number.

    python -m conversion.convert_dyhead dyhead_swint_atss_fpn_2x_ms.pth dyhead-swin-tiny

The folder holds the model and an image processor with the release's settings: shortest side 800 pixels, longest at
most 1333, padded to a multiple of the pyramid's last stride. Every key has to find its place, and every weight its
key. The releases on ResNet are other towers than Florence's and are refused, with the keys that have no place.

The names of the classes are COCO's where there are 80, else the numbers: `--names` takes a text file with one a line.
"""

import argparse
import re
from collections.abc import Callable
from pathlib import Path

from torchvision.models.detection import FCOS_ResNet50_FPN_Weights

from transformers_florence.configuration_florence_detection import FlorenceDetectionConfig
from transformers_florence.image_processing_florence_detection import FlorenceDetectionImageProcessor
from transformers_florence.modeling_florence_detection import FlorenceForObjectDetection

from .key_tables import (
    SWIN,
    Conversion,
    KeyTable,
    LeftOut,
    Row,
    apply_table,
    build_model,
    new_folder,
    prefixed,
    vision_fields,
)
from .reading import Tensors, read_weights

FIRST_LEVEL = 3  # the pyramid's levels are numbered by the logarithm of their stride
BRANCHES = ("coarser", "same", "finer")  # the level that each of a block's convolutions looks at
BODY = r"backbone\.backbone\.bottom_up\."
TOWER = "backbone.vision_model."
BLOCK = r"backbone\.dyhead_tower\.(\d+)\."
OUR_BLOCK = r"dynamic_head.blocks.\1."


def _level(part: str) -> Callable[[re.Match], str]:
    return lambda match: f"pyramid.{part}.{int(match[1]) - FIRST_LEVEL}.0."


def _branch(match: re.Match) -> str:
    part = {"conv": "conv", "bn": "norm"}[match[3]]
    return f"dynamic_head.blocks.{match[1]}.spatial_attention.{BRANCHES[int(match[2])]}.{part}."


DYNAMIC_HEAD: KeyTable = [
    Row(BODY + r"norm(\d)\.", lambda match: f"backbone.feature_norms.stage{int(match[1]) + 1}."),
    *prefixed(SWIN, BODY, TOWER),
    Row(r"backbone\.backbone\.fpn_lateral(\d)\.", _level("inner_blocks")),
    Row(r"backbone\.backbone\.fpn_output(\d)\.", _level("layer_blocks")),
    Row(r"backbone\.backbone\.top_block\.(p[67])\.", r"pyramid.extra_blocks.\1."),
    Row(BLOCK + r"DyConv\.([012])\.(conv|bn)\.", _branch),
    Row(BLOCK + r"offset\.", OUR_BLOCK + "spatial_attention.offset."),
    Row(BLOCK + r"AttnConv\.1\.", OUR_BLOCK + "scale_attention.projection."),
    Row(BLOCK + r"relu\.fc\.0\.", OUR_BLOCK + "task_attention.fc1."),
    Row(BLOCK + r"relu\.fc\.2\.", OUR_BLOCK + "task_attention.fc2."),
    Row(r"head\.cls_logits\.", "class_predictor."),
    Row(r"head\.bbox_pred\.", "box_predictor."),
    Row(r"head\.centerness\.", "centerness_predictor."),
    Row(r"head\.scales\.(\d+)\.scale$", r"box_scales.\1"),
    LeftOut(r"pixel_(mean|std)$", "the image processor's"),
    LeftOut(r"(head\.)?anchor_generator\.", "follows from the strides"),
]


def class_names(count: int) -> dict[int, str]:
    """COCO's, in the order of its 80 classes, or numbers."""
    categories = FCOS_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    coco = [name for name in categories if name not in ("__background__", "N/A")]
    return dict(enumerate(coco if count == len(coco) else map(str, range(count))))


def convert(
    tensors: Tensors, origin: str | Path, names: list[str] | None = None
) -> tuple[FlorenceForObjectDetection, Conversion]:
    """A Dynamic Head's tensors as a model in evaluation mode, and the account of all keys.

    Args:
        tensors: as the release names them.
        origin: where they come from, for messages.
        names: of the classes, in their order.

    Raises:
        ValueError: another number of names than of classes; or see `build_model`.
    """
    conversion = apply_table(tensors, DYNAMIC_HEAD, origin)
    num_labels, hidden_size, *_ = conversion.shape("class_predictor.weight", 4)
    if names is not None and len(names) != num_labels:
        raise ValueError(f"expected the names of {num_labels} classes, got {len(names)}")
    fields = vision_fields(conversion, TOWER)
    features = sorted(
        {name.split(".")[2] for name in conversion.tensors if name.startswith("backbone.feature_norms.")}
    )
    blocks = {name.split(".")[2] for name in conversion.tensors if name.startswith("dynamic_head.blocks.")}
    config = FlorenceDetectionConfig(
        vision_config={**fields, "window_padding": "pad", "out_features": features or None},
        hidden_size=hidden_size,
        num_blocks=len(blocks),
        offset_layout="official",
        id2label=class_names(num_labels) if names is None else dict(enumerate(names)),
    )
    return build_model(FlorenceForObjectDetection, config, conversion), conversion


def convert_file(source: str | Path, output: str | Path, names: str | Path | None = None) -> Conversion:
    """One file of weights -> one folder with model and image processor.

    Raises:
        ValueError: a file, its keys or the output folder are not what they should be.
    """
    folder = new_folder(output)
    tensors, _ = read_weights(source)
    lines = None if names is None else Path(names).read_text("utf-8").splitlines()
    model, conversion = convert(tensors, source, lines)
    model.save_pretrained(folder)
    FlorenceDetectionImageProcessor(size_divisor=model.config.strides[-1]).save_pretrained(folder)
    return conversion


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="weights (.pth, .safetensors)")
    parser.add_argument("output", help="folder to write, new or empty")
    parser.add_argument("--names", help="text file with the name of a class a line (default: COCO's, or numbers)")
    options = parser.parse_args(argv)
    print(convert_file(**vars(options)))
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
