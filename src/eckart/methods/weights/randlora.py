"""RandLoRA: an update of full rank from fixed random bases, of which only scalings are trained.

    dW = s sum_b B_b diag(l_b) A diag(g_b)     b = 1 .. N = ceil(d / r)

A [r, d] and B_b [D, r] are random, frozen and shared by all matrices of the model; d and D
are the smaller and larger side of the matrix, which dW fits as it is or transposed. Trained
are l [r, N], zero at first, and g [N, d], constant at first: about d + d^2 / r numbers, so a
SMALLER r trains more of them. dW can reach full rank, though its energy stays in few directions
for long, since with one A all bases span the same r rows until g differs between them
(init=jittered or shared_a=false break that). Training costs about as much compute as full
fine-tuning; the optimizer state is small.

Take it where raising LoRA's rank still helps and the change that is needed is spread over all
directions: on such a target it wins in claims/randlora.py, on one of low rank it loses. In text,
with as many trained numbers, it ends there at 1.54 nats and LoRA at 1.53, so take LoRA first.

Source: P. Albert et al., "RandLoRA: Full-rank parameter-efficient fine-tuning of large
models", 2025, eq. 4 and 5.
We differ in three points: the bases are divided by their exact standard deviation instead of
the sample's, so that they do not depend on the other targets; they come from a counter-based
generator and a seed (a file of PEFT holds them); and dW is built once per pass where that is
cheaper, and again in the backward pass rather than kept. With order=compat, the default,
basis b and row k are paired as the authors' code and PEFT pair them: B's columns are counted
(b, k), the rows of the scaled A (k, b), a fixed permutation of the paper's sum.

m out, n in, r rank, N bases, d = min(m, n), D = max(m, n), * leading dimensions (experts).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from eckart.errors import FileError
from eckart.linear import Site, Term, alike, plain_mm
from eckart.linear.basis import RandomBasis, uniform
from eckart.linear.products import emulated, fitting, product
from eckart.recipe import Cost, Paper, Weights

A_NAME, B_NAME = "randlora_A", "randlora_B"  # children of the model's root, PEFT's names


def scaled_rows(A: Tensor, lam: Tensor, gam: Tensor, order: str) -> Tensor:
    """The scaled A of all bases, stacked: [*, N r, d].

    A [r, 1 or N, d], lam [*, r, N], gam [*, N, d].
    """
    U = lam.unsqueeze(-1) * A.to(lam.dtype) * gam.unsqueeze(-3)  # [*, r, N, d]
    return (U if order == "compat" else U.transpose(-3, -2)).flatten(-3, -2)


def scaling_gradients(
    A: Tensor, lam: Tensor, gam: Tensor, H: Tensor, order: str
) -> tuple[Tensor, Tensor]:
    """dL/dlam [r, N] and dL/dgam [N, d] from H [N r, d], the gradient of `scaled_rows`."""
    r, N = lam.shape
    if order == "compat":
        H = H.unflatten(0, (r, N))
    else:
        H = H.unflatten(0, (N, r)).transpose(0, 1)
    HA = H * A.to(H.dtype)  # [r, N, d]
    return torch.einsum("kbj,bj->kb", HA, gam), torch.einsum("kbj,kb->bj", HA, lam)


class Scaled(torch.autograd.Function):
    """s x dW^T for dW = B U, or (B U)^T with `across`, in the cheaper way; saves nothing large.

    x [.., t, n], lam [r, N], gam [N, d], A [r, 1 or N, d], B [D, N r]. With the frozen W [m, n] it
    is x (W + s dW)^T, in one product.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        lam: Tensor,
        gam: Tensor,
        A: Tensor,
        B: Tensor,
        scale: float,
        order: str,
        across: bool,
        W: Tensor | None = None,
    ) -> Tensor:
        ctx.save_for_backward(x, lam, gam, A, B, W)
        ctx.options = scale, order, across
        U, B = scaled_rows(A, lam, gam, order) * scale, B.to(lam.dtype)
        return applied(x, U, B, across) if W is None else F.linear(x, summed(W, U, B, across))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, lam, gam, A, B, W = ctx.saved_tensors
        scale, order, across = ctx.options
        U, B = scaled_rows(A, lam, gam, order) * scale, B.to(lam.dtype)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = applied(dy, U, B, not across) if W is None else dy @ summed(W, U, B, across)
        x, dy = (t.reshape(-1, t.shape[-1]).to(lam.dtype) for t in (x, dy))
        long, short = (x, dy) if across else (dy, x)  # [t, D], [t, d]
        if long.shape[0] > B.shape[0]:  # as in `times`
            H = B.mT @ (long.mT @ short)
        else:
            H = (long @ B).mT @ short
        found = scaling_gradients(A, lam, gam, H * scale, order)
        return dx, *found, None, None, None, None, None, None


def summed(W: Tensor, U: Tensor, B: Tensor, across: bool) -> Tensor:
    """W + B U, or W + (B U)^T where `across`: [m, n]. Exactly W where U is zero."""
    return torch.addmm(W, U.mT, B.mT) if across else torch.addmm(W, B, U)


def applied(x: Tensor, U: Tensor, B: Tensor, across: bool) -> Tensor:
    """`times`, but for x in bf16 with fp32 factors in x's dtype, as two thin products."""
    if x.dtype == U.dtype:
        return times(x, U, B, across)
    if emulated(x):
        return times(x.to(U.dtype), U, B, across).to(x.dtype)
    return product(product(x, B), U) if across else product(product(x, U.mT), B.mT)


def times(x: Tensor, U: Tensor, B: Tensor, across: bool) -> Tensor:
    """x (B U)^T, or x B U where `across`: x [.., t, d or D], U [N r, d], B [D, N r].

    Building B U first costs D d^2 + t D d products, two thin ones t d (D + d).
    """
    if x.numel() // x.shape[-1] > B.shape[0]:
        P = B @ U  # [D, d]
        return x @ (P if across else P.mT)
    return (x @ B) @ U if across else (x @ U.mT) @ B.mT


class ScaledBases(Term):
    """s B U or its transpose, with U the rows of A scaled by lam [*, r, N] and gam [*, N, d]."""

    def __init__(
        self,
        lam: Tensor,
        gam: Tensor,
        m: int,
        n: int,
        scale: float,
        order: str = "compat",
        dropout: float = 0.0,
    ):
        super().__init__()
        self.lam = nn.Parameter(lam)
        self.gam = nn.Parameter(gam)
        self.m, self.n, self.scale, self.order, self.dropout = m, n, scale, order, dropout

    def bind(self, shared: Mapping[str, nn.Module], home: nn.Module, param: str) -> None:
        self.__dict__["bases"] = (shared[A_NAME], shared[B_NAME])

    def slices(self) -> tuple[Tensor, Tensor]:
        """This site's slices of the shared bases: A [r, 1 or N, d], B [D, N r]."""
        A, B = (module.values for module in self.__dict__["bases"])
        r, N = self.lam.shape[-2:]
        return A[:r, :N, : self.gam.shape[-1]], B[: max(self.m, self.n), :N, :r].flatten(1)

    @property
    def across(self) -> bool:
        """Is dW the transpose of B U?"""
        return self.m < self.n

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropped(x)
        if self.mm is not plain_mm or self.lam.ndim > 2:
            return self.mm(x.to(self.lam.dtype), self.dense().mT)
        A, B = self.slices()
        x = x if fitting(x, x, self.lam) else x.to(self.lam.dtype)
        return Scaled.apply(x, self.lam, self.gam, A, B, self.scale, self.order, self.across)

    def with_base(self, x: Tensor, W: Tensor, bias: Tensor | None) -> Tensor | None:
        D, d, tokens = max(W.shape), min(W.shape), x.numel() // x.shape[-1]
        # beside the base's own t D d: D d^2 here, t d (D + d) as two thin products there
        dear = tokens * (D + d) <= D * d
        if dear or not alike(x, W, self.lam) or (self.dropout and self.training):
            return None
        A, B = self.slices()
        y = Scaled.apply(
            x, self.lam, self.gam, A, B, self.scale, self.order, self.across, W.detach()
        )
        return y if bias is None else y + bias

    def dense(self) -> Tensor:  # [*, m, n]
        A, B = self.slices()
        P = B.to(self.lam.dtype) @ scaled_rows(A, self.lam, self.gam, self.order)
        return self.scale * (P.mT if self.across else P)

    def extra_repr(self) -> str:
        r, N = self.lam.shape[-2:]
        return f"{self.m} x {self.n}, {N} bases of rank {r}, scale {self.scale:g}"


@dataclass(frozen=True)
class RandLoRA(Weights):
    """Trains scalings of shared random bases; the base stays as it is."""

    rank: Annotated[int, Ge(1)] = 32
    """r, the rank of one basis. Half of it trains twice as many numbers. Paper: 6 to 32."""

    scale: Annotated[float, Gt(0)] = 20.0
    """s. PEFT: alpha / r = 640 / 32; the authors' code: 2 with scaling=bases."""

    scaling: Literal["plain", "bases"] = "plain"
    """s as it is, or s / sqrt(N)."""

    entries: Literal["dense", "sparse", "very_sparse"] = "dense"
    """Random entries: uniform; or -1, 0, 1 with two of three zero; or with all but one in
    sqrt(d) zero, d the smaller side of the largest map."""

    shared_a: bool = True
    """One A for all bases (the paper, PEFT), or one for each: full rank from the first step."""

    init: Literal["constant", "jittered"] = "constant"
    """g at first: 1 / max(N, d), or 10 % around it at random."""

    order: Literal["compat", "paper"] = "compat"
    """How bases and rows are paired: as PEFT and the authors' code do, or as the paper does."""

    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Share of inputs dropped in training. Paper: 0.05 to 0.1."""

    base: ClassVar = "frozen"
    offers: ClassVar = ()
    mission: ClassVar = True
    peft_type: ClassVar = "RANDLORA"
    peft_shared: ClassVar = ("randlora_A", "randlora_B")
    default_lr: ClassVar = 1e-3
    paper: ClassVar = Paper(
        "RandLoRA: Full-rank parameter-efficient fine-tuning of large models",
        "https://arxiv.org/abs/2502.00987",
        "ICLR 2025",
    )
    promises: ClassVar = ("starts_at_base", "restores_base", "merges")

    def build(self, sites: list[Site]) -> dict[str, dict[str, nn.Module]]:
        parts = super().build(sites)
        if not sites:
            return parts
        ranks = [self.at(site).rank for site in sites]
        sides = [max(site.shape[side] for site in sites) for side in (0, 1)]
        d, D = min(sides), max(sides)
        N, seed = -(-d // min(ranks)), sites[0].seed
        q = {"dense": 0.0, "sparse": 3.0, "very_sparse": math.sqrt(d)}[self.entries]
        scale = math.sqrt(q or 3.0)  # entries of variance 1
        parts[""] = {
            A_NAME: RandomBasis(seed, A_NAME, max(ranks), 1 if self.shared_a else N, d, scale, q),
            B_NAME: RandomBasis(seed, B_NAME, D, N, max(ranks), scale, q),
        }
        return parts

    def build_one(self, site: Site) -> Mapping[str, nn.Module]:
        (m, n), d = site.shape, min(site.shape)
        N = -(-d // self.rank)
        lam = torch.zeros(*site.leading, self.rank, N)
        gam = torch.full((*site.leading, N, d), 1 / max(N, d))
        if self.init == "jittered":
            experts = range(math.prod(site.leading))
            noise = uniform(site.seed, f"randlora {site.path}", experts, range(N), range(d))
            gam = gam * (1 + 0.1 * noise.view_as(gam))
        return {"randlora": self.term(lam, gam, m, n)}

    def term(self, lam: Tensor, gam: Tensor, m: int, n: int) -> ScaledBases:
        """The term with these scalings."""
        scale = self.scale / (math.sqrt(lam.shape[-1]) if self.scaling == "bases" else 1)
        return ScaledBases(lam, gam, m, n, scale, self.order, self.dropout)

    def ratios(self, name: str, tensor: Tensor) -> dict[str, float]:
        # g starts at 1 / d, not at 0: decay would shrink the whole term.
        return {"weight_decay": 0.0} if name.endswith(".gam") else {}

    def to_peft(
        self, site: Site, parts: Mapping[str, nn.Module]
    ) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        term = parts["randlora"]
        assert isinstance(term, ScaledBases)
        plain = self.order == "compat" and self.shared_a and not site.overrides
        if site.kind not in ("linear", "conv1d") or not plain:
            return None
        lam = term.lam * (term.scale / self.scale)  # exact where the scaling is plain
        config = {
            "r": self.rank,
            "randlora_alpha": self.scale * self.rank,
            "randlora_dropout": self.dropout,
            "save_projection": True,
        }
        return {"randlora_lambda": lam, "randlora_gamma": term.gam}, config

    def to_peft_shared(self, shared: Mapping[str, nn.Module]) -> dict[str, Tensor]:
        return {name: getattr(module, "values") for name, module in shared.items()}  # noqa: B009

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> Self | None:
        rank = config.get("r", 32)
        return cls(
            rank=rank,
            scale=config.get("randlora_alpha", 640) / rank,
            dropout=float(config.get("randlora_dropout", 0.0)),
        )

    def parts_from_peft(self, site: Site, tensors: Mapping[str, Tensor]) -> dict[str, nn.Module]:
        lam, gam = tensors["randlora_lambda"], tensors["randlora_gamma"]
        d = min(site.shape)
        N = -(-d // self.rank)
        if lam.shape != (self.rank, N) or gam.shape != (N, d):
            found = f"shapes {list(lam.shape)}, {list(gam.shape)}"
            fault = f"{found}, expected {[self.rank, N]}, {[N, d]}"
            raise FileError("the adapter does not fit the model", [(site.path, fault)])
        return {"randlora": self.term(lam, gam, *site.shape)}

    def shared_from_peft(self, tensors: Mapping[str, Tensor]) -> dict[str, nn.Module]:
        held: dict[str, nn.Module] = {}
        for name in (A_NAME, B_NAME):
            count, length, rank = tensors[name].shape
            held[name] = RandomBasis(0, name, count, length, rank, stored=tensors[name])
        return held

    def cost(self, m: int, n: int) -> Cost:
        d, D = min(m, n), max(m, n)
        N = -(-d // self.rank)
        A = self.rank * d * (1 if self.shared_a else N)
        return Cost(  # and 2 D d^2 FLOPs in every pass, to build dW
            parameters=N * (self.rank + d),
            shared=A + D * N * self.rank,
            flops_per_token=2 * m * n,
        )
