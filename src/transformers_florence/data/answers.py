"""Answers of annotators: normalised as VQA's official metric does, the vocabulary of them, and how right each is.

The metric's rules are those of github.com/GT-Vision-Lab/VQA (Antol et al. 2015; Goyal et al. 2017 for VQA v2), the
vocabulary and the soft scores those of METER (Dou et al. 2022), which Florence's fusion stands on (section 3.7).
"""

import functools
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch

ANNOTATORS = 10  # who answer each question of VQA
AGREEING = 3  # as many other annotators with the same answer make it wholly right
MIN_COUNT = 9  # how often an answer is the most common one of a question, to be in METER's vocabulary

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
PERIOD = re.compile(r"\.(?!\d)")  # not that of a decimal number
COMMA_IN_NUMBER = re.compile(r"\d,\d")
ARTICLES = {"a", "an", "the"}
DIGITS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5"}
DIGITS |= {"six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"}
# The metric puts one missing apostrophe into each of these.
CONTRACTIONS = """
    'ow's'at 'twas ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
    haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've
    mustn't needn't not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll
    somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd
    there'd've there're there's they'd they'd've they'll they're they've wasn't we'd've we've weren't what'll what're
    what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
    would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've
"""


def _without_each_apostrophe(word: str) -> list[str]:
    """The word with one apostrophe left out, for each that it has."""
    return [word[:place] + word[place + 1 :] for place, sign in enumerate(word) if sign == "'"]


SPELLINGS = {short: word for word in CONTRACTIONS.split() for short in _without_each_apostrophe(word)}
SPELLINGS["somebody'd"] = "somebodyd"  # the metric's own slip, by which published numbers were measured


def single_line(answer: str) -> str:
    """Line breaks and tabs become spaces, and none is left at either end."""
    return answer.replace("\n", " ").replace("\t", " ").strip()


@functools.lru_cache(maxsize=1 << 16)
def normalize_answer(answer: str) -> str:
    """An answer as VQA's metric compares it: lower case, no articles, no punctuation, digits for numbers up to ten.

    Example:
        >>> normalize_answer("The two dogs, dont you see?")
        "2 dogs don't you see"
    """
    answer = single_line(answer)
    spaced = answer
    for sign in PUNCTUATION:
        # Looked for in the answer as it was; between two letters a sign becomes a space.
        lone = f"{sign} " in answer or f" {sign}" in answer or COMMA_IN_NUMBER.search(answer)
        spaced = spaced.replace(sign, "" if lone else " ")
    words = [DIGITS.get(word, word) for word in PERIOD.sub("", spaced).lower().split()]
    return " ".join(SPELLINGS.get(word, word) for word in words if word not in ARTICLES)


def normalize_together(answer: str, annotated: Sequence[str]) -> tuple[str, list[str]]:
    """A given answer and those of the annotators, as the metric compares them.

    Where the annotators agree to the letter nothing is normalised: they may have read it off the picture.
    """
    annotated = [single_line(each) for each in annotated]
    if len(set(annotated)) <= 1:
        return single_line(answer), annotated
    return normalize_answer(answer), [normalize_answer(each) for each in annotated]


def agreement(count: int, annotators: int) -> float:
    """How right an answer is that `count` of the annotators gave, from 0 to 1.

    The mean, over each annotator left out, of a third of those others who gave it, at most 1: for ten annotators
    0, 0.3, 0.6, 0.9 and then 1.
    """
    others = [count - 1] * count + [count] * (annotators - count)
    return sum(min(1.0, number / AGREEING) for number in others) / annotators


def build_vocabulary(answers: Iterable[str], least: int = MIN_COUNT) -> list[str]:
    """The answers to choose from, the most frequent first, equally frequent ones in alphabetical order.

    Args:
        answers: the most common answer of each question, of training and validation together in METER.
        least: how often an answer occurs at least.

    Returns:
        Normalised answers, without repetition.

    Raises:
        ValueError: no answer occurs that often.
    """
    counts = Counter(normalize_answer(answer) for answer in answers)
    del counts[""]  # of articles and punctuation alone
    kept = sorted((name for name, count in counts.items() if count >= least), key=lambda name: (-counts[name], name))
    if not kept:
        most = max(counts.values(), default=0)
        raise ValueError(f"expected answers that occur at least {least} times, got none above {most}")
    return kept


def soft_scores(answers: Sequence[str], numbers: Mapping[str, int]) -> torch.Tensor:
    """How right each answer of a vocabulary is, by what annotators said: (answers of the vocabulary,), float32, 0..1.

    Args:
        answers: one of each annotator.
        numbers: normalised answer -> its place in the vocabulary.
    """
    scores = torch.zeros(len(numbers))
    for name, count in Counter(normalize_answer(answer) for answer in answers).items():
        if name in numbers:
            scores[numbers[name]] = agreement(count, len(answers))
    return scores


__all__ = [
    "ANNOTATORS",
    "agreement",
    "build_vocabulary",
    "normalize_answer",
    "normalize_together",
    "single_line",
    "soft_scores",
]
