"""From the documents of a corpus to the token shards that training reads.

A preparation writes into `<dir>.partial`, commits its progress every so often, and renames it to `<dir>` at the end: a
directory of that name is complete.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from quack_lm.data.corpus import Corpus, TextCorpus, TokenCorpus, read_texts
from quack_lm.data.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    SPLITS,
    TOKENIZER,
    UNKNOWN,
    Manifest,
    Shard,
    Split,
    SplitName,
    Splits,
    TokenData,
    TokenizerFiles,
    manifest_json,
    read_manifest,
)
from quack_lm.data.tokenizer import (
    BAR_DELAY_S,
    Encoded,
    dtype_name,
    encode_batches,
    locate_tokenizer,
    make_encoder,
    make_tokenizer,
    saved_tokenizer,
    token_dtype,
)
from quack_lm.errors import UserError, explaining
from quack_lm.files import (
    HASHING_THREADS,
    file_sha256,
    file_sha256s,
    holding,
    nearest_existing_parent,
    read_json,
    sync_directory,
    write_atomically,
)
from quack_lm.text import echo

if TYPE_CHECKING:
    from datasets import IterableDataset

BATCH_DOCUMENTS = 512
BATCH_CHARACTERS = 1_000_000
HASHING_BYTES = 1 << 26


# ------------------------------------------------------------------------------------------------ writing


class SplitWriter:
    """Appends tokens to the shards of one split; every shard but the last has exactly `shard_tokens`.

    `text_bytes` are those of the documents' text in UTF-8; None once those of any are unknown.
    """

    def __init__(
        self,
        directory: Path,
        split: SplitName,
        dtype: np.dtype[Any],
        shard_tokens: int,
        *,
        tokens: int,
        documents: int,
        text_bytes: int | None = None,  # the commit of an earlier version has none
    ) -> None:
        self.tokens = tokens
        self.documents = documents
        self.text_bytes = text_bytes
        self.dtype = dtype
        self._directory = directory
        self._split = split
        self._shard_tokens = shard_tokens
        self._file: IO[bytes] | None = None
        self._cut_back()

    def write(self, tokens: npt.NDArray[Any], documents: int, text_bytes: int | None) -> None:
        """Append tokens, those of so many documents and bytes of text."""
        self.documents += documents
        if self.text_bytes is not None:
            self.text_bytes = None if text_bytes is None else self.text_bytes + text_bytes
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
        """Flush what was written to the disk."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Flush and close the open shard."""
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
            n_bytes = tokens * self.dtype.itemsize
            if not path.is_file() or path.stat().st_size < n_bytes:
                raise UserError(f"{path} has lost committed tokens; remove {self._directory} to start again")
            os.truncate(path, n_bytes)


def _shard_name(split: SplitName, index: int) -> str:
    return f"{split}_{index:05d}.bin"


def _shard_sizes(split: SplitName, tokens: int, shard_tokens: int) -> list[tuple[str, int]]:
    """The file names of a split's shards and their numbers of tokens."""
    full, rest = divmod(tokens, shard_tokens)
    sizes = [shard_tokens] * full + ([rest] if rest else [])
    return [(_shard_name(split, index), size) for index, size in enumerate(sizes)]


@dataclass
class LeftOut:
    """What of the corpus is not in the shards: the bad records, and what the tokenizer lost."""

    bad_records: int = 0
    first_bad_record: str = ""
    empty_documents: int = 0
    characters: int = 0
    lost: dict[str, int] = dataclasses.field(default_factory=dict)

    def add(self, bad_records: list[str], encoded: Encoded) -> None:
        """Count a batch: the errors of its bad records, and its encoding."""
        self.bad_records += len(bad_records)
        self.first_bad_record = self.first_bad_record or next(iter(bad_records), "")
        self.empty_documents += encoded.empty_documents
        self.characters += encoded.characters
        self.lost = dict(Counter(self.lost) + encoded.lost)

    def report(self, corpus: Corpus) -> list[str]:
        """What to tell the user, a line each."""
        lines = []
        if self.bad_records:
            lines.append(f"left out {self.bad_records:,} bad records, the first: {self.first_bad_record}")
        if self.empty_documents:
            lines.append(f"left out {self.empty_documents:,} documents of which data.tokenizer makes no tokens")
        if self.lost:
            n = sum(self.lost.values())
            most = ", ".join(f"{c!r} ({count:,})" for c, count in Counter(self.lost).most_common(5))
            lines.append(
                f"warning: {100 * n / self.characters:.2g}% of the characters ({n:,}) cannot be decoded from the "
                f"tokens of data.tokenizer={corpus.tokenizer}, most often {most}"
            )
        return lines


@dataclass(frozen=True)
class PrepareState:
    """The last commit of a preparation: what was read, and what of it is on the disk.

    `identity` says what has to be unchanged for an interrupted preparation to continue; `stream` is the position in the
    documents; `written` has the tokens, documents and bytes of text of each split, and `left_out` is a `LeftOut`.
    """

    identity: dict[str, Any]
    documents: int
    stream: dict[str, Any] | None
    written: dict[str, dict[str, Any]]
    left_out: dict[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def start(cls, identity: dict[str, Any]) -> "PrepareState":
        """The state before the first document."""
        return cls(identity, 0, None, {split: {"tokens": 0, "documents": 0, "text_bytes": 0} for split in SPLITS})

    @classmethod
    def read(cls, path: Path) -> "PrepareState | None":
        """The state in a file; None where there is none, or it was not written by a preparation."""
        try:
            return cls(**read_json(path))
        except TypeError:
            return None


def _identity(corpus: Corpus) -> dict[str, Any]:
    files = corpus.input_files()
    if corpus.tokenizer and os.path.isdir(name := locate_tokenizer(corpus)):
        files += sorted(path for path in Path(name).iterdir() if path.is_file())
    digest = hashlib.sha256()
    for path in files:
        stat = path.stat()
        digest.update(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
    versions = {name: importlib.metadata.version(name) for name in ("datasets", "tokenizers", "transformers")}
    return json.loads(json.dumps({**corpus.settings(), "inputs": digest.hexdigest(), **versions}))


# ------------------------------------------------------------------------------------------------ preparation

PROGRESS = "progress.json"
OUR_FILES = re.compile(r"(train|val|probe)_\d{5,}\.bin|(progress|manifest)\.json(\.tmp)?|tokenizer")


def prepare(corpus: Corpus, *, progress: bool = True, commit_every_s: float = 30.0) -> Path:
    """Make the data set of a corpus, or continue an interrupted preparation; returns its directory.

    UserError where the corpus cannot be read, its settings do not fit, or its directory cannot be written to.
    """
    target = Path(corpus.dir).absolute()
    with directory_errors(corpus):
        if is_prepared(corpus):
            echo(f"{target} is prepared already, with the same settings")
            return target
        with _made_parents(target), _lock(target):
            # Another process may have finished it in the meantime.
            if not _is_complete(corpus, target):
                _prepare(corpus, target, progress=progress, commit_every_s=commit_every_s)
    return target


def directory_errors(corpus: Corpus) -> contextlib.AbstractContextManager[None]:
    """What the system says of the data set's directory becomes a UserError that names it."""
    return explaining(f"data.dir={corpus.dir}", "and run the same command again, or choose another data.dir")


def is_prepared(corpus: Corpus) -> bool:
    """Whether the data set exists; creates nothing.

    UserError where its directory holds something else or cannot be made, or an input of the corpus does not exist.
    """
    target = Path(corpus.dir).absolute()
    if _is_complete(corpus, target):
        return True
    corpus.input_files()
    if corpus.tokenizer:
        locate_tokenizer(corpus)
    place = nearest_existing_parent(target.parent)
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise UserError(f"data.dir={target}: {place} is not a directory that can be written to")
    if _partial(target).is_dir():
        _refuse_other_files(_partial(target), OUR_FILES.fullmatch)
    return False


def _prepare(corpus: Corpus, target: Path, *, progress: bool, commit_every_s: float) -> None:
    partial = _partial(target)
    is_new = not partial.exists()
    partial.mkdir(exist_ok=True)
    _refuse_other_files(partial, OUR_FILES.fullmatch)
    try:
        notes, corpus = corpus.notes(), corpus.settled()
        if not _is_finished(corpus, partial):
            echo(*notes)
            committed = _resume(corpus, partial) or _start_over(corpus, partial, progress=progress)
            left_out = _write_shards(corpus, partial, committed, progress=progress, commit_every_s=commit_every_s)
            echo(*left_out.report(corpus))
    except BaseException as error:
        if is_new and not _is_worth_keeping(partial, error):
            shutil.rmtree(partial)
        raise
    (partial / PROGRESS).unlink(missing_ok=True)
    sync_directory(partial)
    partial.rename(target)
    sync_directory(target.parent)


def _partial(target: Path) -> Path:
    return target.with_name(target.name + ".partial")


def _is_worth_keeping(partial: Path, error: BaseException) -> bool:
    """Committed documents are, for the hub may be back tomorrow; of a corpus that is refused at once, nothing is."""
    committed = PrepareState.read(partial / PROGRESS)
    # A user who interrupts will continue, if only with the tokenizer.
    return committed is not None and (committed.documents > 0 or isinstance(error, KeyboardInterrupt))


@contextlib.contextmanager
def _made_parents(target: Path) -> Iterator[None]:
    """Create the directories above; after a failure, those that are empty are removed again."""
    missing = [parent for parent in target.parents if not parent.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            for parent in missing:
                parent.rmdir()
        raise


def _is_complete(corpus: Corpus, target: Path) -> bool:
    """Whether the data set exists; UserError where its directory holds something else."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return False
    if not (target / MANIFEST).is_file():
        raise UserError(f"data.dir={target} holds no data set but something else: choose another data.dir")
    manifest = TokenData.open(target, verify_checksums=False).manifest
    shards = {shard.file for split in SPLITS for shard in manifest.split(split).shards}
    _refuse_other_files(target, lambda name: name in shards | {MANIFEST, TOKENIZER})
    settings = json.loads(json.dumps(corpus.settings()))
    # A setting that is newer than the data set had its default then.
    made_with = {field.name: field.default for field in dataclasses.fields(corpus)} | manifest.source
    for key in sorted((settings.keys() | manifest.source.keys()) - corpus.open_settings):
        then, now = made_with.get(key), settings.get(key)
        if then != now:
            raise UserError(
                f"data.dir={target} holds a data set made with other settings (data.{key} was {then!r}, is {now!r}): "
                "choose another data.dir, or remove that directory first"
            )
    return True


def _refuse_other_files(directory: Path, is_ours: Callable[[str], Any]) -> None:
    for path in sorted(directory.iterdir()):
        if not is_ours(path.name):
            raise UserError(f"data.dir: {path} is not part of a data set: move it away, or choose another data.dir")


def _is_finished(corpus: Corpus, partial: Path) -> bool:
    """Whether an earlier preparation was interrupted after its manifest and before its rename."""
    if not (partial / MANIFEST).exists():
        return False
    try:
        return read_manifest(partial)[0].source == json.loads(json.dumps(corpus.settings()))
    except UserError:
        return False


def _resume(corpus: Corpus, partial: Path) -> PrepareState | None:
    committed = PrepareState.read(partial / PROGRESS)
    if committed is None or committed.identity != _identity(corpus):
        return None
    echo(f"continuing {partial} after {committed.documents} documents")
    return committed


def _start_over(corpus: Corpus, partial: Path, *, progress: bool) -> PrepareState:
    _remove_ours(partial)
    identity = _identity(corpus)
    tokenizer = make_tokenizer(corpus, progress=progress)
    if tokenizer is not None:
        try:
            tokenizer.save_pretrained(partial / TOKENIZER, save_jinja_files=False)
        except UnicodeEncodeError as error:
            raise UserError(f"data.tokenizer={corpus.tokenizer} has text that is no Unicode ({error.reason})") from None
        for path in (partial / TOKENIZER).iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        sync_directory(partial / TOKENIZER)
    start = PrepareState.start(identity)
    write_atomically(partial / PROGRESS, json.dumps(dataclasses.asdict(start)))
    return start


def _remove_ours(partial: Path) -> None:
    # The progress first: without it nothing that is left counts as committed.
    for path in sorted(partial.iterdir(), key=lambda path: path.name != PROGRESS):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _write_shards(
    corpus: Corpus, partial: Path, committed: PrepareState, *, progress: bool, commit_every_s: float
) -> LeftOut:
    eot_id = _eot_id(corpus, partial)
    left_out = LeftOut(**committed.left_out)
    writers = {
        split: SplitWriter(partial, split, token_dtype(corpus), corpus.shard_tokens, **committed.written[split])
        for split in SPLITS
    }
    committed_at = time.monotonic()
    n_tokens = sum(writer.tokens for writer in writers.values())
    bar = tqdm(
        desc="preparing", unit=" tokens", unit_scale=True, initial=n_tokens, disable=not progress, delay=BAR_DELAY_S
    )
    with bar, contextlib.closing(_encoded(corpus, partial, eot_id, committed)) as encoded:
        for (documents, state, bad_records), batch in encoded:
            for split, writer in writers.items():
                writer.write(*batch.tokens[split])
            left_out.add(bad_records, batch)
            bar.set_postfix_str(f"{documents:,} documents", refresh=False)
            n_tokens = sum(writer.tokens for writer in writers.values())
            bar.update(n_tokens - bar.n)
            if corpus.max_tokens and n_tokens >= corpus.max_tokens:
                break
            if time.monotonic() - committed_at >= commit_every_s:
                made = _written(writers), dataclasses.asdict(left_out)
                _commit(partial, PrepareState(committed.identity, documents, state, *made), writers)
                committed_at = time.monotonic()
    for writer in writers.values():
        writer.close()
    _refuse_empty_splits(corpus, writers, left_out)
    write_atomically(partial / MANIFEST, manifest_json(_make_manifest(corpus, partial, writers, eot_id)))
    return left_out


# How many documents have been read, the place behind them, and the errors of bad records among them.
_Position = tuple[int, Any, list[str]]


def _eot_id(corpus: Corpus, partial: Path) -> int:
    if isinstance(corpus, TokenCorpus) and corpus.eot_id is not None:
        return corpus.eot_id
    found: int = saved_tokenizer(partial).convert_tokens_to_ids(corpus.eot_token)
    return found


def _encoded(
    corpus: Corpus, partial: Path, eot_id: int, committed: PrepareState
) -> Generator[tuple[_Position, Encoded], None, None]:
    """The documents behind the last commit as tokens, with the position after each batch of them."""
    if isinstance(corpus, TokenCorpus):
        yield from _read_tokens(corpus, eot_id, committed)
        return
    assert isinstance(corpus, TextCorpus)
    stream = corpus.stream()
    if committed.stream is not None:
        stream.load_state_dict(committed.stream)
    batches = _batches(corpus, stream, committed.documents)
    with contextlib.closing(encode_batches(make_encoder(corpus, partial, eot_id), batches, corpus.workers)) as encoded:
        yield from encoded


def _read_tokens(
    corpus: TokenCorpus, eot_id: int, committed: PrepareState
) -> Generator[tuple[_Position, Encoded], None, None]:
    documents, place = committed.documents, committed.stream or {"file": 0, "token": 0}
    end = np.array([eot_id], token_dtype(corpus))
    for number, file in enumerate(corpus.open_files(place["file"]), place["file"]):
        start = place["token"] if number == place["file"] else 0
        for pieces, behind in file.documents(eot_id, start, longest=corpus.document_tokens):
            tokens: dict[SplitName, list[npt.NDArray[Any]]] = {split: [end[:0]] for split in SPLITS}
            for piece in filter(len, pieces):
                if not 0 <= piece.min() <= piece.max() < corpus.vocab_size:
                    odd = next(token for token in piece.tolist() if not 0 <= token < corpus.vocab_size)
                    raise UserError(
                        f"data.files: {file.path} has the token {odd}, beyond data.vocab_size={corpus.vocab_size}: "
                        f"correct that, or data.dtype if its tokens ({file.kind}) are not {file.tokens.dtype}"
                    )
                # The split of a document is the same whatever the type of its tokens.
                tokens[corpus.split_of(piece.astype("<u4").tobytes())] += [piece.astype(end.dtype), end]
                documents += 1
            arrays = {split: (np.concatenate(own), len(own) // 2, None) for split, own in tokens.items()}
            yield (documents, {"file": number, "token": behind}, []), Encoded(arrays, 0, 0, Counter())


def _batches(corpus: TextCorpus, stream: "IterableDataset", documents: int) -> Iterator[tuple[_Position, list[str]]]:
    """Batches of texts, each with the position after it."""
    texts: list[str] = []
    errors: list[str] = []
    characters = 0
    for text, error in read_texts(corpus, stream):
        documents += 1
        characters += len(text)
        if text:
            texts.append(text)
        if error:
            errors.append(error)
        if len(texts) + len(errors) >= BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
            yield (documents, stream.state_dict(), errors), texts
            texts, errors, characters = [], [], 0
    yield (documents, stream.state_dict(), errors), texts


def _commit(partial: Path, progress: PrepareState, writers: dict[SplitName, SplitWriter]) -> None:
    for writer in writers.values():
        writer.sync()
    write_atomically(partial / PROGRESS, json.dumps(dataclasses.asdict(progress)))


def _written(writers: dict[SplitName, SplitWriter]) -> dict[str, dict[str, Any]]:
    return {
        split: {"tokens": writer.tokens, "documents": writer.documents, "text_bytes": writer.text_bytes}
        for split, writer in writers.items()
    }


def _refuse_empty_splits(corpus: Corpus, writers: dict[SplitName, SplitWriter], left_out: LeftOut) -> None:
    total = sum(writer.documents for writer in writers.values())
    skipped = "".join(f"; {line}" for line in left_out.report(corpus))
    if not total:
        raise UserError(f"data.dir={corpus.dir}: the corpus has no documents{skipped}")
    advice = {
        "train": f"lower data.val_fraction={corpus.val_fraction} or data.probe_fraction={corpus.probe_fraction}",
        "val": f"raise data.val_fraction={corpus.val_fraction}",
        "probe": f"raise data.probe_fraction={corpus.probe_fraction}",
    }
    for split, writer in writers.items():
        if not writer.documents:
            # A document is in one split: with too few, no fraction helps.
            suggestion = (f"{advice[split]}, or " if total >= len(SPLITS) else "") + corpus.more_documents
            raise UserError(f"none of the {total} documents fell into the {split} split: {suggestion}{skipped}")


def _make_manifest(corpus: Corpus, partial: Path, writers: dict[SplitName, SplitWriter], eot_id: int) -> Manifest:
    splits = {split: _make_split(writer) for split, writer in writers.items()}
    with ThreadPoolExecutor(HASHING_THREADS) as threads:
        train, vocab = writers["train"], corpus.vocab_size
        counted = threads.map(lambda shard: _count_tokens(shard[0], train.dtype, vocab), train.shards())
        counts = sum(counted, np.zeros(vocab, np.int64))
    assert counts[eot_id] == writers["train"].documents, "end-of-text tokens are where documents end, and only there"
    tokenizer_files = sorted((partial / TOKENIZER).glob("*"))
    trained = "byte-level BPE trained on the train split" if isinstance(corpus, TextCorpus) else UNKNOWN
    return Manifest(
        format_version=FORMAT_VERSION,
        vocab_size=corpus.vocab_size,
        eot_id=eot_id,
        dtype=dtype_name(corpus),
        unigram_entropy=_entropy(counts),
        tokenizer=TokenizerFiles(
            name=corpus.tokenizer or trained,
            files={path.name: file_sha256(path) for path in tokenizer_files},
        ),
        splits=Splits(**splits),
        source=json.loads(json.dumps(corpus.settings())),
    )


def _make_split(writer: SplitWriter) -> Split:
    paths, sizes = zip(*writer.shards(), strict=True)
    digests = file_sha256s(paths)
    shards = [Shard(file=p.name, tokens=n, sha256=digest) for p, n, digest in zip(paths, sizes, digests, strict=True)]
    return Split(tokens=writer.tokens, documents=writer.documents, text_bytes=writer.text_bytes, shards=shards)


def _count_tokens(path: Path, dtype: np.dtype[Any], vocab_size: int) -> npt.NDArray[np.int64]:
    tokens = np.memmap(path, dtype=dtype, mode="r")
    counts = np.zeros(vocab_size, dtype=np.int64)
    for start in range(0, len(tokens), HASHING_BYTES):
        counts += np.bincount(tokens[start : start + HASHING_BYTES], minlength=vocab_size)
    return counts


def _entropy(counts: npt.NDArray[np.int64]) -> float:
    """The entropy of the distribution with these counts, in nats."""
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


def _lock(target: Path) -> contextlib.AbstractContextManager[None]:
    """Hold `<dir>.lock`."""
    refusal = f"data.dir={target}: another preparation of it is running; wait for it"
    return holding(target.with_name(target.name + ".lock").open("a"), refusal)
