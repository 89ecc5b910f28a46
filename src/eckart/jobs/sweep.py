"""Which learning rates to try: half-decades, until the best one has worse neighbours.

A point is a whole number j and stands for lr = start * 10^(j / 2). What to run next is a
function of the scores so far, so an interrupted search goes on from what is stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Scores = Mapping[int, float]  # point -> validation loss, lower is better; inf where it diverged


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


def lr_at(start: float, point: int) -> float:
    """The learning rate of a point, rounded so that equal points are equal numbers."""
    return float(f"{start * 10 ** (point / 2):.4g}")


def wanted(short: Scores, full: Scores, plan: Plan) -> tuple[list[int], list[int]]:
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


def best(scores: Scores) -> int:
    """The point with the lowest loss; among equals the lowest learning rate."""
    return min(scores, key=lambda j: (scores[j], j))


def at_edge(full: Scores) -> bool:
    """Does the best point lack a neighbour? Then a better one may lie outside."""
    return not {best(full) - 1, best(full) + 1} <= full.keys()
