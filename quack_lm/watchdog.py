"""Ends a process that hangs: with the stack of every thread on stderr, and exit code 1.

The clock is C code that needs neither the interpreter nor its lock, so it also ends a process that is stuck in a
collective, a driver, or a file system that went away. Every rank has its own: when one hangs, all do, in the next
collective, and all tell where.
"""

import faulthandler
from collections.abc import Iterator
from contextlib import contextmanager

STDERR = 2


class Watchdog:
    """Allows `timeout_s` between two calls of `feed`."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s

    def feed(self) -> None:
        """Something happened: wait again."""
        faulthandler.dump_traceback_later(self.timeout_s, exit=True, file=STDERR)

    def stop(self) -> None:
        """Nothing is waited for any more."""
        faulthandler.cancel_dump_traceback_later()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Nothing is watched outside."""
        # What kills the interpreter itself, such as reading data that was cut short under it, shows its stack too.
        faulthandler.enable(file=STDERR)
        self.feed()
        try:
            yield
        finally:
            self.stop()
