"""APOLLO: train a small code model from scratch, gradients scaled as Adam would scale them.

Source: H. Zhu et al., "APOLLO: SGD-like Memory, AdamW-level Performance", MLSys 2025, Table 2:
at rank d/4 as good as AdamW or better, and better than GaLore of that rank.

Model, data and baselines are those of claims/galore.py; random projections are redrawn as often
as GaLore's bases.
"""

from eckart.claims import lower, matches
from eckart.claims.galore import EVERY, D, beside
from eckart.methods import APOLLO, Dense
from eckart.recipe import Recipe

CLAIM = beside(
    "APOLLO, rank d/4",
    Recipe(Dense(), APOLLO(rank=D // 4, every=EVERY)),
    says="with a random projection to a quarter of the width APOLLO trains on a level with Adam, "
    "and better than GaLore of that rank",
    statements=(
        matches("APOLLO, rank d/4", of="Adam", within=0.02),
        lower("APOLLO, rank d/4", than="GaLore, rank d/4"),
    ),
    unseen="perplexities of models of 60 M to 7 B parameters, throughput and batch sizes on a GPU",
)
