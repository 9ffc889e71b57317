"""`torch.compile` of forward and training, `torch.export`, and ONNX: one graph, any batch, the same numbers."""

import copy
from collections.abc import Iterator

import pytest
import torch
from torch._dynamo.utils import counters
from torch.export import Dim
from torch.testing import assert_close
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from tests.tiny_florence import CONTEXT, random_pixels
from tests.tiny_fusion import TOKENS
from tests.tiny_heads import HEADS, Tensors, batch_for, result_of, tiny_head
from transformers_florence import FlorenceForImageCaptioning, FlorenceModel

# Tracing a tower takes seconds, and the dual encoder's graph has both: the others are for `make test-slow`.
FIRST_FAST = [head if head is FlorenceModel else pytest.param(head, marks=pytest.mark.slow) for head in HEADS]
NEEDS_EXPORT = "needs the export extra: pip install 'transformers_florence[export]'"

pytestmark = [
    pytest.mark.filterwarnings("ignore:`treespec.children_specs` is deprecated"),  # transformers' exporters call it
    # transformers' hooks for recorded outputs remember the collector; strict export tells.
    pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects"),
]


@pytest.fixture(autouse=True)
def forget_graphs() -> Iterator[None]:
    """Each test compiles anew, and leaves no compiled code behind for the next."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def inputs_of(head: type[PreTrainedModel], count: int, tokens: int = TOKENS, pictures: int | None = None) -> Tensors:
    """What the head takes. A dual encoder, whose towers do not meet before the logits, can have other `pictures`."""
    batch = batch_for(head, count, tokens=tokens)
    return {**batch, "pixel_values": random_pixels(pictures)} if head is FlorenceModel and pictures else batch


def loss_of(output: ModelOutput) -> torch.Tensor:
    """The head's own loss, or for a tower the distance of its result from one."""
    return output.loss if "loss" in output else (result_of(output) - 1).square().mean()


FIRST = {"count": 3, "tokens": TOKENS, "pictures": 4}  # traced with these
OTHERS = [{"count": 1, "tokens": 4, "pictures": 1}, {"count": 2, "tokens": 6, "pictures": 5}]  # and called with these


def dynamic_shapes(head: type[PreTrainedModel], inputs: Tensors) -> dict[str, dict[int, Dim]]:
    """Any number of samples, texts of any length; pictures keep their size, clips their number of frames."""
    texts = {0: Dim("batch", min=1, max=64), 1: Dim("tokens", min=1, max=CONTEXT)}
    others = {0: Dim("pictures", min=1, max=64) if head is FlorenceModel else texts[0]}
    return {name: texts if name in ("input_ids", "attention_mask") else others for name in inputs}


@pytest.mark.parametrize("head", FIRST_FAST)
def test_forward_compiles_to_one_graph(head):
    """`fullgraph=True` raises at whatever cannot be traced; three batch sizes need no third graph."""
    model = tiny_head(head)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for size in (1, 2, 4):
            inputs = inputs_of(head, size)
            assert_close(result_of(compiled(**inputs)), result_of(model(**inputs)), atol=1e-5, rtol=1e-5)
    assert 0 < counters["stats"]["unique_graphs"] <= 2


def check_training(head: type[PreTrainedModel], backend: str, checkpointing: bool = False) -> None:
    """One graph, whose loss and gradients are those of the model as it is."""
    model = tiny_head(head).train()
    if checkpointing:
        model.activation_checkpointing_enable()
    inputs = batch_for(head, labels=True)
    plain = copy.deepcopy(model)
    torch.manual_seed(0)  # of the false pairs that pretraining draws
    expected = loss_of(plain(**inputs))
    expected.backward()
    torch.manual_seed(0)
    loss = loss_of(torch.compile(model, fullgraph=True, backend=backend)(**inputs))
    loss.backward()
    assert counters["stats"]["unique_graphs"] == 1
    assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    gradients = {name: weight.grad for name, weight in model.named_parameters()}
    assert_close(gradients, {name: weight.grad for name, weight in plain.named_parameters()}, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("head", FIRST_FAST)
def test_training_compiles_to_one_graph(head):
    check_training(head, "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("backend, checkpointing", [("aot_eager", True), ("inductor", False)])
def test_training_compiles_to_one_graph_in_other_ways(backend, checkpointing):
    check_training(FlorenceModel, backend, checkpointing)


@pytest.mark.slow
@pytest.mark.parametrize("head", HEADS)
def test_inductor_computes_the_same(head):
    model, inputs = tiny_head(head), inputs_of(head, **FIRST)
    with torch.no_grad():
        got = torch.compile(model, fullgraph=True)(**inputs)
        assert_close(result_of(got), result_of(model(**inputs)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("head", FIRST_FAST)
def test_export_with_a_dynamic_batch(head, strict):
    model = tiny_head(head)
    if head is FlorenceForImageCaptioning:
        model.config.use_cache = False  # torch.export cannot return transformers' EncoderDecoderCache
    inputs = inputs_of(head, **FIRST)
    program = torch.export.export(model, (), inputs, dynamic_shapes=dynamic_shapes(head, inputs), strict=strict)
    exported = program.module()
    with torch.no_grad():
        for sizes in OTHERS:
            other = inputs_of(head, **sizes)
            assert_close(result_of(exported(**other)), result_of(model(**other)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("head", FIRST_FAST)
def test_onnx_with_a_dynamic_batch(head, tmp_path):
    """Exported by transformers, run by onnxruntime alone, and by what transformers loads from the saved folder."""
    pytest.importorskip("onnx", reason=NEEDS_EXPORT)
    pytest.importorskip("onnxscript", reason=NEEDS_EXPORT)
    onnxruntime = pytest.importorskip("onnxruntime", reason=NEEDS_EXPORT)
    onnx = pytest.importorskip("transformers.exporters.exporter_onnx", reason="needs transformers 5.23 or newer")
    configs = pytest.importorskip("transformers.exporters.configs", reason="needs transformers 5.23 or newer")
    base = pytest.importorskip("transformers.exporters.base", reason="needs transformers 5.23 or newer")
    model = tiny_head(head)
    inputs = inputs_of(head, **FIRST)
    config = configs.OnnxConfig(dynamic_shapes=dynamic_shapes(head, inputs))
    onnx.OnnxExporter().export(model, inputs, config=config).save_pretrained(tmp_path)

    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    assert [each.name for each in session.get_inputs()] == list(inputs)
    loaded = base.ExportedModel.from_pretrained(tmp_path)
    with torch.no_grad():
        for sizes in [FIRST, *OTHERS]:
            other = inputs_of(head, **sizes)
            expected = result_of(model(**other))
            values = session.run(None, {name: value.numpy() for name, value in other.items()})
            found = dict(zip(names, map(torch.from_numpy, values), strict=True))
            found.setdefault(
                "feature_maps", [value for name, value in found.items() if name.startswith("feature_maps.")]
            )
            assert_close(result_of(found), expected, atol=1e-5, rtol=1e-5)
            assert_close(result_of(loaded(**other)), expected, atol=1e-5, rtol=1e-5)
