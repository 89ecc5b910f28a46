"""Several adapters on one map: a weighted sum, or a different adapter for each row.

    y = p + sum_a w_a D_a(x) + bias        p = W x, the base's product

D_a is the change by adapter a: the sum of its terms, or g_a (p + its terms) - p if it has a gain
g_a, so that one adapter's gain does not scale another's terms.

b rows, t tokens, m out, n in, r rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from eckart.errors import UsageError
from eckart.linear.lowrank import low_rank
from eckart.linear.term import Product, Term, joint_factors, plain_mm

if TYPE_CHECKING:
    from eckart.linear.structured import Structured


@dataclass(frozen=True)
class Branch:
    """One adapter's part of a sum: the names of its children in the module, and its weight."""

    terms: tuple[str, ...] = ()
    gain: str | None = None
    weight: float = 1.0


NOTHING = Branch()


@dataclass(frozen=True)
class Mix:
    """The active branches of one sum, for all rows or row by row."""

    branches: tuple[Branch, ...]
    rows: Tensor | None = None  # int64 [b]: the branch of each row


Run = Callable[[Term, Any], Tensor]  # how a kind of layer applies a term to its input
Change = Callable[[Branch, Tensor, Tensor], Tensor]  # (branch, x, p) -> what it adds to p


def gained(mix: Mix) -> bool:
    """Does any branch have a gain?"""
    return any(branch.gain is not None for branch in mix.branches)


def change_of(
    layer: Structured, run: Run, param: str = "weight", expert: Tensor | None = None
) -> Change:
    """The function that computes a branch's change to this layer's output; `expert` [t] is each
    token's expert in fused experts.
    """

    def change(branch: Branch, x: Tensor, p: Tensor) -> Tensor:
        terms, gain = layer.parts_of(branch)
        parts = [run(term, x).to(p.dtype) for term in terms]
        y = sum(parts[1:], parts[0])
        W = None if gain is None else layer.matrix(param)
        if gain is None or W is None:
            return y
        factor = gain.factor(W, terms).to(p.dtype)  # [m], or [e, m]
        return (p + y) * (factor if expert is None else factor[expert]) - p

    return change


def mixture(layer: Structured, mix: Mix, x: Tensor, y: Tensor, bias: Tensor | None) -> Tensor:
    """y [b, .., m], the base's result with its bias, plus the changes of all branches.

    Row by row, plain pairs are one batched product. A gain does not scale the bias.
    """
    if mix.rows is not None and not gained(mix):
        pairs = row_pairs([layer.parts_of(branch)[0] for branch in mix.branches])
        if pairs is not None:
            part = low_rank_rows(x, pairs, owners_of(mix.rows, x), layer._sum.mm)
            return y + part.to(y.dtype)
    change = change_of(layer, Term.__call__)
    if bias is None or not gained(mix):
        return mixed(mix, x, y, change)
    return mixed(mix, x, y - bias, change) + bias


def mixed(mix: Mix, x: Tensor, p: Tensor, change: Change) -> Tensor:
    """p [b, .., m] plus the changes of the branches, or of one branch for each row.

    Row by row, each branch runs once, on its own rows of x [b, .., n].
    """
    y = p
    if mix.rows is None:
        for branch in mix.branches:
            if branch.terms:
                y = y + (branch.weight * change(branch, x, p)).to(p.dtype)
        return y
    owners = owners_of(mix.rows, x)
    for i, branch in enumerate(mix.branches):
        if branch.terms:
            at = (owners == i).nonzero().flatten()
            part = branch.weight * change(branch, x[at], p[at])
            y = y.index_add(0, at, part.to(y.dtype))
    return y


def owners_of(rows: Tensor, x: Tensor) -> Tensor:
    """The branch of each leading entry of x: beams, windows and tokens belong to their row.

    Raises UsageError if the number of entries is not a multiple of the number of rows.
    """
    count, found = len(rows), x.shape[0]
    if found % count:
        raise UsageError(
            "the batch has other rows than were named",
            [("rows", f"{count} adapters"), ("batch", f"{found} rows")],
            "Name one adapter, or None, for each row of the batch.",
        )
    return rows.to(x.device).repeat_interleave(found // count)


def row_pairs(branches: Sequence[Sequence[Term]]) -> list[tuple[Tensor, Tensor]] | None:
    """Each branch as one pair B [m, r], A [r, n]; None if any branch is not such a product.

    A branch without terms is a pair of rank 0. With dropout in training a branch is not a product
    either.
    """
    found: list[tuple[Tensor, Tensor] | None] = []
    for terms in branches:
        dropped = any(term.dropout and term.training for term in terms)
        pair = joint_factors(terms)
        if dropped or (terms and pair is None):
            return None
        found.append(pair)
    like = next((pair for pair in found if pair is not None), None)
    if like is None:
        return None
    nothing = like[0][:, :0], like[1][:0]
    return [nothing if pair is None else pair for pair in found]


def low_rank_rows(
    x: Tensor, pairs: Sequence[tuple[Tensor, Tensor]], owners: Tensor, mm: Product = plain_mm
) -> Tensor:
    """B_i A_i x with each row's own pair: two batched products, ranks padded with zeros.

    x [b, .., n], owners int64 [b], pairs of B [m, r_i], A [r_i, n] -> [b, .., m].
    """
    rank = max(A.shape[-2] for _, A in pairs)
    wide = [padded(B, A, rank) for B, A in pairs]
    B = torch.stack([B for B, _ in wide])[owners]  # [b, m, r]
    A = torch.stack([A for _, A in wide])[owners]  # [b, r, n]
    flat = x.reshape(x.shape[0], -1, x.shape[-1]).to(A.dtype)  # [b, t, n]
    return low_rank(flat, A, B, mm=mm).reshape(*x.shape[:-1], B.shape[-2])


def padded(B: Tensor, A: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """B [*, m, r], A [*, r, n] padded to a rank with zero components; the product is the same."""
    more = rank - A.shape[-2]
    B = torch.cat([B, B.new_zeros(*B.shape[:-1], more)], dim=-1)
    return B, torch.cat([A, A.new_zeros(*A.shape[:-2], more, A.shape[-1])], dim=-2)
