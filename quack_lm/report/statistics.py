"""Statistics of paired runs, as pure functions of numbers.

Intervals of a mean are Student's t: exact for normal values at every number of seeds, and checked by simulation for
heavier tails. Those of times on a machine, which have outliers, are by ranks. Intervals and tests never pool the
variances of several comparisons: a stabilizer at the edge of its stability varies ten times as much over seeds as one
that is far from it.
"""

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from statistics import NormalDist, fmean, median, variance

LEVEL = 0.95
# Of a test: the largest probability to call equal things different, and the wanted one to find a true difference.
ALPHA, POWER = 1 - LEVEL, 0.8
# The same for a two-sided test at 5%, as quantiles of the normal distribution.
Z_LEVEL, Z_POWER = 1.96, 0.84

_normal = NormalDist().cdf


# ------------------------------------------------------------------------------------------------ Student's t


def t_cdf(t: float, freedom: int) -> float:
    """P(T <= t) for an integer number of degrees of freedom: a finite sum (Abramowitz and Stegun, 26.7.3 and 26.7.4).

    With it no statistics library is needed for one function.
    """
    return 0.5 + 0.5 * _central(math.atan(t / math.sqrt(freedom)), freedom)


def _central(angle: float, freedom: int) -> float:
    """P(|T| <= t), with the sign of t, at angle = atan(t / sqrt(freedom))."""
    sine, cosine = math.sin(angle), math.cos(angle)
    is_odd = freedom % 2
    term, total = (cosine if is_odd else 1.0), 0.0
    for k in range(1 + is_odd, freedom, 2):
        total += term
        term *= cosine * cosine * k / (k + 1)
    return 2 / math.pi * (angle + sine * total) if is_odd else sine * total


@cache
def t_quantile(probability: float, freedom: int) -> float:
    """The t with P(T <= t) = probability, for 0 < probability < 1."""
    low, high = -math.pi / 2, math.pi / 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if 0.5 + 0.5 * _central(middle, freedom) < probability else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def standard_error(values: Sequence[float]) -> float:
    """The standard error of the mean of two values or more."""
    # Not statistics.stdev, which computes with fractions and is a hundred times slower.
    mean, n = fmean(values), len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n)


def t_interval(values: Sequence[float], level: float = LEVEL) -> tuple[float, float] | None:
    """The interval of the mean; None for fewer than two values."""
    if len(values) < 2:
        return None
    half = t_quantile(1 - (1 - level) / 2, len(values) - 1) * standard_error(values)
    return fmean(values) - half, fmean(values) + half


def interval_of_ratios(logs: Sequence[float]) -> tuple[float, float] | None:
    """The t interval of the mean logarithm, as ratios: a ratio and its inverse then have one interval."""
    bounds = t_interval(logs)
    return (math.exp(bounds[0]), math.exp(bounds[1])) if bounds else None


def typical(values: Sequence[float]) -> float:
    """The median of the means of all pairs (Hodges and Lehmann, 1963), which few outliers move."""
    return median(_pair_means(values))


def interval_of_typical(values: Sequence[float], level: float = LEVEL) -> tuple[float, float] | None:
    """What Wilcoxon's signed-rank test does not reject; None for fewer values than the level needs (6 for 95%).

    It covers the center of any symmetric distribution, and is shorter than t's where some values are outliers.
    """
    n = len(values)
    # How many sets of the ranks 1 to n have each sum.
    sets = [1]
    for rank in range(1, n + 1):
        sets = [a + b for a, b in zip(sets + [0] * rank, [0] * rank + sets, strict=True)]
    cut, below = 0, sets[0]
    while below <= (1 - level) / 2 * 2**n:
        cut += 1
        below += sets[cut]
    means = _pair_means(values)
    return (means[cut - 1], means[-cut]) if cut else None


def _pair_means(values: Sequence[float]) -> list[float]:
    return sorted((a + b) / 2 for a, b in itertools.combinations_with_replacement(values, 2))


def interval_of_selected(values: Sequence[float], tries: int) -> tuple[float, float] | None:
    """The interval of the mean of a sample that was selected among several by its mean (Bonferroni).

    All intervals at this level cover their means together, so the selected one does, however it was selected.
    """
    return t_interval(values, 1 - ALPHA / tries)


def p_below(values: Sequence[float], margin: float = 0.0) -> float:
    """The p-value of the one-sided t-test that the mean is below -margin; 1 for fewer than two values."""
    if len(values) < 2:
        return 1.0
    distance, error = fmean(values) + margin, standard_error(values)
    if error == 0:
        return 0.0 if distance < 0 else 1.0
    return t_cdf(distance / error, len(values) - 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values adjusted for their number by Holm's method (1979, Scandinavian Journal of Statistics).

    Calling those below 5% different keeps the probability of any false call in the family at 5%, whatever the
    dependence between the tests.
    """
    adjusted = [1.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


@cache
def detectable_effect(n: int, alpha: float = ALPHA) -> float:
    """The smallest mean, in standard deviations, that a two-sided t-test of n values finds with a power of 80%."""
    freedom = n - 1
    critical = t_quantile(1 - alpha / 2, freedom)
    # The density of s, the estimated over the true standard deviation, at the middles of small intervals.
    width = (1 + 8 / math.sqrt(freedom)) / 2000
    spread = [width * (i + 0.5) for i in range(2000)]
    constant = math.log(2) + freedom / 2 * math.log(freedom / 2) - math.lgamma(freedom / 2)
    weights = [width * math.exp(constant + (freedom - 1) * math.log(s) - freedom * s * s / 2) for s in spread]

    def power(shift: float) -> float:
        tails = (_normal(shift - critical * s) + _normal(-shift - critical * s) for s in spread)
        return sum(weight * tail for weight, tail in zip(weights, tails, strict=True))

    low, high = 0.0, 10.0 + 4 * critical
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if power(middle) < POWER else (low, middle)
    return low / math.sqrt(n)


# ------------------------------------------------------------------------------------------------ over many runs


def pooled_deviation(groups: Sequence[Sequence[float]]) -> float | None:
    """The standard deviation within groups, pooled over those with at least two values."""
    used = [group for group in groups if len(group) > 1]
    freedom = sum(len(group) - 1 for group in used)
    return math.sqrt(sum(variance(group) * (len(group) - 1) for group in used) / freedom) if freedom else None


def seeds_needed(difference: float, deviation: float) -> int:
    """How many paired seeds detect a true difference, given the standard deviation of paired differences.

    For a paired t-test, by the normal approximation and Guenther's correction for it (1981, The American Statistician).
    """
    return math.ceil(((Z_LEVEL + Z_POWER) * deviation / difference) ** 2 + Z_LEVEL**2 / 2)


def lr_sensitivity(losses: Mapping[float, float], initial_loss: float) -> float:
    """Wortsman et al. (arXiv 2309.14322): mean of min(loss, initial loss) over the rates, minus the best loss."""
    capped = [min(loss, initial_loss) for loss in losses.values()]
    return fmean(capped) - min(capped)


def is_evenly_spaced(rates: Collection[float]) -> bool:
    """Whether each rate is about the same multiple of the next lower one, as in 1, 3, 10, 30.

    Only then is a mean over the rates a mean over the logarithm of the rate.
    """
    ordered = sorted(rates)
    steps = [math.log(high / low) for low, high in itertools.pairwise(ordered)]
    return bool(steps) and max(steps) <= 1.25 * min(steps)


def largest_stable_rate(is_healthy: Mapping[float, bool | None]) -> float | None:
    """The largest rate that, like all lower rates, is known (not None) to be healthy; None if there is none."""
    stable = None
    for rate in sorted(is_healthy):
        if not is_healthy[rate]:
            break
        stable = rate
    return stable


def geometric_mean(ratios: Sequence[float]) -> float:
    """The mean of ratios; the mean of their inverses is its inverse."""
    return math.exp(fmean(math.log(ratio) for ratio in ratios))
