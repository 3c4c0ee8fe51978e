"""Comparison of stabilizers: best settings, differences paired by seed, summaries over learning rates, speed.

Runs with the same seed have the same data order and, wherever shapes agree, the same initialization, so they are
compared pair by pair. Each stabilizer is compared at its best setting. If the sweep has tuning seeds, these select it
and the others judge it. Without them the same runs do both, and every interval and test is corrected for the number of
settings that each side has tried (`Difference` says how).
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev

from quack_lm.report.results import Entry, Place, Result, Results, make_results
from quack_lm.report.statistics import (
    ALPHA,
    detectable_effect,
    geometric_mean,
    holm,
    interval_of_ratios,
    interval_of_selected,
    is_evenly_spaced,
    largest_stable_rate,
    lr_sensitivity,
    p_below,
    pooled_deviation,
    standard_error,
    t_interval,
    t_quantile,
)
from quack_lm.sweep.plan import SweepPlan
from quack_lm.training.state import bits_per_byte

# A smaller difference of losses, in nats per token, is rounding.
ROUNDING = 1e-3
# The stabilizer that does nothing: step times are relative to its.
BASELINE = "none"
# A rate belongs to the plateau of a stabilizer if its loss is within this of the best, in nats per token.
PLATEAU = 0.05


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


def in_bits_per_byte(loss: float | None, runs: Sequence[Result]) -> float | None:
    """A validation loss of runs on the same data, in bits per byte of text; None where no run knows the bytes."""
    ratios = [ratio for run in runs if (ratio := run.number("val_tokens_per_byte")) is not None]
    return None if loss is None or not ratios else bits_per_byte(loss, ratios[0])


def by_label(results: Sequence[Result]) -> dict[str, list[Result]]:
    """The runs of each stabilizer with its settings, in order."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result.label, []).append(result)
    return groups


@dataclass(frozen=True, kw_only=True)
class Best:
    """A stabilizer at its best setting, and what was tried to find that setting."""

    runs: list[Result]  # at the best setting, of the seeds that judge it
    settings: list[list[Result]]  # those among which the judging seeds selected; only `runs` if tuning seeds did
    tries: int  # how many settings they selected from, including those with too few seeds to be selected


def select_best(groups: Sequence[list[Result]], tune_seeds: Sequence[int] = ()) -> Best:
    """The group with the lowest mean loss, on the tuning seeds if there are any.

    A group with fewer finished seeds than another is not selected. Before any run has finished, it is the first one.
    """
    if tune_seeds:
        runs = min(groups, key=lambda members: _rank([r for r in members if r.seed in tune_seeds]))
        judged = [r for r in runs if r.seed not in tune_seeds]
        return Best(runs=judged, settings=[judged], tries=1)
    runs = min(groups, key=_rank)
    complete = [members for members in groups if len(losses(members)) == len(losses(runs))]
    return Best(runs=runs, settings=complete, tries=len(groups))


def _rank(runs: Sequence[Result]) -> tuple[int, float]:
    found = losses(runs)
    return -len(found), fmean(found.values()) if found else math.inf


def best_settings(results: Results, place: Place) -> dict[str, Best]:
    """Each stabilizer at its best setting at one place; those that have no run of a judging seed are left out."""
    tune_seeds = results.plan.tune_seeds
    best = {name: select_best(settings, tune_seeds) for name, settings in _settings(results, place).items()}
    return {name: found for name, found in best.items() if found.runs}


def _settings(results: Results, place: Place) -> dict[str, list[list[Result]]]:
    """The runs of each setting of each stabilizer at one place."""
    groups: dict[str, list[list[Result]]] = {}
    for runs in by_label(results.at(place)).values():
        groups.setdefault(runs[0].stabilizer, []).append(runs)
    return groups


def judge_selected(plan: SweepPlan, directory: Path) -> SweepPlan:
    """The plan without the judging seeds of settings that the finished tuning runs do not select, or not yet."""
    if not plan.tune_seeds:
        return plan
    entries: list[Entry] = [(c, c.run_dir.status(), c.run_dir.summary(), {}, {}, {}, None) for c in plan.cells]
    results = make_results(directory, plan, entries)
    needed = {cell.name for cell in plan.cells if cell.config["seed"] in plan.tune_seeds}
    for settings in itertools.chain.from_iterable(_settings(results, p).values() for p in results.places()):
        tuning = [run for runs in settings for run in runs if run.seed in plan.tune_seeds]
        if len(settings) == 1 or all(run.is_finished for run in tuning):
            needed |= {run.cell.name for run in select_best(settings, plan.tune_seeds).runs}
    return replace(plan, cells=[cell for cell in plan.cells if cell.name in needed])


# ------------------------------------------------------------------------------------------------ differences


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The loss of `a` minus that of `b` for each seed, in nats per token.

    Where the same seeds selected the settings, `a` is lower only if one of its settings is lower than every setting of
    `b`, at a level divided by the number of settings of `a` (Bonferroni); and the other way round. So the probability
    to call one better by chance is at most the nominal one, whatever the settings have in common, and the interval
    covers the difference between the truly best settings. With one setting on each side it is the paired t-test.
    """

    a: str
    b: str
    by_seed: dict[int, float]  # at the best settings
    samples: list[list[list[float]]]  # [setting of a][setting of b]: the differences of the seeds that both have
    tries: tuple[int, int]

    @property
    def mean(self) -> float:
        """The mean difference of the best settings over the paired seeds."""
        return fmean(self.by_seed.values())

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95% interval of the difference; None with fewer than two seeds, and for a draw."""
        if len(self.by_seed) < 2 or self.is_draw:
            return None
        upper = min(max(_upper_bound(pair, self.tries[0]) for pair in row) for row in self.samples)
        lower = min(max(_upper_bound(pair, self.tries[1]) for pair in row) for row in _mirrored(self.samples))
        return -lower, upper

    def p_lower(self, margin: float = ROUNDING) -> float:
        """The two-sided p-value of `a` being lower than `b` by more than the margin."""
        return _p_below(self.samples, self.tries[0], margin)

    def p_higher(self, margin: float = ROUNDING) -> float:
        """The two-sided p-value of `a` being higher than `b` by more than the margin."""
        return _p_below(_mirrored(self.samples), self.tries[1], margin)

    @property
    def is_draw(self) -> bool:
        """Whether the losses are equal for every seed: both computed the same, or both diverged."""
        return not any(self.by_seed.values())


def _mirrored(samples: list[list[list[float]]]) -> list[list[list[float]]]:
    """The same as seen from the other side: [setting of b][setting of a], with the opposite sign."""
    return [[[-value for value in pair] for pair in column] for column in zip(*samples, strict=True)]


def _upper_bound(values: Sequence[float], tries: int) -> float:
    if len(values) < 2:
        return math.inf
    return fmean(values) + t_quantile(1 - ALPHA / 2 / tries, len(values) - 1) * standard_error(values)


def _p_below(samples: list[list[list[float]]], tries: int, margin: float) -> float:
    return min(1.0, 2 * tries * min(max(p_below(pair, margin) for pair in row) for row in samples))


def difference(a: Best, b: Best) -> Difference | None:
    """The difference of losses paired by seed; None if no seed has finished on both sides.

    The difference of two diverged runs is zero.
    """
    by_seed = _paired(a.runs, b.runs)
    if not by_seed:
        return None
    return Difference(
        a=a.runs[0].label,
        b=b.runs[0].label,
        by_seed=by_seed,
        samples=[[list(_paired(first, second).values()) for second in b.settings] for first in a.settings],
        tries=(a.tries, b.tries),
    )


def _paired(a: Sequence[Result], b: Sequence[Result]) -> dict[int, float]:
    first, second = losses(a), losses(b)
    draws = {r.seed for r in a if r.is_diverged} & {r.seed for r in b if r.is_diverged}
    seeds = sorted(first.keys() & second.keys())
    return {seed: 0.0 if seed in draws else first[seed] - second[seed] for seed in seeds}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A difference at a place, judged as one of all that a report makes."""

    place: Place
    pair: Difference
    p: float | None  # adjusted by Holm's method; None where nothing was tested: equal losses, or a single seed
    detectable: float | None  # the difference that these seeds find with 80% power, at the level that Holm's asks for

    @property
    def verdict(self) -> str:
        """`better` or `worse`, of the first of the pair, or `not decided`."""
        if self.p is None or self.p >= ALPHA:
            return "not decided"
        return "better" if self.pair.p_lower() < self.pair.p_higher() else "worse"


def comparisons(results: Results) -> list[Comparison]:
    """Every two stabilizers at every place, each at its best setting: one family of tests."""
    found = [(place, pair) for place in results.places() for pair in differences_at(results, place)]
    tested = [pair for _, pair in found if not pair.is_draw and len(pair.by_seed) > 1]
    adjusted = holm([min(pair.p_lower(), pair.p_higher()) for pair in tested])
    by_pair = {id(pair): p for pair, p in zip(tested, adjusted, strict=True)}
    # The next pair would need this level.
    level = ALPHA / max(1, sum(p >= ALPHA for p in adjusted))
    return [
        Comparison(place=place, pair=pair, p=by_pair.get(id(pair)), detectable=_detectable(pair, level))
        for place, pair in found
    ]


def _detectable(pair: Difference, level: float) -> float | None:
    if pair.is_draw or len(pair.by_seed) < 2:
        return None
    effect = detectable_effect(len(pair.by_seed), level / max(pair.tries))
    return ROUNDING + effect * stdev(pair.by_seed.values())


def differences_at(results: Results, place: Place) -> list[Difference]:
    """The differences between every two stabilizers at one place, each at its best setting."""
    best = best_settings(results, place)
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
        best = [healthy for found in best_settings(results, place).values() if (healthy := _healthy(found.runs))]
        for a, b in itertools.combinations(best, 2):
            values = list(_paired(a, b).values())
            if any(values):
                pairs.append(values)
    return Noise(of_losses=pooled_deviation(groups), of_differences=pooled_deviation(pairs))


def _healthy(runs: Sequence[Result]) -> list[Result]:
    return [r for r in runs if r.is_healthy]


# ------------------------------------------------------------------------------------------------ over the rates


@dataclass(frozen=True, kw_only=True)
class OverRates:
    """A stabilizer over all learning rates of one attention, at its best setting for each rate."""

    attention: str
    stabilizer: str
    seeds: list[int]  # those with a finished run at every rate; all numbers but the stable rate are theirs
    best_rate: float
    best_loss: float
    best_bits_per_byte: float | None  # the same, where the bytes of the text are known
    best_interval: tuple[float, float] | None  # corrected for the settings and rates from which the best was selected
    is_at_edge: bool  # the best rate is the lowest or the highest that was run: a wider grid may have a better one
    plateau: tuple[float, float]  # the rates around the best one whose loss is within PLATEAU of its
    is_plateau_open: tuple[bool, bool]  # whether it reaches the lowest and the highest rate that was run
    sensitivity: float | None  # None for one rate, missing rates, or rates that are not evenly spaced
    sensitivity_interval: tuple[float, float] | None  # None where the same seeds selected the settings
    largest_stable: float | None
    missing: list[float]  # planned rates at which no run has finished
    cache_bytes: int | None  # of a token in each layer at decode, in bfloat16

    @property
    def plateau_text(self) -> str:
        """`0.01 to ≥ 0.3`, with ≤ or ≥ at the edge of the grid; empty for a single rate."""
        low, high = self.plateau
        if low == high and self.is_plateau_open == (True, True):
            return ""
        marks = ("≤ " if self.is_plateau_open[0] else "", "≥ " if self.is_plateau_open[1] else "")
        return f"{''.join(marks)}{low:g}" if low == high else f"{marks[0]}{low:g} to {marks[1]}{high:g}"


def over_rates(results: Results) -> list[OverRates]:
    """The summary of each attention and stabilizer that has finished runs."""
    entries = []
    for (attention, condition), places in by_attention(results).items():
        best = {place: best_settings(results, place) for place in places}
        for stabilizer in results.stabilizers():
            own = {place.lr: best[place][stabilizer] for place in places if stabilizer in best[place]}
            if any(losses(found.runs) for found in own.values()):
                entries.append(_over_rates(own, f"{attention} {condition}".rstrip(), stabilizer))
    return entries


def _over_rates(best: dict[float, Best], attention: str, stabilizer: str) -> OverRates:
    runs = {lr: found.runs for lr, found in best.items()}
    by_rate = {lr: found for lr, members in sorted(runs.items()) if (found := losses(members))}
    seeds = sorted(set.intersection(*(set(found) for found in by_rate.values())))
    if seeds:
        by_rate = {lr: {seed: found[seed] for seed in seeds} for lr, found in by_rate.items()}
    means = {lr: fmean(found.values()) for lr, found in by_rate.items()}
    rates = list(means)
    best_rate = min(means, key=means.__getitem__)
    low = high = rates.index(best_rate)
    while low > 0 and means[rates[low - 1]] <= means[best_rate] + PLATEAU:
        low -= 1
    while high < len(rates) - 1 and means[rates[high + 1]] <= means[best_rate] + PLATEAU:
        high += 1
    initial = max(r.number("initial_val_loss") or -math.inf for members in runs.values() for r in members)
    each = [lr_sensitivity({lr: found[seed] for lr, found in by_rate.items()}, initial) for seed in seeds]
    missing = sorted(lr for lr in runs if lr not in by_rate)
    # If the rate at which it fails is missing, a stabilizer would seem robust.
    is_complete = not missing and is_evenly_spaced(by_rate)
    return OverRates(
        attention=attention,
        stabilizer=stabilizer,
        seeds=seeds,
        best_rate=best_rate,
        best_loss=means[best_rate],
        best_bits_per_byte=in_bits_per_byte(means[best_rate], runs[best_rate]),
        best_interval=interval_of_selected(list(by_rate[best_rate].values()), sum(best[lr].tries for lr in by_rate)),
        is_at_edge=len(rates) > 1 and best_rate in (rates[0], rates[-1]),
        plateau=(rates[low], rates[high]),
        is_plateau_open=(low == 0, high == len(rates) - 1),
        sensitivity=fmean(each) if each and is_complete else None,
        # Settings that the same seeds selected are too good at each rate, by an unknown amount.
        sensitivity_interval=t_interval(each) if is_complete and all(b.tries == 1 for b in best.values()) else None,
        largest_stable=largest_stable_rate({lr: _are_healthy(members) for lr, members in runs.items()}),
        missing=missing,
        cache_bytes=runs[best_rate][0].cache_bytes,
    )


def _are_healthy(runs: Sequence[Result]) -> bool | None:
    """None if the finished runs are healthy and others have not finished."""
    if any(r.is_finished and not r.is_healthy for r in runs):
        return False
    return True if all(r.is_finished for r in runs) else None


def by_attention(results: Results) -> dict[tuple[str, str], list[Place]]:
    """The places of each attention and condition, by increasing rate."""
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
    logs: list[float]  # of the ratio, by pair

    @property
    def ratio(self) -> float:
        """The geometric mean; below 1 the stabilizer is the faster one."""
        return math.exp(fmean(self.logs))

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95% t interval of the mean logarithm, as ratios."""
        return interval_of_ratios(self.logs)

    def p_lower(self) -> float:
        """The two-sided p-value of a ratio below 1."""
        return min(1.0, 2 * p_below(self.logs))

    def p_higher(self) -> float:
        """The two-sided p-value of a ratio above 1."""
        return min(1.0, 2 * p_below([-value for value in self.logs]))


def speeds(results: Results, against: str = BASELINE) -> list[Speed]:
    """The relative speed of each attention and stabilizer that has completed pairs."""
    entries = []
    for attention in results.attentions():
        members = [r for r in results.results if r.attention == attention and r.status == "completed"]
        reference = _tokens_per_s([r for r in members if r.stabilizer == against])
        for stabilizer in results.stabilizers():
            speed = _tokens_per_s([r for r in members if r.stabilizer == stabilizer])
            logs = [math.log(reference[key] / own) for key, own in speed.items() if key in reference]
            if logs:
                entries.append(
                    Speed(
                        attention=attention,
                        stabilizer=stabilizer,
                        against=against,
                        tokens_per_s=fmean(speed.values()),
                        logs=logs,
                    )
                )
    return entries


def _tokens_per_s(runs: Sequence[Result]) -> dict[tuple[str, float, int], float]:
    """By condition, rate and seed; the settings of one stabilizer are averaged, not counted as separate pairs."""
    measured: dict[tuple[str, float, int], list[float]] = {}
    for run in runs:
        # Without a timed interval a speed includes warm-up; runs of before this was recorded are taken as they are.
        if run.number("timed_tokens") != 0 and (speed := run.number("tokens_per_s")):
            measured.setdefault((run.condition, run.lr, run.seed), []).append(speed)
    return {key: geometric_mean(speeds) for key, speeds in measured.items()}
