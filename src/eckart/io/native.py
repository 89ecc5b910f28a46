"""Adapters in eckart's own format: everything that differs from the base, for every method.

eckart.json         what it is: format, base and its fingerprint, method, fields, structure
model.safetensors   the tensors, under their raw names in the model
"""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers
from torch import nn
from transformers import PreTrainedTokenizerBase

import eckart
from eckart.errors import FileError
from eckart.io.folder import write_folder, write_json
from eckart.io.headers import format_errors, read_json
from eckart.io.heads import save_naming
from eckart.io.packed import packed, unpacked
from eckart.io.tensors import read_tensors, write_tensors
from eckart.recipe import Handle, attach_from
from eckart.recipe.adapters import DEFAULT, require_free
from eckart.recipe.fingerprint import origin, require_base
from eckart.recipe.installing import roll_back
from eckart.recipe.vocabulary import held_whole, resized

FORMAT = 1
DESCRIPTION, TENSORS = "eckart.json", "model.safetensors"


def save(
    handle: Handle,
    folder: str | Path,
    overwrite: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Write what differs from the base; deterministic for the same state.

    Raises UsageError if the folder is not empty and `overwrite` is False.
    """
    with write_folder(folder, overwrite) as beside:
        write_json(beside / DESCRIPTION, describe(handle))
        write_tensors(beside / TENSORS, packed(handle, handle.named_state()))
        save_naming(handle, beside, "none, since this is an adapter: type eckart.load(FOLDER)")
        if tokenizer is not None:
            tokenizer.save_pretrained(beside)


def describe(handle: Handle) -> dict[str, Any]:
    """The content of eckart.json."""
    structure = handle.structure()
    return {
        "format": FORMAT,
        "base": origin(handle.model),
        "fingerprint": structure.pop("fingerprint"),
        "method": structure.pop("method"),
        "fields": structure.pop("fields"),
        "structure": structure,
        "versions": {
            "eckart": eckart.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "safetensors": safetensors.__version__,
            "python": platform.python_version(),
        },
    }


def load(model: nn.Module, folder: str | Path, name: str = DEFAULT) -> Handle:
    """Attach a saved adapter to its base, in place, under a name.

    Raises FileError if the base is another one, if tensors are missing, unexpected or misshapen, or
    if a file is damaged; the model is then unchanged.
    """
    folder = Path(folder)
    require_free(model, name)
    content = read_description(folder)
    with format_errors(folder / DESCRIPTION):
        rows = content["structure"].get("vocabulary")
        rows = None if rows is None else int(rows)
        whole = held_whole(model, content["structure"]["also_train"])
        require_base(model, content["fingerprint"], content.get("base"), folder, whole)
    tensors = read_tensors(folder / TENSORS)
    with resized(model, rows):
        before = dict(model.named_parameters())
        with format_errors(folder / DESCRIPTION):
            handle = attach_from(model, structure_of(content), name=name)
        try:
            handle.load_named_state(unpacked(handle, tensors))
        except BaseException:
            roll_back(handle, before)
            raise
    return handle


def read_description(folder: Path) -> dict[str, Any]:
    """eckart.json, validated. Raises FileError if it is missing, malformed or too new."""
    path = folder / DESCRIPTION
    if not path.is_file():
        raise FileError("this folder holds no eckart adapter", [(str(path), "is missing")])
    content = read_json(path)
    if content.get("format") != FORMAT:
        raise FileError(
            "unknown format version",
            [(str(path), f"format {content.get('format')}; this eckart reads {FORMAT}")],
            "Update eckart: pip install -U eckart.",
        )
    lost = [key for key in ("fingerprint", "method", "fields", "structure") if key not in content]
    if lost:
        raise FileError("the adapter's description is incomplete", [(str(path), ", ".join(lost))])
    return content


def structure_of(content: dict[str, Any]) -> dict[str, Any]:
    """The structure for `attach_from`, from the content of eckart.json."""
    keys = ("fingerprint", "method", "fields")
    return {**content["structure"], **{key: content[key] for key in keys}}
