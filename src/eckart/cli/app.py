"""The top-level command: registers commands, and answers --version and shell completion."""

import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from inspect import Parameter, Signature
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from eckart.cli.options import COMPLETING
from eckart.cli.running import say
from eckart.errors import EckartError, UsageError
from eckart.jobs.training.workers import hush


class Commands(TyperGroup):
    """All commands. Unknown words and options are reported as every other error is."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run a command line and exit with its code."""
        words = list(sys.argv[1:] if args is None else args)
        try:
            code = super().main(words, prog_name, complete_var, standalone_mode=False, **extra)
        except EckartError as error:  # of the command line, before the command began
            code = say(words[0], error, "--json" in words)
        except Exception as fault:
            if not hasattr(fault, "format_message"):
                raise
            if type(fault).__name__ == "NoArgsIsHelpError":
                typer.echo(fault.format_message(), err=True)
                sys.exit(UsageError.exit_code)
            wrong = import_module("eckart.jobs.settings.mistyped").mistyped(fault, words, self)
            code = say(words[0], wrong, "--json" in words)
        sys.exit(code)


class Command(TyperCommand):
    """One command; its help shows arguments in the usage line only."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return [self.options_metavar or ""]


HELP = {"help_option_names": ["-h", "--help"]}
app = typer.Typer(
    cls=Commands,
    help="Low-rank learning on transformers: pretrain, fine-tune and compress models.",
    epilog="\b\nA first run: eckart demo\nOne command: eckart finetune --help\n"
    "All keys:    eckart config schema",
    options_metavar="",
    subcommand_metavar="COMMAND [OPTIONS]",
    no_args_is_help=True,
    add_completion=False,  # done below: typer's options import pydantic in every command
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings=HELP,
)


def command(
    *takes: Parameter,
    words: str = "",
    examples: Sequence[str] = (),
    of: typer.Typer = app,
    **settings: Any,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function as a command with these arguments and options."""
    shown = "".join(f"\n    {example}" for example in examples)
    settings.setdefault("context_settings", HELP)

    def register(function: Callable[..., None]) -> Callable[..., None]:
        function.__signature__ = Signature(list(takes))  # type: ignore[attr-defined]
        return of.command(
            cls=Command,
            options_metavar=f"{words} [OPTIONS]".strip(),
            epilog=f"\b\nExamples:{shown}" if shown else None,
            **settings,
        )(function)

    return register


def print_help(context: typer.Context, wanted: bool) -> None:
    if wanted:
        typer.echo(context.get_help())
        raise typer.Exit


def print_version(wanted: bool) -> None:
    if wanted:
        import eckart

        typer.echo(f"eckart {eckart.__version__}")
        raise typer.Exit


def install_completion(context: typer.Context, param: Any, wanted: bool) -> None:
    from typer.completion import install_callback

    install_callback(context, param, wanted)


def show_completion(context: typer.Context, param: Any, wanted: bool) -> None:
    from typer.completion import show_callback

    show_callback(context, param, wanted)


Help = Annotated[
    bool,
    typer.Option("-h", "--help", callback=print_help, is_eager=True, help="Show this and exit."),
]
Version = Annotated[
    bool,
    typer.Option("--version", callback=print_version, is_eager=True, help="Print it and exit."),
]
Install = Annotated[
    bool,
    typer.Option(
        "--install-completion", callback=install_completion, is_eager=True,
        help="Let the tab key complete methods, keys and presets in this shell.",
    ),
]  # fmt: skip
Show = Annotated[
    bool,
    typer.Option(
        "--show-completion", callback=show_completion, is_eager=True,
        help="Print the script that does so.",
    ),
]  # fmt: skip


@app.callback()
def common(
    version: Version = False, install: Install = False, show: Show = False, help: Help = False
) -> None:
    """Flags of the program itself: each prints something and exits."""


def main() -> None:
    """The console command."""
    if COMPLETING in os.environ:
        from typer.completion import completion_init

        completion_init()
    hush()
    app(prog_name="eckart")
