"""LoRAM: train an adapter on a pruned code model and use it on the full model.

Source: J. Zhang et al., "Train Small, Infer Large: Memory-Efficient LoRA Training for Large
Language Models", ICLR 2025, abstract: LoRA trained on a pruned and aligned model, recovered and
used on the full model, is better than the large model without fine-tuning and than LoRA on a
smaller model; alignment and recovery are both needed.

Half of the channels and heads of every layer are pruned by magnitude. Aligned means: the pruned
model is trained for 100 steps on its pretraining corpus, once, as a publisher would. Each run is
evaluated in three ways: on the full model with zeros for pruned entries, on the full model with
random numbers for them, and on the pruned model itself. "A smaller model" has the pruned sizes
and was pretrained for as many steps as the large one.
"""

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from eckart.claims import SMALL, UNTOUCHED, Arm, Claim, Lab, Quantities, Statement, Task, lower
from eckart.methods import Dense, LoRA, LoRAM
from eckart.recipe import Recipe

ALIGN_STEPS, ALIGN_LR = 100, 5e-4
LARGE = {**SMALL, "intermediate_size": 512, "num_hidden_layers": 4}
SMALLER = {
    **LARGE,
    "intermediate_size": 256,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
LORA = Recipe(LoRA(rank=8, alpha=16))


def method(ratio: float, **fields: Any) -> LoRAM:
    return LoRAM(rank=8, alpha=16, channels=ratio, heads=ratio, spared=0.0, **fields)


BASES: dict[tuple[float, int, int], tuple[nn.Module, Mapping[str, Tensor]]] = {}


def base(lab: Lab, ratio: float, align: int) -> tuple[nn.Module, Mapping[str, Tensor]]:
    """A fresh pruned model and the indices it keeps, trained for `align` steps except the head.

    Cached per process and always from seed 0, so that all runs share it.
    """
    code = lab.on("stdlib-code")
    code.seed = 0
    key = ratio, align, code.task.pretraining_steps
    if key not in BASES:
        model = lab.model()
        kept = method(ratio).prune(model)
        if align:
            layers = Recipe(Dense(targets=("linear", "embedding")))
            model = code.train(model, layers, lr=ALIGN_LR, steps=align).handle.remove()
        BASES[key] = model, kept
    return copy.deepcopy(BASES[key][0]), BASES[key][1]


def recovered(lab: Lab, ratio: float, align: int) -> Quantities:
    """Train LoRA on the pruned model; `loss` is the full model's with the recovered adapter."""
    small, kept = base(lab, ratio, min(align, lab.task.steps))
    trained = lab.train(small, Recipe(method(ratio)))
    learnt = {name: tensor.detach() for name, tensor in trained.handle.named_state().items()}
    found = dict(trained.quantities)
    found["loss, small"] = found["loss"]
    random = method(ratio, fill="normal").recover(lab.model(), learnt, kept)
    found["loss, random fill"] = lab.evaluate(random.model)["loss"]
    zero = method(ratio).recover(lab.model(), learnt, kept)
    return {**found, **lab.evaluate(zero.model)}


def plain(lab: Lab) -> Quantities:
    return recovered(lab, 0.5, 0)


def aligned(lab: Lab) -> Quantities:
    return recovered(lab, 0.5, ALIGN_STEPS)


def aligned_30(lab: Lab) -> Quantities:
    return recovered(lab, 0.3, ALIGN_STEPS)


def aligned_75(lab: Lab) -> Quantities:
    return recovered(lab, 0.75, ALIGN_STEPS)


def within(text: str, quantity: str) -> Statement:
    """The recovered adapter has a lower loss than another evaluation of the same run."""
    return Statement(
        f"loss of aligned is lower than {text}",
        lambda r: r["aligned"][quantity] - r["aligned"]["loss"],
    )


CLAIM = Claim(
    says="an adapter learnt on the pruned and aligned model makes the whole one better than it "
    "was, than a smaller model with LoRA, and than the pruned model itself",
    task=Task(shape=LARGE),
    arms=(
        UNTOUCHED,
        Arm("LoRA", LORA, lr=1e-2),
        Arm("pruned", run=plain, lr=3e-3),
        Arm("aligned", run=aligned, lr=3e-3),
        Arm("a smaller model", LORA, lr=1e-2, task=Task(shape=SMALLER)),
        Arm("aligned, 30% pruned", run=aligned_30, lr=3e-3, full=True),
        Arm("aligned, 75% pruned", run=aligned_75, lr=3e-3, full=True),
    ),
    control=lower("LoRA", than="untouched", by=0.1),
    statements=(
        lower("aligned", than="untouched"),
        lower("aligned", than="pruned"),
        lower("aligned", than="a smaller model"),
        within("of the small model that it was learnt on", "loss, small"),
        within("with random numbers where something was pruned", "loss, random fill"),
        lower("LoRA", than="aligned"),
        lower("aligned, 30% pruned", than="untouched"),
    ),
    unseen="the redundancy of models of 13 to 70 billion parameters, which is the premise; "
    "4 bits, other prunings, tasks downstream",
)
