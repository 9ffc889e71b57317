"""Captions that a model writes, and their scores against people's: CIDEr, BLEU and ROUGE-L, by COCO's own code.

Needs the extra `captioning`. It scores without Java: in the place of Stanford's tokenizer stands `tokenize_caption`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge
from tqdm.auto import tqdm
from transformers import ProcessorMixin

from ..data.captions import CaptionedPicture
from ..modeling_florence_captioning import FlorenceForImageCaptioning

# The Penn treebank's words: numbers and words with inner signs stay whole, endings split off.
ENDING = r"n't|'(?:s|m|d|ll|re|ve)"
NUMBER = r"\d+(?:[.,:/]\d+)*(?!-?\w)"
PLAIN = r"[^\W_]+"
WORD = re.compile(rf"{ENDING}\b|{NUMBER}|{PLAIN}?(?=(?:{ENDING})\b)|{PLAIN}(?:[-'&./]{PLAIN})*|[&%$#@+*=/]")
JOINED = {"cannot": "can not", "gonna": "gon na", "gotta": "got ta", "wanna": "wan na", "gimme": "gim me"}


@dataclass(frozen=True)
class CaptionScores:
    """COCO's numbers over a set of pictures: BLEU and ROUGE-L from 0 to 1, CIDEr from 0 to 10.

    Attributes:
        pictures: how many there are. CIDEr weighs words by how many of these pictures' captions have them, so it is
            comparable over one set of pictures only, and 0 over a single one.
    """

    cider: float
    bleu_1: float
    bleu_2: float
    bleu_3: float
    bleu_4: float
    rouge_l: float
    pictures: int

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def tokenize_caption(caption: str) -> str:
    """Words in lower case, single spaces, no punctuation: the Penn treebank's splitting, as COCO's metrics want it.

    It is Stanford's tokenizer without its abbreviations, and without Java: of the 35,650 captions of Flickr8k's train
    and dev splits and of 130 pictures of COCO it splits 15 otherwise ("mr." and the like).

    Example:
        >>> tokenize_caption("A man's dog isn't on the T-shirt, is it?")
        "a man 's dog is n't on the t-shirt is it"
    """
    words = WORD.findall(caption.lower().replace("\u2019", "'"))
    return " ".join(JOINED.get(word, word) for word in words)


def score_captions(predictions: Mapping[int, str], pictures: Sequence[CaptionedPicture]) -> CaptionScores:
    """The scores of one caption for each picture against all that people wrote about it.

    Args:
        predictions: number of a picture -> caption.

    Raises:
        ValueError: no picture, or one without a prediction.
    """
    missing = [picture.image_id for picture in pictures if picture.image_id not in predictions]
    if missing or not pictures:
        got = f"none for {len(missing)}, the first {missing[0]}" if missing else "no picture"
        raise ValueError(f"expected a caption of each of at least one picture, got {got}")
    written = {picture.image_id: [tokenize_caption(text) for text in picture.captions] for picture in pictures}
    found = {number: [tokenize_caption(predictions[number])] for number in written}
    bleu: list[float] = Bleu(4).compute_score(written, found, verbose=0)[0]
    cider, rouge = (float(scorer.compute_score(written, found)[0]) for scorer in (Cider(), Rouge()))
    by_length = {f"bleu_{length}": float(value) for length, value in enumerate(bleu, start=1)}
    return CaptionScores(cider=cider, **by_length, rouge_l=rouge, pictures=len(pictures))


@torch.no_grad()
def generate_captions(
    model: FlorenceForImageCaptioning,
    processor: ProcessorMixin,
    pictures: Sequence[CaptionedPicture],
    *,
    batch_size: int = 32,
    progress: bool = False,
    **options: Any,
) -> dict[int, str]:
    """A caption of each picture, in the model's present mode: number of the picture -> text.

    Args:
        options: of `generate`, such as `num_beams` and `max_new_tokens`.

    Raises:
        ValueError: a picture that the image processor refuses.
    """
    captions: dict[int, str] = {}
    for start in tqdm(range(0, len(pictures), batch_size), desc="captioning", disable=not progress):
        part = pictures[start : start + batch_size]
        pixels = processor.image_processor([str(picture.file) for picture in part], return_tensors="pt")[
            "pixel_values"
        ]
        tokens = model.generate(pixel_values=pixels.to(model.device, model.dtype), **options)
        texts = processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        captions |= {picture.image_id: text.strip() for picture, text in zip(part, texts, strict=True)}
    return captions


def evaluate_captioning(
    model: FlorenceForImageCaptioning,
    processor: ProcessorMixin,
    pictures: Sequence[CaptionedPicture],
    *,
    batch_size: int = 32,
    progress: bool = False,
    **options: Any,
) -> tuple[CaptionScores, dict[int, str]]:
    """The scores of a model and the captions that they are of; the model is in its former mode afterwards.

    Raises:
        ValueError: see `generate_captions` and `score_captions`.
    """
    training = model.training
    model.eval()
    try:
        captions = generate_captions(model, processor, pictures, batch_size=batch_size, progress=progress, **options)
    finally:
        model.train(training)
    return score_captions(captions, pictures), captions


__all__ = ["CaptionScores", "evaluate_captioning", "generate_captions", "score_captions", "tokenize_caption"]
