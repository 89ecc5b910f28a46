"""Low-rank factorisations of matrices, and choices of the rank."""

from eckart.decompose.ranks import rank_for_energy
from eckart.decompose.svd import (
    balanced,
    fix_signs,
    product_svd,
    recompress,
    truncated_svd,
    working,
)

__all__ = [
    "balanced",
    "fix_signs",
    "product_svd",
    "rank_for_energy",
    "recompress",
    "truncated_svd",
    "working",
]
