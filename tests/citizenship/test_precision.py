"""Half precision, int8 weights, weights on disk, and attention chosen for each tower: what each may change."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForImageClassification, PreTrainedModel, TorchAoConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from tests.tiny_heads import HEADS, Tensors, batch_for, result_of, save_heads
from transformers_florence import (
    FlorenceForImageCaptioning,
    FlorenceForObjectDetection,
    FlorenceForPreTraining,
    FlorenceFusionModel,
    FlorenceModel,
    FlorenceProcessor,
    FlorenceVisionModel,
    bundled_checkpoint,
    load_checkpoint,
)
from transformers_florence.evaluation.zero_shot import build_zero_shot_classifier, embed_pixels, top_k_accuracy
from transformers_florence.training.lora import LORA_TARGETS

GALLERY = Path(__file__).parents[2] / "examples" / "gallery"
# What a low precision is not for: the last products, whose results are compared with each other.
LAST_LAYERS = ["visual_projection", "text_projection", "classifier", "itm_head", "mlm_head", "lm_head"]
BETWEEN = ("text_transform", "image_transform", "text_pooler", "image_pooler")  # linear layers that join the parts


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[type, Path]:
    """A checkpoint of every head."""
    return save_heads(tmp_path_factory.mktemp("heads"))


@torch.no_grad()
def compute(model: nn.Module, batch: Tensors) -> torch.Tensor:
    return result_of(model(**batch))


def gallery(count: int | None = None) -> tuple[torch.Tensor, list[str], list[str]]:
    """Pixels of pictures that the bundled checkpoint can name, their names, and all names to choose from."""
    names = (GALLERY / "names.txt").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in (GALLERY / "metadata.jsonl").read_text("utf-8").splitlines()]
    rows = [row for row in rows if row["name"] in set(names)][:count]
    processor = FlorenceProcessor.from_pretrained(bundled_checkpoint())
    pictures = [Image.open(GALLERY / row["file_name"]) for row in rows]
    return processor(images=pictures, return_tensors="pt")["pixel_values"], [row["name"] for row in rows], names


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_of_both_towers(dtype, attention):
    """Trained weights and real pictures, against float32.

    The tolerance: every branch that is added to the residual stream comes rounded, by up to half a unit in the last
    place, and the sum is rounded again. Independent errors add up in squares, so a tower with n branches moves its
    result by about sqrt(n) * eps of its length. Measured: a third of that.
    """
    folder = bundled_checkpoint()
    pixels, names, _ = gallery(8)
    texts = FlorenceProcessor.from_pretrained(folder)(text=names, return_tensors="pt", padding=True)
    full = FlorenceModel.from_pretrained(folder)
    half = FlorenceModel.from_pretrained(folder, dtype=dtype, attn_implementation=attention)
    assert {weight.dtype for weight in half.parameters()} == {dtype}
    with torch.no_grad():
        expected, got = full(pixel_values=pixels, **texts), half(pixel_values=pixels, **texts)
    assert got.image_embeds.dtype == got.text_embeds.dtype == dtype and got.logits_per_image.dtype == torch.float32
    vision, text = full.config.vision_config, full.config.text_config
    branches = {
        "image_embeds": 2 * sum(vision.depths) + len(vision.depths),
        "text_embeds": 2 * text.num_hidden_layers + 1,
    }
    for name, count in branches.items():
        error = (got[name].float() - expected[name]).norm(dim=-1)  # of vectors of length one
        assert 0 < error.max() < torch.finfo(dtype).eps * count**0.5


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head", HEADS)
def test_half_precision_of_every_head(head, dtype, attention, folders):
    """The tolerance is the one above, with two branches a layer, and twice for what lies behind the last one."""
    full = head.from_pretrained(folders[head])
    half = head.from_pretrained(folders[head], dtype=dtype, attn_implementation=attention)
    assert {weight.dtype for weight in half.parameters()} == {dtype}
    layers = sum(isinstance(module, GradientCheckpointingLayer) for module in full.modules())
    expected, got = compute(full, batch_for(head)), compute(half, batch_for(head)).float()
    # Products of vectors of unit length are off by a part of that length, however small they are themselves.
    scale = full.logit_scale.exp() * expected.numel() ** 0.5 if hasattr(full, "logit_scale") else expected.norm()
    assert 0 < (got - expected).norm() < 2 * (2 * layers) ** 0.5 * torch.finfo(dtype).eps * scale


def quantised(model_class: type[PreTrainedModel], folder: str | Path) -> PreTrainedModel:
    """Loaded with int8 weights, each row with a scale of its own, and with the last layers as they are."""
    torchao = pytest.importorskip("torchao.quantization", reason="needs torchao: pip install torchao")
    config = TorchAoConfig(torchao.Int8WeightOnlyConfig(version=2), modules_to_not_convert=LAST_LAYERS)
    return load_checkpoint(model_class, folder, quantization_config=config)


def is_int8(weight: torch.Tensor) -> bool:
    return type(weight).__name__ == "Int8Tensor"


def test_int8_weights_are_rounded_and_the_last_layers_are_left_alone():
    """A row has 256 steps from minus to plus its largest weight, and each weight is at the step next to it."""
    plain = dict(FlorenceModel.from_pretrained(bundled_checkpoint()).named_parameters())
    inside = {name for name in plain if name.endswith(tuple(f".{target}.weight" for target in LORA_TARGETS))}
    weights = dict(quantised(FlorenceModel, bundled_checkpoint()).named_parameters())
    assert {name for name, weight in weights.items() if is_int8(weight)} == inside
    for name, weight in weights.items():
        if name not in inside:
            assert torch.equal(weight, plain[name])
            continue
        step = plain[name].abs().amax(dim=1, keepdim=True) / 127.5
        steps = weight.dequantize() / step
        assert (steps - steps.round()).abs().max() < 1e-3 and steps.abs().max() < 128.5
        assert (steps - plain[name] / step).abs().max() < 0.501


def rounded(model: PreTrainedModel, plain: PreTrainedModel) -> PreTrainedModel:
    """`plain` with the weights that `model` computes with."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            plain.get_parameter(name).copy_(weight.dequantize() if is_int8(weight) else weight)
    return plain


def test_int8_layers_compute_with_the_rounded_weights():
    """Inside the image tower, where float32 otherwise takes a faster way that quantised weights do not know."""
    model = quantised(FlorenceVisionModel, bundled_checkpoint())
    expected = rounded(model, FlorenceVisionModel.from_pretrained(bundled_checkpoint()))
    batch = batch_for(FlorenceVisionModel)
    assert_close(compute(model, batch), compute(expected, batch), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("head", HEADS)
def test_an_int8_head_is_saved_and_loaded(head, folders, tmp_path):
    """The linear layers inside all parts and between them are rounded; what the head ends with is as it was."""
    model, plain = quantised(head, folders[head]), head.from_pretrained(folders[head])
    linear = {name for name, module in plain.named_modules() if isinstance(module, nn.Linear)}
    inside = {name for name in linear if name.endswith((*LORA_TARGETS, *BETWEEN))}
    assert {name.removesuffix(".weight") for name, weight in model.named_parameters() if is_int8(weight)} == inside
    for name, weight in plain.named_parameters():
        if name.removesuffix(".weight") not in inside:
            assert torch.equal(model.get_parameter(name), weight)
    before = compute(plain, batch_for(head))
    after = compute(model, batch_for(head))
    assert_close(after, compute(rounded(model, plain), batch_for(head)), atol=1e-5, rtol=1e-5)
    assert 0 < (after - before).norm() < 0.1 * before.norm()
    if any("." not in name for name, _ in plain.named_parameters()):
        return  # torchao's reader takes no weight without a module's name: `logit_scale`, as in transformers' CLIP
    model.save_pretrained(tmp_path)
    loaded = head.from_pretrained(tmp_path)
    assert {name for name, weight in loaded.named_parameters() if is_int8(weight)} == {
        f"{name}.weight" for name in inside
    }
    assert_close(compute(loaded, batch_for(head)), after, atol=1e-6, rtol=1e-6)


@pytest.mark.slow
def test_int8_names_as_many_pictures():
    """The bundled checkpoint on all pictures of the gallery that have a name, among all names it was asked about."""
    pixels, answers, names = gallery()
    targets = torch.tensor([names.index(name) for name in answers])
    tokenizer = FlorenceProcessor.from_pretrained(bundled_checkpoint()).tokenizer
    accuracy = {}
    for model in (FlorenceModel.from_pretrained(bundled_checkpoint()), quantised(FlorenceModel, bundled_checkpoint())):
        classifier = build_zero_shot_classifier(model, tokenizer, names, ("{}", "a picture of {}"))
        scores = embed_pixels(model, pixels) @ classifier.T
        accuracy[is_int8(model.text_model.encoder.layers[0].mlp.fc1.weight)] = top_k_accuracy(scores, targets, 1)
    print(f"top-1 of {len(answers)} pictures among {len(names)} names: float32 and int8 {accuracy}")
    assert accuracy[False] > 0.5 and accuracy[True] > accuracy[False] - 0.01


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("share", [0.1, 0.6, 0.9])
def test_weights_on_disk_change_nothing(head, share, folders, tmp_path):
    """What does not fit into a share of the memory stays in files and is read when its layer is about to run."""
    pytest.importorskip("accelerate", reason="needs accelerate: pip install 'transformers_florence[train]'")
    plain = head.from_pretrained(folders[head])
    budget = int(share * sum(weight.numel() * weight.element_size() for weight in plain.parameters()))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The following device_map keys do not match any submodules")
        options = {"device_map": "auto", "max_memory": {"cpu": budget}, "offload_folder": tmp_path}
        model = head.from_pretrained(folders[head], **options)

    def on_disk() -> list[str]:
        """Both names of a weight that two modules share."""
        return [name for name, weight in model.named_parameters(remove_duplicate=False) if weight.is_meta]

    away = on_disk()
    assert away and "disk" in model.hf_device_map.values()
    whole = ("CoSwinLayer", "ConvEmbed", "CLIPEncoderLayer", "RobertaLayer", "CoAttentionLayer", "DynamicHeadBlock")
    whole += ("VideoCoSwinLayer", "TubeEmbed")
    layers = [name for name, module in model.named_modules() if type(module).__name__ in whole]
    for layer in layers:  # none is torn apart
        assert len({name in away for name, _ in model.named_parameters() if name.startswith(f"{layer}.")}) == 1
    batch = batch_for(head)
    assert torch.equal(compute(model, batch), compute(plain, batch))
    assert torch.equal(compute(model, batch), compute(plain, batch)), "the second call reads the files again"
    assert on_disk() == away


def implementations(model: FlorenceModel) -> tuple[str, str]:
    """What the attention layers of the image tower and of the text tower look up when they run."""
    image = {layer.attention.config._attn_implementation for layer in model.vision_model.encoder.stages[1].layers}
    text = {layer.self_attn.config._attn_implementation for layer in model.text_model.encoder.layers}
    (image,), (text,) = image, text
    return image, text


def test_each_tower_has_its_own_attention(folders):
    folder, batch = folders[FlorenceModel], batch_for(FlorenceModel)
    expected = compute(FlorenceModel.from_pretrained(folder), batch)
    choice = {"vision_config": "eager", "text_config": "sdpa"}
    model = FlorenceModel.from_pretrained(folder, attn_implementation=choice)
    assert implementations(model) == ("eager", "sdpa")
    assert_close(compute(model, batch), expected, atol=1e-5, rtol=1e-5)
    # Only the image tower can tell its weights now: each window's rows add up to one.
    attentions = model(**batch, output_attentions=True).vision_model_output.attentions
    assert len(attentions) == 3 and all(torch.allclose(each.sum(-1), torch.tensor(1.0)) for each in attentions)

    model.set_attn_implementation({"vision_config": "sdpa", "text_config": "eager"})
    assert implementations(model) == ("sdpa", "eager")
    assert_close(compute(model, batch), expected, atol=1e-5, rtol=1e-5)
    assert model(**batch, output_attentions=True).text_model_output.attentions[0].shape[:2] == (3, 2)
    model.set_attn_implementation({"text_config": "flex_attention"})
    assert implementations(model) == ("sdpa", "flex_attention")
    with pytest.raises(ValueError, match="FlorenceVisionModel does not support"):
        model.set_attn_implementation({"vision_config": "flex_attention"})
    model.set_attn_implementation("eager")
    assert implementations(model) == ("eager", "eager")

    head = AutoModelForImageClassification.from_pretrained(folder, attn_implementation=choice)
    assert head.vision_model.encoder.stages[0].layers[0].attention.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("head", "choice", "parts"),
    [
        (
            FlorenceFusionModel,
            {"": "sdpa", "vision_config": "eager", "text_config": "sdpa"},
            {"": "fusion", "vision_config": "vision_model", "text_config": "text_model"},
        ),
        (
            FlorenceForPreTraining,
            {"": "eager", "vision_config": "sdpa", "text_config": "eager"},
            {"": "model.fusion", "vision_config": "model.vision_model", "text_config": "model.text_model"},
        ),
        (
            FlorenceForImageCaptioning,
            {"": "sdpa", "vision_config": "eager"},
            {"": "decoder", "vision_config": "vision_model"},
        ),
        (FlorenceForObjectDetection, {"": "sdpa", "vision_config": "eager"}, {"vision_config": "backbone"}),
    ],
)
def test_each_part_of_a_head_has_its_own_attention(head, choice, parts, folders):
    """Given for each configuration, as it is loaded or later; what is computed stays."""
    expected = compute(head.from_pretrained(folders[head]), batch_for(head))
    loaded = head.from_pretrained(folders[head], attn_implementation=choice)
    changed = head.from_pretrained(folders[head])
    changed.set_attn_implementation(choice)
    for model in (loaded, changed):
        for name, part in parts.items():
            attentions = [each for each in model.get_submodule(part).modules() if "Attention" in type(each).__name__]
            asked = {each.config._attn_implementation for each in attentions if hasattr(each, "config")}
            assert asked == {choice[name]}
        assert_close(compute(model, batch_for(head)), expected, atol=1e-5, rtol=1e-5)
