"""UniCL's checkpoints in every layout: the same numbers from our model, or one error that lists what does not fit."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from transformers import AutoModel, AutoProcessor, pipeline

from conversion import convert_unicl
from conversion.convert_unicl import TABLE, convert, convert_file, print_verification, verify
from conversion.key_tables import apply_table
from conversion.reading import read_content
from tests.conversion.sources import LAYOUTS, SIDE, Tensors, UniCL, pixels, texts, write
from tests.tiny_florence import tiny_tokenizer
from transformers_florence import FlorenceModel, FlorenceVisionConfig, load_checkpoint

SETTINGS = {
    "IMAGE_ENCODER": {
        "TYPE": "swin",
        "IMG_SIZE": SIDE,
        "DROP_PATH_RATE": 0.3,
        "SWIN": {"QK_SCALE": None, "EMBED_DIM": 8, "DEPTHS": (1, 2, 2), "NUM_HEADS": [1, 2, 4]},
    },
    "TEXT_ENCODER": {"TOKENIZER": "clip", "HEADS": 1, "LAYERS": 2, "WIDTH": 64, "AUTOGRESSIVE": True},
}


@pytest.fixture(scope="module")
def unicl() -> UniCL:
    return UniCL()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> str:
    """A tokenizer of the tower's 560 tokens."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def unicl_file(parity_path) -> Path:
    return parity_path("unicl.pt")


def checkpoint(unicl: UniCL, layout: str = "release") -> dict[str, Any]:
    """As UniCL's training saves it."""
    return {
        "model": unicl.tensors(layout),
        "optimizer": {"state": {0: {"step": 7, "exp_avg": torch.zeros(3)}}, "param_groups": [{"betas": (0.9, 0.999)}]},
        "lr_scheduler": {"base_values": [5e-4]},
        "max_accuracy": 30.1,
        "epoch": 31,
        "config": {"MODEL": SETTINGS, "SEED": 0},
        "amp": {"loss_scaler0": {"loss_scale": 65536.0}},
    }


# ------------------------------------------------------------------------------------ the same numbers as the formulas


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-9)])
def test_features_logits_and_gradients_are_those_of_the_source(layout: str, dtype: torch.dtype, tolerance: float):
    source = UniCL().to(dtype)
    model, _ = convert(source.tensors(layout), SETTINGS, "here")
    assert model.dtype == dtype
    images, ids = pixels().to(dtype), texts()
    image, text, logits = source(images, ids)
    output = model(ids, images)
    assert_close(output.vision_model_output.pooler_output, image, rtol=0, atol=tolerance)
    assert_close(output.text_model_output.pooler_output, text, rtol=0, atol=tolerance)
    assert_close(output.logits_per_image, logits, rtol=0, atol=tolerance)

    weights = torch.randn(logits.shape, dtype=dtype, generator=torch.Generator().manual_seed(6))
    (logits * weights).sum().backward()
    (output.logits_per_image * weights).sum().backward()
    expected = apply_table(source.tensors(layout, gradients=True), TABLE, "gradients")
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert expected.unknown == []
    assert_close(gradients, expected.tensors, rtol=0, atol=tolerance)
    assert max(gradient.abs().max() for gradient in gradients.values()) > 0.1


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", ["training.pth", "bare.pth", "module.bin", "bare.safetensors"])
def test_a_file_becomes_a_folder_bit_for_bit(layout: str, form: str, unicl: UniCL, tokenizer: str, tmp_path: Path):
    content: Any = checkpoint(unicl, layout)
    if form != "training.pth":
        content = content["model"]
    if form == "module.bin":
        content = {"module." + name: tensor for name, tensor in content.items()}
    source, output = write(tmp_path / form, content), tmp_path / "out"
    convert_file(source, output, tokenizer)
    expected, _ = convert(unicl.tensors(), SETTINGS, "here")
    for loaded in (FlorenceModel.from_pretrained(output), AutoModel.from_pretrained(output)):
        assert_close(loaded.state_dict(), expected.state_dict(), rtol=0, atol=0)
    config = load_checkpoint(FlorenceModel, output).config
    assert config.text_config.layer_norm_eps == 1e-12
    # What no shape tells comes from UniCL's configuration where the file holds it, else from what the releases share.
    saved = form == "training.pth"
    assert config.vision_config.image_size == (SIDE if saved else 224)
    assert config.vision_config.drop_path_rate == (0.3 if saved else 0.1)


def test_the_folder_serves_the_pipeline(unicl: UniCL, tokenizer: str, tmp_path: Path, capsys):
    source, output = write(tmp_path / "unicl.pth", checkpoint(unicl)), tmp_path / "out"
    convert_unicl.main([str(source), str(output), "--tokenizer", tokenizer])
    printed = capsys.readouterr().out
    assert "taken" in printed and f"wrote {output}" in printed
    assert "left out    5  image_encoder.layers.*.blocks.*.attn.relative_position_index: follows from" in printed
    processor = AutoProcessor.from_pretrained(output)
    assert processor.image_processor.size == {"shortest_edge": 128}
    assert processor.image_processor.crop_size == {"height": SIDE, "width": SIDE}
    assert processor.tokenizer.model_max_length == 12

    picture = Image.effect_noise((150, 128), 80).convert("RGB")
    names = ["a cat", "a dog on a mat", "a photo of a street and of other streets and of houses"]
    answers = pipeline("zero-shot-image-classification", model=str(output))(
        picture, candidate_labels=names, hypothesis_template="{}"
    )
    inputs = processor(images=picture, text=names, return_tensors="pt", padding="max_length")
    with torch.no_grad():
        logits = unicl(inputs["pixel_values"], inputs["input_ids"])[2]
    expected = dict(zip(names, logits.softmax(dim=1)[0].tolist(), strict=True))
    assert {answer["label"]: answer["score"] for answer in answers} == pytest.approx(expected, abs=1e-5)


# ------------------------------------------------------------------------------------------------- UniCL's own tensors


def test_every_case_of_the_original_is_matched(unicl_file: Path, capsys):
    found = verify(unicl_file)
    assert set(found) == {"square_shrunk_last", "nonsquare"}
    for kinds in found.values():
        assert {kind: len(named) for kind, named in kinds.items()} == {"float32": 15, "float64": 2, "gradients": 9}
    assert print_verification(found)
    convert_unicl.main(["--verify", str(unicl_file)])
    assert capsys.readouterr().out.count("ok ") == 12


@pytest.mark.parametrize("case", ["square_shrunk_last", "nonsquare"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_originals_tensors_convert_from_a_file(
    case: str, layout: str, unicl_file: Path, tmp_path: Path, tokenizer
):
    case = read_content(unicl_file)[case]
    image, text, image_projection, text_projection = LAYOUTS[layout]
    names = {"image_encoder.": f"{image}.", "text_encoder.": f"{text}."}
    names |= {"image_projection": image_projection, "text_projection": text_projection}
    pattern = re.compile("|".join(map(re.escape, names)))
    tensors = {
        pattern.sub(lambda match: names[match[0]], key, count=1): value for key, value in case["state_dict"].items()
    }
    model, conversion = convert(tensors, case["config"], "here")
    assert sum(why.startswith("follows") for why in conversion.left_out.values()) == len(conversion.left_out) == 10
    output = model(case["inputs"]["input_ids"], case["inputs"]["image"])
    assert_close(output.logits_per_image, case["outputs"]["logits_per_image"], rtol=0, atol=1e-5)
    # Its hundred tokens are no vocabulary of CLIP's kind: the folder is refused before it is made.
    source = write(tmp_path / "a.pth", {"model": tensors, "config": {"MODEL": case["config"]}})
    with pytest.raises(ValueError, match="expected a tokenizer of 100 tokens with the end token 99, got 560 tokens"):
        convert_file(source, tmp_path / "out", tokenizer)
    assert not (tmp_path / "out").exists()


def test_verification_fails_on_a_difference(unicl_file: Path, tmp_path: Path, capsys):
    content = read_content(unicl_file)
    content["nonsquare"]["outputs64"]["pooled"][0, 0] += 2e-9
    content["square_shrunk_last"]["grads"]["logit_scale"].fill_(float("nan"))
    file = write(tmp_path / "off.pt", content)
    with pytest.raises(SystemExit, match="off.pt: differences above the tolerances"):
        convert_unicl.main(["--verify", str(file)])
    failed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAILED")]
    assert len(failed) == 2
    assert "square_shrunk_last: gradients" in failed[0] and "nonsquare: float64" in failed[1]


def test_verification_wants_cases(tmp_path: Path):
    file = write(tmp_path / "a.pt", {"case": {"config": {}}})
    with pytest.raises(ValueError, match="expected cases with .*state_dict in .*a.pt, got 'case' without"):
        verify(file)


# ----------------------------------------------------------------------------------------------- the released shapes


def released(size: str) -> Tensors:
    """Keys and shapes of a released checkpoint, written out: Swin's of facts known, CLIP's of twelve layers of 512."""
    config = FlorenceVisionConfig.from_size(size)
    shapes: dict[str, tuple[int, ...]] = {
        "text_projection": (512, 512),
        "image_projection": (config.hidden_size, 512),
        "logit_scale": (),
        "text_encoder.positional_embedding": (77, 512),
        "text_encoder.token_embedding.weight": (49408, 512),
        "image_encoder.patch_embed.proj.weight": (config.embed_dim, 3, 4, 4),
        "image_encoder.patch_embed.proj.bias": (config.embed_dim,),
    }

    def linear(name: str, out_features: int, in_features: int) -> None:
        shapes[name + ".weight"], shapes[name + ".bias"] = (out_features, in_features), (out_features,)

    def norm(name: str, width: int) -> None:
        shapes[name + ".weight"] = shapes[name + ".bias"] = (width,)

    norm("text_encoder.ln_final", 512)
    norm("image_encoder.patch_embed.norm", config.embed_dim)
    norm("image_encoder.norm", config.hidden_size)
    for layer in range(12):
        block = f"text_encoder.resblocks.{layer}."
        shapes[block + "attn.in_proj_weight"], shapes[block + "attn.in_proj_bias"] = (1536, 512), (1536,)
        linear(block + "attn.out_proj", 512, 512)
        linear(block + "mlp.c_fc", 2048, 512)
        linear(block + "mlp.c_proj", 512, 2048)
        norm(block + "ln_1", 512)
        norm(block + "ln_2", 512)
    for stage, (dim, depth, heads) in enumerate(zip(config.embed_dims, config.depths, config.num_heads, strict=True)):
        for number in range(depth):
            block = f"image_encoder.layers.{stage}.blocks.{number}."
            if number % 2 and stage < 3:
                shapes[block + "attn_mask"] = (4 ** (3 - stage), 49, 49)
            shapes[block + "attn.relative_position_bias_table"] = (169, heads)
            shapes[block + "attn.relative_position_index"] = (49, 49)
            linear(block + "attn.qkv", 3 * dim, dim)
            linear(block + "attn.proj", dim, dim)
            linear(block + "mlp.fc1", 4 * dim, dim)
            linear(block + "mlp.fc2", dim, 4 * dim)
            norm(block + "norm1", dim)
            norm(block + "norm2", dim)
        if stage < 3:
            shapes[f"image_encoder.layers.{stage}.downsample.reduction.weight"] = (2 * dim, 4 * dim)
            norm(f"image_encoder.layers.{stage}.downsample.norm", 4 * dim)
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("size", "keys", "masks", "millions"),
    [("tiny", 339, 5, 91.34), ("base", 513, 11, 150.70)],
    ids=["Swin-T", "Swin-B"],
)
def test_every_key_of_the_releases_finds_its_place(size: str, keys: int, masks: int, millions: float):
    tensors = released(size)
    conversion = apply_table(tensors, TABLE, size)
    config = convert_unicl.unicl_config(conversion, {})
    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in FlorenceModel(config).state_dict().items()}
    assert len(tensors) == keys
    assert {name: tensor.shape for name, tensor in conversion.tensors.items()} == expected
    assert sum("mask" in key for key in conversion.left_out) == masks
    assert sum(shape.numel() for shape in expected.values()) / 1e6 == pytest.approx(millions, abs=0.005)
    published = FlorenceVisionConfig.from_size(size, embed_type="patch")
    assert config.vision_config == published
    assert (config.text_config.num_attention_heads, config.projection_dim) == (8, 512)


# ------------------------------------------------------------------------------------------------------------ refusals


def test_everything_that_does_not_fit_is_listed_at_once(unicl: UniCL):
    tensors = unicl.tensors()
    del tensors["text_encoder.ln_final.bias"], tensors["image_encoder.layers.1.blocks.0.attn.qkv.weight"]
    tensors |= {"image_encoder.extra": torch.ones(1), "image_encoder.norm.scale": torch.ones(1)}
    tensors["image_projection"] = torch.ones(12, 5)
    tensors["text_projection"] = torch.ones(3)
    tensors["text_encoder.resblocks.0.attn.in_proj_bias"] = torch.ones(5)
    tensors["image_encoder.norm.weight"] = torch.full((32,), float("inf"))
    tensors["image_encoder.norm.bias"] = torch.ones(32, dtype=torch.int64)
    tensors["visual.patch_embed.norm.bias"] = torch.ones(8)
    with pytest.raises(ValueError) as caught:
        convert(tensors, SETTINGS, "a.pth")
    consumed, filled, unfit = re.fullmatch(
        r"expected the weights of FlorenceModel in a.pth, got keys not consumed: (.*); not filled: (.*); unfit: (.*)",
        str(caught.value),
    ).groups()
    assert consumed.split(", ") == ["image_encoder.extra", "image_encoder.norm.scale"]
    assert set(filled.split(", ")) == {
        "text_model.final_layer_norm.bias",
        "text_projection.weight",
        *(f"vision_model.encoder.stages.1.layers.0.attention.{part}_proj.weight" for part in "qkv"),
        *(f"text_model.encoder.layers.0.self_attn.{part}_proj.bias" for part in "qkv"),
    }
    for complaint in (
        "image_encoder.norm.bias (expected finite floating-point numbers)",
        "image_encoder.norm.weight (expected finite floating-point numbers)",
        "image_projection (expected (5, 32), got (5, 12))",
        "text_encoder.resblocks.0.attn.in_proj_bias (expected three equal parts, got (5,))",
        "text_projection (expected a matrix, got (3,))",
        "visual.patch_embed.norm.bias (its place is taken by image_encoder.patch_embed.norm.bias)",
    ):
        assert complaint in unfit


def test_no_kind_of_key_can_be_missing(unicl: UniCL):
    kinds = {re.sub(r"\d+", "*", key): key for key in unicl.tensors()}
    assert len(kinds) == 37
    for key in kinds.values():
        tensors = unicl.tensors()
        del tensors[key]
        if key.endswith(("index", "mask")):
            convert(tensors, SETTINGS, "here")
        else:
            with pytest.raises(ValueError, match="in here, got keys not filled: "):
                convert(tensors, SETTINGS, "here")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"IMAGE_ENCODER": {"TYPE": "focal"}}, "IMAGE_ENCODER.TYPE: expected 'swin' in here, got 'focal'"),
        ({"IMAGE_ENCODER": {"SWIN": {"QK_SCALE": 0.5}}}, "SWIN.QK_SCALE: expected None in here, got 0.5"),
        ({"TEXT_ENCODER": {"TOKENIZER": "bert"}}, "TEXT_ENCODER.TOKENIZER: expected 'clip' in here, got 'bert'"),
        (
            {"IMAGE_ENCODER": {"SWIN": {"DEPTHS": [1, 2, 6]}}},
            r"in here, by its .*, depths: \[1, 2, 6\], got",
        ),
        ({"TEXT_ENCODER": {"LAYERS": 12, "WIDTH": 512}}, "hidden_size: 512, got 64; num_hidden_layers: 12, got 2$"),
        ({"TEXT_ENCODER": {"HEADS": 3}}, "num_attention_heads"),
        ({"TEXT_ENCODER": {"HEADS": "1"}}, "num_attention_heads"),
        ({"IMAGE_ENCODER": {"IMG_SIZE": -1}}, "image_size"),
        ({"TEXT_ENCODER": [1]}, "expected a dictionary under TEXT_ENCODER in UniCL's configuration"),
    ],
)
def test_settings_of_another_model_are_refused(settings: dict[str, Any], message: str, unicl: UniCL):
    with pytest.raises(ValueError, match=message):
        convert(unicl.tensors(), settings, "here")


def test_a_text_tower_that_attends_to_padding_gives_no_folder(unicl: UniCL, tokenizer: str, tmp_path: Path):
    settings = {"MODEL": {"TEXT_ENCODER": {"AUTOGRESSIVE": False}}}
    source = write(tmp_path / "a.pth", {"model": unicl.tensors(), "config": settings})
    with pytest.raises(ValueError, match="AUTOGRESSIVE: expected True, .* in .*a.pth"):
        convert_file(source, tmp_path / "out", tokenizer)


def test_a_folder_with_something_in_it_is_left_alone(unicl: UniCL, tokenizer: str, tmp_path: Path):
    source = write(tmp_path / "a.pth", unicl.tensors())
    with pytest.raises(ValueError, match="expected a new or empty folder"):
        convert_file(source, tmp_path, tokenizer)
    assert list(tmp_path.iterdir()) == [source]


def test_the_temperature_has_no_bound(unicl: UniCL):
    """CLIP's is one hundred, whose logarithm is 4.6; UniCL has none."""
    model, _ = convert(unicl.tensors() | {"logit_scale": torch.tensor(4.7)}, SETTINGS, "here")
    output = model(pixel_values=torch.rand(1, 3, 32, 32))
    assert output.logit_scale.item() == pytest.approx(math.exp(4.7))


@pytest.mark.parametrize("arguments", [[], ["a.pth"], ["a.pth", "out"], ["--tokenizer", "folder"]])
def test_half_a_command_is_explained(arguments: list[str], capsys):
    with pytest.raises(SystemExit):
        convert_unicl.main(arguments)
    assert "expected --verify FILE, or source, output and --tokenizer" in capsys.readouterr().err
