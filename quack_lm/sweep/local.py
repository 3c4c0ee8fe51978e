"""Training cells on this machine, each in its own process on its own cores or GPU."""

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from tqdm import tqdm

from quack_lm.files import take_lock
from quack_lm.sweep.cell import Cell
from quack_lm.sweep.file import StopRule
from quack_lm.sweep.label import titles
from quack_lm.sweep.rule import Watch, forget_other_rules, record_stop
from quack_lm.text import escape
from quack_lm.training.stop_signals import handled, held

# This interpreter, because `quack-lm` may not be on PATH.
TRAIN = [sys.executable, "-m", "quack_lm", "train"]

POLL_S = 0.5
RULE_POLL_S = 2.0
LOG_LINES_SHOWN = 6


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a call of `run` ended."""

    failed: list[Cell]
    signal: int | None

    @property
    def exit_code(self) -> int:
        return 128 + self.signal if self.signal else int(bool(self.failed))


@dataclass(frozen=True)
class Slot:
    """The cores and the GPU that one run at a time may use."""

    cores: frozenset[int]
    gpu: str | None


@dataclass(frozen=True)
class Running:
    """A cell's process, its slot, and the checkpoint that it started from."""

    cell: Cell
    process: subprocess.Popen[bytes]
    slot: Slot
    began_from: str
    is_stopped_by_rule: bool = False


def default_jobs(threads: int) -> int:
    """One run per GPU where there are any, else as many as the cores hold."""
    return len(_gpus()) or max(1, len(_own_cores()) // threads)


def run(cells: Sequence[Cell], *, stop: StopRule | None = None, jobs: int | None = None, threads: int = 1) -> Outcome:
    """Train every unfinished cell, `jobs` at a time, each on its own `threads` cores or GPU.

    A failed cell is printed with the end of its log, and the others go on. A killed one, by its watchdog or from
    outside, is restarted as long as each start reaches a new checkpoint. The stop rule stops runs early. Stop
    signals are passed on once; the runs save and end, and the next call continues them. A second signal kills.
    """
    forget_other_rules(cells, stop)
    pending = [cell for cell in cells if not cell.is_finished()]
    free = _slots(jobs or default_jobs(threads), threads)
    running: list[Running] = []
    failed: list[Cell] = []
    signals_passed_on = 0
    watch = Watch(stop, cells) if stop else None
    with _signals() as received, _progress(cells) as bar, _none_left_behind(running):
        named = {} if bar.disable else titles(cells)
        watched_at = time.monotonic()
        while pending or running:
            if len(received) > signals_passed_on:
                bar.write("stopping: the runs save and end; a second signal kills them", file=sys.stderr)
                pending.clear()
                for entry in running:
                    entry.process.send_signal(signal.SIGKILL if signals_passed_on else received[0])
                signals_passed_on = len(received)
            _start_what_fits(pending, free, running, threads)
            if watch and not received and time.monotonic() - watched_at > RULE_POLL_S:
                running[:] = _stop_early(watch, running)
                watched_at = time.monotonic()
            for entry in [entry for entry in running if entry.process.poll() is not None]:
                running.remove(entry)
                free.append(entry.slot)
                if not received and _is_worth_another_start(entry):
                    pending.append(entry.cell)
                elif not received and not entry.cell.is_finished():
                    failed.append(entry.cell)
                bar.write("\n".join(map(escape, _ending(entry, bool(received)))), file=sys.stderr)
            _advance(bar, cells, running, named)
            time.sleep(POLL_S if pending or running else 0)
    return Outcome(failed=failed, signal=received[0] if received else None)


@contextmanager
def _none_left_behind(running: Sequence[Running]) -> Iterator[None]:
    """If the sweep itself fails, send SIGTERM to its runs, so that they save and end."""
    try:
        yield
    except BaseException:
        for entry in running:
            entry.process.send_signal(signal.SIGTERM)
        raise


def _start_what_fits(pending: list[Cell], free: list[Slot], running: list[Running], threads: int) -> None:
    """Move cells from pending to running while slots are free; one that another process trains stays pending."""
    for cell in list(pending):
        if not free:
            return  # before reading the files of hundreds of cells at every poll
        if cell.is_finished():  # by another process since the last poll
            pending.remove(cell)
        elif process := _start(cell, free[-1], threads):
            running.append(Running(cell, process, free.pop(), cell.run_dir.newest_checkpoint()))
            pending.remove(cell)


def _start(cell: Cell, slot: Slot, threads: int) -> subprocess.Popen[bytes] | None:
    """Start a cell's process; None while another process, perhaps left by a killed sweep, still trains it.

    The log file is locked: the child inherits it as its output, so the lock lasts as long as the child.
    """
    cell.run_dir.path.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    if slot.gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = slot.gpu
    with open(cell.run_dir.log_file, "ab") as log:
        if not take_lock(log):
            return None
        with _pinned(slot.cores), held():
            return subprocess.Popen(
                [*TRAIN, *cell.arguments()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                # Its own session: a Ctrl-C reaches it once, from this process, not again from the terminal.
                start_new_session=True,
            )


def _is_worth_another_start(entry: Running) -> bool:
    """Whether a run was killed, by its watchdog for instance, after it had saved a newer checkpoint."""
    return entry.cell.run_dir.status() == "killed" and entry.cell.run_dir.newest_checkpoint() > entry.began_from


def _stop_early(watch: Watch, running: Sequence[Running]) -> list[Running]:
    """Send SIGTERM to the runs that the rule stops, after recording why: the end must not look like a failure."""
    to_stop = watch.cells_to_stop([entry.cell for entry in running if not entry.is_stopped_by_rule])
    for entry in running:
        if entry.cell in to_stop:
            record_stop(entry.cell, watch.rule)
            entry.process.send_signal(signal.SIGTERM)
    return [replace(entry, is_stopped_by_rule=True) if entry.cell in to_stop else entry for entry in running]


def _ending(entry: Running, is_stopping: bool) -> list[str]:
    cell, code = entry.cell, entry.process.returncode
    summary, status = cell.run_dir.summary(), cell.run_dir.status()
    if cell.is_finished():
        loss = summary.get("val_loss")
        return [f"{cell.name}: {status}" + (f", val loss {loss:.3f}" if loss is not None else "")]
    if is_stopping:
        return [f"{cell.name}: stopped at step {summary.get('step', 0)}"]
    tail = [f"    {line}" for line in cell.run_dir.last_log_lines(LOG_LINES_SHOWN)]
    how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
    if _is_worth_another_start(entry):
        return [f"{cell.name}: {how}, restarts from {cell.run_dir.newest_checkpoint()}:", *tail]
    return [f"{cell.name}: FAILED ({how}), the end of {cell.run_dir.log_file}:", *tail]


# ------------------------------------------------------------------------------------------------ progress


def _progress(cells: Sequence[Cell]) -> "tqdm[Any]":
    return tqdm(
        total=sum(cell.total_steps for cell in cells),
        initial=_steps_settled(cells),
        unit="step",
        desc="sweep",
        dynamic_ncols=True,
        disable=None,  # no bar where the output is a file
    )


def _advance(bar: "tqdm[Any]", cells: Sequence[Cell], running: Sequence[Running], named: Mapping[str, str]) -> None:
    if bar.disable:
        return
    bar.n = _steps_settled(cells)
    finished = sum(cell.is_finished() for cell in cells)
    names = ", ".join(named[entry.cell.name] for entry in running)
    bar.set_postfix_str(escape(f"{finished}/{len(cells)} runs done, now {names or '-'}"))


def _steps_settled(cells: Sequence[Cell]) -> int:
    """Steps that are done: all of them for a finished run, even if it ended early."""
    return sum(cell.total_steps if cell.is_finished() else cell.steps_done() for cell in cells)


# ------------------------------------------------------------------------------------------------ processes and slots


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect stop signals instead of ending."""
    received: list[int] = []
    with handled(lambda number, _: received.append(number)):
        yield received


@contextmanager
def _pinned(cores: frozenset[int]) -> Iterator[None]:
    """A process started inside is pinned to these cores, on systems that support it."""
    own = _own_cores()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, own)


def _own_cores() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def _gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip() not in ("", "-1")]
    import torch  # late: its import takes seconds

    return [str(number) for number in range(torch.cuda.device_count())]


def _slots(jobs: int, threads: int) -> list[Slot]:
    """A slot per job: cores and GPUs are disjoint unless there are more jobs than cores or GPUs."""
    gpus = itertools.cycle(_gpus() or [None])
    own = sorted(_own_cores())
    # With GPUs, all cores are divided among the jobs: data loading and compilation use more than one.
    share = max(threads, len(own) // jobs) if _gpus() else threads
    cores = itertools.cycle(own)
    return [Slot(frozenset(itertools.islice(cores, share)), next(gpus)) for _ in range(jobs)]
