"""Finds the module where a NaN or infinity arose, in the forward or the backward pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def first_bad_module(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[str, str] | None:
    """(path, what) of the first non-finite tensor in a forward pass of the batch.

    A non-finite weight is named before any output, since it is the cause of those.
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
    """(path, what) of the non-finite gradient that the backward pass computed first.

    Parameters are in the order of the forward pass, so it is the last one in the list.
    """
    bad = [n for n, p in model.named_parameters() if p.grad is not None and not finite(p.grad)]
    return (bad[-1].rpartition(".")[0], "gradient") if bad else None


def finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def tensors_in(output: Any) -> list[Tensor]:
    """The tensors in a module's output: a tensor, tuple or mapping."""
    if isinstance(output, Tensor):
        return [output]
    parts = output.values() if isinstance(output, Mapping) else output
    return (
        [t for t in parts if isinstance(t, Tensor)] if isinstance(output, tuple | Mapping) else []
    )
