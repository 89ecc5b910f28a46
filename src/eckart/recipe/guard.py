"""A loop that leaves the data objectives out is stopped at its first step.

An objective that sees the batch enters through `handle.loss`. A foreign loop (an unmixed
Trainer, a copied training script) would never call it, train on the task's loss alone and
look healthy. So an optimizer that holds any of the model's parameters is not let step
unless `handle.loss` was asked since its last step.
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
    """Look at every step of every torch optimizer from now on."""
    register_optimizer_step_pre_hook(before_step)


def guard_steps(handle: Handle) -> None:
    """Hold a handle's model to its objectives until the handle is detached or gone."""
    start_watching()
    guarded.add(handle)


def before_step(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise UsageError where the loss of this step did not pass through its handle."""
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
    """Does the optimizer move parameters of the handle's model?"""
    mine = {id(p) for p in handle.model.parameters()}
    return any(id(p) in mine for group in optimizer.param_groups for p in group["params"])


def forgotten(handle: Handle) -> UsageError:
    """The error for a step whose loss did not pass through the handle."""
    names = ", ".join(o.slug for o in handle.data_objectives)
    return UsageError(
        "this loop leaves the objective out",
        [(f"objective = {names}", "handle.loss() was not called before the step")],
        "Use eckart.trainer(Trainer)(handle, ...), or handle.loss(batch, outputs).backward().",
    )
