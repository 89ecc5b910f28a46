"""`eckart compress MODEL [DATA]`: fewer numbers in each matrix of a trained model.

The whole model is loaded, its matrices replaced by what the method makes of them, measured
on DATA where it is given, trained further where heal.steps asks for it, and saved as a
factored folder.
"""

from __future__ import annotations

import dataclasses
import shlex
import time
from pathlib import Path
from typing import Any

from eckart.errors import UsageError
from eckart.io import factored
from eckart.io.models import folder_of, holds_tokenizer, load_model, own_task, recognise_result
from eckart.io.opening import Opened
from eckart.io.run import Run
from eckart.io.tasks import TASKS
from eckart.io.text import Data
from eckart.jobs.settings import settle
from eckart.jobs.settings.config import Job
from eckart.jobs.training import held_out, modality, outcome, prepare
from eckart.jobs.training.classes import require_task
from eckart.jobs.training.fit import fit
from eckart.jobs.training.screen import Screen, amount
from eckart.jobs.training.train import size_line
from eckart.recipe import Compress, Handle, Recipe, attach

LOADING = "import eckart.hf, then {}.from_pretrained"


def run(job: Job) -> dict[str, Any]:
    """Everything from a job to a compressed model; the object of --json."""
    outcome.refuse_early(job)
    refuse_adapter(job)
    screen, begun = Screen(quiet=job.flags.json), time.monotonic()
    job = settle.precision(job, prepare.device())
    method = sized(job)
    require_data(job, method)
    model = load_model(model_of(job))
    before = sum(p.numel() for p in model.parameters())
    screen.line("model", size_line(Opened(model, None, str(job.model))), Path(str(job.model)).name)
    reader = reader_of(job)
    job, data = read(job, model, reader, screen)
    scores = {"before": measured(job, model, data), "after": None}

    recipe = Recipe(weights=method, update=job.heal.update.method)  # type: ignore[arg-type]
    calibration = prepare.calibration(job, model, data) if recipe.needs and data else None
    handle = attach(model, recipe, calibration=calibration, seed=job.train.seed)
    after = sum(p.numel() for p in model.parameters())
    screen.line("method", sizes(handle, before, after), method.slug)
    if not handle.attached:
        raise UsageError(
            "no matrix would become smaller",
            [(f"{key} = {value}", "") for key, value in budget_of(job).items()],
            "Type a smaller keep= or rank=, or a larger error=.",
        )
    if job.flags.dry_run:
        return document(job, screen, handle, scores, begun)

    with Run.create(job.out, job.flags.overwrite) as run:
        run.write_config(job.dump())
        run.write_resolved(job.dump_resolved())
        if data and job.heal.steps:
            scores["compressed"] = measured(job, model, data)
            fit(healing(job, data, handle), run, handle, data, screen)
        scores["after"] = measured(job, model, data)
        factored.save(handle, run.final, overwrite=True, tokenizer=reader)
        found = document(job, screen, handle, scores, begun, run)
        outcome.record(run, found, "factored")
    report(screen, found)
    return found


def refuse_adapter(job: Job) -> None:
    """Raise UsageError where the training after it is to have a weights method of its own."""
    if (name := job.heal.weights.name) != "auto":
        raise UsageError(
            "a compression is healed as it is",
            [(f"heal.weights = {name}", "would be a term on top")],
            "Leave it out: what is left of each matrix is trained.",
        )


def require_data(job: Job, method: Compress) -> None:
    """Raise UsageError where the method or the training after it needs DATA and there is none."""
    if job.data.train:
        return
    measured = " and ".join(sorted(method.needed - {"horizon"}))
    if measured:
        raise UsageError(
            f"{method.slug} measures {measured} on data",
            [(f"compress = {method.slug}", "no DATA")],
            f"Type eckart compress {shlex.quote(str(job.model))} DATA method={method.slug}",
        )
    if job.heal.steps:
        raise UsageError(
            "healing trains on text",
            [(f"heal.steps = {job.heal.steps}", "no DATA")],
            "Type eckart compress MODEL DATA heal.steps=...",
        )


def model_of(job: Job) -> str:
    """The model to compress. UsageError for what is none, or is none yet."""
    source = recognise_result(job.model or "")
    if source.kind in ("peft", "native"):
        raise UsageError(
            "this is an adapter, not a model",
            [(source.path, f"for {source.base or 'a base it does not name'}")],
            f"Merge it first: eckart convert {source.path} --to dense -o MERGED",
        )
    if source.kind == "factored":
        raise UsageError(
            "this model is made of thin matrices already",
            [(source.path, "")],
            "Compress the model that it was made from, or fold it first: "
            f"eckart convert {source.path} --to dense -o FOLDED",
        )
    if source.kind in ("preset", "config"):
        raise UsageError(
            "this is a shape without weights",
            [(source.path, source.kind)],
            f"Train it first: eckart pretrain {source.path} DATA",
        )
    return source.path


def sized(job: Job) -> Compress:
    """The method, with the job's size where it has fields for one."""
    method = job.choices["compress"].method
    assert isinstance(method, Compress)
    return dataclasses.replace(method, **budget_of(job))


def budget_of(job: Job) -> dict[str, Any]:
    """The keys of the job's size that the method has."""
    method: Any = job.choices["compress"].method
    names = {f.name for f in dataclasses.fields(method)}
    return {k: v for k, v in dataclasses.asdict(job.compress).items() if k in names}


def reader_of(job: Job) -> Any:
    """What reads the model's inputs, or None where there is no tokenizer and no text is read."""
    task = own_task(job.model or "")
    if job.data.train:
        require_task(job)
        return modality.reader_of(job)
    there = TASKS[task].sees != "text" or holds_tokenizer(folder_of(job.model or ""))
    return modality.beside(job.model or "", task) if there else None


def read(job: Job, model: Any, reader: Any, screen: Screen) -> tuple[Job, Data | None]:
    """DATA, where it is given."""
    if not job.data.train:
        return job, None
    job = modality.settled(job, model, prepare.device())
    data = modality.read_data(job, reader, model)
    name, _, summary = data.summary.partition(": ")
    screen.line("data", summary, name)
    return settle.metrics(job, held_out.names(data)), data


def measured(job: Job, model: Any, data: Data | None) -> dict[str, Any] | None:
    """The model's held-out numbers, where there is data."""
    return held_out.measure(model, data, 8, job.eval.metrics) if data else None


def healing(job: Job, data: Data, handle: Handle) -> Job:
    """The job as a training of the compressed model: heal's keys in train's place."""
    train = dataclasses.replace(job.heal.train, steps=job.heal.steps)
    job = dataclasses.replace(job, train=train)
    job = settle.horizon(job, len(data.train), handle.recipe)
    handle.steps, handle.lr = int(job.train.steps), float(job.train.lr)
    return prepare.into_memory(job, handle, data)[0]


def sizes(handle: Handle, before: int, after: int) -> str:
    """`28 of 28 matrices; 2.2 M -> 1.6 M parameters (73 %)`."""
    matrices = f"{len(handle.attached)} of {len(handle.sites)} matrices"
    return f"{matrices}; {amount(before)} -> {amount(after)} parameters ({after / before:.0%})"


def document(
    job: Job,
    screen: Screen,
    handle: Handle,
    scores: dict[str, Any],
    begun: float,
    run: Run | None = None,
) -> dict[str, Any]:
    """The object of --json."""
    return {
        "run": str(run.folder) if run else None,
        "command": job.command,
        "exit": 0,
        "recipe": outcome.recipe_of(job),
        "seconds": time.monotonic() - begun,
        "parameters": outcome.parameters_of(handle),
        "eval": scores,
        "warnings": list(screen.warnings),
    }


def report(screen: Screen, found: dict[str, Any]) -> None:
    """The last lines: what came out, and what to type next."""
    folder = outcome.shown(found["run"])
    task = own_task(found["run"])
    before, after = found["eval"]["before"], found["eval"]["after"]
    gained = f"held out {before['loss']:.3f} -> {after['loss']:.3f}; " if before and after else ""
    screen.line(
        "done", f"{gained}factored: {LOADING.format(TASKS[task].auto)}", folder, result=True
    )
    screen.line("next", outcome.asking(found["run"], task), result=True)
