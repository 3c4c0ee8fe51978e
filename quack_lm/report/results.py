"""What the runs of a sweep directory measured, as plain data for the table, the figures and the page."""

import functools
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from quack_lm.config import check, choice, fingerprint
from quack_lm.errors import UserError
from quack_lm.files import LARGEST_FLOAT
from quack_lm.report.curves import EMPTY, Array, Curve, CurveReader, read_lines
from quack_lm.sweep.cell import Cell
from quack_lm.sweep.label import describe_differences, title
from quack_lm.sweep.plan import PLAN_FILE, SweepPlan, read_plan
from quack_lm.training.run_dir import FINISHED, RunDir
from quack_lm.training.state import kind_of_end

# A metric's name, or what makes a curve of those that a run has.
Reader = str | Callable[[Mapping[str, Curve]], Curve]


class Place(NamedTuple):
    """Where stabilizers are compared: the same attention, learning rate and other settings."""

    attention: str
    condition: str
    lr: float

    def __str__(self) -> str:
        return f"{self.attention}, lr {self.lr:g}" + (f", {self.condition}" if self.condition else "")


class Blowup(NamedTuple):
    """The first probe at which a head's max logit was above `trainer.unstable_logit`, and the largest head there."""

    step: int
    layer: int
    head: int

    def __str__(self) -> str:
        return f"first head above the threshold: layer {self.layer}, head {self.head}, at step {self.step}"


@dataclass(frozen=True, kw_only=True)
class Result:
    """A cell of the sweep, with what its run has measured so far."""

    cell: Cell
    settings: str  # the stabilizer's settings that differ between the runs of the sweep: "tau=0.1"
    condition: str  # settings outside the stabilizer that differ from those of most runs: "adamw_lr=0.01"
    status: str
    summary: dict[str, Any]
    curves: Mapping[str, Curve]  # by the names in metrics.jsonl
    environment: dict[str, Any]
    stop_record: dict[str, Any]  # what the sweep's stop rule wrote, if it ended the run
    blowup: Blowup | None  # the first head above the threshold

    @property
    def attention(self) -> str:
        return choice(self.cell.config["attention"])

    @property
    def stabilizer(self) -> str:
        return choice(self.cell.config["stabilizer"])

    @property
    def place(self) -> Place:
        return Place(self.attention, self.condition, self.lr)

    @property
    def label(self) -> str:
        """The stabilizer with its settings, as legends and tables name it: the name alone where no setting differs."""
        return f"{self.stabilizer} {self.settings}".rstrip()

    @property
    def title(self) -> str:
        """Everything that distinguishes it from the other runs of the sweep."""
        return title(self.cell.config, self.settings, self.condition)

    @property
    def lr(self) -> float:
        return float(self.cell.config["optimizer"]["lr"])

    @property
    def seed(self) -> int:
        return int(self.cell.config["seed"])

    @property
    def unstable(self) -> list[str]:
        """Why a run that did not diverge still counts as unstable; empty for a healthy run."""
        return list(self.summary.get("unstable") or [])

    @property
    def reason(self) -> str | None:
        """Why the run ended, as its summary says or, where it failed without a reason, the last line of its log."""
        if self.status == "failed" and not self.summary.get("reason"):
            return next(iter(self.cell.run_dir.last_log_lines(1)), None)
        return self.summary.get("reason")

    @property
    def outcome(self) -> str:
        """The status, more specific where the reason is known: `non-finite`, `out of memory`, `preempted`."""
        return kind_of_end(self.status, self.reason)

    @property
    def is_diverged(self) -> bool:
        return self.status == "diverged"

    @property
    def is_healthy(self) -> bool:
        """Whether it completed and no stability rule flagged it."""
        return self.status == "completed" and not self.unstable

    @property
    def step(self) -> int:
        return int(self.summary.get("step") or 0)

    @property
    def is_finished(self) -> bool:
        return self.status in FINISHED

    def number(self, key: str) -> float | None:
        """A number of the summary; None where it was not measured or not finite."""
        value = _number(self.summary.get(key))
        return value if math.isfinite(value) else None

    def over_steps(self, read: Reader) -> Curve:
        """The metric, at the steps at which it was due."""
        return self.curves.get(read, EMPTY) if isinstance(read, str) else read(self.curves)

    def curve(self, read: Reader) -> list[tuple[int, float]]:
        """(step, value) of a metric that is a number; nan where it was not finite."""
        found = self.over_steps(read)
        return list(zip(found.steps.tolist(), found.mean.tolist(), strict=True))

    @property
    def probe_cost(self) -> tuple[float, float] | None:
        """(seconds of one probe, the same in units of training steps); None for a run without probes."""
        seconds, n_probes = (self.summary.get("outside_s") or {}).get("probe"), self.summary.get("probes")
        elapsed = self.number("elapsed_s")
        if not (seconds and n_probes and elapsed and self.step):
            return None
        return seconds / n_probes, seconds / n_probes / (elapsed / self.step)

    @property
    def cache_bytes(self) -> int | None:
        """The bytes of a token in each layer at decode, in bfloat16; None for a config of another version."""
        # Runs that differ in what no cache depends on are computed once.
        same = {"run_dir": None, "seed": 0, "optimizer": {**self.cell.config["optimizer"], "lr": 1.0}}
        return _cache_bytes(json.dumps({**self.cell.config, **same}))

    @property
    def steps_saved(self) -> int:
        """How many steps the stop rule saved; 0 for a run that it did not end."""
        return self.cell.total_steps - self.step if self.stop_record else 0

    @property
    def seconds_saved(self) -> float:
        """The training time of the saved steps, at the run's own speed."""
        elapsed = self.number("elapsed_s")
        return self.steps_saved * elapsed / self.step if elapsed and self.step else 0.0


@dataclass(frozen=True, kw_only=True)
class Results:
    """The runs of a sweep directory as they are now, ordered by attention, stabilizer, rate and seed."""

    directory: Path
    plan: SweepPlan
    results: list[Result]

    def attentions(self) -> list[str]:
        """Their names, in the order of the sweep file."""
        return list(dict.fromkeys(result.attention for result in self.results))

    def rates(self) -> list[float]:
        """The learning rates, increasing."""
        return sorted({result.lr for result in self.results})

    def stabilizers(self) -> list[str]:
        """Their names, in the order of the sweep file."""
        return list(dict.fromkeys(result.stabilizer for result in self.results))

    def places(self) -> list[Place]:
        """Every place of the sweep, in the order of the sweep file and by increasing rate."""
        return list(self._by_place)

    def at(self, place: Place) -> list[Result]:
        """The runs at a place, of all stabilizers and seeds."""
        return self._by_place.get(place, [])

    @cached_property
    def _by_place(self) -> dict[Place, list[Result]]:
        groups: dict[Place, list[Result]] = {}
        for result in self.results:
            groups.setdefault(result.place, []).append(result)
        order = _ranks((place.attention, place.condition) for place in groups)
        return dict(sorted(groups.items(), key=lambda item: (order[item[0][:2]], item[0].lr)))

    @cached_property
    def most_settings(self) -> int:
        """The largest number of stabilizers, each setting counted, at one place."""
        return max((len({r.label for r in runs}) for runs in self._by_place.values()), default=0)

    def with_results(self, results: Sequence[Result]) -> "Results":
        """The same sweep with these results: what differs between its runs is named anew."""
        entries = [(r.cell, r.status, r.summary, r.curves, r.environment, r.stop_record, r.blowup) for r in results]
        return make_results(self.directory, self.plan, entries)

    def not_in_plan(self) -> list[str]:
        """The names of run directories that the plan does not list: those of an earlier, larger plan."""
        planned = {cell.name for cell in self.plan.cells}
        found = {path.name for path in self.directory.iterdir() if RunDir(path).summary_file.is_file()}
        return sorted(found - planned)


# A cell, and its status, summary, curves, environment, stop record and blow-up.
Entry = tuple[Cell, str, dict[str, Any], Mapping[str, Curve], dict[str, Any], dict[str, Any], Blowup | None]


def from_runs(directory: Path) -> Results:
    """The results of a sweep, read from its plan and its run directories; or of a run, from its own."""
    if RunDir(directory).config_file.is_file() and not (directory / PLAN_FILE).is_file():
        plan = plan_of_run(directory)
    else:
        plan = read_plan(directory)
    entries = []
    for cell in plan.cells:
        run = cell.run_dir
        curves, blowup = _read_metrics(cell)
        entries.append((cell, run.status(), run.summary(), curves, run.environment(), run.stop_record(), blowup))
    return make_results(directory, plan, entries)


def _read_metrics(cell: Cell) -> tuple[dict[str, Curve], Blowup | None]:
    reader, blowup = CurveReader(cell.total_steps), None
    limit = cell.config["trainer"].get("unstable_logit", math.inf)
    for step, values in read_lines(cell.run_dir.metrics_file):
        for key, value in values.items():
            reader.add(step, key, value)
        if blowup is None and "logits/max_per_head" in values:
            blowup = _blowup(step, values["logits/max_per_head"], limit)
    return reader.curves(), blowup


def _blowup(step: int, max_logits: Array, limit: float) -> Blowup | None:
    """The largest head of a [layers, heads] table, if it is above the limit, as a value that is not finite is."""
    found = np.nan_to_num(max_logits, nan=np.inf, posinf=np.inf)
    if not found.max() > limit:
        return None
    layer, head = np.unravel_index(found.argmax(), found.shape)
    return Blowup(step, int(layer), int(head))


def plan_of_run(directory: Path) -> SweepPlan:
    """A plan of the one run that a directory holds."""
    config = RunDir(directory).config()
    cell = Cell(overrides=[], config=config, fingerprint=fingerprint(config), run_dir=RunDir(directory))
    question = f"The run in {directory.name}."
    return SweepPlan(sweep=directory.name, question=question, command="", cells=[cell])


def join(parts: Sequence[Results]) -> Results:
    """Results of several directories as one; a run that several have counts once, where it got furthest."""
    furthest: dict[str, Result] = {}
    for result in (result for part in parts for result in part.results):
        other = furthest.get(result.cell.fingerprint)
        if other is None or (other.is_finished, other.step) < (result.is_finished, result.step):
            furthest[result.cell.fingerprint] = result
    plans = [part.plan for part in parts]
    plan = SweepPlan(
        sweep=", ".join(plan.sweep for plan in plans),
        question="\n".join(plan.question for plan in plans),
        command="\n".join(filter(None, (plan.command for plan in plans))),
        cells=[result.cell for result in furthest.values()],
    )
    return replace(parts[0], plan=plan).with_results(list(furthest.values()))


def make_results(directory: Path, plan: SweepPlan, entries: Sequence[Entry]) -> Results:
    """The results in order, from what was read of each cell; `Entry` says what that is."""
    named = describe_differences([cell.config for cell, *_ in entries])
    results = [
        Result(
            cell=cell,
            settings=settings,
            condition=condition,
            status=status,
            summary=summary,
            curves=curves,
            environment=environment,
            stop_record=record,
            blowup=blowup,
        )
        for (cell, status, summary, curves, environment, record, blowup), (settings, condition) in zip(
            entries, named, strict=True
        )
    ]
    # Attentions and stabilizers keep the order in which the sweep file names them.
    attentions = _ranks(result.attention for result in results)
    stabilizers = _ranks(result.stabilizer for result in results)
    labels_in_order = _ranks(result.label for result in results)
    conditions = _ranks(result.condition for result in results)

    def rank(r: Result) -> tuple[float, ...]:
        place = attentions[r.attention], conditions[r.condition]
        return *place, stabilizers[r.stabilizer], labels_in_order[r.label], r.lr, r.seed

    results.sort(key=rank)
    return Results(directory=directory, plan=plan, results=results)


@functools.cache
def _cache_bytes(config_json: str) -> int | None:
    from quack_lm.training.build import count_cache_bytes  # late: torch is needed for nothing else

    try:
        return count_cache_bytes(check(json.loads(config_json)))
    except UserError:
        return None


def _number(value: Any) -> float:
    """nan for null, which a run writes for a value that is not finite, and for anything that is not a number."""
    return float(value) if isinstance(value, int | float) and abs(value) <= LARGEST_FLOAT else math.nan


def _ranks(names: Iterable[Any]) -> dict[Any, int]:
    return {name: rank for rank, name in enumerate(dict.fromkeys(names))}
