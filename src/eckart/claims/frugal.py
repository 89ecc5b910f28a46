"""FRUGAL: train a small code model from scratch, Adam on a quarter, signSGD elsewhere.

Source: P. Zmushko et al., "FRUGAL: Memory-Efficient Optimization by Reducing State Overhead
for Scalable Training", ICML 2025, Table 2 (better than GaLore at its memory, close to Adam) and
the ablation of the state-free part.

Model, data and baselines are those of claims/galore.py.
"""

from eckart.claims import Arm, lower, matches
from eckart.claims.galore import EVERY, beside
from eckart.methods import FRUGAL, Dense
from eckart.recipe import Recipe

CLAIM = beside(
    "FRUGAL",
    Recipe(Dense(), FRUGAL(density=0.25, every=EVERY)),
    says="with Adam on a quarter of the columns and signs elsewhere FRUGAL trains better than "
    "GaLore at a quarter of the width, and better than without the signs, on a level with Adam",
    others=(
        Arm("without signs", Recipe(Dense(), FRUGAL(density=0.25, every=EVERY, outside="none"))),
    ),
    statements=(
        lower("FRUGAL", than="GaLore, rank d/4"),
        lower("FRUGAL", than="without signs"),
        matches("FRUGAL", of="Adam", within=0.02),
    ),
    unseen="perplexities of models of 60 M to 1 B parameters, fine-tuning on GLUE",
)
