"""Where text and tokens come from: the `data` section of a config, and the documents of each kind of source.

Training imports this module for the settings alone, so the libraries that read documents are imported where they are
used. `quack_lm.data.prepare` makes token shards of the documents.
"""

import contextlib
import dataclasses
import functools
import glob
import hashlib
import inspect
import os
import re
import sysconfig
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt

from quack_lm.data.documents import (
    BLANK_LINES,
    LINES,
    Format,
    Row,
    field_of,
    find_separator,
    format_note,
    format_of_name,
    is_named_table,
    is_split_by,
    read_files,
    read_start,
    text_error,
    text_field_hint,
)
from quack_lm.data.manifest import MANIFEST, SPLITS, Manifest, SplitName, damaged, read_manifest
from quack_lm.data.settings import DataSettings, VocabSize
from quack_lm.data.token_files import TokenFile, open_token_file, refuse_wider_numbers
from quack_lm.errors import UserError
from quack_lm.files import relative_note

if TYPE_CHECKING:
    from datasets import IterableDataset

Share = Annotated[float, Field(gt=0, lt=1)]

# What is read of text files, all together, to find out what separates documents in them.
LOOK_BYTES, LOOK_FILES = 1 << 26, 64

# The choices of `data=` that are data sets of the hub, by their names there.
HUB_CHOICES = {
    "HuggingFaceTB/smollm-corpus": "cosmopedia_v2",
    "HuggingFaceFW/fineweb-edu": "fineweb_edu",
    "mlfoundations/dclm-baseline-1.0": "dclm",
    "Salesforce/wikitext": "wikitext",
}

# Settings that do not change what is prepared, and of which a manifest says nothing.
NOT_PREPARED = {"dir", "workers", "mask_documents", "verify_checksums"}


# ------------------------------------------------------------------------------------------------ settings


@dataclass(frozen=True, kw_only=True)
class Corpus(DataSettings):
    """The settings that every source of documents has: its vocabulary, its splits, and where its data set is.

    Args:
        dir: directory of the token shards.
        vocab_size: size of the vocabulary.
        tokenizer: a transformers tokenizer, as a directory or hub name; null: train a byte-level BPE on the text.
        val_fraction: share of the documents in the validation split.
        probe_fraction: share of the documents in the split that the logit probe reads.
        shard_tokens: tokens in a file of the data set.
        eot_token: token after each document.
        max_tokens: tokens after which the preparation ends, up to some hundred documents later; null: it reads all.
    """

    dir: str
    vocab_size: VocabSize
    tokenizer: str | None
    val_fraction: Share
    probe_fraction: Share
    shard_tokens: PositiveInt
    eot_token: str = "<|endoftext|>"
    max_tokens: PositiveInt | None = None

    def __post_init__(self) -> None:
        # A shell leaves a quoted ~ as it is. The key is no part of what a data set is identified by.
        object.__setattr__(self, "dir", os.path.expanduser(self.dir))
        if self.val_fraction + self.probe_fraction >= 1:
            raise UserError(
                f"data.val_fraction={self.val_fraction} and data.probe_fraction={self.probe_fraction} leave nothing to "
                "train on: their sum must be below 1"
            )

    @abstractmethod
    def input_files(self) -> list[Path]:
        """The local files that the documents come from."""

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
        """The keys that say where the documents come from, for messages: from all files, or from that of a number."""
        files = [str(path) for path in self.input_files()]
        if file is not None:
            files = files[file : file + 1] or files
        return "data.files: " + ", ".join(files[:3]) + (f" and {len(files) - 3} more" if len(files) > 3 else "")

    def split_of(self, document: str | bytes) -> SplitName:
        """The split of a document: a function of its text or tokens, so that equal documents share a split."""
        content = document.encode() if isinstance(document, str) else document
        number = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest()) / 2**64
        if number < self.val_fraction:
            return "val"
        return "probe" if number < self.val_fraction + self.probe_fraction else "train"

    @property
    def open_settings(self) -> set[str]:
        """The keys that `settled` gives a value: a data set that has one already is as good as any other."""
        return set()

    def settled(self) -> Self:
        """The same with a value for each setting that was left to the input: what a manifest says."""
        return self

    def settings(self) -> dict[str, Any]:
        """What decides the contents of the data set; its manifest says it as `source`."""
        values = {key: value for key, value in dataclasses.asdict(self).items() if key not in NOT_PREPARED}
        return {"corpus": type(self).__name__, **values}

    @property
    def directories(self) -> list[str]:
        return [self.dir]

    def weights_of(self, train_tokens: Sequence[int]) -> list[Fraction]:
        return [Fraction(1)]

    @classmethod
    def as_prepared(cls, section: dict[str, Any], explicit: Collection[str]) -> dict[str, Any]:
        directory = section.get("dir")
        found = _made_section(directory) if isinstance(directory, str) else None
        if found is None:
            return section
        made, kind = found
        typed, own = (
            HUB_CHOICES.get(str(values.get("name")), c.choice) for values, c in ((section, cls), (made, kind))
        )
        if "_target_" in explicit and typed not in (own, kind.choice):
            raise UserError(
                f"data.dir={directory} was made with data={own}, not {typed}; leave data={typed} out to use that data "
                "set, or choose another data.dir"
            )
        keys = _keys(kind)
        known = keys | _keys(cls)
        for key in sorted(set(explicit) & known - NOT_PREPARED):
            if section.get(key) not in ("auto", made.get(key)):
                raise UserError(
                    f"data.dir={directory} was made with data.{key}={made.get(key)}, not {section.get(key)}; leave it "
                    "out to use that data set, or choose another data.dir"
                )
        # What is unknown is kept, for the check of the config to answer.
        kept = NOT_PREPARED & (keys | set(explicit)) | section.keys() - known
        return {**made, **{key: value for key, value in section.items() if key in kept}}


@dataclass(frozen=True, kw_only=True)
class TextCorpus(Corpus):
    """Documents of text, which the preparation encodes.

    Args:
        workers: processes that encode text; 0 or 1: this process, with threads.
        tokenizer_characters: characters of text on which a tokenizer is trained at most.
    """

    workers: Annotated[int, Field(ge=0, le=1024)]
    # A tokenizer of this size learns nothing more from text beyond this.
    tokenizer_characters: PositiveInt = 1_000_000_000

    @abstractmethod
    def stream(self) -> "IterableDataset":
        """The documents in a fixed order, each {"text": ...}, with a position that can be saved and restored."""

    @property
    def skips_bad_records(self) -> bool:
        """Whether records that cannot be used are left out, and counted; else they are errors."""
        return False


@dataclass(frozen=True, kw_only=True)
class StdlibCorpus(TextCorpus):
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
class RecordCorpus(TextCorpus):
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
        format: kind of the files: in text a document is a file, in jsonl and parquet a row; auto: by their names.
        text_field: column that has the text; doc.text is the field text of the column doc.
        separator: what ends a document inside of a text file: blank_lines, or any text, in which \\n is a line break;
            null: only the end of the file. auto: eot_token where the files have it at the ends of documents; else null
            where files of at most 64 MB, a document each, fill the three splits; else blank lines or line breaks.
    """

    choice = "local"

    files: Annotated[list[str], Field(min_length=1)]
    format: Format | Literal["auto"]
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

    @property
    def file_format(self) -> Format:
        """That of the files, where need be by their names."""
        if self.format != "auto":
            return self.format
        paths = self.input_files()
        if table := next((path for path in paths if is_named_table(path)), None):
            raise UserError(
                f"data.files: {table} is a table by its name, of which every line would be a document, the header too: "
                "convert it to jsonl or parquet, or set data.format=text"
            )
        named: dict[Format, Path] = {format_of_name(path) or "text": path for path in reversed(paths)}
        if len(named) > 1:
            (one, path), (another, other), *_ = named.items()
            raise UserError(
                f"data.files: {path} is {one} and {other} is {another} by its name: give files of one format, or say "
                "which it is with data.format"
            )
        return next(iter(named))

    @property
    def open_settings(self) -> set[str]:
        return {"format"} if self.format == "auto" else set()

    def settled(self) -> Self:
        return dataclasses.replace(self, format=self.file_format)

    def stream(self) -> "IterableDataset":
        paths, format = self.input_files(), self.file_format
        separator = self._found_separator(paths)[0] if format == "text" else None
        settings = {"format": format, "text_field": self.text_field, "separator": separator}
        return _stream_files(read_files, paths, **settings)

    @property
    def more_documents(self) -> str:
        is_text = self.file_format == "text"
        return super().more_documents + (", or say where they end in a file (data.separator)" if is_text else "")

    def notes(self) -> list[str]:
        format = self.file_format
        if format != "text" and self.format == "auto":
            return [f"{self.source()}: {format}, by the names of the files (data.format=auto)"]
        if format != "text" or self.separator is None:
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
        format = None if self.format == "auto" else self.format
        return super().source(file) + (format_note(self.input_files()[file], format) if file is not None else "")

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
        fill = partial(self._fill_splits, paths)
        separator = find_separator(starts, self.eot_token, are_documents=fill)
        seen = sum(start.count(self.eot_token.encode()) for start in starts)
        return separator, 0 if separator == self.eot_token else seen

    def _fill_splits(self, paths: list[Path]) -> bool:
        """Whether text files have a document for each split where each is one."""
        if len(paths) < len(SPLITS):
            return False
        filled = set()
        for number, path in enumerate(paths):
            with input_errors(partial(self.source, number)):
                start = read_start(path, LOOK_BYTES + 1)
                if len(start) > LOOK_BYTES:
                    return False
                rows = list(read_files([str(path)], format="text", text_field="", separator=None))
            filled |= {self.split_of(text) for row in rows if (text := row["text"]) and text.strip()}
            if len(filled) == len(SPLITS):
                return True
        return False


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
        revision: a commit, branch or tag of it; null: the newest commit. The manifest has the commit that was read.
    """

    choice = "hub"

    # owner/name: a bare name would be one of the loaders that `datasets` ships, pickles among them.
    name: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")]
    subset: str | None
    split: str
    text_field: str
    streaming: bool
    files: list[str] = dataclasses.field(default_factory=list)
    revision: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "choice", HUB_CHOICES.get(self.name, self.choice))

    def input_files(self) -> list[Path]:
        return _resolve_files(self.files)

    @property
    def open_settings(self) -> set[str]:
        return set() if re.fullmatch("[0-9a-f]{40}", self.revision or "") else {"revision"}

    def settled(self) -> Self:
        import huggingface_hub.constants

        if self.files or not self.open_settings or huggingface_hub.constants.is_offline_mode():
            return self
        require_hub(f"data.name={self.name}")
        with input_errors(self.source):
            commit = huggingface_hub.HfApi().dataset_info(self.name, revision=self.revision).sha
        return dataclasses.replace(self, revision=commit)

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
        loaded = datasets.load_dataset(
            self.name, self.subset, split=self.split, streaming=self.streaming, revision=self.revision
        )
        return loaded if self.streaming else loaded.to_iterable_dataset()


@dataclass(frozen=True, kw_only=True)
class TokenCorpus(Corpus):
    """Tokens that another program has made, in the files of Megatron, llm.c, nanoGPT, OLMo or datatrove.

    Args:
        files: paths or globs of the files with the tokens; ** crosses directories.
        tokenizer: the transformers tokenizer that made the tokens, as a directory or hub name; null: it is unknown.
        dtype: type of the tokens in files that do not say it; auto: uint16 where data.vocab_size allows, else uint32.
        eot_id: the token between documents; null: that of data.eot_token in data.tokenizer.
        document_tokens: tokens after which a document ends anyway; null: never.
    """

    choice = "tokens"

    files: Annotated[list[str], Field(min_length=1)]
    dtype: Literal["auto", "uint16", "uint32", "int32", "int64"] = "auto"
    eot_id: NonNegativeInt | None = None
    document_tokens: PositiveInt | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eot_id is None and self.tokenizer is None:
            raise UserError(
                "data.eot_id is not set, the token between documents: give it (50256 for GPT-2), or the data.tokenizer "
                "that made the tokens"
            )
        if self.eot_id is not None and self.eot_id >= self.vocab_size:
            raise UserError(f"data.eot_id={self.eot_id} must be below data.vocab_size={self.vocab_size}")

    def input_files(self) -> list[Path]:
        return _resolve_files(self.files)

    def open_files(self, first: int = 0) -> Iterator[TokenFile]:
        """The files from a number on, opened one after the other; UserError for one that is not what it says."""
        raw = self.dtype if self.dtype != "auto" else "uint16" if self.vocab_size <= 2**16 else "uint32"
        for path in self.input_files()[first:]:
            file = open_token_file(path, raw)
            if self.dtype == "auto":
                refuse_wider_numbers(file)
            yield file

    @property
    def more_documents(self) -> str:
        return super().more_documents + ", or end them after so many tokens (data.document_tokens)"

    def notes(self) -> list[str]:
        counts = Counter((file.kind, str(file.tokens.dtype)) for file in self.open_files())
        files = {key: f"{n:,} {'file' if n == 1 else 'files'}" for key, n in counts.items()}
        return [f"data.files: {n} of {kind}, tokens of {dtype}" for (kind, dtype), n in files.items()]


# ------------------------------------------------------------------------------------------------ what is prepared


def _made_section(directory: str) -> tuple[dict[str, Any], type[Corpus]] | None:
    """(the section of which a prepared data set was made, its class); None where no manifest can be read.

    UserError where a manifest names a source that this version does not have.
    """
    place = Path(os.path.expanduser(directory))
    try:
        stat = (place / MANIFEST).stat()
        manifest = _read_manifest_once(place, (stat.st_ino, stat.st_size, stat.st_mtime_ns))
    except (OSError, ValueError):  # the opening of the data says which
        return None
    kinds = {kind.__name__: kind for kind in _concrete(Corpus)}
    name = manifest.source.get("corpus")
    if not isinstance(name, str) or name not in kinds:
        raise damaged(place, place / MANIFEST, f"source.corpus={name!r} is none of {', '.join(sorted(kinds))}")
    own = {key: value for key, value in manifest.source.items() if key not in NOT_PREPARED | {"corpus"}}
    target = {"_target_": f"{kinds[name].__module__}.{name}", "vocab_size": manifest.vocab_size}
    reading = {"workers": 0} if "workers" in _keys(kinds[name]) else {}
    return {**_defaults(kinds[name]), **own, **reading, **target}, kinds[name]


@functools.lru_cache(64)  # the runs of a sweep have the same few data sets
def _read_manifest_once(directory: Path, _mark: tuple[int, ...]) -> Manifest:
    return read_manifest(directory)[0]


def _concrete(kind: type[Any]) -> list[type[Any]]:
    own = [] if inspect.isabstract(kind) else [kind]
    return own + [found for below in kind.__subclasses__() for found in _concrete(below)]


def _keys(kind: type[DataSettings]) -> set[str]:
    return {"_target_", *(field.name for field in dataclasses.fields(kind))}


def _defaults(kind: type[DataSettings]) -> dict[str, Any]:
    """Those of the settings that decide what is prepared: a data set that is older than one had its default."""
    fields = [field for field in dataclasses.fields(kind) if field.name not in NOT_PREPARED]
    simple = {field.name: field.default for field in fields if field.default is not dataclasses.MISSING}
    made = {field.name: field.default_factory() for field in fields if callable(field.default_factory)}
    return {**simple, **made}


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
        hint = text_field_hint(next(iter(stream), {}))
        raise UserError(
            f"data.text_field={text_field}: no such column; the columns are {', '.join(columns) or 'none'}{hint}"
        )
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
    import huggingface_hub.constants

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


def read_texts(corpus: TextCorpus, stream: "IterableDataset") -> Iterator[tuple[str, str | None]]:
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
