"""What the runs of a sweep directory measured, as plain data for the table, the figures and the page."""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from quack_lm.config import choice, flatten
from quack_lm.outcome import kind_of_end
from quack_lm.sweep.cell import FINISHED, LOG_FILE, Cell, last_lines, read_json
from quack_lm.sweep.plan import Plan, read_plan

# Settings that have a column, a panel or a style of their own; every other difference between runs goes into the label.
SHOWN_ELSEWHERE = (
    "run_dir",
    "seed",
    "attention._target_",
    "stabilizer._target_",
    "optimizer.lr",
    "trainer.probe_parts",
)


# A metric's name, or what to take from a line of metrics; `...` stands for "not due at this step".
Reader = str | Callable[[dict[str, Any]], Any]


class Place(NamedTuple):
    """Where methods are compared: all settings but the stabilizer's own, and the seed."""

    attention: str
    condition: str
    lr: float

    def __str__(self) -> str:
        return f"{self.attention}, lr {self.lr:g}" + (f", {self.condition}" if self.condition else "")


@dataclass(frozen=True, kw_only=True)
class Result:
    """One cell with what it has reached."""

    cell: Cell
    variation: str  # what tells it from cells with the same stabilizer at the same place: "tau=0.1"
    condition: str  # settings outside of the stabilizer in which it is unlike most cells: "adamw_lr=0.01"
    status: str
    summary: dict[str, Any]
    metrics: list[dict[str, Any]]
    environment: dict[str, Any]
    stop_record: dict[str, Any]  # what the sweep's stop rule wrote, if it ended the run

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
    def method(self) -> str:
        """The stabilizer with what varies beside it, as legends and tables name it."""
        return f"{self.stabilizer} {self.variation}".rstrip()

    @property
    def lr(self) -> float:
        return float(self.cell.config["optimizer"]["lr"])

    @property
    def seed(self) -> int:
        return int(self.cell.config["seed"])

    @property
    def unstable(self) -> list[str]:
        """The reasons for which a run that did not diverge is still no healthy run."""
        return list(self.summary.get("unstable") or [])

    @property
    def reason(self) -> str | None:
        """Why the run ended, in its own words or, where it had no time for any, the last of its log."""
        if self.status == "failed" and not self.summary.get("reason"):
            return next(iter(last_lines(self.cell.run_dir / LOG_FILE, 1)), None)
        return self.summary.get("reason")

    @property
    def outcome(self) -> str:
        """The status in finer words: `non-finite`, `out of memory`, `preempted`."""
        return kind_of_end(self.status, self.reason)

    @property
    def is_diverged(self) -> bool:
        return self.status == "diverged"

    @property
    def is_healthy(self) -> bool:
        """Whether it reached its end without any sign of trouble."""
        return self.status == "completed" and not self.unstable

    @property
    def step(self) -> int:
        return int(self.summary.get("step") or 0)

    @property
    def is_finished(self) -> bool:
        return self.status in FINISHED

    def number(self, key: str) -> float | None:
        """A number of the summary; None where it was not measured or not finite."""
        value = self.summary.get(key)
        return float(value) if isinstance(value, int | float) and math.isfinite(value) else None

    def curve(self, read: Reader) -> list[tuple[int, float]]:
        """(step, value) wherever the metric was due; a value that was not finite is nan."""
        values = [(line["step"], line.get(read, ...) if isinstance(read, str) else read(line)) for line in self.metrics]
        return [(step, math.nan if value is None else float(value)) for step, value in values if value is not ...]

    @property
    def probe_cost(self) -> tuple[float, float] | None:
        """(seconds of one probe, the same in units of training steps); None where there was none."""
        seconds, n_probes = (self.summary.get("outside_s") or {}).get("probe"), self.summary.get("probes")
        elapsed = self.number("elapsed_s")
        if not (seconds and n_probes and elapsed and self.step):
            return None
        return seconds / n_probes, seconds / n_probes / (elapsed / self.step)

    def first_blowup(self) -> tuple[int, int, int] | None:
        """(step, layer, head) at the first probe at which a head's largest logit left its range; the largest such."""
        limit = self.cell.config["trainer"].get("unstable_logit", math.inf)
        for line in self.metrics:
            table = line.get("logits/max_per_head", [])
            heads = [
                (math.inf if value is None else value, layer, head)
                for layer, row in enumerate(table)
                for head, value in enumerate(row)
            ]
            largest, layer, head = max(heads, default=(-math.inf, 0, 0), key=lambda entry: entry[0])
            if largest > limit:
                return line["step"], layer, head
        return None

    @property
    def steps_saved(self) -> int:
        """The steps that the stop rule spared."""
        return self.cell.total_steps - self.step if self.stop_record else 0

    @property
    def seconds_saved(self) -> float:
        """The training time of these steps, at the speed of the run itself."""
        elapsed = self.number("elapsed_s")
        return self.steps_saved * elapsed / self.step if elapsed and self.step else 0.0


def middle_head(key: str) -> Reader:
    """Reads the middle head of the middle layer out of a [layer][head] table."""

    def read(line: dict[str, Any]) -> Any:
        if key not in line:
            return ...
        layer = line[key][len(line[key]) // 2]
        return layer[len(layer) // 2]

    return read


@dataclass(frozen=True, kw_only=True)
class Results:
    """A sweep directory as it is now, ordered by attention, stabilizer, rate and seed."""

    directory: Path
    plan: Plan
    results: list[Result]

    def attentions(self) -> list[str]:
        return list(dict.fromkeys(result.attention for result in self.results))

    def rates(self) -> list[float]:
        return sorted({result.lr for result in self.results})

    def stabilizers(self) -> list[str]:
        return list(dict.fromkeys(result.stabilizer for result in self.results))

    def places(self) -> list[Place]:
        """In the order of the sweep file, rates rising."""
        order = _ranks((r.attention, r.condition) for r in self.results)
        return sorted({r.place for r in self.results}, key=lambda p: (order[p.attention, p.condition], p.lr))

    def at(self, place: Place) -> list[Result]:
        return [result for result in self.results if result.place == place]

    def not_in_plan(self) -> list[str]:
        """Run directories of an earlier, larger plan: they are shown nowhere else."""
        planned = {cell.name for cell in self.plan.cells}
        found = {path.parent.name for path in self.directory.glob("*/summary.json")}
        return sorted(found - planned)


# A cell, and its status, summary, metrics, environment and stop record.
Entry = tuple[Cell, str, dict[str, Any], list[dict[str, Any]], dict[str, Any], dict[str, Any]]


def from_runs(directory: Path) -> Results:
    """What the run directories of a sweep hold now."""
    plan = read_plan(directory)
    entries = []
    for cell in plan.cells:
        metrics = list(_json_lines(cell.run_dir / "metrics.jsonl"))
        environment = read_json(cell.run_dir / "environment.json")
        entries.append((cell, cell.status(), cell.summary(), metrics, environment, cell.stop_record()))
    return make_results(directory, plan, entries)


def make_results(directory: Path, plan: Plan, entries: Sequence[Entry]) -> Results:
    labels = _labels([cell.config for cell, *_ in entries])
    results = [
        Result(
            cell=cell,
            variation=variation,
            condition=condition,
            status=status,
            summary=summary,
            metrics=metrics,
            environment=environment,
            stop_record=record,
        )
        for (cell, status, summary, metrics, environment, record), (variation, condition) in zip(
            entries, labels, strict=True
        )
    ]
    # Attentions and stabilizers keep the order in which the sweep file names them.
    attentions = _ranks(result.attention for result in results)
    stabilizers = _ranks(result.stabilizer for result in results)
    methods = _ranks(result.method for result in results)
    conditions = _ranks(result.condition for result in results)
    results.sort(
        key=lambda r: (
            *(attentions[r.attention], conditions[r.condition], stabilizers[r.stabilizer], methods[r.method]),
            *(r.lr, r.seed),
        )
    )
    return Results(directory=directory, plan=plan, results=results)


def _json_lines(path: Path) -> Iterable[dict[str, Any]]:
    if not path.is_file():
        return
    for line in path.read_text(errors="replace").splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            return  # the last line of a run that is being written, or was killed while writing
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            yield record


def _ranks(names: Iterable[Any]) -> dict[Any, int]:
    return {name: rank for rank, name in enumerate(dict.fromkeys(names))}


def _labels(configs: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """(variation, condition) of each config, among the configs with the same choice in the section of a setting.

    A stabilizer's settings are named wherever they differ; others only where they are not what most configs have.
    """
    flat = [flatten(config) for config in configs]
    labels = []
    for config in flat:
        variation: dict[str, None] = {}
        condition: dict[str, None] = {}
        for key, value in config.items():
            section, _, name = key.rpartition(".")
            target = f"{section}._target_"
            peers = [other for other in flat if name == "_target_" or other.get(target) == config.get(target)]
            values = Counter(_text(peer.get(key)) for peer in peers)
            if len(values) == 1 or key in SHOWN_ELSEWHERE or section == "logger":
                continue
            text = f"{section}={value.split('.')[-2]}" if name == "_target_" else f"{name}={_text(value)}"
            if section == "stabilizer":
                variation[text] = None
            elif _text(value) != values.most_common(1)[0][0]:
                condition[text] = None
        labels.append((" ".join(variation), " ".join(condition)))
    return labels


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
