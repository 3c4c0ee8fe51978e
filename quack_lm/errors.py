"""The one exception for a user's error, and how it is printed."""

import os
import re
import sys
from typing import NoReturn


class UserError(ValueError):
    """An error in a config, data set, checkpoint or environment: one line with the key or file, and a fix."""


def exit_without_teardown(code: int) -> NoReturn:
    """End this process at once; background threads are neither waited for nor torn down."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def printable(text: str) -> str:
    """The text without control characters: an untrusted file must not steer a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def one_line(text: str) -> str:
    """The text on one line, printable, and without the passwords of URLs."""
    # Whatever stands before an @ in a URL. A path keeps one slash of `://`, and a grammar may remove the colon.
    return re.sub(r"(:/+|//)[^/\s]*@", r"\1***@", printable(" ".join(text.split())))
