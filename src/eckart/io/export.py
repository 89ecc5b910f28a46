"""Writing and reading every format: `eckart.export` and `eckart.load`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from eckart.errors import FileError, UsageError, did_you_mean
from eckart.io import dense, factored, kohya, native, peft
from eckart.io.models import Source, load_model, missing, recognise, result_of
from eckart.io.opening import ADAPTERS
from eckart.recipe import Handle
from eckart.recipe.adapters import DEFAULT, adapters_of
from eckart.recipe.handle import handle_of

WRITERS: dict[str, Callable[..., None]] = {
    "peft": peft.save,
    "dense": dense.save,
    "factored": factored.save,
    "native": native.save,
    "kohya": kohya.save,
}


def export(
    handle: Handle,
    folder: str | Path,
    format: str = "peft",
    tokenizer: PreTrainedTokenizerBase | None = None,
    overwrite: bool = False,
    **options: Any,
) -> None:
    """Write a trained model; the live handle stays attached.

    peft      an adapter that PEFT, vLLM and others load (`uniform=True`: one rank, no scale)
    dense     an ordinary transformers model, terms merged (`dtype=torch.float32`)
    factored  a transformers model with its terms apart; loads with `import eckart.hf`
    native    an adapter that eckart.load reads, exact for every method
    kohya     one file of thin pairs in the names that webui and ComfyUI take

    Raises UsageError for a format that this method cannot have, naming those it can.
    """
    if format not in WRITERS:
        raise UsageError(
            f"unknown format {format}", [("format", format)], did_you_mean(format, list(WRITERS))
        )
    reason = reasons(handle)[format]
    if reason:
        raise UsageError(
            f"this cannot be written as {format}",
            [(handle.weights.slug, reason)],
            f"Possible: {', '.join(possible(handle))}.",
        )
    WRITERS[format](handle, folder, overwrite=overwrite, tokenizer=tokenizer, **options)


def reasons(handle: Handle) -> dict[str, str | None]:
    """For each format, why a handle cannot be written in it; None if it can."""
    return {
        "peft": peft.obstacle(handle),
        "dense": dense.obstacle(handle),
        "factored": factored.obstacle(handle),
        "native": None,
        "kohya": kohya.obstacle(handle),
    }


def possible(handle: Handle) -> list[str]:
    """The formats that a handle can be written in."""
    return [name for name, reason in reasons(handle).items() if reason is None]


def load(
    folder: str | Path, model: nn.Module | None = None, name: str = DEFAULT, **options: Any
) -> Handle:
    """Load what `export` (or PEFT) wrote; returns the handle of the model.

    An adapter is attached to `model`, in place, or to the base that it names (`options` are passed
    on to its loading: dtype, task, device). Several adapters can be attached to one model under
    different names: `handle.use(NAME)` activates one, `handle.rows([...])` one per row. A factored
    folder is a whole model. Raises UsageError for an ordinary model, which transformers loads.
    """
    if isinstance(folder, nn.Module):
        raise UsageError("the folder comes first", fix="Type eckart.load(FOLDER, model).")
    source = recognise(folder)
    if source.kind == "run":
        return load(result_of(source.path), model, name, **options)
    if source.kind in ADAPTERS:
        base = model if model is not None else load_model(base_of(source), **options)
        return ADAPTERS[source.kind](base, source.path, name)
    if source.kind == "hub":
        raise missing(Path(source.path))
    if source.kind != "factored":
        raise UsageError(
            "this carries nothing of eckart",
            [(str(folder), f"a {source.kind}")],
            "Load it with transformers, and attach a recipe with eckart.attach.",
        )
    if model is not None:
        raise UsageError(
            "this is a whole model, not an adapter", [(str(folder), "")], "Leave model= out."
        )
    handle = handle_of(load_model(source.path, **options))
    if handle is None:
        raise FileError("the model came without its terms", [(str(folder), "")])
    return handle


def swap(handle: Handle, folder: str | Path) -> None:
    """Replace an adapter's values by another one's from a folder, in place; nothing is recompiled.

    Raises UsageError if the other has different maps, ranks or scales; nothing is changed then.
    """
    before = adapters_of(handle.model)
    weights, rows = dict(before.weights), before.rows
    other = load(folder, handle.model, name=f"{handle.name} (other)")
    try:
        ours, theirs = handle.structure()["sites"], other.structure()["sites"]
        for path in sorted(ours.keys() | theirs.keys()):
            if ours.get(path) != theirs.get(path):
                raise UsageError(
                    "this adapter has another structure",
                    [(str(folder), path)],
                    f"Load it beside: eckart.load({str(folder)!r}, model, name=NAME).",
                )
        handle.load_named_state(other.named_state())
    finally:
        other.remove()
        before.choose(weights, rows)


def base_of(source: Source) -> str:
    """The base that an adapter names. UsageError if it names none."""
    if not source.base:
        raise UsageError(
            "the adapter does not say which base it is for",
            [(source.path, "")],
            "Type eckart.load(FOLDER, model=BASE).",
        )
    return source.base
