"""The progress of the runs of a sweep, read from the ends of their files."""

from collections import Counter
from collections.abc import Mapping, Sequence

from quack_lm.report.table import NO_NUMBER, Table, count, duration, loss
from quack_lm.slurm import Task
from quack_lm.sweep.cell import Cell
from quack_lm.sweep.label import titles
from quack_lm.training.state import kind_of_end


def status_table(cells: Sequence[Cell], tasks: Mapping[str, Task] | None = None) -> str:
    """One row per run with its step, loss, speed and time left; below, the number of runs in each status.

    `tasks` are, if jobs were submitted, the newest slurm task of each run by the run's name.
    """
    header: tuple[str, ...] = ("run", "status", "step", "of", "loss", "tok/s", "time left")
    names = titles(cells)
    rows = [(names[cell.name], *_row(cell)) for cell in cells]
    counts = Counter(row[1] for row in rows)
    total = f"{len(rows)} runs: {', '.join(f'{n} {status}' for status, n in counts.items())}"
    if tasks is not None:
        header = (*header, "job", "slurm")
        rows = [(*row, *_job(tasks.get(cell.name))) for row, cell in zip(rows, cells, strict=True)]
        states = Counter(task.state.lower() for task in tasks.values() if task.is_active)
        total += f"; in slurm: {', '.join(f'{n} {state}' for state, n in states.items()) or 'nothing queued'}"
    return f"{Table(header=header, rows=rows, numeric=range(2, 7)).as_text()}\n\n{total}"


def _job(task: Task | None) -> tuple[str, str]:
    if task is None:
        return NO_NUMBER, NO_NUMBER
    return str(task), task.state.lower() + (f" ({task.reason})" if task.state == "PENDING" else "")


def _row(cell: Cell) -> tuple[str, ...]:
    step, status = cell.steps_done(), cell.run_dir.status()
    train_loss = cell.run_dir.last_line("train/loss").get("train/loss")
    speed = cell.run_dir.last_line("throughput/tokens_per_s").get("throughput/tokens_per_s")
    left = (cell.total_steps - step) * cell.tokens_per_step / speed if speed and not cell.is_finished() else None
    kind = kind_of_end(status, cell.run_dir.summary().get("reason"))
    return (
        kind,
        str(step),
        str(cell.total_steps),
        loss(train_loss),
        count(speed),
        duration(left),
    )
