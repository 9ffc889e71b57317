"""The loss over all ranks: with two and with four processes against one that has the whole batch."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.models.clip.modeling_clip import image_text_contrastive_loss

from tests.gloo_ranks import run_ranks
from tests.tiny_florence import CONTEXT, VOCABULARY, random_pixels, tiny_model
from transformers_florence.losses_contrastive import sigmoid_loss, unicl_loss
from transformers_florence.training import distributed
from transformers_florence.training.distributed import global_sigmoid_loss, global_unicl_loss
from transformers_florence.training.objectives import ContrastiveObjective

RANKS, WIDTH, DIM = 4, 5, 3
LABELS = [0, 1, 0, 2, 1, 0, 3, 0, 2, 4]  # meanings that lie on several ranks, and some of which there is one
# The objective, its form, and how many of the first pairs each rank has.
CASES = [
    ("unicl", "mean", (3, 3)),
    ("unicl", "sum", (4, 1)),
    ("clip", "mean", (2, 3)),
    ("sigmoid", "mean", (3, 2)),
    ("sigmoid", "sum", (2, 2)),
    ("unicl", "mean", (2, 2, 2, 2)),
    ("unicl", "mean", (3, 1, 4, 2)),
    ("unicl", "sum", (1, 3, 0, 2)),  # a rank without any
    ("clip", "sum", (2, 2, 3, 1)),
    ("sigmoid", "mean", (1, 2, 3, 1)),
    ("sigmoid", "mean", (0, 1, 0, 2)),
]
FLORENCE_COUNTS = (3, 2)


class Towers(nn.Module):
    """A dual encoder of two matrices, in float64."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        for name in ("image", "text"):
            weight = torch.randn(WIDTH, DIM, generator=generator, dtype=torch.float64)
            setattr(self, name, nn.Parameter(weight))
        self.logit_scale = nn.Parameter(torch.tensor(1.2, dtype=torch.float64))
        self.logit_bias = nn.Parameter(torch.tensor(-0.7, dtype=torch.float64))

    def forward(self, images: torch.Tensor, texts: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(rows, WIDTH) twice -> unit embeddings (rows, DIM) twice, the scale and the bias."""
        embeds = F.normalize(images @ self.image, dim=-1), F.normalize(texts @ self.text, dim=-1)
        return *embeds, self.logit_scale.exp(), self.logit_bias.clone()


def pairs(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images and texts, (count, WIDTH), and labels, (count,); the same first ones whatever the count."""
    images, texts = torch.randn(2, len(LABELS), WIDTH, generator=torch.Generator().manual_seed(2)).double()
    return images[:count], texts[:count], torch.tensor(LABELS[:count])


def gradients_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.grad for name, weight in module.named_parameters() if weight.grad is not None}


def florence(objective: str) -> ContrastiveObjective:
    """A tiny dual encoder without stochastic depth, with prototypes, the same on every rank."""
    torch.manual_seed(5)
    return ContrastiveObjective(tiny_model(), objective=objective, num_labels=max(LABELS) + 1)


def florence_inputs(count: int) -> dict[str, torch.Tensor]:
    tokens = torch.randint(VOCABULARY - 2, (count, CONTEXT), generator=torch.Generator().manual_seed(6))
    tokens[:, 0], tokens[:, -1] = VOCABULARY - 2, VOCABULARY - 1
    return {"pixel_values": random_pixels(count), "input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


class LargestTensor(TorchDispatchMode):
    """How many elements the largest tensor has that is made meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *made])
        return result


def loss_on_rank(objective: str, reduction: str, outputs: tuple, labels: torch.Tensor, group: Any) -> torch.Tensor:
    images, texts, scale, bias = outputs
    if objective == "sigmoid":
        return global_sigmoid_loss(images, texts, labels, scale, bias, reduction=reduction, group=group)
    of_pairs = labels if objective == "unicl" else None
    # The bias takes part without effect: DDP waits for every weight.
    return global_unicl_loss(images, texts, of_pairs, scale, reduction=reduction, group=group) + 0 * bias


def work_of_a_rank(rank: int) -> dict[str, Any]:
    """Everything that more than one process is needed for; losses and averaged gradients."""
    groups = {2: dist.new_group([0, 1]), 4: dist.new_group([0, 1, 2, 3])}
    results: dict[str, Any] = {"cases": [None] * len(CASES), "florence": {}}
    for index, (objective, reduction, counts) in enumerate(CASES):
        if rank >= len(counts):
            continue
        group = groups[len(counts)]
        own = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
        images, texts, labels = pairs(sum(counts))
        wrapped = DistributedDataParallel(Towers(), process_group=group)
        loss = loss_on_rank(objective, reduction, wrapped(images[own], texts[own]), labels[own], group)
        loss.backward()
        results["cases"][index] = {"loss": loss.detach(), "gradients": gradients_of(wrapped.module)}

    if rank < len(FLORENCE_COUNTS):
        own = slice(sum(FLORENCE_COUNTS[:rank]), sum(FLORENCE_COUNTS[: rank + 1]))
        inputs = {name: value[own] for name, value in florence_inputs(sum(FLORENCE_COUNTS)).items()}
        for objective in ("unicl", "sigmoid"):
            module = florence(objective)
            module.group = groups[2]
            wrapped = DistributedDataParallel(module, process_group=groups[2])
            labels = torch.tensor(LABELS)[: sum(FLORENCE_COUNTS)][own]
            loss = module.loss(**wrapped(**inputs), labels=labels, class_labels=labels)
            loss.backward()
            results["florence"][objective] = {"loss": loss.detach(), "gradients": gradients_of(module)}

    rows = 16
    embeds = F.normalize(torch.randn(2, rows, 2, generator=torch.Generator().manual_seed(rank)), dim=-1)
    images, texts = (part.clone().requires_grad_() for part in embeds)
    with LargestTensor() as largest:
        global_unicl_loss(images, texts, torch.arange(rows), torch.tensor(3.0)).backward()
    results["largest"] = largest.elements

    try:
        nothing = torch.zeros(0, 2)
        global_unicl_loss(nothing, nothing, torch.arange(0), torch.tensor(3.0))
    except ValueError as error:
        results["empty"] = str(error)
    return results


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, Any]]:
    """What each of `RANKS` processes found; started once."""
    return run_ranks(work_of_a_rank, RANKS, tmp_path_factory.mktemp("ranks"))


def whole_batch(objective: str, reduction: str, count: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of one process: CLIP's from transformers, the sigmoid's from its definition."""
    towers = Towers()
    images, texts, labels = pairs(count)
    image_embeds, text_embeds, scale, bias = towers(images, texts)
    if objective == "unicl":
        loss = unicl_loss(image_embeds, text_embeds, labels, scale, reduction)
    elif objective == "clip":
        loss = image_text_contrastive_loss(scale * text_embeds @ image_embeds.T) * (
            2 * count if reduction == "sum" else 1
        )
    else:
        signs = torch.tensor([[1.0 if a == b else -1.0 for b in labels] for a in labels], dtype=torch.float64)
        loss = torch.log1p(torch.exp(-signs * (scale * image_embeds @ text_embeds.T + bias))).sum()
        loss = loss / count if reduction == "mean" else loss
    (loss + 0 * bias).backward()
    return loss.detach(), gradients_of(towers)


@pytest.mark.parametrize("index", range(len(CASES)), ids=[" ".join(map(str, case)) for case in CASES])
def test_ranks_together_have_the_loss_and_gradients_of_one_process(ranks, index):
    objective, reduction, counts = CASES[index]
    loss, gradients = whole_batch(objective, reduction, sum(counts))
    assert set(gradients) == {"image", "text", "logit_scale", "logit_bias"}
    assert all(gradients[name].abs().sum() > 1e-4 for name in ("image", "text", "logit_scale"))
    for result in ranks[: len(counts)]:
        found = result["cases"][index]
        assert_close(found["loss"], loss, rtol=1e-12, atol=1e-12)
        assert_close(found["gradients"], gradients, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("objective", ["unicl", "sigmoid"])
def test_two_ranks_of_florence_are_one(ranks, objective):
    module, count = florence(objective), sum(FLORENCE_COUNTS)
    output = module.model(**florence_inputs(count))
    arguments = output.image_embeds, output.text_embeds, torch.tensor(LABELS[:count]), output.logit_scale
    loss = unicl_loss(*arguments) if objective == "unicl" else sigmoid_loss(*arguments, module.logit_bias)
    labels, prototypes = arguments[2], module.prototypes
    loss = loss + F.cross_entropy(20 * output.image_embeds @ prototypes.T, labels, label_smoothing=0.1)
    loss = loss + 5 * (1 - F.cosine_similarity(output.text_embeds, prototypes.detach()[labels])).mean()
    loss.backward()
    gradients = gradients_of(module)
    assert gradients["model.logit_scale"].abs() > 1e-3
    for result in ranks[:2]:
        found = result["florence"][objective]
        assert_close(found["loss"], loss.detach(), rtol=1e-6, atol=1e-6)
        assert set(found["gradients"]) == set(gradients)
        for name, gradient in gradients.items():
            assert_close(
                found["gradients"][name], gradient, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
            )


def test_a_rank_holds_its_own_rows_of_the_logits_alone(ranks):
    assert [result["largest"] for result in ranks] == [16 * 64] * RANKS


def test_a_batch_that_is_empty_on_all_ranks_is_refused_on_all(ranks):
    assert all("at least one image-text pair, got an empty batch" in result["empty"] for result in ranks)


# One process ------------------------------------------------------------------------------------------------------


def embeddings(count: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """Unit images and texts, (count, 4), that collect gradients."""
    parts = torch.randn(2, count, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return [part.to(dtype).requires_grad_() for part in F.normalize(parts, dim=-1)]


@pytest.fixture
def group_of_one(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=(tmp_path / "store").as_uri(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def compare_with_the_whole(count: int, reduction: str) -> None:
    """Loss and gradients of both global losses against the functions of one batch."""
    labels = torch.tensor(LABELS[:count])
    scale, bias = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (4.0, -1.5))
    images, texts = embeddings(count)
    arguments = [images, texts, scale, bias]
    unicl = global_unicl_loss(images, texts, labels, scale, reduction=reduction)
    clip = global_unicl_loss(images, texts, None, scale, reduction=reduction)
    sigmoid = global_sigmoid_loss(images, texts, labels, scale, bias, reduction=reduction)
    pairs_of_losses = [
        (unicl, unicl_loss(images, texts, labels, scale, reduction)),
        (clip, unicl_loss(images, texts, torch.arange(count), scale, reduction)),
        (sigmoid, sigmoid_loss(images, texts, labels, scale, bias, reduction)),
    ]
    for ours, expected in pairs_of_losses:
        assert_close(ours, expected, rtol=1e-12, atol=1e-12)
        found, wanted = (
            torch.autograd.grad(loss, arguments, allow_unused=True, materialize_grads=True)
            for loss in (ours, expected)
        )
        assert_close(found, wanted, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("count", [1, 2, 10])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_one_process_needs_no_group(count, reduction):
    assert not dist.is_initialized()
    compare_with_the_whole(count, reduction)


def test_a_group_of_one_communicates_nothing(group_of_one, monkeypatch):
    for name in ("all_gather_into_tensor", "all_reduce", "reduce_scatter_tensor"):
        monkeypatch.setattr(dist, name, lambda *_, **__: pytest.fail("a collective was called"))
    compare_with_the_whole(7, "mean")


@pytest.mark.parametrize("logits", [1, 25, 39, 1000])
def test_blocks_of_rows_change_nothing(monkeypatch, logits):
    """Ten rows of ten in blocks of one, two, three and ten rows."""
    monkeypatch.setattr(distributed, "BLOCK_LOGITS", logits)
    compare_with_the_whole(10, "mean")


@pytest.mark.parametrize("loss", ["unicl", "sigmoid"])
def test_blocks_bound_the_logits_both_ways(monkeypatch, loss):
    monkeypatch.setattr(distributed, "BLOCK_LOGITS", 64 * 8)
    images, texts = embeddings(64)
    with LargestTensor() as largest:
        if loss == "unicl":
            value = global_unicl_loss(images, texts, torch.arange(64), torch.tensor(3.0))
        else:
            value = global_sigmoid_loss(images, texts, torch.arange(64), torch.tensor(3.0), torch.tensor(-2.0))
        value.backward()
    assert largest.elements == 64 * 8  # eight rows; the embeddings of both sides together have as many


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_embeddings_make_a_float32_loss(dtype):
    images, texts = embeddings(8, dtype)
    exact = unicl_loss(images.float(), texts.float(), torch.arange(8), torch.tensor(50.0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = global_unicl_loss(images, texts, torch.arange(8), torch.tensor(50.0))
    assert loss.dtype == torch.float32
    assert_close(loss, exact, rtol=1e-6, atol=0)
    assert torch.autograd.grad(loss, images)[0].dtype == dtype


ROWS = torch.eye(3)
BAD_INPUTS = {
    "no images": (dict(image_embeds=None), "image_embeds as a floating-point tensor, got NoneType"),
    "no images and no labels": (dict(image_embeds=None, labels=None), "image_embeds .* got NoneType"),
    "an image without its batch": (dict(image_embeds=ROWS[0], labels=None), r"both \(batch, dim\), got \(3,\)"),
    "fewer texts": (dict(text_embeds=ROWS[:2]), r"as many texts as images.*\(3, 3\).*\(2, 3\)"),
    "fewer labels": (dict(labels=torch.arange(2)), r"labels of shape \(3,\), got \(2,\)"),
    "an empty batch": (dict(image_embeds=ROWS[:0], text_embeds=ROWS[:0], labels=None), "an empty batch"),
    "another reduction": (dict(reduction="max"), "'mean' or 'sum', got 'max'"),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
@pytest.mark.parametrize("loss", [global_unicl_loss, global_sigmoid_loss])
def test_bad_input_is_refused(case, loss):
    changes, message = BAD_INPUTS[case]
    scalars = {"logit_scale": torch.tensor(1.0)}
    if loss is global_sigmoid_loss:
        scalars["logit_bias"] = torch.tensor(0.0)
    arguments = dict(image_embeds=ROWS, text_embeds=ROWS, labels=torch.arange(3), **scalars)
    with pytest.raises(ValueError, match=message):
        loss(**{**arguments, **changes})
