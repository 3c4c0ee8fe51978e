"""Where the text comes from, and how it becomes the token shards that `quack_lm.data` reads.

Training imports this module for the settings classes alone, so the preparation's libraries are imported where they are
used. A preparation writes into `<dir>.partial`, commits its progress now and then, and renames it to `<dir>` at the
end: a directory of that name is complete.
"""

import contextlib
import dataclasses
import errno
import fcntl
import glob
import hashlib
import importlib.metadata
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import sysconfig
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import Field, NonNegativeInt, PositiveInt
from tqdm import tqdm

from quack_lm.data import (
    FORMAT_VERSION,
    HASHING_THREADS,
    MANIFEST,
    SPLITS,
    TOKENIZER,
    Manifest,
    Shard,
    Split,
    SplitName,
    Splits,
    TokenData,
    TokenizerFiles,
    file_sha256,
    manifest_json,
    read_manifest,
)
from quack_lm.errors import UserError

if TYPE_CHECKING:
    from datasets import IterableDataset

T = TypeVar("T")
Fraction = Annotated[float, Field(gt=0, lt=1)]
Tokenizer = Any  # a transformers tokenizer, or the `tokenizers.Tokenizer` inside it

# Settings that do not change what is prepared.
NOT_IDENTITY = ("dir", "workers", "mask_documents", "verify_checksums")
BYTES = 256  # the least vocabulary of a byte-level tokenizer, less its special tokens
BATCH_DOCUMENTS = 512
BATCH_CHARACTERS = 1_000_000
HASHING_BYTES = 1 << 26


# ------------------------------------------------------------------------------------------------ settings


@dataclass(frozen=True, kw_only=True)
class Corpus(ABC):
    """What every source of text has in common: its tokens, its splits, and how training reads it."""

    dir: str
    vocab_size: PositiveInt
    # A transformers tokenizer, as a directory or hub name. None: train a byte-level BPE on the train documents.
    tokenizer: str | None
    val_fraction: Fraction
    probe_fraction: Fraction
    shard_tokens: PositiveInt
    # 0 or 1: encode in this process (with threads); more: in so many processes.
    workers: NonNegativeInt
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

    def source(self) -> str:
        """The keys that say where the text comes from, for messages."""
        files = [str(path) for path in self.input_files()]
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

    def input_files(self) -> list[Path]:
        left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
        paths: list[Path] = []
        for directory, folders, names in os.walk(sysconfig.get_paths()["stdlib"]):
            folders[:] = set(folders) - left_out
            paths += [Path(directory, name) for name in names if name.endswith(".py")]
        return sorted(path for path in paths if path.is_file())

    def source(self) -> str:
        return f"the standard library in {sysconfig.get_paths()['stdlib']}"

    def stream(self) -> "IterableDataset":
        return _stream_files(_decodable_documents, self.input_files())


@dataclass(frozen=True, kw_only=True)
class LocalCorpus(Corpus):
    """Files of one's own: text (a document is a file), or jsonl or parquet (a document is a row)."""

    files: Annotated[list[str], Field(min_length=1)]  # paths or globs; ** crosses directories
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
    """A data set of the Hugging Face hub, or local parquet or jsonl files of the same columns in its place."""

    name: str
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
        return _select_text(self._hub_stream(), self.text_field)

    def source(self) -> str:
        if self.files:
            return super().source()
        return f"data.name={self.name} data.subset={self.subset} data.split={self.split}"

    def _hub_stream(self) -> "IterableDataset":
        import datasets

        if self.streaming:
            _require_hub(f"data.name={self.name}")
        with _readable(self.source):
            loaded = datasets.load_dataset(self.name, self.subset, split=self.split, streaming=self.streaming)
        return loaded if self.streaming else loaded.to_iterable_dataset()


# ------------------------------------------------------------------------------------------------ reading


def _resolve_files(patterns: list[str]) -> list[Path]:
    paths: set[str] = set()
    for pattern in patterns:
        pattern = os.path.expanduser(pattern)
        found = [pattern] if os.path.isfile(pattern) else glob.glob(pattern, recursive=True)
        files = [os.path.abspath(path) for path in found if os.path.isfile(path)]
        if not files:
            raise UserError(f"data.files: {pattern} matches no file in {Path.cwd()}: give existing paths or globs")
        paths.update(files)
    return [Path(path) for path in sorted(paths)]


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

    builder = {"jsonl": "json", "parquet": "parquet"}[format]
    with _readable(lambda: f"data.files: {paths[0]} ({format})"):
        stream = datasets.load_dataset(builder, data_files=[str(path) for path in paths], split="train", streaming=True)
        return _select_text(stream, text_field)


def _select_text(stream: "IterableDataset", text_field: str) -> "IterableDataset":
    columns = stream.column_names or list(next(iter(stream), {}))
    if text_field not in columns:
        raise UserError(f"data.text_field={text_field}: no such column; the columns are {', '.join(columns) or 'none'}")
    # Columns are dropped before rows become Python objects, which is where the time goes.
    stream = stream.select_columns([text_field])
    return stream if text_field == "text" else stream.rename_column(text_field, "text")


@contextlib.contextmanager
def _readable(source: Callable[[], str]) -> Iterator[None]:
    """Turn what libraries raise over unreadable input into one line that names the input."""
    try:
        yield
    except UserError:
        raise
    # pyarrow and datasets derive what they raise over broken files from these.
    except (OSError, ValueError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{source()}: cannot read it: {lines[0]}") from error


def _require_hub(what: str) -> None:
    """Ask once whether the hub can be reached; the libraries themselves try for a minute, with a page of warnings."""
    import httpx
    import huggingface_hub

    try:
        if huggingface_hub.constants.is_offline_mode():
            raise UserError(f"{what}: the hub is switched off by HF_HUB_OFFLINE: unset it, or use local files")
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=10)
    except httpx.HTTPError as error:
        raise UserError(
            f"{what}: no connection to the hub ({error}): connect this machine, or use local copies "
            "(data.files=[...], data.tokenizer=DIRECTORY)"
        ) from None


def _texts(corpus: Corpus, stream: "IterableDataset") -> Iterator[str]:
    """The text of each row; "" where a row has none."""
    with _readable(corpus.source):
        for row in stream:
            text = row["text"]
            if text is not None and not isinstance(text, str):
                raise UserError(f"data.text_field: expected a column of text, found {type(text).__name__} {text!r:.60}")
            yield text if text and not text.isspace() else ""


# ------------------------------------------------------------------------------------------------ tokenizer


def _make_tokenizer(corpus: Corpus, *, progress: bool) -> Tokenizer:
    tokenizer = _train_tokenizer(corpus, progress=progress) if corpus.tokenizer is None else _load_tokenizer(corpus)
    vocabulary = tokenizer.get_vocab()
    size = max(vocabulary.values()) + 1
    if size != corpus.vocab_size:
        trained = " (the corpus is too small for more)" if corpus.tokenizer is None else ""
        raise UserError(
            f"data.vocab_size={corpus.vocab_size} is not the tokenizer's, which has {size} entries{trained}: set "
            f"data.vocab_size={size}"
        )
    if corpus.eot_token not in vocabulary:
        special = ", ".join(tokenizer.all_special_tokens) or "none"
        raise UserError(
            f"data.eot_token={corpus.eot_token!r} is not in the vocabulary of data.tokenizer={corpus.tokenizer}; "
            f"its special tokens are: {special}"
        )
    return tokenizer


def _load_tokenizer(corpus: Corpus) -> Tokenizer:
    from transformers import AutoTokenizer

    name = os.path.expanduser(str(corpus.tokenizer))
    what = f"data.tokenizer={corpus.tokenizer}"
    is_local = os.path.isdir(name)
    if not is_local and (name.startswith((".", "/")) or name.count("/") > 1):
        raise UserError(f"{what}: no such directory")
    try:
        return AutoTokenizer.from_pretrained(name, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        if is_local:
            raise UserError(f"{what}: not a transformers tokenizer directory: {str(error).splitlines()[0]}") from error
    _require_hub(what)
    with _readable(lambda: what):
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)


def _train_tokenizer(corpus: Corpus, *, progress: bool) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if corpus.vocab_size <= BYTES:
        raise UserError(f"data.vocab_size={corpus.vocab_size}: a byte-level tokenizer has at least {BYTES + 1} entries")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=corpus.vocab_size,
        special_tokens=[corpus.eot_token],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    with tqdm(desc="training the tokenizer", unit=" documents", disable=not progress) as bar:
        texts = _train_texts(corpus, bar)
        first = next(texts, None)
        if first is None:
            raise UserError(f"{corpus.source()}: no documents to train a tokenizer on")
        bpe.train_from_iterator(itertools.chain([first], texts), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=corpus.eot_token, clean_up_tokenization_spaces=False)


def _train_texts(corpus: Corpus, bar: "tqdm[Any]") -> Iterator[str]:
    characters = 0
    for text in _texts(corpus, corpus.stream()):
        bar.update()
        if text and corpus.split_of(text) == "train":
            yield text
            characters += len(text)
        if characters >= corpus.tokenizer_characters:
            return


# ------------------------------------------------------------------------------------------------ encoding


@dataclass(frozen=True)
class Encoder:
    """Turns texts into the tokens of each split, an end-of-text token after each document; sent to the workers."""

    corpus: Corpus
    tokenizer: Tokenizer
    eot_id: int
    dtype: np.dtype[Any]

    def __call__(self, texts: list[str]) -> dict[SplitName, tuple[npt.NDArray[Any], int]]:
        """The tokens and the number of documents of each split."""
        ids: dict[SplitName, list[int]] = {split: [] for split in SPLITS}
        documents = dict.fromkeys(SPLITS, 0)
        for text, tokens in zip(texts, self._encode(texts), strict=True):
            split = self.corpus.split_of(text)
            ids[split] += tokens
            ids[split].append(self.eot_id)
            documents[split] += 1
        return {split: (np.array(ids[split], dtype=self.dtype), documents[split]) for split in SPLITS}

    def _encode(self, texts: list[str]) -> list[list[int]]:
        import tokenizers

        if isinstance(self.tokenizer, tokenizers.Tokenizer):
            # A document that spells a special token gets the ids of its letters: only we end documents. Set here because
            # pickling, on the way to a worker, forgets it.
            self.tokenizer.encode_special_tokens = True
            return [encoding.ids for encoding in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        encoded = self.tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)
        ids: list[list[int]] = encoded["input_ids"]
        return ids


def _make_encoder(corpus: Corpus, directory: Path) -> Encoder:
    """From the copy of the tokenizer inside the data set, so that an interrupted preparation goes on with the same."""
    from transformers import AutoTokenizer

    tokenizer: Tokenizer = AutoTokenizer.from_pretrained(
        directory / TOKENIZER, local_files_only=True, trust_remote_code=False
    )
    eot_id = tokenizer.convert_tokens_to_ids(corpus.eot_token)
    if tokenizer.is_fast:
        tokenizer = tokenizer.backend_tokenizer
        tokenizer.no_truncation()
        tokenizer.no_padding()
    return Encoder(corpus, tokenizer, eot_id, np.dtype(_dtype_name(corpus)).newbyteorder("<"))


def _dtype_name(corpus: Corpus) -> Literal["uint16", "uint32"]:
    return "uint16" if corpus.vocab_size <= 2**16 else "uint32"


_worker_encoder: Encoder


def _start_worker(encoder: Encoder) -> None:
    global _worker_encoder
    _worker_encoder = encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    # A pool's worker waits on a pipe that it holds open itself, so it would outlive a killed parent.
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode_in_worker(texts: list[str]) -> dict[SplitName, tuple[npt.NDArray[Any], int]]:
    return _worker_encoder(texts)


def _encode_batches(
    encoder: Encoder, batches: Iterable[tuple[T, list[str]]], workers: int
) -> Generator[tuple[T, dict[SplitName, tuple[npt.NDArray[Any], int]]], None, None]:
    """Each batch's encoding beside what came with it, in order, with a bounded number of batches in flight."""
    if workers < 2:
        for position, texts in batches:
            yield position, encoder(texts)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(encoder,))
    pending: deque[tuple[T, Future[dict[SplitName, tuple[npt.NDArray[Any], int]]]]] = deque()
    try:
        for position, texts in batches:
            pending.append((position, pool.submit(_encode_in_worker, texts)))
            if len(pending) > 4 * workers:
                oldest, future = pending.popleft()
                yield oldest, future.result()
        while pending:
            oldest, future = pending.popleft()
            yield oldest, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


# ------------------------------------------------------------------------------------------------ writing


class SplitWriter:
    """Appends tokens to the shards of one split; every shard but the last has exactly `shard_tokens`."""

    def __init__(
        self, directory: Path, split: SplitName, dtype: np.dtype[Any], shard_tokens: int, *, tokens: int, documents: int
    ) -> None:
        self.tokens = tokens
        self.documents = documents
        self._directory = directory
        self._split = split
        self._dtype = dtype
        self._shard_tokens = shard_tokens
        self._file: IO[bytes] | None = None
        self._cut_back()

    def write(self, tokens: npt.NDArray[Any], documents: int) -> None:
        """Append the tokens of some whole documents."""
        self.documents += documents
        while len(tokens):
            index, filled = divmod(self.tokens, self._shard_tokens)
            if self._file is None:
                self._file = (self._directory / _shard_name(self._split, index)).open("ab")
            piece = tokens[: self._shard_tokens - filled]
            self._file.write(piece.tobytes())
            self.tokens += len(piece)
            tokens = tokens[len(piece) :]
            if self.tokens % self._shard_tokens == 0:
                self.close()

    def sync(self) -> None:
        """Make what was written survive a power cut."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Finish the file that is open."""
        self.sync()
        if self._file is not None:
            self._file.close()
            self._file = None

    def shards(self) -> list[tuple[Path, int]]:
        """The files and their numbers of tokens."""
        sizes = _shard_sizes(self._split, self.tokens, self._shard_tokens)
        return [(self._directory / name, tokens) for name, tokens in sizes]

    def _cut_back(self) -> None:
        """Forget what was written after the last commit."""
        committed = dict(self.shards())
        for path in self._directory.glob(f"{self._split}_*.bin"):
            if path not in committed:
                path.unlink()
        for path, tokens in committed.items():
            os.truncate(path, tokens * self._dtype.itemsize)


def _shard_name(split: SplitName, index: int) -> str:
    return f"{split}_{index:05d}.bin"


def _shard_sizes(split: SplitName, tokens: int, shard_tokens: int) -> list[tuple[str, int]]:
    """The file names of a split's shards and their numbers of tokens."""
    full, rest = divmod(tokens, shard_tokens)
    sizes = [shard_tokens] * full + ([rest] if rest else [])
    return [(_shard_name(split, index), size) for index, size in enumerate(sizes)]


@dataclass(frozen=True)
class Progress:
    """The last commit of a preparation: what was read, and what of it is safely written."""

    identity: dict[str, Any]
    documents: int
    stream: dict[str, Any] | None
    written: dict[str, dict[str, int]]

    @classmethod
    def start(cls, identity: dict[str, Any]) -> "Progress":
        """Nothing read yet."""
        return cls(identity, 0, None, {split: {"tokens": 0, "documents": 0} for split in SPLITS})

    @classmethod
    def read(cls, path: Path) -> "Progress | None":
        """What a file says, None if there is none or it is not ours."""
        try:
            return cls(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):
            return None


def _identity(corpus: Corpus) -> dict[str, Any]:
    """What must be unchanged for an interrupted preparation to go on."""
    files = corpus.input_files()
    if corpus.tokenizer and os.path.isdir(corpus.tokenizer):
        files += sorted(path for path in Path(corpus.tokenizer).iterdir() if path.is_file())
    digest = hashlib.sha256()
    for path in files:
        stat = path.stat()
        digest.update(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
    versions = {name: importlib.metadata.version(name) for name in ("datasets", "tokenizers", "transformers")}
    return json.loads(json.dumps({**corpus.settings(), "inputs": digest.hexdigest(), **versions}))


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    _sync_directory(path.parent)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ------------------------------------------------------------------------------------------------ preparation

PROGRESS = "progress.json"
OUR_FILES = re.compile(r"(train|val|probe)_\d{5,}\.bin|(progress|manifest)\.json(\.tmp)?|tokenizer")


def prepare(corpus: Corpus, *, progress: bool = True, commit_every_s: float = 30.0) -> Path:
    """Make the data set of a corpus, or go on with an interrupted one; returns its directory."""
    target = Path(corpus.dir).absolute()
    try:
        if _is_complete(corpus, target):
            print(f"{target} is prepared already, with the same settings")
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        with _lock(target):
            # Another process may have finished between the two looks.
            if not _is_complete(corpus, target):
                _prepare(corpus, target, progress=progress, commit_every_s=commit_every_s)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
            raise UserError(
                f"data.dir={corpus.dir}: cannot write {error.filename or target}: {error.strerror}"
            ) from error
        raise
    return target


def _prepare(corpus: Corpus, target: Path, *, progress: bool, commit_every_s: float) -> None:
    partial = target.with_name(target.name + ".partial")
    partial.mkdir(exist_ok=True)
    _refuse_foreign(partial, OUR_FILES.fullmatch)
    if not _is_finished(corpus, partial):
        committed = _resume(corpus, partial) or _start_over(corpus, partial, progress=progress)
        _write_shards(corpus, partial, committed, progress=progress, commit_every_s=commit_every_s)
    (partial / PROGRESS).unlink(missing_ok=True)
    _sync_directory(partial)
    partial.rename(target)
    _sync_directory(target.parent)


def _is_complete(corpus: Corpus, target: Path) -> bool:
    """Whether the data set is there; raises UserError if something else is."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return False
    if not (target / MANIFEST).is_file():
        raise UserError(f"data.dir={target} holds no data set but something else: choose another data.dir")
    manifest = TokenData.open(target, verify_checksums=False).manifest
    shards = {shard.file for split in SPLITS for shard in manifest.split(split).shards}
    _refuse_foreign(target, lambda name: name in shards | {MANIFEST, TOKENIZER})
    settings = json.loads(json.dumps(corpus.settings()))
    for key in sorted(settings.keys() | manifest.source.keys()):
        then, now = manifest.source.get(key), settings.get(key)
        if then != now:
            raise UserError(
                f"data.dir={target} holds a data set made with other settings (data.{key} was {then!r}, is {now!r}): "
                "choose another data.dir, or remove that directory first"
            )
    return True


def _refuse_foreign(directory: Path, is_ours: Callable[[str], Any]) -> None:
    for path in sorted(directory.iterdir()):
        if not is_ours(path.name):
            raise UserError(f"data.dir: {path} is not part of a data set: move it away, or choose another data.dir")


def _is_finished(corpus: Corpus, partial: Path) -> bool:
    """Whether an earlier preparation was interrupted after its manifest and before its rename."""
    if not (partial / MANIFEST).exists():
        return False
    with contextlib.suppress(UserError):
        return _is_complete_but_for_progress(corpus, partial)
    return False


def _is_complete_but_for_progress(corpus: Corpus, partial: Path) -> bool:
    manifest, _ = read_manifest(partial)
    return manifest.source == json.loads(json.dumps(corpus.settings()))


def _resume(corpus: Corpus, partial: Path) -> Progress | None:
    committed = Progress.read(partial / PROGRESS)
    if committed is None or committed.identity != _identity(corpus) or not _has_committed(corpus, partial, committed):
        return None
    print(f"going on with {partial} after {committed.documents} documents")
    return committed


def _has_committed(corpus: Corpus, partial: Path, committed: Progress) -> bool:
    """Whether the files hold at least what was committed; not so after somebody meddled with them."""
    for split in SPLITS:
        for name, tokens in _shard_sizes(split, committed.written[split]["tokens"], corpus.shard_tokens):
            path = partial / name
            if not path.is_file() or path.stat().st_size < tokens * np.dtype(_dtype_name(corpus)).itemsize:
                return False
    return (partial / TOKENIZER).is_dir()


def _start_over(corpus: Corpus, partial: Path, *, progress: bool) -> Progress:
    _remove_ours(partial)
    identity = _identity(corpus)
    _make_tokenizer(corpus, progress=progress).save_pretrained(partial / TOKENIZER, save_jinja_files=False)
    for path in (partial / TOKENIZER).iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    _sync_directory(partial / TOKENIZER)
    start = Progress.start(identity)
    _write_atomically(partial / PROGRESS, json.dumps(dataclasses.asdict(start)))
    return start


def _remove_ours(partial: Path) -> None:
    # Progress goes first: without it nothing that is left can be taken for committed.
    for path in sorted(partial.iterdir(), key=lambda path: path.name != PROGRESS):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _write_shards(corpus: Corpus, partial: Path, committed: Progress, *, progress: bool, commit_every_s: float) -> None:
    encoder = _make_encoder(corpus, partial)
    writers = {
        split: SplitWriter(partial, split, encoder.dtype, corpus.shard_tokens, **committed.written[split])
        for split in SPLITS
    }
    stream = corpus.stream()
    if committed.stream is not None:
        stream.load_state_dict(committed.stream)
    batches = _batches(corpus, stream, committed.documents)
    committed_at = time.monotonic()
    bar = tqdm(desc="preparing", unit=" documents", initial=committed.documents, disable=not progress)
    with bar, contextlib.closing(_encode_batches(encoder, batches, corpus.workers)) as encoded:
        for (documents, state), tokens_of in encoded:
            for split, writer in writers.items():
                writer.write(*tokens_of[split])
            bar.update(documents - bar.n)
            bar.set_postfix_str(_token_rate(writers, committed, bar))
            if time.monotonic() - committed_at >= commit_every_s:
                _commit(partial, Progress(committed.identity, documents, state, _written(writers)), writers)
                committed_at = time.monotonic()
    for writer in writers.values():
        writer.close()
    _refuse_empty_splits(corpus, writers)
    _write_atomically(partial / MANIFEST, manifest_json(_make_manifest(corpus, partial, writers, encoder.eot_id)))


def _batches(corpus: Corpus, stream: "IterableDataset", documents: int) -> Iterator[tuple[tuple[int, Any], list[str]]]:
    """Batches of texts, each with the number of documents read so far and the stream's position after it."""
    texts: list[str] = []
    characters = 0
    for text in _texts(corpus, stream):
        documents += 1
        characters += len(text)
        if text:
            texts.append(text)
        if len(texts) >= BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
            yield (documents, stream.state_dict()), texts
            texts, characters = [], 0
    yield (documents, stream.state_dict()), texts


def _commit(partial: Path, progress: Progress, writers: dict[SplitName, SplitWriter]) -> None:
    for writer in writers.values():
        writer.sync()
    _write_atomically(partial / PROGRESS, json.dumps(dataclasses.asdict(progress)))


def _written(writers: dict[SplitName, SplitWriter]) -> dict[str, dict[str, int]]:
    return {split: {"tokens": writer.tokens, "documents": writer.documents} for split, writer in writers.items()}


def _token_rate(writers: dict[SplitName, SplitWriter], committed: Progress, bar: "tqdm[Any]") -> str:
    new = sum(writer.tokens - committed.written[split]["tokens"] for split, writer in writers.items())
    elapsed_s = bar.format_dict["elapsed"]
    return f"{new / elapsed_s:,.0f} tokens/s" if elapsed_s else ""


def _refuse_empty_splits(corpus: Corpus, writers: dict[SplitName, SplitWriter]) -> None:
    total = sum(writer.documents for writer in writers.values())
    if not total:
        raise UserError(f"data.dir={corpus.dir}: the corpus has no documents")
    mend = {
        "train": f"lower data.val_fraction={corpus.val_fraction} or data.probe_fraction={corpus.probe_fraction}",
        "val": f"raise data.val_fraction={corpus.val_fraction}",
        "probe": f"raise data.probe_fraction={corpus.probe_fraction}",
    }
    for split, writer in writers.items():
        if not writer.documents:
            raise UserError(
                f"none of the {total} documents fell into the {split} split: {mend[split]} or add documents"
            )


def _make_manifest(corpus: Corpus, partial: Path, writers: dict[SplitName, SplitWriter], eot_id: int) -> Manifest:
    with ThreadPoolExecutor(HASHING_THREADS) as threads:
        splits = {split: _make_split(writer, threads) for split, writer in writers.items()}
        train = [path for path, _ in writers["train"].shards()]
        counts = sum(
            threads.map(lambda path: _count_tokens(path, corpus), train), np.zeros(corpus.vocab_size, np.int64)
        )
    tokenizer_files = sorted((partial / TOKENIZER).iterdir())
    return Manifest(
        format_version=FORMAT_VERSION,
        vocab_size=corpus.vocab_size,
        eot_id=eot_id,
        dtype=_dtype_name(corpus),
        unigram_entropy=_entropy(counts),
        tokenizer=TokenizerFiles(
            name=corpus.tokenizer or "byte-level BPE trained on the train split",
            files={path.name: file_sha256(path) for path in tokenizer_files},
        ),
        splits=Splits(**splits),
        source=json.loads(json.dumps(corpus.settings())),
    )


def _make_split(writer: SplitWriter, threads: ThreadPoolExecutor) -> Split:
    paths, sizes = zip(*writer.shards(), strict=True)
    digests = threads.map(file_sha256, paths)
    shards = [Shard(file=p.name, tokens=n, sha256=digest) for p, n, digest in zip(paths, sizes, digests, strict=True)]
    return Split(tokens=writer.tokens, documents=writer.documents, shards=shards)


def _count_tokens(path: Path, corpus: Corpus) -> npt.NDArray[np.int64]:
    tokens = np.memmap(path, dtype=np.dtype(_dtype_name(corpus)).newbyteorder("<"), mode="r")
    counts = np.zeros(corpus.vocab_size, dtype=np.int64)
    for start in range(0, len(tokens), HASHING_BYTES):
        counts += np.bincount(tokens[start : start + HASHING_BYTES], minlength=corpus.vocab_size)
    return counts


def _entropy(counts: npt.NDArray[np.int64]) -> float:
    """Of the distribution with these counts, in nats."""
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


@contextlib.contextmanager
def _lock(target: Path) -> Iterator[None]:
    """Hold `<dir>.lock`; the system lets go of it when this process ends, however it ends."""
    path = target.with_name(target.name + ".lock")
    for _ in itertools.count():
        file = path.open("a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise UserError(f"data.dir={target}: another preparation of it is running: wait for it") from None
        # Its last holder may have removed the file that we opened before we locked it.
        if path.exists() and os.fstat(file.fileno()).st_ino == path.stat().st_ino:
            break
        file.close()
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()
