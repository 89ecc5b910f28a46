"""LoRA: a frozen matrix plus a trained product of two thin ones.

    y = W x + s B A x        B [m, r] zero at first, A [r, n] random, s = alpha / r

The baseline of the field and its exchange format. Take it first, with its learning rate tuned.
At rank 8 it has about 0.9 of what training the same matrices whole gains (1.88 nats before, 1.48,
whole 1.44 in claims/lora.py). A rate ten times too small costs 0.08 there, and no variant in
claims/unified_study.py is better by 0.02. Take more rank where a lower loss is needed, dense where
that does not help. With rank-stabilised scaling, s = alpha / sqrt(r), a learning rate found at
one rank holds at others.

Source: E. Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, eq. 3;
D. Kalajdzievski, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", 2023.
A is drawn as the code of both official repositories draws it (Kaiming uniform with
a = sqrt 5, that is U(-1/sqrt n, 1/sqrt n)), where the paper says Gaussian.

Other starts are functions in STARTS: pissa (F. Meng et al., 2024) and olora (K. Buyukakyuz,
2024) from W; gradient (LoRA-GA, S. Wang et al., 2024) from dL/dW; eva (F. Paischer et al.,
2024) from the inputs, with ranks divided over the maps by the variance they explain. EVA's
principal directions are exact here where its code finds them batch by batch, prompt tokens
count, and the scale stays the same at every rank.

m out, n in, r rank, * any leading dimensions (fused experts).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor, nn

from eckart.decompose import balanced, truncated_svd
from eckart.errors import UsageError
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
    """B A = 0 with neither factor zero: even and odd rows of a random rotation of r.

    There is none at rank 1, which uses LoRA's own start.
    """
    if rank == 1:
        return fresh_pair(site, rank)
    (m, n), g, half = site.shape, site.generator, rank // 2
    Q = torch.linalg.qr(torch.randn(*site.leading, rank, rank, generator=g))[0]
    A = torch.randn(*site.leading, n, half, generator=g) @ Q[..., 1::2, :][..., :half, :]
    B = torch.randn(*site.leading, m, half, generator=g) @ Q[..., 0::2, :][..., :half, :]
    return B / 10, A.mT / 10


def pissa(site: Site, rank: int) -> tuple[Tensor, Tensor]:
    """The principal part of W: B = U sqrt(S), A = sqrt(S) V^T (the base keeps the rest)."""
    return balanced(*truncated_svd(site.weight(torch.float32), rank))


def olora(site: Site, rank: int) -> tuple[Tensor, Tensor]:
    """Thin QR of W: B = Q_r, A = R_r."""
    Q, R = torch.linalg.qr(site.weight(torch.float32))
    return Q[..., :rank].contiguous(), R[..., :rank, :].contiguous()


def gradient(site: Site, rank: int) -> tuple[Tensor, Tensor]:
    """LoRA-GA: A = c V_1..r^T and B = c U_r+1..2r of dL/dW, c = (m / 256)^(1/4).

    The first step then covers the 2 r leading directions of the gradient, where a zero B
    covers r random ones. c is the paper's m^(1/4) / sqrt(16).
    """
    if site.gradient is None:
        raise calibration_missing(site, "gradients")
    U, _, Vt = truncated_svd(site.gradient, 2 * rank)
    size = (site.shape[0] / 256) ** 0.25
    return size * U[..., -rank:], size * Vt[..., :rank, :]


STARTS = {
    "kaiming": fresh_pair,
    "gaussian": gaussian,
    "orthogonal": orthogonal,
    "pissa": pissa,
    "olora": olora,
    "gradient": gradient,
}
SUBTRACTED = ("pissa", "olora", "gradient")  # starts that are not zero


class Inputs(NamedTuple):
    """EVA's statistics of a map: the principal directions of its inputs and their weights."""

    directions: Tensor  # [k, n], orthonormal, largest variance first
    shares: Tensor  # [k], of the variance of all inputs


def principal_inputs(sites: list[Site], most: list[int]) -> dict[str, Inputs]:
    """The leading directions of each site's centred inputs, at most `most` of each.

    Sites whose inputs are not vectors of width n (embeddings, convolutions, the second map of fused
    experts) are left out, and so are those that calibration never reached.
    """
    found: dict[str, Inputs] = {}
    seen, last = torch.empty(0), Inputs(torch.empty(0), torch.empty(0))
    for site, count in zip(sites, most, strict=True):
        X = site.activations  # [t, n]
        if X is None or site.kind in ("embedding", "conv") or X.shape[-1] != site.shape[1]:
            continue
        if not torch.equal(X, seen):  # q, k, v and gate, up are neighbours with the same inputs
            seen, centred = X, X - X.mean(0)
            _, s, Vt = truncated_svd(centred, max(most))
            shares = s.square() / centred.square().sum().clamp_min(torch.finfo(s.dtype).tiny)
            kept = shares > 1e-10  # fewer tokens than directions: fp32 noise is no direction
            last = Inputs(Vt[kept], shares[kept])
        if len(last.shares):
            found[site.path] = Inputs(last.directions[:count], last.shares[:count])
    return found


def divide_ranks(shares: Sequence[Tensor], budget: int) -> list[int]:
    """How many components each map gets if the largest of all maps are taken.

    shares: one descending tensor [k] per map. An earlier map wins a tie.
    """
    owner = torch.cat([torch.full((len(s),), i) for i, s in enumerate(shares)])
    order = torch.cat(list(shares)).argsort(descending=True, stable=True)
    return torch.bincount(owner[order[:budget]], minlength=len(shares)).tolist()


def calibration_missing(site: Site, what: str) -> UsageError:
    """The error for a start that needs calibration data which the method did not request."""
    fix = f"Pass attach(..., calibration=), with {what} for all maps: overrides ask for none."
    return UsageError(f"this start of lora needs {what}", [(site.path, "there are none")], fix)


@dataclass(frozen=True)
class LoRA(Weights):
    """Trains two thin factors beside each matrix; the base stays as it is."""

    rank: Annotated[int, Ge(1)] = 16
    """r, the rank of the update. Paper: 1 to 64; cut to min(m, n) where a map is narrower."""

    alpha: Annotated[float, Gt(0)] = 32.0
    """Numerator of the scale s. Twice the rank is customary."""

    scaling: Literal["lora", "rslora"] = "lora"
    """s = alpha / r (lora) or alpha / sqrt(r) (rslora)."""

    init: Literal["kaiming", "gaussian", "orthogonal", "pissa", "olora", "eva", "gradient"] = (
        "kaiming"
    )
    """Initial factors. pissa and olora take them from W, gradient from dL/dW on calibration
    data, and what differs from them is trained; eva takes A from the inputs."""

    rho: Annotated[float, Ge(1)] = 2.0
    """EVA: no map gets more than rho times the rank; 1 gives all the same. Paper: 1 to 3."""

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
    needs: ClassVar = {"gradients": {"init": "gradient"}, "activations": {"init": "eva"}}

    def build(self, sites: list[Site]) -> dict[str, dict[str, nn.Module]]:
        if self.init != "eva":
            return super().build(sites)
        own = {site.path: self.at(site) for site in sites}
        eva = [site for site in sites if own[site.path].init == "eva"]
        inputs = principal_inputs(eva, [own[site.path].most(site) for site in eva])
        if eva and not inputs:
            raise calibration_missing(eva[0], "activations")
        budget = sum(own[path].rank for path in inputs)
        shares = [inputs[path].shares for path in inputs]
        ranks = dict(zip(inputs, divide_ranks(shares, budget), strict=True))
        return {
            site.path: own[site.path].from_inputs(site, inputs[site.path], ranks[site.path])
            if site.path in inputs
            else dict(own[site.path].build_one(site))
            for site in sites
        }

    def most(self, site: Site) -> int:
        """The maximum rank that EVA may give a map."""
        return min(round(self.rho * self.rank), *site.shape)

    def from_inputs(self, site: Site, inputs: Inputs, rank: int) -> dict[str, nn.Module]:
        """EVA's start: A from the inputs' leading directions, B zero; no term at rank 0."""
        if not rank:
            return {}
        (m, n), scale = site.shape, scale_of(self.alpha, self.rank, self.scaling)
        A = inputs.directions[:rank].expand(*site.leading, rank, n).contiguous()
        B = A.new_zeros(*site.leading, m, rank)
        return {"lora": LowRank(B, A.clone(), scale, dropout=self.dropout)}

    def build_one(self, site: Site) -> Mapping[str, nn.Module]:
        rank = min(self.rank, *site.shape)
        scale = scale_of(self.alpha, self.rank, self.scaling)
        # Without inputs EVA has no statistics of a map, which then starts as usual.
        B, A = STARTS["kaiming" if self.init == "eva" else self.init](site, rank)
        if self.init == "pissa":  # the scale must not change the product
            B, A = B / math.sqrt(scale), A / math.sqrt(scale)
        B, A = B.contiguous(), A.contiguous()
        # W stays whole and the start is subtracted: the same function and gradients as a
        # base without it, but exact in every dtype and with r (m + n) numbers kept, not m n.
        start = (B.clone(), A.clone()) if self.init in SUBTRACTED else None
        return {"lora": LowRank(B, A, scale, start=start, dropout=self.dropout)}

    def ratios(self, name: str, tensor: Tensor) -> dict[str, float]:
        return {"lr": self.lr_ratio} if name.endswith(".B") else {}

    def to_peft(
        self, site: Site, parts: Mapping[str, nn.Module]
    ) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        term = parts["lora"]
        assert isinstance(term, LowRank)
        if term.B0 is not None:  # written by its exact factors, of twice the rank
            return None
        return {"lora_A": term.A, "lora_B": term.B}, peft_entries(term, self.scaling)

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> Self | None:
        return None if config.get("use_dora") else cls(**fields_of(config))

    def parts_from_peft(self, site: Site, tensors: Mapping[str, Tensor]) -> dict[str, nn.Module]:
        scale = scale_of(self.alpha, self.rank, self.scaling)
        return {"lora": LowRank(tensors["lora_B"], tensors["lora_A"], scale, dropout=self.dropout)}

    def cost(self, m: int, n: int) -> Cost:
        pair = min(self.rank, m, n) * (m + n)  # with eva the mean over maps
        start = pair if self.init in SUBTRACTED else 0
        return Cost(parameters=pair, frozen=start, flops_per_token=2 * (pair + start))
