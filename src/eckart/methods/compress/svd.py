"""SVD: stand in for each matrix by its best low-rank approximation.

    W ~ B A,   B = U_r sqrt(S_r),   A = sqrt(S_r) V_r^T

Needs no data and takes seconds. It minimises the error of W, not of the model's outputs, so
activation-aware methods beat it at equal size; take it as the baseline, or for matrices
whose spectrum falls fast (see `eckart inspect`).

Source: C. Eckart and G. Young, "The approximation of one matrix by another of lower rank",
1936. A map is left dense where its factors would not be smaller.

m out, n in, r rank, * any leading dimensions (fused experts).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt, Le
from torch import nn

from eckart.decompose import balanced, rank_for_energy, truncated_svd
from eckart.linear import LowRank, Site
from eckart.recipe import Compress, Cost, Paper


def rank_for_size(keep: float, m: int, n: int) -> int:
    """The largest rank whose factors have at most `keep` m n elements, at least 1."""
    return max(1, int(keep * m * n / (m + n)))


@dataclass(frozen=True)
class SVD(Compress):
    """Replaces matrices by truncated SVDs, by size, by rank or by error."""

    keep: Annotated[float, Gt(0), Le(1)] | None = 0.8
    """Share of each matrix' elements that remains, where neither rank nor error is given."""

    rank: Annotated[int, Ge(1)] | None = None
    """The same rank everywhere."""

    error: Annotated[float, Gt(0), Le(1)] | None = None
    """Largest relative error |W - B A| / |W| of each matrix (Frobenius)."""

    paper: ClassVar = Paper(
        "The approximation of one matrix by another of lower rank",
        "https://doi.org/10.1007/BF02288367",
    )
    promises: ClassVar = ("merges", "exports_low_rank")

    def build_one(self, site: Site) -> Mapping[str, nn.Module]:
        m, n = site.shape
        U, s, Vt = truncated_svd(site.weight(torch.float32), min(m, n))
        rank = min(self.rank_at(site, s), m, n)
        if rank * (m + n) >= m * n:
            return {}
        B, A = balanced(U[..., :rank], s[..., :rank], Vt[..., :rank, :])
        dtype = site.raw.dtype
        return {"factors": LowRank(B.to(dtype).contiguous(), A.to(dtype).contiguous())}

    def rank_at(self, site: Site, s: torch.Tensor) -> int:
        """The rank of one site whose singular values are s [*, k]."""
        if self.rank is not None:
            return self.rank
        if self.error is not None:
            spectrum = s.reshape(-1, s.shape[-1]).square().sum(0).sqrt()
            return rank_for_energy(spectrum, 1 - self.error**2)
        return rank_for_size(self.keep or 1.0, *site.shape)

    def cost(self, m: int, n: int) -> Cost:
        """Elements of the factors by size or rank; an error bound costs what the data say."""
        r = min(self.rank or rank_for_size(self.keep or 1.0, m, n), m, n)
        return Cost(parameters=min(r * (m + n), m * n), flops_per_token=2 * min(r * (m + n), m * n))
