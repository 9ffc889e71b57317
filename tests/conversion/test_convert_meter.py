"""A METER of transformers' and torchvision's parts, under its own names: its numbers from ours, or a clear error."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torchvision.models.swin_transformer import SwinTransformer
from transformers import BridgeTowerTextConfig, RobertaConfig, RobertaModel
from transformers.models.bridgetower.modeling_bridgetower import BridgeTowerBertCrossLayer

from conversion import convert_meter
from conversion.convert_meter import convert, convert_file
from tests.conversion.sources import DIM, SIDE, Tensors, microsoft_keys, random_weights, torchvision_swin, write
from tests.tiny_florence import save_tiny
from tests.tiny_fusion import VOCABULARY, random_texts, tiny_roberta_tokenizer
from transformers_florence import FlorenceProcessor, FlorenceVisionModel
from transformers_florence.losses_fusion import IGNORED_TOKEN
from transformers_florence.modeling_florence_fusion_heads import (
    FlorenceForImageTextRetrieval,
    FlorenceForPreTraining,
    FlorenceForQuestionAnswering,
)

WIDTH, HEADS, IMAGE_WIDTH = 24, 4, 4 * DIM


class Meter(nn.Module):
    """METER's parts and formulas; its names are those of the release."""

    def __init__(self, answers: int = 3) -> None:
        super().__init__()
        text = RobertaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=HEADS,
            intermediate_size=64,
            max_position_embeddings=52,
            type_vocab_size=1,
            layer_norm_eps=1e-5,
        )
        cross = BridgeTowerTextConfig(
            hidden_size=WIDTH, num_attention_heads=HEADS, intermediate_size=4 * WIDTH, layer_norm_eps=1e-12
        )
        cross._attn_implementation = "eager"
        self.swin = torchvision_swin()
        self.text_transformer = RobertaModel(text)  # with the pooler that METER does not call
        self.cross_modal_text_transform = nn.Linear(16, WIDTH)
        self.cross_modal_image_transform = nn.Linear(IMAGE_WIDTH, WIDTH)
        self.token_type_embeddings = nn.Embedding(2, WIDTH)
        self.cross_modal_text_layers = nn.ModuleList(BridgeTowerBertCrossLayer(cross) for _ in range(2))
        self.cross_modal_image_layers = nn.ModuleList(BridgeTowerBertCrossLayer(cross) for _ in range(2))
        self.cross_modal_text_pooler = nn.ModuleDict({"dense": nn.Linear(WIDTH, WIDTH)})
        self.cross_modal_image_pooler = nn.ModuleDict({"dense": nn.Linear(WIDTH, WIDTH)})
        self.vqa_classifier = nn.Sequential(
            nn.Linear(2 * WIDTH, 2 * WIDTH), nn.LayerNorm(2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, answers)
        )
        self.itm_score = nn.ModuleDict({"fc": nn.Linear(2 * WIDTH, 2)})
        self.rank_output = nn.Linear(2 * WIDTH, 1)
        self.mlm_score = nn.ModuleDict(
            {
                "transform": nn.ModuleDict(
                    {"dense": nn.Linear(WIDTH, WIDTH), "LayerNorm": nn.LayerNorm(WIDTH, eps=1e-12)}
                ),
                "decoder": nn.Linear(WIDTH, VOCABULARY),
            }
        )
        random_weights(self)

    def tensors(self, *heads: str) -> Tensors:
        """As the release saves them, with the heads named."""
        tensors: Tensors = {}
        every = ("vqa_classifier.", "itm_score.", "rank_output.", "mlm_score.")
        for name, tensor in self.state_dict().items():
            if name.startswith("swin.") or (name.startswith(every) and not name.startswith(heads or "-")):
                continue
            tensors[name.replace("mlm_score.decoder.bias", "mlm_score.bias")] = tensor
        swin = {name.removeprefix("swin."): tensor for name, tensor in self.state_dict().items() if "swin." in name}
        tensors |= {f"vit_model.{name}": tensor for name, tensor in microsoft_keys(swin).items()}
        tensors["vit_model.layers.0.blocks.1.attn_mask"] = torch.zeros(4, 49, 49)
        return tensors | {"text_transformer.embeddings.position_ids": torch.arange(52)[None]}

    def image_tokens(self, pixels: torch.Tensor) -> torch.Tensor:
        swin: SwinTransformer = self.swin
        return swin.norm(swin.features(pixels)).flatten(1, 2)

    def forward(self, pixels: torch.Tensor, input_ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Text states after the fusion, and both pooled."""
        text = self.cross_modal_text_transform(self.text_transformer(input_ids, mask).last_hidden_state)
        image = self.cross_modal_image_transform(self.image_tokens(pixels))
        x, y = text + self.token_type_embeddings.weight[0], image + self.token_type_embeddings.weight[1]
        hidden = (1 - mask[:, None, None].to(x.dtype)) * torch.finfo(x.dtype).min
        shown = torch.zeros(len(y), 1, 1, y.shape[1], dtype=x.dtype)
        for text_layer, image_layer in zip(self.cross_modal_text_layers, self.cross_modal_image_layers, strict=True):
            x, y = text_layer(x, y, hidden, shown)[0], image_layer(y, x, shown, hidden)[0]
        pooled = self.cross_modal_text_pooler["dense"](x[:, 0]), self.cross_modal_image_pooler["dense"](y.mean(1))
        return x, torch.cat(pooled, dim=1).tanh()


@pytest.fixture(scope="module")
def meter() -> Meter:
    return Meter().double().eval()


@pytest.fixture(scope="module")
def inputs() -> dict[str, torch.Tensor]:
    pixels = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return {"pixel_values": pixels, **random_texts(2)}


def outputs(meter: Meter, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return meter(inputs["pixel_values"], inputs["input_ids"], inputs["attention_mask"])


@torch.no_grad()
def test_answers_are_the_sources(meter, inputs):
    tensors = meter.tensors("vqa_classifier.", "itm_score.", "mlm_score.")  # as fine-tuning leaves the pretraining's
    model, conversion = convert(tensors, "here", answers=["no", "yes", "two"], heads=HEADS)
    assert type(model) is FlorenceForQuestionAnswering and model.dtype == torch.float64
    assert model.config.id2label == {0: "no", 1: "yes", 2: "two"} and model.config.num_hidden_layers == 2
    assert model.config.vision_config.image_size == 224 and model.config.vision_config.embed_type == "patch"
    expected = meter.vqa_classifier(outputs(meter, inputs)[1])
    assert_close(model(**inputs).logits, expected, rtol=0, atol=1e-9)
    heads = {name for name in conversion.left_out if name.startswith(("itm_score", "mlm_score"))}
    assert len(heads) == 8 and "left out    2  itm_score.fc.*: a head of another task" in str(conversion)
    assert conversion.left_out["text_transformer.pooler.dense.weight"] == "METER never calls it"
    assert len(conversion.tensors) == len(model.state_dict()) and not conversion.new


@torch.no_grad()
def test_pretraining_is_the_sources(meter, inputs):
    model, _ = convert(meter.tensors("itm_score.", "mlm_score."), "here", heads=HEADS)
    assert type(model) is FlorenceForPreTraining
    text, pooled = outputs(meter, inputs)
    output = model(**inputs)
    assert_close(output.itm_logits, meter.itm_score["fc"](pooled), rtol=0, atol=1e-9)
    transform = meter.mlm_score["transform"]
    words = transform["LayerNorm"](nn.functional.gelu(transform["dense"](text)))
    shown = inputs["attention_mask"].bool()
    assert_close(output.mlm_logits[shown], meter.mlm_score["decoder"](words)[shown], rtol=0, atol=1e-9)
    labels = torch.full_like(inputs["input_ids"], IGNORED_TOKEN)
    assert model(**inputs, labels=labels).loss.dtype == torch.float64


@torch.no_grad()
def test_ranking_is_the_sources(meter, inputs):
    """The log odds of a match are `rank_output`'s; the matching head that it came from is left out."""
    model, conversion = convert(meter.tensors("rank_output.", "itm_score.", "mlm_score."), "here", heads=HEADS)
    assert type(model) is FlorenceForImageTextRetrieval
    logits = model(**inputs).logits
    expected = meter.rank_output(outputs(meter, inputs)[1])[:, 0]
    assert_close(logits[:, 1] - logits[:, 0], expected, rtol=0, atol=1e-9)
    assert "frozen since" in conversion.left_out["itm_score.fc.weight"]
    model, _ = convert(meter.tensors("itm_score."), "here", heads=HEADS)
    assert_close(model(**inputs).logits, meter.itm_score["fc"](outputs(meter, inputs)[1]), rtol=0, atol=1e-9)


def clip_tensors(meter: Meter, *heads: str) -> Tensors:
    """The same on CLIP's image tower, of which two keys are enough to know it."""
    tensors = {name: tensor for name, tensor in meter.tensors(*heads).items() if not name.startswith("vit_model.")}
    tower = {"vit_model.visual.conv1.weight": torch.ones(4, 3, 8, 8), "vit_model.ln_final.bias": torch.ones(4)}
    return tensors | tower


@torch.no_grad()
def test_on_clip_the_text_encoder_fusion_and_heads_are_taken(meter, inputs, tmp_path):
    dual = save_tiny(tmp_path)
    vision = FlorenceVisionModel.from_pretrained(tmp_path)
    tensors = clip_tensors(meter, "vqa_classifier.")
    model, conversion = convert(tensors, "here", vision=vision, heads=HEADS)
    assert set(conversion.new) == {"model.image_transform.weight", "model.image_transform.bias"}
    assert "this is a start for training" in str(conversion)
    assert conversion.left_out["vit_model.ln_final.bias"].startswith("CLIP's image tower")
    assert conversion.left_out["cross_modal_image_transform.weight"] == "of CLIP's image tokens"
    assert_close(model.model.vision_model.float().state_dict(), dual.vision_model.state_dict(), rtol=0, atol=0)
    # From the fusion's input on the numbers are the source's.
    text = meter.text_transformer(inputs["input_ids"], inputs["attention_mask"]).last_hidden_state
    assert_close(model.model.encode_texts(inputs["input_ids"], inputs["attention_mask"]), text, rtol=0, atol=1e-9)
    tokens = meter.image_tokens(inputs["pixel_values"])
    model.model.image_transform = meter.cross_modal_image_transform
    logits = model.classifier(model.model.fuse(text, tokens, inputs["attention_mask"]).pooler_output)
    assert_close(logits, meter.vqa_classifier(outputs(meter, inputs)[1]), rtol=0, atol=1e-9)


def test_files_become_folders(meter, tmp_path: Path, capsys):
    tokenizer = tiny_roberta_tokenizer()
    tokenizer.save_pretrained(tmp_path / "words")
    tensors = {name: t.float() if t.is_floating_point() else t for name, t in meter.tensors("vqa_classifier.").items()}
    file = write(tmp_path / "release.pt", {"state_dict": tensors, "epoch": 9})
    (tmp_path / "answers.txt").write_text("no\nyes\ntwo\n", "utf-8")
    arguments = [str(file), str(tmp_path / "out"), "--tokenizer", str(tmp_path / "words"), "--heads", str(HEADS)]
    convert_meter.main([*arguments, "--answers", str(tmp_path / "answers.txt")])
    assert "wrote" in capsys.readouterr().out
    model = FlorenceForQuestionAnswering.from_pretrained(tmp_path / "out")
    expected = convert(tensors, "here", answers=["no", "yes", "two"], heads=HEADS)[0]
    assert_close(model.state_dict(), expected.state_dict(), rtol=0, atol=0)
    assert model.config.id2label == {0: "no", 1: "yes", 2: "two"}
    processor = FlorenceProcessor.from_pretrained(tmp_path / "out")
    assert processor.tokenizer.model_max_length == 50 and len(processor.tokenizer) == VOCABULARY
    assert processor.image_processor.crop_size["height"] == 224
    save_tiny(tmp_path / "florence")
    clip = write(tmp_path / "clip.pt", {"state_dict": clip_tensors(meter, "itm_score.", "mlm_score.")})
    arguments = [str(clip), str(tmp_path / "start"), "--tokenizer", str(tmp_path / "words"), "--heads", str(HEADS)]
    convert_meter.main([*arguments, "--vision", str(tmp_path / "florence")])
    assert FlorenceForPreTraining.from_pretrained(tmp_path / "start").config.hidden_size == WIDTH


def test_every_key_is_accounted_for(meter):
    tensors = meter.tensors("vqa_classifier.")
    tensors["cross_modal_text_layers.0.attention.self.extra.weight"] = torch.ones(1)
    tensors["vit_model.norm.strange"] = torch.ones(1)
    del tensors["cross_modal_image_layers.1.crossattention.self.key.bias"]
    tensors["token_type_embeddings.weight"] = torch.ones(3, WIDTH)
    with pytest.raises(ValueError) as caught:
        convert(tensors, "here", heads=HEADS)
    message = str(caught.value)
    assert "not consumed: cross_modal_text_layers.0.attention.self.extra.weight, vit_model.norm.strange" in message
    assert "not filled: model.fusion.image_layers.1.cross_attention.k_proj.bias" in message
    assert "token_type_embeddings.weight (expected (2, 24), got (3, 24))" in message


@pytest.mark.parametrize("head, task", [("nlvr2_classifier.0.weight", "nlvr2"), ("snli_classifier.0.weight", "snli")])
def test_other_tasks_are_refused(meter, head, task):
    tensors = meter.tensors("itm_score.", "mlm_score.") | {head: torch.ones(1)}
    with pytest.raises(ValueError, match=f"expected METER's weights for .* got those for {task}"):
        convert(tensors, "here", heads=HEADS)


def test_what_does_not_fit_is_refused(meter, tmp_path):
    save_tiny(tmp_path)
    vision = FlorenceVisionModel.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="expected METER's image tower in here"):
        convert({"a": torch.ones(1)}, "here")
    with pytest.raises(ValueError, match="expected one of METER's heads in here"):
        convert(meter.tensors(), "here")
    with pytest.raises(ValueError, match="expected Florence's image tower beside METER on CLIP, got none"):
        convert(clip_tensors(meter, "itm_score."), "here")
    with pytest.raises(ValueError, match="expected no tower beside METER on Swin, got one"):
        convert(meter.tensors("itm_score."), "here", vision=vision)
    with pytest.raises(ValueError, match="expected the names of 3 answers, got 1"):
        convert(meter.tensors("vqa_classifier."), "here", answers=["no"], heads=HEADS)
    tiny_roberta_tokenizer().save_pretrained(tmp_path / "words")
    file = write(tmp_path / "a.pt", meter.tensors("itm_score."))
    with pytest.raises(ValueError, match="expected a new or empty folder"):
        convert_file(file, tmp_path, str(tmp_path / "words"))
    tensors = meter.tensors("itm_score.")
    tensors["text_transformer.embeddings.word_embeddings.weight"] = torch.ones(300, 16, dtype=torch.float64)
    file = write(tmp_path / "b.pt", tensors)
    with pytest.raises(ValueError, match="expected a tokenizer of 300 tokens, got 261"):
        convert_file(file, tmp_path / "out", str(tmp_path / "words"), heads=HEADS)
