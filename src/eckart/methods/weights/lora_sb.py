"""LoRA-SB: train an r x r core between two frozen bases taken from the first full update.

    y = W x + B R A x        B^T B = I, A A^T = I, frozen; R [r, r] trained

    G    the mean gradient dL/dW over calibration data, at W
    dW_1 = -eta sign(G)      AdamW's first step, eta the rate of the first warm-up step
    U S V^T = dW_1           truncated at r:  B = U,  A = V^T,  R = diag(S)

r^2 trained numbers per matrix, whatever its size: tiny optimizer state and traffic. The file
and the frozen memory are LoRA's, r (m + n). With orthonormal bases a plain gradient step on
R moves W by -lr B B^T G A^T A, the best step there is in the span of (B, A), so no scale has
to be tuned. core=zero keeps the subspace and starts at the base, R = 0.

Take it for a very small optimizer state, with a learning rate about ten times LoRA's. Where file
and activations count take LoRA of rank 1: in claims/lora_sb.py that ends at 1.59 nats with 5,120
numbers, LoRA-SB at 1.60 with 3,584, and at 1.64 or 1.65 with bases of W or at random.

Source: K. Ponkshe et al., "Initialization using Update Approximation is a Silver Bullet for
Extremely Efficient Low-Rank Fine-Tuning", 2024, eq. 9 to 11 and Alg. 1; LoRA-XS (init=xs,
2024) is the same term with the singular vectors of W.
We differ from its code in three points: the exact SVD where a randomised one without
oversampling misses 9 % of a flat spectrum, bases in fp32 where bf16 breaks B^T B = I by
3e-3, and eta counted in optimizer steps.

m out, n in, r rank, * any leading dimensions (fused experts).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge
from torch import Tensor, nn

from eckart.decompose import truncated_svd
from eckart.errors import UsageError
from eckart.linear import LowRank, Site
from eckart.recipe import Cost, Paper, Weights

Start = tuple[Tensor, Tensor, Tensor]  # B [*, m, r], R [*, r, r], A [*, r, n]


def first_update(G: Tensor, eta: float, rule: str) -> Tensor:
    """-eta sign(G), the first step of Adam and AdamW; or -eta G, that of SGD."""
    return -eta * (G.sign() if rule == "sign" else G)


def from_update(site: Site, rank: int, rule: str) -> Start:
    """Bases and core of the first full update.

    A matrix (or expert) that the calibration data never reached has no update: its bases are those
    of W, with R = 0.
    """
    G = site.gradient
    if G is None:
        raise UsageError(
            "lora-sb needs gradients here", [(site.path, "")], "Pass attach(..., calibration=)."
        )
    reached = G.abs().amax((-2, -1)) > 0  # [*]
    update = first_update(G, site.horizon.first_lr, rule)
    M = torch.where(reached[..., None, None], update, site.weight(torch.float32))
    U, s, Vt = truncated_svd(M, rank)
    return U, torch.diag_embed(s * reached[..., None]), Vt


def from_weight(site: Site, rank: int) -> Start:
    """The leading singular vectors of W, and R = 0."""
    U, s, Vt = truncated_svd(site.weight(torch.float32), rank)
    return U, torch.diag_embed(torch.zeros_like(s)), Vt


def as_lora_xs(site: Site, rank: int) -> Start:
    """LoRA-XS as published: B = U S, A = V^T of W, R ~ N(0, 1e-5^2)."""
    U, s, Vt = truncated_svd(site.weight(torch.float32), rank)
    R = torch.randn(*s.shape, rank, generator=site.generator) * 1e-5
    return U * s.unsqueeze(-2), R.to(U.device), Vt


def at_random(site: Site, rank: int) -> Start:
    """Orthonormal bases of Gaussian matrices, and R = 0: the baseline of all the others."""
    (m, n), g = site.shape, site.generator
    B = torch.linalg.qr(torch.randn(*site.leading, m, rank, generator=g))[0]
    A = torch.linalg.qr(torch.randn(*site.leading, n, rank, generator=g))[0].mT
    return B, torch.zeros(*site.leading, rank, rank), A


@dataclass(frozen=True)
class LoRASB(Weights):
    """Trains r^2 numbers per matrix between two frozen bases; the base stays as it is."""

    rank: Annotated[int, Ge(1)] = 64
    """r, the width of the core. Paper: 24 to 96; cut to min(m, n) where a map is narrower."""

    init: Literal["sign", "raw", "weight", "xs", "random"] = "sign"
    """Where the bases come from: sign, AdamW's first update (the paper); raw, SGD's;
    weight, singular vectors of W; xs, LoRA-XS as published; random, a baseline."""

    core: Literal["step", "zero"] = "step"
    """R at first: step, what the init gives (sign and raw: the first update itself, so the
    model starts one small step ahead of the base); zero, exactly the base."""

    base: ClassVar = "frozen"
    offers: ClassVar = ()
    mission: ClassVar = True
    needs: ClassVar = {"gradients": {"init": ("sign", "raw")}}
    default_lr: ClassVar = 1e-3
    paper: ClassVar = Paper(
        "Initialization using Update Approximation is a Silver Bullet for Extremely Efficient "
        "Low-Rank Fine-Tuning",
        "https://arxiv.org/abs/2411.19557",
    )
    promises: ClassVar = {
        "starts_at_base": {"core": "zero"},
        "restores_base": {},
        "merges": {},
        "exports_low_rank": {},
    }

    def build_one(self, site: Site) -> Mapping[str, nn.Module]:
        rank = min(self.rank, *site.shape)
        B, R, A = self.start(site, rank)
        R = torch.zeros_like(R) if self.core == "zero" else R
        B, A = B.contiguous(), A.contiguous()
        return {"core": LowRank(B, A, R=R, trained=("R",))}

    def start(self, site: Site, rank: int) -> Start:
        """Bases and core for one site."""
        if self.init in ("sign", "raw"):
            return from_update(site, rank, self.init)
        return {"weight": from_weight, "xs": as_lora_xs, "random": at_random}[self.init](site, rank)

    def ratios(self, name: str, tensor: Tensor) -> dict[str, float]:
        return {"weight_decay": 0.0}  # it would pull back the first update, not towards W

    def cost(self, m: int, n: int) -> Cost:
        r = min(self.rank, m, n)
        frozen = r * (m + n)
        return Cost(parameters=r * r, frozen=frozen, flops_per_token=2 * (frozen + r * r))
