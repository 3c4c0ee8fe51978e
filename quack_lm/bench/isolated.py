"""The training step in a process of its own, which has the memory settings of whoever trains so."""

import atexit
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

from quack_lm.bench.step import TimedStep, Timing
from quack_lm.config import instantiate
from quack_lm.errors import UserError
from quack_lm.parallel import World
from quack_lm.training.memory import PeakMemory
from quack_lm.training.process import start_process

LEAVE_S = 10.0


class IsolatedStep:
    """The step that `make` makes in a new process; turns are its own, and it waits between them."""

    def __init__(
        self, make: Callable[[World], TimedStep], trainer: dict[str, Any], *, device: str, keeps_freed_memory: bool
    ) -> None:
        self.tokens_per_step = trainer["global_batch_size"] * trainer["seq_len"]
        self.memory_bytes = 0  # the most that its tensors took until the end of the first turn
        context = get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._is_waiting = True
        self._process = context.Process(
            target=_serve, args=(theirs, make, trainer, device, keeps_freed_memory), daemon=True
        )
        self._process.start()
        theirs.close()  # so that the end of the process closes the pipe
        atexit.register(self.close)

    def turn(self, steps: int) -> Timing:
        """Make so many steps; UserError where the process cannot."""
        try:
            self._is_waiting = False
            self._pipe.send(steps)
            answer: Timing | str = self._pipe.recv()
        except (EOFError, BrokenPipeError):
            self._process.join()
            raise RuntimeError(f"the process of a step ended with exit code {self._process.exitcode}") from None
        if isinstance(answer, str):
            raise UserError(answer)
        if not self.memory_bytes:
            self.memory_bytes = self._pipe.recv()
        self._is_waiting = True
        return answer

    def close(self) -> None:
        """End the process: one that waits for a turn leaves by itself, with all that it has started."""
        if self._is_waiting and self._process.is_alive():
            self._is_waiting = False
            with suppress(BrokenPipeError):
                self._pipe.send(0)
            self._process.join(LEAVE_S)
        self._process.terminate()
        self._process.join()


def _serve(
    pipe: Connection,
    make: Callable[[World], TimedStep],
    trainer: dict[str, Any],
    device: str,
    keeps_freed_memory: bool,
) -> None:
    """Make the step, then as many as each message asks for, until that is none."""
    try:
        world = start_process([instantiate(trainer)], device=device, keeps_freed_memory=keeps_freed_memory)
        if not (steps := pipe.recv()):
            return
        with PeakMemory(world.device) as peak:
            step = make(world)
            first = step.turn(steps)
        pipe.send(first)
        pipe.send(peak.bytes)
        while steps := pipe.recv():
            pipe.send(step.turn(steps))
        world.leave()
    except UserError as error:
        pipe.send(str(error))
    except (EOFError, BrokenPipeError, KeyboardInterrupt):  # the other end has gone, or is going
        pass
