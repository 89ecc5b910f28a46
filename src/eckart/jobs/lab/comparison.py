"""Compares candidates: paired differences to the baseline, and sensitivity to the learning rate.

Pure functions of a metric by seed and by learning rate. Internally every metric is a loss (lower
is better); results hold the metric itself, and a difference is positive where the candidate
beats the baseline.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, Literal

import numpy as np
from scipy import stats

from eckart.jobs.lab.bare_loop import WORST
from eckart.jobs.lab.statistics import ALPHA, Difference, difference, holm, seeds_needed
from eckart.jobs.lab.sweep import at_edge, best, lr_at
from eckart.jobs.lab.verdicts import number
from eckart.jobs.training.held_out import RISING

Verdict = Literal["better", "worse", "equivalent", "no difference seen", "no verdict"]
BASIN = 0.05  # share of the gain over the initial model that a rate in the basin may lose
FEWEST = 3  # seeds that a verdict needs
NEAR_ENOUGH = 0.5  # standard deviations of the baseline over seeds: the default margin


@dataclass
class Record:
    """One candidate's results so far, all converted by `as_loss`."""

    name: str
    start: float  # its default learning rate, point 0 of its grid
    scores: dict[Any, dict[int, float]] = field(default_factory=dict)  # point -> seed -> loss
    test: dict[str, dict[int, float]] = field(default_factory=dict)  # metric -> seed -> loss
    costs: dict[str, float] = field(default_factory=dict)

    @property
    def means(self) -> dict[Any, float]:
        """Mean validation loss by point of the grid; inf where a seed diverged."""
        return {j: sum(by.values()) / len(by) for j, by in self.scores.items() if by}

    @property
    def lr(self) -> float:
        return lr_at(self.start, best(self.means))

    @property
    def edge(self) -> bool:
        return at_edge(self.means)


def as_loss(metric: str, value: float) -> float:
    """The metric's value, negated where higher is better. Applying it twice gives the value."""
    return 0.0 - value if metric in RISING else value


def margin_of(losses: Mapping[int, float]) -> float:
    """The default equivalence margin: half the baseline's standard deviation over seeds."""
    values = list(losses.values())
    return NEAR_ENOUGH * float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def differences(
    records: Sequence[Record], baseline: Record, metric: str
) -> list[tuple[Difference, float]]:
    """Each record's paired difference to the baseline, and its p-value corrected by Holm."""
    losses = baseline.test[metric]
    found = [
        difference(
            [losses[s] - r.test[metric][s] for s in sorted(losses)], comparisons=len(records)
        )
        for r in records
    ]
    return list(zip(found, holm([d.p for d in found]), strict=True))


def verdict_on(
    d: Difference, p: float, margin: float, edges: Sequence[str] = (), alpha: float = ALPHA
) -> Verdict:
    """The verdict on one difference.

    `p` is corrected; `edges` names candidates whose best learning rate lies at the grid's edge.
    """
    if edges or d.seeds < FEWEST:
        return "no verdict"
    side = d.verdict(p, alpha)
    if side == "confirmed" and d.mean > margin:
        return "better"
    if side == "refuted" and d.mean < -margin:
        return "worse"
    if -margin <= d.low and d.high <= margin:
        return "equivalent"
    return "no difference seen"


def table(
    records: Sequence[Record],
    untouched: float | None,
    margin: float | None = None,
    metric: str = "loss",
) -> list[dict[str, Any]]:
    """One row of plain data per candidate, the baseline first.

    Verdicts are by `metric`; the other metrics are reported too. `untouched` is the metric
    before training.
    """
    baseline, others = records[0], records[1:]
    start = None if untouched is None else as_loss(metric, untouched)
    margins = {name: margin_of(losses) for name, losses in baseline.test.items()}
    margins |= {} if margin is None else {metric: margin}
    compared = {name: differences(others, baseline, name) for name in baseline.test}
    unlearned = no_gain(baseline, start, metric)
    itself = difference_facts(difference([]), math.nan, math.nan, 1)  # all null
    rows = [row(baseline, baseline, start, metric)]
    rows[0] |= {"verdict": "baseline", "reason": "", "differences": dict.fromkeys(margins, itself)}
    for i, r in enumerate(others):
        edges = [x.name for x in (r, baseline) if x.edge]
        reason = f"best learning rate at the edge: {', '.join(edges)}" if edges else ""
        if len(r.test[metric]) < FEWEST:
            reason = f"fewer than {FEWEST} seeds"
        verdict = verdict_on(*compared[metric][i], margins[metric], edges)
        told = {
            name: difference_facts(*found[i], margins[name], len(others))
            for name, found in compared.items()
        }
        rows.append(
            row(r, baseline, start, metric)
            | {
                "verdict": "no verdict" if unlearned else verdict,
                "reason": unlearned or reason,
                "differences": told,
            }
        )
    return rows


def difference_facts(d: Difference, p: float, margin: float, comparisons: int) -> dict[str, Any]:
    """One paired difference as plain data; `p` is the corrected p-value."""
    return {
        "mean": number(d.mean),
        "interval": [number(d.low), number(d.high)],
        "p": number(d.p),
        "p_corrected": number(p),
        "smallest_visible": number(d.visible),
        "seeds_for_the_margin": needed(d, margin, comparisons),
    }


def no_gain(baseline: Record, untouched: float | None, metric: str) -> str:
    """The positive control: a reason where the baseline did not learn, else an empty string."""
    if untouched is None:
        return ""
    gain = difference([untouched - loss for loss in baseline.test[metric].values()])
    learned = gain.verdict() == "confirmed"
    return "" if learned else f"{baseline.name} is not seen to improve on the untouched model"


def needed(d: Difference, margin: float, comparisons: int) -> int | None:
    """The number of seeds needed to detect a difference as large as the margin."""
    if not (d.sd > 0 and margin > 0):
        return None
    return seeds_needed(margin, d.sd, ALPHA / comparisons)


def row(r: Record, baseline: Record, untouched: float | None, metric: str) -> dict[str, Any]:
    """A candidate's own results, without its comparison to the baseline."""
    means = r.means
    most = as_loss(metric, 0.0) if metric in RISING else math.inf  # a loss has no upper bound

    def shown(loss: float) -> float | None:
        return number(as_loss(metric, loss))

    return {
        "name": r.name,
        "lr": r.lr,
        "default_lr": r.start,
        "at_edge": r.edge,
        "trials": sum(len(by) for by in (*r.scores.values(), r.test[metric])),
        "lr_curve": [
            {
                "lr": lr_at(r.start, j),
                "mean": shown(means[j]),
                "values": [shown(r.scores[j][s]) for s in sorted(r.scores[j])],
            }
            for j in sorted(means)
        ],
        "basin_decades": number(basin(means, untouched)),
        "regret_at_default_lr": number(regret(r, r.start)),
        "regret_at_baseline_lr": number(regret(r, baseline.lr)),
        "expected_after_trials": [shown(x) for x in expected_best(list(means.values()), most)],
        "test": {name: over_seeds(name, losses) for name, losses in r.test.items()},
    }


def over_seeds(metric: str, losses: Mapping[int, float]) -> dict[str, Any]:
    """A metric on test rows: mean with interval, standard deviation, value of each seed."""
    values = [as_loss(metric, losses[s]) for s in sorted(losses)]
    found = difference(values)
    return {
        "mean": number(found.mean),
        "sd": number(found.sd),
        "interval": [number(found.low), number(found.high)],
        "values": [number(v) for v in values],
    }


def basin(means: Mapping[Any, float], untouched: float | None) -> float:
    """Decades of learning rate that reach at least 95 % of the best gain; NaN without `untouched`.

    Counts the contiguous points around the best one, half a decade each.
    """
    top = best(means)
    if untouched is None or not untouched > means[top]:
        return math.nan
    limit = means[top] + BASIN * (untouched - means[top])
    points = sorted(means)
    low = high = points.index(top)
    while low > 0 and means[points[low - 1]] <= limit:
        low -= 1
    while high < len(points) - 1 and means[points[high + 1]] <= limit:
        high += 1
    return (points[high] - points[low] + 1) / 2


def regret(r: Record, lr: float) -> float:
    """Excess loss over the best at the tried rate nearest to `lr`; NaN where none is near."""
    tried = {lr_at(r.start, j): loss for j, loss in r.means.items()}
    near = min(tried, key=lambda x: abs(math.log10(x / lr)))
    close = abs(math.log10(near / lr)) < 0.25  # half the spacing of the grid, in decades
    return tried[near] - r.means[best(r.means)] if close else math.nan


def expected_best(losses: Sequence[float], most: float = math.inf) -> list[float]:
    """The expected best loss of k learning rates drawn from those tried, for k = 1 to all of them.

    Draws with replacement: E_k = sum_i v_i ((1 - (i-1)/N)^k - (1 - i/N)^k), v ascending. A rate
    that diverged counts as the worst loss plus `WORST`, at most `most`. Empty where all diverged.
    """
    finite = [x for x in losses if math.isfinite(x)]
    if not finite:
        return []
    v = sorted(finite) + [min(most, max(finite) + WORST)] * (len(losses) - len(finite))
    n = len(v)
    return [
        sum(x * ((1 - i / n) ** k - (1 - (i + 1) / n) ** k) for i, x in enumerate(v))
        for k in range(1, n + 1)
    ]


def ranking(records: Sequence[Record], metric: str = "loss") -> dict[str, Any]:
    """Stability of the ranking over seeds: mean rank, times first, mean pairwise Kendall tau."""
    seeds = sorted(records[0].test[metric])
    ranks = np.array([stats.rankdata([r.test[metric][s] for r in records]) for s in seeds])
    taus = [stats.kendalltau(a, b).statistic for a, b in combinations(ranks, 2)]
    known = [float(t) for t in taus if math.isfinite(t)]
    return {
        "mean_rank": {r.name: number(float(ranks[:, i].mean())) for i, r in enumerate(records)},
        "times_first": {r.name: int((ranks[:, i] == 1).sum()) for i, r in enumerate(records)},
        "kendall_tau": number(sum(known) / len(known)) if known else None,
        "seeds": len(seeds),
    }
