"""Linear maps as sums of terms: the terms, the sums, and the sites they are installed at."""

from eckart.linear.layers import frozen_linear, kernels, linear_plus_term
from eckart.linear.lowrank import LowRank, linear_plus_low_rank, low_rank
from eckart.linear.sites import Horizon, Site, find_sites, seeded_generator
from eckart.linear.structured import Structured, fold, install, uninstall
from eckart.linear.term import (
    Dense,
    Gain,
    Pair,
    Part,
    Product,
    Shared,
    Term,
    alike,
    by_expert,
    describe,
    joint_factors,
    plain_mm,
)

__all__ = [
    "Dense",
    "Gain",
    "Horizon",
    "LowRank",
    "Pair",
    "Part",
    "Product",
    "Shared",
    "Site",
    "Structured",
    "Term",
    "alike",
    "by_expert",
    "describe",
    "find_sites",
    "fold",
    "frozen_linear",
    "install",
    "joint_factors",
    "kernels",
    "linear_plus_low_rank",
    "linear_plus_term",
    "low_rank",
    "plain_mm",
    "seeded_generator",
    "uninstall",
]
