"""CoDyRA: gated LoRA for a stream of tasks; weak components are dropped, strong ones merged.

    y = W x + sum_past w b a x + B diag(w) A x      B [m, r], w [r], A [r, n] trained

    per step of the sparse half:   w <- shrink(w, kappa)           components with w = 0 are out
    after each task:               S = {i: w_i != 0} joins the past; B = 0, A and w drawn anew

Take it to fine-tune one model on task after task without replay: the fewer components a task
keeps, the less it overwrites, and each matrix finds its own rank. After four texts in a row the
mean loss is 2.57 nats in claims/codyra.py, with a fixed rank of 16 2.73, of 1 2.82. Merged, it
costs nothing at inference. Take LoRA for a single task. As published, a component survives mostly
by its random first w; report an "adaptive rank" beside random pruning to the same ranks.

    importance  gate        kappa on |w|: as published
                normalised  kappa on |w_i| |b_i| |a_i|, the size of the component's own update;
                            |w| alone bounds nothing, since w b a = (w / c) (c b) a
                spectral    kappa on the singular values of B diag(w) A, at level changes: the
                            proximal step of the nuclear norm, whatever the basis

Source: H. Lu et al., "Adaptive Rank, Reduced Forgetting: Knowledge Retention in Continual
Learning Vision-Language Models with Dynamic Rank-Selective LoRA", 2024, eq. 5 to 7.
We differ in four points, of which fields undo the first three. The soft threshold is
the paper's; the code's (shrink=official) also zeroes what it has just brought below kappa. The
threshold reaches its last level whatever the number of steps (schedule=even). Gates start at
1 and not at N(0, 1) (gates=normal), and are weighed by their components. W is not
overwritten: the past is a frozen low-rank sum of its own, so the base can be had back bit by
bit and all tasks exported as one LoRA. The published setting is importance=gate,
shrink=official, schedule=official, gates=normal, with AdamW's second beta at 0.9999.

m out, n in, r rank, R rank of the past, T steps of a task, * any leading dimensions (experts).
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Le
from torch import Tensor, nn

from eckart.decompose import product_svd, recompress
from eckart.errors import UsageError
from eckart.linear import Site, seeded_generator
from eckart.linear.factored import fresh_pair
from eckart.linear.spectral import Spectral
from eckart.recipe import Cost, Event, Handle, Now, Paper, Stage, Weights, Work, every_step
from eckart.recipe.coverage import cover
from eckart.recipe.lock import lock

# --- thresholds ----------------------------------------------------------------------------


def soft(w: Tensor, kappa: Tensor | float) -> Tensor:
    """sign(w) max(|w| - kappa, 0): argmin_v (v - w)^2 / 2 + kappa |v|. Continuous."""
    return w.sign() * (w.abs() - kappa).clamp_min(0)


def official(w: Tensor, kappa: Tensor | float) -> Tensor:
    """The official code's shrinkage: also zeroes what soft leaves below kappa (2 kappa in all)."""
    left = soft(w, kappa)
    return torch.where(left.abs() < kappa, 0.0, left)


SHRINKS = {"soft": soft, "official": official}


@dataclass(frozen=True)
class Thresholds:
    """kappa after each step 0..T-1 of a task: zero at first, then increasing in levels."""

    steps: int
    dense: float
    levels: int
    largest: float
    schedule: str

    def level(self, step: int) -> int:
        """0 in the dense part; levels - 1 at most."""
        T, K = self.steps, self.levels
        if self.schedule == "even":
            first = math.ceil(self.dense * T)
            found = 0 if step < first else K * (step - first + 1) // (T - first)
        else:  # one level up at the start of every step that q divides
            first = math.ceil(self.dense * T)
            q = int((T - self.dense * T) / K)
            found = 0 if q == 0 or step < first else step // q - (first - 1) // q
        return min(K - 1, found)

    def kappa(self, step: int) -> float:
        """The threshold after this step; the official code starts one step later."""
        if self.schedule == "official" and step <= self.dense * self.steps:
            return 0.0
        return self.largest * self.level(step) / max(1, self.levels - 1)

    def gathered(self, step: int) -> float:
        """The sum of thresholds since the level last changed, at steps where it changes; else 0."""
        if not self.changes(step):
            return 0.0
        total, i = self.kappa(step), step - 1
        while i >= 0 and not self.changes(i):
            total, i = total + self.kappa(i), i - 1
        return total

    def changes(self, step: int) -> bool:
        """Does the level change at the next step? True at the last one."""
        return step == self.steps - 1 or self.level(step + 1) != self.level(step)


def shrunk_product(B: Tensor, w: Tensor, A: Tensor, kappa: float) -> tuple[Tensor, Tensor, Tensor]:
    """U, (s - kappa)_+, V^T of B diag(w) A: singular value thresholding by thin factors.

    B [*, m, r], w [*, r], A [*, r, n].
    """
    U, s, Vt = product_svd(B * w.unsqueeze(-2), A)
    return U, (s - kappa).clamp_min(0), Vt


# --- the term ------------------------------------------------------------------------------


class Gated(Spectral):
    """B diag(s) A for the current task, and the frozen sum of the tasks before it."""

    B_past: Tensor  # [*, m, R]
    A_past: Tensor  # [*, R, n]
    task: int

    def __init__(self, B: Tensor, s: Tensor, A: Tensor):
        super().__init__(B, s, A)
        self.register_buffer("B_past", B.new_zeros(*B.shape[:-1], 0))
        self.register_buffer("A_past", A.new_zeros(*A.shape[:-2], 0, A.shape[-1]))
        self.task = 0  # tasks that are in the past

    def frames(self) -> tuple[Tensor, Tensor]:
        if self.B_past.shape[-1] == 0:
            return self.B, self.A
        return torch.cat([self.B, self.B_past], -1), torch.cat([self.A, self.A_past], -2)

    def gates(self) -> Tensor:
        ones = self.s.new_ones(*self.s.shape[:-1], self.B_past.shape[-1])
        return torch.cat([self.s, ones], -1)

    def live(self) -> Tensor:
        """Which components are nonzero, in any expert: bool [r]."""
        here = (self.s != 0) & (self.B != 0).any(-2) & (self.A != 0).any(-1)
        return here.reshape(-1, here.shape[-1]).any(0)

    def factors(self) -> tuple[Tensor, Tensor]:
        """The past components and the live ones of the current task: rank R + |S|."""
        keep = self.live()
        B = self.B[..., keep] * self.s[..., None, keep]
        return torch.cat([B, self.B_past], -1), torch.cat([self.A[..., keep, :], self.A_past], -2)

    @torch.no_grad()
    def shrink(self, kappa: float, how: str, importance: str) -> None:
        """One proximal step on the gates."""
        if importance == "spectral":
            for tensor, new in zip(
                (self.B, self.s, self.A), shrunk_product(self.B, self.s, self.A, kappa), strict=True
            ):
                tensor.copy_(new)
            return
        limit: Tensor | float = kappa
        if importance == "normalised":  # 0 / 0: a component without factors goes out
            limit = kappa / (self.B.norm(dim=-2) * self.A.norm(dim=-1))
        self.s.copy_(SHRINKS[how](self.s, limit))

    @torch.no_grad()
    def begin_task(self, B: Tensor, s: Tensor, A: Tensor) -> None:
        """Move live components into the past, at most of full rank, and reinitialise the others."""
        past_B, past_A = self.factors()
        most = min(past_B.shape[-2], past_A.shape[-1])
        if past_B.shape[-1] > most:  # more columns than a matrix has directions: the same sum
            past_B, past_A, _ = recompress(past_B, past_A, most)
        self.B_past, self.A_past = past_B.clone(), past_A.clone()
        for tensor, new in ((self.B, B), (self.s, s), (self.A, A)):
            tensor.copy_(new)
        self.task += 1


@dataclass(frozen=True)
class CoDyRA(Weights):
    """Trains gated components, task by task; the base stays as it is."""

    rank: Annotated[int, Ge(1)] = 16
    """r, components that each task starts with. Paper: 16."""

    importance: Literal["normalised", "gate", "spectral"] = "normalised"
    """What the threshold is held against; paper: gate."""

    shrink: Literal["soft", "official"] = "soft"
    """The paper's soft threshold or its code's. Spectral is always soft."""

    gates: Literal["ones", "normal"] = "ones"
    """w at the start of a task: 1, or N(0, 1) as in the official code."""

    threshold: Annotated[float, Ge(0)] = 5e-3
    """kappa of the last level, per step. Paper: 5e-3; its sum over a task is what counts."""

    levels: Annotated[int, Ge(1)] = 50
    """Levels between 0 and the last threshold."""

    dense: Annotated[float, Ge(0), Le(1)] = 0.5
    """Share of a task's steps before the first threshold. Paper: 0.5."""

    schedule: Literal["even", "official"] = "even"
    """even: reaches the last level in any number of steps; official: none in a short task."""

    base: ClassVar = "frozen"
    offers: ClassVar = ()
    mission: ClassVar = True
    default_lr: ClassVar = 1e-3
    paper: ClassVar = Paper(
        "Adaptive Rank, Reduced Forgetting: Knowledge Retention in Continual Learning "
        "Vision-Language Models with Dynamic Rank-Selective LoRA",
        "https://arxiv.org/abs/2412.01004",
    )
    promises: ClassVar = ("starts_at_base", "restores_base", "merges", "exports_low_rank")
    stages: ClassVar = (
        Stage("learn", "train", repeat="tasks"),
        Stage("keep", "operate", repeat="tasks"),
    )

    def build_one(self, site: Site) -> Mapping[str, nn.Module]:
        return {"codyra": Gated(*self.fresh(site, site.generator))}

    def fresh(self, site: Site, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """B, w, A at the start of a task: their product is 0."""
        r = min(self.rank, *site.shape)
        B, A = fresh_pair(site, r, generator)
        w = torch.ones(*site.leading, r)
        return B, w.normal_(generator=generator) if self.gates == "normal" else w, A

    def events(self) -> Iterable[Event]:
        # Spectral rewrites B and A, so the optimizer's moments no longer fit them.
        moments: Literal["keep", "reset"] = "reset" if self.importance == "spectral" else "keep"
        return (Event("shrink the gates", every_step, self.sparsify, moments=moments),)

    def sparsify(self, now: Now) -> bool:
        """Apply the threshold of the step just done; False if there was none."""
        if now.steps is None:
            raise UsageError(
                "codyra needs the number of steps",
                [("attach(...)", "steps= is missing")],
                "Pass attach(..., steps=).",
            )
        plan = self.thresholds(now.steps)
        step = now.step - 1
        kappa = plan.gathered(step) if self.importance == "spectral" else plan.kappa(step)
        if kappa == 0:
            return False
        for by_name in now.terms.values():
            for term in by_name.values():
                if isinstance(term, Gated):
                    term.shrink(kappa, self.shrink, self.importance)
        return True

    def thresholds(self, steps: int) -> Thresholds:
        """The schedule of thresholds for one task."""
        return Thresholds(steps, self.dense, self.levels, self.threshold, self.schedule)

    def operate(self, work: Work) -> Work:
        """After each task, including the last: move live components into the past."""
        assert work.handle is not None
        ranks = ranks_of(work.handle)
        next_task(work.handle)
        return dataclasses.replace(work, output=ranks)

    def ratios(self, name: str, tensor: Tensor) -> dict[str, float]:
        """No weight decay on gates: it would shrink them a second time."""
        return {"weight_decay": 0.0} if name.endswith(".s") else {}

    def cost(self, m: int, n: int) -> Cost:
        """The cost in the first task; each past component adds m + n frozen numbers."""
        r = min(self.rank, m, n)
        return Cost(parameters=r * (m + n + 1), flops_per_token=2 * r * (m + n) + r)


def gated(handle: Handle) -> dict[str, Gated]:
    """The terms of this method by site."""
    found = {path: by_name.get("codyra") for path, by_name in handle.terms().items()}
    return {path: term for path, term in found.items() if isinstance(term, Gated)}


def ranks_of(handle: Handle) -> dict[str, Tensor]:
    """|S|, the number of live components of the current task, by site."""
    return {path: term.live().sum() for path, term in gated(handle).items()}


def next_task(handle: Handle, steps: int | None = None) -> None:
    """Move live components into the past and start a task; create a new optimizer afterwards.

    Shapes of frozen tensors grow, so no wrapper (DDP, FSDP) may hold the model. `steps` is the next
    task's horizon; a trainer that knows it may set it later.
    """
    method = handle.weights
    assert isinstance(method, CoDyRA)
    for path, term in gated(handle).items():
        site = handle.sites[path]
        generator = seeded_generator(site.seed, path, "task", term.task + 1)
        term.begin_task(*method.at(site).fresh(site, generator))
    handle.events.step, handle.steps = 0, steps
    handle.coverage = cover(handle)
    lock(handle.model, handle.structure())
