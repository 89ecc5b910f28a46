"""Orthogonality: keep the columns of B and the rows of A apart from each other.

    penalty = weight * sum over pairs of |B^T B - diag|_F^2 + |A A^T - diag|_F^2

where diag is the Gram matrix's own diagonal: lengths are free, angles are pulled to 90
degrees. Take it when factors collapse onto few directions (low effective rank).

Source: the regulariser of Q. Zhang et al., "AdaLoRA", 2023, eq. 4, whose identity target is
replaced by the diagonal, so that a B that starts at zero pays nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Gt
from torch import Tensor

from eckart.linear import LowRank, Term
from eckart.recipe import Objective, Paper


def off_diagonal(M: Tensor) -> Tensor:
    """Squared sum of the entries off the diagonal: M [*, r, r] -> scalar."""
    return M.square().sum() - M.diagonal(dim1=-2, dim2=-1).square().sum()


@dataclass(frozen=True)
class Orthogonality(Objective):
    """Penalises overlap between the rank components of each factor."""

    weight: Annotated[float, Gt(0)] = 1e-2
    """Multiplies the penalty. AdaLoRA: 0.1 to 0.5 with its identity target."""

    kind: ClassVar = "penalty"
    paper: ClassVar = Paper("AdaLoRA", "https://arxiv.org/abs/2303.10512")

    def penalty(self, terms: Mapping[str, Mapping[str, Term]]) -> Tensor:
        pairs = [
            t for by_name in terms.values() for t in by_name.values() if isinstance(t, LowRank)
        ]
        parts = [off_diagonal(t.B.mT @ t.B) + off_diagonal(t.A @ t.A.mT) for t in pairs]
        return self.weight * (torch.stack(parts).sum() if parts else torch.zeros(()))
