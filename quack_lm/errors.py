"""The one exception for a user's error, and what becomes one."""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

# What a system refuses to a program that is right, and what its user can do about it.
REMEDIES = {
    **dict.fromkeys((errno.EACCES, errno.EPERM), "change its permissions"),
    errno.EROFS: "mount its file system for writing",
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some of your quota",
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "allow more open files with ulimit -n"),
}


class UserError(ValueError):
    """An error in a config, data set, checkpoint or environment: one line with the key or file, and a fix."""


def explained(error: OSError, what: str = "", fix: str = "") -> str:
    """`WHAT: FILE: Permission denied; change its permissions, FIX`: one line for the user."""
    file = str(error.filename or "")
    where = what if file in what else file if what in file else f"{what}: {file}"
    problem = [where, error.strerror or str(error)]
    solution = [REMEDIES.get(error.errno or 0, "correct that"), fix]
    return "; ".join([": ".join(filter(None, problem)), ", ".join(filter(None, solution))])


@contextmanager
def explaining(what: str = "", fix: str = "") -> Iterator[None]:
    """An OSError inside becomes a UserError, `explained`; without `what`, only one of REMEDIES.

    Any other, where nothing was said about the file, is probably an error of this program, and keeps its traceback.
    """
    try:
        yield
    except OSError as error:
        if not what and error.errno not in REMEDIES:
            raise
        raise UserError(explained(error, what, fix)) from error


def exit_without_teardown(code: int) -> NoReturn:
    """End this process at once; background threads are neither waited for nor torn down."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
