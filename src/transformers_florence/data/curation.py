"""Curation of pictures with texts: what is too small, doubled, in an evaluation set, mismatched or too common goes.

Two passes over the rows, as Florence section 2.1 names the steps: `scan` reads every picture once and keeps a few
numbers of it; `decide` chooses by these numbers alone; writing reads the chosen rows again. The numbers take about 20
bytes a row and 20 a text; pictures are in memory a block at a time.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from imagededup.methods import PHash
from PIL import Image

from ..image_checks import PICTURE_FORMATS
from ..image_processing_pil_florence import FlorenceImageProcessorPil
from .prompts import normalize_text
from .sources import text_label

# Why a row goes; each has the first of these that is true of it.
REASONS = ("corrupt", "no text", "small", "narrow", "in evaluation", "mismatch", "duplicate", "over cap")
KEPT = -1
HASH_BITS = 64
BLOCK_ROWS = 1024  # scanned at a time
ROW_TYPE = np.dtype([("width", "u4"), ("height", "u4"), ("hash", "u8"), ("texts", "u4")])  # width 0: corrupt
TEXT_TYPE = np.dtype([("label", "i8"), ("relevance", "f4")])  # relevance: NaN where it was not asked for

# Prepared pictures, and of each its texts -> of each the relevance of its texts.
Relevance = Callable[[list[Any], list[list[str]]], Iterable[Sequence[float]]]


@dataclass(frozen=True)
class CurationRules:
    """What is kept.

    Attributes:
        min_side: pixels that the short side must have.
        max_aspect: how many times the short side the long one may have.
        duplicate_distance: pictures whose 64-bit perceptual hashes differ in at most so many bits are one picture;
            the first is kept. Of 3.1 million pairs of different photographs none is as near as 6, while halved,
            recompressed, brightened or grey copies, and those cropped by 3 percent, are in 99 of 100 cases. Cropped
            by 10 percent 20 of 100 are, mirrored none. Drawings on white resemble each other more: 2.
        min_relevance: a text goes where its cosine with the picture is lower; None for no such rule.
        relevance_quantile: that part of the texts goes, those of the lowest cosine; 0 for no such rule.
        label_cap: rows in which one text, after `normalize_text`, may be; None for no such rule. Which ones is drawn.
        seed: decides what is drawn.

    Raises:
        ValueError: a number out of range.
    """

    min_side: int = 32
    max_aspect: float = 4.0
    duplicate_distance: int = 6
    min_relevance: float | None = None
    relevance_quantile: float = 0.0
    label_cap: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        ranges = {
            "min_side": self.min_side >= 1,
            "max_aspect": self.max_aspect >= 1,
            "duplicate_distance": 0 <= self.duplicate_distance < HASH_BITS,
            "min_relevance": self.min_relevance is None or -1 <= self.min_relevance <= 1,
            "relevance_quantile": 0 <= self.relevance_quantile < 1,
            "label_cap": self.label_cap is None or self.label_cap >= 1,
            "seed": self.seed >= 0,
        }
        for name, fits in ranges.items():
            if not fits:
                raise ValueError(f"{name}: expected a value in range, got {getattr(self, name)}")

    def is_small(self, width: Any, height: Any) -> Any:
        """Whether a size in pixels, or each of an array of them, is too small."""
        return np.minimum(width, height) < self.min_side

    def is_narrow(self, width: Any, height: Any) -> Any:
        """Whether a size in pixels, or each of an array of them, is too long for its width or the other way round."""
        return np.maximum(width, height) > self.max_aspect * np.minimum(width, height)

    @property
    def asks_for_relevance(self) -> bool:
        """Whether a rule needs the relevance of the texts."""
        return self.min_relevance is not None or self.relevance_quantile > 0


@dataclass(frozen=True)
class Facts:
    """What is known of rows: `rows` of `ROW_TYPE`, and `texts` of `TEXT_TYPE`, those of the first row first."""

    rows: np.ndarray
    texts: np.ndarray

    @classmethod
    def join(cls, parts: Sequence["Facts"]) -> "Facts":
        """The facts of one part after the other."""
        rows = np.concatenate([part.rows for part in parts] or [np.empty(0, ROW_TYPE)])
        return cls(rows, np.concatenate([part.texts for part in parts] or [np.empty(0, TEXT_TYPE)]))


@dataclass(frozen=True)
class Decision:
    """What becomes of rows and texts.

    Attributes:
        rows: (rows,), int8: `KEPT`, or the index in `REASONS`.
        texts: (texts,), bool: whether a text is kept; none is of a row that goes.
        report: numbers of all of it, fit for JSON.
    """

    rows: np.ndarray
    texts: np.ndarray
    report: dict[str, Any]


def picture_bytes(image: Any) -> bytes:
    """The encoded picture of a row.

    Raises:
        OSError: it is in a file that cannot be read.
        ValueError: there is none.
    """
    if image and image.get("bytes") is not None:
        return image["bytes"]
    if image and image.get("path") is not None:
        return Path(image["path"]).read_bytes()
    raise ValueError("expected a picture, got none")


@dataclass(frozen=True)
class Picture:
    """What is left of a picture that was read: its size in pixels, its perceptual hash, and what was prepared."""

    width: int
    height: int
    hash: int
    prepared: Any


class PictureReader:
    """Decodes and hashes pictures, in threads.

    Args:
        threads: how many.
        prepare: RGB picture, uint8 (3, height, width) -> what a model needs of it, or None if nobody is to ask for the
            relevance of its texts. Nothing larger stays in memory.
    """

    def __init__(self, threads: int = 1, prepare: Callable[[np.ndarray], Any] | None = None) -> None:
        self.threads, self.prepare = threads, prepare
        self.hasher = PHash(verbose=False)
        self.door = FlorenceImageProcessorPil(max_aspect_ratio=1e6)  # ratios are the rules' to judge, not the door's

    def read(self, image: Any) -> Picture | None:
        """A row's picture; None for a corrupt one."""
        try:
            with Image.open(BytesIO(picture_bytes(image)), formats=PICTURE_FORMATS) as opened:
                pixels = self.door.process_image(opened)
        except Exception:  # bytes from anywhere: decoders raise whatever they like
            return None
        value = int(self.hasher.encode_image(image_array=pixels.transpose(1, 2, 0)), 16)
        prepared = None if self.prepare is None else self.prepare(pixels)
        return Picture(pixels.shape[2], pixels.shape[1], value, prepared)

    def map(self, images: Iterable[Any]) -> list[Picture | None]:
        """`read` of each, in their order."""
        if self.threads == 1:
            return list(map(self.read, images))
        with ThreadPoolExecutor(self.threads) as pool:
            return list(pool.map(self.read, images))


def scan(rows: Sequence[dict[str, Any]], reader: PictureReader, relevance: Relevance | None = None) -> Facts:
    """The facts of a block of rows in the common form (`sources`)."""
    pictures = reader.map(row["image"] for row in rows)
    facts = np.zeros(len(rows), ROW_TYPE)
    facts["texts"] = [len(row["texts"]) for row in rows]
    starts = np.cumsum(facts["texts"]) - facts["texts"]
    texts = np.zeros(int(facts["texts"].sum()), TEXT_TYPE)
    texts["label"] = [text_label(text) for row in rows for text in row["texts"]]
    texts["relevance"] = np.nan
    asked = []
    for number, (row, picture) in enumerate(zip(rows, pictures, strict=True)):
        if picture is not None:
            facts[number] = (picture.width, picture.height, picture.hash, len(row["texts"]))
            asked += [(number, picture.prepared)] if row["texts"] and picture.prepared is not None else []
    if relevance is not None and asked:
        numbers, prepared = zip(*asked, strict=True)
        values = relevance(list(prepared), [rows[number]["texts"] for number in numbers])
        for number, own in zip(numbers, values, strict=True):
            texts["relevance"][starts[number] : starts[number] + facts["texts"][number]] = own
    return Facts(facts, texts)


def in_blocks(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Lists of `size` items; the last may be shorter and is never empty."""
    iterator = iter(items)
    return iter(lambda: list(islice(iterator, size)), [])


def hash_pictures(images: Iterable[Any], reader: PictureReader) -> tuple[np.ndarray, int]:
    """The hashes of an evaluation set's pictures, (pictures,) uint64, and how many more could not be read."""
    pictures = [picture for block in in_blocks(images, BLOCK_ROWS) for picture in reader.map(block)]
    hashes = [picture.hash for picture in pictures if picture is not None]
    return np.array(hashes, np.uint64), len(pictures) - len(hashes)


def near_pairs(hashes: np.ndarray, distance: int) -> np.ndarray:
    """All pairs of hashes that differ in at most `distance` bits: (pairs, 2), int64, the smaller index first, sorted.

    Exact: cut into distance + 1 bands, two such hashes agree in at least one, so only hashes of equal bands are
    compared. With 6 bits these are 1 in 75 of all pairs.

    Args:
        hashes: (count,), uint64.
        distance: 0 to 63.
    """
    bounds = np.linspace(0, HASH_BITS, distance + 2).round().astype(int)
    found = [np.empty((0, 2), np.int64)]
    for low, high in pairwise(bounds):
        keys = (hashes >> np.uint64(low)) & np.uint64((1 << int(high - low)) - 1)
        order = np.argsort(keys, kind="stable")
        keys, values = keys[order], hashes[order]
        active = np.arange(len(order))  # whose band is that of the hash `step` places later
        step = 0
        while len(active):
            step += 1
            active = active[active < len(order) - step]
            active = active[keys[active] == keys[active + step]]
            near = active[np.bitwise_count(values[active] ^ values[active + step]) <= distance]
            found.append(np.sort(np.stack([order[near], order[near + step]], axis=1), axis=1))
    return np.unique(np.concatenate(found), axis=0)


def near_any(hashes: np.ndarray, references: np.ndarray, distance: int) -> np.ndarray:
    """Which hashes are at most `distance` bits from a reference: (count,), bool. Both are uint64."""
    own, member = np.unique(hashes, return_inverse=True)
    others = np.unique(references)
    pairs = near_pairs(np.concatenate([others, own]), distance) - len(others)  # negative: a reference
    found = np.zeros(len(own), bool)
    found[pairs[(pairs[:, 0] < 0) & (pairs[:, 1] >= 0), 1]] = True
    return found[member]


def near_earlier(hashes: np.ndarray, distance: int) -> np.ndarray:
    """Which hashes, (count,) uint64, are at most `distance` bits from an earlier one that is not: (count,), bool.

    Of a chain whose ends are far apart both ends stay.
    """
    own, first, member = np.unique(hashes, return_index=True, return_inverse=True)  # equal ones are the many
    order = np.argsort(first)
    gone = np.zeros(len(own), bool)  # of the distinct hashes, by first appearance
    for earlier, later in near_pairs(own[order], distance):  # sorted, so the earlier one's fate is known
        gone[later] |= not gone[earlier]
    rank = np.argsort(order)
    return gone[rank][member] | (first[member] != np.arange(len(hashes)))


def over_cap(labels: np.ndarray, cap: int, rng: np.random.Generator) -> np.ndarray:
    """(count,), bool: true for all but `cap` of each label, drawn without regard to their order."""
    order = rng.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    ordered = labels[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]]) if len(labels) else np.empty(0, int)
    place = np.arange(len(labels)) - np.repeat(starts, np.diff(np.r_[starts, len(labels)]))
    result = np.zeros(len(labels), bool)
    result[order[place >= cap]] = True
    return result


def decide(facts: Facts, rules: CurationRules, evaluation: np.ndarray | None = None) -> Decision:
    """What is kept, by the facts of all rows.

    The rules apply in the order of `REASONS`, each to what those before it left: a picture whose text does not fit
    makes no duplicate of a later one whose text does. A row whose texts all go, goes with the last of them.

    Args:
        facts: of every row.
        rules: what is kept.
        evaluation: hashes of pictures that must not be among the kept, (pictures,), uint64.

    Raises:
        ValueError: a rule on relevance, and texts whose relevance is not known.
    """
    rows, texts = facts.rows, facts.texts
    fate = np.full(len(rows), KEPT, np.int8)
    owner = np.repeat(np.arange(len(rows)), rows["texts"])  # (texts,): the row of each
    kept = np.ones(len(texts), bool)
    texts_dropped: dict[str, int] = {}

    def drop(reason: str, which: np.ndarray) -> None:
        fate[which & (fate == KEPT)] = REASONS.index(reason)
        kept[fate[owner] != KEPT] = False

    def drop_texts(reason: str, which: np.ndarray) -> None:
        which = which & kept
        kept[which] = False
        left = np.zeros(len(rows), bool)
        left[owner[kept]] = True
        texts_dropped[reason] = int(which.sum())
        drop(reason, ~left)

    drop("corrupt", rows["width"] == 0)
    drop("no text", rows["texts"] == 0)
    drop("small", rules.is_small(rows["width"], rows["height"]))
    drop("narrow", rules.is_narrow(rows["width"], rows["height"]))
    if evaluation is not None:
        drop("in evaluation", near_any(rows["hash"], evaluation, rules.duplicate_distance))
    if rules.asks_for_relevance:
        values = texts["relevance"]
        if np.isnan(values[kept]).any():
            raise ValueError("expected the relevance of every text as a rule asks for it, got texts without")
        least = -np.inf if rules.min_relevance is None else rules.min_relevance
        if rules.relevance_quantile and kept.any():
            least = max(least, np.quantile(values[kept], rules.relevance_quantile))
        drop_texts("mismatch", values < least)
    left = np.flatnonzero(fate == KEPT)
    near = near_earlier(rows["hash"][left], rules.duplicate_distance)
    drop("duplicate", np.isin(np.arange(len(rows)), left[near]))
    if rules.label_cap is not None:
        places = np.flatnonzero(kept)
        over = over_cap(texts["label"][places], rules.label_cap, np.random.default_rng(rules.seed))
        drop_texts("over cap", np.isin(np.arange(len(texts)), places[over]))

    labels, counts = np.unique(texts["label"][kept], return_counts=True)
    reasons = Counter(fate.tolist())
    report = {
        "rows": len(rows),
        "kept": reasons[KEPT],
        "dropped": {reason: reasons[index] for index, reason in enumerate(REASONS)},
        "texts": len(texts),
        "texts_kept": int(kept.sum()),
        "texts_dropped": texts_dropped,
        "labels": len(labels),
        "shared_labels": int((counts > 1).sum()),
        "texts_of_shared_labels": int(counts[counts > 1].sum()),
    }
    return Decision(fate, kept, report)


class LabelTable:
    """The hash table from texts to labels (Florence section 2.1), with how often each came."""

    def __init__(self) -> None:
        self.texts: dict[int, str] = {}
        self.counts: Counter[int] = Counter()

    def add(self, text: str) -> int:
        """Count a text. Returns its label.

        Raises:
            ValueError: another text has the same label.
        """
        label, text = text_label(text), normalize_text(text)
        if self.texts.setdefault(label, text) != text:
            raise ValueError(f"expected a label for each text, got {label} for {self.texts[label]!r} and {text!r}")
        self.counts[label] += 1
        return label


__all__ = [
    "BLOCK_ROWS",
    "KEPT",
    "REASONS",
    "CurationRules",
    "Decision",
    "Facts",
    "LabelTable",
    "PictureReader",
    "decide",
    "hash_pictures",
    "in_blocks",
    "near_any",
    "near_earlier",
    "near_pairs",
    "over_cap",
    "picture_bytes",
    "scan",
]
