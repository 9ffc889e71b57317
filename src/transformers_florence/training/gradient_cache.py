"""The gradient cache: a contrastive step on more pairs than memory holds, with the exact gradients of the whole batch.

Gao, Zhang, Han and Callan, "Scaling deep contrastive learning batch size under memory limited setup" (2021), which
Florence trains with (section 2.7). The loss sees the model through its embeddings alone, so: embed all chunks without
a graph, ask the loss for the gradient at the embeddings, then embed each chunk once more with a graph and go back from
there. Memory is that of one chunk and of all embeddings; time is one more forward.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import get_device_states, set_device_states

from .distributed import rows_of_ranks

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel

EMBEDDINGS = ("image_embeds", "text_embeds")


def checkpoint_activations(model: "PreTrainedModel") -> None:
    """Let each layer of both towers keep what enters it alone, and be computed again going backwards; in place.

    Equal gradients for about a third more time (Chen et al. 2016; Florence section 2.7).
    """
    # transformers' new name for it, and the one before, which it is about to drop.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()


class RandomState:
    """The state of torch's random generators: the CPU's, and those of the devices that some tensors lie on."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self.device_type = next((tensor.device.type for tensor in tensors if tensor.device.type != "cpu"), "cpu")
        self.cpu = torch.get_rng_state()
        self.devices, self.states = get_device_states(*tensors) if self.device_type != "cpu" else ([], [])

    def restore(self) -> None:
        """Let the generators draw again what they drew after this state was taken."""
        torch.set_rng_state(self.cpu)
        if self.devices:
            set_device_states(self.devices, self.states, device_type=self.device_type)


@contextlib.contextmanager
def _accumulating(model: nn.Module, accelerator: "Accelerator | None") -> Iterator[None]:
    """Backward passes in here add to the gradients; no rank hears of them and no optimizer steps."""
    if accelerator is None:
        with getattr(model, "no_sync", contextlib.nullcontext)():
            yield
        return
    before = accelerator.sync_gradients
    accelerator.sync_gradients = False  # DeepSpeed's optimizer steps at the end of a backward that finds this true
    try:
        with accelerator.no_sync(model):
            yield
    finally:
        accelerator.sync_gradients = before


def _rows_of(inputs: Mapping[str, Any], chunk_size: int) -> int:
    """How many rows the inputs have.

    Raises:
        ValueError: they differ, there is no tensor, or the chunk size is not a positive integer.
    """
    if not isinstance(chunk_size, int) or isinstance(chunk_size, bool) or chunk_size < 1:
        raise ValueError(f"expected chunk_size, an integer of at least 1, got {chunk_size!r}")
    shapes = {name: tuple(value.shape) for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    if not shapes or any(not shape for shape in shapes.values()) or len({shape[0] for shape in shapes.values()}) > 1:
        raise ValueError(f"expected inputs with one and the same number of rows, got {shapes or 'no tensor'}")
    return next(iter(shapes.values()))[0]


def _outputs_of(
    model: nn.Module, inputs: Mapping[str, Any], piece: slice, shared: Sequence[str]
) -> dict[str, torch.Tensor]:
    """The model's embeddings of some rows, and its shared outputs.

    Raises:
        ValueError: one of them is missing, or there is not one embedding a row.
    """
    rows = {name: value[piece] if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    output = model(**rows)
    names = (*EMBEDDINGS, *shared)
    missing = [name for name in names if not isinstance(output, Mapping) or output.get(name) is None]
    if missing:
        raise ValueError(f"expected a model that returns {', '.join(names)} by name, got no {', '.join(missing)}")
    for name in EMBEDDINGS:
        if output[name].shape[0] != piece.stop - piece.start:
            raise ValueError(
                f"expected {piece.stop - piece.start} rows of {name}, one an input, got {output[name].shape[0]}"
            )
    return {name: output[name] for name in names}


def _leaf(tensor: torch.Tensor) -> torch.Tensor:
    """A float32 (or float64) copy that collects a gradient: half precision would round the sums of the loss."""
    copy = tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32), copy=True)
    return copy.requires_grad_()


def cached_backward(
    model: nn.Module,
    loss: Callable[..., torch.Tensor],
    inputs: Mapping[str, Any],
    chunk_size: int,
    *,
    shared: Sequence[str] = ("logit_scale",),
    accelerator: "Accelerator | None" = None,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """Add the gradients of a contrastive loss to those of the model's weights, a chunk of the batch at a time.

    Equal to `loss(**model(**inputs)).backward()` with the same random choices, whatever the chunk size: what dropout
    and stochastic depth draw for a chunk is drawn again on its second way through, and the generators end where one
    pass over the chunks leaves them. A batch of one chunk is that very step, at no extra cost.

    Every rank of a group calls this, with as many rows as it has, one at least. All make as many forwards as the rank
    with most rows, because wrappers communicate in them: others repeat a row with no weight. Gradients are exchanged
    once, on the last chunk, but for those that ZeRO-2, ZeRO-3 and FSDP must exchange each time.

    Args:
        model: what the trainer calls: the model itself or its wrapper (`DistributedDataParallel`, DeepSpeed's engine,
            FSDP). It takes `inputs` by name and returns a mapping (or `ModelOutput`) with `image_embeds` and
            `text_embeds`, (rows, dim), and the `shared` outputs.
        loss: from the embeddings of this rank's whole batch and the shared outputs, by name, to a scalar; such as
            `functools.partial(objective.loss, labels=labels)`. It must not touch weights of the model.
        inputs: tensors (rows, ...), where the ranks communicate from (the device, with NCCL); all else is passed on.
        chunk_size: rows of a forward.
        shared: outputs that do not depend on the rows, such as the temperature: their gradient is counted once.
        accelerator: whose `backward` and `no_sync` to use; needed for DeepSpeed and for gradient scaling. With
            DeepSpeed the optimizer has stepped when this returns, as it has after `accelerator.backward`.
        group: the ranks that share the batch; None for all.

    Returns:
        The loss, a scalar without graph.

    Raises:
        ValueError: a chunk size below 1, inputs of different lengths, a rank without rows, or a model that does not
            return what `shared` and the loss need.
    """
    rows = _rows_of(inputs, chunk_size)
    tensors = [value for value in inputs.values() if isinstance(value, torch.Tensor)]
    counts = rows_of_ranks(rows, tensors[0].device, group)
    if 0 in counts:
        raise ValueError(f"expected at least one row on every rank, got {counts}")
    backward = torch.Tensor.backward if accelerator is None else accelerator.backward
    pieces = [slice(start, min(start + chunk_size, rows)) for start in range(0, rows, chunk_size)]
    own, spare = len(pieces), -(-max(counts) // chunk_size) - len(pieces)
    pieces += [slice(0, 1)] * spare
    if len(pieces) == 1:
        value = loss(**_outputs_of(model, inputs, pieces[0], shared))
        backward(value)
        return value.detach()

    # One tensor of each device that may draw: wrappers move inputs that lie elsewhere to the weights.
    devices = list({tensor.device: tensor for tensor in [*tensors, *model.parameters()]}.values())
    states, embedded = [], []
    with _accumulating(model, accelerator), torch.no_grad():
        for piece in pieces:
            states.append(RandomState(devices))
            embedded.append(_outputs_of(model, inputs, piece, shared))

    leaves = {name: _leaf(torch.cat([outputs[name] for outputs in embedded[:own]])) for name in EMBEDDINGS}
    leaves |= {name: _leaf(embedded[0][name]) for name in shared}
    del embedded
    with torch.enable_grad():
        value = loss(**leaves)
        found = torch.autograd.grad(value, list(leaves.values()), materialize_grads=True)
    gradients = dict(zip(leaves, found, strict=True))

    for index, piece in enumerate(pieces):
        is_last = index + 1 == len(pieces)
        with contextlib.nullcontext() if is_last else _accumulating(model, accelerator):
            states[index].restore()  # and the last chunk leaves the generators where the first pass did
            outputs = _outputs_of(model, inputs, piece, shared)
            # A function of this chunk with the loss's gradient. Parts that do not count are in it with weight zero, so
            # that every backward reaches the same weights.
            terms = [(outputs[name] * gradients[name][piece] * float(index < own)).sum() for name in EMBEDDINGS] + [
                (outputs[name] * gradients[name] * float(is_last)).sum() for name in shared
            ]
            backward(torch.stack(terms).sum())
    return value.detach()


__all__ = ["RandomState", "cached_backward", "checkpoint_activations"]
