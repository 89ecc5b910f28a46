"""A frozen linear map plus a low-rank term in one autograd function.

    y = x W^T + b + s (x A^T) B^T

The plain form keeps x twice where the factors are fp32 and the base is bf16 (as it is, and
cast), and writes three [t, m] temporaries. Here x is kept once, in its own dtype, with
h = x A^T [t, r]; the scale is folded into thin tensors and the term is added into the
base's result. Thin products run in the factors' dtype, a block of tokens at a time, so that
casts stay in the cache; accuracy is that of the plain form or better.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from eckart.linear import linear_plus_low_rank

BF16_ON_CPU = torch.ops.mkldnn._is_mkldnn_bf16_supported()
BLOCK = 512  # tokens whose fp32 copies (n and m wide) are alive at once


def fused_linear_plus_low_rank(
    x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float
) -> Tensor:
    """As `linear_plus_low_rank`; falls back to it where W is trained or autocast is on."""
    trained = W.requires_grad or (bias is not None and bias.requires_grad)
    if trained or torch.is_autocast_enabled(x.device.type) or not plain(x, A, B):
        return linear_plus_low_rank(x, W, bias, A, B, scale)
    return FusedLowRank.apply(x, W, bias, A, B, scale)


def plain(*tensors: Tensor) -> bool:
    """Are these ordinary tensors (no DTensor, no quantised subclass)?"""
    return all(type(t) in (Tensor, torch.nn.Parameter) for t in tensors)


class FusedLowRank(torch.autograd.Function):
    """See the file's head. W and bias are frozen."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])  # [t, n]
        y = F.linear(flat, W, bias)  # [t, m]
        h = flat.new_empty(flat.shape[0], A.shape[0], dtype=A.dtype)  # [t, r]
        thin = (B * scale).mT  # [r, m]
        for rows in blocks(flat):
            torch.mm(flat[rows].to(A.dtype), A.mT, out=h[rows])
            add_product(y[rows], h[rows], thin)
        ctx.save_for_backward(x, h, W, A, B)
        ctx.scale = scale
        return y.view(*x.shape[:-1], W.shape[0])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, h, W, A, B = ctx.saved_tensors
        flat, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        wide = emulated(W) and A.dtype == torch.float32
        dx = None
        if ctx.needs_input_grad[0]:
            dx = torch.empty_like(flat) if wide else dy @ W  # [t, n]
        base = W.float() if wide else W
        scaled = B * ctx.scale  # [m, r]
        dA, dB = torch.zeros_like(A), torch.zeros_like(B)
        for rows in blocks(flat):
            dy_rows = dy[rows].to(B.dtype)  # [block, m]
            dh = dy_rows @ scaled  # [block, r]
            dB.addmm_(dy_rows.mT, h[rows], alpha=ctx.scale)
            dA.addmm_(dh.mT, flat[rows].to(A.dtype))
            if dx is not None and wide:
                dx[rows] = torch.addmm(dh @ A, dy_rows, base).to(dx.dtype)
            elif dx is not None:
                add_product(dx[rows], dh, A)
        return None if dx is None else dx.view_as(x), None, None, dA, dB, None


def emulated(W: Tensor) -> bool:
    """Are products in W's dtype emulated here? In fp32 they are then tens of times faster."""
    return W.dtype == torch.bfloat16 and W.device.type == "cpu" and not BF16_ON_CPU


def blocks(flat: Tensor) -> list[slice]:
    """Row slices: one where no cast is needed or on an accelerator, else of BLOCK tokens."""
    rows = flat.shape[0]
    size = rows if flat.device.type != "cpu" or flat.dtype == torch.float32 else BLOCK
    return [slice(start, start + size) for start in range(0, rows, max(1, size))]


def add_product(y: Tensor, a: Tensor, b: Tensor) -> None:
    """y += a @ b in place; a and b may be of a wider dtype than y."""
    if y.dtype == a.dtype:
        y.addmm_(a, b)
    else:
        y.add_(a @ b)
