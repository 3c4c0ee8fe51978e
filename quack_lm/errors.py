"""The one exception for a user's mistake, and how a script ends on it."""

import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn


class UserError(ValueError):
    """A mistake in a config, data set, checkpoint or environment: one line naming the key or file, and the mend."""


# srun ends the other ranks when one fails, and once one of them has died of that, it listens to none any more (slurm's
# step_launch.c, client_io_handler_abort): the one that speaks needs a moment to be heard, and to write its summary.
SPEAKER_HAS_S = 2.0


def tell_job(word: str) -> None:
    """Tell slurm/job.sh why this process ends: no exit code of srun says it once other ranks had to be killed."""
    if file := os.environ.get("QUACK_JOB"):
        with suppress(OSError):  # another rank has told
            os.rename(file, f"{file}.{word}")


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """End the program with one clear line and exit code 2 instead of a traceback.

    Under srun, that line or the traceback of another error is in the job's log before the other ranks are ended.
    """
    try:
        yield
    except UserError as error:
        tell_job("mistake")
        # Of all the processes on a machine, one speaks; one whose rank cannot be read, too, for that may be the error.
        rank = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))
        if not rank.isdecimal() or int(rank) == 0:
            print(f"error: {_one_line(str(error))}", file=sys.stderr)
        else:
            time.sleep(SPEAKER_HAS_S)
        distributed = sys.modules.get("torch.distributed")  # where it is not loaded, it has not been used
        if distributed is not None and distributed.is_initialized():
            exit_without_teardown(2)
        _let_be_heard()
        raise SystemExit(2) from None
    except Exception:
        if not _is_one_of_many():
            raise
        sys.excepthook(*sys.exc_info())
        _let_be_heard()
        raise SystemExit(1) from None


def exit_without_teardown(code: int) -> NoReturn:
    """End this process at once; what is still being done beside it, in threads, is neither waited for nor torn down."""
    if code:
        _let_be_heard()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _is_one_of_many() -> bool:
    """Whether srun has started this process with others."""
    return os.environ.get("SLURM_STEP_NUM_TASKS", "1") != "1"


def _let_be_heard() -> None:
    """Wait until srun has passed on what was said."""
    sys.stdout.flush()
    sys.stderr.flush()
    if _is_one_of_many():
        time.sleep(SPEAKER_HAS_S)


def printable(text: str) -> str:
    """The text without what a foreign file could use to steer a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _one_line(text: str) -> str:
    """The text on one line, printable, and without passwords."""
    # What a URL has before an @; of its beginning, a path keeps one slash, and a grammar may take the colon away.
    return re.sub(r"(:/+|//)[^/\s]*@", r"\1***@", printable(" ".join(text.split())))
