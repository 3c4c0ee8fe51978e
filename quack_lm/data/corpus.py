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
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, PositiveInt

from quack_lm.data.manifest import SplitName
from quack_lm.errors import UserError
from quack_lm.files import relative_note

if TYPE_CHECKING:
    from datasets import IterableDataset

Fraction = Annotated[float, Field(gt=0, lt=1)]

# Settings that do not change what is prepared.
NOT_IDENTITY = ("dir", "workers", "mask_documents", "verify_checksums")


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
        values = {key: value for key, value in dataclasses.asdict(self).items() if key not in NOT_IDENTITY}
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
class LocalCorpus(Corpus):
    """The user's files: text (a document is a file), or jsonl or parquet (a document is a row).

    Args:
        files: paths or globs; ** crosses directories.
        format: kind of the files: in text a document is a file, in jsonl and parquet a row.
        text_field: column that has the text.
    """

    choice = "local"

    files: Annotated[list[str], Field(min_length=1)]
    format: Literal["text", "jsonl", "parquet"]
    text_field: str = "text"

    def input_files(self) -> list[Path]:
        return _resolve_files(self.files)

    def stream(self) -> "IterableDataset":
        if self.format == "text":
            return _stream_files(_text_documents, self.input_files())
        return _stream_tables(self.format, self.input_files(), self.text_field)


@dataclass(frozen=True, kw_only=True)
class HubCorpus(Corpus):
    """A data set of the Hugging Face hub, or local parquet or jsonl files of the same columns in its place.

    Args:
        name: owner/name of the data set on the hub.
        subset: its configuration; null: the default one.
        split: its split.
        text_field: column that has the text.
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
            formats = {_table_format(path) for path in paths}
            if len(formats) > 1:
                raise UserError("data.files: parquet and jsonl files cannot be mixed")
            return _stream_tables(formats.pop(), paths, self.text_field)
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


def _stream_files(documents: Callable[[list[str]], Iterator[dict[str, str]]], paths: list[Path]) -> "IterableDataset":
    import datasets

    # A list of arguments is a list of shards to datasets, so that a saved position is a file and not a count.
    return datasets.IterableDataset.from_generator(documents, gen_kwargs={"paths": [str(path) for path in paths]})


def _text_documents(paths: list[str]) -> Iterator[dict[str, str]]:
    for path in paths:
        try:
            yield {"text": Path(path).read_bytes().decode()}
        except UnicodeDecodeError as error:
            raise UserError(f"data.files: {path} is not UTF-8 text ({error.reason} at byte {error.start})") from None


def _decodable_documents(paths: list[str]) -> Iterator[dict[str, str]]:
    for path in paths:
        with contextlib.suppress(UnicodeDecodeError):
            yield {"text": Path(path).read_bytes().decode()}


def _table_format(path: Path) -> str:
    for name, suffixes in {"parquet": (".parquet",), "jsonl": (".jsonl", ".json", ".jsonl.gz", ".jsonl.zst")}.items():
        if path.name.endswith(suffixes):
            return name
    raise UserError(f"data.files: {path} is neither .parquet nor .jsonl")


def _stream_tables(format: str, paths: list[Path], text_field: str) -> "IterableDataset":
    import datasets

    # Of what it raises over broken files, `input_errors` makes one line; it would log more.
    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)
    builder = {"jsonl": "json", "parquet": "parquet"}[format]
    with input_errors(lambda: f"data.files: {paths[0]} ({format})"):
        # It reads each path as a pattern, which could match another file.
        patterns = [glob.escape(str(path)) for path in paths]
        stream = datasets.load_dataset(builder, data_files=patterns, split="train", streaming=True)
        return _select_text(stream, text_field)


def _select_text(stream: "IterableDataset", text_field: str) -> "IterableDataset":
    columns = stream.column_names or list(next(iter(stream)))
    if text_field not in columns:
        raise UserError(f"data.text_field={text_field}: no such column; the columns are {', '.join(columns) or 'none'}")
    # Columns are dropped before rows become Python objects, which is where the time goes.
    stream = stream.select_columns([text_field])
    return stream if text_field == "text" else stream.rename_column(text_field, "text")


@contextlib.contextmanager
def input_errors(source: Callable[[], str], *, problem: str = "cannot read it") -> Iterator[None]:
    """Turn whatever libraries raise over unreadable input into a UserError that names the input."""
    try:
        yield
    except UserError:
        raise
    # Broken archives raise EOFError or what their module defines, and so on.
    except Exception as error:
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


def read_texts(corpus: Corpus, stream: "IterableDataset") -> Iterator[str]:
    """The text of each row; "" where a row has none."""
    with input_errors(lambda: corpus.source(_file_at(stream))):
        for row in stream:
            text = row["text"]
            if text is not None and not isinstance(text, str):
                raise UserError(f"data.text_field: expected a column of text, found {type(text).__name__} {text!r:.60}")
            yield text if text and not text.isspace() else ""


def _file_at(stream: "IterableDataset") -> int | None:
    """The number of the file that a stream is in, where its position tells: None for what has no files."""
    state: Any = stream.state_dict()
    while isinstance(state, dict) and "shard_idx" not in state:
        state = state.get("examples_iterable")
    return state["shard_idx"] if state else None
