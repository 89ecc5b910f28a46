"""SUMO: train a small code model from scratch with orthogonalized moments in GaLore's subspace.

Source: Y. Refael et al., "SUMO: Subspace-Aware Moment-Orthogonalization for Accelerating
Memory-Efficient LLM Training", NeurIPS 2025, Table 2: better than GaLore at equal rank, and
close to Adam, with less state.

Model, data and baselines are those of claims/galore.py.
"""

from eckart.claims import Statement, lower, matches
from eckart.claims.galore import EVERY, D, beside
from eckart.methods import SUMO, Dense
from eckart.recipe import Recipe

CLAIM = beside(
    "SUMO, rank d/4",
    Recipe(Dense(), SUMO(rank=D // 4, every=EVERY)),
    says="in the subspaces of a quarter of the width SUMO trains better than GaLore with less "
    "state, and on a level with Adam",
    statements=(
        lower("SUMO, rank d/4", than="GaLore, rank d/4"),
        matches("SUMO, rank d/4", of="Adam", within=0.02),
        Statement(
            "SUMO's state is less than GaLore's",
            lambda r: r["GaLore, rank d/4"]["state_bytes"] - r["SUMO, rank d/4"]["state_bytes"],
            unit="bytes",
        ),
    ),
    unseen="perplexities of models of 60 M to 1 B parameters, GLUE, time to a given loss",
)
