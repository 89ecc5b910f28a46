"""How contestants stand: paired differences to the baseline, and how much a rate matters.

Pure functions of losses by seed and by learning rate; lower is better everywhere. A
difference is positive where the contestant beats the baseline.
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
from eckart.jobs.lab.judge import number
from eckart.jobs.lab.statistics import ALPHA, Difference, difference, holm, seeds_needed
from eckart.jobs.lab.sweep import at_edge, best, lr_at

Standing = Literal["better", "worse", "equivalent", "no difference seen", "no verdict"]
BASIN = 0.05  # of the gain over the untouched model: within it a rate is as good as the best
NEAR_ENOUGH = 0.5  # standard deviations of the baseline over seeds: the default margin


@dataclass
class Record:
    """One contestant's numbers as they come in."""

    name: str
    start: float  # its default learning rate, point 0 of its grid
    scores: dict[Any, dict[int, float]] = field(default_factory=dict)  # point -> seed -> loss
    test: dict[int, float] = field(default_factory=dict)  # seed -> loss
    costs: dict[str, float] = field(default_factory=dict)

    @property
    def means(self) -> dict[Any, float]:
        """Validation loss by point, over the seeds of the selection; inf where one diverged."""
        return {j: sum(by.values()) / len(by) for j, by in self.scores.items() if by}

    @property
    def lr(self) -> float:
        return lr_at(self.start, best(self.means))

    @property
    def edge(self) -> bool:
        return at_edge(self.means)


def margin_of(baseline: Record) -> float:
    """The default margin of equivalence: half the baseline's deviation over seeds."""
    values = list(baseline.test.values())
    return NEAR_ENOUGH * float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def differences(records: Sequence[Record], baseline: Record) -> list[Difference]:
    """Every other contestant's paired differences to the baseline."""
    return [
        difference(
            [baseline.test[s] - r.test[s] for s in sorted(baseline.test)],
            comparisons=len(records),
        )
        for r in records
    ]


def standing(
    d: Difference, p: float, margin: float, edges: Sequence[str] = (), alpha: float = ALPHA
) -> Standing:
    """The verdict on one difference; `p` corrected, `edges` those whose search did not end."""
    if edges or d.seeds < 3:
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
    records: Sequence[Record], untouched: float | None, margin: float | None = None
) -> list[dict[str, Any]]:
    """All contestants, the baseline first, as plain data."""
    baseline, others = records[0], records[1:]
    near = margin_of(baseline) if margin is None else margin
    found = differences(others, baseline)
    corrected = holm([d.p for d in found])
    rows = [row(baseline, baseline, untouched) | {"verdict": "baseline", "difference": None}]
    unlearned = no_gain(baseline, untouched)
    for r, d, p in zip(others, found, corrected, strict=True):
        edges = [x.name for x in (r, baseline) if x.edge]
        verdict = "no verdict" if unlearned else standing(d, p, near, edges)
        reason = f"best learning rate at the edge: {', '.join(edges)}" if edges else ""
        rows.append(
            row(r, baseline, untouched)
            | {
                "verdict": verdict,
                "reason": unlearned or reason,
                "difference": {
                    "mean": number(d.mean),
                    "interval": [number(d.low), number(d.high)],
                    "p": number(d.p),
                    "p_corrected": number(p),
                    "smallest_visible": number(d.visible),
                    "seeds_for_the_margin": needed(d, near, len(others)),
                },
            }
        )
    return rows


def no_gain(baseline: Record, untouched: float | None) -> str:
    """The control: why nothing can be compared where the baseline learned nothing."""
    if untouched is None:
        return ""
    gain = difference([untouched - loss for loss in baseline.test.values()])
    learned = gain.verdict() == "confirmed"
    return "" if learned else f"{baseline.name} is not seen to improve on the untouched model"


def needed(d: Difference, margin: float, comparisons: int) -> int | None:
    """Seeds with which a difference as large as the margin would have been seen."""
    if not (d.sd > 0 and margin > 0):
        return None
    return seeds_needed(margin, d.sd, ALPHA / comparisons)


def row(r: Record, baseline: Record, untouched: float | None) -> dict[str, Any]:
    """A contestant's own facts."""
    values = [r.test[s] for s in sorted(r.test)]
    means = r.means
    return {
        "name": r.name,
        "lr": r.lr,
        "default_lr": r.start,
        "at_edge": r.edge,
        "trials": sum(len(by) for by in r.scores.values()) + len(values),
        "lr_curve": [
            {
                "lr": lr_at(r.start, j),
                "mean": number(means[j]),
                "values": [number(r.scores[j][s]) for s in sorted(r.scores[j])],
            }
            for j in sorted(means)
        ],
        "basin_decades": number(basin(means, untouched)),
        "regret_at_default_lr": number(regret(r, r.start)),
        "regret_at_baseline_lr": number(regret(r, baseline.lr)),
        "expected_after_trials": [number(x) for x in budget_curve(list(means.values()))],
        "test": {
            "mean": number(sum(values) / len(values)),
            "sd": number(float(np.std(values, ddof=1)) if len(values) > 1 else math.nan),
            "values": [number(v) for v in values],
        },
    }


def basin(means: Mapping[Any, float], untouched: float | None) -> float:
    """Decades of learning rate within 5 % of the best gain; NaN without a start to gain over.

    Between the points in a row with the best that are within it, and half a decade for the
    best itself: a basin of one point is as wide as the grid is fine.
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
    """Loss at the tried rate nearest to this one, above the best; NaN where none is near."""
    tried = {lr_at(r.start, j): loss for j, loss in r.means.items()}
    near = min(tried, key=lambda x: abs(math.log10(x / lr)))
    close = abs(math.log10(near / lr)) < 0.25  # another grid's rates are as near as that
    return tried[near] - r.means[best(r.means)] if close else math.nan


def budget_curve(losses: Sequence[float]) -> list[float]:
    """The expected best of k learning rates drawn from those tried, for k = 1 to all of them.

    Draws with replacement: E_k = sum_i v_i ((1 - (i-1)/N)^k - (1 - i/N)^k), v ascending. A rate
    that diverged is a nat worse than all others; nothing is expected where every one did.
    """
    finite = [x for x in losses if math.isfinite(x)]
    if not finite:
        return []
    v = sorted(finite) + [max(finite) + WORST] * (len(losses) - len(finite))
    n = len(v)
    return [
        sum(x * ((1 - i / n) ** k - (1 - (i + 1) / n) ** k) for i, x in enumerate(v))
        for k in range(1, n + 1)
    ]


def ranking(records: Sequence[Record]) -> dict[str, Any]:
    """How stable the order is over seeds: mean rank, times first, mean Kendall tau of pairs."""
    seeds = sorted(records[0].test)
    ranks = np.array([stats.rankdata([r.test[s] for r in records]) for s in seeds])
    taus = [stats.kendalltau(a, b).statistic for a, b in combinations(ranks, 2)]
    known = [float(t) for t in taus if math.isfinite(t)]
    return {
        "mean_rank": {r.name: number(float(ranks[:, i].mean())) for i, r in enumerate(records)},
        "times_first": {r.name: int((ranks[:, i] == 1).sum()) for i, r in enumerate(records)},
        "kendall_tau": number(sum(known) / len(known)) if known else None,
        "seeds": len(seeds),
    }
