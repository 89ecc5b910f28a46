"""Atomic writing of files and folders.

Everything is written beside its target, flushed to disk and renamed, so that a kill at any moment
leaves either the old or the new content. Files left by a killed process are hidden
(`.NAME.writing-*`, `.NAME.aside-*`) and are removed, or restored, when the same target is written
again.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import socket
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import Any

from eckart.errors import EckartError, FileError, OutOfRoom, UsageError

MANIFEST = "manifest.json"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

# --overwrite replaces what eckart, PEFT or transformers wrote, and nothing else: a mistyped
# -o must not delete a folder of photographs.
MARKS = (MANIFEST, "run.json", "eckart.json", "config.json", "adapter_config.json")


@contextmanager
def disk_errors(path: str | Path) -> Iterator[None]:
    """Turn the faults of a disk into words: OutOfRoom when it is full, else FileError."""
    try:
        yield
    except EckartError:
        raise
    except OSError as fault:
        raise disk_error(fault, path) from fault
    except Exception as fault:
        # safetensors reports a full disk as its own exception, with the number in the text
        for number in FULL:
            if f"os error {number}" in str(fault):
                raise disk_error(OSError(number, ""), path) from fault
        raise


def disk_error(fault: OSError, path: str | Path) -> EckartError:
    """The EckartError that says what a failed write to `path` means."""
    where = str(fault.filename or path)
    if fault.errno in FULL:  # disk, quota or the process' own limit
        free = f"{free_bytes(Path(path)) / 2**20:,.0f} MiB free"
        return OutOfRoom(
            "the disk is full",
            [(where, free)],
            "Free some space, or type -o FOLDER on another disk.",
        )
    reason = os.strerror(fault.errno).lower() if fault.errno else str(fault)
    return FileError(
        "cannot write here", [(where, reason)], "Type -o FOLDER with a folder you own."
    )


def free_bytes(path: Path) -> int:
    """Free bytes on the disk that holds a path, which need not exist yet."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a file atomically: beside, flushed to disk, then renamed over the old one."""
    path = Path(path).resolve()  # a link stays one
    beside = path.with_name(hidden(path.name, "writing"))
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(beside, "xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise
        sync(path.parent)


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    write_bytes(path, text.encode())


def write_json(path: str | Path, content: Any) -> None:
    """Write a JSON file atomically; keys keep their order."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def write_folder(path: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder that becomes `path` when the block ends without an exception.

    An existing target is refused (UsageError), or moved aside and removed once the new one is in
    place. Any exception removes what was written and leaves the target as it was.
    """
    target = Path(path).resolve()  # where a link leads, which may be another disk
    recover(target)
    refuse_occupied(target, overwrite)
    beside = target.with_name(hidden(target.name, "writing"))
    aside = None
    with disk_errors(path):
        try:
            beside.mkdir(parents=True)
            yield beside
            for name in files_in(beside):
                sync(beside / name)
            sync(beside)
            aside = move_aside(target)
            os.rename(beside, target)
            sync(target.parent)
        except BaseException:
            shutil.rmtree(beside, ignore_errors=True)
            if aside and not target.exists():
                os.rename(aside, target)
            raise
    if aside:
        shutil.rmtree(aside, ignore_errors=True)


def refuse_occupied(target: Path, overwrite: bool) -> None:
    """Raise UsageError if writing would overwrite something without `overwrite`."""
    if target.is_file():
        raise UsageError("there is a file of this name", [(str(target), "")], "Choose another -o.")
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not overwrite:
        raise UsageError(
            "the folder is not empty",
            [(str(target), f"{sum(1 for _ in target.iterdir())} entries")],
            "Type --overwrite to replace it, or choose another -o.",
        )
    here = Path.cwd()
    if target == here or target in here.parents or not any((target / m).exists() for m in MARKS):
        raise UsageError(
            "--overwrite replaces only runs, models and adapters",
            [(str(target), "is none of them")],
            "Remove the folder yourself, or choose another -o.",
        )


def require_writable(folder: Path) -> None:
    """Raise FileError, or OutOfRoom, where nothing can be made in a folder, which need not exist
    yet. Tried, since a mode does not say what a mount allows."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    trial = there / hidden(folder.name, "writing")
    try:
        trial.mkdir()
        trial.rmdir()
    except OSError as fault:
        raise disk_error(OSError(fault.errno, ""), folder) from fault


def move_aside(target: Path) -> Path | None:
    """Rename an existing folder to a hidden sibling; None if there was none."""
    if not target.exists():
        return None
    aside = target.with_name(hidden(target.name, "aside"))
    os.rename(target, aside)
    return aside


def recover(target: Path) -> None:
    """Clean up after a killed writer: restore the old folder, remove half-written ones."""
    if not target.parent.is_dir():
        return
    for left in sorted(target.parent.glob(f".{escape(target.name)}.aside-*")):
        if not abandoned(left):
            continue
        if target.exists():
            shutil.rmtree(left, ignore_errors=True)
        else:
            os.rename(left, target)
    for left in target.parent.glob(f".{escape(target.name)}.writing-*"):
        if abandoned(left):
            remove(left)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it exists."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def hidden(name: str, state: str) -> str:
    """A sibling's name that identifies the process and machine that write it."""
    return f".{name}.{state}-{machine()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"


def abandoned(path: Path) -> bool:
    """Has the process that made this hidden sibling ended?

    Only names made on this machine are checked: on a shared disk, process numbers of other machines
    mean nothing here.
    """
    where, pid, _ = path.name.rsplit("-", 3)[1:]
    if where != machine():
        return False
    try:
        with suppress(PermissionError):  # another user's process, still running
            os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    return False


def machine() -> str:
    """A short name of this machine without hyphens."""
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def sync(path: Path) -> None:
    """Flush a file or a folder's entries to disk, on file systems that support it."""
    with suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def files_in(folder: Path) -> list[str]:
    """Names of all files below a folder, relative, sorted, with forward slashes."""
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a file, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def close_with_manifest(folder: str | Path, **facts: Any) -> None:
    """List every file with its size and SHA-256 in manifest.json, written last.

    `facts` (plain JSON) are stored beside the list.
    """
    folder = Path(folder)
    files = {
        name: {"size": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)}
        for name in files_in(folder)
        if name != MANIFEST
    }
    write_json(folder / MANIFEST, {"format": 1, **facts, "files": files})


def manifest_holds(folder: str | Path) -> bool:
    """Do all files in the folder's manifest exist, with their sizes and hashes?"""
    folder = Path(folder)
    try:
        files: Mapping[str, Any] = json.loads((folder / MANIFEST).read_bytes())["files"]
        return all(
            (folder / name).stat().st_size == file["size"]
            and sha256_of(folder / name) == file["sha256"]
            for name, file in files.items()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False
