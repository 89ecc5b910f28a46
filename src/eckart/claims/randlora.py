"""RandLoRA: fine-tune a small code model on prose by scaling fixed random bases.

Source: P. Albert et al., "RandLoRA: Full-rank parameter-efficient fine-tuning of large
models", ICLR 2025, abstract: what holds LoRA back is its rank, not its number of trained
parameters, and an update of full rank closes part of the gap to full fine-tuning.

In the small model RandLoRA trains 16,128 parameters, and LoRA of rank 3 trains 15,360. To show
that rank is the cause, both also learn a target of known rank: an error E of an 80 x 80 map, from
inputs and outputs, with 480 parameters each. Where all singular values of E are equal, rank 3 can
remove 3 / 80 of it and 480 free directions 480 / 6400; where E has rank 3, LoRA can remove it
all. RandLoRA must win on the first and lose on the second.
"""

from functools import cache

import torch
from torch import Tensor, nn

from eckart.claims import (
    END,
    UNTOUCHED,
    Arm,
    Claim,
    Lab,
    Quantities,
    Splits,
    Task,
    Trained,
    higher,
    lower,
)
from eckart.decompose.spectra import stable_rank
from eckart.methods import Dense, LoRA, RandLoRA
from eckart.recipe import Recipe

SIDE, RANK = 80, 3
TINY = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 8}


# --- a map that is off by E ----------------------------------------------------------------


@cache
def error(flat: bool) -> Tensor:
    """E [80, 80] of squared norm 80: eighty equal singular values, or three."""
    g = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(SIDE, SIDE, generator=g))[0] for _ in range(2))
    count = SIDE if flat else RANK
    return (SIDE / count) ** 0.5 * U[:, :count] @ V[:, :count].mT


def splits(flat: bool) -> Splits:
    """Inputs x [4096, 80] and targets E x, split into train, validation and test."""
    x = torch.randn(4096, SIDE, generator=torch.Generator().manual_seed(1))
    parts = {"x": x, "missing": x @ error(flat).mT}
    cut = [
        {k: t[a:b] for k, t in parts.items()} for a, b in ((0, 3584), (3584, 3840), (3840, 4096))
    ]
    return Splits(*cut)


def flat_error() -> Splits:
    return splits(flat=True)


def low_rank_error() -> Splits:
    return splits(flat=False)


class Map(nn.Module):
    """A linear map W x that should become (W + E) x; the loss is the missing share of |E x|^2."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(SIDE, SIDE, bias=False)
        with torch.no_grad():
            self.map.weight.copy_(torch.eye(SIDE))

    def forward(self, x: Tensor, missing: Tensor) -> dict[str, Tensor]:
        rest = self.map(x) - x - missing
        return {"loss": rest.square().mean() / missing.square().mean()}


def on_map(lab: Lab, recipe: Recipe) -> Quantities:
    return lab.train(Map(), recipe).quantities


def lora_on_map(lab: Lab) -> Quantities:
    return on_map(lab, Recipe(LoRA(rank=RANK, alpha=2 * RANK, targets=("map",))))


def randlora_on_map(lab: Lab) -> Quantities:
    return on_map(lab, Recipe(RandLoRA(rank=16, scale=1.0, targets=("map",))))


FLAT = Task(data=flat_error, pretrained=None, shape=TINY, steps=800, batch_size=64)
LOW = Task(data=low_rank_error, pretrained=None, shape=TINY, steps=800, batch_size=64)


# --- the small model -----------------------------------------------------------------------


@torch.no_grad()
def stable_ranks(trained: Trained, lab: Lab) -> Quantities:
    """The mean stable rank of the learned updates."""
    changes = [
        sum(term.dense() for term in by_name.values() if hasattr(term, "dense"))
        for by_name in trained.handle.terms().values()
    ]
    ranks = [float(stable_rank(torch.linalg.svdvals(change))) for change in changes]
    return {"stable rank": sum(ranks) / len(ranks)}


CLAIM = Claim(
    says="with as many trained numbers, an update of full rank is better than LoRA's, because "
    "its rank is full: it wins where the target's spectrum is flat and loses where it is low",
    arms=(
        UNTOUCHED,
        Arm("LoRA", Recipe(LoRA(rank=3, alpha=6)), lr=1e-2, watch={END: stable_ranks}),
        Arm("RandLoRA", Recipe(RandLoRA(rank=16)), lr=3e-3, watch={END: stable_ranks}),
        Arm("RandLoRA, an A for each basis", Recipe(RandLoRA(rank=16, shared_a=False)), lr=3e-3),
        Arm("LoRA, flat target", run=lora_on_map, lr=1e-2, task=FLAT),
        Arm("RandLoRA, flat target", run=randlora_on_map, lr=1e-2, task=FLAT),
        Arm("LoRA, target of rank 3", run=lora_on_map, lr=1e-2, task=LOW),
        Arm("RandLoRA, target of rank 3", run=randlora_on_map, lr=1e-2, task=LOW),
        Arm("full", Recipe(Dense(targets=("linear",))), lr=3e-3, full=True),
    ),
    control=lower("LoRA", than="untouched", by=0.1),
    statements=(
        lower("RandLoRA", than="LoRA"),
        lower("RandLoRA, an A for each basis", than="LoRA"),
        higher("RandLoRA", than="LoRA", quantity="stable rank", unit=""),
        lower("RandLoRA, flat target", than="LoRA, flat target", unit=""),
        lower("LoRA, target of rank 3", than="RandLoRA, target of rank 3", unit=""),
    ),
    unseen="CLIP and DinoV2, commonsense at 8 billion parameters, where the gap to full "
    "fine-tuning closes",
)
