"""Text from a trained model, token by token with a cache.

    language_model = load(Path("runs/mine"))
    language_model.generate(["def main("], sampling=Sampling(temperature=0))
    for pieces in language_model.stream(["def main("]):
        print(pieces[0], end="")

Axes: B sequences, T tokens, V vocabulary.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from quack_lm.attention.cache import bytes_per_token
from quack_lm.data.manifest import MANIFEST, TOKENIZER, Manifest, check_tokenizer, read_manifest
from quack_lm.data.tokenizer import TextTokenizer
from quack_lm.errors import UserError
from quack_lm.files import relative_note
from quack_lm.model import Transformer
from quack_lm.parallel import default_device, memory_of_a_rank
from quack_lm.text import is_text
from quack_lm.training.trained import Trained, find_run_data, load_trained

# Logits divided by less could be infinite in float32.
LEAST_TEMPERATURE = 1e-6
GIVE_TOKENIZER = "give the tokenizer of the run's data, or a data set with it, as tokenizer=DIR (--tokenizer DIR)"


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn.

    Args:
        temperature: logits are divided by it; 0: the most likely token is taken.
        top_k: draw from so many of the most likely tokens; None: from all.
        top_p: draw from the fewest most likely tokens that have this probability together.
        seed: of the draws, which for each prompt depend on nothing else but its number.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature != 0 and not LEAST_TEMPERATURE <= self.temperature < float("inf"):
            raise UserError(f"temperature={self.temperature} must be 0 or a number from {LEAST_TEMPERATURE} on")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k={self.top_k} must be at least 1; leave it out to draw from all tokens")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p} must be above 0 and at most 1")

    def probabilities(self, logits_BV: Tensor) -> Tensor:
        """Of each token to be drawn, for a temperature above 0: [B, V]."""
        scores = logits_BV / self.temperature
        if self.top_k is not None and self.top_k < scores.shape[-1]:
            least = scores.topk(self.top_k).values[..., -1:]
            scores = scores.masked_fill(scores < least, -torch.inf)
        if self.top_p < 1:
            ordered, order = scores.sort(descending=True)
            probabilities = ordered.softmax(-1)
            is_left_out = probabilities.cumsum(-1) - probabilities >= self.top_p
            is_left_out[..., 0] = False  # also where top_p is 0 in float32
            scores = scores.masked_fill(is_left_out.gather(-1, order.argsort(-1)), -torch.inf)
        return scores.softmax(-1)

    def generator(self, number: int) -> torch.Generator:
        """The generator of the draws for a prompt."""
        digest = hashlib.sha256(f"{self.seed}/{number}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))

    def draw(self, logits_BV: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """The next token of each sequence, [B]; on the host, as are the logits."""
        if self.temperature == 0:
            return logits_BV.argmax(-1)
        rows = zip(self.probabilities(logits_BV), generators, strict=True)
        return torch.cat([row.multinomial(1, generator=generator) for row, generator in rows])


def generate_tokens(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    stop_id: int | None = None,
    n_ids: int | None = None,
    first_number: int = 0,
) -> Iterator[list[int | None]]:
    """The next token of each sequence, again and again; None for one that has ended.

    Args:
        model: in evaluation mode.
        prompts: at least one token each; shorter ones are filled up at their beginning, which they do not see.
        max_new_tokens: how many tokens each sequence gets at most.
        sampling: how they are drawn.
        stop_id: the token that ends a sequence; it is not among those returned.
        n_ids: draw only tokens below this id, where the vocabulary of the model is larger than the tokenizer's.
        first_number: number of the first prompt, for its draws.
    """
    longest, device = max(map(len, prompts)), model.embedding.weight.device
    pads = torch.tensor([longest - len(prompt) for prompt in prompts])
    rows = [[*[0] * int(n), *prompt] for n, prompt in zip(pads, prompts, strict=True)]
    capacity = longest + max_new_tokens
    token_bytes = sum(bytes_per_token(a.cache_entries(), model.embedding.weight.dtype) for a in model.attentions)
    if (n_bytes := len(prompts) * capacity * token_bytes) > memory_of_a_rank(device.type):
        raise UserError(
            f"max_new_tokens={max_new_tokens}: the cache of {len(prompts)} texts of {capacity:,} tokens would take "
            f"{n_bytes / 2**30:,.0f} GiB, more than all memory here; lower it, or the batch size"
        )
    cache = model.make_cache(len(prompts), capacity, pads_B=pads)
    generators = [sampling.generator(first_number + number) for number in range(len(prompts))]
    new_BT, has_ended = torch.tensor(rows), [False] * len(prompts)
    for _ in range(max_new_tokens):
        logits_BV = model.decode(new_BT.to(device), cache)[:, -1, :n_ids].float().cpu()
        refuse_not_finite(logits_BV)
        drawn_B = sampling.draw(logits_BV, generators)
        has_ended = [ended or token == stop_id for ended, token in zip(has_ended, drawn_B.tolist(), strict=True)]
        if all(has_ended):
            return
        yield [None if ended else token for ended, token in zip(has_ended, drawn_B.tolist(), strict=True)]
        new_BT = drawn_B[:, None]


def refuse_not_finite(logits: Tensor) -> None:
    """UserError where a logit is infinite or nan: whatever would be chosen among them means nothing."""
    if not logits.isfinite().all():
        raise UserError("the model's logits are not finite; take float32 (--dtype float32), or another checkpoint")


@dataclass
class GrowingText:
    """The text of a prompt and its new tokens, which grows by whole characters."""

    tokenizer: TextTokenizer
    ids: list[int]
    shown: str = field(init=False)

    def __post_init__(self) -> None:
        self.shown = self.tokenizer.decode(self.ids)

    def add(self, token: int | None) -> str:
        """What a token adds; nothing while the bytes of a character are incomplete."""
        if token is not None:
            self.ids.append(token)
            if not self.tokenizer.decode(self.ids).endswith("\ufffd"):
                return self.rest()
        return ""

    def rest(self) -> str:
        """What has not been returned yet."""
        before, self.shown = self.shown, self.tokenizer.decode(self.ids)
        return self.shown[len(before) :]


@dataclass(frozen=True)
class LanguageModel:
    """A trained model with the tokenizer of its data."""

    trained: Trained
    tokenizer: TextTokenizer
    note: str | None = None  # what is not known about the tokenizer

    @property
    def model(self) -> Transformer:
        """The model alone."""
        return self.trained.model

    def encode(self, prompt: str) -> list[int]:
        """The tokens of a prompt; of an empty one the end-of-text token, behind which a document begins.

        UserError where it is no text: a lone surrogate is none.
        """
        if not is_text(prompt):
            raise UserError(f"prompt {prompt!r} must be text that UTF-8 can encode")
        return self.tokenizer.encode(prompt) or [self.tokenizer.eot_id]

    def stream(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int = 100,
        sampling: Sampling = Sampling(),
        first_number: int = 0,
    ) -> Iterator[list[str]]:
        """The next piece of the text that follows each prompt, possibly empty, until all have ended."""
        if isinstance(prompts, str):
            raise UserError("prompts is a list of texts: write [prompt]")
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens={max_new_tokens} must be at least 1")
        if not prompts:
            return
        tokens = [self.encode(prompt) for prompt in prompts]
        # An end-of-text token in the place of a prompt is not shown.
        texts = [
            GrowingText(self.tokenizer, ids if prompt else []) for ids, prompt in zip(tokens, prompts, strict=True)
        ]
        for step in generate_tokens(
            self.model,
            [tuple(ids) for ids in tokens],
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            stop_id=self.tokenizer.eot_id,
            n_ids=self.tokenizer.size,
            first_number=first_number,
        ):
            yield [text.add(token) for text, token in zip(texts, step, strict=True)]
        yield [text.rest() for text in texts]

    def generate(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int = 100,
        sampling: Sampling = Sampling(),
        batch_size: int = 16,
    ) -> list[str]:
        """The text that follows each prompt, up to the end of its document or so many tokens."""
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size} must be at least 1")
        texts: list[str] = []
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            pieces = self.stream(batch, max_new_tokens=max_new_tokens, sampling=sampling, first_number=start)
            texts += ["".join(parts) for parts in zip(*pieces, strict=True)]
        return texts


def load(
    path: Path, *, tokenizer: Path | None = None, device: str = "auto", dtype: torch.dtype = torch.float32
) -> LanguageModel:
    """The model of a run or a checkpoint with the tokenizer of its data.

    UserError where one is missing or damaged, or the tokenizer is known to be another.

    Args:
        path: the directory of a run, whose last valid checkpoint is taken, or of a checkpoint.
        tokenizer: its directory, or that of a prepared data set; None: the data.dir of the run.
        device: cpu, cuda, or auto for a GPU where there is one.
        dtype: of weights and cache.
    """
    trained = load_trained(path, device=torch.device(default_device() if device == "auto" else device), dtype=dtype)
    opened, note = _open_tokenizer(trained, tokenizer)
    n_rows = trained.model.sizes.vocab_size
    if opened.size > n_rows:
        raise UserError(
            f"tokenizer={tokenizer}: it has {opened.size} entries and the model of {trained.checkpoint} only {n_rows}; "
            "give the tokenizer of the run's data"
        )
    if trained.config["data"]["mask_documents"]:
        trained.model.eot_id = opened.eot_id
    return LanguageModel(trained, opened, note)


def _open_tokenizer(trained: Trained, directory: Path | None) -> tuple[TextTokenizer, str | None]:
    """The tokenizer, and a note where it could not be compared with that of the run's data."""
    if directory is None:
        return _run_tokenizer(trained), None
    with suppress(UserError):  # a copy of the run's data set
        return _run_tokenizer(trained, directory), None
    what, data = f"tokenizer={directory}", trained.config["data"]
    if not directory.is_dir():
        raise UserError(f"{what}: no such directory{relative_note(directory)}; {GIVE_TOKENIZER}")
    if (directory / MANIFEST).is_file():
        manifest, _ = read_manifest(directory)
        check_tokenizer(directory, manifest)
        opened = _open_data_set(directory, manifest, what)
    else:
        opened = TextTokenizer.open(directory, what, eot_token=data.get("eot_token"), eot_id=data.get("eot_id"))
    try:
        own = _run_tokenizer(trained)
    except UserError:
        return opened, f"note: {what} was not compared with the tokenizer of the run's data, which is not here"
    if opened.tokenizer.get_vocab() != own.tokenizer.get_vocab():
        raise UserError(f"{what} is another tokenizer than that of the run's data; leave it out to use that one")
    return opened, None


def _run_tokenizer(trained: Trained, directory: Path | None = None) -> TextTokenizer:
    place, manifest = find_run_data(trained.checkpoint, trained.config, directory, fix=GIVE_TOKENIZER)
    return _open_data_set(place, manifest, f"data.dir={place} of {trained.checkpoint}")


def _open_data_set(directory: Path, manifest: Manifest, what: str) -> TextTokenizer:
    if not manifest.tokenizer.files:
        raise UserError(f"{what} has no tokenizer, for its tokens were made elsewhere; {GIVE_TOKENIZER}")
    return TextTokenizer.open(directory / TOKENIZER, what, eot_id=manifest.eot_id)
