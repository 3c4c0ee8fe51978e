"""The signals that ask a run to stop, before its loop listens to them.

A sweep holds them back while it starts a process, so that none is lost to an interpreter that has no handler yet. From
the settings to the loop there is nothing to save, and a signal ends the process at once. From then on it asks the loop
to save and stop: see `Coordinator.supervising`.
"""

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)  # SIGHUP: the terminal was closed


PR_SET_PDEATHSIG = 1  # linux/prctl.h


def follow_launcher() -> None:
    """From now on, a torchrun that is killed sends SIGTERM to this process, on Linux: nobody else tells its ranks.

    Called first of all, since they may wait for each other for minutes. A sweep that is killed lets its runs go on.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        follow_parent()


def follow_parent() -> None:
    """From now on, the end of the process that started this one sends it SIGTERM, on Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def hold() -> None:
    """From now on, also in a new process or program, stop signals wait until `release`."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)


def release() -> None:
    """Deliver the stop signals that wait, and the later ones as they come."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


@contextmanager
def held() -> Iterator[None]:
    """A process that is started within has its stop signals wait until it is ready for them."""
    hold()
    try:
        yield
    finally:
        release()


@contextmanager
def handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Within, stop signals are released and have this handler; SIGHUP not where nohup has it ignored."""
    nohup = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else set()
    before = {number: signal.signal(number, handler) for number in STOP_SIGNALS if number not in nohup}
    release()
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)


def leaving() -> AbstractContextManager[None]:
    """Within, a stop signal ends the process as an error would, so that what it started and wrote is cleared up."""

    def leave(number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(128 + number)

    return handled(leave)


@contextmanager
def ending(end: Callable[[signal.Signals], None]) -> Iterator[None]:
    """Within, a stop signal makes a thread call `end`: the main thread may be in C code that takes minutes."""
    received, written = os.pipe()
    os.set_blocking(written, False)

    def wait() -> None:
        while number := os.read(received, 1):
            end(signal.Signals(number[0]))
        os.close(received)

    threading.Thread(target=wait, daemon=True, name="stop signals").start()
    # The handler's C part writes the number at once; its Python part waits for the main thread, and has nothing to do.
    fd_before = signal.set_wakeup_fd(written)
    try:
        with handled(lambda number, frame: None):
            yield
    finally:
        signal.set_wakeup_fd(fd_before)
        os.close(written)
