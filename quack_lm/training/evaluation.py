"""Tasks on which a run is evaluated while it trains: files of JSON lines, all of one of two kinds.

    {"context": "2 + 2 =", "choices": [" 4", " 5"], "answer": 0}       # multiple choice
    {"text": "A text that is scored as a whole."}                      # perplexity

A choice is scored by the sum of its tokens' log-probabilities after the context, a text by those of all its tokens, as
lm-eval does it (EleutherAI/lm-evaluation-harness): `accuracy` takes the largest sum, `accuracy_norm` that per byte.
`bits_per_byte`, of the right choices or of the texts, does not depend on the tokenizer; `loss` is in nats per token.
"""

import codecs
import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError, model_validator

from quack_lm.config import CONFIG_DIR, nearest
from quack_lm.errors import UserError, explained
from quack_lm.files import open_regular, user_path
from quack_lm.model import Transformer
from quack_lm.parallel import World, evaluating

SHIPPED = CONFIG_DIR / "tasks"
Encode = Callable[[str], list[int]]


@dataclass(frozen=True, kw_only=True)
class EvalSettings:
    """On which tasks a run is evaluated, and how often.

    Args:
        every: steps between evaluations, and one at the end; 0: none.
        tasks: names of files in configs/tasks/, or paths of files that end in .jsonl, by whose names they are logged.
    """

    every: NonNegativeInt = 0
    tasks: list[Annotated[str, Field(min_length=1)]] = field(default_factory=lambda: ["tiny_choice", "tiny_text"])

    def __post_init__(self) -> None:
        """Refuse an evaluation on nothing."""
        if self.every and not self.tasks:
            raise UserError(f"eval.every={self.every} has no eval.tasks: name some, or set eval.every=0")


class Choices(BaseModel):
    """A question with its answers, of which the one of index `answer` is right."""

    model_config = ConfigDict(extra="forbid", strict=True)

    context: str
    choices: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=2)]
    answer: NonNegativeInt

    @model_validator(mode="after")
    def _answer_is_a_choice(self) -> "Choices":
        if self.answer >= len(self.choices):
            raise ValueError(f"answer {self.answer} is not the index of a choice")
        return self


class Text(BaseModel):
    """A text."""

    model_config = ConfigDict(extra="forbid", strict=True)

    text: Annotated[str, Field(min_length=1)]


class Task(NamedTuple):
    """A task by the name under which it is logged; its items are all of one kind."""

    name: str
    items: Sequence[Choices] | Sequence[Text]


class Row(NamedTuple):
    """Tokens with the targets that count, for one score: many rows may sum to it."""

    score: int
    tokens: list[int]  # at most seq_len + 1
    n_scored: int  # of the last targets


def read_tasks(names: Sequence[str]) -> list[Task]:
    """The tasks of these names or paths; UserError for a file that is none, with the number of the line."""
    tasks = [_read_task(name) for name in names]
    for name in (task.name for task in tasks):
        if sum(task.name == name for task in tasks) > 1:
            raise UserError(f"eval.tasks: two tasks are called {name}; rename a file")
    return tasks


def _read_task(name: str) -> Task:
    path = user_path(name) if name.endswith(".jsonl") else SHIPPED / f"{name}.jsonl"
    if not path.exists():
        hint = "" if name.endswith(".jsonl") else f"; {nearest(name, sorted(p.stem for p in SHIPPED.glob('*.jsonl')))}"
        raise UserError(f"eval.tasks: there is no {path}{hint}")
    try:
        with open_regular(path, "rb") as file:
            content = file.read().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise UserError(explained(error, "eval.tasks")) from None
    items: list[Choices | Text] = []
    # Not splitlines(): JSON may have Unicode's line separators in a string.
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            raw = json.loads(line.decode())
            kind = Choices if isinstance(raw, dict) and "choices" in raw else Text
            items.append(kind.model_validate(raw))
        except (ValueError, RecursionError) as error:
            what = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
            where = ".".join(map(str, what["loc"]))
            raise UserError(
                f"eval.tasks: {path}, line {number}: {where}{': ' * bool(where)}{what['msg']}; a line is "
                '{"context": ..., "choices": [...], "answer": 0} or {"text": ...}'
            ) from None
    if len({type(item) for item in items}) != 1:
        raise UserError(
            f"eval.tasks: {path} has {'both kinds of items' if items else 'no line'}; give items of one kind"
        )
    return Task(path.stem, items)  # type: ignore[arg-type]


class Evaluation:
    """The rows of some tasks, and what a model scores on them, the same for every world size."""

    def __init__(
        self,
        tasks: Sequence[Task],
        encode: Encode,
        world: World,
        *,
        every: int,
        eot_id: int,
        seq_len: int,
        micro_batch_size: int,
    ) -> None:
        self.tasks = tasks
        self.every = every
        self.world = world
        self.micro_batch_size = micro_batch_size
        rows: list[Row] = []
        self.n_tokens: list[int] = []  # by score
        for task in tasks:
            for item in task.items:
                for pieces in _rows_of(item, encode, eot_id, seq_len):
                    rows += [Row(len(self.n_tokens), *piece) for piece in pieces]
                    self.n_tokens.append(sum(n for _, n in pieces))
        # Under FSDP every rank must run equally many forwards.
        padded = -len(rows) % (world.size * micro_batch_size)
        rows += [Row(0, [eot_id], 0)] * padded
        share = len(rows) // world.size
        own = rows[world.rank * share : (world.rank + 1) * share]
        self.scores = torch.tensor([row.score for row in own])
        self.tokens = torch.full((share, seq_len + 1), eot_id)
        self.is_scored = torch.zeros(share, seq_len, dtype=torch.bool)
        for number, row in enumerate(own):
            end = len(row.tokens)
            self.tokens[number, :end] = torch.tensor(row.tokens)
            self.is_scored[number, end - 1 - row.n_scored : end - 1] = True

    def run(self, model: Transformer, feed: Callable[[], None] = lambda: None) -> dict[str, float]:
        """`eval/<task>/<metric>` of every task; `feed` is called before each forward."""
        device = self.world.device
        nats_S = torch.zeros(len(self.n_tokens), dtype=torch.float64, device=device)
        with evaluating(model):
            for start in range(0, len(self.tokens), self.micro_batch_size):
                feed()
                part = slice(start, start + self.micro_batch_size)
                tokens, is_scored = (self.world.to_device(t[part]) for t in (self.tokens, self.is_scored))
                nats_BT = model(tokens[:, :-1], tokens[:, 1:]).view_as(is_scored)
                # where() and not a product: what does not count may be NaN in a run that diverges.
                nats_B = torch.where(is_scored, nats_BT, 0.0).sum(-1, dtype=torch.float64)
                nats_S.index_add_(0, self.scores[part].to(device), nats_B)
        # Before: each rank has the sums of its rows. After: of all rows.
        scores = iter(zip(self.world.sum(nats_S).tolist(), self.n_tokens, strict=True))
        return {
            f"eval/{task.name}/{key}": value for task in self.tasks for key, value in _metrics(task, scores).items()
        }


def _rows_of(item: Choices | Text, encode: Encode, eot_id: int, seq_len: int) -> Iterator[list[tuple[list[int], int]]]:
    """For each score of an item its rows: (tokens, how many of the last targets count)."""
    if isinstance(item, Text):
        tokens = [eot_id, *encode(item.text)]
        ends = [*range(seq_len, len(tokens) - 1, seq_len), len(tokens) - 1]
        # The last window is as long as the others: it has tokens before those that count.
        yield [(tokens[max(0, end - seq_len) : end + 1], end - start) for start, end in itertools.pairwise([0, *ends])]
        return
    # A space between context and choice belongs to the choice, as tokenizers have it.
    context = item.context.rstrip()
    space = item.context[len(context) :]
    before = encode(context) or [eot_id]
    for choice in item.choices:
        tokens = encode(context + space + choice)
        tokens = tokens if context else [eot_id, *tokens]
        if len(tokens) <= len(before):  # one token reaches from the context into the choice
            tokens = [*before, *encode(space + choice)]
        yield [(tokens[-seq_len - 1 :], min(len(tokens) - len(before), seq_len))]


def _metrics(task: Task, scores: Iterator[tuple[float, int]]) -> dict[str, float]:
    nats = tokens = n_bytes = 0.0
    right = right_norm = 0
    for item in task.items:
        texts = [item.text] if isinstance(item, Text) else item.choices
        sizes = [len(text.encode()) for text in texts]
        found = [next(scores) for _ in texts]
        answer = 0 if isinstance(item, Text) else item.answer
        nats, tokens, n_bytes = nats + found[answer][0], tokens + found[answer][1], n_bytes + sizes[answer]
        right += _lowest([score for score, _ in found]) == answer
        right_norm += _lowest([score / size for (score, _), size in zip(found, sizes, strict=True)]) == answer
    bits_per_byte = nats / math.log(2) / n_bytes
    if isinstance(task.items[0], Text):
        return {"loss": nats / tokens, "bits_per_byte": bits_per_byte}
    n = len(task.items)
    return {"accuracy": right / n, "accuracy_norm": right_norm / n, "bits_per_byte": bits_per_byte}


def _lowest(values: Sequence[float]) -> int:
    """The index of the lowest number; -1 where none is finite, which is no answer."""
    finite = [value for value in values if math.isfinite(value)]
    return values.index(min(finite)) if finite else -1
