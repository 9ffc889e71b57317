"""Several sets of annotated pictures as one, with one vocabulary (the shape of FLOD-9M, Florence section 2.4)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from .detection import AnnotatedPicture, DetectionSet


def plain_name(name: str) -> str:
    """How two sets would write one class: small letters, single spaces, no underscores or hyphens."""
    return " ".join(name.replace("_", " ").replace("-", " ").lower().split())


@dataclass(frozen=True)
class MergedSets:
    """What `merge_sets` returns.

    Attributes:
        names: the common vocabulary, sorted.
        pictures: of each set, with the numbers of that vocabulary.
        origins: name in the vocabulary -> the sets that have it, each with its own spelling.
    """

    names: list[str]
    pictures: dict[str, list[AnnotatedPicture]]
    origins: dict[str, dict[str, list[str]]]

    def table(self) -> str:
        """Sets with their pictures, objects and classes, then the classes that several sets share, as text."""
        width = max(map(len, [*self.pictures, "all"]))
        lines, total = [f"{'set':<{width}}  pictures  objects  classes  its own"], [0, 0]
        for source, pictures in self.pictures.items():
            classes = [name for name, sets in self.origins.items() if source in sets]
            own = sum(len(self.origins[name]) == 1 for name in classes)
            objects = sum(len(picture.labels) for picture in pictures)
            total = [total[0] + len(pictures), total[1] + objects]
            lines.append(f"{source:<{width}}  {len(pictures):>8}  {objects:>7}  {len(classes):>7}  {own:>7}")
        lines.append(f"{'all':<{width}}  {total[0]:>8}  {total[1]:>7}  {len(self.names):>7}")
        for name, sets in self.origins.items():
            if len(sets) > 1:
                spelt = ", ".join(f"{source} ({' and '.join(spellings)})" for source, spellings in sets.items())
                lines.append(f"shared: {name}: {spelt}")
        return "\n".join(lines)


def merge_sets(sets: Mapping[str, DetectionSet], aliases: Mapping[str, Sequence[str]] | None = None) -> MergedSets:
    """One vocabulary for several sets: names that differ in case, spaces, underscores or hyphens are one class.

    Sets that do not annotate each other's classes teach a detector of classes that those are background. For class-
    agnostic proposals, as Florence pretrains its Dynamic Head, that matters little.

    Args:
        sets: each by a name of its own.
        aliases: name in the vocabulary -> other words for it.

    Raises:
        ValueError: no set, or a word that is an alias of two names, or of one that is itself an alias.
    """
    if not sets:
        raise ValueError("expected at least one set, got none")
    target: dict[str, str] = {}
    for name, words in (aliases or {}).items():
        if isinstance(words, str):
            raise ValueError(f"aliases of {name!r}: expected a list of words, got {words!r}")
        for word in {plain_name(name), *map(plain_name, words)}:
            if target.setdefault(word, plain_name(name)) != plain_name(name):
                raise ValueError(f"aliases: expected {word!r} under one name, got {target[word]!r} and {name!r}")
    origins: dict[str, dict[str, list[str]]] = {}
    for source, data in sets.items():
        for name in data.names:
            common = target.get(plain_name(name), plain_name(name))
            origins.setdefault(common, {}).setdefault(source, []).append(name)
    names = sorted(origins)
    pictures = {}
    for source, data in sets.items():
        numbers = [names.index(target.get(plain_name(name), plain_name(name))) for name in data.names]
        table = torch.tensor(numbers, dtype=torch.long)
        pictures[source] = [replace(picture, labels=table[picture.labels]) for picture in data.pictures]
    return MergedSets(names, pictures, {name: origins[name] for name in names})


__all__ = ["MergedSets", "merge_sets", "plain_name"]
