"""When bases are recomputed, and how the moments are carried over to a new basis."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from eckart.decompose.products import CACHED
from eckart.optim.part import CHUNK, Part, State, Tensors, counted, stacked
from eckart.optim.project import (
    Basis,
    Directions,
    Found,
    Search,
    fix_signs,
    parts,
    polish,
    top_eigenvectors,
    usable,
)
from eckart.optim.sharded import Groups, Layout, Rows, columns_of, local, sum_, sum_symmetric_

if TYPE_CHECKING:
    from eckart.optim.entry import Entry


@dataclass(frozen=True)
class Refresh(Part):
    """A new basis every `every` steps of a parameter's own step count, the first at step 0.

    With `stagger` each parameter has its own phase, from a hash of its name, so that the
    decompositions are spread over the steps, independently of order and grouping.

    `adaptive`: the parameter's interval is doubled where the mean cosine between successive
    leading directions, over the last five refreshes, is at least this (Q-GaLore).

    `moments`: kept as they are (GaLore), rotated into the new basis (LDAdam), or reset to
    zero together with their bias correction (FRUGAL).
    """

    every: int = 200
    moments: Literal["keep", "rotate", "reset"] = "keep"
    stagger: bool = True
    adaptive: float | None = None

    def next(self, step: int, name: str, gap: int) -> int:
        """The step of the refresh after the one at `step`; `gap` is the parameter's interval in
        steps."""
        phase = zlib.crc32(name.encode()) if self.stagger else 0
        return step + gap - (step + phase) % gap

    def init(self, W: Tensor) -> State:
        """The state of an adaptive interval: its length in steps, and the last five cosines."""
        if self.adaptive is None:
            return {}
        return {"gap": self.every, "cosines": torch.full((5,), torch.nan, device=W.device)}

    def stretch(self, state: State, cosines: Tensor, cosine: Tensor) -> None:
        """Record a cosine and double the interval where the leading direction is stable; one
        host sync."""
        cosines.copy_(torch.cat([cosines[1:], cosine[None]]))
        if self.adaptive is not None and bool(cosines.mean() >= self.adaptive):  # NaN: too few
            state["gap"] *= 2


def refresh(entries: list[Entry]) -> None:
    """Compute new bases from the gradients, for those entries of one shape that are due.

    A zero or non-finite gradient gives no basis: the old one stays and the parameter is due
    again at its next step. (A parameter with several matrices, such as experts, is due again
    only if none of them gave one.)
    """
    if not entries[0].projected or not entries[0].rule.projector.names:
        return  # there is no basis
    due = [e for e in entries if e.state["due"] <= e.state["step"]]
    cached = entries[0].param.is_cpu and not entries[0].rule.projector.decomposes
    together = max(1, (CACHED if cached else CHUNK) // max(1, entries[0].param.numel()))
    for first in (True, False):
        some = [e for e in due if (e.state["step"] == 0) == first]
        for start in range(0, len(some), together):
            refresh_together(some[start : start + together], first)


def refresh_together(entries: list[Entry], first: bool) -> None:
    """Refresh the bases of entries of one shape with one batched decomposition."""
    rule = entries[0].rule
    layout = None if entries[0].layout is None else entries[0].layout.own
    projector, source = rule.projector, rule.source
    names = [name for name in projector.names if name in entries[0].state]
    old = {name: torch.stack([all_rows(e, name) for e in entries]) for name in names}
    size = entries[0].size
    if layout is not None and projector.from_gram(first, size) and by_gram(layout, entries[0]):
        ok, found = found_from_gram(entries, layout)
    else:
        ok, found = found_from_gradients(entries, layout, old, first)
    new = {name: chosen(ok, found[name], old[name]) for name in names}
    if projector.decomposes or rule.refresh.every > 1:
        # the only host sync; a decomposition has synchronised anyway
        found_one = ok.reshape(len(entries), -1).any(1).float()
        sum_([found_one], others(entries[0]))
        fresh = (found_one > 0).tolist()
    else:
        fresh = [True] * len(entries)  # where it is not, old and new are equal
    kept = [i for i, is_fresh in enumerate(fresh) if is_fresh]
    for i, entry in enumerate(entries):
        step = entry.state["step"]
        if not fresh[i]:
            entry.state["due"] = step + 1
            continue
        if rule.refresh.adaptive is not None and not first:
            both = ({name: t[i] for name, t in state.items()} for state in (old, new))
            a, b = (leading_direction(projector.basis(s, entry.local, size)) for s in both)
            cosine = torch.cosine_similarity(a, b, dim=-1).abs().flatten()  # signs mean nothing
            mean = torch.stack([cosine.sum(), cosine.new_tensor(cosine.numel())])
            sum_([mean], others(entry))
            rule.refresh.stretch(entry.state, entry.tensors["cosines"], mean[0] / mean[1])
        gap = entry.state.get("gap", rule.refresh.every)
        entry.state["due"] = rule.refresh.next(step, entry.name, gap)
        if source is not None:
            source.turn(entry, 1.0)
    renew_moments(entries, kept, old, new)
    for name, t in new.items():
        placed = [
            t[i] if layout is None else local(layout.place(t[i], rule.kind(name))) for i in kept
        ]
        write([entries[i].tensors[name] for i in kept], placed)
    for i in kept:
        entry = entries[i]
        if source is not None:
            source.turn(entry, -1.0)
        if projector.fleeting:
            P = found["left"][i].to(entry.A.dtype)
            entry.found = Basis(P if layout is None else local(layout.place(P, "left")), None)
        if "low" in found and (layout is None or not layout.groups("columns")):
            entry.low = found["low"][i].to(entry.A.dtype)
            entry.summed = layout is not None and layout.left  # a left R is one of all rows


def all_rows(entry: Entry, name: str) -> Tensor:
    """A state tensor of the basis for this process's matrices, gathered over rows and columns."""
    t, layout, leading = entry.state[name], entry.layout, entry.group["leading"]
    if layout is None:
        return t
    part = local(t)
    shape = torch.Size([*part.shape[:leading], *t.shape[leading:]])
    return layout.own.gather(part, shape, entry.rule.kind(name))


def others(entry: Entry) -> Groups:
    """The groups of processes that hold other matrices (experts) of the same parameter."""
    return () if entry.layout is None else entry.layout.groups("lead")


def found_from_gradients(
    entries: list[Entry], layout: Layout | None, old: dict[str, Tensor], first: bool
) -> tuple[Tensor, Found]:
    """Which gradients can give a basis, bool [k, *], and the new state tensors of all.

    Sharded gradients are gathered, unless the projector needs only a part on each process.
    """
    projector, size = entries[0].rule.projector, entries[0].size
    enough, rows = projector.from_shards(first, size), Rows()
    if layout is None or layout.groups("columns"):
        enough = "all"
    elif enough == "rows":
        rows = Rows(layout, size[0])
    elif enough == "columns" and len(layout.groups("rows")) == 1:
        rows = Rows(layout, size[1])
    G = stacked([e.sought if rows.layout else e.whole_sought for e in entries])  # [k, *, m, n]
    if rows.layout is not None and enough == "columns":
        G = columns_of(G, rows.layout, size[0])
    G = G.to(torch.promote_types(G.dtype, torch.float32))
    search = Search(G, old, [e.seed for e in entries], first, size, entries[0].first_matrix, rows)
    if projector.measures:
        found = projector.find(search)
        return usable(found.pop("energy")), found
    ok = usable(rows.total(torch.linalg.vector_norm(G, dim=(-2, -1)).square()))
    # a NaN makes a batched decomposition raise; on a CPU the check is free and saves a copy of G
    if projector.decomposes and not (G.is_cpu and bool(ok.all())):
        search = replace(search, G=torch.where(ok[..., None, None], G, 0))
    return ok, projector.find(search)


def by_gram(layout: Layout, entry: Entry) -> bool:
    """True where finding leading singular vectors from a Gram matrix sends less than gathering G.

    G is split along its m rows over p processes. Each sends (p - 1) / p times as many numbers:

        gathering G               m n
        on the right              n (n + 1)            a sum of half of G^T G
        on the left,   m > n      n (n + 1) + m r      the same, and G V is gathered
        on the left,   m <= n     m n / p + m (m + 1)  a sum of half of G G^T: `columns_of`
        on both,       m <= n     the same + n r       and G^T U is gathered

    On the right alone a Gram matrix always sends less; a G split along its columns is gathered.
    """
    (m, n), (left, right) = entry.size, entry.rule.projector.ranks(*entry.size)
    rows = layout.groups("rows")
    if layout.groups("columns") or not left:
        return not layout.groups("columns")
    if m > n:
        return n * (n + 1) + m * left < m * n
    p = dist.get_world_size(rows[0]) if len(rows) == 1 else 1
    return m * n / p + m * (m + 1) + n * right < m * n


def found_from_gram(entries: list[Entry], layout: Layout) -> tuple[Tensor, Found]:
    """As `found_from_gradients`, from the eigenvectors of a summed Gram matrix; see `by_gram`.

    In fp64, since the Gram matrix squares the condition number.
    """
    projector, (m, n) = entries[0].rule.projector, entries[0].size
    left, right = projector.ranks(m, n)
    G = torch.stack([e.sought for e in entries])  # [k, *, m of this shard, n]
    turned = left > 0 and m <= n
    if turned:
        G = columns_of(G, layout, m).mT  # [k, *, n of this process, m]
    G = G.double()
    C = G.mT @ G
    sum_symmetric_([C], layout.groups("rows"))
    ok = usable(C.diagonal(dim1=-2, dim2=-1).sum(-1))
    # a NaN makes a batched decomposition raise
    C, G = (torch.where(ok[..., None, None], t, 0) for t in (C, G))
    near = far = top_eigenvectors(C, left or right)
    if right if turned else left:  # of the other side: G V = U S
        lines = Rows(layout, n if turned else m).whole(G @ near)
        far = fix_signs(polish(torch.linalg.qr(lines)[0]), -2)
    U, V = (near, far) if turned else (far, near)
    return ok, projector.stored(parts(lambda: U, lambda: V.mT, left, right))


def renew_moments(entries: list[Entry], kept: list[int], old: Found, new: Found) -> None:
    """Keep, rotate or reset the moments of the entries at the indices `kept`, whose bases change.

    `old` and `new` are the projector's state tensors [k, *, ...]. Where the inner rule is
    elementwise, moments with the same step count are rotated in one batch.
    """
    rule = entries[0].rule
    projector, inner = rule.projector, rule.inner
    counts = {i: counted(entries[i].state) for i in kept}
    seen = [i for i in kept if counts[i] > 0]
    if rule.refresh.moments == "reset":
        for i in seen:
            inner.reset(rule.moments(entries[i].tensors))
            entries[i].state["start"] = entries[i].state["step"]
    if rule.refresh.moments != "rotate":
        return
    for count in dict.fromkeys(counts[i] for i in seen):
        some = [i for i in seen if counts[i] == count]
        together = inner.elementwise and len(some) > 1
        for places in [some] if together else [[i] for i in some]:
            before, after = ({k: t[places] for k, t in state.items()} for state in (old, new))
            moments = [rule.moments(entries[i].tensors) for i in places]
            if together:
                all_of = {k: torch.stack([m[k] for m in moments]) for k in moments[0]}
                inner.rotate(all_of, projector.turn(before, after, entries[0].size), count)
                for k, t in all_of.items():
                    write([m[k] for m in moments], list(t.unbind()))
            else:
                a, b = ({k: t[0] for k, t in state.items()} for state in (before, after))
                inner.rotate(moments[0], projector.turn(a, b, entries[0].size), count)


def write(tensors: Tensors, values: Tensors) -> None:
    """Copy each value into the tensor of the same index."""
    if tensors:
        torch._foreach_copy_(tensors, values)


def leading_direction(basis: Directions) -> Tensor:
    """The first direction of a basis, in fp32."""
    assert isinstance(basis, Basis)
    if basis.right is not None:
        return basis.right[..., 0, :].float()
    assert basis.left is not None
    return basis.left[..., :, 0].float()


def chosen(ok: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """`new` where ok, else `old`; in the dtype of the old state."""
    ok = ok.reshape(*ok.shape, *(1,) * (old.dim() - ok.dim()))
    return torch.where(ok, new.to(old.dtype), old)
