"""UniCL's loss against the paper's equations in plain loops, CLIP's loss, finite differences, and its symmetries.

The sigmoid loss against SigLIP's model in transformers and binary cross entropies one by one.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import SiglipConfig, SiglipModel
from transformers.models.clip.modeling_clip import image_text_contrastive_loss

from transformers_florence.losses_contrastive import (
    positive_cross_entropy,
    sigmoid_loss,
    sigmoid_rows,
    unicl_loss,
    unicl_rows,
)

LABELS = [[0], [0, 1, 2], [5, 5], [0, 1, 0, 2], [7, 7, 7, 7], [-3, 2**40, -3, 2**40, 0]]
label_lists = st.lists(st.integers(-3, 3), min_size=1, max_size=16)


def pairs(batch: int, dim: int = 6, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """Unit image and text embeddings, (batch, dim)."""
    generator = torch.Generator().manual_seed(seed)
    images, texts = torch.randn(2, batch, dim, generator=generator, dtype=torch.float64)
    return [F.normalize(images, dim=-1).to(dtype), F.normalize(texts, dim=-1).to(dtype)]


def paper_loss(images: torch.Tensor, texts: torch.Tensor, labels: list[int], tau: float) -> float:
    """Florence's equations 1 to 3, one exponential at a time."""

    def one_way(queries: list[list[float]], keys: list[list[float]]) -> float:
        total = 0.0
        for i, query in enumerate(queries):
            scores = [math.exp(tau * sum(a * b for a, b in zip(query, key, strict=True))) for key in keys]
            positives = [k for k, label in enumerate(labels) if label == labels[i]]
            total -= sum(math.log(scores[k] / sum(scores)) for k in positives) / len(positives)
        return total

    return one_way(images.tolist(), texts.tolist()) + one_way(texts.tolist(), images.tolist())


@pytest.mark.parametrize("labels", LABELS, ids=str)
@pytest.mark.parametrize("tau", [1.0, 14.3, 100.0])
def test_sum_is_the_papers_equations(labels, tau):
    images, texts = pairs(len(labels))
    loss = unicl_loss(images, texts, torch.tensor(labels), torch.tensor(tau), "sum")
    assert loss.dtype == torch.float64 and loss.shape == ()
    assert loss.item() == pytest.approx(paper_loss(images, texts, labels, tau), rel=1e-7, abs=1e-9)


@settings(max_examples=60)
@given(label_lists, st.floats(0.1, 100), st.integers(0, 1000))
def test_sum_is_twice_the_batch_times_the_mean(labels, tau, seed):
    images, texts = pairs(len(labels), seed=seed)
    arguments = images, texts, torch.tensor(labels), torch.tensor(tau)
    assert_close(unicl_loss(*arguments, "sum"), 2 * len(labels) * unicl_loss(*arguments, "mean"))
    assert_close(unicl_loss(*arguments), unicl_loss(*arguments, "mean"), rtol=0, atol=0)


@pytest.mark.parametrize("batch", [1, 2, 7, 32])
@pytest.mark.parametrize("labels", [torch.arange, torch.randperm, lambda batch: -5 * torch.arange(batch) + 3])
def test_unique_labels_give_clips_loss(batch, labels):
    images, texts = pairs(batch, dtype=torch.float32)
    scale = torch.tensor(1 / 0.07)
    expected = image_text_contrastive_loss(scale * texts @ images.T)
    assert_close(unicl_loss(images, texts, labels(batch), scale), expected, rtol=1e-6, atol=1e-7)


def test_a_single_pair_costs_nothing():
    images, texts = (tensor.requires_grad_() for tensor in pairs(1))
    for reduction in ("mean", "sum"):
        loss = unicl_loss(images, texts, torch.tensor([3]), torch.tensor(50.0), reduction)
        assert loss.item() == 0
        assert all(gradient.abs().max() == 0 for gradient in torch.autograd.grad(loss, (images, texts)))


@settings(max_examples=40)
@given(st.integers(1, 16), st.floats(0, 100), st.integers(0, 1000))
def test_one_label_for_all_cannot_fall_below_its_collapse(batch, tau, seed):
    """Every text is a positive of every image: at best all are equally near, which costs ln(batch) a side."""
    labels, scale = torch.zeros(batch, dtype=torch.long), torch.tensor(tau)
    floor = 2 * math.log(batch)
    images, texts = pairs(batch, seed=seed)
    collapsed = images[:1].expand(batch, -1)
    assert unicl_loss(collapsed, collapsed, labels, scale, "sum").item() / batch == pytest.approx(floor, abs=1e-9)
    assert unicl_loss(images, texts, labels, scale, "sum").item() / batch >= floor - 1e-9


@settings(max_examples=60)
@given(st.data(), label_lists, st.integers(0, 1000))
def test_neither_order_nor_names_of_labels_matter(data, labels, seed):
    images, texts = pairs(len(labels), seed=seed)
    scale = torch.tensor(14.3)
    expected = unicl_loss(images, texts, torch.tensor(labels), scale)
    order = torch.tensor(data.draw(st.permutations(range(len(labels)))))
    assert_close(unicl_loss(images[order], texts[order], torch.tensor(labels)[order], scale), expected)
    names = data.draw(st.lists(st.integers(-(2**62), 2**62), min_size=7, max_size=7, unique=True))
    renamed = torch.tensor([names[label + 3] for label in labels])
    assert unicl_loss(images, texts, renamed, scale).item() == expected.item()
    assert_close(unicl_loss(texts, images, renamed, scale), expected)  # and the two sides are alike


def test_a_shared_label_is_felt():
    """The same pairs under other labels: merging two meanings must change the loss, and pull across the pairs."""
    images, texts = pairs(3)
    images.requires_grad_()
    losses = [unicl_loss(images, texts, torch.tensor(labels), torch.tensor(5.0)) for labels in ([0, 1, 2], [0, 1, 0])]
    assert abs(losses[0].item() - losses[1].item()) > 1e-3
    pulls = [torch.autograd.grad(loss, images)[0][0] @ texts[2] for loss in losses]
    assert pulls[1] < pulls[0]  # descent moves image 0 towards text 2 once they mean the same


@pytest.mark.parametrize("labels", LABELS[1:], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradients_are_finite_differences(labels, reduction):
    images, texts = (tensor.requires_grad_() for tensor in pairs(len(labels), dim=3))
    log_scale = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)

    def loss(images: torch.Tensor, texts: torch.Tensor, log_scale: torch.Tensor) -> torch.Tensor:
        return unicl_loss(images, texts, torch.tensor(labels), log_scale.exp(), reduction)

    assert torch.autograd.gradcheck(loss, (images, texts, log_scale), atol=1e-8, rtol=1e-6)


def test_gradients_are_softmax_minus_target():
    labels = torch.tensor([0, 1, 0, 2, 1])
    images, texts = (tensor.requires_grad_() for tensor in pairs(5))
    unicl_loss(images, texts, labels, torch.tensor(8.0), "sum").backward()
    with torch.no_grad():
        logits = 8.0 * images @ texts.T
        same = (labels[:, None] == labels).double()
        error = logits.softmax(dim=1) + logits.softmax(dim=0) - same / same.sum(1, keepdim=True) - same / same.sum(0)
        assert_close(images.grad, 8.0 * error @ texts)
        assert_close(texts.grad, 8.0 * error.T @ images)


# Bounds on the relative error that half-precision embeddings bring at the highest temperature: their own rounding.
@pytest.mark.parametrize("dtype, bound", [(torch.float16, 0.008 / 64.2), (torch.bfloat16, 0.088 / 64.2)])
@pytest.mark.parametrize("labels", [list(range(32)), [index % 5 for index in range(32)]], ids=["unique", "shared"])
def test_half_precision_stays_near(dtype, bound, labels):
    images, texts = pairs(32, dim=64)
    arguments = torch.tensor(labels), torch.tensor(100.0)
    exact = unicl_loss(images, texts, *arguments)
    half = unicl_loss(images.to(dtype), texts.to(dtype), *arguments)
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(exact.item(), rel=bound)


def test_autocast_does_not_reach_the_logits():
    """A product in bfloat16 would move a logit of 100 by up to a quarter."""
    images, texts = pairs(32, dim=64, dtype=torch.float32)
    arguments = images, texts, torch.arange(32), torch.tensor(100.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = unicl_loss(*arguments)
    assert inside.dtype == torch.float32
    assert_close(inside, unicl_loss(*arguments), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_extreme_similarities_stay_finite(dtype):
    """Texts that are the images' opposites, at CLIP's highest temperature: logits from -100 to 100."""
    images = torch.eye(4, dtype=dtype).requires_grad_()
    for texts in (images.detach(), -images.detach(), images.detach().roll(1, 0)):
        loss = unicl_loss(images, texts, torch.tensor([0, 1, 1, 2]), torch.tensor(100.0))
        assert torch.isfinite(loss) and torch.isfinite(torch.autograd.grad(loss, images)[0]).all()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8])
def test_any_integer_type_labels(dtype):
    images, texts = pairs(4)
    labels, scale = torch.tensor([0, 1, 0, 2]), torch.tensor(5.0)
    assert unicl_loss(images, texts, labels.to(dtype), scale) == unicl_loss(images, texts, labels, scale)


def test_cross_entropy_of_a_rectangle():
    """Fewer texts than images, as when equal texts are kept once: soft targets of torch's own cross entropy."""
    logits = torch.randn(5, 3, dtype=torch.float64)
    positives = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 1, 1], [0, 0, 1], [0, 1, 0]], dtype=torch.bool)
    targets = positives.double() / positives.sum(dim=1, keepdim=True)
    assert_close(positive_cross_entropy(logits, positives), F.cross_entropy(logits, targets, reduction="none"))


@pytest.mark.parametrize("labels", LABELS, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_parts_of_the_rows_add_up_to_the_whole(labels, rows):
    images, texts = pairs(len(labels))
    numbers, scale, bias = torch.tensor(labels), torch.tensor(14.3), torch.tensor(-3.0)

    def total(row_loss, queries: torch.Tensor, keys: torch.Tensor, *scalars: torch.Tensor) -> torch.Tensor:
        parts = zip(queries.split(rows), numbers.split(rows), strict=True)
        return torch.cat([row_loss(part, keys, own, numbers, *scalars) for part, own in parts]).sum()

    both_ways = total(unicl_rows, images, texts, scale) + total(unicl_rows, texts, images, scale)
    assert_close(both_ways, unicl_loss(images, texts, numbers, scale, "sum"))
    assert_close(
        total(sigmoid_rows, images, texts, scale, bias), sigmoid_loss(images, texts, numbers, scale, bias, "sum")
    )


def test_unique_labels_give_siglips_loss():
    tower = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    config = SiglipConfig(
        text_config=dict(vocab_size=20, max_position_embeddings=4, pad_token_id=0, **tower),
        vision_config=dict(image_size=8, patch_size=4, **tower),
    )
    model = SiglipModel(config).eval()
    with torch.no_grad():
        model.logit_scale.fill_(1.5)
        model.logit_bias.fill_(-2.5)
        output = model(input_ids=torch.randint(20, (5, 4)), pixel_values=torch.randn(5, 3, 8, 8), return_loss=True)
        arguments = output.image_embeds, output.text_embeds, torch.randperm(5), model.logit_scale.exp()
        assert_close(sigmoid_loss(*arguments, model.logit_bias), output.loss)


@pytest.mark.parametrize("labels", LABELS, ids=str)
@pytest.mark.parametrize(("tau", "bias"), [(10.0, -10.0), (1.0, 0.5), (100.0, -30.0)])
def test_sigmoid_is_one_question_for_each_pair(labels, tau, bias):
    images, texts = pairs(len(labels))
    total = 0.0
    for i, image in enumerate(images.tolist()):
        for k, text in enumerate(texts.tolist()):
            logit = tau * sum(a * b for a, b in zip(image, text, strict=True)) + bias
            total += math.log(1 + math.exp(-logit if labels[i] == labels[k] else logit))
    arguments = images, texts, torch.tensor(labels), torch.tensor(tau), torch.tensor(bias)
    loss = sigmoid_loss(*arguments, "sum")
    assert loss.dtype == torch.float64 and loss.shape == ()
    assert loss.item() == pytest.approx(total, rel=1e-6)
    assert sigmoid_loss(*arguments).item() == pytest.approx(total / len(labels), rel=1e-6)


def test_sigmoid_gradients_are_finite_differences():
    images, texts = (tensor.requires_grad_() for tensor in pairs(4, dim=3))
    scalars = [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (1.3, -0.8)]

    def loss(images: torch.Tensor, texts: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return sigmoid_loss(images, texts, torch.tensor([0, 1, 0, 2]), scale, bias)

    assert torch.autograd.gradcheck(loss, (images, texts, *scalars), atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_sigmoid_stays_finite_and_out_of_autocast(dtype):
    images = torch.eye(4, dtype=dtype).requires_grad_()
    for texts in (images.detach(), -images.detach()):
        arguments = texts, torch.tensor([0, 1, 1, 2]), torch.tensor(100.0), torch.tensor(-10.0)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = sigmoid_loss(images, *arguments)
        assert loss.dtype == torch.float32
        assert_close(loss, sigmoid_loss(images.float(), texts.float(), *arguments[1:]), rtol=0, atol=0)
        assert torch.isfinite(loss) and torch.isfinite(torch.autograd.grad(loss, images)[0]).all()


ROWS = torch.eye(3)
BAD_INPUTS = {
    "fewer texts than images": (dict(text_embeds=ROWS[:2]), r"as many texts as images.*\(3, 3\).*\(2, 3\)"),
    "other width of the texts": (dict(text_embeds=torch.ones(3, 4)), r"as many texts as images.*\(3, 4\)"),
    "one picture without its batch": (dict(image_embeds=ROWS[0], text_embeds=ROWS[0]), r"\(batch, dim\).*\(3,\)"),
    "a grid of embeddings": (dict(image_embeds=ROWS[None], text_embeds=ROWS[None]), r"\(batch, dim\).*\(1, 3, 3\)"),
    "an empty batch": (dict(image_embeds=ROWS[:0], text_embeds=ROWS[:0], labels=torch.arange(0)), "an empty batch"),
    "integer images": (dict(image_embeds=ROWS.long()), "image_embeds as a floating-point tensor, got torch.int64"),
    "texts as a list": (dict(text_embeds=ROWS.tolist()), "text_embeds as a floating-point tensor, got list"),
    "no images": (dict(image_embeds=None), "image_embeds .* got NoneType"),
    "labels too few": (dict(labels=torch.arange(2)), r"labels of shape \(3,\), got \(2,\)"),
    "labels as a column": (dict(labels=torch.arange(3)[:, None]), r"labels of shape \(3,\), got \(3, 1\)"),
    "labels as floats": (dict(labels=torch.ones(3)), "labels as an integer tensor, got torch.float32"),
    "labels as truth values": (dict(labels=torch.ones(3, dtype=torch.bool)), "integer tensor, got torch.bool"),
    "labels as a list": (dict(labels=[0, 1, 2]), "labels as an integer tensor, got list"),
    "labels missing": (dict(labels=None), "labels as an integer tensor, got NoneType"),
    "a scale for each pair": (dict(logit_scale=torch.ones(3)), r"a scalar logit_scale, got shape \(3,\)"),
    "a scale without a tensor": (dict(logit_scale=100.0), "logit_scale as a floating-point tensor, got float"),
    "another reduction": (dict(reduction="none"), "'mean' or 'sum', got 'none'"),
    "no reduction": (dict(reduction=None), "'mean' or 'sum', got None"),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_input_is_refused(case):
    changes, message = BAD_INPUTS[case]
    arguments = dict(image_embeds=ROWS, text_embeds=ROWS, labels=torch.arange(3), logit_scale=torch.tensor(1.0))
    with pytest.raises(ValueError, match=message):
        unicl_loss(**{**arguments, **changes})


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_input_of_the_sigmoid_is_refused_alike(case):
    changes, message = BAD_INPUTS[case]
    arguments = dict(image_embeds=ROWS, text_embeds=ROWS, labels=torch.arange(3), logit_scale=torch.tensor(1.0))
    with pytest.raises(ValueError, match=message):
        sigmoid_loss(**{**arguments, **changes}, logit_bias=torch.tensor(0.0))


BAD_BIASES = {
    "a bias without a tensor": (-10.0, "logit_bias as a floating-point tensor, got float"),
    "no bias": (None, "logit_bias as a floating-point tensor, got NoneType"),
    "an integer": (torch.tensor(-10), "logit_bias as a floating-point tensor, got torch.int64"),
    "a bias for each text": (torch.zeros(3), r"a scalar logit_bias, got shape \(3,\)"),
}


@pytest.mark.parametrize("case", BAD_BIASES)
def test_a_bad_bias_is_refused(case):
    bias, message = BAD_BIASES[case]
    with pytest.raises(ValueError, match=message):
        sigmoid_loss(ROWS, ROWS, torch.arange(3), torch.tensor(1.0), bias)
