"""Ends a process that hangs: with the stack of every thread on stderr, and exit code 1.

Every rank has its own: when one hangs, all do, in the next collective, and each reports where. Each writes its stacks
at once, so that those of many ranks in one log stay apart. Where a hang keeps the interpreter's lock, in a driver for
instance, no Python thread can run; then C code, which needs no lock, writes them a little later.
"""

import faulthandler
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

STDERR = 2
# Launchers kill all ranks when the first one ends; until then each must have written.
OTHERS_WRITE_S = 2.0
# How much later the C code acts.
LOCKED_S = 10.0


class Watchdog:
    """Allows `timeout_s` between two calls of `feed`."""

    def __init__(self, timeout_s: float, *, rank: int = 0) -> None:
        self.timeout_s = timeout_s
        self.rank = rank
        self._deadline = 0.0
        self._stopped = threading.Event()

    def feed(self) -> None:
        """Report progress: the time limit starts again."""
        self._deadline = time.monotonic() + self.timeout_s
        faulthandler.dump_traceback_later(self.timeout_s + OTHERS_WRITE_S + LOCKED_S, exit=True, file=STDERR)

    def stop(self) -> None:
        """End watching, for good or until the next `watching`."""
        self._stopped.set()
        faulthandler.cancel_dump_traceback_later()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch within this context only."""
        # What kills the interpreter itself, such as reading data that was cut short under it, shows its stack too.
        faulthandler.enable(file=STDERR)
        self._stopped.clear()
        self.feed()
        threading.Thread(target=self._watch, daemon=True, name="watchdog").start()
        try:
            yield
        finally:
            self.stop()

    def _watch(self) -> None:
        while not self._stopped.wait(max(0.0, self._deadline - time.monotonic())):
            if time.monotonic() >= self._deadline:
                os.write(STDERR, self._stacks().encode(errors="replace"))
                time.sleep(OTHERS_WRITE_S)
                os._exit(1)

    def _stacks(self) -> str:
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        lines = [
            f"rank {self.rank}: nothing happened for trainer.timeout_s={self.timeout_s:g} s, so the run ends here:\n"
        ]
        for ident, frame in sys._current_frames().items():
            if ident != threading.get_ident():
                lines += [f"  thread {names.get(ident, ident)}\n", *traceback.format_stack(frame)]
        return "".join(lines)
