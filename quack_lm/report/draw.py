"""Draws plots with matplotlib; a stabilizer has the same color and marker in every figure."""

import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.transforms import ScaledTranslation
from PIL import Image

from quack_lm.config import choices
from quack_lm.report.figures import Line, Panel, Plot
from quack_lm.report.heat import HeatMaps
from quack_lm.report.plateau import Bar, Plateaus
from quack_lm.report.table import significant
from quack_lm.text import escape

# Colors of Okabe and Ito, then of Tol, which color-blind readers can tell apart; markers and dashes repeat the
# distinction. Known stabilizers take them in the order of their configs, so that all reports agree.
CYCLE = (
    ("#E69F00", "^"),
    ("#000000", "s"),
    ("#CC79A7", "v"),
    ("#56B4E9", "D"),
    ("#009E73", "o"),
    ("#D55E00", "P"),
    ("#0072B2", "*"),
    ("#999999", "h"),
    ("#882255", "X"),
)
DASHES: tuple = ("-", (0, (5, 1.5)), (0, (1.5, 1)), (0, (6, 1.5, 1.5, 1.5)), (0, (3, 1, 1, 1, 1, 1)))
FILLS = ("full", "none", "left", "top")
# Towards black where negative, towards white where positive.
SHADES = (0.0, -0.45, 0.45, -0.65, 0.65)

STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e3e3e3",
    "legend.frameon": False,
    "pdf.fonttype": 42,  # text stays text
    "figure.dpi": 150,
}
PANEL_INCHES = (4.3, 3.3)
LEGEND_LINE_INCHES, LEGEND_LETTER_INCHES = 0.85, 0.085
# A legend of more rows than these makes a figure higher.
LEGEND_ROWS, LEGEND_ROW_INCHES = 6, 0.2
MARKERS_PER_CURVE = 7
# Labels of more learning rates would overlap.
MOST_RATES = 6
BAR_INCHES, ARROW_INCHES, BAR_ALPHA = 0.33, 0.07, 0.4
# The color scale ends here: smaller values all have its lowest color.
HEAT_FLOOR = 1e-4
MOST_LAYERS_LABELED = 20


def draw(plot: Plot | Plateaus | HeatMaps, *, columns: int | None = None) -> Figure:
    """The figure, with its panels in `columns` columns; the narrow form of a page has one."""
    if isinstance(plot, Plateaus):
        return _draw_plateaus(plot, columns)
    return _draw_lines(plot, columns) if isinstance(plot, Plot) else _draw_heat(plot, columns)


def _draw_lines(plot: Plot, columns: int | None) -> Figure:
    columns = min(columns or plot.columns, len(plot.panels))
    rows = math.ceil(len(plot.panels) / columns)
    with matplotlib.rc_context(STYLE):
        styles = Styles([panel.lines for panel in plot.panels])
        handles = styles.legend(plot)
        width = PANEL_INCHES[0] * columns
        n_columns = _legend_columns(handles, width)
        n_rows = math.ceil(len(handles) / n_columns)
        height = PANEL_INCHES[1] * rows + 0.7 + LEGEND_ROW_INCHES * max(0, n_rows - LEGEND_ROWS)
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = list(figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flat)
        for axis, panel in zip(axes, plot.panels, strict=False):
            _draw_panel(axis, panel, plot, styles)
        if plot.ceiling is not None:
            # After all panels, which share the axis: a limit set earlier would not grow with later curves.
            axes[0].set_ylim(top=min(plot.ceiling, axes[0].get_ylim()[1]))
        _label_outer(axes, len(plot.panels), columns)
        figure.suptitle(_plain(plot.title), fontsize=12)
        figure.legend(handles=handles, loc="outside lower center", ncols=n_columns, handlelength=3)
    return figure


def _draw_plateaus(plot: Plateaus, columns: int | None) -> Figure:
    """One row per stabilizer: a bar over its plateau, with its marker at the best rate and arrows at open ends."""
    columns = min(columns or 3, len(plot.panels))
    rows = math.ceil(len(plot.panels) / columns)
    styles = Styles([panel.bars for panel in plot.panels])
    names = plot.stabilizers()
    rates = sorted({rate for panel in plot.panels for rate in panel.rates})
    # A plateau of a single rate has a width, too; and there is room for the arrows.
    overhang, margin = ((rates[-1] / rates[0]) ** share for share in (0.02, 0.1))
    with matplotlib.rc_context(STYLE):
        height = (BAR_INCHES * len(names) + 0.8) * rows + 0.8
        figure = Figure(figsize=(PANEL_INCHES[0] * columns, height), layout="constrained")
        axes = list(figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flat)
        for axis, panel in zip(axes, plot.panels, strict=False):
            axis.set_title(_plain(panel.title), fontsize=10)
            axis.set_xlabel("learning rate")
            axis.set_xscale("log")
            for bar in panel.bars:
                _draw_bar(axis, bar, names.index(bar.stabilizer), overhang, styles.of(bar))
            _set_rates(axis, rates)
        axes[0].set_xlim(rates[0] / margin, rates[-1] * margin)
        axes[0].set_yticks(range(len(names)), map(_plain, names))
        axes[0].set_ylim(len(names) - 0.5, -0.5)
        _label_outer(axes, len(plot.panels), columns)
        figure.suptitle(plot.title, fontsize=12)
        gray: dict[str, Any] = {"color": "#777777"}
        handles = [
            Patch(label="plateau", alpha=BAR_ALPHA, **gray),
            Line2D([], [], label="best rate", linestyle="", marker="o", **gray),
            Line2D([], [], label="edge of the grid", linestyle="", marker=">", **gray),
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return figure


def _draw_bar(axis: Axes, bar: Bar, y: int, overhang: float, style: dict[str, Any]) -> None:
    color, ends = style["color"], (bar.low / overhang, bar.high * overhang)
    axis.barh(y, ends[1] - ends[0], left=ends[0], height=0.5, color=color, alpha=BAR_ALPHA, zorder=3)
    axis.plot([bar.best], [y], linestyle="", marker=style["marker"], color=color, markersize=7, zorder=4)
    for end, is_open, marker, shift in zip(ends, bar.is_open, "<>", (-ARROW_INCHES, ARROW_INCHES), strict=True):
        if is_open:
            outside = axis.transData + ScaledTranslation(shift, 0, axis.figure.dpi_scale_trans)
            axis.plot([end], [y], linestyle="", marker=marker, color=color, transform=outside)


def _draw_heat(plot: HeatMaps, columns: int | None) -> Figure:
    """One map per stabilizer with its settings, all with one color scale."""
    columns = min(columns or 3, len(plot.maps))
    rows = math.ceil(len(plot.maps) / columns)
    values = np.concatenate([each.values[np.isfinite(each.values)] for each in plot.maps])
    low, high = (values.min(), values.max()) if values.size else (1e-3, 1.0)
    scale = LogNorm(max(low, HEAT_FLOOR), high)
    with matplotlib.rc_context(STYLE | {"axes.grid": False}):
        figure = Figure(figsize=(PANEL_INCHES[0] * columns, PANEL_INCHES[1] * rows + 0.5), layout="constrained")
        axes = list(figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flat)
        for axis, each in zip(axes, plot.maps, strict=False):
            mesh = axis.pcolormesh(each.steps, range(len(each.values)), each.values, norm=scale, cmap="viridis")
            # Values that are not finite must not look small.
            axis.set_facecolor("#D55E00")
            layers = range(0, len(each.values), each.rows_per_layer)
            labeled = range(0, len(layers), math.ceil(len(layers) / MOST_LAYERS_LABELED))
            axis.set_yticks([layers[i] + (each.rows_per_layer - 1) / 2 for i in labeled], [str(i) for i in labeled])
            for top in layers[1:] if len(labeled) == len(layers) else ():
                axis.axhline(top - 0.5, color="white", linewidth=0.8)
            axis.set_title(_plain(each.title), fontsize=10)
            axis.set_xlabel("optimizer steps")
            axis.set_ylabel("layer")
        _label_outer(axes, len(plot.maps), columns)
        figure.colorbar(mesh, ax=axes, label=plot.label)
        figure.suptitle(_plain(plot.title), fontsize=12)
    return figure


def _label_outer(axes: Sequence[Axes], used: int, columns: int) -> None:
    """Keep labels at the outer edges only; a panel above an empty cell of the grid keeps its own."""
    for number, axis in enumerate(axes):
        axis.set_visible(number < used)
        if number + columns < used:
            axis.set_xlabel("")
        axis.tick_params(labelbottom=number + columns >= used, labelleft=number % columns == 0)
        if number % columns:
            axis.set_ylabel("")


class Ramp(NamedTuple):
    """A curve over the learning rates of a ramp, and the rate at which it is marked."""

    label: str
    points: Sequence[tuple[float, float]]
    mark: float | None
    log_y: bool = False


def draw_ramps(ramps: Sequence[Ramp], *, title: str) -> Figure:
    """Curves over one axis of learning rates, side by side."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(PANEL_INCHES[0] * len(ramps), PANEL_INCHES[1]), layout="constrained")
        for axis, ramp in zip(figure.subplots(1, len(ramps), squeeze=False).flat, ramps, strict=True):
            axis.plot(*zip(*ramp.points, strict=True), color=CYCLE[1][0]) if ramp.points else None
            if ramp.mark is not None:
                axis.axvline(ramp.mark, color=CYCLE[5][0], linestyle="--", label=f"{ramp.mark:.2g}")
                axis.legend()
            axis.set_xscale("log")
            axis.set_yscale("log" if ramp.log_y else "linear")
            axis.set_xlabel("optimizer.lr")
            axis.set_ylabel(ramp.label)
        figure.suptitle(_plain(title), fontsize=12)
    return figure


def save(figure: Figure, kind: str = "png") -> bytes:
    """The figure as the bytes of a PNG or PDF file."""
    with matplotlib.rc_context(STYLE):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=kind)
    if kind != "png":
        return buffer.getvalue()
    # A palette takes a quarter of the bytes, which keeps a page with twenty figures small enough for mail.
    small = io.BytesIO()
    with Image.open(buffer) as picture:
        picture.convert("RGB").quantize(128).save(small, "png", optimize=True)
    return small.getvalue()


@dataclass(frozen=True, kw_only=True)
class PointValue:
    """A marker of a figure in fractions of its width and height, from the upper left corner, and what it says."""

    left: float
    top: float
    text: str


def point_values(figure: Figure, plot: Plot | Plateaus) -> list[PointValue]:
    """The value at each marker of a figure that was drawn from the plot and has been saved, which does its layout."""
    found = []
    for axis, marked in zip(figure.axes, _marked(plot), strict=False):
        for x, y, text in marked:
            left, top = axis.transData.transform((x, y)) / figure.bbox.size
            inside = axis.get_position()
            if inside.x0 - 0.01 <= left <= inside.x1 + 0.01 and inside.y0 - 0.01 <= top <= inside.y1 + 0.01:
                found.append(PointValue(left=float(left), top=float(1 - top), text=text))
    return found


def _marked(plot: Plot | Plateaus) -> Iterable[Sequence[tuple[float, float, str]]]:
    """The position of each marker in a panel, and its value as text."""
    if isinstance(plot, Plateaus):
        names = plot.stabilizers()
        yield from ([(bar.best, names.index(bar.stabilizer), bar.text) for bar in each.bars] for each in plot.panels)
        return
    styles = Styles([panel.lines for panel in plot.panels])
    for panel in plot.panels:
        marked = []
        for line in panel.lines:
            every = _markers(line.points, styles.rank(line), plot.log_x)
            spread = {x: f" ({significant(low, 4)} to {significant(high, 4)})" for x, low, high in line.band}
            marked += [
                (x, y, f"{panel.title}, {line.label}: {significant(y, 4)}{spread.get(x, '')} at {x:g}")
                for x, y in (line.points[every] if isinstance(every, slice) else line.points)
                if math.isfinite(y)
            ]
        yield marked


class Styles:
    """The color and marker of each stabilizer; its settings differ in dashes and filling, within one panel also in
    shade."""

    def __init__(self, panels: Sequence[Sequence[Line | Bar]]) -> None:
        lines = [line for panel in panels for line in panel]
        known = choices("stabilizer")
        names = {line.stabilizer: None for line in lines}
        ordered = [*known, *(name for name in names if name not in known)]
        # Lines that are no stabilizers, such as the parts of a change, begin with the first color.
        ordered = ordered if names.keys() & set(known) else list(names)
        self.ranks = {name: rank for rank, name in enumerate(ordered)}
        groups = [[line.stabilizer for line in panel] for panel in panels]
        self.shades = SHADES if any(len(set(group)) < len(group) for group in groups) else SHADES[:1]
        self.settings: dict[str, list[str]] = {}
        for line in lines:
            seen = self.settings.setdefault(line.stabilizer, [])
            seen += [line.settings] if line.settings not in seen else []

    def of(self, line: Line | Bar) -> dict[str, Any]:
        """The arguments of `Axes.plot` for a line."""
        rank = self.ranks[line.stabilizer]
        color, marker = CYCLE[rank % len(CYCLE)]
        number = self.settings[line.stabilizer].index(line.settings)
        return {
            "color": _shade(color, self.shades[number % len(self.shades)]),
            "marker": marker,
            "fillstyle": FILLS[number % len(FILLS)],
            "linestyle": DASHES[(rank + number) % len(DASHES)],
            "markersize": 5,
            "linewidth": 1.6,
        }

    def rank(self, line: Line) -> int:
        """The place of its stabilizer in the order of all."""
        return self.ranks[line.stabilizer]

    def legend(self, plot: Plot) -> list[Line2D]:
        """One entry per label, and one for each mark that the plot uses."""
        lines = [line for panel in plot.panels for line in panel.lines]
        # Seeds share a label and one entry.
        by_label = {line.label: line for line in lines if line.points or line.diverged}
        handles = [Line2D([], [], label=_plain(label), **self.of(line)) for label, line in by_label.items()]
        if any(line.diverged for line in lines):
            handles.append(Line2D([], [], label="diverged or stopped", **_cross("#444444")))
        if any(line.unstable for line in lines):
            handles.append(Line2D([], [], label="unstable", **_ring("#444444")))
        return handles


def _shade(color: str, amount: float) -> tuple[float, ...]:
    """The color blended with white by `amount`, or with black where that is negative."""
    goal = 1.0 if amount > 0 else 0.0
    return tuple(part + abs(amount) * (goal - part) for part in to_rgb(color))


def _legend_columns(handles: Sequence[Line2D], width: float) -> int:
    """The number of columns that fit into `width` inches, with rows of about equal length."""
    widest = LEGEND_LINE_INCHES + LEGEND_LETTER_INCHES * max(len(str(handle.get_label())) for handle in handles)
    rows = math.ceil(len(handles) / max(1, int(width / widest)))
    return math.ceil(len(handles) / rows)


def _plain(text: str) -> str:
    return escape(text, "figure")


def _draw_panel(axis: Axes, panel: Panel, plot: Plot, styles: Styles) -> None:
    axis.set_title(_plain(panel.title), fontsize=10)
    axis.set_xlabel(plot.x_label)
    axis.set_ylabel(plot.y_label)
    axis.set_xscale("log" if plot.log_x else "linear")
    axis.set_yscale("log" if plot.log_y else "linear")
    if plot.log_x:
        # Ticks at the rates that were run, not at powers of ten.
        lines = [line for each in plot.panels for line in each.lines]  # panels share their axes
        ticks = {x for line in lines for x, _ in [*line.points, *line.diverged]}
        _set_rates(axis, ticks)
    for line in panel.lines:
        if line.band:
            x, low, high = zip(*line.band, strict=True)
            axis.fill_between(x, low, high, color=styles.of(line)["color"], alpha=0.15, linewidth=0)
            if line.is_in_parts:  # a spike of one step is narrower than a pixel
                axis.plot(x, high, x, low, color=styles.of(line)["color"], alpha=0.5, linewidth=0.5)
    for line in panel.lines:
        x, y = zip(*line.points, strict=True) if line.points else ((), ())
        axis.plot(x, y, markevery=_markers(line.points, styles.rank(line), plot.log_x), **styles.of(line))
    if not any(line.points or line.diverged for line in panel.lines):
        axis.text(0.5, 0.5, "no data yet", transform=axis.transAxes, ha="center", color="#666666")
    for line in panel.lines:
        _mark_outcome(axis, line, styles.of(line)["color"], plot.ceiling)


def _set_rates(axis: Axes, rates: Iterable[float]) -> None:
    """Ticks at the rates that were run, not at powers of ten."""
    ticks = sorted(rates)
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks], rotation=45 if len(ticks) > MOST_RATES else 0)
    axis.set_xticks([], minor=True)


def _mark_outcome(axis: Axes, line: Line, color: str, ceiling: float | None) -> None:
    for x, y in line.diverged:
        if y is None or (ceiling is not None and y > ceiling):
            axis.plot([x], [0.97], transform=axis.get_xaxis_transform(), clip_on=False, **_cross(color))
        else:
            axis.plot([x], [y], clip_on=False, **_cross(color))
    for x, y in line.unstable:
        axis.plot([x], [y], clip_on=False, **_ring(color))


def _cross(color: str) -> dict[str, Any]:
    return {"linestyle": "", "marker": "X", "markersize": 10, "color": color, "markeredgecolor": "white", "zorder": 5}


def _ring(color: str) -> dict[str, Any]:
    return {
        "linestyle": "",
        "marker": "o",
        "markersize": 11,
        "fillstyle": "none",
        "markeredgewidth": 1.6,
        "color": color,
    }


def _markers(points: Sequence[tuple[float, float]], rank: int, every: bool) -> slice | int:
    """`markevery` for a few markers per curve, shifted for each stabilizer so that they do not hide each other."""
    if every or len(points) <= MARKERS_PER_CURVE:
        return 1
    stride = max(1, len(points) // MARKERS_PER_CURVE)
    return slice((rank * stride) // len(CYCLE), None, stride)
