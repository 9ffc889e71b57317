"""Ordered key tables, an account of every tensor, and models built of what was converted."""

import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from transformers_florence import FlorenceImageProcessor, FlorenceTextConfig, FlorenceTokenizer
from transformers_florence.configuration_florence import VISION_SIZES

from .reading import Tensors

Model = TypeVar("Model", bound=PreTrainedModel)

# ------------------------------------------------------------------------------------------------------- key tables


def whole(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (tensor,)


def twice(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (tensor, tensor)


def thirds(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(3 * dim, ...) -> query, key and value, (dim, ...) each."""
    if tensor.ndim == 0 or tensor.shape[0] % 3:
        raise ValueError(f"expected three equal parts, got {tuple(tensor.shape)}")
    return tensor.chunk(3)


def transposed(tensor: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(in_features, out_features), as a factor at the right of rows -> (out_features, in_features), as a `Linear`."""
    if tensor.ndim != 2:
        raise ValueError(f"expected a matrix, got {tuple(tensor.shape)}")
    return (tensor.T,)


class Row(NamedTuple):
    r"""A line of a key table: the source's name of a module or parameter, and ours.

    After either, `.weight`, `.bias` or nothing follows.

    source: a regular expression. target: with \1 for its groups, or a function of the match where a number changes;
    `[qkv]` stands for three names, into which `change` cuts the tensor.
    """

    source: str
    target: str | Callable[[re.Match], str]
    change: Callable[[torch.Tensor], Sequence[torch.Tensor]] = whole


class LeftOut(NamedTuple):
    """A line of a key table: keys that begin with `source` have no place in our model, and why."""

    source: str
    why: str


KeyTable = list[Row | LeftOut]


def torchvision_layers(place: str, stage: Callable[[str], Callable[[re.Match], str]]) -> KeyTable:
    """The layers of torchvision's Swin, of pictures and of clips.

    Args:
        place: regular expression of a layer's place, with two groups: its entry in the list, its number in the stage.
        stage: from the rest of our name to the target of a row, which finds the stage by the first group.
    """
    return [
        Row(place + r"attn\.qkv\.", stage(r"layers.\2.attention.[qkv]_proj."), thirds),
        Row(place + r"attn\.proj\.", stage(r"layers.\2.attention.out_proj.")),
        Row(
            place + r"attn\.relative_position_bias_table$",
            stage(r"layers.\2.attention.relative_position_bias_table"),
        ),
        Row(place + r"mlp\.0\.", stage(r"layers.\2.mlp.fc1.")),
        Row(place + r"mlp\.3\.", stage(r"layers.\2.mlp.fc2.")),
        Row(place + r"(norm[12])\.", stage(r"layers.\2.\3.")),
    ]


def prefixed(table: KeyTable, source: str, target: str) -> KeyTable:
    """The same table for keys with something before them; `source` is a regular expression without groups."""

    def extended(row: Row | LeftOut) -> Row | LeftOut:
        old = row.target if isinstance(row, Row) else None
        if callable(old):
            return row._replace(source=source + row.source, target=lambda match: target + old(match))
        if isinstance(row, Row):
            return row._replace(source=source + row.source, target=target + row.target)
        return row._replace(source=source + row.source)

    return [extended(row) for row in table]


def next_stage(part: str) -> Callable[[re.Match], str]:
    """The target of what closes a stage in other towers, and opens the next one in ours."""
    return lambda match: f"encoder.stages.{int(match[1]) + 1}.embed.{match.expand(part)}"


BUFFERS: KeyTable = [
    LeftOut(r".*\brelative_position_index$", "follows from the window"),
    LeftOut(r".*\battn_mask$", "follows from the grid and the window"),
]
BLOCK = r"layers\.(\d+)\.blocks\.(\d+)\."
LAYER = r"encoder.stages.\1.layers.\2."
# Microsoft's own Swin, and what was made from it: UniCL's image tower, GLIP's Swin and CoSwin. A stage ends with the
# next one's embedding.
SWIN: KeyTable = [
    *BUFFERS,
    Row(r"patch_embed\.proj\.", "embeddings.projection."),
    Row(r"patch_embed\.norm\.", "embeddings.norm."),
    Row(BLOCK + r"attn\.qkv\.", LAYER + "attention.[qkv]_proj.", thirds),
    Row(BLOCK + r"attn\.proj\.", LAYER + "attention.out_proj."),
    Row(BLOCK + r"attn\.relative_position_bias_table$", LAYER + "attention.relative_position_bias_table"),
    Row(BLOCK + r"gamma$", LAYER + "layer_scale[12]", twice),  # GLIP scales both branches by one parameter
    Row(BLOCK + r"(norm[12]|mlp\.fc[12])\.", LAYER + r"\3."),
    Row(r"layers\.(\d+)\.downsample\.proj\.", next_stage("projection.")),
    Row(r"layers\.(\d+)\.downsample\.(norm|reduction)\.", next_stage(r"\2.")),
    Row(r"norm(\d)\.", lambda match: f"feature_norms.stage{int(match[1]) + 1}."),
    Row(r"norm\.", "norm."),
    LeftOut(r"head\.", "a classifier; the tower ends at the pooled features"),
]
# CLIP's own text transformer, and what was made from it: open_clip's and UniCL's.
RESBLOCK = r"(?:transformer\.)?resblocks\.(\d+)\."
CLIP_TEXT: KeyTable = [
    *BUFFERS,
    Row(r"token_embedding\.", "embeddings.token_embedding."),
    Row(r"positional_embedding$", "embeddings.position_embedding.weight"),
    Row(RESBLOCK + r"attn\.in_proj_", r"encoder.layers.\1.self_attn.[qkv]_proj.", thirds),
    Row(RESBLOCK + r"attn\.out_proj\.", r"encoder.layers.\1.self_attn.out_proj."),
    Row(RESBLOCK + r"ln_([12])\.", r"encoder.layers.\1.layer_norm\2."),
    Row(RESBLOCK + r"mlp\.c_fc\.", r"encoder.layers.\1.mlp.fc1."),
    Row(RESBLOCK + r"mlp\.c_proj\.", r"encoder.layers.\1.mlp.fc2."),
    Row(r"ln_final\.", "final_layer_norm."),
]


# ------------------------------------------------------------------------------------------------------- the account


def _pattern(key: str) -> str:
    """The key without its numbers, and without which of a pair or triple it is: one line for all that are alike."""
    key = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", key)
    return re.sub(r"\b[qkv]_proj\b", "[qkv]_proj", re.sub(r"(?<=[._])(?:weight|bias)$", "*", key))


@dataclass
class Conversion:
    """Tensors under our names, and the account of every key on both sides.

    origin: where they come from, for messages. sources: our name -> the source's key. left_out: the source's key ->
    why. new: our name -> why no source fills it. notes: what else a user should know. unknown, bad: what is wrong.
    """

    origin: str
    tensors: Tensors = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    new: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)

    def refuse(self, aim: str, missing: Sequence[str], bad: Sequence[str] = ()) -> None:
        """Raise a `ValueError` with everything that is wrong, if anything is."""
        lists = {"not consumed": self.unknown, "not filled": missing, "unfit": [*self.bad, *bad]}
        found = [f"{kind}: {', '.join(sorted(names))}" for kind, names in lists.items() if names]
        if found:
            raise ValueError(f"expected the weights of {aim} in {self.origin}, got keys " + "; ".join(found))

    def shape(self, name: str, rank: int) -> tuple[int, ...]:
        """The shape of a tensor that a configuration is read off.

        Raises:
            ValueError: it is missing or has another rank.
        """
        if name not in self.tensors:
            self.refuse("a tower", [name])
        shape = tuple(self.tensors[name].shape)
        if len(shape) != rank or 0 in shape:
            self.refuse("a tower", [], [f"{self.sources[name]} (expected rank {rank}, got shape {shape})"])
        return shape

    def drop(self, pattern: str, why: str) -> None:
        """Leave out tensors that got a name of ours, but have no place in this model."""
        for name in [name for name in self.tensors if re.match(pattern, name)]:
            del self.tensors[name]
            self.left_out[self.sources.pop(name)] = why

    def rename(self, pattern: str, target: str) -> None:
        """Change the beginnings of our names."""
        for name in [name for name in self.tensors if re.match(pattern, name)]:
            renamed = re.sub("^" + pattern, target, name)
            self.tensors[renamed], self.sources[renamed] = self.tensors.pop(name), self.sources.pop(name)

    def __str__(self) -> str:
        """What was taken, what was left out, what is new, in one line for all tensors alike."""
        taken = Counter((_pattern(source), _pattern(name)) for name, source in self.sources.items())
        left = Counter((_pattern(source), why) for source, why in self.left_out.items())
        new = Counter((_pattern(name), why) for name, why in self.new.items())
        return "\n".join(
            [
                *(f"taken    {count:4}  {source} -> {name}" for (source, name), count in taken.items()),
                *(f"left out {count:4}  {source}: {why}" for (source, why), count in left.items()),
                *(f"new      {count:4}  {name}: {why}" for (name, why), count in new.items()),
                *(f"note           {note}" for note in self.notes),
            ]
        )


def find_layout(tensors: Tensors, marks: dict[str, str], expected: str, origin: str | Path) -> str:
    """Whose names the keys are: the layout of the first mark, a regular expression, that begins one of them.

    expected, origin: what was looked for and where, for the message.

    Raises:
        ValueError: no mark fits.
    """
    for mark, layout in marks.items():
        if any(re.match(mark, key) for key in tensors):
            return layout
    shown = ", ".join(list(tensors)[:3])
    raise ValueError(f"expected {expected} in {origin}, got {shown}, ...")


def apply_table(tensors: Tensors, table: KeyTable, origin: str | Path) -> Conversion:
    """Rename, cut and turn tensors as the first fitting line of the table says; nothing is refused yet."""
    conversion = Conversion(str(origin))
    for key, tensor in tensors.items():
        row, match = next(((row, match) for row in table if (match := re.match(row.source, key))), (None, None))
        if isinstance(row, LeftOut):
            conversion.left_out[key] = row.why
            continue
        if row is None or key[match.end() :] not in ("", "weight", "bias"):
            conversion.unknown.append(key)
            continue
        name = (row.target(match) if callable(row.target) else match.expand(row.target)) + key[match.end() :]
        choice = re.search(r"\[(\w+)\]", name)
        names = [name] if choice is None else [name.replace(choice[0], letter) for letter in choice[1]]
        try:
            parts = row.change(tensor)
        except ValueError as error:
            conversion.bad.append(f"{key} ({error})")
            parts = ()
        for part_name, part in zip(names, parts, strict=False):
            if part_name in conversion.tensors:
                conversion.bad.append(f"{key} (its place is taken by {conversion.sources[part_name]})")
            conversion.tensors[part_name], conversion.sources[part_name] = part, key
    return conversion


# ------------------------------------------------------------------------------------------ configurations, building


def vision_fields(conversion: Conversion, prefix: str = "") -> dict[str, Any]:
    """Fields of a `FlorenceVisionConfig`, read off the shapes of a tower's tensors under our names.

    Raises:
        ValueError: a tensor that tells one is missing or misshapen.
    """
    embed_dim, num_channels, _, kernel = conversion.shape(prefix + "embeddings.projection.weight", 4)
    depths, heads, windows = [], [], []
    layer = re.compile(re.escape(prefix) + r"encoder\.stages\.(\d+)\.layers\.(\d+)\.")
    numbers = [(int(match[1]), int(match[2])) for name in conversion.tensors if (match := layer.match(name))]
    for stage in range(len({number for number, _ in numbers})):
        name = f"{prefix}encoder.stages.{stage}.layers.0.attention.relative_position_bias_table"
        rows, count = conversion.shape(name, 2)
        side = (math.isqrt(rows) + 1) // 2
        if (2 * side - 1) ** 2 != rows:
            conversion.refuse(
                "a tower", [], [f"{conversion.sources[name]} (expected a square window, got {rows} rows)"]
            )
        depths.append(1 + max(depth for number, depth in numbers if number == stage))
        heads.append(count)
        windows.append(side)
    hidden_dim, _ = conversion.shape(prefix + "encoder.stages.0.layers.0.mlp.fc1.weight", 2)
    published = (size for size in VISION_SIZES.values() if (size["embed_dim"], size["depths"]) == (embed_dim, depths))
    return {
        "embed_dim": embed_dim,
        "depths": depths,
        "num_channels": num_channels,
        "num_heads": heads,
        "window_size": windows[0] if len(set(windows)) == 1 else windows,
        "embed_type": "conv" if kernel == 7 else "patch",
        "mlp_ratio": hidden_dim / embed_dim,
        "qkv_bias": any(name.endswith(".attention.q_proj.bias") for name in conversion.tensors),
        "layer_scale_init_value": 1e-4 if any(name.endswith(".layer_scale1") for name in conversion.tensors) else None,
        "drop_path_rate": next(published, {}).get("drop_path_rate", 0.1),  # for who trains on
    }


def text_fields(conversion: Conversion, heads: int | None, prefix: str = "") -> dict[str, Any]:
    """Fields of a `FlorenceTextConfig`, read off the shapes of a tower's tensors under our names.

    heads: attention heads, which no tensor tells; None for CLIP's rule, one for every 64 channels.

    Raises:
        ValueError: a tensor that tells a field is missing or misshapen, or the rule gives no whole number.
    """
    vocab_size, hidden_size = conversion.shape(prefix + "embeddings.token_embedding.weight", 2)
    context, _ = conversion.shape(prefix + "embeddings.position_embedding.weight", 2)
    intermediate_size, _ = conversion.shape(prefix + "encoder.layers.0.mlp.fc1.weight", 2)
    if heads is None and hidden_size % 64:
        raise ValueError(f"expected the number of attention heads for {conversion.origin}, of width {hidden_size}")
    layer = re.compile(re.escape(prefix) + r"encoder\.layers\.(\d+)\.")
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": 1 + max(int(match[1]) for name in conversion.tensors if (match := layer.match(name))),
        "num_attention_heads": hidden_size // 64 if heads is None else heads,
        "max_position_embeddings": context,
    }


def check_agreement(read: dict[str, Any], said: dict[str, Any], origin: str | Path) -> None:
    """Refuse weights that are not what the configuration beside them says, such as those of a part of the layers.

    Raises:
        ValueError: a field of both, read off the shapes and said by the configuration, differs; all are listed.
    """
    both = {name: (list(value) if isinstance(value, tuple) else value) for name, value in said.items() if name in read}
    differing = [f"{name}: {value!r}, got {read[name]!r}" for name, value in both.items() if value != read[name]]
    if differing:
        raise ValueError(f"expected in {origin}, by its configuration, {'; '.join(sorted(differing))}")


def build_model(model_class: type[Model], config: PreTrainedConfig, conversion: Conversion) -> Model:
    """The model with the converted weights, in evaluation mode; those in `conversion.new` as it initialises them.

    Half precision becomes float32, which holds the same numbers and computes with them more exactly.

    Raises:
        ValueError: source keys not consumed, targets not filled, misfits of shape, numbers that are not finite, all
            listed.
    """
    with torch.device("meta"):  # shapes without memory: a hostile file is refused before any is taken
        expected = {name: tensor.shape for name, tensor in model_class(config).state_dict().items()}
    conversion.unknown += {source for name, source in conversion.sources.items() if name not in expected}
    unfit = []
    for name in expected.keys() & conversion.tensors.keys():
        tensor = conversion.tensors[name]
        if tensor.shape != expected[name]:
            unfit.append(f"{conversion.sources[name]} (expected {tuple(expected[name])}, got {tuple(tensor.shape)})")
        elif not tensor.is_floating_point() or not torch.isfinite(tensor).all():
            unfit.append(f"{conversion.sources[name]} (expected finite floating-point numbers)")
    missing = expected.keys() - conversion.tensors.keys() - conversion.new.keys()
    conversion.refuse(model_class.__name__, list(missing), unfit)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # what is new is the same each time
        model = model_class(config)
    dtypes = (tensor.dtype for tensor in conversion.tensors.values())
    model = model.to(functools.reduce(torch.promote_types, dtypes, torch.float32))
    model.load_state_dict(conversion.tensors, strict=not conversion.new)
    conversion.notes.append(f"{model_class.__name__} of {model.num_parameters() / 1e6:.2f} million parameters")
    return model.eval()


def image_processor(image_size: int | Sequence[int]) -> FlorenceImageProcessor:
    """Pictures as UniCL's evaluation prepares them: 256 pixels for every 224, of which the middle is cut out."""
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    return FlorenceImageProcessor(
        size={"shortest_edge": 256 * max(height, width) // 224}, crop_size={"height": height, "width": width}
    )


def load_tokenizer(name: str, config: FlorenceTextConfig) -> FlorenceTokenizer:
    """CLIP's tokenizer, from a folder or by its name on the Hub, cutting texts to the tower's context.

    Raises:
        ValueError: it cannot be loaded, or has another vocabulary than the tower.
    """
    try:
        tokenizer = FlorenceTokenizer.from_pretrained(name, model_max_length=config.max_position_embeddings)
    except Exception as error:  # files of any origin, see `read_content`
        raise ValueError(f"expected the folder of a CLIP tokenizer or its name, got {name!r}: {error}") from error
    if len(tokenizer) != config.vocab_size or tokenizer.eos_token_id != config.eos_token_id:
        raise ValueError(
            f"expected a tokenizer of {config.vocab_size} tokens with the end token {config.eos_token_id}, got "
            f"{len(tokenizer)} tokens and {tokenizer.eos_token_id} from {name!r}"
        )
    return tokenizer


def new_folder(path: str | Path) -> Path:
    """The folder to write to, which must not hold anything yet.

    Raises:
        ValueError: it does.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"expected a new or empty folder, got {path}")
    return path
