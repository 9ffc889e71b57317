"""Answers, matches and pretraining: losses, learning, folders of one head for another, doors, parameter groups."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

from tests.oracles import randomize
from tests.tiny_florence import random_pixels
from tests.tiny_fusion import (
    ANSWERS,
    TOKENS,
    VOCABULARY,
    random_texts,
    text_configs,
    tiny_fusion_config,
    tiny_roberta_tokenizer,
)
from transformers_florence.losses_fusion import IGNORED_TOKEN, answer_loss, token_loss
from transformers_florence.modeling_florence_captioning import FlorenceForImageCaptioning
from transformers_florence.modeling_florence_fusion import FlorenceFusionModel
from transformers_florence.modeling_florence_fusion_heads import (
    NO_DECAY,
    FlorenceForImageTextRetrieval,
    FlorenceForPreTraining,
    FlorenceForQuestionAnswering,
    fusion_learning_rates,
)
from transformers_florence.training.optimization import parameter_groups

HEADS = [FlorenceForQuestionAnswering, FlorenceForImageTextRetrieval, FlorenceForPreTraining]


def tiny(model_class, **fields):
    """In evaluation mode, with weights of which every one matters."""
    return randomize(model_class(tiny_fusion_config(**fields))).eval()


def batch(count: int = 3) -> dict[str, torch.Tensor]:
    return {"pixel_values": random_pixels(count), **random_texts(count)}


def masked(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The second token of each text masked, as transformers' collator does."""
    labels = torch.full_like(inputs["input_ids"], IGNORED_TOKEN)
    labels[:, 1] = inputs["input_ids"][:, 1]
    hidden = inputs["input_ids"].clone()
    hidden[:, 1] = 4
    return {**inputs, "input_ids": hidden, "labels": labels}


@torch.no_grad()
def test_answers_by_their_parts():
    model, inputs = tiny(FlorenceForQuestionAnswering), batch()
    pooled = model.model(**inputs).pooler_output
    first, norm, _, last = model.classifier
    hidden = pooled @ first.weight.T + first.bias
    hidden = nn.functional.gelu(nn.functional.layer_norm(hidden, (48,), norm.weight, norm.bias, eps=1e-5))
    expected = hidden @ last.weight.T + last.bias
    scores = torch.rand(3, len(ANSWERS))
    output = model(**inputs, labels=scores)
    assert_close(output.logits, expected, rtol=0, atol=1e-5)
    assert_close(output.loss, answer_loss(expected, scores), rtol=0, atol=1e-5)
    assert isinstance(model(**inputs, labels=scores, return_dict=False), tuple)


@torch.no_grad()
def test_the_loss_is_ours_not_what_transformers_picks_by_the_class_name():
    """By the name it would be that of extractive question answering: of a start and an end."""
    model, inputs = tiny(FlorenceForQuestionAnswering), batch()
    loss = model(**inputs, labels=torch.zeros(3, len(ANSWERS))).loss
    expected = nn.functional.softplus(model(**inputs).logits).sum(1).mean()
    assert_close(loss, expected)


@pytest.mark.parametrize("model_class", HEADS)
@torch.no_grad()
def test_folders(model_class, tmp_path):
    model, inputs = tiny(model_class), batch()
    model.save_pretrained(tmp_path)
    loaded, info = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    name = "itm_logits" if model_class is FlorenceForPreTraining else "logits"
    assert_close(loaded(**inputs)[name], model(**inputs)[name], rtol=0, atol=1e-6)
    assert loaded.config.id2label == ANSWERS
    body = FlorenceFusionModel.from_pretrained(tmp_path)
    assert_close(body.state_dict(), model.model.state_dict(), rtol=0, atol=0)


@torch.no_grad()
def test_what_was_pretrained_goes_on(tmp_path):
    """Into questions the fusion, into retrieval the matching head too."""
    model = tiny(FlorenceForPreTraining)
    model.save_pretrained(tmp_path)
    answers, info = FlorenceForQuestionAnswering.from_pretrained(tmp_path, output_loading_info=True)
    assert {name.split(".")[0] for name in info["missing_keys"]} == {"classifier"} and not info["unexpected_keys"]
    assert_close(answers.model.state_dict(), model.model.state_dict(), rtol=0, atol=0)
    retrieval, info = FlorenceForImageTextRetrieval.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert_close(retrieval(**batch()).logits, model(**batch()).itm_logits, rtol=0, atol=1e-6)


@torch.no_grad()
def test_shortlists_are_scored_as_pairs_are():
    model = tiny(FlorenceForImageTextRetrieval)
    texts, pixels = random_texts(4), random_pixels(3)
    shortlists = torch.tensor([[0, 3], [2, 1], [3, 3]])
    calls = []
    model.model.vision_model.register_forward_hook(lambda *call: calls.append(1))
    image_embeds = model.model.encode_images(pixels)
    for size in (1, 4, 64):
        scores = model.score_shortlists(image_embeds, **texts, shortlists=shortlists, batch_size=size)
        for picture, row in enumerate(shortlists.tolist()):
            for place, text in enumerate(row):
                pair = {name: value[text : text + 1] for name, value in texts.items()}
                logits = model(pixel_values=pixels[picture : picture + 1], **pair).logits[0]
                expected = logits.softmax(0)[1].logit()
                assert scores[picture, place].item() == pytest.approx(expected.item(), abs=1e-4)
    assert len(calls) == 1 + 3 * 6
    with pytest.raises(ValueError, match=r"expected shortlists of shape \(3, k\), got \(2, 2\)"):
        model.score_shortlists(image_embeds, **texts, shortlists=shortlists[:2])
    with pytest.raises(ValueError, match="expected numbers of texts from 0 to 3, got 4"):
        model.score_shortlists(image_embeds, **texts, shortlists=shortlists + 1)


@torch.no_grad()
def test_pretraining_by_its_parts(monkeypatch):
    model, inputs = tiny(FlorenceForPreTraining), masked(batch(4))
    whole = {**batch(4), "input_ids": torch.where(inputs["labels"] >= 0, inputs["labels"], inputs["input_ids"])}
    output = model(**inputs)
    shown = {name: value for name, value in inputs.items() if name != "labels"}
    mlm_logits = model(**shown).mlm_logits
    assert_close(output.mlm_logits, mlm_logits, rtol=0, atol=1e-5)
    assert_close(output.mlm_loss, token_loss(mlm_logits, inputs["labels"]), rtol=0, atol=1e-5)
    # The true pairs come first, with the texts as they were before they were masked.
    assert_close(output.itm_logits[:4], model(**whole).itm_logits, rtol=0, atol=1e-5)
    assert output.itm_labels.tolist() == [1] * 4 + [0] * 8
    expected = nn.functional.cross_entropy(output.itm_logits, output.itm_labels)
    assert_close(output.itm_loss, expected, rtol=0, atol=1e-5)
    assert_close(output.loss, output.itm_loss + output.mlm_loss)
    # Each false pair is one text with another's picture, each picture with another's text.
    names = ("input_ids", "attention_mask")
    for row, logits in enumerate(output.itm_logits[4:8]):  # picture `row` with some other text
        others = [other for other in range(4) if other != row]
        pairs = {name: whole[name][others] for name in names}
        candidates = model(**pairs, pixel_values=whole["pixel_values"][row : row + 1]).itm_logits
        assert (candidates - logits).abs().amax(1).min() < 1e-4
    for row, logits in enumerate(output.itm_logits[8:]):  # text `row` with some other picture
        others = [other for other in range(4) if other != row]
        pair = {name: whole[name][row : row + 1] for name in names}
        candidates = model(**pair, pixel_values=whole["pixel_values"][others]).itm_logits
        assert (candidates - logits).abs().amax(1).min() < 1e-4


@torch.no_grad()
def test_hard_negatives_follow_the_similarities():
    """Picture 0 looks like text 2, text 0 like picture 1, so strongly that nothing else is drawn."""
    model, inputs = tiny(FlorenceForPreTraining), masked(batch(3))
    similarities = torch.tensor([[0.0, 0.0, 1e4], [1e4, 0.0, 0.0], [0.0, 1e4, 0.0]])
    output = model(**inputs, similarities=similarities)
    whole = {**batch(3)}
    texts = {name: whole[name][[2, 0, 1]] for name in ("input_ids", "attention_mask")}
    expected = model(**texts, pixel_values=whole["pixel_values"]).itm_logits
    assert_close(output.itm_logits[3:6], expected, rtol=0, atol=1e-5)
    same = {name: whole[name] for name in ("input_ids", "attention_mask")}
    expected = model(**same, pixel_values=whole["pixel_values"][[1, 2, 0]]).itm_logits
    assert_close(output.itm_logits[6:], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("reason", ["labels", "texts"])
@torch.no_grad()
def test_a_batch_without_negatives(reason):
    """One label for all, or one text: the true pairs alone make the loss."""
    model, inputs = tiny(FlorenceForPreTraining), masked(batch())
    if reason == "labels":
        inputs["pair_labels"] = torch.full((3,), 7)
    else:
        for name in ("input_ids", "attention_mask", "labels"):
            inputs[name] = inputs[name][:1].expand(3, -1)
    output = model(**inputs)
    assert output.itm_labels.tolist() == [1] * 3 + [IGNORED_TOKEN] * 6
    expected = nn.functional.cross_entropy(output.itm_logits[:3], torch.ones(3, dtype=torch.long))
    assert_close(output.itm_loss, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_captioning_is_a_third_loss_that_captioning_models_go_on_from(tmp_path):
    """The decoder sees the texts before they were masked; alone, on the same tower, it has the same loss."""
    model, inputs = tiny(FlorenceForPreTraining, num_decoder_layers=2), masked(batch(4))
    output = model(**inputs)
    assert_close(output.loss, output.itm_loss + output.mlm_loss + output.caption_loss)
    model.save_pretrained(tmp_path)
    captioning = FlorenceForImageCaptioning.from_pretraining(tmp_path)
    whole = batch(4)
    labels = whole["input_ids"].masked_fill(whole["attention_mask"] == 0, IGNORED_TOKEN)
    assert_close(captioning(**whole, labels=labels).loss, output.caption_loss, rtol=0, atol=1e-5)
    assert captioning.config.bos_token_id == 0 and captioning.config.eos_token_id == 2
    assert captioning.generate(pixel_values=whole["pixel_values"], max_new_tokens=3).shape[0] == 4
    frozen = FlorenceForImageCaptioning.from_pretraining(tmp_path, freeze_vision=True)
    assert not any(weight.requires_grad for weight in frozen.vision_model.parameters())
    answers, info = FlorenceForQuestionAnswering.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["unexpected_keys"]


def test_captioning_needs_a_decoder_and_its_tokens(tmp_path):
    FlorenceForPreTraining(tiny_fusion_config()).save_pretrained(tmp_path / "none")
    with pytest.raises(ValueError, match="expected a checkpoint with a decoder, got num_decoder_layers=0"):
        FlorenceForImageCaptioning.from_pretraining(tmp_path / "none")
    fields = {"text_config": text_configs()["bert"], "num_decoder_layers": 1}
    FlorenceForPreTraining(tiny_fusion_config(**fields)).save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match="expected the ids of the special tokens, got {'bos_token_id': None"):
        FlorenceForImageCaptioning.from_pretraining(tmp_path / "bert")
    model = FlorenceForImageCaptioning.from_pretraining(tmp_path / "bert", bos_token_id=101, eos_token_id=102)
    assert model.config.bos_token_id == 101


@torch.no_grad()
def test_heads_on_merged_attention(tmp_path):
    """They take what the one stack leaves of texts and pictures; its weights are recorded over both."""
    fields = {"fusion_type": "merged_attention", "attn_implementation": "eager"}
    model, inputs = tiny(FlorenceForQuestionAnswering, **fields), batch()
    output = model(**inputs, output_attentions=True, output_hidden_states=True)
    tokens = TOKENS + model.encode_images(inputs["pixel_values"]).shape[1]
    assert [tuple(weights.shape) for weights in output.attentions] == [(3, 4, tokens, tokens)] * 2
    assert [tuple(states.shape) for states in output.hidden_states] == [(3, tokens, 24)] * 3
    assert not output.cross_attentions
    features = model.model(**inputs)
    assert_close(output.hidden_states[-1], torch.cat((features.text_features, features.image_features), dim=1))
    model.save_pretrained(tmp_path)
    again = FlorenceForQuestionAnswering.from_pretrained(tmp_path)
    assert_close(again(**inputs).logits, output.logits, rtol=0, atol=1e-5)


def test_no_masked_token_is_no_loss_and_no_nan():
    model, inputs = tiny(FlorenceForPreTraining), batch()
    output = model(**inputs, labels=torch.full_like(inputs["input_ids"], IGNORED_TOKEN))
    assert output.mlm_loss.item() == 0 and torch.isfinite(output.loss)
    output.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_transformers_collator_makes_the_batch():
    tokenizer = tiny_roberta_tokenizer()
    texts = ["a red cube", "a small blue ball", "nothing"]
    collated = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.3)([tokenizer(text) for text in texts])
    output = tiny(FlorenceForPreTraining)(pixel_values=random_pixels(), **collated)
    assert torch.isfinite(output.loss)


@pytest.mark.parametrize("model_class", HEADS)
def test_one_batch_is_learnt(model_class):
    torch.manual_seed(0)
    model = model_class(tiny_fusion_config()).train()
    inputs = batch(4)
    if model_class is FlorenceForQuestionAnswering:
        inputs["labels"] = torch.eye(len(ANSWERS))[[0, 1, 2, 3]]
    elif model_class is FlorenceForImageTextRetrieval:
        inputs["labels"] = torch.tensor([0, 1, 1, 0])
    else:
        inputs = masked(inputs)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(25):
        loss = model(**inputs).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) / 5 < losses[0] * 0.5
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if "pooler" in name)


def test_transformers_trainer_divides_by_its_accumulation_steps(tmp_path):
    """Four batches of one accumulate to the very step of one batch of four."""
    weights = []
    samples = [
        {**{name: value[row] for name, value in batch(4).items()}, "labels": torch.eye(5)[row]} for row in range(4)
    ]
    for size, steps in ((4, 1), (1, 4)):
        model = tiny(FlorenceForQuestionAnswering)
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            max_steps=1,
            learning_rate=1e-3,
            optim="sgd",
            lr_scheduler_type="constant",
            max_grad_norm=0,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        )
        Trainer(model, arguments, train_dataset=samples).train()
        weights.append(model.state_dict())
    assert_close(weights[0], weights[1], rtol=0, atol=1e-5)


def test_parameter_groups_are_meters():
    model = FlorenceForPreTraining(tiny_fusion_config())
    groups = parameter_groups(model, 0.01, fusion_learning_rates(1e-5, head_factor=5.0), NO_DECAY, learning_rate=1e-5)
    found = {id(parameter): group for group in groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        group = found.pop(id(parameter))
        meter = any(part in name for part in ("fusion", "transform", "pooler", "itm_head", "mlm_head"))
        assert group["lr"] == pytest.approx(5e-5 if meter else 1e-5), name
        still = parameter.ndim < 2 or "text_model.embeddings" in name or "token_type" in name or "bias_table" in name
        assert group["weight_decay"] == (0.0 if still else 0.01), name
    assert not found
    model = FlorenceForQuestionAnswering(tiny_fusion_config())
    groups = parameter_groups(model, 0.01, fusion_learning_rates(1e-5), NO_DECAY, learning_rate=1e-5)
    heads = [parameter for group in groups if group["lr"] > 1e-4 for parameter in group["params"]]
    assert {id(parameter) for parameter in heads} == {id(parameter) for parameter in model.classifier.parameters()}


@pytest.mark.parametrize(
    ("model_class", "changes", "message"),
    [
        (FlorenceForQuestionAnswering, {"labels": torch.zeros(3, 4)}, r"scores of the answers of shape \(3, 5\)"),
        (FlorenceForQuestionAnswering, {"labels": torch.zeros(3, 5).long()}, "floating, got torch.int64"),
        (FlorenceForQuestionAnswering, {"labels": torch.full((3, 5), 1.5)}, "from 0 to 1, got 1.5"),
        (FlorenceForQuestionAnswering, {"labels": torch.full((3, 5), torch.nan)}, "from 0 to 1, got nan"),
        (FlorenceForQuestionAnswering, {"labels": [0, 1]}, "got list"),
        (FlorenceForImageTextRetrieval, {"labels": torch.tensor([0, 1, 2])}, "labels from 0 to 1, got 2"),
        (FlorenceForImageTextRetrieval, {"labels": torch.zeros(3)}, "integers, got torch.float32"),
        (FlorenceForPreTraining, {"labels": torch.zeros(3, 4).long()}, r"labels of shape \(3, 9\)"),
        (FlorenceForPreTraining, {"labels": torch.full((3, TOKENS), VOCABULARY)}, "labels from 0 to 260, got 261"),
        (FlorenceForPreTraining, {"labels": torch.full((3, TOKENS), -1)}, "labels from 0 to 260, got -1"),
        (
            FlorenceForPreTraining,
            {"labels": torch.zeros(3, TOKENS).long(), "pair_labels": torch.zeros(2).long()},
            r"pair_labels of shape \(3,\)",
        ),
        (
            FlorenceForPreTraining,
            {"labels": torch.zeros(3, TOKENS).long(), "similarities": torch.zeros(3, 2)},
            r"similarities of shape \(3, 3\)",
        ),
        (
            FlorenceForPreTraining,
            {"labels": torch.zeros(3, TOKENS).long(), "pixel_values": random_pixels(1)},
            "expected as many pictures as texts, got 1 and 3",
        ),
    ],
)
def test_doors(model_class, changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(model_class)(**{**batch(), **changes})
