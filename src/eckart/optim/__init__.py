"""How does a gradient become a change? Optimizers put together from small parts."""

from eckart.optim.inner import SGD, Adam, Direction, Inner
from eckart.optim.optimizer import LowRankOptimizer
from eckart.optim.project import SVD, Basis, Identity, Projector, Subspace
from eckart.optim.refresh import Refresh
from eckart.optim.rule import Rule

__all__ = [
    "SGD",
    "SVD",
    "Adam",
    "Basis",
    "Direction",
    "Identity",
    "Inner",
    "LowRankOptimizer",
    "Projector",
    "Refresh",
    "Rule",
    "Subspace",
]
