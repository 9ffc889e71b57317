"""`torch.compile` of forward and training, `torch.export`, and ONNX: one graph, any batch, the same numbers."""

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters
from torch.export import Dim
from torch.testing import assert_close
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from tests.tiny_florence import (
    CONTEXT,
    random_pixels,
    save_tiny,
    tiny_model,
    tiny_tokenizer,
    tiny_vision_config,
)
from transformers_florence import (
    FlorenceBackbone,
    FlorenceForImageClassification,
    FlorenceModel,
    FlorenceTextModel,
    FlorenceVisionModel,
)

HEADS = [FlorenceModel, FlorenceForImageClassification, FlorenceVisionModel, FlorenceTextModel, FlorenceBackbone]
# Tracing a tower takes seconds, and the dual encoder's graph has both: the others are for `make test-slow`.
FIRST_FAST = [FlorenceModel, *(pytest.param(head, marks=pytest.mark.slow) for head in HEADS[1:])]
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("compile")
    torch.manual_seed(0)
    save_tiny(folder)
    return folder


def inputs_of(head: type[PreTrainedModel], texts: list[str], pictures: int) -> dict[str, torch.Tensor]:
    """What the head takes. `texts` decide the number of tokens, so that it can change as well."""
    tokens = dict(tiny_tokenizer()(texts, return_tensors="pt", padding=True))
    pixels = {"pixel_values": random_pixels(pictures)}
    return {**tokens, **pixels} if head is FlorenceModel else tokens if head is FlorenceTextModel else pixels


def result_of(output: ModelOutput | dict) -> torch.Tensor:
    """What a model is for, as one tensor."""
    found = [output[name] for name in ("logits_per_image", "logits", "pooler_output") if name in output]
    return found[0] if found else output["feature_maps"][0]


FIRST = (["a cat", "a red bicycle", "some pictures of houses"], 3)  # traced with these
OTHERS = [(["dog"], 1), (["a cat", "mountain"], 5)]  # and called with these


def dynamic_shapes(inputs: dict[str, torch.Tensor]) -> dict[str, dict[int, Dim]]:
    """Any number of pictures, any number of texts of any length; pictures keep their size."""
    texts = {0: Dim("texts", min=1, max=64), 1: Dim("tokens", min=1, max=CONTEXT)}
    pictures = {0: Dim("pictures", min=1, max=64)}
    return {name: pictures if name == "pixel_values" else texts for name in inputs}


@pytest.mark.parametrize("head", FIRST_FAST)
def test_forward_compiles_to_one_graph(head, folder):
    """`fullgraph=True` raises at whatever cannot be traced; three batch sizes need no third graph."""
    model = head.from_pretrained(folder)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for size in (1, 2, 4):
            inputs = inputs_of(head, FIRST[0], size)
            assert_close(result_of(compiled(**inputs)), result_of(model(**inputs)), atol=1e-5, rtol=1e-5)
    assert 0 < counters["stats"]["unique_graphs"] <= 2


@pytest.mark.parametrize(
    ("backend", "checkpointing"),
    [
        ("aot_eager", False),
        pytest.param("aot_eager", True, marks=pytest.mark.slow),
        pytest.param("inductor", False, marks=pytest.mark.slow),
    ],
)
def test_training_compiles_to_one_graph(backend, checkpointing):
    model = tiny_model(vision_config=tiny_vision_config(drop_path_rate=0.0)).train()
    if checkpointing:
        model.activation_checkpointing_enable()
    inputs = {**inputs_of(FlorenceModel, FIRST[0], 3), "labels": torch.tensor([0, 1, 0])}
    plain = copy.deepcopy(model)
    expected = plain(**inputs).loss
    expected.backward()
    loss = torch.compile(model, fullgraph=True, backend=backend)(**inputs).loss
    loss.backward()
    assert counters["stats"]["unique_graphs"] == 1
    assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    gradients = {name: weight.grad for name, weight in model.named_parameters()}
    assert_close(gradients, {name: weight.grad for name, weight in plain.named_parameters()}, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_inductor_computes_the_same(folder):
    model = FlorenceModel.from_pretrained(folder)
    inputs = inputs_of(FlorenceModel, *FIRST)
    with torch.no_grad():
        got = torch.compile(model, fullgraph=True)(**inputs).logits_per_image
        assert_close(got, model(**inputs).logits_per_image, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("head", FIRST_FAST)
def test_export_with_a_dynamic_batch(head, strict, folder):
    model = head.from_pretrained(folder)
    inputs = inputs_of(head, *FIRST)
    program = torch.export.export(model, (), inputs, dynamic_shapes=dynamic_shapes(inputs), strict=strict)
    exported = program.module()
    with torch.no_grad():
        for texts, pictures in OTHERS:
            other = inputs_of(head, texts, pictures)
            assert_close(result_of(exported(**other)), result_of(model(**other)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("head", FIRST_FAST)
def test_onnx_with_a_dynamic_batch(head, folder, tmp_path):
    """Exported by transformers, run by onnxruntime alone, and by what transformers loads from the saved folder."""
    pytest.importorskip("onnx", reason=NEEDS_EXPORT)
    pytest.importorskip("onnxscript", reason=NEEDS_EXPORT)
    onnxruntime = pytest.importorskip("onnxruntime", reason=NEEDS_EXPORT)
    onnx = pytest.importorskip("transformers.exporters.exporter_onnx", reason="needs transformers 5.23 or newer")
    configs = pytest.importorskip("transformers.exporters.configs", reason="needs transformers 5.23 or newer")
    base = pytest.importorskip("transformers.exporters.base", reason="needs transformers 5.23 or newer")
    model = head.from_pretrained(folder)
    inputs = inputs_of(head, *FIRST)
    config = configs.OnnxConfig(dynamic_shapes=dynamic_shapes(inputs))
    onnx.OnnxExporter().export(model, inputs, config=config).save_pretrained(tmp_path)

    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    assert [each.name for each in session.get_inputs()] == list(inputs)
    loaded = base.ExportedModel.from_pretrained(tmp_path)
    with torch.no_grad():
        for texts, pictures in [FIRST, *OTHERS]:
            other = inputs_of(head, texts, pictures)
            expected = result_of(model(**other))
            values = session.run(None, {name: value.numpy() for name, value in other.items()})
            found = dict(zip(names, map(torch.from_numpy, values), strict=True))
            found.setdefault("feature_maps", [found.get("feature_maps.0")])
            assert_close(result_of(found), expected, atol=1e-5, rtol=1e-5)
            assert_close(result_of(loaded(**other)), expected, atol=1e-5, rtol=1e-5)
