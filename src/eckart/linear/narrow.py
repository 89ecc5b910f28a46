"""Removing rows or columns of linear layers, and scattering slices back to full size."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


@torch.no_grad()
def narrow(layer: nn.Linear, rows: Tensor | None = None, columns: Tensor | None = None) -> None:
    """Keep only these outputs and inputs (int64 indices, in order), in place; the bias too."""
    weight: Tensor = layer.weight.detach()
    bias: Tensor | None = layer.bias
    if rows is not None:
        weight = weight.index_select(0, rows)
        bias = None if bias is None else bias.detach().index_select(0, rows)
    if columns is not None:
        weight = weight.index_select(1, columns)
    replace(layer, weight.contiguous(), bias)


def replace(layer: nn.Linear, weight: Tensor, bias: Tensor | None) -> None:
    """Replace a layer's parameters; `requires_grad` stays as it was."""
    layer.weight = nn.Parameter(weight, requires_grad=layer.weight.requires_grad)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach(), requires_grad=layer.bias.requires_grad)
    layer.out_features, layer.in_features = weight.shape


def take_shapes(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Resize linear maps to the shapes of saved tensors, which can then be loaded.

    Unknown names and equal shapes are left alone. New parameters have no values.
    """
    for path, layer in model.named_modules():
        saved = tensors.get(f"{path}.weight")
        if not isinstance(layer, nn.Linear) or saved is None or saved.shape == layer.weight.shape:
            continue
        m = saved.shape[0]
        bias = None if layer.bias is None else layer.bias.new_empty(m)
        replace(layer, layer.weight.new_empty(saved.shape), bias)


def spread(thin: Tensor, kept: Tensor, size: int, axis: int) -> Tensor:
    """Scatter slices to the indices they were kept from, zeros elsewhere: `size` along `axis`."""
    shape = list(thin.shape)
    shape[axis] = size
    return thin.new_zeros(shape).index_copy(axis, kept.to(thin.device), thin)


def units(kept: Tensor, width: int) -> Tensor:
    """Indices of all entries of units of this width: kept [k] -> int64 [k width], in order."""
    inside = torch.arange(width, device=kept.device)
    return (kept.long()[:, None] * width + inside).flatten()
