"""A sweep: a yaml file expanded to runs, each known by the hash of its resolved config, and trained N at a time.

    sweep file --load--> Sweep --plan--> cells --write_plan--> plan.json --run--> run directories

A cell's directory depends on its own config only, so growing a sweep repeats nothing, and what a cell has reached is
read from its directory, so any number of calls, also at the same time, share one state.
"""

import fcntl
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import IO, Any

import pydantic
import yaml
from tqdm import tqdm

from quack_lm.config import CONFIG_DIR, choice, compose, fingerprint
from quack_lm.errors import UserError
from quack_lm.files import write_json

TRAIN_SCRIPT = CONFIG_DIR.parent / "scripts" / "train.py"
PLAN_FILE = "plan.json"
LOG_FILE = "train.log"

# Outcomes that running again would only repeat.
FINISHED = ("completed", "diverged")

POLL_S = 0.5
LOG_LINES_SHOWN = 6

# ------------------------------------------------------------------------------------------------ the file

Scalar = str | int | float | bool | None

_KEYS: dict[str, Any] = {
    "base": list[str],
    "grid": dict[str, list[Scalar] | dict[Scalar, list[str]]],
    "extra": list[list[str]],
    "exclude": list[dict[str, Scalar]],
    "seeds": list[pydantic.NonNegativeInt],
}


@dataclass(frozen=True)
class Point:
    """One value on each axis of the grid, and the overrides that these values stand for."""

    labels: dict[str, str]
    overrides: list[str]


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A sweep file as written, with every grid value as a label and its overrides."""

    name: str
    question: str
    base: list[str] = field(default_factory=list)
    grid: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    extra: list[list[str]] = field(default_factory=list)
    exclude: list[dict[str, str]] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [0])

    def points(self) -> list[Point]:
        """The grid without its exclusions, first axis slowest, then the extra points."""
        grid = []
        for values in itertools.product(*(axis.items() for axis in self.grid.values())):
            labels = dict(zip(self.grid, (label for label, _ in values), strict=True))
            if not any(_matches(labels, exclusion) for exclusion in self.exclude):
                grid.append(Point(labels, [override for _, overrides in values for override in overrides]))
        # A file without a grid is its extra points, not one bare base run beside them.
        return (grid if self.grid or not self.extra else []) + [Point({}, overrides) for overrides in self.extra]


def load(name: str) -> Sweep:
    """Read `configs/sweep/<name>.yaml`, or the file itself when `name` ends in .yaml."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else CONFIG_DIR / "sweep" / f"{name}.yaml"
    if not path.is_file():
        raise UserError(f"sweep={name}: there is no {path}; {_nearest(name, _known_sweeps())}")
    try:
        text = path.read_text(encoding="utf-8")
        raw = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a readable yaml file: {error}") from None
    return _check(raw, _opening_comment(text, path), path)


def _check(raw: Any, question: str, path: Path) -> Sweep:
    if not isinstance(raw, dict):
        raise UserError(f"{path}: expected keys at the top level, among {', '.join(_KEYS)}")
    for key, value in raw.items():
        if key not in _KEYS:
            raise UserError(f"{path}: unknown key {key}; {_nearest(str(key), list(_KEYS))}")
        try:
            pydantic.TypeAdapter(_KEYS[key]).validate_python(value, strict=True)
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in (key, *first["loc"]))
            raise UserError(f"{path}: {place}={first['input']!r}: {first['msg']}") from None
    grid = {axis: _axis(path, axis, values) for axis, values in raw.get("grid", {}).items()}
    exclude = [{axis: _text(value) for axis, value in entry.items()} for entry in raw.get("exclude", [])]
    _check_exclusions(path, grid, exclude)
    seeds = raw.get("seeds", [0])
    if not seeds:
        raise UserError(f"{path}: seeds is empty; give at least one, for example [0]")
    name = path.resolve().with_suffix("")
    return Sweep(
        name=str(name.relative_to(CONFIG_DIR / "sweep")) if name.is_relative_to(CONFIG_DIR / "sweep") else name.name,
        question=question,
        base=raw.get("base", []),
        grid=grid,
        extra=raw.get("extra", []),
        exclude=exclude,
        seeds=seeds,
    )


def _axis(path: Path, axis: str, values: Any) -> dict[str, list[str]]:
    """`lr: [0.1]` stands for the override lr=0.1; `method: {a: [x=1, y=2]}` gives a label to several overrides."""
    if not values:
        raise UserError(f"{path}: grid.{axis} is empty; give it a value or remove it")
    if isinstance(values, dict):
        return {_text(label): overrides for label, overrides in values.items()}
    return {_text(value): [f"{axis}={override_value(value)}"] for value in values}


def _check_exclusions(path: Path, grid: dict[str, dict[str, list[str]]], exclude: list[dict[str, str]]) -> None:
    """An exclusion that can match nothing is a mistake, not a wish."""
    for axis, label in (pair for entry in exclude for pair in entry.items()):
        if axis not in grid:
            raise UserError(f"{path}: exclude names {axis}, which is no axis of the grid; {_nearest(axis, list(grid))}")
        if not any(_equal(label, known) for known in grid[axis]):
            raise UserError(f"{path}: exclude {axis}={label} is not in the grid; {_nearest(label, list(grid[axis]))}")
    if {} in exclude:
        raise UserError(f"{path}: exclude has an empty entry, which would exclude everything")


def _opening_comment(text: str, path: Path) -> str:
    lines = list(itertools.takewhile(lambda line: line.startswith("#"), text.splitlines()))
    question = "\n".join(line.lstrip("#").strip() for line in lines).strip()
    if not question:
        raise UserError(f"{path}: must open with a comment that says what the sweep asks and what is held fixed")
    return question


def _matches(labels: dict[str, str], exclusion: dict[str, str]) -> bool:
    return all(_equal(labels[axis], label) for axis, label in exclusion.items())


def _equal(a: str, b: str) -> bool:
    """Equal as numbers where both are numbers: yaml reads 3e-3 as text and 0.003 as a float."""
    try:
        return float(a) == float(b)
    except ValueError:
        return a == b


def _text(value: Scalar) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return str(value)


def override_value(value: Scalar) -> str:
    """The value in the override grammar: as it is where that is plain, otherwise in quotes."""
    text = _text(value)
    if re.fullmatch(r"[\w.+\-/]+", text, flags=re.ASCII):
        return text
    # Backslashes are ordinary there except in front of a quote.
    return "'" + re.sub(r"(\\*)'", lambda match: match[1] * 2 + "\\'", re.sub(r"(\\+)$", r"\1\1", text)) + "'"


def _known_sweeps() -> list[str]:
    folder = CONFIG_DIR / "sweep"
    return sorted(str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.yaml"))


def _nearest(name: str, known: list[str]) -> str:
    close = get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"choices: {', '.join(known) or 'none'}"


# ------------------------------------------------------------------------------------------------ the plan


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of a sweep."""

    overrides: list[str]
    config: dict[str, Any]
    fingerprint: str
    run_dir: Path

    @property
    def name(self) -> str:
        return self.run_dir.name

    @property
    def total_steps(self) -> int:
        return int(self.config["trainer"]["steps"])

    @property
    def total_tokens(self) -> int:
        trainer = self.config["trainer"]
        return int(self.total_steps * trainer["global_batch_size"] * trainer["seq_len"])

    def arguments(self) -> list[str]:
        """The arguments of scripts/train.py; a cell that was started before continues."""
        return [*self.overrides, f"run_dir={override_value(str(self.run_dir))}", "trainer.resume=auto"]

    def command(self) -> str:
        """The run as one line to paste into a shell."""
        return shlex.join(["python", "scripts/train.py", *self.arguments()])

    def summary(self) -> dict[str, Any]:
        """What the run wrote about itself so far; empty before it wrote anything, or where that is damaged."""
        try:
            return dict(json.loads((self.run_dir / "summary.json").read_text()))
        except (FileNotFoundError, json.JSONDecodeError):
            return {}

    def status(self) -> str:
        """The run's own status; `running` only while a process is at it, else `stopped`; `missing` if never started."""
        written = self.summary().get("status")
        if written not in (None, "running"):
            return str(written)
        log = self.run_dir / LOG_FILE
        if _is_locked(log):
            return "running"
        if written:
            return "stopped"
        return "failed" if log.exists() else "missing"

    def is_finished(self) -> bool:
        return self.summary().get("status") in FINISHED

    def steps_done(self) -> int:
        """Steps that need no more work: all of them for a finished run, even if it diverged early."""
        if self.is_finished():
            return self.total_steps
        return min(_last_step(self.run_dir / "metrics.jsonl"), self.total_steps)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The cells of a sweep as its directory records them."""

    sweep: str
    question: str
    command: str
    cells: list[Cell]


def plan(sweep: Sweep, directory: Path, overrides: Sequence[str] = ()) -> list[Cell]:
    """Every run of the sweep, composed and checked; `overrides` join the base of each."""
    points = sweep.points()
    _refuse_overridden_axes(sweep, points, overrides)
    cells: dict[str, Cell] = {}
    for point, seed in itertools.product(points, sweep.seeds):
        cell = _cell([*sweep.base, f"seed={seed}", *overrides, *point.overrides], directory)
        # An extra point may repeat one of the grid.
        cells.setdefault(cell.fingerprint, cell)
    if not cells:
        raise UserError(f"sweep {sweep.name} has no runs: everything is excluded")
    return list(cells.values())


def write_plan(directory: Path, plan: Plan) -> None:
    """Write plan.json whole or not at all."""
    cells = [
        {"name": c.name, "fingerprint": c.fingerprint, "overrides": c.overrides, "config": c.config} for c in plan.cells
    ]
    document = {"sweep": plan.sweep, "question": plan.question, "command": plan.command, "cells": cells}
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / PLAN_FILE, document)


def read_plan(directory: Path) -> Plan:
    """The plan of a sweep directory, wherever the directory lies now."""
    path = directory / PLAN_FILE
    if not path.is_file():
        raise UserError(
            f"{directory}: no {PLAN_FILE} here; python scripts/sweep.py plan sweep=... dir={directory} writes it"
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
    return Plan(sweep=document["sweep"], question=document["question"], command=document["command"], cells=cells)


def _cell(overrides: list[str], directory: Path) -> Cell:
    config = compose(overrides)
    identity = fingerprint(config)
    return Cell(
        overrides=overrides, config=config, fingerprint=identity, run_dir=directory / f"{_readable(config)}-{identity}"
    )


def _readable(config: dict[str, Any]) -> str:
    """Made of the cell's own config alone: a name must not change when the sweep around it grows."""
    attention, stabilizer = choice(config["attention"]), choice(config["stabilizer"])
    return f"{attention}-{stabilizer}-lr{config['optimizer']['lr']:g}-seed{config['seed']}"


def _refuse_overridden_axes(sweep: Sweep, points: list[Point], overrides: Sequence[str]) -> None:
    """A command-line value for a key that the grid sets would have no effect, silently."""
    axes = {override.split("=")[0] for point in points for override in point.overrides}
    axes |= {"seed"} if len(sweep.seeds) > 1 else set()
    for override in overrides:
        if override.split("=")[0] in axes:
            raise UserError(f"{override}: the sweep {sweep.name} sets this key itself, cell by cell; change its file")


# ------------------------------------------------------------------------------------------------ the runs


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a call of `run` ended."""

    failed: list[Cell]
    signal: int | None

    @property
    def exit_code(self) -> int:
        return 128 + self.signal if self.signal else int(bool(self.failed))


def default_jobs(threads: int) -> int:
    return max(1, len(_own_cores()) // threads)


def run(cells: Sequence[Cell], *, jobs: int | None = None, threads: int = 1) -> Outcome:
    """Train every unfinished cell, `jobs` at a time, each on `threads` cores of its own.

    A failed cell is named with the end of its log and stops nothing. SIGINT and SIGTERM are passed on once; the runs
    save and end, and the next call continues them. A second signal kills.
    """
    pending = [cell for cell in cells if not cell.is_finished()]
    free = _core_sets(jobs or default_jobs(threads), threads)
    running: list[_Running] = []
    failed: list[Cell] = []
    signals_passed_on = 0
    with _signals() as received, _progress(cells) as bar:
        while pending or running:
            if len(received) > signals_passed_on:
                bar.write("stopping: the runs save and end; a second signal kills them", file=sys.stderr)
                pending.clear()
                for entry in running:
                    entry.process.send_signal(signal.SIGKILL if signals_passed_on else received[0])
                signals_passed_on = len(received)
            _start_what_fits(pending, free, running, threads)
            for entry in [entry for entry in running if entry.process.poll() is not None]:
                running.remove(entry)
                free.append(entry.cores)
                if not entry.cell.is_finished() and not received:
                    failed.append(entry.cell)
                bar.write(_ending(entry, bool(received)), file=sys.stderr)
            _advance(bar, cells, running)
            time.sleep(POLL_S if pending or running else 0)
    return Outcome(failed=failed, signal=received[0] if received else None)


@dataclass(frozen=True)
class _Running:
    cell: Cell
    process: subprocess.Popen[bytes]
    cores: set[int]


def _start_what_fits(pending: list[Cell], free: list[set[int]], running: list[_Running], threads: int) -> None:
    """Move cells from pending to running while cores are free; one that another process trains stays pending."""
    for cell in list(pending):
        if cell.is_finished():  # meanwhile, by another call
            pending.remove(cell)
        elif free and (process := _start(cell, free[-1], threads)):
            running.append(_Running(cell, process, free.pop()))
            pending.remove(cell)


def _start(cell: Cell, cores: set[int], threads: int) -> subprocess.Popen[bytes] | None:
    """Start a cell's process, or None while another process, perhaps left by a killed sweep, still trains it.

    The log is the lock: the child inherits it as its output, so the lock lives as long as the child does.
    """
    cell.run_dir.mkdir(parents=True, exist_ok=True)
    with open(cell.run_dir / LOG_FILE, "ab") as log:
        if not _lock(log, fcntl.LOCK_EX):
            return None
        with _pinned(cores):
            return subprocess.Popen(
                [sys.executable, str(TRAIN_SCRIPT), *cell.arguments()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)},
                # Its own session: a Ctrl-C reaches it once, from us, and not a second time from the terminal.
                start_new_session=True,
            )


def _ending(entry: _Running, is_stopping: bool) -> str:
    cell, code = entry.cell, entry.process.returncode
    summary = cell.summary()
    if cell.is_finished():
        loss = summary.get("val_loss")
        return f"{cell.name}: {summary['status']}" + (f", val loss {loss:.3f}" if loss is not None else "")
    if is_stopping:
        return f"{cell.name}: stopped at step {summary.get('step', 0)}"
    tail = "".join(f"\n    {line}" for line in last_lines(cell.run_dir / LOG_FILE, LOG_LINES_SHOWN))
    how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
    return f"{cell.name}: FAILED ({how}), the end of {cell.run_dir / LOG_FILE}:{tail}"


def last_lines(log: Path, count: int) -> list[str]:
    """The end of a log; a progress bar's repainted lines count as one."""
    if not log.is_file():
        return []
    lines = [line.split("\r")[-1].rstrip() for line in _tail(log).replace("\r\n", "\n").split("\n")]
    return [line for line in lines if line][-count:]


def _progress(cells: Sequence[Cell]) -> "tqdm[Any]":
    return tqdm(
        total=sum(cell.total_steps for cell in cells),
        initial=sum(cell.steps_done() for cell in cells),
        unit="step",
        desc="sweep",
        dynamic_ncols=True,
        disable=None,  # no bar where the output is a file
    )


def _advance(bar: "tqdm[Any]", cells: Sequence[Cell], running: Sequence[_Running]) -> None:
    if bar.disable:
        return
    bar.n = sum(cell.steps_done() for cell in cells)
    finished = sum(cell.is_finished() for cell in cells)
    names = ", ".join(entry.cell.name.rpartition("-")[0] for entry in running)
    bar.set_postfix_str(f"{finished}/{len(cells)} runs done, now {names or '-'}")


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of dying of them."""
    received: list[int] = []
    caught = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda number, _: received.append(number)) for number in caught]
    try:
        yield received
    finally:
        for number, handler in zip(caught, before, strict=True):
            signal.signal(number, handler)


@contextmanager
def _pinned(cores: set[int]) -> Iterator[None]:
    """A process started inside inherits these cores; not every system can pin."""
    own = _own_cores()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, own)


def _own_cores() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def _core_sets(jobs: int, threads: int) -> list[set[int]]:
    """One set of cores per job, disjoint unless more are asked for than there are."""
    ring = itertools.cycle(sorted(_own_cores()))
    return [set(itertools.islice(ring, threads)) for _ in range(jobs)]


def _lock(log: IO[bytes], kind: int) -> bool:
    try:
        fcntl.flock(log, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_locked(log: Path) -> bool:
    if not log.is_file():
        return False
    with open(log, "rb") as handle:
        return not _lock(handle, fcntl.LOCK_SH)


def _last_step(metrics: Path) -> int:
    if not metrics.is_file():
        return 0
    for line in reversed(_tail(metrics).split("\n")):
        try:
            return int(json.loads(line)["step"])
        except (json.JSONDecodeError, KeyError, TypeError):
            continue  # a line cut by our window, or still being written
    return 0


def _tail(path: Path, size: int = 1 << 18) -> str:
    with open(path, "rb") as handle:
        handle.seek(max(0, path.stat().st_size - size))
        return handle.read().decode(errors="replace")
