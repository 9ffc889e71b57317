"""Weights, inputs and outputs of METER's own code: the same numbers from our fusion, heads and losses.

The file lies in the folder `shared` beside the clone, under `parity`; without it these tests skip.
"""

import re
from typing import Any

import pytest
import torch
from torch.testing import assert_close
from transformers import RobertaConfig

from tests.tiny_florence import tiny_vision_config
from transformers_florence.configuration_florence_fusion import FlorenceFusionConfig
from transformers_florence.losses_fusion import answer_loss, matching_loss, token_loss
from transformers_florence.modeling_florence_fusion_heads import FlorenceForPreTraining, FlorenceForQuestionAnswering

# (pattern of METER's key, ours); None for what has no place in our model.
TABLE: list[tuple[str, str | None]] = [
    (r"vit_model\.", None),  # of an image tower that is not Florence's
    (r"text_transformer\.pooler\.", None),  # METER does not call it
    (r"text_transformer\.", "model.text_model."),
    (r"cross_modal_(text|image)_transform\.", r"model.\1_transform."),
    (r"cross_modal_(text|image)_pooler\.dense\.", r"model.\1_pooler."),
    (r"token_type_embeddings\.", "model.token_type_embeddings."),
    (r"cross_modal_(text|image)_layers\.(\d+)\.output\.LayerNorm\.", r"model.fusion.\1_layers.\2.mlp_norm."),
    (r"cross_modal_(text|image)_layers\.(\d+)\.intermediate\.dense\.", r"model.fusion.\1_layers.\2.mlp.fc1."),
    (r"cross_modal_(text|image)_layers\.(\d+)\.output\.dense\.", r"model.fusion.\1_layers.\2.mlp.fc2."),
    (r"cross_modal_(text|image)_layers\.(\d+)\.", r"model.fusion.\1_layers.\2."),
    (r"itm_score\.fc\.", "itm_head."),
    (r"mlm_score\.bias", "mlm_head.vocabulary.bias"),
    (r"mlm_score\.transform\.dense\.", "mlm_head.transform."),
    (r"mlm_score\.transform\.LayerNorm\.", "mlm_head.norm."),
    (r"mlm_score\.decoder\.", "mlm_head.vocabulary."),
    (r"vqa_classifier\.", "classifier."),
]
PARTS = {
    r"\.attention\.(?=self|output)": ".self_attention.",
    r"\.crossattention\.": ".cross_attention.",
    r"\.self\.(q|k|v)\w+\.": r".\1_proj.",
    r"_attention\.output\.dense\.": "_attention.out_proj.",
    r"_attention\.output\.LayerNorm\.": "_attention_norm.",
}


def convert(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """METER's tensors under our keys; a key that no pattern fits is an error."""
    converted = {}
    for key, tensor in tensors.items():
        source, target = next(row for row in TABLE if re.match(row[0], key))
        if target is None:
            continue
        name = re.sub("^" + source, target, key)
        if ".fusion." in name:
            for pattern, part in PARTS.items():
                name = re.sub(pattern, part, name)
        converted[name] = tensor
    return converted


@pytest.fixture(scope="module")
def parity(parity_file) -> dict[str, Any]:
    return parity_file("meter.pt")


def build(model_class, case: dict[str, Any]):
    source = case["config"]
    embed_dim = source["input_image_embed_size"] // 2  # two stages
    config = FlorenceFusionConfig(
        vision_config=tiny_vision_config(embed_dim=embed_dim),
        text_config=RobertaConfig(
            vocab_size=source["vocab_size"],
            hidden_size=source["input_text_embed_size"],
            intermediate_size=4 * source["input_text_embed_size"],
            num_hidden_layers=2,
            num_attention_heads=source["num_heads"],
            max_position_embeddings=14,
            type_vocab_size=1,
            layer_norm_eps=1e-5,
        ),
        hidden_size=source["hidden_size"],
        num_hidden_layers=source["num_top_layer"],
        num_attention_heads=source["num_heads"],
        mlp_ratio=source["mlp_ratio"],
        num_labels=source["vqav2_label_size"],
    )
    model = model_class(config)
    incompatible = model.load_state_dict(convert(case["state_dict"]), strict=False)
    assert incompatible.unexpected_keys == []
    assert all(name.startswith("model.vision_model.") for name in incompatible.missing_keys)
    return model.eval()


@torch.no_grad()
def test_features_are_meters(parity):
    case = parity["swin_grid_itm_mlm"]
    inputs, expected = case["inputs"], case["outputs"]
    model = build(FlorenceForPreTraining, case).model
    text = model.encode_texts(inputs["text_ids"], inputs["text_masks"])
    shown = inputs["text_masks"].bool()
    assert_close(text[shown], expected["text_encoder"][shown], rtol=0, atol=1e-5)
    output = model(inputs["text_ids"], None, inputs["text_masks"], image_embeds=inputs["image"])
    assert_close(output.text_features[shown], expected["text_feats"][shown], rtol=0, atol=1e-5)
    assert_close(output.image_features, expected["image_feats"], rtol=0, atol=1e-5)
    assert_close(output.pooler_output, expected["cls_feats"], rtol=0, atol=1e-5)


@torch.no_grad()
def test_masked_language_modelling_is_meters(parity):
    case = parity["swin_grid_itm_mlm"]
    inputs, expected = case["inputs"], case["outputs"]
    model = build(FlorenceForPreTraining, case)
    output = model(inputs["text_ids_mlm"], None, inputs["text_masks"], image_embeds=inputs["image"])
    shown = inputs["text_masks"].bool()
    assert_close(output.mlm_logits[shown], expected["mlm_logits"][shown], rtol=0, atol=1e-5)
    assert_close(token_loss(output.mlm_logits, inputs["text_labels_mlm"]), expected["mlm_loss"], rtol=0, atol=1e-5)
    trained = model(
        inputs["text_ids_mlm"],
        None,
        inputs["text_masks"],
        image_embeds=inputs["image"],
        labels=inputs["text_labels_mlm"],
    )
    assert_close(trained.mlm_loss, expected["mlm_loss"], rtol=0, atol=1e-5)


@torch.no_grad()
def test_matching_is_meters(parity):
    """METER keeps the picture of the pairs labelled 1 and takes another for the rest."""
    case = parity["swin_grid_itm_mlm"]
    inputs, expected = case["inputs"], case["outputs"]
    model = build(FlorenceForPreTraining, case)
    labels = expected["itm_labels"].long()
    images = torch.where(labels[:, None, None] == 1, inputs["image"], inputs["image2"])
    output = model(inputs["text_ids"], None, inputs["text_masks"], image_embeds=images)
    assert_close(output.itm_logits, expected["itm_logits"], rtol=0, atol=1e-5)
    assert_close(matching_loss(output.itm_logits, labels), expected["itm_loss"], rtol=0, atol=1e-5)


@torch.no_grad()
def test_answers_are_meters(parity):
    """The image tower of this case is CLIP's, whose first token METER pools: its features go into the head here."""
    case = parity["clip16_vqa"]
    expected = case["outputs"]
    model = build(FlorenceForQuestionAnswering, case)
    text, image = expected["text_feats"][:, 0], expected["image_feats"][:, 0]
    pooled = torch.cat((model.model.text_pooler(text), model.model.image_pooler(image)), dim=-1).tanh()
    assert_close(pooled, expected["cls_feats"], rtol=0, atol=1e-5)
    logits = model.classifier(expected["cls_feats"])
    assert_close(logits, expected["vqa_logits"], rtol=0, atol=1e-5)
    assert_close(answer_loss(logits, expected["vqa_targets"]), expected["vqa_loss"], rtol=0, atol=1e-5)
