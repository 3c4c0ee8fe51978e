"""Evaluation on tasks: scores against a plain reference, windows that cover a text once, and tasks that are none."""

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from quack_lm.config import compose
from quack_lm.errors import UserError
from quack_lm.model import Transformer
from quack_lm.parallel import World, materialize
from quack_lm.training.build import make_model
from quack_lm.training.evaluation import SHIPPED, Choices, Evaluation, Task, Text, read_tasks

HERE = World(0, 1, 0, torch.device("cpu"))
EOT, SEQ_LEN = 0, 16


def encode(text: str) -> list[int]:
    """Bytes, of which pairs of letters are one token: ids of a text are not those of its parts."""
    ids, raw = [], text.encode()
    while raw:
        n = 2 if raw[:2].isalpha() and len(raw) > 1 else 1
        ids.append(1 + (raw[0] * 3 + raw[n - 1]) % 500)
        raw = raw[n:]
    return ids


@pytest.fixture(scope="module")
def model() -> Transformer:
    sizes = ["model.d_model=32", "model.n_layers=2", "model.n_heads=2", "model.d_ff=48", "model.vocab_size=512"]
    made = make_model(compose(["experiment=tiny", *sizes]))
    materialize(made, lambda name, shape: made.initial_value(name, shape, seed=0, device=HERE.device), HERE.device)
    with torch.no_grad():  # logits that tell tokens apart
        made.embedding.weight.mul_(20)
    return made


def evaluate(model: Transformer, *tasks: Task, micro_batch_size: int = 3) -> dict[str, float]:
    evaluation = Evaluation(
        tasks, encode, HERE, every=1, eot_id=EOT, seq_len=SEQ_LEN, micro_batch_size=micro_batch_size
    )
    return evaluation.run(model)


def log_probability(model: Transformer, before: list[int], after: list[int]) -> float:
    """Of tokens after others, one forward for each, in float64."""
    total = 0.0
    with torch.no_grad():
        for n in range(len(after)):
            logits = model(torch.tensor([[*before, *after[:n]]]))[0, -1].double()
            total += logits.log_softmax(-1)[after[n]].item()
    return total


CHOICES = [
    Choices(context="ab c ", choices=["d", "efg", "hi j"], answer=1),
    Choices(context="", choices=["xyz", "q"], answer=0),
    Choices(context="The end of it", choices=[" is", " are not"], answer=1),
    Choices(context="a context that is longer than all tokens of a sequence", choices=[" yes", " no, no"], answer=0),
]


def test_choices_are_scored_by_their_tokens_after_the_context(model: Transformer) -> None:
    scores = []
    for item in CHOICES:
        context = item.context.rstrip()
        own = []
        for choice in item.choices:
            tokens = encode(context + item.context[len(context) :] + choice)
            # As lm-eval: the end-of-text token stands for an empty context alone.
            before, after = tokens[: len(encode(context))] or [EOT], tokens[len(encode(context)) :]
            own.append(log_probability(model, before[-(SEQ_LEN + 1 - len(after)) :], after))
        scores.append(own)
    sizes = [[len(choice) for choice in item.choices] for item in CHOICES]
    right = [
        max(range(len(own)), key=own.__getitem__) == item.answer for own, item in zip(scores, CHOICES, strict=True)
    ]
    per_byte = [[s / n for s, n in zip(own, n_bytes, strict=True)] for own, n_bytes in zip(scores, sizes, strict=True)]
    right_norm = [
        max(range(len(own)), key=own.__getitem__) == i.answer for own, i in zip(per_byte, CHOICES, strict=True)
    ]
    of_answers = sum(own[item.answer] for own, item in zip(scores, CHOICES, strict=True))
    n_bytes = sum(own[item.answer] for own, item in zip(sizes, CHOICES, strict=True))
    assert 0 < sum(right) + sum(right_norm) < 8, "a score of all or nothing would show little"
    for micro_batch_size in (1, 3, 100):
        found = evaluate(model, Task("pond", CHOICES), micro_batch_size=micro_batch_size)
        assert found == {
            "eval/pond/accuracy": sum(right) / 4,
            "eval/pond/accuracy_norm": sum(right_norm) / 4,
            "eval/pond/bits_per_byte": pytest.approx(-of_answers / math.log(2) / n_bytes, rel=1e-5),
        }


@pytest.mark.parametrize("n_letters", [1, 2 * SEQ_LEN, 2 * SEQ_LEN + 1, 5 * SEQ_LEN])
def test_every_token_of_a_text_counts_once_and_the_last_window_is_full(model: Transformer, n_letters: int) -> None:
    texts = [("a1" * n_letters)[:n_letters], "ein Wörtchen"]
    total, n_tokens = 0.0, 0
    for text in texts:
        tokens = [EOT, *encode(text)]
        n_tokens += len(tokens) - 1
        for start in range(0, len(tokens) - 1, SEQ_LEN):
            after = tokens[start + 1 : start + SEQ_LEN + 1]
            # The last window has the tokens before those that count.
            total += log_probability(model, tokens[max(0, start + len(after) - SEQ_LEN) : start + 1], after)
    found = evaluate(model, Task("first", CHOICES), Task("texts", [Text(text=text) for text in texts]))
    assert found["eval/texts/loss"] == pytest.approx(-total / n_tokens, rel=1e-5)
    n_bytes = sum(len(text.encode()) for text in texts)
    assert found["eval/texts/bits_per_byte"] == pytest.approx(-total / math.log(2) / n_bytes, rel=1e-5)


def test_a_model_whose_loss_is_not_finite_answers_nothing(model: Transformer) -> None:
    broken = [Choices(context="a", choices=["b", "c"], answer=answer) for answer in (0, 1)]
    with torch.no_grad():
        before = model.embedding.weight.clone()
        model.embedding.weight.fill_(math.nan)
        found = evaluate(model, Task("x", broken))
        model.embedding.weight.copy_(before)
    assert (found["eval/x/accuracy"], found["eval/x/accuracy_norm"]) == (0.0, 0.0)
    assert math.isnan(found["eval/x/bits_per_byte"])


def test_the_shipped_tasks_have_one_right_answer_each() -> None:
    tasks = read_tasks(sorted(path.stem for path in SHIPPED.glob("*.jsonl")))
    assert [task.name for task in tasks] == ["tiny_choice", "tiny_text"]
    for item in tasks[0].items:
        assert isinstance(item, Choices)
        assert len(set(item.choices)) == len(item.choices) >= 2


GOOD: dict[str, Any] = {"context": "a", "choices": ["b", "c"], "answer": 1}


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([], "has no line"),
        (["{"], "line 1"),
        ([GOOD, GOOD | {"answer": 2}], "line 2: .*answer 2 is not the index of a choice"),
        ([GOOD | {"choices": ["b"]}], "line 1: choices: List should have at least 2"),
        ([GOOD | {"label": 1}], "line 1: label: Extra inputs"),
        ([{"text": ""}], "line 1: text: String should have at least 1"),
        ([[1]], "line 1"),
        ([GOOD, {"text": "b"}], "has both kinds of items"),
        ([GOOD, '{"text": "\udcff"}'], "line 2: 'utf-8' codec can't decode byte 0xff"),
    ],
)
def test_a_file_that_is_no_task_is_refused_with_its_line(lines: list[Any], words: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=words):
        read_tasks([str(path)])


def test_lines_of_a_task_end_at_line_feeds_alone_and_may_be_blank(tmp_path: Path) -> None:
    # U+2028, which JSON allows in a string, ended a line; a byte-order mark and a blank line were errors.
    path = tmp_path / "mine.jsonl"
    path.write_bytes('\ufeff{"text": "a\u2028b"}\r\n\n{"text": "c"}'.encode())
    assert read_tasks([str(path)])[0].items == [Text(text="a\u2028b"), Text(text="c")]


def test_a_task_that_is_no_regular_file_is_not_called_missing(tmp_path: Path) -> None:
    (tmp_path / "folder.jsonl").mkdir()
    os.mkfifo(tmp_path / "pipe.jsonl")
    for name, words in (("folder", "Is a directory"), ("pipe", "is not a regular file")):
        with pytest.raises(UserError, match=rf"eval\.tasks: .*{name}\.jsonl.*{words}"):
            read_tasks([str(tmp_path / f"{name}.jsonl")])


def test_an_unknown_task_is_refused_and_so_are_two_of_one_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"eval\.tasks: there is no .*tiny_choise\.jsonl; did you mean tiny_choice"):
        read_tasks(["tiny_choise"])
    (tmp_path / "tiny_text.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(UserError, match="two tasks are called tiny_text"):
        read_tasks(["tiny_text", str(tmp_path / "tiny_text.jsonl")])
