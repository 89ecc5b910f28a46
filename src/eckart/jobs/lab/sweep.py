"""Which learning rates to try: half-decades, until the best one has worse neighbours.

A point is a whole number j and stands for lr = start * 10^(j / 2). What to run next is a
function of the scores so far, so an interrupted search goes on from what is stored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from eckart.errors import MissingExtra

Point = TypeVar("Point", int, float)  # whole on the grid, any number from a sampler
Scores = Mapping[float, float]  # point -> validation loss, lower is better; inf: it diverged
WIDEST = 4  # points to either side of the start, where a sampler may look


@dataclass(frozen=True)
class Plan:
    """How a learning rate is searched."""

    window: int = 5
    """Points around the start that are tried in any case."""
    purse: int = 9
    """Points at full length at most."""
    share: float = 0.25
    """Length of a first look as a share of the steps; 1: all points at full length."""
    keep: int = 2
    """Points that a first look leaves for full length."""


def lr_at(start: float, point: float) -> float:
    """The learning rate of a point, rounded so that equal points are equal numbers."""
    return float(f"{start * 10 ** (point / 2):.4g}")


def next_points(
    short: Mapping[int, float], full: Mapping[int, float], plan: Plan
) -> tuple[list[int], list[int]]:
    """The points to run next: in short, at full length. Nothing twice: the search is over."""
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
    """The point with the lowest loss; among equals the lowest learning rate."""
    return min(scores, key=lambda j: (scores[j], j))


def at_edge(full: Mapping[Point, float]) -> bool:
    """Is the best point the first or the last? Then a better one may lie outside."""
    return best(full) in (min(full), max(full))
