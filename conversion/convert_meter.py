"""METER's released checkpoints as Florence's models of vision and language, number for number where towers agree.

    python -m conversion.convert_meter meter_swinbase_384_roberta_pretrain.pt meter-swin --tokenizer roberta-base
    python -m conversion.convert_meter meter_clip16_288_roberta_vqa.pt meter-vqa --tokenizer roberta-base \
        --vision florence-folder --answers answers.txt

Which model comes out is what the checkpoint's heads are for: `FlorenceForQuestionAnswering`, `FlorenceForPreTraining`
(matching and masked language modelling) or `FlorenceForImageTextRetrieval`, whose log odds of a match are then METER's
ranking scores. The folder holds the model and a processor. Every key has to find its place, and every weight its key.

METER on Swin is whole: Swin is Florence's tower with `embed_type="patch"`. METER on CLIP's ViT-B/16 is not: its image
tower is none of Florence's. Of such a checkpoint the text encoder, the fusion and the heads are taken, `--vision`
names the Florence checkpoint whose image tower goes with them, and the map from its tokens to the fusion is new: a
start for training, not a model that answers. Checkpoints for NLVR2 (two pictures) and SNLI-VE are refused.

The names of the answers are numbers unless `--answers` gives a text file with one a line, in the order of the
release's `answer2label`.
"""

import argparse
import re
from pathlib import Path
from typing import Any

import torch
from transformers import AutoImageProcessor, AutoTokenizer, RobertaConfig

from transformers_florence import FlorenceImageProcessor, FlorenceProcessor, FlorenceVisionModel
from transformers_florence.configuration_florence_fusion import FlorenceFusionConfig
from transformers_florence.modeling_florence_fusion import FlorenceFusionPreTrainedModel, load_tower
from transformers_florence.modeling_florence_fusion_heads import (
    FlorenceForImageTextRetrieval,
    FlorenceForPreTraining,
    FlorenceForQuestionAnswering,
)

from .key_tables import (
    SWIN,
    Conversion,
    KeyTable,
    LeftOut,
    Row,
    apply_table,
    build_model,
    find_layout,
    new_folder,
    prefixed,
    vision_fields,
)
from .reading import Tensors, read_weights

CHANNELS_PER_HEAD = 64  # in every model of the release; no tensor tells
PIXELS_PER_TOKEN = 32  # of Swin's last map: the release sets the window to the map
TEXT_TOKENS = 50  # to which the release cuts and pads its texts
NORM_EPS = 1e-5  # of roberta-base; the fusion's is the default of its class, 1e-12
VISION, TEXT = "model.vision_model.", "model.text_model."
LAYERS = r"cross_modal_(text|image)_layers\.(\d+)\."
OURS = r"model.fusion.\1_layers.\2."


def against_nothing(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(1, ...), one score -> (2, ...), the logits of "no match", always 0, and of "match"."""
    return (torch.cat((torch.zeros_like(tensor), tensor)),)


RANKING: KeyTable = [
    Row(r"rank_output\.", "itm_head.", against_nothing),
    LeftOut(r"itm_score\.", "where the ranking started from; frozen since"),
]
HEADS: KeyTable = [
    Row(r"itm_score\.fc\.", "itm_head."),
    Row(r"mlm_score\.bias$", "mlm_head.vocabulary.bias"),
    Row(r"mlm_score\.decoder\.", "mlm_head.vocabulary."),
    Row(r"mlm_score\.transform\.dense\.", "mlm_head.transform."),
    Row(r"mlm_score\.transform\.LayerNorm\.", "mlm_head.norm."),
    Row(r"vqa_classifier\.([013])\.", r"classifier.\1."),
    LeftOut(r"rank_output\.", "a head of another task"),
]
METER: KeyTable = [
    LeftOut(r"text_transformer\.pooler\.", "METER never calls it"),
    LeftOut(r"text_transformer\.embeddings\.position_ids$", "counts from 0"),
    Row(r"text_transformer\.(embeddings\.\w+|encoder\.layer\.\d+\.[\w.]+?)\.(?=weight$|bias$)", TEXT + r"\1."),
    Row(r"cross_modal_(text|image)_transform\.", r"model.\1_transform."),
    Row(r"cross_modal_(text|image)_pooler\.dense\.", r"model.\1_pooler."),
    Row(r"token_type_embeddings\.", "model.token_type_embeddings."),
    *(
        row
        for source, target in (("attention", "self_attention"), ("crossattention", "cross_attention"))
        for row in (
            Row(LAYERS + rf"{source}\.self\.(q|k|v)(?:uery|ey|alue)\.", OURS + target + r".\3_proj."),
            Row(LAYERS + rf"{source}\.output\.dense\.", OURS + target + ".out_proj."),
            Row(LAYERS + rf"{source}\.output\.LayerNorm\.", OURS + target + "_norm."),
        )
    ),
    Row(LAYERS + r"intermediate\.dense\.", OURS + "mlp.fc1."),
    Row(LAYERS + r"output\.dense\.", OURS + "mlp.fc2."),
    Row(LAYERS + r"output\.LayerNorm\.", OURS + "mlp_norm."),
]
FOREIGN_TOWER: KeyTable = [LeftOut(r"vit_model\.", "CLIP's image tower, which is none of Florence's")]
# Whose image tower the keys are of; and what the heads are for: a later training keeps the heads of an earlier one.
TOWERS = {r"vit_model\.patch_embed\.": "swin", r"vit_model\.visual\.": "clip"}
TASKS = {
    r"nlvr2_classifier\.": "nlvr2",
    r"snli_classifier\.": "snli",
    r"vqa_classifier\.": "answers",
    r"rank_output\.": "ranking",
    r"mlm_score\.": "pretraining",
    r"itm_score\.": "retrieval",
}
MODELS: dict[str, tuple[type[FlorenceFusionPreTrainedModel], str]] = {
    "answers": (FlorenceForQuestionAnswering, r"(itm|mlm)_head\."),
    "pretraining": (FlorenceForPreTraining, r"classifier\."),
    "ranking": (FlorenceForImageTextRetrieval, r"mlm_head\.|classifier\."),
    "retrieval": (FlorenceForImageTextRetrieval, r"mlm_head\.|classifier\."),
}


def text_config(conversion: Conversion, heads: int | None) -> RobertaConfig:
    """RoBERTa's configuration, read off the shapes; heads: None for one every 64 channels."""
    vocab_size, hidden_size = conversion.shape(TEXT + "embeddings.word_embeddings.weight", 2)
    positions, _ = conversion.shape(TEXT + "embeddings.position_embeddings.weight", 2)
    types, _ = conversion.shape(TEXT + "embeddings.token_type_embeddings.weight", 2)
    intermediate_size, _ = conversion.shape(TEXT + "encoder.layer.0.intermediate.dense.weight", 2)
    return RobertaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=_depth(conversion, TEXT + "encoder.layer."),
        num_attention_heads=max(1, hidden_size // CHANNELS_PER_HEAD) if heads is None else heads,
        intermediate_size=intermediate_size,
        max_position_embeddings=positions,
        type_vocab_size=types,
        layer_norm_eps=NORM_EPS,
    )


def _depth(conversion: Conversion, prefix: str) -> int:
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
    return len({match[1] for name in conversion.tensors if (match := pattern.match(name))})


def convert(
    tensors: Tensors,
    origin: str | Path,
    *,
    vision: FlorenceVisionModel | None = None,
    answers: list[str] | None = None,
    heads: int | None = None,
) -> tuple[FlorenceFusionPreTrainedModel, Conversion]:
    """A METER's tensors as a model in evaluation mode, and the account of all keys.

    Args:
        tensors: as the release names them.
        origin: where they come from, for messages.
        vision: the image tower, for a checkpoint whose own is CLIP's, and for no other.
        answers: their names, in order.
        heads: attention heads of the text encoder and of the fusion; None for one every 64 channels.

    Raises:
        ValueError: a checkpoint for another task, an image tower missing or too many, another number of answers than
            the head has; or see `build_model`.
    """
    tower = find_layout(tensors, TOWERS, "METER's image tower", origin)
    task = find_layout(tensors, TASKS, "one of METER's heads", origin)
    if task not in MODELS:
        raise ValueError(
            f"expected METER's weights for pretraining, questions or retrieval in {origin}, got those for {task}"
        )
    if (tower == "clip") != (vision is not None):
        expected = "Florence's image tower beside METER on CLIP" if vision is None else "no tower beside METER on Swin"
        raise ValueError(f"expected {expected}, got {'none' if vision is None else 'one'}")
    model_class, foreign_heads = MODELS[task]
    table = FOREIGN_TOWER if tower == "clip" else prefixed(SWIN, r"vit_model\.", VISION)
    heads_table = [*RANKING, *HEADS] if task == "ranking" else HEADS
    conversion = apply_table(tensors, [*table, *METER, *heads_table], origin)
    conversion.drop(foreign_heads, "a head of another task")
    if vision is None:
        fields: dict[str, Any] = vision_fields(conversion, VISION)
        window = fields["window_size"] if isinstance(fields["window_size"], int) else fields["window_size"][-1]
        fields["image_size"] = PIXELS_PER_TOKEN * window
    else:
        fields = vision.config.to_dict()
        conversion.drop(r"model\.image_transform\.", "of CLIP's image tokens")
        conversion.new |= dict.fromkeys(
            ("model.image_transform.weight", "model.image_transform.bias"), "the map from Florence's image tokens"
        )
        conversion.notes.append("text encoder, fusion and heads alone are METER's: this is a start for training")
        for name, tensor in vision.state_dict().items():
            conversion.tensors[VISION + name], conversion.sources[VISION + name] = tensor, "Florence's " + name
    hidden_size, _ = conversion.shape("model.text_transform.weight", 2)
    intermediate_size, _ = conversion.shape("model.fusion.text_layers.0.mlp.fc1.weight", 2)
    labels: dict[str, Any] = {}
    if task == "answers":
        count = len(conversion.tensors["classifier.3.bias"]) if "classifier.3.bias" in conversion.tensors else 0
        if answers is not None and len(answers) != count:
            raise ValueError(f"expected the names of {count} answers, got {len(answers)}")
        names = answers or [str(number) for number in range(count)]
        labels = {"id2label": dict(enumerate(names)), "label2id": {name: id for id, name in enumerate(names)}}
    config = FlorenceFusionConfig(
        vision_config=fields,
        text_config=text_config(conversion, heads),
        hidden_size=hidden_size,
        num_hidden_layers=_depth(conversion, "model.fusion.text_layers."),
        num_attention_heads=max(1, hidden_size // CHANNELS_PER_HEAD) if heads is None else heads,
        mlp_ratio=intermediate_size / hidden_size,
        **labels,
    )
    return build_model(model_class, config, conversion), conversion


def image_processor(image_size: int) -> FlorenceImageProcessor:
    """As METER evaluates on Swin: the shortest side resized, the middle cut out, ImageNet's mean and deviation."""
    return FlorenceImageProcessor(
        size={"shortest_edge": image_size}, crop_size={"height": image_size, "width": image_size}
    )


def convert_file(
    source: str | Path,
    output: str | Path,
    tokenizer: str,
    vision: str | Path | None = None,
    answers: str | Path | None = None,
    heads: int | None = None,
) -> Conversion:
    """One file of weights -> one folder with model and processor.

    Raises:
        ValueError: a file, its keys, the tokenizer or the output folder are not what they should be.
    """
    folder = new_folder(output)
    tensors, _ = read_weights(source)
    names = None if answers is None else Path(answers).read_text("utf-8").splitlines()
    tower = None if vision is None else load_tower(FlorenceVisionModel, vision)
    model, conversion = convert(tensors, source, vision=tower, answers=names, heads=heads)
    words = AutoTokenizer.from_pretrained(tokenizer)
    vocab_size = model.config.text_config.vocab_size
    if len(words) != vocab_size:
        raise ValueError(f"expected a tokenizer of {vocab_size} tokens, got {len(words)} from {tokenizer!r}")
    words.model_max_length = min(TEXT_TOKENS, model.config.max_text_tokens)
    if vision is None:
        pictures = image_processor(model.config.image_size)
    else:
        pictures = AutoImageProcessor.from_pretrained(vision)
    model.save_pretrained(folder)
    FlorenceProcessor(pictures, words).save_pretrained(folder)
    return conversion


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="weights (.pt, .pth, .bin, .safetensors)")
    parser.add_argument("output", help="folder to write, new or empty")
    parser.add_argument("--tokenizer", required=True, help="RoBERTa's tokenizer: a folder or a name on the Hub")
    parser.add_argument("--vision", help="Florence checkpoint whose image tower stands in for CLIP's")
    parser.add_argument("--answers", help="text file with an answer a line (default: their numbers)")
    parser.add_argument("--heads", type=int, help="attention heads (default: one every 64 channels)")
    options = parser.parse_args(argv)
    print(convert_file(**vars(options)))
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
