"""Where the text comes from: the `data` section of a config, and the documents of each kind of source.

Training imports this module for the settings alone, so the libraries that read documents are imported where they are
used. `quack_lm.data.prepare` makes token shards of the documents.
"""

import contextlib
import dataclasses
import glob
import hashlib
import os
import sysconfig
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, PositiveInt

from quack_lm.data.documents import (
    BLANK_LINES,
    LINES,
    Format,
    Row,
    field_of,
    find_separator,
    format_note,
    format_of_name,
    is_split_by,
    read_files,
    read_start,
    text_error,
)
from quack_lm.data.manifest import SplitName
from quack_lm.errors import UserError
from quack_lm.files import relative_note

if TYPE_CHECKING:
    from datasets import IterableDataset

Fraction = Annotated[float, Field(gt=0, lt=1)]

# What is read of text files, all together, to find out what separates documents in them.
LOOK_BYTES, LOOK_FILES = 1 << 26, 64

# Settings that do not change what is prepared.
NOT_PREPARED = ("dir", "workers", "mask_documents", "verify_checksums")


# ------------------------------------------------------------------------------------------------ settings


@dataclass(frozen=True, kw_only=True)
class Corpus(ABC):
    """The settings that every source of text has: its tokenizer, its splits, and how training reads it.

    Args:
        dir: directory of the token shards.
        vocab_size: size of the vocabulary.
        tokenizer: a transformers tokenizer, as a directory or hub name; null: train a byte-level BPE on the text.
        val_fraction: share of the documents in the validation split.
        probe_fraction: share of the documents in the split that the logit probe reads.
        shard_tokens: tokens in a file of the data set.
        workers: processes that encode text; 0 or 1: this process, with threads.
        eot_token: token after each document.
        tokenizer_characters: characters of text on which a tokenizer is trained at most.
        mask_documents: whether attention stays within a document.
        verify_checksums: whether each start of a run reads all shards and compares their checksums.
    """

    choice: ClassVar[str]  # the `data=` that makes one

    dir: str
    # The library that trains a tokenizer allocates all of it at once.
    vocab_size: Annotated[int, Field(gt=0, le=10_000_000)]
    tokenizer: str | None
    val_fraction: Fraction
    probe_fraction: Fraction
    shard_tokens: PositiveInt
    workers: Annotated[int, Field(ge=0, le=1024)]
    eot_token: str = "<|endoftext|>"
    # A tokenizer of this size learns nothing more from text beyond this.
    tokenizer_characters: PositiveInt = 1_000_000_000
    mask_documents: bool = False
    verify_checksums: bool = True

    def __post_init__(self) -> None:
        # A shell leaves a quoted ~ as it is. The key is no part of what a data set is identified by.
        object.__setattr__(self, "dir", os.path.expanduser(self.dir))
        if self.val_fraction + self.probe_fraction >= 1:
            raise UserError(
                f"data.val_fraction={self.val_fraction} and data.probe_fraction={self.probe_fraction} leave nothing to "
                "train on: their sum must be below 1"
            )

    @abstractmethod
    def stream(self) -> "IterableDataset":
        """The documents in a fixed order, each {"text": ...}, with a position that can be saved and restored."""

    @abstractmethod
    def input_files(self) -> list[Path]:
        """The local files that the documents come from."""

    @property
    def skips_bad_records(self) -> bool:
        """Whether records that cannot be used are left out, and counted; else they are errors."""
        return False

    @property
    def more_documents(self) -> str:
        """What helps a corpus that has too few documents."""
        return "add documents"

    def notes(self) -> list[str]:
        """What the settings left open, and was chosen for these files: a line each.

        UserError where a setting says what is in none of the files.
        """
        return []

    def source(self, file: int | None = None) -> str:
        """The keys that say where the text comes from, for messages: from all files, or from that of a number."""
        files = [str(path) for path in self.input_files()]
        if file is not None:
            files = files[file : file + 1] or files
        return "data.files: " + ", ".join(files[:3]) + (f" and {len(files) - 3} more" if len(files) > 3 else "")

    def split_of(self, text: str) -> SplitName:
        """The split of a document: a function of its text, so that equal documents share a split."""
        number = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) / 2**64
        if number < self.val_fraction:
            return "val"
        return "probe" if number < self.val_fraction + self.probe_fraction else "train"

    def settings(self) -> dict[str, Any]:
        """What decides the contents of the data set."""
        values = {key: value for key, value in dataclasses.asdict(self).items() if key not in NOT_PREPARED}
        return {"corpus": type(self).__name__, **values}


@dataclass(frozen=True, kw_only=True)
class StdlibCorpus(Corpus):
    """The source of Python's own standard library, without its tests: real text wherever Python is."""

    choice = "stdlib"

    def input_files(self) -> list[Path]:
        left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
        paths: list[Path] = []
        for directory, folders, names in os.walk(sysconfig.get_paths()["stdlib"]):
            folders[:] = set(folders) - left_out
            paths += [Path(directory, name) for name in names if name.endswith(".py")]
        return sorted(path for path in paths if path.is_file())

    def source(self, file: int | None = None) -> str:
        return f"the standard library in {sysconfig.get_paths()['stdlib']}"

    def stream(self) -> "IterableDataset":
        return _stream_files(_decodable_documents, self.input_files())


@dataclass(frozen=True, kw_only=True)
class RecordCorpus(Corpus):
    """Text in records that others wrote, some of which may be damaged.

    Args:
        on_bad_record: what a record that is damaged, or has something other than text, does: error ends the
            preparation, skip leaves the record out and counts it.
    """

    on_bad_record: Literal["error", "skip"] = "error"

    @property
    def skips_bad_records(self) -> bool:
        return self.on_bad_record == "skip"


@dataclass(frozen=True, kw_only=True)
class LocalCorpus(RecordCorpus):
    """The user's files: text (a document is a file, or a part of one), or jsonl or parquet (a document is a row).

    Args:
        files: paths or globs; ** crosses directories.
        format: kind of the files: in text a document is a file, in jsonl and parquet a row.
        text_field: column that has the text; doc.text is the field text of the column doc.
        separator: what ends a document inside of a text file: blank_lines, or any text, in which \\n is a line break;
            null: only the end of the file. auto: eot_token where the files have it at the ends of documents; else null
            for three files or more, and for fewer, which could not fill the three splits, blank lines or line breaks.
    """

    choice = "local"

    files: Annotated[list[str], Field(min_length=1)]
    format: Format
    text_field: str = "text"
    separator: Annotated[str, Field(min_length=1)] | None = "auto"

    def input_files(self) -> list[Path]:
        paths = _resolve_files(self.files)
        named = {name: path for path in paths if (name := format_of_name(path))}
        # Text may be named like jsonl, and jsonl like text, but nothing else is like parquet.
        if "parquet" in named and len(named) > 1:
            (_, parquet), (other, path) = sorted(named.items(), key=lambda item: item[0] != "parquet")[:2]
            raise UserError(
                f"data.files: {parquet} is parquet and {path} is {other} by its name: give files of one format, or "
                "convert them to one"
            )
        if self.format == "text":
            formats = {format_of_name(path) if path.suffix != ".json" else None for path in paths}
            if formats <= {"jsonl", "parquet"}:
                raise UserError(
                    f"data.format=text: {paths[0]} is {format_of_name(paths[0])} by its name, and each file would be "
                    f"one document: set data.format={format_of_name(paths[0])}"
                )
        return paths

    def stream(self) -> "IterableDataset":
        paths = self.input_files()
        separator = self._found_separator(paths)[0] if self.format == "text" else None
        settings = {"format": self.format, "text_field": self.text_field, "separator": separator}
        return _stream_files(read_files, paths, **settings)

    @property
    def more_documents(self) -> str:
        is_text = self.format == "text"
        return super().more_documents + (", or say where they end in a file (data.separator)" if is_text else "")

    def notes(self) -> list[str]:
        if self.format != "text" or self.separator is None:
            return []
        if self.separator != "auto":
            self._require_separator(self.separator)
            return []
        separator, n_unused = self._found_separator(self.input_files())
        names = {BLANK_LINES: "blank lines", LINES: "line breaks"}
        ends = f"documents end at {names.get(separator, separator)}" if separator else "each file is a document"
        unused = f"; {self.eot_token} is in them {n_unused} times, but seems not to end documents" if n_unused else ""
        return [f"{self.source()}: {ends} (data.separator=auto){unused}"]

    def source(self, file: int | None = None) -> str:
        return super().source(file) + (format_note(self.input_files()[file], self.format) if file is not None else "")

    def _require_separator(self, separator: str) -> None:
        for number, path in enumerate(self.input_files()):
            with input_errors(partial(self.source, number)):
                if is_split_by(path, _without_escapes(separator)):
                    return
        raise UserError(
            f"data.separator='{separator}' occurs in none of {self.source()}; correct it, or set "
            "data.separator=null to make each file a document"
        )

    def _found_separator(self, paths: list[Path]) -> tuple[str | None, int]:
        """(what ends documents inside of text files, how often eot_token was seen where it does not end them)."""
        if self.separator != "auto":
            return self.separator and _without_escapes(self.separator), 0
        starts = []
        some = range(0, len(paths), -(-len(paths) // LOOK_FILES))
        for number in some:
            with input_errors(partial(self.source, number)):
                starts.append(read_start(paths[number], LOOK_BYTES // len(some)))
        separator = find_separator(starts, self.eot_token, n_files=len(paths))
        seen = sum(start.count(self.eot_token.encode()) for start in starts)
        return separator, 0 if separator == self.eot_token else seen


@dataclass(frozen=True, kw_only=True)
class HubCorpus(RecordCorpus):
    """A data set of the Hugging Face hub, or local parquet or jsonl files of the same columns in its place.

    Args:
        name: owner/name of the data set on the hub.
        subset: its configuration; null: the default one.
        split: its split.
        text_field: column that has the text; doc.text is the field text of the column doc.
        streaming: read it from the hub as it is needed; false: download it first.
        files: local parquet or jsonl files to read in its place.
    """

    choice = "cosmopedia_v2"

    # owner/name: a bare name would be one of the loaders that `datasets` ships, pickles among them.
    name: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")]
    subset: str | None
    split: str
    text_field: str
    streaming: bool
    files: list[str] = dataclasses.field(default_factory=list)

    def input_files(self) -> list[Path]:
        return _resolve_files(self.files)

    def stream(self) -> "IterableDataset":
        if self.files:
            paths = self.input_files()
            if unknown := [path for path in paths if format_of_name(path) not in ("jsonl", "parquet")]:
                raise UserError(f"data.files: {unknown[0]} is neither .parquet nor .jsonl")
            return _stream_files(read_files, paths, format=None, text_field=self.text_field, separator=None)
        with input_errors(self.source):
            return _select_text(self._hub_stream(), self.text_field)

    def source(self, file: int | None = None) -> str:
        if self.files:
            return super().source(file)
        return f"data.name={self.name} data.subset={self.subset} data.split={self.split}"

    def _hub_stream(self) -> "IterableDataset":
        import datasets
        import huggingface_hub

        # What is not streamed may be in the cache, and HF_HUB_OFFLINE says to look nowhere else.
        if self.streaming or not huggingface_hub.constants.is_offline_mode():
            require_hub(f"data.name={self.name}")
        loaded = datasets.load_dataset(self.name, self.subset, split=self.split, streaming=self.streaming)
        return loaded if self.streaming else loaded.to_iterable_dataset()


# ------------------------------------------------------------------------------------------------ reading


def _without_escapes(separator: str) -> str:
    for escape, meaning in (("\\r\\n", "\n"), ("\r\n", "\n"), ("\\n", "\n"), ("\\t", "\t")):
        separator = separator.replace(escape, meaning)
    return separator


def _resolve_files(patterns: list[str]) -> list[Path]:
    paths: dict[str, str] = {}
    for pattern in patterns:
        pattern = os.path.expanduser(pattern)
        found = [pattern] if os.path.isfile(pattern) else glob.glob(pattern, recursive=True)
        files = [os.path.abspath(path) for path in found if os.path.isfile(path)]
        if not files:
            raise UserError(
                f"data.files: {pattern} matches no file{relative_note(pattern)}; give existing paths or globs"
            )
        # Links may lead to a directory many times: each file is read once, under the first of its names.
        for path in sorted(files):
            paths.setdefault(os.path.realpath(path), path)
    return [Path(path) for path in sorted(paths.values())]


def _stream_files(documents: Callable[..., Iterator[Row]], paths: list[Path], **settings: Any) -> "IterableDataset":
    import datasets

    # A list of arguments is a list of shards to datasets, so that a saved position is a file and not a count.
    arguments = {"paths": [str(path) for path in paths], **settings}
    return datasets.IterableDataset.from_generator(documents, gen_kwargs=arguments)


def _decodable_documents(paths: list[str]) -> Iterator[Row]:
    for path in paths:
        with contextlib.suppress(UnicodeDecodeError):
            yield {"text": Path(path).read_bytes().decode(), "error": None}


def _select_text(stream: "IterableDataset", text_field: str) -> "IterableDataset":
    columns = stream.column_names or list(next(iter(stream)))
    root, *inner = [text_field] if text_field in columns else text_field.split(".")
    if root not in columns:
        raise UserError(f"data.text_field={text_field}: no such column; the columns are {', '.join(columns) or 'none'}")
    # Columns are dropped before rows become Python objects, which is where the time goes.
    stream = stream.select_columns([root])
    if inner:
        stream = stream.map(lambda row: {"text": field_of(row, text_field)})
        return stream.select_columns(["text"])
    return stream if root == "text" else stream.rename_column(root, "text")


@contextlib.contextmanager
def input_errors(source: Callable[[], str], *, problem: str = "cannot read it") -> Iterator[None]:
    """Turn whatever libraries raise over unreadable input into a UserError that names the input."""
    try:
        yield
    except UserError:
        raise
    # Broken archives raise EOFError or what their module defines, and so on.
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # that of libraries in Rust
            raise
        silent = "no documents in it" if isinstance(error, StopIteration) else type(error).__name__
        lines = str(error).strip().splitlines() or [silent]
        raise UserError(f"{source()}: {problem}: {lines[0]}") from error


def require_hub(what: str) -> None:
    """Ask once whether the hub can be reached; the libraries themselves try for a minute, with a page of warnings."""
    import huggingface_hub

    if huggingface_hub.constants.is_offline_mode():
        raise UserError(f"{what}: the hub is switched off by HF_HUB_OFFLINE: unset it, or use local files")
    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=10)
    # Which HTTP library is inside, and so what it raises, differs between versions of huggingface_hub.
    except Exception as error:
        raise UserError(
            f"{what}: no connection to the hub ({error}): connect this machine, or use local copies "
            "(data.files=[...], data.tokenizer=DIRECTORY)"
        ) from error


def read_texts(corpus: Corpus, stream: "IterableDataset") -> Iterator[tuple[str, str | None]]:
    """(the text of each row, "" where it has none; what is wrong with a record that `on_bad_record` leaves out)."""
    with input_errors(lambda: corpus.source(_file_at(stream))):
        for row in stream:
            text, error = row["text"], row.get("error")
            # The rows of a hub are checked here, and those of files where they are read, which knows where they are.
            if error is None and "error" not in row and (found := text_error(text)):
                error = f"{corpus.source()}: {found}"
            if error is not None and not corpus.skips_bad_records:
                raise UserError(f"{error}; correct it, or leave such records out with data.on_bad_record=skip")
            yield ("" if error is not None or not text or text.isspace() else text), error


def _file_at(stream: "IterableDataset") -> int | None:
    """The number of the file that a stream is in, where its position tells: None for what has no files."""
    state: Any = stream.state_dict()
    while isinstance(state, dict) and "shard_idx" not in state:
        state = state.get("examples_iterable")
    return state["shard_idx"] if state else None
