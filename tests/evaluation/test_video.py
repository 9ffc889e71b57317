"""Recognition and retrieval of clips: scores against counting by hand, views against the model's own call."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.oracles import randomize
from tests.tiny_florence import SIDE, TEXTS, tiny_tokenizer
from tests.tiny_retrieval import tiny_retrieval
from tests.tiny_videos import frames
from transformers_florence.configuration_florence_video import FlorenceVideoConfig
from transformers_florence.data.video import Clip
from transformers_florence.evaluation.video import evaluate_recognition, evaluate_video_retrieval, recognition_scores
from transformers_florence.modeling_florence_video import FlorenceForVideoClassification
from transformers_florence.video_processing_florence import FlorenceVideoProcessor

NAMES = ["nod", "sit", "wave"]


def write_strips(folder: Path, count: int, **fields: Any) -> list[Clip]:
    clips = []
    for number in range(count):
        pixels = frames(6, 30, 40, number)
        file = folder / f"{number}.png"
        Image.fromarray(pixels.reshape(-1, 40, 3)).save(file)
        clips.append(Clip(file, file.name, strip=6, **{name: values[number] for name, values in fields.items()}))
    return clips


def processor() -> FlorenceVideoProcessor:
    size = {"height": SIDE, "width": SIDE}
    return FlorenceVideoProcessor(num_frames=4, size={"shortest_edge": SIDE}, crop_size=size)


def classifier() -> FlorenceForVideoClassification:
    fields: dict[str, Any] = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 3, "num_frames": 4}
    return randomize(
        FlorenceForVideoClassification(FlorenceVideoConfig(**fields, id2label=dict(enumerate(NAMES))))
    ).eval()


def test_scores_are_counted():
    rng = np.random.default_rng(0)
    probabilities, labels = torch.from_numpy(rng.random((40, 7))), torch.from_numpy(rng.integers(0, 6, 40))
    names = list("abcdefg")
    scores = recognition_scores(probabilities, labels, names)
    order = probabilities.argsort(dim=1, descending=True).tolist()
    hits = [label == row[0] for label, row in zip(labels.tolist(), order, strict=True)]
    assert scores.top_1 == pytest.approx(sum(hits) / 40)
    assert scores.top_5 == pytest.approx(sum(n in row[:5] for n, row in zip(labels.tolist(), order, strict=True)) / 40)
    by_class = {n: [hit for hit, label in zip(hits, labels.tolist(), strict=True) if label == n] for n in range(6)}
    assert scores.classes == {names[n]: pytest.approx(sum(own) / len(own)) for n, own in by_class.items() if own}
    assert scores.mean_class == pytest.approx(np.mean(list(scores.classes.values())))
    assert scores.as_dict()["clips"] == 40 and "g" not in scores.classes


def test_who_says_the_same_of_all_classes_knows_nothing():
    scores = recognition_scores(torch.full((4, 6), 0.5), torch.tensor([0, 1, 0, 0]), list("abcdef"))
    assert (scores.top_1, scores.top_5, scores.mean_class) == (0, 0, 0)


@pytest.mark.parametrize(
    "probabilities, labels, message",
    [
        (torch.zeros(2, 3), torch.tensor([0, 1, 2]), r"got \(2, 3\) for labels \(3,\) and 3 names"),
        (torch.zeros(0, 3), torch.zeros(0).long(), "of at least one clip"),
        (torch.full((1, 3), torch.nan), torch.tensor([0]), "expected finite probabilities"),
        (torch.zeros(1, 3), torch.tensor([3]), "expected labels from 0 to 2, got 3 to 3"),
    ],
)
def test_what_cannot_be_scored(probabilities, labels, message):
    with pytest.raises(ValueError, match=message):
        recognition_scores(probabilities, labels, NAMES)


@pytest.mark.parametrize("counts", [(1, 1), (2, 3)])
def test_recognition_averages_the_views(tmp_path, counts):
    model, labels = classifier(), ["wave", "nod", "wave", "sit", "sit"]
    clips = write_strips(tmp_path, 5, label=labels)
    views = [processor().views(frames(6, 30, 40, n), *counts)["pixel_values_videos"] for n in range(5)]
    probabilities = torch.stack([model(view[0]).logits.softmax(dim=-1).mean(dim=0) for view in views])
    expected = recognition_scores(probabilities, torch.tensor([NAMES.index(label) for label in labels]), NAMES)
    for batch_size in (2, 8):
        found = evaluate_recognition(
            model, processor(), clips, num_clips=counts[0], num_crops=counts[1], batch_size=batch_size
        )
        assert found == expected


def test_recognition_refuses_other_classes(tmp_path):
    with pytest.raises(ValueError, match="expected clips of the model's classes nod, sit, wave, got jump"):
        evaluate_recognition(classifier(), processor(), write_strips(tmp_path, 1, label=["jump"]))
    with pytest.raises(ValueError, match="at least one clip"):
        evaluate_recognition(classifier(), processor(), [])


def test_retrieval_is_a_table_of_cosines(tmp_path):
    model, tokenizer = tiny_retrieval(), tiny_tokenizer()
    texts = [(TEXTS[0], TEXTS[1]), (TEXTS[2],), (TEXTS[3],)]
    clips = write_strips(tmp_path, 3, texts=texts)
    found = evaluate_video_retrieval(model, processor(), tokenizer, clips, batch_size=2)
    tokens = tokenizer(TEXTS[:4], return_tensors="pt", padding=True, truncation=True, max_length=12)
    pixels = processor()([frames(6, 30, 40, n) for n in range(3)], return_tensors="pt")["pixel_values_videos"]
    table = model(**tokens, pixel_values_videos=pixels).logits_per_text  # (4 texts, 3 clips)
    right = [0, 0, 1, 2]
    ranks = [1 + sum(table[n, other] > table[n, own] for other in range(3)).item() for n, own in enumerate(right)]
    assert found["text_to_video_recall_1"] == pytest.approx(np.mean([rank == 1 for rank in ranks]))
    assert found["text_to_video_median_rank"] == np.median(ranks)
    own = [table[[0, 1], 0].max(), table[2, 1], table[3, 2]]
    ranks = [1 + sum(table[n, clip] > own[clip] for n in range(4) if right[n] != clip) for clip in range(3)]
    assert found["video_to_text_recall_1"] == pytest.approx(np.mean([int(rank) == 1 for rank in ranks]))
    assert (found["clips"], found["texts"], found["video_to_text_recall_5"]) == (3, 4, 1.0)


@pytest.mark.parametrize(
    "texts, message",
    [
        ([("a cat",), ()], "expected a text for each picture, got none for 1 of 2: 1"),
        ([("a cat",), ("a dog", "a cat")], "expected each text at one clip, got 'a cat' at 0.png and 1.png"),
        ([(), ()], "expected clips with texts, got 2 clips and no text"),
    ],
)
def test_retrieval_refuses(tmp_path, texts, message):
    with pytest.raises(ValueError, match=message):
        evaluate_video_retrieval(
            tiny_retrieval(), processor(), tiny_tokenizer(), write_strips(tmp_path, 2, texts=texts)
        )
