"""Few-shot classification: episodes under domain shift (Florence section 3.4), and k pictures of every class."""

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from .embedding import check_features

# The paper prints "momentum/learning rate" as "0.9/0.0002" for CoSwin and "0.99/0.01" for the head, in either order.
TOWER_RATE, TOWER_MOMENTUM = 2e-4, 0.9
HEAD_RATE, HEAD_MOMENTUM = 1e-2, 0.99
DROPOUT = 0.5
EPOCHS = 100
BATCH_SIZE = 4  # the CD-FSL benchmark's (Guo et al. 2020); the paper gives none
QUERIES = 15  # of each class, the benchmark's
CONFIDENCE = 1.96  # standard errors to either side of a mean: 95% of a normal distribution
# Penalties that `choose_strength` tries.
STRENGTHS = (1e-2, 1e-1, 1.0, 1e1, 1e2, 1e3, 1e4)
MAX_FOLDS = 5


@dataclass(frozen=True)
class Episode:
    """Rows of a set: support (ways, shots) to learn from, query (ways, queries) to be judged by; class by class."""

    support: torch.Tensor
    query: torch.Tensor


@dataclass(frozen=True)
class EpisodeScores:
    """Accuracy of each episode, (episodes,), float32, in 0..1."""

    accuracies: torch.Tensor

    @property
    def mean(self) -> float:
        return self.accuracies.mean().item()

    @property
    def interval(self) -> float:
        """Half of the width of the mean's 95% interval; NaN for one episode."""
        count = len(self.accuracies)
        return CONFIDENCE * self.accuracies.std().item() / math.sqrt(count) if count > 1 else math.nan

    def as_dict(self) -> dict[str, Any]:
        """For a result: mean accuracy, half of its 95% interval (None of one episode), and how many episodes."""
        interval = None if math.isnan(self.interval) else self.interval
        return {"accuracy": self.mean, "interval_95": interval, "episodes": len(self.accuracies)}


def draw_episodes(
    labels: torch.Tensor, *, ways: int = 5, shots: int, queries: int = QUERIES, episodes: int = 600, seed: int = 0
) -> list[Episode]:
    """Random classes, and of each of them random pictures, none of them twice in an episode.

    Args:
        labels: (pictures,), int64.

    Raises:
        ValueError: fewer than `ways` classes have `shots + queries` pictures, or a count below 1 (ways: below 2).
    """
    if min(ways - 1, shots, queries, episodes) < 1:
        got = f"{ways} ways, {shots} shots, {queries} queries and {episodes} episodes"
        raise ValueError(f"expected at least 2 ways, 1 shot, 1 query and 1 episode, got {got}")
    rows_of = [(labels == number).nonzero()[:, 0] for number in range(int(labels.max()) + 1)]
    large = [rows for rows in rows_of if len(rows) >= shots + queries]
    if len(large) < ways:
        raise ValueError(
            f"expected {ways} classes of at least {shots} + {queries} pictures, got {len(large)} such among "
            f"{len(rows_of)}, the largest of {max(map(len, rows_of))}"
        )
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for _ in range(episodes):
        chosen = []
        for number in torch.randperm(len(large), generator=generator)[:ways].tolist():
            order = torch.randperm(len(large[number]), generator=generator)[: shots + queries]
            chosen.append(large[number][order])
        rows = torch.stack(chosen)  # (ways, shots + queries)
        drawn.append(Episode(rows[:, :shots], rows[:, shots:]))
    return drawn


def _train_heads(
    views: torch.Tensor, rows: torch.Tensor, ways: int, epochs: int, dropout: float, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Linear heads of many episodes at once, by SGD with momentum, each on its own batches.

    views: (2, pictures, dim), as they are and flipped; rows: (episodes, ways * shots), class by class.
    Returns weight (episodes, ways, dim) and bias (episodes, ways). The gradient is written out: a head's logits are
    linear, so it is (probabilities - targets) times the features.
    """
    episodes, count = rows.shape
    targets = torch.eye(ways).repeat_interleave(count // ways, dim=0)  # (ways * shots, ways)
    weight, bias = torch.zeros(episodes, ways, views.shape[2]), torch.zeros(episodes, ways)
    weight_speed, bias_speed = torch.zeros_like(weight), torch.zeros_like(bias)
    for _ in range(epochs):
        order = torch.rand(episodes, count, generator=generator).argsort(dim=1)
        for places in order.split(BATCH_SIZE, dim=1):  # (episodes, batch)
            flipped = torch.randint(2, places.shape, generator=generator)
            inputs = views[flipped, rows.gather(1, places)]  # (episodes, batch, dim)
            if dropout:
                kept = torch.rand(inputs.shape, generator=generator) >= dropout
                inputs = inputs * kept / (1 - dropout)
            logits = inputs @ weight.mT + bias[:, None]  # (episodes, batch, ways)
            error = (logits.softmax(dim=2) - targets[places]) / places.shape[1]
            weight_speed.mul_(HEAD_MOMENTUM).add_(error.mT @ inputs)
            bias_speed.mul_(HEAD_MOMENTUM).add_(error.sum(dim=1))
            weight.sub_(weight_speed, alpha=HEAD_RATE)
            bias.sub_(bias_speed, alpha=HEAD_RATE)
    return weight, bias


def evaluate_episodes(
    features: torch.Tensor,
    flipped: torch.Tensor,
    episodes: list[Episode],
    *,
    epochs: int = EPOCHS,
    dropout: float = DROPOUT,
    seed: int = 0,
    chunk: int = 200,
    progress: bool = False,
) -> EpisodeScores:
    """A linear head for each episode on features that stay as they are, with the paper's optimizer for heads.

    Pictures are flipped half of the time in training; a query's logits are the mean over both views.

    Args:
        features, flipped: (pictures, dim), of the pictures and of their mirror images (`embed_pictures(flip=True)`).
        episodes: of `draw_episodes`, all of one shape.
        dropout: of features, before the head.
        chunk: episodes that are trained at once.

    Raises:
        ValueError: features that are not finite or of two shapes, or no episode.
    """
    check_features(features)
    check_features(flipped, "flipped")
    if features.shape != flipped.shape or not episodes:
        shapes = f"{tuple(features.shape)} and {tuple(flipped.shape)}"
        raise ValueError(f"expected two views of one shape and episodes, got {shapes} and {len(episodes)} episodes")
    views = torch.stack([features, flipped]).float()
    generator = torch.Generator().manual_seed(seed)
    accuracies = []
    for start in tqdm(range(0, len(episodes), chunk), desc="episodes", disable=not progress):
        part = episodes[start : start + chunk]
        support = torch.stack([episode.support for episode in part])  # (episodes, ways, shots)
        query = torch.stack([episode.query for episode in part])  # (episodes, ways, queries)
        ways = support.shape[1]
        weight, bias = _train_heads(views, support.flatten(1), ways, epochs, dropout, generator)
        inputs = views[:, query.flatten(1)].mean(dim=0)  # the mean of logits is that of features
        answers = (inputs @ weight.mT + bias[:, None]).argmax(dim=2)  # (episodes, ways * queries)
        right = answers == torch.arange(ways).repeat_interleave(query.shape[2])
        accuracies.append(right.float().mean(dim=1))
    return EpisodeScores(torch.cat(accuracies))


def tune_episode(
    tower: nn.Module,
    pixels: torch.Tensor,
    episode: Episode,
    *,
    tower_rate: float = TOWER_RATE,
    epochs: int = EPOCHS,
    dropout: float = DROPOUT,
    batch_size: int = BATCH_SIZE,
    seed: int = 0,
) -> float:
    """Accuracy of one episode when the tower learns with the head, as in the paper; the tower itself stays as it is.

    Args:
        tower: an image tower, whose output has a `pooler_output`: `FlorenceVisionModel`, `CLIPVisionModel`.
        pixels: (pictures, 3, height, width), normalised: those that the episode's rows number.
        tower_rate: 0 for a tower that does not learn.
    """
    ways, shots = episode.support.shape
    tuned = copy.deepcopy(tower).train()
    targets = torch.arange(ways, device=pixels.device).repeat_interleave(shots)
    support = pixels[episode.support.flatten()]
    with torch.no_grad():
        dim = tower(support[:1]).pooler_output.shape[1]
    head = nn.Linear(dim, ways).to(pixels)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    groups = [
        {"params": list(tuned.parameters()), "lr": tower_rate, "momentum": TOWER_MOMENTUM},
        {"params": list(head.parameters()), "lr": HEAD_RATE, "momentum": HEAD_MOMENTUM},
    ]
    optimizer = torch.optim.SGD(groups)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for _ in range(epochs):
            for places in torch.randperm(len(support)).split(batch_size):
                inputs = support[places]
                mirrored = torch.rand(len(places), device=inputs.device) < 0.5
                inputs = torch.where(mirrored[:, None, None, None], inputs.flip(-1), inputs)
                logits = head(F.dropout(tuned(inputs).pooler_output, dropout))
                optimizer.zero_grad()
                F.cross_entropy(logits, targets[places]).backward()
                optimizer.step()
    tuned.eval()
    query = pixels[episode.query.flatten()]
    with torch.no_grad():
        logits = head(tuned(query).pooler_output) + head(tuned(query.flip(-1)).pooler_output)
    wanted = torch.arange(ways, device=pixels.device).repeat_interleave(episode.query.shape[1])
    return (logits.argmax(dim=1) == wanted).float().mean().item()


def draw_shots(labels: torch.Tensor, shots: int, num_classes: int, seed: int = 0) -> torch.Tensor:
    """Rows of `shots` random pictures of each class, class by class: (num_classes * shots,), int64.

    Raises:
        ValueError: a class has fewer pictures, or `shots` is below 1.
    """
    if shots < 1:
        raise ValueError(f"expected at least one picture of each class, got shots={shots}")
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for number in range(num_classes):
        rows = (labels == number).nonzero()[:, 0]
        if len(rows) < shots:
            raise ValueError(f"expected {shots} pictures of each class, got {len(rows)} of class {number}")
        chosen.append(rows[torch.randperm(len(rows), generator=generator)[:shots]])
    return torch.cat(chosen)


def fit_head(embeds: torch.Tensor, labels: torch.Tensor, start: torch.Tensor, strength: float) -> torch.Tensor:
    """The linear head that explains the pictures best and stays close to where it started.

    It minimises the summed cross-entropy plus strength / 2 times the squared distance to `start`: with the zero-shot
    classifier (its scale times its class vectors) as the start, few pictures move it little; with zeros it is
    logistic regression without an intercept. The problem is convex: the start is no mere initialisation.

    Args:
        embeds: (pictures, dim); labels: (pictures,), int64.
        start: (classes, dim).

    Returns:
        (classes, dim), float32: logits are `embeds @ head.T`.

    Raises:
        ValueError: vectors that are not finite or do not fit, labels of no class, or a strength that is not positive.
    """
    check_features(embeds, "embeds")
    check_features(start, "start")
    if embeds.shape[1] != start.shape[1] or labels.shape != embeds.shape[:1] or not strength > 0:
        got = f"{tuple(embeds.shape)}, {tuple(labels.shape)}, {tuple(start.shape)} and {strength}"
        raise ValueError(f"expected embeds, labels and start that fit and a positive strength, got {got}")
    if not 0 <= int(labels.min()) <= int(labels.max()) < len(start):
        raise ValueError(f"expected labels from 0 to {len(start) - 1}, got {int(labels.min())} to {int(labels.max())}")
    inputs, origin = embeds.double(), start.double()  # the line search needs differences of nearly equal losses
    head = origin.clone().requires_grad_(True)
    optimizer = torch.optim.LBFGS(
        [head], max_iter=500, tolerance_grad=1e-6, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(inputs @ head.T, labels, reduction="sum")
        loss = loss + strength / 2 * (head - origin).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return head.detach().float()


def choose_strength(embeds: torch.Tensor, labels: torch.Tensor, start: torch.Tensor) -> float:
    """The strength of `fit_head` that names pictures best that it was not fitted to, by cross-validation.

    Arguments and errors are those of `fit_head`. With one picture a class there is nothing to validate on: 1. Of
    strengths that do equally well the greatest.
    """
    shots = int(labels.bincount().max())
    folds = min(shots, MAX_FOLDS)
    if folds < 2:
        return 1.0
    place = torch.zeros_like(labels)  # of a picture within its class
    for number in labels.unique().tolist():
        rows = labels == number
        place[rows] = torch.arange(int(rows.sum()))
    hits = dict.fromkeys(STRENGTHS, 0)
    for fold in range(folds):
        held = place % folds == fold
        for strength in STRENGTHS:
            head = fit_head(embeds[~held], labels[~held], start, strength)
            hits[strength] += int(((embeds[held] @ head.T).argmax(dim=1) == labels[held]).sum())
    return max(STRENGTHS, key=lambda strength: (hits[strength], strength))


__all__ = [
    "Episode",
    "EpisodeScores",
    "choose_strength",
    "draw_episodes",
    "draw_shots",
    "evaluate_episodes",
    "fit_head",
    "tune_episode",
]
