"""Every command: its signature and one call into `jobs`. Nothing heavy is imported here."""

import errno
import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from eckart.errors import EckartError, Interrupted, OutOfRoom, UsageError

HELP = {"help_option_names": ["-h", "--help"]}

app = typer.Typer(
    help="Low-rank learning on transformers: train, compress, linearize and compose models.",
    epilog="A job takes key=value words and -c FILE; all keys: eckart config schema",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings=HELP,
)

# Unknown flags reach `to_job` as words, where they are answered with the key that is meant.
JOB = {"ignore_unknown_options": True}
WORDS = "Paths or hub ids, then keys: method=lora weights.rank=8 train.lr=1e-3"


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Register a command whose job is there; `evaluate` is typed `eval`."""
    job = Path(__file__).parent / "jobs" / f"{function.__name__}.py"
    name = function.__name__.removesuffix("uate")
    return app.command(name, context_settings=JOB)(function) if job.exists() else function


def option(*names: str, text: str, metavar: str | None = None) -> Any:
    return typer.Option(*names, help=text, metavar=metavar, show_default=False)


def words(metavar: str) -> Any:
    return typer.Argument(metavar=metavar, show_default=False, help=WORDS)


def print_help(context: typer.Context, wanted: bool) -> None:
    if wanted:
        typer.echo(context.get_help())
        raise typer.Exit


def print_version(wanted: bool) -> None:
    if wanted:
        import eckart

        typer.echo(f"eckart {eckart.__version__}")
        raise typer.Exit


Help = Annotated[
    bool,
    typer.Option("-h", "--help", callback=print_help, is_eager=True, help="Show this and exit."),
]
Version = Annotated[
    bool,
    typer.Option("--version", callback=print_version, is_eager=True, help="Print it and exit."),
]
ModelData = Annotated[list[str] | None, words("MODEL DATA KEY=VALUE")]
Source = Annotated[list[str] | None, words("SOURCE")]
JobWords = Annotated[list[str] | None, words("COMMAND MODEL DATA KEY=VALUE")]
ModelMaybeData = Annotated[list[str] | None, words("MODEL [DATA] KEY=VALUE")]
Model = Annotated[list[str] | None, words("MODEL KEY=VALUE")]
Config = Annotated[
    list[Path] | None, option("-c", "--config", text="A YAML file of keys; repeatable, later wins.")
]
Out = Annotated[str | None, option("-o", "--out", text="The run's folder.", metavar="FOLDER")]
Seed = Annotated[int | None, option("--seed", text="Same as train.seed=.")]
Dry = Annotated[bool, option("--dry-run", text="Decide everything, train and write nothing.")]
Json = Annotated[bool, option("--json", text="One JSON object on stdout, nothing else.")]
Resume = Annotated[str | None, option("--resume", text="Go on with a run.", metavar="RUN")]
To = Annotated[
    str | None,
    option("--to", text="peft, lora, dense, factored, native or kohya.", metavar="FORMAT"),
]
Overwrite = Annotated[bool, option("--overwrite", text="Replace what the folder holds.")]


@command
def finetune(
    words: ModelData = None,
    config: Config = None,
    out: Out = None,
    seed: Seed = None,
    dry_run: Dry = False,
    json: Json = False,
    resume: Resume = None,
    overwrite: Overwrite = False,
) -> None:
    """Teach a model from data: MODEL is a model, an adapter or a run to continue from."""
    flags = job_flags(out, seed, dry_run, json, resume, overwrite)
    run_job("finetune", words, config, flags)


@command
def pretrain(
    words: ModelData = None,
    config: Config = None,
    out: Out = None,
    seed: Seed = None,
    dry_run: Dry = False,
    json: Json = False,
    resume: Resume = None,
    overwrite: Overwrite = False,
) -> None:
    """Train from random weights: MODEL is a configuration or the name of a preset."""
    flags = job_flags(out, seed, dry_run, json, resume, overwrite)
    run_job("pretrain", words, config, flags)


@command
def compress(
    words: ModelMaybeData = None,
    config: Config = None,
    out: Out = None,
    seed: Seed = None,
    dry_run: Dry = False,
    json: Json = False,
    resume: Resume = None,
    overwrite: Overwrite = False,
) -> None:
    """Make a trained model smaller: keep=0.8, rank=64 or error=0.1."""
    flags = job_flags(out, seed, dry_run, json, resume, overwrite)
    run_job("compress", words, config, flags)


@command
def linearize(
    words: ModelData = None,
    config: Config = None,
    out: Out = None,
    seed: Seed = None,
    dry_run: Dry = False,
    json: Json = False,
    resume: Resume = None,
    overwrite: Overwrite = False,
) -> None:
    """Replace softmax attention by a linear one and teach it to agree."""
    flags = job_flags(out, seed, dry_run, json, resume, overwrite)
    run_job("linearize", words, config, flags)


@command
def evaluate(
    words: ModelData = None,
    config: Config = None,
    against: Annotated[
        str | None,
        option("--against", text="Another model on the same rows: drift.", metavar="OTHER"),
    ] = None,
    json: Json = False,
) -> None:
    """Measure a model, an adapter or a run on data: loss, bits per byte, accuracy, intervals."""
    run_job("evaluate", words, config, {"json": json}, {"against": against})


@command
def convert(
    words: Source = None,
    to: To = None,
    out: Out = None,
    json: Json = False,
    overwrite: Overwrite = False,
) -> None:
    """Write a run, an adapter or a model in another form."""
    run_job("convert", words, None, {"out": out, "json": json, "overwrite": overwrite}, {"to": to})


@command
def inspect(words: Source = None, json: Json = False) -> None:
    """Show a model's, an adapter's or a run's structure, spectra and effective ranks."""
    run_job("inspect", words, None, {"json": json})


@app.command(context_settings=JOB)
def estimate(words: JobWords = None, config: Config = None, json: Json = False) -> None:
    """Say what a job will take, before anything is loaded: eckart estimate finetune MODEL ..."""
    command, rest = job_words(words)
    document = call(
        "estimate",
        lambda job: job.run(to_job(command, rest, config, {"json": json}, partial=True)),
        json,
    )
    show(document, json)


@command
def generate(
    words: Model = None,
    config: Config = None,
    prompt: Annotated[
        list[str] | None, option("-p", "--prompt", text="Text to go on from; repeatable.")
    ] = None,
    tokens: Annotated[int, option("-n", "--tokens", text="New tokens at most; 100.")] = 100,
    temperature: Annotated[
        float, option("-t", "--temperature", text="0 takes the likeliest token; the default.")
    ] = 0.0,
    seed: Seed = None,
    json: Json = False,
) -> None:
    """Let a model, an adapter or a run write; prompts from -p or standard input."""
    options = {"prompt": prompt, "tokens": tokens, "temperature": temperature}
    run_job("generate", words, config, {"seed": seed, "json": json}, options)


@command
def demo(out: Out = None, json: Json = False, overwrite: Overwrite = False) -> None:
    """A first run: a few minutes, no network."""
    run_job("demo", None, None, {"out": out, "json": json, "overwrite": overwrite})


@command
def bench(
    words: ModelData = None,
    config: Config = None,
    methods: Annotated[
        str | None, option("--methods", text="For example lora:rank=4,dense+galore", metavar="A,B")
    ] = None,
    budget: Annotated[
        str | None, option("--budget", text="steps=300, tokens=1e6, seconds=60 or bytes=2GB.")
    ] = None,
    match: Annotated[
        str | None, option("--match", text="parameters: ranks to train as many as the baseline.")
    ] = None,
    seeds: Annotated[int | None, option("--seeds", text="Seeds of the report; 5.")] = None,
    choose: Annotated[int | None, option("--choose", text="Seeds that choose a rate; 2.")] = None,
    window: Annotated[int | None, option("--window", text="Rates tried first; 5.")] = None,
    purse: Annotated[int | None, option("--purse", text="Rates tried at most; 9.")] = None,
    margin: Annotated[
        float | None, option("--margin", text="Nats that make no difference; half an sd.")
    ] = None,
    sampler: Annotated[
        str | None, option("--sampler", text="tpe: Optuna chooses the rates, not the grid.")
    ] = None,
    processes: Annotated[int | None, option("--processes", text="Runs at once; 1.")] = None,
    ray: Annotated[bool, option("--ray", text="Runs on a Ray cluster, or a local one.")] = False,
    out: Out = None,
    seed: Seed = None,
    json: Json = False,
    resume: Resume = None,
    overwrite: Overwrite = False,
) -> None:
    """Compare methods with the same tuning: paired seeds, intervals, a report."""
    options = {
        "methods": methods, "budget": budget, "match": match, "seeds": seeds, "choose": choose,
        "window": window, "purse": purse, "margin": margin, "sampler": sampler,
        "processes": processes, "ray": ray,
    }  # fmt: skip
    run_job("bench", words, config, job_flags(out, seed, False, json, resume, overwrite), options)


@command
def reproduce(
    slugs: Annotated[list[str] | None, typer.Argument(metavar="[SLUG]...")] = None,
    quick: Annotated[bool, option("--quick", text="See that it runs; no verdict.")] = False,
    full: Annotated[bool, option("--full", text="All arms, longer, twice the seeds.")] = False,
    processes: Annotated[int | None, option("--processes", text="Runs at once; 2.")] = None,
    out: Annotated[
        str | None, option("-o", "--out", text="Keep the documents here.", metavar="FOLDER")
    ] = None,
    json: Json = False,
) -> None:
    """Test papers' claims on a small scale: confirmed, not seen or refuted. All without SLUG."""
    budget = "quick" if quick else "full" if full else "default"
    show(
        call("reproduce", lambda job: job.run(slugs or (), budget, out, processes, json), json),
        json,
    )


# typer loads pydantic to read any parameter that is not a bool, its own --help among them. This
# command must answer at once, so NAME comes from the context and --help is ours.
@app.command(
    options_metavar="[NAME] [OPTIONS]",
    context_settings={"allow_extra_args": True},
)
def methods(
    context: typer.Context,
    json: Json = False,
    cite: Annotated[bool, option("--cite", text="BibTeX entries of the papers.")] = False,
    help: Help = False,
) -> None:
    """List what can be chosen on each axis; with NAME, all about one method."""
    show(call("methods", lambda job: job.run(context.args, cite=cite, json=json), json), json)


@app.command(context_settings=HELP)
def runs(
    folder: Annotated[str, typer.Argument(metavar="[DIR]", show_default=False)] = "runs",
    json: Json = False,
) -> None:
    """List the runs in a folder with recipe, state and score; DIR is runs/ without it."""
    show(call("runs", lambda job: job.run(folder, json), json), json)


@app.command(context_settings=HELP)
def doctor(json: Json = False) -> None:
    """Show versions, devices and extras, and what each extra unlocks."""
    document = call("doctor", lambda job: job.run(json), json)
    show(document, json)
    if code := int(document["exit"]):
        raise typer.Exit(code)


config_app = typer.Typer(
    help="See, describe or check the keys of a job.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(config_app, name="config")


@config_app.command("show", context_settings=JOB)
def config_show(words: JobWords = None, config: Config = None) -> None:
    """Print every key of a job with its value; what is auto is decided when the job runs."""
    command, rest = job_words(words)
    call(
        "schema", lambda schema: schema.show(to_job(command, rest, config, {}, partial=True)), False
    )


@config_app.command("validate", context_settings=JOB)
def config_validate(words: JobWords = None, config: Config = None) -> None:
    """Check files and keys without running anything."""
    command, rest = job_words(words)
    call(
        "schema",
        lambda schema: schema.validate(to_job(command, rest, config, {}, partial=True)),
        False,
    )


@config_app.command("schema")
def config_schema() -> None:
    """Print the JSON schema of all keys, with every method's fields."""
    call("schema", lambda schema: schema.schema(), False)


@config_app.command("import")
def config_import(
    file: Annotated[str, typer.Argument(metavar="FILE", show_default=False)],
) -> None:
    """Turn a file of PEFT, LLaMA-Factory or axolotl into a job file; say what is left out."""
    call("foreign", lambda foreign: foreign.run(file), False)


@app.callback()
def common(version: Version = False, help: Help = False) -> None:
    """Both flags answer by themselves, before any command."""


# From words to a job, and from its end to an exit code


def job_flags(
    out: str | None,
    seed: int | None,
    dry_run: bool,
    json: bool,
    resume: str | None,
    overwrite: bool,
) -> dict[str, Any]:
    """The flags that every training command has, by name."""
    return locals()


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
    from eckart.jobs.config import Flags, resolve
    from eckart.jobs.refuse import unknown_flag
    from eckart.jobs.words import is_setting

    for word, following in zip(words or (), [*(words or ()), ""][1:], strict=True):
        if word.startswith("-") and word != "-":
            raise unknown_flag(word, following)
    settings = [word for word in words or () if is_setting(word)]
    model, data, *more = [*(w for w in words or () if not is_setting(w)), None, None]
    if any(more):
        raise UsageError(
            f"unexpected word {more[0]}     command line",
            fix="After MODEL and DATA come key=value words; several files: data=[a.jsonl,b.jsonl]",
        )
    return resolve(command, model, data, settings, config or (), Flags(**flags), options, partial)


def job_words(words: list[str] | None) -> tuple[str, list[str]]:
    """COMMAND and the rest; finetune where a file is checked by itself."""
    from eckart.jobs.config import NEEDS

    first, *rest = words or ["finetune"]
    return (first, rest) if first in NEEDS else ("finetune", [first, *rest])


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
    if as_json:
        said = {"what": error.what, "facts": [list(f) for f in error.facts], "fix": error.fix}
        show({"command": command, "exit": error.exit_code, "error": said}, True)
    typer.echo(error.text(), err=True)
    raise typer.Exit(error.exit_code)


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
    app(prog_name="eckart")


if __name__ == "__main__":
    main()
