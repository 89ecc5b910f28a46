"""Muon: train a small code model from scratch with orthogonalized momentum.

Source: K. Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024, and
J. Liu et al., "Muon is Scalable for LLM Training", arXiv 2502.16982: a lower loss than AdamW's
after as many steps, with half of its state.

Model, data and baselines are those of claims/galore.py.
"""

from eckart.claims import lower
from eckart.claims.galore import beside
from eckart.methods import Dense, Muon
from eckart.recipe import Recipe

CLAIM = beside(
    "Muon",
    Recipe(Dense(), Muon()),
    says="after as many steps Muon's loss is below Adam's, by more than a batch's luck",
    statements=(lower("Muon", than="Adam", by=0.02),),
    unseen="twice the efficiency at billions of parameters, speed records, time per step",
)
