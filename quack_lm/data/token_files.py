"""Files of tokens that other programs have made, read in place, and where documents end in them.

    FILE.bin with FILE.idx      Megatron-LM (megatron/core/datasets/indexed_dataset.py): the index has the type of the
                                tokens, and the lengths of sequences and documents
    FILE.ds with FILE.ds.index  datatrove (pipeline/tokens/tokenizer.py): the index has the ends of documents, uint64
    FILE.bin with a header      llm.c, modded-nanogpt: 256 int32, of which the first are a magic number, a version and
                                the number of tokens
    FILE.npy with a header      NumPy's own format
    any other                   nothing but tokens: nanoGPT's .bin, and OLMo's .npy, which is no NumPy file

A file is taken for what it begins with and what lies beside it. Where there is no index, documents end at a token.
"""

import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from quack_lm.errors import UserError

WINDOW = 1 << 20  # tokens that are read at once
LONGEST = 1 << 26  # tokens of a document
LOOKED_AT = 1 << 16  # tokens by which their type is checked

MEGATRON_MAGIC = b"MMIDIDX\x00\x00"
MEGATRON_TYPES = {1: "uint8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
LLM_C_TYPES = {20240520: "uint16", 20240801: "uint32"}  # by the magic number: GPT-2's and Llama 3's tokens
LLM_C_BYTES = 256 * 4
NUMPY_MAGIC = b"\x93NUMPY"


@dataclass(frozen=True)
class TokenFile:
    """Tokens [n], memory-mapped, and the places [m] behind the last token of each document, where an index has them."""

    path: Path
    kind: str
    tokens: npt.NDArray[Any]
    ends: npt.NDArray[np.int64]

    def documents(
        self, eot_id: int, start: int, *, longest: int | None = None
    ) -> Iterator[tuple[list[npt.NDArray[Any]], int]]:
        """The tokens of the documents from a place on, without `eot_id`, some at a time, and the place behind them.

        A document ends at `eot_id`, where the index says so, and after the `longest` number of tokens. The places are
        those from which to continue.
        """
        size = WINDOW
        while start < len(self.tokens):
            window = np.asarray(self.tokens[start : start + size])
            is_last = start + size >= len(self.tokens)
            pieces, taken = self._cut(window, start, eot_id, longest, is_last=is_last)
            if not taken:  # a document longer than the window
                if size >= LONGEST:
                    raise UserError(
                        f"data.files: {self.path} ({self.kind}) has no token {eot_id} in the {size:,} from {start:,} "
                        "on: correct data.eot_id or data.dtype, or end documents anyway with data.document_tokens"
                    )
                size *= 2
                continue
            yield pieces, start + taken
            start, size = start + taken, WINDOW

    def _cut(
        self, window: npt.NDArray[Any], start: int, eot_id: int, longest: int | None, *, is_last: bool
    ) -> tuple[list[npt.NDArray[Any]], int]:
        """The documents that are complete in a window, and how many of its tokens they and their ends are."""
        eots = np.flatnonzero(window == eot_id)
        first, last = np.searchsorted(self.ends, (start, start + len(window)), side="right")
        ends = self.ends[first:last] - start
        # Of each document where its tokens end, and where the next begins.
        stops = np.concatenate([eots, ends, [len(window)] * is_last]).astype(np.int64)
        nexts = np.concatenate([eots + 1, ends, [len(window)] * is_last]).astype(np.int64)
        order = np.argsort(stops, kind="stable")
        pieces, begin = [], 0
        for stop, following in zip(stops[order].tolist(), nexts[order].tolist(), strict=True):
            step = longest or max(1, stop - begin)
            pieces += [window[i : min(i + step, stop)] for i in range(begin, stop, step)]
            begin = max(begin, following)
        if longest:  # of a document that is not complete
            whole = begin + (len(window) - begin) // longest * longest
            pieces += [window[i : i + longest] for i in range(begin, whole, longest)]
            begin = whole
        return pieces, begin


def open_token_file(path: Path, raw_dtype: str) -> TokenFile:
    """A file of tokens of any of the kinds; `raw_dtype` is the type of those that do not say it.

    UserError where a file does not have what its header or its index says.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(12)
    magic, _, count = np.frombuffer(start.ljust(12, b"\0"), "<i4").tolist()
    if (index := path.with_suffix(".idx")).is_file() and path.suffix == ".bin":
        return _megatron(path, index)
    if (index := path.with_name(path.name + ".index")).is_file():
        ends = _read(index, "<u8").astype(np.int64)
        total = int(ends[-1]) if len(ends) else 0
        dtype = next((d for d in map(np.dtype, ("<u2", "<u4")) if d.itemsize * total == size), None)
        if dtype is None or (ends < 0).any() or (np.diff(ends) < 0).any():
            raise _odd(path, f"it has {size} bytes, and by {index.name} {total} tokens, of 2 or 4 bytes each")
        return TokenFile(path, "datatrove", _map(path, dtype, 0), ends)
    if start.startswith(NUMPY_MAGIC):
        try:
            array = np.lib.format.open_memmap(path, mode="r")
        # NumPy parses the header as an expression of Python, some with `tokenize`.
        except (ValueError, TypeError, OverflowError, SyntaxError, tokenize.TokenError) as error:
            raise _odd(path, str(error)) from None
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise _odd(path, f"it is an array of {array.dtype} {list(array.shape)}, and not one row of integers")
        return TokenFile(path, "NumPy", array, _NO_ENDS)
    if magic in LLM_C_TYPES and size >= LLM_C_BYTES:
        header_dtype = np.dtype(LLM_C_TYPES[magic]).newbyteorder("<")
        if size != LLM_C_BYTES + count * header_dtype.itemsize:
            raise _odd(path, f"it has {size} bytes, and by its header {count} tokens of {header_dtype.itemsize} bytes")
        return TokenFile(path, "llm.c", _map(path, header_dtype, LLM_C_BYTES), _NO_ENDS)
    raw = np.dtype(raw_dtype).newbyteorder("<")
    if size % raw.itemsize:
        raise _odd(path, f"its {size} bytes are not a whole number of {raw_dtype}: set data.dtype")
    return TokenFile(path, "bare tokens", _map(path, raw, 0), _NO_ENDS)


def refuse_wider_numbers(file: TokenFile) -> None:
    """UserError where bare numbers of 2 bytes look like halves or quarters of wider ones: the others are all zero."""
    start = np.asarray(file.tokens[:LOOKED_AT])
    if file.kind != "bare tokens" or start.dtype.itemsize != 2 or len(start) < 8 or not start[::4].any():
        return
    if not start[1::2].any():
        wider = "uint32" if start[2::4].any() else "int64"
        raise UserError(
            f"data.files: every second number of {file.path} is 0, as if its numbers were {wider} and not uint16: set "
            f"data.dtype={wider}, or data.dtype=uint16 if they are right"
        )


_NO_ENDS: npt.NDArray[np.int64] = np.empty(0, dtype=np.int64)


def _megatron(path: Path, index: Path) -> TokenFile:
    with index.open("rb") as file:
        header = file.read(34)
    if header[:9] != MEGATRON_MAGIC or len(header) < 34:
        raise _odd(path, f"{index.name} beside it is no index of Megatron's")
    version, kind = int.from_bytes(header[9:17], "little"), header[17]
    n_sequences, n_documents = (int.from_bytes(header[i : i + 8], "little") for i in (18, 26))
    if version != 1 or kind not in MEGATRON_TYPES:
        raise _odd(path, f"{index.name} beside it has version {version} and type {kind}, which are not known")
    dtype = np.dtype(MEGATRON_TYPES[kind]).newbyteorder("<")
    # The lengths of sequences, int32; their first bytes, int64; the numbers of documents' first sequences, int64.
    if index.stat().st_size < 34 + 12 * n_sequences + 8 * n_documents:
        raise _odd(path, f"{index.name} beside it is shorter than its header says")
    lengths = np.fromfile(index, "<i4", n_sequences, offset=34).astype(np.int64)
    pointers = np.fromfile(index, "<i8", n_sequences, offset=34 + 4 * n_sequences)
    documents = np.fromfile(index, "<i8", n_documents, offset=34 + 12 * n_sequences)
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    if (lengths < 0).any() or (pointers != bounds[:-1] * dtype.itemsize).any():
        raise _odd(path, f"{index.name} beside it does not list its sequences one after the other")
    if path.stat().st_size != bounds[-1] * dtype.itemsize:
        raise _odd(path, f"it has {path.stat().st_size} bytes, and by {index.name} {bounds[-1]} tokens of {dtype}")
    if ((documents < 0) | (documents > n_sequences)).any() or (np.diff(documents) < 0).any():
        raise _odd(path, f"{index.name} beside it has documents of sequences that there are not")
    return TokenFile(path, "Megatron", _map(path, dtype, 0), bounds[documents])


def _map(path: Path, dtype: np.dtype[Any], offset: int) -> npt.NDArray[Any]:
    if path.stat().st_size <= offset:  # which cannot be mapped
        return np.empty(0, dtype)
    return np.memmap(path, dtype, mode="r", offset=offset)


def _read(path: Path, dtype: str) -> npt.NDArray[Any]:
    if path.stat().st_size % np.dtype(dtype).itemsize:
        raise _odd(path, f"its size is not a whole number of {np.dtype(dtype)}")
    return np.fromfile(path, dtype)


def _odd(path: Path, what: str) -> UserError:
    return UserError(f"data.files: {path} cannot be read: {what}; copy or make the file again")
