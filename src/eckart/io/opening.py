"""Opens what a user names as MODEL: a model, an adapter with its base, or a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from eckart.errors import FileError
from eckart.io import kohya, native, peft
from eckart.io.headers import read_json
from eckart.io.heads import CONFIG, naming_of
from eckart.io.models import Source, load_model, recognise, result_of
from eckart.io.tasks import task_of
from eckart.recipe import Handle

ADAPTERS: dict[str, Callable[..., Handle]] = {
    "native": native.load,
    "peft": peft.load,
    "kohya": kohya.load,
}


@dataclass(frozen=True)
class Opened:
    """A model in memory, and the handle of its adapter (None for a plain model)."""

    model: Any
    handle: Handle | None
    base: str  # what an adapter trained on it would name as its base


def open_model(
    source: str | Path, dtype: torch.dtype | None = None, task: str | None = None, seed: int = 0
) -> Opened:
    """Load a model, or an adapter onto its base; a run means its `final/`.

    An adapter with its own configuration replaces the base's head. Raises FileError for what cannot
    be opened, with the file, and for an adapter whose base does not exist.
    """
    found = recognise(source)
    if found.kind == "run":
        return open_model(result_of(found.path), dtype, task, seed)
    if found.kind not in ADAPTERS:
        model = load_model(source, dtype, task, seed)
        return Opened(model, None, str(source))
    if not found.base:
        raise FileError("the adapter names no base", [(found.path, "")])
    return on_base(found, found.base, dtype, task, seed)


def on_base(
    adapter: Source,
    base: str,
    dtype: torch.dtype | None = None,
    task: str | None = None,
    seed: int = 0,
) -> Opened:
    """Load an adapter onto this base, whatever base it names."""
    own, head = Path(adapter.path) / CONFIG, {}
    if own.is_file():
        facts = read_json(own)
        task, head = task or task_of(facts), naming_of(facts)
    model = load_model(base, dtype, task, seed, **head)
    return Opened(model, ADAPTERS[adapter.kind](model, adapter.path), base)
