"""Training cells as job arrays of a slurm cluster, and the state of their tasks.

    plan -> submitted/0001.json, 0002.json ... -> one job array each; task i trains the i-th cell of its file

The file is written once and never changes: a sweep that grows later does not change what a queued task trains. The
array is found again by its name, which is derived from the file's path, so no record of the job number can be lost. A
task is the same process as a run of the local runner: it appends to the same log and holds the same lock.
"""

import os
import re
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NoReturn

from quack_lm import slurm
from quack_lm.config import instantiate
from quack_lm.errors import UserError, explaining
from quack_lm.files import LOCK_WAIT_S, take_lock
from quack_lm.slurm import Resources
from quack_lm.sweep.cell import Cell
from quack_lm.sweep.local import TRAIN
from quack_lm.sweep.plan import PLAN_FILE, SweepPlan, read_plan, write_plan
from quack_lm.sweep.rule import Watch, forget_other_rules, record_stop
from quack_lm.text import echo
from quack_lm.training.stop_signals import hold

FOLDER = "submitted"
# Many tasks read the files of all runs from a shared file system.
RULE_POLL_S = 10.0
# Canceled runs have slurm's KillWait to save, 30 s by default; then slurm cleans up the nodes.
CANCEL_WAIT_S = 120.0
CANCEL_POLL_S = 1.0
# Slurm is also asked about this many numbers after the last file's: the file of a queued job may have been deleted.
SPARE_NUMBERS = 16


@dataclass(frozen=True)
class Submitted:
    """The number of a job array, and how many cells it trains."""

    job: int
    n_cells: int


@dataclass(frozen=True)
class Submission:
    """The job arrays that one call queued, and the cells that it could not queue: an earlier task is still ending."""

    jobs: list[Submitted]
    still_ending: list[Cell]


# ------------------------------------------------------------------------------------------------ submitting


def submit(directory: Path, plan: SweepPlan, resources: Resources, *, concurrency: int) -> Submission:
    """Queue every cell that is neither finished nor queued nor running, `concurrency` at a time.

    More cells than an array may have make several arrays, one after the other.
    """
    directory = directory.absolute()
    if "\\" in str(directory):
        raise UserError(f"dir={directory}: slurm cannot write its logs to a path with a backslash; choose another dir")
    _check_ranks(plan.cells, resources)
    max_size = slurm.max_array_size()
    array = partial(slurm.Array, concurrency=concurrency, resources=resources)
    # Before anything is written.
    array(file=directory / FOLDER / "test", size=min(len(plan.cells), max_size)).check()
    with _one_at_a_time(directory):
        write_plan(directory, plan)
        forget_other_rules(plan.cells, plan.stop)
        arrays = _arrays(directory)
        known = _newest(directory, arrays)
        unfinished = [cell for cell in plan.cells if not cell.is_finished()]
        # It saves after a cancellation, or slurm requeues it after a preemption; slurm will soon show which.
        ending = [cell for cell in unfinished if cell.name in known and known[cell.name].is_ending]
        todo = [
            cell
            for cell in unfinished
            if cell.run_dir.status() != "running" and not (cell.name in known and known[cell.name].is_active)
        ]
        number = max([0, *_numbers(directory), *arrays])
        # One array after the other: otherwise their concurrencies add up.
        before = sorted({task.job for tasks in arrays.values() for task in tasks if task.is_active})
        jobs: list[Submitted] = []
        for start in range(0, len(todo), max_size):
            number += 1
            cells, file = todo[start : start + max_size], _file(number)
            write_plan(directory, replace(plan, cells=cells), file)
            job = array(file=directory / file, size=len(cells)).submit(after=before)
            jobs.append(Submitted(job, len(cells)))
            before = [job]
        return Submission(jobs, ending)


def _check_ranks(cells: Sequence[Cell], resources: Resources) -> None:
    for cell in cells:
        try:
            instantiate(cell.config["trainer"]).check_ranks(resources.ranks)
        except UserError as error:
            raise UserError(f"{cell.name}: {error}; change nodes=, gpus=, tasks= or the batch") from None


def _file(number: int) -> str:
    return f"{FOLDER}/{number:04}.json"


def _numbers(directory: Path) -> list[int]:
    """The numbers of the existing files, unsorted."""
    return [int(path.stem) for path in (directory / FOLDER).glob("*.json") if re.fullmatch(r"\d+", path.stem)]


@contextmanager
def _one_at_a_time(directory: Path) -> Iterator[None]:
    """Hold the directory's lock: two submissions at the same time would queue the same cells twice."""
    with explaining(f"dir={directory}", "or choose another"):
        (directory / FOLDER).mkdir(parents=True, exist_ok=True)
        file = open(directory / FOLDER / ".lock", "wb")  # noqa: SIM115
    with file:
        if not take_lock(file):
            raise UserError(f"dir={directory}: another submission is running here; wait for it")
        yield


# ------------------------------------------------------------------------------------------------ state


def was_submitted(directory: Path) -> bool:
    """Whether jobs were ever submitted for this sweep."""
    return (directory / FOLDER).is_dir()


def tasks_of(directory: Path) -> dict[str, slurm.Task]:
    """The newest task of each cell by the cell's name; an active task wins over one that has ended."""
    return _newest(directory, _arrays(directory))


def _arrays(directory: Path) -> dict[int, list[slurm.Task]]:
    """The tasks of this sweep's job arrays by the number of their file; the file itself may be missing."""
    last = max(_numbers(directory), default=0)
    names = {slurm.job_name(directory / _file(number)): number for number in range(1, last + 1 + SPARE_NUMBERS)}
    return {names[name]: tasks for name, tasks in slurm.array_tasks(list(names)).items()}


def _newest(directory: Path, arrays: Mapping[int, Sequence[slurm.Task]]) -> dict[str, slurm.Task]:
    newest: dict[str, slurm.Task] = {}
    for number in sorted(arrays):
        cells = _cells_of(directory, _file(number), arrays[number])
        for task in arrays[number]:
            if task.index >= len(cells):
                continue
            cell = cells[task.index].name
            if cell not in newest or task.is_active or not newest[cell].is_active:
                newest[cell] = task
    return newest


def _cells_of(directory: Path, file: str, tasks: Sequence[slurm.Task]) -> list[Cell]:
    """The cells of the file; none if it is damaged, which is an error only while one of the tasks is active."""
    try:
        cells = read_plan(directory, file).cells
    except UserError:
        cells = []
    for task in tasks:
        if task.is_active and task.index >= len(cells):
            raise UserError(
                f"{directory / file} is damaged or missing, and job {task} trains a run of it; cancel the sweep's "
                "jobs with quack-lm sweep cancel dir=..., and submit again"
            )
    return cells


def cancel(directory: Path) -> list[int]:
    """Cancel this sweep's jobs, and no others; their numbers. Active runs save before they end."""
    jobs = _active_jobs(directory)
    slurm.cancel(jobs)
    return jobs


def wait_for_end(directory: Path) -> list[int]:
    """Wait until all jobs of this sweep have ended; those that have not after `CANCEL_WAIT_S`."""
    deadline = time.monotonic() + CANCEL_WAIT_S
    while (jobs := _active_jobs(directory)) and time.monotonic() < deadline:
        time.sleep(CANCEL_POLL_S)
    return jobs


def _active_jobs(directory: Path) -> list[int]:
    return sorted({task.job for tasks in _arrays(directory).values() for task in tasks if task.is_active})


# ------------------------------------------------------------------------------------------------ inside a task


def run_task(file: Path, index: int) -> NoReturn:
    """Replace this process by a rank of the trainer of the file's index-th cell."""
    directory = file.absolute().parent.parent
    plan = read_plan(directory, f"{FOLDER}/{file.name}")
    if index >= len(plan.cells):
        raise UserError(f"index={index}: {file} has {len(plan.cells)} runs, counted from 0")
    cell = plan.cells[index]
    echo(f"{cell.name}: the log is {cell.run_dir.log_file}")
    if cell.run_dir.has_ended():
        echo("finished already")
        raise SystemExit(0)
    step = slurm.current_step()
    is_main = step is None or step.rank == 0
    cell.run_dir.path.mkdir(parents=True, exist_ok=True)
    if is_main and plan.stop:
        _start_watch(cell, plan, directory)
    hold()  # from the first trace of the run until it is ready for signals
    log = open(cell.run_dir.log_file, "ab")  # noqa: SIM115
    # The lock belongs to the open file, which the trainer keeps as its output; the other ranks only write. A process
    # that reads the run's state holds it for a moment, a node that died for longer.
    if is_main and not take_lock(log, wait_s=LOCK_WAIT_S):
        echo(f"error: {cell.name} is being trained by another process; cancel it, or wait for it", err=True)
        raise SystemExit(1)
    sys.stdout.flush()
    for descriptor in (1, 2):
        os.dup2(log.fileno(), descriptor)
    # The same process from here on: slurm's signals reach the trainer, and slurm gets its exit code.
    os.execv(sys.executable, [*TRAIN, *cell.arguments()])


def _start_watch(cell: Cell, plan: SweepPlan, directory: Path) -> None:
    """Fork a child that sends SIGTERM to this process, soon the trainer, when the sweep's stop rule applies."""
    assert plan.stop is not None
    trainer = os.getpid()
    if os.fork():
        return
    # No error of the child may reach the code after the fork.
    try:
        quiet = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(quiet, descriptor)
        everything = read_plan(directory).cells if (directory / PLAN_FILE).is_file() else plan.cells
        watch = Watch(plan.stop, everything)
        while os.getppid() == trainer:
            if watch.cells_to_stop([c for c in everything if c.name == cell.name]):
                record_stop(cell, plan.stop)
                os.kill(trainer, signal.SIGTERM)
                break
            time.sleep(RULE_POLL_S)
    finally:
        os._exit(0)
