"""Scores of captions: cases worked by hand, Stanford's own splitting, and the way from a model to them."""

import math
from pathlib import Path

import pytest
import torch
from PIL import Image

pytest.importorskip(
    "pycocoevalcap.cider.cider", reason="needs the extra `captioning`: pip install 'transformers_florence[captioning]'"
)

from tests.oracles import randomize
from tests.tiny_fusion import tiny_captioning_config, tiny_fusion_processor
from transformers_florence.data.captions import CaptionedPicture
from transformers_florence.evaluation.captioning import (
    evaluate_captioning,
    generate_captions,
    score_captions,
    tokenize_caption,
)
from transformers_florence.modeling_florence_captioning import FlorenceForImageCaptioning

# What Stanford's tokenizer (stanford-corenlp-3.4.1, lower case) leaves of these once COCO's code has taken its
# punctuation away.
STANFORD = {
    "A man's dog isn't on the T-shirt, is it?": "a man 's dog is n't on the t-shirt is it",
    "Two 3.5 m long boats ; 1,000 people .": "two 3.5 m long boats 1,000 people",
    "A black-and-white dog . . .": "a black-and-white dog",
    "a 3-year-old girl": "a 3-year-old girl",
    "they can't see they're at 8:30": "they ca n't see they 're at 8:30",
    '"Hello" snow': "hello snow",
    "he cannot , she 's gonna": "he can not she 's gon na",
    "50% off & more": "50 % off & more",
    "the dogs' toys": "the dogs toys",
    "A boy\u2019s hat": "a boy 's hat",
}


@pytest.mark.parametrize(("caption", "expected"), STANFORD.items())
def test_words_as_stanford_splits_them(caption: str, expected: str):
    assert tokenize_caption(caption) == expected


def test_brackets_go_with_the_punctuation():
    """COCO's code means them to: it looks for "-LRB-", but the tokens are lower case."""
    assert tokenize_caption("a dog (left) [sic]") == "a dog left sic"


def picture(number: int, *captions: str) -> CaptionedPicture:
    return CaptionedPicture(Path(f"{number}.png"), number, captions)


def test_what_people_wrote_gets_all_points():
    """Both captions have n-grams of every length that the other has not, so each likeness of CIDEr is 1, times 10."""
    pictures = [picture(3, "A dog runs on the beach."), picture(5, "Two women are sitting in a red car!")]
    scores = score_captions({3: "a dog runs on the beach", 5: "two women are sitting in a red car"}, pictures)
    numbers = scores.as_dict()
    assert numbers.pop("pictures") == 2 and numbers.pop("cider") == pytest.approx(10)
    assert list(numbers) == ["bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l"]
    assert list(numbers.values()) == pytest.approx([1] * 5, abs=1e-6)


def test_scores_worked_by_hand():
    """Of "the cat sat": two of three words and one of two pairs are in "the cat is here", one word longer."""
    pictures = [picture(1, "the cat is here"), picture(2, "nothing alike")]
    scores = score_captions({1: "the cat sat", 2: "xyz"}, pictures)
    shorter = math.exp(1 - 6 / 4)  # words of people over words of the model, in all
    assert scores.bleu_1 == pytest.approx(2 / 4 * shorter, abs=1e-6)
    assert scores.bleu_2 == pytest.approx(math.sqrt(2 / 4 * 1 / 2) * shorter, abs=1e-6)
    precision, recall, weight = 2 / 3, 2 / 4, 1.2**2
    assert scores.rouge_l == pytest.approx((1 + weight) * precision * recall / (recall + weight * precision) / 2)
    # CIDEr: counts times log(2 pictures / pictures with the n-gram) are all log 2 here, but for "sat" and what has it,
    # which people never wrote: log 2 as well. One picture of two has a likeness, over n-grams of one and two words.
    ones, twos = 2 / math.sqrt(3 * 4), 1 / math.sqrt(2 * 3)
    penalty = math.exp(-((2 - 3) ** 2) / (2 * 6**2))  # its length is the number of pairs
    assert scores.cider == pytest.approx(10 * (ones + twos) / 4 * penalty / 2)


def test_punctuation_and_case_do_not_count():
    pictures = [picture(1, "A dog runs", "one dog"), picture(2, "the red car")]
    first, second = (score_captions({1: text, 2: "a car"}, pictures) for text in ("A DOG, runs...", "a dog runs"))
    assert first == second


def test_what_cannot_be_scored():
    with pytest.raises(ValueError, match="expected a caption of each of at least one picture, got no picture"):
        score_captions({}, [])
    with pytest.raises(ValueError, match="got none for 1, the first 2"):
        score_captions({1: "a"}, [picture(1, "a"), picture(2, "b")])


@torch.no_grad()
def test_a_batch_is_described_as_single_pictures_are(tmp_path: Path):
    model = randomize(FlorenceForImageCaptioning(tiny_captioning_config(bos_token_id=0, eos_token_id=2))).eval()
    processor, pictures = tiny_fusion_processor(), []
    for number, color in enumerate(("red", "blue", "green")):
        Image.new("RGB", (32, 32), color).save(tmp_path / f"{color}.png")
        pictures.append(CaptionedPicture(tmp_path / f"{color}.png", 10 + number, ("a dog",)))
    expected = {}
    for each in pictures:
        pixels = processor(images=str(each.file), return_tensors="pt")["pixel_values"]
        tokens = model.generate(pixel_values=pixels, max_new_tokens=6, num_beams=2)
        expected[each.image_id] = processor.tokenizer.decode(tokens[0], skip_special_tokens=True).strip()
    options = {"max_new_tokens": 6, "num_beams": 2}
    assert generate_captions(model, processor, pictures, batch_size=2, **options) == expected
    assert any(expected.values())
    model.train()
    scores, captions = evaluate_captioning(model, processor, pictures, **options)
    assert captions == expected and scores == score_captions(expected, pictures) and model.training
