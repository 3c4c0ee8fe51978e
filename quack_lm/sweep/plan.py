"""The plan of a sweep: its cells, composed and checked, and the plan.json that records them."""

import itertools
import math
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import pydantic
from tqdm import tqdm

from quack_lm.config import choice, compose_all, fingerprint, flatten
from quack_lm.errors import UserError, explaining
from quack_lm.files import LARGEST_FLOAT, write_json
from quack_lm.sweep.cell import Cell, readable
from quack_lm.sweep.file import Point, StopRule, Sweep, override_value
from quack_lm.training.run_dir import RunDir
from quack_lm.training.state import Count

PLAN_FILE = "plan.json"
CLASS_NAME = r"^\w+(\.\w+)+$"
Positive = Annotated[Count, pydantic.Field(gt=0)]
Float32 = Annotated[float, pydantic.Field(ge=1 / LARGEST_FLOAT, le=LARGEST_FLOAT)]


@dataclass(frozen=True, kw_only=True)
class SweepPlan:
    """The cells of a sweep as its directory records them."""

    sweep: str
    question: str
    command: str
    cells: list[Cell]
    stop: StopRule | None = None
    tune_seeds: Sequence[int] = ()  # select each stabilizer's setting; the other seeds judge it


class _Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(strict=True)


class _Choice(_Strict):
    """A section of a config, as far as a report takes it for granted."""

    target: Annotated[str, pydantic.Field(alias="_target_", pattern=CLASS_NAME, max_length=200)]


class _Optimizer(_Choice):
    lr: Float32


class _Trainer(_Strict):
    steps: Positive
    seq_len: Positive
    global_batch_size: Positive
    unstable_logit: pydantic.PositiveFloat = math.inf


class _Config(_Strict):
    seed: Count
    attention: _Choice
    stabilizer: _Choice
    optimizer: _Optimizer
    trainer: _Trainer


def _is_config(config: dict[str, Any]) -> dict[str, Any]:
    _Config.model_validate(config)
    for key, value in flatten(config).items():
        if key.rpartition(".")[2] == "_target_" and not (isinstance(value, str) and re.fullmatch(CLASS_NAME, value)):
            raise ValueError(f"{key}={value!r} is not the name of a class")
    return config


def _is_file_name(name: str) -> str:
    if len(os.fsencode(name)) > 200:
        raise ValueError("it is longer than the name of a file may be")
    return name


class Record(pydantic.BaseModel):
    """A cell as plan.json and the collected files have it, which may come from somebody else."""

    # One name, not a path: what is read and written lies in the sweep's directory.
    name: Annotated[
        str, pydantic.Field(pattern=r"^[^/\x00-\x1f\x7f.][^/\x00-\x1f\x7f]*$"), pydantic.AfterValidator(_is_file_name)
    ]
    fingerprint: str
    overrides: list[str]
    config: Annotated[dict[str, Any], pydantic.AfterValidator(_is_config)]


class Document(pydantic.BaseModel):
    """A plan as plan.json and the collected files have it."""

    sweep: str
    question: str
    command: str
    stop: StopRule | None = None
    tune_seeds: list[int] = []
    cells: list[Record]

    def plan(self, directory: Path) -> SweepPlan:
        """The plan with its runs in a directory."""
        cells = [
            Cell(overrides=c.overrides, config=c.config, fingerprint=c.fingerprint, run_dir=RunDir(directory / c.name))
            for c in self.cells
        ]
        return SweepPlan(
            sweep=self.sweep,
            question=self.question,
            command=self.command,
            cells=cells,
            stop=self.stop,
            tune_seeds=self.tune_seeds,
        )


def reason(error: Exception) -> str:
    """What a file's reader found first, in a few words."""
    if isinstance(error, pydantic.ValidationError):
        first = error.errors()[0]
        return ": ".join(part for part in (".".join(map(str, first["loc"])), first["msg"]) if part)
    return next(iter(str(error).splitlines()), type(error).__name__)


def make_cells(sweep: Sweep, directory: Path, overrides: Sequence[str] = ()) -> list[Cell]:
    """Every run of the sweep, composed and checked; `overrides` join the base of each."""
    points = sweep.points()
    _refuse_lost_settings(sweep, points, overrides)
    runs = [[*sweep.base, f"seed={point.seed}", *overrides, *point.overrides] for point in points]
    cells: dict[str, Cell] = {}
    # No bar where the output is a file.
    bar = tqdm(compose_all(runs), "plan", len(runs), unit="run", disable=None, leave=False, dynamic_ncols=True)
    for config, own in zip(bar, runs, strict=True):
        cell = _cell(config, own, directory, sweep.name)
        # An extra point may repeat one of the grid.
        cells.setdefault(cell.fingerprint, cell)
    if not cells:
        raise UserError(f"sweep {sweep.name} has no runs: everything is excluded")
    return list(cells.values())


def write_plan(directory: Path, plan: SweepPlan, file: str = PLAN_FILE) -> None:
    """Write plan.json, or another file of the sweep directory, atomically."""
    cells = [
        {"name": c.name, "fingerprint": c.fingerprint, "overrides": c.overrides, "config": c.config} for c in plan.cells
    ]
    head = {"sweep": plan.sweep, "question": plan.question, "command": plan.command}
    rules = {"stop": asdict(plan.stop) if plan.stop else None, "tune_seeds": list(plan.tune_seeds)}
    with explaining(f"dir={directory}", "or choose another"):
        (directory / file).parent.mkdir(parents=True, exist_ok=True)
        write_json(directory / file, {**head, **rules, "cells": cells})


def read_plan(directory: Path, file: str = PLAN_FILE) -> SweepPlan:
    """The plan of a sweep directory, wherever the directory lies now."""
    path = directory / file
    if not path.is_file():
        raise UserError(f"{directory}: no {file} here; quack-lm sweep plan sweep=... dir={directory} writes it")
    try:
        return Document.model_validate_json(path.read_bytes()).plan(directory)
    except (OSError, pydantic.ValidationError) as error:
        raise UserError(f"{path} is invalid ({reason(error)}); make the plan again") from None


def _cell(config: dict[str, Any], overrides: list[str], directory: Path, sweep: str) -> Cell:
    identity = fingerprint(config)
    run_dir = RunDir(directory / f"{readable(config)}-{identity}")
    # One W&B group per sweep, and tags to group and filter by; what the user set himself comes later and wins.
    tags = ",".join(choice(config[section]) for section in ("attention", "stabilizer"))
    mirror = [f"logger.group={override_value(sweep)}", f"logger.tags=[{tags}]"]
    return Cell(overrides=[*mirror, *overrides], config=config, fingerprint=identity, run_dir=run_dir)


def _refuse_lost_settings(sweep: Sweep, points: list[Point], overrides: Sequence[str]) -> None:
    """A value that another one replaces in every cell would have no effect, silently."""
    axes = sweep.keys_of_points() | ({"seed"} if len(sweep.seeds) > 1 else set())
    for override in overrides:
        if _key(override) in axes:
            raise UserError(
                f"{override}: the sweep {sweep.name} sets this key itself, run by run; remove it here or there"
            )
    for override in [*sweep.base, *overrides, *itertools.chain.from_iterable(point.overrides for point in points)]:
        if _key(override) == "run_dir":
            raise UserError(f"{override}: a sweep names the directories of its runs itself; remove it, and use dir=")
    for override in [*sweep.base, *itertools.chain.from_iterable(point.overrides for point in points)]:
        if _key(override) == "seed":
            raise UserError(f"{override}: a sweep file gives its seeds as seeds: [...]; remove it")
    for point in points:
        keys = [_key(override) for override in point.overrides]
        if twice := next((key for key in keys if keys.count(key) > 1), None):
            raise UserError(f"{twice}: two axes of the sweep {sweep.name} set this key; only one can count")


def _key(override: str) -> str:
    return override.split("=")[0].strip()
