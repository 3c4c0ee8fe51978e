"""The plateau of each stabilizer over the learning rates, as plain numbers."""

from collections.abc import Sequence
from dataclasses import dataclass

from quack_lm.report.comparison import PLATEAU, OverRates, over_rates
from quack_lm.report.results import Results
from quack_lm.report.shown import left_out, shown_attentions

# With fewer rates, a plateau says little.
FEWEST_RATES = 3


@dataclass(frozen=True, kw_only=True)
class Bar:
    """The plateau of a stabilizer: the rates around its best one whose loss is near that one's."""

    stabilizer: str
    low: float
    high: float
    best: float
    is_open: tuple[bool, bool]  # whether it reaches the lowest and the highest rate of the grid
    text: str
    settings: str = ""  # the best one at each rate


@dataclass(frozen=True, kw_only=True)
class BarPanel:
    """The bars of one attention, and the rates of its grid."""

    title: str
    rates: Sequence[float]
    bars: list[Bar]


@dataclass(frozen=True, kw_only=True)
class Plateaus:
    """One figure: a panel for each attention, which share their axes."""

    name: str
    title: str
    caption: str
    panels: list[BarPanel]
    is_appendix: bool = False

    def has_data(self) -> bool:
        """Whether an attention has enough rates."""
        return bool(self.panels)

    def stabilizers(self) -> list[str]:
        """The rows of the figure, from the top."""
        return list(dict.fromkeys(bar.stabilizer for panel in self.panels for bar in panel.bars))


def plateaus(results: Results) -> Plateaus:
    """The numbers of the table of best learning rates, for each attention with at least FEWEST_RATES rates."""
    shown = shown_attentions(results)
    by_attention: dict[str, list[OverRates]] = {}
    for entry in over_rates(results):
        by_attention.setdefault(entry.attention, []).append(entry)
    panels = []
    for (attention, condition), places in shown.items():
        title = f"{attention} {condition}".rstrip()
        if len(places) >= FEWEST_RATES and title in by_attention:
            bars = [_bar(entry) for entry in by_attention[title]]
            panels.append(BarPanel(title=title, rates=[place.lr for place in places], bars=bars))
    return Plateaus(
        name="plateau",
        title=f"Plateau: learning rates within {PLATEAU:g} nats of the best",
        caption="The rates around the best one of each stabilizer whose final validation loss is within "
        f"{PLATEAU:g} nats of its, at the best setting for each rate; the table of best rates has the numbers. "
        "An arrow marks the edge of the grid, beyond which there may be more of them."
        + left_out(sum(map(len, shown.values())), results),
        panels=panels,
    )


def _bar(entry: OverRates) -> Bar:
    return Bar(
        stabilizer=entry.stabilizer,
        low=entry.plateau[0],
        high=entry.plateau[1],
        best=entry.best_rate,
        is_open=entry.is_plateau_open,
        text=f"{entry.attention}, {entry.stabilizer}: {entry.best_loss:.3f} at {entry.best_rate:g}, plateau "
        f"{entry.plateau_text}",
    )
