"""The sweep file: a base, a grid, extra points, exclusions and seeds, and optionally several scales of all that.

# The question it asks, and what is held fixed.
base: [experiment=tiny]
grid:
  attention: [mha, mla]                         # each value stands for an override: attention=mha
  method: {a: [stabilizer=quack, stabilizer.tau=1], b: [stabilizer=none]}   # a label for several overrides
exclude: [{attention: mha, method: b}]          # cells that match all of it; seed is an axis, too
extra: [[attention=mha, stabilizer=qk_norm]]
seeds: [0, 1]                                   # or {tune: [0, 1, 2], judge: [3, 4, 5, 6, 7]}
stop: {loss_above_best: 2.0, for_steps: 50}     # see rule.py
scales:                                         # scale=big on the command line picks one
  big: [model=1b]                               # overrides that join the base
  small: {base: [model=tiny], grid: {attention: [mla]}, seeds: [0, 1, 2]}   # any of the keys above
"""

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import pydantic

from quack_lm.config import CONFIG_DIR, nearest, read_yaml
from quack_lm.errors import UserError

MOST_RUNS = 10_000
Scalar = str | int | float | bool | None
Axes = dict[str, list[Scalar] | dict[Scalar, list[str]]]


@dataclass(frozen=True, kw_only=True)
class StopRule:
    """When a cell is stopped early: its loss is so many times the best at the same step, for so many steps."""

    __pydantic_config__ = pydantic.ConfigDict(extra="forbid")

    loss_above_best: Annotated[float, pydantic.Field(gt=1, allow_inf_nan=False)]
    for_steps: Annotated[int, pydantic.Field(gt=0, strict=True)]

    def __str__(self) -> str:
        return f"training loss above {self.loss_above_best:g} x the best at the same step for {self.for_steps} steps"


@dataclass(frozen=True, kw_only=True)
class SeparateSeeds:
    """Seeds on which the setting of each stabilizer is selected, and others on which the stabilizers are compared."""

    __pydantic_config__ = pydantic.ConfigDict(extra="forbid")

    tune: Annotated[list[pydantic.NonNegativeInt], pydantic.Field(min_length=1)]
    judge: Annotated[list[pydantic.NonNegativeInt], pydantic.Field(min_length=1)]


_KEYS: dict[str, Any] = {
    "base": list[str],
    "grid": Axes,
    "extra": list[list[str]],
    "exclude": list[dict[str, Scalar]],
    "seeds": list[pydantic.NonNegativeInt],
    "stop": dict[str, Scalar] | None,
}
_SEPARATE_SEEDS: Any = dict[str, list[pydantic.NonNegativeInt]]


@dataclass(frozen=True, kw_only=True)
class Point:
    """One value on each axis of the grid, the overrides that these values stand for, and a seed."""

    labels: dict[str, str]
    overrides: list[str]
    seed: int


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A sweep file as written, at one of its scales, with every grid value as a label and its overrides."""

    name: str  # of the file; fig2-proxy where there are scales
    question: str
    base: list[str] = field(default_factory=list)
    grid: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    extra: list[list[str]] = field(default_factory=list)
    exclude: list[dict[str, str]] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [0])
    tune_seeds: list[int] = field(default_factory=list)  # those of `seeds` that only select settings
    stop: StopRule | None = None

    def keys_of_points(self) -> set[str]:
        """The keys that the grid and the extra points set."""
        labeled = (overrides for axis in self.grid.values() for overrides in axis.values())
        return {override.split("=")[0].strip() for own in (*labeled, *self.extra) for override in own}

    def points(self) -> list[Point]:
        """The grid without its exclusions and the extra points, for one seed after the other; last axis fastest.

        So a sweep that is cut short has whole comparisons of its first seeds, and runs that are paired by their seed
        follow each other on the machine.
        """
        grid = [
            (
                dict(zip(self.grid, (label for label, _ in values), strict=True)),
                [override for _, own in values for override in own],
            )
            for values in itertools.product(*(axis.items() for axis in self.grid.values()))
        ]
        if self.extra and not self.grid:
            # A file without a grid is its extra points, not one bare base run beside them.
            grid = []
        points = []
        for seed in self.seeds:
            points += [
                Point(labels=labels, overrides=overrides, seed=seed)
                for labels, overrides in grid
                if not any(_matches(labels | {"seed": str(seed)}, exclusion) for exclusion in self.exclude)
            ]
            points += [Point(labels={}, overrides=extra, seed=seed) for extra in self.extra]
        return points


def load(name: str, scale: str | None = None) -> Sweep:
    """Read `configs/sweep/<name>.yaml`, or the file itself when `name` ends in .yaml, at one of its scales."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else CONFIG_DIR / "sweep" / f"{name}.yaml"
    if not path.is_file():
        where = "" if path.is_absolute() else f" in {Path.cwd()}"
        raise UserError(f"sweep={name}: there is no {path}{where}; {nearest(name, known_sweeps())}")
    raw = read_yaml(path, str(path))
    if not isinstance(raw, dict):
        raise UserError(f"{path}: expected keys at the top level, among {', '.join(_KEYS)}")
    question = _opening_comment(path.read_text(encoding="utf-8"), path)
    stem = path.resolve().with_suffix("")
    folder = CONFIG_DIR / "sweep"
    name = str(stem.relative_to(folder)) if stem.is_relative_to(folder) else stem.name
    return _check(_at_scale(raw, scale, path), question, f"{name}-{scale}" if scale else name, path)


def known_sweeps() -> list[str]:
    """The names that `sweep=...` accepts."""
    folder = CONFIG_DIR / "sweep"
    return sorted(str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.yaml"))


def override_value(value: Scalar) -> str:
    """The value in the override grammar: as it is where that is plain, otherwise in quotes."""
    text = _text(value)
    if re.fullmatch(r"[\w.+\-/]+", text, flags=re.ASCII):
        return text
    # Backslashes are ordinary there except in front of a quote.
    return "'" + re.sub(r"(\\*)'", lambda match: match[1] * 2 + "\\'", re.sub(r"(\\+)$", r"\1\1", text)) + "'"


# ------------------------------------------------------------------------------------------------ checks


def _at_scale(raw: dict[str, Any], scale: str | None, path: Path) -> dict[str, Any]:
    """The file with one of its scales joined in: lists are appended to, seeds, stop and axes replaced."""
    common = {key: value for key, value in raw.items() if key != "scales"}
    scales = raw.get("scales", {})
    if not isinstance(scales, dict) or not all(isinstance(part, list | dict) for part in scales.values()):
        raise UserError(f"{path}: scales must give each scale a list of overrides, or keys among {', '.join(_KEYS)}")
    names = [str(name) for name in scales]
    if not scales and scale is None:
        return common
    if not scales:
        raise UserError(f"scale={scale}: {path} has no scales; leave it out")
    if scale is None:
        raise UserError(f"{path} has scales: choose one with {' or '.join(f'scale={name}' for name in names)}")
    if scale not in names:
        raise UserError(f"scale={scale}: {nearest(scale, names)}")
    chosen = next(part for name, part in scales.items() if str(name) == scale)
    part = {"base": chosen} if isinstance(chosen, list) else chosen
    for source, where in ((common, ""), (part, f"scales.{scale}.")):
        _check_types(source, path, where)
    joined = {key: [*common.get(key, []), *part.get(key, [])] for key in ("base", "extra", "exclude")}
    return {**common, **part, **joined, "grid": common.get("grid", {}) | part.get("grid", {})}


def _check_types(raw: dict[str, Any], path: Path, where: str = "") -> None:
    for key, value in raw.items():
        if key not in _KEYS:
            raise UserError(f"{path}: unknown key {where}{key}; {nearest(str(key), [*_KEYS, 'scales'])}")
        try:
            kind = _SEPARATE_SEEDS if key == "seeds" and isinstance(value, dict) else _KEYS[key]
            pydantic.TypeAdapter(kind).validate_python(value, strict=True)
        except pydantic.ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in (key, *first["loc"]))
            raise UserError(f"{path}: {where}{place}={first['input']!r}: {first['msg']}") from None


def _check(raw: dict[str, Any], question: str, name: str, path: Path) -> Sweep:
    _check_types(raw, path)
    grid = {axis: _axis(path, axis, values) for axis, values in raw.get("grid", {}).items()}
    exclude = [{axis: _text(value) for axis, value in entry.items()} for entry in raw.get("exclude", [])]
    seeds, tune_seeds = _seeds(raw.get("seeds", [0]), path)
    _check_exclusions(path, grid | {"seed": [str(seed) for seed in seeds]}, exclude)
    sweep = Sweep(
        name=name,
        question=question,
        base=raw.get("base", []),
        grid=grid,
        extra=raw.get("extra", []),
        exclude=exclude,
        seeds=seeds,
        tune_seeds=tune_seeds,
        stop=_stop_rule(raw.get("stop"), path),
    )
    check_size(sweep, str(path))
    return sweep


def _seeds(raw: list[int] | dict[str, list[int]], path: Path) -> tuple[list[int], list[int]]:
    """All seeds, and those of them that only select settings."""
    if isinstance(raw, list):
        if not raw:
            raise UserError(f"{path}: seeds is empty; give at least one, for example [0]")
        return raw, []
    try:
        separate = pydantic.TypeAdapter(SeparateSeeds).validate_python(raw)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise UserError(
            f"{path}: seeds.{'.'.join(map(str, first['loc']))}: {first['msg']}; for example "
            "seeds: {tune: [0, 1, 2], judge: [3, 4, 5, 6, 7]}"
        ) from None
    if common := sorted(set(separate.tune) & set(separate.judge)):
        raise UserError(f"{path}: seeds.tune and seeds.judge both have {common[0]}; a seed that tunes cannot judge")
    return [*separate.tune, *separate.judge], separate.tune


def check_size(sweep: Sweep, where: str) -> None:
    """UserError where so many runs can only be a mistake."""
    n_runs = (math.prod(map(len, sweep.grid.values())) + len(sweep.extra)) * len(sweep.seeds)
    if n_runs > MOST_RUNS:
        raise UserError(f"{where}: grid, extra and seeds make {n_runs} runs, above {MOST_RUNS}: split the sweep")


def _stop_rule(raw: dict[str, Any] | None, path: Path) -> StopRule | None:
    try:
        return pydantic.TypeAdapter(StopRule).validate_python(raw) if raw is not None else None
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{path}: stop.{'.'.join(map(str, first['loc']))}={first['input']!r}: {first['msg']}") from None


def _axis(path: Path, axis: str, values: Any) -> dict[str, list[str]]:
    """`lr: [0.1]` stands for the override lr=0.1; `method: {a: [x=1, y=2]}` gives a label to several overrides."""
    if not values:
        raise UserError(f"{path}: grid.{axis} is empty; give it a value or remove it")
    if isinstance(values, dict):
        return {_text(label): overrides for label, overrides in values.items()}
    return {_text(value): [f"{axis}={override_value(value)}"] for value in values}


def _check_exclusions(path: Path, axes: dict[str, Any], exclude: Sequence[dict[str, str]]) -> None:
    """UserError where an exclusion can match nothing."""
    for axis, label in (pair for entry in exclude for pair in entry.items()):
        if axis not in axes:
            raise UserError(f"{path}: exclude names {axis}, which is no axis of the grid; {nearest(axis, list(axes))}")
        if not any(_equal(label, known) for known in axes[axis]):
            raise UserError(f"{path}: exclude {axis}={label} is not in the grid; {nearest(label, list(axes[axis]))}")
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
