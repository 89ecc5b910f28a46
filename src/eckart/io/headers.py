"""Reads the headers of weight files without reading the weights.

Safetensors only: pickles are refused by name.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from eckart.errors import FileError, UsageError, is_out_of_memory

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5")


def refused(path: Path) -> FileError:
    """The error for weights in a format that can execute code when it is loaded."""
    return FileError(
        "weights in this format can run code and are not read",
        [(str(path), "pickle" if path.suffix not in (".msgpack", ".h5") else path.suffix[1:])],
        "Save the model as safetensors: model.save_pretrained(folder).",
    )


@contextmanager
def format_errors(path: Path) -> Iterator[None]:
    """Convert exceptions caused by a malformed or too new description into FileError."""
    try:
        yield
    except UsageError as fault:  # a value out of range is the file's fault here, not the user's
        raise FileError(fault.what, [(str(path), ""), *fault.facts]) from fault
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, re.error) as fault:
        if is_out_of_memory(fault):
            raise
        raise FileError(
            "this description of an adapter cannot be used",
            [(str(path), f"{type(fault).__name__}: {fault}")],
            "It may be from a later version: pip install -U eckart.",
        ) from fault


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises FileError with the line if it is malformed."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as fault:
        where = f"line {fault.lineno}" if isinstance(fault, json.JSONDecodeError) else "not UTF-8"
        raise FileError("this is not JSON", [(str(path), f"{where}: {fault}")]) from fault
    if not isinstance(content, dict):
        raise FileError("this JSON is not an object", [(str(path), type(content).__name__)])
    return content


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model's folder, including the shards of an index."""
    index = folder / INDEX
    if index.is_file():
        with format_errors(index):
            shards = sorted(set(read_json(index).get("weight_map", {}).values()))
            return [folder / shard for shard in shards]
    single = folder / SINGLE
    return [single] if single.is_file() else []


def pickles_in(folder: Path) -> list[Path]:
    """Weight files of a folder that are refused."""
    known = ("training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth")
    return sorted(p for p in folder.iterdir() if p.suffix in PICKLES and p.name not in known)


def header(path: Path) -> dict[str, Any]:
    """The tensors of a safetensors file: {name: {dtype, shape, data_offsets}}."""
    return read_header(path)[0]


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tensor list of a safetensors file, and its metadata.

    Raises FileError if the file is missing, is not safetensors, or is shorter than the tensors it
    lists; those are named.
    """
    if not path.is_file():
        raise FileError("a file of the model is missing", [(str(path), "named in its index")])
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(size - 8, 100_000_000):
            reason = "empty file" if size == 0 else "header damaged or cut off"
            raise FileError("this is not a safetensors file", [(str(path), reason)])
        try:
            tensors = json.loads(file.read(length))
            metadata = dict(tensors.pop("__metadata__", {}))
            ends = {name: 8 + length + t["data_offsets"][1] for name, t in tensors.items()}
        except (ValueError, LookupError, TypeError, AttributeError) as fault:
            raise FileError(
                "this is not a safetensors file", [(str(path), "header damaged")]
            ) from fault
    lost = sorted(name for name, end in ends.items() if end > size)
    if lost:
        raise FileError(
            "the file ends before its tensors do",
            [(str(path), f"{size:,} of {max(ends.values()):,} bytes"), *listed(lost, "cut off")],
            "Download or copy it again.",
        )
    return tensors, metadata


def unfit(path: Path, facts: Iterable[tuple[str, str]], fix: str = "") -> FileError:
    """The error for an adapter whose tensors do not fit the model."""
    return FileError("the adapter does not fit the model", [(str(path), ""), *facts], fix)


def listed(names: list[str], what: str, most: int = 5) -> list[tuple[str, str]]:
    """Facts for an error: the first names, and the number of the others."""
    facts = [(name, what) for name in names[:most]]
    more = len(names) - most
    return facts + ([(f"and {more} more", what)] if more > 0 else [])


def check_folder(folder: Path) -> None:
    """Raise FileError unless the folder has a config and complete safetensors weights."""
    if not (folder / "config.json").is_file():
        raise FileError("this folder holds no model", [(str(folder), "no config.json")])
    read_json(folder / "config.json")
    files = weight_files(folder)
    if not files:
        for pickle in pickles_in(folder):
            raise refused(pickle)
        raise FileError(
            "the model has no weights",
            [(str(folder), "config.json, but no model.safetensors")],
            f"To start from random weights: eckart pretrain {folder} DATA.",
        )
    held = {name for file in files for name in header(file)}
    index = folder / INDEX
    if index.is_file():
        lost = sorted(set(read_json(index)["weight_map"]) - held)
        if lost:
            raise FileError(
                "tensors of the model's index are in no file",
                [(str(index), ""), *listed(lost, "missing")],
            )
