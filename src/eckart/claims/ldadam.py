"""LDAdam: train a small code model from scratch with Adam in a subspace that changes every step.

Source: T. Robert et al., "LDAdam: Adaptive Optimization from Low-Dimensional Gradient
Statistics", ICLR 2025, Table 3: better than GaLore at equal rank and close to AdamW.

Model, data and baselines are those of claims/galore.py. LDAdam's error feedback has a
buffer of the weights' size, which the paper does not count as state.
"""

from eckart.claims import Arm, lower, matches
from eckart.claims.galore import D, beside, galore
from eckart.methods import Dense, LDAdam
from eckart.recipe import Recipe

CLAIM = beside(
    "LDAdam, rank d/16",
    Recipe(Dense(), LDAdam(rank=D // 16)),
    says="at a sixteenth of the width LDAdam trains better than GaLore there and on a level with "
    "Adam",
    others=(Arm("GaLore, rank d/16", galore(D // 16)),),
    statements=(
        lower("LDAdam, rank d/16", than="GaLore, rank d/16"),
        matches("LDAdam, rank d/16", of="Adam", within=0.02),
    ),
    unseen="perplexities of models of 130 M and 350 M parameters, fine-tuning on GLUE",
)
