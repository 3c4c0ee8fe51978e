"""One safetensors file, written and read in rows: hashed as it is written, and synced to disk.

Layout (github.com/huggingface/safetensors): 8 bytes with the header's length, a json header with each tensor's type,
shape and place, then the bytes. `__metadata__` says which rows of the whole tensors these are.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

TYPES = {torch.float32: "F32", torch.float64: "F64", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64"}
ROWS = "rows"
HASHED_AT_ONCE = 2**24


@dataclass(frozen=True)
class Piece:
    """Rows [start, stop) of a tensor whose first dimension is `whole`; a scalar is row 0 of 1."""

    start: int
    stop: int
    whole: int


@dataclass(frozen=True)
class Digest:
    """What identifies a file's contents."""

    bytes: int
    sha256: str


def write_tensors(path: Path, tensors: dict[str, Tensor], pieces: dict[str, Piece]) -> Digest:
    """Write host tensors and wait until the disk has them; the digest of what was meant to be written."""
    # The widest first, so that all lie aligned.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    rows = {name: [pieces[name].start, pieces[name].stop, pieces[name].whole] for name in names}
    header: dict[str, object] = {"__metadata__": {ROWS: json.dumps(rows)}}
    end = 0
    for name in names:
        start, end = end, end + tensors[name].nbytes
        header[name] = {
            "dtype": TYPES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        pieces_of_file: list[Any] = [
            len(text).to_bytes(8, "little"),
            text,
            *(_bytes_of(tensors[name]) for name in names),
        ]
        for piece in pieces_of_file:
            digest.update(piece)
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    return Digest(8 + len(text) + end, digest.hexdigest())


def read_pieces(path: Path) -> dict[str, Piece]:
    """Which rows of which tensors a file has; ValueError where it is not such a file."""
    try:
        with safe_open(path, framework="pt") as file:
            rows = json.loads((file.metadata() or {}).get(ROWS, "{}"))
            return {name: Piece(*rows[name]) for name in file.keys()}  # noqa: SIM118 (not a dictionary)
    except (SafetensorError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None


class Reader:
    """Rows of tensors that are spread over files."""

    def __init__(self, paths: list[Path]) -> None:
        self._places: dict[str, list[tuple[Path, Piece]]] = {}
        for path in paths:
            for name, piece in read_pieces(path).items():
                self._places.setdefault(name, []).append((path, piece))
        self._files = {path: safe_open(path, framework="pt") for path in paths}

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def read(self, name: str) -> Tensor:
        """A whole tensor."""
        (path, piece), *others = self._places[name]
        if not others and piece == Piece(0, piece.whole, piece.whole):
            whole: Tensor = self._files[path].get_tensor(name)
            return whole
        rows = self._files[path].get_slice(name)[:]
        whole = rows.new_empty(piece.whole, *rows.shape[1:])
        self.read_into(whole, name, Piece(0, piece.whole, piece.whole))
        return whole

    @torch.no_grad()
    def read_into(self, target: Tensor, name: str, wanted: Piece) -> None:
        """Fill the rows `wanted` of a tensor; ValueError where they are not all there, or are not of this shape."""
        if target.ndim == 0:
            target.copy_(self.read(name))
            return
        filled = 0
        for path, piece in self._places[name]:
            start, stop = max(wanted.start, piece.start), min(wanted.stop, piece.stop)
            if start >= stop or piece.whole != wanted.whole:
                continue
            rows = self._files[path].get_slice(name)[start - piece.start : stop - piece.start]
            if rows.shape[1:] != target.shape[1:] or rows.dtype != target.dtype:
                raise ValueError(f"{name} has another shape or type in {path}")
            target[start - wanted.start : stop - wanted.start].copy_(rows)
            filled += stop - start
        if filled != wanted.stop - wanted.start:
            raise ValueError(f"rows {wanted.start} to {wanted.stop} of {wanted.whole} of {name} are not all there")


def file_digest(path: Path) -> Digest:
    """The digest of a file that is there."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(HASHED_AT_ONCE):
            digest.update(block)
            size += len(block)
    return Digest(size, digest.hexdigest())


def _bytes_of(tensor: Tensor) -> Any:
    """Without a copy."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
