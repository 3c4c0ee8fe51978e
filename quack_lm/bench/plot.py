"""Figures of the suites whose variants have a size, with which their names end."""

from collections.abc import Mapping, Sequence

from quack_lm.bench.rounds import Summary
from quack_lm.report.figures import Line, Panel, Plot


def decode_plot(found: Sequence[Summary], cache_bytes: Mapping[str, int]) -> Plot:
    """Steps per second against the length of the context, a line for each cache."""
    points: dict[str, list[tuple[float, float]]] = {}
    for one in found:
        name, context = _split(one.variant)
        points.setdefault(f"{name}: {cache_bytes[one.variant]:,} B/token", []).append((context, 1 / one.step_s))
    return _plot("Decoding", "tokens of context", "decode steps per second", points, log_y=False)


def scaling_plot(found: Sequence[Summary]) -> Plot:
    """Step time against each size, both relative to those of the baseline."""
    points: dict[str, list[tuple[float, float]]] = {}
    for one in found:
        name, size = _split(one.variant)
        points.setdefault(name, []).append((size / _split(one.baseline)[1], one.ratio))
    return _plot(
        "How the cost of a step grows", "times the size of the baseline", "times its step time", points, log_y=True
    )


def _split(variant: str) -> tuple[str, int]:
    name, _, size = variant.rpartition(" ")
    return name, int(size)


def _plot(
    title: str, x_label: str, y_label: str, points: Mapping[str, list[tuple[float, float]]], *, log_y: bool
) -> Plot:
    lines = [
        Line(name=name, label=name, stabilizer=name, settings="", points=sorted(own), diverged=[], unstable=[], band=[])
        for name, own in points.items()
    ]
    return Plot(
        name="bench",
        title=title,
        caption="",
        x_label=x_label,
        y_label=y_label,
        panels=[Panel(title="", lines=lines)],
        columns=1,
        log_x=True,
        log_y=log_y,
    )
