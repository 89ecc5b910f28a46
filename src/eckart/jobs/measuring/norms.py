"""Batch norms while a model is taught: they keep the statistics that they came with.

Else a pass that only measures would change the model, a row could not be seen alone, a step
would depend on how its rows are split, and an adapter's base would drift from the model that
the adapter names. Scale and shift of the norms are trained where the recipe trains them.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def hold_statistics(model: nn.Module) -> None:
    """Let every batch norm use its own statistics, in training as well."""
    for module in model.modules():
        if isinstance(module, _BatchNorm) and evaluated not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(evaluated)


def evaluated(norm: nn.Module, _: Any) -> None:
    """Before its forward pass: as in evaluation, whatever the model is in."""
    norm.training = False
