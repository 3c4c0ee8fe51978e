"""Generate text from a checkpoint.

    quack-lm generate runs/mine --prompt 'def main('
    quack-lm generate runs/mine/checkpoints/step_00000400 --prompt 'import' --temperature 0 --max-new-tokens 50
    quack-lm generate runs/mine --prompts prompts.txt --top-k 50 --top-p 0.95 --seed 1 -o texts.jsonl

A run's directory stands for its last valid checkpoint. The tokenizer is that of the run's data, found by its data.dir.
A text ends where the model ends the document, or after --max-new-tokens. One text is shown while it is made, several
when they are complete. Draws depend on --seed and on the number of the prompt alone.
"""

import json
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quack_lm.cli.flags import Parser, add_model, check_file, load_model
from quack_lm.errors import UserError, explaining
from quack_lm.files import open_regular, parse_json, user_path, write_atomically
from quack_lm.text import echo, echo_piece, is_text

if TYPE_CHECKING:
    from quack_lm.generate import LanguageModel


def read(arguments: list[str]) -> Namespace:
    """The flags; UserError for a mistake in them."""
    parser = Parser("generate", __doc__)
    add_model(parser, dtype_of="weights and cache")
    add = parser.add_argument
    add("--prompt", action="append", default=[], help="text to continue; several make several texts (none)")
    add("--prompts", type=user_path, metavar="FILE", help='a prompt per line, of a .jsonl file as {"prompt": ...}')
    add("--max-new-tokens", type=int, default=100, metavar="N", help="tokens of a text at most (100)")
    add("--temperature", type=float, default=1.0, metavar="T", help="0: always the most likely token (1)")
    add("--top-k", type=int, metavar="K", help="draw from the K most likely tokens (all)")
    add("--top-p", type=float, default=1.0, metavar="P", help="draw from the fewest tokens with probability P (1)")
    add("--seed", type=int, default=0, help="of the draws (0)")
    add("--batch-size", type=int, default=16, metavar="N", help="texts made at once (16)")
    add("-o", "--out", type=user_path, metavar="FILE", help="write prompts and texts as lines of JSON")
    options = parser.parse_args(arguments)
    for name, value in (("--max-new-tokens", options.max_new_tokens), ("--batch-size", options.batch_size)):
        if value < 1:
            raise UserError(f"{name} {value} must be at least 1")
    if prompt := next((prompt for prompt in options.prompt if not is_text(prompt)), None):
        raise UserError(f"--prompt {prompt!r} is not UTF-8 text; correct it, or give it in a file with --prompts")
    check_file(options.out)
    return options


def main(arguments: list[str]) -> int:
    """Generate a text for each prompt; returns the exit code."""
    options = read(arguments)
    prompts = [*options.prompt, *(read_prompts(options.prompts) if options.prompts else [])] or [""]

    # Imported late: --help and a mistake in the flags need not wait for torch.
    from quack_lm.generate import Sampling

    sampling = Sampling(temperature=options.temperature, top_k=options.top_k, top_p=options.top_p, seed=options.seed)
    language_model = load_model(options)
    if note := length_note(language_model, prompts, options.max_new_tokens):
        echo(note, err=True)
    start = time.perf_counter()
    how: dict[str, Any] = {"max_new_tokens": options.max_new_tokens, "sampling": sampling}
    if len(prompts) == 1 and not options.out:
        pieces = language_model.stream(prompts, **how)
        (first,) = next(pieces)  # or an error, before anything is shown
        echo_piece(prompts[0] + first)
        for (piece,) in pieces:
            echo_piece(piece)
        echo("")
    else:
        texts = language_model.generate(prompts, batch_size=options.batch_size, **how)
        _show(prompts, texts, options.out)
    echo(f"{language_model.trained.checkpoint}, {time.perf_counter() - start:.1f} s", err=True)
    return 0


def _show(prompts: Sequence[str], texts: Sequence[str], out: Path | None) -> None:
    if out is None:
        for number, (prompt, text) in enumerate(zip(prompts, texts, strict=True), start=1):
            echo(f"--- {number}")
            echo_piece(f"{prompt}{text}\n")
        return
    lines = (json.dumps({"prompt": p, "text": t}) + "\n" for p, t in zip(prompts, texts, strict=True))
    with explaining(f"-o {out}", "or choose another file"):
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, "".join(lines))
    echo(f"{len(texts)} texts: {out}")


def read_prompts(file: Path) -> list[str]:
    """The prompts of a file, one in each line; UserError where there is none, or a line is not one."""
    with explaining(f"--prompts {file}", "or choose another file"), open_regular(file) as opened:
        try:
            lines = opened.read().removeprefix("\ufeff").split("\n")  # without a byte-order mark
        except UnicodeDecodeError:
            raise UserError(f"--prompts {file} is not UTF-8 text; choose another file") from None
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if not numbered:
        raise UserError(f"--prompts {file} has no prompt; write one in each line")
    if file.suffix != ".jsonl":
        return [line for _, line in numbered]
    prompts = []
    for number, line in numbered:
        try:
            found = parse_json(line)["prompt"]
        except (ValueError, KeyError, TypeError):
            found = None
        if not is_text(found):
            raise UserError(f'--prompts {file}, line {number}: expected {{"prompt": "..."}}, with UTF-8 text')
        prompts.append(found)
    return prompts


def length_note(language_model: "LanguageModel", prompts: Sequence[str], max_new_tokens: int) -> str | None:
    """What to know about texts that may become longer than the sequences of training."""
    trained_length = language_model.trained.config["trainer"]["seq_len"]
    longest = max(len(language_model.encode(prompt)) for prompt in prompts) + max_new_tokens
    if longest <= trained_length:
        return None
    return f"note: up to {longest} tokens, and the model was trained on sequences of {trained_length} (trainer.seq_len)"
