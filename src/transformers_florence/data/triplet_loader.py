"""Endless batches of triplets for training, from rows at hand or from a stream of shards, on every rank.

A batch of `TripletLoader` is a dict of

- `pixels`: (batch, 3, height, width), uint8; `PixelNormalizer` makes `pixel_values` of them, on the device;
- `texts`: list of str, and what `tokenize` makes of them;
- `labels`: (batch,), int64: `text_label` of the texts before they came into templates;
- `templated`: (batch,), bool: whether a text stands in a template;
- `bad`: list of str: what was wrong with the samples that were passed over on the way to this batch.

Batches never end, so every rank has as many as every other, whatever was passed over: ranks stay in step.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, get_worker_info
from tqdm.auto import tqdm

from .sources import Source, open_source, stream_rows
from .triplets import BadSampleError, Tokenize, TripletMaker, collate

MAX_BAD_IN_A_ROW = 1000  # as many bad samples one after the other are a broken set, not an accident
WORKER_TIMEOUT_SECONDS = 600


def name_of(row: Mapping[str, Any], number: int) -> str:
    """What an error calls a row: its number, and its picture's path if it has one."""
    path = row["image"].get("path") if isinstance(row["image"], Mapping) else None
    return f"row {number}" if path is None else f"row {number} ({path})"


def check_sources(sources: Sequence[Source], maker: TripletMaker) -> list[float] | None:
    """The sources' shares of the samples, with a sum of one; None where none has a weight.

    Raises:
        ValueError: no sources, weights for some of them only, or class labels where templated texts are left out.
    """
    if not sources:
        raise ValueError("expected at least one source, got none")
    for source in sources:
        if source.label is not None and maker.leave_out_templated:
            raise ValueError(f"{source.path}: expected texts as templated ones are left out, got class labels only")
    weights = [source.weight for source in sources if source.weight is not None]
    if weights and len(weights) < len(sources):
        raise ValueError(f"expected a weight for each of {len(sources)} sources or for none, got {len(weights)}")
    return [weight / sum(weights) for weight in weights] or None


class TripletRows(Dataset):
    """Rows at hand, any of them at any time: sample n is a pure function of the seed and of n.

    An epoch is a permutation of all rows, a new one each time; with weights it lasts until every row was there, and
    rows of sources that should come more often return. Samples are numbered through the epochs, 0 to infinity, so
    that a step's number says where a run is: nothing else is needed to resume it, also on another number of ranks.

    A bad sample is replaced by the next good one in the epoch's order, which so is there twice, and is told of in its
    own turn only: over an epoch the messages are as many as the bad rows.

    Args:
        sources: the sets; all with weights or all without.
        maker: what makes triplets of rows.
        seed: decides every order and every text.
        progress: whether to show a bar while rows without a drawable text are looked for.

    Raises:
        ValueError: as `open_source`; as `check_sources`; or no row with a drawable text in a source.

    Attributes:
        epoch_length: samples in an epoch.
    """

    def __init__(
        self, sources: Sequence[Source], maker: TripletMaker, *, seed: int = 0, progress: bool = True
    ) -> None:
        self.maker, self.seed = maker, seed
        shares = check_sources(sources, maker)
        opened = [open_source(source, streaming=False) for source in sources]
        self.rows, self.readers = zip(*opened, strict=True)
        self.kept = [
            np.arange(len(rows)) if not maker.leave_out_templated else self._drawable(rows, reader, progress)
            for rows, reader in opened
        ]
        for source, kept in zip(sources, self.kept, strict=True):
            if len(kept) == 0:
                raise ValueError(f"{source.path}: expected at least one row with a text to draw, got none")
        sizes = [len(kept) for kept in self.kept]
        # Long enough for the source that is drawn most rarely, for its size, to be there as a whole.
        length = 0.0 if shares is None else max(size / share for size, share in zip(sizes, shares, strict=True))
        self.draws = (
            sizes
            if shares is None
            else [max(size, round(share * length)) for size, share in zip(sizes, shares, strict=True)]
        )
        self.starts = np.cumsum([0, *sizes[:-1]])
        self.epoch_length = sum(self.draws)
        self._orders: dict[int, np.ndarray] = {}

    def _drawable(self, rows: Any, reader: Any, progress: bool) -> np.ndarray:
        texts = rows.select_columns([name for name in rows.column_names if name != reader.image])
        bar = tqdm(texts, desc="texts", unit="row", disable=not progress)
        # A row without any text is bad and stays, so that the policy for bad samples sees it.
        found = [not own or bool(self.maker.drawable(own, reader.is_label)) for own in map(reader.texts, bar)]
        return np.flatnonzero(found)

    def order(self, epoch: int) -> np.ndarray:
        """(epoch_length,), int64: the rows of an epoch, numbered through the sources."""
        if epoch not in self._orders:
            rng = np.random.default_rng([self.seed, 1 << 32, epoch])
            drawn = []
            for kept, draws, start in zip(self.kept, self.draws, self.starts, strict=True):
                passes = [rng.permutation(len(kept)) for _ in range(-(-draws // len(kept)))]
                drawn.append(start + np.concatenate(passes)[:draws])
            self._orders = {key: value for key, value in self._orders.items() if key == epoch - 1}
            self._orders[epoch] = rng.permutation(np.concatenate(drawn))
        return self._orders[epoch]

    def _sample(self, place: int, rng: np.random.Generator) -> dict[str, Any]:
        source = int(np.searchsorted(self.starts, place, side="right")) - 1
        row = int(self.kept[source][place - self.starts[source]])
        values = self.readers[source](self.rows[source][row])
        return self.maker(values, rng, name_of(values, row))

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Sample `number`: a triplet, and under `bad` what was wrong with the row whose turn it was, if anything.

        Raises:
            BadSampleError: a bad sample where they are not skipped, or too many one after the other.
        """
        epoch, position = divmod(number, self.epoch_length)
        order, rng = self.order(epoch), np.random.default_rng([self.seed, number])
        first = None
        for step in range(min(MAX_BAD_IN_A_ROW, self.epoch_length)):
            try:
                sample = self._sample(int(order[(position + step) % self.epoch_length]), rng)
                return {**sample, "bad": first}
            except BadSampleError as error:
                if not self.maker.skip_bad:
                    raise
                first = first or str(error)
        raise BadSampleError(f"expected a good sample within {step + 1} rows, got none; the first: {first}")


class StepSampler(Sampler[list[int]]):
    """Numbers of the samples of a rank, step by step without end: global batches are equal for any number of ranks."""

    def __init__(self, batch_size: int, rank: int, world_size: int, first_step: int) -> None:
        self.batch_size, self.rank, self.world_size, self.first_step = batch_size, rank, world_size, first_step

    def __iter__(self) -> Iterator[list[int]]:
        for step in itertools.count(self.first_step):
            start = (step * self.world_size + self.rank) * self.batch_size
            yield list(range(start, start + self.batch_size))


def check_shards(path: str, num_shards: int, world_size: int, num_workers: int) -> None:
    """Refuse a stream that cannot give every worker of every rank a shard of its own.

    Raises:
        ValueError: too few shards, with both numbers and what helps.
    """
    workers = max(1, num_workers)
    if num_shards < world_size * workers:
        raise ValueError(
            f"{path}: expected at least {world_size} ranks x {workers} workers = {world_size * workers} shards, got "
            f"{num_shards}: cut it into more (examples/curate.py --shards), take fewer workers, or do not stream it"
        )


class TripletStream:
    """Rows of sets too large to be at hand: shards are read one after the other and shuffled within a buffer.

    Each worker of each rank has shards of its own of every source and goes through them again and again, in a new
    order each time; of which source the next row comes is drawn by the weights. Bad samples are passed over.

    Args:
        sources: the sets; several need weights.
        maker: what makes triplets of rows.
        seed: decides every order and every text.
        shuffle_buffer: rows in memory, per worker and source, of which the next one is drawn. A resumed run sees
            those that were in the buffer only in the next epoch; 1 loses none and shuffles shards only.

    Raises:
        ValueError: as `open_source` and `check_sources`; several sources without weights; or a buffer of less than one
            row.
    """

    def __init__(
        self, sources: Sequence[Source], maker: TripletMaker, *, seed: int = 0, shuffle_buffer: int = 1000
    ) -> None:
        if shuffle_buffer < 1:
            raise ValueError(f"expected a shuffle_buffer of at least 1 row, got {shuffle_buffer}")
        shares = check_sources(sources, maker)
        if shares is None and len(sources) > 1:
            raise ValueError(f"expected a weight for each of {len(sources)} streamed sources, got none")
        self.shares = shares or [1.0]
        self.sources, self.maker, self.seed, self.shuffle_buffer = sources, maker, seed, shuffle_buffer
        self.streams = [stream_rows(source) for source in sources]


class EndlessRows:
    """One source's rows for one worker of one rank, epoch after epoch.

    Args:
        stream: the stream that has the source.
        source: its number.
        rank, world_size: of which rank.
        state: where to begin; None for the beginning.
    """

    def __init__(
        self, stream: TripletStream, source: int, rank: int, world_size: int, state: dict[str, Any] | None
    ) -> None:
        self.stream, self.source, self.rank, self.world_size = stream, source, rank, world_size
        self.useful = state is not None  # whether a row of this epoch became a sample; its rest may have none
        self._open(0 if state is None else state["epoch"])
        if state is not None:
            self.rows.load_state_dict(state["rows"])

    def _open(self, epoch: int) -> None:
        seed = int(np.random.SeedSequence([self.stream.seed, self.source, epoch]).generate_state(1)[0])
        # One shard at a time: datasets' interleaving of several holds threads, and its state cannot be loaded in a
        # worker process (datasets 5.2).
        rows = self.stream.streams[self.source].shuffle(
            seed=seed, buffer_size=self.stream.shuffle_buffer, max_buffer_input_shards=1
        )
        self.epoch = epoch
        self.rows = split_dataset_by_node(rows, self.rank, self.world_size, strategy="shards")
        self.iterator: Iterator[dict[str, Any]] | None = None  # made when the state has been loaded

    def __next__(self) -> dict[str, Any]:
        """The next row.

        Raises:
            BadSampleError: none of a whole epoch became a sample.
        """
        while True:
            if self.iterator is None:
                self.iterator = iter(self.rows)
            row = next(self.iterator, None)
            if row is not None:
                return row
            if not self.useful:
                path = self.stream.sources[self.source].path
                raise BadSampleError(f"{path}: expected a good sample in the shards of rank {self.rank}, got none")
            self.useful = False
            self._open(self.epoch + 1)

    def state(self) -> dict[str, Any]:
        """Where this is; plain values."""
        return {"epoch": self.epoch, "rows": self.rows.state_dict()}


class StreamBatches(IterableDataset):
    """What one worker of one rank makes of a stream: batches, each with the worker's state after it.

    Args:
        stream: the stream.
        collate_fn: samples and messages -> a batch.
        batch_size, rank, world_size: of the rank.
        states: one for each worker, as the last batches carried them; None for the beginning.
        late: the workers of a smaller number begin with None instead of a batch: so the others are the first to give
            one, in the order in which they would have gone on.
    """

    def __init__(
        self,
        stream: TripletStream,
        collate_fn: Callable[[list[dict[str, Any]], list[str]], dict[str, Any]],
        *,
        batch_size: int,
        rank: int,
        world_size: int,
        states: Sequence[dict[str, Any] | None],
        late: int,
    ) -> None:
        self.stream, self.collate_fn, self.batch_size = stream, collate_fn, batch_size
        self.rank, self.world_size, self.states, self.late = rank, world_size, states, late

    def __iter__(self) -> Iterator[dict[str, Any] | None]:
        info = get_worker_info()
        worker = 0 if info is None else info.id
        if worker < self.late:
            yield None
        stream, maker = self.stream, self.stream.maker
        numbers = range(len(stream.sources))
        state = self.states[worker] or {"drawn": 0, "sources": [None for _ in numbers]}
        drawn = state["drawn"]
        sources = [
            EndlessRows(stream, number, self.rank, self.world_size, state["sources"][number]) for number in numbers
        ]
        samples: list[dict[str, Any]] = []
        bad: list[str] = []
        bad_in_a_row = 0
        while True:
            drawn += 1
            rng = np.random.default_rng([stream.seed, self.rank, worker, drawn])
            source = sources[rng.choice(numbers, p=stream.shares)]
            row = next(source)
            if row["texts"] and not maker.drawable(row["texts"], row["is_label"]):
                continue
            try:
                samples.append(maker(row, rng, f"rank {self.rank}, worker {worker}, {name_of(row, drawn)}"))
                source.useful, bad_in_a_row = True, 0
            except BadSampleError as error:
                bad_in_a_row += 1
                if not maker.skip_bad:
                    raise
                if bad_in_a_row == MAX_BAD_IN_A_ROW:
                    raise BadSampleError(f"expected a good sample within {bad_in_a_row} rows: {error}") from error
                bad.append(str(error))
            if len(samples) == self.batch_size:
                after = {"drawn": drawn, "sources": [source.state() for source in sources]}
                yield {**self.collate_fn(samples, bad), "state": after}
                samples, bad = [], []


def _collate_rows(samples: Sequence[dict[str, Any]], tokenize: Tokenize | None) -> dict[str, Any]:
    return collate(samples, [sample["bad"] for sample in samples if sample["bad"]], tokenize)


class TripletLoader:
    """Endless batches of one rank, decoded in worker processes, from where a saved state says.

    Iterating again goes on after the last batch that was handed out.

    Args:
        data: the rows or the stream.
        batch_size: triplets in a batch of this rank.
        rank, world_size: which of how many ranks this is.
        num_workers: processes that decode; 0 decodes in this one.
        tokenize: texts -> tensors that become part of the batch, such as `partial(tokenizer, padding=True,
            truncation=True, return_tensors="pt")`. It runs in the workers.
        pin_memory: as in `DataLoader`.

    Raises:
        ValueError: numbers out of range, or a stream with fewer shards than ranks times workers.
    """

    def __init__(
        self,
        data: TripletRows | TripletStream,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        tokenize: Tokenize | None = None,
        pin_memory: bool = False,
    ) -> None:
        if batch_size < 1 or num_workers < 0 or not 0 <= rank < world_size:
            raise ValueError(
                "expected batch_size >= 1, num_workers >= 0 and 0 <= rank < world_size, got "
                f"{batch_size}, {num_workers}, {rank} and {world_size}"
            )
        self.data, self.batch_size, self.tokenize, self.pin_memory = data, batch_size, tokenize, pin_memory
        self.rank, self.world_size, self.num_workers = rank, world_size, num_workers
        if isinstance(data, TripletStream):
            for source, stream in zip(data.sources, data.streams, strict=True):
                check_shards(source.path, stream.num_shards, world_size, num_workers)
        self._step = 0
        self._workers: list[dict[str, Any] | None] = [None] * max(1, num_workers)

    def state_dict(self) -> dict[str, Any]:
        """Where this rank is, after the last batch that was handed out; plain values, fit for JSON.

        Rows: the step alone, the same on every rank. A stream: also the state of each worker, another on each rank.
        """
        state: dict[str, Any] = {"step": self._step}
        if isinstance(self.data, TripletStream):
            shape = {"batch_size": self.batch_size, "rank": self.rank, "world_size": self.world_size}
            state |= {**shape, "workers": list(self._workers)}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken, from the next batch.

        Raises:
            ValueError: the state of rows for a stream or the other way round, or of another rank or of another number
                of ranks, workers or triplets a batch, among which the shards are shared otherwise.
        """
        own = self.state_dict()
        if own.keys() != state.keys():
            raise ValueError(f"expected a state with {sorted(own)}, got {sorted(state)}")
        if "workers" in own:
            expected = {name: own[name] for name in ("batch_size", "rank", "world_size")}
            expected["workers"] = len(own["workers"])
            got = {name: state[name] for name in ("batch_size", "rank", "world_size")}
            got["workers"] = len(state["workers"])
            if expected != got:
                raise ValueError(f"expected the state of a stream with {expected}, got {got}")
            self._workers = list(state["workers"])
        self._step = state["step"]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        options: dict[str, Any] = {"num_workers": self.num_workers, "pin_memory": self.pin_memory}
        options["timeout"] = WORKER_TIMEOUT_SECONDS if self.num_workers else 0
        if isinstance(self.data, TripletRows):
            sampler = StepSampler(self.batch_size, self.rank, self.world_size, self._step)
            loader = DataLoader(
                self.data,
                batch_sampler=sampler,
                collate_fn=partial(_collate_rows, tokenize=self.tokenize),
                **options,
            )
        else:
            batches = StreamBatches(
                self.data,
                partial(collate, tokenize=self.tokenize),
                batch_size=self.batch_size,
                rank=self.rank,
                world_size=self.world_size,
                states=self._workers,
                late=self._step % len(self._workers),
            )
            loader = DataLoader(batches, batch_size=None, **options)
        for batch in loader:
            if batch is None:  # of a worker whose turn it is not yet
                continue
            if "state" in batch:
                self._workers[self._step % len(self._workers)] = batch.pop("state")
            self._step += 1
            yield batch


__all__ = ["StepSampler", "TripletLoader", "TripletRows", "TripletStream", "check_shards", "check_sources"]
