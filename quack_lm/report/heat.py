"""Every head over the steps, as plain numbers: a map is one run's [layer.head, step] table."""

import math
from dataclasses import dataclass

from quack_lm.report.figures import shown_at
from quack_lm.report.results import Place, Result, Results

FEW_PLACES = 2


@dataclass(frozen=True, kw_only=True)
class HeatMap:
    """One run's table; nan where a value was not finite, and nothing after a run's end."""

    title: str
    heads_per_layer: int
    steps: list[int]
    values: list[list[float]]  # [layer * heads_per_layer + head][step]


@dataclass(frozen=True, kw_only=True)
class HeatMaps:
    """Maps with one color scale, one per method at one place."""

    name: str
    title: str
    caption: str
    label: str
    maps: list[HeatMap]


def heat_maps(results: Results) -> list[HeatMaps]:
    """Max logit and mean change of every head, of the first seeds: at each rate of a sweep of few, else for each
    attention at its highest rate, where differences are largest."""
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
        caption=f"Each row is a head, the layers are set apart by lines, seed {seed}. The color scale is logarithmic "
        "and common to all panels.",
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
        title=run.method,
        heads_per_layer=len(lines[0][key][0]),
        steps=[line["step"] for line in lines],
        values=[list(row) for row in zip(*columns, strict=True)],
    )


def _shape(table: list[list[float]]) -> tuple[int, int]:
    return len(table), len(table[0])


def _positive(value: float | None) -> float:
    return value if value is not None and value > 0 else math.nan
