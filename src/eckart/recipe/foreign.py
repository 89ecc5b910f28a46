"""The update rules for a model without a handle: a PEFT model, or plain weights.

    model = peft.get_peft_model(base, LoraConfig(...))
    optimizer = eckart.optimizer_for(model, eckart.LoRAPro(), lr=1e-4)

Which parameters are trained is what `requires_grad` says. Their names, the factor pairs with
the scale of each, and the matrices that a projected rule is about are found here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from eckart.errors import UsageError
from eckart.linear import Structured
from eckart.optim import LowRankOptimizer
from eckart.recipe.groups import arranged, matrices_of
from eckart.recipe.method import Update
from eckart.recipe.recipe import misplaced
from eckart.recipe.targets import sites_of

PEFT_LAYER = "peft.tuners.lora.layer.LoraLayer"
USUAL_LR = 1e-3  # of adapters, where the update has no rate of its own
Pair = tuple[str, str, float]


def optimizer_for(
    model: nn.Module,
    update: Update,
    lr: float | None = None,
    *,
    clip: float | None = None,
    seed: int = 0,
) -> LowRankOptimizer:
    """An optimizer with this update rule over what the model trains.

    A rule for factor pairs moves the pairs of PEFT's LoRA layers; biases, norms, DoRA's
    magnitudes and whatever else is trained follow AdamW, as `update.plain()` says. A rule for
    matrices moves those that `update.targets` names. `clip` bounds the norm of the gradients
    as applied, so switch the trainer's own clipping off.

    Raises UsageError where nothing is trained, where a rule for pairs finds none, and for
    what only `eckart.attach` can do.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(
            "an optimizer is made for a model, whose modules say what is a matrix or a pair",
            [("model", f"is of type {type(model).__name__}")],
            "Give the model itself in place of its parameters.",
        )
    if not isinstance(update, Update):
        raise misplaced("update", update)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    refuse(model, update, trained)
    pairs = list(peft_pairs(model))
    if update.wants == "matrices" and pairs and update.targets == Update.targets:
        raise UsageError(
            f"{update.slug} changes whole matrices, and the model trains factor pairs",
            [(type(model).__name__, f"{len(pairs)} pairs of PEFT")],
            "Give the base without PEFT, or take a rule for pairs such as eckart.LoRAPro().",
        )
    if update.wants == "pairs" and not pairs:
        raise UsageError(
            f"{update.slug} moves factor pairs, and the model trains none",
            [(type(model).__name__, f"{len(trained)} trained tensors, no LoRA layer of PEFT")],
            "Add LoRA with peft.get_peft_model, or use eckart.attach.",
        )
    special = {
        "pairs": {name for pair in pairs for name in pair[:2]},
        "matrices": matrices_of(model, update) if update.wants == "matrices" else set(),
        "any": set(trained),
    }[update.wants]
    leading = {f"{s.module_path}.{s.param}": len(s.leading) for s in sites_of(model)}
    rate = lr if lr is not None else (update.usual_lr() or USUAL_LR)
    groups = arranged(trained, update, special, leading, pairs, rate)
    return LowRankOptimizer(groups, lr=rate, clip=clip, seed=seed)


def refuse(model: nn.Module, update: Update, trained: Mapping[str, Tensor]) -> None:
    """Raise UsageError for an update that needs more than an optimizer."""
    if not trained:
        raise UsageError(
            "nothing is trained", [(type(model).__name__, "all parameters are frozen")]
        )
    carried = next((n for n, m in model.named_modules() if isinstance(m, Structured)), None)
    if carried is not None:
        raise UsageError(
            "this model carries terms of eckart",
            [(carried, "was attached to")],
            "Take handle.optimizer(): it knows of events and penalties, too.",
        )
    if update.branch_gradient() is not None:
        raise UsageError(
            f"{update.slug} changes the backward pass, which no optimizer can",
            [(f"update = {update.slug}", "needs layers of eckart")],
            "Use eckart.attach, or an update that acts on the step alone (apply=update).",
        )
    if list(update.events()):
        raise UsageError(
            f"{update.slug} schedules events, which need a handle",
            [(f"update = {update.slug}", "has no place to run them")],
            "Use eckart.attach.",
        )


def peft_pairs(model: nn.Module) -> Iterator[Pair]:
    """(name of B, name of A, scale) for each trained pair of PEFT's LoRA layers.

    Linear layers and embeddings, of every adapter that is trained. Left out are pairs whose
    product is no B A: convolutions, and the stacked factors of fused experts.
    """
    names = {p: name for name, p in model.named_parameters() if p.requires_grad}
    layers: list[Any] = [module for module in model.modules() if is_peft_layer(module)]
    for layer in layers:
        for adapter, scale in layer.scaling.items():
            B, A = factors_of(layer, adapter)
            if B not in names or A not in names or not B.ndim == A.ndim == 2:
                continue
            if B.shape[1] == A.shape[0] == layer.r[adapter]:
                yield names[B], names[A], float(scale)


def is_peft_layer(module: nn.Module) -> bool:
    """Is it one of PEFT's LoRA layers? Recognised by name, so PEFT need not be installed."""
    return any(f"{c.__module__}.{c.__qualname__}" == PEFT_LAYER for c in type(module).__mro__)


def factors_of(module: Any, adapter: str) -> tuple[Any, Any]:
    """B [m, r] and A [r, n] of one adapter of a layer; None if it has none."""
    if adapter in module.lora_A:
        return module.lora_B[adapter].weight, module.lora_A[adapter].weight
    if adapter in module.lora_embedding_A:
        return module.lora_embedding_B[adapter], module.lora_embedding_A[adapter]
    return None, None
