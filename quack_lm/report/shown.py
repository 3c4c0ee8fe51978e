"""What figures show of a sweep that is too large to draw completely."""

import itertools

from quack_lm.report.comparison import best_settings, by_attention, by_label
from quack_lm.report.results import Place, Result, Results

# With more stabilizers and settings than this in one panel, only the best setting of each stabilizer is shown.
MANY = 6
# With more places than this, figures have panels for a few of them.
MOST_PLACES, FEW_PANELS = 12, 8
# The appendix has no curves of all settings if these are more lines.
MOST_LINES = 200


def has_many_settings(results: Results) -> bool:
    """Whether a panel with every setting would be too full to read."""
    return results.most_settings > MANY


def shown_at(results: Results, place: Place, *, every: bool = False) -> list[list[Result]]:
    """The runs of each line to show at a place: every setting, or the best of each stabilizer if there are many."""
    if every or not has_many_settings(results):
        return list(by_label(results.at(place)).values())
    return [best.runs for best in best_settings(results, place).values()]


def shown_attentions(results: Results) -> dict[tuple[str, str], list[Place]]:
    """The places of each attention and condition with a panel over the rates: all or, of many, the usual settings."""
    groups = by_attention(results)
    return groups if len(groups) <= MOST_PLACES else _usual(groups)


def shown_places(results: Results) -> list[Place]:
    """The places that have a panel over the steps: all or, of many, a few rates of the usual settings.

    The lowest and the highest rate of each attention are among them.
    """
    places = results.places()
    if len(places) <= MOST_PLACES:
        return places
    groups = _usual(by_attention(results))
    count = max(2, FEW_PANELS // len(groups))
    return [own[i] for own in groups.values() for i in _spread(len(own), count)]


def _usual(groups: dict[tuple[str, str], list[Place]]) -> dict[tuple[str, str], list[Place]]:
    """Without the conditions, which differ from the settings of most runs."""
    usual = {key: places for key, places in groups.items() if not key[1]}
    return usual or dict(itertools.islice(groups.items(), FEW_PANELS))


def _spread(n: int, count: int) -> list[int]:
    """At most `count` of the numbers below n, evenly spaced, with the first and the last."""
    return sorted({round(i * (n - 1) / (count - 1)) for i in range(count)})


def count_settings(results: Results) -> int:
    """The number of stabilizers, each setting counted, at all places."""
    return sum(len(by_label(results.at(place))) for place in results.places())


def left_out(shown: int, results: Results) -> str:
    """The sentence on the places without a panel."""
    n_places = len(results.places())
    return f" {shown} of {n_places} places are drawn; the tables have all." if shown < n_places else ""
