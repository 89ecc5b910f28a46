"""Where a model is, and its inputs with it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def model_device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def on_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """A batch with its tensors moved; what is no tensor stays."""
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
