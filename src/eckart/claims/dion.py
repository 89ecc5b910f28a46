"""Dion: train a small code model from scratch with low-rank orthonormalized momentum.

Source: K. Ahn et al., "Dion: Distributed Orthonormalized Updates", arXiv 2504.05295, figures of
the loss by rank: as good as Muon at full rank, slightly worse at a quarter of it.

Model, data and baselines are those of claims/galore.py.
"""

from eckart.claims import Arm, lower, matches
from eckart.claims.galore import D, beside
from eckart.methods import Dense, Dion, Muon
from eckart.recipe import Recipe

CLAIM = beside(
    "Dion, rank d/4",
    Recipe(Dense(), Dion(rank=D // 4)),
    says="in a quarter of the directions Dion trains on a level with Muon, and better than Adam",
    others=(Arm("Muon", Recipe(Dense(), Muon())),),
    statements=(
        matches("Dion, rank d/4", of="Muon", within=0.02),
        lower("Dion, rank d/4", than="Adam"),
    ),
    unseen="models of 120 M to 3 B parameters, wall time on many cards",
)
