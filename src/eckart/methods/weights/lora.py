"""LoRA: a frozen matrix plus a trained product of two thin ones.

    y = W x + s B A x        B [m, r] zero at first, A [r, n] random, s = alpha / r

The baseline of the field and its exchange format. Take it first, with its learning rate
tuned: most variants gain less than that does. With rank-stabilised scaling,
s = alpha / sqrt(r), a learning rate found at one rank holds at others.

Source: E. Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, eq. 3;
D. Kalajdzievski, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", 2023.
A is drawn as the code of both official repositories draws it (Kaiming uniform with
a = sqrt 5, that is U(-1/sqrt n, 1/sqrt n)), where the paper says Gaussian.

m out, n in, r rank, * any leading dimensions (fused experts).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor, nn

from eckart.decompose import truncated_svd
from eckart.linear import LowRank, Site
from eckart.linear.factored import fresh_pair
from eckart.linear.scaling import fields_of, peft_entries, scale_of
from eckart.recipe import Cost, Paper, Weights


def gaussian(site: Site, rank: int) -> tuple[Tensor, Tensor]:
    """B = 0, A ~ N(0, 1/r^2)."""
    B, A = fresh_pair(site, rank)
    if site.kind == "embedding":
        return B, A
    return B, A.normal_(0.0, 1 / rank, generator=site.generator)


def orthogonal(site: Site, rank: int) -> tuple[Tensor, Tensor]:
    """B A = 0 with neither factor zero: even and odd rows of a random rotation of r."""
    (m, n), g, half = site.shape, site.generator, rank // 2
    Q = torch.linalg.qr(torch.randn(*site.leading, rank, rank, generator=g))[0]
    A = torch.randn(*site.leading, n, half, generator=g) @ Q[..., 1::2, :][..., :half, :]
    B = torch.randn(*site.leading, m, half, generator=g) @ Q[..., 0::2, :][..., :half, :]
    return B / 10, A.mT / 10


def pissa(site: Site, rank: int) -> tuple[Tensor, Tensor]:
    """The principal part of W: B = U sqrt(S), A = sqrt(S) V^T (the base keeps the rest)."""
    U, s, Vt = truncated_svd(site.weight(torch.float32), rank)
    root = s.sqrt()
    return U * root.unsqueeze(-2), root.unsqueeze(-1) * Vt


def olora(site: Site, rank: int) -> tuple[Tensor, Tensor]:
    """Thin QR of W: B = Q_r, A = R_r."""
    Q, R = torch.linalg.qr(site.weight(torch.float32))
    return Q[..., :rank].contiguous(), R[..., :rank, :].contiguous()


STARTS = {
    "kaiming": fresh_pair,
    "gaussian": gaussian,
    "orthogonal": orthogonal,
    "pissa": pissa,
    "olora": olora,
}
FROM_WEIGHT = ("pissa", "olora")  # starts that are not zero


@dataclass(frozen=True)
class LoRA(Weights):
    """Trains two thin factors beside each matrix; the base stays as it is."""

    rank: Annotated[int, Ge(1)] = 16
    """r, the rank of the update. Paper: 1 to 64; cut to min(m, n) where a map is narrower."""

    alpha: Annotated[float, Gt(0)] = 32.0
    """Numerator of the scale s. Twice the rank is customary."""

    scaling: Literal["lora", "rslora"] = "lora"
    """s = alpha / r (lora) or alpha / sqrt(r) (rslora)."""

    init: Literal["kaiming", "gaussian", "orthogonal", "pissa", "olora"] = "kaiming"
    """Initial factors. pissa and olora take them from W and train what differs from them."""

    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Share of inputs of A dropped in training. Paper: 0 to 0.1."""

    lr_ratio: Annotated[float, Gt(0)] = 1.0
    """LoRA+: learning rate of B over that of A. Its paper: 16."""

    base: ClassVar = "frozen"
    mission: ClassVar = False
    peft_type: ClassVar = "LORA"
    default_lr: ClassVar = 1e-3
    paper: ClassVar = Paper(
        "LoRA: Low-Rank Adaptation of Large Language Models", "https://arxiv.org/abs/2106.09685"
    )
    promises: ClassVar = ("starts_at_base", "restores_base", "merges", "exports_low_rank")

    def build_one(self, site: Site) -> Mapping[str, nn.Module]:
        rank = min(self.rank, *site.shape)
        scale = scale_of(self.alpha, self.rank, self.scaling)
        B, A = STARTS[self.init](site, rank)
        if self.init == "pissa":  # the scale must not change the product
            B, A = B / math.sqrt(scale), A / math.sqrt(scale)
        B, A = B.contiguous(), A.contiguous()
        # W stays whole and the start is subtracted: the same function and gradients as a
        # base without it, but exact in every dtype and with r (m + n) numbers kept, not m n.
        start = (B.clone(), A.clone()) if self.init in FROM_WEIGHT else None
        return {"lora": LowRank(B, A, scale, start=start, dropout=self.dropout)}

    def ratios(self, name: str, tensor: Tensor) -> dict[str, float]:
        return {"lr": self.lr_ratio} if name.endswith(".B") else {}

    def to_peft(
        self, site: Site, parts: Mapping[str, nn.Module]
    ) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        term = parts["lora"]
        assert isinstance(term, LowRank)
        if term.B0 is not None:  # exact at twice the rank: the house's general form
            return None
        return {"lora_A": term.A, "lora_B": term.B}, peft_entries(term, self.scaling)

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> Self | None:
        return None if config.get("use_dora") else cls(**fields_of(config))

    def parts_from_peft(self, site: Site, tensors: Mapping[str, Tensor]) -> dict[str, nn.Module]:
        scale = scale_of(self.alpha, self.rank, self.scaling)
        return {"lora": LowRank(tensors["lora_B"], tensors["lora_A"], scale, dropout=self.dropout)}

    def cost(self, m: int, n: int) -> Cost:
        pair = min(self.rank, m, n) * (m + n)
        start = pair if self.init in FROM_WEIGHT else 0
        return Cost(parameters=pair, frozen=start, flops_per_token=2 * (pair + start))
