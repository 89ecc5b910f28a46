"""Results of a training: final/, the lines printed at the end, and the --json document."""

from __future__ import annotations

import dataclasses
import os
import shlex
from collections.abc import Mapping
from typing import Any

from eckart.io.export import export, possible
from eckart.io.models import own_task
from eckart.io.run import Run, require_place
from eckart.io.tasks import TASKS
from eckart.io.text import Data
from eckart.jobs.measuring.memory import in_words
from eckart.jobs.settings.config import Job
from eckart.jobs.training import launch
from eckart.jobs.training.fit import Fitted
from eckart.jobs.training.screen import Screen
from eckart.recipe import Handle


def refuse_early(job: Job) -> None:
    """Raise what opening a new run's folder would, before anything is loaded."""
    if not job.flags.resume:
        require_place(job.out, job.flags.overwrite)


def open_run(job: Job, data: Data, parameters: Mapping[str, Any], estimate: int) -> Run:
    """Create or reopen the run's folder, and record the job in it."""
    run = (
        Run.resume(job.flags.resume)
        if job.flags.resume
        else Run.create(job.out, job.flags.overwrite)
    )
    run.write_config(job.dump())
    run.write_resolved(job.dump_resolved())
    run.record(
        command=job.command,
        seed=job.train.seed,
        data={"sha256": data.sha256, "hashes": dict(data.hashes), "rows": len(data.train)},
        recipe=recipe_of(job),
        parameters=dict(parameters),
        estimated_memory_bytes=estimate,
    )
    return run


def write_final(run: Run, handle: Handle, tokenizer: Any) -> str:
    """Write final/ of a finetuned model: an adapter without its base, if the method allows it.

    Returns the format. The tokenizer is saved too, with the chat template used in training.
    """
    dropped = handle.weights.base == "dropped"
    return write(run, handle, tokenizer, *(("factored",) if dropped else ("peft", "native")))


def write_whole(run: Run, handle: Handle, tokenizer: Any) -> str:
    """Write final/ of a pretrained model, whole, since its base is saved nowhere else.

    Factored if the terms replace the dense matrices, else merged into them if possible.
    """
    dropped = handle.weights.base == "dropped"
    wanted = ("factored", "dense") if dropped else ("dense", "factored")
    return write(run, handle, tokenizer, *wanted)


def write(run: Run, handle: Handle, tokenizer: Any, *wanted: str) -> str:
    """Write the first of these formats that is possible; dense without terms."""
    can = possible(handle)
    form = next(f for f in (wanted if handle.attached else ("dense",)) if f in can)
    if launch.is_first():
        export(handle, run.final, form, tokenizer, overwrite=True)
    launch.wait_for_all()
    return form


LOADED_BY = {
    "peft": "plain PEFT loads it",
    "dense": "plain transformers loads it",
    "factored": "transformers loads it after `import eckart.hf`",
    "native": "eckart.load() loads it",
}


def recipe_of(job: Job) -> dict[str, Any]:
    """{axis: {name, fields}} of the chosen methods."""
    chosen = {
        axis: {"name": choice.name, **dataclasses.asdict(choice.method)}
        for axis, choice in job.choices.items()
        if choice.method is not None
    }
    objectives = [
        {"name": c.name, **dataclasses.asdict(c.method)} for c in job.objectives if c.method
    ]
    return {**chosen, "objective": objectives}


def parameters_of(handle: Handle) -> dict[str, Any]:
    """Numbers of parameters: total, trained, and by role."""
    coverage = handle.coverage
    trainable = sum(p.numel() for p in handle.trainable().values())
    by_role = {role: dict(row) for role, row in coverage.by_role.items()}
    return {"total": coverage.parameters, "trainable": trainable, "by_role": by_role}


def document(
    job: Job,
    screen: Screen,
    parameters: Mapping[str, Any],
    estimate: int,
    run: Run | None = None,
    fitted: Fitted | None = None,
    before: Mapping[str, Any] | None = None,
    after: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The --json document. Values that a dry run does not have are null."""
    planned = None if job.train.steps == "auto" else int(job.train.steps)
    return {
        "run": str(run.folder) if run else None,
        "command": job.command,
        "exit": 0,
        "recipe": recipe_of(job),
        "steps": fitted.steps if fitted else planned,
        "seconds": fitted.seconds if fitted else None,
        "tokens_per_second": (fitted.tokens_per_second or None) if fitted else None,
        "peak_memory_bytes": fitted.peak_bytes if fitted else None,
        "estimated_memory_bytes": estimate,
        "parameters": dict(parameters),
        "eval": {"before": before or None, "after": after or None},
        "warnings": list(screen.warnings),
    }


def record(run: Run, found: Mapping[str, Any], form: str) -> None:
    """Write the document to run.json, without the exit code, which is recorded at the end."""
    run.record(**{k: v for k, v in found.items() if k not in ("run", "exit")}, format=form)


def say_nothing_gained(
    screen: Screen, before: Mapping[str, Any] | None, after: Mapping[str, Any] | None
) -> None:
    """Warn if the held-out loss is not lower than before training."""
    if before and after and after["loss"] >= before["loss"]:
        screen.warn(
            "no checkpoint is better than the model was before: try another train.lr, or more data"
        )


def report(screen: Screen, found: Mapping[str, Any], form: str, fitted: Fitted) -> None:
    """Print the last two lines: the result, and the command to type next."""
    folder = shown(found["run"])
    before, after = found["eval"]["before"], found["eval"]["after"]
    gained = f"held out {before['loss']:.3f} -> {after['loss']:.3f}" if before and after else ""
    if gained and "accuracy" in after:
        gained += f", right {before['accuracy']:.1%} -> {after['accuracy']:.1%}"
    if fitted.best_step and fitted.best_step != fitted.steps:
        gained += f" (best, step {fitted.best_step})"
    measured, estimated = fitted.peak_bytes, found["estimated_memory_bytes"]
    memory = f"{in_words(measured)} measured, {in_words(estimated)} estimated" if measured else ""
    facts = [gained, memory, f"{form}: {LOADED_BY[form]}"]
    screen.line("done", "; ".join(f for f in facts if f), folder, result=True)
    following(screen, found["run"], form)


def following(screen: Screen, run: str, form: str) -> None:
    """Print the command to type next."""
    words = [asking(run, own_task(run))]
    words += [f"eckart convert {shown(run)} --to dense"] if form != "dense" else []
    screen.line("next", "   |   ".join(words), result=True)


def asking(model: str, task: str) -> str:
    """The command that shows a model's output."""
    if not (TASKS[task].language or TASKS[task].classes):  # an encoder says nothing by itself
        return f"eckart inspect {shown(model)}"
    prompt = "TEXT" if TASKS[task].sees == "text" else "IMAGE"
    return f"eckart generate {shown(model)} -p {prompt}"


def shown(folder: str) -> str:
    """A path quoted for a shell, relative to the working directory if it is below it."""
    relative = os.path.relpath(folder)
    return shlex.quote(folder if relative.startswith("..") else relative)
