"""Independent implementations that tests compare with, holding the same weights as a model of ours.

A key table is a list of (pattern of our key, key of the other model); `rename` applies the first pattern that fits.
"""

import re
from collections.abc import Callable

import torch
from torch import nn
from torchvision.models.swin_transformer import ShiftedWindowAttention, SwinTransformer
from transformers import SwinConfig, SwinModel

from transformers_florence.modeling_florence_vision import FlorenceVisionModel

Tensors = dict[str, torch.Tensor]
KeyTable = list[tuple[str, str | Callable[[re.Match], str]]]

TORCHVISION_SWIN: KeyTable = [
    (r"embeddings\.projection\.", "features.0.0."),
    (r"embeddings\.norm\.", "features.0.2."),
    (r"encoder\.stages\.(\d+)\.embed\.", lambda match: f"features.{2 * int(match[1])}."),
    (
        r"encoder\.stages\.(\d+)\.layers\.(\d+)\.mlp\.fc([12])\.",
        lambda match: f"features.{2 * int(match[1]) + 1}.{match[2]}.mlp.{'03'[int(match[3]) - 1]}.",
    ),
    (
        r"encoder\.stages\.(\d+)\.layers\.(\d+)\.attention\.",
        lambda match: f"features.{2 * int(match[1]) + 1}.{match[2]}.attn.",
    ),
    (
        r"encoder\.stages\.(\d+)\.layers\.(\d+)\.(norm[12])\.",
        lambda match: f"features.{2 * int(match[1]) + 1}.{match[2]}.{match[3]}.",
    ),
    (r"norm\.", "norm."),
]

TRANSFORMERS_SWIN: KeyTable = [
    (r"embeddings\.projection\.", "embeddings.patch_embeddings.projection."),
    (r"embeddings\.norm\.", "embeddings.norm."),
    (r"encoder\.stages\.(\d+)\.embed\.", lambda match: f"encoder.layers.{int(match[1]) - 1}.downsample."),
    (
        r"encoder\.stages\.(\d+)\.layers\.(\d+)\.attention\.relative_position_bias_table",
        r"encoder.layers.\1.blocks.\2.attention.relative_position_bias.relative_position_bias_table",
    ),
    (
        r"encoder\.stages\.(\d+)\.layers\.(\d+)\.attention\.out_proj\.",
        r"encoder.layers.\1.blocks.\2.attention.o_proj.",
    ),
    (r"encoder\.stages\.(\d+)\.layers\.(\d+)\.norm1\.", r"encoder.layers.\1.blocks.\2.layernorm_before."),
    (r"encoder\.stages\.(\d+)\.layers\.(\d+)\.norm2\.", r"encoder.layers.\1.blocks.\2.layernorm_after."),
    (r"encoder\.stages\.(\d+)\.layers\.(\d+)\.", r"encoder.layers.\1.blocks.\2."),
    (r"norm\.", "layernorm."),
]


def rename(key: str, table: KeyTable) -> str:
    """The other model's key; a key that no pattern fits is an error, so that nothing is left out unseen."""
    for pattern, target in table:
        renamed, count = re.subn("^" + pattern, target, key)
        if count:
            return renamed
    raise KeyError(key)


def fuse_qkv(tensors: Tensors) -> Tensors:
    """Separate projections `.q_proj.`, `.k_proj.`, `.v_proj.` as one `.qkv.`, and `.out_proj.` as `.proj.`."""
    fused = {key: value for key, value in tensors.items() if not re.search(r"\.[qkv]_proj\.", key)}
    for key in tensors:
        if ".q_proj." in key:
            parts = [tensors[key.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"]
            fused[key.replace(".q_proj.", ".qkv.")] = torch.cat(parts)
    return {key.replace(".out_proj.", ".proj."): value for key, value in fused.items()}


@torch.no_grad()
def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights of which every one shows in the output (fresh models have zero biases and unit norms); eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if parameter.ndim > 1 and "bias_table" not in name:
            noise = noise / parameter[0].numel() ** 0.5
        elif name.endswith(("norm.weight", "norm1.weight", "norm2.weight")):
            noise = 1 + 0.2 * noise
        else:
            noise = noise if "bias_table" in name else 0.2 * noise
        parameter.copy_(noise)
    return model.eval()


def torchvision_swin(model: FlorenceVisionModel) -> SwinTransformer:
    """torchvision's Swin with the model's weights; its head is the identity, so it returns the pooled output.

    It is UniCL's Swin where every map is larger than its stage's window or a square of its size.
    """
    config = model.config
    depths, heads = list(config.depths), list(config.num_heads)
    peer = SwinTransformer([4, 4], config.embed_dim, depths, heads, [config.window_sizes[0]] * 2, num_classes=1)
    peer.head = nn.Identity()
    for stage, (dim, window) in enumerate(zip(config.embed_dims, config.window_sizes, strict=True)):
        for depth, block in enumerate(peer.features[2 * stage + 1]):
            shift = window // 2 if depth % 2 else 0
            block.attn = ShiftedWindowAttention(dim, [window] * 2, [shift] * 2, heads[stage])
    tensors = {rename(key, TORCHVISION_SWIN): value for key, value in model.state_dict().items()}
    buffers = {key: value for key, value in peer.state_dict().items() if key.endswith("relative_position_index")}
    peer.load_state_dict(fuse_qkv(tensors) | buffers)
    return peer.to(model.dtype).eval()


def transformers_swin(model: FlorenceVisionModel) -> SwinModel:
    """transformers' Swin with the model's weights; call it with `always_partition=True` for detection's convention.

    Make a new one for each size: a small picture changes its windows for good. Its norms' epsilon is 1e-5.
    """
    config = model.config
    fields = dict(
        image_size=config.image_size,
        num_channels=config.num_channels,
        embed_dim=config.embed_dim,
        depths=list(config.depths),
        num_heads=list(config.num_heads),
        window_size=config.window_size,
        mlp_ratio=config.mlp_ratio,
        qkv_bias=config.qkv_bias,
        hidden_act=config.hidden_act,
        drop_path_rate=0.0,
    )
    peer = SwinModel(SwinConfig(**fields))
    peer.load_state_dict({rename(key, TRANSFORMERS_SWIN): value for key, value in model.state_dict().items()})
    return peer.to(model.dtype).eval()
