"""Heat maps of every head over the steps, as plain numbers."""

import math
from dataclasses import dataclass

from quack_lm.report.figures import shown_at
from quack_lm.report.results import Place, Result, Results

FEW_PLACES = 2


@dataclass(frozen=True, kw_only=True)
class HeatMap:
    """The table of one run; nan where a value was not finite, and no columns after the end of the run."""

    title: str
    heads_per_layer: int
    steps: list[int]
    values: list[list[float]]  # [layer * heads_per_layer + head][step]


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
    return HeatMaps(
        name=f"heat_{key}_{place.attention}_lr{place.lr:g}",
        title=f"{label[0].upper()}{label[1:]} of every head ({place})",
        caption=f"One row per head, lines between layers, seed {seed}. All panels share one logarithmic color scale.",
        label=label,
        maps=maps,
    )


def _map(run: Result, key: str) -> HeatMap | None:
    lines = [line for line in run.metrics if line.get(key)]
    if not lines:
        return None
    lines = [line for line in lines if _shape(line[key]) == _shape(lines[0][key])]
    columns = [[_positive(value) for row in line[key] for value in row] for line in lines]
    return HeatMap(
        title=run.label,
        heads_per_layer=len(lines[0][key][0]),
        steps=[line["step"] for line in lines],
        values=[list(row) for row in zip(*columns, strict=True)],
    )


def _shape(table: list[list[float]]) -> tuple[int, int]:
    return len(table), len(table[0])


def _positive(value: float | None) -> float:
    return value if value is not None and value > 0 else math.nan
