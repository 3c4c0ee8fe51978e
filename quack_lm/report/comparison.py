"""Methods against each other: best settings, differences paired by seed, sums over the learning rates, speed.

Runs with the same seed have the same data order and, wherever shapes agree, the same initialization: they are compared
pair by pair. A method is judged at its best setting, chosen by the same runs; one with more settings has more tries.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from quack_lm.report.results import Place, Result, Results
from quack_lm.report.statistics import (
    bootstrap_interval,
    excludes_zero,
    geometric_mean,
    is_evenly_spaced,
    largest_stable_rate,
    lr_sensitivity,
    pooled_deviation,
)

# Losses that differ by less, in nats per token, differ by rounding.
ROUNDING = 1e-3


def settled_loss(result: Result) -> float | None:
    """The final validation loss, but never above the initial one: that is what a diverged run counts as."""
    initial, final = result.number("initial_val_loss"), result.number("val_loss")
    if not result.is_finished:
        return None
    if result.is_diverged or final is None:
        return initial
    return final if initial is None else min(final, initial)


def losses(results: Sequence[Result]) -> dict[int, float]:
    """The settled loss of each seed."""
    return {r.seed: loss for r in results if (loss := settled_loss(r)) is not None}


def by_method(results: Sequence[Result]) -> dict[str, list[Result]]:
    """The runs of each method, in order."""
    methods: dict[str, list[Result]] = {}
    for result in results:
        methods.setdefault(result.method, []).append(result)
    return methods


def best_settings(results: Sequence[Result]) -> dict[str, list[Result]]:
    """For each stabilizer the runs of its best setting at one place: the one with the lowest mean loss.

    One with fewer seeds than another is no candidate; before any run has finished, the first setting stands in.
    """
    best: dict[str, tuple[tuple[float, float], list[Result]]] = {}
    for runs in by_method(results).values():
        found = losses(runs)
        rank = (-len(found), fmean(found.values()) if found else math.inf)
        if runs[0].stabilizer not in best or rank < best[runs[0].stabilizer][0]:
            best[runs[0].stabilizer] = (rank, runs)
    return {stabilizer: runs for stabilizer, (_, runs) in best.items()}


# ------------------------------------------------------------------------------------------------ differences


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The loss of `a` less that of `b`, seed by seed."""

    a: str
    b: str
    by_seed: dict[int, float]

    @property
    def mean(self) -> float:
        return fmean(self.by_seed.values())

    @property
    def interval(self) -> tuple[float, float] | None:
        return bootstrap_interval(list(self.by_seed.values()))

    @property
    def is_draw(self) -> bool:
        """Whether every seed has the same loss on both sides: the two computed the same, or both diverged."""
        return not any(self.by_seed.values())

    @property
    def winner(self) -> str | None:
        """Who has the lower loss, where the interval excludes zero and what is only rounding; else None."""
        if not excludes_zero(self.interval, ROUNDING):
            return None
        return self.a if self.mean < 0 else self.b


def difference(a: Sequence[Result], b: Sequence[Result]) -> Difference | None:
    """Paired by seed; None where no seed has finished on both sides. Where both diverged, it is a draw."""
    first, second = losses(a), losses(b)
    draws = {r.seed for r in a if r.is_diverged} & {r.seed for r in b if r.is_diverged}
    pairs = {
        seed: 0.0 if seed in draws else first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())
    }
    return Difference(a=a[0].method, b=b[0].method, by_seed=pairs) if pairs else None


def differences_at(results: Results, place: Place) -> list[Difference]:
    """Between the best settings of every two stabilizers."""
    best = best_settings(results.at(place))
    pairs = (difference(best[a], best[b]) for a, b in itertools.combinations(best, 2))
    return [pair for pair in pairs if pair is not None]


@dataclass(frozen=True, kw_only=True)
class Noise:
    """Standard deviations over seeds, pooled over all places; None with one seed."""

    of_losses: float | None
    of_differences: float | None


def noise(results: Results) -> Noise:
    """Of healthy runs only: how a failing run fails is a lottery of its own. Differences are of what is compared: the
    best settings of two stabilizers, where they did not compute the same (a clip that never clips is no method)."""
    groups, pairs = [], []
    for place in results.places():
        groups += [list(losses(_healthy(runs)).values()) for runs in by_method(results.at(place)).values()]
        best = [healthy for runs in best_settings(results.at(place)).values() if (healthy := _healthy(runs))]
        for a, b in itertools.combinations(best, 2):
            if (pair := difference(a, b)) and not pair.is_draw:
                pairs.append(list(pair.by_seed.values()))
    return Noise(of_losses=pooled_deviation(groups), of_differences=pooled_deviation(pairs))


def _healthy(runs: Sequence[Result]) -> list[Result]:
    return [r for r in runs if r.is_healthy]


# ------------------------------------------------------------------------------------------------ over the rates


@dataclass(frozen=True, kw_only=True)
class OverRates:
    """A stabilizer over all learning rates of one attention, each at its best setting there."""

    attention: str
    stabilizer: str
    best_rate: float
    best_loss: float
    best_interval: tuple[float, float] | None
    sensitivity: float | None  # None with one rate, with rates that are missing, or not evenly spaced
    sensitivity_interval: tuple[float, float] | None
    largest_stable: float | None
    missing: list[float]  # planned rates at which no run has finished


def over_rates(results: Results) -> list[OverRates]:
    """One entry per attention and stabilizer with finished runs."""
    return [
        _over_rates(results, places, attention, condition, stabilizer)
        for (attention, condition), places in _by_attention(results).items()
        for stabilizer in results.stabilizers()
        if any(losses(best_settings(results.at(place)).get(stabilizer, [])) for place in places)
    ]


def _over_rates(
    results: Results, places: Sequence[Place], attention: str, condition: str, stabilizer: str
) -> OverRates:
    runs = {place.lr: best_settings(results.at(place)).get(stabilizer, []) for place in places}
    by_rate = {lr: found for lr, members in runs.items() if (found := losses(members))}
    best_rate = min(by_rate, key=lambda lr: fmean(by_rate[lr].values()))
    best = list(by_rate[best_rate].values())
    initial = max(r.number("initial_val_loss") or -math.inf for members in runs.values() for r in members)
    # A seed counts if it has run at every rate.
    seeds = set.intersection(*(set(found) for found in by_rate.values()))
    each = [lr_sensitivity({lr: found[seed] for lr, found in by_rate.items()}, initial) for seed in sorted(seeds)]
    missing = sorted(lr for lr, members in runs.items() if members and lr not in by_rate)
    # Without a rate at which it fails, a method would look robust.
    is_complete = not missing and is_evenly_spaced(by_rate)
    return OverRates(
        attention=f"{attention} {condition}".rstrip(),
        stabilizer=stabilizer,
        best_rate=best_rate,
        best_loss=fmean(best),
        best_interval=bootstrap_interval(best),
        sensitivity=fmean(each) if each and is_complete else None,
        sensitivity_interval=bootstrap_interval(each) if is_complete else None,
        largest_stable=largest_stable_rate({lr: _are_healthy(members) for lr, members in runs.items() if members}),
        missing=missing,
    )


def _are_healthy(runs: Sequence[Result]) -> bool | None:
    """None while some of them have not finished and the others are healthy."""
    if any(r.is_finished and not r.is_healthy for r in runs):
        return False
    return True if all(r.is_finished for r in runs) else None


def _by_attention(results: Results) -> dict[tuple[str, str], list[Place]]:
    groups: dict[tuple[str, str], list[Place]] = {}
    for place in results.places():
        groups.setdefault((place.attention, place.condition), []).append(place)
    return groups


# ------------------------------------------------------------------------------------------------ speed


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Step time relative to another stabilizer, paired by seed, attention, rate and condition."""

    attention: str
    stabilizer: str
    against: str
    tokens_per_s: float
    ratio: float
    interval: tuple[float, float] | None
    pairs: int


def speeds(results: Results, against: str = "none") -> list[Speed]:
    """One entry per attention and stabilizer, for which pairs have completed."""
    entries = []
    for attention in results.attentions():
        members = [r for r in results.results if r.attention == attention and r.status == "completed"]
        reference = _tokens_per_s([r for r in members if r.stabilizer == against])
        for stabilizer in results.stabilizers():
            speed = _tokens_per_s([r for r in members if r.stabilizer == stabilizer])
            ratios = [reference[key] / own for key, own in speed.items() if key in reference]
            if ratios:
                bounds = bootstrap_interval([math.log(ratio) for ratio in ratios])
                entries.append(
                    Speed(
                        attention=attention,
                        stabilizer=stabilizer,
                        against=against,
                        tokens_per_s=fmean(speed.values()),
                        ratio=geometric_mean(ratios),
                        interval=(math.exp(bounds[0]), math.exp(bounds[1])) if bounds else None,
                        pairs=len(ratios),
                    )
                )
    return entries


def _tokens_per_s(runs: Sequence[Result]) -> dict[tuple[str, float, int], float]:
    """By condition, rate and seed; the settings of a stabilizer are no pairs of their own, but one number."""
    measured: dict[tuple[str, float, int], list[float]] = {}
    for run in runs:
        if speed := run.number("tokens_per_s"):
            measured.setdefault((run.condition, run.lr, run.seed), []).append(speed)
    return {key: geometric_mean(speeds) for key, speeds in measured.items()}
