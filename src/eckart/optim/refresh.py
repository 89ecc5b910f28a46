"""When a basis changes, and what becomes of the moments that were written in it."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from eckart.optim.part import CHUNK, Part, State
from eckart.optim.project import Basis, as_matrix, overlap, usable
from eckart.optim.sharded import Layout, local, sum_, whole

if TYPE_CHECKING:
    from eckart.optim.bucket import Entry


@dataclass(frozen=True)
class Refresh(Part):
    """A new basis every `every` steps of a parameter's own count, the first at its step 0.

    Staggered, each parameter has its own phase, from a hash of its name: no step carries
    all decompositions, and neither order nor grouping matters.

    `moments`: keep them as they are (GaLore), rotate them into the new basis (LDAdam), or
    reset them, so that the next step is a first step again (FRUGAL).
    """

    every: int = 200
    moments: Literal["keep", "rotate", "reset"] = "keep"
    stagger: bool = True

    def phase(self, name: str) -> int:
        """This parameter's offset in [0, every)."""
        return zlib.crc32(name.encode()) % self.every if self.stagger else 0

    def next(self, step: int, name: str) -> int:
        """The step at which the refresh after the one at `step` is due."""
        return step + self.every - (step + self.phase(name)) % self.every


def refresh(entries: list[Entry]) -> None:
    """Find new bases for those entries of one shape that are due, from their gradients.

    A zero or non-finite gradient gives no basis: the old one stays and the parameter is due
    again at its next step. (Where a parameter holds several matrices, as experts do, it is
    due again only if none of them gave one.)
    """
    due = [e for e in entries if e.projected and e.state["due"] <= e.state["step"]]
    together = max(1, CHUNK // max(1, entries[0].param.numel()))
    for start in range(0, len(due), together):
        refresh_together(due[start : start + together])


def refresh_together(entries: list[Entry]) -> None:
    """One batched decomposition."""
    rule, layout = entries[0].rule, entries[0].layout
    bases = [Basis(*(e.state.get(side) for side in Basis._fields)) for e in entries]
    old = Basis(*(stack(parts) for parts in zip(*bases, strict=True)))  # each [k, *, ...]
    if layout is not None and layout.gram_suffices and rule.projector.from_gram:
        ok, found = found_from_gram(entries, layout)
    else:
        ok, found = found_from_gradients(entries, old)
    new = Basis(*(chosen(ok, f, o) for f, o in zip(found, old, strict=True)))
    # the one host read; the decomposition has synchronised anyway
    fresh = ok.reshape(len(entries), -1).any(1).tolist()
    for i, entry in enumerate(entries):
        before, after = (Basis(*(t if t is None else t[i] for t in basis)) for basis in (old, new))
        if fresh[i]:
            renew_moments(entry, before, after)
        for side, t in after._asdict().items():
            if t is not None:
                entry.tensors[side].copy_(
                    t if layout is None else local(layout.place(t, rule.kind(side)))
                )
        step = entry.state["step"]
        entry.state["due"] = rule.refresh.next(step, entry.name) if fresh[i] else step + 1


def found_from_gradients(entries: list[Entry], old: Basis) -> tuple[Tensor, Basis]:
    """Which gradients gave a basis, bool [k, *], and the bases; gathered where sharded."""
    leading = entries[0].group["leading"]
    G = torch.stack([as_matrix(whole(e.gradient), leading) for e in entries])  # [k, *, m, n]
    G = G.to(torch.promote_types(G.dtype, torch.float32))
    ok = usable(G)
    G = torch.where(ok[..., None, None], G, 0)  # a NaN would end a batched decomposition
    return ok, entries[0].rule.projector.find(G, old)


def found_from_gram(entries: list[Entry], layout: Layout) -> tuple[Tensor, Basis]:
    """The same from C = sum over shards of G^T G: n x n numbers travel, and no gradient.

    In fp64, since the Gram matrix squares the condition number.
    """
    G = torch.stack([e.view(e.gradient) for e in entries]).double()  # [k, m of this shard, n]
    C = G.mT @ G
    sum_([C], layout.groups("rows"))
    ok = usable(C)
    C = torch.where(ok[..., None, None], C, 0)
    rank = entries[0].tensors["right"].shape[-2]
    return ok, Basis(None, entries[0].rule.projector.find_right(C, rank))


def renew_moments(entry: Entry, before: Basis, after: Basis) -> None:
    """Keep, rotate or reset the moments of an entry whose basis changes."""
    refresh, inner = entry.rule.refresh, entry.rule.inner
    if counted(entry.state) == 0:
        return  # nothing has been seen yet
    if refresh.moments == "rotate":
        inner.rotate(entry.tensors, overlap(before, after), counted(entry.state))
    if refresh.moments == "reset":
        inner.reset(entry.tensors)
        entry.state["start"] = entry.state["step"]


def counted(state: State) -> int:
    """Completed steps that the moments have seen."""
    return state["step"] - state.get("start", 0)


def stack(parts: Sequence[Tensor | None]) -> Tensor | None:
    """One part of several bases [k, ...], gathered; None where that side is not projected."""
    full = [whole(t) for t in parts if t is not None]
    return torch.stack(full) if full else None


def chosen(ok: Tensor, new: Tensor | None, old: Tensor | None) -> Tensor | None:
    """The new basis where the gradient could give one, in the stored dtype."""
    if new is None or old is None:
        return None
    return torch.where(ok[..., None, None], new.to(old.dtype), old)
