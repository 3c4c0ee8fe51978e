"""The figures as plain numbers: a plot is panels, a panel is lines; `draw` renders them."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import NamedTuple

from quack_lm.report.curves import MOST
from quack_lm.report.plateau import Plateaus, plateaus
from quack_lm.report.results import Reader, Result, Results
from quack_lm.report.shown import (
    MOST_LINES,
    count_settings,
    has_many_settings,
    left_out,
    shown_at,
    shown_attentions,
    shown_places,
)
from quack_lm.report.statistics import geometric_mean

# Curves are cut off at this multiple of the initial loss.
LOSS_CEILING = 1.1
IN_PARTS = (
    f" Each point is the mean of one of at most {MOST // 2} equal parts of the run, and the shade reaches from the "
    "smallest to the largest value in it."
)
# More columns are too small to read on a page.
MOST_COLUMNS = 4
# Training losses are averaged over the last steps / SMOOTHING steps.
SMOOTHING = 50


@dataclass(frozen=True, kw_only=True)
class Line:
    """A curve over the steps, or losses over learning rates, of a stabilizer with its settings; mean over seeds."""

    name: str  # which runs these are
    label: str  # the legend's entry; lines with the same label have the same style
    stabilizer: str
    settings: str
    points: list[tuple[float, float]]  # nan where the value was not finite
    diverged: list[tuple[float, float | None]]  # positions of crosses; at the top of the panel where y is None
    unstable: list[tuple[float, float]]  # positions of rings
    band: list[tuple[float, float, float]]  # x, and the smallest and largest value of the seeds
    is_in_parts: bool = False  # of runs so long that each point, and the band there, is of several steps


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One pair of axes and the lines drawn on them."""

    title: str
    lines: list[Line]


@dataclass(frozen=True, kw_only=True)
class Plot:
    """One figure: panels that share their axes."""

    name: str  # of its files, without extension
    title: str
    caption: str
    x_label: str
    y_label: str
    panels: list[Panel]
    columns: int
    log_x: bool = False
    log_y: bool = False
    ceiling: float | None = None
    is_appendix: bool = False

    def has_data(self) -> bool:
        """Whether any line has a point or a cross."""
        return any(line.points or line.diverged for panel in self.panels for line in panel.lines)


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A metric over the steps, and how it is plotted."""

    name: str
    read: Reader
    title: str
    caption: str
    y_label: str
    is_loss: bool = False  # cut off above the initial loss
    is_smoothed: bool = False
    log_y: bool = False


VAL_LOSS = Metric(
    name="val_loss",
    read="val/loss",
    title="Validation loss",
    caption="Loss on the held-out validation sequences.",
    y_label="validation loss (nats per token)",
    is_loss=True,
)
TRAIN_LOSS = Metric(
    name="train_loss",
    read="train/loss",
    title="Training loss",
    caption=f"Loss on the training batches, mean over the last 1/{SMOOTHING} of all steps.",
    y_label="training loss (nats per token)",
    is_loss=True,
    is_smoothed=True,
)
MAX_LOGIT = Metric(
    name="max_logit",
    read="logits/max",
    title="Max logit, all heads",
    caption="Max attention logit over all layers and heads, on the held-out probe batch.",
    y_label="max logit",
    log_y=True,
)
DELTA = Metric(
    name="delta",
    read="logits/delta_mean",
    title="Mean |Δlogit|, all heads",
    caption="Mean absolute change of the attention logits in one optimizer step, on the held-out probe batch; over all "
    "layers and heads.",
    y_label="mean |Δlogit| per step",
    log_y=True,
)


def plots(results: Results) -> list[Plot | Plateaus]:
    """Every figure for which there is data.

    If there are many settings, these show the best setting of each stabilizer, and an appendix shows all.
    """
    all_plots: list[Plot | Plateaus] = [
        *_loss_by_rate(results),
        plateaus(results),
        curves(results, VAL_LOSS),
        curves(results, TRAIN_LOSS),
        curves(results, MAX_LOGIT),
        curves(results, DELTA),
        *_parts(results),
    ]
    if has_many_settings(results):
        if count_settings(results) <= MOST_LINES:
            all_plots += [curves(results, metric, is_appendix=True) for metric in (VAL_LOSS, TRAIN_LOSS)]
        all_plots += _loss_by_rate(results, is_appendix=True)
    return [plot for plot in all_plots if plot.has_data()]


def curves(results: Results, metric: Metric, *, is_appendix: bool = False) -> Plot:
    """A metric over the steps: one panel per place, one line per stabilizer with its settings."""
    panels = []
    places = shown_places(results)
    for place in places:
        groups = shown_at(results, place, every=is_appendix)
        panels.append(Panel(title=str(place), lines=[curve(runs, metric) for runs in groups]))
    caption = metric.caption + left_out(len(places), results)
    if any(line.is_in_parts for panel in panels for line in panel.lines):
        caption += IN_PARTS
    if metric.is_loss and (n := count_settings(results)) > MOST_LINES and has_many_settings(results):
        caption += f" The curves of all {n} settings are too many to draw; the tables have their losses."
    n_rates = len({place.lr for place in places})
    return Plot(
        name=f"{metric.name}_all" if is_appendix else metric.name,
        title=metric.title + _which_settings(results, is_appendix),
        caption=caption,
        x_label="optimizer steps",
        y_label=metric.y_label,
        panels=panels,
        # Full rows, and each rate in one column where they are few.
        columns=math.ceil(n_rates / math.ceil(n_rates / MOST_COLUMNS)) if n_rates > 1 else min(len(panels), 3),
        log_y=metric.log_y,
        ceiling=loss_ceiling(results) if metric.is_loss else None,
        is_appendix=is_appendix,
    )


def _which_settings(results: Results, is_appendix: bool) -> str:
    if is_appendix:
        return ", all settings"
    return ", best setting of each stabilizer" if has_many_settings(results) else ""


class _Point(NamedTuple):
    x: float
    y: float
    low: float  # below y only where it is of several steps of one run
    high: float


def curve(runs: Sequence[Result], metric: Metric) -> Line:
    """The mean of a metric over the seeds of one stabilizer with its settings, with their range."""
    each = [_points(run, metric) for run in runs]
    diverged: list[tuple[float, float | None]] = []
    unstable: list[tuple[float, float]] = []
    for run, points in zip(runs, each, strict=True):
        last = next(((point.x, point.y) for point in reversed(points) if math.isfinite(point.y)), None)
        if (run.is_diverged or run.stop_record) and run.curves:
            # A run that ended before its first value has a cross, too.
            diverged.append(last or (float(run.step), None))
        elif run.unstable and last:
            unstable.append(last)
    mean, band = _over_seeds(each, geometric_mean if metric.log_y else fmean)
    return Line(
        name=f"{runs[0].place} {runs[0].label}",
        label=runs[0].label,
        stabilizer=runs[0].stabilizer,
        settings=runs[0].settings,
        points=mean,
        diverged=diverged,
        unstable=unstable,
        band=band,
        is_in_parts=any(run.over_steps(metric.read).is_in_parts for run in runs),
    )


def _points(run: Result, metric: Metric) -> list[_Point]:
    """The metric of one run, nan where its axis cannot show the value."""
    found = run.over_steps(metric.read)
    values = found.mean.tolist()
    if metric.is_smoothed:
        values = _smooth(found.steps.tolist(), values, max(1, run.cell.total_steps // SMOOTHING))
    if metric.log_y:
        values = [value if value > 0 else math.nan for value in values]
    low, high = (found.low.tolist(), found.high.tolist()) if found.is_in_parts else (values, values)
    return list(map(_Point, map(float, found.steps.tolist()), values, low, high))


def _over_seeds(
    curves: Sequence[Sequence[_Point]], average: Callable[[Sequence[float]], float]
) -> tuple[list[tuple[float, float]], list[tuple[float, float, float]]]:
    """The mean of the finite values at each step, nan where there is none, and their range."""
    at_step: dict[float, list[_Point]] = {}
    for point in itertools.chain.from_iterable(curves):
        at_step.setdefault(point.x, [])
        if math.isfinite(point.y):
            at_step[point.x].append(point)
    ordered = sorted(at_step.items())
    mean = [(x, average([point.y for point in points]) if points else math.nan) for x, points in ordered]
    band = [
        (x, min(point.low for point in points), max(point.high for point in points))
        for x, points in ordered
        if len(points) > 1 or any(point.low < point.high for point in points)
    ]
    return mean, band


def _parts(results: Results) -> list[Plot]:
    """The contributions to the change of the logits, if the probe measured them."""
    sources = {
        "query weights": "logits/delta_from_query",
        "key weights": "logits/delta_from_key",
        "upstream layers": "logits/delta_from_upstream",
        "largest by the weights": "logits/delta_weights_max",
        "bound of the largest": "logits/delta_weights_max_bound",
    }
    panels = []
    places = shown_places(results)
    for place in places:
        for runs in shown_at(results, place):
            if any("logits/delta_from_query" in run.curves for run in runs):
                lines = [curve(runs, replace(DELTA, read=read)) for read in sources.values()]
                panels.append(Panel(title=f"{place}, {runs[0].label}", lines=relabeled(lines, list(sources))))
    plot = Plot(
        name="parts",
        title="Contributions to the change of the logits",
        caption="Mean |Δlogit| over all heads caused by the query weights, by the key weights and by all layers "
        "upstream; then the largest |Δlogit| caused by the weights, with its bound from the norms of weights and "
        "updates. A stabilizer that normalizes between the weights and the logits has no such bound."
        + left_out(len(places), results),
        x_label="optimizer steps",
        y_label="|Δlogit| per step",
        panels=panels,
        columns=min(5, len(panels)),
        log_y=True,
    )
    return [plot] if panels else []


def relabeled(lines: Sequence[Line], labels: Sequence[str]) -> list[Line]:
    """The lines with these labels, and a color for each label in place of one for each stabilizer."""
    return [
        replace(line, name=f"{line.name} {label}", label=label, stabilizer=label, settings="")
        for line, label in zip(lines, labels, strict=True)
    ]


def _smooth(steps: Sequence[int], values: Sequence[float], window: int) -> list[float]:
    """The mean of the finite values of the last `window` steps; nan where the value itself is not finite."""
    smoothed = []
    start = 0
    for end, (step, value) in enumerate(zip(steps, values, strict=True)):
        while steps[start] <= step - window:
            start += 1
        recent = [v for v in values[start : end + 1] if math.isfinite(v)]
        smoothed.append(fmean(recent) if math.isfinite(value) else math.nan)
    return smoothed


def loss_ceiling(results: Results) -> float | None:
    """The loss at which curves are cut off; None if no run has an initial loss."""
    initial = [value for r in results.results if (value := r.number("initial_val_loss")) is not None]
    return LOSS_CEILING * max(initial) if initial else None


def _loss_by_rate(results: Results, *, is_appendix: bool = False) -> list[Plot]:
    """Final validation loss of every finished run against its learning rate, mean over seeds."""
    if len(results.rates()) == 1:
        return []
    is_best_only = has_many_settings(results) and not is_appendix
    panels = []
    for (attention, condition), places in shown_attentions(results).items():
        groups: dict[str, list[Result]] = {}
        for runs in (runs for place in places for runs in shown_at(results, place, every=is_appendix)):
            groups.setdefault(runs[0].stabilizer if is_best_only else runs[0].label, []).extend(runs)
        finished = {label: [r for r in runs if r.is_finished] for label, runs in groups.items()}
        lines = [_rate_line(label, runs) for label, runs in finished.items() if runs]
        panels.append(Panel(title=f"{attention} {condition}".rstrip(), lines=lines))
    plot = Plot(
        name="loss_by_lr_all" if is_appendix else "loss_by_lr",
        title="Final validation loss against learning rate" + _which_settings(results, is_appendix),
        caption="Mean and range over seeds of the runs that completed; a run that diverged or was stopped is a cross "
        "at the top." + left_out(sum(map(len, shown_attentions(results).values())), results),
        x_label="learning rate",
        y_label=VAL_LOSS.y_label,
        panels=panels,
        columns=min(3, len(panels)),
        log_x=True,
        ceiling=loss_ceiling(results),
        is_appendix=is_appendix,
    )
    return [plot]


def _rate_line(label: str, runs: Sequence[Result]) -> Line:
    completed = [r for r in runs if r.status == "completed"]
    points = [[_Point(r.lr, loss, loss, loss)] for r in completed if (loss := r.number("val_loss")) is not None]
    mean, band = _over_seeds(points, fmean)
    unstable_rates = {r.lr for r in completed if r.unstable}
    first = runs[0]
    return Line(
        name=f"{first.place} {first.label}",
        label=label,
        stabilizer=first.stabilizer,
        # At each rate its best setting: the settings differ along the line.
        settings="" if label == first.stabilizer else first.settings,
        points=mean,
        diverged=[(r.lr, None) for r in runs if r.status != "completed"],
        unstable=[point for point in mean if point[0] in unstable_rates],
        band=band,
    )
