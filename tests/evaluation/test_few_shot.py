"""Few-shot evaluation: sound episodes, heads against torch's SGD and scikit-learn, towers that learn or do not."""

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch.nn import functional as F
from torch.testing import assert_close

from tests.tiny_clip import tiny_clip
from tests.tiny_florence import random_pixels, tiny_model
from transformers_florence.evaluation.few_shot import (
    HEAD_MOMENTUM,
    HEAD_RATE,
    EpisodeScores,
    choose_strength,
    draw_episodes,
    draw_shots,
    evaluate_episodes,
    fit_head,
    tune_episode,
)

DIM, CLASSES, PER_CLASS = 6, 7, 12
LABELS = torch.arange(CLASSES * PER_CLASS) % CLASSES


def clouds(noise: float) -> torch.Tensor:
    centres = torch.randn(CLASSES, DIM, generator=torch.Generator().manual_seed(0))
    return centres[LABELS] + noise * torch.randn(len(LABELS), DIM, generator=torch.Generator().manual_seed(1))


def test_episodes_take_each_picture_once_and_classes_as_they_are():
    drawn = draw_episodes(LABELS, ways=3, shots=2, queries=4, episodes=20)
    for episode in drawn:
        assert episode.support.shape == (3, 2) and episode.query.shape == (3, 4)
        rows = torch.cat([episode.support, episode.query], dim=1)
        assert rows.unique().numel() == rows.numel()
        classes = LABELS[rows]
        assert (classes == classes[:, :1]).all() and classes[:, 0].unique().numel() == 3
    again = draw_episodes(LABELS, ways=3, shots=2, queries=4, episodes=20)
    assert all(torch.equal(one.query, other.query) for one, other in zip(drawn, again, strict=True))
    other = draw_episodes(LABELS, ways=3, shots=2, queries=4, episodes=20, seed=1)
    assert not all(torch.equal(one.query, two.query) for one, two in zip(drawn, other, strict=True))
    assert torch.cat([LABELS[episode.support[:, 0]] for episode in drawn]).unique().numel() == CLASSES


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shots": 9}, r"expected 5 classes of at least 9 \+ 4 pictures, got 0 such among 7, the largest of 12"),
        ({"ways": 8}, "expected 8 classes of at least .* got 7 such"),
        ({"ways": 1}, "expected at least 2 ways"),
        ({"queries": 0}, "1 query"),
        ({"episodes": 0}, "got 5 ways, 2 shots, 4 queries and 0 episodes"),
    ],
)
def test_episodes_that_cannot_be_drawn(changes, message):
    with pytest.raises(ValueError, match=message):
        draw_episodes(LABELS, **({"ways": 5, "shots": 2, "queries": 4, "episodes": 3} | changes))


def slow_episode(features, flipped, episode, epochs: int) -> torch.Tensor:
    """One episode with torch's linear layer and optimizer: logits of the queries. All supports in one batch."""
    ways, shots = episode.support.shape
    head = torch.nn.Linear(DIM, ways)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    optimizer = torch.optim.SGD(head.parameters(), lr=HEAD_RATE, momentum=HEAD_MOMENTUM)
    targets = torch.arange(ways).repeat_interleave(shots)
    for _ in range(epochs):
        optimizer.zero_grad()
        F.cross_entropy(head(features[episode.support.flatten()]), targets).backward()
        optimizer.step()
    rows = episode.query.flatten()
    return (head(features[rows]) + head(flipped[rows])).argmax(dim=1)


def test_heads_trained_at_once_are_those_trained_alone():
    """Both views alike and no dropout: nothing is random but the order within a batch of all."""
    features = clouds(1.5)
    drawn = draw_episodes(LABELS, ways=2, shots=2, queries=10, episodes=9)
    found = evaluate_episodes(features, features, drawn, epochs=7, dropout=0.0, chunk=4)
    for episode, accuracy in zip(drawn, found.accuracies, strict=True):
        answers = slow_episode(features, features, episode, 7)
        wanted = (answers == torch.arange(2).repeat_interleave(10)).float().mean()
        assert accuracy == pytest.approx(wanted.item())
    assert 0.6 < found.mean < 1


def test_queries_are_judged_by_both_views():
    """Only the queries' mirror images differ from the pictures: training is that of the loop."""
    features, differs = clouds(1.5), 0
    for episode in draw_episodes(LABELS, ways=2, shots=2, queries=10, episodes=6):
        flipped = features.clone()
        flipped[episode.query.flatten()] += 3 * torch.randn(20, DIM)
        wanted = torch.arange(2).repeat_interleave(10)
        right = (slow_episode(features, flipped, episode, 7) == wanted).float().mean().item()
        found = evaluate_episodes(features, flipped, [episode], epochs=7, dropout=0.0)
        assert found.mean == pytest.approx(right)
        differs += found.mean != evaluate_episodes(features, features, [episode], epochs=7, dropout=0.0).mean
    assert differs > 3


def test_easy_episodes_are_solved_and_noise_is_chance():
    drawn = draw_episodes(LABELS, shots=5, queries=5, episodes=30)
    easy, noise = clouds(0.05), torch.randn(len(LABELS), DIM)
    assert evaluate_episodes(easy, easy, drawn).mean > 0.97
    assert evaluate_episodes(noise, noise, drawn).mean == pytest.approx(0.2, abs=0.08)


def test_the_flipped_view_counts():
    """Where the flipped view says nothing, queries that are judged by both are worse."""
    features = clouds(0.5)
    drawn = draw_episodes(LABELS, shots=4, queries=8, episodes=20)
    whole = evaluate_episodes(features, features, drawn, epochs=20).mean
    assert evaluate_episodes(features, 5 * torch.randn_like(features), drawn, epochs=20).mean < whole - 0.1


def test_scores_have_their_interval():
    accuracies = torch.rand(600)
    scores = EpisodeScores(accuracies)
    wanted = 1.96 * np.std(accuracies.numpy(), ddof=1) / math.sqrt(600)
    assert scores.as_dict() == {
        "accuracy": pytest.approx(accuracies.mean().item()),
        "interval_95": pytest.approx(wanted),
        "episodes": 600,
    }
    assert EpisodeScores(accuracies[:1]).as_dict()["interval_95"] is None


def test_views_that_do_not_fit_are_refused():
    features = clouds(1.0)
    drawn = draw_episodes(LABELS, shots=1, queries=1, episodes=1)
    with pytest.raises(ValueError, match="expected two views of one shape"):
        evaluate_episodes(features, features[:, 1:], drawn)
    with pytest.raises(ValueError, match="0 episodes"):
        evaluate_episodes(features, features, [])
    with pytest.raises(ValueError, match="expected finite flipped"):
        evaluate_episodes(features, features / 0, drawn)


@pytest.mark.parametrize("kind", ["florence", "clip"])
def test_a_tower_that_does_not_learn_gives_the_heads_of_fixed_features(kind):
    tower = (tiny_model() if kind == "florence" else tiny_clip()[0]).vision_model
    pixels, labels = random_pixels(18), torch.arange(18) % 2
    pixels = (pixels + pixels.flip(-1)) / 2 + labels[:, None, None, None]  # mirror images of themselves
    episode = draw_episodes(labels, ways=2, shots=2, queries=7, episodes=1)[0]
    with torch.no_grad():
        features = tower(pixels).pooler_output
    fixed = evaluate_episodes(features, features, [episode], epochs=5, dropout=0.0)
    before = {name: value.clone() for name, value in tower.state_dict().items()}
    tuned = tune_episode(tower, pixels, episode, tower_rate=0.0, epochs=5, dropout=0.0)
    assert tuned == pytest.approx(fixed.mean) and tuned > 0.5
    assert 0 <= tune_episode(tower, pixels, episode, tower_rate=1e-2, epochs=2) <= 1
    assert all(torch.equal(value, before[name]) for name, value in tower.state_dict().items())


def test_a_tower_that_learns_solves_what_fixed_features_hide():
    """Features without the dimension that tells the classes apart: only a tower that learns finds it."""

    class Tower(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(3, 2)
            with torch.no_grad():
                self.layer.weight.zero_()
                self.layer.weight[:, 0] = 1

        def forward(self, pixels):
            output = torch.nn.Module()
            output.pooler_output = self.layer(pixels.mean(dim=(2, 3)))
            return output

    labels = torch.arange(24) % 2
    pixels = torch.zeros(24, 3, 4, 4)
    pixels[:, 1] = (4.0 * labels - 2)[:, None, None]
    pixels[:, 0] = torch.randn(24, 1, 1)
    episode = draw_episodes(labels, ways=2, shots=4, queries=8, episodes=1)[0]
    options = {"epochs": 30, "dropout": 0.0}
    assert tune_episode(Tower(), pixels, episode, tower_rate=0.0, **options) < 0.9
    assert tune_episode(Tower(), pixels, episode, tower_rate=0.05, **options) == 1.0


def test_shots_of_each_class():
    rows = draw_shots(LABELS, 3, CLASSES)
    assert rows.unique().numel() == 3 * CLASSES
    assert LABELS[rows].tolist() == [number for number in range(CLASSES) for _ in range(3)]
    assert not torch.equal(rows, draw_shots(LABELS, 3, CLASSES, seed=1))
    with pytest.raises(ValueError, match="expected 13 pictures of each class, got 12 of class 0"):
        draw_shots(LABELS, 13, CLASSES)
    with pytest.raises(ValueError, match="got 0 of class 7"):
        draw_shots(LABELS, 1, CLASSES + 1)
    with pytest.raises(ValueError, match="at least one picture of each class"):
        draw_shots(LABELS, 0, CLASSES)


def test_a_head_from_zeros_is_logistic_regression():
    features = clouds(1.0)
    head = fit_head(features, LABELS, torch.zeros(CLASSES, DIM), 0.5)
    wanted = LogisticRegression(C=2.0, fit_intercept=False, max_iter=1000, tol=1e-8).fit(features, LABELS)
    assert_close(head, torch.from_numpy(wanted.coef_).float(), atol=1e-3, rtol=1e-3)


def test_a_head_stays_where_it_started_or_follows_the_pictures():
    features, start = clouds(0.3), torch.randn(CLASSES, DIM, generator=torch.Generator().manual_seed(2))
    assert_close(fit_head(features, LABELS, start, 1e9), start, atol=1e-4, rtol=0)
    free = fit_head(features, LABELS, start, 1e-2)
    assert ((features @ free.T).argmax(dim=1) == LABELS).float().mean() > 0.95
    assert ((features @ start.T).argmax(dim=1) == LABELS).float().mean() < 0.5


def test_the_strength_is_great_where_the_start_is_right_and_small_where_it_is_not():
    features = clouds(1.2)
    centres = torch.randn(CLASSES, DIM, generator=torch.Generator().manual_seed(0))  # those of the clouds
    rows = draw_shots(LABELS, 2, CLASSES)
    right = choose_strength(features[rows], LABELS[rows], 10 * centres)
    wrong = choose_strength(features[rows], LABELS[rows], 10 * centres.roll(1, dims=0))
    assert right > wrong
    assert choose_strength(features[:CLASSES], LABELS[:CLASSES], centres) == 1.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strength": 0.0}, "a positive strength"),
        ({"start": torch.zeros(CLASSES, DIM + 1)}, "expected embeds, labels and start that fit"),
        ({"start": torch.full((CLASSES, DIM), torch.nan)}, "expected finite start"),
        ({"labels": LABELS[1:]}, "expected embeds, labels and start that fit"),
        ({"labels": LABELS + 1}, "expected labels from 0 to 6, got 1 to 7"),
    ],
)
def test_heads_that_are_refused(changes, message):
    options = {"embeds": clouds(1.0), "labels": LABELS, "start": torch.zeros(CLASSES, DIM), "strength": 1.0}
    with pytest.raises(ValueError, match=message):
        fit_head(**(options | changes))
