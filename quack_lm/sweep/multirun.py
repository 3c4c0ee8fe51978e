"""Sweeps from the command line: `attention=mha,mla seed=range(0,5)` is a grid without a file, or more axes for one."""

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import replace

from quack_lm.config import Axis, split_axes
from quack_lm.errors import UserError
from quack_lm.sweep.file import Sweep, check_size


def unnamed_name(overrides: Sequence[str]) -> str:
    """multirun-<8 hex digits>: the same for the same settings, in whatever order they stand."""
    return f"multirun-{hashlib.sha256(json.dumps(sorted(overrides)).encode()).hexdigest()[:8]}"


def unnamed_sweep(overrides: Sequence[str]) -> Sweep:
    """The sweep of a line such as `experiment=tiny stabilizer=none,quack optimizer.lr=3e-3,3e-2 seed=0,1`.

    Values with a comma, Hydra's range(...) and choice(...) are axes; what has one value is not part of the sweep.
    """
    plain, axes = split_axes(overrides)
    if not axes:
        raise UserError(
            "say which sweep: sweep=quickstart, or give a key several values such as seed=0,1; for one run, quack-lm "
            "train without -m"
        )
    held = " ".join(plain) or "the defaults"
    return with_axes(Sweep(name=unnamed_name(overrides), question=f"Held fixed: {held}."), axes)


def with_axes(sweep: Sweep, axes: Sequence[Axis]) -> Sweep:
    """The sweep with further axes, for its extra points as well; UserError where it sets one of these keys itself."""
    for axis in axes:
        if axis.key in sweep.keys_of_points() or (axis.key == "seed" and len(sweep.seeds) > 1):
            raise UserError(
                f"{axis.key}={','.join(axis.values)}: the sweep {sweep.name} sets {axis.key} itself, run by run; "
                "remove it here or there"
            )
    if not axes:
        return sweep
    seeds = next((_seeds(axis) for axis in axes if axis.key == "seed"), sweep.seeds)
    own = [axis for axis in axes if axis.key != "seed"]
    grid = {axis.key: {value: [f"{axis.key}={value}"] for value in axis.values} for axis in own}
    points = [list(point) for point in itertools.product(*([f"{a.key}={v}" for v in a.values] for a in own))]
    varied = "; ".join(f"{axis.key} = {', '.join(axis.values)}" for axis in axes)
    grown = replace(
        sweep,
        question=f"{sweep.question}\nVaried on the command line: {varied}.",
        # A sweep of extra points only has no grid, and gets none.
        grid=sweep.grid | grid if sweep.grid or not sweep.extra else {},
        extra=[[*extra, *point] for extra in sweep.extra for point in points],
        seeds=seeds,
    )
    check_size(grown, f"sweep {sweep.name}")
    return grown


def _seeds(axis: Axis) -> list[int]:
    if not all(value.isdecimal() for value in axis.values):
        raise UserError(f"seed={','.join(axis.values)}: a seed is an integer, 0 or more")
    return [int(value) for value in axis.values]
