"""What the tests of bad input share: a command that must fail, word for word, leaving nothing."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from tests.journeys.runs import eckart

BEFORE = ("model", "data", "method", "memory", "lr", "steps", "source", "warning", " ")
"""Lines that may come before an error: what had been decided until then."""


def complains(line: str, code: int, text: str) -> None:
    """Run `line` in the current folder: it ends with `text` on stderr and this exit code.

    Nothing stands on stdout, there is no traceback, and no file or folder is new.
    """
    before = entries()
    ran = eckart(*shlex.split(line))
    assert ran.err.endswith(text), f"--- said\n{ran.err}--- wanted\n{text}"
    early = ran.err[: len(ran.err) - len(text)].splitlines()
    assert all(said.startswith(BEFORE) for said in early), ran.err
    assert (ran.code, ran.out) == (code, "")
    assert "Traceback" not in ran.err
    assert entries() == before, "something was left behind"


def entries() -> list[str]:
    """All files and folders below the current one, hidden ones too."""
    return sorted(str(path) for path in Path().rglob("*"))


def enter(folder: Path, monkeypatch) -> None:
    """Work in a folder, with a cache outside of it."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("ECKART_CACHE", str(folder.parent / f"{folder.name}-cache"))
    assert Path(os.getcwd()) == folder.resolve()
