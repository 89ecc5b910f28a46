"""A linear map as a named sum of terms, in the place where the map already lives.

    y = gain * sum_i term_i(x) + bias

Terms become children of the module (`q_proj.lora.A` beside `q_proj.weight`) and the
module's class becomes a cached subclass of its own class: names, ties, dtype checks and
foreign code that looks at the module go on working. Where the dense matrix is dropped, its
parameter goes and a read-only `weight` stands for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eckart.linear.lowrank import LowRank, linear_plus_low_rank
from eckart.linear.sites import Site, as_matrix, as_stored
from eckart.linear.term import Gain, Product, Term, plain_mm

kernels: dict[Callable[..., Any], Callable[..., Any]] = {}
"""Faster forms of plain functions, filled by `eckart.kernels`; empty, all still runs."""


@dataclass
class Sum:
    """What a structured module remembers: the names of its terms, per parameter."""

    kind: str
    terms: dict[str, list[str]]  # parameter -> names of its terms, in order
    gain: dict[str, str]  # parameter -> name of its gain
    owner: nn.Module | None = None  # where the terms live, when they live elsewhere (tied)
    flipped: bool = False  # this end of a tied pair runs the map backwards
    mm: Product = plain_mm
    enabled: bool = True


class Structured(nn.Module):
    """Mixed into a module's own class. `forward` is given by the kind of layer."""

    _sum: Sum

    def children_of(self, param: str = "weight") -> dict[str, Term]:
        """The terms of one parameter by name, without the parameter's prefix."""
        prefix = f"{param}_" if self._sum.kind == "experts" else ""
        names = self._sum.terms.get(param, ())
        return {name: getattr(self, prefix + name) for name in names}

    def gain_of(self, param: str = "weight") -> Gain | None:
        """The gain of one parameter, or None."""
        name = self._sum.gain.get(param)
        return None if name is None else getattr(self, name)

    def matrix(self, param: str = "weight") -> Tensor | None:
        """The dense matrix [*, m, n] without terms; None where it was dropped."""
        tensor = self._parameters.get(param)
        return None if tensor is None else as_matrix(tensor, self, self._sum.kind)

    def merged(self, param: str = "weight") -> Tensor:
        """The matrix that the whole sum stands for, [*, m, n], in fp64."""
        base = self.matrix(param)
        terms = list(self.children_of(param).values())
        parts = [] if base is None else [base.detach().double()]
        parts += [term.dense().detach().double() for term in terms]
        total = torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]
        gain = self.gain_of(param)
        if gain is not None and base is not None:
            total = total * gain.factor(base, terms).detach().double().unsqueeze(-1)
        return total

    def __reduce_ex__(self, protocol: int) -> Any:
        # A dynamic class cannot be found by name: pickle names its base and its mixin.
        mixin, base = type(self).__bases__
        return _revive, (mixin, base, self.__getstate__())


def _revive(mixin: type, base: type, state: dict[str, Any]) -> nn.Module:
    module = base.__new__(structured_class(mixin, base))
    module.__setstate__(state)
    return module


def _linear_sum(module: Structured, x: Tensor, base: Callable[[Tensor], Tensor] | None) -> Tensor:
    """The sum for x [*, t, n]; `base` computes the dense part with its bias, if there is one."""
    record, terms, gain = module._sum, list(module.children_of().values()), module.gain_of()
    bias = getattr(module, "bias", None)
    if gain is None and base is not None and record.mm is plain_mm:
        if kernels and record.kind == "linear" and (lone := lone_low_rank(module, terms)):
            fast = kernels.get(linear_plus_low_rank, linear_plus_low_rank)
            return fast(x, module.weight, bias, lone.A, lone.B, lone.scale)
        y = base(x)
        for term in terms:
            y = y + term(x).to(y.dtype)
        return y
    W = module.matrix()
    y = None if W is None else record.mm(x, W.mT)
    for term in terms:
        part = term(x)
        y = part.to(x.dtype) if y is None else y + part.to(y.dtype)
    if y is None:
        raise RuntimeError("a structured module without a dense matrix and without terms")
    if gain is not None and W is not None:
        y = y * gain.factor(W, terms).to(y.dtype)
    return y if bias is None else y + bias


def lone_low_rank(module: Structured, terms: list[Term]) -> LowRank | None:
    """The only term, where a fused product may take over: plain LoRA on a plain matrix."""
    if len(terms) != 1 or type(terms[0]) is not LowRank:
        return None
    term = terms[0]
    plain = (
        term.R is None
        and term.B0 is None
        and not term.phi
        and term.branch_gradient is None
        and term.mm is plain_mm
        and not (term.dropout and term.training)
        and type(module.weight.data) is Tensor
    )
    return term if plain else None


class LinearSum(Structured):
    """Linear and Conv1D; also the head of a tied pair, where the map runs backwards."""

    def forward(self, x: Tensor) -> Tensor:
        if not self._sum.enabled:
            return super().forward(x)
        if self._sum.owner is not None:
            return self._tied_forward(x, self._sum.owner)
        has_dense = self._parameters.get("weight") is not None
        return _linear_sum(self, x, super().forward if has_dense else None)

    def _tied_forward(self, x: Tensor, owner: Any) -> Tensor:  # [*, t, m] -> [*, t, n]
        terms, gain, W = list(owner.children_of().values()), owner.gain_of(), owner.matrix()
        if not self._sum.flipped:  # two linear maps that share one matrix
            y = super().forward(x)
            for term in terms:
                y = y + term(x).to(y.dtype)
            return y
        if gain is not None:
            x = x * gain.factor(W, terms).to(x.dtype)
        y = super().forward(x)
        for term in terms:
            y = y + term.back(x).to(y.dtype)
        return y


class EmbeddingSum(Structured):
    """Embedding: columns of the map for the ids. Its own scale multiplies terms too."""

    def forward(self, ids: Tensor) -> Tensor:  # [..] -> [.., m]
        if not self._sum.enabled:
            return super().forward(ids)
        owner: Any = self._sum.owner or self
        terms, gain = list(owner.children_of().values()), owner.gain_of()
        y = super().forward(ids) if self._parameters.get("weight") is not None else None
        scale = getattr(self, "embed_scale", None)
        for term in terms:
            part = term.columns(ids)
            part = part if scale is None else part * torch.as_tensor(scale, dtype=part.dtype)
            y = part if y is None else y + part.to(y.dtype)
        if gain is not None:
            y = y * gain.factor(owner.matrix(), terms).to(y.dtype)
        return y


class ConvSum(Structured):
    """Conv2d, one group: terms see patches [*, t, c * kh * kw]."""

    def forward(self, x: Tensor) -> Tensor:  # [b, c, h, w] -> [b, m, h', w']
        if not self._sum.enabled:
            return super().forward(x)
        terms, gain, W = list(self.children_of().values()), self.gain_of(), self.matrix()
        patches = self.patches(x)  # [b, t, n]
        y = None if W is None else patches @ W.mT
        for term in terms:
            part = term(patches)
            y = part if y is None else y + part.to(y.dtype)
        y = y if gain is None else y * gain.factor(W, terms).to(y.dtype)
        y = y if self.bias is None else y + self.bias
        h = self.output_size(x.shape[-2], 0)
        return y.mT.unflatten(-1, (h, -1))

    def patches(self, x: Tensor) -> Tensor:
        """Unfold with the convolution's own padding, stride and dilation."""
        if self.padding_mode != "zeros":
            x = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding: Any = 0
        elif isinstance(self.padding, str):
            x, padding = F.pad(x, self._reversed_padding_repeated_twice), 0
        else:
            padding = self.padding
        columns = F.unfold(x, self.kernel_size, self.dilation, padding, self.stride)
        return columns.mT  # [b, t, n]

    def output_size(self, size: int, axis: int) -> int:
        """Length of the output along one axis."""
        both = self._reversed_padding_repeated_twice
        padding = both[-1 - 2 * axis] + both[-2 - 2 * axis]
        reach = self.dilation[axis] * (self.kernel_size[axis] - 1)
        return (size + padding - reach - 1) // self.stride[axis] + 1


class ExpertSum(Structured):
    """Fused experts: terms run on tokens sorted by expert; the dense update is never formed."""

    def forward(self, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """x [t, d], top_k_index and top_k_weights [t, k] -> [t, d]."""
        if not self._sum.enabled:
            return super().forward(x, top_k_index, top_k_weights)
        k = top_k_index.shape[-1]
        expert = top_k_index.reshape(-1)  # [t k]
        order = torch.argsort(expert, stable=True)
        counts = torch.bincount(expert, minlength=self.num_experts)[: self.num_experts]
        offsets = [0, *counts.cumsum(0).tolist()]
        order = order[: offsets[-1]]  # ids beyond the last expert mark tokens of other ranks
        h = x[order // k]
        gated = getattr(self, "has_gate", True)
        first = "gate_up_proj" if gated else "up_proj"
        h = self.product(first, h, offsets)
        h = self._apply_gate(h) if gated else self.act_fn(h)
        h = self.product("down_proj", h, offsets)
        h = h * top_k_weights.reshape(-1)[order, None].to(h.dtype)
        out = torch.zeros(x.shape[0] * k, x.shape[-1], dtype=h.dtype, device=h.device)
        out = out.index_copy(0, order, h)
        return out.view(x.shape[0], k, -1).sum(1).to(x.dtype)

    def product(self, param: str, x: Tensor, offsets: list[int]) -> Tensor:
        """One of the experts' maps on sorted tokens x [t, n] -> [t, m]."""
        spans = [(e, a, b) for e, (a, b) in enumerate(zip(offsets, offsets[1:], strict=False))]
        W, terms, gain = self.matrix(param), self.children_of(param), self.gain_of(param)
        bias = getattr(self, f"{param}_bias", None)
        mm = self._sum.mm
        y = None
        if W is not None:
            y = torch.cat([mm(x[a:b], W[e].mT) for e, a, b in spans])
        for term in terms.values():
            part = term.grouped(x, offsets)
            y = part.to(x.dtype) if y is None else y + part.to(y.dtype)
        per_token = torch.cat([torch.full((b - a,), e) for e, a, b in spans]).to(x.device)
        if gain is not None:
            y = y * gain.factor(W, list(terms.values()))[per_token].to(y.dtype)
        return y if bias is None else y + bias[per_token]


MIXINS: dict[str, type[Structured]] = {
    "linear": LinearSum,
    "conv1d": LinearSum,
    "embedding": EmbeddingSum,
    "conv2d": ConvSum,
    "experts": ExpertSum,
}
_classes: dict[tuple[type, type], type] = {}


def structured_class(mixin: type, base: type) -> type:
    """The cached subclass of a layer's own class; one per (mixin, base)."""
    if (mixin, base) not in _classes:
        _classes[mixin, base] = type(f"Structured{base.__name__}", (mixin, base), {})
    return _classes[mixin, base]


def dropped_class(mixin: type, base: type) -> type:
    """As `structured_class`, with a read-only `weight` computed from the terms."""
    return structured_class(dropped_mixin(mixin), base)


_dropped: dict[type, type] = {}


def dropped_mixin(mixin: type) -> type:
    """The mixin with a read-only weight."""
    if mixin not in _dropped:
        name = f"Dropped{mixin.__name__}"
        _dropped[mixin] = type(name, (mixin,), {"weight": property(read_only_weight)})
        _dropped[mixin].__module__ = __name__
        globals()[name] = _dropped[mixin]  # so that pickle finds it by name
    return _dropped[mixin]


def read_only_weight(module: Structured) -> Tensor:
    """The matrix of the sum in the layer's own layout, computed when asked for."""
    reference = next(module.parameters())
    matrix = module.merged().to(reference.dtype)
    return matrix.mT if module._sum.kind in ("conv1d", "embedding") else matrix


def install(site: Site, parts: Mapping[str, nn.Module], drop: bool = False) -> None:
    """Make a site's module a sum: its dense matrix (unless dropped) plus `parts`.

    `parts` maps names to terms; a Gain stands under any name. Tied modules get an
    unregistered reference to the terms. With `drop` the dense parameter is removed.
    """
    module = site.module
    mixin = MIXINS[site.kind]
    if not isinstance(module, Structured):
        module.__class__ = structured_class(mixin, type(module))
        module.__dict__["_sum"] = Sum(site.kind, {}, {})
    record: Sum = module.__dict__["_sum"]
    for name, part in parts.items():
        child = site.prefix + name
        if hasattr(module, child):
            raise ValueError(f"{site.path} already has something called {child!r}")
        module.add_module(child, part)
        if isinstance(part, Gain):
            record.gain[site.param] = child
        else:
            record.terms.setdefault(site.param, []).append(name)
    if drop:
        drop_dense(site)
    for other in site.tied_modules:
        flipped = (site.kind == "embedding") != (type_kind(other) == "embedding")
        tie(other, module, flipped)


def type_kind(module: nn.Module) -> str:
    """The kind of a module that may already be structured."""
    if isinstance(module, Structured):
        return module._sum.kind
    return "embedding" if isinstance(module, nn.Embedding) else "linear"


def tie(other: nn.Module, owner: nn.Module, flipped: bool) -> None:
    """Let another module that shares the matrix run the owner's terms."""
    if isinstance(other, Structured):
        return
    kind = type_kind(other)
    other.__class__ = structured_class(MIXINS[kind], type(other))
    # Not registered: a module registered twice would make saving raise.
    other.__dict__["_sum"] = Sum(kind, {}, {}, owner=owner, flipped=flipped)


def drop_dense(site: Site) -> None:
    """Remove the dense parameter; a read-only `weight` stands in for it on single maps."""
    module = site.module
    del module._parameters[site.param]
    if site.kind == "experts":
        return
    mixin, base = type(module).__bases__
    module.__class__ = dropped_class(mixin, base)


def uninstall(module: nn.Module, param: str = "weight") -> None:
    """Take the terms of one parameter away; the class goes back when none is left."""
    if not isinstance(module, Structured):
        return
    record = module._sum
    prefix = f"{param}_" if record.kind == "experts" else ""
    for name in record.terms.pop(param, []):
        delattr(module, prefix + name)
    if param in record.gain:
        delattr(module, record.gain.pop(param))
    if not record.terms and not record.gain:
        restore_class(module)


def restore_class(module: nn.Module) -> None:
    """Give a module its own class back."""
    module.__class__ = type(module).__bases__[1]
    del module.__dict__["_sum"]


def fold(site: Site) -> Tensor:
    """The merged matrix of a site in its stored layout and dtype, rounded once."""
    module: Any = site.module
    reference = module._parameters.get(site.param)
    dtype = reference.dtype if reference is not None else next(module.parameters()).dtype
    matrix = module.merged(site.param)
    shape = reference.shape if reference is not None else torch.Size(matrix.shape)
    return as_stored(matrix, module, site.kind, shape).to(dtype).contiguous()
