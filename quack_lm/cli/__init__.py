"""The command line: `quack-lm VERB ...`, one module for each verb.

    quack-lm train       train one model
    quack-lm prepare     turn text into token shards
    quack-lm sweep       train every run of a grid, here or on a slurm cluster, and compare them
    quack-lm report      tables, figures and a page from the runs of a sweep
    quack-lm preflight   check config, data, machine and ranks before a long run
    quack-lm completion  turn on shell completion, for bash or zsh

`quack-lm VERB --help` explains each. `python -m quack_lm VERB` is the same, for torchrun and srun.
"""

import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

from quack_lm.errors import UserError, exit_on_user_error

VERBS = ("train", "prepare", "sweep", "report", "preflight", "completion")


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one verb and exit with its code."""
    verb, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    with exit_on_user_error():
        if verb in ("-h", "--help", "help"):
            print(__doc__)
            sys.exit(0)
        if verb not in VERBS:
            raise UserError(f"unknown verb {verb}; choose one of: {', '.join(VERBS)}")
        # Imported late: no verb pays for the libraries of another.
        sys.exit(importlib.import_module(f"quack_lm.cli.{verb}").main(rest))
