"""Weights, inputs and outputs of Microsoft's own code (UniCL, GLIP's CoSwin): the same numbers from our models.

The files lie in the folder `shared` beside the clone, under `parity`; without it these tests skip.
"""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from transformers_florence.configuration_florence import FlorenceConfig, FlorenceVisionConfig
from transformers_florence.losses_contrastive import unicl_loss
from transformers_florence.modeling_florence import FlorenceModel
from transformers_florence.modeling_florence_vision import FlorenceBackbone, FlorenceVisionModel

Tensors = dict[str, torch.Tensor]

# (pattern of the source's key, our key or keys); fused projections become three, one scale of both branches two.
TOWER: list[tuple[str, str]] = [
    (r"patch_embed\.proj\.", "embeddings.projection."),
    (r"patch_embed\.norm\.", "embeddings.norm."),
    (r"layers\.(\d+)\.blocks\.(\d+)\.attn\.qkv\.", r"encoder.stages.\1.layers.\2.attention.[qkv]_proj."),
    (r"layers\.(\d+)\.blocks\.(\d+)\.attn\.proj\.", r"encoder.stages.\1.layers.\2.attention.out_proj."),
    (r"layers\.(\d+)\.blocks\.(\d+)\.attn\.", r"encoder.stages.\1.layers.\2.attention."),
    (r"layers\.(\d+)\.blocks\.(\d+)\.gamma", r"encoder.stages.\1.layers.\2.layer_scale"),
    (r"layers\.(\d+)\.blocks\.(\d+)\.", r"encoder.stages.\1.layers.\2."),
    (r"layers\.(\d+)\.downsample\.proj\.", r"encoder.stages.NEXT(\1).embed.projection."),
    (r"layers\.(\d+)\.downsample\.", r"encoder.stages.NEXT(\1).embed."),
    (r"norm\.", "norm."),
]
TEXT: list[tuple[str, str]] = [
    (r"positional_embedding", "embeddings.position_embedding.weight"),
    (r"token_embedding\.", "embeddings.token_embedding."),
    (r"resblocks\.(\d+)\.attn\.in_proj_", r"encoder.layers.\1.self_attn.[qkv]_proj."),
    (r"resblocks\.(\d+)\.attn\.", r"encoder.layers.\1.self_attn."),
    (r"resblocks\.(\d+)\.ln_", r"encoder.layers.\1.layer_norm"),
    (r"resblocks\.(\d+)\.mlp\.c_fc\.", r"encoder.layers.\1.mlp.fc1."),
    (r"resblocks\.(\d+)\.mlp\.c_proj\.", r"encoder.layers.\1.mlp.fc2."),
    (r"ln_final\.", "final_layer_norm."),
]
UNICL = (
    [(r"image_encoder\." + source, "vision_model." + target) for source, target in TOWER]
    + [(r"text_encoder\." + source, "text_model." + target) for source, target in TEXT]
    + [("image_projection", "visual_projection.weight"), ("text_projection", "text_projection.weight")]
    + [("logit_scale", "logit_scale")]
)
DERIVED = ("relative_position_index", "attn_mask")  # buffers that the sources save and we compute


def convert(tensors: Tensors, table: list[tuple[str, str]]) -> Tensors:
    """The source's tensors, also gradients, under our keys; a key that no pattern fits is an error."""
    converted: Tensors = {}
    for key, value in tensors.items():
        if key.endswith(DERIVED):
            continue
        source, target = next(row for row in table if re.match(row[0], key))
        name = re.sub(r"NEXT\((\d+)\)", lambda match: str(int(match[1]) + 1), re.sub("^" + source, target, key))
        if "[qkv]" in name:
            converted |= {name.replace("[qkv]", part): rows for part, rows in zip("qkv", value.chunk(3), strict=True)}
        elif name.endswith("layer_scale"):
            converted |= {name + "1": value, name + "2": value}
        else:
            converted[name] = value.T if key.endswith("_projection") else value
    return converted


def window_of(tensors: Tensors, stage: int, prefix: str = "") -> int:
    """A stage's window, as its table of (2 * window - 1) ** 2 rows tells."""
    rows = len(tensors[f"{prefix}layers.{stage}.blocks.0.attn.relative_position_bias_table"])
    return (int(rows**0.5) + 1) // 2


@pytest.fixture(scope="session")
def parity(parity_file) -> Callable[[str, str], dict[str, Any]]:
    """One case of one file of `../shared/parity`."""
    return lambda file, case: parity_file(file)[case]


# ------------------------------------------------------------------------------------------------------------ UniCL

UNICL_CASES = pytest.mark.parametrize("case", ["square_shrunk_last", "nonsquare"])


def unicl_model(case: dict[str, Any], **fields: Any) -> FlorenceModel:
    image, text, tensors = case["config"]["IMAGE_ENCODER"], case["config"]["TEXT_ENCODER"], case["state_dict"]
    swin = image["SWIN"]
    config = FlorenceConfig(
        vision_config=dict(
            image_size=image["IMG_SIZE"],
            num_channels=swin["IN_CHANS"],
            embed_dim=swin["EMBED_DIM"],
            depths=swin["DEPTHS"],
            num_heads=swin["NUM_HEADS"],
            window_size=[window_of(tensors, stage, "image_encoder.") for stage in range(4)],
            window_padding="clamp",
            embed_type="patch",
            mlp_ratio=swin["MLP_RATIO"],
            qkv_bias=swin["QKV_BIAS"],
        ),
        text_config=dict(
            vocab_size=text["VOCAB_SIZE"],
            hidden_size=text["WIDTH"],
            intermediate_size=4 * text["WIDTH"],
            num_hidden_layers=text["LAYERS"],
            num_attention_heads=text["HEADS"],
            max_position_embeddings=text["CONTEXT_LENGTH"],
            causal=text["AUTOGRESSIVE"],
            layer_norm_eps=1e-12,
        ),
        projection_dim=case["config"]["DIM_PROJECTION"],
        **fields,
    )
    model = FlorenceModel(config)
    model.load_state_dict(convert(tensors, UNICL))
    return model.eval()


@UNICL_CASES
@torch.no_grad()
def test_unicl_towers(parity, case):
    case = parity("unicl.pt", case)
    model, inputs, expected = unicl_model(case), case["inputs"], case["outputs"]
    image = model.get_image_features(inputs["image"], output_hidden_states=True)
    text = model.get_text_features(inputs["input_ids"])
    assert_close(image.hidden_states[0].flatten(1, 2), expected["patch_embed"], rtol=0, atol=1e-5)
    # UniCL's stages end with the next one's merging; the last ends with its layers, before the norm.
    merged = [*(stage.embed for stage in model.vision_model.encoder.stages[1:]), lambda hidden_states: hidden_states]
    for stage, (embed, hidden_states) in enumerate(zip(merged, image.hidden_states[1:], strict=True)):
        assert_close(embed(hidden_states).flatten(1, 2), expected[f"stage{stage}"], rtol=0, atol=2e-5)
    assert_close(image.last_hidden_state.mean(dim=1), expected["pooled"], rtol=0, atol=1e-5)
    assert_close(image.pooler_output, expected["image_unnormed"], rtol=0, atol=1e-5)
    assert_close(text.last_hidden_state, expected["text_last_hidden_state"], rtol=0, atol=1e-5)
    assert_close(text.pooler_output, expected["text_unnormed"], rtol=0, atol=1e-5)


@UNICL_CASES
@torch.no_grad()
def test_unicl_in_double_precision(parity, case):
    case = parity("unicl.pt", case)
    image = unicl_model(case).double().get_image_features(case["inputs"]["image"].double())
    assert_close(image.last_hidden_state.mean(dim=1), case["outputs64"]["pooled"], rtol=0, atol=1e-9)
    assert_close(image.pooler_output, case["outputs64"]["image_unnormed"], rtol=0, atol=1e-9)


@UNICL_CASES
@pytest.mark.parametrize("reduction, key", [("sum", "loss_paper_total"), ("mean", "loss_mean_half")])
@torch.no_grad()
def test_unicl_logits_and_losses(parity, case, reduction, key):
    case = parity("unicl.pt", case)
    inputs, expected = case["inputs"], case["outputs"]
    texts = dict(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    model = unicl_model(case, loss_reduction=reduction)
    output = model(pixel_values=inputs["image"], labels=inputs["labels"], **texts)
    assert_close(output.image_embeds, expected["image_features"], rtol=0, atol=1e-5)
    assert_close(output.text_embeds, expected["text_features"], rtol=0, atol=1e-5)
    assert_close(output.logit_scale, expected["logit_scale_exp"], rtol=0, atol=1e-5)
    assert_close(output.logits_per_image, expected["logits_per_image"], rtol=0, atol=1e-5)
    assert_close(output.logits_per_text, expected["logits_per_image"].T, rtol=0, atol=1e-5)
    assert output.loss.item() == pytest.approx(expected[key].item(), rel=1e-5)
    # From the saved features themselves, in double precision.
    features = [F.normalize(expected[f"{side}_unnormed"].double(), dim=-1) for side in ("image", "text")]
    loss = unicl_loss(*features, inputs["labels"], expected["logit_scale_exp"].double(), reduction)
    assert loss.item() == pytest.approx(expected[key].item(), rel=1e-6)


@UNICL_CASES
def test_unicl_gradients(parity, case):
    case = parity("unicl.pt", case)
    inputs = case["inputs"]
    model = unicl_model(case, loss_reduction="mean")
    model(input_ids=inputs["input_ids"], pixel_values=inputs["image"], labels=inputs["labels"]).loss.backward()
    parameters = dict(model.named_parameters())
    gradients = convert(case["grads"], UNICL)
    assert len(gradients) == 9
    for name, expected in gradients.items():
        assert_close(
            parameters[name].grad, expected, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


# ----------------------------------------------------------------------------------------------------------- CoSwin

COSWIN_CASES = pytest.mark.parametrize("case", ["conv_w4_layerscale", "swin_v1_padded"])
STAGES = ["stage1", "stage2", "stage3", "stage4"]


def coswin_fields(case: dict[str, Any]) -> dict[str, Any]:
    """GLIP's options as ours. Its version 2 embeds with convolutions and may scale both branches by one `gamma`."""
    source = case["config"]
    return dict(
        embed_dim=source["embed_dim"],
        depths=source["depths"],
        num_heads=source["num_heads"],
        window_size=source["window_size"],
        window_padding="pad",
        embed_type="conv" if source["cls"] == "swint_v2" else "patch",
        layer_scale_init_value=1e-4 if source.get("layer_scale") else None,
        out_features=STAGES,
    )


def coswin_backbone(case: dict[str, Any]) -> FlorenceBackbone:
    table = [(r"norm(\d)\.", r"feature_norms.stageNEXT(\1)."), *[(key, "vision_model." + to) for key, to in TOWER]]
    model = FlorenceBackbone(FlorenceVisionConfig(**coswin_fields(case)))
    model.load_state_dict(convert(case["state_dict"], table))
    return model.eval()


def padded(image: torch.Tensor, config: FlorenceVisionConfig) -> torch.Tensor:
    """GLIP's convolutional embedding pads pictures to a multiple of its kernel, seven, at the right and below."""
    height, width = image.shape[2:]
    return F.pad(image, (0, -width % 7, 0, -height % 7)) if config.embed_type == "conv" else image


@COSWIN_CASES
@pytest.mark.parametrize("key, dtype, tolerance", [("stages", torch.float32, 1e-5), ("stages64", torch.float64, 1e-9)])
@torch.no_grad()
def test_coswin_feature_maps(parity, case, key, dtype, tolerance):
    case = parity("coswin.pt", case)
    model = coswin_backbone(case).to(dtype)
    for picture in case["cases"]:
        pixel_values = padded(picture["image"], model.config).to(dtype)
        output = model(pixel_values, output_hidden_states=True)
        stem = output.hidden_states[0].permute(0, 3, 1, 2)
        assert_close(stem.float(), picture["patch_embed"], rtol=0, atol=1e-5)
        assert len(output.feature_maps) == 4
        for feature, expected in zip(output.feature_maps, picture[key], strict=True):
            assert_close(feature, expected, rtol=0, atol=tolerance)


@COSWIN_CASES
@torch.no_grad()
def test_coswin_tower(parity, case):
    """The last map's norm is the classification tower's final norm."""
    case = parity("coswin.pt", case)
    tensors = {key.replace("norm3.", "norm."): value for key, value in case["state_dict"].items()}
    tensors = {key: value for key, value in tensors.items() if not re.match(r"norm\d", key)}
    model = FlorenceVisionModel(FlorenceVisionConfig(**coswin_fields(case))).eval()
    model.load_state_dict(convert(tensors, TOWER))
    for picture in case["cases"]:
        output = model(padded(picture["image"], model.config))
        expected = picture["stages"][-1].flatten(2).transpose(1, 2)
        assert_close(output.last_hidden_state, expected, rtol=0, atol=1e-5)
        assert_close(output.pooler_output, expected.mean(dim=1), rtol=0, atol=1e-5)
