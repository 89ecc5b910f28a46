"""How each kind of layer computes its sum of terms; mixed into the layer's own class."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from eckart.linear.lowrank import linear_plus_low_rank
from eckart.linear.mixing import Branch, Mix, change_of, mixed, mixture
from eckart.linear.sites import quantised
from eckart.linear.structured import Structured, mixins
from eckart.linear.term import Gain, Term, by_expert, plain_mm

kernels: dict[Callable[..., Any], Callable[..., Any]] = {}
"""Faster forms of plain functions, filled by `eckart.kernels`; optional."""

PLAIN = (Tensor, FakeTensor)  # subclasses of other packages excluded; estimates use fake tensors


def summed(y: Tensor | None, parts: Iterable[Tensor], dtype: torch.dtype | None = None) -> Tensor:
    """y plus the parts, in y's dtype. If y is None the first part starts the sum, in `dtype`."""
    for part in parts:
        y = part.to(dtype or part.dtype) if y is None else y + part.to(y.dtype)
    assert y is not None  # a map without a dense matrix has terms
    return y


def with_gain(y: Tensor, gain: Gain | None, W: Tensor | None, terms: list[Term]) -> Tensor:
    """y [.., m] times the gain's factor for each row, if there is a gain."""
    return y if gain is None or W is None else y * gain.factor(W, terms).to(y.dtype)


class LinearSum(Structured):
    """Linear and Conv1D; also the head of a tied pair, which applies the transposed map."""

    weight: Tensor
    bias: nn.Parameter | None

    def forward(self, x: Tensor) -> Tensor:
        """x [*, t, n] -> [*, t, m]; m and n are exchanged for the other end of a tied pair."""
        if not self._sum.enabled:
            return self.base(x)
        if self._sum.owner is not None:
            return self.tied(x, self._sum.owner)
        mix = self._sum.mix.get("weight")
        if mix is None and quantised(self._parameters.get("weight")):
            mix = Mix((self.active_parts(),))  # its own forward knows how to multiply
        if mix is not None:
            return mixture(self, mix, x, self.base(x), self.bias)
        (terms, gain), W = self.parts_of(self.active_parts()), self.matrix()
        if W is None or self._sum.mm is not plain_mm:
            return self.parts(x, W)
        if (fused := self.fused(x, W, terms, gain)) is not None:
            return fused
        if gain is not None:
            return self.parts(x, W)
        return summed(self.base(x), (term(x) for term in terms))

    def fused(self, x: Tensor, W: Tensor, terms: list[Term], gain: Gain | None) -> Tensor | None:
        """The base and its only term in fewer products, if the term supports it; else None."""
        # torch.func refuses autograd functions whose forward takes a context
        plain = type(W.data) in PLAIN and not torch._C._are_functorch_transforms_active()
        if self._sum.kind != "linear" or len(terms) != 1 or not plain:
            return None
        y = kernels.get(linear_plus_term, linear_plus_term)(self, x, W, terms[0])
        if y is None or gain is None:
            return y
        y = with_gain(y, gain, W, terms)
        return y if self.bias is None else y + self.bias

    def bias_within(self) -> nn.Parameter | None:
        """The bias that can be part of the product; none under a gain, which does not scale it."""
        return self.bias if self.active_parts().gain is None else None

    def base(self, x: Tensor) -> Tensor:
        """The layer's own forward, bias included."""
        if self._own is nn.Linear and not quantised(self._parameters.get("weight")):
            return kernels.get(frozen_linear, frozen_linear)(x, self.weight, self.bias)
        return super().forward(x)

    def parts(self, x: Tensor, W: Tensor | None) -> Tensor:
        """The sum, product by product: with a gain, another precision or a dropped matrix."""
        y = None if W is None else self._sum.mm(x, W.mT)
        terms, gain = self.parts_of(self.active_parts())
        y = with_gain(summed(y, (term(x) for term in terms), x.dtype), gain, W, terms)
        return y if self.bias is None else y + self.bias

    def tied(self, x: Tensor, owner: Structured) -> Tensor:
        """The other end of a tied pair, whose owner has the terms: [*, t, m] -> [*, t, n]."""
        if mix := owner._sum.mix.get("weight"):
            return mixed(mix, x, self.base(x), lambda b, x, p: self.tied_sum(owner, b, x) - p)
        return self.tied_sum(owner, owner.active_parts(), x)

    def tied_sum(self, owner: Structured, branch: Branch, x: Tensor) -> Tensor:
        """The base and one of the owner's branches, transposed: [*, t, m] -> [*, t, n]."""
        W, (terms, gain) = owner.matrix(), owner.parts_of(branch)
        x = with_gain(x, gain, W, terms)
        parts = (term.back(x) if self._sum.flipped else term(x) for term in terms)
        return summed(self.base(x), parts)


def frozen_linear(x: Tensor, W: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + bias, x [*, t, n] and W [m, n]: the reference that a kernel may replace."""
    return F.linear(x, W, bias)


def linear_plus_term(layer: LinearSum, x: Tensor, W: Tensor, term: Term) -> Tensor | None:
    """A layer's frozen matrix with its only term, before any gain, in fewer products if the
    term supports it, else None. The reference for a kernel that computes several layers with
    the same input at once.
    """
    pair, bias = term.pair(), layer.bias_within()
    if pair is None:
        trained = W.requires_grad or (bias is not None and bias.requires_grad)
        whole = trained or layer.active_parts().gain is not None
        return None if whole else term.with_base(x, W, bias)
    return kernels.get(linear_plus_low_rank, linear_plus_low_rank)(x, W, bias, pair)


class EmbeddingSum(Structured):
    """Embedding: columns of the map for the ids. The layer's own scale also applies to terms."""

    def forward(self, ids: Tensor) -> Tensor:
        """ids [..] -> [.., m]."""
        if not self._sum.enabled:
            return super().forward(ids)
        owner: Any = self._sum.owner or self
        if mix := owner._sum.mix.get("weight"):
            return mixed(mix, ids, super().forward(ids), change_of(owner, self.look_up))
        W, (terms, gain) = owner.matrix(), owner.parts_of(owner.active_parts())
        y = None if W is None else super().forward(ids)
        y = summed(y, (self.look_up(term, ids) for term in terms))
        return with_gain(y, gain, W, terms)

    def look_up(self, term: Term, ids: Tensor) -> Tensor:
        """A term's columns with this layer's scale: [..] -> [.., m]."""
        part = term.columns(ids)
        # Gemma and BART multiply what they look up; a class attribute would hide the buffer.
        scale = getattr(self, "embed_scale", None)
        return part if scale is None else part * torch.as_tensor(scale, dtype=part.dtype)


class ConvSum(Structured):
    """Conv1d, Conv2d, Conv3d with one group: terms see patches [b, t, n], n = c * kh * kw.

    t counts output positions, the last axis fastest.
    """

    bias: nn.Parameter | None
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding_mode: str
    _reversed_padding_repeated_twice: list[int]  # of the last axis first

    def forward(self, x: Tensor) -> Tensor:
        """x [b, c, h, w] -> [b, m, h', w'], with or without b."""
        (terms, gain), W = self.parts_of(self.active_parts()), self.matrix()
        mix = self._sum.mix.get("weight")
        if not self._sum.enabled or (W is not None and not mix and not terms):
            return super().forward(x)
        patches = self.patches(x)  # [b, t, n]
        if mix:
            y = super().forward(x).flatten(-len(self.kernel_size)).mT  # [b, t, m]
            return self.as_image(mixture(self, mix, patches, y, self.bias), x)
        y = None if W is None or gain is None else patches @ W.mT  # [b, t, m]
        y = summed(y, (term(patches) for term in terms), x.dtype)
        y = with_gain(y, gain, W, terms)
        if W is not None and gain is None:
            return super().forward(x) + self.as_image(y, x)
        y = y if self.bias is None else y + self.bias
        return self.as_image(y, x)

    def patches(self, x: Tensor) -> Tensor:
        """x [b, c, h, w] -> [b, t, n], with the convolution's padding, stride and dilation."""
        kernel, dilation, stride = self.kernel_size, self.dilation, self.stride
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        single = x.ndim == len(kernel) + 1
        x = F.pad(x.unsqueeze(0) if single else x, self._reversed_padding_repeated_twice, mode)
        b, depths = x.shape[0], 1
        if len(kernel) == 1:  # an image of one row
            x = x.unsqueeze(-2)
            kernel, dilation, stride = (1, *kernel), (1, *dilation), (1, *stride)
        if len(kernel) == 3:  # an image for each depth, whose channels are (c, kd)
            span = dilation[0] * (kernel[0] - 1) + 1
            x = x.unfold(2, span, stride[0])[..., :: dilation[0]]  # [b, c, d', h, w, kd]
            depths = x.shape[2]
            x = x.permute(0, 2, 1, 5, 3, 4).flatten(2, 3).flatten(0, 1)  # [b d', c kd, h, w]
        found = F.unfold(x, kernel[-2:], dilation[-2:], 0, stride[-2:]).mT  # [b d', t, n]
        found = found.reshape(b, depths * found.shape[1], found.shape[2])
        return found.squeeze(0) if single else found

    def as_image(self, y: Tensor, x: Tensor) -> Tensor:
        """Results y [b, t, m] for an input x [b, c, h, w], reshaped to [b, m, h', w']."""
        pads = self._reversed_padding_repeated_twice
        axes = range(len(self.kernel_size))
        shape = x.shape[-len(axes) :]
        sizes = []
        for i in axes:
            padded = shape[i] + sum(pads[2 * (axes[-1] - i) : 2 * (axes[-1] - i) + 2])
            span = self.dilation[i] * (self.kernel_size[i] - 1) + 1
            sizes.append((padded - span) // self.stride[i] + 1)
        return y.mT.unflatten(-1, sizes)


class ExpertSum(Structured):
    """Fused experts: terms run on tokens sorted by expert; the dense update is never formed."""

    num_experts: int
    has_gate: bool = True
    act_fn: Callable[[Tensor], Tensor]
    _apply_gate: Callable[[Tensor], Tensor]

    def forward(self, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """x [t, d], top_k_index and top_k_weights [t, k] -> [t, d]."""
        if not self._sum.enabled and not isinstance(top_k_index, FakeTensor):
            return super().forward(x, top_k_index, top_k_weights)
        k = top_k_index.shape[-1]
        order, offsets = self.sorted_tokens(top_k_index.reshape(-1))
        h = self.product("gate_up_proj" if self.has_gate else "up_proj", x[order // k], offsets)
        h = self._apply_gate(h) if self.has_gate else self.act_fn(h)
        h = self.product("down_proj", h, offsets)
        h = h * top_k_weights.reshape(-1)[order, None].to(h.dtype)
        out = h.new_zeros(x.shape[0] * k, x.shape[-1]).index_copy(0, order, h)
        return out.view(x.shape[0], k, x.shape[-1]).sum(1).to(x.dtype)

    def sorted_tokens(self, expert: Tensor) -> tuple[Tensor, list[int]]:
        """Tokens [t] in the order of their experts, and the start and end of each expert's tokens.

        With fake tensors (an estimate) all experts get the same number.
        """
        if isinstance(expert, FakeTensor):
            shares = [len(expert) * e // self.num_experts for e in range(self.num_experts + 1)]
            return torch.arange(len(expert), device=expert.device), shares
        order = torch.argsort(expert, stable=True)
        counts = torch.bincount(expert, minlength=self.num_experts)[: self.num_experts]
        offsets = [0, *counts.cumsum(0).tolist()]
        return order[: offsets[-1]], offsets  # ids beyond the last mark tokens of other ranks

    def product(self, param: str, x: Tensor, offsets: list[int]) -> Tensor:
        """One of the experts' maps on sorted tokens x [t, n] -> [t, m]."""
        W, (terms, gain) = self.matrix(param), self.parts_of(self.active_parts(param))
        if not self._sum.enabled:
            terms, gain = [], None
        y = None
        if W is not None:
            y = by_expert(x, offsets, lambda rows, e: self._sum.mm(rows, W[e].mT))
        y = summed(y, (term.grouped(x, offsets) for term in terms), x.dtype)
        bias, mix = getattr(self, f"{param}_bias", None), self._sum.mix.get(param)
        if gain is None and bias is None and mix is None:
            return y
        counts = torch.tensor(offsets, device=x.device).diff()
        numbers = torch.arange(len(counts), device=x.device)
        expert = numbers.repeat_interleave(counts, output_size=len(x))  # [t]
        if mix is not None:
            change = change_of(self, lambda term, x: term.grouped(x, offsets), param, expert)
            y = mixed(mix, x, y, change)
        if gain is not None and W is not None:
            y = y * gain.factor(W, terms)[expert].to(y.dtype)
        return y if bias is None else y + bias[expert]


mixins.update(
    linear=LinearSum, conv1d=LinearSum, embedding=EmbeddingSum, conv=ConvSum, experts=ExpertSum
)
