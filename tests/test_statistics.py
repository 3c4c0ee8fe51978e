"""Statistics of paired runs, against numbers worked by hand."""

import math
from statistics import fmean, stdev

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quack_lm.report.statistics import (
    bootstrap_interval,
    excludes_zero,
    geometric_mean,
    is_evenly_spaced,
    largest_stable_rate,
    lr_sensitivity,
    pooled_deviation,
    seeds_needed,
)


def test_three_values_have_their_range_at_95_percent_and_less_at_80() -> None:
    values = [0.0, 3.0, 6.0]
    # Each end has 1/27 = 3.7% of the mass: more than 2.5%, less than 10%. The next mean, 1, has 3/27.
    assert bootstrap_interval(values) == (0.0, 6.0)
    assert bootstrap_interval(values, level=0.8) == (1.0, 5.0)


def test_fewer_than_three_values_have_no_interval() -> None:
    assert bootstrap_interval([1.0]) is None
    assert bootstrap_interval([1.0, 3.0]) is None
    assert not excludes_zero(None)


@given(st.lists(st.floats(-5, 5), min_size=3, max_size=9))
def test_an_interval_holds_the_mean_and_stays_within_the_range(values: list[float]) -> None:
    low, high = bootstrap_interval(values) or (math.nan, math.nan)
    assert min(values) - 1e-9 <= low <= fmean(values) + 1e-9
    assert fmean(values) - 1e-9 <= high <= max(values) + 1e-9


def test_many_values_agree_with_the_normal_approximation() -> None:
    values = [math.sin(i * 1.7) for i in range(40)]
    low, high = bootstrap_interval(values) or (0.0, 0.0)
    half = 1.96 * stdev(values) / math.sqrt(40)
    assert low == pytest.approx(fmean(values) - half, abs=0.04)
    assert high == pytest.approx(fmean(values) + half, abs=0.04)


@pytest.mark.parametrize(
    ("interval", "expected"), [((0.1, 0.2), True), ((-0.2, -0.1), True), ((-0.1, 0.1), False), ((0.0, 0.1), False)]
)
def test_a_difference_is_one_when_its_interval_excludes_zero(interval: tuple[float, float], expected: bool) -> None:
    assert excludes_zero(interval) is expected


def test_a_margin_takes_small_differences_for_none() -> None:
    assert excludes_zero((0.02, 0.03), margin=0.01)
    assert not excludes_zero((0.005, 0.03), margin=0.01)
    assert not excludes_zero((-0.03, -0.005), margin=0.01)


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
