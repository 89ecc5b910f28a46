"""`eckart estimate ... --fit 24GB`: which recipes fit, the best first, each with the reason.

Asked are full training with every update rule, and with the plain one every adapter, or where
weights are random every method that trains them from there, all with their defaults. First
comes what can move more of the model; among equals what needs no recomputation, then the plain
update rule, then what is fastest, then what is smallest. That order is about room, not about
quality: `eckart bench` compares.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from eckart.errors import EckartError, OutOfRoom
from eckart.jobs.measuring.memory import Line, in_words, line
from eckart.jobs.measuring.shallow import Sizes, alike, sized
from eckart.jobs.measuring.speed import Speed, digits
from eckart.jobs.settings.job import NONE, Choice, Job
from eckart.jobs.settings.settle import SHARE, largest_divisor
from eckart.jobs.training import prepare
from eckart.jobs.training.screen import Screen
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
        parts += [f"{self.rows} rows at once" if self.rows > 1 else "one row at once"]
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
    job: Job,
    config: Any,
    place: torch.device,
    limit: int,
    batch: tuple[int, int],
    speed: Callable[[Any], Speed],
    task: str,
    packed: bool,
) -> tuple[list[Proposal], list[str]]:
    """The recipes that fit into `limit` bytes with at least one row, best first; the rest's words.

    `batch` is the rows that a step takes and the tokens in each, `packed` where these are several
    texts; `speed` is asked with the update
    rule of what fits. Raises OutOfRoom where nothing does.
    """
    found, left = [], []
    rows, length = batch
    passes = Passes(length)
    stacked = alike(config, task)
    for words, weights, update, plain in candidates(from_scratch=job.command == "pretrain"):
        try:
            precision: Any = job.choices["precision"].method
            recipe = Recipe(weights=weights, update=update, precision=precision)
            recipe.check()
            sizes = sized(config, recipe, dtype_of(job, recipe), place, stacked, task, packed)
        except EckartError:
            continue  # they do not combine, or need what an estimate has not
        proposal = placed(words, plain, sizes, limit, rows, partial(speed, update), passes)
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


def dtype_of(job: Job, recipe: Recipe) -> torch.dtype:
    """The dtype in which the job's model is loaded to be trained by this recipe."""
    for axis in ("weights", "update"):
        method = getattr(recipe, axis)
        job = job.choose(axis, Choice(method.slug, method) if method else NONE, "proposed")
    return prepare.dtype_of(job)


def candidates(from_scratch: bool = False) -> Iterator[tuple[str, Any, Any, bool]]:
    """What to type, the weights, the update rule, and whether that is the plain one."""
    full: Any = registry.load(registry.FULL)
    for slug, entry in registry.methods().items():
        method: Any = registry.load(slug)
        if entry.axis == "update":
            plain = slug == registry.DEFAULTS["update"]
            words = f"weights={registry.FULL}" + ("" if plain else f" update={slug}")
            yield words, full(), method(), plain
        elif entry.axis == "weights" and slug != registry.FULL and not method.stages:
            if (entry.base == "frozen") == from_scratch:
                continue  # an adapter would stand on random numbers
            yield f"weights={slug}", method(), None, True


class Passes:
    """What rows take, asked once for all update rules of the same weights."""

    def __init__(self, length: int):
        self.length = length
        self.kept: dict[tuple[str, bool], Line] = {}
        self.work: dict[str, tuple[int, int]] = {}

    def activations(self, words: str, sizes: Sizes, checkpointing: bool) -> Line:
        """Bytes that are kept for the backward pass."""
        key = words.partition(" ")[0], checkpointing
        if key not in self.kept:
            self.kept[key] = line(lambda rows: sizes.activations(rows, self.length, checkpointing))
        return self.kept[key]

    def flops(self, words: str, sizes: Sizes, checkpointing: bool) -> int:
        """Operations of both passes."""
        key = words.partition(" ")[0]
        if key not in self.work:
            self.work[key] = sizes.flops(1, self.length)
        forward, backward = self.work[key]
        return (2 if checkpointing else 1) * forward + backward


def placed(
    words: str,
    plain: bool,
    sizes: Sizes,
    limit: int,
    rows: int,
    speed: Callable[[], Speed],
    passes: Passes,
) -> Proposal | None:
    """The most rows of a step that fit at once, with recomputation only where it must be."""
    fixed = sum(sizes.fixed.values())
    space = SHARE * (limit - fixed)
    if space <= 0:
        return None
    for checkpointing in (False, True):
        kept = passes.activations(words, sizes, checkpointing)
        if most := kept.rows_within(space):
            at_once = largest_divisor(rows, most)
            work = rows * passes.flops(words, sizes, checkpointing)
            seconds = speed().seconds(work, sizes.trainable)[0]
            return Proposal(
                words, plain, sizes.trainable, sizes.parameters, fixed,
                kept.of(at_once), at_once, checkpointing, seconds,
            )  # fmt: skip
    return None


def say(screen: Screen, found: list[Proposal], left: list[str], limit: int) -> None:
    """A line for each that fits, and how many do not."""
    width = max(len(p.words) for p in found)
    lines = [
        f"{p.words:<{width}}{in_words(p.bytes):>10}   {digits(p.seconds):>7} s a step   {p.reason}"
        for p in found
    ]
    screen.line("fits", "\n".join(lines), result=True)
    too_large = f"; too large: {', '.join(left)}" if left else ""
    screen.line(
        "", f"{len(found)} of {len(found) + len(left)} fit into {in_words(limit)}{too_large}"
    )
    screen.line("", "(in the order of what is trained, not of quality: eckart bench compares)")
