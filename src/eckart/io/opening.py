"""Open whatever a person names as MODEL: a model, an adapter with its base, or a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from eckart.errors import FileError
from eckart.io import kohya, native, peft
from eckart.io.models import load_model, recognise, result_of
from eckart.recipe import Handle

ADAPTERS: dict[str, Callable[..., Handle]] = {
    "native": native.load,
    "peft": peft.load,
    "kohya": kohya.load,
}


@dataclass(frozen=True)
class Opened:
    """A live model, and the handle of the adapter it carries (None for a model of its own)."""

    model: Any
    handle: Handle | None
    base: str  # what an adapter trained on it would name as its base


def open_model(
    source: str | Path, dtype: torch.dtype | None = None, task: str | None = None, seed: int = 0
) -> Opened:
    """Load a model, or an adapter onto its base; a run stands for its `final/`.

    Raises FileError for what cannot be opened, naming the file, and for an adapter whose
    base is not where it says.
    """
    found = recognise(source)
    if found.kind == "run":
        return open_model(result_of(found.path), dtype, task, seed)
    if found.kind not in ADAPTERS:
        model = load_model(source, dtype, task, seed)
        return Opened(model, None, str(source))
    if not found.base:
        raise FileError("the adapter names no base", [(found.path, "")])
    model = load_model(found.base, dtype, task, seed)
    return Opened(model, ADAPTERS[found.kind](model, found.path), found.base)
