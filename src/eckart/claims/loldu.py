"""LoLDU: fine-tune a small code model on prose through the diagonals of LDU decompositions.

Source: Y. Shi et al., "LoLDU: Low-Rank Adaptation via Lower-Diag-Upper Decomposition for
Parameter-Efficient Fine-Tuning", 2024, abstract: comparable to other adapters with far fewer
trained parameters, by means of the LDU decomposition.

"Comparable" means: at most 3 % above LoRA of rank 1 in loss, which trains 2.9 times as many
parameters. To show that the LDU decomposition itself matters, it must beat three methods with as
many parameters per matrix: a diagonal between singular vectors, one between random orthonormal
bases, and NOLA's coefficients. Each has its own learning rate, since the columns of L and U are
longer than orthonormal ones and one rate for all would favour LDU.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from eckart.claims import UNTOUCHED, Arm, Claim, lower, near
from eckart.decompose import truncated_svd
from eckart.linear import Site
from eckart.linear.spectral import Spectral
from eckart.methods import NOLA, LoLDU, LoRA
from eckart.recipe import Recipe

RANK = 128  # min(m, n) of every matrix


@dataclass(frozen=True)
class Diagonal(LoLDU):
    """Trains a diagonal between two frozen orthonormal bases: W's singular vectors, or random."""

    random: bool = False

    def build_one(self, site: Site) -> Mapping[str, nn.Module]:
        r = min(self.rank, *site.shape)
        B, A = self.frames(site, r)
        s = torch.zeros(r)
        return {"diagonal": Spectral(B.contiguous(), s, A.contiguous(), trained=("s",))}

    def frames(self, site: Site, r: int) -> tuple[Tensor, Tensor]:
        """B [m, r] and A [r, n]."""
        if not self.random:
            U, _, Vt = truncated_svd(site.weight(torch.float32), r)
            return U, Vt
        B, A = (
            torch.linalg.qr(torch.randn(size, r, generator=site.generator))[0]
            for size in site.shape
        )
        return B, A.mT


CLAIM = Claim(
    says="rescaling the pieces of an LDU decomposition comes within 3% of LoRA of rank 1 with a "
    "third of its numbers, and is better than other adapters of that size",
    arms=(
        UNTOUCHED,
        Arm("LoRA, rank 1", Recipe(LoRA(rank=1, alpha=2)), lr=1e-2),
        Arm("LDU", Recipe(LoLDU(rank=RANK)), lr=1e-2),
        Arm("singular values", Recipe(Diagonal(rank=RANK)), lr=1e-1),
        Arm("random bases", Recipe(Diagonal(rank=RANK, random=True)), lr=1e-1),
        Arm("NOLA", Recipe(NOLA(rank=8, bases=RANK // 2)), lr=3e-2),
        Arm("LDU, r = 32", Recipe(LoLDU(rank=32)), lr=1e-2, full=True),
        Arm("singular values, r = 32", Recipe(Diagonal(rank=32)), lr=1e-1, full=True),
    ),
    control=lower("LoRA, rank 1", than="untouched", by=0.1),
    statements=(
        near("LDU", of="LoRA, rank 1", share=0.03),
        lower("LDU", than="singular values"),
        lower("LDU", than="random bases"),
        lower("LDU", than="NOLA"),
        lower("LDU, r = 32", than="singular values, r = 32"),
    ),
    unseen="instructions at 7 billion parameters, classification, images, image generation; "
    "2,600 times fewer parameters",
)
