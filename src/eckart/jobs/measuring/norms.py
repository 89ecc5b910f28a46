"""Keeps batch norms in evaluation mode during training, with the statistics they were loaded with.

Otherwise a forward pass for measuring would change the model, an output would depend on the other
rows of its batch, and an adapter's base would drift from the model that the adapter names. Scale
and shift are trained where the recipe trains them.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def hold_statistics(model: nn.Module) -> None:
    """Make every batch norm use its running statistics, in training mode too."""
    for module in model.modules():
        if isinstance(module, _BatchNorm) and evaluated not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(evaluated)


def evaluated(norm: nn.Module, _: Any) -> None:
    """A forward pre-hook that puts the batch norm into evaluation mode."""
    norm.training = False
