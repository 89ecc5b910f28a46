"""Runs commands: words become a job, and results and errors an exit code."""

import errno
import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import typer

from eckart.errors import (
    EckartError,
    Interrupted,
    OutOfRoom,
    UsageError,
    is_out_of_memory,
    nearest,
)


def run_job(
    command: str,
    words: list[str] | None,
    config: list[Path] | None,
    flags: Mapping[str, Any],
    options: Mapping[str, Any] | None = None,
) -> None:
    """Resolve a command's job, run it, print its document; `options` are those of the command."""
    as_json = bool(flags.get("json"))
    document = call(
        command,
        lambda module, job: module.run(job),
        as_json,
        lambda: to_job(command, words, config, flags, options),
    )
    show(document, as_json)
    if code := int(document.get("exit") or 0):
        raise typer.Exit(code)


def to_job(
    command: str,
    words: list[str] | None,
    config: list[Path] | None,
    flags: Mapping[str, Any],
    options: Mapping[str, Any] | None = None,
    partial: bool = False,
) -> Any:
    """Resolve a command line. Words that are not key=value are MODEL and DATA, in order."""
    from eckart.jobs.settings.config import Flags, resolve
    from eckart.jobs.settings.refuse import refuse_unread, refuse_word, unknown_flag
    from eckart.jobs.settings.words import is_setting

    own = [f"--{name.replace('_', '-')}" for name in ("config", *flags, *(options or {}))]
    for word, following in zip(words or (), [*(words or ()), ""][1:], strict=True):
        if word.startswith("-") and word != "-":
            raise unknown_flag(word, following, own)
    settings = [word for word in words or () if is_setting(word)]
    plain = [word for word in words or () if not is_setting(word)]
    for place, word in enumerate(plain):
        refuse_word(word, command, place)
    refuse_unread(settings, command)
    model, data = [*plain, None, None][:2]
    return resolve(command, model, data, settings, config or (), Flags(**flags), options, partial)


def job_words(words: list[str] | None) -> tuple[str, list[str]]:
    """The command and the words after it; finetune if the first word is no command.

    Raises UsageError for a first word that looks like a mistyped command.
    """
    from eckart.jobs.settings.config import NEEDS
    from eckart.jobs.settings.words import is_setting

    first, *rest = words or ["finetune"]
    if first in NEEDS:
        return first, rest
    may_be_a_model = is_setting(first) or first.startswith("-") or Path(first).exists()
    if not may_be_a_model and (close := nearest(first, NEEDS)):
        fix = f"Did you mean {close[0]}?"
        raise UsageError(f"unknown command {first}     command line", fix=fix)
    return "finetune", [first, *rest]


def call(
    module: str, action: Callable[..., Any], as_json: bool, read: Callable[[], Any] | None = None
) -> Any:
    """Run an action on a module of `jobs`; a Ctrl-C raises Interrupted.

    `read` is called first and its result passed to the action, so that errors in the words are
    reported before torch is imported.
    """
    try:
        given = () if read is None else (read(),)
        return action(import_module(f"eckart.jobs.{module}"), *given)
    except KeyboardInterrupt:
        leave(module, Interrupted("interrupted"), as_json)
    except EckartError as error:
        leave(module, error, as_json)
    except BrokenPipeError:  # `| head` closed the pipe: drop the rest of the output
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(128 + signal.SIGPIPE) from None
    except Exception as fault:
        leave(module, as_error(fault), as_json)


def leave(command: str, error: EckartError, as_json: bool) -> NoReturn:
    """Report an error and exit with its code."""
    raise typer.Exit(say(command, error, as_json))


def say(command: str, error: EckartError, as_json: bool) -> int:
    """Print an error to stderr, and as the --json document; returns the exit code."""
    if as_json:
        said = {"what": error.what, "facts": [list(f) for f in error.facts], "fix": error.fix}
        show({"command": command, "exit": error.exit_code, "error": said}, True)
    typer.echo(error.text(), err=True)
    return error.exit_code


def as_error(fault: Exception) -> EckartError:
    """The error for an unexpected exception: no memory, no disk space, or a bug (writes a file)."""
    if is_out_of_memory(fault):
        return OutOfRoom("out of memory", fix="Type a smaller train.batch_size or data.seq_len.")
    if isinstance(fault, OSError) and fault.errno == errno.ENOSPC:
        return OutOfRoom("no space left on the disk", fix="Make room, or choose another -o.")
    import tempfile
    import traceback

    with tempfile.NamedTemporaryFile(
        "w", prefix="eckart-fault-", suffix=".txt", delete=False, encoding="utf-8"
    ) as file:
        file.write(" ".join(sys.argv) + "\n\n" + "".join(traceback.format_exception(fault)))
    first = (str(fault).splitlines() or [""])[0]
    return EckartError(
        f"internal fault: {type(fault).__name__}: {first}",
        [("traceback", file.name)],
        "This is a mistake in eckart, not in what you typed. Please report it with that file.",
    )


def show(document: Any, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps(document, indent=2, default=str) + "\n")
