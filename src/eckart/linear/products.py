"""In which dtype bf16 activations and fp32 factors are multiplied.

A product in bf16 accumulates in fp32 and rounds its result once, as the sum that it enters is
rounded anyway. It takes a quarter of an fp32 product's time where the processor knows bf16, and
several times as long where that is emulated. Gradients of what is held in fp32 are no such
sums: they are computed in fp32 always.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eckart.linear.term import alike

BF16_ON_CPU = torch.ops.mkldnn._is_mkldnn_bf16_supported()


def emulated(x: Tensor) -> bool:
    """Are products in x's dtype emulated here? In fp32 they are then tens of times faster."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and not BF16_ON_CPU


def fitting(x: Tensor, W: Tensor, *trained: Tensor) -> bool:
    """Are all of one dtype, or x and W in bf16 beside fp32, with autocast off?"""
    if not alike(x, W):
        return False
    kinds = {t.dtype for t in trained}
    return kinds == {x.dtype} or (x.dtype == torch.bfloat16 and kinds == {torch.float32})


def product(x: Tensor, w: Tensor) -> Tensor:
    """x [.., k] w [k, j] in x's dtype; w may be in fp32 where x is in bf16."""
    if emulated(x):
        return (x.float() @ w.float()).to(x.dtype)
    return x @ w.to(x.dtype)


def within_sum(x: Tensor, factor: Tensor) -> torch.dtype:
    """The dtype for a product of thin factors that is added to a result in x's dtype."""
    narrow = x.dtype == torch.bfloat16 and not emulated(x)
    return x.dtype if narrow else torch.promote_types(x.dtype, factor.dtype)


def add_product(y: Tensor, a: Tensor, b: Tensor) -> None:
    """y += a @ b in place, all of two dimensions; a and b may be of a wider dtype than y."""
    if y.dtype == a.dtype:
        y.addmm_(a, b)
    else:
        y.add_(a @ b)


def shaped(y: Tensor, x: Tensor) -> Tensor:
    """y [t, m], which an autograd function made from x [.., n], as [.., m].

    Not as a view: a model that adds to its layers' results in place (Falcon) could not change it.
    """
    found: Tensor = torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[-1]))
    return found
