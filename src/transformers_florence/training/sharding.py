"""One model in several processes by DDP, DeepSpeed's ZeRO or FSDP2: what was asked for, and no less."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs, parse_flag_from_env
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.integrations import unset_hf_deepspeed_config
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from ..modeling_florence_vision import CoSwinLayer
from .distributed import ranks_in
from .gradient_cache import cached_backward
from .stability import GuardedUpdate


def make_accelerator(*, processes: int = 0, **options: Any) -> Accelerator:
    """An accelerator of what the launcher asks for by environment variables, and no less.

    DeepSpeed's processes meet over gloo where there is no accelerator. transformers does not learn of ZeRO-3: models
    are made and loaded whole, on any rank alone if need be, and taken apart by `Accelerator.prepare`. With
    `mixed_precision="fp16"` the loss is scaled on a CPU too, where Accelerate would leave it as it is.

    Args:
        processes: how many must train together; 0 for as many as the launcher started.
        options: of `Accelerator`.

    Raises:
        ValueError: other processes than asked for, which launchers drop on CPUs in silence, or FSDP.
    """
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        raise ValueError("expected a configuration of one process, DDP or DeepSpeed, got FSDP: ZeRO-3 does the same")
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED") and not torch.accelerator.is_available():
        options["kwargs_handlers"] = [*options.get("kwargs_handlers", []), InitProcessGroupKwargs(backend="gloo")]
    accelerator = Accelerator(**options)
    unset_hf_deepspeed_config()
    wanted = processes or int(os.environ.get("WORLD_SIZE", 1))
    if accelerator.num_processes != wanted:
        raise ValueError(
            f"expected {wanted} processes that train together, got {accelerator.num_processes}; on CPUs launch them "
            "by `ACCELERATE_USE_CPU=true torchrun --nproc_per_node N`"
        )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler("cpu")
    return accelerator


def zero_stage(accelerator: Accelerator) -> int | None:
    """The stage of ZeRO that DeepSpeed was asked for: 1 shards the optimizer's states, 2 also the gradients, 3 also
    the weights; None without DeepSpeed.
    """
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return None
    return int(accelerator.deepspeed_plugin.deepspeed_config["zero_optimization"]["stage"])


def configure_deepspeed(
    accelerator: Accelerator, batch_size: int, max_grad_norm: float, dtype: torch.dtype = torch.float32
) -> None:
    """Tell DeepSpeed what the training's own arguments say; nothing without DeepSpeed. To be called before `prepare`.

    Weights and optimizer stay in float32. In bfloat16 DeepSpeed's `torch_autocast` computes and exchanges gradients;
    its `bf16`, which also rounds the weights, would move the temperature by up to one part in a hundred.

    Args:
        batch_size: rows of a step, of all processes together.
        max_grad_norm: what DeepSpeed clips to, as it steps inside of `backward`.
        dtype: float32 or bfloat16.

    Raises:
        ValueError: DeepSpeed's configuration says another thing (leave the key out, or set it to "auto"), or float16,
            whose loss scale would be DeepSpeed's.
    """
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return
    config = accelerator.deepspeed_plugin.deepspeed_config
    wanted = {
        "train_batch_size": batch_size,
        "train_micro_batch_size_per_gpu": batch_size // accelerator.num_processes,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_grad_norm,
    }
    for name, value in wanted.items():
        if config.get(name, "auto") not in ("auto", value):
            raise ValueError(f"DeepSpeed's {name}: expected {value} or 'auto', got {config[name]!r}")
        config[name] = value
    for name in ("fp16", "bf16", "torch_autocast"):
        if config.get(name, {}).get("enabled") is True:
            raise ValueError(f"DeepSpeed's {name}: expected none, as the training sets the precision, got it enabled")
    if dtype == torch.float16:
        raise ValueError("expected float32 or bfloat16 with DeepSpeed, got float16")
    if dtype == torch.bfloat16:
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}


def keep_scalars_as_vectors(module: nn.Module) -> None:
    """Make each scalar weight a vector of one, in place and under its own name.

    DeepSpeed 0.19 broadcasts weights as bytes, of which PyTorch has no view of a scalar, and FSDP2 takes no scalars
    at all. What the module returns (a mapping) by the name of such a weight becomes a scalar again on its way out. To
    be called before the optimizer is made; `save_whole` writes scalars.
    """
    scalars = {name: weight for name, weight in module.named_parameters() if weight.ndim == 0}
    for weight in scalars.values():
        weight.data = weight.data.reshape(1)
    names = {name.rpartition(".")[2] for name in scalars}

    def as_scalars(module: nn.Module, inputs: Any, outputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: value.reshape(()) if name in names else value for name, value in outputs.items()}

    module.register_forward_hook(as_scalars)


def shard_fully(module: nn.Module, **options: Any) -> None:
    """Shard a module's weights by PyTorch's FSDP2, in place: each layer of both towers for itself, then all the rest.

    Scalars become vectors as by `keep_scalars_as_vectors`. To be called on every rank, with equal weights, before the
    optimizer is made. A model that no rank can hold whole is loaded in pieces by transformers' `distributed_config`:
    see `average_whole_gradients`.

    Args:
        module: an objective or another module with towers, that returns a mapping.
        options: of `torch.distributed.fsdp.fully_shard`, such as `mesh`, `mp_policy` or `offload_policy`.
    """
    keep_scalars_as_vectors(module)
    layers = [layer for layer in module.modules() if isinstance(layer, CoSwinLayer | CLIPEncoderLayer)]
    for part in [*layers, module]:
        fully_shard(part, **options)


def average_whole_gradients(module: nn.Module) -> None:
    """Average the gradients of weights that FSDP2 has left whole on each rank, such as a temperature, over all ranks.

    For a model that transformers has loaded in pieces: `from_pretrained(..., distributed_config=DistributedConfig(
    fsdp_size=N))`. FSDP2 averages what it has sharded; of the others each rank would go its own way. To be called on
    every rank, after loading. Optimizers and clipping that take many weights at once do not mix both kinds: give the
    whole ones a group of their own, or use `shard_fully`.
    """
    ranks = ranks_in()

    def average(weight: torch.Tensor) -> None:
        gradient = weight.grad
        assert gradient is not None, "this is called when it has come"
        # What earlier backward passes left there is equal on all ranks, and stays: the mean of equals.
        dist.all_reduce(gradient)
        gradient /= ranks

    for weight in module.parameters():
        if weight.requires_grad and not isinstance(weight, DTensor):
            weight.register_post_accumulate_grad_hook(average)


class _LeftOutError(Exception):
    """The guard did not admit a loss."""


@dataclass(frozen=True)
class Step:
    """What one step saw.

    loss: a scalar without graph.
    shared: name -> shared output of the model, without graph.
    gradient_norm: before clipping; None where the loss was not finite, or nothing computed it.
    taken: whether the weights were changed.
    """

    loss: torch.Tensor
    shared: dict[str, torch.Tensor]
    gradient_norm: float | None
    taken: bool


def guarded_step(
    update: GuardedUpdate,
    model: nn.Module,
    loss: Callable[..., torch.Tensor],
    inputs: Mapping[str, Any],
    chunk_size: int,
    *,
    shared: Sequence[str],
    step: int,
    samples: Sequence[Any],
) -> Step:
    """`cached_backward` and `update`, with the guard in between: it sees the loss before any backward does.

    DeepSpeed changes the weights inside of the last backward, so that a loss that is not finite must not get there.

    Args:
        model, loss, inputs, chunk_size, shared: as `cached_backward` takes them.
        step, samples: as `GuardedUpdate` takes them.

    Raises:
        NonFiniteError: as `GuardedUpdate`.
        ValueError: as `cached_backward`.
    """
    value, seen = torch.tensor(torch.nan), {}

    def admitted(**outputs: torch.Tensor) -> torch.Tensor:
        nonlocal value, seen
        found = loss(**outputs)
        value, seen = found.detach(), {name: outputs[name].detach() for name in shared}
        if not update.admits(value, step=step, samples=samples):
            raise _LeftOutError
        return found

    try:
        cached_backward(model, admitted, inputs, chunk_size, shared=shared, accelerator=update.accelerator)
    except _LeftOutError:
        return Step(value, seen, None, False)
    done = update(value, step=step, samples=samples)
    return Step(value, seen, done.gradient_norm, done.taken)


def save_whole(
    accelerator: Accelerator, wrapped: nn.Module, model: PreTrainedModel, folder: str | os.PathLike
) -> None:
    """Save a model, whole and unwrapped, as `from_pretrained` reads it; every rank calls this, and rank 0 writes.

    Args:
        wrapped: what `prepare` returned.
        model: the module to save, in `wrapped`.

    Raises:
        ValueError: DeepSpeed's configuration forbids to gather the weights of ZeRO-3.
    """
    if zero_stage(accelerator) == 3:
        state = accelerator.get_state_dict(wrapped) or {}  # a collective; rank 0's alone has something in it
        modules = accelerator.unwrap_model(wrapped).named_modules()
        prefix = next(name + "." for name, module in modules if module is model)
        state = {name.removeprefix(prefix): weight for name, weight in state.items() if name.startswith(prefix)}
    else:
        state = model.state_dict()
        for name, weight in state.items():
            state[name] = weight.full_tensor() if isinstance(weight, DTensor) else weight  # a collective under FSDP2
    if accelerator.is_main_process:
        with torch.device("meta"):
            shapes = {name: weight.shape for name, weight in type(model)(model.config).state_dict().items()}
        state = {name: weight.reshape(shapes[name]) for name, weight in state.items()}  # vectors of one to scalars
        model.save_pretrained(Path(folder), state_dict=state)


def check_running(accelerator: Accelerator, wrapped: Any, dtype: torch.dtype = torch.float32) -> str:
    """Refuse to train in another way than was asked for.

    Args:
        wrapped: what `prepare` returned.
        dtype: float32, bfloat16 or float16, what the model computes in.

    Returns:
        What is running: precision, the number of processes, device, wrapper and stage of ZeRO.

    Raises:
        ValueError: another wrapper, another stage or another precision than asked for.
    """
    ranks, kind, stage = accelerator.num_processes, type(wrapped).__name__, zero_stage(accelerator)
    with_deepspeed = parse_flag_from_env("ACCELERATE_USE_DEEPSPEED")
    expected = "DeepSpeedEngine" if with_deepspeed else "DistributedDataParallel" if ranks > 1 else kind
    if kind != expected:
        raise ValueError(f"expected a model in {expected}, got {kind}; on CPUs set ACCELERATE_USE_CPU=true for DDP")
    if stage is not None and wrapped.zero_optimization_stage() != stage:
        raise ValueError(f"expected ZeRO-{stage}, got ZeRO-{wrapped.zero_optimization_stage()}")
    precision = {torch.float32: "no", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
    mixed = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if mixed not in ("no", precision):  # "no" is also what `accelerate launch` says where nobody said anything
        raise ValueError(f"expected the mixed precision {mixed!r} that Accelerate was asked for, got {precision!r}")
    zero = "" if stage is None else f" with ZeRO-{stage}"
    return f"{str(dtype).removeprefix('torch.')} on {ranks} x {accelerator.device.type}, {kind}{zero}"


__all__ = [
    "Step",
    "average_whole_gradients",
    "check_running",
    "configure_deepspeed",
    "guarded_step",
    "keep_scalars_as_vectors",
    "make_accelerator",
    "save_whole",
    "shard_fully",
    "zero_stage",
]
