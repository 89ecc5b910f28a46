"""APOLLO-Mini: train a small code model from scratch with almost no optimizer state.

Source: H. Zhu et al., "APOLLO: SGD-like Memory, AdamW-level Performance", MLSys 2025, Table 2:
with one random direction and one scaling factor per matrix as good as AdamW, and better than
GaLore of rank d/4.

Model, data and baselines are those of claims/galore.py.
"""

from eckart.claims import Statement, lower, matches
from eckart.claims.galore import EVERY, beside
from eckart.methods import APOLLOMini, Dense
from eckart.recipe import Recipe

CLAIM = beside(
    "APOLLO-Mini",
    Recipe(Dense(), APOLLOMini(every=EVERY)),
    says="with the state of one direction a matrix APOLLO-Mini trains on a level with Adam, and "
    "better than GaLore at a quarter of the width",
    statements=(
        matches("APOLLO-Mini", of="Adam", within=0.02),
        lower("APOLLO-Mini", than="GaLore, rank d/4"),
        Statement(
            "APOLLO-Mini's state is less than GaLore's",
            lambda r: r["GaLore, rank d/4"]["state_bytes"] - r["APOLLO-Mini"]["state_bytes"],
            unit="bytes",
        ),
    ),
    unseen="perplexities of models of 60 M to 7 B parameters, pretraining 7 B on one card",
)
