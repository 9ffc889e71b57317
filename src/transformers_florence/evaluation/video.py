"""Recognition of clips with several views (Florence section 3.9), and retrieval between clips and texts (3.8)."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..data.video import Clip
from ..data.video_transforms import make_views
from ..modeling_florence_video import FlorenceForVideoClassification
from ..modeling_florence_video_retrieval import FlorenceForVideoTextRetrieval
from ..video_processing_florence import FlorenceVideoProcessor
from .embedding import tokenize
from .retrieval import evaluate_retrieval


@dataclass(frozen=True)
class RecognitionScores:
    """Parts of the clips, in 0..1.

    Attributes:
        top_1, top_5: whose class is the most probable one, among the five most probable.
        mean_class: mean over the classes that occur of their own `top_1`, so that a frequent one counts no more.
        clips: how many there are.
        classes: each class's own `top_1`, by its name; those that do not occur are left out.
    """

    top_1: float
    top_5: float
    mean_class: float
    clips: int
    classes: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def recognition_scores(probabilities: torch.Tensor, labels: torch.Tensor, names: Sequence[str]) -> RecognitionScores:
    """Scores of a set.

    Args:
        probabilities: (clips, classes), floating; only their order in a row counts.
        labels: (clips,), int64.
        names: of the classes.

    Raises:
        ValueError: shapes that do not fit, no clip, values that are not finite, or labels of no class.
    """
    clips, classes = labels.shape[0], len(names)
    if probabilities.shape != (clips, classes) or labels.ndim != 1 or clips == 0:
        got = f"{tuple(probabilities.shape)} for labels {tuple(labels.shape)} and {classes} names"
        raise ValueError(f"expected probabilities (clips, classes) of at least one clip, got {got}")
    if not torch.isfinite(probabilities).all():
        raise ValueError("expected finite probabilities, got NaN or infinity")
    if not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(f"expected labels from 0 to {classes - 1}, got {int(labels.min())} to {int(labels.max())}")
    right = probabilities.gather(1, labels[:, None])  # (clips, 1)
    # A class that is exactly as probable stands before: a model that says the same of all classes knows nothing.
    ranks = (probabilities >= right).sum(dim=1)  # from 1
    first = (ranks == 1).double()
    own = {name: first[labels == number] for number, name in enumerate(names)}
    of_classes = {name: hits.mean().item() for name, hits in own.items() if len(hits)}
    return RecognitionScores(
        top_1=first.mean().item(),
        top_5=(ranks <= 5).double().mean().item(),
        mean_class=sum(of_classes.values()) / len(of_classes),
        clips=clips,
        classes=of_classes,
    )


def evaluate_recognition(
    model: FlorenceForVideoClassification,
    processor: FlorenceVideoProcessor,
    clips: Sequence[Clip],
    *,
    num_clips: int = 1,
    num_crops: int = 1,
    batch_size: int = 8,
    progress: bool = False,
) -> RecognitionScores:
    """Top-1, top-5 and mean class accuracy of a classifier in evaluation mode.

    Args:
        clips: each with a label among the model's.
        num_clips, num_crops: views of a clip, whose probabilities are averaged (4 and 3 in the paper).
        batch_size: clips that are read at a time.

    Raises:
        ValueError: no clip, a clip of another class, or one that cannot be read.
    """
    names = [model.config.id2label[number] for number in range(model.config.num_labels)]
    strange = sorted({str(clip.label) for clip in clips} - set(names))
    if strange:
        raise ValueError(f"expected clips of the model's classes {', '.join(names)}, got {', '.join(strange)}")
    labels = torch.tensor([names.index(str(clip.label)) for clip in clips])
    probabilities = [torch.empty(0, len(names))]
    for start in tqdm(range(0, len(clips), batch_size), desc="clips", disable=not progress):
        views = make_views(clips[start : start + batch_size], processor, num_clips, num_crops)
        views = views.to(model.device, model.dtype)
        probabilities.append(model.classify_views(views, views_at_a_time=batch_size).float().cpu())
    return recognition_scores(torch.cat(probabilities), labels, names)


@torch.no_grad()
def evaluate_video_retrieval(
    model: FlorenceForVideoTextRetrieval,
    processor: FlorenceVideoProcessor,
    tokenizer: PreTrainedTokenizerBase,
    clips: Sequence[Clip],
    *,
    batch_size: int = 8,
    progress: bool = False,
) -> dict[str, float]:
    """Recall at 1, 5 and 10 and median rank, clips to texts and texts to clips, of a model in evaluation mode.

    A text belongs to one clip. Sets in which several clips have one and the same are refused: whichever of them is
    found would be right, and these numbers would call all but one wrong.

    Args:
        clips: each with at least one text.
        batch_size: clips, and texts, that go through their tower at a time.

    Returns:
        `video_to_text_recall_1` and so on, `recall_sum` (at most 6), `clips` and `texts`.

    Raises:
        ValueError: a clip without a text, a text of two clips, or a clip that cannot be read.
    """
    texts = [(text, number) for number, clip in enumerate(clips) for text in clip.texts]
    seen: dict[str, int] = {}
    for text, number in texts:
        if seen.setdefault(text, number) != number:
            other = clips[seen[text]].name
            raise ValueError(f"expected each text at one clip, got {text!r} at {other} and {clips[number].name}")
    video_embeds, text_embeds = [], []
    for start in tqdm(range(0, len(clips), batch_size), desc="clips", disable=not progress):
        pixels = make_views(clips[start : start + batch_size], processor)[:, 0]  # (clips, frames, 3, height, width)
        features = model.get_video_features(pixels.to(model.device, model.dtype)).pooler_output
        video_embeds.append(F.normalize(features.float(), dim=-1).cpu())
    for start in range(0, len(texts), batch_size):
        tokens = tokenize(model, tokenizer, [text for text, _ in texts[start : start + batch_size]])
        text_embeds.append(F.normalize(model.get_text_features(**tokens).pooler_output.float(), dim=-1).cpu())
    if not text_embeds:
        raise ValueError(f"expected clips with texts, got {len(clips)} clips and no text")
    numbers = torch.tensor([number for _, number in texts])
    scores = evaluate_retrieval(torch.cat(video_embeds), torch.cat(text_embeds), numbers).as_dict()
    return {name.replace("image", "video").replace("pictures", "clips"): value for name, value in scores.items()}


__all__ = ["RecognitionScores", "evaluate_recognition", "evaluate_video_retrieval", "recognition_scores"]
