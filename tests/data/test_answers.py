"""Answers normalised, counted into a vocabulary, and scored: cases worked by hand with the official metric's rules."""

import pytest
import torch
from torch.testing import assert_close

from transformers_florence.data.answers import (
    CONTRACTIONS,
    agreement,
    build_vocabulary,
    normalize_answer,
    normalize_together,
    soft_scores,
)

# Each of them is what github.com/GT-Vision-Lab/VQA's own code makes of it.
GOLDEN = {
    "": "",
    "The Dog": "dog",
    "a\tdog\non an  elk ": "dog on elk",
    "two": "2",
    "None": "0",
    "twenty one": "twenty 1",
    "dont": "don't",
    "shed've gone": "she'd've gone",
    "she'dve": "she'd've",
    "shedve": "shedve",
    "somebody'd": "somebodyd",
    "Im": "im",
    "don't": "don't",
    "red/blue": "red blue",
    "red / blue": "red blue",
    "t-shirt": "t shirt",
    "t- shirt": "t shirt",
    "(left)": "left",
    "yes!": "yes",
    "1,000": "1000",
    "1,000-2": "10002",
    "3.5": "3.5",
    "3.": "3",
    "u.s.a.": "usa",
    ".5": ".5",
    "the": "",
    "what?no": "what no",
    "don't; stop": "don't stop",
    "a-the": "",
    "it's 10:30": "it's 10:30",
}


@pytest.mark.parametrize(("answer", "expected"), GOLDEN.items())
def test_answers_as_the_official_metric_compares_them(answer: str, expected: str):
    assert normalize_answer(answer) == expected


def test_every_contraction_without_one_of_its_apostrophes():
    words = CONTRACTIONS.split()
    assert len(words) == 92
    for word in words:
        for place, sign in enumerate(word):
            if sign == "'":
                assert normalize_answer(word[:place] + word[place + 1 :]) == word


def test_annotators_who_agree_are_taken_by_the_letter():
    """They may have read it: a sign that says "The 2" is not one that says "2"."""
    assert normalize_together("The 2\n", ["The 2"] * 10) == ("The 2", ["The 2"] * 10)
    assert normalize_together("The 2", ["The 2"] * 9 + ["two"]) == ("2", ["2"] * 10)
    assert normalize_together(" a", ["a\t"] * 3) == ("a", ["a"] * 3)


def test_agreement_of_ten_annotators():
    assert [round(agreement(count, 10), 12) for count in range(11)] == [0, 0.3, 0.6, 0.9] + [1] * 7


def test_vocabulary_counts_what_is_the_same_and_sorts_by_frequency():
    answers = ["two"] * 5 + ["2"] * 4 + ["The dog"] * 9 + ["cat"] * 10 + ["elk"] * 8 + ["the"] * 20
    assert build_vocabulary(answers) == ["cat", "2", "dog"]
    assert build_vocabulary(reversed(answers)) == ["cat", "2", "dog"]
    assert build_vocabulary(answers, least=8)[-1] == "elk"
    with pytest.raises(ValueError, match="expected answers that occur at least 11 times, got none above 10"):
        build_vocabulary(answers, least=11)
    with pytest.raises(ValueError, match="got none above 0"):
        build_vocabulary([])


def test_soft_scores_are_meters():
    """0, 0.3, 0.6, 0.9 and 1 for 0, 1, 2, 3 and 4 annotators; those outside of the vocabulary count for nothing."""
    answers = ["yes"] * 4 + ["no"] * 3 + ["The dog", "dog"] + ["elk"]
    scores = soft_scores(answers, {"cat": 0, "yes": 1, "no": 2, "dog": 3})
    assert scores.dtype == torch.float32
    assert_close(scores, torch.tensor([0.0, 1.0, 0.9, 0.6]), rtol=0, atol=1e-7)
    assert_close(soft_scores(answers, {"elk": 0}), torch.tensor([0.3]))
