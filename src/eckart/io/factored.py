"""A factored model: a transformers folder that keeps its terms apart; `import eckart.hf` loads it.

The live model's locked configuration (recipe/lock.py) writes the structure; the tensors stand
under their raw names. Where a dense matrix was dropped, a tensor without elements stands under
one such name: a loader that ignores the configuration fails on its size, instead of filling
the layers with random numbers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eckart.errors import UsageError
from eckart.io.folder import write_folder
from eckart.io.presets import quiet
from eckart.linear.sites import quantised
from eckart.recipe import Handle
from eckart.recipe.lock import MODEL_TYPE


def save(
    handle: Handle,
    folder: str | Path,
    overwrite: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_shard_size: str = "50GB",
) -> None:
    """Write the model with its terms. Raises UsageError if it has none."""
    reason = obstacle(handle)
    if reason:
        raise UsageError("there is no factored model to write", [(handle.weights.slug, reason)])
    model: Any = handle.model
    state = {**model.state_dict(), **size_lock(handle)}
    with write_folder(folder, overwrite) as beside, quiet():
        model.save_pretrained(beside, state_dict=state, max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(beside)


def obstacle(handle: Handle) -> str | None:
    """Why a handle cannot be written as a factored model; None if it can."""
    if not isinstance(handle.model, PreTrainedModel):
        return "the model is not one of transformers"
    if not handle.attached:
        return "no terms are attached: this is an ordinary model"
    if handle.suffix or any(other.attached for other in handle.others()):
        return f"{handle.name} is one of several adapters: write it as an adapter, or merge it"
    config = getattr(handle.model.config, "quantization_config", None)
    foreign = config is not None and getattr(config, "quant_method", None) != MODEL_TYPE
    if foreign or any(quantised(p) for p in handle.model.parameters()):
        return "the base is quantised: its tensors are not written beside ours"
    return None


def size_lock(handle: Handle) -> dict[str, Tensor]:
    """An empty tensor in place of one dropped matrix; nothing if all are kept."""
    model: Any = handle.model
    for path in handle.attached:
        site = handle.sites[path]
        if site.kind != "experts" and site.module._parameters.get(site.param) is None:
            return {f"{site.module_path}.{site.param}": torch.empty(0, dtype=model.dtype)}
    return {}
