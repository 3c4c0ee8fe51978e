"""What a run has logged over its steps, in at most as many values as a figure can show, whatever the length of the run.

Up to MOST values of a metric stay as they are. Of more, each of at most MOST / 2 equal parts of the run has their mean,
the smallest and the largest, so that a spike of a single step is still there; a part with a value that was not finite
is nan. Runs of the same length have the same parts, so that seeds can be averaged.
"""

from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from quack_lm.files import metrics_line

# Of tables over heads fewer: one may be larger than all numbers of a run.
MOST, MOST_TABLES = 2000, 200

# What figures and collected files have of a line; the other tables over heads are most of its bytes.
KEPT_PREFIXES = ("train/", "val/", "logits/", "throughput/tokens")
KEPT_TABLES = ("logits/max_per_head", "logits/delta_mean_per_head", "logits/delta_from_")
TABLE = "_per_head"

Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class Curve:
    """A metric of one run: a number, or a table over [layers, heads], at each of n steps."""

    steps: Array  # [n]; of a part, its last
    mean: Array  # [n] or [n, layers, heads], as low and high; nan where a value was not finite
    low: Array
    high: Array

    @property
    def is_in_parts(self) -> bool:
        """Whether each value is of several steps."""
        return self.low is not self.mean

    def head(self, layer: int, head: int) -> "Curve":
        """One head of a table."""
        mean = self.mean[:, layer, head]
        low, high = (values[:, layer, head] if self.is_in_parts else mean for values in (self.low, self.high))
        return Curve(steps=self.steps, mean=mean, low=low, high=high)


_NONE = np.zeros(0)
EMPTY = Curve(steps=_NONE, mean=_NONE, low=_NONE, high=_NONE)


class CurveReader:
    """Takes the values of one run as they come, and keeps what its curves need."""

    def __init__(self, total_steps: int) -> None:
        self.total_steps = total_steps
        self._series: dict[str, _Series] = {}

    def add(self, step: int, key: str, value: Any) -> None:
        """A number, or a table, which is left out if it has another shape than the first."""
        series = self._series.get(key)
        if series is None:
            series = self._series[key] = _Series(self.total_steps, np.shape(value))
        series.add(step, value)

    def curves(self) -> dict[str, Curve]:
        """By metric, in the order in which they first came."""
        return {key: series.curve() for key, series in self._series.items()}


class _Series:
    """The values of one metric: all, or once these are too many the parts."""

    def __init__(self, total_steps: int, shape: tuple[int, ...]) -> None:
        self.total_steps, self.shape = total_steps, shape
        self.n_parts = (MOST_TABLES if shape else MOST) // 2
        self.steps = array("q")
        self.values: Any = [] if shape else array("d")
        self.counts: Array | None = None  # of the values in each part

    def add(self, step: int, value: Any) -> None:
        if self.shape and value.shape != self.shape:
            return
        self.steps.append(step)
        self.values.append(value)
        if len(self.steps) > 2 * self.n_parts:
            self._fold()

    def curve(self) -> Curve:
        if self.counts is None:
            values = np.array(self.values)
            return Curve(steps=np.array(self.steps), mean=values, low=values, high=values)
        self._fold()
        used = self.counts > 0
        mean = self.sums[used] / self.counts[used].reshape(-1, *(1 for _ in self.shape))
        return Curve(steps=self.last[used], mean=mean, low=self.low[used], high=self.high[used])

    def _fold(self) -> None:
        steps, values = np.array(self.steps), np.array(self.values).reshape(-1, *self.shape)
        del self.steps[:], self.values[:]
        if self.counts is None:
            size = (self.n_parts, *self.shape)
            self.counts, self.last = np.zeros(self.n_parts, np.int64), np.zeros(self.n_parts, np.int64)
            self.sums = np.zeros(size)
            self.low, self.high = np.full(size, np.inf, values.dtype), np.full(size, -np.inf, values.dtype)
        width = -(-self.total_steps // self.n_parts)
        parts = np.minimum(steps // width, self.n_parts - 1)
        np.add.at(self.counts, parts, 1)
        np.maximum.at(self.last, parts, steps)
        with np.errstate(invalid="ignore"):
            np.add.at(self.sums, parts, values)
            np.minimum.at(self.low, parts, values)
            np.maximum.at(self.high, parts, values)


def read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The step of each line of a metrics.jsonl, and what is kept of it; nothing of a line that is damaged."""
    if path.is_file():
        with open(path, "rb") as file:
            for line in file:
                # The last line of a run that is being written, or was killed while writing, is empty.
                if record := metrics_line(line):
                    yield record["step"], _kept(record)


def _kept(record: dict[str, Any]) -> dict[str, Any]:
    """The numbers, nan for null, and the tables of a line that are kept; nothing that is neither."""
    found: dict[str, Any] = {}
    for key, value in record.items():
        if not key.startswith(KEPT_PREFIXES):
            continue
        if key.endswith(TABLE):
            if key.startswith(KEPT_TABLES) and (table := as_table(value)) is not None:
                found[key] = table
        elif value is None or isinstance(value, int | float):
            found[key] = np.nan if value is None else value
    return found


def as_table(value: Any) -> Array | None:
    """A [layers, heads] table with nan for null; None for anything else."""
    try:
        table = np.array(value, dtype=np.float32)
    except (TypeError, ValueError, OverflowError):
        return None
    return table if table.ndim == 2 and table.size else None
