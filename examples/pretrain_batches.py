"""Batches for `pretrain_unicl.py`, of a picture corpus in memory or of any sets on disk, and what evaluates them.

Both kinds give, for each step, `inputs` of the model, `labels` of its loss, and the `samples` they are made of, on the
device; texts for a vocabulary; their place in the data, for a checkpoint; and what a run's checkpoint belongs to.
"""

import hashlib
import itertools
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from pretrain_arguments import PretrainArguments
from transformers_florence import FlorenceModel, FlorenceProcessor
from transformers_florence.data.augmentation import BatchAugmentation
from transformers_florence.data.picture_corpus import PictureCorpus, load_split
from transformers_florence.data.prompts import DRAWING_TEMPLATES, PHOTO_TEMPLATES, normalize_text
from transformers_florence.data.sources import Source, make_sources, open_source, texts_of
from transformers_florence.data.triplet_loader import TripletLoader, TripletRows, TripletStream
from transformers_florence.data.triplets import PictureDecoder, PixelNormalizer, TripletMaker
from transformers_florence.evaluation.retrieval import recall_at_k
from transformers_florence.evaluation.zero_shot import (
    build_zero_shot_classifier,
    embed_pixels,
    embed_texts,
    top_k_accuracy,
)

TEMPLATES = {"photo": PHOTO_TEMPLATES, "drawing": DRAWING_TEMPLATES}
TOLD_SAMPLES = 20  # bad samples whose messages each process logs; the others are counted alone
HELD_OUT_ROWS = 1000  # of a held-out source, evenly through it

logger = logging.getLogger(__name__)


def corpus_texts(corpus: PictureCorpus) -> list[str]:
    """Every text of the training pictures, and the templates."""
    return [corpus.full_text(row) for row in range(len(corpus))] + corpus.category_names + list(DRAWING_TEMPLATES)


def source_texts(arguments: PretrainArguments) -> Iterator[str]:
    """The first texts of the sources, of each in turn, and the templates."""
    texts = [texts_of(source) for source in make_sources(arguments.sources)]
    mixed = (text for some in itertools.zip_longest(*texts) for text in some if text is not None)
    return itertools.chain(itertools.islice(mixed, arguments.vocabulary_texts), TEMPLATES[arguments.templates])


def shorten(tokens: Mapping[str, torch.Tensor], length: int, eos_token_id: int) -> dict[str, torch.Tensor]:
    """What the tokenizer gives for a smaller `max_length`: (batch, tokens) -> (batch, at most `length`).

    A text that is cut keeps its end token.
    """
    ids, mask = tokens["input_ids"][:, :length].clone(), tokens["attention_mask"]
    if mask.shape[1] > length:
        ids[mask[:, length] != 0, -1] = eos_token_id
    return {"input_ids": ids, "attention_mask": mask[:, :length]}


class Batches(ABC):
    """A process's part of the batch of any step.

    Attributes:
        identity: what a checkpoint of the run belongs to, beside its arguments; a hash.
        label_names: the texts of the labels that have prototypes, by their numbers; none where there are none.
        steps_of_epoch: steps until every picture was there; None where nobody knows.
        skipped: bad samples that this process has passed over.
    """

    identity: str
    label_names: Sequence[str] = ()
    steps_of_epoch: int | None = None
    skipped = 0

    def __init__(
        self,
        arguments: PretrainArguments,
        processor: FlorenceProcessor,
        device: torch.device,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self.arguments, self.tokenizer, self.device = arguments, processor.tokenizer, device
        self.rank, self.ranks = rank, ranks
        if arguments.batch_size % ranks:
            raise ValueError(f"batch_size: expected a multiple of {ranks} processes, got {arguments.batch_size}")
        image_processor = processor.image_processor
        crops = image_processor.do_center_crop
        self.full_side = dict(image_processor.crop_size if crops else image_processor.size)["height"]
        self.mean = torch.tensor(image_processor.image_mean, device=device).view(1, 3, 1, 1)
        self.std = torch.tensor(image_processor.image_std, device=device).view(1, 3, 1, 1)

    def is_small(self, step: int) -> bool:
        """Whether a step belongs to the first part of the run."""
        return step < self.arguments.small_part * self.arguments.steps

    def side(self, step: int) -> int:
        """Side of the pictures at a step, in pixels."""
        return self.full_side // 2 if self.is_small(step) else self.full_side

    def length(self, step: int) -> int:
        """Tokens of a text at a step, at most."""
        full = self.arguments.context_length
        return full * 2 // 3 if self.is_small(step) else full

    def strength(self, step: int) -> float:
        """Of the augmentation at a step."""
        ramp = max(1.0, self.arguments.augmentation_ramp * self.arguments.steps)
        return min(1.0, step / ramp) * self.arguments.augmentation

    def pixel_values(self, pixels: torch.Tensor, step: int, rng: np.random.Generator) -> torch.Tensor:
        """pixels: (batch, 3, height, width), uint8 -> (batch, 3, side, side), augmented and normalised."""
        generator = torch.Generator().manual_seed(int(rng.integers(1 << 62)))
        pixels, side, strength = pixels.float() / 255, self.side(step), self.strength(step)
        if self.arguments.augmentation or pixels.shape[-2:] != (side, side):
            pixels = BatchAugmentation(size=side)(pixels, generator, strength)
        return (pixels - self.mean) / self.std

    @abstractmethod
    def __call__(self, step: int) -> dict[str, Any]:
        """At a step: `inputs` of the model, `labels` of its loss, and the `samples` that they are made of."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """This process's place in the data, for JSON; nothing where the step says it all."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where `state_dict` was taken."""

    @abstractmethod
    def evaluators(self) -> "list[Evaluator]":
        """What looks at the model from time to time."""


class CorpusBatches(Batches):
    """Of a picture corpus in memory, from the seed and the step's number alone.

    Every process draws the whole batch and keeps its part, so that the batch does not depend on their number.
    """

    def __init__(
        self,
        arguments: PretrainArguments,
        corpus: PictureCorpus,
        processor: FlorenceProcessor,
        device: torch.device,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        super().__init__(arguments, processor, device, rank, ranks)
        self.corpus, self.processor = corpus, processor
        local = arguments.batch_size // ranks
        self.part = slice(rank * local, (rank + 1) * local)
        self.with_category = (corpus.categories >= 0).nonzero()[:, 0].numpy()
        self.templates = () if arguments.leave_out_templated else DRAWING_TEMPLATES
        # The rows that have a text of the kinds that are drawn.
        self.rows = np.array([row for row in range(len(corpus)) if self.templates or corpus.has_more_than_a_name(row)])
        self.steps_of_epoch = self.per_epoch = len(self.rows) // arguments.batch_size
        if self.per_epoch == 0:
            raise ValueError(f"expected at least batch_size={arguments.batch_size} pictures, got {len(self.rows)}")
        self.identity = hashlib.sha256("\n".join(corpus_texts(corpus)).encode()).hexdigest()
        if arguments.objective != "clip":
            names = dict(zip(corpus.labels.tolist(), corpus.names, strict=True))
            self.label_names = [names[label] for label in range(len(names))]

    def __str__(self) -> str:
        return f"{len(self.rows)} pictures, {len(set(self.corpus.names))} names"

    def draw_names(self, step: int, rng: np.random.Generator) -> tuple[np.ndarray, list[str], torch.Tensor]:
        """Rows in the epoch's order, a text of each, and the numbers of their names."""
        epoch, position = divmod(step, self.per_epoch)
        size = self.arguments.batch_size
        order = np.random.default_rng([self.arguments.seed, 1 << 32, epoch]).permutation(self.rows)
        rows = order[position * size : (position + 1) * size]
        return rows, [self.corpus.draw_text(row, self.templates, rng) for row in rows], self.corpus.labels[rows]

    def draw_categories(self, rng: np.random.Generator) -> tuple[np.ndarray, list[str], torch.Tensor] | None:
        """Rows, the words of their categories and the categories' numbers; None if too few rows have one."""
        if len(self.with_category) < self.arguments.batch_size:
            return None
        rows = rng.choice(self.with_category, size=self.arguments.batch_size, replace=False)
        texts = [self.corpus.draw_category_text(row, DRAWING_TEMPLATES, rng) for row in rows]
        return rows, texts, self.corpus.categories[rows]

    def draw_keywords(self, rng: np.random.Generator) -> tuple[np.ndarray, list[str], torch.Tensor] | None:
        """Rows, a keyword of each and the keywords' numbers; None if there are too few."""
        rows, numbers = self.corpus.draw_keyword_rows(self.arguments.batch_size, rng)
        if len(rows) < self.arguments.batch_size:
            return None
        texts = [self.corpus.draw_keyword_text(number, DRAWING_TEMPLATES, rng) for number in numbers]
        return rows, texts, torch.from_numpy(numbers)

    def __call__(self, step: int) -> dict[str, Any]:
        arguments, corpus = self.arguments, self.corpus
        rng = np.random.default_rng([arguments.seed, step])
        kind, wider = rng.random(), None
        if kind < arguments.category_batches:
            wider = self.draw_categories(rng)
        elif kind < arguments.category_batches + arguments.keyword_batches:
            wider = self.draw_keywords(rng)
        rows, texts, labels = wider or self.draw_names(step, rng)
        tokens = self.tokenizer(
            texts, return_tensors="pt", padding=True, truncation=True, max_length=self.length(step), verbose=False
        ).to(self.device)
        if arguments.objective == "clip":
            labels = torch.arange(len(rows))
        inputs = {
            "pixel_values": self.pixel_values(corpus.pixels[rows].to(self.device), step, rng),
            "input_ids": tokens["input_ids"],
            "attention_mask": tokens["attention_mask"],
        }
        class_labels = None if arguments.objective == "clip" else corpus.labels[rows][self.part].to(self.device)
        return {
            "inputs": {name: value[self.part] for name, value in inputs.items()},
            "labels": {
                "labels": labels[self.part].to(self.device),
                "class_labels": class_labels,
                "align_texts": wider is None,
            },
            "samples": rows[self.part].tolist(),
        }

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass  # the step says it all

    def evaluators(self) -> "list[Evaluator]":
        rows = load_split(self.arguments.corpus, "train")
        sources = rows["source"] if "source" in rows.column_names else ["emoji"] * len(rows)
        known = {name for name, source in zip(self.corpus.names, sources, strict=True) if source == "emoji"}
        try:
            held_out = load_split(self.arguments.corpus, "test_style")
        except ValueError:
            return []
        keep = [index for index, name in enumerate(held_out["name"]) if name in known]
        if not keep:
            return []
        pictures = PictureCorpus(held_out.select(keep), size=self.arguments.stored_size)
        return [HeldOutStyle(self.processor, pictures, sorted(known))]


class TripletBatches(Batches):
    """Of any sets on disk, read by worker processes; each process reads its own part of every batch.

    Rows at hand: the pictures and texts of a step depend on the seed and the step alone, whatever the number of
    processes. A stream: on the checkpoint it goes on from, and on the number of processes and workers.
    """

    def __init__(
        self,
        arguments: PretrainArguments,
        processor: FlorenceProcessor,
        device: torch.device,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        super().__init__(arguments, processor, device, rank, ranks)
        self.processor, sources = processor, make_sources(arguments.sources)
        maker = TripletMaker(
            PictureDecoder(processor.image_processor),
            templates=TEMPLATES[arguments.templates],
            leave_out_templated=arguments.leave_out_templated,
            skip_bad=arguments.bad_samples == "skip",
        )
        data: TripletRows | TripletStream
        if arguments.streaming:
            data = TripletStream(sources, maker, seed=arguments.seed, shuffle_buffer=arguments.shuffle_buffer)
            self.size = f"{len(sources)} streamed sources"
            lengths = [stream.num_shards for stream in data.streams]
        else:
            data = TripletRows(sources, maker, seed=arguments.seed, progress=rank == 0)
            self.size = f"{data.epoch_length} rows of {len(sources)} sources"
            self.steps_of_epoch = data.epoch_length // arguments.batch_size
            lengths = data.draws
        columns = [[source.text, source.label, source.split, source.weight] for source in sources]
        self.identity = hashlib.sha256(json.dumps([columns, lengths]).encode()).hexdigest()
        self.loader = TripletLoader(
            data,
            batch_size=arguments.batch_size // ranks,
            rank=rank,
            world_size=ranks,
            num_workers=arguments.workers,
            tokenize=partial(
                processor.tokenizer,
                return_tensors="pt",
                padding=True,
                truncation=True,
                max_length=arguments.context_length,
                verbose=False,
            ),
            pin_memory=device.type == "cuda",
        )
        self.iterator: Iterator[dict[str, Any]] | None = None

    def __str__(self) -> str:
        return self.size

    def __call__(self, step: int) -> dict[str, Any]:
        at = self.loader.state_dict()["step"]
        if at != step:
            raise ValueError(f"expected step {at}, the next one of the data, got {step}")
        if self.iterator is None:
            self.iterator = iter(self.loader)
        batch = next(self.iterator)
        for message in batch["bad"][: max(0, TOLD_SAMPLES - self.skipped)]:
            logger.warning("passed over %s", message)
        self.skipped += len(batch["bad"])
        tokens = shorten(batch, self.length(step), self.tokenizer.eos_token_id)
        rng = np.random.default_rng([self.arguments.seed, step, self.rank])
        pixels = batch["pixels"].to(self.device, non_blocking=True)
        return {
            "inputs": {
                "pixel_values": self.pixel_values(pixels, step, rng),
                **{name: value.to(self.device, non_blocking=True) for name, value in tokens.items()},
            },
            "labels": {"labels": batch["labels"].to(self.device, non_blocking=True)},
            "samples": batch["texts"],
        }

    def state_dict(self) -> dict[str, Any]:
        return {"loader": self.loader.state_dict(), "skipped": self.skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loader.load_state_dict(state["loader"])
        self.skipped, self.iterator = state["skipped"], None

    def evaluators(self) -> "list[Evaluator]":
        sources = make_sources(self.arguments.held_out, "held_out") if self.arguments.held_out else []
        return [HeldOutSource(self.processor, source, TEMPLATES[self.arguments.templates]) for source in sources]


class Evaluator(ABC):
    """Numbers of a model on held-out pictures."""

    @abstractmethod
    def __call__(self, model: FlorenceModel, side: int) -> dict[str, float]:
        """model: in evaluation mode; side: of the pictures that are being trained, in pixels."""


class HeldOutStyle(Evaluator):
    """Pictures of a held-out style named among all training names: `top1` and `top5`."""

    def __init__(self, processor: FlorenceProcessor, corpus: PictureCorpus, names: Sequence[str]) -> None:
        self.processor, self.corpus, self.names = processor, corpus, names

    def __call__(self, model: FlorenceModel, side: int) -> dict[str, float]:
        classifier = build_zero_shot_classifier(model, self.processor.tokenizer, self.names, ("{}", "an emoji of {}"))
        pixels = self.processor.image_processor(
            list(self.corpus.pixels), size={"height": side, "width": side}, return_tensors="pt"
        )["pixel_values"]
        scores = embed_pixels(model, pixels) @ classifier.T
        column = {name: index for index, name in enumerate(self.names)}
        targets = torch.tensor([column[name] for name in self.corpus.names], device=scores.device)
        return {f"top{k}": top_k_accuracy(scores, targets, min(k, len(self.names))) for k in (1, 5)}


class HeldOutSource(Evaluator):
    """A held-out source of texts: recall both ways, `FOLDER_image_to_text_r1` and so on, by the folder's name. One of
    class labels: their names in the templates, `FOLDER_top1` and `FOLDER_top5`.

    Raises:
        ValueError: as `open_source`, no row with a text, or a picture that cannot be read.
    """

    def __init__(self, processor: FlorenceProcessor, source: Source, templates: Sequence[str]) -> None:
        self.processor, self.source, self.templates = processor, source, templates
        rows, self.reader = open_source(source, streaming=False)
        texts = [self.reader.texts(row) for row in rows.remove_columns([source.image])]
        numbers = [number for number, own in enumerate(texts) if own]
        if not numbers:
            raise ValueError(f"{source.path}: expected at least one row with a text, got none")
        numbers = numbers[:: -(-len(numbers) // HELD_OUT_ROWS)]
        self.texts = [texts[number][0] for number in numbers]
        decode = PictureDecoder(processor.image_processor)
        pictures = rows.select(numbers)[source.image]
        self.pixels = torch.stack(
            [
                decode(picture, f"{source.path}, row {number}")
                for picture, number in zip(pictures, numbers, strict=True)
            ]
        )  # (rows, 3, height, width), uint8

    def embed(self, model: FlorenceModel, side: int) -> torch.Tensor:
        """(rows, projection_dim), unit length."""
        normalize, chunks = PixelNormalizer(self.processor.image_processor), []
        for some in self.pixels.split(128):
            pixels = normalize(some)
            if pixels.shape[-1] != side:
                pixels = F.interpolate(pixels, (side, side), mode="bilinear", antialias=True)
            chunks.append(embed_pixels(model, pixels))
        return torch.cat(chunks)

    def __call__(self, model: FlorenceModel, side: int) -> dict[str, float]:
        images, tokenizer = self.embed(model, side), self.processor.tokenizer
        words, found = [normalize_text(text) for text in self.texts], {}
        if self.reader.is_label:
            names = sorted(set(words if self.reader.names is None else map(normalize_text, self.reader.names)))
            column = {name: index for index, name in enumerate(names)}
            targets = torch.tensor([column[word] for word in words], device=images.device)
            scores = images @ build_zero_shot_classifier(model, tokenizer, names, self.templates).T
            for k in (1, 5):
                found[f"top{k}"] = top_k_accuracy(scores, targets, min(k, len(names)))
        else:
            texts = embed_texts(model, tokenizer, self.texts)
            same = torch.tensor([[one == other for other in words] for one in words], device=images.device)
            for k in (1, 5):
                found[f"image_to_text_r{k}"] = recall_at_k(images, texts, same, min(k, len(words)))
                found[f"text_to_image_r{k}"] = recall_at_k(texts, images, same, min(k, len(words)))
        return {f"{Path(self.source.path).name}_{name}": value for name, value in found.items()}


__all__ = ["Batches", "CorpusBatches", "Evaluator", "TripletBatches", "corpus_texts", "shorten", "source_texts"]
