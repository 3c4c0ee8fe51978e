"""Prepared token shards, and the batches of one rank cut from them.

A split is one long row of token ids, cut into windows of `seq_len + 1` tokens with stride `seq_len` (the last target of
a window is the first input of the next). Sample number g of a training run is

    window permutation(seed, g // n_windows)[g % n_windows]

so the step number alone says what comes next, whatever the world size or the micro-batch size.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch


class Windows:
    """Windows of seq_len + 1 tokens over shards read as one row; a window may straddle shards."""

    def __init__(
        self, shards: list[npt.NDArray[Any]], seq_len: int, *, marks: dict[Path, tuple[int, ...]] | None = None
    ) -> None:
        self.seq_len = seq_len
        self._shards = shards
        self.file_marks = list((marks or {}).items())
        # What has happened to the files since they were opened and checked, once it has been noticed.
        self.trouble: str | None = None
        self._ends = np.cumsum([len(shard) for shard in shards])

    def __len__(self) -> int:
        return int(self._ends[-1] - 1) // self.seq_len

    def read(self, indices: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
        """The windows of these numbers, [n, seq_len + 1]; zeros from the moment at which there is `trouble`."""
        windows = np.zeros((len(indices), self.seq_len + 1), dtype=np.int64)
        # Before: reading beyond the end of a file that was cut ends the process. After: it may have changed meanwhile.
        self.trouble = self.trouble or self._change(indices)
        if self.trouble is None:
            for window, index in zip(windows, indices.tolist(), strict=True):
                if not 0 <= index < len(self):
                    raise IndexError(f"window {index} of {len(self)}")
                self._fill(window, start=index * self.seq_len)
            self.trouble = self._change(indices)
        # What was read from a changed file may be no token at all; zeros are, until the ranks end over `trouble`.
        return np.zeros_like(windows) if self.trouble else windows

    def _change(self, indices: npt.NDArray[np.integer]) -> str | None:
        starts = np.asarray(indices, dtype=np.int64) * self.seq_len
        touched = np.searchsorted(self._ends, np.concatenate([starts, starts + self.seq_len]), side="right")
        for number in np.unique(touched).tolist() if self.file_marks else ():
            path, mark = self.file_marks[number]
            try:
                if file_mark(path) == mark:
                    continue
                what = "has been changed"
            except OSError as error:
                what = f"cannot be read any more ({error.strerror})"
            return f"data.dir: {path} {what} while the run was reading it; restore it and run the same command again"
        return None

    def _fill(self, window: npt.NDArray[np.int64], start: int) -> None:
        filled = 0
        shard = int(np.searchsorted(self._ends, start, side="right"))
        while filled < len(window):
            offset = start + filled - (self._ends[shard] - len(self._shards[shard]))
            piece = self._shards[shard][offset : offset + len(window) - filled]
            window[filled : filled + len(piece)] = piece
            filled += len(piece)
            shard += 1


class TrainBatches:
    """The training batches of one rank; its only state is the step number, which the caller keeps."""

    def __init__(
        self,
        windows: Windows,
        *,
        seed: int,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        assert global_batch_size % (world_size * micro_batch_size) == 0, "see TrainerSettings.check_ranks"
        self._windows = windows
        self._seed = seed
        self._global_batch_size = global_batch_size
        self._micro_batch_size = micro_batch_size
        self._rank = rank
        self._rank_batch_size = global_batch_size // world_size
        self._order: tuple[int, npt.NDArray[np.integer]] = (-1, np.empty(0, dtype=np.uint8))

    def micro_batches(self, step: int) -> Iterator[torch.Tensor]:
        """This rank's part of the global batch of a step, int64 [micro_batch_size, seq_len + 1] at a time."""
        first = step * self._global_batch_size + self._rank * self._rank_batch_size
        for start in range(first, first + self._rank_batch_size, self._micro_batch_size):
            numbers = self._window_numbers(start, self._micro_batch_size)
            yield torch.from_numpy(self._windows.read(numbers))

    @property
    def error(self) -> str | None:
        """What has happened to the files, see `Windows`."""
        return self._windows.trouble

    def epoch(self, step: int) -> float:
        """Passes over the data that are complete when a step begins."""
        return step * self._global_batch_size / len(self._windows)

    def _window_numbers(self, first: int, count: int) -> npt.NDArray[np.integer]:
        pieces = []
        while count > 0:
            epoch, position = divmod(first, len(self._windows))
            pieces.append(self._epoch_order(epoch)[position : position + count])
            first += len(pieces[-1])
            count -= len(pieces[-1])
        return np.concatenate(pieces)

    def _epoch_order(self, epoch: int) -> npt.NDArray[np.integer]:
        if self._order[0] != epoch:
            self._order = (epoch, permutation(len(self._windows), seed=self._seed, epoch=epoch))
        return self._order[1]


class EvalBatches:
    """A fixed, evenly spaced set of windows, the same for every world size; each rank yields equally many batches."""

    def __init__(
        self, windows: Windows, *, n_sequences: int, micro_batch_size: int, rank: int = 0, world_size: int = 1
    ) -> None:
        self.n_sequences = min(n_sequences, len(windows))
        self._windows = windows
        self._micro_batch_size = micro_batch_size
        chosen = np.arange(self.n_sequences) * len(windows) // self.n_sequences
        # Under FSDP every rank must run equally many forwards: the rest is padded with a window that weighs nothing.
        padded = -self.n_sequences % (world_size * micro_batch_size)
        indices = np.concatenate([chosen, np.zeros(padded, dtype=chosen.dtype)])
        weights = np.concatenate([np.ones(self.n_sequences, np.float32), np.zeros(padded, np.float32)])
        self._indices = np.split(indices, world_size)[rank]
        self._weights = np.split(weights, world_size)[rank]

    @property
    def error(self) -> str | None:
        """What has happened to the files, see `Windows`."""
        return self._windows.trouble

    def __len__(self) -> int:
        return len(self._indices) // self._micro_batch_size

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for start in range(0, len(self._indices), self._micro_batch_size):
            rows = slice(start, start + self._micro_batch_size)
            tokens = self._windows.read(self._indices[rows])
            yield torch.from_numpy(tokens), torch.from_numpy(self._weights[rows].copy())


def file_mark(path: Path) -> tuple[int, ...]:
    """What tells a file from another one, and from itself after it was written to."""
    seen = path.stat()
    return seen.st_dev, seen.st_ino, seen.st_size, seen.st_mtime_ns


def permutation(n: int, *, seed: int, epoch: int) -> npt.NDArray[np.integer]:
    """A permutation of range(n) that depends on nothing else than its arguments."""
    # NumPy promises that the raw numbers of a bit generator never change; of Generator.permutation it does not.
    keys = np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(n)
    return np.argsort(keys, kind="stable").astype(np.min_scalar_type(n))
