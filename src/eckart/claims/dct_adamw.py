"""DCT-AdamW: train a small code model from scratch in cosine directions chosen at each step.

Source: I. Modoranu et al., "FFT-based Dynamic Subspace Selection for Low-Rank Adaptive
Optimization of Large Language Models", arXiv 2505.17967, abstract: as good as projection on
singular vectors, at a fraction of the time that these take.

Model, data and baselines are those of claims/galore.py; the rank is d / 8 for all. The
singular basis is recomputed at every step, as the cosine directions are, and everything else is
the same. "As good" means: at most 2 % above in loss. The share of energy in the directions is
measured on the gradient of a batch at the end; r of n random directions hold r / n of it. Times
are for one matrix of 512 x 512.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from eckart.claims import END, Arm, Claim, Lab, Quantities, Statement, Trained, lower, near
from eckart.claims.galore import CLAIM as GALORE
from eckart.claims.galore import D
from eckart.decompose import truncated_svd
from eckart.methods import AdamW, DCTAdamW, Dense
from eckart.optim import SVD, Refresh, Rule
from eckart.optim.fixed import directions
from eckart.recipe import Recipe

RANK = D // 8
WIDTH, REPEATS = 512, 5


@dataclass(frozen=True)
class SingularBasis(DCTAdamW):
    """DCT-AdamW with directions from an SVD; everything else is the same."""

    def rule(self) -> Rule:
        rule = super().rule()
        refresh = Refresh(self.every, self.on_refresh, stagger=self.every > 1)
        return replace(rule, projector=SVD(self.rank, self.side), refresh=refresh)


def chosen(A: Tensor, r: int) -> Tensor:
    """Coordinates [m, r] of A [m, n] in the r cosine directions of largest l1 norm."""
    S = A @ directions("dct2", A.shape[-1], A.dtype, A.device)
    return S[:, S.abs().sum(0).topk(r).indices]


def energies(trained: Trained, lab: Lab) -> Quantities:
    """Mean share of the squared gradient in r cosine, singular and random directions."""
    batch = lab.batch(trained.step)
    weights = [site.raw for site in trained.handle.sites.values() if site.kind == "linear"]
    loss = trained.handle.loss(batch, trained.model(**batch))
    shares = []
    for G in torch.autograd.grad(loss, weights):
        A = G.mT if G.shape[0] < G.shape[1] else G  # [long side, short side]
        r = min(RANK, A.shape[1])
        cosine, singular = chosen(A, r).square().sum(), torch.linalg.svdvals(A)[:r].square().sum()
        shares.append((float(cosine / A.square().sum()), float(singular / A.square().sum()),
                       r / A.shape[1]))  # fmt: skip
    names = ("energy", "energy of singular directions", "energy of random directions")
    columns = zip(*shares, strict=True)
    return {n: sum(c) / len(c) for n, c in zip(names, columns, strict=True)}


def seconds(function: Callable[[], object]) -> float:
    """The shortest time of a few calls, after a warm-up call."""
    function()
    taken = []
    for _ in range(REPEATS):
        begun = time.perf_counter()
        function()
        taken.append(time.perf_counter() - begun)
    return min(taken)


def searches(lab: Lab) -> Quantities:
    """Seconds for finding r = n / 8 directions of one matrix."""
    generator = torch.Generator().manual_seed(lab.seed)
    G = torch.randn(WIDTH, WIDTH, generator=generator)
    r = WIDTH // 8
    return {
        "cosine seconds": seconds(lambda: chosen(G, r)),
        "singular seconds": seconds(lambda: truncated_svd(G, r)),
    }


def dct(**fields: Any) -> Recipe:
    return Recipe(Dense(), DCTAdamW(rank=RANK, **fields))


CLAIM = Claim(
    says="choosing r directions of a fixed cosine basis at every step trains as well as taking "
    "the r leading singular directions, and finds them at least five times faster",
    task=GALORE.task,
    arms=(
        Arm("Adam", Recipe(Dense(), AdamW()), lr=3e-3),
        Arm("blocks frozen", Recipe(Dense(targets=("embedding", "head"))), lr=1e-2),
        Arm("cosine", dct(), lr=3e-3, watch={END: energies}),
        Arm("singular", Recipe(Dense(), SingularBasis(rank=RANK)), lr=3e-3),
        Arm("random basis, chosen alike", dct(basis="random"), lr=3e-3),
        Arm("one search", run=searches, search=False),
        Arm(
            "singular, every 50",
            Recipe(Dense(), SingularBasis(rank=RANK, every=50)),
            lr=3e-3,
            full=True,
        ),
        Arm("cosine, moments stay in place", dct(on_refresh="keep"), lr=3e-3, full=True),
        Arm("cosine, with error feedback", dct(error_feedback=True), lr=3e-3, full=True),
    ),
    control=lower("Adam", than="blocks frozen", by=0.05),
    statements=(
        near("cosine", of="singular", share=0.02),
        Statement(
            "the chosen cosine directions hold more of the gradient than random ones do",
            lambda r: r["cosine"]["energy"] - r["cosine"]["energy of random directions"],
            unit="",
        ),
        Statement(
            "a search by SVD takes at least five times as long",
            lambda r: r["one search"]["singular seconds"] - 5 * r["one search"]["cosine seconds"],
            unit="s",
        ),
        lower("cosine", than="cosine, moments stay in place"),
    ),
    unseen="models of 350 M to 1.3 B parameters, fine-tuning on mathematics, a quarter less "
    "memory, run time that does not depend on the rank",
)
