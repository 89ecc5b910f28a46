"""Options and arguments of commands, each defined once, and their shell completion."""

from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any

import typer

COMPLETING = "_ECKART_COMPLETE"  # set by a shell that asks for completions


def option(
    name: str, kind: Any, *flags: str, text: str, metavar: str | None = None, default: Any = None
) -> Parameter:
    """An option of a type. Its default is None, or False for a switch."""
    metavar = metavar or {int: "N", float: "X"}.get(kind)
    about = typer.Option(*flags, help=text, metavar=metavar, show_default=False)
    return parameter(name, kind, about, default)


def parameter(name: str, kind: Any, about: Any, default: Any = None) -> Parameter:
    default = False if kind is bool else default
    annotation = Annotated[kind if kind is bool else kind | None, about]  # type: ignore[valid-type]
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def word(name: str, kind: Any, default: Any = None, completion: Any = None) -> Parameter:
    """A positional argument, shown in the usage line only."""
    about = typer.Argument(
        metavar=name.upper(), hidden=True, show_default=False, autocompletion=completion
    )
    return parameter(name, kind, about, default)


def completed(context: typer.Context, incomplete: str) -> list[Any]:
    """Completions of a job's next word; without any the shell completes file names."""
    from eckart.jobs.settings.completion import completions

    typed = [str(word) for word in context.params.get("words") or ()]
    return completions(context.command.name or "", typed, incomplete)


def named(incomplete: str) -> list[str]:
    """Completions of a method's name."""
    from eckart.jobs.settings.completion import method_names

    return [name for name in method_names() if name.startswith(incomplete)]


WORDS = word("words", list[str], completion=completed)  # MODEL DATA KEY=VALUE ...
CONFIG = option(
    "config", list[Path], "-c", "--config", metavar="FILE",
    text="A YAML file of keys; repeatable, later wins.",
)  # fmt: skip
OUT = option(
    "out", str, "-o", "--out", text="The run's folder; runs/0001 and on.", metavar="FOLDER"
)
RESULT = option(
    "out", str, "-o", "--out", text="The folder to write; SOURCE-FORMAT.", metavar="FOLDER"
)
PICTURE = option(
    "out", str, "-o", "--out", text="Draw it: picture.html or picture.svg.", metavar="FILE"
)
SEED = option("seed", int, "--seed", text="Same as train.seed=N.")
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
    option(
        "budget", str, "--budget", metavar="AMOUNT",
        text="steps=300, tokens=1e6, seconds=60 or bytes=2GB.",
    ),
    option(
        "match", str, "--match", metavar="WHAT",
        text="parameters or memory: sizes that equal the baseline's.",
    ),
    option("seeds", int, "--seeds", text="Seeds of the report; 5."),
    option("choose", int, "--choose", text="Seeds that choose a rate; 2."),
    option("window", int, "--window", text="Rates tried first; 5."),
    option("purse", int, "--purse", text="Rates tried at most; 9."),
    option(
        "metric", str, "--metric", metavar="NAME",
        text="accuracy: rates and verdicts by it, not by the loss.",
    ),
    option("margin", float, "--margin", text="What makes no difference; half an sd."),
    option(
        "sampler", str, "--sampler", metavar="NAME",
        text="tpe: Optuna chooses the rates, not the grid.",
    ),
    PROCESSES,
    option("ray", bool, "--ray", text="Runs by Ray Tune on a cluster, or here."),
)  # fmt: skip
