"""Errors that a user can cause: what is wrong, where, and how to fix it.

Every one is an EckartError. Its text has up to three parts: what is wrong, the facts (one line
each, aligned), and what to type. Its class sets the exit code of the command line.
"""

import re
from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher
from typing import Any

ALIKE = 0.75  # difflib's ratio of two words: rnak and rank have it, ranks and track do not


class EckartError(Exception):
    """Base of all errors a user can cause; also an internal fault (exit code 1).

    `what` is one line without a full stop. `facts` are (thing, place or value) pairs.
    `fix` is the last line: what to type or change.
    """

    exit_code = 1

    def __init__(self, what: str, facts: Iterable[tuple[str, str]] = (), fix: str = ""):
        self.what = what
        self.facts = tuple(facts)
        self.fix = fix
        super().__init__(self.text())

    def text(self) -> str:
        """The message as it is printed, without a trailing newline."""
        width = max((len(thing) for thing, _ in self.facts), default=0)
        facts = [f"  {thing:<{width}}  {place}".rstrip() for thing, place in self.facts]
        return "\n".join([self.what, *facts, *([self.fix] if self.fix else [])])

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.what, self.facts, self.fix)


class UsageError(EckartError):
    """Wrong command, key, value, target or combination."""

    exit_code = 2


class FileError(EckartError):
    """Data, model, adapter or run files that are missing, malformed or do not fit."""

    exit_code = 3


class OutOfRoom(EckartError):
    """Memory or disk space ran out."""

    exit_code = 4


class Diverged(EckartError):
    """A loss, gradient or weight is no longer finite."""

    exit_code = 5


class MissingExtra(EckartError):
    """An optional dependency is needed and not installed."""

    exit_code = 6


class Interrupted(EckartError):
    """Ctrl-C, after a checkpoint was saved."""

    exit_code = 130


def is_out_of_memory(fault: BaseException) -> bool:
    """Is this an out-of-memory error of Python or torch? Torch's is recognised by its message."""
    if isinstance(fault, MemoryError) or type(fault).__name__ == "OutOfMemoryError":
        return True
    return "DefaultCPUAllocator: can't allocate memory" in str(fault)


def nearest(word: str, choices: Iterable[str], n: int = 1) -> list[str]:
    """The n choices that a mistyped word most likely means, best first; empty if none is close.

    Close are words of similar spelling, and those that contain or abbreviate one another.
    """
    typed = plain(word)
    likeness = {choice: SequenceMatcher(None, plain(choice), typed).ratio() for choice in choices}
    near = [c for c in likeness if likeness[c] >= ALIKE or contains(plain(c), typed)]
    return sorted(near, key=lambda choice: -likeness[choice])[:n]


def plain(word: str) -> str:
    return word.lower().replace("_", "-")


def contains(a: str, b: str) -> bool:
    """Does one word begin, end or abbreviate the other (peft-run, attn), by enough letters?"""
    short, long = sorted((a, b), key=len)
    if re.search(rf"\b{re.escape(short)}|{re.escape(short)}\b", long):
        return len(short) >= 3 or 2 * len(short) >= len(long) > 0
    rest = iter(long)
    return len(short) >= 4 and short[0] == long[0] and all(letter in rest for letter in short)


def did_you_mean(word: str, choices: Sequence[str], otherwise: str = "") -> str:
    """`Did you mean X?`, or the list of choices where nothing is close."""
    close = nearest(word, choices)
    if close:
        return f"Did you mean {close[0]}?"
    return otherwise or f"Choices: {', '.join(sorted(choices))}."
