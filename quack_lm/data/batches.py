"""Prepared token shards, and the batches of one rank cut from them.

A split is one long row of token ids, cut into sequences of `seq_len + 1` tokens with stride `seq_len` (the last target
of a sequence is the first input of the next). The g-th sequence that a training run reads is number

    permutation(seed, g // n_sequences)[g % n_sequences]

so the step number alone says what comes next, whatever the world size or the micro-batch size.
"""

from collections.abc import Iterable, Iterator
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


class TrainBatches:
    """The training batches of one rank; its only state is the step number, which the caller keeps."""

    def __init__(
        self,
        sequences: Sequences,
        *,
        seed: int,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        assert global_batch_size % (world_size * micro_batch_size) == 0, "see TrainerSettings.check_ranks"
        self._sequences = sequences
        self._seed = seed
        self._global_batch_size = global_batch_size
        self._micro_batch_size = micro_batch_size
        self._rank = rank
        self._rank_batch_size = global_batch_size // world_size
        self.n_micro_batches = self._rank_batch_size // micro_batch_size
        self._order: tuple[int, npt.NDArray[np.integer]] = (-1, np.empty(0, dtype=np.uint8))

    def micro_batches(self, step: int) -> Iterator[torch.Tensor]:
        """This rank's part of the global batch of a step, int64 [micro_batch_size, seq_len + 1] at a time."""
        first = step * self._global_batch_size + self._rank * self._rank_batch_size
        for start in range(first, first + self._rank_batch_size, self._micro_batch_size):
            numbers = self._sequence_numbers(start, self._micro_batch_size)
            with torch.profiler.record_function("data"):
                tokens = torch.from_numpy(self._sequences.read(numbers))
            yield tokens

    @property
    def error(self) -> str | None:
        """The error of reading the shards, if any: see `Sequences`."""
        return self._sequences.error

    def epoch(self, step: int) -> float:
        """Passes over the data that are complete when a step begins."""
        return step * self._global_batch_size / len(self._sequences)

    def _sequence_numbers(self, first: int, count: int) -> npt.NDArray[np.integer]:
        pieces = []
        while count > 0:
            epoch, position = divmod(first, len(self._sequences))
            pieces.append(self._epoch_order(epoch)[position : position + count])
            first += len(pieces[-1])
            count -= len(pieces[-1])
        return np.concatenate(pieces)

    def _epoch_order(self, epoch: int) -> npt.NDArray[np.integer]:
        if self._order[0] != epoch:
            self._order = (epoch, permutation(len(self._sequences), seed=self._seed, epoch=epoch))
        return self._order[1]


class EvalBatches:
    """A fixed, evenly spaced set of sequences, the same for every world size; each rank yields equally many batches."""

    def __init__(
        self, sequences: Sequences, *, n_sequences: int, micro_batch_size: int, rank: int = 0, world_size: int = 1
    ) -> None:
        self.n_sequences = min(n_sequences, len(sequences))
        self._sequences = sequences
        self._micro_batch_size = micro_batch_size
        chosen = np.arange(self.n_sequences) * len(sequences) // self.n_sequences
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


def permutation(n: int, *, seed: int, epoch: int) -> npt.NDArray[np.integer]:
    """A permutation of range(n) that depends on nothing else than its arguments."""
    # NumPy promises that the raw numbers of a bit generator never change; of Generator.permutation it does not.
    keys = np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(n)
    return np.argsort(keys, kind="stable").astype(np.min_scalar_type(n))
