"""ALLoRA: fine-tune a small code model on prose for fifty steps.

Source: H. Huang and R. Balestriero, "ALLoRA: Adaptive Learning Rate Mitigates LoRA Fatal
Flaws", arXiv 2410.09692, abstract: short runs do better without dropout and without the
scale, once rows of a zero B are given a larger rate that shrinks as they grow.

SGD and Adam are compared. With SGD the row factors have their full effect; Adam, the usual choice
for adapters, normalises slowly changing factors of B away, so the difference may vanish. The size
of B A after ten steps, and the sensitivity to the scale or to eta, are compared at one learning
rate; everything else at each arm's own.
"""

from dataclasses import dataclass
from typing import Any

from eckart.claims import (
    UNTOUCHED,
    Arm,
    Claim,
    Lab,
    Quantities,
    Results,
    Statement,
    Task,
    Trained,
    higher,
    lower,
)
from eckart.methods import AdamW, ALLoRA, LoRA
from eckart.optim import SGD, Rule
from eckart.recipe import Recipe

SETTINGS = (1.0, 4.0, 16.0)  # values of the scale, and of eta
EARLY, RANK = 10, 4


@dataclass(frozen=True)
class PlainSGD(AdamW):
    """Plain SGD under AdamW's fields, so that nothing but the method scales the gradients."""

    def rule(self) -> Rule:
        return Rule(SGD(), weight_decay=self.weight_decay)


def size(trained: Trained, lab: Lab) -> Quantities:
    """The Frobenius norm over all updates B A."""
    terms = [t for by_name in trained.handle.terms().values() for t in by_name.values()]
    return {"size": sum(float(t.dense().detach().square().sum()) for t in terms) ** 0.5}


def lora(scale: float = 1.0, dropout: float = 0.0) -> LoRA:
    return LoRA(rank=RANK, alpha=RANK * scale, dropout=dropout)


def same_rate(name: str, recipe: Recipe) -> Arm:
    return Arm(name, recipe, lr=3e-3, search=False, watch={EARLY: size})


def spread(kind: str) -> Any:
    """A function of the results: the range of losses over SETTINGS, for arms of this kind."""

    def of(r: Results) -> float:
        losses = [r[f"{kind} {value:g}"]["loss"] for value in SETTINGS]
        return max(losses) - min(losses)

    return of


LORA, ALLORA = spread("scale"), spread("eta")

CLAIM = Claim(
    says="in fifty steps ALLoRA leaves B = 0 faster than LoRA without a scale, ends no worse "
    "than LoRA with a tuned rate, and depends less on eta than LoRA does on its scale",
    task=Task(steps=50),
    arms=(
        UNTOUCHED,
        *(same_rate(f"scale {s:g}", Recipe(lora(s))) for s in SETTINGS),
        *(same_rate(f"eta {eta:g}", Recipe(lora(), ALLoRA(eta=eta))) for eta in SETTINGS),
        Arm("LoRA", Recipe(lora(2.0)), lr=1e-2),
        Arm("ALLoRA", Recipe(lora(), ALLoRA()), lr=1e-2),
        Arm("LoRA, SGD", Recipe(lora(2.0), PlainSGD()), lr=0.3),
        Arm("ALLoRA, SGD", Recipe(lora(), ALLoRA(eta=4.0, inner="sgd")), lr=0.3),
        Arm("LoRA, dropout", Recipe(lora(2.0, dropout=0.05)), lr=1e-2, full=True),
        Arm("factor on the step", Recipe(lora(), ALLoRA(apply="update")), lr=1e-2, full=True),
    ),
    control=lower("LoRA", than="untouched", by=0.1),
    statements=(
        higher("eta 4", than="scale 1", quantity="size", unit=""),
        lower("ALLoRA", than="LoRA"),
        lower("ALLoRA, SGD", than="LoRA, SGD"),
        Statement(
            "losses of ALLoRA with eta of 1 to 16 differ less than of LoRA with such scales",
            lambda r: LORA(r) - ALLORA(r),
        ),
        lower("ALLoRA", than="LoRA, dropout"),
        lower("ALLoRA", than="factor on the step"),
    ),
    unseen="perception tasks and commonsense suites with models of 0.3 to 8 billion parameters, "
    "DoRA as a rival, the comparison of other laws for the factor",
)
