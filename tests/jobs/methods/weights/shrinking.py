"""Shrinking: a low-rank update that loses its weakest components in mid-run.

Not a method of the package: tests drop it in through the registry.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from eckart.linear import LowRank, Site
from eckart.recipe import Cut, Now, Weights


def strongest(term: LowRank, count: int) -> Tensor:
    """Indices of the components with the largest |b_i| |a_i|, in order: [count] int64."""
    size = term.B.detach().norm(dim=-2) * term.A.detach().norm(dim=-1)  # [r]
    return size.topk(count).indices.sort().values


@dataclass(frozen=True)
class Shrinking(Weights):
    """Starts at `rank`, goes on with `left` after `cut_after` steps."""

    rank: int = 6
    """Components at the start."""
    left: int = 2
    """Components after the cut."""
    cut_after: int = 4
    """Steps before the cut."""
    dropout: float = 0.0
    """Share of the inputs of A that is left out, so that generators matter."""

    base: ClassVar = "frozen"

    def build_one(self, site: Site) -> dict[str, LowRank]:
        (m, n), g = site.shape, site.generator
        B = 0.1 * torch.randn(m, self.rank, generator=g)
        A = 0.1 * torch.randn(self.rank, n, generator=g)
        return {"shrinking": LowRank(B, A, 2.0, dropout=self.dropout)}

    def events(self) -> list[Cut]:
        return [Cut("shrink", lambda step, steps: step == self.cut_after, self.kept)]

    def kept(self, now: Now) -> dict[str, dict[str, Tensor]]:
        return {
            path: {"shrinking": strongest(by_name["shrinking"], self.left)}
            for path, by_name in now.terms.items()
        }
