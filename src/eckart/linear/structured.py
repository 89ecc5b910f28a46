"""A linear map as a named sum of terms, installed in the existing module.

    y = gain * sum_i term_i(x) + bias

Terms become children of the module (`q_proj.lora.A` beside `q_proj.weight`), and the module's class
becomes a cached subclass of its own class: names, ties, dtype checks and other code that inspects
the module continue to work. Where the dense matrix is dropped, its parameter is removed and a
read-only `weight` replaces it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from types import MethodType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from eckart.errors import UsageError
from eckart.linear.mixing import NOTHING, Branch, Mix
from eckart.linear.sites import (
    HOOKED,
    Site,
    as_matrix,
    as_stored,
    dequantised,
    kind_of,
    quantised,
)
from eckart.linear.term import Gain, Product, Term, plain_mm

mixins: dict[str, type] = {}
"""Kind of layer -> its forward as a sum; filled by `layers.py`."""


@dataclass
class Sum:
    """A structured module's record of the names of its parts, per parameter."""

    kind: str
    use: dict[str, Branch] = field(default_factory=dict)  # the active terms and gain
    children: dict[str, list[str]] = field(default_factory=dict)  # all of them, active or not
    mix: dict[str, Mix] = field(default_factory=dict)  # if several adapters are active
    owner: Any = None  # the module that has the terms, if it is another one (tied)
    flipped: bool = False  # this end of a tied pair applies the transposed map
    mm: Product = plain_mm
    enabled: bool = True
    peers: Any = None  # this map and those that are given the same input, see `peers.py`


class Structured(nn.Module):
    """Mixed into a module's own class. The kind of layer defines `forward`."""

    _sum: Sum
    _mixin: ClassVar[type]
    _own: ClassVar[type]  # the layer's class without terms
    _dropped: ClassVar[bool]  # is there no dense matrix?

    def active_parts(self, param: str = "weight") -> Branch:
        """The active terms and gain of one parameter, under their names in the module."""
        return self._sum.use.get(param, NOTHING)

    def parts_of(self, branch: Branch) -> tuple[list[Term], Gain | None]:
        """The terms and the gain of a branch."""
        terms: list[Term] = [getattr(self, name) for name in branch.terms]
        return terms, None if branch.gain is None else getattr(self, branch.gain)

    def matrix(self, param: str = "weight") -> Tensor | None:
        """The dense matrix [*, m, n] without terms; None where it was dropped."""
        tensor: Tensor | None = self._parameters.get(param)
        if quantised(tensor) and tensor is not None:
            return dequantised(tensor.detach(), self)
        return None if tensor is None else as_matrix(tensor, self, self._sum.kind)

    def merged(self, param: str = "weight") -> Tensor:
        """The matrix equal to the active sum, [*, m, n], in fp64."""
        base, mix = self.matrix(param), self._sum.mix.get(param)
        if mix is not None and base is not None:
            whole = base.detach().double()
            changes = [b.weight * (self.sum_of(param, b) - whole) for b in mix.branches if b.terms]
            return torch.stack([whole, *changes]).sum(0)
        return self.sum_of(param, self.active_parts(param))

    def sum_of(self, param: str, branch: Branch) -> Tensor:
        """The base's matrix plus one branch, ignoring its weight: [*, m, n], in fp64."""
        base, (terms, gain) = self.matrix(param), self.parts_of(branch)
        parts = [] if base is None else [base.detach().double()]
        parts += [term.dense().detach().double() for term in terms]
        total = torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]
        if gain is not None and base is not None:
            total = total * gain.factor(base, terms).detach().double().unsqueeze(-1)
        return total

    def __reduce_ex__(self, protocol: Any) -> Any:
        # A class made here cannot be found by name: pickle names what it was made of. The state
        # comes after the object, so that a term may refer to the module it lives in.
        return _revive, (self._mixin, self._own, self._dropped), self.__getstate__()


def _revive(mixin: type, own: type, dropped: bool) -> nn.Module:
    return object.__new__(structured_class(mixin, own, dropped=dropped))


@cache
def structured_class(mixin: type, own: type, *, dropped: bool) -> type:
    """The subclass of a layer's own class that computes a sum of terms; cached.

    If the dense matrix was dropped it has a read-only `weight`, computed from the terms.
    """
    names: dict[str, Any] = {"_mixin": mixin, "_own": own, "_dropped": dropped}
    if dropped:
        names["weight"] = property(read_only_weight)
    return type(f"Structured{own.__name__}", (mixin, own), names)


def read_only_weight(module: Structured) -> Tensor:
    """The matrix of the sum in the layer's own layout, computed on access."""
    reference = next(module.parameters())
    return as_stored(module.merged().to(reference.dtype), module, module._sum.kind)


def install(site: Site, parts: Mapping[str, nn.Module], drop: bool = False) -> None:
    """Make a site's module a sum: its dense matrix (unless dropped) plus `parts`.

    `parts` maps names to terms, and may include a Gain. Tied modules get an unregistered reference
    to the terms. With `drop` the dense parameter is removed.
    """
    module: Any = site.module
    if site.kind == "conv" and getattr(module, "groups", 1) != 1:
        raise UsageError(
            "a convolution in groups cannot carry terms",
            [(site.path, f"groups = {module.groups}: its outputs see different inputs")],
            "Leave it out of weights.targets.",
        )
    mixin = mixins[site.kind]
    if not isinstance(module, Structured):
        change_class(module, structured_class(mixin, module.__class__, dropped=False))
        module.__dict__["_sum"] = Sum(site.kind)
    record: Sum = module.__dict__["_sum"]
    for name, part in parts.items():
        child = site.prefix + name
        if hasattr(module, child):
            raise UsageError(
                "there is something of this name already",
                [(site.path, child)],
                "Call remove() first, or pass another name=.",
            )
        module.add_module(child, part)
        record.children.setdefault(site.param, []).append(child)
        now = record.use.get(site.param, NOTHING)
        gained = isinstance(part, Gain)
        change = {"gain": child} if gained else {"terms": (*now.terms, child)}
        record.use[site.param] = replace(now, **change)
    if drop:
        drop_dense(site)
    for other in site.tied_modules:
        if not isinstance(other, Structured):
            tie(other, site)


def tie(other: Any, owner: Site) -> None:
    """Make another module that shares a site's matrix use the site's terms."""
    kind = kind_of(other)
    assert kind is not None  # find_sites saw it as a layer
    change_class(other, structured_class(mixins[kind], other.__class__, dropped=False))
    flipped = (owner.kind == "embedding") != (kind == "embedding")
    # Not registered: a module registered twice would make saving raise.
    other.__dict__["_sum"] = Sum(kind, owner=owner.module, flipped=flipped)


def drop_dense(site: Site) -> None:
    """Remove the dense parameter; on single maps a read-only `weight` replaces it."""
    module = site.module
    del module._parameters[site.param]
    if site.kind == "experts":
        return
    assert isinstance(module, Structured)
    change_class(module, structured_class(module._mixin, module._own, dropped=True))


def uninstall(
    module: nn.Module, param: str = "weight", names: Collection[str] | None = None
) -> None:
    """Remove the terms of one parameter, all or those with these names in the module.

    The module's own class is restored when no term is left.
    """
    if not isinstance(module, Structured):
        return
    record = module._sum
    here = record.children.get(param, [])
    leaving = [name for name in here if names is None or name in names]
    for name in leaving:
        delattr(module, name)
        here.remove(name)
    activate(module, param, [])
    if not any(record.children.values()):
        restore_class(module)


def activate(
    module: Structured, param: str, branches: Sequence[Branch], rows: Tensor | None = None
) -> None:
    """Make these branches, and no others, the active sum of a parameter."""
    record = module._sum
    record.mix.pop(param, None)
    plain = rows is None and all(b.weight == 1.0 for b in branches)
    if plain and len(branches) < 2:
        record.use[param] = branches[0] if branches else NOTHING
        return
    record.use[param] = NOTHING
    record.mix[param] = Mix(tuple(branches), rows)


def change_class(module: nn.Module, cls: type) -> None:
    """Change a module's class to one with the same layout.

    accelerate's hooks (models on several devices) hold the forward of the old class, so they are
    given the new one.
    """
    module.__class__ = cls
    if HOOKED in vars(module):
        vars(module)[HOOKED] = MethodType(cls.forward, module)  # type: ignore[attr-defined]


def restore_class(module: Structured) -> None:
    """Restore a module's own class."""
    change_class(module, module._own)
    del module.__dict__["_sum"]


def fold(site: Site, dtype: torch.dtype | None = None) -> Tensor:
    """The merged matrix of a site in its stored layout, rounded once (by default to its dtype)."""
    module: Any = site.module
    reference = module._parameters.get(site.param)
    reference = next(module.parameters()) if reference is None else reference
    merged = as_stored(module.merged(site.param), module, site.kind)
    return merged.to(dtype or reference.dtype).contiguous()
