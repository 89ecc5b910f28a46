"""Merged models: ordinary transformers folders without anything of eckart's.

The terms are merged matrix by matrix in fp64 and rounded once; the live model is unchanged.
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from eckart.errors import UsageError
from eckart.io.folder import write_folder
from eckart.io.presets import quiet
from eckart.linear import fold
from eckart.linear.sites import quantised
from eckart.recipe import Handle
from eckart.recipe.adapters import alone
from eckart.recipe.lock import STRUCTURE, unlock_config

LOSS_WORTH_SAYING = 0.05  # of the update, lost to rounding


def save(
    handle: Handle,
    folder: str | Path,
    overwrite: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write the merged model; `dtype` None keeps the base's.

    Warns with the measured loss if a half-precision dtype rounds away a part of the update (17 % of
    an update a hundredth as large as the weights, in bf16). Raises UsageError if the terms are not
    linear maps.
    """
    reason = obstacle(handle)
    if reason:
        raise UsageError("this cannot be merged", [(handle.weights.slug, reason)])
    model: Any = handle.model
    dtype = dtype or model.dtype
    with torch.no_grad(), alone(handle):
        state, loss = merged_state(handle, dtype)
    if loss > LOSS_WORTH_SAYING:
        name = str(dtype).removeprefix("torch.")
        warnings.warn(
            f"rounding to {name} loses {100 * loss:.0f} % of the update: write it with "
            "dtype=torch.float32, or keep the adapter (format='peft' or 'native')",
            stacklevel=2,
        )
    with write_folder(folder, overwrite) as beside, quiet():
        bare(model, dtype).save_pretrained(beside, state_dict=state)
        if tokenizer is not None:
            tokenizer.save_pretrained(beside)


def obstacle(handle: Handle) -> str | None:
    """Why a handle cannot be merged into an ordinary model; None if it can."""
    if not isinstance(handle.model, PreTrainedModel):
        return "the model is not one of transformers: handle.merge() folds it in place"
    for path, terms in handle.terms().items():
        for name, term in terms.items():
            if not term.linear:
                return f"{path}.{name} is not a linear map"
        weight = handle.sites[path].module._parameters.get(handle.sites[path].param)
        if weight is not None and (quantised(weight) or not weight.is_floating_point()):
            return f"{path} is quantised: write the adapter, and merge it on the base as it was"
    return None if handle.weights.promised("merges") else "it does not promise to merge"


def merged_state(handle: Handle, dtype: torch.dtype) -> tuple[dict[str, Tensor], float]:
    """The state dict of the ordinary model, and the share of the update lost to rounding."""
    stems = tuple(f"{stem}." for h in (handle, *handle.others()) for stem in h.carried())
    state = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in handle.model.state_dict().items()
        if not name.startswith(stems)
    }
    update = lost = 0.0  # squared norms
    for path in handle.attached:
        site = handle.sites[path]
        exact = fold(site, torch.float64)
        rounded = exact.to(dtype)
        for name in (f"{site.module_path}.{site.param}", *(f"{t}.weight" for t in site.ties)):
            state[name] = rounded
        base = handle.originals.get(path, site.module._parameters.get(site.param))
        if base is not None:
            update += float((exact - base.double()).square().sum())
            lost += float((exact - rounded.double()).square().sum())
    return state, (lost / update) ** 0.5 if update else 0.0


def bare(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The same architecture without weights or terms, which writes the folder's other files."""
    config = copy.deepcopy(model.config)
    if STRUCTURE in config.__dict__:
        unlock_config(config)
    with torch.device("meta"):
        skeleton: PreTrainedModel = type(model)._from_config(config, dtype=dtype)
    generation = getattr(model, "generation_config", None)
    if isinstance(generation, GenerationConfig):
        skeleton.generation_config = copy.deepcopy(generation)
    return skeleton
