"""`eckart estimate ... --fit 24GB`: which recipes fit, the best first, each with the reason.

Asked are full training with every update rule, and every method whose base stays frozen with
the plain one, all with their defaults. First comes what can move more of the model; among
equals what needs no recomputation, then the plain update rule, then what is fastest, then
what is smallest. That order is about room, not about quality: `eckart bench` compares.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from eckart.errors import EckartError, OutOfRoom
from eckart.jobs import prepare
from eckart.jobs.config import Job
from eckart.jobs.imagined import Imagined, imagine
from eckart.jobs.memory import in_words
from eckart.jobs.screen import Screen
from eckart.jobs.settle import SHARE, largest_divisor
from eckart.jobs.speed import Speed
from eckart.recipe import Recipe, registry


@dataclass(frozen=True)
class Proposal:
    """A recipe that fits: what to type, what it takes, and why it stands where it stands."""

    words: str
    plain: bool  # the update rule that is taken where none is named
    trainable: int
    parameters: int
    fixed: int  # bytes whatever the batch
    activations: int  # bytes of the rows at once
    rows: int
    checkpointing: bool
    seconds: float  # of a step

    @property
    def bytes(self) -> int:
        return self.fixed + self.activations

    @property
    def order(self) -> tuple[Any, ...]:
        return -self.trainable, self.checkpointing, not self.plain, self.seconds, self.bytes

    @property
    def reason(self) -> str:
        """What speaks for it and against it."""
        share = 100 * self.trainable / self.parameters
        parts = [f"trains {share:.2g} %" if share < 99.5 else "trains everything"]
        parts += ["computes activations again"] if self.checkpointing else []
        parts += [f"{self.rows} rows at once"]
        return ", ".join(parts)

    def document(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "words": self.words,
            "bytes": self.bytes,
            "trainable": self.trainable,
            "rows": self.rows,
            "checkpointing": self.checkpointing,
            "seconds_per_step": self.seconds,
            "reason": self.reason,
        }


def proposals(
    job: Job, config: Any, place: torch.device, limit: int, rows: int, speed: Speed
) -> tuple[list[Proposal], list[str]]:
    """The recipes that fit into `limit` bytes with at least one row, best first; the rest's words.

    `rows` is what a step takes. Raises OutOfRoom where nothing fits.
    """
    found, left = [], []
    per_row: dict[tuple[str, bool], int] = {}
    for words, weights, update, plain in candidates():
        try:
            recipe = Recipe(weights=weights, update=update)
            recipe.check()
            imagined = imagine(config, recipe, prepare.dtype_of(job), place)
        except EckartError:
            continue  # they do not combine, or need what an estimate has not
        proposal = placed(job, words, plain, imagined, limit, rows, speed, per_row)
        if proposal is None:
            left.append(words)
        else:
            found.append(proposal)
    if not found:
        raise OutOfRoom(
            "no recipe fits",
            [("--fit", in_words(limit)), ("asked", f"{len(left)} recipes with one row")],
            "Type a shorter data.seq_len=, precision=bf16, or a smaller model.",
        )
    return sorted(found, key=lambda p: p.order), left


def candidates() -> Iterator[tuple[str, Any, Any, bool]]:
    """What to type, the weights, the update rule, and whether that is the plain one."""
    full: Any = registry.load(registry.FULL)
    for slug, entry in registry.methods().items():
        method: Any = registry.load(slug)
        if entry.axis == "update":
            plain = slug == registry.DEFAULTS["update"]
            words = f"weights={registry.FULL}" + ("" if plain else f" update={slug}")
            yield words, full(), method(), plain
        elif entry.axis == "weights" and entry.base == "frozen" and not method.stages:
            yield f"weights={slug}", method(), None, True


def placed(
    job: Job,
    words: str,
    plain: bool,
    found: Imagined,
    limit: int,
    rows: int,
    speed: Speed,
    per_row: dict[tuple[str, bool], int],
) -> Proposal | None:
    """The most rows of a step that fit at once, with recomputation only where it must be."""
    fixed, length = sum(found.fixed.values()), int(job.data.seq_len)
    space = SHARE * (limit - fixed)
    if space <= 0:
        return None
    for checkpointing in (False, True):
        key = words.partition(" ")[0], checkpointing  # the same passes for all update rules
        if key not in per_row:
            per_row[key] = found.activations(1, length, checkpointing)
        most = int(space // max(1, per_row[key]))
        if most:
            at_once = largest_divisor(rows, most)
            forward, backward = found.flops(1, length)
            work = rows * ((2 if checkpointing else 1) * forward + backward)
            seconds = speed.seconds(work)[0]
            return Proposal(
                words, plain, found.trainable, found.parameters, fixed,
                per_row[key] * at_once, at_once, checkpointing, seconds,
            )  # fmt: skip
    return None


def say(screen: Screen, found: list[Proposal], left: list[str], limit: int) -> None:
    """A line for each that fits, and how many do not."""
    width = max(len(p.words) for p in found)
    for i, p in enumerate(found):
        numbers = f"{in_words(p.bytes):>10}   {p.seconds:8.3g} s a step"
        screen.line(
            "fits" if i == 0 else "", f"{p.words:<{width}}{numbers}   {p.reason}", result=True
        )
    too_large = f"; too large: {', '.join(left)}" if left else ""
    screen.line(
        "", f"{len(found)} of {len(found) + len(left)} fit into {in_words(limit)}{too_large}"
    )
