"""LoLDU: rescale the pieces of a frozen L D U decomposition by one trained number each.

    W = P L diag(D) U     L unit lower [m, k], U unit upper [k, n], P the pivoting, k = min(m, n)
    y = W x + sigma (P L)_r diag(z - z_0) U_r x      z_0 = D_r; z [r] trained, the rest frozen

r numbers per matrix. Take it where thousands of adapters must be stored and a base is at hand to
rebuild L and U from. With as many numbers NOLA ends lower (1.66 nats in claims/loldu.py, LoLDU
1.68), LoRA of rank 1 with three times as many at 1.59. L and U are triangular, not orthogonal,
and their order is that of the columns, not of importance. A large learning rate is part of the
method: the entries of D spread over orders of magnitude.

Only r x r and thinner systems are solved, in fp64. With p the first r pivot rows,
    W[p, :r] = L_1 U_1     (PL)_r = W[:, :r] U_1^-1     diag(D_r) U_r = L_1^-1 W[p]
so that, the pivots given, L and U are smooth in W. The file holds z - z_0 and the pivots:
L and U are rebuilt from the base, on any device and in any dtype; other pivots at a near-tie
would give z another meaning. A pivot below 1e-6 of the largest entry of W is dead (W has
no LDU there): it keeps its number, moves nothing, and its row stays in the base.

Source: Y. Shi et al., "LoLDU: Low-Rank Adaptation via Lower-Diag-Upper Decomposition for
Parameter-Efficient Fine-Tuning", 2024.
We differ in three points. W stays whole and z - z_0 is what is stored and decayed, where the
paper splits a residual off W: the same function, exact in every dtype. P is never a matrix.
And sigma is 1: with Adam it only scales the learning rate.

m out, n in, r rank, * any leading dimensions (fused experts).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.linalg import solve_triangular

from eckart.linear import Site
from eckart.linear.spectral import Spectral
from eckart.recipe import Cost, Paper, Weights

DEAD = 1e-6  # of the largest entry of W: far above fp64 rounding, far below a pivot of use


def threshold(W: Tensor) -> Tensor:
    """The largest pivot that counts as dead: [*, m, n] -> [*]."""
    return DEAD * W.abs().amax((-2, -1))


def pivot_rows(W: Tensor, r: int) -> Tensor:
    """The first r rows that partial pivoting selects, int32 [*, r]. W [*, m, n] in fp64.

    They depend on the first r columns alone. As in LAPACK, except at a dead pivot: nothing is
    eliminated with it, as the later pivots would depend on its noise.
    """
    if isinstance(W, FakeTensor):  # an estimate: no numbers to choose by, any rows have the size
        return torch.arange(r, dtype=torch.int32).expand(*W.shape[:-2], r).contiguous()
    panel = W[..., :r]
    LU, swaps, _ = torch.linalg.lu_factor_ex(panel)
    if bool((LU.diagonal(dim1=-2, dim2=-1).abs() > threshold(W)[..., None]).all()):
        rows = [swapped(s.tolist(), W.shape[-2])[:r] for s in swaps.reshape(-1, r)]
        return torch.tensor(rows, dtype=torch.int32, device=W.device).reshape(swaps.shape)
    left, chosen = panel.clone(), []
    free = torch.ones(W.shape[:-1], dtype=torch.bool, device=W.device)  # [*, m]
    for j in range(r):
        sizes = torch.where(free, left[..., j].abs(), -1.0)  # [*, m]
        row = sizes.argmax(-1, keepdim=True)  # [*, 1]
        chosen.append(row)
        free.scatter_(-1, row, False)
        top = torch.take_along_dim(left, row[..., None], -2)  # [*, 1, r]
        alive = top[..., j].abs() > threshold(W)[..., None]
        factor = torch.where(free & alive, left[..., j] / torch.where(alive, top[..., j], 1.0), 0.0)
        left -= factor[..., None] * top
    return torch.cat(chosen, -1).int()


def swapped(swaps: list[int], m: int) -> list[int]:
    """The order of rows 0..m-1 after LAPACK's row exchanges, which are 1-based."""
    order = list(range(m))
    for i, other in enumerate(swaps):
        order[i], order[other - 1] = order[other - 1], order[i]
    return order


def without_pivoting(M: Tensor, dead: Tensor) -> tuple[Tensor, Tensor]:
    """M [*, k, k] = L U without exchanging rows, recursively by halves. `dead` [*]: pivots to skip.

    Where |U_ii| <= dead, column i of L is e_i; M is then reproduced up to its column i alone.
    """
    k = M.shape[-1]
    if k == 1:
        return torch.ones_like(M), M
    h = k // 2
    L11, U11 = without_pivoting(M[..., :h, :h], dead)
    U12 = solve_triangular(L11, M[..., :h, h:], upper=False, unitriangular=True)
    L21 = over(M[..., h:, :h], U11, alive(U11, dead))
    L22, U22 = without_pivoting(M[..., h:, h:] - L21 @ U12, dead)
    zero = torch.zeros_like(M[..., :h, h:])
    L = torch.cat([torch.cat([L11, zero], -1), torch.cat([L21, L22], -1)], -2)
    U = torch.cat([torch.cat([U11, U12], -1), torch.cat([zero.mT, U22], -1)], -2)
    return L, U


def alive(U: Tensor, dead: Tensor) -> Tensor:
    """Which pivots on the diagonal of U [*, k, k] are above the noise: [*, k]."""
    return U.diagonal(dim1=-2, dim2=-1).abs() > dead[..., None]


def over(X: Tensor, U: Tensor, alive: Tensor, instead: float | Tensor = 0.0) -> Tensor:
    """X U^-1 with X [*, a, k]; columns of dead pivots are replaced by `instead` [a, k]."""
    here = alive[..., None, :]
    eye = torch.eye(U.shape[-1], dtype=U.dtype, device=U.device)
    right = torch.where(here, X, instead)
    return solve_triangular(torch.where(here, U, eye), right, upper=True, left=False)


def ldu(W: Tensor, pivots: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The first r pieces of W = P L diag(D) U: (P L)_r [*, m, r], D [*, r], U_r [*, r, n].

    W [*, m, n] in fp64, pivots [*, r] its first pivot rows. |L| <= 1. Rows of U at dead
    pivots are 0.
    """
    r, rows = pivots.shape[-1], pivots.long()
    top = torch.take_along_dim(W, rows[..., None], -2)  # [*, r, n]
    dead = threshold(W)
    L1, U1 = without_pivoting(top[..., :r], dead)
    here = alive(U1, dead)  # [*, r]
    own = torch.zeros_like(W[..., :r]).scatter(-2, rows[..., None, :], 1.0)  # e_p, column by column
    L = over(W[..., :r], U1, here, own)
    U = solve_triangular(L1, top, upper=False, unitriangular=True).triu()  # [*, r, n]
    D = U.diagonal(dim1=-2, dim2=-1)
    return L, D, torch.where(here[..., None], U / torch.where(here, D, 1.0)[..., None], 0.0)


class LDU(Spectral):
    """sigma (P L)_r diag(s) U_r with s = z - z_0; the frames are derived from W and pivots."""

    pivots: Tensor

    def __init__(self, pivots: Tensor, s: Tensor, scale: float, relative: bool):
        super().__init__(torch.empty(0), s, torch.empty(0), scale, trained=("s",))  # s [*, r]
        self.register_buffer("pivots", pivots)  # int32 [*, r]
        self.relative = relative
        self.forget_frames()

    @classmethod
    def empty(cls, tensors: Mapping[str, Mapping[str, Any]], scalars: Mapping[str, Any]) -> Self:
        term = super().empty(tensors, scalars)
        term.forget_frames()
        return term

    def forget_frames(self) -> None:
        """Drop the frames, which are not saved: they are recomputed from W and the pivots."""
        self.register_buffer("B", None, persistent=False)
        self.register_buffer("A", None, persistent=False)

    def bind(self, shared: Mapping[str, nn.Module], home: nn.Module, param: str) -> None:
        self.__dict__["home"], self.param = home, param

    def frames(self) -> tuple[Tensor, Tensor]:
        if self.B is None:
            home: Any = self.__dict__["home"]
            self.derive(home.matrix(self.param))
        return super().frames()

    @torch.inference_mode(False)  # frames made while generating serve a training after it
    @torch.no_grad()
    def derive(self, W: Tensor) -> Tensor:
        """Compute the frames from the base matrix W [*, m, n]; returns D [*, r]."""
        L, D, U = ldu(W.detach().double(), self.pivots)
        U = D[..., None] * U if self.relative else U
        self.B, self.A = L.to(self.s.dtype).contiguous(), U.to(self.s.dtype).contiguous()
        return D


@dataclass(frozen=True)
class LoLDU(Weights):
    """Trains r numbers per matrix; the base stays as it is."""

    rank: Annotated[int, Ge(1)] = 64
    """r, pieces that are rescaled, in the order of the columns. Paper: min(m, n)."""

    scale: Annotated[float, Gt(0)] = 1.0
    """sigma. Paper: alpha / r; adaptive optimizers hardly see it."""

    relative: bool = False
    """Train the change as a share of D, so that one step moves every piece by the same
    percentage. Paper: in units of D's own entries."""

    z_init: Literal["lu", "zeros", "ones", "uniform", "normal"] = "lu"
    """z at first. lu: D, the base itself; others change the model at step 0: 0, 1,
    U(-1, 1), N(0, 1)."""

    base: ClassVar = "frozen"
    offers: ClassVar = ()
    mission: ClassVar = True
    default_lr: ClassVar = 3e-3
    paper: ClassVar = Paper(
        "LoLDU: Low-Rank Adaptation via Lower-Diag-Upper Decomposition for Parameter-Efficient "
        "Fine-Tuning",
        "https://arxiv.org/abs/2410.13618",
    )
    promises: ClassVar = {
        "starts_at_base": {"z_init": "lu"},
        "restores_base": {},
        "merges": {},
        "exports_low_rank": {},
    }

    def build_one(self, site: Site) -> Mapping[str, nn.Module]:
        r = min(self.rank, *site.shape)
        W = site.weight(torch.float64)
        pivots = pivot_rows(W, r)
        term = LDU(pivots, torch.zeros(pivots.shape), self.scale, self.relative)
        D = term.derive(W).float().cpu()
        if self.z_init != "lu":
            change = self.start(site, D) - D
            unit = D if self.relative else torch.ones_like(D)
            term.s.data.copy_(torch.where(unit == 0, 0.0, change / unit))
        return {"loldu": term}

    def start(self, site: Site, D: Tensor) -> Tensor:
        """The initial z [*, r] of the inits other than D."""
        z, g = torch.zeros_like(D), site.generator
        if self.z_init == "uniform":
            return z.uniform_(-1, 1, generator=g)
        if self.z_init == "normal":
            return z.normal_(generator=g)
        return z + 1 if self.z_init == "ones" else z

    def ratios(self, name: str, tensor: Tensor) -> dict[str, float]:
        """Weight decay pulls z to z_0, so it is allowed although s is a vector."""
        return {"weight_decay": 1.0}

    def cost(self, m: int, n: int) -> Cost:
        r = min(self.rank, m, n)
        frames = r * (m + n)
        return Cost(parameters=r, frozen=frames + r, flops_per_token=2 * frames + r)
