"""Optimizers composed of small parts: projector, inner rule, refresh, residual, ..."""

from eckart.optim.blocks import Blocks
from eckart.optim.drawn import Coordinates, Gaussian
from eckart.optim.fixed import Selected
from eckart.optim.inner import (
    SGD,
    Adafactor,
    Adam,
    Direction,
    Inner,
    Memoryless,
    Normalised,
)
from eckart.optim.leading import SEARCHES, SVD, Gram, Iteration, Leading, Randomised
from eckart.optim.optimizer import LowRankOptimizer
from eckart.optim.orthogonal import Orthogonal
from eckart.optim.pair import (
    Factor,
    Moments,
    PairRule,
    Spectrum,
    Stacks,
    grams,
    inverse,
    mixed,
    spectrum,
    stepped,
    sylvester,
)
from eckart.optim.project import (
    Basis,
    Identity,
    Projector,
    Subspace,
    Whole,
)
from eckart.optim.refresh import Refresh
from eckart.optim.residual import NormGrowth, Outside, Replaced, Rescaled, Residual
from eckart.optim.rule import Rule
from eckart.optim.source import ErrorFeedback, Momentum, Source
from eckart.optim.storage import EightBit, Packed
from eckart.optim.warm import Warm

__all__ = [
    "SEARCHES",
    "SGD",
    "SVD",
    "Adafactor",
    "Adam",
    "Basis",
    "Blocks",
    "Coordinates",
    "Direction",
    "EightBit",
    "ErrorFeedback",
    "Factor",
    "Gaussian",
    "Gram",
    "Identity",
    "Inner",
    "Iteration",
    "Leading",
    "LowRankOptimizer",
    "Memoryless",
    "Moments",
    "Momentum",
    "NormGrowth",
    "Normalised",
    "Orthogonal",
    "Outside",
    "Packed",
    "PairRule",
    "Projector",
    "Randomised",
    "Refresh",
    "Replaced",
    "Rescaled",
    "Residual",
    "Rule",
    "Selected",
    "Source",
    "Spectrum",
    "Stacks",
    "Subspace",
    "Warm",
    "Whole",
    "grams",
    "inverse",
    "mixed",
    "spectrum",
    "stepped",
    "sylvester",
]
