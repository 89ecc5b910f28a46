"""Caches values that change only when the optimizer steps, across passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Cached(Generic[T]):
    """The latest value of a pure function of tensors.

    It is reused while the tensors hold the same numbers, compared with a copy: torch's version
    counters miss writes through `.data` and what FSDP gathers. `frozen` tensors, too large for a
    copy, are compared by address and version, `scalars` by value. Nothing is cached while
    compiling or under torch.func, for fake, sharded or inference tensors, or on an accelerator,
    where a comparison would synchronise the host in every pass. Copies and pickles start empty.
    """

    def __init__(self) -> None:
        self.value: Any = None
        self.copies: tuple[Tensor, ...] = ()
        self.places: tuple[Any, ...] = ()

    def __reduce__(self) -> Any:
        return type(self), ()

    def __call__(
        self,
        compute: Callable[[], T],
        tensors: Sequence[Tensor],
        frozen: Sequence[Tensor] = (),
        scalars: tuple[float, ...] = (),
    ) -> T:
        """compute() without a gradient, or the value cached for the same numbers."""
        traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
        if traced or not all(map(comparable, (*tensors, *frozen))):
            with torch.no_grad():
                return compute()
        # a value made in inference mode could not be used by the training that comes after
        with torch.inference_mode(False), torch.no_grad():
            places = (scalars, *((t.data_ptr(), t._version, t.dtype, t.shape) for t in frozen))
            if places != self.places or not same(tensors, self.copies):
                self.value = compute()
                self.copies, self.places = tuple(t.detach().clone() for t in tensors), places
            return self.value


def comparable(tensor: Tensor) -> bool:
    """Is this an ordinary tensor (not fake, inference or distributed) on the CPU?"""
    ordinary = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.is_cpu
    return ordinary and not tensor.is_inference()


def same(tensors: Sequence[Tensor], copies: Sequence[Tensor]) -> bool:
    """Do these tensors equal their copies, in the same dtype and on the same device?"""
    return len(tensors) == len(copies) and all(
        t.dtype == c.dtype and t.device == c.device and torch.equal(t, c)
        for t, c in zip(tensors, copies, strict=True)
    )
