"""The folder of a run: what was asked, what was decided, what happened, what came out.

    config.yaml    as given              metrics.jsonl   one line per log step
    resolved.yaml  every `auto` decided  checkpoints/    step-N, each closed by a manifest
    run.json       versions, seeds,      spectra.jsonl   what was learned, as it grew
                   data hashes, exit     final/          the model or adapter
                                         report.html

One process owns the folder at a time; the kernel releases a killed one's lock.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from eckart.errors import FileError, UsageError, did_you_mean
from eckart.io.folder import (
    disk_errors,
    manifest_holds,
    move_aside,
    recover,
    refuse_occupied,
    require_writable,
    write_json,
    write_text,
)

PACKAGES = (
    "eckart",
    "torch",
    "transformers",
    "peft",
    "trl",
    "accelerate",
    "datasets",
    "tokenizers",
)
NUMBER = "{name}"  # at the end of a run's name: the next number stands there
METRICS, SPECTRA = LOGS = ("metrics.jsonl", "spectra.jsonl")
REFUSED = (UsageError.exit_code, FileError.exit_code)


class Run:
    """One run's folder, locked while this object is open.

    Made by `Run.create` or `Run.resume`; closed by `finish` (or by leaving a `with` block,
    which records an exception's exit code).
    """

    def __init__(
        self,
        folder: Path,
        handle: int,
        replaced: Path | None = None,
        is_new: bool = False,
        made: Sequence[Path] = (),
    ):
        self.folder, self.is_new = folder, is_new
        self._made = made  # folders that were not there before, the innermost first
        self._handle = handle  # the lock's file descriptor
        self._replaced = replaced  # what --overwrite moved aside, until this run has succeeded

    @classmethod
    def create(cls, out: str | Path, overwrite: bool = False, **facts: Any) -> Run:
        """Open a new run folder; `facts` (plain JSON) go into run.json beside the versions.

        A name that ends in `{name}` is numbered: runs/{name} -> runs/0001. A folder with
        something in it is a UsageError; with `overwrite` it is moved aside, and comes back if
        this run fails before it has anything to keep.
        """
        replaced = None
        folder = place_of(out)
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        if is_numbered(out):
            folder = claim_number(folder)
        else:
            recover(folder)
            refuse_taken(folder, overwrite)
            with disk_errors(folder):
                replaced = move_aside(folder) if folder.is_dir() and any(folder.iterdir()) else None
                folder.mkdir(parents=True, exist_ok=True)
        run = cls(folder, lock(folder), replaced, is_new=True, made=made)
        try:
            begun = {"command": sys.argv[1:], "folder": os.getcwd()}  # that its paths start from
            run.record(versions=versions(), **begun, exit=None, **facts)
        except BaseException:
            os.close(run._handle)
            raise
        return run

    @classmethod
    def resume(cls, folder: str | Path) -> Run:
        """Open an existing run to continue it. Raises FileError if it is not a run."""
        path = require_run(folder)
        run = cls(path, lock(path))
        run._drop_torn_line()
        run.record(exit=None)
        return run

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: Any, fault: BaseException | None, trace: Any) -> None:
        if self._handle >= 0:
            if fault is None:
                self.finish()
            else:
                self.finish(exit_code(fault), error=str(fault))

    # What was asked and decided

    def write_config(self, text: str) -> None:
        """Write config.yaml, as given."""
        write_text(self.folder / "config.yaml", text)

    def write_resolved(self, text: str) -> None:
        """Write resolved.yaml: every key with its value, and the reason if it was `auto`."""
        write_text(self.folder / "resolved.yaml", text)

    @property
    def facts(self) -> dict[str, Any]:
        """run.json's content; {} before the first record."""
        return facts_of(self.folder)

    def record(self, **facts: Any) -> None:
        """Add or replace facts in run.json."""
        write_json(self.folder / "run.json", {**self.facts, **facts})

    # What happened

    def log(self, file: str = METRICS, **values: Any) -> None:
        """Append one line to a log, in a single write, so that a kill corrupts no other line."""
        line = (json.dumps(values) + "\n").encode()
        path = self.folder / file
        with disk_errors(path), open(path, "ab", buffering=0) as log:
            log.write(line)

    def metrics(self) -> list[dict[str, Any]]:
        """All complete lines of metrics.jsonl."""
        return read_metrics(self.folder)

    def rewind(self, step: int) -> None:
        """Drop the lines after a step, which a resumed run writes again."""
        for file in LOGS:
            if (self.folder / file).exists():
                kept = [m for m in read_lines(self.folder, file) if m.get("step", 0) <= step]
                write_text(self.folder / file, "".join(json.dumps(m) + "\n" for m in kept))

    def _drop_torn_line(self) -> None:
        for path in (self.folder / file for file in LOGS):
            if path.exists() and not path.read_bytes().endswith(b"\n"):
                whole = path.read_bytes().rpartition(b"\n")
                write_text(path, (whole[0] + whole[1]).decode())

    # What came out

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def final(self) -> Path:
        return self.folder / "final"

    @property
    def report(self) -> Path:
        return self.folder / "report.html"

    def latest(self) -> Path | None:
        """The newest checkpoint whose manifest is valid; None if there is none."""
        return latest_checkpoint(self.folder)

    def drop_from(self, step: int) -> None:
        """Remove the checkpoints of a step and of those after it."""
        for path in checkpoint_folders(self.folder):
            if int(path.name[5:]) >= step:
                shutil.rmtree(path)

    def finish(self, exit: int = 0, error: str | None = None, **facts: Any) -> None:
        """Record how the run ended and release the folder.

        A new run that was refused before it had anything to keep leaves no folder, and none of
        those that were made for it alone. An older
        folder that it replaced is removed now, or, if this run failed so early, put back.
        """
        try:
            self.record(exit=exit, error=error, **facts)
        finally:
            os.close(self._handle)
            self._handle = -1
        failed_early = bool(exit) and not self.has_results
        if failed_early and (self._replaced or (self.is_new and exit in REFUSED)):
            shutil.rmtree(self.folder)
            for path in self._made:
                with suppress(OSError):  # gone already, or somebody else's by now
                    path.rmdir()
        if self._replaced and failed_early:
            os.rename(self._replaced, self.folder)
        elif self._replaced:
            shutil.rmtree(self._replaced, ignore_errors=True)

    @property
    def has_results(self) -> bool:
        """Is there a checkpoint, a stage or a trial from which a run could be resumed?"""
        return any(any(part.iterdir()) for part in self.folder.iterdir() if part.is_dir())


def require_run(folder: str | Path) -> Path:
    """The absolute path of a run's folder. Raises FileError if it is not a run."""
    path = Path(folder).absolute()
    if (path / "run.json").is_file():
        return path
    runs = [p.parent.name for p in path.parent.glob("*/run.json")]
    otherwise = "Type --resume FOLDER with a run's folder."
    raise FileError(
        "no run in this folder",
        [(str(folder), "has no run.json")],
        did_you_mean(path.name, runs, otherwise) if runs else otherwise,
    )


def facts_of(folder: Path) -> dict[str, Any]:
    """A run.json's content; {} if there is none. FileError if it cannot be read."""
    path = folder / "run.json"
    try:
        return json.loads(path.read_bytes()) if path.exists() else {}
    except ValueError as fault:
        raise FileError("run.json is not JSON", [(str(path), str(fault))]) from fault


def refuse_elsewhere(run: Path, command: str, paths: Sequence[str]) -> None:
    """Raise FileError if a run's paths do not exist here, but in the folder it was started in."""
    begun = Path(facts_of(run).get("folder", "."))
    lost = [path for path in paths if not Path(path).exists() and (begun / path).exists()]
    if lost:
        raise FileError(
            "this run was begun in another folder",
            [(path, f"is in {begun}") for path in lost],
            f"Type it there: cd {begun} && eckart {command} --resume {run.resolve()}",
        )


def require_place(out: str | Path, overwrite: bool) -> None:
    """Raise what `Run.create` would, without making anything."""
    if not is_numbered(out):
        refuse_taken(place_of(out), overwrite)
    require_writable(place_of(out))


def is_numbered(out: str | Path) -> bool:
    return str(out).endswith(NUMBER)


def place_of(out: str | Path) -> Path:
    """A run's folder, where a link leads; of numbered ones the folder that they are in."""
    return Path(str(out).removesuffix(NUMBER)).resolve()


def refuse_taken(folder: Path, overwrite: bool) -> None:
    """Raise UsageError if another process writes this run, or the folder is not empty."""
    if (folder / ".lock").exists():
        os.close(lock(folder))
    refuse_occupied(folder, overwrite)


def lock(folder: Path) -> int:
    """Hold a folder for this process alone; a file descriptor, whose closing frees it.

    Raises UsageError where another open run, of this process or another, holds it.
    """
    with disk_errors(folder):
        handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as fault:
        os.close(handle)
        raise UsageError(
            "another process is writing to this run",
            [(str(folder), "locked")],
            "Wait for it to end, or choose another -o.",
        ) from fault
    return handle


def is_open(folder: Path) -> bool:
    """Is a process writing to this run right now?"""
    try:
        handle = os.open(folder / ".lock", os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(handle)
    return False


def claim_number(parent: Path) -> Path:
    """Make the next numbered folder: 0001, 0002, ... Two processes never get the same one."""
    with disk_errors(parent):
        parent.mkdir(parents=True, exist_ok=True)
        taken = [int(p.name) for p in parent.iterdir() if re.fullmatch(r"\d{4,}", p.name)]
        number = max(taken, default=0)
        while True:
            number += 1
            folder = parent / f"{number:04d}"
            try:
                folder.mkdir()
                return folder
            except FileExistsError:
                continue


def checkpoint_folders(run: Path) -> list[Path]:
    """The checkpoints of a run, newest first, complete or not."""
    found = [p for p in (run / "checkpoints").glob("step-*") if p.name[5:].isdigit()]
    return sorted(found, key=lambda p: int(p.name[5:]), reverse=True)


def latest_checkpoint(run: str | Path) -> Path | None:
    """The newest checkpoint of a run folder whose manifest is valid."""
    return next((p for p in checkpoint_folders(Path(run)) if manifest_holds(p)), None)


def read_metrics(run: str | Path) -> list[dict[str, Any]]:
    """All complete lines of a run's metrics.jsonl."""
    return read_lines(run, METRICS)


def read_lines(run: str | Path, file: str) -> list[dict[str, Any]]:
    """All complete lines of one of a run's logs; an incomplete last line is left out."""
    path = Path(run) / file
    if not path.exists():
        return []
    whole = path.read_text(encoding="utf-8").rpartition("\n")[0]
    return [json.loads(line) for line in whole.splitlines()]


def versions() -> Mapping[str, str]:
    """Versions of Python and of the packages that affect a run's numbers."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def exit_code(fault: BaseException) -> int:
    """The exit code of the command line for an exception."""
    return 130 if isinstance(fault, KeyboardInterrupt) else getattr(fault, "exit_code", 1)
