"""How does a gradient become a change? Optimizers put together from small parts."""

from eckart.optim.blocks import Blocks
from eckart.optim.fixed import Selected
from eckart.optim.inner import SGD, Adafactor, Adam, Direction, Inner, Orthogonal
from eckart.optim.optimizer import LowRankOptimizer
from eckart.optim.pair import Factor, Moments, PairRule, Spectrum, spectrum, sylvester
from eckart.optim.project import (
    SVD,
    Basis,
    Gram,
    Identity,
    Iteration,
    Projector,
    Randomised,
    Subspace,
)
from eckart.optim.refresh import Refresh
from eckart.optim.residual import NormGrowth, Rescaled, Residual
from eckart.optim.rule import Rule
from eckart.optim.source import ErrorFeedback, Momentum, Source
from eckart.optim.storage import EightBit, Packed

__all__ = [
    "SGD",
    "SVD",
    "Adafactor",
    "Adam",
    "Basis",
    "Blocks",
    "Direction",
    "EightBit",
    "ErrorFeedback",
    "Factor",
    "Gram",
    "Identity",
    "Inner",
    "Iteration",
    "LowRankOptimizer",
    "Moments",
    "Momentum",
    "NormGrowth",
    "Orthogonal",
    "Packed",
    "PairRule",
    "Projector",
    "Randomised",
    "Refresh",
    "Rescaled",
    "Residual",
    "Rule",
    "Selected",
    "Source",
    "Spectrum",
    "Subspace",
    "spectrum",
    "sylvester",
]
