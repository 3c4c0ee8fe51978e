"""The parser of verbs with ordinary flags."""

import argparse
import math
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, NoReturn

from quack_lm.errors import UserError, explaining
from quack_lm.files import nearest_existing_parent, refuse_other_than_file, user_path
from quack_lm.text import echo

if TYPE_CHECKING:
    from quack_lm.generate import LanguageModel


class Parser(argparse.ArgumentParser):
    """argparse's, whose errors are a UserError and whose --help is the docstring of the verb's module."""

    def __init__(self, verb: str, description: str | None) -> None:
        super().__init__(
            prog=f"quack-lm {verb}",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Refuse the command line."""
        raise UserError(f"{message}; see --help")


def add_model(parser: Parser, *, dtype_of: str) -> None:
    """The flags of `load_model`; `dtype_of` is what the model has in --dtype."""
    add = parser.add_argument
    add("checkpoint", type=user_path, help="the directory of a run, or of one of its checkpoints")
    add("--tokenizer", type=user_path, metavar="DIR", help="its directory, or a prepared data set (the run's data.dir)")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: a GPU where there is one")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help=f"of {dtype_of} (float32)")


def load_model(options: argparse.Namespace) -> "LanguageModel":
    """The model and tokenizer that the flags of `add_model` name."""
    # Imported late: --help and a mistake in the flags need not wait for torch.
    import torch

    from quack_lm.generate import load
    from quack_lm.parallel import check_world, resolve_device

    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here; use --device cpu or install a CUDA build of torch")
    device = resolve_device(options.device)
    check_world(device=device)
    loaded = load(options.checkpoint, tokenizer=options.tokenizer, device=device, dtype=getattr(torch, options.dtype))
    if loaded.note:
        echo(loaded.note, err=True)
    return loaded


def read_number(text: str) -> float:
    """The number that a key's value is; nan, which no bound admits, where it is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def check_file(out: Path | None) -> None:
    """UserError where -o names no file that can be written."""
    if out:
        check_writable(out, f"-o {out}")
        refuse_other_than_file(f"-o {out}", out)


def check_writable(out: Path, what: str) -> None:
    """UserError, which begins with `what`, where nothing of this name can be made; leaves nothing."""
    with explaining(what, "or choose another place"):
        parent = nearest_existing_parent(out.parent)
        try:
            TemporaryFile(dir=parent).close()  # more than `os.access` says, to root for example
        except OSError as error:
            raise UserError(
                f"{what}: {parent} is not a writable directory ({error.strerror}); choose another"
            ) from None
