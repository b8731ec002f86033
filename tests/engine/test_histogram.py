"""Histograms, against the values they counted."""

import random

import pytest

from vattention.engine.histogram import SECONDS, TOKENS, Histogram


def filled(bounds, *values):
    histogram = Histogram(bounds)
    for value in values:
        histogram.observe(value)
    return histogram


def test_a_value_counts_under_the_first_bound_that_it_does_not_exceed():
    assert filled((1, 2, 5), 0, 1, 1.5, 2, 4, 6, 100).now().counts == (2, 2, 1, 2)


def test_count_and_total_are_those_of_the_values():
    found = filled((1, 2), 0.5, 1.5, 7).now()
    assert found.count == 3
    assert found.total == 9


def test_what_came_since():
    histogram = filled((1, 2), 0.5)
    before = histogram.now()
    histogram.observe(1.5)
    new = histogram.now().since(before)
    assert (new.counts, new.total) == ((0, 1, 0), 1.5)
    assert before.counts == (1, 0, 0)  # frozen


def test_no_values_have_no_quantile():
    assert Histogram((1, 2)).now().quantile(0.5) is None


@pytest.mark.parametrize(("share", "expected"), [(0, 1), (0.25, 1.5), (0.5, 2), (0.75, 3), (1, 4)])
def test_values_are_taken_to_be_spread_evenly_between_bounds(share, expected):
    assert filled((1, 2, 4, 8), 1.5, 1.5, 3, 3).now().quantile(share) == expected


def test_values_above_the_last_bound_count_as_it():
    assert filled((1, 2), 50, 60).now().quantile(0.5) == 2


@pytest.mark.parametrize("share", [0.01, 0.5, 0.9, 0.99])
def test_quantiles_of_times_are_right_to_a_fifth(share):
    chance = random.Random(1)
    values = sorted(chance.lognormvariate(-2, 1.5) for _ in range(5000))
    exact = values[int(share * len(values))]
    assert filled(SECONDS, *values).now().quantile(share) == pytest.approx(exact, rel=0.2)


@pytest.mark.parametrize("bounds", [SECONDS, TOKENS])
def test_bounds_ascend(bounds):
    assert list(bounds) == sorted(set(bounds))
