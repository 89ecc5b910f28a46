"""Errors of the command-line parser (unknown words, options, missing values) as UsageErrors.

They are recognised by their attributes, so that only the command line imports the parser.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from eckart.errors import EckartError, UsageError, nearest

PLACE = "command line"
KINDS = {"valid integer": "a whole number", "valid number": "a number"}  # the parser's words
ELSEWHERE = {  # commands of other tools -> what to type
    **dict.fromkeys(("train", "sft"), "finetune MODEL DATA"),
    **dict.fromkeys(("merge", "export", "fuse"), "convert RUN --to dense -o FOLDER"),
    **dict.fromkeys(("chat", "infer", "inference"), "generate MODEL -p TEXT"),
}


def mistyped(fault: Any, words: Sequence[str], commands: Any) -> EckartError:
    """The error of a command line that could not be read; `words` as they were typed.

    `commands` is the group of all commands.
    """
    command, options = meant(words, commands)
    more = f"All options: {command} --help"
    if hasattr(fault, "possibilities"):  # an unknown option
        return UsageError(
            f"unknown option {fault.option_name}     {PLACE}",
            fix=f"{option_meant(fault.option_name, options)} {more}".strip(),
        )
    if hasattr(fault, "option_name"):
        name = fault.option_name
        metavar = next((p.metavar for p in options if name in p.opts), None) or "VALUE"
        return UsageError(f"{name} needs a value     {PLACE}", fix=f"Type {name} {metavar}. {more}")
    about = getattr(fault, "param", None)
    if about is not None and not fault.message:
        return UsageError(f"{command} needs {about.metavar}", fix=f"Type {command} {about.metavar}")
    if about is not None:
        name = next((opt for opt in about.opts if said_by(opt, words)), about.opts[0])
        kind = next((k for said, k in KINDS.items() if said in fault.message), fault.message)
        return UsageError(
            f"{name} is of the wrong type",
            [(f"{name} {said_by(name, words)}", PLACE), ("allowed", kind)],
            f"Leave it out for the default. {more}",
        )
    return of_words(fault, command)


def of_words(fault: Any, command: str) -> EckartError:
    """The error for an unknown command, or for one word too many."""
    _, _, rest = fault.message.partition("No such command ")
    if rest:
        typed = rest.split("'")[1]
        commands = list(getattr(fault.ctx.command, "commands", ()))
        hint = f"Here it is eckart {ELSEWHERE[typed]}. " if typed in ELSEWHERE else ""
        if not hint and (near := nearest(typed, commands)):
            hint = f"Did you mean {command} {near[0]}? "
        return UsageError(
            f"unknown command {typed}     {PLACE}", fix=f"{hint}All commands: {command} --help"
        )
    _, _, rest = fault.message.partition("unexpected extra argument")
    if rest:
        first = rest[rest.rindex("(") + 1 :].rstrip(")").split()[0]
        return UsageError(
            f"unexpected word {first}     {PLACE}", fix=f"What it takes: {command} --help"
        )
    return UsageError(fault.format_message().rstrip("."), fix=f"Type {command} --help.")


def meant(words: Sequence[str], commands: Any) -> tuple[str, list[Any]]:
    """The command named by the first words, in full, and its options."""
    found, name = commands, "eckart"
    for word in words:
        if word not in getattr(found, "commands", ()):
            break
        found, name = found.commands[word], f"{name} {word}"
    return name, list(found.params)


def option_meant(typed: str, options: Sequence[Any]) -> str:
    """`Did you mean --json?`; empty if no option is similar."""
    close = nearest(typed, [opt for p in options for opt in p.opts if opt.startswith("--")])
    return f"Did you mean {close[0]}?" if close else ""


def said_by(option: str, words: Sequence[str]) -> str:
    """The word after an option; empty if the option was not typed."""
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word == option:
            return following
        if word.startswith(f"{option}="):
            return word.partition("=")[2]
    return ""
