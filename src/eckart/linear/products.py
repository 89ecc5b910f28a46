"""The dtype in which bf16 activations and fp32 factors are multiplied.

A bf16 product accumulates in fp32 and rounds its result once, as the sum that it is added to is
rounded anyway. It takes a quarter of the time of an fp32 product on processors with bf16 support,
and several times as long where bf16 is emulated. Gradients of fp32 tensors are always computed in
fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eckart.linear.term import alike

BF16_ON_CPU = torch.ops.mkldnn._is_mkldnn_bf16_supported()


def emulated(x: Tensor) -> bool:
    """Are products in x's dtype emulated on this processor? fp32 is then tens of times faster."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and not BF16_ON_CPU


def fitting(x: Tensor, W: Tensor, *trained: Tensor) -> bool:
    """Do all have one dtype, or are x and W in bf16 with fp32 tensors, with autocast off?"""
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
    """y += a @ b in place, all of two dimensions; a and b may have a wider dtype than y."""
    if y.dtype == a.dtype:
        y.addmm_(a, b)
    else:
        y.add_(a @ b)


def shaped(y: Tensor, x: Tensor) -> Tensor:
    """Reshape y [t, m], which an autograd function made from x [.., n], to [.., m].

    Not as a view: a model that adds to its layers' results in place (Falcon) could not change it.
    """
    found: Tensor = torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[-1]))
    return found
