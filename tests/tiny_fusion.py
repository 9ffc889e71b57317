"""Fusion and captioning small enough for a test: configurations and texts."""

import torch
from tokenizers import pre_tokenizers
from transformers import BertConfig, PreTrainedConfig, RobertaConfig, RobertaTokenizer, XLMRobertaConfig

from tests.tiny_florence import tiny_image_processor, tiny_text_config, tiny_vision_config
from transformers_florence import FlorenceProcessor
from transformers_florence.configuration_florence_fusion import FlorenceCaptioningConfig, FlorenceFusionConfig

VOCABULARY, TOKENS = 261, 9  # five special tokens and the bytes
ANSWERS = {0: "no", 1: "yes", 2: "red", 3: "two", 4: "a dog"}
ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 42,
}


def text_configs() -> dict[str, PreTrainedConfig]:
    """One of each kind of text encoder."""
    return {
        "roberta": RobertaConfig(**ENCODER),
        "xlm-roberta": XLMRobertaConfig(**ENCODER),
        "bert": BertConfig(**ENCODER),
        "florence": tiny_text_config(),
    }


def tiny_fusion_config(**fields) -> FlorenceFusionConfig:
    """A RoBERTa, and two layers of four heads; no dropout anywhere, so that training mode is as repeatable."""
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return FlorenceFusionConfig(
        **{
            "vision_config": tiny_vision_config(drop_path_rate=0.0),
            "text_config": RobertaConfig(**ENCODER, **still),
            "hidden_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
            "id2label": ANSWERS,
            "label2id": {name: number for number, name in ANSWERS.items()},
            **fields,
        }
    )


def tiny_captioning_config(**fields) -> FlorenceCaptioningConfig:
    return FlorenceCaptioningConfig(
        **{
            "vision_config": tiny_vision_config(drop_path_rate=0.0),
            "vocab_size": VOCABULARY,
            "hidden_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 16,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
            **fields,
        }
    )


def random_texts(count: int = 3, seed: int = 0, tokens: int = TOKENS) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask`, (count, tokens), as of RoBERTa's tokenizer: 0 first, 2 last, 1 behind."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(5, VOCABULARY, (count, tokens), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    input_ids[:, 0] = 0
    for row in range(count):
        length = max(2, tokens - row % 4)
        input_ids[row, length - 1], input_ids[row, length:], attention_mask[row, length:] = 2, 1, 0
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def tiny_roberta_tokenizer(model_max_length: int = 40) -> RobertaTokenizer:
    """RoBERTa's with the bytes alone; as many tokens as `tiny_fusion_config` has."""
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokens = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocab = {token: number for number, token in enumerate(tokens)}
    return RobertaTokenizer(vocab=vocab, merges=[], model_max_length=model_max_length)


def tiny_fusion_processor() -> FlorenceProcessor:
    """Florence's pictures, RoBERTa's texts."""
    return FlorenceProcessor(tiny_image_processor(), tiny_roberta_tokenizer())
