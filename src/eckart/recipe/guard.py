"""Stops a training loop that leaves out the data objectives, at its first step.

A data objective sees the batch through `handle.loss`. A loop that does not call it (an unmixed
Trainer, a copied training script) would train on the task's loss alone, without any sign of it. So
an optimizer that holds any of the model's parameters may step only if `handle.loss` was called
since its last step.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from eckart.errors import UsageError

if TYPE_CHECKING:
    from eckart.recipe.handle import Handle

guarded: WeakSet[Handle] = WeakSet()


@cache  # torch's hook is global and stays: removed during a step, it would break that step
def start_watching() -> None:
    """Register a global pre-step hook on all torch optimizers."""
    register_optimizer_step_pre_hook(before_step)


def guard_steps(handle: Handle) -> None:
    """Check the steps of a handle's model until the handle is detached or deleted."""
    start_watching()
    guarded.add(handle)


def before_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise UsageError if the loss of this step did not come from the handle."""
    # A closure computes its loss inside the step: it is seen at the next one.
    if kwargs.get("closure") or any(callable(a) for a in args if a is not optimizer):
        return
    for handle in list(guarded):
        if not holds(optimizer, handle):
            continue
        if not handle.loss_was_asked:
            raise forgotten(handle)
        handle.loss_was_asked = False


def holds(optimizer: Optimizer, handle: Handle) -> bool:
    """Does the optimizer hold parameters of the handle's model?"""
    mine = {id(p) for p in handle.model.parameters()}
    return any(id(p) in mine for group in optimizer.param_groups for p in group["params"])


def forgotten(handle: Handle) -> UsageError:
    """The error for a step whose loss did not come from the handle."""
    names = ", ".join(o.slug for o in handle.data_objectives)
    return UsageError(
        "this loop leaves the objective out",
        [(f"objective = {names}", "handle.loss() was not called before the step")],
        "Use eckart.trainer(Trainer)(handle, ...), or handle.loss(batch, outputs).backward().",
    )
