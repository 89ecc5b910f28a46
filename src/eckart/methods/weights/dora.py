"""DoRA: LoRA for the directions of a matrix's rows, and a trained length for each row.

    y = (g / c) * ((W + s B A) x),   c_i = |(W + s B A)_i|,   g [m] trained, g = |W_i| at first

c counts as a constant in the backward pass, as in the paper. Take it when LoRA at a low rank
stalls and longer steps do no harm; take LoRA first, since tuned both end alike (1.48 nats at rank 8
in claims/dora.py).

Source: S.-Y. Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", 2024, eq. 5 and 11.
The norm is computed without the product B A,
    c_i^2 = |w_i|^2 + 2 s b_i . (A w_i) + s^2 b_i (A A^T) b_i,
once for all passes until A or B change, for which a copy of both is kept. With dropout the
whole sum is scaled, so that the training forward stays the DoRA of one weight.

m out, n in, r rank, * any leading dimensions (fused experts).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor, nn

from eckart.linear import Gain, LowRank, Site, Term
from eckart.linear.cached import Cached
from eckart.linear.factored import fresh_pair
from eckart.linear.scaling import fields_of, peft_entries, scale_of
from eckart.recipe import Cost, Paper, Weights


class Magnitude(Gain):
    """g / |W + s B A| for each row."""

    def __init__(self, g: Tensor):
        super().__init__()
        self.g = nn.Parameter(g)  # [*, m]
        self.norms: Cached[Tensor] = Cached()

    @classmethod
    def empty(cls, tensors: Mapping[str, Mapping[str, Any]], scalars: Mapping[str, Any]) -> Self:
        return cls(super().empty(tensors, scalars).g.detach())

    def factor(self, weight: Tensor, terms: list[Term]) -> Tensor:  # [*, m, n] -> [*, m]
        lora = terms[0]
        assert isinstance(lora, LowRank)
        B, A, s = lora.B, lora.A, lora.scale
        return self.g / self.norms(lambda: row_norms(weight, B, A, s), (B, A), (weight,), (s,))


def row_norms(W: Tensor, B: Tensor, A: Tensor, s: float) -> Tensor:
    """|(W + s B A)_i| for all rows without forming B A: [*, m], in fp32 or wider. W [*, m, n]."""
    wide = torch.promote_types(B.dtype, torch.float32)
    W, B, A = W.to(wide), B.to(wide), A.to(wide)
    WA = W @ A.mT  # [*, m, r]
    squared = W.square().sum(-1) + (B * (2 * s * WA + s * s * (B @ (A @ A.mT)))).sum(-1)
    # Rounding may leave a tiny negative number for a row of zeros.
    return squared.clamp_min(torch.finfo(squared.dtype).tiny).sqrt()


@dataclass(frozen=True)
class DoRA(Weights):
    """Trains two thin factors and a length per output row; the base stays as it is."""

    rank: Annotated[int, Ge(1)] = 16
    """r, the rank of the change of direction. Paper: 4 to 64."""

    alpha: Annotated[float, Gt(0)] = 32.0
    """Numerator of the scale s."""

    scaling: Literal["lora", "rslora"] = "lora"
    """s = alpha / r (lora) or alpha / sqrt(r) (rslora)."""

    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Share of inputs of A dropped in training."""

    base: ClassVar = "frozen"
    peft_type: ClassVar = "LORA"
    default_lr: ClassVar = 1e-3
    paper: ClassVar = Paper(
        "DoRA: Weight-Decomposed Low-Rank Adaptation", "https://arxiv.org/abs/2402.09353"
    )
    promises: ClassVar = ("starts_at_base", "restores_base", "merges")

    def build_one(self, site: Site) -> Mapping[str, nn.Module]:
        scale = scale_of(self.alpha, self.rank, self.scaling)
        B, A = fresh_pair(site, min(self.rank, *site.shape))
        lora = LowRank(B, A, scale, dropout=self.dropout)
        g = row_norms(site.weight(torch.float32).cpu(), B, A, scale)
        return {"lora": lora, "magnitude": Magnitude(g)}

    def to_peft(
        self, site: Site, parts: Mapping[str, nn.Module]
    ) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        term, magnitude = parts["lora"], parts["magnitude"]
        assert isinstance(term, LowRank) and isinstance(magnitude, Magnitude)
        config = {**peft_entries(term, self.scaling), "use_dora": True}
        tensors = {"lora_A": term.A, "lora_B": term.B, "lora_magnitude_vector": magnitude.g}
        return tensors, config

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> Self | None:
        return cls(**fields_of(config)) if config.get("use_dora") else None

    def parts_from_peft(self, site: Site, tensors: Mapping[str, Tensor]) -> dict[str, nn.Module]:
        scale = scale_of(self.alpha, self.rank, self.scaling)
        lora = LowRank(tensors["lora_B"], tensors["lora_A"], scale, dropout=self.dropout)
        return {"lora": lora, "magnitude": Magnitude(tensors["lora_magnitude_vector"])}

    def cost(self, m: int, n: int) -> Cost:
        r = min(self.rank, m, n)
        return Cost(parameters=r * (m + n) + m, flops_per_token=2 * r * (m + n) + m)
