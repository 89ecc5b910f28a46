"""A schedule of which blocks of a model train at a time.

A block is everything under one index of the model's longest module list (`layers.7.`);
parameters outside all blocks (embeddings, head, last norm) are "the rest". The blocks of a
period depend only on the seed and the period, so they are the same on all processes and after
a resume.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal
from zlib import crc32

import torch

from eckart.errors import UsageError
from eckart.optim.part import Part
from eckart.optim.project import share

NUMBERED = re.compile(r"^(.*?)(?:^|\.)(\d+)\.")  # the outermost number in a name


@dataclass(frozen=True)
class Blocks(Part):
    """Trains `count` blocks at a time, chosen again every `every` steps, and the rest.

    `moments` of a block are dropped at each new period ("reset"), kept as long as the block is
    drawn again ("carry"), or always kept, unchanged while it is frozen ("keep"). Those of the
    rest are kept unless `reset_rest`. With `once` the first draw is used for the whole run.
    `paths` names the modules that are blocks, instead of the longest list; `weights` are the
    blocks' relative probabilities.

    `order`: "drawn" draws each period independently; the others go through all blocks in turn,
    in ascending, descending or shuffled order (shuffled again in each round). A float `count`
    is a share of all blocks.
    """

    count: int | float = 2
    every: int = 20
    moments: Literal["reset", "carry", "keep"] = "reset"
    reset_rest: bool = False
    train_rest: bool = True
    once: bool = False
    paths: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    order: Literal["drawn", "ascending", "descending", "shuffled"] = "drawn"

    def __post_init__(self) -> None:
        if self.count == 0 and not self.train_rest:
            raise UsageError(
                "nothing would be trained",
                [("blocks", "0"), ("train_rest", "False")],
                "Type update.blocks=1, or leave one of them out.",
            )
        if len(set(self.paths)) < len(self.paths):
            raise UsageError(
                "a block is named twice", [("update.block_paths", ", ".join(self.paths))]
            )
        likely = sum(weight > 0 for weight in self.weights)
        if self.weights and (min(self.weights) < 0 or likely < self.count):
            raise UsageError(
                "too few blocks can be drawn with these weights",
                [("update.block_weights", str(list(self.weights))), ("blocks", str(self.count))],
                f"Give at least {self.count} blocks a weight above 0, and none one below.",
            )

    def resting(self, names: Sequence[str], step: int, seed: int) -> set[str]:
        """Those of the named parameters that do not train at `step` (counted from 0)."""
        members = self.members(tuple(names))
        drawn = self.drawn(len({b for b in members.values() if b is not None}), step, seed)
        return {n for n, b in members.items() if not (self.train_rest if b is None else b in drawn)}

    def forgotten(self, names: Sequence[str], resting: set[str]) -> set[str]:
        """Those of the named parameters whose moments are dropped when a period begins."""
        members = self.members(tuple(names))
        rest = {n for n, b in members.items() if b is None and self.reset_rest}
        inside = {n for n, b in members.items() if b is not None}
        ends = {"reset": inside, "carry": inside & resting, "keep": set()}
        return rest | ends[self.moments]

    def drawn(self, blocks: int, step: int, seed: int) -> set[int]:
        """The indices of the blocks that train at this step."""
        count = self.counted(blocks)
        if count == 0:
            return set()
        period = 0 if self.once else step // self.every
        if self.order == "drawn":
            weights = torch.tensor(self.weights or [1.0] * blocks)
            generator = generator_of(seed, period)
            return set(torch.multinomial(weights, count, generator=generator).tolist())
        round_, place = divmod(period, -(-blocks // count))
        order = list(range(blocks))
        if self.order == "descending":
            order.reverse()
        if self.order == "shuffled":
            order = torch.randperm(blocks, generator=generator_of(seed, round_)).tolist()
        return set(order[place * count : (place + 1) * count])

    def counted(self, blocks: int) -> int:
        """How many of `blocks` blocks train at a time."""
        return self.count if isinstance(self.count, int) else share(self.count, blocks)

    def begins(self, step: int) -> bool:
        """True where a new period begins at this step."""
        return step % self.every == 0 and (step == 0 or not self.once)

    def members(self, names: tuple[str, ...]) -> Mapping[str, int | None]:
        """The block index of each parameter; None for the rest. Raises UsageError where the
        model's blocks do not fit `count`, `paths` or `weights`."""
        found = membership(self.paths, names)
        blocks = len(self.paths) or len({b for b in found.values() if b is not None})
        if self.counted(blocks) > blocks == 0:
            raise UsageError(
                "this model has no blocks to train in turn",
                [
                    (
                        "trained parameters",
                        "no name has a block's number, as in layers.0.weight",
                    )
                ],
                "Name modules in update.block_paths, or take another update rule.",
            )
        if self.counted(blocks) > blocks:
            raise UsageError(
                "more blocks are to be trained than there are",
                [("blocks", f"{self.count} of {blocks}")],
                f"Type update.blocks={blocks}, or name them in update.block_paths.",
            )
        if self.weights and len(self.weights) != blocks:
            raise UsageError(
                "each block needs its weight",
                [("update.block_weights", f"{len(self.weights)} for {blocks} blocks")],
                "Give one for each, or leave them out: all are alike then.",
            )
        return found


def generator_of(seed: int, period: int) -> torch.Generator:
    """The random generator for one period, on the CPU."""
    return torch.Generator().manual_seed(crc32(f"{seed}/blocks/{period}".encode()))


@lru_cache(maxsize=8)
def membership(paths: tuple[str, ...], names: tuple[str, ...]) -> Mapping[str, int | None]:
    """The block index of each parameter, from `paths` or the model's longest module list."""
    homes = [home_of(name, paths) for name in names]
    empty = [path for path in paths if path not in homes]
    if empty:
        raise UsageError(
            "a block holds nothing that is trained",
            [(path, "is no module above a trained parameter") for path in empty],
            "Name modules as in the model, such as model.layers.0: eckart inspect MODEL",
        )
    order: Sequence[str] = paths
    if not paths:
        lists: dict[str, set[str]] = {}
        for home in filter(None, homes):
            lists.setdefault(home.rpartition(".")[0], set()).add(home)
        longest = max(lists.values(), key=len, default=set())
        order = sorted(longest, key=lambda home: int(home.rpartition(".")[2]))
    number = {home: i for i, home in enumerate(order)}
    return {n: number.get(h) if h else None for n, h in zip(names, homes, strict=True)}


def home_of(name: str, paths: tuple[str, ...]) -> str | None:
    """The path of the module that contains this parameter as a block would; None if there is
    none."""
    if paths:
        return next((path for path in paths if name.startswith(f"{path}.")), None)
    found = NUMBERED.match(name)
    return name[: found.end() - 1] if found else None
