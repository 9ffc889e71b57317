"""What vision and language cost: a training step of the fusion beside its peers, many questions, generation's cache.

    python benchmarks/fusion.py
    python benchmarks/fusion.py --width 256 --layers 2 --heads 4 --batch 16 --rounds 3

The training step is forward, loss and backward of the two stacks alone, at METER's size unless told otherwise, with
dropout, in float32. Its peers have the same weights to learn: METER's structure in plain PyTorch (attention as two
matrix products and a softmax), and transformers' BridgeTower layers, which are METER's. All take turns, round by
round; the table holds medians. The questions are about one picture of the bundled tower: twenty of them in one call of
`image_rows`, beside one. Captions are 20 tokens, greedy, by a decoder of the fusion's size with CLIP's vocabulary over
the tokens of a picture of 224 pixels (49) or 448 (196). Times are processor seconds of this process, so that one
thread is as good as told even on a busy machine.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from tqdm import tqdm
from transformers import BridgeTowerTextConfig
from transformers.models.bridgetower.modeling_bridgetower import BridgeTowerBertCrossLayer

from transformers_florence import (
    FlorenceCaptioningConfig,
    FlorenceForImageCaptioning,
    FlorenceForQuestionAnswering,
    FlorenceFusionConfig,
    bundled_checkpoint,
)
from transformers_florence.fusion import FusionEncoder, MergedFusionEncoder

TEXT_TOKENS, IMAGE_TOKENS = 40, 144  # of a question, padded; of a picture of 384 pixels
QUESTIONS, WRITTEN = 20, 20


class PlainAttention(nn.Module):
    """BERT's attention by its formula."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim) for _ in range(4))
        self.norm, self.dropout = nn.LayerNorm(dim, eps=1e-12), nn.Dropout(dropout)

    def forward(self, states: torch.Tensor, source: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        def split(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        query, key, value = split(self.query(states)), split(self.key(source)), split(self.value(source))
        scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
        weights = self.dropout((scores if mask is None else scores + mask).softmax(dim=-1))
        return self.norm(states + self.dropout(self.out((weights @ value).transpose(1, 2).flatten(2))))


class PlainLayer(nn.Module):
    """METER's layer of one modality."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.own, self.cross = PlainAttention(dim, heads, dropout), PlainAttention(dim, heads, dropout)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.norm, self.dropout = nn.LayerNorm(dim, eps=1e-12), nn.Dropout(dropout)

    def forward(self, states, other, mask, other_mask):
        states = self.cross(self.own(states, states, mask), other, other_mask)
        return self.norm(states + self.dropout(self.mlp(states)))


class Peer(nn.Module):
    """Two stacks of a peer's layers, updated as METER does."""

    def __init__(self, make: Callable[[], nn.Module], layers: int) -> None:
        super().__init__()
        self.text, self.image = (nn.ModuleList(make() for _ in range(layers)) for _ in range(2))

    def forward(self, text: torch.Tensor, image: torch.Tensor, mask: torch.Tensor):
        added = (1 - mask.to(text.dtype))[:, None, None, :] * torch.finfo(text.dtype).min
        for text_layer, image_layer in zip(self.text, self.image, strict=True):
            new, image = text_layer(text, image, added, None), image_layer(image, text, None, added)
            text, image = (each[0] if isinstance(each, tuple) else each for each in (new, image))
        return text, image


class BridgeTowerLayer(BridgeTowerBertCrossLayer):
    """With the arguments in our order."""

    def forward(self, states, other, mask, other_mask):
        return super().forward(states, other, attention_mask=mask, encoder_attention_mask=other_mask)


def median_times(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Processor seconds of each, in turns; a first round warms up and does not count."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in tqdm(range(rounds + 1), desc=", ".join(runs), leave=False):
        for name, run in runs.items():
            started = time.process_time()
            run()
            if number:
                times[name].append(time.process_time() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def training_steps(options: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """A step of each encoder, on the same tensors."""
    width, layers, heads = options.width, options.layers, options.heads
    ours = FlorenceFusionConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, attn_implementation="sdpa"
    )
    theirs = BridgeTowerTextConfig(
        hidden_size=width, num_attention_heads=heads, intermediate_size=4 * width, layer_norm_eps=1e-12
    )
    theirs._attn_implementation = options.bridgetower
    dropout = ours.hidden_dropout
    encoders = {
        "FusionEncoder": FusionEncoder(ours),
        "BridgeTower's layers": Peer(lambda: BridgeTowerLayer(theirs), layers),
        "METER, plain PyTorch": Peer(lambda: PlainLayer(width, heads, dropout), layers),
        "MergedFusionEncoder": MergedFusionEncoder(ours),
    }
    text, image = torch.randn(options.batch, TEXT_TOKENS, width), torch.randn(options.batch, IMAGE_TOKENS, width)
    mask = (torch.arange(TEXT_TOKENS) < torch.randint(8, TEXT_TOKENS, (options.batch, 1))).long()

    def step(encoder: nn.Module) -> None:
        new_text, new_image = encoder(text, image, mask)
        (new_text.square().mean() + new_image.square().mean()).backward()
        encoder.zero_grad()

    return {name: partial(step, encoder.train()) for name, encoder in encoders.items()}


def asking() -> dict[str, Callable[[], object]]:
    """One question about a picture, and many, by the bundled towers and a fusion of two layers."""
    model = FlorenceForQuestionAnswering.from_pretrained_towers(
        bundled_checkpoint(), hidden_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    pixels, ids = torch.randn(1, 3, 224, 224), torch.randint(0, 3000, (QUESTIONS, 16))
    rows = torch.zeros(QUESTIONS, dtype=torch.long)

    @torch.no_grad()
    def ask(count: int) -> None:
        model(ids[:count], pixels, image_rows=rows[:count])

    return {"one question": partial(ask, 1), f"{QUESTIONS} questions": partial(ask, QUESTIONS)}


def writing(options: argparse.Namespace, batch: int, tokens: int) -> dict[str, Callable[[], object]]:
    """Captions with the cache and without."""
    vision = {"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 1, 1]}
    config = FlorenceCaptioningConfig(
        vision_config=vision,
        hidden_size=options.width,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
    )
    model = FlorenceForImageCaptioning(config).eval()
    embeds = torch.randn(batch, tokens, model.config.vision_config.hidden_size)
    fixed = {"min_new_tokens": WRITTEN, "max_new_tokens": WRITTEN, "do_sample": False}
    return {
        name: partial(model.generate, image_embeds=embeds, use_cache=use, **fixed)
        for name, use in (("with cache", True), ("without", False))
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--batch", type=int, default=4, help="pairs in a training step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bridgetower", default="eager", help="attention of BridgeTower's layers")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {options.threads} thread(s), medians of {options.rounds} rounds")
    times = median_times(training_steps(options), options.rounds)
    ours = times["FusionEncoder"]
    size = f"{options.layers} x {options.width}, batch {options.batch}, {TEXT_TOKENS} and {IMAGE_TOKENS} tokens"
    print(f"\ntraining step, {size}\n{'':<22}  seconds  FusionEncoder is faster by")
    for name, value in times.items():
        print(f"{name:<22}  {value:7.3f}  {value / ours:.2f}x")
    times = median_times(asking(), options.rounds)
    one, many = times.values()
    print(f"\none picture: 1 question {one:.3f} s, {QUESTIONS} questions {many:.3f} s, {many / one:.2f} times as long")
    print(f"\n{WRITTEN} tokens written\nbatch  image tokens  with cache  without  faster by")
    for batch, tokens in ((1, 49), (8, 49), (1, 196), (8, 196)):
        cached, plain = median_times(writing(options, batch, tokens), max(1, options.rounds // 2)).values()
        print(f"{batch:>5}  {tokens:>12}  {cached:10.3f}  {plain:7.3f}  {plain / cached:.2f}x")


if __name__ == "__main__":
    main()
