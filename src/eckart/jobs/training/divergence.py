"""Where numbers went wrong: the first module whose output, or the last whose gradient, is bad."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def first_bad_module(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[str, str] | None:
    """(path, what) of the first thing that is not finite in a forward pass of the batch.

    A weight is named where one is bad already, since what follows is only its echo.
    """
    for name, parameter in model.named_parameters():
        if not finite(parameter):
            return name, "weight"
    found: list[str] = []

    def watch(path: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if not found and any(not finite(t) for t in tensors_in(output)):
                found.append(path)

        return hook

    # Modules that compute: with tensors of their own (terms may be children), or innermost.
    named = [(p, m) for p, m in model.named_modules() if p]
    working = [(p, m) for p, m in named if m._parameters or not any(m.children())]
    handles = [module.register_forward_hook(watch(path)) for path, module in working]
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return (found[0], "activation") if found else None


def first_bad_gradient(model: nn.Module) -> tuple[str, str] | None:
    """(path, what) of the bad gradient that the backward pass met first.

    Parameters are listed in the order of the forward pass, so the last one is the first.
    """
    bad = [n for n, p in model.named_parameters() if p.grad is not None and not finite(p.grad)]
    return (bad[-1].rpartition(".")[0], "gradient") if bad else None


def finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def tensors_in(output: Any) -> list[Tensor]:
    """The tensors of a module's output: one, or those of a tuple or mapping."""
    if isinstance(output, Tensor):
        return [output]
    parts = output.values() if isinstance(output, Mapping) else output
    return (
        [t for t in parts if isinstance(t, Tensor)] if isinstance(output, tuple | Mapping) else []
    )
