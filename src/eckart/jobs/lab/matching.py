"""Matches candidates to the baseline's number of trained parameters, or its peak memory.

Sets a method's size field (`Method.size`, mostly a rank) to the value that comes nearest. A size
given on the command line, and a method without a size field, stay as they are.
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
NEAR = 0.1  # relative difference to the baseline up to which a candidate counts as matched
PARTS = 64  # steps between 0 and 1 for a size that is a fraction
REACHED: Mapping[Match, tuple[str, str]] = {  # match -> a run's quantity, and its name in messages
    "none": ("parameters", ""),
    "parameters": ("parameters", "trained parameters"),
    "memory": ("peak_bytes", "peak bytes"),
}


def matched(entered: Sequence[Candidate], match: Match, rows: int) -> list[Candidate]:
    """The candidates, each resized to come nearest to the baseline; `rows` in a batch."""
    if match == "none":
        return list(entered)
    measure = trained if match == "parameters" else partial(peak, rows=rows)
    axes = ("weights",) if match == "parameters" else ("weights", "update")
    target = measure(entered[0])
    return [entered[0], *(resized(c, axes, measure, target) for c in entered[1:])]


def summary(entered: Sequence[Candidate], match: Match, rows: int) -> str:
    """Each candidate's estimated size, in words."""
    if match == "parameters":
        return ", ".join(f"{c.name} {trained(c):,}" for c in entered)
    return ", ".join(f"{c.name} {in_words(peak(c, rows))}" for c in entered)


def outcome(match: Match, reached: Mapping[str, float]) -> str:
    """What was matched and which candidates are not, in words.

    `reached` has measured sizes by name, the baseline first.
    """
    if match == "none":
        return "nothing: each method at its own size"
    target, *_ = reached.values()
    left = [name for name, size in reached.items() if abs(size - target) > NEAR * target]
    by_size = f"{REACHED[match][1]}, by each method's size"
    return by_size + (f"; not {', '.join(left)}" if left else "")


def resized(
    c: Candidate, axes: Sequence[str], measure: Callable[[Candidate], int], target: int
) -> Candidate:
    """The candidate with its size field set so that `measure` is nearest to the target."""
    for axis in axes:
        choice = c.job.choices[axis]
        method: Any = choice.method
        if method is not None and method.size in registry.find(choice.name).fields:
            break
    else:
        return c
    slug, field, usual = choice.name, method.size, getattr(method, method.size)
    if f":{field}=" in part_for(c.name, slug):
        return c
    step = 1 / PARTS if isinstance(usual, float) else 1

    @cache
    def at(k: int) -> Candidate:
        made = dataclasses.replace(choice, method=dataclasses.replace(method, **{field: k * step}))
        job = c.job.choose(axis, made, "the size that comes nearest to the baseline's")
        return Candidate(renamed(c.name, slug, f"{field}={k * step:g}"), job)

    most = PARTS if step < 1 else max_rank(c) if field == "rank" else None
    return at(nearest(lambda k: measure(at(k)), target, most))


def part_for(name: str, slug: str) -> str:
    """The part of a candidate's name for a method; empty where the method is a default."""
    parts = [part for part in name.split("+") if part.split(":")[0].strip() == slug]
    return parts[0] if parts else ""


def renamed(name: str, slug: str, field: str) -> str:
    """The name with one field added: `lora-pro` becomes `lora:rank=8+lora-pro`."""
    part = part_for(name, slug)
    return name.replace(part, f"{part}:{field}", 1) if part else f"{slug}:{field}+{name}"


def nearest(measure: Callable[[int], int], target: int, most: int | None = None) -> int:
    """The integer from 1 to `most` whose measure is nearest to the target.

    The measure must be monotonic. Doubles the integer until the target is passed or comes no
    nearer, then bisects.
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
    """Number of trained elements, by the method's own cost formula."""
    weights: Any = c.job.choices["weights"].method
    return elements(weights, targeted_sites(c))[0]


@cache
def peak(c: Candidate, rows: int) -> int:
    """Peak bytes of tensors in a training step."""
    return bytes_of(c, rows)


def targeted_sites(c: Candidate) -> list[Site]:
    """The sites that a candidate's `targets` select."""
    sites = sites_of(workload(c.job).model)
    weights: Any = c.job.choices["weights"].method
    words = [t for t in weights.targets if t != EVERYTHING]
    return select(sites, words) if words else sites


def max_rank(c: Candidate) -> int:
    """The largest rank that any of its targeted matrices can have."""
    return max(min(site.shape) for site in targeted_sites(c))
