"""The contract of a term: one summand of a linear map.

    y = gain * sum_i term_i(x) + bias

m out, n in, t tokens, * any leading dimensions (fused experts have one per expert).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

Product = Callable[[Tensor, Tensor], Tensor]


def plain_mm(x: Tensor, w: Tensor) -> Tensor:
    """x [*, t, n] times w [*, n, m]: the product that a precision may replace."""
    return x @ w


def alike(*tensors: Tensor) -> bool:
    """Do they have one dtype, with autocast off? Matrices may then be added before a product."""
    off = not torch.is_autocast_enabled(tensors[0].device.type)
    return off and len({t.dtype for t in tensors}) == 1


def by_expert(x: Tensor, offsets: list[int], run: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Call run(rows, e) on each expert's rows, if it has any: x [t, n] sorted -> [t, m]."""
    spans = enumerate(zip(offsets, offsets[1:], strict=False))
    parts = [run(x[a:b], e) for e, (a, b) in spans if b > a]
    return torch.cat(parts) if parts else run(x[:0], 0)


class Pair(NamedTuple):
    """The factors of a term scale * (B A - B0 A0), for a product fused with the base's."""

    A: Tensor  # [r, n]
    B: Tensor  # [m, r]
    scale: float = 1.0
    start: tuple[Tensor, Tensor] | None = None  # B0 [m, r], A0 [r, n], frozen


class Part(nn.Module):
    """A module that can be rebuilt from plain data: terms, gains, shared tensors."""

    @classmethod
    def empty(cls, tensors: Mapping[str, Mapping[str, Any]], scalars: Mapping[str, Any]) -> Self:
        """A part with stored shapes but without values, to load into; its __init__ is not called.

        `tensors` maps names to {shape, dtype, trained} and `scalars` are plain attributes, as
        `describe` wrote them. A part with derived tensors that are not saved overrides this to
        compute them again.
        """
        part = cls.__new__(cls)
        nn.Module.__init__(part)
        vars(part).update(scalars)
        for name, spec in tensors.items():
            tensor = torch.empty(spec["shape"], dtype=getattr(torch, spec["dtype"]))
            part.register(name, tensor, spec["trained"])
        return part

    def register(self, name: str, tensor: Tensor | None, trained: bool) -> None:
        """Register a parameter if it is trained, or a saved buffer if it is frozen or None."""
        if tensor is not None and trained:
            self.register_parameter(name, nn.Parameter(tensor))
        else:
            self.register_buffer(name, tensor)


class Term(Part):
    """One summand. A subclass defines `forward` and, if it is linear, `dense`."""

    linear: ClassVar[bool] = True
    """False where a nonlinearity stands between the factors: then there is no dense()."""
    rank_axes: ClassVar[dict[str, int]] = {}
    """The axis along which rank components lie, for each tensor that has them."""
    mm: Product = staticmethod(plain_mm)
    """How products are computed; an instance attribute where a precision sets it."""
    dropout: float = 0.0
    """Share of its inputs that is dropped in training, where a term does that."""

    def forward(self, x: Tensor) -> Tensor:
        """x [*, t, n] -> [*, t, m]."""
        raise NotImplementedError

    def dense(self) -> Tensor:
        """The term as a matrix [*, m, n], in the dtype of its tensors."""
        raise NotImplementedError(f"{type(self).__name__} is not linear: it has no dense form")

    def back(self, x: Tensor) -> Tensor:
        """x [*, t, m] -> [*, t, n], the transposed map, for the other end of a tied pair."""
        return self.mm(x, self.dense().to(x.dtype))

    def columns(self, ids: Tensor) -> Tensor:
        """Columns of the map for token ids [..]: [.., m]."""
        return self.dense().mT[ids]

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """Exact B [*, m, r], A [*, r, n] with dense() = B A, the scale inside B; else None."""
        return None

    def pair(self) -> Pair | None:
        """The factors that `forward` multiplies by, if it does nothing else; else None."""
        return None

    def with_base(self, x: Tensor, W: Tensor, bias: Tensor | None) -> Tensor | None:
        """x (W + dense())^T + bias for the site's frozen W [m, n] and bias, if one product for both
        is cheaper and equals the base while dense() is zero; else None.
        """
        return None

    def grouped(self, x: Tensor, offsets: list[int]) -> Tensor:
        """Ragged tokens sorted by expert: x [t, n], expert e owns rows offsets[e]:offsets[e+1].

        Runs the term once per expert on that expert's slice of its tensors.
        """
        tensors = {**dict(self.named_parameters()), **dict(self.named_buffers())}

        def own(rows: Tensor, e: int) -> Tensor:
            return functional_call(self, {name: t[e] for name, t in tensors.items()}, rows)

        return by_expert(x, offsets, own)

    def dropped(self, x: Tensor) -> Tensor:
        """x with dropout in training."""
        return F.dropout(x, self.dropout, self.training) if self.dropout else x

    def bind(self, shared: Mapping[str, nn.Module], home: nn.Module, param: str) -> None:
        """Take references to modules elsewhere: shared bases, the site's own matrix.

        `shared` are the modules at the model's root; `home.matrix(param)` is the dense matrix [*,
        m, n] beside this term. Called after building and after loading. Store references with
        `self.__dict__[...] = module`, so that they are not registered: a module registered twice
        would be saved twice.
        """

    def pack(self, name: str, tensor: Tensor) -> Tensor | None:
        """One of its tensors, whole and on the CPU, in the form that files store, if fewer bits
        give the same function; None if it is stored as it is.
        """
        return None

    def unpack(self, name: str, held: Tensor, shape: torch.Size) -> Tensor:
        """A tensor of this shape, from the result of `pack`."""
        raise NotImplementedError(f"{type(self).__name__} packs nothing")

    def select(self, kept: Tensor) -> None:
        """Keep only these rank components (int64 indices), in place."""
        for name, axis in self.rank_axes.items():
            tensor = getattr(self, name)
            if tensor is None:
                continue
            smaller = tensor.detach().index_select(axis, kept.to(tensor.device)).contiguous()
            if isinstance(tensor, nn.Parameter):
                smaller = nn.Parameter(smaller, requires_grad=tensor.requires_grad)
            setattr(self, name, smaller)


class Gain(Part):
    """A factor for each output row, computed from the site's matrix and its terms."""

    def factor(self, weight: Tensor, terms: list[Term]) -> Tensor:
        """weight [*, m, n] -> [*, m]."""
        raise NotImplementedError


class Shared(Part):
    """Tensors stored once at the model's root, to which terms of many sites refer."""

    def forward(self, x: Any) -> Any:
        """The identity, because a root such as nn.Sequential calls each of its children."""
        return x


def describe(part: nn.Module) -> dict[str, Any]:
    """Plain data for `Part.empty`: a part's class, saved tensors and scalars."""
    tensors = {
        name: {
            "shape": list(tensor.shape),
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "trained": isinstance(tensor, nn.Parameter),
        }
        for name, tensor in part.state_dict(keep_vars=True).items()
    }
    scalars = {
        name: value
        for name, value in vars(part).items()
        if isinstance(value, int | float | str) and name not in ("training", "linear")
    }
    return {"type": type(part).__name__, "tensors": tensors, "scalars": scalars}


def joint_factors(parts: Iterable[nn.Module]) -> tuple[Tensor, Tensor] | None:
    """The parts of one map as one product, concatenated: exact B [*, m, R], A [*, R, n].

    None if there are no parts, or if one is not such a product: a gain, a nonlinear term.
    """
    pairs = [part.factors() if isinstance(part, Term) else None for part in parts]
    known = [pair for pair in pairs if pair is not None]
    if not known or len(known) < len(pairs):
        return None
    return torch.cat([B for B, _ in known], dim=-1), torch.cat([A for _, A in known], dim=-2)


class Dense(Term):
    """A whole matrix as a term: `weight` [*, m, n]."""

    def __init__(self, weight: Tensor, trained: bool = True):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=trained)

    def forward(self, x: Tensor) -> Tensor:
        return self.mm(x, self.weight.mT.to(x.dtype))

    def dense(self) -> Tensor:
        return self.weight
