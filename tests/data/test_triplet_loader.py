"""Batches of triplets: which picture and text come when, on every rank, worker and resumed run."""

import collections
import itertools
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, List, Value

from tests.tiny_shards import DECODER, MAKER, numbers_of, png, sentence, take, write_numbered
from transformers_florence.data import triplet_loader
from transformers_florence.data.sources import Source
from transformers_florence.data.triplet_loader import TripletLoader, TripletRows, TripletStream
from transformers_florence.data.triplets import BadSampleError, TripletMaker

BAD = (4, 6, 11, 13, 20, 22, 31, 33, 40, 41, 58, 59)


def facts(batches: list[dict]) -> list:
    """What there is to compare of batches."""
    return [(numbers_of(batch), batch["texts"], batch["labels"].tolist(), batch["bad"]) for batch in batches]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """96 pictures in 4 shards."""
    return write_numbered(tmp_path_factory.mktemp("shards"), range(96), 4)


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """24 other pictures in 4 shards."""
    return write_numbered(tmp_path_factory.mktemp("few"), range(500, 524), 4)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """60 pictures in 2 shards, 12 of them bad: 6 are broken, 6 have no text."""
    return write_numbered(tmp_path_factory.mktemp("damaged"), range(60), 2, bad=BAD)


def rows_of(*folders: Path, seed: int = 0, maker: TripletMaker = MAKER, weights=None) -> TripletRows:
    weights = weights or [None] * len(folders)
    sources = [
        Source(str(folder), text="text", weight=weight) for folder, weight in zip(folders, weights, strict=True)
    ]
    return TripletRows(sources, maker, seed=seed, progress=False)


def stream_of(*folders: Path, maker: TripletMaker = MAKER, weights=None, **options) -> TripletStream:
    weights = weights or [None] * len(folders)
    sources = [
        Source(str(folder), text="text", weight=weight) for folder, weight in zip(folders, weights, strict=True)
    ]
    return TripletStream(sources, maker, **options)


# Rows at hand


def test_every_epoch_has_every_row_once_in_another_order(shards):
    data = rows_of(shards)
    assert data.epoch_length == 96
    epochs = [[numbers_of({"pixels": data[n]["pixels"][None]})[0] for n in range(e * 96, e * 96 + 96)] for e in (0, 1)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(96))
    assert epochs[0] != epochs[1]
    other = rows_of(shards, seed=1)
    assert [numbers_of({"pixels": other[n]["pixels"][None]})[0] for n in range(96)] != epochs[0]


def test_ranks_and_workers_share_the_batches_of_one_process(shards):
    data = rows_of(shards)
    whole = facts(take(TripletLoader(data, batch_size=20), 6))  # batches across the end of an epoch
    for world_size, workers in ((2, 0), (4, 0), (1, 2)):
        ranks = [
            take(
                TripletLoader(
                    data, batch_size=20 // world_size, rank=rank, world_size=world_size, num_workers=workers
                ),
                6,
            )
            for rank in range(world_size)
        ]
        parts = [facts(batches) for batches in ranks]
        joined = [
            tuple(list(itertools.chain(*values)) for values in zip(*step, strict=True))
            for step in zip(*parts, strict=True)
        ]
        assert joined == whole


def test_rows_resume_by_their_step_on_any_number_of_ranks(shards):
    data = rows_of(shards)
    whole = facts(take(TripletLoader(data, batch_size=8), 15))
    loader = TripletLoader(data, batch_size=8)
    take(loader, 5)
    state = json.loads(json.dumps(loader.state_dict()))
    assert state == {"step": 5}
    for world_size in (1, 2):
        halves = []
        for rank in range(world_size):
            resumed = TripletLoader(rows_of(shards), batch_size=8 // world_size, rank=rank, world_size=world_size)
            resumed.load_state_dict(state)
            halves.append(facts(take(resumed, 10)))
        joined = [
            tuple(list(itertools.chain(*values)) for values in zip(*step, strict=True))
            for step in zip(*halves, strict=True)
        ]
        assert joined == whole[5:]


def test_weights_decide_the_shares_and_every_row_is_there(shards, few):
    data = rows_of(shards, few, weights=[1, 3])
    assert data.epoch_length == 96 * 4, "the large set once, the small one three times as often"
    drawn = [numbers_of({"pixels": data[n]["pixels"][None]})[0] for n in range(data.epoch_length)]
    counts = collections.Counter(drawn)
    assert {counts[n] for n in range(96)} == {1}
    assert {counts[n] for n in range(500, 524)} == {12}
    first = sum(n >= 500 for n in drawn[:96]) / 96
    assert first == pytest.approx(0.75, abs=0.15), "they are mixed"
    assert rows_of(shards, few).epoch_length == 96 + 24
    with pytest.raises(ValueError, match="a weight for each of 2 sources"):
        rows_of(shards, few, weights=[1, None])


def test_bad_rows_are_told_of_once_and_batches_stay_full(damaged):
    data = rows_of(damaged)
    batches = take(TripletLoader(data, batch_size=12, num_workers=2), 10)  # two epochs
    assert all(len(batch["texts"]) == 12 == len(batch["pixels"]) for batch in batches)
    for epoch in (batches[:5], batches[5:]):
        messages = [message for batch in epoch for message in batch["bad"]]
        assert len(messages) == len(BAD)
        assert sum("expected a text, got none" in message for message in messages) == 6
        assert {int(m.split("(")[1].split(".png")[0]) for m in messages} == set(BAD)
        yielded = [number for batch in epoch for number in numbers_of(batch)]
        assert set(yielded) == set(range(60)) - set(BAD), "every good row is there"


def test_bad_rows_raise_where_they_are_not_skipped(damaged):
    data = rows_of(damaged, maker=TripletMaker(DECODER, skip_bad=False))
    with pytest.raises(BadSampleError, match=r"row \d+ .*png"):
        take(TripletLoader(data, batch_size=30), 2)
    stream = stream_of(damaged, maker=TripletMaker(DECODER, skip_bad=False))
    with pytest.raises(BadSampleError, match=r"rank 0, worker 0, row \d+ .*png"):
        take(TripletLoader(stream, batch_size=30), 2)


def test_a_set_of_nothing_but_bad_rows_is_refused(tmp_path):
    folder = write_numbered(tmp_path / "bad", range(6), 2, bad=tuple(range(6)))
    with pytest.raises(BadSampleError, match="expected a good sample within 6 rows, got none"):
        rows_of(folder)[0]
    with pytest.raises(BadSampleError, match="expected a good sample in the shards of rank 0, got none"):
        take(TripletLoader(stream_of(folder), batch_size=2), 1)


def test_too_many_bad_rows_one_after_the_other_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(triplet_loader, "MAX_BAD_IN_A_ROW", 3)
    folder = write_numbered(tmp_path / "bad", range(40), 1, bad=tuple(range(8, 16)))
    with pytest.raises(BadSampleError, match="expected a good sample within 3 rows: rank 0, worker 0, row 11 "):
        take(TripletLoader(stream_of(folder, shuffle_buffer=1), batch_size=4), 6)
    folder = write_numbered(tmp_path / "all", range(6), 1, bad=tuple(range(6)))
    with pytest.raises(BadSampleError, match="expected a good sample within 3 rows, got none; the first: row"):
        rows_of(folder)[0]


def test_the_second_stage_leaves_rows_out_that_have_short_texts_only(tmp_path):
    captions = [["dog"], [sentence(1), "dog"], ["a cat"], [sentence(3)], [" "]]
    rows = [{"image": {"bytes": png(n), "path": None}, "text": own} for n, own in enumerate(captions)]
    features = Features({"image": Image(), "text": List(Value("string"))})
    Dataset.from_list(rows, features).to_parquet(tmp_path / "train.parquet")
    maker = TripletMaker(DECODER, leave_out_templated=True)
    for data in (rows_of(tmp_path, maker=maker), stream_of(tmp_path, maker=maker)):
        batches = take(TripletLoader(data, batch_size=2), 3)
        assert {number for batch in batches for number in numbers_of(batch)} == {1, 3}
        assert {text for batch in batches for text in batch["texts"]} == {sentence(1), sentence(3)}
        messages = [message for batch in batches for message in batch["bad"]]
        assert messages and all("expected a text, got none" in message for message in messages), "only the empty row"
    labels = Source(str(tmp_path), label="text")
    for opening in (partial(TripletRows, progress=False), TripletStream):
        with pytest.raises(ValueError, match="expected .*text"):
            opening([labels], maker)


# Streams


def test_a_stream_has_every_row_of_an_epoch_once_over_ranks_and_workers(shards):
    seen: list[int] = []
    for rank in range(2):
        loader = TripletLoader(stream_of(shards), batch_size=6, rank=rank, world_size=2, num_workers=2)
        seen += [number for batch in take(loader, 8) for number in numbers_of(batch)]  # 96 / 2 / 6 batches
    assert sorted(seen) == list(range(96))


def test_a_stream_goes_on_in_another_order(shards):
    batches = take(TripletLoader(stream_of(shards, shuffle_buffer=30), batch_size=12), 16)
    first, second = ([n for batch in part for n in numbers_of(batch)] for part in (batches[:8], batches[8:]))
    assert sorted(first) == sorted(second) == list(range(96)) and first != second
    again = take(TripletLoader(stream_of(shards, shuffle_buffer=30), batch_size=12), 16)
    assert facts(again) == facts(batches)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("steps", [3, 4, 13])
def test_a_resumed_stream_is_the_uninterrupted_one(shards, few, workers, steps):
    """Without a shuffle buffer nothing is lost and nothing comes twice, also in the second epoch of a mixture."""

    def loader() -> TripletLoader:
        stream = stream_of(shards, few, weights=[3, 1], shuffle_buffer=1)
        return TripletLoader(stream, batch_size=10, num_workers=workers)

    whole = facts(take(loader(), 20))
    stopped = loader()
    take(stopped, steps)
    state = json.loads(json.dumps(stopped.state_dict()))
    assert facts(take(stopped, 2)) == whole[steps : steps + 2], "the same object goes on as well"
    resumed = loader()
    resumed.load_state_dict(state)
    assert facts(take(resumed, 20 - steps)) == whole[steps:]


def test_a_resumed_stream_loses_no_more_than_its_buffer(shards):
    def loader() -> TripletLoader:
        return TripletLoader(stream_of(shards, shuffle_buffer=16), batch_size=8)

    stopped = loader()
    before = [n for batch in take(stopped, 5) for n in numbers_of(batch)]
    resumed = loader()
    resumed.load_state_dict(stopped.state_dict())
    rest = [n for batch in take(resumed, 5) for n in numbers_of(batch)]
    after = rest[: 96 - 40 - 16]
    assert not set(before) & set(after), "nothing twice"
    assert len(set(range(96)) - set(before) - set(rest)) <= 16


def test_shares_of_a_streamed_mixture(shards, few):
    loader = TripletLoader(stream_of(shards, few, weights=[1, 1]), batch_size=40)
    drawn = [number for batch in take(loader, 12) for number in numbers_of(batch)]
    assert np.mean([number >= 500 for number in drawn]) == pytest.approx(0.5, abs=0.08)
    with pytest.raises(ValueError, match="a weight for each of 2 streamed sources, got none"):
        stream_of(shards, few)


def test_bad_rows_of_a_stream_are_told_of_and_ranks_stay_in_step(damaged):
    messages, yielded = [], []
    for rank in range(2):
        batches = take(TripletLoader(stream_of(damaged), batch_size=4, rank=rank, world_size=2), 6)
        assert [len(batch["texts"]) for batch in batches] == [4] * 6
        messages += [message for batch in batches for message in batch["bad"]]
        yielded += [number for batch in batches for number in numbers_of(batch)]
    assert len(yielded) == 48 and set(yielded) == set(range(60)) - set(BAD)
    assert {int(message.split("(")[1].split(".png")[0]) for message in messages} == set(BAD)
    assert len(messages) == len(BAD)


@pytest.mark.parametrize(("world_size", "workers", "need"), [(5, 0, 5), (2, 4, 8), (1, 5, 5)])
def test_too_few_shards_are_refused_with_the_numbers(shards, world_size, workers, need):
    message = rf"expected at least {world_size} ranks x {max(1, workers)} workers = {need} shards, got 4: .*--shards"
    with pytest.raises(ValueError, match=message):
        TripletLoader(stream_of(shards), batch_size=2, world_size=world_size, num_workers=workers)
    TripletLoader(stream_of(shards), batch_size=2, world_size=2, num_workers=2)


def test_an_impossible_stream_is_refused(shards):
    with pytest.raises(ValueError, match="a shuffle_buffer of at least 1 row, got 0"):
        stream_of(shards, shuffle_buffer=0)
    with pytest.raises(ValueError, match="expected texts as templated ones are left out"):
        TripletStream([Source(str(shards), label="text")], TripletMaker(DECODER, leave_out_templated=True))


# The loader


def test_texts_become_tensors_in_the_batch(shards):
    def tokenize(texts: list[str]) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.tensor([[len(text)] for text in texts])}

    for data in (rows_of(shards), stream_of(shards)):
        (batch,) = take(TripletLoader(data, batch_size=4, tokenize=tokenize), 1)
        assert batch["input_ids"].tolist() == [[len(text)] for text in batch["texts"]]
        assert batch["labels"].dtype == torch.int64 and batch["templated"].dtype == torch.bool
        assert "state" not in batch


@pytest.mark.parametrize("options", [dict(batch_size=0), dict(num_workers=-1), dict(rank=1), dict(rank=-1)])
def test_impossible_loaders_are_refused(shards, options):
    with pytest.raises(ValueError, match="expected batch_size >= 1, num_workers >= 0 and 0 <= rank < world_size"):
        TripletLoader(rows_of(shards), **{"batch_size": 2, **options})


def test_states_of_other_runs_are_refused(shards):
    rows, stream = rows_of(shards), stream_of(shards)
    state = TripletLoader(stream, batch_size=2).state_dict()
    with pytest.raises(ValueError, match=r"expected a state with \['step'\]"):
        TripletLoader(rows, batch_size=2).load_state_dict(state)
    for options in (dict(batch_size=3), dict(world_size=2), dict(world_size=2, rank=1), dict(num_workers=2)):
        with pytest.raises(ValueError, match="expected the state of a stream with"):
            TripletLoader(stream, **{"batch_size": 2, **options}).load_state_dict(state)
