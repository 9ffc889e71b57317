"""Figures of what evaluators find: confusion matrix, recall over k, accuracy over shots, a map of vectors.

Each function returns a `matplotlib.figure.Figure`, which a notebook shows and `save_beside` writes. matplotlib and
scikit-learn, of the extra `eval`, are imported when something is drawn; without them that is an ImportError.
"""

import importlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from .embedding import check_features
from .retrieval import RECALLS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 100
NUMBERED = 20  # classes up to which cells hold numbers and colours have a legend
NAMED = 120  # classes up to which an axis names each
LETTERS = 24  # of a name
MISTAKE_HEIGHT = 0.3  # inches of a line in the list of mistakes
LAST_RANK = 100  # up to which recall is drawn
MAPPED = 2000  # vectors on a map
PERPLEXITY = 30.0  # of t-SNE, for enough vectors
PALETTE = "tab20"


def _library(name: str) -> ModuleType:
    """A module of matplotlib or scikit-learn. Raises ImportError that says how to get it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = {"sklearn": "scikit-learn"}.get(name.partition(".")[0], "matplotlib")
        raise ImportError(f"plots need {package}: pip install 'transformers_florence[eval]'") from error


def _new_figure(width: float, height: float) -> Any:
    """An empty figure of so many inches, outside of pyplot: nothing has to close it."""
    return _library("matplotlib.figure").Figure(figsize=(width, height), layout="constrained")


def _short(name: str) -> str:
    """A name as a label: one line, not too long, and without mathematics between dollar signs."""
    text = " ".join(name.split())
    text = text if len(text) <= LETTERS else text[: LETTERS - 1] + "…"
    return text.replace("$", r"\$")


def confusion_figure(counts: torch.Tensor, names: Sequence[str]) -> "Figure":
    """Which class is taken for which: shares of each class's pictures, and a list of the most frequent mistakes.

    Rows are true classes, with how many pictures they have, columns are guesses. Cells say their share if there are
    few classes; of very many classes the axes count instead of naming them.

    Args:
        counts: (classes, classes), integers, of `classification.confusion_matrix`.
        names: of the classes.

    Raises:
        ValueError: other than a square of counts, one row for each name.
    """
    if counts.shape != (len(names), len(names)) or counts.is_floating_point() or not names:
        got = f"{counts.dtype} {tuple(counts.shape)}"
        raise ValueError(f"expected integers ({len(names)}, {len(names)}), a row for each name, got {got}")
    classes, per_class = len(names), counts.sum(dim=1, keepdim=True)
    shares = counts / per_class.clamp(min=1)  # a class without pictures has an empty row
    labels = [_short(name) for name in names]
    side = max(3.0, 0.5 * classes) if classes <= NUMBERED else min(max(8.0, 0.14 * classes), 15.0)  # inches
    wrong, lines = counts.clone().fill_diagonal_(0), int(side / MISTAKE_HEIGHT)
    order = wrong.flatten().argsort(descending=True, stable=True)[: min(lines, int((wrong > 0).sum()))].tolist()

    figure = _new_figure(side + 2 + 5 * bool(order), side + 1.5)
    panels = figure.subplots(1, 1 + bool(order), squeeze=False, width_ratios=[side, 3.0][: 1 + bool(order)])[0]
    display = _library("sklearn.metrics").ConfusionMatrixDisplay(shares.numpy(), display_labels=labels)
    display.plot(
        ax=panels[0],
        cmap="Blues",
        include_values=classes <= NUMBERED,
        values_format=".0%",
        xticks_rotation="vertical",
        colorbar=False,
    )
    if classes <= NUMBERED:
        for text, share in zip(display.text_.flat, shares.flatten().tolist(), strict=True):
            text.set_visible(share > 0)
    if classes <= NAMED:
        counted = [f"{label} ({count})" for label, count in zip(labels, per_class[:, 0].tolist(), strict=True)]
        panels[0].set_yticks(range(classes), counted)
    else:
        places = range(0, classes, 10 ** (len(str(classes)) - 2))
        panels[0].set_xticks(places, places)
        panels[0].set_yticks(places, places)
    panels[0].tick_params(labelsize=9 if classes <= NUMBERED else 7)
    right = int(counts.diagonal().sum())
    panels[0].set_title(f"{right} of {int(counts.sum())} pictures right")
    if order:
        pairs = [divmod(place, classes) for place in order]
        panels[1].barh(range(len(pairs)), [wrong[pair].item() for pair in pairs], color="#c44e52")
        panels[1].set_yticks(range(len(pairs)), [f"{labels[true]} → {labels[guess]}" for true, guess in pairs])
        panels[1].tick_params(labelsize=8)
        panels[1].set_ylim(lines - 0.5, -0.5)  # the most frequent one on top, bars of one width
        panels[1].xaxis.get_major_locator().set_params(integer=True)
        panels[1].set_title("most frequent mistakes, pictures")
    return figure


def recall_figure(ranks: Mapping[str, torch.Tensor]) -> "Figure":
    """Recall over k, on a logarithmic axis: the part of the queries that find their own among the k nearest.

    Args:
        ranks: what a curve is called -> the rank of each query's first own item, (queries,), int64, from 1, of
            `retrieval.first_ranks`.

    Raises:
        ValueError: no curve, or one without ranks or with a rank below 1.
    """
    if not ranks or any(len(values) == 0 or int(values.min()) < 1 for values in ranks.values()):
        raise ValueError(f"expected ranks from 1 on for each curve, got the curves {', '.join(ranks) or 'none'}")
    last = max(RECALLS[-1], min(LAST_RANK, max(int(values.max()) for values in ranks.values())))
    figure = _new_figure(7, 4.5)
    axes = figure.subplots()
    for name, values in ranks.items():
        found = values.bincount(minlength=last + 1)[1 : last + 1].cumsum(dim=0) / len(values)
        median = values.double().quantile(0.5).item()
        marked = [k - 1 for k in RECALLS]
        label = f"{name} (median rank {median:g})"
        axes.plot(range(1, last + 1), found.tolist(), marker="o", markevery=marked, label=label)
    ticks = [k for k in (*RECALLS, 20, 50, LAST_RANK) if k <= last]
    axes.set_xscale("log")
    axes.set_xticks(ticks, ticks)
    axes.set_xticks([], minor=True)
    axes.set(xlabel="k", ylabel="recall at k", ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def shots_figure(
    curves: Mapping[str, Mapping[int, float]],
    *,
    intervals: Mapping[str, Mapping[int, float]] | None = None,
    levels: Mapping[str, float] | None = None,
) -> "Figure":
    """Accuracy over the number of pictures of each class that were learnt from.

    Args:
        curves: what a curve is called -> shots -> accuracy, in 0..1.
        intervals: of some curves: shots -> half of the width of the accuracy's interval.
        levels: what needs no picture, such as chance: what a line is called -> accuracy.

    Raises:
        ValueError: no curve, or one without a point.
    """
    if not curves or not all(curves.values()):
        raise ValueError(f"expected curves with a point at least, got {dict(curves)}")
    figure = _new_figure(7, 4.5)
    axes = figure.subplots()
    for name, points in curves.items():
        half = (intervals or {}).get(name, {})
        errors = [half.get(shots, 0.0) for shots in points] if half else None
        axes.errorbar(list(points), list(points.values()), yerr=errors, marker="o", capsize=3, label=name)
    for number, (name, level) in enumerate((levels or {}).items()):
        axes.axhline(level, linestyle=("--", ":")[number % 2], color="gray", label=name)
    ticks = sorted({shots for points in curves.values() for shots in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, ticks)
    axes.set(xlabel="pictures of each class", ylabel="accuracy", ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def _places(vectors: torch.Tensor, seed: int) -> torch.Tensor:
    """(pictures, dim) -> (pictures, 2): t-SNE from the first two principal components."""
    if not vectors.var(dim=0, correction=0).any():
        return torch.zeros(len(vectors), 2)  # one picture, or one vector for all: there is no direction
    perplexity = min(PERPLEXITY, max(1.0, (len(vectors) - 1) / 3))
    mapping = _library("sklearn.manifold").TSNE(perplexity=perplexity, random_state=seed)
    return torch.from_numpy(mapping.fit_transform(vectors.float().numpy()))


def map_figure(vectors: torch.Tensor, labels: torch.Tensor, names: Sequence[str], *, seed: int = 0) -> "Figure":
    """Pictures as points, near each other where their vectors are, coloured by class (t-SNE, van der Maaten 2008).

    Few classes stand in a legend, more are named at the median of their points. Of very many pictures it shows some,
    drawn by the seed.

    Args:
        vectors: (pictures, dim), of `embed_pictures`.
        labels: (pictures,), int64, class numbers.
        names: of the classes.

    Raises:
        ValueError: vectors that are not finite, or labels that do not fit.
    """
    check_features(vectors, "vectors")
    if labels.shape != vectors.shape[:1] or not 0 <= int(labels.min()) <= int(labels.max()) < len(names):
        raise ValueError(f"expected {len(vectors)} labels of {len(names)} classes, got {tuple(labels.shape)}")
    rows = torch.randperm(len(vectors), generator=torch.Generator().manual_seed(seed))[:MAPPED].sort().values
    places, shown = _places(vectors[rows], seed), labels[rows]
    present = shown.unique().tolist()
    few = len(present) <= NUMBERED
    figure = _new_figure(9, 7) if few else _new_figure(12, 12)
    axes = figure.subplots()
    colors = _library("matplotlib").colormaps[PALETTE].colors
    for place, number in enumerate(present):
        points = places[shown == number]
        axes.scatter(*points.T.tolist(), s=14, color=colors[place % len(colors)], label=_short(names[number]))
        if not few:
            x, y = points.median(dim=0).values.tolist()
            halo = {"boxstyle": "round,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.7}
            axes.text(x, y, _short(names[number]), ha="center", va="center", fontsize=7, bbox=halo)
    axes.set(xticks=[], yticks=[])
    part = "" if len(rows) == len(vectors) else f" of {len(vectors)}"
    axes.set_title(f"{len(rows)}{part} pictures by their vectors (t-SNE)")
    if few:
        figure.legend(loc="outside right upper", fontsize=8)
    return figure


def save_beside(file: str | Path, **figures: "Figure") -> list[Path]:
    """Write figures beside a result's file, each in one step: `<file's stem>.<figure's name>.png`."""
    written = []
    for name, figure in figures.items():
        picture = Path(file).with_suffix(f".{name}.png")
        partial = picture.with_suffix(".partial")
        figure.savefig(partial, format="png", dpi=DPI)
        os.replace(partial, picture)
        written.append(picture)
    return written


__all__ = ["confusion_figure", "map_figure", "recall_figure", "save_beside", "shots_figure"]
