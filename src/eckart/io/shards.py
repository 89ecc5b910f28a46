"""Models larger than memory: tensors are read and written one by one.

`Shards` opens a model's safetensors files without reading them; `ShardWriter` writes numbered files
of a limited size and their index, as transformers expects.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from eckart.errors import FileError, UsageError, did_you_mean
from eckart.io.folder import write_json
from eckart.io.headers import INDEX, SINGLE, check_folder, header, weight_files
from eckart.io.models import folder_of
from eckart.io.tensors import save


class Shards(Mapping[str, Tensor]):
    """The tensors of a model's folder by name, each read from disk on access.

    Files are checked when opened (FileError for a missing or truncated one) and closed at the end
    of the `with` block. Nothing is cached.
    """

    def __init__(self, source: str | Path):
        self.folder = folder_of(source)
        check_folder(self.folder)
        self._facts: dict[str, dict[str, Any]] = {}
        self._file: dict[str, Path] = {}
        for file in weight_files(self.folder):
            for name, facts in header(file).items():
                self._facts[name] = facts
                self._file[name] = file
        self._open: dict[Path, Any] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Shards:
        return self

    def __exit__(self, kind: Any, fault: BaseException | None, trace: Any) -> None:
        self._open.clear()
        self._stack.close()

    def __iter__(self) -> Iterator[str]:
        return iter(self._facts)

    def __len__(self) -> int:
        return len(self._facts)

    def __contains__(self, name: object) -> bool:
        return name in self._facts  # Mapping would read the tensor to find out

    def __getitem__(self, name: str) -> Tensor:
        file = self._file[name]
        try:
            if file not in self._open:
                self._open[file] = self._stack.enter_context(safe_open(file, framework="pt"))
            return self._open[file].get_tensor(name)
        except SafetensorError as fault:
            raise FileError("this tensor cannot be read", [(name, str(file))]) from fault

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, from the header alone."""
        return tuple(self._facts[name]["shape"])

    def bytes(self, name: str | None = None) -> int:
        """Size of one tensor, or of all, from the headers alone."""
        names = [name] if name is not None else list(self._facts)
        spans = (self._facts[n]["data_offsets"] for n in names)
        return sum(stop - start for start, stop in spans)

    def below(self, prefix: str) -> dict[str, Tensor]:
        """All tensors of one module, by their names inside it.

        Raises FileError, with the nearest module, if there are none.
        """
        dot = prefix + "." if prefix else ""
        found = {name[len(dot) :]: self[name] for name in self if name.startswith(dot)}
        if not found:
            modules = sorted({name.rpartition(".")[0] for name in self})
            raise FileError(
                "no tensors of this module",
                [(prefix, str(self.folder))],
                did_you_mean(prefix, modules, "eckart inspect lists its modules."),
            )
        return found


class ShardWriter:
    """Writes tensors into numbered files of at most `shard_bytes` each (one tensor at least).

    Used inside `write_folder`, so that a folder without its last shard is never seen. At most
    one shard is held in memory. `close` (or leaving the `with` block without an exception)
    gives the files their final names and writes the index.
    """

    def __init__(self, folder: str | Path, shard_bytes: int = 2 << 30):
        self.folder = Path(folder)
        self.shard_bytes = shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._shards: list[list[str]] = []
        self._total = 0

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: Any, fault: BaseException | None, trace: Any) -> None:
        if fault is None:
            self.close()

    def add(self, name: str, tensor: Tensor) -> None:
        """Add one tensor. Raises UsageError if the name was written before."""
        if name in self._pending or any(name in names for names in self._shards):
            raise UsageError("a tensor is written twice", [(name, str(self.folder))])
        ready = tensor.detach().cpu().contiguous()
        if self._pending and size(self._pending.values()) + size([ready]) > self.shard_bytes:
            self._flush()
        # a view would keep, and safetensors refuse, the whole storage behind it
        whole = ready.untyped_storage().nbytes() == size([ready])
        self._pending[name] = ready if whole and ready is not tensor else ready.clone()

    def _flush(self) -> None:
        path = self._part(len(self._shards))
        save(self._pending, path)
        self._shards.append(list(self._pending))
        self._total += size(self._pending.values())
        self._pending = {}

    def _part(self, i: int) -> Path:
        return self.folder / f"part-{i}.safetensors"

    def close(self) -> None:
        """Write pending tensors, and the index if there is more than one file."""
        if self._pending or not self._shards:
            self._flush()
        count = len(self._shards)
        if count == 1:
            os.rename(self._part(0), self.folder / SINGLE)
            return
        weight_map: dict[str, str] = {}
        for i, names in enumerate(self._shards):
            file = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
            os.rename(self._part(i), self.folder / file)
            weight_map |= dict.fromkeys(names, file)
        content = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
        write_json(self.folder / INDEX, content)


def size(tensors: Any) -> int:
    """Total bytes of tensors."""
    return sum(t.numel() * t.element_size() for t in tensors)
