"""Embeddings in PEFT's files: resized, trained whole, or trained for some tokens only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eckart.errors import FileError
from eckart.io.headers import unfit
from eckart.io.peft_layout import meant, saved_whole
from eckart.recipe.vocabulary import ends, rows_of, tied_ends

ROWS = "token_adapter.trainable_tokens_delta"  # the rows themselves, although PEFT says delta
BELOW = "token_adapter.base_layer.weight"  # the embedding, which is saved where it was resized


def take_vocabulary(
    model: nn.Module, config: dict[str, Any], tensors: dict[str, Tensor], folder: Path
) -> tuple[dict[str, Any], dict[str, Tensor], int | None]:
    """Config and tensors with whole embeddings, and how many rows these have: None, if unchanged.

    PEFT writes such an embedding under `modules_to_save`, beside its own wrappings, or without
    a word in the config, and a tied head once more.
    """
    tensors = {k: t for k, t in tensors.items() if ".original_module." not in k}
    config, tensors = with_token_rows(model, config, tensors, folder)
    for path in ends(model):
        wrapped = [k for k in tensors if k.startswith(f"{path}.modules_to_save.")]
        for key in wrapped:
            tensors[f"{path}.weight"] = tensors.pop(key)
    held = [path for path in ends(model) if f"{path}.weight" in tensors]
    before = rows_of(model)
    rows = len(tensors[f"{held[0]}.weight"]) if held else before
    named = any(meant(config.get("modules_to_save"), path) for path in held)
    if rows == before and not named:
        return config, tensors, None
    if tied_ends(model) and len(held) == 2:
        embedding, head = (tensors[f"{path}.weight"] for path in held)
        if not torch.equal(embedding, head):
            raise FileError(
                "this adapter does not act alike on both ends of a tied pair",
                [(str(folder), held[0]), ("tied with", held[1])],
                "Train it with ensure_weight_tying=True, or untie the model.",
            )
        del tensors[f"{held.pop()}.weight"]
    saved = saved_whole(model, config)
    if tied_ends(model):
        saved = [path for path in saved if path != ends(model)[1]]
    config = {**config, "modules_to_save": list(dict.fromkeys((*saved, *held)))}
    return config, tensors, rows if held[:1] == list(ends(model)[:1]) else None


def with_token_rows(
    model: nn.Module, config: dict[str, Any], tensors: dict[str, Tensor], folder: Path
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and tensors with whole embeddings, of which PEFT trained the rows of some tokens.

    The adapter computes the same, but holds all rows: a run that goes on from it trains them all.
    """
    asked = config.get("trainable_token_indices")
    if not asked:
        return config, tensors
    tensors, saved = dict(tensors), config.get("modules_to_save") or []
    for path in ends(model):
        values = tensors.pop(f"{path}.{ROWS}", None)
        below = tensors.pop(f"{path}.{BELOW}", None)
        if values is None:
            continue
        own = model.get_parameter(f"{path}.weight").detach().cpu() if below is None else below
        rows = tokens_of(asked, path)
        if not rows and tied_ends(model):  # PEFT names the embedding, and writes both
            rows = tokens_of(asked, ends(model)[0])
        last = max(rows, default=-1)
        if len(rows) != len(values) or own.shape[1:] != values.shape[1:] or last >= len(own):
            shape = f"shape {list(values.shape)} for {len(rows)} tokens up to {last}"
            raise unfit(folder, [(f"{path}.{ROWS}", shape), (path, f"{len(own)} tokens")])
        place = torch.tensor(rows)
        tensors[f"{path}.weight"] = own.index_copy(0, place, values.to(own.dtype))
        saved = [*saved, path]
    if saved == (config.get("modules_to_save") or []):
        raise unfit(folder, [(ROWS, "is missing")])
    return {**config, "trainable_token_indices": None, "modules_to_save": saved}, tensors


def tokens_of(asked: Sequence[int] | dict[str, list[int]], path: str) -> list[int]:
    """The tokens whose rows an embedding has in the file."""
    if not isinstance(asked, dict):
        return list(asked)
    return next((rows for name, rows in asked.items() if meant([name], path)), [])
