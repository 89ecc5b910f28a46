"""NOLA: LoRA whose factors are combinations of random matrices that nobody has to store.

    y = W x + s B A x     A = A_0 + sum_i a_i A_i / sqrt(k)     B = sum_j b_j B_j / sqrt(k)

A_i [r, n] and B_j [m, r] have entries U(-1, 1) and come from a seed; only the 2 k
coefficients are trained, both from zero. A_0 ~ U(-1/sqrt n, 1/sqrt n) is fixed and has no
coefficient: without it every gradient would be zero for ever. So the number of trained
parameters depends on neither rank nor width, and can be far below LoRA's of rank 1.

Take it to keep thousands of small adapters of one base (a file is 8 k bytes per matrix and a seed,
2 k or k with `bits`), with a learning rate ten times LoRA's: with as many numbers as LoRA of rank 1
it ends at 1.58 nats in claims/nola.py, LoRA at 1.59. Take LoRA where r (m + n) numbers are no
burden; on fewer matrices it is as good below rank 1, too (1.65, NOLA 1.66 with 2,048 numbers).

NOLA is LoRA in a random subspace: dL/da_i = <dL/dA, A_i> / sqrt(k), so a step of it is
LoRA's step projected on the span of the A_i, and k = r n one-hot bases give LoRA itself.

Source: S. Koohpayegani et al., "NOLA: Compressing LoRA using Linear Combination of Random
Basis", 2024, eq. 3 and its code (the factors 1 / sqrt(k) and A_0 are there alone).
We differ in three points: all matrices combine the beginnings of one pair of bases, with
coefficients and an A_0 of their own; the numbers come from a counter-based generator, equal
on all devices and dtypes, where the code re-seeds torch's global one in every pass; and
merging is right.

m out, n in, r rank, k bases, * any leading dimensions (fused experts).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor, nn

from eckart.linear import Site, by_expert, low_rank
from eckart.linear.basis import Drawn, RandomBasis, combined, uniform
from eckart.linear.bits import packed, unpacked
from eckart.linear.cached import Cached
from eckart.linear.factored import Factored
from eckart.recipe import Cost, Paper, Weights

A_NAME, B_NAME = "nola_A", "nola_B"  # the bases: children of the model's root


def frozen_start(seed: int, path: str, experts: int, n: int, rank: int) -> Tensor:
    """A_0 of one site, transposed: [experts, n, r], U(-1/sqrt n, 1/sqrt n)."""
    draw = uniform(seed, f"nola A_0 {path}", range(experts), range(n), range(rank))
    return draw / math.sqrt(n)


def quantise(c: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes (int8) and step [*, 1] of coefficients c [*, k]: symmetric, one step per vector.

    c is codes * step to within step / 2; a vector of zeros has step 1. The step has 16 bits of
    mantissa, so that codes * step is exact in fp32 and has these codes and this step again.
    """
    largest = c.abs().amax(-1, keepdim=True)
    step = torch.where(largest > 0, largest / (2 ** (bits - 1) - 1), 1.0)
    mantissa, exponent = torch.frexp(step)
    step = torch.ldexp((mantissa * 2**16).round() / 2**16, exponent)
    return (c / step).round().to(torch.int8), step


def rounded(c: Tensor, bits: int) -> Tensor:
    """c [*, k] rounded to `bits`, with a straight-through gradient."""
    if bits == 32:
        return c
    codes, step = quantise(c.detach(), bits)
    return codes * step + (c - c.detach())  # the last is 0


def in_bytes(codes: Tensor, step: Tensor, bits: int) -> Tensor:
    """Codes [*, k] and step [*, 1] in fp32 as stored in files: uint8 [*, k bits / 8 + 4]."""
    codes = packed(codes.short() + 2 ** (bits - 1), bits)
    return torch.cat([codes, step.float().view(torch.uint8)], -1)


def from_bytes(held: Tensor, bits: int, k: int) -> Tensor:
    """The coefficients [*, k] in fp32, from the result of `in_bytes`."""
    codes, step = unpacked(held[..., :-4], bits, k), held[..., -4:].clone().view(torch.float32)
    return (codes.short() - 2 ** (bits - 1)) * step


class Combination(Factored):
    """scale * B A with A, B combined from random bases by coefficients a, b [*, k]."""

    A0: Tensor

    def __init__(
        self,
        k: int,
        m: int,
        n: int,
        rank: int,
        *,
        path: str,
        leading: tuple[int, ...] = (),
        seed: int = 0,
        scale: float = 1.0,
        dropout: float = 0.0,
        bits: int = 32,
    ):
        super().__init__()
        self.m, self.n, self.rank, self.path, self.seed = m, n, rank, path, seed
        self.scale, self.dropout, self.bits = scale, dropout, bits
        self.a = nn.Parameter(torch.zeros(*leading, k))
        self.b = nn.Parameter(torch.zeros(*leading, k))
        start = frozen_start(seed, path, math.prod(leading), n, rank)
        self.register_buffer("A0", start.view(*leading, n, rank), persistent=False)
        self.made: dict[str, Cached[Tensor]] = {A_NAME: Cached(), B_NAME: Cached()}

    @classmethod
    def empty(cls, tensors: Mapping[str, Mapping[str, Any]], scalars: Mapping[str, Any]) -> Self:
        *leading, k = tensors["a"]["shape"]
        return cls(k, leading=tuple(leading), **scalars)

    def bind(self, shared: Mapping[str, nn.Module], home: nn.Module, param: str) -> None:
        self.__dict__["bases"] = {name: shared.get(name) for name in (A_NAME, B_NAME)}

    def pack(self, name: str, tensor: Tensor) -> Tensor | None:
        return None if self.bits == 32 else in_bytes(*quantise(tensor, self.bits), self.bits)

    def unpack(self, name: str, held: Tensor, shape: torch.Size) -> Tensor:
        return from_bytes(held, self.bits, shape[-1])

    def factors(self) -> tuple[Tensor, Tensor]:
        A = self.combined(A_NAME, self.a, self.n, self.A0)  # [*, n, r]
        return self.scale * self.combined(B_NAME, self.b, self.m), A.mT

    def combined(
        self, name: str, coefficients: Tensor, length: int, start: Tensor | None = None
    ) -> Tensor:
        """start + the combination of bases, [*, length, r], cached for each value."""
        c = rounded(coefficients, self.bits) / math.sqrt(coefficients.shape[-1])
        held: Any = self.__dict__["bases"][name]
        basis: Tensor | Drawn = (self.seed, name, length, self.rank)
        if held is not None:
            basis = held.values[: c.shape[-1], :length, : self.rank]

        def value() -> Tensor:
            total = combined(c.detach(), basis)
            return total if start is None else start + total

        frozen = [t for t in (start, basis) if isinstance(t, Tensor)]
        return combined(c, basis, known=self.made[name](value, (c,), frozen))

    def grouped(self, x: Tensor, offsets: list[int]) -> Tensor:
        B, A = self.factors()  # of all experts at once: the bases are read a single time
        x = self.dropped(x).to(A.dtype)
        return by_expert(x, offsets, lambda x, e: low_rank(x, A[e], B[e], mm=self.mm))

    def extra_repr(self) -> str:
        return f"{self.m} x {self.n}, rank {self.rank}, {self.a.shape[-1]} bases a side"


@dataclass(frozen=True)
class NOLA(Weights):
    """Trains 2 k coefficients per matrix; the base stays as it is."""

    rank: Annotated[int, Ge(1)] = 16
    """r, the rank of the update; costs no parameters. Paper: 8 and 16; cut to min(m, n)."""

    bases: Annotated[int, Ge(1)] = 512
    """k, random matrices per factor. Paper: 512; from r n on, LoRA itself is smaller."""

    scale: Annotated[float, Gt(0)] = 1.0
    """s. The paper's scripts: 1 (GPT-2) and 0.25 (LLaMA), as alpha / r."""

    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Share of inputs dropped in training."""

    bits: Literal[4, 8, 32] = 32
    """Bits that a coefficient is rounded to in every pass, its gradient straight through, and
    has in the file: off by at most a part in 254 (8 bits) or 14 (4 bits) of its vector's largest,
    in training as after loading."""

    hold: bool = True
    """Keep one pair of bases in memory, k r (m + n) numbers for the largest m and n of the
    model; false draws them again, piece by piece, after every step and in every backward pass,
    which is far slower."""

    base: ClassVar = "frozen"
    offers: ClassVar = ()
    mission: ClassVar = True
    default_lr: ClassVar = 1e-2
    size: ClassVar = "bases"
    paper: ClassVar = Paper(
        "NOLA: Compressing LoRA using Linear Combination of Random Basis",
        "https://arxiv.org/abs/2310.02556",
        "ICLR 2024",
    )
    promises: ClassVar = ("starts_at_base", "restores_base", "merges", "exports_low_rank")

    def build(self, sites: list[Site]) -> dict[str, dict[str, nn.Module]]:
        parts = super().build(sites)
        if self.hold and sites:
            k = max(self.at(site).bases for site in sites)
            r = max(self.at(site).rank_at(site) for site in sites)
            outputs, inputs = (max(site.shape[side] for site in sites) for side in (0, 1))
            parts[""] = {
                A_NAME: RandomBasis(sites[0].seed, A_NAME, k, inputs, r),
                B_NAME: RandomBasis(sites[0].seed, B_NAME, k, outputs, r),
            }
        return parts

    def build_one(self, site: Site) -> Mapping[str, nn.Module]:
        term = Combination(
            self.bases,
            *site.shape,
            self.rank_at(site),
            path=site.path,
            leading=site.leading,
            seed=site.seed,
            scale=self.scale,
            dropout=self.dropout,
            bits=self.bits,
        )
        return {"nola": term}

    def rank_at(self, site: Site) -> int:
        """r, capped where the map is narrower."""
        return min(self.rank, *site.shape)

    def ratios(self, name: str, tensor: Tensor) -> dict[str, float]:
        return {"weight_decay": 0.0}  # of a would lead to A_0, not to the base

    def cost(self, m: int, n: int) -> Cost:
        r = min(self.rank, m, n)  # k r (m + n) FLOPs to combine, once a step, and in each backward
        return Cost(
            parameters=2 * self.bases,
            frozen=r * n,
            shared=self.bases * r * (m + n) if self.hold else 0,
            flops_per_token=2 * r * (m + n),
        )
