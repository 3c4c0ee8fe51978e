"""Statistics of paired runs, as pure functions of numbers.

Intervals are percentile bootstraps. For up to six values every resample is enumerated, so the result is exact. For
three, the 95% interval is the range of the values, which misses the median of their distribution one time in four.
"""

import itertools
import math
import random
from collections.abc import Collection, Mapping, Sequence
from statistics import fmean, variance

LEVEL = 0.95
# The bootstrap interval of two values is their range, which misses the median of their distribution half of the time.
FEWEST = 3
EXACT_UP_TO = 6
RESAMPLES = 20_000

# A two-sided test at 5% with 80% power.
Z_LEVEL, Z_POWER = 1.96, 0.84


def bootstrap_interval(values: Sequence[float], level: float = LEVEL) -> tuple[float, float] | None:
    """The interval of the mean; None for fewer than FEWEST values."""
    n = len(values)
    if n < FEWEST:
        return None
    if n <= EXACT_UP_TO:
        means = sorted(fmean(sample) for sample in itertools.product(values, repeat=n))
    else:
        generator = random.Random(0)
        means = sorted(fmean(generator.choices(values, k=n)) for _ in range(RESAMPLES))
    # The first mean at which the cumulative share passes the tail, from either side.
    skipped = math.floor((1 - level) / 2 * len(means))
    return means[skipped], means[-1 - skipped]


def excludes_zero(interval: tuple[float, float] | None, margin: float = 0.0) -> bool:
    """Whether every value in the interval is further from zero than `margin`, all on the same side."""
    return interval is not None and (interval[0] > margin or interval[1] < -margin)


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
