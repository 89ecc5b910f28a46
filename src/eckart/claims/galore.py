"""GaLore: train a small code model from scratch with Adam on projected gradients.

Source: J. Zhao et al., "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank
Projection", ICML 2024, Table 2 (GaLore near full-rank training, LoRA far behind) and the
argument of section 3 that the leading singular vectors are the directions to keep.

Every arm trains embedding and head; "blocks frozen" trains nothing else. Ranks are fractions of
the width d = 96; LoRA's rank is the one at which its optimizer state is as large as GaLore's.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from eckart.claims import Arm, Claim, Statement, Task, lower, ordered
from eckart.methods import AdamW, Dense, GaLore, LoRA
from eckart.optim import Rule, Subspace
from eckart.optim.project import Found, Search
from eckart.recipe import Recipe

D = 96
EVERY = 50  # steps between decompositions; the paper has 200 in 10,000 steps


@dataclass(frozen=True)
class Drawn(Subspace):
    """A random subspace, redrawn at every refresh."""

    def find(self, search: Search) -> Found:
        ends = zip(("left", "right"), self.ranks(*search.size), search.size, strict=True)
        found = {}
        for name, rank, size in ends:
            if rank:
                Q = torch.stack([orthonormal(size, rank, seed) for seed in search.seeds])
                found[name] = (Q if name == "left" else Q.mT).to(search.G.dtype)
        return found


def orthonormal(size: int, rank: int, seed: int) -> torch.Tensor:
    """Orthonormal columns [size, rank], uniformly distributed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, rank, generator=generator))[0]


@dataclass(frozen=True)
class RandomBasis(GaLore):
    """GaLore with random directions; everything else is the same."""

    def rule(self) -> Rule:
        return replace(super().rule(), projector=Drawn(self.rank, self.side))


def galore(rank: int) -> Recipe:
    return Recipe(Dense(), GaLore(rank=rank, every=EVERY))


CLAIM = Claim(
    says="GaLore trains the blocks nearly as well as Adam does, the better the larger its rank, "
    "and its singular directions are better than random ones",
    task=Task(
        data="stdlib-code",
        pretrained=None,
        shape={
            "hidden_size": D,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 256,
            "tie_word_embeddings": False,
        },
        steps=300,
        floor=0.1,
    ),
    arms=(
        Arm("Adam", Recipe(Dense(), AdamW()), lr=3e-3),
        Arm("blocks frozen", Recipe(Dense(targets=("embedding", "head"))), lr=1e-2),
        Arm("rank d/16", galore(D // 16)),
        Arm("rank d/4", galore(D // 4)),
        Arm("random basis, rank d/16", Recipe(Dense(), RandomBasis(rank=D // 16, every=EVERY))),
        Arm("rank d/8", galore(D // 8), full=True),
        Arm("rank d/2", galore(D // 2), full=True),
        Arm(
            "LoRA, state of rank d/4",
            Recipe(LoRA(rank=18, alpha=36)),
            lr=1e-2,
            also_train=("model.embed_tokens", "model.norm", "lm_head"),
            full=True,
        ),
    ),
    control=lower("Adam", than="blocks frozen", by=0.05),
    statements=(
        lower("rank d/16", than="blocks frozen"),
        lower("rank d/4", than="rank d/16"),
        Statement(
            "rank d/4 has at least 80% of what Adam gains over frozen blocks",
            lambda r: (
                (r["blocks frozen"]["loss"] - r["rank d/4"]["loss"])
                - 0.8 * (r["blocks frozen"]["loss"] - r["Adam"]["loss"])
            ),
        ),
        lower("rank d/16", than="random basis, rank d/16"),
        lower("rank d/4", than="LoRA, state of rank d/4"),
        *ordered(("rank d/16", "rank d/8")),
        *ordered(("rank d/4", "rank d/2")),
    ),
    unseen="perplexity on a level with Adam's at a billion parameters, a 7B model on one card",
)


def beside(
    name: str,
    recipe: Recipe,
    *,
    says: str,
    statements: Sequence[Statement],
    unseen: str,
    others: Sequence[Arm] = (),
) -> Claim:
    """A claim that compares another optimizer with Adam and GaLore on this model and data."""
    return Claim(
        says=says,
        task=CLAIM.task,
        arms=(
            Arm("Adam", Recipe(Dense(), AdamW()), lr=3e-3),
            Arm("blocks frozen", Recipe(Dense(targets=("embedding", "head"))), lr=1e-2),
            Arm("GaLore, rank d/4", galore(D // 4)),
            *others,
            Arm(name, recipe),
        ),
        control=CLAIM.control,
        statements=tuple(statements),
        unseen=unseen,
    )
