"""What a pretraining takes, before it starts: arithmetic, memory of a device, hours; and what cannot fit.

Memory of one of N devices, in bytes, for P parameters:

    weights      4 P, or 4 P / N under ZeRO-3, which gathers up to `LIVE_PARAMETERS` of them at a time: 4 min(P, that)
    gradients    4 P, or 4 P / N from ZeRO-2 on
    optimizer    8 P (AdamW's two moments); under ZeRO 12 P / N, as each device has its part of the weights once more;
                 nothing where it is offloaded
    exchange     4 P with several devices (DDP's buckets); under ZeRO 4 min(P, `BUCKET_PARAMETERS`)
    copies       2 P in half precision: the rounded weights, which the backward pass needs
    average      4 P, if there is a running average of the weights
    activations  what autograd keeps of one chunk of the device's rows: every distinct storage, found by running the
                 model on the meta device. With activation checkpointing: what enters each layer, what is kept outside
                 of the layers, and all of the largest layer. Autocast keeps some tensors in float32, so where it
                 computes (half precision with checkpointing) all are counted so.
    workspace    a quarter of what the largest layer keeps: gradients on their way through it, where they are most
    loss         embeddings of the device's rows and of the whole batch with their gradients, and a block of logits

Arithmetic is counted by PyTorch on the meta device: one forward, two more for the backward, one more for activation
checkpointing, one more for the gradient cache.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers.modeling_layers import GradientCheckpointingLayer

from ..configuration_florence import FlorenceConfig
from ..modeling_florence import FlorenceModel
from .distributed import BLOCK_LOGITS

GIB = 2**30
RESERVED = 3 * GIB  # of a device: the driver's and the communication's own, and what the allocator cannot use
# DeepSpeed's defaults: `stage3_max_live_parameters` and `reduce_bucket_size`.
LIVE_PARAMETERS, BUCKET_PARAMETERS = 1_000_000_000, 500_000_000
# FLOP/s of dense matrix products in half precision and in float32, from NVIDIA's data sheets.
PEAKS = {
    "T4": (65e12, 8.1e12),
    "V100": (125e12, 15.7e12),
    "A10": (125e12, 31.2e12),
    "L4": (121e12, 30.3e12),
    "L40S": (362e12, 91.6e12),
    "A100": (312e12, 19.5e12),
    "H100": (989e12, 67e12),
    "H200": (989e12, 67e12),
}
# Name -> chip and memory.
DEVICES = {
    "t4-16gb": ("T4", 16 * GIB),
    "l4-24gb": ("L4", 24 * GIB),
    "a10-24gb": ("A10", 24 * GIB),
    "v100-32gb": ("V100", 32 * GIB),
    "a100-40gb": ("A100", 40 * GIB),
    "l40s-48gb": ("L40S", 48 * GIB),
    "a100-80gb": ("A100", 80 * GIB),
    "h100-80gb": ("H100", 80 * GIB),
    "h200-141gb": ("H200", 141 * GIB),
}


def peak_flops(name: str, dtype: torch.dtype) -> float | None:
    """Peak of a device in FLOP/s; None for one that is not known.

    Args:
        name: as `torch.cuda.get_device_name()` gives it, or a chip of `PEAKS`.
        dtype: what is computed in.
    """
    for word in re.findall(r"[A-Z]+\d+[A-Z]*", name):
        if word in PEAKS:
            half, single = PEAKS[word]
            return single if dtype == torch.float32 else half
    return None


def _inputs(config: FlorenceConfig, rows: int, image_size: int, tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    """Pictures and texts without values."""
    channels = config.vision_config.num_channels
    return {
        "pixel_values": torch.empty(rows, channels, image_size, image_size, dtype=dtype, device="meta"),
        "input_ids": torch.zeros(rows, tokens, dtype=torch.int64, device="meta"),
    }


def _build(config: FlorenceConfig, dtype: torch.dtype) -> FlorenceModel:
    """The model without values, training."""
    with torch.device("meta"):
        return FlorenceModel(config).to(dtype).train()


def forward_flops(config: FlorenceConfig, image_size: int, tokens: int) -> int:
    """FLOPs of one picture and one text through both towers; a multiplication and an addition are two.

    Args:
        image_size: side of the picture in pixels.
        tokens: of the text.
    """
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        _build(config, torch.float32)(**_inputs(config, 1, image_size, tokens, torch.float32))
    return counter.get_total_flops()


@dataclass(frozen=True)
class Activations:
    """Bytes that autograd keeps of a forward pass.

    whole: all distinct storages, without weights and inputs.
    outside: of these, those that no layer made.
    entering: what enters the layers, of all together.
    largest: what the largest layer keeps.
    """

    whole: int
    outside: int
    entering: int
    largest: int

    @property
    def checkpointed(self) -> int:
        """What is there at most where layers keep only what enters them."""
        return self.outside + self.entering + self.largest


def kept_activations(model: nn.Module, inputs: dict[str, Any]) -> Activations:
    """What autograd keeps when a model runs on inputs, on any device, the meta device among them."""
    known = {tensor.untyped_storage()._cdata for tensor in [*model.parameters(), *model.buffers(), *inputs.values()]}
    kept: dict[int, tuple[torch.UntypedStorage, int]] = {}  # held, so that no address comes twice
    entering: dict[int, torch.UntypedStorage] = {}
    current = [-1]  # the layer that is running

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            kept.setdefault(storage._cdata, (storage, current[0]))
        return tensor

    layers = [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]
    handles = []
    for number, layer in enumerate(layers):

        def enter(module: nn.Module, arguments: tuple[Any, ...], number: int = number) -> None:
            current[0] = number
            storage = arguments[0].untyped_storage()
            entering[storage._cdata] = storage

        def leave(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            current[0] = -1

        handles += [layer.register_forward_pre_hook(enter), layer.register_forward_hook(leave)]
    try:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    of_layer = [0] * (len(layers) + 1)  # the last one: outside
    for storage, number in kept.values():
        of_layer[number] += storage.nbytes()
    return Activations(
        whole=sum(of_layer),
        outside=of_layer[-1],
        entering=sum(storage.nbytes() for storage in entering.values()),
        largest=max(of_layer[:-1], default=0),
    )


@dataclass(frozen=True)
class Memory:
    """Bytes of one device, by what they are for; the module says how each is found."""

    weights: int
    gradients: int
    optimizer: int
    exchange: int
    copies: int
    average: int
    activations: int
    workspace: int
    loss: int

    @property
    def total(self) -> int:
        """All together."""
        return sum(vars(self).values())


@dataclass(frozen=True)
class Shape:
    """How a training is laid out.

    batch_size: pairs of a step, on all devices together.
    chunk_size: pairs of a device that are in its memory at once; 0 for all.
    image_size, tokens: of a picture's side in pixels, and of a text.
    devices: how many share the batch.
    zero_stage: of DeepSpeed; 0 for DDP.
    offload: whether DeepSpeed keeps the optimizer's states on the CPU.
    dtype: what is computed in.

    Raises:
        ValueError: a batch that the devices cannot share equally, another stage than 0 to 3, offloading without
            DeepSpeed, or float16 with it.
    """

    batch_size: int
    chunk_size: int
    image_size: int
    tokens: int
    devices: int
    zero_stage: int = 0
    offload: bool = False
    dtype: torch.dtype = torch.bfloat16
    activation_checkpointing: bool = False
    average: bool = False

    def __post_init__(self) -> None:
        if self.devices < 1 or self.batch_size % self.devices:
            raise ValueError(f"batch_size: expected a multiple of {self.devices} devices, got {self.batch_size}")
        if not 0 <= self.zero_stage <= 3:
            raise ValueError(f"zero_stage: expected 0 to 3, got {self.zero_stage}")
        if self.offload and not self.zero_stage:
            raise ValueError("offload: expected a stage of ZeRO, got none")
        if self.zero_stage and self.dtype == torch.float16:
            raise ValueError("expected float32 or bfloat16 with DeepSpeed, got float16")
        if self.zero_stage == 3 and self.average:
            raise ValueError("expected whole weights to average, got weights that ZeRO-3 partitions")

    @property
    def rows(self) -> int:
        """Pairs of a device."""
        return self.batch_size // self.devices

    @property
    def chunk(self) -> int:
        """Pairs of a device that are in its memory at once."""
        return min(self.chunk_size or self.rows, self.rows)

    @property
    def passes(self) -> int:
        """Forward passes that a step costs, a backward pass counted as two."""
        return 3 + self.activation_checkpointing + (self.chunk < self.rows)


def memory_of(config: FlorenceConfig, shape: Shape) -> Memory:
    """What a step takes of one device."""
    is_half = shape.dtype != torch.float32
    autocasts = is_half and (shape.activation_checkpointing or shape.zero_stage > 0)
    dtype = torch.float32 if autocasts else shape.dtype
    model = _build(config, dtype)
    parameters = sum(weight.numel() for weight in model.parameters())
    inputs = _inputs(config, shape.chunk, shape.image_size, shape.tokens, dtype)
    kept = kept_activations(model, inputs)
    activations = kept.checkpointed if shape.activation_checkpointing else kept.whole
    activations += sum(tensor.nbytes for tensor in inputs.values())
    stage, devices = shape.zero_stage, shape.devices
    optimizer = -(-12 * parameters // devices) if stage else 8 * parameters
    exchange = 4 * min(parameters, BUCKET_PARAMETERS) if stage else 4 * parameters * (devices > 1)
    embeddings = 2 * 4 * config.projection_dim * (shape.rows + shape.batch_size)  # of pictures and texts, float32
    return Memory(
        weights=-(-4 * parameters // devices) + 4 * min(parameters, LIVE_PARAMETERS) if stage == 3 else 4 * parameters,
        gradients=-(-4 * parameters // devices) if stage >= 2 else 4 * parameters,
        optimizer=0 if shape.offload else optimizer,
        exchange=exchange,
        copies=2 * parameters if is_half else 0,
        average=4 * parameters if shape.average else 0,
        activations=activations,
        workspace=kept.largest // 4,
        loss=2 * embeddings + 4 * 4 * BLOCK_LOGITS,  # with their gradients; logits, mask, softmax, gradient
    )


@dataclass(frozen=True)
class Plan:
    """What a training would take.

    parameters: of the model.
    flops: of all steps, on all devices.
    memory: of one device.
    device: its name, one of `DEVICES`.
    hours: of the whole training, with the assumed share of the peak.
    device_hours: times the number of devices.
    """

    parameters: int
    flops: float
    memory: Memory
    device: str
    hours: float
    device_hours: float

    def check(self) -> None:
        """Refuse what cannot fit.

        Raises:
            ValueError: more memory than the device has, with the three largest parts and what helps.
        """
        room = DEVICES[self.device][1] - RESERVED
        if self.memory.total > room:
            parts = sorted(vars(self.memory).items(), key=lambda part: -part[1])[:3]
            told = ", ".join(f"{name} {value / GIB:.1f}" for name, value in parts)
            raise ValueError(
                f"{self.device}: expected at most {room / GIB:.0f} GiB beside the {RESERVED / GIB:.0f} that are "
                f"reserved, got {self.memory.total / GIB:.1f} ({told}): take a smaller chunk_size, "
                "activation_checkpointing, a higher zero_stage, offload, or a larger device"
            )


def plan_training(config: FlorenceConfig, parts: Sequence[tuple[int, Shape]], device: str, peak_share: float) -> Plan:
    """Work out what a training takes.

    Args:
        parts: (steps, how they are laid out), one after the other; the last one is the largest.
        device: one of `DEVICES`.
        peak_share: part of the device's peak that the arithmetic is assumed to reach, all of it counted: what
            activation checkpointing and the gradient cache compute again, too.

    Raises:
        ValueError: a device that is not known, or a share that is not above 0 and at most 1.
    """
    if device not in DEVICES:
        raise ValueError(f"device: expected one of {', '.join(DEVICES)}, got {device!r}")
    if not 0 < peak_share <= 1:
        raise ValueError(f"peak_share: expected a number above 0 and at most 1, got {peak_share}")
    flops, seconds = 0.0, 0.0
    for steps, shape in parts:
        of_part = (
            float(steps) * shape.batch_size * shape.passes * forward_flops(config, shape.image_size, shape.tokens)
        )
        peak = peak_flops(DEVICES[device][0], shape.dtype)
        assert peak is not None, "every device has a chip that is known"
        flops += of_part
        seconds += of_part / (shape.devices * peak * peak_share)
    last = parts[-1][1]
    return Plan(
        parameters=sum(weight.numel() for weight in _build(config, torch.float32).parameters()),
        flops=flops,
        memory=memory_of(config, last),
        device=device,
        hours=seconds / 3600,
        device_hours=seconds / 3600 * last.devices,
    )


__all__ = [
    "DEVICES",
    "GIB",
    "RESERVED",
    "Activations",
    "Memory",
    "Plan",
    "Shape",
    "forward_flops",
    "kept_activations",
    "memory_of",
    "peak_flops",
    "plan_training",
]
