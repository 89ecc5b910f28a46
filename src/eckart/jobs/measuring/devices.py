"""The device of a model, and moving batches to it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def model_device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def on_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch with its tensors moved to `device`; other values are kept."""
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
