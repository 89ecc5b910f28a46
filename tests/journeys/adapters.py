"""Adapters on disk without a training: attached, moved by chance, written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from eckart.io.export import export
from eckart.io.models import load_model, load_tokenizer
from eckart.recipe import Handle, registry
from tests.tiny import attached


def handle_on(base: Path, slug: str, **fields: Any) -> Handle:
    """A method's terms on a base, every trained tensor moved from its start."""
    return attached(load_model(base), registry.load(slug)(**fields))


def adapter(folder: Path, base: Path, slug: str, form: str = "native", **fields: Any) -> Path:
    """The same, written."""
    export(handle_on(base, slug, **fields), folder, form, tokenizer=load_tokenizer(base))
    return folder
