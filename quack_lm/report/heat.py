"""Heat maps of every head over the steps, as plain numbers."""

import math
from dataclasses import dataclass

import numpy as np

from quack_lm.report.curves import Array
from quack_lm.report.results import Place, Result, Results
from quack_lm.report.shown import shown_at

FEW_PLACES = 2
# With more heads, each row of a map is of several.
MOST_ROWS = 1000


@dataclass(frozen=True, kw_only=True)
class HeatMap:
    """The table of one run; nan where a value was not finite, and no columns after the end of the run."""

    title: str
    heads_per_row: int
    rows_per_layer: int
    steps: list[int]
    values: Array  # [layer * rows_per_layer + row, step]; the largest, where it is of several heads or steps


@dataclass(frozen=True, kw_only=True)
class HeatMaps:
    """One map per stabilizer with its settings at one place, all with the same color scale."""

    name: str
    title: str
    caption: str
    label: str
    maps: list[HeatMap]


def heat_maps(results: Results) -> list[HeatMaps]:
    """Max logit and mean change of every head, for the first seed of each stabilizer.

    At every place if there are at most FEW_PLACES, else at the highest rate of each attention, where stabilizers differ
    most.
    """
    places = [place for place in results.places() if not place.condition]
    highest = {place.attention: place for place in places}
    found = []
    for place in places if len(places) <= FEW_PLACES else highest.values():
        for key, label in (("max", "max logit"), ("delta_mean", "mean |Δlogit| per step")):
            runs = [members[0] for members in shown_at(results, place)]
            maps = [drawn for run in runs if (drawn := _map(run, f"logits/{key}_per_head"))]
            if maps:
                found.append(_maps(place, key, label, maps, runs[0].seed))
    return found


def _maps(place: Place, key: str, label: str, maps: list[HeatMap], seed: int) -> HeatMaps:
    several = max(each.heads_per_row for each in maps)
    rows = f"Each row is the largest of {several} neighboring heads" if several > 1 else "One row per head"
    return HeatMaps(
        name=f"heat_{key}_{place.attention}_lr{place.lr:g}",
        title=f"{label[0].upper()}{label[1:]} of every head ({place})",
        caption=f"{rows}, lines between layers, seed {seed}. All panels share one logarithmic color scale.",
        label=label,
        maps=maps,
    )


def _map(run: Result, key: str) -> HeatMap | None:
    curve = run.curves.get(key)
    if curve is None:
        return None
    tables = np.where(curve.high > 0, curve.high.astype(np.float64), np.nan)
    _, layers, heads = tables.shape
    heads_per_row = min(heads, math.ceil(layers * heads / MOST_ROWS))
    rows = np.fmax.reduceat(tables, range(0, heads, heads_per_row), axis=2)
    return HeatMap(
        title=run.label,
        heads_per_row=heads_per_row,
        rows_per_layer=rows.shape[2],
        steps=curve.steps.tolist(),
        values=rows.reshape(len(rows), -1).T,
    )
