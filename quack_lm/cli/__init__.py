"""The command line: `quack-lm VERB ...`, one module for each verb.

    quack-lm train       train one model
    quack-lm prepare     turn text into token shards
    quack-lm sweep       train every run of a grid, here or on a slurm cluster, and compare them
    quack-lm report      tables, figures and a page from the runs of a sweep
    quack-lm generate    text from a checkpoint
    quack-lm export      write a trained model as a directory of Hugging Face transformers
    quack-lm plan        parameters, memory, communication and time of a run or a sweep, without its hardware
    quack-lm eval        evaluate a checkpoint on tasks of lm-eval
    quack-lm lr-find     raise the learning rate in a short training: where does the loss turn up?
    quack-lm bench       compare the speed of training steps
    quack-lm gpu-check   tests, benchmarks and a trace on a GPU, on one page
    quack-lm preflight   check config, data, machine and ranks before a long run
    quack-lm submit      train, prepare or preflight as a job of a slurm cluster
    quack-lm completion  turn on shell completion, for bash or zsh

`quack-lm VERB --help` explains each; `quack-lm --version` prints the version. `python -m quack_lm VERB` is the same
command, for torchrun and srun.
"""

import importlib
import logging
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

from quack_lm import __version__, slurm
from quack_lm.errors import UserError, exit_without_teardown, explaining
from quack_lm.text import PrintableRecord, echo, one_line, refuse_secret
from quack_lm.training.stop_signals import follow_launcher

VERBS = (
    "train",
    "prepare",
    "sweep",
    "report",
    "generate",
    "export",
    "plan",
    "eval",
    "lr-find",
    "bench",
    "gpu-check",
    "preflight",
    "submit",
    "completion",
)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one verb and exit with its code."""
    follow_launcher()
    verb, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    logging.setLogRecordFactory(PrintableRecord)
    with exit_on_user_error():
        if verb in ("-h", "--help", "help"):
            echo(*__doc__.splitlines())
            sys.exit(0)
        if verb == "--version":
            echo(f"quack-lm {__version__}")
            sys.exit(0)
        if verb not in VERBS:
            raise UserError(f"unknown verb {verb}; choose one of: {', '.join(VERBS)}")
        for argument in rest:  # which are written down
            key = re.match(r"[\w.+-]+(?==)", argument)
            refuse_secret(key[0] if key else f"quack-lm {verb}", argument)
        try:
            # Imported late: no verb pays for the libraries of another.
            sys.exit(importlib.import_module(f"quack_lm.cli.{verb.replace('-', '_')}").main(rest))
        except ModuleNotFoundError as error:
            if (error.name or "quack_lm").startswith("quack_lm"):
                raise
            raise UserError(
                f"{error}, which quack_lm needs; activate the environment (in a checkout: source .venv/bin/activate), "
                f"or install quack_lm for {sys.executable}"
            ) from None


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """End the program on a UserError, or a file that the system refuses, with one line on stderr and exit code 2.

    Under srun, that line or the traceback of another error reaches the job's log before the other ranks are ended.
    """
    try:
        with explaining():
            yield
    except UserError as error:
        slurm.tell_job("user_error")
        if slurm.is_first_on_node():
            echo(f"error: {one_line(str(error))}", err=True)
        else:
            time.sleep(slurm.SRUN_STDERR_GRACE_S)
        slurm.flush_before_srun_kills()
        distributed = sys.modules.get("torch.distributed")  # where it is not loaded, it has not been used
        if distributed is not None and distributed.is_initialized():
            exit_without_teardown(2)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        echo("interrupted", err=True)
        raise SystemExit(130) from None
    except BrokenPipeError:
        # The reader of the output has gone, `| head` for instance: no traceback, here or when Python flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except Exception:
        if not slurm.is_one_of_many():
            raise
        sys.excepthook(*sys.exc_info())
        slurm.flush_before_srun_kills()
        raise SystemExit(1) from None
