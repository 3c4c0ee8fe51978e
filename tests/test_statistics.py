"""Statistics of paired runs, against tables, numbers worked by hand, and simulations."""

import itertools
import math
import random
from collections.abc import Callable
from statistics import fmean, stdev

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quack_lm.report.comparison import Difference
from quack_lm.report.statistics import (
    ALPHA,
    LEVEL,
    detectable_effect,
    geometric_mean,
    holm,
    interval_of_selected,
    interval_of_typical,
    is_evenly_spaced,
    largest_stable_rate,
    lr_sensitivity,
    p_below,
    pooled_deviation,
    seeds_needed,
    t_cdf,
    t_interval,
    t_quantile,
    typical,
)

# ------------------------------------------------------------------------------------------------ Student's t


@pytest.mark.parametrize(
    ("probability", "freedom", "quantile"),
    [
        (0.975, 1, 12.706204736),
        (0.975, 2, 4.302652730),
        (0.975, 3, 3.182446305),
        (0.975, 4, 2.776445105),
        (0.975, 7, 2.364624252),
        (0.975, 15, 2.131449546),
        (0.995, 5, 4.032142984),
        (0.95, 30, 1.697260887),
        (0.9995, 2, 31.599054577),
        (0.975, 120, 1.979930405),
        (0.8, 3, 0.978472312),
        (0.5, 9, 0.0),
        (0.025, 4, -2.776445105),
    ],
)
def test_quantiles_of_t_are_those_of_the_tables(probability: float, freedom: int, quantile: float) -> None:
    assert t_quantile(probability, freedom) == pytest.approx(quantile, rel=1e-8, abs=1e-8)
    assert t_cdf(quantile, freedom) == pytest.approx(probability, abs=1e-8)


@given(st.floats(1e-6, 1 - 1e-6), st.integers(1, 60))
def test_the_quantile_inverts_the_distribution(probability: float, freedom: int) -> None:
    assert t_cdf(t_quantile(probability, freedom), freedom) == pytest.approx(probability, abs=1e-12)


def test_the_interval_of_three_values_is_that_of_the_textbook() -> None:
    # 3 with a standard deviation of 3: 4.3027 x 3 / sqrt(3) to either side.
    assert t_interval([0.0, 3.0, 6.0]) == (pytest.approx(3 - 7.452413), pytest.approx(3 + 7.452413))
    assert t_interval([1.0]) is None


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=9), st.floats(0, 1))
def test_the_p_value_is_below_5_percent_where_the_interval_excludes_the_margin(
    values: list[float], margin: float
) -> None:
    low, high = t_interval(values) or (0.0, 0.0)
    if min(abs(high + margin), abs(low - margin)) > 1e-9:
        assert (2 * p_below(values, margin) < ALPHA) == (high < -margin)
        assert (2 * p_below([-v for v in values], margin) < ALPHA) == (low > margin)


def student3(generator: random.Random) -> float:
    """Student's t with 3 degrees of freedom, whose kurtosis is infinite."""
    return generator.gauss() / math.sqrt(sum(generator.gauss() ** 2 for _ in range(3)) / 3)


def coverage(draw: str, n: int, times: int, interval: Callable[[list[float]], tuple[float, float] | None]) -> float:
    generator = random.Random(n)
    covered = 0
    for _ in range(times):
        values = [generator.gauss() if draw == "normal" else student3(generator) for _ in range(n)]
        low, high = interval(values) or (0.0, 0.0)
        covered += low <= 0 <= high
    return covered / times


@pytest.mark.parametrize("draw", ["normal", "heavy tails"])
@pytest.mark.parametrize("n", [3, 5, 8, 16])
@pytest.mark.parametrize("times", [2_000, pytest.param(40_000, marks=pytest.mark.slow)])
def test_an_interval_covers_the_mean_as_often_as_it_says(draw: str, n: int, times: int) -> None:
    assert coverage(draw, n, times, t_interval) > 0.93


@pytest.mark.parametrize("draw", ["normal", "heavy tails"])
@pytest.mark.parametrize("n", [6, 10, 24])
@pytest.mark.parametrize("times", [2_000, pytest.param(40_000, marks=pytest.mark.slow)])
def test_an_interval_by_ranks_covers_the_center_as_often_as_it_says(draw: str, n: int, times: int) -> None:
    assert coverage(draw, n, times, interval_of_typical) > LEVEL - 3 * math.sqrt(ALPHA / times)


def test_the_interval_by_ranks_is_that_of_the_table() -> None:
    # Hollander and Wolfe, table A.4: for 10 values P(T+ >= 47) = 0.024, so that the 9th pair mean from each end bounds.
    values = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0]
    means = sorted((a + b) / 2 for i, a in enumerate(values) for b in values[i:])
    assert typical(values) == means[27]
    assert interval_of_typical(values) == (means[8], means[-9])
    assert interval_of_typical(values[:6]) == (1.0, 32.0)
    assert interval_of_typical(values[:5]) is None


def called_better(n_settings: int, n: int, shared: float, times: int) -> float:
    """How often a stabilizer is called better than one with a single setting, if all settings are equal."""
    generator = random.Random(n)
    better = 0
    for _ in range(times):
        seeds = [generator.gauss(0, shared) for _ in range(n)]
        runs = [[common + generator.gauss() for common in seeds] for _ in range(n_settings + 1)]
        *own, other = runs
        samples = [[[a - b for a, b in zip(setting, other, strict=True)]] for setting in own]
        best = min(samples, key=lambda row: fmean(row[0]))[0]
        pair = Difference(a="a", b="b", by_seed=dict(enumerate(best)), samples=samples, tries=(n_settings, 1))
        better += pair.p_lower(0.0) < ALPHA
        _, high = pair.interval or (0.0, 0.0)
        assert (high < 0) == (pair.p_lower(0.0) < ALPHA)
    return better / times


@pytest.mark.parametrize("n", [3, 5, 8])
@pytest.mark.parametrize("shared", [0.0, 2.0])
@pytest.mark.parametrize("times", [2_000, pytest.param(40_000, marks=pytest.mark.slow)])
def test_four_equal_settings_are_called_better_at_most_at_the_nominal_rate(n: int, shared: float, times: int) -> None:
    # Half of the 5% of the two-sided test, with three standard errors of the simulation.
    nominal = ALPHA / 2
    assert called_better(4, n, shared, times) < nominal + 3 * math.sqrt(nominal / times)


@pytest.mark.parametrize("tries", [1, 3, 12])
@pytest.mark.parametrize("n", [3, 5])
@pytest.mark.parametrize("times", [2_000, pytest.param(40_000, marks=pytest.mark.slow)])
def test_the_interval_of_the_lowest_of_several_covers_its_mean(tries: int, n: int, times: int) -> None:
    generator = random.Random(n)
    covered = 0
    for _ in range(times):
        lowest = min(([generator.gauss() for _ in range(n)] for _ in range(tries)), key=fmean)
        low, high = interval_of_selected(lowest, tries) or (0.0, 0.0)
        covered += low <= 0 <= high
    assert covered / times > LEVEL - 3 * math.sqrt(ALPHA / times)


def test_holms_correction_is_that_of_the_example_worked_by_hand() -> None:
    # In order: 4 x 0.01, 3 x 0.015, 2 x 0.03, 0.04, none smaller than the one before.
    assert holm([0.04, 0.01, 0.03, 0.015]) == pytest.approx([0.06, 0.04, 0.06, 0.045])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize("times", [400, pytest.param(10_000, marks=pytest.mark.slow)])
def test_any_false_call_in_a_family_has_the_nominal_rate(times: int) -> None:
    generator = random.Random(0)
    false = 0
    for _ in range(times):
        stabilizers = [[generator.gauss() for _ in range(5)] for _ in range(5)]
        pairs = [[a - b for a, b in zip(*two, strict=True)] for two in itertools.combinations(stabilizers, 2)]
        p_values = [2 * min(p_below(pair), p_below([-v for v in pair])) for pair in pairs]
        false += min(holm(p_values)) < ALPHA
    assert false / times < ALPHA + 3 * math.sqrt(ALPHA / times)


@pytest.mark.parametrize(("n", "alpha", "effect"), [(10, 0.05, 0.9962), (34, 0.05, 0.4951)])
def test_the_detectable_effect_is_that_of_the_power_tables(n: int, alpha: float, effect: float) -> None:
    assert detectable_effect(n, alpha) == pytest.approx(effect, abs=2e-4)


def test_a_detectable_effect_is_found_four_times_in_five() -> None:
    generator, n, level = random.Random(1), 4, 0.01
    shift = detectable_effect(n, level)
    found = 0
    for _ in range(3000):
        values = [generator.gauss(shift, 1) for _ in range(n)]
        found += abs(fmean(values)) > t_quantile(1 - level / 2, n - 1) * stdev(values) / math.sqrt(n)
    assert found / 3000 == pytest.approx(0.8, abs=0.025)


# ------------------------------------------------------------------------------------------------ over many runs


def test_a_grid_of_rates_is_even_in_the_logarithm_or_it_is_not() -> None:
    assert is_evenly_spaced([0.3, 0.003, 0.03])
    assert is_evenly_spaced([1e-3, 3e-3, 1e-2, 3e-2])
    assert not is_evenly_spaced([1e-3, 1e-2, 2e-2])
    assert not is_evenly_spaced([1e-3])


def test_deviations_are_pooled_by_degrees_of_freedom() -> None:
    # Squares about the means: 2 with one degree of freedom, 2 with two; single values say nothing.
    assert pooled_deviation([[1.0, 3.0], [0.0, 1.0, 2.0], [7.0]]) == pytest.approx(math.sqrt(4 / 3))
    assert pooled_deviation([[1.0], []]) is None


def test_seeds_needed_grow_with_the_square_of_noise_over_difference() -> None:
    # ((1.96 + 0.84) * 1)^2 + 1.96^2 / 2 = 7.84 + 1.92; the tables of the paired t-test say 10, and 34 for half of it.
    assert seeds_needed(1.0, 1.0) == 10
    assert seeds_needed(0.5, 1.0) == 34
    assert seeds_needed(100.0, 1.0) == 2


def test_lr_sensitivity_caps_losses_at_the_initial_one() -> None:
    # (3 + 4 + 6) / 3 - 3
    assert lr_sensitivity({0.001: 3.0, 0.01: 4.0, 0.1: 90.0}, initial_loss=6.0) == pytest.approx(4 / 3)
    assert lr_sensitivity({0.001: 3.0, 0.01: 3.0}, initial_loss=6.0) == 0.0


def test_the_largest_stable_rate_has_only_stable_ones_below_it() -> None:
    assert largest_stable_rate({0.3: True, 0.003: True, 0.03: False}) == 0.003
    assert largest_stable_rate({0.3: True, 0.03: True}) == 0.3
    assert largest_stable_rate({0.03: False, 0.3: True}) is None
    # Nothing is known of 0.03 yet.
    assert largest_stable_rate({0.003: True, 0.03: None, 0.3: True}) == 0.003


def test_a_ratio_and_its_inverse_average_to_one() -> None:
    assert geometric_mean([2.0, 0.5]) == pytest.approx(1.0)
