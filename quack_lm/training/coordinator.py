"""Keeps the ranks in lockstep: an error, a stop signal or a hang on one of them ends the run on all.

A rank that raised by itself would leave the others waiting in the next collective. So errors of files and background
threads are recorded where they occur, and all ranks agree on them, and on signals, once a step in `sync`.
"""

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import NamedTuple, Protocol

from quack_lm.errors import UserError, explained
from quack_lm.parallel import World
from quack_lm.training.run_dir import RunDir
from quack_lm.training.stop_signals import handled
from quack_lm.training.watchdog import Watchdog


class Fallible(Protocol):
    """Something that records its error for the ranks to agree on, in place of raising it."""

    @property
    def error(self) -> str | None:
        """One line for the user, or None."""


class Agreement(NamedTuple):
    """What all ranks know after a `sync`."""

    stop_signal: str | None  # the name of a signal that some rank received
    is_saving: bool  # whether some rank still writes a checkpoint in the background


@dataclass
class Coordinator:
    """One per rank; `parts` are asked for their errors in this order, and `saver.is_writing` is shared."""

    world: World
    watchdog: Watchdog
    run_dir: RunDir
    parts: Sequence[Fallible]
    error: str | None = None  # of this rank, until `sync`
    _signal: int = 0

    @contextmanager
    def supervising(self) -> Iterator[None]:
        """Within, a hang ends the process, and the first stop signal only asks the loop to stop.

        A second SIGINT raises KeyboardInterrupt.
        """
        self._signal = 0
        with handled(self._remember), self.watchdog.watching():
            yield

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self._signal and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = self._signal or number

    def sync(self, *, is_saving: bool = False) -> Agreement:
        """On all ranks together; raises the UserError of the first rank that has one, on every rank."""
        self.error = self.error or next((part.error for part in self.parts if part.error), None)
        # Before: each rank has its own signal, error and background work, or none. After: all know of all.
        number, has_error, saving = self.world.max_over_ranks(self._signal, self.error is not None, is_saving)
        if has_error:
            raise UserError(next(text for text in self.world.all_gather(self.error or "") if text))
        self.watchdog.feed()
        return Agreement(signal.Signals(number).name if number else None, bool(saving))

    @contextmanager
    def recording_write_errors(self) -> Iterator[None]:
        """An OSError inside, of a full disk for instance, ends the run for all ranks at the next `sync`."""
        try:
            yield
        except OSError as error:
            fix = "and run the same command again: it continues from the last complete checkpoint"
            self.error = self.error or explained(error, f"run_dir={self.run_dir}", fix)
