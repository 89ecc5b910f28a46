"""The commands that run no job: estimate, reproduce, methods, runs, doctor, config."""

import os
from inspect import Parameter
from typing import Any

import typer

from eckart.cli import running
from eckart.cli.app import Help, app, command
from eckart.cli.jobs import JOB, MODEL_DATA
from eckart.cli.options import (
    COMPLETING,
    CONFIG,
    FIT,
    JSON,
    PROCESSES,
    WORDS,
    named,
    option,
    word,
)
from eckart.errors import UsageError


@command(
    WORDS,
    CONFIG,
    FIT,
    JSON,
    words=f"COMMAND {MODEL_DATA}",
    examples=[
        "eckart estimate finetune ./model chat.jsonl method=dora",
        "eckart estimate finetune ./model --fit 24GB",
    ],
    context_settings=JOB,
)
def estimate(words: Any, config: Any, fit: str | None, json: bool) -> None:
    """Say what a job will take, before anything is loaded. Bytes by category, and time."""
    name, rest = running.job_words(words)
    options = {"fit": fit} if fit else {}
    flags = {"json": json}
    document = running.call(
        "estimate",
        lambda module, job: module.run(job),
        json,
        lambda: running.to_job(name, rest, config, flags, options, partial=True),
    )
    running.show(document, json)


@command(
    word("slugs", list[str], completion=named),
    option("quick", bool, "--quick", text="See that it runs; no verdict."),
    option("full", bool, "--full", text="All arms, longer, twice the seeds."),
    PROCESSES,
    option("out", str, "-o", "--out", text="Keep the documents here.", metavar="FOLDER"),
    JSON,
    words="[METHOD]...",
)
def reproduce(
    slugs: Any, quick: bool, full: bool, processes: int | None, out: str | None, json: bool
) -> None:
    """Test papers' claims on a small scale. Confirmed, not seen or refuted; all without METHOD."""
    if quick and full:
        raise UsageError("--quick and --full exclude each other     command line", fix="Leave one.")
    budget = "quick" if quick else "full" if full else "default"
    document = running.call(
        "reproduce", lambda job: job.run(slugs or (), budget, out, processes, json), json
    )
    running.show(document, json)


# typer imports pydantic for any parameter that is not a bool, and for its --help. This command
# must be fast, so it has its own --help and takes NAME from the context, except when a shell asks
# for completions.
NAMES = [word("names", list[str], completion=named)] if COMPLETING in os.environ else []


@command(
    Parameter("context", Parameter.KEYWORD_ONLY, annotation=typer.Context),
    JSON,
    option("cite", bool, "--cite", text="BibTeX entries of the papers."),
    *NAMES,
    Parameter("help", Parameter.KEYWORD_ONLY, default=False, annotation=Help),
    words="[NAME]...",
    context_settings={"allow_extra_args": True},
)
def methods(context: typer.Context, json: bool, cite: bool, help: bool, **names: Any) -> None:
    """List what can be chosen on each axis, or all about one."""
    document = running.call(
        "methods", lambda job: job.run(context.args, cite=cite, json=json), json
    )
    running.show(document, json)


@command(word("folder", str, "runs"), JSON, words="[FOLDER]")
def runs(folder: str, json: bool) -> None:
    """List the runs in a folder with recipe, state and score. FOLDER is runs/ without it."""
    running.show(running.call("runs", lambda job: job.run(folder, json), json), json)


@command(JSON)
def doctor(json: bool) -> None:
    """Show versions, devices, extras and what each unlocks."""
    document = running.call("doctor", lambda job: job.run(json), json)
    running.show(document, json)
    if code := int(document["exit"]):
        raise typer.Exit(code)


config_app = typer.Typer(
    help="See, describe, check or import the keys of a job.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(config_app, name="config")
OF_CONFIG: dict[str, Any] = {
    "words": f"COMMAND {MODEL_DATA}", "of": config_app, "context_settings": JOB
}  # fmt: skip


@command(WORDS, CONFIG, name="show", **OF_CONFIG)
def config_show(words: Any, config: Any) -> None:
    """Print every key of a job with its value. What is auto is decided when the job runs."""
    of_keys(words, config, "show")


@command(WORDS, CONFIG, name="validate", **OF_CONFIG)
def config_validate(words: Any, config: Any) -> None:
    """Check files and keys without running anything."""
    of_keys(words, config, "validate")


def of_keys(words: Any, config: Any, action: str) -> None:
    """Run an action on the keys of a job that may be incomplete."""
    name, rest = running.job_words(words)
    running.call(
        "schema",
        lambda schema: getattr(schema, action)(
            running.to_job(name, rest, config, {}, partial=True)
        ),
        False,
    )


@command(of=config_app, name="schema")
def config_schema() -> None:
    """Print the JSON schema of all keys, with every method's fields."""
    running.call("schema", lambda schema: schema.schema(), False)


@command(word("file", str, Parameter.empty), words="FILE", of=config_app, name="import")
def config_import(file: str) -> None:
    """Turn a file of another tool into a job file. Of PEFT, LLaMA-Factory or axolotl; says what
    is left out."""
    running.call("foreign", lambda foreign: foreign.run(file), False)
