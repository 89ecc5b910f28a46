"""Verdicts, learning-rate statistics and rankings on known numbers."""

import math

import numpy as np
import pytest

from eckart.jobs.lab import comparison, statistics
from eckart.jobs.lab.comparison import Record, basin, expected_best, ranking, regret, table


@pytest.fixture(autouse=True)
def fewer_draws(monkeypatch):
    monkeypatch.setattr(statistics, "DRAWS", 200)


def record(name, losses, optimum=0, start=1e-3, level=3.0):
    """A record with a parabola over learning rates and these test losses."""
    points = range(optimum - 2, optimum + 3)
    scores = {j: {0: level + 0.1 * (j - optimum) ** 2} for j in points}
    return Record(name, start, scores, {"loss": dict(enumerate(losses))}, {})


def by_chance(rng, effects, seeds=5, luck=1.0, noise=0.1):
    """Records whose losses share a random effect of the seed, plus noise and their own effect."""
    shared = luck * rng.standard_normal(seeds)
    return [
        record(f"m{i}", 3.0 + shared - effect + noise * rng.standard_normal(seeds))
        for i, effect in enumerate(effects)
    ]


def verdicts(records, **options):
    return [row["verdict"] for row in table(records, 10.0, **options)]


def test_the_same_method_against_itself_is_called_different_in_at_most_one_of_twenty():
    rng, tables = np.random.default_rng(1), 300
    found = [verdicts(by_chance(rng, [0, 0, 0, 0]))[1:] for _ in range(tables)]
    wrong = sum(bool({"better", "worse"} & set(row)) for row in found)
    assert wrong / tables <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / tables)
    said = [v for row in found for v in row]
    assert said.count("no difference seen") + said.count("equivalent") > 0.9 * len(said)


def test_planted_differences_are_found_and_named_by_their_sign():
    rng = np.random.default_rng(2)
    found = [verdicts(by_chance(rng, [0, 1.5, -1.5, 0]), margin=0.3)[1:] for _ in range(40)]
    columns = list(zip(*found, strict=True))
    assert columns[0].count("better") >= 38 and columns[1].count("worse") >= 38
    assert columns[2].count("better") + columns[2].count("worse") <= 3


def test_a_narrow_interval_inside_the_margin_is_equivalent():
    rng = np.random.default_rng(3)
    assert verdicts(by_chance(rng, [0, 0], noise=0.01), margin=0.5)[1] == "equivalent"


def test_a_difference_below_the_margin_is_not_called_better():
    rng = np.random.default_rng(3)
    assert verdicts(by_chance(rng, [0, 0.1], noise=0.01), margin=0.5)[1] == "equivalent"
    assert verdicts(by_chance(rng, [0, 0.1], noise=0.01), margin=0.05)[1] == "better"


def test_without_a_gain_of_the_baseline_nothing_is_compared():
    rng = np.random.default_rng(4)
    rows = table(by_chance(rng, [0, 2.0]), untouched=3.0)
    assert rows[1]["verdict"] == "no verdict"
    assert rows[1]["reason"] == "m0 is not seen to improve on the untouched model"


def test_a_best_rate_at_the_edge_is_no_verdict():
    a, b = by_chance(np.random.default_rng(5), [0, 2.0])
    b.scores = {j: {0: 3.0 - j} for j in range(-2, 3)}
    row = table([a, b], 10.0)[1]
    assert (row["verdict"], row["reason"]) == ("no verdict", "best learning rate at the edge: m1")


def test_two_seeds_are_no_verdict():
    a, b = by_chance(np.random.default_rng(5), [0, 5.0], seeds=2, noise=0.0)
    row = table([a, b], 10.0)[1]
    assert (row["verdict"], row["reason"]) == ("no verdict", "fewer than 3 seeds")


def test_a_method_that_is_another_with_its_rate_relabelled_is_equal():
    losses = [3.0, 3.1, 2.9, 3.05, 3.2]
    a, b = record("a", losses), record("b", losses, start=1e-2, optimum=-2)
    row = table([a, b], 10.0, margin=0.1)[1]
    assert row["lr"] == 1e-3 and row["verdict"] == "equivalent"
    assert row["regret_at_default_lr"] == pytest.approx(0.4) and row["regret_at_baseline_lr"] == 0


def test_the_order_of_methods_and_seeds_changes_no_number():
    rng = np.random.default_rng(6)
    a, b, c = by_chance(rng, [0, 0.3, -0.3])
    rows = {row["name"]: row for row in table([a, b, c], 10.0)}
    for r in (a, b, c):
        r.test["loss"] = dict(reversed(r.test["loss"].items()))
        r.scores = dict(reversed(r.scores.items()))
    again = {row["name"]: row for row in table([a, c, b], 10.0)}
    assert rows == again


def test_a_diverged_rate_counts_as_the_worst():
    r = record("a", [3.0, 3.1])
    r.scores[3] = {0: math.inf}
    assert r.lr == 1e-3 and r.means[3] == math.inf
    assert basin(r.means, 10.0) < math.inf


def test_the_expected_best_of_k_by_hand():
    # one of 1, 2, 4 at random: 7/3. The better of two draws: (5 * 1 + 3 * 2 + 1 * 4) / 9
    assert expected_best([4.0, 1.0, 2.0])[:2] == pytest.approx([7 / 3, 15 / 9], rel=1e-12)
    values = expected_best(list(np.random.default_rng(7).random(9)))
    assert all(a >= b for a, b in zip(values, values[1:], strict=False))
    # 2, and a diverged rate a nat above it: either at random, then both only in one of four pairs
    assert expected_best([math.inf, 2.0]) == [2.5, 2.25] and expected_best([math.inf]) == []


def test_the_basin_is_measured_in_decades():
    flat = {-2: 5.0, -1: 2.01, 0: 2.0, 1: 2.04, 2: 4.0}
    assert basin(flat, 3.0) == 1.5  # 5 % of the gain of 1 is 0.05: three points
    assert math.isnan(basin(flat, None))


def test_regret_outside_the_grid_is_unknown():
    r = record("a", [3.0])
    assert regret(r, 1e-3) == 0 and math.isnan(regret(r, 1.0))


def test_a_ranking_is_stable_where_the_order_is():
    rng = np.random.default_rng(8)
    found = ranking(by_chance(rng, [0, 5.0, 10.0]))
    assert found["kendall_tau"] == 1.0 and found["times_first"] == {"m0": 0, "m1": 0, "m2": 5}
    loose = ranking(by_chance(rng, [0, 0, 0], seeds=40))
    assert abs(loose["kendall_tau"]) < 0.2


def test_the_default_margin_is_half_the_baselines_deviation():
    r = record("a", [1.0, 2.0, 3.0])
    assert comparison.margin_of(r.test["loss"]) == 0.5


def test_a_metric_of_which_more_is_better_is_chosen_by_the_same_rules():
    """Accuracies are compared as negated losses, and reported as accuracies."""
    rng = np.random.default_rng(9)
    a, b = by_chance(rng, [0, 1.5])
    losses = table([a, b], 10.0, margin=0.3)
    for r in (a, b):
        r.test["accuracy"] = r.test["loss"]
    shares = table([a, b], -10.0, margin=0.3, metric="accuracy")
    for one, other in zip(losses, shares, strict=True):
        assert one["verdict"] == other["verdict"] and one["lr"] == other["lr"]
        assert one["differences"]["loss"] == other["differences"]["accuracy"]
        assert one["test"]["loss"] == other["test"]["loss"]  # told beside it
        assert one["test"]["loss"]["mean"] == -other["test"]["accuracy"]["mean"]
        assert [p["mean"] for p in one["lr_curve"]] == [-p["mean"] for p in other["lr_curve"]]
        assert one["basin_decades"] == other["basin_decades"]


def test_where_a_rate_diverged_nothing_is_right_and_no_share_is_below_none():
    assert expected_best([math.inf, -0.8], most=0.0) == pytest.approx([-0.4, -0.6])
