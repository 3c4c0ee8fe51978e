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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

from quack_lm import slurm
from quack_lm.config import CONFIG_DIR
from quack_lm.errors import UserError
from quack_lm.files import take_lock
from quack_lm.sweep.cell import LOG_FILE, Cell
from quack_lm.sweep.local import TRAIN_SCRIPT
from quack_lm.sweep.plan import PLAN_FILE, Plan, read_plan, write_plan
from quack_lm.sweep.rule import Watch, forget_other_rules, record_stop

FOLDER = "submitted"
SLURM_SCRIPTS = CONFIG_DIR.parent / "slurm"
# Many tasks read the files of all runs, from a file system that others use, too.
RULE_POLL_S = 10.0
LOCK_WAIT_S = 60.0


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


# ------------------------------------------------------------------------------------------------ submitting


def submit(directory: Path, plan: Plan, resources: Resources, *, concurrency: int) -> list[Submitted]:
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
    write_plan(directory, plan)
    with _one_at_a_time(directory):
        forget_other_rules(plan.cells, plan.stop)
        known = tasks_of(directory)
        todo = [
            cell
            for cell in plan.cells
            if not cell.is_finished()
            and cell.status() != "running"
            and not (cell.name in known and known[cell.name].is_active)
        ]
        # In a row, or the concurrency of the arrays would add up.
        before = sorted({task.job for task in known.values() if task.is_active})
        jobs: list[Submitted] = []
        for start in range(0, len(todo), largest):
            cells, file = todo[start : start + largest], _next_file(directory)
            write_plan(directory, replace(plan, cells=cells), file)
            after = [f"--dependency=afterany:{':'.join(map(str, before))}"] if before else []
            answer = _sbatch(directory, file, len(cells), resources, concurrency, "--parsable", *after)
            jobs.append(Submitted(int(answer.split(";")[0]), len(cells)))
            before = [jobs[-1].job]
        return jobs


def _sbatch(directory: Path, file: str, n_cells: int, resources: Resources, concurrency: int, *more: str) -> str:
    log = str(directory / FOLDER / "slurm").replace("%", "%%") + "-%A_%a.out"
    flags = [f"--job-name={slurm.job_name(directory / file)}", f"--output={log}"]
    flags += [f"--array=0-{n_cells - 1}%{concurrency}", *resources.flags(), *more]
    script = [str(SLURM_SCRIPTS / "sweep.sbatch"), f"file={directory / file}"]
    return slurm.call(["bash", str(SLURM_SCRIPTS / "submit.sh"), *flags, *script], name="sbatch")


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


def _next_file(directory: Path) -> str:
    numbers = [int(path.stem) for path in _files(directory)]
    return f"{FOLDER}/{max(numbers, default=0) + 1:04}.json"


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in (directory / FOLDER).glob("*.json") if re.fullmatch(r"\d+", path.stem))


@contextmanager
def _one_at_a_time(directory: Path) -> Iterator[None]:
    """Two submissions at the same time would both queue the same cells."""
    (directory / FOLDER).mkdir(parents=True, exist_ok=True)
    with open(directory / FOLDER / ".lock", "wb") as file:
        if not take_lock(file):
            raise UserError(f"dir={directory}: another submission is at work here; wait for it")
        yield


# ------------------------------------------------------------------------------------------------ state


def was_submitted(directory: Path) -> bool:
    """Whether jobs were ever submitted for this sweep."""
    return bool(_files(directory))


def tasks_of(directory: Path) -> dict[str, slurm.Task]:
    """The newest task of each cell by the cell's name; one that is still active comes before any that has ended."""
    files = {slurm.job_name(path): path for path in _files(directory)}
    tasks = slurm.array_tasks(list(files))
    newest: dict[str, slurm.Task] = {}
    for name, path in files.items():
        if name not in tasks:
            continue
        cells = read_plan(directory, str(path.relative_to(directory))).cells
        for task in tasks[name]:
            cell = cells[task.index].name
            if cell not in newest or task.is_active or not newest[cell].is_active:
                newest[cell] = task
    return newest


def cancel(directory: Path) -> list[int]:
    """Cancel this sweep's jobs, and no others; their numbers."""
    jobs = sorted({task.job for task in tasks_of(directory).values() if task.is_active})
    slurm.cancel(jobs)
    return jobs


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
    os.execv(sys.executable, [sys.executable, str(TRAIN_SCRIPT), *cell.arguments()])


def _start_watch(cell: Cell, plan: Plan, directory: Path) -> None:
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
