"""Captioning: the decoder against one pass over all, generation with and without a cache, answers ranked, doors."""

import itertools

import pytest
import torch
from torch.testing import assert_close
from transformers import GenerationConfig

from tests.oracles import randomize
from tests.tiny_florence import SIDE, random_pixels, save_tiny
from tests.tiny_fusion import VOCABULARY, tiny_captioning_config
from transformers_florence.losses_fusion import IGNORED_TOKEN
from transformers_florence.modeling_florence_captioning import FlorenceForImageCaptioning, open_prompts

BOS, PAD, EOS = 0, 1, 2


def tiny(**fields) -> FlorenceForImageCaptioning:
    """In evaluation mode, with weights of which every one matters; RoBERTa's special tokens."""
    config = tiny_captioning_config(bos_token_id=BOS, pad_token_id=PAD, eos_token_id=EOS, **fields)
    model = randomize(FlorenceForImageCaptioning(config))
    with torch.no_grad():
        model.lm_head.norm.weight.mul_(4.0)  # decided predictions: ties would hide what differs
    return model.eval()


def texts(count: int = 3, tokens: int = 8) -> torch.Tensor:
    ids = torch.randint(5, VOCABULARY, (count, tokens), generator=torch.Generator().manual_seed(3))
    ids[:, 0] = BOS
    return ids


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_a_token_depends_on_those_before_it_and_on_the_picture(implementation):
    model, ids, pixels = tiny(attn_implementation=implementation), texts(), random_pixels()
    whole = model(ids, pixels).logits
    for length in (1, 4, 7):
        assert_close(model(ids[:, :length], pixels).logits, whole[:, :length], rtol=0, atol=1e-4)
    changed = ids.clone()
    changed[:, 5] = 7
    assert (model(changed, pixels).logits - whole)[:, 5].abs().max() > 0.01
    assert (model(ids, random_pixels(seed=9)).logits - whole)[:, 0].abs().max() > 0.01


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@torch.no_grad()
def test_a_cache_changes_no_logit(implementation):
    model, ids, pixels = tiny(attn_implementation=implementation), texts(), random_pixels()
    calls = []
    model.vision_model.register_forward_hook(lambda *call: calls.append(1))
    whole = model(ids, pixels, use_cache=False)
    assert whole.past_key_values is None
    output = model(ids[:, :3], pixels)
    steps = [output.logits]
    for position in range(3, 8):
        output = model(ids[:, position : position + 1], past_key_values=output.past_key_values)
        steps.append(output.logits)
    assert len(calls) == 2  # once for each way: the steps need no picture
    assert_close(torch.cat(steps, dim=1), whole.logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_is_nothing(side):
    model, pixels = tiny(), random_pixels(2)
    ids, mask = texts(2), torch.ones(2, 8, dtype=torch.long)
    hidden = slice(0, 3) if side == "left" else slice(5, 8)
    shown = slice(3, 8) if side == "left" else slice(0, 5)
    text = ids[1, :5].clone()
    ids[1, shown], ids[1, hidden], mask[1, hidden] = text, PAD, 0
    together = model(ids, pixels, attention_mask=mask).logits
    assert_close(together[0], model(ids[:1], pixels[:1]).logits[0], rtol=0, atol=1e-4)
    assert_close(together[1, shown], model(text[None], pixels[1:]).logits[0], rtol=0, atol=1e-4)


@torch.no_grad()
def test_the_loss_is_of_the_next_token():
    model, ids, pixels = tiny(), texts(), random_pixels()
    labels = ids.clone()
    labels[0, 5:] = IGNORED_TOKEN
    labels[:, :2] = IGNORED_TOKEN  # a question of two tokens
    output = model(ids, pixels, labels=labels)
    likelihoods = output.logits.log_softmax(-1)
    terms = [
        likelihoods[row, place - 1, ids[row, place]]
        for row, place in itertools.product(range(3), range(2, 8))
        if row > 0 or place < 5
    ]
    assert_close(output.loss, -torch.stack(terms).mean(), rtol=0, atol=1e-4)
    assert output.past_key_values is None


@pytest.mark.parametrize("use_cache", [True, False])
@torch.no_grad()
def test_greedy_generation_is_the_argmax_of_one_pass_after_another(use_cache):
    model, pixels = tiny(), random_pixels(2)
    generated = model.generate(pixel_values=pixels, max_new_tokens=6, use_cache=use_cache, do_sample=False)
    ids = torch.full((2, 1), BOS)
    done = torch.zeros(2, dtype=torch.bool)
    for _ in range(generated.shape[1] - 1):
        following = model(ids, pixels, use_cache=False).logits[:, -1].argmax(-1)
        following = torch.where(done, PAD, following)
        done |= following == EOS
        ids = torch.cat((ids, following[:, None]), dim=1)
    assert generated.tolist() == ids.tolist()
    assert len(set(generated[0].tolist())) > 2  # not one word again and again


@torch.no_grad()
def test_beam_search_finds_what_trying_everything_finds():
    """As many beams as pairs of tokens: the best of all sequences of two tokens."""
    model, pixels = tiny(), random_pixels(1)
    small = 6  # tokens 5 and up are made impossible, so that everything can be tried
    model.lm_head.vocabulary.bias.data[small:] = -1e4
    model.lm_head.vocabulary.bias.data[EOS] = -1e4
    model.config.tie_word_embeddings = False
    start = model(torch.tensor([[BOS]]), pixels).logits[0, -1].log_softmax(-1)
    best, score = None, -torch.inf
    for first, second in itertools.product([0, 1, 3, 4, 5], repeat=2):
        behind = model(torch.tensor([[BOS, first]]), pixels).logits[0, -1].log_softmax(-1)
        if start[first] + behind[second] > score:
            best, score = [BOS, first, second], start[first] + behind[second]
    for use_cache in (True, False):
        found = model.generate(pixel_values=pixels, max_new_tokens=2, num_beams=25, use_cache=use_cache)
        assert found[0].tolist() == best


def test_with_a_cache_each_token_and_the_picture_are_computed_once():
    """Of n tokens written without one, the decoder computes 1 + 2 + ... + n, and the picture's keys n times."""
    model, written = tiny(max_position_embeddings=32), 20
    embeds = model.encode_images(random_pixels(2))
    tokens, pictures = [], []
    layer = model.decoder.layers[0]
    layer.mlp.register_forward_pre_hook(lambda module, inputs: tokens.append(inputs[0].shape[1]))
    layer.cross_attention.k_proj.register_forward_pre_hook(lambda module, inputs: pictures.append(inputs[0].shape[1]))
    counts = {}
    for use_cache in (True, False):
        tokens.clear()
        pictures.clear()
        model.generate(
            image_embeds=embeds, min_new_tokens=written, max_new_tokens=written, do_sample=False, use_cache=use_cache
        )
        counts[use_cache] = (sum(tokens), len(pictures))
    assert counts == {True: (written, 1), False: (written * (written + 1) // 2, written)}


@torch.no_grad()
def test_beams_with_a_cache_are_beams_without():
    model, pixels = tiny(), random_pixels(3)
    options = {"max_new_tokens": 6, "num_beams": 3, "num_return_sequences": 2}
    with_cache = model.generate(pixel_values=pixels, **options)
    assert with_cache.shape[0] == 6
    assert with_cache.tolist() == model.generate(pixel_values=pixels, use_cache=False, **options).tolist()


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_prompts_of_different_lengths_go_on_as_each_alone(side):
    """As tokenizers make them: with end tokens, padded on either side."""
    model, pixels = tiny(), random_pixels(2)
    prompts = [[BOS, 7, 9, 11, EOS], [BOS, 8, EOS]]
    padding = [PAD, PAD]
    rows = [prompts[0], padding + prompts[1] if side == "left" else prompts[1] + padding]
    mask = [[1] * 5, [0, 0, 1, 1, 1] if side == "left" else [1, 1, 1, 0, 0]]
    options = {"max_new_tokens": 5, "do_sample": False}
    together = model.generate(torch.tensor(rows), pixels, torch.tensor(mask), **options)
    assert together[:, :4].tolist() == [prompts[0][:4], [PAD, PAD, *prompts[1][:2]]]
    for row, prompt in enumerate(prompts):
        alone = model.generate(torch.tensor([prompt]), pixels[row : row + 1], **options)[0, len(prompt) - 1 :]
        assert together[row, 4:][: len(alone)].tolist() == alone.tolist()


@torch.no_grad()
def test_one_picture_serves_many_questions():
    model, pixels = tiny(), random_pixels(1)
    questions = texts(3, 4)
    calls = []
    model.vision_model.register_forward_hook(lambda *call: calls.append(1))
    embeds = model.encode_images(pixels)
    options = {"max_new_tokens": 4, "do_sample": False}
    together = model.generate(questions, image_embeds=embeds, **options)
    assert len(calls) == 1
    assert together.tolist() == model.generate(questions, pixels.expand(3, -1, -1, -1), **options).tolist()


@torch.no_grad()
def test_no_text_grows_beyond_the_positions():
    model = tiny()
    model.lm_head.vocabulary.bias.data[EOS] = -1e4
    for beams in (1, 2):
        generated = model.generate(pixel_values=random_pixels(2), max_new_tokens=100, num_beams=beams)
        assert generated.shape == (2, 16)
    config = GenerationConfig(max_new_tokens=3, eos_token_id=EOS, pad_token_id=PAD)
    assert model.generate(pixel_values=random_pixels(2), generation_config=config).shape == (2, 4)


@pytest.mark.parametrize("batch_size", [1, 5, 64])
@torch.no_grad()
def test_answers_are_ranked_by_their_likelihood(batch_size):
    model, pixels = tiny(), random_pixels(2)
    questions = torch.tensor([[BOS, 7, 9, 11, EOS], [BOS, 8, EOS, PAD, PAD]])
    mask = torch.tensor([[1] * 5, [1, 1, 1, 0, 0]])
    answers = [[20], [21, 22, 23], [24, 25], []]
    rows = torch.full((4, 5), PAD)
    for row, answer in zip(rows, answers, strict=True):
        row[: len(answer) + 2] = torch.tensor([BOS, *answer, EOS])
    scores = model.rank_answers(rows, questions, pixels, mask, batch_size=batch_size)
    for row, prompt in enumerate(([BOS, 7, 9, 11], [BOS, 8])):
        for place, answer in enumerate(answers):
            ids = [*prompt, *answer, EOS]
            likelihoods = model(torch.tensor([ids]), pixels[row : row + 1]).logits[0].log_softmax(-1)
            expected = sum(likelihoods[at - 1, ids[at]].item() for at in range(len(prompt), len(ids)))
            assert scores[row, place].item() == pytest.approx(expected, abs=1e-3)
    captions = model.rank_answers(rows, pixel_values=pixels)
    assert captions.shape == (2, 4)


def test_one_batch_is_learnt_and_then_told():
    torch.manual_seed(0)
    config = tiny_captioning_config(bos_token_id=BOS, pad_token_id=PAD, eos_token_id=EOS)
    model = FlorenceForImageCaptioning(config).train()
    ids = texts(3, 6)
    ids[:, -1] = EOS
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        loss = model(ids, random_pixels(), labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1
    told = model.eval().generate(pixel_values=random_pixels(), max_new_tokens=8, do_sample=False)
    assert told.tolist() == ids.tolist()


def test_folders_and_shared_weights(tmp_path):
    model = tiny()
    assert model.lm_head.vocabulary.weight is model.decoder.word_embeddings.weight
    model.save_pretrained(tmp_path / "own")
    loaded, info = FlorenceForImageCaptioning.from_pretrained(tmp_path / "own", output_loading_info=True)
    assert not any(info.values())
    assert loaded.lm_head.vocabulary.weight is loaded.decoder.word_embeddings.weight
    assert loaded.generation_config.eos_token_id == EOS and loaded.generation_config.bos_token_id == BOS
    ids, pixels = texts(), random_pixels()
    assert_close(loaded(ids, pixels).logits, model(ids, pixels).logits, rtol=0, atol=1e-5)
    dual = save_tiny(tmp_path / "dual")
    fields = {"vocab_size": 100, "hidden_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1}
    model = FlorenceForImageCaptioning.from_pretrained_vision(tmp_path / "dual", freeze_vision=True, **fields)
    assert_close(model.vision_model.state_dict(), dual.vision_model.state_dict(), rtol=0, atol=0)
    model.train()
    assert not model.vision_model.training and model.decoder.training
    model(texts() % 100, random_pixels(), labels=texts() % 100).loss.backward()
    assert all(p.grad is None for p in model.vision_model.parameters())


def test_gradient_checkpointing_changes_no_gradient():
    model, ids, pixels = tiny().train(), texts(), random_pixels()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(ids, pixels, labels=ids).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_weights_are_recorded():
    model, ids, pixels = tiny(attn_implementation="eager"), texts(), random_pixels()
    output = model(ids, pixels, output_attentions=True, output_hidden_states=True)
    assert [tuple(each.shape) for each in output.attentions] == [(3, 4, 8, 8)] * 2
    assert all(each.triu(1).abs().max() == 0 for each in output.attentions)
    assert [tuple(each.shape[:3]) for each in output.cross_attentions] == [(3, 4, 8)] * 2
    assert len(output.hidden_states) == 3
    assert_close(model.lm_head(output.hidden_states[-1]), output.logits)


def test_resized_vocabulary_stays_shared():
    model = tiny()
    model.resize_token_embeddings(VOCABULARY + 3)
    assert model.config.vocab_size == VOCABULARY + 3
    assert model.lm_head.vocabulary.weight is model.decoder.word_embeddings.weight
    assert model(texts(), random_pixels()).logits.shape[-1] == VOCABULARY + 3


def test_open_prompts_by_hand():
    ids = torch.tensor([[BOS, 5, EOS, PAD], [PAD, BOS, 6, 7], [BOS, EOS, EOS, EOS]])
    mask = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1], [1, 1, 0, 0]])
    opened, shown = open_prompts(ids, mask, EOS, PAD)
    assert opened.tolist() == [[PAD, BOS, 5], [BOS, 6, 7], [PAD, PAD, BOS]]
    assert shown.tolist() == [[0, 1, 1], [1, 1, 1], [0, 0, 1]]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"pixel_values": None}, "got neither"),
        ({"image_embeds": torch.zeros(3, 4, 16)}, "got both"),
        ({"pixel_values": random_pixels(2)}, "expected as many pictures as texts, or one, got 2 and 3"),
        ({"input_ids": torch.full((3, 4), VOCABULARY)}, "expected token ids from 0 to 260"),
        ({"input_ids": torch.zeros(3, 17).long()}, "at most 16 tokens"),
        ({"labels": torch.zeros(3, 4).long()}, r"expected labels of shape \(3, 8\) and all logits, got \(3, 4\)"),
        ({"attention_mask": torch.ones(3, 4)}, r"expected attention_mask of shape \(3, 8\), got \(3, 4\)"),
        ({"position_ids": torch.full((1, 8), 16)}, "expected texts of at most 16 tokens, got one with 17"),
    ],
)
def test_doors(inputs, message):
    with pytest.raises(ValueError, match=message):
        tiny()(**{"input_ids": texts(), "pixel_values": random_pixels(), **inputs})


def test_doors_of_generation():
    model, pixels = tiny(), torch.zeros(2, 3, SIDE, SIDE)
    with pytest.raises(ValueError, match="got neither"):
        model.generate(torch.zeros(2, 3).long())
    with pytest.raises(ValueError, match="expected prompts of less than 16 tokens, got 16"):
        model.generate(torch.full((2, 16), 5), pixels)
    with pytest.raises(ValueError, match="at least one token before the end token"):
        model.generate(torch.tensor([[EOS, 5], [BOS, 5]]), pixels)
    with pytest.raises(ValueError, match="expected as many pictures as texts, or one, got 2 and 3"):
        model.generate(texts(), pixels)
    with pytest.raises(ValueError, match=r"expected attention_mask of shape \(2, 8\)"):
        model.generate(texts(2), pixels, torch.ones(2, 3))
    for wrong in ([[5, 6, EOS]], [[BOS, 6, 7]]):
        with pytest.raises(ValueError, match="expected answers from the start token 0 to the end token 2"):
            model.rank_answers(torch.tensor(wrong), pixel_values=pixels)
