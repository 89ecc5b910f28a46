"""Fira: train a small code model from scratch with GaLore plus the scaled residual gradient.

Source: X. Chen et al., "Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank
Constraint?", arXiv 2410.01623, abstract (comparable to or better than full-rank training),
the 7B experiment (rank 64 against GaLore's 1024) and the ablation of scaling and limiter.

Model, data and baselines are those of claims/galore.py. GaLore and Fira of one rank have
equal state, up to one number per matrix. Adam's learning rate is searched as widely as Fira's,
since the paper's "better than full-rank" depends on it. The margin to Adam, 0.02 nats, is 2 % of
the perplexity.
"""

from typing import Any

from eckart.claims import Arm, Claim, lower, matches
from eckart.claims.galore import CLAIM as GALORE
from eckart.claims.galore import EVERY, D, galore
from eckart.methods import AdamW, Dense, Fira
from eckart.recipe import Recipe

MARGIN = 0.02


def fira(rank: int, **fields: Any) -> Recipe:
    return Recipe(Dense(), Fira(rank=rank, every=EVERY, **fields))


CLAIM = Claim(
    says="with GaLore's memory Fira trains better than GaLore, at a quarter of its rank too, "
    "and on a level with Adam",
    task=GALORE.task,
    arms=(
        Arm("Adam", Recipe(Dense(), AdamW()), lr=3e-3),
        Arm("blocks frozen", Recipe(Dense(targets=("embedding", "head"))), lr=1e-2),
        Arm("GaLore, rank d/8", galore(D // 8)),
        Arm("Fira, rank d/8", fira(D // 8)),
        Arm("GaLore, rank d/4", galore(D // 4)),
        Arm("Fira, rank d/16", fira(D // 16)),
        # Adam's scaling factors of small gradients are above 1, so phi_max=1 turns scaling off.
        Arm("Fira, rank d/8, residual not scaled", fira(D // 8, phi_max=1.0), full=True),
        Arm("Fira, rank d/8, no limiter", fira(D // 8, gamma=None), full=True),
    ),
    control=lower("Adam", than="blocks frozen", by=0.05),
    statements=(
        lower("Fira, rank d/8", than="GaLore, rank d/8"),
        lower("Fira, rank d/16", than="GaLore, rank d/4"),
        matches("Fira, rank d/8", of="Adam", within=MARGIN),
        lower("Fira, rank d/8", than="Fira, rank d/8, residual not scaled"),
        lower("Fira, rank d/8", than="Fira, rank d/8, no limiter"),
    ),
    unseen="perplexities of models of 60 M to 7 B parameters, a rank 16 times smaller than "
    "GaLore's, fine-tuning on commonsense questions, loss spikes of long runs",
)
