"""DyLoRA: one training whose first b components are an adapter of rank b, for every b.

    y = W x + (alpha / b) B[:, :b] A[:b] x      b drawn anew for each step, one for all layers

After training the adapter is cut to any rank (`use_rank`, or active_rank=) and each cut is a
plain LoRA with that rank and alpha. Take it when several small ranks of one adapter are served.
For one rank train LoRA at that rank (1.59 nats at rank 1 in claims/dylora.py, DyLoRA 1.65). For
larger ranks train LoRA and order its components by singular values (`in_order`), which costs no
training: such a cut is worse at rank 1 (1.70) and no worse from rank 4 on (1.55, DyLoRA 1.56).

A component that is not part of a step does not move in it: no momentum, no decay, and its
bias correction counts its own steps. Each unit of components is therefore a parameter of its
own, A0, B0, A1, B1, ..., whose gradient is dropped before the step: true under every
optimizer, while each process still has the same parameters in its backward pass.

frozen=True trains only the last unit of b and holds the ones before it as well, truly, where
the official code only zeroes gradients and AdamW goes on moving them (0.0096 in one step
at lr 0.01). A component then moves in one step of r, and needs about r times the steps.

Source: M. Valipour et al., "DyLoRA: Parameter-Efficient Tuning of Pretrained Models using
Dynamic Search-Free Low-Rank Adaptation", 2022, Alg. 1.
We differ in two more points: evaluation runs at one fixed rank, and the first step of a run
trains all components, since b is drawn after each step for the next.

m out, n in, r rank, u unit, * any leading dimensions (fused experts).
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn

from eckart.decompose import recompress
from eckart.errors import UsageError
from eckart.linear import Shared, Site, Term
from eckart.linear.factored import Factored, fresh_pair
from eckart.linear.scaling import scale_of
from eckart.linear.spectral import Spectral
from eckart.recipe import Cost, Event, Now, Paper, Weights, every_step
from eckart.recipe.handle import ROOT

Terms = Mapping[str, Mapping[str, Term]]


class Ranks(Shared):
    """Two ranks shared by the whole model: the next training step's, and the active one."""

    drawn: Tensor  # int64 []: components 1..drawn take part in the next step
    active: Tensor  # int64 []: in evaluation, merge and export
    known: tuple[Tensor | None, int, int] = (None, 0, 0)  # `drawn`, its version, its value then

    def __init__(self, largest: int, active: int, device: torch.device | None = None):
        super().__init__()
        self.register_buffer("drawn", torch.tensor(largest, device=device))
        self.register_buffer("active", torch.tensor(active, device=device))
        self.note(largest)

    def note(self, b: int) -> None:
        """Remember that `drawn`, as it stands now, is b."""
        self.known = (self.drawn, self.drawn._version, b)

    def draw(self, b: int) -> None:
        """Let components 1..b take part in the next step."""
        self.drawn.fill_(b)
        self.note(b)

    def in_step(self) -> int:
        """`drawn` on the host, which waits for the device only where another wrote it: a
        checkpoint, or DDP's broadcast."""
        tensor, version, b = self.known
        if tensor is not self.drawn or version != self.drawn._version:
            self.note(b := int(self.drawn))
        return b


class Nested(Spectral):
    """alpha / b times the first b of r components, kept in units: A0 [*, u, n], B0 [*, m, u]."""

    B0: Tensor
    A0: Tensor

    def __init__(self, B: Tensor, A: Tensor, alpha: float, unit: int, scaling: str):
        Factored.__init__(self)
        self.alpha, self.unit, self.scaling = alpha, unit, scaling
        self.ordered = False  # by singular values: then cuts keep the scale of rank r
        for i, (b, a) in enumerate(zip(B.split(unit, -1), A.split(unit, -2), strict=True)):
            self.register_parameter(f"B{i}", nn.Parameter(b.contiguous()))
            self.register_parameter(f"A{i}", nn.Parameter(a.contiguous()))

    def bind(self, shared: Mapping[str, nn.Module], home: nn.Module, param: str) -> None:
        self.__dict__["ranks"] = shared["dylora"]

    @property
    def ranks(self) -> Ranks:
        """The ranks shared by all terms of the model."""
        return self.__dict__["ranks"]

    def units(self) -> Iterator[tuple[int, nn.Parameter, nn.Parameter]]:
        """(first component, B_i [*, m, u], A_i [*, u, n]) of each unit."""
        for i in range(len(self._parameters) // 2):
            yield i * self.unit, getattr(self, f"B{i}"), getattr(self, f"A{i}")

    def frames(self) -> tuple[Tensor, Tensor]:
        """All of B [*, m, r] and A [*, r, n]."""
        units = list(self.units())
        return torch.cat([B for _, B, _ in units], -1), torch.cat([A for _, _, A in units], -2)

    def width(self) -> int:
        """r, the number of components."""
        return sum(A.shape[-2] for _, _, A in self.units())

    def gates(self) -> Tensor:
        """The scale for components 1..b and 0 for the others, [*, r], without a host sync."""
        r, first = self.width(), self.B0
        b = (self.ranks.drawn if self.training else self.ranks.active).clamp(max=r)
        here = torch.arange(r, device=b.device) < b
        counted = torch.full_like(b, r) if self.ordered else b
        root = counted.to(first.dtype)
        scale = self.alpha / (root.sqrt() if self.scaling == "rslora" else root)
        return (here * scale).expand(*first.shape[:-2], r)

    def factors(self) -> tuple[Tensor, Tensor]:
        """The factors at exactly the active rank, as merged and exported."""
        (B, A), r = self.frames(), self.width()
        b = min(int(self.ranks.active), r)
        scale = scale_of(self.alpha, r if self.ordered else b, self.scaling)
        return scale * B[..., :b], A[..., :b, :]

    def drop_gradients(self, b: int, frozen: bool) -> None:
        """Drop the gradients of components that are not trained in this step."""
        b = min(b, self.width())
        for start, B, A in self.units():
            last = start < b <= start + A.shape[-2]
            if not (last if frozen else start < b):
                B.grad = A.grad = None

    @torch.no_grad()
    def in_order(self) -> None:
        """Rewrite the components as singular triples, largest first; B A does not change.

        Truncated at b it is then the best rank-b approximation (Eckart and Young 1936). It keeps
        the scale of rank r, at which all components were trained.
        """
        B, A = self.frames()
        B, A, _ = recompress(B, A, self.width())
        for start, b, a in self.units():
            stop = start + a.shape[-2]
            b.copy_(B[..., start:stop])
            a.copy_(A[..., start:stop, :])
        self.ordered = True

    def extra_repr(self) -> str:
        return f"rank up to {self.width()} in units of {self.unit}"


def nested(terms: Terms) -> list[Nested]:
    """The terms of this method."""
    found = [term for by_name in terms.values() for term in by_name.values()]
    return [term for term in found if isinstance(term, Nested)]


def use_rank(terms: Terms, b: int) -> None:
    """Evaluate, merge and export at rank b from now on: `use_rank(handle.terms(), 4)`.

    Narrower maps are used at their own rank. Raises UsageError outside 1..r.
    """
    found = nested(terms)
    largest = max((term.width() for term in found), default=0)
    if not 1 <= b <= largest:
        raise UsageError("dylora: there is no such rank", [(str(b), f"ranks are 1..{largest}")])
    found[0].ranks.active.fill_(b)


def in_order(terms: Terms) -> None:
    """Order the components of all terms by singular values: `in_order(handle.terms())`."""
    for term in nested(terms):
        term.in_order()


@dataclass(frozen=True)
class DyLoRA(Weights):
    """Trains nested adapters, one for each rank; the base stays as it is."""

    rank: Annotated[int, Ge(1)] = 16
    """r, the largest rank. Official script: 8."""

    alpha: Annotated[float, Gt(0)] = 32.0
    """Numerator of the scale; rank b is trained and used at alpha / b. Official script: 16."""

    scaling: Literal["lora", "rslora"] = "lora"
    """alpha / b (lora) or alpha / sqrt(b) (rslora)."""

    unit: Annotated[int, Ge(1)] = 1
    """u, components that come and go together: ranks are u, 2 u, ..., r. Larger means fewer
    and larger parameters, and r itself is plain LoRA."""

    draw: Literal["uniform", "geometric"] = "uniform"
    """How b is drawn: all ranks alike, or small ones more often."""

    p: Annotated[float, Gt(0), Le(1)] = 0.25
    """Of the geometric draw: P(k-th rank) is proportional to (1 - p)^(k - 1)."""

    frozen: bool = False
    """Train the last unit of b alone. Official script: True."""

    active_rank: Annotated[int, Ge(0)] = 0
    """The rank in evaluation, merge and export; 0: the largest."""

    base: ClassVar = "frozen"
    offers: ClassVar = ()
    mission: ClassVar = True
    default_lr: ClassVar = 1e-3
    paper: ClassVar = Paper(
        "DyLoRA: Parameter-Efficient Tuning of Pretrained Models using Dynamic Search-Free "
        "Low-Rank Adaptation",
        "https://arxiv.org/abs/2210.07558",
        "EACL 2023",
    )
    promises: ClassVar = ("starts_at_base", "restores_base", "merges", "exports_low_rank")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.active_rank > self.largest:
            raise UsageError(
                "dylora: active_rank is larger than rank",
                [(f"active_rank = {self.active_rank}", f"rank = {self.largest}")],
                f"Type weights.active_rank={self.largest}, or less.",
            )

    @property
    def largest(self) -> int:
        """The largest rank of all sites; narrower ones cap b at their own."""
        return max([self.rank, *(o.get("rank", 0) for o in self.overrides)])

    def build(self, sites: list[Site]) -> dict[str, dict[str, nn.Module]]:
        ranks = Ranks(self.largest, self.active_rank or self.largest, sites[0].raw.device)
        terms = {site.path: self.at(site).build_one(site) for site in sites}
        return {ROOT: {"dylora": ranks}, **terms}

    def build_one(self, site: Site) -> dict[str, nn.Module]:
        B, A = fresh_pair(site, min(self.rank, *site.shape))
        return {"dylora": Nested(B, A, self.alpha, self.unit, self.scaling)}

    def probabilities(self) -> dict[int, float]:
        """P(b) for every rank that may be drawn."""
        ranks = [*range(self.unit, self.largest, self.unit), self.largest]
        stay = 1 - self.p if self.draw == "geometric" else 1.0
        weights = [stay**k for k in range(len(ranks))]
        return {b: w / math.fsum(weights) for b, w in zip(ranks, weights, strict=True)}

    def events(self) -> Iterable[Event]:
        return (
            Event("components at rest", every_step, self.rest_of_step, when="before"),
            Event("rank of the next step", every_step, self.draw_rank, when="after"),
        )

    def rest_of_step(self, now: Now) -> None:
        """Drop the gradients of components that are not trained in this step."""
        terms = nested(now.terms)
        b = terms[0].ranks.in_step()
        for term in terms:
            term.drop_gradients(b, self.frozen)

    def draw_rank(self, now: Now) -> None:
        """Draw b for the next step: one for the whole model, the same on every process."""
        ranks, weights = zip(*self.probabilities().items(), strict=True)
        k = torch.multinomial(
            torch.tensor(weights, dtype=torch.float64), 1, generator=now.generator
        )
        nested(now.terms)[0].ranks.draw(ranks[int(k)])

    def cost(self, m: int, n: int) -> Cost:
        r = min(self.rank, m, n)
        return Cost(parameters=r * (m + n), shared=2, flops_per_token=2 * r * (m + n))
