"""Prepared token shards, and the batches of one rank cut from them.

A split is one long row of token ids, cut into sequences of `seq_len + 1` tokens with stride `seq_len` (the last target
of a sequence is the first input of the next). The k-th sequence that a training run reads of a data set is number

    permutation(seed, k // n_sequences)[k % n_sequences]

With several data sets, `MixtureOrder` says of which one the g-th sequence of the run is, and so how many k of its
sequences came before. So the step number alone says what comes next, whatever the world size or the micro-batch size.
"""

import functools
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch


class Sequences:
    """The sequences of seq_len + 1 tokens of a split; one may straddle shards.

    `files` are those that the shards are mapped from, if any. `error` is None until a read finds that one of them has
    been changed, moved or deleted; it is recorded and not raised, because all ranks have to end together.
    """

    def __init__(self, shards: list[npt.NDArray[Any]], seq_len: int, *, files: Iterable[Path] = ()) -> None:
        self.seq_len = seq_len
        self.error: str | None = None
        self._shards = shards
        self._files = [(path, _file_mark(path)) for path in files]
        self._ends = np.cumsum([len(shard) for shard in shards])

    def __len__(self) -> int:
        return int(self._ends[-1] - 1) // self.seq_len

    def read(self, indices: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
        """The sequences of these numbers, [n, seq_len + 1]; zeros once there is an `error`."""
        rows = np.empty((len(indices), self.seq_len + 1), dtype=np.int64)
        for row, index in zip(rows, indices.tolist(), strict=True):
            assert 0 <= index < len(self), f"sequence {index} of {len(self)}"
            self._fill(row, start=index * self.seq_len)
        # What a changed file holds may be no token ids, and the forward before the ranks end needs some.
        return np.zeros_like(rows) if self.error else rows

    def _fill(self, row: npt.NDArray[np.int64], start: int) -> None:
        filled = 0
        number = int(np.searchsorted(self._ends, start, side="right"))
        while filled < len(row):
            shard = self._shards[number]
            offset = start + filled - (self._ends[number] - len(shard))
            piece = shard[offset : offset + len(row) - filled]
            row[filled : filled + len(piece)] = piece
            filled += len(piece)
            # After the read: a change before or during it is found.
            self.error = self.error or (_change(*self._files[number]) if self._files else None)
            number += 1


def _file_mark(path: Path) -> tuple[int, ...]:
    """What differs once a file has been written to or replaced."""
    seen = path.stat()
    return seen.st_ino, seen.st_size, seen.st_mtime_ns


def _change(path: Path, mark: tuple[int, ...]) -> str | None:
    try:
        if _file_mark(path) == mark:
            return None
        what = "has been changed"
    except OSError as error:
        what = f"cannot be read any more ({error.strerror})"
    return f"data.dir: {path} {what} while the run was reading it; restore it and run the same command again"


class SequenceMixture:
    """The sequences of one or several data sets, numbered one set after the other; `names` call them in a log."""

    def __init__(self, parts: Sequence[Sequences], weights: Sequence[Fraction], names: Sequence[str]) -> None:
        self.parts = parts
        self.names = names
        self.seq_len = parts[0].seq_len
        self.shares = [weight / sum(weights) for weight in weights]
        self.starts = np.cumsum([0, *(len(part) for part in parts)])

    @classmethod
    def of(cls, sequences: "Sequences | SequenceMixture") -> "SequenceMixture":
        """Those of one data set as a mixture of it alone."""
        return sequences if isinstance(sequences, SequenceMixture) else cls([sequences], [Fraction(1)], [""])

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def error(self) -> str | None:
        """The error of reading one of them, if any: see `Sequences`."""
        return next((part.error for part in self.parts if part.error), None)

    def sources_of(self, indices: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
        """The number of the data set that each sequence is in, [n] -> [n]."""
        return np.searchsorted(self.starts, indices, side="right") - 1

    def read(self, indices: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
        """The sequences of these numbers, [n, seq_len + 1]."""
        rows = np.empty((len(indices), self.seq_len + 1), dtype=np.int64)
        sources = self.sources_of(indices)
        for number in np.unique(sources):
            own = sources == number
            rows[own] = self.parts[number].read(indices[own] - self.starts[number])
        return rows


class MixtureOrder:
    """The order in which a run reads a mixture: a function of the seed alone.

    It is made of blocks. After each of them, every data set has had its share of all sequences so far, rounded down
    (the one with the largest share has what the others leave). Within a block the data sets alternate at random.
    """

    BLOCK = 4096  # sequences

    def __init__(self, mixture: SequenceMixture, *, seed: int) -> None:
        self._mixture = mixture
        self._seed = seed
        self._block = functools.lru_cache(2)(self._make_block)
        self._epoch_order = [
            functools.lru_cache(1)(functools.partial(permutation, len(part), seed)) for part in mixture.parts
        ]

    def sources(self, first: int, count: int) -> npt.NDArray[np.int64]:
        """The number of the data set of so many sequences from the `first` on."""
        if len(self._mixture.parts) == 1:
            return np.zeros(count, dtype=np.int64)
        pieces = [np.empty(0, dtype=np.int64)]
        while count > 0:
            block, position = divmod(first, self.BLOCK)
            pieces.append(self._block(block)[position : position + count])
            first += len(pieces[-1])
            count -= len(pieces[-1])
        return np.concatenate(pieces)

    def counts(self, n_sequences: int) -> list[int]:
        """How many of the first so many sequences are of each data set."""
        block, rest = divmod(n_sequences, self.BLOCK)
        before = apportion(block * self.BLOCK, self._mixture.shares)
        within = np.bincount(self.sources(block * self.BLOCK, rest), minlength=len(before))
        return [a + int(b) for a, b in zip(before, within, strict=True)]

    def indices(self, first: int, count: int) -> npt.NDArray[np.int64]:
        """The numbers in the mixture of so many sequences from the `first` on."""
        sources, before = self.sources(first, count), self.counts(first)
        found = np.empty(count, dtype=np.int64)
        for number in np.unique(sources):
            own = np.flatnonzero(sources == number)
            found[own] = self._mixture.starts[number] + self._take(number, before[number], len(own))
        return found

    def _take(self, source: int, first: int, count: int) -> npt.NDArray[np.integer]:
        """So many sequences of a data set in its own order, through its epochs."""
        pieces: list[npt.NDArray[np.integer]] = []
        while count > 0:
            epoch, position = divmod(first, len(self._mixture.parts[source]))
            pieces.append(self._epoch_order[source](epoch)[position : position + count])
            first += len(pieces[-1])
            count -= len(pieces[-1])
        return np.concatenate(pieces)

    def _make_block(self, block: int) -> npt.NDArray[np.int64]:
        shares = self._mixture.shares
        before, after = (apportion(n * self.BLOCK, shares) for n in (block, block + 1))
        sizes = [b - a for a, b in zip(before, after, strict=True)]
        # Not the keys that order the sequences of a data set.
        return np.repeat(np.arange(len(sizes)), sizes)[permutation(self.BLOCK, self._seed, block, stream=1)]


def apportion(count: int, shares: Sequence[Fraction]) -> list[int]:
    """A whole number of things by shares that sum to 1, rounded down; the largest share has the rest."""
    found = [int(share * count) for share in shares]
    found[max(range(len(shares)), key=shares.__getitem__)] += count - sum(found)
    return found


class TrainBatches:
    """The training batches of one rank; its only state is the step number, which the caller keeps."""

    def __init__(
        self,
        sequences: Sequences | SequenceMixture,
        *,
        seed: int,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        assert global_batch_size % (world_size * micro_batch_size) == 0, "see TrainerSettings.check_ranks"
        self._sequences = SequenceMixture.of(sequences)
        self._order = MixtureOrder(self._sequences, seed=seed)
        self._global_batch_size = global_batch_size
        self._micro_batch_size = micro_batch_size
        self._rank = rank
        self._rank_batch_size = global_batch_size // world_size
        self.n_micro_batches = self._rank_batch_size // micro_batch_size

    @property
    def names(self) -> Sequence[str]:
        """The names of the data sets."""
        return self._sequences.names

    @property
    def is_mixed(self) -> bool:
        """Whether there are several."""
        return len(self.names) > 1

    def micro_batches(self, step: int) -> Iterator[torch.Tensor]:
        """This rank's part of the global batch of a step, int64 [micro_batch_size, seq_len + 1] at a time."""
        for start in self._starts(step):
            with torch.profiler.record_function("data"):
                tokens = torch.from_numpy(self._sequences.read(self._order.indices(start, self._micro_batch_size)))
            yield tokens

    def sources(self, step: int) -> Iterator[torch.Tensor]:
        """The number of the data set of each sequence in these, int64 [micro_batch_size] at a time."""
        for start in self._starts(step):
            yield torch.from_numpy(self._order.sources(start, self._micro_batch_size))

    def source_tokens(self, step: int) -> dict[str, int]:
        """The tokens of each data set in the global batch of a step, by its name; empty where there is but one."""
        before, after = self.sequences_read(step), self.sequences_read(step + 1)
        n_tokens = {name: (after[name] - before[name]) * self._sequences.seq_len for name in self.names}
        return n_tokens if self.is_mixed else {}

    def _starts(self, step: int) -> range:
        first = step * self._global_batch_size + self._rank * self._rank_batch_size
        return range(first, first + self._rank_batch_size, self._micro_batch_size)

    def sequences_read(self, step: int) -> dict[str, int]:
        """How many sequences of each data set, by its name, all ranks together have read when a step begins."""
        return dict(zip(self.names, self._order.counts(step * self._global_batch_size), strict=True))

    @property
    def error(self) -> str | None:
        """The error of reading the shards, if any: see `Sequences`."""
        return self._sequences.error

    def epoch(self, step: int) -> float:
        """Sequences read when a step begins, relative to those that there are: passes over the data."""
        return step * self._global_batch_size / len(self._sequences)

    def epochs(self, step: int) -> dict[str, float]:
        """Passes over each data set, by its name, that are complete when a step begins."""
        read = self.sequences_read(step)
        return {name: read[name] / len(part) for name, part in zip(self.names, self._sequences.parts, strict=True)}


class EvalBatches:
    """A fixed set of sequences, evenly spaced in each data set, which has its share of them as far as it has so many.

    It is the same for every world size, and each rank yields equally many batches.
    """

    def __init__(
        self,
        sequences: Sequences | SequenceMixture,
        *,
        n_sequences: int,
        micro_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._sequences = SequenceMixture.of(sequences)
        self._micro_batch_size = micro_batch_size
        wanted = apportion(n_sequences, self._sequences.shares)
        taken = [(min(n, len(part)), len(part)) for n, part in zip(wanted, self._sequences.parts, strict=True)]
        self.sequences_of = [n for n, _ in taken]  # each data set
        starts = self._sequences.starts[:-1]
        chosen = np.concatenate(
            [start + np.arange(n) * total // max(n, 1) for start, (n, total) in zip(starts, taken, strict=True)]
        )
        self.n_sequences = len(chosen)
        # Under FSDP every rank must run equally many forwards: the rest is padded with a sequence of weight 0.
        padded = -self.n_sequences % (world_size * micro_batch_size)
        indices = np.concatenate([chosen, np.zeros(padded, dtype=chosen.dtype)])
        weights = np.concatenate([np.ones(self.n_sequences, np.float32), np.zeros(padded, np.float32)])
        self._indices = np.split(indices, world_size)[rank]
        self._weights = np.split(weights, world_size)[rank]

    @property
    def error(self) -> str | None:
        """The error of reading the shards, if any: see `Sequences`."""
        return self._sequences.error

    def __len__(self) -> int:
        return len(self._indices) // self._micro_batch_size

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for start in range(0, len(self._indices), self._micro_batch_size):
            rows = slice(start, start + self._micro_batch_size)
            tokens = self._sequences.read(self._indices[rows])
            yield torch.from_numpy(tokens), torch.from_numpy(self._weights[rows].copy())

    def sources(self) -> Iterator[torch.Tensor]:
        """The number of the data set of each sequence in the batches, int64 [micro_batch_size] at a time."""
        sources = self._sequences.sources_of(self._indices)
        yield from torch.from_numpy(sources).split(self._micro_batch_size)


def permutation(n: int, seed: int, epoch: int, *, stream: int = 0) -> npt.NDArray[np.integer]:
    """A permutation of range(n) that depends on nothing else than its arguments."""
    # NumPy promises that the raw numbers of a bit generator never change; of Generator.permutation it does not. A
    # stream of 0 is what NumPy fills the list with.
    keys = np.random.Philox(np.random.SeedSequence([seed, epoch, stream])).random_raw(n)
    return np.argsort(keys, kind="stable").astype(np.min_scalar_type(n))
