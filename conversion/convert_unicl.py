"""UniCL's released checkpoints (Swin-T, Swin-B) as a `FlorenceModel` folder with processor, number for number.

    python -m conversion.convert_unicl yfcc14m.pth unicl-swin-tiny --tokenizer openai/clip-vit-base-patch32
    python -m conversion.convert_unicl --verify ../shared/parity/unicl.pt

The first command writes a folder for `FlorenceModel.from_pretrained` and `pipeline("zero-shot-image-classification")`.
Every key of the file has to find its place, and every weight of the model its key; the account of both is printed.
`--tokenizer` is a folder with CLIP's vocabulary, or its name on the Hub: the only thing that is ever fetched, and only
if it is a name. The second command converts each case of a file of inputs and outputs that UniCL's own code computed,
and prints the largest differences; it fails where they are above 1e-5 (float32, gradients) or 1e-9 (float64).

UniCL (Yang et al., 2022, arXiv 2204.03610) is by Florence's authors, trained with Florence's objective.
"""

import argparse
import math
from pathlib import Path
from typing import Any

import torch

from transformers_florence import (
    FlorenceConfig,
    FlorenceModel,
    FlorenceProcessor,
    unicl_loss,
)

from .key_tables import (
    CLIP_TEXT,
    SWIN,
    Conversion,
    KeyTable,
    Row,
    apply_table,
    build_model,
    check_agreement,
    image_processor,
    load_tokenizer,
    new_folder,
    prefixed,
    text_fields,
    transposed,
    vision_fields,
)
from .reading import Tensors, read_content, read_weights

# The two names of a part are those of the repository and of its earlier code, which some files were written with.
TABLE: KeyTable = [
    *prefixed(SWIN, r"(?:image_encoder|visual)\.", "vision_model."),
    *prefixed(CLIP_TEXT, r"(?:text_encoder|lang_encoder|text)\.", "text_model."),
    Row(r"(?:image|vision)_projection$", "visual_projection.weight", transposed),
    Row(r"(?:text|lang)_projection$", "text_projection.weight", transposed),
    Row(r"logit_scale$", "logit_scale"),
]
# UniCL's names of what the shapes tell.
VISION_NAMES = {"EMBED_DIM": "embed_dim", "DEPTHS": "depths", "NUM_HEADS": "num_heads", "IN_CHANS": "num_channels"}
TEXT_NAMES = {"WIDTH": "hidden_size", "LAYERS": "num_hidden_layers", "CONTEXT_LENGTH": "max_position_embeddings"}
TOLERANCES = {"float32": 1e-5, "float64": 1e-9, "gradients": 1e-5}
LAYER_NORM_EPS = 1e-12  # of the text tower's own layer norm; the image tower has PyTorch's default


def section(settings: dict[str, Any], name: str) -> dict[str, Any]:
    """A part of UniCL's configuration; empty if there is none.

    Raises:
        ValueError: there is something else under this name.
    """
    part = settings.get(name, {})
    if not isinstance(part, dict):
        raise ValueError(f"expected a dictionary under {name} in UniCL's configuration, got {part!r}")
    return part


def unicl_config(conversion: Conversion, settings: dict[str, Any]) -> FlorenceConfig:
    """The configuration, read off the tensors' shapes and, where no shape tells, off UniCL's own.

    settings: the `MODEL` part of UniCL's configuration, or empty: then what the releases have in common holds.

    Raises:
        ValueError: shapes or settings that are not those of UniCL with Swin.
    """
    image, text = section(settings, "IMAGE_ENCODER"), section(settings, "TEXT_ENCODER")
    swin = section(image, "SWIN")
    for name, expected, value in (
        ("IMAGE_ENCODER.TYPE", "swin", image.get("TYPE", "swin")),
        ("IMAGE_ENCODER.SWIN.QK_SCALE", None, swin.get("QK_SCALE")),
        ("TEXT_ENCODER.TOKENIZER", "clip", text.get("TOKENIZER", "clip")),
    ):
        if value != expected:
            raise ValueError(f"{name}: expected {expected!r} in {conversion.origin}, got {value!r}")
    vision = vision_fields(conversion, "vision_model.")
    words = text_fields(conversion, text.get("HEADS"), "text_model.")
    for read, said, names in ((vision, swin, VISION_NAMES), (words, text, TEXT_NAMES)):
        check_agreement(read, {names[name]: said[name] for name in names if name in said}, conversion.origin)
    if "DROP_PATH_RATE" in image:
        vision["drop_path_rate"] = image["DROP_PATH_RATE"]
    return FlorenceConfig(
        vision_config={**vision, "image_size": image.get("IMG_SIZE", 224), "window_padding": "clamp"},
        text_config={
            **words,
            "causal": text.get("AUTOGRESSIVE", True),
            "hidden_act": "quick_gelu",
            "layer_norm_eps": LAYER_NORM_EPS,
        },
        projection_dim=conversion.shape("visual_projection.weight", 2)[0],
        logit_scale_init_value=1.0,
        max_logit_scale=None,  # UniCL lets it grow
    )


def convert(tensors: Tensors, settings: dict[str, Any], origin: str | Path) -> tuple[FlorenceModel, Conversion]:
    """UniCL's tensors, in any of its layouts, as a model in evaluation mode, and the account of all keys.

    settings: see `unicl_config`. origin: where the tensors come from, for messages.

    Raises:
        ValueError: see `unicl_config` and `build_model`.
    """
    conversion = apply_table(tensors, TABLE, origin)
    return build_model(FlorenceModel, unicl_config(conversion, settings), conversion), conversion


def convert_file(source: str | Path, output: str | Path, tokenizer: str) -> Conversion:
    """One checkpoint -> one folder with model and processor.

    Raises:
        ValueError: a file, its keys, the tokenizer or the output folder are not what they should be.
    """
    folder = new_folder(output)
    tensors, beside = read_weights(source)
    model, conversion = convert(tensors, section(section(beside, "config"), "MODEL"), source)
    if not model.config.text_config.causal:
        # Its text tower also attends to its padding: no attention mask of a tokenizer gives the same numbers.
        raise ValueError(f"TEXT_ENCODER.AUTOGRESSIVE: expected True, as in all releases with Swin, in {source}")
    pictures = image_processor(model.config.vision_config.image_size)
    processor = FlorenceProcessor(pictures, load_tokenizer(tokenizer, model.config.text_config))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return conversion


# ------------------------------------------------------------------------------------------------------ verification


def computed(model: FlorenceModel, inputs: Tensors) -> Tensors:
    """What UniCL computes from a case's inputs, by the names that the files of reference use."""
    ids, labels = inputs["input_ids"], inputs["labels"]
    # Without causal mask UniCL hides token 0, whatever the attention mask says.
    mask = None if model.config.text_config.causal else (ids != 0).long()
    output = model(ids, inputs["image"].to(model.dtype), mask, output_hidden_states=True)
    image, text = output.vision_model_output, output.text_model_output
    # UniCL's stages end with the next one's embedding.
    following = [stage.embed for stage in list(model.vision_model.encoder.stages)[1:]] + [torch.nn.Identity()]
    stages = zip(following, image.hidden_states[1:], strict=True)
    embeds = (output.image_embeds, output.text_embeds, labels, output.logit_scale)
    return {
        "patch_embed": image.hidden_states[0].flatten(1, 2),
        **{f"stage{index}": embed(grid).flatten(1, 2) for index, (embed, grid) in enumerate(stages)},
        "pooled": image.last_hidden_state.mean(dim=1),
        "image_unnormed": image.pooler_output,
        "image_features": output.image_embeds,
        "text_last_hidden_state": text.last_hidden_state,
        "text_unnormed": text.pooler_output,
        "text_features": output.text_embeds,
        "logit_scale_exp": output.logit_scale,
        "logits_per_image": output.logits_per_image,
        "loss_paper_total": unicl_loss(*embeds, reduction="sum"),
        "loss_mean_half": unicl_loss(*embeds, reduction="mean"),
    }


def differences(case: dict[str, Any], origin: str) -> dict[str, dict[str, float]]:
    """Kind (`TOLERANCES`) -> name -> largest absolute difference between our numbers and those of one case.

    Compared are the outputs that `computed` names; the halves of the summed loss, which the files also hold, make
    up its total.
    """
    model, _ = convert(case["state_dict"], case["config"], origin)
    ours = computed(model, case["inputs"])
    ours["loss_mean_half"].backward()
    parameters = {name: parameter.grad for name, parameter in model.named_parameters()}
    gradients = apply_table(case["grads"], TABLE, origin)
    gradients.refuse("UniCL's gradients", [])
    with torch.no_grad():
        precise = computed(model.double(), case["inputs"])
    pairs = {
        "float32": {name: (ours[name], value) for name, value in case["outputs"].items() if name in ours},
        "float64": {name: (precise[name], value) for name, value in case["outputs64"].items() if name in precise},
        "gradients": {name: (parameters[name], value) for name, value in gradients.tensors.items()},
    }
    return {
        kind: {name: (left - right).abs().max().item() for name, (left, right) in named.items()}
        for kind, named in pairs.items()
    }


def verify(path: str | Path) -> dict[str, dict[str, dict[str, float]]]:
    """Case -> kind -> name -> difference, over a file of cases (configuration, weights, inputs, outputs, gradients).

    Raises:
        ValueError: see `read_content`, or the file holds something else than such cases.
    """
    cases = read_content(path)
    parts = {"config", "state_dict", "inputs", "outputs", "outputs64", "grads"}
    for name, case in cases.items():
        if not isinstance(case, dict) or not parts <= case.keys():
            raise ValueError(
                f"expected cases with {', '.join(sorted(parts))} in {path}, got {name!r} without all of them"
            )
    return {name: differences(case, f"{path}: {name}") for name, case in cases.items()}


def print_verification(found: dict[str, dict[str, dict[str, float]]]) -> bool:
    """The largest difference of each case and kind. Returns whether all are within `TOLERANCES`."""
    good = True
    for case, kinds in found.items():
        for kind, named in kinds.items():
            worst = max(named, key=lambda name: math.inf if math.isnan(named[name]) else named[name])
            within = named[worst] <= TOLERANCES[kind]  # NaN is not
            good &= within
            print(
                f"{'ok    ' if within else 'FAILED'} {case}: {kind}, {len(named)} tensors, largest difference "
                f"{named[worst]:.1e} (at most {TOLERANCES[kind]:.0e}), {worst}"
            )
    return good


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", help="UniCL's checkpoint (.pth), or its weights as .safetensors")
    parser.add_argument("output", nargs="?", help="folder to write, new or empty")
    parser.add_argument("--tokenizer", help="folder of CLIP's tokenizer, or its name on the Hub")
    parser.add_argument("--verify", metavar="FILE", help="file of UniCL's own inputs and outputs to compare with")
    options = parser.parse_args(argv)
    if not options.verify and not (options.source and options.output and options.tokenizer):
        parser.error("expected --verify FILE, or source, output and --tokenizer")
    if options.verify and not print_verification(verify(options.verify)):
        raise SystemExit(f"{options.verify}: differences above the tolerances")
    if options.source:
        print(convert_file(options.source, options.output, options.tokenizer))
        print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
