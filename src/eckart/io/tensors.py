"""Named tensors in safetensors files: deterministic writing, reading with clear errors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from eckart.errors import FileError
from eckart.io.folder import disk_errors
from eckart.io.headers import header, pickles_in, refused

# Transformers refuses files that do not name their framework. One key only: safetensors
# writes its metadata in the order of a hash map.
METADATA = {"format": "pt"}


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors under sorted names, whole and contiguous, on the CPU.

    A sharded tensor (DTensor) is gathered; tensors that share memory are copied. `metadata` are
    further entries of the file's header.
    """
    save({name: standalone(tensors[name]) for name in sorted(tensors)}, path)
    if metadata:
        with disk_errors(path):
            path.write_bytes(with_metadata(path.read_bytes(), {**METADATA, **metadata}))


def with_metadata(data: bytes, metadata: Mapping[str, str]) -> bytes:
    """A safetensors file with these entries in its header, in sorted order."""
    length = int.from_bytes(data[:8], "little")
    content = json.loads(data[8 : 8 + length])
    content["__metadata__"] = {key: metadata[key] for key in sorted(metadata)}
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of eight
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def save(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write CPU tensors as they are, into a file with the permissions of its folder."""
    with disk_errors(path):
        save_file(dict(tensors), path, metadata=METADATA)
        path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors leaves 0o600


def standalone(tensor: Tensor) -> Tensor:
    """A contiguous CPU tensor that shares no memory with other tensors."""
    whole = tensor.detach()
    if hasattr(whole, "full_tensor"):
        whole = whole.full_tensor()
    return whole.cpu().contiguous().clone()


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file onto the CPU.

    Raises FileError if it is missing (naming a pickle found instead), truncated or damaged.
    """
    if not path.is_file():
        for pickle in pickles_in(path.parent):
            raise refused(pickle)
        raise FileError("a file of the adapter is missing", [(str(path), "")])
    header(path)
    try:
        return load_file(path, device="cpu")
    except SafetensorError as fault:
        raise FileError("this is not a safetensors file", [(str(path), str(fault))]) from fault
