"""Candidates of one size: as many trained parameters as the baseline, or as many bytes.

A method's own size field (`Method.size`: a rank, mostly) is set to where the candidate comes
nearest. A size that was typed stays, and so does a method that has none.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any, Literal

from eckart.jobs.lab.candidates import Candidate, workload
from eckart.jobs.lab.lengths import bytes_of
from eckart.jobs.measuring.imagined import elements
from eckart.jobs.measuring.memory import in_words
from eckart.linear import Site
from eckart.recipe import registry
from eckart.recipe.targets import EVERYTHING, select, sites_of

Match = Literal["none", "parameters", "memory"]
NEAR = 0.1  # of the baseline's size: within it a candidate counts as matched
PARTS = 64  # of a size that is a share
REACHED: Mapping[Match, tuple[str, str]] = {  # match -> a run's quantity, and its name
    "none": ("parameters", ""),
    "parameters": ("parameters", "trained parameters"),
    "memory": ("peak_bytes", "peak bytes"),
}


def matched(entered: Sequence[Candidate], match: Match, rows: int) -> list[Candidate]:
    """The candidates, each with the size that comes nearest to the baseline's."""
    if match == "none":
        return list(entered)
    measure = trained if match == "parameters" else partial(peak, rows=rows)
    axes = ("weights",) if match == "parameters" else ("weights", "update")
    target = measure(entered[0])
    return [entered[0], *(sized(c, axes, measure, target) for c in entered[1:])]


def said(entered: Sequence[Candidate], match: Match, rows: int) -> str:
    """What each candidate comes to before anything is trained."""
    if match == "parameters":
        return ", ".join(f"{c.name} {trained(c):,}" for c in entered)
    return ", ".join(f"{c.name} {in_words(peak(c, rows))}" for c in entered)


def outcome(match: Match, reached: Mapping[str, float]) -> str:
    """What was made equal, and who is not, from what was measured: the baseline first."""
    if match == "none":
        return "nothing: each method at its own size"
    target, *_ = reached.values()
    left = [name for name, size in reached.items() if abs(size - target) > NEAR * target]
    by_size = f"{REACHED[match][1]}, by each method's size"
    return by_size + (f"; not {', '.join(left)}" if left else "")


def sized(
    c: Candidate, axes: Sequence[str], measure: Callable[[Candidate], int], target: int
) -> Candidate:
    """The candidate with the size whose measure is nearest to the target."""
    for axis in axes:
        choice = c.job.choices[axis]
        method: Any = choice.method
        if method is not None and method.size in registry.find(choice.name).fields:
            break
    else:
        return c
    slug, field, usual = choice.name, method.size, getattr(method, method.size)
    if f":{field}=" in part_of(c.name, slug):
        return c
    step = 1 / PARTS if isinstance(usual, float) else 1

    @cache
    def at(k: int) -> Candidate:
        made = dataclasses.replace(choice, method=dataclasses.replace(method, **{field: k * step}))
        job = c.job.choose(axis, made, "the size that comes nearest to the baseline's")
        return Candidate(renamed(c.name, slug, f"{field}={k * step:g}"), job)

    most = PARTS if step < 1 else widest(c) if field == "rank" else None
    return at(nearest(lambda k: measure(at(k)), target, most))


def part_of(name: str, slug: str) -> str:
    """The part of a candidate's name that speaks of a method; empty where it is understood."""
    parts = [part for part in name.split("+") if part.split(":")[0].strip() == slug]
    return parts[0] if parts else ""


def renamed(name: str, slug: str, field: str) -> str:
    """The name with one field more: `lora-pro` is `lora:rank=8+lora-pro`."""
    part = part_of(name, slug)
    return name.replace(part, f"{part}:{field}", 1) if part else f"{slug}:{field}+{name}"


def nearest(measure: Callable[[int], int], target: int, most: int | None = None) -> int:
    """The number from 1 to `most` whose measure is nearest to the target.

    The measure may rise or fall with the number, but not turn. Numbers are doubled until the
    target is passed or comes no nearer; then halves are taken.
    """
    known = cache(measure)
    began_above = known(1) > target

    def passed(k: int) -> bool:
        return (known(k) > target) != began_above

    low = high = 1
    while high != most and not passed(high):
        low, high = high, min(2 * high, most or 2 * high)
        if not passed(high) and abs(known(high) - target) >= abs(known(low) - target):
            break
    found = low + bisect_left(range(low, high), True, key=passed)
    return min((1, max(1, found - 1), found), key=lambda k: (abs(known(k) - target), k))


# --- what is measured ----------------------------------------------------------------------


def trained(c: Candidate) -> int:
    """Trained elements by the method's own cost formula."""
    weights: Any = c.job.choices["weights"].method
    return elements(weights, targeted(c))[0]


@cache
def peak(c: Candidate, rows: int) -> int:
    """Bytes of tensors in a step."""
    return bytes_of(c, rows)


def targeted(c: Candidate) -> list[Site]:
    """The places where a candidate's terms would go."""
    sites = sites_of(workload(c.job).model)
    weights: Any = c.job.choices["weights"].method
    words = [t for t in weights.targets if t != EVERYTHING]
    return select(sites, words) if words else sites


def widest(c: Candidate) -> int:
    """The largest rank that any of its matrices can have."""
    return max(min(site.shape) for site in targeted(c))
