"""When a basis changes, and what becomes of the moments that were written in it."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from eckart.optim.part import CHUNK, Part, State
from eckart.optim.project import Basis, overlap, usable

if TYPE_CHECKING:
    from eckart.optim.bucket import Bucket


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


def refresh(bucket: Bucket) -> None:
    """Find new bases for the parameters of a bucket that are due, from their gradients.

    A zero or non-finite gradient gives no basis: the old one stays and the parameter is due
    again at its next step. (Where a parameter holds several matrices, as experts do, it is
    due again only if none of them gave one.)
    """
    if not bucket.projected:
        return
    due = [i for i, state in enumerate(bucket.states) if state["due"] <= state["step"]]
    together = max(1, CHUNK // max(1, bucket.grads[0].numel()))
    for start in range(0, len(due), together):
        refresh_together(bucket, due[start : start + together])


def refresh_together(bucket: Bucket, due: list[int]) -> None:
    """One batched decomposition for parameters of one shape."""
    rule, states = bucket.rule, [bucket.states[i] for i in due]
    G = torch.stack([bucket.grads[i] for i in due])  # [k, *, m, n]
    G = G.to(torch.promote_types(G.dtype, torch.float32))
    ok = usable(G)  # [k, *]
    G = torch.where(ok[..., None, None], G, 0)  # a NaN would end a batched decomposition
    old = Basis(*(stacked(states, side) for side in Basis._fields))
    found = rule.projector.find(G, old)
    new = Basis(*(chosen(ok, f, o) for f, o in zip(found, old, strict=True)))
    # the one host read; the decomposition has synchronised anyway
    fresh = ok.reshape(len(due), -1).any(1).tolist()
    for i, (state, anew) in enumerate(zip(states, fresh, strict=True)):
        basis_new, basis_old = (Basis(*(b if b is None else b[i] for b in x)) for x in (new, old))
        step = state["step"]
        if anew and step > state.get("start", 0):
            if rule.refresh.moments == "rotate":
                rule.inner.rotate(state, overlap(basis_old, basis_new), counted(state))
            if rule.refresh.moments == "reset":
                rule.inner.reset(state)
                state["start"] = step
        for side, basis in zip(Basis._fields, basis_new, strict=True):
            if basis is not None:
                state[side].copy_(basis)
        state["due"] = rule.refresh.next(step, bucket.names[due[i]]) if anew else step + 1


def counted(state: State) -> int:
    """Completed steps that the moments have seen."""
    return state["step"] - state.get("start", 0)


def stacked(states: list[State], name: str) -> Tensor | None:
    """One state tensor of several parameters [k, ...]; None where they have none."""
    return torch.stack([s[name] for s in states]) if name in states[0] else None


def chosen(ok: Tensor, new: Tensor | None, old: Tensor | None) -> Tensor | None:
    """The new basis where the gradient could give one, in the stored dtype."""
    if new is None or old is None:
        return None
    return torch.where(ok[..., None, None], new.to(old.dtype), old)
