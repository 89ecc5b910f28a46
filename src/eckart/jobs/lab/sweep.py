"""Learning-rate search on a grid of half-decades, until the best rate has worse neighbours.

A point is an integer j and stands for lr = start * 10^(j / 2). The next points are a function of
the scores so far, so an interrupted search resumes from the stored scores.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from eckart.errors import MissingExtra

Point = TypeVar("Point", int, float)  # int on the grid, float from a sampler
Scores = Mapping[float, float]  # point -> validation loss; inf where it diverged
WIDEST = 4  # points on either side of the start that bound a sampler's range


@dataclass(frozen=True)
class Plan:
    """Settings of a learning-rate search."""

    window: int = 5
    """Points around the start that are always tried."""
    purse: int = 9
    """The most points that are run at full length."""
    share: float = 0.25
    """Length of a short first run as a share of the steps; 1: all runs at full length."""
    keep: int = 2
    """The number of best points of the short runs that are run at full length."""


def lr_at(start: float, point: float) -> float:
    """The learning rate of a point, rounded to 4 digits so that equal points give equal rates."""
    return float(f"{start * 10 ** (point / 2):.4g}")


def next_points(
    short: Mapping[int, float], full: Mapping[int, float], plan: Plan
) -> tuple[list[int], list[int]]:
    """The points to run next: (short runs, full runs). Both empty: the search is finished."""
    side = plan.window // 2
    window = range(-side, plan.window - side)
    if plan.share < 1:
        if looks := [j for j in window if j not in short]:
            return looks, []
        first = sorted(sorted(short, key=lambda j: (short[j], j))[: plan.keep])
    else:
        first = list(window)
    if runs := [j for j in first if j not in full]:
        return [], runs
    around = [j for j in (best(full) - 1, best(full) + 1) if j not in full]
    return [], around[: max(0, plan.purse - len(full))]


def next_sampled(full: Scores, plan: Plan, seed: int) -> list[float]:
    """As `next_points`, by Optuna's tree-structured Parzen estimator: one point, anywhere in range.

    It is a function of the scores so far; every candidate spends the whole purse.
    """
    if len(full) >= plan.purse:
        return []
    try:
        import optuna
    except ModuleNotFoundError as fault:
        raise MissingExtra(
            "--sampler tpe needs optuna", [("optuna", "not installed")],
            "Type pip install 'eckart[sweeps]', or leave --sampler out.",
        ) from fault  # fmt: skip
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(seed=seed + len(full), n_startup_trials=plan.window)
    study = optuna.create_study(sampler=sampler)
    span = optuna.distributions.FloatDistribution(-WIDEST, WIDEST)
    finite = [loss for loss in full.values() if math.isfinite(loss)]
    worst = max(finite, default=0.0) + 1.0
    for point in sorted(full):
        loss = full[point] if math.isfinite(full[point]) else worst
        known = {"params": {"point": point}, "distributions": {"point": span}}
        study.add_trial(optuna.trial.create_trial(value=loss, **known))
    point = study.ask({"point": span}).params["point"]
    return [round(float(point), 2)]


def best(scores: Mapping[Point, float]) -> Point:
    """The point with the lowest loss; ties go to the lowest learning rate."""
    return min(scores, key=lambda j: (scores[j], j))


def at_edge(full: Mapping[Point, float]) -> bool:
    """Is the best point the first or the last? Then a better one may lie outside the range."""
    return best(full) in (min(full), max(full))
