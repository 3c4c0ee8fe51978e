"""Comparison of stabilizers: best settings, differences paired by seed, summaries over learning rates, speed.

Runs with the same seed have the same data order and, wherever shapes agree, the same initialization, so they are
compared pair by pair. Each stabilizer is compared at its best setting, selected on the same runs; one with more
settings has more tries.
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

# A smaller difference of losses, in nats per token, is rounding.
ROUNDING = 1e-3
# The stabilizer that does nothing: step times are relative to its.
BASELINE = "none"


def settled_loss(result: Result) -> float | None:
    """The final validation loss, at most the initial one, and that one for a diverged run; None if unfinished."""
    initial, final = result.number("initial_val_loss"), result.number("val_loss")
    if not result.is_finished:
        return None
    if result.is_diverged or final is None:
        return initial
    return final if initial is None else min(final, initial)


def losses(results: Sequence[Result]) -> dict[int, float]:
    """The settled loss by seed, of the runs that have one."""
    return {r.seed: loss for r in results if (loss := settled_loss(r)) is not None}


def by_label(results: Sequence[Result]) -> dict[str, list[Result]]:
    """The runs of each stabilizer with its settings, in order."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result.label, []).append(result)
    return groups


def best_settings(results: Sequence[Result]) -> dict[str, list[Result]]:
    """For each stabilizer, the runs at its best setting at one place: the one with the lowest mean loss.

    A setting with fewer finished seeds than another is not selected. Before any run has finished, it is the first one.
    """
    best: dict[str, tuple[tuple[float, float], list[Result]]] = {}
    for runs in by_label(results).values():
        found = losses(runs)
        rank = (-len(found), fmean(found.values()) if found else math.inf)
        if runs[0].stabilizer not in best or rank < best[runs[0].stabilizer][0]:
            best[runs[0].stabilizer] = (rank, runs)
    return {stabilizer: runs for stabilizer, (_, runs) in best.items()}


# ------------------------------------------------------------------------------------------------ differences


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The loss of `a` minus that of `b` for each seed, in nats per token."""

    a: str
    b: str
    by_seed: dict[int, float]

    @property
    def mean(self) -> float:
        """The mean difference over the paired seeds."""
        return fmean(self.by_seed.values())

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95% bootstrap interval of the mean; None with too few seeds."""
        return bootstrap_interval(list(self.by_seed.values()))

    @property
    def is_draw(self) -> bool:
        """Whether the losses are equal for every seed: both computed the same, or both diverged."""
        return not any(self.by_seed.values())

    @property
    def better(self) -> str | None:
        """The label with the lower loss, if the interval excludes zero by more than rounding; else None."""
        if not excludes_zero(self.interval, ROUNDING):
            return None
        return self.a if self.mean < 0 else self.b


def difference(a: Sequence[Result], b: Sequence[Result]) -> Difference | None:
    """The difference of losses paired by seed; None if no seed has finished on both sides.

    The difference of two diverged runs is zero.
    """
    first, second = losses(a), losses(b)
    draws = {r.seed for r in a if r.is_diverged} & {r.seed for r in b if r.is_diverged}
    pairs = {
        seed: 0.0 if seed in draws else first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())
    }
    return Difference(a=a[0].label, b=b[0].label, by_seed=pairs) if pairs else None


def differences_at(results: Results, place: Place) -> list[Difference]:
    """The differences between every two stabilizers at one place, each at its best setting."""
    best = best_settings(results.at(place))
    pairs = (difference(best[a], best[b]) for a, b in itertools.combinations(best, 2))
    return [pair for pair in pairs if pair is not None]


@dataclass(frozen=True, kw_only=True)
class Noise:
    """Standard deviations over seeds, pooled over all places; None if there is only one seed."""

    of_losses: float | None
    of_differences: float | None


def noise(results: Results) -> Noise:
    """The noise of healthy runs; the losses of failing runs vary far more.

    Differences are between the best settings of two stabilizers, unless both computed the same (a clip that never
    clips, against no clip).
    """
    groups, pairs = [], []
    for place in results.places():
        groups += [list(losses(_healthy(runs)).values()) for runs in by_label(results.at(place)).values()]
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
    """A stabilizer over all learning rates of one attention, at its best setting for each rate."""

    attention: str
    stabilizer: str
    best_rate: float
    best_loss: float
    best_interval: tuple[float, float] | None
    sensitivity: float | None  # None for one rate, missing rates, or rates that are not evenly spaced
    sensitivity_interval: tuple[float, float] | None
    largest_stable: float | None
    missing: list[float]  # planned rates at which no run has finished


def over_rates(results: Results) -> list[OverRates]:
    """The summary of each attention and stabilizer that has finished runs."""
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
    # If the rate at which it fails is missing, a stabilizer would seem robust.
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
    """None if the finished runs are healthy and others have not finished."""
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
    """Step time relative to another stabilizer's, in pairs with equal seed, attention, rate and condition."""

    attention: str
    stabilizer: str
    against: str
    tokens_per_s: float
    ratio: float
    interval: tuple[float, float] | None
    pairs: int


def speeds(results: Results, against: str = BASELINE) -> list[Speed]:
    """The relative speed of each attention and stabilizer that has completed pairs."""
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
    """By condition, rate and seed; the settings of one stabilizer are averaged, not counted as separate pairs."""
    measured: dict[tuple[str, float, int], list[float]] = {}
    for run in runs:
        if speed := run.number("tokens_per_s"):
            measured.setdefault((run.condition, run.lr, run.seed), []).append(speed)
    return {key: geometric_mean(speeds) for key, speeds in measured.items()}
