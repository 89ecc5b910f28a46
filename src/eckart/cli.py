"""Every command: its words, its options and one call into `jobs`. Nothing heavy is imported here.

The table of jobs stands first; then come the commands that are no jobs.
"""

import errno
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from inspect import Parameter, Signature
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from eckart.errors import EckartError, Interrupted, OutOfRoom, UsageError, nearest

HELP = {"help_option_names": ["-h", "--help"]}


class Commands(TyperGroup):
    """All commands. Words and options that none of them takes are said as all errors are."""

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
        except EckartError as error:  # of the words themselves, before the command had begun
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


app = typer.Typer(
    cls=Commands,
    help="Low-rank learning on transformers: train, compress, linearize and compose models.",
    epilog="A job takes key=value words and -c FILE; all keys: eckart config schema",
    no_args_is_help=True,
    add_completion=False,  # ours below: typer's own two options cost pydantic in every command
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings=HELP,
)
config_app = typer.Typer(
    help="See, describe or check the keys of a job.", no_args_is_help=True, rich_markup_mode=None
)

# Unknown flags reach `to_job` as words, where they are answered with the key that is meant.
JOB = {"ignore_unknown_options": True}
COMPLETING = "_ECKART_COMPLETE"  # a shell sets it to ask what a word may be
FLAGS = ("out", "seed", "dry_run", "json", "resume", "overwrite")  # of the command line itself


# --- options, each defined once ------------------------------------------------------------


def option(
    name: str, kind: Any, *flags: str, text: str, metavar: str | None = None, default: Any = None
) -> Parameter:
    """An option of a type; None where it is left out, False where it is a switch."""
    about = typer.Option(*flags, help=text, metavar=metavar, show_default=False)
    return parameter(name, kind, about, default)


def parameter(name: str, kind: Any, about: Any, default: Any = None) -> Parameter:
    default = False if kind is bool else default
    annotation = Annotated[kind if kind is bool else kind | None, about]  # type: ignore[valid-type]
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def words(metavar: str) -> Parameter:
    """What is typed without a flag: paths, hub ids and keys, completed by the shell."""
    text = "Paths or hub ids, then keys: method=lora weights.rank=8 train.lr=1e-3"
    return parameter(
        "words",
        list[str],
        typer.Argument(metavar=metavar, show_default=False, help=text, autocompletion=completed),
    )


def completed(context: typer.Context, incomplete: str) -> list[Any]:
    """What a word of a job may be. The shell names files by itself where this is empty."""
    from eckart.jobs.settings.completion import completions

    typed = [str(word) for word in context.params.get("words") or ()]
    return completions(context.command.name or "", typed, incomplete)


def named(incomplete: str) -> list[str]:
    """Methods whose names begin so."""
    from eckart.jobs.settings.completion import method_names

    return [name for name in method_names() if name.startswith(incomplete)]


CONFIG = option(
    "config", list[Path], "-c", "--config", metavar="FILE",
    text="A YAML file of keys; repeatable, later wins.",
)  # fmt: skip
OUT = option("out", str, "-o", "--out", text="The run's folder.", metavar="FOLDER")
SEED = option("seed", int, "--seed", text="Same as train.seed=.")
DRY = option("dry_run", bool, "--dry-run", text="Decide everything, train and write nothing.")
JSON = option("json", bool, "--json", text="One JSON object on stdout, nothing else.")
RESUME = option("resume", str, "--resume", text="Go on with a run.", metavar="RUN")
OVERWRITE = option("overwrite", bool, "--overwrite", text="Replace what the folder holds.")
TRAINING = (CONFIG, OUT, SEED, DRY, JSON, RESUME, OVERWRITE)
AGAINST = option(
    "against", str, "--against", text="Another model on the same rows: drift.", metavar="OTHER"
)
COMPARED = option(
    "against", str, "--against", text="Another one: what differs, by matrix.", metavar="OTHER"
)
TO = option(
    "to", str, "--to", text="peft, lora, dense, factored, native or kohya.", metavar="FORMAT"
)
FIT = option("fit", str, "--fit", text="Which recipes fit into this: 24GB.", metavar="SIZE")
PROMPT = option(
    "prompt", list[str], "-p", "--prompt", text="Text to go on from; repeatable.", metavar="TEXT"
)
TOKENS = option("tokens", int, "-n", "--tokens", text="New tokens at most; 100.", default=100)
TEMPERATURE = option(
    "temperature", float, "-t", "--temperature",
    text="0 takes the likeliest token; the default.", default=0.0,
)  # fmt: skip
ADAPTER = option(
    "adapter", list[str], "--adapter",
    text="Write with this one on MODEL; repeatable.", metavar="NAME=PATH",
)  # fmt: skip
PROCESSES = option("processes", int, "--processes", text="Runs at once.")
BENCH = (
    option("methods", str, "--methods", text="For example lora:rank=4,dense+galore", metavar="A,B"),
    option("budget", str, "--budget", text="steps=300, tokens=1e6, seconds=60 or bytes=2GB."),
    option("match", str, "--match", text="parameters: ranks to train as many as the baseline."),
    option("seeds", int, "--seeds", text="Seeds of the report; 5."),
    option("choose", int, "--choose", text="Seeds that choose a rate; 2."),
    option("window", int, "--window", text="Rates tried first; 5."),
    option("purse", int, "--purse", text="Rates tried at most; 9."),
    option("margin", float, "--margin", text="Nats that make no difference; half an sd."),
    option("sampler", str, "--sampler", text="tpe: Optuna chooses the rates, not the grid."),
    PROCESSES,
    option("ray", bool, "--ray", text="Runs by Ray Tune on a cluster, or here."),
)
JOB_WORDS = words("COMMAND MODEL DATA KEY=VALUE")


# --- the table of jobs ---------------------------------------------------------------------


def job(name: str, shown: str, options: tuple[Parameter, ...], text: str, file: str = "") -> None:
    """Register a command that resolves a job and runs it, where `jobs` has its file."""
    module = file or name
    if not (Path(__file__).parent / "jobs" / f"{module}.py").exists():
        return

    def run(**given: Any) -> None:
        flags = {key: given.pop(key) for key in FLAGS if key in given}
        typed, files = given.pop("words", None), given.pop("config", None)
        run_job(module, typed, files, flags, given or None)

    takes = [*([words(shown)] if shown else []), *options]
    app.command(name, help=text, context_settings=JOB)(signed(run, takes))


def signed(function: Callable[..., None], takes: list[Parameter]) -> Callable[..., None]:
    """The function as typer is to see it."""
    function.__signature__ = Signature(takes)  # type: ignore[attr-defined]
    return function


MODEL_DATA = "MODEL DATA KEY=VALUE"
# fmt: off
job("finetune", MODEL_DATA, TRAINING,
    "Teach a model from data: MODEL is a model, an adapter or a run to continue from.")
job("pretrain", MODEL_DATA, TRAINING,
    "Train from random weights: MODEL is a configuration or the name of a preset.")
job("compress", "MODEL [DATA] KEY=VALUE", TRAINING,
    "Make a trained model smaller: keep=0.8, rank=64 or error=0.1.")
job("linearize", MODEL_DATA, TRAINING,
    "Replace softmax attention by a linear one and teach it to agree.")
job("eval", MODEL_DATA, (CONFIG, AGAINST, JSON),
    "Measure a model, an adapter or a run on data: loss, bits per byte, accuracy, intervals.",
    file="evaluate")
job("convert", "SOURCE", (TO, OUT, JSON, OVERWRITE),
    "Write a run, an adapter or a model in another form.")
job("inspect", "SOURCE", (COMPARED, OUT, JSON),
    "Show a model's, an adapter's or a run's structure, spectra and effective ranks.")
job("generate", "MODEL KEY=VALUE", (CONFIG, PROMPT, TOKENS, TEMPERATURE, ADAPTER, SEED, JSON),
    "Let a model, an adapter or a run write; prompts from -p or standard input.")
job("demo", "", (OUT, JSON, OVERWRITE), "A first run: a few minutes, no network.")
job("bench", MODEL_DATA, (CONFIG, *BENCH, OUT, SEED, JSON, RESUME, OVERWRITE),
    "Compare methods with the same tuning: paired seeds, intervals, a report.")
# fmt: on


def command(
    *takes: Parameter, of: typer.Typer = app, name: str | None = None, **settings: Any
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a function under its name, with these words and options."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        return of.command(name, **settings)(signed(function, list(takes)))

    return register


# --- commands that are no jobs -------------------------------------------------------------


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


@command(JOB_WORDS, CONFIG, FIT, JSON, context_settings=JOB)
def estimate(words: Any, config: Any, fit: str | None, json: bool) -> None:
    """Say what a job will take, before anything is loaded: eckart estimate finetune MODEL ..."""
    name, rest = job_words(words)
    options = {"fit": fit} if fit else {}
    document = call(
        "estimate",
        lambda job: job.run(to_job(name, rest, config, {"json": json}, options, partial=True)),
        json,
    )
    show(document, json)


@command(
    parameter("slugs", list[str], typer.Argument(metavar="[SLUG]...", autocompletion=named)),
    option("quick", bool, "--quick", text="See that it runs; no verdict."),
    option("full", bool, "--full", text="All arms, longer, twice the seeds."),
    PROCESSES,
    option("out", str, "-o", "--out", text="Keep the documents here.", metavar="FOLDER"),
    JSON,
)
def reproduce(
    slugs: Any, quick: bool, full: bool, processes: int | None, out: str | None, json: bool
) -> None:
    """Test papers' claims on a small scale: confirmed, not seen or refuted. All without SLUG."""
    if quick and full:
        raise UsageError("--quick and --full exclude each other     command line", fix="Leave one.")
    budget = "quick" if quick else "full" if full else "default"
    show(
        call("reproduce", lambda job: job.run(slugs or (), budget, out, processes, json), json),
        json,
    )


# typer loads pydantic to read any parameter that is not a bool, its own --help among them. This
# command must answer at once, so NAME comes from the context, but where a shell asks what NAME
# may be, and --help is ours.
NAMES = (
    [parameter("names", list[str], typer.Argument(autocompletion=named))]
    if COMPLETING in os.environ
    else []
)


@command(
    Parameter("context", Parameter.KEYWORD_ONLY, annotation=typer.Context),
    JSON,
    option("cite", bool, "--cite", text="BibTeX entries of the papers."),
    *NAMES,
    Parameter("help", Parameter.KEYWORD_ONLY, default=False, annotation=Help),
    options_metavar="[NAME] [OPTIONS]",
    context_settings={"allow_extra_args": True},
)
def methods(context: typer.Context, json: bool, cite: bool, help: bool, **names: Any) -> None:
    """List what can be chosen on each axis; with NAME, all about one method."""
    show(call("methods", lambda job: job.run(context.args, cite=cite, json=json), json), json)


@command(
    parameter("folder", str, typer.Argument(metavar="[DIR]", show_default=False), "runs"),
    JSON,
    context_settings=HELP,
)
def runs(folder: str, json: bool) -> None:
    """List the runs in a folder with recipe, state and score; DIR is runs/ without it."""
    show(call("runs", lambda job: job.run(folder, json), json), json)


@command(JSON, context_settings=HELP)
def doctor(json: bool) -> None:
    """Show versions, devices and extras, and what each extra unlocks."""
    document = call("doctor", lambda job: job.run(json), json)
    show(document, json)
    if code := int(document["exit"]):
        raise typer.Exit(code)


@command(JOB_WORDS, CONFIG, of=config_app, name="show", context_settings=JOB)
def config_show(words: Any, config: Any) -> None:
    """Print every key of a job with its value; what is auto is decided when the job runs."""
    name, rest = job_words(words)
    call("schema", lambda schema: schema.show(to_job(name, rest, config, {}, partial=True)), False)


@command(JOB_WORDS, CONFIG, of=config_app, name="validate", context_settings=JOB)
def config_validate(words: Any, config: Any) -> None:
    """Check files and keys without running anything."""
    name, rest = job_words(words)
    call(
        "schema",
        lambda schema: schema.validate(to_job(name, rest, config, {}, partial=True)),
        False,
    )


@command(of=config_app, name="schema")
def config_schema() -> None:
    """Print the JSON schema of all keys, with every method's fields."""
    call("schema", lambda schema: schema.schema(), False)


@command(
    Parameter(
        "file",
        Parameter.KEYWORD_ONLY,
        annotation=Annotated[str, typer.Argument(metavar="FILE", show_default=False)],
    ),
    of=config_app,
    name="import",
)
def config_import(file: str) -> None:
    """Turn a file of PEFT, LLaMA-Factory or axolotl into a job file; say what is left out."""
    call("foreign", lambda foreign: foreign.run(file), False)


app.add_typer(config_app, name="config")


@app.callback()
def common(
    version: Version = False, install: Install = False, show: Show = False, help: Help = False
) -> None:
    """These flags answer by themselves, before any command."""


# --- from words to a job, and from its end to an exit code ----------------------------------


def run_job(
    command: str,
    words: list[str] | None,
    config: list[Path] | None,
    flags: Mapping[str, Any],
    options: Mapping[str, Any] | None = None,
) -> None:
    """Resolve a command's job, run it, print its document; `options` are its own flags."""
    as_json = bool(flags.get("json"))
    document = call(
        command, lambda job: job.run(to_job(command, words, config, flags, options)), as_json
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
    """The job of a command line. Words that are not key=value are MODEL and DATA, in order."""
    from eckart.jobs.settings.config import Flags, resolve
    from eckart.jobs.settings.refuse import refuse_elsewhere, refuse_word, unknown_flag
    from eckart.jobs.settings.words import is_setting

    own = [f"--{name.replace('_', '-')}" for name in ("config", *flags, *(options or {}))]
    for word, following in zip(words or (), [*(words or ()), ""][1:], strict=True):
        if word.startswith("-") and word != "-":
            raise unknown_flag(word, following, own)
    settings = [word for word in words or () if is_setting(word)]
    plain = [word for word in words or () if not is_setting(word)]
    for place, word in enumerate(plain):
        refuse_word(word, command, place)
    refuse_elsewhere(settings, command)
    model, data = [*plain, None, None][:2]
    return resolve(command, model, data, settings, config or (), Flags(**flags), options, partial)


def job_words(words: list[str] | None) -> tuple[str, list[str]]:
    """COMMAND and the rest; finetune where a file is checked by itself.

    Raises UsageError for a first word that is meant for a command and is none.
    """
    from eckart.jobs.settings.config import FILES, NEEDS
    from eckart.jobs.settings.words import is_setting

    first, *rest = words or ["finetune"]
    command = FILES.get(first, first)
    if command in NEEDS:
        return command, rest
    plain = [word for word in (first, *rest) if not is_setting(word) and word[:1] != "-"]
    if plain[:1] == [first] and not Path(first).exists():
        names = [name for name in (*NEEDS, *FILES) if name not in FILES.values()]
        if close := nearest(first, names):
            fix = f"Did you mean {close[0]}?"
            raise UsageError(f"unknown command {first}     command line", fix=fix)
    return "finetune", [first, *rest]


def call(module: str, action: Callable[[Any], Any], as_json: bool) -> Any:
    """Run an action on a file of `jobs`; a Ctrl-C ends as Interrupted."""
    try:
        return action(import_module(f"eckart.jobs.{module}"))
    except KeyboardInterrupt:
        leave(module, Interrupted("interrupted"), as_json)
    except EckartError as error:
        leave(module, error, as_json)
    except BrokenPipeError:  # `| head` has read enough: what is left has nowhere to go
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(128 + signal.SIGPIPE) from None
    except Exception as fault:
        leave(module, as_error(fault), as_json)


def leave(command: str, error: EckartError, as_json: bool) -> NoReturn:
    """Say what was wrong and exit with its code."""
    raise typer.Exit(say(command, error, as_json))


def say(command: str, error: EckartError, as_json: bool) -> int:
    """What was wrong, on stderr, and as the document of --json; the exit code."""
    if as_json:
        said = {"what": error.what, "facts": [list(f) for f in error.facts], "fix": error.fix}
        show({"command": command, "exit": error.exit_code, "error": said}, True)
    typer.echo(error.text(), err=True)
    return error.exit_code


def as_error(fault: Exception) -> EckartError:
    """What was not foreseen: no room left, or a fault of ours with its traceback in a file."""
    if isinstance(fault, MemoryError) or type(fault).__name__ == "OutOfMemoryError":  # torch's
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


def main() -> None:
    """The console command."""
    if COMPLETING in os.environ:
        from typer.completion import completion_init

        completion_init()
    # Where torchao is installed transformers loads it, and it warns of other machines' kernels.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    app(prog_name="eckart")


if __name__ == "__main__":
    main()
