"""Texts as tensors: what is typed is text, what is too long keeps its end."""

from tests.tiny_fusion import tiny_roberta_tokenizer
from transformers_florence import FlorenceTokenizer
from transformers_florence.data.texts import tokenize_texts


def test_special_tokens_are_text_and_long_texts_keep_their_end():
    tokenizer = tiny_roberta_tokenizer()
    inputs = tokenize_texts(tokenizer, ["<mask> no", "a" * 99], max_tokens=12, return_special_tokens_mask=True)
    assert inputs["input_ids"].shape == inputs["special_tokens_mask"].shape == (2, 12)
    assert tokenizer.mask_token_id not in inputs["input_ids"]
    assert inputs["input_ids"][1, -1] == tokenizer.eos_token_id
    assert tokenizer.decode(inputs["input_ids"][0], skip_special_tokens=True) == "<mask> no"
    assert tokenize_texts(tokenizer, ["a" * 99], max_tokens=99)["input_ids"].shape == (1, 40)  # the tokenizer's own


def test_clips_special_tokens_are_text_too():
    tokenizer = FlorenceTokenizer.train_new(["a dog and a cat"] * 3, vocab_size=514, model_max_length=40)
    ids = tokenize_texts(tokenizer, ["<|endoftext|> no"], max_tokens=40)["input_ids"][0].tolist()
    assert ids.count(tokenizer.eos_token_id) == 1 and ids[-1] == tokenizer.eos_token_id
