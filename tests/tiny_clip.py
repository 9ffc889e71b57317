"""transformers' own CLIP and SigLIP with random weights, as small as the tiny Florence, and pictures for them."""

import json
from pathlib import Path

import torch
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    SiglipConfig,
    SiglipModel,
)

from tests.tiny_florence import CONTEXT, DIM, SIDE, VOCABULARY, tiny_tokenizer

SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}


def tiny_clip_tokenizer() -> CLIPTokenizer:
    """CLIP's own class, with the vocabulary of the tiny Florence."""
    learnt = json.loads(tiny_tokenizer().backend_tokenizer.to_str())["model"]
    merges = [tuple(merge) for merge in learnt["merges"]]
    return CLIPTokenizer(vocab=learnt["vocab"], merges=merges, model_max_length=CONTEXT)


def tiny_clip() -> tuple[CLIPModel, CLIPTokenizer]:
    tokenizer = tiny_clip_tokenizer()
    text = {"vocab_size": VOCABULARY, "max_position_embeddings": CONTEXT, "eos_token_id": tokenizer.eos_token_id}
    config = CLIPConfig(
        text_config={**SHAPE, **text, "bos_token_id": tokenizer.bos_token_id},
        vision_config={**SHAPE, "image_size": SIDE, "patch_size": 8},
        projection_dim=DIM,
    )
    return CLIPModel(config).eval(), tokenizer


def tiny_siglip() -> tuple[SiglipModel, CLIPTokenizer]:
    """With another bias and scale than a new one, and CLIP's tokenizer: SentencePiece cannot be learnt in a test."""
    config = SiglipConfig(
        text_config={**SHAPE, "vocab_size": VOCABULARY, "max_position_embeddings": CONTEXT},
        vision_config={**SHAPE, "image_size": SIDE, "patch_size": 8},
    )
    model = SiglipModel(config).eval()
    with torch.no_grad():
        model.logit_scale.fill_(1.5)
        model.logit_bias.fill_(-0.7)
    return model, tiny_clip_tokenizer()


def tiny_clip_image_processor() -> CLIPImageProcessor:
    size = {"height": SIDE, "width": SIDE}
    return CLIPImageProcessor(size=size, crop_size=size, do_center_crop=False)


def save_peer(kind: str, folder: Path) -> tuple[CLIPModel | SiglipModel, CLIPProcessor]:
    """A tiny "clip" or "siglip" with its processor in a folder, as scripts take it."""
    model, tokenizer = {"clip": tiny_clip, "siglip": tiny_siglip}[kind]()
    processor = CLIPProcessor(tiny_clip_image_processor(), tokenizer)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor
