"""Swin weights of timm, transformers, torchvision and Microsoft as Florence's image tower, number for number.

    python -m conversion.convert_swin swin_tiny_patch4_window7_224.safetensors swin-tiny
    python -m conversion.convert_swin swin_t-704ceda3.pth coswin-tiny-start --embed-type conv

The file's keys tell whose it is. With Swin's own embeddings (`--embed-type patch`, the default for Swin) the tower
computes what the source computes, and the folder loads as `FlorenceVisionModel`; weights of a detector's backbone,
with a norm behind each stage, load as `FlorenceBackbone`. Every key has to find its place, and every weight its key.

`--embed-type conv` makes a start for training CoSwin: what both towers have is taken, the rest begins as
`FlorenceVisionModel` initialises it, and the account that is printed says which is which, and why.

`--window-padding` says what happens to maps no larger than a window, where the same weights give different numbers:
"clamp" (the default) is classification's Swin, as timm, torchvision and transformers compute it at their training
size; "pad" is detection's, the default for backbones. GLIP's CoSwin pads pictures to a multiple of seven pixels at the
right and below before its first convolution; do so yourself for its numbers at other sizes.
"""

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.nn import functional as F

from transformers_florence import FlorenceBackbone, FlorenceVisionConfig, FlorenceVisionModel

from .key_tables import (
    BUFFERS,
    SWIN,
    Conversion,
    KeyTable,
    LeftOut,
    Row,
    apply_table,
    build_model,
    check_agreement,
    find_layout,
    image_processor,
    new_folder,
    next_stage,
    torchvision_layers,
    vision_fields,
)
from .reading import Tensors, config_beside, read_weights

CLASSIFIER = "a classifier; the tower ends at the pooled features"


def _stage(part: str) -> Callable[[re.Match], str]:
    """torchvision counts stems, layers and embeddings in one list: two entries a stage."""
    return lambda match: f"encoder.stages.{int(match[1]) // 2}.{match.expand(part)}"


HUB_BLOCK = r"(?:swin\.)?encoder\.layers\.(\d+)\.blocks\.(\d+)\."
LIST_BLOCK = r"features\.(\d*[13579])\.(\d+)\."
LAYER = r"encoder.stages.\1.layers.\2."
TABLES: dict[str, KeyTable] = {
    "Microsoft": SWIN,
    # In timm a stage begins with its own embedding.
    "timm": [Row(r"layers\.(\d+)\.downsample\.(norm|reduction)\.", r"encoder.stages.\1.embed.\2."), *SWIN],
    # The names of the Hub's files, and those of transformers 5's modules.
    "transformers": [
        *BUFFERS,
        Row(r"(?:swin\.)?embeddings\.patch_embeddings\.projection\.", "embeddings.projection."),
        Row(r"(?:swin\.)?embeddings\.norm\.", "embeddings.norm."),
        Row(HUB_BLOCK + r"attention\.(?:self\.)?(q|k|v)(?:uery|ey|alue|_proj)\.", LAYER + r"attention.\3_proj."),
        Row(HUB_BLOCK + r"attention\.(?:output\.dense|o_proj)\.", LAYER + "attention.out_proj."),
        Row(
            HUB_BLOCK + r"attention\.(?:self|relative_position_bias)\.relative_position_bias_table$",
            LAYER + "attention.relative_position_bias_table",
        ),
        Row(HUB_BLOCK + r"layernorm_before\.", LAYER + "norm1."),
        Row(HUB_BLOCK + r"layernorm_after\.", LAYER + "norm2."),
        Row(HUB_BLOCK + r"(?:intermediate\.dense|mlp\.fc1)\.", LAYER + "mlp.fc1."),
        Row(HUB_BLOCK + r"(?:output\.dense|mlp\.fc2)\.", LAYER + "mlp.fc2."),
        Row(r"(?:swin\.)?encoder\.layers\.(\d+)\.downsample\.(norm|reduction)\.", next_stage(r"\2.")),
        Row(r"hidden_states_norms\.(\w+)\.", r"feature_norms.\1."),
        Row(r"(?:swin\.)?layernorm\.", "norm."),
        LeftOut(r"classifier\.", CLASSIFIER),
    ],
    "torchvision": [
        *BUFFERS,
        Row(r"features\.0\.0\.", "embeddings.projection."),
        Row(r"features\.0\.2\.", "embeddings.norm."),
        *torchvision_layers(LIST_BLOCK, _stage),
        Row(r"features\.(\d*[02468])\.(norm|reduction)\.", _stage(r"embed.\2.")),
        Row(r"norm\.", "norm."),
        LeftOut(r"head\.", CLASSIFIER),
    ],
}
# The keys of the stem tell whose weights they are.
STEMS = {
    r"features\.0\.0\.weight$": "torchvision",
    r"(swin\.)?embeddings\.patch_embeddings\.projection\.weight$": "transformers",
    r"patch_embed\.proj\.weight$": "timm",  # or Microsoft's, of which timm's began as a copy
}
STEM = "embeddings.projection.weight"
# Fields that transformers' configuration of Swin and ours have in common, but for the window, which fits the map here.
SAVED = ("image_size", "hidden_act", "embed_dim", "depths", "num_heads", "num_channels", "qkv_bias")


def layout_of(tensors: Tensors, origin: str | Path) -> str:
    """Whose names the keys are: one of `TABLES`.

    Raises:
        ValueError: nobody's that has a table.
    """
    layout = find_layout(tensors, STEMS, f"Swin's keys as {', '.join(TABLES)} name them", origin)
    ends_stages = any(key.startswith("layers.0.downsample.") for key in tensors)
    return "Microsoft" if layout == "timm" and ends_stages else layout


def start_coswin(conversion: Conversion, prefix: str, stages: int) -> None:
    """Turn the tensors of a Swin into what a CoSwin can begin with; `prefix` is that of the names of what is new."""
    kernel = conversion.tensors[STEM]
    if kernel.shape[2:] != (4, 4):
        conversion.refuse("a Swin", [], [f"{conversion.sources[STEM]} (expected 4 x 4, got {tuple(kernel.shape)})"])
    conversion.drop(
        r"encoder\.stages\.\d+\.embed\.",
        "Swin normalises four neighbours and projects them, CvT's embedding convolves nine and normalises the result",
    )
    # CoSwin's first convolution has the stride of the patches and begins two pixels before each.
    conversion.tensors[STEM] = F.pad(kernel, (2, 1, 2, 1))  # (embed_dim, channels, 7, 7)
    conversion.notes.append(f"{STEM}: the patch's kernel in the middle of a larger one of zeros, the same tokens")
    parts = [f"{part}.{kind}" for part in ("projection", "norm") for kind in ("weight", "bias")]
    conversion.new |= {
        f"{prefix}encoder.stages.{stage}.embed.{part}": "CvT's embedding, which Swin does not have"
        for stage in range(1, stages)
        for part in parts
    }


def convert(
    tensors: Tensors,
    origin: str | Path,
    embed_type: str | None = None,
    window_padding: str | None = None,
    settings: dict[str, Any] | None = None,
) -> tuple[FlorenceVisionModel | FlorenceBackbone, Conversion]:
    """A Swin's tensors as a model in evaluation mode, and the account of all keys.

    Args:
        tensors: as one of `TABLES` names them.
        origin: where they come from, for messages.
        embed_type, window_padding: fields of the configuration; None for what the weights are made for.
        settings: other fields of the configuration, such as `image_size`, that no shape tells; those that one tells
            have to agree.

    Raises:
        ValueError: no known layout; convolutional embeddings where patches are asked for; or see `build_model`.
    """
    conversion = apply_table(tensors, TABLES[layout_of(tensors, origin)], origin)
    fields, settings = vision_fields(conversion), settings or {}
    check_agreement(fields, settings, origin)
    stages = ["stem", *(f"stage{number}" for number in range(1, 1 + len(fields["depths"])))]
    features = [stage for stage in stages if f"feature_norms.{stage}.weight" in conversion.tensors]
    prefix = "vision_model." if features else ""
    if embed_type == "patch" and fields["embed_type"] == "conv":
        raise ValueError(f"expected patch embeddings in {origin}, got convolutional ones")
    if embed_type == "conv" and fields["embed_type"] == "patch":
        start_coswin(conversion, prefix, len(fields["depths"]))
    if features:
        conversion.drop(r"norm\.", "a backbone has a norm behind each stage")
        conversion.rename(r"(?!feature_norms\.)", prefix)
    config = FlorenceVisionConfig(
        **{
            **fields,
            **settings,
            "embed_type": embed_type or fields["embed_type"],
            "window_padding": window_padding or ("pad" if features else "clamp"),
            "out_features": features or None,
        }
    )
    model_class = FlorenceBackbone if features else FlorenceVisionModel
    return build_model(model_class, config, conversion), conversion


def settings_beside(source: str | Path) -> dict[str, Any]:
    """What the configuration that transformers saved with the weights tells and no shape does; empty without one.

    Raises:
        ValueError: a norm's epsilon that transformers' own Swin uses for some of its norms only.
    """
    saved = config_beside(source)
    if saved.get("model_type") != "swin":
        return {}
    if saved.get("layer_norm_eps", 1e-5) != 1e-5:
        raise ValueError(f"layer_norm_eps: expected 1e-5 beside {source}, got {saved['layer_norm_eps']!r}")
    return {name: saved[name] for name in SAVED if name in saved}


def convert_file(
    source: str | Path,
    output: str | Path,
    embed_type: str | None = None,
    window_padding: str | None = None,
    image_size: int | None = None,
) -> Conversion:
    """One file of weights, or folder that `save_pretrained` wrote -> one folder with tower and image processor.

    Raises:
        ValueError: a file, its keys or the output folder are not what they should be.
    """
    folder = new_folder(output)
    tensors, _ = read_weights(source)
    settings = settings_beside(source) | ({} if image_size is None else {"image_size": image_size})
    model, conversion = convert(tensors, source, embed_type, window_padding, settings)
    model.save_pretrained(folder)
    image_processor(model.config.image_size).save_pretrained(folder)
    return conversion


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="weights (.safetensors, .pth, .bin), or a folder that transformers saved")
    parser.add_argument("output", help="folder to write, new or empty")
    parser.add_argument(
        "--embed-type", choices=("patch", "conv"), help="the tower's embeddings (default: the source's)"
    )
    parser.add_argument("--window-padding", choices=("clamp", "pad"), help="(default: what the source is made for)")
    parser.add_argument(
        "--image-size", type=int, help="pixels of the training pictures (default: config.json's, or 224)"
    )
    options = parser.parse_args(argv)
    print(convert_file(**vars(options)))
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
