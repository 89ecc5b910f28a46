"""LaMDA: three factors, of which one is frozen from the start and one as training goes.

    y = W x + (s B R - B_0 R_0) A x     A [r, n] frozen, R [r, r] trained, B [m, r] for a while

    W ~ U S V^T, truncated at r:   A = V^T,  R_0 = S,  B_0 = U,  s = 1       (init=svd)
    k(t) = min(r, floor(r t / (eta T)))     columns of B frozen at step t, leading ones first

After the share eta of the run only r^2 numbers per matrix are trained, whatever its size. No
factor that sees x is ever trained: the backward pass keeps A x, r numbers per token, where
LoRA keeps x. Take it when activations and optimizer state fill the memory and r can be
large (128 costs 16 k numbers per matrix); take LoRA when the file is what must be small,
since A and B are stored all the same, or when the loss counts: 1.48 nats at rank 8 in
claims/lamda.py, LaMDA 1.54 at rank 24. There 1.58 is reached without training B at all (eta = 0,
which with init=svd_zero is LoRA-XS), and 1.49 by training it to the end (eta = 1).

The two factors start at the leading part of W, and that start is subtracted. A never moves,
so the difference has rank r and is an ordinary LoRA, and W itself is not touched.

A frozen column does not move at all: neither by momentum nor by weight decay. Once all are
frozen, B leaves the optimizer: its gradient and moments are freed, 3 m r numbers per matrix. Under
FSDP2, and in a loop of your own, they are kept, and what moves is the same.

LaMDA++ gives each matrix its own rank at the same average. A spectrum concentrated in few
directions gets a small one, a flat spectrum a large one (see `in_bins`, `at_equal_energy`).

Source: S. A. Azizi et al., "LaMDA: Large Model Fine-Tuning via Spectrally Decomposed
Low-Dimensional Adaptation", 2024.
Its official code is another method: random A, B = 0, a random core and s = alpha / r
(init=code), a counter by which at most 3 columns are ever frozen, and "frozen" columns that
momentum and decay go on moving. We follow the text. How the text bins the spectra is not
said exactly; both rules here are ours. Dropout acts on A x, not on x.

m out, n in, r rank, T steps of the run, * any leading dimensions (fused experts).
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor, nn

from eckart.decompose import truncated_svd
from eckart.errors import UsageError
from eckart.linear import Site
from eckart.linear.factored import Factored
from eckart.recipe import Cost, Cut, Event, Now, Paper, Weights, every_step


class Core(Factored):
    """(s B R - B_0 diag(s_0)) A with A frozen; B trained, or frozen too."""

    B: Tensor
    A: Tensor
    B0: Any  # a tensor or None, as is s0
    s0: Any

    def __init__(
        self,
        B: Tensor,
        R: Tensor,
        A: Tensor,
        scale: float = 1.0,
        *,
        s0: Tensor | None = None,
        thaw: bool = True,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.scale, self.dropout = scale, dropout
        self.register_buffer("A", A)  # [*, r, n]
        self.R = nn.Parameter(R)  # [*, r, r]
        self.register("B", B, thaw)  # [*, m, r]
        self.register_buffer("s0", s0)  # [*, r]; None where the start is zero
        self.register_buffer("B0", B.clone() if thaw and s0 is not None else None)
        self.__dict__["held"] = None  # frozen columns, while the optimizer steps

    @classmethod
    def empty(cls, tensors: Mapping[str, Mapping[str, Any]], scalars: Mapping[str, Any]) -> Self:
        term = super().empty(tensors, scalars)
        for name in ("s0", "B0"):
            if name not in tensors:
                term.register_buffer(name, None)
        term.__dict__["held"] = None
        return term

    def factors(self) -> tuple[Tensor, Tensor]:
        left = self.scale * (self.B @ self.R)  # [*, m, r]
        if self.s0 is not None:
            left = left - (self.B if self.B0 is None else self.B0) * self.s0.unsqueeze(-2)
        return left, self.A

    def forward(self, x: Tensor) -> Tensor:  # [*, t, n] -> [*, t, m]
        if not self.dropout:
            return super().forward(x)
        B, A = self.factors()
        h = self.dropped(self.mm(x.to(A.dtype), A.mT))  # [*, t, r]
        return self.mm(h, B.mT)

    def select(self, kept: Tensor) -> None:
        """B stays whole; if no column of it is trained any longer it becomes a constant."""
        if not len(kept) and isinstance(self.B, nn.Parameter):
            B = self.B.detach()
            del self.B
            self.register_buffer("B", B)

    # The optimizer moves whole tensors. Frozen columns are kept out of its norm, and put back.

    @torch.no_grad()
    def hold(self, frozen: int) -> None:
        """Before a step: save the first columns of B and clear their gradient."""
        if frozen == 0 or not isinstance(self.B, nn.Parameter):
            return
        self.__dict__["held"] = self.B.detach()[..., :frozen].clone()
        if self.B.grad is not None:
            self.B.grad[..., :frozen].zero_()

    @torch.no_grad()
    def put_back(self) -> None:
        """After a step: restore the saved columns, bit for bit."""
        held = self.__dict__["held"]
        if held is not None:
            self.B[..., : held.shape[-1]].copy_(held)
            self.__dict__["held"] = None


def frozen_columns(step: int, steps: int, eta: float, r: int) -> int:
    """k(t): columns of B that are frozen in the step after `step` completed ones."""
    thaw = eta * steps
    return r if thaw == 0 else min(r, math.floor(r * step / thaw + 1e-12))


# --- ranks of LaMDA++ ----------------------------------------------------------------------


def energies(W: Tensor) -> Tensor:
    """E(1), ..., E(k): the share of |W|^2 in the leading directions, fp64 [k], k = min(m, n).

    From the Gram matrix of the short side: only values are needed. Experts are pooled.
    """
    wide = W.double()
    gram = wide @ wide.mT if W.shape[-2] <= W.shape[-1] else wide.mT @ wide
    squares = torch.linalg.eigvalsh(gram).clamp_min(0).flip(-1)  # [*, k]
    total = squares.reshape(-1, squares.shape[-1]).sum(0).cumsum(0)
    return total / total[-1].clamp_min(torch.finfo(torch.float64).tiny)


def in_bins(shares: Mapping[str, Tensor], rank: int, candidates: Sequence[int]) -> dict[str, int]:
    """Assign the candidate ranks by energy at the target rank: flatter spectra get larger ones.

    Groups are as equal as possible; the remainder goes to the flattest. Ties are broken by name.
    """

    def energy(path: str) -> tuple[float, str]:
        E = shares[path]
        # Rounded, so that a scaled copy of a matrix is still its equal.
        return round(float(E[min(rank, len(E)) - 1]), 9), path

    order, ranks = sorted(shares, key=energy), sorted(candidates, reverse=True)
    size, extra = divmod(len(order), len(ranks))
    found: dict[str, int] = {}
    start = 0
    for i, candidate in enumerate(ranks):
        end = start + size + (i < extra)
        found |= {path: min(candidate, len(shares[path])) for path in order[start:end]}
        start = end
    return found


def at_equal_energy(
    shares: Mapping[str, Tensor], budget: int, low: int, high: int, weights: Mapping[str, int]
) -> dict[str, int]:
    """Ranks at the same share tau of energy, the largest that `budget` >= sum w r^2 allows.

    r = min {r: E(r) >= tau}, within low..high. `weights` counts the matrices of a site (its
    experts). Raises UsageError if even the lowest ranks exceed the budget.
    """

    def ranks(tau: float) -> dict[str, int]:
        # 1e-12: the rounding of sums of up to 10^4 squares in fp64
        need = {path: int((tau - 1e-12 > E).sum()) + 1 for path, E in shares.items()}
        return {p: min(max(r, low), high, len(shares[p])) for p, r in need.items()}

    def fits(tau: float) -> bool:
        return sum(weights[path] * r * r for path, r in ranks(tau).items()) <= budget

    levels = [0.0, *torch.cat(list(shares.values())).unique().tolist()]
    if not fits(levels[0]):
        raise UsageError(
            "lamda: the ranks' budget is below the smallest ranks",
            [("sum of r^2 allowed", str(budget)), ("smallest rank", str(low))],
            "Type a smaller first entry of weights.spread.",
        )
    first, last = 0, len(levels) - 1  # levels[first] fits; costs only grow
    while first < last:
        middle = (first + last + 1) // 2
        first, last = (middle, last) if fits(levels[middle]) else (first, middle - 1)
    return ranks(levels[first])


@dataclass(frozen=True)
class LaMDA(Weights):
    """Trains a small core, and at first one outer factor; the base stays as it is."""

    rank: Annotated[int, Ge(1)] = 32
    """r, the width of the core. Paper: 32; 16 to 256, since r^2 grows slowly."""

    eta: Annotated[float, Ge(0), Le(1)] = 0.3
    """Share of the steps after which all of B is frozen. Paper: 0.3; 0: B never trains."""

    init: Literal["svd", "svd_zero", "code"] = "svd"
    """svd: the leading part of W (paper); svd_zero: its directions, R = 0; code: A and R at
    random, B = 0 (official code)."""

    alpha: Annotated[float, Gt(0)] = 16.0
    """Numerator of s = alpha / r in init=code; the others have s = 1."""

    allocation: Literal["flat", "bins", "equal_energy"] = "flat"
    """Ranks over the matrices: the same, or by their spectra in one of two ways (LaMDA++)."""

    spread: tuple[float, ...] = (0.5, 0.75, 1.0, 1.25, 1.5)
    """Ranks of LaMDA++ as shares of `rank`: bins hands these out, equal_energy stays between
    the smallest and the largest."""

    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Share of A x dropped in training."""

    base: ClassVar = "frozen"
    offers: ClassVar = ()
    mission: ClassVar = True
    default_lr: ClassVar = 1e-3
    paper: ClassVar = Paper(
        "LaMDA: Large Model Fine-Tuning via Spectrally Decomposed Low-Dimensional Adaptation",
        "https://arxiv.org/abs/2406.12832",
        "Findings of EMNLP 2024",
    )
    promises: ClassVar = ("starts_at_base", "restores_base", "merges", "exports_low_rank")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.spread or min(self.spread) <= 0:
            raise UsageError(
                "lamda: spread is out of range", [(f"spread = {self.spread}", "needs shares > 0")]
            )

    def build(self, sites: list[Site]) -> dict[str, dict[str, nn.Module]]:
        ranks = self.ranks(sites)
        return {
            site.path: {
                "lamda": dataclasses.replace(self.at(site), rank=ranks[site.path]).term(site)
            }
            for site in sites
        }

    def ranks(self, sites: Sequence[Site]) -> dict[str, int]:
        """The rank of every site; one set by an override is not changed."""
        found = {site.path: min(self.at(site).rank, *site.shape) for site in sites}
        free = [site for site in sites if "rank" not in site.overrides]
        if self.allocation == "flat" or not free:
            return found
        shares = {site.path: energies(site.weight(torch.float32)).cpu() for site in free}
        candidates = [max(1, round(share * self.rank)) for share in self.spread]
        if self.allocation == "bins":
            return found | in_bins(shares, self.rank, candidates)
        weights = {site.path: math.prod(site.leading) for site in free}
        budget = sum(weights[path] * found[path] ** 2 for path in shares)
        low, high = min(candidates), max(candidates)
        return found | at_equal_energy(shares, budget, low, high, weights)

    def flat(self) -> Weights:
        return dataclasses.replace(self, allocation="flat")

    def term(self, site: Site) -> Core:
        """The term of one site at this method's rank."""
        r, thaw = min(self.rank, *site.shape), self.eta > 0
        if self.init == "code":
            B, R, A = at_random(site, r)
            return Core(B, R, A, self.alpha / r, thaw=thaw, dropout=self.dropout)
        U, s, Vt = truncated_svd(site.weight(torch.float32), r)
        U, Vt = U.contiguous(), Vt.contiguous()
        R = torch.diag_embed(s if self.init == "svd" else torch.zeros_like(s))
        s0 = s.clone() if self.init == "svd" else None
        return Core(U, R, Vt, s0=s0, thaw=thaw, dropout=self.dropout)

    def events(self) -> Iterable[Event | Cut]:
        if self.eta == 0:
            return ()
        return (
            Event("hold frozen columns", every_step, self.hold, when="before"),
            Event("put frozen columns back", every_step, put_back, when="after"),
            Cut("B leaves the optimizer", self.thaw_ends, nothing_of_B, needed=False),
        )

    def thaw_ends(self, step: int, steps: int | None) -> bool:
        """Is the step after `step` completed ones the first with all of B frozen?"""
        if steps is None:
            return False
        before, now = (frozen_columns(t, steps, self.eta, 1) for t in (step - 1, step))
        return before < 1 <= now

    def hold(self, now: Now) -> None:
        """Save the columns that are frozen in the step about to start."""
        if now.steps is None:
            raise UsageError(
                "lamda needs the number of steps",
                [("attach(...)", "steps= is missing")],
                "Pass attach(..., steps=), or eta=0 to keep B frozen.",
            )
        for term in cores(now):
            term.hold(frozen_columns(now.step, now.steps, self.eta, term.B.shape[-1]))

    def ratios(self, name: str, tensor: Tensor) -> dict[str, float]:
        """No decay where zero is not the base: it would remove W's leading directions."""
        return {"weight_decay": 0.0} if self.init == "svd" else {}

    def cost(self, m: int, n: int) -> Cost:
        """The cost at equal ranks, while B trains; LaMDA++ has the same on average."""
        r, thaw, svd = min(self.rank, m, n), self.eta > 0, self.init == "svd"
        B, start = m * r, (r + m * r * thaw) * svd
        return Cost(
            parameters=r * r + B * thaw,
            frozen=r * n + B * (not thaw) + start,
            flops_per_token=2 * r * (m + n),
        )


def cores(now: Now) -> list[Core]:
    """The live terms of this method."""
    found = [term for by_name in now.terms.values() for term in by_name.values()]
    return [term for term in found if isinstance(term, Core)]


def nothing_of_B(now: Now) -> dict[str, dict[str, Tensor]]:
    """For `Cut.kept`: no column of B is trained any longer."""
    none = torch.empty(0, dtype=torch.int64)
    return {path: dict.fromkeys(by_name, none) for path, by_name in now.terms.items()}


def put_back(now: Now) -> None:
    """Undo what the optimizer did to frozen columns."""
    for term in cores(now):
        term.put_back()


def at_random(site: Site, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """B = 0, R ~ U(-1/sqrt r, 1/sqrt r), A ~ U(-1/sqrt n, 1/sqrt n), as in the official code."""
    (m, n), g = site.shape, site.generator
    A = torch.empty(*site.leading, r, n).uniform_(-1 / math.sqrt(n), 1 / math.sqrt(n), generator=g)
    R = torch.empty(*site.leading, r, r).uniform_(-1 / math.sqrt(r), 1 / math.sqrt(r), generator=g)
    return torch.zeros(*site.leading, m, r), R, A
