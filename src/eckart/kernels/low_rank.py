"""Frozen linear maps with low-rank terms, one or several with the same input, as one function.

    y_i = x W_i^T + b_i + s_i (x A_i^T) B_i^T - s_i (x A0_i^T) B0_i^T

Memory: the plain form saves x twice where the factors are fp32 and the base is bf16 (as it is,
and cast), and makes three [t, m] temporaries. Here x is saved once, in its own dtype and only
where an A is trained, and h = x A^T [t, r] where a B is; the scale goes into thin tensors, and the
term is added to the base's result in place. Maps with the same input share the product with all A
and dL/dx. Thin products run in the factors' dtype, a block of tokens at a time, so that the casts
stay in the cache; their accuracy is that of the plain form or better.

Base: in a training pass its products are `decompose.products`'s, which are faster on some CPUs. A
pass without gradients takes torch's own, so that a fresh adapter gives the bits of its base.

Starts: one doubles the rank k of the thin products, which cost 2 k (m + n) for each token in the
forward pass and again for dL/dx. To make the matrix W + s (B A - B0 A0) costs 2 k m n once. So
where an fp32 pass has many tokens it is made, used and dropped in each direction; it is then
smaller than the map's input and output. Without a start, writing and reading the matrix costs what
is saved; in bf16 a small term would be rounded away.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from eckart.decompose.products import CACHED, add_product_, product
from eckart.linear import Pair, frozen_linear, linear_plus_low_rank
from eckart.linear.products import add_product, emulated, shaped, within_sum

PLAIN = (Tensor, torch.nn.Parameter, FakeTensor)  # an estimate runs on tensors without numbers
BEFORE = 3  # x, the scales and whether it is a training pass, before the maps' tensors
BLOCK = 512  # tokens of which an fp32 copy is made at once, at most; 128 at least


class Map(NamedTuple):
    """One frozen map and its term. W, bias, B0 and A0 are constants."""

    W: Tensor  # [m, n]
    bias: Tensor | None  # [m]
    A: Tensor  # [r, n]
    B: Tensor  # [m, r]
    B0: Tensor | None
    A0: Tensor | None
    scale: float


def map_of(W: Tensor, bias: Tensor | None, pair: Pair) -> Map:
    """The map of a frozen matrix and its term's factors."""
    B0, A0 = pair.start or (None, None)
    return Map(W, bias, pair.A, pair.B, B0, A0, pair.scale)


def fused_linear_plus_low_rank(x: Tensor, W: Tensor, bias: Tensor | None, pair: Pair) -> Tensor:
    """As `linear_plus_low_rank`; falls back to it where W is trained or autocast is on."""
    one = map_of(W, bias, pair)
    if not ordinary(x, *one[:-1]):
        return linear_plus_low_rank(x, W, bias, pair)
    return fused(x, [one])[0]


def fused(x: Tensor, maps: Sequence[Map]) -> tuple[Tensor, ...]:
    """The results [.., m_i] of maps of x [.., n]. Factors have one dtype; all or no A train."""
    scales = tuple(one.scale for one in maps)
    tensors = [t for one in maps for t in one[:-1]]
    return FusedLowRank.apply(x, scales, torch.is_grad_enabled(), *tensors)


def fused_frozen_linear(x: Tensor, W: Tensor, bias: Tensor | None) -> Tensor:
    """As `frozen_linear`; where bf16 is emulated, the gradient is computed in fp32."""
    if not emulated(W) or not ordinary(x, W, bias):
        return frozen_linear(x, W, bias)
    return WideGradient.apply(x, W, bias)


def ordinary(x: Tensor, W: Tensor, bias: Tensor | None, *factors: Tensor | None) -> bool:
    """Is the base frozen, autocast off, and nothing a DTensor or a quantised subclass?"""
    trained = W.requires_grad or (bias is not None and bias.requires_grad)
    if trained or torch.is_autocast_enabled(x.device.type):
        return False
    return all(t is None or type(t) in PLAIN for t in (x, W, *factors))


def unpack(scales: Sequence[float], tensors: Sequence[Any]) -> list[Map]:
    """The maps, from a flat sequence of their tensors, six each."""
    columns = [tensors[i::6] for i in range(6)]
    return [
        Map(W, bias, A, B, B0, A0, scale)
        for W, bias, A, B, B0, A0, scale in zip(*columns, scales, strict=True)
    ]


def thin(one: Map) -> tuple[Tensor, Tensor]:
    """down [k, n] and up [m, k] with up @ down = s (B A - B0 A0); the rows of A come first.

    A start is subtracted factor by factor, s ((B - B0) A + B0 (A - A0)): exactly zero while nothing
    has moved, and a small move is not lost in the difference of two rounded products.
    """
    if one.A0 is None or one.B0 is None:
        return one.A, one.B * one.scale
    up = torch.cat([one.B - one.B0, one.B0], 1) * one.scale
    return torch.cat([one.A, one.A - one.A0]), up


def cheaper_folded(flat: Tensor, maps: Sequence[Map]) -> bool:
    """Is it cheaper to add the terms to the matrices? With a margin for memory traffic."""
    if any(one.A0 is None for one in maps):
        return False
    narrow = {t.dtype for one in maps for t in (one.W, one.A)} - {torch.float32, torch.float64}
    if narrow or torch.compiler.is_compiling():  # a compiled pass serves any number of tokens
        return False
    sizes = [one.W.shape for one in maps]
    return len(flat) * sum(m + n for m, n in sizes) > 2 * sum(m * n for m, n in sizes)


def folded(one: Map) -> Map:
    """The map with its term added to its matrix; A and B are kept for their gradients."""
    down, up = thin(one)
    return one._replace(W=torch.addmm(one.W, up, down), B0=None, A0=None)


def side_by_side(downs: Sequence[Tensor]) -> tuple[Tensor, list[slice]]:
    """Matrices [k_i, n] concatenated to [sum k, n], and the rows of each."""
    edges = [0]
    for down in downs:
        edges.append(edges[-1] + down.shape[0])
    whole = downs[0] if len(downs) == 1 else torch.cat(list(downs))
    return whole, [slice(a, b) for a, b in zip(edges, edges[1:], strict=False)]


def of_A(h: Tensor, maps: Sequence[Map], parts: Sequence[slice]) -> Tensor:
    """The columns of h [t, sum k] that are x A^T: [t, sum r]."""
    if all(one.A0 is None for one in maps):
        return h
    own = [h[:, part][:, : len(one.A)] for one, part in zip(maps, parts, strict=True)]
    return torch.cat(own, 1)


def into_A(dh: Tensor, maps: Sequence[Map], parts: Sequence[slice]) -> Tensor:
    """dL/d(x A^T) [t, sum r] from dL/dh [t, sum k]: with a start, A enters as A and as A - A0."""
    if all(one.A0 is None for one in maps):
        return dh
    halves = [dh[:, part].tensor_split(2, 1) for part in parts]
    return torch.cat([own + change for own, change in halves], 1)


class FusedLowRank(torch.autograd.Function):
    """See the module's docstring. Six tensors per map, as in `Map`, after x and two constants."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, scales: tuple[float, ...], training: bool, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        maps = unpack(scales, tensors)
        flat = x.reshape(-1, x.shape[-1])  # [t, n]
        kept = [t for one in maps for t in one._replace(bias=None)[:-1]]
        if fold := cheaper_folded(flat, maps):
            maps = [folded(one) for one in maps]
        base = training_linear if training else F.linear
        ys = [base(flat, one.W, one.bias) for one in maps]  # [t, m]
        downs, ups = zip(*map(thin, maps), strict=True)
        down, parts = side_by_side(downs)
        dtype = within_sum(flat, down)
        ups_T = [up.to(dtype).mT for up in ups]  # [k, m]
        h = flat.new_empty(flat.shape[0], down.shape[0], dtype=down.dtype)  # [t, sum k]
        for rows in blocks(flat, flat.shape[1]):
            torch.mm(flat[rows].to(down.dtype), down.mT, out=h[rows])
            for y, part, up in () if fold else zip(ys, parts, ups_T, strict=True):
                add_product(y[rows], h[rows, part].to(dtype), up)
        wanted = ctx.needs_input_grad[BEFORE:]
        # x for the gradient of an A, h for that of a B
        ctx.save_for_backward(
            x if any(wanted[2::6]) else None,
            of_A(h, maps, parts) if any(wanted[3::6]) else None,
            *kept,
        )
        ctx.scales, ctx.shape, ctx.fold = scales, x.shape, fold
        ctx.set_materialize_grads(False)  # a result that nobody used has no gradient
        return tuple(shaped(y, x) for y in ys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, h, *tensors = ctx.saved_tensors
        every = unpack(ctx.scales, tensors)
        used = [i for i, dy in enumerate(grads) if dy is not None]
        if not used:
            return (None,) * (BEFORE + len(tensors))
        maps = [folded(every[i]) if ctx.fold else every[i] for i in used]
        dys = [grads[i].reshape(-1, grads[i].shape[-1]) for i in used]  # [t, m]
        flat = None if x is None else x.reshape(-1, x.shape[-1])  # [t, n]
        downs, ups = zip(*map(thin, maps), strict=True)
        down, parts = side_by_side(downs)
        A, parts_A = side_by_side([one.A for one in maps])
        parts_h = side_by_side([one.A for one in every])[1]
        wide = emulated(dys[0]) and down.dtype == torch.float32
        dtype = within_sum(dys[0], down)
        dx = base_gradient(maps, dys, wide) if ctx.needs_input_grad[0] else None
        dA = None if flat is None else torch.zeros_like(A)
        dBs = [None if h is None else torch.zeros_like(one.B.mT) for one in maps]  # [r, m]
        for rows in blocks(dys[0], max(down.shape[1], *(one.W.shape[0] for one in maps))):
            dx_rows = None  # of the base, in fp32
            if wide and dx is not None:
                dx_rows = down.new_zeros(len(dx[rows]), down.shape[1])  # [block, n]
            dhs = []
            for i, one, up, dB, whole in zip(used, maps, ups, dBs, dys, strict=True):
                dy = whole[rows].to(down.dtype)  # [block, m], one copy at a time
                if dB is not None:
                    dB.addmm_(h[rows, parts_h[i]].mT, dy, alpha=one.scale)
                if dx_rows is not None:
                    dx_rows.addmm_(dy, one.W.float())
                dhs.append(dy @ up)
            dh = torch.cat(dhs, -1)  # [block, sum k]
            if dA is not None and flat is not None:
                dA.addmm_(into_A(dh, maps, parts).mT, flat[rows].to(down.dtype))
            if dx_rows is not None and dx is not None:
                dx[rows] = dx_rows.addmm_(dh, down).to(dx.dtype)
            elif dx is not None and not ctx.fold:
                add_product(dx[rows], dh.to(dtype), down.to(dtype))
        found: list[Tensor | None] = [None] * (BEFORE + len(tensors))
        found[0] = None if dx is None else dx.view(ctx.shape)
        for i, part, dB in zip(used, parts_A, dBs, strict=True):
            found[BEFORE + 6 * i + 2] = None if dA is None else dA[part]
            found[BEFORE + 6 * i + 3] = None if dB is None else dB.mT.contiguous()
        return tuple(found)


def training_linear(x: Tensor, W: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear with the products of a training pass."""
    return product(x, W.mT, bias)


def base_gradient(maps: Sequence[Map], dys: Sequence[Tensor], wide: bool) -> Tensor:
    """dL/dx [t, n] of the frozen maps; with `wide` uninitialised, as the blocks fill it."""
    if wide:
        return dys[0].new_empty(dys[0].shape[0], maps[0].W.shape[1])
    dx = product(dys[0], maps[0].W)
    for one, dy in zip(maps[1:], dys[1:], strict=True):
        add_product_(dx, dy, one.W)
    return dx


class WideGradient(torch.autograd.Function):
    """x W^T + b with W and b frozen; dL/dx = dy W as an fp32 product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, bias: Tensor | None) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(W)
        return shaped(F.linear(x, W, bias), x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (W,) = ctx.saved_tensors
        return (dy.float() @ W.float()).to(W.dtype), None, None


def blocks(flat: Tensor, width: int) -> list[slice]:
    """Slices of rows whose copies of this width fit a CPU's cache; one if nothing is copied."""
    rows = size = flat.shape[0]
    if flat.device.type == "cpu" and flat.dtype != torch.float32:
        size = min(BLOCK, max(128, CACHED // width // 128 * 128))
    return [slice(start, start + size) for start in range(0, rows, max(1, size))]
