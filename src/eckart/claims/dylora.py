"""DyLoRA: fine-tune a small code model on prose once, for all ranks up to eight.

Source: M. Valipour et al., "DyLoRA: Parameter-Efficient Tuning of Pretrained Models using
Dynamic Search-Free Low-Rank Adaptation", 2022, abstract: one training replaces a search over
ranks without much loss, and holds over a much larger range of ranks than LoRA does.

The paper truncates an ordinary LoRA to its first components. A fairer baseline sorts them by
singular value first, which is exact and needs no training: "singular order", measured on the same
run. "Without much loss" means: at most 0.02 nats above a LoRA trained at that rank, about a
twentieth of the gain of fine-tuning. With --full everything trains three times as long, since
DyLoRA's last components are trained rarely.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from eckart.claims import UNTOUCHED, Arm, Claim, Lab, Quantities, Statement, Task, Trained, lower
from eckart.decompose import recompress
from eckart.linear import LowRank
from eckart.methods import DyLoRA, LoRA
from eckart.methods.weights.dylora import use_rank
from eckart.recipe import Recipe

MARGIN = 0.02
LARGEST, ALPHA = 8, 16.0
RANKS = (1, 2, 4, 8)

Pairs = Mapping[LowRank, tuple[Tensor, Tensor]]


def nest(lab: Lab, frozen: bool) -> dict[str, float]:
    """Train DyLoRA and evaluate it at all ranks; `validation` is their mean."""
    recipe = Recipe(DyLoRA(rank=LARGEST, alpha=ALPHA, frozen=frozen))
    trained = lab.train(lab.model(), recipe)
    found, validation = dict(trained.quantities), 0.0
    for b in RANKS:
        use_rank(trained.handle.terms(), b)
        at_b = lab.evaluate(trained.model)
        found[f"loss, rank {b}"] = at_b["loss"]
        validation += at_b["validation"] / len(RANKS)
    return {**found, "validation": validation}


def nested(lab: Lab) -> Quantities:
    return nest(lab, frozen=False)


def nested_frozen(lab: Lab) -> Quantities:
    return nest(lab, frozen=True)


@torch.no_grad()
def cut(lab: Lab) -> Quantities:
    """Train one LoRA and truncate it to all ranks, by first components and by singular values."""
    with torch.enable_grad():
        trained = lab.train(lab.model(), Recipe(LoRA(rank=LARGEST, alpha=ALPHA)))
    whole = {term: (term.B.clone(), term.A.clone()) for term in low_rank_terms(trained)}
    ordered = {term: recompress(B, A, LARGEST)[:2] for term, (B, A) in whole.items()}
    found = dict(trained.quantities)
    for b in RANKS:
        found[f"first components, rank {b}"] = loss_of(lab, trained, whole, b)
        found[f"singular order, rank {b}"] = loss_of(lab, trained, ordered, b)
    return found


def low_rank_terms(trained: Trained) -> list[LowRank]:
    found = [term for by_name in trained.handle.terms().values() for term in by_name.values()]
    return [term for term in found if isinstance(term, LowRank)]


def loss_of(lab: Lab, trained: Trained, pairs: Pairs, b: int) -> float:
    """Test loss with the first b components of B [m, r] and A [r, n]; the scale is unchanged."""
    for term, (B, A) in pairs.items():
        term.B.copy_(B)
        term.B[:, b:] = 0
        term.A.copy_(A)
    return lab.evaluate(trained.model)["loss"]


def better_than(kind: str, b: int) -> Statement:
    return Statement(
        f"at rank {b} DyLoRA is better than LoRA's {kind}",
        lambda r: r["LoRA, cut"][f"{kind}, rank {b}"] - r["DyLoRA"][f"loss, rank {b}"],
    )


def as_good_as(arm: str, b: int) -> Statement:
    return Statement(
        f"at rank {b} DyLoRA is at most {MARGIN:g} above LoRA trained at that rank",
        lambda r: MARGIN - (r["DyLoRA"][f"loss, rank {b}"] - r[arm]["loss"]),
    )


def lora(rank: int) -> Recipe:
    return Recipe(LoRA(rank=rank, alpha=2 * rank))


CLAIM = Claim(
    says="one run of DyLoRA gives an adapter of every rank up to 8 that is as good as LoRA "
    "trained at that rank and better than a cut of LoRA, in singular order too",
    full=Task(steps=600),
    arms=(
        UNTOUCHED,
        Arm("LoRA, cut", run=cut, lr=1e-2),
        Arm("DyLoRA", run=nested, lr=1e-2),
        Arm("LoRA, rank 1", lora(1), lr=1e-2),
        Arm("LoRA, rank 2", lora(2), lr=1e-2),
        Arm("LoRA, rank 4", lora(4), lr=1e-2, full=True),
        Arm("DyLoRA, last component alone", run=nested_frozen, lr=1e-2, full=True),
    ),
    control=lower("LoRA, cut", than="untouched", by=0.1),
    statements=(
        *(better_than("first components", b) for b in (1, 2, 4)),
        *(better_than("singular order", b) for b in (1, 2, 4)),
        as_good_as("LoRA, rank 1", 1),
        as_good_as("LoRA, rank 2", 2),
        as_good_as("LoRA, rank 4", 4),
        as_good_as("LoRA, cut", 8),
    ),
    unseen="a point on GLUE, generation with GPT-2, hours saved by not searching",
)
