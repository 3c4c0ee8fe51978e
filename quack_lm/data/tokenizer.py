"""Tokenizers of a corpus, loaded or trained, and the encoding of its documents in worker processes."""

import contextlib
import itertools
import json
import multiprocessing
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from quack_lm.data.corpus import Corpus, TextCorpus, TokenCorpus, input_errors, read_texts, require_hub
from quack_lm.data.manifest import SPLITS, TOKENIZER, SplitName
from quack_lm.errors import UserError
from quack_lm.files import open_regular, parse_json, relative_note

T = TypeVar("T")
Tokenizer = Any  # a transformers tokenizer, or the `tokenizers.Tokenizer` inside it

BAR_DELAY_S = 2.0  # no bar above the error message of what is refused at once
# A longer word of a text, which can only be data, counts as several where a tokenizer is trained: the time that a word
# takes is quadratic in its length.
WORD_BYTES = 1000
BYTES = 256  # the least vocabulary of a byte-level tokenizer, less its special tokens


# ------------------------------------------------------------------------------------------------ tokenizer


def make_tokenizer(corpus: Corpus, *, progress: bool) -> Tokenizer | None:
    """The tokenizer of a corpus, loaded or trained; None for tokens of an unknown one.

    UserError where it does not fit the corpus' settings.
    """
    if corpus.tokenizer is not None:
        tokenizer = _load_tokenizer(corpus)
    elif isinstance(corpus, TextCorpus):
        tokenizer = _train_tokenizer(corpus, progress=progress)
    else:
        return None
    vocabulary = tokenizer.get_vocab()
    size = max(vocabulary.values(), default=-1) + 1
    if size != corpus.vocab_size:
        trained = " (the corpus is too small for more)" if corpus.tokenizer is None else ""
        raise UserError(
            f"data.vocab_size={corpus.vocab_size} is not the tokenizer's, which has {size} entries{trained}: set "
            f"data.vocab_size={size}"
        )
    is_given = isinstance(corpus, TokenCorpus) and corpus.eot_id is not None
    if corpus.eot_token not in vocabulary and not is_given:
        special = ", ".join(tokenizer.all_special_tokens) or "none"
        raise UserError(
            f"data.eot_token={corpus.eot_token!r} is not in the vocabulary of data.tokenizer={corpus.tokenizer}; "
            f"its special tokens are: {special}"
        )
    return tokenizer


def locate_tokenizer(corpus: Corpus) -> str:
    """The directory of the tokenizer, or its name on the hub; UserError for a directory that does not exist."""
    name = os.path.expanduser(str(corpus.tokenizer))
    if not os.path.isdir(name) and (name.startswith((".", "/")) or name.count("/") > 1):
        raise UserError(f"data.tokenizer={corpus.tokenizer}: no such directory{relative_note(name)}")
    return name


def _load_tokenizer(corpus: Corpus) -> Tokenizer:
    from transformers import AutoTokenizer

    name, what = locate_tokenizer(corpus), f"data.tokenizer={corpus.tokenizer}"
    if os.path.isdir(name):
        return _open_directory(Path(name), what)
    # What is in the cache needs no hub; where it is incomplete, the hub may have it.
    with contextlib.suppress(Exception):
        return AutoTokenizer.from_pretrained(name, local_files_only=True, trust_remote_code=False)
    require_hub(what)
    with input_errors(lambda: what):
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)


def _open_directory(directory: Path, what: str) -> Tokenizer:
    with input_errors(lambda: what, problem="not a transformers tokenizer directory"):
        for path in directory.iterdir():
            if not path.is_dir():
                open_regular(path).close()  # the library would wait for a pipe
        try:
            return _read_tokenizer(directory)
        except Exception:
            _refuse_damaged_json(directory)
            raise


def _refuse_damaged_json(directory: Path) -> None:
    """A ValueError that names the file, which the library does not."""
    for path in sorted(directory.glob("*.json")):
        try:
            parse_json(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}); copy it again") from None


def _read_tokenizer(directory: Path) -> Tokenizer:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)


def _train_tokenizer(corpus: TextCorpus, *, progress: bool) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if corpus.vocab_size <= BYTES:
        raise UserError(f"data.vocab_size={corpus.vocab_size}: a byte-level tokenizer has at least {BYTES + 1} entries")
    bpe = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([byte_level, pre_tokenizers.FixedLength(length=WORD_BYTES)])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=corpus.vocab_size,
        special_tokens=[corpus.eot_token],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    with tqdm(desc="training the tokenizer", unit=" documents", disable=not progress, delay=BAR_DELAY_S) as bar:
        texts = _train_texts(corpus, bar)
        first = next(texts, None)
        if first is None:
            raise UserError(f"{corpus.source()}: no documents to train a tokenizer on{_why_none(corpus)}")
        _run_interruptibly(lambda: bpe.train_from_iterator(itertools.chain([first], texts), trainer))
    bpe.pre_tokenizer = byte_level
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=corpus.eot_token, clean_up_tokenization_spaces=False)


def _run_interruptibly(work: Callable[[], T]) -> T:
    """Call a library that does not see Ctrl-C meanwhile: it is raised here, and the work goes on in a thread."""
    results: list[T] = []
    errors: list[BaseException] = []

    def call() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def _why_none(corpus: TextCorpus) -> str:
    documents, bad_records, first_error = 0, 0, None
    for text, error in read_texts(corpus, corpus.stream()):
        documents += bool(text)
        bad_records += error is not None
        first_error = first_error or error
    if documents:
        return (
            f": all {documents} of the corpus fell into the other splits; lower data.val_fraction and "
            f"data.probe_fraction, or {corpus.more_documents}"
        )
    return f"; {bad_records:,} bad records were left out, the first: {first_error}" if first_error else ""


def _train_texts(corpus: TextCorpus, bar: "tqdm[Any]") -> Iterator[str]:
    characters = 0
    for text, _ in read_texts(corpus, corpus.stream()):
        bar.update()
        if text and corpus.split_of(text) == "train":
            yield text
            characters += len(text)
        if characters >= corpus.tokenizer_characters:
            return


# ------------------------------------------------------------------------------------------------ encoding


@dataclass(frozen=True)
class Encoded:
    """Of each split the tokens, the number of documents and the bytes of their text in UTF-8, which may be unknown.

    And what of the texts the tokens do not have.
    """

    tokens: Mapping[SplitName, tuple[npt.NDArray[Any], int, int | None]]
    empty_documents: int  # texts without a token, which are left out
    characters: int  # of all texts, without white space; counted for tokenizers that may lose some
    lost: Counter[str]  # characters that decoding does not give back, and how often each


@dataclass(frozen=True)
class Encoder:
    """Turns texts into the tokens of each split, an end-of-text token after each document; sent to the workers."""

    corpus: TextCorpus
    tokenizer: Tokenizer
    eot_id: int
    dtype: np.dtype[Any]
    is_lossless: bool  # whether every text can be decoded from its tokens

    def __call__(self, texts: list[str]) -> Encoded:
        """The tokens of a batch of texts."""
        ids: dict[SplitName, list[int]] = {split: [] for split in SPLITS}
        documents = dict.fromkeys(SPLITS, 0)
        text_bytes = dict.fromkeys(SPLITS, 0)
        lost: Counter[str] = Counter()
        characters = empty = 0
        for text, tokens in zip(texts, self._encode(texts), strict=True):
            if not self.is_lossless:
                written = "".join(text.split())
                characters += len(written)
                lost.update(lost_characters(written, self.tokenizer.decode(tokens, skip_special_tokens=True)))
            if not tokens:
                empty += 1
                continue
            split = self.corpus.split_of(text)
            ids[split] += tokens
            ids[split].append(self.eot_id)
            documents[split] += 1
            text_bytes[split] += len(text.encode())
        arrays = {s: (np.array(ids[s], dtype=self.dtype), documents[s], text_bytes[s]) for s in SPLITS}
        return Encoded(arrays, empty, characters, lost)

    def _encode(self, texts: list[str]) -> list[list[int]]:
        # What a tokenizer lacks may show only at a text that needs it.
        with input_errors(lambda: f"data.tokenizer={self.corpus.tokenizer}", problem="it cannot encode a document"):
            ids = encode_texts(self.tokenizer, texts)
        # A document that spells the end-of-text token gets the ids of its letters: only we end documents.
        for i, text in enumerate(texts):
            if self.eot_id in ids[i]:
                ids[i] = self._encode_without_end(text)
        return ids

    def _encode_without_end(self, text: str) -> list[int]:
        """The tokens of a text that is cut inside of whatever would be the end-of-text token.

        A vocabulary may have it as an ordinary piece or an added token that is not special, which no setting of a
        tokenizer turns off. UserError where a single character is it, or where the tokenizer does not tell.
        """
        import tokenizers

        spans = [(0, 0)]
        if isinstance(self.tokenizer, tokenizers.Tokenizer):
            encoding = self.tokenizer.encode(text, add_special_tokens=False)
            spans = [span for token, span in zip(encoding.ids, encoding.offsets, strict=True) if token == self.eot_id]
            if not spans:
                return list(encoding.ids)
        if uncut := next((span for span in spans if span[1] - span[0] < 2), None):
            raise UserError(
                f"data.eot_token={self.corpus.eot_token!r} is what data.tokenizer={self.corpus.tokenizer} makes of "
                f"text as well, of {text[slice(*uncut)] or text!r:.60}, so that it does not mark the ends of "
                "documents: choose another data.eot_token or data.tokenizer"
            )
        cuts = [0, *(start + 1 for start, _ in spans), len(text)]
        return [token for a, b in itertools.pairwise(cuts) for token in self._encode_without_end(text[a:b])]


def encode_texts(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """The ids of each text, in which the name of a special token is text like any other."""
    import tokenizers

    if isinstance(tokenizer, tokenizers.Tokenizer):
        # It is set here because pickling, on the way to a worker, forgets it.
        tokenizer.encode_special_tokens = True
        return [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    encoded = tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)
    ids: list[list[int]] = encoded["input_ids"]
    return ids


def lost_characters(text: str, decoded: str) -> Counter[str]:
    """The characters, white space apart, that a text has more often than what was decoded from its tokens."""
    decoded = "".join(decoded.split())
    return Counter() if text == decoded else Counter(text) - Counter(decoded)


def _is_lossless(tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer has a token for each byte and changes no text; False where that cannot be told."""
    import tokenizers
    from tokenizers import pre_tokenizers

    if not isinstance(tokenizer, tokenizers.Tokenizer):
        return False
    is_byte_level = '"ByteLevel"' in json.dumps(json.loads(tokenizer.to_str())["pre_tokenizer"])
    bytes_known = set(pre_tokenizers.ByteLevel.alphabet()) <= tokenizer.get_vocab().keys()
    return is_byte_level and bytes_known and tokenizer.normalizer is None


def saved_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer that a data set has a copy of: an interrupted preparation continues with it."""
    with input_errors(lambda: f"data.dir: {directory / TOKENIZER}", problem=f"remove {directory} to start again"):
        return _read_tokenizer(directory / TOKENIZER)


def make_encoder(corpus: TextCorpus, directory: Path, eot_id: int) -> Encoder:
    """An encoder with the tokenizer of a data set."""
    tokenizer = _inner(saved_tokenizer(directory))
    return Encoder(corpus, tokenizer, eot_id, token_dtype(corpus), _is_lossless(tokenizer))


def _inner(tokenizer: Tokenizer) -> Tokenizer:
    """The `tokenizers.Tokenizer` inside of a fast one, which cuts and fills up nothing."""
    if tokenizer.is_fast:
        tokenizer = tokenizer.backend_tokenizer
        tokenizer.no_truncation()
        tokenizer.no_padding()
    return tokenizer


@dataclass(frozen=True)
class TextTokenizer:
    """A saved tokenizer for the text that a trained model reads and writes.

    Its ids of a text are those that the preparation of a data set makes of it.
    """

    tokenizer: Tokenizer
    eot_id: int
    size: int  # ids are below

    @classmethod
    def open(cls, directory: Path, what: str, *, eot_token: str | None = None, eot_id: int | None = None) -> Self:
        """Read a directory that transformers wrote; UserError, which begins with `what`, where it is none."""
        tokenizer = _open_directory(directory, what)
        vocabulary = tokenizer.get_vocab()
        if eot_id is None:
            if eot_token not in vocabulary:
                raise UserError(f"{what}: its vocabulary has no {eot_token!r}, which ends documents in the run's data")
            eot_id = int(vocabulary[eot_token])
        return cls(_inner(tokenizer), eot_id, 1 + max(vocabulary.values(), default=-1))

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without an end-of-text token."""
        return encode_texts(self.tokenizer, [text])[0]

    def decode(self, ids: list[int]) -> str:
        """The text of some ids."""
        text: str = self.tokenizer.decode(ids, skip_special_tokens=False)
        return text


def dtype_name(corpus: Corpus) -> Literal["uint16", "uint32"]:
    """The smallest dtype that holds every token id."""
    return "uint16" if corpus.vocab_size <= 2**16 else "uint32"


def token_dtype(corpus: Corpus) -> np.dtype[Any]:
    """That of the shards, little-endian on any machine."""
    return np.dtype(dtype_name(corpus)).newbyteorder("<")


_worker_encoder: Encoder


def _start_worker(encoder: Encoder, stop: Connection) -> None:
    global _worker_encoder
    _worker_encoder = encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_when_closed, args=(stop,), daemon=True).start()


def _die_when_closed(stop: Connection) -> None:
    # The other end is closed when the parent stops or is killed. The pipe on which a pool's worker waits it holds open
    # itself, so it would outlive its parent; and it sees no signal while it encodes a long document.
    with contextlib.suppress(EOFError, OSError):
        stop.recv_bytes()
    os._exit(1)


def _encode_in_worker(texts: list[str]) -> Encoded:
    return _worker_encoder(texts)


def encode_batches(
    encoder: Encoder, batches: Iterable[tuple[T, list[str]]], workers: int
) -> Generator[tuple[T, Encoded], None, None]:
    """Each batch's position and encoding, in order, with a bounded number of batches in flight."""
    if workers < 2:
        for position, texts in batches:
            yield position, _run_interruptibly(partial(encoder, texts))
        return
    context = multiprocessing.get_context("spawn")
    stop, ours = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(encoder, stop))
    pending: deque[tuple[T, Future[Encoded]]] = deque()
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
        ours.close()
        pool.shutdown(cancel_futures=True)
        stop.close()
