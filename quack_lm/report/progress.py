"""How far the runs of a sweep have come, from the ends of their files."""

from collections import Counter
from collections.abc import Sequence

from quack_lm.outcome import kind_of_end
from quack_lm.report.table import Table, duration, loss, per_second
from quack_lm.sweep.cell import Cell


def status_table(cells: Sequence[Cell]) -> str:
    """One row per run with its step, loss, speed and time left, and the number of each status."""
    rows = [_row(cell) for cell in cells]
    table = Table(header=("run", "status", "step", "of", "loss", "tok/s", "time left"), rows=rows, numeric=range(2, 7))
    counts = Counter(row[1] for row in rows)
    return f"{table.as_text()}\n\n{len(rows)} runs: {', '.join(f'{n} {status}' for status, n in counts.items())}"


def _row(cell: Cell) -> tuple[str, ...]:
    step, status = cell.steps_done(), cell.status()
    train_loss = cell.last_line("train/loss").get("train/loss")
    speed = cell.last_line("throughput/tokens_per_s").get("throughput/tokens_per_s")
    left = (cell.total_steps - step) * cell.tokens_per_step / speed if speed and not cell.is_finished() else None
    kind = kind_of_end(status, cell.summary().get("reason"))
    return (
        cell.name.rpartition("-")[0],
        kind,
        str(step),
        str(cell.total_steps),
        loss(train_loss),
        per_second(speed),
        duration(left),
    )
