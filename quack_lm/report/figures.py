"""What the figures show, as plain numbers: a figure is panels, a panel is lines; `draw` turns them into pixels."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

from quack_lm.report.comparison import best_settings, by_method
from quack_lm.report.results import Place, Reader, Result, Results, middle_head
from quack_lm.report.statistics import geometric_mean

# A curve this far above the loss it started from has nothing more to say: what lies above is cut off.
LOSS_CEILING = 1.1
# More methods than this in one panel, and only the best setting of each stabilizer is shown.
MANY = 6


@dataclass(frozen=True, kw_only=True)
class Line:
    """A method's curve over the steps, or its losses over the learning rates; mean over seeds."""

    name: str  # which runs these are
    label: str  # the legend's entry; lines with the same label look the same
    stabilizer: str
    variation: str
    points: list[tuple[float, float]]  # nan where the value was not finite
    diverged: list[tuple[float, float | None]]  # where to put a cross; at the top of the panel where y is None
    unstable: list[tuple[float, float]]  # where to put a ring
    band: list[tuple[float, float, float]]  # x, and the smallest and largest value of the seeds


@dataclass(frozen=True, kw_only=True)
class Panel:
    title: str
    lines: list[Line]


@dataclass(frozen=True, kw_only=True)
class Plot:
    """One figure."""

    name: str  # of its files
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
        return any(line.points or line.diverged for panel in self.panels for line in panel.lines)


def plots(results: Results) -> list[Plot]:
    """Every figure of the report for which there is data; with many settings, the best of each and all in an appendix.

    Fig. 1 of the paper is the training loss, Fig. 2 the validation loss, Fig. 3 the norms, Fig. 4 the middle head.
    """
    probe = "on the held-out probe batch, before against after one optimizer step"
    loss_looks: dict[str, Any] = {"ceiling": _loss_ceiling(results)}
    validation: dict[str, Any] = {
        "name": "val_loss",
        "title": "Validation loss",
        "caption": "Loss on the fixed validation windows. As in the paper's Fig. 2.",
        "y_label": "validation loss (nats per token)",
        **loss_looks,
    }
    training: dict[str, Any] = {
        "name": "train_loss",
        "title": "Training loss",
        "caption": "Loss on the training batches, mean over a sliding window of a fiftieth of the run. "
        "As in the paper's Fig. 1.",
        "y_label": "training loss (nats per token)",
        **loss_looks,
    }
    logits: dict[str, Any] = {"log_y": True}
    max_logit, change = "max logit", "mean |Δlogit| per step"
    all_plots = [
        _curves(results, "val/loss", **validation),
        _curves(results, "train/loss", smooth=True, **training),
        *_norms(results, validation),
        _loss_by_rate(results),
        _curves(
            results,
            middle_head("logits/max_per_head"),
            name="max_logit_middle_head",
            title="Max logit, middle head of the middle layer",
            caption=f"{_middle(results)} As in the paper's Fig. 4.",
            y_label=max_logit,
            **logits,
        ),
        _curves(
            results,
            middle_head("logits/delta_mean_per_head"),
            name="delta_middle_head",
            title="Mean |Δlogit|, middle head of the middle layer",
            caption=f"{_middle(results)} Mean absolute change {probe}. As in the paper's Fig. 4.",
            y_label=change,
            **logits,
        ),
        _curves(
            results,
            "logits/max",
            name="max_logit",
            title="Max logit, all heads",
            caption="The largest attention logit of any layer and head on the held-out probe batch.",
            y_label=max_logit,
            **logits,
        ),
        _curves(
            results,
            "logits/delta_mean",
            name="delta",
            title="Mean |Δlogit|, all heads",
            caption=f"Mean absolute change of the attention logits {probe}, over all layers and heads.",
            y_label=change,
            **logits,
        ),
        _parts(results),
    ]
    if has_many_settings(results):
        all_plots += [
            _curves(results, "val/loss", is_appendix=True, **validation),
            _curves(results, "train/loss", smooth=True, is_appendix=True, **training),
            _loss_by_rate(results, is_appendix=True),
        ]
    return [plot for plot in all_plots if plot is not None and plot.has_data()]


def has_many_settings(results: Results) -> bool:
    """Whether a panel with every setting would be too full to read."""
    return any(len(by_method(results.at(place))) > MANY for place in results.places())


def shown_at(results: Results, place: Place, *, every: bool = False) -> list[list[Result]]:
    """The runs of each method to show at a place: all, or the best setting of each stabilizer where there are many."""
    members = results.at(place)
    if every or not has_many_settings(results):
        return list(by_method(members).values())
    return list(best_settings(members).values())


def _curves(
    results: Results,
    read: Reader,
    *,
    name: str,
    title: str,
    smooth: bool = False,
    is_appendix: bool = False,
    **looks: Any,
) -> Plot:
    """A metric over the steps: one panel per place, one line per method."""
    panels = []
    for place in results.places():
        groups = shown_at(results, place, every=is_appendix)
        lines = [_curve_line(runs, read, smooth=smooth, log_y=looks.get("log_y", False)) for runs in groups]
        panels.append(Panel(title=str(place), lines=lines))
    is_cut = has_many_settings(results)
    suffix = ", all settings" if is_appendix else ", best setting of each method" if is_cut else ""
    n_rates = len(results.rates())
    return Plot(
        name=f"{name}_all" if is_appendix else name,
        title=title + suffix,
        x_label="optimizer steps",
        panels=panels,
        columns=n_rates if n_rates > 1 else min(len(panels), 3),
        is_appendix=is_appendix,
        **looks,
    )


def _curve_line(runs: Sequence[Result], read: Reader, *, smooth: bool, log_y: bool) -> Line:
    curves = []
    for run in runs:
        curve = run.curve(read)
        curve = _smooth(curve, max(1, run.cell.total_steps // 50)) if smooth else curve
        curves.append([(float(step), value if value > 0 or not log_y else math.nan) for step, value in curve])
    diverged: list[tuple[float, float | None]] = []
    unstable: list[tuple[float, float]] = []
    for run, points in zip(runs, curves, strict=True):
        finite = [point for point in points if math.isfinite(point[1])]
        if (run.is_diverged or run.stop_record) and run.metrics:
            # A run that was over before its first value still gets its cross.
            diverged.append(finite[-1] if finite else (float(run.step), None))
        elif run.unstable:
            unstable += finite[-1:]
    mean, band = _over_seeds(curves, geometric_mean if log_y else fmean)
    return _line(runs, points=mean, diverged=diverged, unstable=unstable, band=band)


def _over_seeds(
    curves: Sequence[list[tuple[float, float]]], average: Callable[[Sequence[float]], float]
) -> tuple[list[tuple[float, float]], list[tuple[float, float, float]]]:
    """The mean of the finite values at each step, nan where there is none, and their range."""
    at_step: dict[float, list[float]] = {}
    for x, y in (point for curve in curves for point in curve):
        at_step.setdefault(x, [])
        at_step[x] += [y] if math.isfinite(y) else []
    ordered = sorted(at_step.items())
    mean = [(x, average(values) if values else math.nan) for x, values in ordered]
    return mean, [(x, min(values), max(values)) for x, values in ordered if len(values) > 1]


def _line(runs: Sequence[Result], **data: Any) -> Line:
    first = runs[0]
    return Line(
        name=f"{first.place} {first.method}",
        label=first.method,
        stabilizer=first.stabilizer,
        variation=first.variation,
        **data,
    )


def _norms(results: Results, looks: dict[str, Any]) -> list[Plot]:
    """Frobenius against spectral: one panel per place and tau, where a sweep has both."""
    panels = []
    for place in results.places():
        runs = [r for r in results.at(place) if r.cell.config["stabilizer"].get("norm")]
        by_tau: dict[float, list[Result]] = {}
        for run in runs:
            by_tau.setdefault(run.cell.config["stabilizer"]["tau"], []).append(run)
        for tau, members in by_tau.items():
            groups = list(by_method(members).values())
            if len({r.cell.config["stabilizer"]["norm"] for r in members}) > 1:
                lines = [_curve_line(group, "val/loss", smooth=False, log_y=False) for group in groups]
                names = [group[0].cell.config["stabilizer"]["norm"] for group in groups]
                panels.append(Panel(title=f"{place}, tau {tau:g}", lines=_renamed(lines, names)))
    text = {"name": "norms", "title": "QuacK's norm", "caption": "As in the paper's Fig. 3."}
    return [Plot(x_label="optimizer steps", panels=panels, columns=3, **(looks | text))] if panels else []


def _parts(results: Results) -> Plot | None:
    """What moved the logits, where the probe was asked to split the change."""
    panels = []
    for place in results.places():
        for runs in shown_at(results, place):
            parts = {f"from the {part} weights": f"logits/delta_from_{part}" for part in ("query", "key")}
            parts |= {"from everything upstream": "logits/delta_from_upstream"}
            parts |= {"largest by the weights": "logits/delta_weights_max", "Lemma 1": "logits/delta_weights_max_bound"}
            if any(run.curve("logits/delta_from_query") for run in runs):
                lines = [_curve_line(runs, read, smooth=False, log_y=True) for read in parts.values()]
                panels.append(Panel(title=f"{place}, {runs[0].method}", lines=_renamed(lines, list(parts))))
    if not panels:
        return None
    return Plot(
        name="parts",
        title="Where the change of the logits comes from",
        caption="Mean |Δlogit| over all heads due to the query weights, the key weights and everything upstream of the "
        "layer; then the largest |Δlogit| due to the weights beside what Lemma 1 allows for their norms. There is no "
        "such bound for QK norm, which normalizes between the weights and the logits.",
        x_label="optimizer steps",
        y_label="|Δlogit| per step",
        panels=panels,
        columns=min(5, len(panels)),
        log_y=True,
    )


def _renamed(lines: Sequence[Line], names: Sequence[str]) -> list[Line]:
    """The lines as things of their own instead of as stabilizers."""
    return [
        replace(line, name=f"{line.name} {name}", label=name, stabilizer=name, variation="")
        for line, name in zip(lines, names, strict=True)
    ]


def _smooth(curve: list[tuple[int, float]], window: int) -> list[tuple[int, float]]:
    """Mean over the values of the last `window` steps; a value that is not finite stays one."""
    smoothed = []
    start = 0
    for end, (step, value) in enumerate(curve):
        while curve[start][0] <= step - window:
            start += 1
        recent = [v for _, v in curve[start : end + 1] if math.isfinite(v)]
        smoothed.append((step, fmean(recent) if math.isfinite(value) else math.nan))
    return smoothed


def _loss_ceiling(results: Results) -> float | None:
    initial = [value for r in results.results if (value := r.number("initial_val_loss")) is not None]
    return LOSS_CEILING * max(initial) if initial else None


def _middle(results: Results) -> str:
    for result in results.results:
        for line in result.metrics:
            if table := line.get("logits/max_per_head"):
                layers, heads = len(table), len(table[0])
                return f"Layer {layers // 2} of 0 to {layers - 1}, head {heads // 2} of 0 to {heads - 1}."
    return ""


def _loss_by_rate(results: Results, *, is_appendix: bool = False) -> Plot | None:
    """Final validation loss of every finished run against its learning rate, mean over seeds."""
    if len(results.rates()) == 1:
        return None
    panels = []
    attentions = dict.fromkeys((place.attention, place.condition) for place in results.places())
    for attention, condition in attentions:
        places = [p for p in results.places() if p[:2] == (attention, condition)]
        groups: dict[str, list[Result]] = {}
        for runs in (runs for place in places for runs in shown_at(results, place, every=is_appendix)):
            many = has_many_settings(results) and not is_appendix
            groups.setdefault(runs[0].stabilizer if many else runs[0].method, []).extend(runs)
        lines = [_rate_line(label, [r for r in runs if r.is_finished]) for label, runs in groups.items()]
        panels.append(Panel(title=f"{attention} {condition}".rstrip(), lines=[line for line in lines if line]))
    suffix = ", all settings" if is_appendix else ", best setting of each method" if has_many_settings(results) else ""
    return Plot(
        name="loss_by_lr_all" if is_appendix else "loss_by_lr",
        title="Final validation loss against learning rate" + suffix,
        caption="Mean and range over seeds of the runs that reached their last step; a run that diverged or was "
        "stopped is a cross at the top.",
        x_label="learning rate",
        y_label="validation loss (nats per token)",
        panels=panels,
        columns=min(3, len(panels)),
        log_x=True,
        ceiling=_loss_ceiling(results),
        is_appendix=is_appendix,
    )


def _rate_line(label: str, runs: Sequence[Result]) -> Line | None:
    if not runs:
        return None
    reached = [r for r in runs if r.status == "completed"]
    points = [[(r.lr, value)] for r in reached if (value := r.number("val_loss")) is not None]
    mean, band = _over_seeds(points, fmean)
    unstable_rates = {r.lr for r in reached if r.unstable}
    line = _line(
        runs,
        points=mean,
        diverged=[(r.lr, None) for r in runs if r.status != "completed"],
        unstable=[point for point in mean if point[0] in unstable_rates],
        band=band,
    )
    # At each rate its best setting: the settings differ along the line.
    return replace(line, label=label, variation="" if label == line.stabilizer else line.variation)
