"""Planted differences are found and planted ties are not, at the stated rates."""

import math
import warnings

import numpy as np
import pytest
from scipy import stats

from eckart.jobs.lab import statistics
from eckart.jobs.lab.statistics import difference, holm, power, seeds_needed, visible

TABLES = 600
# The share of errors in 600 tables is known to 2 * sqrt(.05 * .95 / 600) = 0.018.
MOST = 0.05 + 0.018


@pytest.fixture(autouse=True)
def fewer_draws(monkeypatch):
    monkeypatch.setattr(statistics, "DRAWS", 200)  # intervals to the second digit, in seconds


def experiments(rng, effect, seeds, noise=lambda rng, n: rng.standard_normal(n)):
    """Differences within seeds: large effects of the seed cancel and small noise remains."""
    luck = 5 * rng.standard_normal(seeds)
    return (luck + effect + noise(rng, seeds)) - (luck + noise(rng, seeds))


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("noise", ["normal", "skewed", "heavy"])
def test_ties_are_called_differences_in_at_most_one_of_twenty(seeds, noise):
    draws = {
        "normal": lambda rng, n: rng.standard_normal(n),
        "skewed": lambda rng, n: rng.exponential(size=n),
        "heavy": lambda rng, n: rng.standard_t(3, size=n),
    }[noise]
    rng = np.random.default_rng(1)
    found = [difference(experiments(rng, 0.0, seeds, draws)).verdict() for _ in range(TABLES)]
    assert sum(v != "not seen" for v in found) / TABLES <= MOST


def test_the_bootstrap_alone_would_call_a_quarter_of_ties_differences():
    rng = np.random.default_rng(2)
    called = 0
    for _ in range(TABLES):
        low, high = statistics.bootstrap_interval(rng.standard_normal(3))
        called += low > 0 or high < 0
    assert called / TABLES > 0.2


def test_a_difference_of_the_visible_size_is_found_in_four_of_five():
    rng, seeds = np.random.default_rng(3), 5
    size = visible(math.sqrt(2), seeds)  # sd of a difference of two unit noises
    found = [difference(experiments(rng, size, seeds)).verdict() for _ in range(TABLES)]
    # 0.8 within 2 * sqrt(.8 * .2 / 600) = 0.033
    assert abs(found.count("confirmed") / TABLES - 0.8) < 0.034 and "refuted" not in found


def test_a_difference_the_other_way_is_refuted():
    rng = np.random.default_rng(4)
    found = [difference(experiments(rng, -8.0, 5)).verdict() for _ in range(50)]
    assert found.count("refuted") >= 48


def test_families_of_ties_err_in_at_most_one_of_twenty_after_holm():
    rng, arms = np.random.default_rng(5), 6
    wrong, families = 0, 300  # so the share is known to 0.025
    for _ in range(families):
        family = [difference(rng.standard_normal(5)) for _ in range(arms)]
        corrected = holm([d.p for d in family])
        wrong += any(d.verdict(p) != "not seen" for d, p in zip(family, corrected, strict=True))
    assert wrong / families <= 0.075


def test_without_holm_the_same_families_err_far_more_often():
    rng = np.random.default_rng(5)
    wrong = sum(
        any(difference(rng.standard_normal(5)).verdict() != "not seen" for _ in range(6))
        for _ in range(200)
    )
    assert wrong / 200 > 0.15


def test_holm_by_hand():
    # sorted .01 .02 .04 .3: times 4, 3, 2, 1, and never falling
    assert holm([0.04, 0.01, 0.3, 0.02]) == pytest.approx([0.08, 0.04, 0.3, 0.06], rel=1e-12)
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    with_nan = holm([0.01, math.nan])
    assert with_nan[0] == 0.02 and math.isnan(with_nan[1])


def test_the_interval_is_students_by_hand_where_that_is_wider():
    values = [1.0, 2.0, 4.0]
    d = difference(values)
    half = stats.t.ppf(0.975, 2) * np.std(values, ddof=1) / math.sqrt(3)
    assert (d.low, d.high) == pytest.approx((7 / 3 - half, 7 / 3 + half), rel=1e-12)
    assert d.p == pytest.approx(stats.ttest_1samp(values, 0).pvalue, rel=1e-12)


def test_the_order_of_seeds_changes_no_bit():
    values = list(np.random.default_rng(6).standard_normal(7))
    a, b = difference(values), difference(values[::-1])
    assert (a.low, a.high) == (b.low, b.high) or math.isclose(a.low, b.low, rel_tol=1e-15)


def test_equal_numbers_are_exact():
    d = difference([3.0, 3.0, 3.0])
    assert (d.low, d.high, d.p, d.visible, d.verdict()) == (3.0, 3.0, 0.0, 0.0, "confirmed")
    assert difference([0.1 + 0.2 - 0.3 + 2, 2.0, 2.0]).sd == 0.0  # rounding is no noise
    assert difference([0.0, 0.0]).verdict() == "not seen"


def test_a_number_that_is_missing_is_no_verdict():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert difference([1.0, math.nan, 1.0]).verdict() == "not seen"
        assert difference([1.0]).verdict() == "not seen"


def test_power_and_what_can_be_seen_agree():
    assert power(0.0, 1.0, 5) == pytest.approx(0.05, abs=1e-9)
    assert power(visible(0.7, 4, 0.01), 0.7, 4, 0.01) == pytest.approx(0.8, abs=1e-9)
    n = seeds_needed(1.0, 1.0)
    assert power(1.0, 1.0, n) >= 0.8 > power(1.0, 1.0, n - 1)
