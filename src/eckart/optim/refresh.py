"""When a basis changes, and what becomes of the moments that were written in it."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from eckart.optim.part import CHUNK, Part, State
from eckart.optim.project import as_matrix, usable
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
    for first in (True, False):
        some = [e for e in due if (e.state["step"] == 0) == first]
        for start in range(0, len(some), together):
            refresh_together(some[start : start + together], first)


def refresh_together(entries: list[Entry], first: bool) -> None:
    """One batched decomposition."""
    rule, layout = entries[0].rule, entries[0].layout
    projector = rule.projector
    names = [name for name in projector.names if name in entries[0].state]
    old = {name: torch.stack([whole(e.state[name]) for e in entries]) for name in names}
    if layout is not None and layout.gram_suffices and projector.from_gram:
        ok, found = found_from_gram(entries, layout)
    else:
        ok, G = gathered(entries)
        found = projector.find(G, old, [e.seed for e in entries], first)
    new = {name: chosen(ok, found[name], old[name]) for name in names}
    # the one host read; a decomposition has synchronised anyway
    fresh = ok.reshape(len(entries), -1).any(1).tolist()
    for i, entry in enumerate(entries):
        step = entry.state["step"]
        entry.state["due"] = rule.refresh.next(step, entry.name) if fresh[i] else step + 1
        if not fresh[i]:
            continue
        before, after = ({name: t[i] for name, t in state.items()} for state in (old, new))
        renew_moments(entry, before, after)
        for name, t in after.items():
            placed = t if layout is None else local(layout.place(t, rule.kind(name)))
            entry.tensors[name].copy_(placed)


def gathered(entries: list[Entry]) -> tuple[Tensor, Tensor]:
    """Which gradients can give a basis, bool [k, *], and all of them [k, *, m, n], whole and
    at least in fp32; those that cannot are zero, as one NaN would end a batch."""
    leading = entries[0].group["leading"]
    G = torch.stack([as_matrix(whole(e.gradient), leading) for e in entries])
    G = G.to(torch.promote_types(G.dtype, torch.float32))
    ok = usable(G)
    return ok, torch.where(ok[..., None, None], G, 0)


def found_from_gram(entries: list[Entry], layout: Layout) -> tuple[Tensor, dict[str, Tensor]]:
    """The same and the bases, from C = sum over shards of G^T G: n x n numbers travel.

    In fp64, since the Gram matrix squares the condition number.
    """
    G = torch.stack([e.view(e.gradient) for e in entries]).double()  # [k, m of this shard, n]
    C = G.mT @ G
    sum_([C], layout.groups("rows"))
    ok = usable(C)
    C = torch.where(ok[..., None, None], C, 0)
    rank = entries[0].tensors["right"].shape[-2]
    return ok, {"right": entries[0].rule.projector.find_right(C, rank)}


def renew_moments(entry: Entry, old: dict[str, Tensor], new: dict[str, Tensor]) -> None:
    """Keep, rotate or reset the moments of an entry whose basis changes."""
    refresh, inner = entry.rule.refresh, entry.rule.inner
    if counted(entry.state) == 0:
        return  # nothing has been seen yet
    if refresh.moments == "rotate":
        turn = entry.rule.projector.turn(old, new)
        inner.rotate(entry.tensors, turn, counted(entry.state))
    if refresh.moments == "reset":
        names = entry.rule.projector.names
        inner.reset({k: t for k, t in entry.tensors.items() if k not in names})
        entry.state["start"] = entry.state["step"]


def counted(state: State) -> int:
    """Completed steps that the moments have seen."""
    return state["step"] - state.get("start", 0)


def chosen(ok: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """The new state where the gradient could give one, in the stored dtype."""
    ok = ok.reshape(*ok.shape, *(1,) * (old.dim() - ok.dim()))
    return torch.where(ok, new.to(old.dtype), old)
