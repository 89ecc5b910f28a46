"""Products of large fp32 matrices on a CPU, by oneDNN where it is faster than MKL.

torch multiplies by MKL, which does not use AVX-512 on other processors than Intel's. oneDNN,
which is part of torch, does: 2.2 times as fast on a Zen 5. The choice depends only on processor,
dtype and shape, so a resumed run computes the same; `torch.backends.mkldnn.enabled = False`
turns it off.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

CACHED = 2**18  # numbers that fit in a core's cache
LEAST = 2**22  # multiplications; below, oneDNN's set-up takes longer than it saves
PIECE = 1024  # of the inner dimension; in one piece the rounding error is 2.2 times MKL's


@cache
def preferred() -> bool:
    """True on a CPU with AVX-512 that MKL is not optimised for (AMD)."""
    known = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return known and wide and "AMD" in torch.cpu.get_capabilities().get("cpu_name", "")


def fits(A: Tensor, B: Tensor) -> bool:
    """True where oneDNN computes A B, or each product of two stacks, faster. Never while autograd
    records, as the operation has no backward pass."""
    return (
        not torch.compiler.is_compiling()
        and A.is_cpu
        and A.dtype == B.dtype == torch.float32
        and A.dim() == B.dim() >= 2
        and A.shape[:-2] == B.shape[:-2]
        and A.shape[-2:].numel() * B.shape[-1] >= LEAST
        and not torch.is_grad_enabled()
        and bool(torch.backends.mkldnn.enabled)
        and preferred()
    )


def product(A: Tensor, B: Tensor, bias: Tensor | None = None) -> Tensor:
    """A [*, m, k] @ B [*, k, n], plus a bias [n]."""
    if not fits(A, B):
        return A @ B if bias is None else F.linear(A, B.mT, bias)
    if A.dim() > 2:
        pairs = zip(A.flatten(0, -3), B.flatten(0, -3), strict=True)
        each = [product(*pair, bias) for pair in pairs]
        together = each[0] if len(each) == 1 else torch.stack(each)  # of one, no copy
        return together.view(*A.shape[:-1], -1)
    if A.shape[1] <= PIECE:
        return by_onednn(A, B, bias)
    pairs = zip(A.split(PIECE, 1), B.split(PIECE), strict=True)
    first, *others = (by_onednn(a, b) for a, b in pairs)
    for other in others if bias is None else (*others, bias):
        first += other
    return first


def add_product_(C: Tensor, A: Tensor, B: Tensor, alpha: float = 1.0, beta: float = 1.0) -> None:
    """C = beta C + alpha A B in place, for matrices or stacks of them [k, m, n]."""
    if not fits(A, B):
        add_ = C.addmm_ if C.dim() == 2 else C.baddbmm_
        add_(A, B, alpha=alpha, beta=beta)
    elif C.dim() == 3:
        for c, a, b in zip(C, A, B, strict=True):
            add_product_(c, a, b, alpha, beta)
    else:
        rows = max(1, CACHED // C.shape[1])  # so that each product is added while in cache
        for c, a in zip(C.split(rows), A.split(rows), strict=True):
            if beta != 1:
                c.mul_(beta)
            c.add_(product(a, B), alpha=alpha)


def by_onednn(A: Tensor, B: Tensor, bias: Tensor | None = None) -> Tensor:
    multiply = torch.ops.mkldnn._linear_pointwise
    found: Tensor = multiply(dense(A), dense(B.mT), bias, "none", [], "")
    return found


def dense(t: Tensor) -> Tensor:
    """The tensor, copied unless it or its transpose is contiguous: with other strides oneDNN
    takes a hundred times as long."""
    return t if t.is_contiguous() or t.mT.is_contiguous() else t.contiguous()
