"""Configurations of fusion and captioning: defaults, round trips, every impossible value by name."""

import pytest
from transformers import BertConfig, CLIPTextConfig, PreTrainedConfig, RobertaConfig

from tests.tiny_florence import tiny_config, tiny_vision_config
from tests.tiny_fusion import ENCODER, text_configs, tiny_captioning_config, tiny_fusion_config
from transformers_florence import FlorenceTextConfig, FlorenceVisionConfig
from transformers_florence.configuration_florence_fusion import FlorenceCaptioningConfig, FlorenceFusionConfig

NOT_A_NUMBER = float("nan")


def test_the_defaults_are_meters():
    config = FlorenceFusionConfig()
    shape = (config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.mlp_ratio)
    assert shape == (768, 6, 12, 4) and config.layer_norm_eps == 1e-12 and config.hidden_dropout == 0.1
    assert type(config.text_config) is RobertaConfig and type(config.vision_config) is FlorenceVisionConfig


@pytest.mark.parametrize("kind", ["roberta", "xlm-roberta", "bert", "florence"])
def test_a_folder_gives_the_text_encoders_class_back(kind, tmp_path):
    config = tiny_fusion_config(text_config=text_configs()[kind])
    config.save_pretrained(tmp_path)
    loaded = FlorenceFusionConfig.from_pretrained(tmp_path)
    assert type(loaded.text_config) is type(config.text_config)
    assert loaded == config and loaded.id2label == config.id2label
    assert loaded.get_text_config() is loaded.text_config


@pytest.mark.parametrize("kind, tokens", [("roberta", 40), ("xlm-roberta", 40), ("bert", 42), ("florence", 12)])
def test_how_long_a_text_may_be(kind, tokens):
    """RoBERTa's positions start behind its padding token's id, 1: two rows of 42 are for no token."""
    assert tiny_fusion_config(text_config=text_configs()[kind]).max_text_tokens == tokens


def test_a_dual_encoders_towers_are_taken_over():
    dual = tiny_config()
    config = FlorenceFusionConfig.from_florence_config(dual, hidden_size=24, num_attention_heads=2)
    assert config.vision_config == dual.vision_config and config.text_config == dual.text_config
    assert type(config.text_config) is FlorenceTextConfig and config.hidden_size == 24


def test_captioning_round_trip_and_special_tokens(tmp_path):
    config = tiny_captioning_config()
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (259, 260, 260)
    config.save_pretrained(tmp_path)
    assert FlorenceCaptioningConfig.from_pretrained(tmp_path) == config
    assert tiny_captioning_config(bos_token_id=0, eos_token_id=2, pad_token_id=1).pad_token_id == 1


@pytest.mark.parametrize("make", [tiny_fusion_config, tiny_captioning_config])
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 0}, "`hidden_size`: expected an integer between 1 and"),
        ({"hidden_size": True}, "`hidden_size`"),
        ({"num_attention_heads": 5}, "`num_attention_heads`: expected a divisor of hidden_size=24, got 5"),
        ({"num_hidden_layers": -1}, "`num_hidden_layers`"),
        ({"num_hidden_layers": 10**9}, "`num_hidden_layers`"),
        ({"mlp_ratio": NOT_A_NUMBER}, "`mlp_ratio`"),
        ({"mlp_ratio": 1e9}, "`mlp_ratio`"),
        ({"hidden_act": "eval"}, "`hidden_act`: expected one of 'gelu'"),
        ({"hidden_dropout": 1.5}, "`hidden_dropout`"),
        ({"attention_dropout": -0.1}, "`attention_dropout`"),
        ({"layer_norm_eps": 0.0}, "`layer_norm_eps`"),
        ({"initializer_range": 0.0}, "`initializer_range`"),
        ({"hidden_size": 65536, "num_hidden_layers": 1000}, "at most 2e"),
        ({"vision_config": 3}, "`vision_config`: expected a FlorenceVisionConfig"),
        ({"vision_config": {"model_type": "swin"}}, "`vision_config.model_type`: expected 'florence_vision_model'"),
        ({"vision_config": {"depths": [0]}}, "depths"),
        ({"attn_implementation": "owner/kernel"}, "`attn_implementation`"),
    ],
)
def test_impossible_values(make, fields, message):
    with pytest.raises(ValueError, match=message):
        make(**fields)


@pytest.mark.parametrize(
    ("text_config", "message"),
    [
        (3, "`text_config`: expected the configuration of a text encoder"),
        ({"model_type": "llama"}, "`text_config.model_type`: expected one of 'roberta', 'xlm-roberta', 'bert'"),
        (CLIPTextConfig(), "`text_config`: expected one of RobertaConfig, .* got 'CLIPTextConfig'"),
        (tiny_vision_config(), "got 'FlorenceVisionConfig'"),
        (BertConfig(is_decoder=True, **ENCODER), "`text_config`: expected an encoder"),
        (RobertaConfig(**{**ENCODER, "max_position_embeddings": 2}), "the context of `text_config`"),
        (BertConfig(**{**ENCODER, "vocab_size": 1 << 40}), "`text_config.vocab_size`"),
        ({"model_type": "florence_text_model", "hidden_size": 0}, "`hidden_size`"),
    ],
)
def test_impossible_text_encoders(text_config, message):
    with pytest.raises(ValueError, match=message):
        tiny_fusion_config(text_config=text_config)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vocab_size": 1}, "`vocab_size`"),
        ({"max_position_embeddings": 1}, "`max_position_embeddings`"),
        ({"num_hidden_layers": 0}, "`num_hidden_layers`"),
        ({"eos_token_id": 261}, "`eos_token_id`: expected an integer between 0 and 260, got 261"),
        ({"bos_token_id": 5, "eos_token_id": 5}, "`bos_token_id`: expected another token than eos_token_id=5"),
    ],
)
def test_impossible_captioning(fields, message):
    with pytest.raises(ValueError, match=message):
        tiny_captioning_config(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"fusion_type": "late"}, "`fusion_type`: expected one of 'co_attention', 'merged_attention', got 'late'"),
        ({"num_decoder_layers": -1}, "`num_decoder_layers`: expected an integer between 0 and 1000"),
    ],
)
def test_impossible_kinds_of_fusion(fields, message):
    with pytest.raises(ValueError, match=message):
        tiny_fusion_config(**fields)


def test_no_layer_of_fusion_is_possible():
    assert tiny_fusion_config(num_hidden_layers=0).num_hidden_layers == 0
    own = text_configs()["florence"]
    with pytest.raises(ValueError, match="`num_hidden_layers`: expected an integer between 1"):
        tiny_fusion_config(num_hidden_layers=0, text_config=own)  # causal: its first token knows nothing of the text
    own.causal = False
    assert tiny_fusion_config(num_hidden_layers=0, text_config=own).num_hidden_layers == 0


def test_model_types_are_their_own():
    kinds = {config.model_type for config in (FlorenceFusionConfig, FlorenceCaptioningConfig)}
    assert kinds == {"florence_fusion", "florence_captioning"} and PreTrainedConfig.model_type not in kinds


@pytest.mark.parametrize("kind", ["dual encoder", "image tower"])
def test_a_folder_of_an_image_tower_starts_a_captioning_model(kind, tmp_path):
    config = tiny_config() if kind == "dual encoder" else tiny_vision_config()
    config.save_pretrained(tmp_path)
    loaded = FlorenceCaptioningConfig.from_pretrained(tmp_path, hidden_size=24, num_attention_heads=2)
    assert loaded.vision_config == (config.vision_config if kind == "dual encoder" else config)
    assert loaded.hidden_size == 24 and loaded.model_type == "florence_captioning"
