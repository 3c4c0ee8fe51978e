"""Ends a process that hangs, with the stack of every thread on stderr.

Every rank has its own: when one hangs, all do, in the next collective, and each reports where. A small process beside
the rank counts the time in which the rank is not stopped: a suspended job or machine is no hang. At the limit it tells
a thread of the rank, which writes the stacks at once, so that those of many ranks in one log stay apart, and exits with
code 1. Where a hang keeps the interpreter's lock, in a driver for instance, no Python thread can run; then the rank
gets SIGABRT a little later, at which C code, which needs no lock, writes the stacks.
"""

import faulthandler
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress

STDERR = 2
# Launchers kill all ranks when the first one ends; until then each must have written.
OTHERS_WRITE_S = 2.0
# How much later a rank is ended that does not do it itself.
LOCKED_S = 10.0


class Watchdog:
    """Allows `timeout_s` between two calls of `feed`."""

    def __init__(self, timeout_s: float, *, rank: int = 0) -> None:
        self.timeout_s = timeout_s
        self._headline = f"rank {rank}: nothing happened for trainer.timeout_s={timeout_s:g} s, so the run ends here:\n"
        self._clock: tuple[subprocess.Popen[bytes], socket.socket] | None = None

    def feed(self) -> None:
        """Report progress: the time limit starts again."""
        if self._clock:
            with suppress(OSError):  # of a clock that is stopped or gone, which must not keep the rank from its work
                self._clock[1].send(b".", socket.MSG_DONTWAIT)

    def stop(self) -> None:
        """End watching, for good or until the next `watching`."""
        if self._clock:
            self._clock[0].kill()
            self._clock[0].wait()
            self._clock = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch within this context only."""
        # What kills the interpreter itself, such as reading data that was cut short under it, shows its stack too.
        faulthandler.enable(file=STDERR)
        ours, theirs = socket.socketpair()
        with theirs:
            # It gets no stderr, which may be a log whose lock says that the rank lives, and no signals of a terminal.
            clock = subprocess.Popen(
                [sys.executable, "-I", "-S", __file__, str(self.timeout_s), self._headline],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        self._clock = clock, ours
        threading.Thread(target=self._watch, args=[ours], daemon=True, name="watchdog").start()
        try:
            yield
        finally:
            self.stop()

    def _watch(self, clock: socket.socket) -> None:
        with clock, suppress(ConnectionError):  # of one that `stop` has ended
            if clock.recv(1):
                os.write(STDERR, self._stacks().encode(errors="replace"))
                time.sleep(OTHERS_WRITE_S)
                os._exit(1)

    def _stacks(self) -> str:
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        lines = [self._headline]
        for ident, frame in sys._current_frames().items():
            if ident != threading.get_ident():
                lines += [f"  thread {names.get(ident, ident)}\n", *traceback.format_stack(frame)]
        return "".join(lines)


# ------------------------------------------------------------------------------------------------ the process beside it


def watch(rank: int, timeout_s: float, headline: str) -> None:
    """Wait for a byte on stdin at each `feed`; if none comes, send one back; if that does not help, end the rank."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):  # slurm may send them to all of a job
        signal.signal(number, signal.SIG_IGN)
    if is_silent(rank, timeout_s):
        os.write(0, b"!")
        if is_silent(rank, OTHERS_WRITE_S + LOCKED_S):
            with suppress(OSError), open(f"/proc/{rank}/fd/{STDERR}", "a") as log:
                log.write(headline)
            os.kill(rank, signal.SIGABRT)
            if is_silent(rank, LOCKED_S):
                os.kill(rank, signal.SIGKILL)


def is_silent(rank: int, seconds: float) -> bool:
    """Wait until the rank, while it was not stopped, has sent nothing for so long; False when it has ended."""
    tick_s, left_s, before = min(1.0, seconds / 4), seconds, time.monotonic()
    while left_s > 0:
        time.sleep(min(tick_s, left_s))
        if select.select([0], [], [], 0)[0]:
            if not os.read(0, 1 << 16):
                return False
            left_s = seconds
        now = time.monotonic()
        # A longer tick is one in which this process was stopped, too.
        left_s -= 0.0 if is_stopped(rank) else min(now - before, 2 * tick_s)
        before = now
    return os.getppid() == rank


def is_stopped(rank: int) -> bool:
    """Whether a signal, or a debugger, has stopped the process; False where there is no /proc."""
    with suppress(OSError), open(f"/proc/{rank}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] in "Tt"
    return False


if __name__ == "__main__":
    watch(os.getppid(), float(sys.argv[1]), sys.argv[2])
