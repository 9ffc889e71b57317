"""CLIP's and open_clip's text towers as Florence's, number for number.

    python -m conversion.convert_clip_text clip-vit-base-patch32 clip-text
    python -m conversion.convert_clip_text open_clip_model.safetensors clip-text --activation gelu
    python -m conversion.convert_clip_text clip-vit-base-patch32 start --vision swin-tiny

The file's keys tell whether transformers wrote it (then `config.json` beside it tells the rest) or OpenAI or open_clip
did (then say `--activation`: "quick_gelu" for OpenAI's weights and open_clip's `-quickgelu` models, "gelu" for its
others). The folder loads as `FlorenceTextModel`. Its projection into the space of CLIP's pictures has no place there;
with `--vision`, a folder with a `FlorenceVisionModel` (see `convert_swin`), the result is a `FlorenceModel` to train:
the two towers and the texts' projection as they were, the pictures' projection and the temperature new. `--tokenizer`
puts CLIP's tokenizer into the folder, with `--vision` a whole processor.
"""

import argparse
from pathlib import Path
from typing import Any

from transformers import CLIPTextConfig

from transformers_florence import (
    FlorenceConfig,
    FlorenceModel,
    FlorenceProcessor,
    FlorenceTextConfig,
    FlorenceTextModel,
    FlorenceVisionModel,
    load_checkpoint,
)

from .key_tables import (
    CLIP_TEXT,
    Conversion,
    KeyTable,
    LeftOut,
    Row,
    apply_table,
    build_model,
    check_agreement,
    find_layout,
    image_processor,
    load_tokenizer,
    new_folder,
    prefixed,
    text_fields,
    transposed,
)
from .reading import Tensors, config_beside, read_weights

PICTURES = "belongs to CLIP's image tower"
SCALE = "belongs to the pair of CLIP's towers"
HUB_LAYER = r"(?:text_model\.)?encoder\.layers\.(\d+)\."
LAYER = r"encoder.layers.\1."
TABLES: dict[str, KeyTable] = {
    # `text.` before every key of the tower is open_clip's younger layout, for towers of all makes.
    "open_clip": [
        *prefixed(CLIP_TEXT, r"(?:text\.)?", ""),
        Row(r"(?:text\.)?text_projection\.weight$", "text_projection.weight"),
        Row(r"(?:text\.)?text_projection$", "text_projection.weight", transposed),
        LeftOut(r"visual\.", PICTURES),
        LeftOut(r"logit_(?:scale|bias)$", SCALE),
        LeftOut(r"(?:input_resolution|context_length|vocab_size)$", "follows from the shapes"),  # OpenAI's files
    ],
    "transformers": [
        LeftOut(r"(?:text_model\.)?embeddings\.position_ids$", "counts from zero"),
        Row(r"(?:text_model\.)?embeddings\.(token|position)_embedding\.", r"embeddings.\1_embedding."),
        Row(HUB_LAYER + r"self_attn\.(q|k|v|out)_proj\.", LAYER + r"self_attn.\2_proj."),
        Row(HUB_LAYER + r"(layer_norm[12]|mlp\.fc[12])\.", LAYER + r"\2."),
        Row(r"(?:text_model\.)?final_layer_norm\.", "final_layer_norm."),
        Row(r"text_projection\.", "text_projection."),
        LeftOut(r"vision_model\.|visual_projection\.", PICTURES),
        LeftOut(r"logit_scale$", SCALE),
    ],
}
# The keys of the vocabulary tell whose weights they are.
VOCABULARIES = {
    r"(text_model\.)?embeddings\.token_embedding\.weight$": "transformers",
    r"(text\.)?token_embedding\.weight$": "open_clip",
}
# Fields that transformers' configuration of CLIP's text tower and ours have in common.
SAVED = ("num_attention_heads", "hidden_act", "layer_norm_eps", "eos_token_id", "num_hidden_layers", "hidden_size")
OLD_EOS = 2  # transformers' CLIP configurations had it by mistake, and pool at the highest id instead


def layout_of(tensors: Tensors, origin: str | Path) -> str:
    """Whose names the keys are: one of `TABLES`.

    Raises:
        ValueError: nobody's that has a table.
    """
    return find_layout(tensors, VOCABULARIES, f"CLIP's keys as {' or '.join(TABLES)} name them", origin)


def saved_fields(settings: dict[str, Any]) -> dict[str, Any]:
    """What `config.json` of one of transformers' CLIP models tells of its text tower and no shape does.

    Raises:
        ValueError: it is not CLIP's.
    """
    if settings.get("model_type") not in ("clip", "clip_text_model"):
        raise ValueError(f"expected CLIP's config.json beside the weights, got {settings.get('model_type') or 'none'}")
    # The parts are those of CLIP's configuration of both towers; the second is how old ones state the first.
    for name in ("text_config", "text_config_dict"):
        part = settings.get(name) or {}
        if not isinstance(part, dict):
            raise ValueError(f"expected a dictionary under {name} in CLIP's config.json, got {part!r}")
        settings = settings | part
    fields = {name: settings.get(name, getattr(CLIPTextConfig(), name)) for name in SAVED}
    if fields["eos_token_id"] == OLD_EOS:
        del fields["eos_token_id"]  # Florence's default is the highest id
    return fields


def convert(
    tensors: Tensors, origin: str | Path, settings: dict[str, Any], vision: FlorenceVisionModel | None = None
) -> tuple[FlorenceTextModel | FlorenceModel, Conversion]:
    """The text tower of a CLIP as a model in evaluation mode, and the account of all keys.

    Args:
        tensors: as one of `TABLES` names them.
        origin: where they come from, for messages.
        settings: fields of the configuration that no shape tells: `hidden_act`, and where they are not CLIP's
            `num_attention_heads`, `layer_norm_eps` and `eos_token_id`; those that a shape tells have to agree.
        vision: an image tower to make a dual encoder with.

    Raises:
        ValueError: no known layout, `hidden_act` missing, no projection for a dual encoder, or see `build_model`.
    """
    layout = layout_of(tensors, origin)
    if "hidden_act" not in settings:
        raise ValueError(f"hidden_act: expected 'quick_gelu' or 'gelu' for {origin}, which does not tell, got none")
    conversion = apply_table(tensors, TABLES[layout], origin)
    fields = text_fields(conversion, settings.get("num_attention_heads"))
    check_agreement(fields, settings, origin)
    config = FlorenceTextConfig(**{"layer_norm_eps": 1e-5, **fields, **settings})
    if vision is None:
        conversion.drop(r"text_projection\.", "a text tower ends at the pooled state (but see --vision)")
        return build_model(FlorenceTextModel, config, conversion), conversion
    projection_dim, _ = conversion.shape("text_projection.weight", 2)
    conversion.rename(r"(?!text_projection\.)", "text_model.")
    for name, tensor in vision.state_dict().items():
        conversion.tensors["vision_model." + name] = tensor
        conversion.sources["vision_model." + name] = name
    why = "joins two towers that never met"
    conversion.new |= {"visual_projection.weight": why, "logit_scale": why}
    both = FlorenceConfig(vision_config=vision.config, text_config=config, projection_dim=projection_dim)
    return build_model(FlorenceModel, both, conversion), conversion


def convert_file(
    source: str | Path,
    output: str | Path,
    activation: str | None = None,
    vision: str | Path | None = None,
    tokenizer: str | None = None,
) -> Conversion:
    """One file of weights, or folder that `save_pretrained` wrote -> one folder with the model and its tokenizer.

    Raises:
        ValueError: a file, its keys, the tokenizer or a folder are not what they should be.
    """
    folder = new_folder(output)
    tensors, _ = read_weights(source)
    settings = saved_fields(config_beside(source)) if layout_of(tensors, source) == "transformers" else {}
    if activation is not None:
        if settings.get("hidden_act", activation) != activation:
            raise ValueError(f"expected the activation {settings['hidden_act']!r} of {source}, got {activation!r}")
        settings["hidden_act"] = activation
    image_tower = None if vision is None else load_checkpoint(FlorenceVisionModel, vision)
    model, conversion = convert(tensors, source, settings, image_tower)
    text_config = model.config.text_config if isinstance(model, FlorenceModel) else model.config
    parts = [] if tokenizer is None else [load_tokenizer(tokenizer, text_config)]
    if parts and image_tower is not None:
        parts = [FlorenceProcessor(image_processor(image_tower.config.image_size), *parts)]
    for part in (model, *parts):
        part.save_pretrained(folder)
    return conversion


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="weights (.safetensors, .pt, .bin), or a folder that transformers saved")
    parser.add_argument("output", help="folder to write, new or empty")
    parser.add_argument("--activation", choices=("quick_gelu", "gelu"), help="(default: that of config.json)")
    parser.add_argument("--vision", help="folder of an image tower, for a dual encoder")
    parser.add_argument("--tokenizer", help="folder of CLIP's tokenizer, or its name on the Hub")
    options = parser.parse_args(argv)
    print(convert_file(**vars(options)))
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
