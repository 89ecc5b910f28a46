"""Block-LoRA: one down-projection shared by p up-projections ("one head, eight arms").

    y = W x + s (B_1 + ... + B_p) A x      A [k, n], B_i [m, k], k = r / p, s = alpha / r

The rank axis of a LoRA of rank r is cut into p blocks and all blocks of A are made one: its
p products become p - 1 additions. All B_i start at 0. What remains is a product through k
dimensions:

    rank(dW) <= k, and every Block-LoRA function is a LoRA function of rank k.

More than that: all arms see the same gradient, s G A^T. They start equal, so an elementwise
optimizer keeps them equal for ever, and training them is training ONE arm B = sum B_i with p
times the learning rate, 1/p of the weight decay, and p times its weight in the norm that is
clipped: LoRA+ of rank k with ratio p. form=merged (the default) trains that one arm with
these ratios; form=arms trains all p, to the same trajectory at more memory; the tests hold
the two together. Take LoRA, of rank k where that is enough: rank 8 in four blocks ends where
LoRA of rank 2 does with the same ratios (1.55 nats in claims/block_lora.py), LoRA of rank 8 at
1.48. Take this where CLIP's few-shot results are to be repeated.

Two other partitions of the same matrices do more, and are no longer that LoRA:

    row     row block i of dW    = s B_i A_i             B_i [m/p, k], A_i [k, n]: rank r
    grid    block (i, j) of dW   = s B_i diag(D_ij) A_j  B_i [m/p, r], A_j [r, n/p]: rank up to p r

grid with D = 1, its start, is LoRA of rank r; with D free it is BoRA.

Source: "One Head Eight Arms: Block Matrix based Low Rank Adaptation for CLIP-based Few-Shot
Learning", 2025 (arms; the axis of the partition is read from its abstract); BoRA, 2025
(grid).

m out, n in, r nominal rank, p blocks, k = r / p, * any leading dimensions (fused experts).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor, nn

from eckart.errors import UsageError
from eckart.linear import LowRank, Site
from eckart.linear.factored import Factored, fresh_pair
from eckart.recipe import Cost, Paper, Weights


class Arms(Factored):
    """s (sum_i B_i) A with all p arms trained: B [*, p, m, k], A [*, k, n]."""

    def __init__(self, B: Tensor, A: Tensor, scale: float, dropout: float = 0.0):
        super().__init__()
        self.scale, self.dropout = scale, dropout
        self.B, self.A = nn.Parameter(B), nn.Parameter(A)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.scale * self.B.sum(-3), self.A


class Rows(Arms):
    """A LoRA of rank k for each of p row blocks: B [*, p, m/p, k], A [*, p, k, n]."""

    def factors(self) -> tuple[Tensor, Tensor]:
        """The block diagonal of the B_i, and the A_i stacked: rank r = p k."""
        return self.scale * block_diagonal(self.B), self.A.flatten(-3, -2)

    def forward(self, x: Tensor) -> Tensor:  # [*, t, n] -> [*, t, m]
        h = self.mm(self.dropped(x).to(self.A.dtype), self.A.flatten(-3, -2).mT)  # [*, t, p k]
        h = by_block(h * self.scale, self.B.shape[-3])  # [*, p, t, k]
        return side_by_side(self.mm(h, self.B.mT))


class Grid(Factored):
    """Block (i, j) = s B_i diag(D_ij) A_j: B [*, p, m/p, r], D [*, p, p, r], A [*, p, r, n/p]."""

    def __init__(self, B: Tensor, D: Tensor, A: Tensor, scale: float, dropout: float = 0.0):
        super().__init__()
        self.scale, self.dropout = scale, dropout
        self.B, self.D, self.A = nn.Parameter(B), nn.Parameter(D), nn.Parameter(A)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Rank p r: row block i of B is [B_i diag(D_i1), ..., B_i diag(D_ip)], A is diagonal."""
        B = self.B.unsqueeze(-3) * self.D.unsqueeze(-2)  # [*, i, j, m/p, r]
        return self.scale * side_by_side(B).flatten(-3, -2), block_diagonal(self.A)

    def forward(self, x: Tensor) -> Tensor:  # [*, t, n] -> [*, t, m]
        x = by_block(self.dropped(x).to(self.A.dtype), self.A.shape[-3])  # [*, j, t, n/p]
        h = self.mm(x, self.A.mT)  # [*, j, t, r]
        h = torch.einsum("...ijr,...jtr->...itr", self.D * self.scale, h)
        return side_by_side(self.mm(h, self.B.mT))


def by_block(x: Tensor, p: int) -> Tensor:
    """Split the last axis into p blocks: [*, t, n] -> [*, p, t, n/p]."""
    return x.unflatten(-1, (p, -1)).transpose(-3, -2)


def side_by_side(x: Tensor) -> Tensor:
    """The inverse of `by_block`: [*, p, t, n/p] -> [*, t, n]."""
    return x.transpose(-3, -2).flatten(-2)


def block_diagonal(blocks: Tensor) -> Tensor:
    """[*, p, a, b] -> [*, p a, p b]."""
    p = blocks.shape[-3]
    spread = torch.eye(p, dtype=blocks.dtype, device=blocks.device)[:, :, None, None]
    return side_by_side(blocks.unsqueeze(-3) * spread).flatten(-3, -2)


@dataclass(frozen=True)
class BlockLoRA(Weights):
    """Trains one thin factor and p that share it; the base stays as it is."""

    rank: Annotated[int, Ge(1)] = 16
    """r, the nominal rank. What the update can reach is r / blocks."""

    blocks: Annotated[int, Ge(1)] = 4
    """p, a divisor of r: 1 is LoRA. In row and grid it divides the sides of every map."""

    alpha: Annotated[float, Gt(0)] = 16.0
    """Numerator of the scale s = alpha / r."""

    form: Literal["merged", "arms", "row", "grid"] = "merged"
    """merged: the sum of the arms, trained as they would move it; arms: each arm (the paper);
    row, grid: other partitions."""

    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Share of inputs dropped in training. CLIP-LoRA: 0.25."""

    base: ClassVar = "frozen"
    offers: ClassVar = ()  # no pairs: rules for pairs would ignore the ratios
    mission: ClassVar = True
    default_lr: ClassVar = 1e-3
    paper: ClassVar = Paper(
        "One Head Eight Arms: Block Matrix based Low Rank Adaptation for CLIP-based Few-Shot "
        "Learning",
        "https://arxiv.org/abs/2501.16720",
    )
    promises: ClassVar = ("starts_at_base", "restores_base", "merges", "exports_low_rank")

    def __post_init__(self) -> None:
        super().__post_init__()
        for place, fields in (("", {}), *(("overrides, ", o) for o in self.overrides)):
            rank, blocks = fields.get("rank", self.rank), fields.get("blocks", self.blocks)
            if rank % blocks:
                raise UsageError(
                    "block-lora: blocks must divide rank",
                    [(f"{place}blocks = {blocks}", f"rank = {rank}")],
                    f"Type weights.rank={-(-rank // blocks) * blocks}, or blocks=1 for LoRA.",
                )
            if blocks != self.blocks and self.form == "merged":
                raise UsageError(
                    "block-lora: merged arms have one number of blocks",
                    [(f"{place}blocks = {blocks}", f"blocks = {self.blocks} elsewhere")],
                    "Type weights.form=arms.",
                )

    def build_one(self, site: Site) -> Mapping[str, nn.Module]:
        s, p = self.alpha / self.rank, self.blocks
        if self.form in ("row", "grid"):
            return {"block_lora": self.partition(site)}
        B, A = fresh_pair(site, self.shared_rank(*site.shape))
        if self.form == "arms":
            arms = B.unsqueeze(-3).repeat(*[1] * len(site.leading), p, 1, 1)
            return {"block_lora": Arms(arms, A, s, self.dropout)}
        return {"block_lora": LowRank(p * B, A, s, dropout=self.dropout)}

    def shared_rank(self, m: int, n: int) -> int:
        """k = r / p, capped where a map is narrower."""
        return min(self.rank // self.blocks, m, n)

    def row_rank(self, m: int, n: int) -> int:
        """p k, capped at a multiple of p where a map is narrower."""
        return max(1, min(self.rank, m, n) // self.blocks) * self.blocks

    def partition(self, site: Site) -> Factored:
        """The term of row and grid. Raises UsageError if p does not divide the map's sides."""
        (m, n), p, s = site.shape, self.blocks, self.alpha / self.rank
        if m % p or (self.form == "grid" and n % p):
            raise UsageError(
                f"block-lora: blocks must divide the map in form={self.form}",
                [("blocks", str(p)), (site.path, f"{m} x {n}")],
                "Leave it out of weights.targets, or take form=arms.",
            )
        B, A = fresh_pair(site, self.row_rank(m, n) if self.form == "row" else self.rank)
        if self.form == "row":
            B, A = by_block(B, p)[..., : m // p, :], A.unflatten(-2, (p, -1))
            return Rows(B.contiguous(), A.contiguous(), s, self.dropout)
        D = torch.ones(*site.leading, p, p, self.rank)
        B, A = B.unflatten(-2, (p, -1)), by_block(A, p)
        return Grid(B.contiguous(), D, A.contiguous(), s, self.dropout)

    def ratios(self, name: str, tensor: Tensor) -> dict[str, float]:
        """The ratios at which one arm trains like p equal arms; no decay on D (starts at 1)."""
        if name.endswith(".D"):
            return {"weight_decay": 0.0}
        if self.form != "merged" or not name.endswith(".B"):
            return {}
        p = self.blocks
        return {"lr": p, "weight_decay": 1 / p, "clip": p}

    def cost(self, m: int, n: int) -> Cost:
        p, k = self.blocks, self.shared_rank(m, n)
        if self.form == "merged":
            return Cost(parameters=k * (m + n), flops_per_token=2 * k * (m + n))
        if self.form == "arms":  # and (p - 1) m k additions once per pass
            return Cost(parameters=k * (n + p * m), flops_per_token=2 * k * (m + n))
        if self.form == "row":
            r = self.row_rank(m, n)
            return Cost(parameters=r * n + r // p * m, flops_per_token=2 * (r * n + r // p * m))
        r = self.rank
        pair = r * (m + n) + p * p * r
        return Cost(parameters=pair, flops_per_token=2 * pair)
