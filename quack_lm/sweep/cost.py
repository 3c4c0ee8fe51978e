"""What a sweep costs: tokens, FLOPs, and the hours that they take at a speed that is assumed or was measured.

Measured hours include validation, probes and checkpoints, and not the start of a run, which nothing records.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from quack_lm.config import choice
from quack_lm.sweep.cell import Cell


@dataclass(frozen=True, kw_only=True)
class Speed:
    """An assumed speed of one device."""

    mfu: float
    tflops: float


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of all cells together; hours of one run at a time, None where nothing says how fast it goes."""

    tokens: int
    flops: float
    hours: float | None
    hours_left: float | None


def count_flops(cells: Sequence[Cell], flops_per_token: Callable[[dict[str, Any]], float]) -> dict[str, float]:
    """The FLOPs of each cell by name; each distinct model is counted once."""
    known: dict[str, float] = {}
    flops = {}
    for cell in cells:
        # The rest of a config does not enter a forward pass; of a stabilizer, its kind may.
        parts = [cell.config["model"], cell.config["attention"], cell.config["stabilizer"]["_target_"]]
        key = json.dumps([*parts, cell.config["trainer"]["seq_len"]], sort_keys=True)
        if key not in known:
            known[key] = flops_per_token(cell.config)
        flops[cell.name] = known[key] * cell.total_tokens
    return flops


def estimate(cells: Sequence[Cell], flops: dict[str, float], assumed: Speed | None = None) -> Cost:
    """The cost of the sweep, at an assumed speed or at that of the cells that have run."""
    seconds = _seconds_assumed(flops, assumed) if assumed else _seconds_measured(cells)
    return Cost(
        tokens=sum(cell.total_tokens for cell in cells),
        flops=sum(flops.values()),
        hours=sum(seconds.values()) / 3600 if seconds else None,
        hours_left=sum(seconds[cell.name] * _share_left(cell) for cell in cells) / 3600 if seconds else None,
    )


def _seconds_assumed(flops: dict[str, float], speed: Speed) -> dict[str, float]:
    return {name: count / (speed.mfu * speed.tflops * 1e12) for name, count in flops.items()}


def _seconds_measured(cells: Sequence[Cell]) -> dict[str, float]:
    """At the mean speed of the same attention and stabilizer where one has run, else of the attention, else of all."""
    measured: dict[tuple[str, ...], list[float]] = {}
    for cell in cells:
        if seconds := _seconds_per_token(cell):
            for kind in _kinds(cell):
                measured.setdefault(kind, []).append(seconds)
    if not measured:
        return {}
    found = {cell.name: next(measured[kind] for kind in _kinds(cell) if kind in measured) for cell in cells}
    return {cell.name: cell.total_tokens * fmean(found[cell.name]) for cell in cells}


def _seconds_per_token(cell: Cell) -> float | None:
    summary = cell.run_dir.summary()
    times = [summary.get("elapsed_s"), *(summary.get("outside_s") or {}).values()]
    return sum(times) / summary["tokens"] if summary.get("tokens") and all(times[:1]) else None


def _kinds(cell: Cell) -> list[tuple[str, ...]]:
    attention, stabilizer = choice(cell.config["attention"]), choice(cell.config["stabilizer"])
    return [(attention, stabilizer), (attention,), ()]


def _share_left(cell: Cell) -> float:
    return 0.0 if cell.is_finished() else 1 - cell.steps_done() / cell.total_steps
