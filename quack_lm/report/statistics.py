"""Statistics of paired runs, as pure functions on plain numbers.

Intervals are percentile bootstraps. Up to six values every resample is enumerated, so the result is exact; with three,
the 95% interval is the range of the values, and it misses the median of what they were drawn from one time in four.
"""

import itertools
import math
import random
from collections.abc import Mapping, Sequence
from statistics import fmean, variance

LEVEL = 0.95
EXACT_UP_TO = 6
RESAMPLES = 20_000

# A two-sided test at 5% that finds a true difference four times out of five.
Z_LEVEL, Z_POWER = 1.96, 0.84


def bootstrap_interval(values: Sequence[float], level: float = LEVEL) -> tuple[float, float] | None:
    """The interval of the mean; None for fewer than two values, which say nothing about their spread."""
    n = len(values)
    if n < 2:
        return None
    if n <= EXACT_UP_TO:
        means = sorted(fmean(sample) for sample in itertools.product(values, repeat=n))
    else:
        generator = random.Random(0)
        means = sorted(fmean(generator.choices(values, k=n)) for _ in range(RESAMPLES))
    # The first mean at which the cumulative share passes the tail, from either side.
    skipped = math.floor((1 - level) / 2 * len(means))
    return means[skipped], means[-1 - skipped]


def excludes_zero(interval: tuple[float, float] | None) -> bool:
    """Whether a difference with this interval may be called one."""
    return interval is not None and (interval[0] > 0 or interval[1] < 0)


def pooled_deviation(groups: Sequence[Sequence[float]]) -> float | None:
    """The standard deviation within groups, pooled over those with at least two values."""
    used = [group for group in groups if len(group) > 1]
    freedom = sum(len(group) - 1 for group in used)
    return math.sqrt(sum(variance(group) * (len(group) - 1) for group in used) / freedom) if freedom else None


def seeds_needed(difference: float, deviation: float) -> int:
    """How many paired seeds it takes to find a true difference, given the deviation of paired differences."""
    return max(2, math.ceil(((Z_LEVEL + Z_POWER) * deviation / difference) ** 2))


def lr_sensitivity(losses: Mapping[float, float], initial_loss: float) -> float:
    """Wortsman et al. (arXiv 2309.14322): mean of min(loss, initial loss) over the rates, less the best loss."""
    capped = [min(loss, initial_loss) for loss in losses.values()]
    return fmean(capped) - min(capped)


def largest_stable_rate(is_healthy: Mapping[float, bool]) -> float | None:
    """The largest rate that, like all rates below it, is healthy."""
    stable = None
    for rate in sorted(is_healthy):
        if not is_healthy[rate]:
            break
        stable = rate
    return stable


def geometric_mean(ratios: Sequence[float]) -> float:
    """The mean of ratios that does not care which side is divided by which."""
    return math.exp(fmean(math.log(ratio) for ratio in ratios))
