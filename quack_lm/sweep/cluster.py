"""Training cells as job arrays of a slurm cluster, and what slurm knows of them.

    plan -> submitted/0001.json, 0002.json ... -> one job array each; task i trains the i-th cell of its file

The file is written once and never changes: a sweep that grows later does not shift what a queued task means. The array
is found again by its name, which follows from the path of the file, so nothing is lost between a submission and its
record. A task is the same process as a run of the local runner: it appends to the same log, holds the same lock.
"""

import os
import re
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

from quack_lm import slurm
from quack_lm.config import SLURM_DIR
from quack_lm.errors import UserError
from quack_lm.files import LOCK_WAIT_S, take_lock
from quack_lm.sweep.cell import LOG_FILE, Cell
from quack_lm.sweep.local import TRAIN
from quack_lm.sweep.plan import PLAN_FILE, SweepPlan, read_plan, write_plan
from quack_lm.sweep.rule import Watch, forget_other_rules, record_stop

FOLDER = "submitted"
# Many tasks read the files of all runs, from a file system that others use, too.
RULE_POLL_S = 10.0
# Slurm gives canceled runs its KillWait to save, 30 s unless the site says otherwise, and then tidies the nodes up.
CANCEL_WAIT_S = 120.0
CANCEL_POLL_S = 1.0
# So many numbers after the last file's are asked for, too: the file of a job that is queued may have been deleted.
SPARE_NUMBERS = 16


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What each cell gets; counts are per node."""

    nodes: int = 1
    gpus: int | None = None
    tasks: int | None = None  # ranks; one per GPU unless given
    cpus: int | None = None  # per rank
    time: str | None = None

    @property
    def tasks_per_node(self) -> int:
        return self.tasks or self.gpus or 1

    @property
    def ranks(self) -> int:
        return self.nodes * self.tasks_per_node

    def flags(self) -> list[str]:
        """As sbatch takes them."""
        optional = {"gpus-per-node": self.gpus, "cpus-per-task": self.cpus, "time": self.time}
        given = [f"--{name}={value}" for name, value in optional.items() if value is not None]
        return [f"--nodes={self.nodes}", f"--ntasks-per-node={self.tasks_per_node}", *given]


@dataclass(frozen=True)
class Submitted:
    """One job array."""

    job: int
    n_cells: int


@dataclass(frozen=True)
class Submission:
    """What one call has queued, and the cells that it could not queue because an earlier task of theirs still ends."""

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
    largest = slurm.max_array_size()
    # Slurm's own checks of partition, account, GPUs and limits, before anything is written.
    _sbatch(directory, "test", min(len(plan.cells), largest), resources, concurrency, "--test-only")
    with _one_at_a_time(directory):
        write_plan(directory, plan)
        forget_other_rules(plan.cells, plan.stop)
        arrays = _arrays(directory)
        known = _newest(directory, arrays)
        unfinished = [cell for cell in plan.cells if not cell.is_finished()]
        # Canceled a moment ago, it saves; preempted, it is queued again. In a moment it will be known which.
        ending = [cell for cell in unfinished if cell.name in known and known[cell.name].is_ending]
        todo = [
            cell
            for cell in unfinished
            if cell.status() != "running" and not (cell.name in known and known[cell.name].is_active)
        ]
        number = max([0, *_numbers(directory), *arrays])
        # In a row, or the concurrency of the arrays would add up.
        before = sorted({task.job for tasks in arrays.values() for task in tasks if task.is_active})
        jobs: list[Submitted] = []
        for start in range(0, len(todo), largest):
            number += 1
            cells, file = todo[start : start + largest], _file(number)
            write_plan(directory, replace(plan, cells=cells), file)
            after = [f"--dependency=afterany:{':'.join(map(str, before))}"] if before else []
            answer = _sbatch(directory, file, len(cells), resources, concurrency, "--parsable", *after)
            jobs.append(Submitted(_job_number(answer), len(cells)))
            before = [jobs[-1].job]
        return Submission(jobs, ending)


def _sbatch(directory: Path, file: str, n_cells: int, resources: Resources, concurrency: int, *more: str) -> str:
    log = str(directory / FOLDER / "slurm").replace("%", "%%") + "-%A_%a.out"
    flags = [f"--job-name={slurm.job_name(directory / file)}", f"--output={log}"]
    flags += [f"--array=0-{n_cells - 1}%{concurrency}", *resources.flags(), *more]
    script = [str(SLURM_DIR / "sweep.sbatch"), f"file={directory / file}"]
    return slurm.call(["bash", str(SLURM_DIR / "submit.sh"), *flags, *script], name="sbatch")


def _job_number(answer: str) -> int:
    """From `123;cluster`, the last line that sbatch prints; what sites have wrapped around it may print more."""
    match = re.fullmatch(r"(\d+)(;.*)?", answer.strip().rpartition("\n")[2].strip())
    if match is None:
        raise UserError(
            f"sbatch printed {answer.strip()[-200:]!r} in place of the job's number; sweep.py status shows what is "
            "queued, and submit queues the rest"
        )
    return int(match[1])


def _check_ranks(cells: Sequence[Cell], resources: Resources) -> None:
    for cell in cells:
        trainer = cell.config["trainer"]
        if trainer["global_batch_size"] % (resources.ranks * trainer["micro_batch_size"]):
            raise UserError(
                f"{cell.name}: trainer.global_batch_size={trainer['global_batch_size']} must be a multiple of ranks x "
                f"trainer.micro_batch_size = {resources.ranks} x {trainer['micro_batch_size']}; change nodes=, gpus=, "
                "tasks= or the batch"
            )
        if resources.ranks % trainer["replicas"]:
            raise UserError(
                f"{cell.name}: trainer.replicas={trainer['replicas']} must divide the ranks, {resources.ranks}"
            )


def _file(number: int) -> str:
    return f"{FOLDER}/{number:04}.json"


def _numbers(directory: Path) -> list[int]:
    """Of the files that are there."""
    return [int(path.stem) for path in (directory / FOLDER).glob("*.json") if re.fullmatch(r"\d+", path.stem)]


@contextmanager
def _one_at_a_time(directory: Path) -> Iterator[None]:
    """Two submissions at the same time would both queue the same cells."""
    try:
        (directory / FOLDER).mkdir(parents=True, exist_ok=True)
        file = open(directory / FOLDER / ".lock", "wb")  # noqa: SIM115
    except OSError as error:
        raise UserError(f"dir={directory} cannot be written to: {error.strerror}; choose another") from None
    with file:
        if not take_lock(file):
            raise UserError(f"dir={directory}: another submission is at work here; wait for it")
        yield


# ------------------------------------------------------------------------------------------------ state


def was_submitted(directory: Path) -> bool:
    """Whether jobs were ever submitted for this sweep."""
    return (directory / FOLDER).is_dir()


def tasks_of(directory: Path) -> dict[str, slurm.Task]:
    """The newest task of each cell by the cell's name; one that is still active comes before any that has ended."""
    return _newest(directory, _arrays(directory))


def _arrays(directory: Path) -> dict[int, list[slurm.Task]]:
    """The tasks of this sweep's job arrays by the number of their file, which itself is not needed."""
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
    """What these tasks train; of a file that is damaged nothing, which matters only while a task is active."""
    try:
        cells = read_plan(directory, file).cells
    except UserError:
        cells = []
    for task in tasks:
        if task.is_active and task.index >= len(cells):
            raise UserError(
                f"{directory / file} is damaged or gone, and job {task} trains a run of it; cancel the sweep's jobs, "
                "quack-lm sweep cancel dir=..., and submit again"
            )
    return cells


def cancel(directory: Path) -> list[int]:
    """Cancel this sweep's jobs, and no others; their numbers. A run that is under way saves before it ends."""
    jobs = _active_jobs(directory)
    slurm.cancel(jobs)
    return jobs


def wait_for_end(directory: Path) -> list[int]:
    """Wait until no job of this sweep does anything any more; those that still do after `CANCEL_WAIT_S`."""
    deadline = time.monotonic() + CANCEL_WAIT_S
    while (jobs := _active_jobs(directory)) and time.monotonic() < deadline:
        time.sleep(CANCEL_POLL_S)
    return jobs


def _active_jobs(directory: Path) -> list[int]:
    return sorted({task.job for tasks in _arrays(directory).values() for task in tasks if task.is_active})


# ------------------------------------------------------------------------------------------------ inside a task


def run_task(file: Path, index: int) -> NoReturn:
    """Become the trainer of the file's index-th cell, as one of its ranks."""
    directory = file.absolute().parent.parent
    plan = read_plan(directory, f"{FOLDER}/{file.name}")
    if index >= len(plan.cells):
        raise UserError(f"index={index}: {file} has {len(plan.cells)} runs, counted from 0")
    cell = plan.cells[index]
    print(f"{cell.name}: the log is {cell.run_dir / LOG_FILE}", flush=True)
    if cell.has_ended():
        print("finished already")
        raise SystemExit(0)
    step = slurm.current_step()
    is_main = step is None or step.rank == 0
    cell.run_dir.mkdir(parents=True, exist_ok=True)
    if is_main and plan.stop:
        _start_watch(cell, plan, directory)
    log = open(cell.run_dir / LOG_FILE, "ab")  # noqa: SIM115
    # The lock belongs to the open file, which the trainer keeps as its output; the other ranks only write. Whoever asks
    # for the state of the run holds it for a moment, a node that died for longer.
    if is_main and not take_lock(log, wait_s=LOCK_WAIT_S):
        print(f"error: {cell.name} is trained by another process; cancel that one, or let it end", file=sys.stderr)
        raise SystemExit(1)
    sys.stdout.flush()
    for descriptor in (1, 2):
        os.dup2(log.fileno(), descriptor)
    # The same process from here on: slurm's signals reach the trainer, and its exit code slurm.
    os.execv(sys.executable, [*TRAIN, *cell.arguments()])


def _start_watch(cell: Cell, plan: SweepPlan, directory: Path) -> None:
    """Leave a child behind that ends this process, the trainer to be, when the sweep's stop rule says so."""
    assert plan.stop is not None
    trainer = os.getpid()
    if os.fork():
        return
    # Whatever happens here ends here.
    try:
        quiet = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(quiet, descriptor)
        everything = read_plan(directory).cells if (directory / PLAN_FILE).is_file() else plan.cells
        watch = Watch(plan.stop, everything)
        while os.getppid() == trainer:
            if watch.hopeless([c for c in everything if c.name == cell.name]):
                record_stop(cell, plan.stop)
                os.kill(trainer, signal.SIGTERM)
                break
            time.sleep(RULE_POLL_S)
    finally:
        os._exit(0)
