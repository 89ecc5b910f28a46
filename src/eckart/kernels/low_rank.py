"""A frozen linear map, alone or with a low-rank term, in one autograd function.

    y = x W^T + b + s (x A^T) B^T - s (x A0^T) B0^T

The plain form keeps x twice where the factors are fp32 and the base is bf16 (as it is, and
cast), and writes three [t, m] temporaries. Here x is kept once, in its own dtype and only
where A is trained, with h = x A^T [t, r] where B is; the scale is folded into thin tensors
and the term is added into the base's result. Thin products run in the factors' dtype, a block
of tokens at a time, so that casts stay in the cache; accuracy is that of the plain form or
better.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from eckart.linear import frozen_linear, linear_plus_low_rank

BF16_ON_CPU = torch.ops.mkldnn._is_mkldnn_bf16_supported()
BLOCK = 512  # tokens whose fp32 copies (n and m wide) are alive at once

Start = tuple[Tensor, Tensor]  # B0 [m, r], A0 [r, n]


def fused_linear_plus_low_rank(
    x: Tensor,
    W: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scale: float,
    start: Start | None = None,
) -> Tensor:
    """As `linear_plus_low_rank`; falls back to it where W is trained or autocast is on."""
    B0, A0 = start or (None, None)
    if not ordinary(x, W, bias, A, B, A0, B0):
        return linear_plus_low_rank(x, W, bias, A, B, scale, start)
    return FusedLowRank.apply(x, W, bias, A, B, scale, A0, B0)


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
    return all(t is None or type(t) in (Tensor, torch.nn.Parameter) for t in (x, W, *factors))


class FusedLowRank(torch.autograd.Function):
    """See the file's head. W, bias, A0 and B0 are frozen."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        W: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        scale: float,
        A0: Tensor | None = None,
        B0: Tensor | None = None,
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])  # [t, n]
        y = F.linear(flat, W, bias)  # [t, m]
        h = flat.new_empty(flat.shape[0], A.shape[0], dtype=A.dtype)  # [t, r]
        thin = (B * scale).mT  # [r, m]
        for rows in blocks(flat, A0 is not None):
            wide = flat[rows].to(A.dtype)
            torch.mm(wide, A.mT, out=h[rows])
            if A0 is None or B0 is None:
                add_product(y[rows], h[rows], thin)
            else:  # two products of one shape: equal factors cancel exactly
                y[rows] += h[rows] @ thin - (wide @ A0.mT) @ (B0 * scale).mT
        _, _, _, for_A, for_B, *_ = ctx.needs_input_grad
        ctx.save_for_backward(x if for_A else None, h if for_B else None, W, A, B, A0, B0)
        ctx.scale, ctx.shape = scale, x.shape
        return y.view(*x.shape[:-1], W.shape[0])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, h, W, A, B, A0, B0 = ctx.saved_tensors
        dy = dy.reshape(-1, dy.shape[-1])  # [t, m]
        flat = None if x is None else x.reshape(-1, x.shape[-1])  # [t, n]
        wide = emulated(W) and A.dtype == torch.float32
        base = W.float() if wide else W
        dx = None
        if ctx.needs_input_grad[0]:
            dx = dy.new_empty(dy.shape[0], W.shape[1]) if wide else dy @ W  # [t, n]
        scaled = B * ctx.scale  # [m, r]
        dA = None if flat is None else torch.zeros_like(A)
        dB = None if h is None else torch.zeros_like(B)
        for rows in blocks(dy):
            dy_rows = dy[rows].to(B.dtype)  # [block, m]
            if dB is not None:
                dB.addmm_(dy_rows.mT, h[rows], alpha=ctx.scale)
            if dA is None and dx is None:
                continue
            dh = dy_rows @ scaled  # [block, r]
            if dA is not None and flat is not None:
                dA.addmm_(dh.mT, flat[rows].to(A.dtype))
            if dx is None:
                continue
            if A0 is not None:
                dh, A_ = torch.cat([dh, dy_rows @ (B0 * -ctx.scale)], -1), torch.cat([A, A0])
            else:
                A_ = A
            if wide:
                dx[rows] = torch.addmm(dh @ A_, dy_rows, base).to(dx.dtype)
            else:
                add_product(dx[rows], dh, A_)
        dx = None if dx is None else dx.view(ctx.shape)
        return dx, None, None, dA, dB, None, None, None


class WideGradient(torch.autograd.Function):
    """x W^T + b with W and b frozen; dL/dx = dy W as an fp32 product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, bias: Tensor | None) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(W)
        return F.linear(x, W, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (W,) = ctx.saved_tensors
        return (dy.float() @ W.float()).to(W.dtype), None, None


def emulated(W: Tensor) -> bool:
    """Are products in W's dtype emulated here? In fp32 they are then tens of times faster."""
    return W.dtype == torch.bfloat16 and W.device.type == "cpu" and not BF16_ON_CPU


def blocks(flat: Tensor, temporaries: bool = False) -> list[slice]:
    """Row slices: BLOCK tokens on the CPU where a cast or a temporary is needed, else one."""
    rows = flat.shape[0]
    cast = flat.dtype != torch.float32 or temporaries
    size = BLOCK if flat.device.type == "cpu" and cast else rows
    return [slice(start, start + size) for start in range(0, rows, max(1, size))]


def add_product(y: Tensor, a: Tensor, b: Tensor) -> None:
    """y += a @ b in place; a and b may be of a wider dtype than y."""
    if y.dtype == a.dtype:
        y.addmm_(a, b)
    else:
        y.add_(a @ b)
