"""A unified study of LoRA's variants: the learning rate matters far more than the variant.

Source: "A Unified Study of LoRA Variants: Taxonomy, Review, Codebase, and Empirical
Evaluation", 2026 (arXiv 2601.22708), abstract: variants are far more sensitive to the
learning rate than to other hyper-parameters, and with proper ones LoRA matches or beats most
of them. `eckart bench` is that study's protocol for one's own model and data.

A variant matters here if it is better than tuned LoRA by more than 0.02 nats, about a twentieth of
the gain of fine-tuning.
"""

from typing import Any

from eckart.claims import UNTOUCHED, Arm, Claim, Results, Statement, lower, matches
from eckart.methods import DoRA, LoRA
from eckart.recipe import Recipe

RANK, LR, MATTERS = 8, 1e-2, 0.02


def lora(rank: int = RANK, alpha: float = 16, **fields: Any) -> Recipe:
    return Recipe(LoRA(rank=rank, alpha=alpha, **fields))


def fixed(name: str, recipe: Recipe, lr: float = LR) -> Arm:
    """An arm with a fixed learning rate."""
    return Arm(name, recipe, lr=lr, search=False)


def span(*arms: str) -> Statement:
    """The range of losses over learning rates is at least three times that over the arms."""

    def excess(r: Results) -> float:
        rates = [r[name]["loss"] for name in ("lr / 10", "as it is", "lr x 10")]
        others = [r[name]["loss"] for name in ("as it is", *arms)]
        return (max(rates) - min(rates)) - 3 * (max(others) - min(others))

    text = f"two decades of learning rate move the loss three times as far as {' and '.join(arms)}"
    return Statement(text, excess)


CLAIM = Claim(
    says="the learning rate moves LoRA's loss far more than rank and scale do, and once it is "
    "tuned no variant is better than plain LoRA by an amount that matters",
    arms=(
        UNTOUCHED,
        Arm("plain", lora(), lr=LR),
        Arm("DoRA, tuned", Recipe(DoRA(rank=RANK, alpha=16)), lr=LR),
        Arm("ratio 16 of B's rate to A's, tuned", lora(lr_ratio=16.0), lr=3e-3),
        Arm("principal start, tuned", lora(init="pissa"), lr=3e-3),
        Arm("stable scaling, tuned", lora(scaling="rslora"), lr=3e-3, full=True),
        Arm("QR start, tuned", lora(init="olora"), lr=3e-3, full=True),
        fixed("as it is", lora()),
        fixed("lr / 10", lora(), LR / 10),
        fixed("lr x 10", lora(), LR * 10),
        fixed("rank 4", lora(4, 8)),
        fixed("rank 16", lora(16, 32)),
        fixed("alpha 8", lora(alpha=8)),
        fixed("alpha 32", lora(alpha=32)),
    ),
    control=lower("plain", than="untouched", by=0.1),
    statements=(
        span("rank 4", "rank 16"),
        span("alpha 8", "alpha 32"),
        matches("plain", of="DoRA, tuned", within=MATTERS),
        matches("plain", of="ratio 16 of B's rate to A's, tuned", within=MATTERS),
        matches("plain", of="principal start, tuned", within=MATTERS),
        matches("plain", of="stable scaling, tuned", within=MATTERS),
        matches("plain", of="QR start, tuned", within=MATTERS),
    ),
    unseen="models of billions of parameters, batch size, mixtures of experts, other tasks",
)
