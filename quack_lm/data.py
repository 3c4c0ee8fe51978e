"""Prepared token shards, and the batches of one rank cut from them.

A split is one long row of token ids, cut into windows of `seq_len + 1` tokens with stride `seq_len` (the last target of
a window is the first input of the next). Sample number g of a training run is

    window permutation(seed, g // n_windows)[g % n_windows]

so the step number alone says what comes next, whatever the world size or the micro-batch size.
"""

import hashlib
import json
import os
import shlex
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import numpy.typing as npt
import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError, model_validator

from quack_lm.errors import UserError
from quack_lm.files import open_regular

FORMAT_VERSION: Literal[1] = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer"
HASHING_THREADS = 8

# A manifest may come from somebody else: its names stay inside the directory.
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_\-][A-Za-z0-9_.\-]*$")]
Count = Annotated[int, Field(gt=0, lt=2**63)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
SplitName = Literal["train", "val", "probe"]
SPLITS: tuple[SplitName, ...] = ("train", "val", "probe")


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


class Shard(_Strict):
    """One file of raw little-endian token ids."""

    file: FileName
    tokens: Count
    sha256: Sha256


class Split(_Strict):
    """The shards of one split, in order."""

    tokens: Count
    documents: Count
    shards: list[Shard]

    @model_validator(mode="after")
    def _counts_agree(self) -> Self:
        if self.tokens != sum(shard.tokens for shard in self.shards):
            raise ValueError("tokens is not the sum of its shards' tokens")
        return self


class Splits(_Strict):
    """Disjoint by document."""

    train: Split
    val: Split
    probe: Split

    @model_validator(mode="after")
    def _files_are_distinct(self) -> Self:
        names = [shard.file for split in (self.train, self.val, self.probe) for shard in split.shards]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"{min(twice)} is listed twice")
        return self


class TokenizerFiles(_Strict):
    """Which tokenizer made the ids, and the files of its copy in `tokenizer/`."""

    name: str
    files: Annotated[dict[FileName, Sha256], Field(min_length=1)]


class Manifest(_Strict):
    """What a prepared data set contains; `unigram_entropy` is that of the train split, in nats per token."""

    format_version: Literal[1]
    vocab_size: PositiveInt
    eot_id: NonNegativeInt
    dtype: Literal["uint16", "uint32"]
    unigram_entropy: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    tokenizer: TokenizerFiles
    splits: Splits
    source: dict[str, Any]

    @model_validator(mode="after")
    def _ids_fit(self) -> Self:
        if self.eot_id >= self.vocab_size:
            raise ValueError("eot_id is not below vocab_size")
        if self.vocab_size > 2 ** (8 * self.token_dtype.itemsize):
            raise ValueError("dtype is too small for vocab_size")
        return self

    @property
    def token_dtype(self) -> np.dtype[Any]:
        """How ids lie in the shards, on any machine."""
        return np.dtype(self.dtype).newbyteorder("<")

    def split(self, name: SplitName) -> Split:
        """The split of this name."""
        split: Split = getattr(self.splits, name)
        return split


@dataclass(frozen=True)
class TokenData:
    """A prepared data set whose files have been checked against its manifest."""

    directory: Path
    manifest: Manifest
    manifest_sha256: str

    @classmethod
    def open(cls, directory: Path, *, verify_checksums: bool = True) -> Self:
        """Read and check a data set; without checksums, shards are still checked for their size."""
        manifest, digest = read_manifest(directory)
        _check_tokenizer(directory, manifest)
        _check_shards(directory, manifest, verify_checksums=verify_checksums)
        return cls(directory, manifest, digest)

    @property
    def n_bytes(self) -> int:
        """Of all shards."""
        return sum(self.manifest.split(name).tokens for name in SPLITS) * self.manifest.token_dtype.itemsize

    def windows(self, split: SplitName, seq_len: int) -> "Windows":
        """The windows of a split, memory-mapped."""
        tokens = self.manifest.split(split).tokens
        if tokens < seq_len + 1:
            raise UserError(
                f"trainer.seq_len={seq_len} is too long for the {split} split of {self.directory}, which has {tokens} "
                f"tokens: set trainer.seq_len to at most {tokens - 1} or prepare more data"
            )
        shards = self.manifest.split(split).shards
        paths = [self.directory / shard.file for shard in shards]
        # First what the file is, then its bytes: a change in between is seen.
        marks = [_mark(path) for path in paths]
        mapped = [np.memmap(path, dtype=self.manifest.token_dtype, mode="r") for path in paths]
        return Windows(list(mapped), seq_len, marks=dict(zip(paths, marks, strict=True)))


class Windows:
    """Windows of seq_len + 1 tokens over shards read as one row; a window may straddle shards."""

    def __init__(
        self, shards: list[npt.NDArray[Any]], seq_len: int, *, marks: dict[Path, tuple[int, ...]] | None = None
    ) -> None:
        self.seq_len = seq_len
        self._shards = shards
        self._marks = list((marks or {}).items())
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
        for number in np.unique(touched).tolist() if self._marks else ():
            path, mark = self._marks[number]
            try:
                if _mark(path) == mark:
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
        if global_batch_size % (world_size * micro_batch_size):
            raise UserError(
                f"trainer.global_batch_size={global_batch_size} must be a multiple of the number of ranks x "
                f"trainer.micro_batch_size = {world_size} x {micro_batch_size}"
            )
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
    def trouble(self) -> str | None:
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
    def trouble(self) -> str | None:
        """What has happened to the files, see `Windows`."""
        return self._windows.trouble

    def __len__(self) -> int:
        return len(self._indices) // self._micro_batch_size

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for start in range(0, len(self._indices), self._micro_batch_size):
            rows = slice(start, start + self._micro_batch_size)
            tokens = self._windows.read(self._indices[rows])
            yield torch.from_numpy(tokens), torch.from_numpy(self._weights[rows].copy())


def _mark(path: Path) -> tuple[int, ...]:
    """What tells a file from another one, and from itself after it was written to."""
    seen = path.stat()
    return seen.st_dev, seen.st_ino, seen.st_size, seen.st_mtime_ns


def permutation(n: int, *, seed: int, epoch: int) -> npt.NDArray[np.integer]:
    """A permutation of range(n) that depends on nothing else than its arguments."""
    # NumPy promises that the raw numbers of a bit generator never change; of Generator.permutation it does not.
    keys = np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(n)
    return np.argsort(keys, kind="stable").astype(np.min_scalar_type(n))


def read_manifest(directory: Path) -> tuple[Manifest, str]:
    """The checked manifest of a data set and the sha256 of its file."""
    path = directory / MANIFEST
    try:
        _refuse_link_out(directory, path)
        with open_regular(path, "rb") as file:
            raw = file.read()
    except FileNotFoundError:
        raise UserError(f"data.dir: no data set in {directory} ({path} is missing): {_mend(directory)}") from None
    except OSError as error:
        raise UserError(f"data.dir: cannot read {path} ({error.strerror}): {_mend(directory)}") from None
    try:
        manifest = Manifest.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise _damaged(directory, path, f"{where}: {first['msg']}" if where else first["msg"]) from None
    return manifest, hashlib.sha256(raw).hexdigest()


def file_sha256(path: Path) -> str:
    """The sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_tokenizer(directory: Path, manifest: Manifest) -> None:
    folder = directory / TOKENIZER
    expected = manifest.tokenizer.files
    present = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    for name in sorted(expected.keys() | present):
        if name not in present:
            raise _damaged(directory, folder / name, "the file is missing")
        if name not in expected:
            raise _damaged(directory, folder / name, "the manifest does not know this file")
        _refuse_link_out(directory, folder / name)
        if not (folder / name).is_file() or file_sha256(folder / name) != expected[name]:
            raise _damaged(directory, folder / name, "its sha256 is not that of the manifest")


def _check_shards(directory: Path, manifest: Manifest, *, verify_checksums: bool) -> None:
    shards = [shard for split in SPLITS for shard in manifest.split(split).shards]
    for shard in shards:
        path = directory / shard.file
        size = shard.tokens * manifest.token_dtype.itemsize
        _refuse_link_out(directory, path)
        if not path.is_file():
            raise _damaged(directory, path, "the shard is missing")
        if path.stat().st_size != size:
            raise _damaged(directory, path, f"it has {path.stat().st_size} bytes, the manifest says {size}")
    if not verify_checksums:
        return
    with ThreadPoolExecutor(HASHING_THREADS) as threads:
        digests = threads.map(lambda shard: file_sha256(directory / shard.file), shards)
        for shard, digest in zip(shards, digests, strict=True):
            if digest != shard.sha256:
                raise _damaged(directory, directory / shard.file, "its sha256 is not that of the manifest")
            tokens = np.memmap(directory / shard.file, dtype=manifest.token_dtype, mode="r")
            if tokens.max() >= manifest.vocab_size:
                raise _damaged(directory, directory / shard.file, "it has tokens beyond the vocabulary")


def _refuse_link_out(directory: Path, path: Path) -> None:
    """A data set from a stranger reads no file but its own; the directory itself may be reached through a link."""
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(directory)):
        raise _damaged(directory, path, "it is a link to a file outside of the data set")
    if path.exists() and not path.is_file() and not path.is_dir():
        raise _damaged(directory, path, "it is no ordinary file")


def _damaged(directory: Path, path: Path, what: str) -> UserError:
    return UserError(f"data.dir: {path} is damaged or foreign: {what}: remove {directory} and {_mend(directory)}")


def _mend(directory: Path) -> str:
    override = shlex.quote(f"data.dir={directory}")
    return f"make it with `python scripts/prepare_data.py` and the same data settings ({override})"


def manifest_json(manifest: Manifest) -> str:
    """The manifest as it is written to disk."""
    return json.dumps(manifest.model_dump(), indent=2) + "\n"
