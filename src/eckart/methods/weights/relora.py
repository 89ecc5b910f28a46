"""ReLoRA: pretraining of full rank by one adapter of low rank after another.

    y = W x + s B A x        B [m, r] zero at first, A [r, n] random, s = alpha / r

    every K steps:  W += s B A;  B = 0, A drawn anew;  most of the moments are forgotten
    after each:     the learning rate rises again from zero over a few steps

The map goes through a restart unchanged, and each adapter adds r to the rank of what W has
moved by. The optimizer's state is LoRA's. Moments that were written for the old factors would
lead the new ones to the same subspace: only the largest are kept, and the jagged warm-up keeps
the first steps with what is left short. Embeddings, norms and head are trained whole.

The paper needs a start of full rank: some thousand steps of plain training first (train with
weights=dense, then go on from its result). Take it to pretrain where gradients and moments of
whole matrices do not fit; take GaLore where the gradients do, and LoRA for a short training: in
200 steps one adapter of rank 4 did as well as four (1.47 nats in claims/relora.py).

Source: V. Lialin et al., "ReLoRA: High-Rank Training Through Low-Rank Updates", 2023, Alg. 1.
We differ from its code in two points: both moments of an element are kept or forgotten
together, by the first one's size (the code prunes each by its own, so that a first moment may
stay over a second one of zero); and the merge is rounded once, from fp32.

The matrices themselves change, and what they were is not kept: the result is a dense model.

m out, n in, r rank, * any leading dimensions (fused experts).
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn

from eckart.linear import LowRank, Site
from eckart.linear.factored import fresh_pair
from eckart.optim.sharded import sharded_as, whole
from eckart.recipe import Cost, Event, Now, Paper, Weights


class Restarting(LowRank):
    """s B A beside a matrix to which it is added repeatedly."""

    def bind(self, shared: Mapping[str, nn.Module], home: nn.Module, param: str) -> None:
        self.__dict__["home"] = (home, param)  # not registered: it would be saved twice

    @torch.no_grad()
    def restart(self, generator: torch.Generator) -> None:
        """W += s B A, rounded once; then B = 0 and A ~ U(-1/sqrt n, 1/sqrt n)."""
        home, param = self.__dict__["home"]
        W = home.matrix(param)  # [*, m, n], a view of the stored parameter
        wide = torch.promote_types(W.dtype, torch.float32)
        W.copy_(W.to(wide) + self.scale * (self.B.to(wide) @ self.A.to(wide)))
        self.B.zero_()
        bound = 1 / math.sqrt(self.A.shape[-1])
        drawn = torch.empty(self.A.shape).uniform_(-bound, bound, generator=generator)
        self.A.copy_(sharded_as(self.A, drawn))


def restart(now: Now) -> None:
    """Merge and reinitialise all adapters, in the order of their names."""
    for path in sorted(now.terms):
        for term in now.terms[path].values():
            if isinstance(term, Restarting):
                term.restart(now.generator)


def forget(state: dict[str, Any], p: Tensor, share: float) -> None:
    """Zero this share of the elements of all moments shaped like the parameter, by the smallest
    absolute value of the first moment.
    """
    moments = [v for v in state.values() if isinstance(v, Tensor) and v.shape == p.shape]
    kept = round((1 - share) * p.numel())
    if not moments or kept == p.numel():
        return
    largest = whole(moments[0]).abs().flatten().topk(kept).indices
    mask = torch.zeros(p.numel(), dtype=torch.bool, device=p.device)
    mask[largest] = True
    for moment in moments:
        moment.mul_(sharded_as(moment, mask.view(p.shape)))


@dataclass(frozen=True)
class ReLoRA(Weights):
    """Trains an adapter, merges it into its matrix, and trains another."""

    rank: Annotated[int, Ge(1)] = 128
    """r, the rank of each adapter. Usual: 128."""

    alpha: Annotated[float, Gt(0)] = 32.0
    """Numerator of the scale s = alpha / r. Usual: 32."""

    every: Annotated[int, Ge(1)] = 2000
    """K, steps between two restarts. Paper: a few thousand."""

    rewarm: Annotated[int, Ge(0)] = 100
    """Steps after a restart in which the learning rate rises to what the schedule says.
    Usual: 50 to 100."""

    pruned: Annotated[float, Ge(0), Le(1)] = 0.99
    """Share of the moments that is forgotten at a restart. Paper: 0.9 to 0.999."""

    base: ClassVar = "rewritten"
    rest: ClassVar = "trained"
    offers: ClassVar = ()  # rules for pairs would keep state of factors that are gone
    default_lr: ClassVar = 1e-3
    paper: ClassVar = Paper(
        "ReLoRA: High-Rank Training Through Low-Rank Updates",
        "https://arxiv.org/abs/2307.05695",
        "ICLR 2024",
    )
    promises: ClassVar = ("starts_at_base", "merges")

    def build_one(self, site: Site) -> Mapping[str, nn.Module]:
        B, A = fresh_pair(site, min(self.rank, *site.shape))
        return {"relora": Restarting(B, A, self.alpha / self.rank)}

    def events(self) -> Iterable[Event]:
        return (Event("restart", self.due, restart, moments=self.forget),)

    def due(self, step: int) -> bool:
        """Is this step a multiple of K?"""
        return step > 0 and step % self.every == 0

    def forget(self, state: dict[str, Any], p: Tensor) -> None:
        """Reset the moments at a restart."""
        forget(state, p, self.pruned)

    def rate(self, step: int) -> float:
        """1 until the first restart, as the schedule has its own warm-up; then the jagged one."""
        since = step % self.every
        return 1.0 if step < self.every or since >= self.rewarm else (since + 1) / self.rewarm

    def cost(self, m: int, n: int) -> Cost:
        pair = min(self.rank, m, n) * (m + n)
        return Cost(parameters=pair, flops_per_token=2 * pair)
