"""Object detection in the wild as Florence reports it (section 3.6, table 7): eleven sets, in full and by few shots.

Needs the extra `detection`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ..data.detection import AnnotatedPicture, DetectionSet, RawAnnotations, validate_annotations
from ..data.detection_merge import plain_name
from ..data.detection_readers import read_annotations

# The paper's names -> what the folders of their downloads are called, without case, spaces, underscores and hyphens.
ODINW: dict[str, tuple[str, ...]] = {
    "Aquarium": ("aquarium", "aquariumcombined"),
    "BCCD": ("bccd", "bloodcells"),
    "Chess": ("chess", "chesspieces"),
    "Mask": ("mask", "maskwearing"),
    "Pets": ("pets", "oxfordpets", "oxfordpetsbybreed"),
    "Packages": ("packages",),
    "Pistols": ("pistols",),
    "PKLot": ("pklot", "pklot640"),
    "Pothole": ("pothole", "potholes"),
    "Thermal": ("thermal", "thermaldogsandpeople"),
    "Wildfire": ("wildfire", "wildfiresmoke"),
}
SHOTS = (1, 3, 5, 10)
PREFIX = "det"


def folder_key(name: str) -> str:
    """How folders' names are compared."""
    words = plain_name(name).split()
    return "".join(words[1:] if words[:1] == [PREFIX] else words)


def find_sets(root: Path) -> dict[str, Path | None]:
    """The paper's name of each set -> its folder below `root`, or None where it is missing.

    A folder is found by its name alone (`Aquarium`, `aquarium_combined`, `det_aquarium`).

    Raises:
        ValueError: there is no such folder, or two of them are one set.
    """
    if not Path(root).is_dir():
        raise ValueError(f"expected a folder of sets, got {str(root)!r}: no such folder")
    found: dict[str, Path | None] = dict.fromkeys(ODINW)
    for folder in sorted(path for path in Path(root).iterdir() if path.is_dir()):
        for name, spellings in ODINW.items():
            if folder_key(folder.name) in spellings:
                if found[name] is not None:
                    raise ValueError(f"expected one folder of {name} in {root}, got {found[name]} and {folder}")
                found[name] = folder
    return found


def read_split(folder: Path, split: str, names: Sequence[str] | None = None) -> DetectionSet:
    """A split of a set, its boxes cut at the pictures' edges.

    names: of the training set's classes by number, for the others.
    """
    raw: RawAnnotations = read_annotations(folder, split)
    return validate_annotations(raw, "clip", names)


def few_shot(pictures: Sequence[AnnotatedPicture], shots: int, seed: int) -> list[AnnotatedPicture]:
    """Pictures in a random order, of which each is taken that still has a class with fewer than `shots` objects.

    So every class has at least `shots` objects, or all that there are, and some have more: pictures are taken whole.

    Raises:
        ValueError: `shots` below 1, or no picture with an object.
    """
    if isinstance(shots, bool) or not isinstance(shots, int) or shots < 1:
        raise ValueError(f"shots: expected an integer >= 1, got {shots!r}")
    counts: dict[int, int] = {}
    taken = []
    for row in torch.randperm(len(pictures), generator=torch.Generator().manual_seed(seed)).tolist():
        labels = pictures[row].labels[~pictures[row].crowd].tolist()
        if any(counts.get(label, 0) < shots for label in labels):
            taken.append(pictures[row])
            for label in labels:
                counts[label] = counts.get(label, 0) + 1
    if not taken:
        raise ValueError(f"expected pictures with objects, got none among {len(pictures)}")
    return taken


def few_shot_set(data: DetectionSet, shots: int, seed: int) -> DetectionSet:
    """`few_shot` of a set, with its names and its report."""
    return replace(data, pictures=few_shot(data.pictures, shots, seed))


def average(scores: Mapping[str, float | Sequence[float]]) -> tuple[float, list[str]]:
    """Mean over the sets, each the mean over its seeds, and the paper's sets that are missing from it.

    A mean over fewer than all eleven is not the paper's number.

    Raises:
        ValueError: no set, one without a score, a set that is none of the paper's, or a score that is no number.
    """
    unknown = sorted(scores.keys() - ODINW.keys())
    if unknown or not scores:
        raise ValueError(f"expected scores of {', '.join(ODINW)}, got {', '.join(unknown) or 'none'}")
    means = []
    for name, values in scores.items():
        rows = [values] if isinstance(values, int | float) else list(values)
        if not rows or not all(math.isfinite(value) for value in rows):
            raise ValueError(f"{name}: expected finite scores, got {rows}")
        means.append(math.fsum(rows) / len(rows))
    return math.fsum(means) / len(means), [name for name in ODINW if name not in scores]


__all__ = ["ODINW", "SHOTS", "average", "few_shot", "few_shot_set", "find_sets", "read_split"]
