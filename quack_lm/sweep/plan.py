"""The plan of a sweep: its cells, composed and checked, and the plan.json that records them."""

import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from quack_lm.config import choice, compose, fingerprint
from quack_lm.errors import UserError
from quack_lm.files import write_json
from quack_lm.sweep.cell import Cell, readable
from quack_lm.sweep.file import Point, StopRule, Sweep, override_value

PLAN_FILE = "plan.json"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The cells of a sweep as its directory records them."""

    sweep: str
    question: str
    command: str
    cells: list[Cell]
    stop: StopRule | None = None


def make_cells(sweep: Sweep, directory: Path, overrides: Sequence[str] = ()) -> list[Cell]:
    """Every run of the sweep, composed and checked; `overrides` join the base of each."""
    points = sweep.points()
    _refuse_overridden_axes(sweep, points, overrides)
    cells: dict[str, Cell] = {}
    for point in points:
        cell = _cell([*sweep.base, f"seed={point.seed}", *overrides, *point.overrides], directory, sweep.name)
        # An extra point may repeat one of the grid.
        cells.setdefault(cell.fingerprint, cell)
    if not cells:
        raise UserError(f"sweep {sweep.name} has no runs: everything is excluded")
    return list(cells.values())


def write_plan(directory: Path, plan: Plan, file: str = PLAN_FILE) -> None:
    """Write plan.json, or another file of the sweep directory, whole or not at all."""
    cells = [
        {"name": c.name, "fingerprint": c.fingerprint, "overrides": c.overrides, "config": c.config} for c in plan.cells
    ]
    head = {"sweep": plan.sweep, "question": plan.question, "command": plan.command}
    (directory / file).parent.mkdir(parents=True, exist_ok=True)
    write_json(directory / file, {**head, "stop": asdict(plan.stop) if plan.stop else None, "cells": cells})


def read_plan(directory: Path, file: str = PLAN_FILE) -> Plan:
    """The plan of a sweep directory, wherever the directory lies now."""
    path = directory / file
    if not path.is_file():
        raise UserError(
            f"{directory}: no {file} here; python scripts/sweep.py plan sweep=... dir={directory} writes it"
        )
    document = json.loads(path.read_text())
    cells = [
        Cell(
            overrides=cell["overrides"],
            config=cell["config"],
            fingerprint=cell["fingerprint"],
            run_dir=directory / cell["name"],
        )
        for cell in document["cells"]
    ]
    return Plan(
        sweep=document["sweep"],
        question=document["question"],
        command=document["command"],
        cells=cells,
        stop=StopRule(**document["stop"]) if document.get("stop") else None,
    )


def _cell(overrides: list[str], directory: Path, sweep: str) -> Cell:
    config = compose(overrides)
    identity = fingerprint(config)
    run_dir = directory / f"{readable(config)}-{identity}"
    # One W&B group per sweep, and tags to group and filter by; what the user set himself comes later and wins.
    tags = ",".join(choice(config[section]) for section in ("attention", "stabilizer"))
    mirror = [f"logger.group={override_value(sweep)}", f"logger.tags=[{tags}]"]
    return Cell(overrides=[*mirror, *overrides], config=config, fingerprint=identity, run_dir=run_dir)


def _refuse_overridden_axes(sweep: Sweep, points: list[Point], overrides: Sequence[str]) -> None:
    """A command-line value for a key that the grid sets would have no effect, silently."""
    axes = set(itertools.chain.from_iterable([o.split("=")[0] for o in point.overrides] for point in points))
    axes |= {"seed"} if len(sweep.seeds) > 1 else set()
    for override in overrides:
        if override.split("=")[0] in axes:
            raise UserError(f"{override}: the sweep {sweep.name} sets this key itself, cell by cell; change its file")
