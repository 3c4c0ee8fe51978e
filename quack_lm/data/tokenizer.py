"""Tokenizers of a corpus, loaded or trained, and the encoding of its documents in worker processes."""

import contextlib
import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from quack_lm.data.corpus import Corpus, input_errors, read_texts, require_hub
from quack_lm.data.manifest import SPLITS, TOKENIZER, SplitName
from quack_lm.errors import UserError
from quack_lm.files import open_regular, relative_note

T = TypeVar("T")
Tokenizer = Any  # a transformers tokenizer, or the `tokenizers.Tokenizer` inside it

BAR_DELAY_S = 2.0  # no bar above the error message of what is refused at once
BYTES = 256  # the least vocabulary of a byte-level tokenizer, less its special tokens


# ------------------------------------------------------------------------------------------------ tokenizer


def make_tokenizer(corpus: Corpus, *, progress: bool) -> Tokenizer:
    """The tokenizer of a corpus, loaded or trained; UserError where it does not fit the corpus' settings."""
    tokenizer = _train_tokenizer(corpus, progress=progress) if corpus.tokenizer is None else _load_tokenizer(corpus)
    vocabulary = tokenizer.get_vocab()
    size = max(vocabulary.values(), default=-1) + 1
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
        with input_errors(lambda: what, problem="not a transformers tokenizer directory"):
            for path in Path(name).iterdir():
                if not path.is_dir():
                    open_regular(path).close()  # the library would wait for a pipe
            return AutoTokenizer.from_pretrained(name, local_files_only=True, trust_remote_code=False)
    # What is in the cache needs no hub; where it is incomplete, the hub may have it.
    with contextlib.suppress(Exception):
        return AutoTokenizer.from_pretrained(name, local_files_only=True, trust_remote_code=False)
    require_hub(what)
    with input_errors(lambda: what):
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
    with tqdm(desc="training the tokenizer", unit=" documents", disable=not progress, delay=BAR_DELAY_S) as bar:
        texts = _train_texts(corpus, bar)
        first = next(texts, None)
        if first is None:
            raise UserError(f"{corpus.source()}: no documents to train a tokenizer on")
        bpe.train_from_iterator(itertools.chain([first], texts), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=corpus.eot_token, clean_up_tokenization_spaces=False)


def _train_texts(corpus: Corpus, bar: "tqdm[Any]") -> Iterator[str]:
    characters = 0
    for text in read_texts(corpus, corpus.stream()):
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
        # What a tokenizer lacks may show only at a text that needs it.
        with input_errors(lambda: f"data.tokenizer={self.corpus.tokenizer}", problem="it cannot encode a document"):
            return self._encode_all(texts)

    def _encode_all(self, texts: list[str]) -> list[list[int]]:
        import tokenizers

        if isinstance(self.tokenizer, tokenizers.Tokenizer):
            # A document that spells a special token gets the ids of its letters: only we end documents. It is set here
            # because pickling, on the way to a worker, forgets it.
            self.tokenizer.encode_special_tokens = True
            return [encoding.ids for encoding in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        encoded = self.tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)
        ids: list[list[int]] = encoded["input_ids"]
        return ids


def make_encoder(corpus: Corpus, directory: Path) -> Encoder:
    """An encoder with the tokenizer that the data set has a copy of: an interrupted preparation continues with it."""
    from transformers import AutoTokenizer

    with input_errors(lambda: f"data.dir: {directory / TOKENIZER}", problem=f"remove {directory} to start again"):
        tokenizer: Tokenizer = AutoTokenizer.from_pretrained(
            directory / TOKENIZER, local_files_only=True, trust_remote_code=False
        )
    eot_id = tokenizer.convert_tokens_to_ids(corpus.eot_token)
    if tokenizer.is_fast:
        tokenizer = tokenizer.backend_tokenizer
        tokenizer.no_truncation()
        tokenizer.no_padding()
    return Encoder(corpus, tokenizer, eot_id, np.dtype(dtype_name(corpus)).newbyteorder("<"))


def dtype_name(corpus: Corpus) -> Literal["uint16", "uint32"]:
    """The smallest dtype that holds every token id."""
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


def encode_batches(
    encoder: Encoder, batches: Iterable[tuple[T, list[str]]], workers: int
) -> Generator[tuple[T, dict[SplitName, tuple[npt.NDArray[Any], int]]], None, None]:
    """Each batch's position and encoding, in order, with a bounded number of batches in flight."""
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
