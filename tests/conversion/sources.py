"""The other side of the comparisons: towers as their authors wrote them, and files in the layouts of the releases."""

import math
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from torchvision.models.swin_transformer import SwinTransformer
from transformers.activations import ACT2FN

from tests.oracles import randomize

# How near a converted tower must be to its source, by the precision that both compute in.
PRECISIONS = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-9)], ids=["float32", "float64"]
)

Tensors = dict[str, torch.Tensor]
WINDOW, SIDE, DEPTHS, HEADS, DIM = 7, 112, [1, 2, 2], [1, 2, 4], 8  # the last map is as large as the window


@torch.no_grad()
def random_weights(model: nn.Module, seed: int = 0) -> nn.Module:
    """`randomize`, with norms about one whatever their names."""
    generator = torch.Generator().manual_seed(seed)
    for module in randomize(model, seed).modules():
        if isinstance(module, nn.LayerNorm):
            module.weight.copy_(1 + 0.2 * torch.randn(module.weight.shape, generator=generator))
    return model


class Block(nn.Module):
    """A block of CLIP's text transformer, with PyTorch's own attention."""

    def __init__(self, width: int, heads: int, activation: str, eps: float) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads)
        self.ln_1 = nn.LayerNorm(width, eps)
        layers = {
            "c_fc": nn.Linear(width, 4 * width),
            "gelu": ACT2FN[activation],
            "c_proj": nn.Linear(4 * width, width),
        }
        self.mlp = nn.Sequential(OrderedDict(layers))
        self.ln_2 = nn.LayerNorm(width, eps)

    def forward(self, hidden_states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """(tokens, batch, width) -> same shape."""
        normed = self.ln_1(hidden_states)
        hidden_states = hidden_states + self.attn(normed, normed, normed, attn_mask=mask, need_weights=False)[0]
        return hidden_states + self.mlp(self.ln_2(hidden_states))


class TextTower(nn.Module):
    """CLIP's text transformer under its authors' names; UniCL's is the one of `eps=1e-12`."""

    def __init__(self, activation: str = "quick_gelu", eps: float = 1e-12, *, vocabulary: int = 560) -> None:
        super().__init__()
        width, heads, context = 64, 1, 12
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.positional_embedding = nn.Parameter(torch.empty(context, width))
        self.resblocks = nn.ModuleList(Block(width, heads, activation, eps) for _ in range(2))
        self.ln_final = nn.LayerNorm(width, eps)
        self.text_projection = nn.Parameter(torch.empty(width, 12))

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(batch, context) -> states (batch, context, width), those at the highest id, and these projected."""
        mask = torch.full((input_ids.shape[1],) * 2, -math.inf, dtype=self.positional_embedding.dtype).triu(1)
        hidden_states = (self.token_embedding(input_ids) + self.positional_embedding).permute(1, 0, 2)
        for block in self.resblocks:
            hidden_states = block(hidden_states, mask)
        hidden_states = self.ln_final(hidden_states.permute(1, 0, 2))
        pooled = hidden_states[torch.arange(len(input_ids)), input_ids.argmax(dim=-1)]
        return hidden_states, pooled, pooled @ self.text_projection


def torchvision_swin(seed: int = 0) -> SwinTransformer:
    """Small, random, without a classifier: from (batch, 3, SIDE, SIDE) to pooled features."""
    swin = SwinTransformer([4, 4], DIM, DEPTHS, HEADS, [WINDOW] * 2, stochastic_depth_prob=0.0, num_classes=3)
    swin.head = nn.Identity()
    return random_weights(swin, seed)


def microsoft_keys(tensors: Tensors) -> Tensors:
    """torchvision's tensors under the names of Microsoft's Swin, whose stages end with the next one's embedding."""
    renamed = {}
    for key, tensor in tensors.items():
        key = key.replace("features.0.0.", "patch_embed.proj.").replace("features.0.2.", "patch_embed.norm.")
        key = key.replace("mlp.0.", "mlp.fc1.").replace("mlp.3.", "mlp.fc2.")
        match = re.match(r"features\.(\d+)\.", key)
        if match:
            index, rest = int(match[1]), key[match.end() :]
            key = f"layers.{index // 2}.blocks.{rest}" if index % 2 else f"layers.{index // 2 - 1}.downsample.{rest}"
        area = WINDOW**2
        renamed[key] = tensor.view(area, area) if key.endswith("relative_position_index") else tensor
    return renamed


# UniCL's names of its image tower, its text tower and their projections, in the order in which they came up.
LAYOUTS = {
    "older": ("visual", "text", "vision_projection", "text_projection"),
    "between": ("image_encoder", "lang_encoder", "image_projection", "lang_projection"),
    "release": ("image_encoder", "text_encoder", "image_projection", "text_projection"),
}


class UniCL(nn.Module):
    """UniCL by its formulas: torchvision's Swin, CLIP's text transformer, two projections, a temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.swin, self.text = torchvision_swin(1), random_weights(TextTower(), 2)
        generator = torch.Generator().manual_seed(3)
        self.image_projection = nn.Parameter(torch.randn(DIM * 4, 12, generator=generator) / 6)
        self.logit_scale = nn.Parameter(torch.tensor(1.7))

    def forward(self, pixels: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Image features, text features, both before they get unit length, and logits (images, texts)."""
        image, text = self.swin(pixels) @ self.image_projection, self.text(ids)[2]
        logits = self.logit_scale.exp() * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T
        return image, text, logits

    def tensors(self, layout: str = "release", *, gradients: bool = False) -> Tensors:
        """Weights, with the buffers that are saved with them, or gradients, under the names of one of `LAYOUTS`."""
        image, text, image_projection, text_projection = LAYOUTS[layout]
        own = {name: parameter.grad if gradients else parameter.data for name, parameter in self.named_parameters()}
        swin = {name.removeprefix("swin."): value for name, value in own.items() if name.startswith("swin.")}
        if not gradients:
            swin |= {**dict(self.swin.named_buffers()), "layers.1.blocks.1.attn_mask": torch.zeros(4, 49, 49)}
        words = {name.removeprefix("text."): value for name, value in own.items() if name.startswith("text.")}
        return {
            text_projection: words.pop("text_projection"),
            image_projection: own["image_projection"],
            "logit_scale": own["logit_scale"],
            **{f"{text}.{name}": value for name, value in words.items()},
            **{f"{image}.{name}": value for name, value in microsoft_keys(swin).items()},
        }


def pixels(count: int = 2, side: int | tuple[int, int] = SIDE) -> torch.Tensor:
    """(count, 3, side, side) in double precision."""
    height, width = (side, side) if isinstance(side, int) else side
    generator = torch.Generator().manual_seed(4)
    return torch.randn(count, 3, height, width, generator=generator, dtype=torch.float64)


def texts(vocabulary: int = 560, context: int = 12) -> torch.Tensor:
    """(3, context): the end token, the highest id, in different places and then again as padding."""
    ids = torch.randint(1, vocabulary - 2, (3, context), generator=torch.Generator().manual_seed(5))
    for row, end in zip(ids, (3, 7, context - 1), strict=True):
        row[end:] = vocabulary - 1
    return ids


def write(path: Path, content: Any) -> Path:
    """A file in the format of its suffix."""
    if path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in content.items()}, path)
    else:
        torch.save(content, path)
    return path
