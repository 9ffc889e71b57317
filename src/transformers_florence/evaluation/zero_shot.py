"""Zero-shot classification: class names become a classifier, once for a whole label set (Florence section 3.1).

Models are `FlorenceModel` and whatever has its interface, transformers' CLIP and SigLIP among them.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.image_sets import check_class_names
from ..data.prompts import fill_template
from .embedding import check_features, tokenize


def _check_texts(what: str, texts: Sequence[str]) -> None:
    if isinstance(texts, str) or len(texts) == 0:
        raise ValueError(f"expected a list of at least one of {what}, got {texts!r}")


@torch.no_grad()  # not inference_mode: class vectors may stand in a training step
def embed_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    batch_size: int = 256,
    progress: bool = False,
) -> torch.Tensor:
    """Unit vectors of texts: (texts, projection_dim), float32. Raises ValueError for an empty list."""
    _check_texts("texts", texts)
    chunks = []
    for start in tqdm(range(0, len(texts), batch_size), desc="texts", disable=not progress):
        tokens = tokenize(model, tokenizer, texts[start : start + batch_size])
        chunks.append(F.normalize(model.get_text_features(**tokens).pooler_output.float(), dim=-1))
    return torch.cat(chunks)


@torch.no_grad()
def embed_pixels(
    model: PreTrainedModel, pixel_values: torch.Tensor, *, batch_size: int = 128, progress: bool = False
) -> torch.Tensor:
    """Unit vectors of pictures: (batch, channels, height, width), normalised -> (batch, projection_dim), float32.

    Raises:
        ValueError: an empty batch, or pixels that the model refuses.
    """
    if len(pixel_values) == 0:
        raise ValueError(f"expected at least one picture, got pixel_values of shape {tuple(pixel_values.shape)}")
    chunks = []
    for start in tqdm(range(0, len(pixel_values), batch_size), desc="pictures", disable=not progress):
        pixels = pixel_values[start : start + batch_size].to(model.device)
        chunks.append(F.normalize(model.get_image_features(pixels).pooler_output.float(), dim=-1))
    return torch.cat(chunks)


def check_labels_differ(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, labels: Sequence[str], templates: Sequence[str]
) -> None:
    """Refuse labels that are equal, or that become so when their texts are cut to the context.

    Raises:
        ValueError: what `check_class_names` refuses; or two labels with the same tokens in the shortest template.
    """
    check_class_names(labels, "labels")
    shortest = min(templates, key=len)
    tokens = tokenize(model, tokenizer, [fill_template(shortest, label) for label in labels])["input_ids"]
    first: dict[tuple[int, ...], str] = {}
    for label, row in zip(labels, tokens.tolist(), strict=True):
        other = first.setdefault(tuple(row), label)
        if other != label:
            raise ValueError(
                f"expected labels that differ within {tokens.shape[1]} tokens, got {other[:200]!r} and {label[:200]!r}"
            )


def build_zero_shot_classifier(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    labels: Sequence[str],
    templates: Sequence[str],
    *,
    batch_size: int = 256,
    progress: bool = False,
) -> torch.Tensor:
    """Class vectors (labels, projection_dim), float32, unit length: CLIP's prompt ensemble.

    Every template's text is normalised, their mean is taken, and the mean is normalised again.

    Raises:
        ValueError: no labels, no templates, one text instead of a list, a template without exactly one `{}`, or
            labels that `check_labels_differ` refuses.
    """
    _check_texts("labels", labels)
    _check_texts("templates", templates)
    check_labels_differ(model, tokenizer, labels, templates)
    texts = [fill_template(template, label) for label in labels for template in templates]
    embeds = embed_texts(model, tokenizer, texts, batch_size=batch_size, progress=progress)
    return F.normalize(embeds.view(len(labels), len(templates), -1).mean(dim=1), dim=-1)


def text_fingerprint(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> str:
    """A digest of all that a text's vector depends on: weights other than the image tower's, vocabulary, context."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        if "vision_model." not in name and "visual_projection." not in name:
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    vocabulary = sorted(tokenizer.get_vocab().items())
    digest.update(json.dumps([vocabulary, tokenizer.model_max_length]).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def best_thresholds(
    logits: torch.Tensor, present: torch.Tensor, labels: Sequence[str], counted: torch.Tensor | None = None
) -> torch.Tensor:
    """For each label the threshold of highest F1, half-way to the next logit below; the highest of equal ones.

    Args:
        logits: (pictures, labels); present: (pictures, labels), bool.
        counted: (pictures, labels), bool: False where it is not known, such as VOC's difficult ones; all if None.

    Returns:
        (labels,), float32.

    Raises:
        ValueError: shapes that do not fit, or a label that no picture has.
    """
    counted = torch.ones_like(present) if counted is None else counted
    for name, mask in (("present", present), ("counted", counted)):
        if mask.shape != logits.shape or mask.dtype != torch.bool:
            expected = f"expected {name} as bool of shape {tuple(logits.shape)}"
            raise ValueError(f"{expected}, got {mask.dtype} {tuple(mask.shape)}")
    present = present & counted
    absent = [label for label, count in zip(labels, present.sum(dim=0).tolist(), strict=True) if not count]
    if absent:
        raise ValueError(f"expected pictures of every label, got none of {', '.join(map(repr, absent[:5]))}")
    ranked, order = logits.float().sort(dim=0, descending=True)
    hits = present.gather(0, order).cumsum(dim=0)
    count = counted.gather(0, order).cumsum(dim=0)
    f1 = 2 * hits / (count + present.sum(dim=0))  # of taking the pictures down to this one
    below = torch.cat([ranked[1:], ranked[-1:] - 2])
    f1 = f1.masked_fill(ranked == below, -1)  # equal logits are taken together
    best = f1.argmax(dim=0, keepdim=True)
    return ((ranked + below) / 2).gather(0, best)[0]


@dataclass(frozen=True)
class ZeroShotClassifier:
    """A label set as vectors, with what they were made of: built once, saved, used on any number of pictures.

    Attributes:
        weight: (labels, projection_dim), float32, unit length.
        labels, templates: the texts.
        scale, bias: of the logits: the model's temperature, and SigLIP's bias (0 for others).
        fingerprint: of the text side of the model and its tokenizer, see `text_fingerprint`.
        thresholds: (labels,), float32: from which logit on a picture has a label, see `calibrate`; None before.
    """

    weight: torch.Tensor
    labels: tuple[str, ...]
    templates: tuple[str, ...]
    scale: float
    bias: float = 0.0
    fingerprint: str = ""
    thresholds: torch.Tensor | None = None

    @classmethod
    def build(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        labels: Sequence[str],
        templates: Sequence[str],
        *,
        cache: str | Path | None = None,
        batch_size: int = 256,
        progress: bool = False,
    ) -> "ZeroShotClassifier":
        """The classifier of a model, or the same one from the cache, where the text tower has no work.

        Args:
            cache: folder of classifiers, each under a name made of text tower, tokenizer, labels and templates.

        Raises:
            ValueError: as `build_zero_shot_classifier`; or a file in the cache that is damaged.
        """
        fingerprint = text_fingerprint(model, tokenizer)
        key = json.dumps([fingerprint, list(labels), list(templates)])
        file = Path(cache or ".") / f"{hashlib.blake2b(key.encode(), digest_size=16).hexdigest()}.safetensors"
        if cache is not None and file.is_file():
            return cls.load(file)
        weight = build_zero_shot_classifier(
            model, tokenizer, labels, templates, batch_size=batch_size, progress=progress
        ).cpu()
        scale, bias = model.logit_scale.detach().float(), getattr(model, "logit_bias", None)
        limit = getattr(model.config, "max_logit_scale", None)
        classifier = cls(
            weight,
            tuple(labels),
            tuple(templates),
            float(scale.exp() if limit is None else scale.exp().clamp(max=limit)),
            0.0 if bias is None else bias.item(),
            fingerprint,
        )
        if cache is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            classifier.save(file)
        return classifier

    def save(self, file: str | Path) -> None:
        """Write a safetensors file that holds all of it; a former one is replaced as a whole."""
        tensors = {"weight": self.weight}
        if self.thresholds is not None:
            tensors["thresholds"] = self.thresholds
        content = {name: getattr(self, name) for name in ("labels", "templates", "scale", "bias", "fingerprint")}
        partial = Path(file).with_suffix(".partial")
        save_file(tensors, partial, metadata={"classifier": json.dumps(content)})
        partial.replace(file)

    @classmethod
    def load(cls, file: str | Path) -> "ZeroShotClassifier":
        """What `save` wrote. Raises ValueError if it is something else, or damaged."""
        try:
            with safe_open(file, "pt") as content:
                fields = json.loads((content.metadata() or {})["classifier"])
                tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
            fields |= {"labels": tuple(fields["labels"]), "templates": tuple(fields["templates"])}
            classifier = cls(**tensors, **fields)
            check_features(classifier.weight, "class vectors")
        except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
            raise ValueError(f"expected a saved classifier, got {file}: {error!r}") from error
        if len(classifier.weight) != len(classifier.labels):
            got = f"{len(classifier.weight)} vectors and {len(classifier.labels)} labels"
            raise ValueError(f"{file}: expected a vector for each label, got {got}")
        return classifier

    def logits(self, image_embeds: torch.Tensor) -> torch.Tensor:
        """(pictures, projection_dim), unit length -> (pictures, labels), float32: softmax or sigmoid makes scores.

        Raises:
            ValueError: vectors of another length, or not finite.
        """
        check_features(image_embeds, "image_embeds")
        if image_embeds.shape[1] != self.weight.shape[1]:
            raise ValueError(f"expected vectors of length {self.weight.shape[1]}, got {image_embeds.shape[1]}")
        return self.scale * image_embeds.float() @ self.weight.to(image_embeds.device).T + self.bias

    def calibrate(
        self, image_embeds: torch.Tensor, present: torch.Tensor, counted: torch.Tensor | None = None
    ) -> "ZeroShotClassifier":
        """The same classifier with the thresholds that are best on a validation split, by each label's F1.

        A temperature learnt by softmax says nothing of a label by itself: sigmoids of such logits are all near 1.

        Args:
            image_embeds: (pictures, projection_dim), unit length.
            present: (pictures, labels), bool: which picture has which label.
            counted: (pictures, labels), bool: False where that is not known; all if None.

        Raises:
            ValueError: shapes that do not fit, or a label that no picture has.
        """
        logits = self.logits(image_embeds)
        return replace(self, thresholds=best_thresholds(logits, present, self.labels, counted))

    def present(self, image_embeds: torch.Tensor) -> torch.Tensor:
        """(pictures, labels), bool: logits that reach their threshold. Raises ValueError before `calibrate`."""
        if self.thresholds is None:
            raise ValueError("expected thresholds: calibrate the classifier on a validation split first")
        return self.logits(image_embeds) >= self.thresholds.to(image_embeds.device)


def top_k_accuracy(scores: torch.Tensor, targets: torch.Tensor, k: int) -> float:
    """Part of rows whose target is among the k best columns. scores: (rows, columns); targets: (rows,), int64.

    Raises:
        ValueError: shapes that do not fit, no rows, or k not between 1 and the number of columns.
    """
    if scores.ndim != 2 or len(scores) == 0 or targets.shape != scores.shape[:1]:
        got = f"{tuple(scores.shape)} and {tuple(targets.shape)}"
        raise ValueError(f"expected scores (rows, columns) and targets (rows,), got {got}")
    if not 1 <= k <= scores.shape[1]:
        raise ValueError(f"expected k between 1 and {scores.shape[1]}, got {k}")
    best = scores.topk(k, dim=1).indices
    return (best == targets[:, None]).any(dim=1).float().mean().item()


__all__ = [
    "ZeroShotClassifier",
    "best_thresholds",
    "build_zero_shot_classifier",
    "check_labels_differ",
    "embed_pixels",
    "embed_texts",
    "text_fingerprint",
    "top_k_accuracy",
]
