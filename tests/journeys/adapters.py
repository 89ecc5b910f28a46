"""Adapters on disk without a training: attached, moved by chance, written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from eckart.io.export import export
from eckart.io.models import load_model, load_tokenizer
from eckart.recipe import Handle, Recipe, attach, registry
from tests.tiny import train_by_chance


def handle_on(base: Path, slug: str, **fields: Any) -> Handle:
    """A method's terms on a base, every trained tensor moved from its start."""
    handle = attach(load_model(base), Recipe(weights=registry.load(slug)(**fields)))
    train_by_chance(handle)
    return handle


def adapter(folder: Path, base: Path, slug: str, form: str = "native", **fields: Any) -> Path:
    """The same, written."""
    export(handle_on(base, slug, **fields), folder, form, tokenizer=load_tokenizer(base))
    return folder
