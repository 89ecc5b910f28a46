"""Peers: maps to which a model gives the same input (q, k, v; gate, up)."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from eckart.linear.structured import Structured


class Peers:
    """Maps with the same input, and results computed for all of them at once.

    A result is returned only for the tensor that it was computed from, unchanged since then.
    """

    def __init__(self, members: Sequence[nn.Module]):
        self.members = list(members)
        self.common: Common | None = None
        self.forget()

    def __getstate__(self) -> dict[str, Any]:
        return {"members": self.members}

    def __setstate__(self, state: dict[str, Any]) -> None:
        Peers.__init__(self, **state)

    def forget(self) -> None:
        """Drop results that were not used."""
        self.input: Any = None  # a weak reference, and the version of what it refers to
        self.waiting: dict[int, Tensor] = {}  # id of a member -> its result

    def keep(self, x: Tensor, results: Sequence[Tensor]) -> None:
        """Store the results of all members for an input."""
        self.input = weakref.ref(x), x._version
        self.waiting = {id(m): y for m, y in zip(self.members, results, strict=True)}

    def take(self, layer: nn.Module, x: Tensor) -> Tensor | None:
        """The stored result for a layer, if computed from this very input; it is removed."""
        if self.input is None or self.input[0]() is not x or self.input[1] != x._version:
            return None
        return self.waiting.pop(id(layer), None)


@dataclass
class Common:
    """A value that depends on the input alone, and how many members have not asked for it yet."""

    input: weakref.ref[Tensor]
    key: tuple[Hashable, int]  # which value it is, and the version of the input
    value: Tensor
    left: int


def once(peers: Peers | None, x: Tensor, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
    """A value that depends on x alone: computed for the first member, dropped after the last."""
    if peers is None or torch.compiler.is_compiling() or x.is_inference():
        return make()
    known, named = peers.common, (key, x._version)
    if known is None or known.input() is not x or known.key != named:
        known = peers.common = Common(weakref.ref(x), named, make(), len(peers.members))
    known.left -= 1
    if not known.left:
        peers.common = None
    return known.value


def make_peers(modules: Sequence[nn.Module]) -> None:
    """Register structured maps as having the same input."""
    peers = Peers(modules)
    for module in modules:
        if isinstance(module, Structured):
            module._sum.peers = peers
