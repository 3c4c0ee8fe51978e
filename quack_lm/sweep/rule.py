"""Early stopping of cells, by a rule that the sweep file states before it starts.

    stop: {loss_above_best: 2.0, for_steps: 50}

A cell is stopped once its training loss has been above `loss_above_best` times the smallest loss of any cell of the
sweep at the same step, for `for_steps` steps in a row, up to its newest.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict

from quack_lm.files import metrics_line, write_json
from quack_lm.sweep.cell import Cell
from quack_lm.sweep.file import StopRule


class Watch:
    """The training losses of all cells, read as the runs write them."""

    def __init__(self, rule: StopRule, cells: Sequence[Cell]) -> None:
        self.rule = rule
        self.cells = cells
        self.losses: dict[str, dict[int, float]] = {cell.name: {} for cell in cells}
        self._read: dict[str, int] = {cell.name: 0 for cell in cells}

    def cells_to_stop(self, running: Sequence[Cell]) -> list[Cell]:
        """Those of the running cells that the rule stops now."""
        for cell in self.cells:
            self._follow(cell)
        best: dict[int, float] = {}
        for losses in self.losses.values():
            for step, loss in losses.items():
                best[step] = min(loss, best.get(step, math.inf))
        return [cell for cell in running if should_stop(self.losses[cell.name], best, self.rule)]

    def _follow(self, cell: Cell) -> None:
        path, start = cell.run_dir.metrics_file, self._read[cell.name]
        if not path.is_file():
            return
        if path.stat().st_size < start:  # the run went back to a checkpoint and dropped what came after it
            start, self.losses[cell.name] = 0, {}
        with open(path, "rb") as file:
            file.seek(start)
            new = file.read()
        whole = new[: new.rfind(b"\n") + 1]  # the last line may still be being written
        self._read[cell.name] = start + len(whole)
        for line in whole.splitlines():
            record = metrics_line(line)
            if "train/loss" in record:
                loss = record["train/loss"]
                self.losses[cell.name][record["step"]] = loss if isinstance(loss, int | float) else math.inf


def should_stop(losses: dict[int, float], best: dict[int, float], rule: StopRule) -> bool:
    """Whether the newest `for_steps` losses are all above the factor times the best."""
    if len(losses) < rule.for_steps:
        return False
    newest = sorted(losses)[-rule.for_steps :]
    return all(losses[step] > rule.loss_above_best * best[step] for step in newest)


def record_stop(cell: Cell, rule: StopRule) -> None:
    """Write down that the rule ends this run, before the run is told to end."""
    write_json(cell.run_dir.stop_file, {"rule": asdict(rule), "decided_at_step": cell.steps_done()})


def forget_other_rules(cells: Sequence[Cell], rule: StopRule | None) -> None:
    """A run that was stopped by a rule which the sweep file no longer has goes on."""
    for cell in cells:
        record = cell.run_dir.stop_record()
        if record and record.get("rule") != (asdict(rule) if rule else None):
            (cell.run_dir.stop_file).unlink()
