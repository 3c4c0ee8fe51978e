"""What the figures show, as plain numbers: a figure is panels, a panel is lines; `draw` turns them into pixels."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from quack_lm.report.results import Reader, Result, Results, middle_head
from quack_lm.report.runs import title as run_title

# A curve this far above the loss it started from has nothing more to say: what lies above is cut off.
LOSS_CEILING = 1.1


@dataclass(frozen=True, kw_only=True)
class Line:
    """One run's curve, or one method's losses over the learning rates."""

    name: str  # which run this is
    label: str  # the legend's entry; lines with the same label look the same
    stabilizer: str
    variation: str
    points: list[tuple[float, float]]  # nan where the value was not finite
    diverged: list[tuple[float, float | None]]  # where to put a cross; at the top of the panel where y is None
    unstable: list[tuple[float, float]]  # where to put a ring


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

    def has_data(self) -> bool:
        return any(line.points or line.diverged for panel in self.panels for line in panel.lines)


def plots(results: Results) -> list[Plot]:
    """Every figure of the report for which there is data."""
    probe = "on the held-out probe batch, before against after one optimizer step"
    all_plots = [
        _curves(
            results,
            "val/loss",
            name="val_loss",
            title="Validation loss",
            caption="Loss on the fixed validation windows.",
            y_label="validation loss (nats per token)",
            ceiling=_loss_ceiling(results),
        ),
        _curves(
            results,
            "train/loss",
            name="train_loss",
            title="Training loss",
            caption="Loss on the training batches, mean over a sliding window of a fiftieth of the run.",
            y_label="training loss (nats per token)",
            ceiling=_loss_ceiling(results),
            smooth=True,
        ),
        _curves(
            results,
            "logits/max",
            name="max_logit",
            title="Max logit, all heads",
            caption="The largest attention logit of any layer and head on the held-out probe batch.",
            y_label="max logit",
            log_y=True,
        ),
        _curves(
            results,
            middle_head("logits/max_per_head"),
            name="max_logit_middle_head",
            title="Max logit, middle head of the middle layer",
            caption=f"{_middle(results)} As in the paper's Fig. 4.",
            y_label="max logit",
            log_y=True,
        ),
        _curves(
            results,
            "logits/delta_mean",
            name="delta",
            title="Mean |Δlogit|, all heads",
            caption=f"Mean absolute change of the attention logits {probe}, over all layers and heads.",
            y_label="mean |Δlogit| per step",
            log_y=True,
        ),
        _curves(
            results,
            middle_head("logits/delta_mean_per_head"),
            name="delta_middle_head",
            title="Mean |Δlogit|, middle head of the middle layer",
            caption=f"{_middle(results)} As in the paper's Fig. 4.",
            y_label="mean |Δlogit| per step",
            log_y=True,
        ),
    ]
    if len(results.rates()) > 1:
        all_plots.append(_loss_by_rate(results))
    return [plot for plot in all_plots if plot.has_data()]


def _curves(results: Results, read: Reader, *, smooth: bool = False, **looks: Any) -> Plot:
    """A metric over the steps: one panel per attention and learning rate, one line per run."""
    rates = results.rates()
    panels = []
    for attention in results.attentions():
        for lr in rates:
            members = [r for r in results.results if r.attention == attention and r.lr == lr]
            lines = [_curve_line(r, r.curve(read), smooth=smooth, log_y=looks.get("log_y", False)) for r in members]
            panels.append(Panel(title=f"{attention}, lr {lr:g}", lines=lines))
    columns = len(rates) if len(rates) > 1 else len(panels)
    return Plot(x_label="optimizer steps", panels=panels, columns=columns, **looks)


def _curve_line(result: Result, curve: list[tuple[int, float]], *, smooth: bool, log_y: bool) -> Line:
    if smooth:
        curve = _smooth(curve, max(1, result.cell.total_steps // 50))
    points = [(float(step), value if value > 0 or not log_y else math.nan) for step, value in curve]
    finite = [point for point in points if math.isfinite(point[1])]
    return _line(
        result,
        points=points,
        # A run that was over before its first value still gets its cross.
        diverged=[finite[-1] if finite else (float(result.summary.get("step", 0)), None)] if result.is_diverged else [],
        unstable=finite[-1:] if result.unstable and not result.is_diverged else [],
    )


def _line(result: Result, **data: Any) -> Line:
    return Line(
        name=run_title(result),
        label=result.method,
        stabilizer=result.stabilizer,
        variation=result.variation,
        **data,
    )


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


def _loss_by_rate(results: Results) -> Plot:
    """Final validation loss of every finished run against its learning rate, mean over seeds."""
    panels = []
    for attention in results.attentions():
        members = [r for r in results.results if r.attention == attention and r.is_finished]
        methods = dict.fromkeys(r.method for r in members)
        lines = [_rate_line([r for r in members if r.method == method]) for method in methods]
        panels.append(Panel(title=attention, lines=lines))
    return Plot(
        name="loss_by_lr",
        title="Final validation loss against learning rate",
        caption="Mean over seeds of the runs that reached their last step; a diverged run is a cross at the top.",
        x_label="learning rate",
        y_label="final validation loss (nats per token)",
        panels=panels,
        columns=len(panels),
        log_x=True,
        ceiling=_loss_ceiling(results),
    )


def _rate_line(results: Sequence[Result]) -> Line:
    losses: dict[float, list[float]] = {}
    for result in results:
        value = result.number("val_loss")
        if not result.is_diverged and value is not None:
            losses.setdefault(result.lr, []).append(value)
    points = [(lr, fmean(values)) for lr, values in sorted(losses.items())]
    unstable_rates = {r.lr for r in results if r.unstable}
    return _line(
        results[0],
        points=points,
        diverged=[(r.lr, None) for r in results if r.is_diverged],
        unstable=[point for point in points if point[0] in unstable_rates],
    )
