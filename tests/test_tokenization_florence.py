"""FlorenceTokenizer: CLIP's format learnt exactly, texts cut by default with one warning, bad input refused."""

import json
import random
import re
import unicodedata
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.utils import logging

from tests.tiny_florence import CONTEXT, TEXTS, VOCABULARY, tiny_tokenizer
from transformers_florence import FlorenceTextConfig, FlorenceTokenizer

BYTE_OF = {symbol: byte for byte, symbol in bytes_to_unicode().items()}
LONG = "a photo of " * 20
TOKENIZER = tiny_tokenizer()


@pytest.fixture
def tokenizer() -> FlorenceTokenizer:
    return TOKENIZER


@pytest.fixture
def warned(caplog):
    """The messages of our tokenizer's warnings, as if none had been given before."""
    logging.warning_once.cache_clear()
    name = FlorenceTokenizer.__module__
    return lambda: [record.getMessage() for record in caplog.records if record.name == name]


def slow_merges(texts: list[str], count: int) -> list[tuple[str, str]]:
    """Byte-pair encoding as in its paper: merge the most frequent pair, again and again; lower ids win ties."""
    symbols = bytes_to_unicode()
    ids = {symbol: index for index, symbol in enumerate(symbols.values())}
    ids.update({symbol + "</w>": 256 + index for symbol, index in list(ids.items())})
    words: Counter[tuple[str, ...]] = Counter()
    for text in texts:
        for word in re.findall(r"[a-z]+|\d|[^\sa-z\d]+", text.lower()):
            letters = [symbols[byte] for byte in word.encode()]
            words[(*letters[:-1], letters[-1] + "</w>")] += 1
    merges = []
    for _ in range(count):
        pairs: Counter[tuple[str, str]] = Counter()
        for word, times in words.items():
            for pair in pairwise(word):
                pairs[pair] += times
        best = min(pairs, key=lambda pair: (-pairs[pair], ids[pair[0]], ids[pair[1]]))
        merges.append(best)
        ids.setdefault(best[0] + best[1], len(ids))
        merged: Counter[tuple[str, ...]] = Counter()
        for word, times in words.items():
            parts: list[str] = []
            for part in word:
                joined = bool(parts) and (parts[-1], part) == best
                parts = [*parts[:-1], parts[-1] + part] if joined else [*parts, part]
            merged[tuple(parts)] += times
        words = merged
    return merges


def test_the_vocabulary_has_clips_order(tokenizer):
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    symbols = list(bytes_to_unicode().values())
    assert tokens[:256] == symbols
    assert tokens[256:512] == [symbol + "</w>" for symbol in symbols]
    assert tokens[512:-2] == list(dict.fromkeys(a + b for a, b in slow_merges(TEXTS, VOCABULARY - 514)))
    assert tokens[-2:] == ["<|startoftext|>", "<|endoftext|>"]
    assert tokenizer.convert_tokens_to_ids("a</w>") == 320  # as in OpenAI's vocabulary


def test_special_ids_are_those_that_the_text_tower_expects(tokenizer):
    config = FlorenceTextConfig(vocab_size=len(tokenizer), max_position_embeddings=tokenizer.model_max_length)
    assert len(tokenizer) == tokenizer.vocab_size == VOCABULARY
    assert tokenizer.eos_token_id == config.eos_token_id == VOCABULARY - 1
    assert tokenizer.bos_token_id == config.bos_token_id == VOCABULARY - 2
    assert tokenizer.pad_token_id == config.pad_token_id == VOCABULARY - 1


def test_the_whole_byte_range_is_covered(tokenizer):
    in_words = {BYTE_OF[token] for token in tokenizer.get_vocab() if token in BYTE_OF}
    at_ends = {
        BYTE_OF[token[:-4]] for token in tokenizer.get_vocab() if token[:-4] in BYTE_OF and token[-4:] == "</w>"
    }
    assert in_words == at_ends == set(range(256))


@settings(max_examples=50)
@given(st.text(max_size=40))
@example("naïve café — 日本語 🦊 \x00 \u200d")
def test_any_text_survives_without_an_unknown_token(text):
    tokenizer = TOKENIZER
    ids = tokenizer(text, truncation=False)["input_ids"]
    assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert all(0 <= token < tokenizer.bos_token_id for token in ids[1:-1])
    spelled = "".join(tokenizer.convert_ids_to_tokens(ids[1:-1])).replace("</w>", "")
    decoded = bytes(BYTE_OF[symbol] for symbol in spelled).decode()
    expected = unicodedata.normalize("NFC", text).lower()
    # What counts as white space differs between libraries at the edges of ASCII; nothing else may get lost.
    visible = [re.sub(r"[\s\x1c-\x1f\x85]", "", value) for value in (decoded, expected)]
    assert visible[0] == visible[1]


def test_ids_are_those_of_clips_tokenizer_with_the_same_vocabulary(tokenizer):
    reference = CLIPTokenizer(vocab=tokenizer.get_vocab(), merges=slow_merges(TEXTS, VOCABULARY - 514))
    texts = [*TEXTS, "Other   words,\tIt's 2026!", "", "éa日本"]
    assert tokenizer(texts, truncation=False)["input_ids"] == reference(texts)["input_ids"]


def test_case_and_white_space_do_not_matter(tokenizer):
    assert tokenizer("A  Photo\tof\n a CAT ")["input_ids"] == tokenizer("a photo of a cat")["input_ids"]
    assert (
        tokenizer.decode(tokenizer("A Photo  of a CAT")["input_ids"], skip_special_tokens=True) == "a photo of a cat"
    )


def test_learning_does_not_depend_on_the_order_of_texts(tokenizer):
    texts = TEXTS * 2
    random.Random(1).shuffle(texts)
    again = FlorenceTokenizer.train_new(iter(texts), vocab_size=VOCABULARY, model_max_length=CONTEXT)
    learnt, expected = (json.loads(each.backend_tokenizer.to_str())["model"] for each in (again, tokenizer))
    assert learnt == expected


def test_a_saved_tokenizer_is_the_same_tokenizer(tokenizer, tmp_path):
    tokenizer(TEXTS, padding="max_length", max_length=5)  # leaves padding and truncation in the backend
    tokenizer.save_pretrained(tmp_path / "a")
    for loaded in (
        FlorenceTokenizer.from_pretrained(tmp_path / "a"),
        AutoTokenizer.from_pretrained(tmp_path / "a"),
    ):
        assert type(loaded) is FlorenceTokenizer
        assert loaded.model_max_length == CONTEXT
        assert loaded(TEXTS)["input_ids"] == tokenizer(TEXTS)["input_ids"]
        assert loaded(LONG)["input_ids"] == tokenizer(LONG)["input_ids"]
    loaded.save_pretrained(tmp_path / "b")
    fresh = tiny_tokenizer()
    fresh.save_pretrained(tmp_path / "c")
    files = [(tmp_path / name / "tokenizer.json").read_bytes() for name in "abc"]
    assert files[0] == files[1] == files[2]


def test_a_long_text_is_cut_with_one_warning(tokenizer, warned):
    encoded = tokenizer([LONG, "a cat"], return_tensors="pt", padding=True)  # the call of the zero-shot pipeline
    assert encoded["input_ids"].shape == (2, CONTEXT)
    assert encoded["input_ids"][0, -1] == tokenizer.eos_token_id
    whole = tokenizer(LONG, truncation=False, verbose=False)["input_ids"]
    assert encoded["input_ids"][0, :-1].tolist() == whole[: CONTEXT - 1]
    tokenizer([LONG])
    assert tokenizer.encode(LONG) == encoded["input_ids"][0].tolist()
    assert len(warned()) == 1
    assert str(CONTEXT) in warned()[0]


@pytest.mark.parametrize(
    ("choice", "length"),
    [
        ({"truncation": False}, 62),
        ({"max_length": 5}, 5),
        ({"verbose": False}, CONTEXT),
        ({"truncation": "do_not_truncate"}, 62),
    ],
)
def test_what_the_caller_chooses_gives_no_warning(tokenizer, warned, choice, length):
    assert len(tokenizer(LONG, **choice)["input_ids"]) == length
    assert warned() == []


def test_texts_that_fit_are_neither_cut_nor_padded(tokenizer, warned):
    encoded = tokenizer(["a cat", "a photo of a cat"])
    assert [len(ids) for ids in encoded["input_ids"]] == [4, 7]
    assert warned() == []


def test_padding_to_a_multiple_stays_within_the_context(tokenizer):
    encoded = tokenizer([LONG, "a cat"], padding=True, pad_to_multiple_of=5, verbose=False)
    assert {len(ids) for ids in encoded["input_ids"]} == {CONTEXT - CONTEXT % 5}
    assert tokenizer.pad({"input_ids": [[1, 2], [3]]}, pad_to_multiple_of=5)["input_ids"][1] == [
        3,
        *[VOCABULARY - 1] * 4,
    ]


def test_the_rest_of_a_cut_text_can_be_had(tokenizer):
    encoded = tokenizer(LONG, return_overflowing_tokens=True, verbose=False)
    inner = [token for ids in encoded["input_ids"] for token in ids[1:-1]]
    assert inner == tokenizer(LONG, truncation=False, verbose=False)["input_ids"][1:-1]


@pytest.mark.parametrize("text", [[], (), None, 3, [3], ["a cat", None], ["a cat", float("nan")], {"a": 1}, "\ud800"])
def test_what_is_no_text_is_refused(tokenizer, text):
    with pytest.raises(ValueError):
        tokenizer(text, padding=True)


def test_an_empty_text_is_a_text(tokenizer):
    assert tokenizer("")["input_ids"] == [VOCABULARY - 2, VOCABULARY - 1]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"vocab_size": 513}, "vocab_size"),
        ({"vocab_size": 600.0}, "vocab_size"),
        ({"vocab_size": True}, "vocab_size"),
        ({"model_max_length": 2}, "model_max_length"),
        ({"model_max_length": "32"}, "model_max_length"),
        ({"vocab_size": 3072}, "at most 5"),  # five sentences hold few words
    ],
)
def test_impossible_sizes_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        FlorenceTokenizer.train_new(TEXTS[:1], **{"vocab_size": 520, "model_max_length": 8, **sizes})
