"""Training a job from a loaded model to a finished run.

    data -> recipe attached -> `auto` keys decided -> training -> final/

`finetune` and `pretrain` share it: they differ in how the model is made and what is written.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from eckart.io.data import Data
from eckart.io.models import name_of
from eckart.io.opening import Opened
from eckart.io.run import Run
from eckart.jobs.measuring.memory import (
    by_category,
    described,
    in_words,
    parameter_count,
    room,
)
from eckart.jobs.settings import settle
from eckart.jobs.settings.config import Job
from eckart.jobs.training import continual, held_out, launch, modality, observe, outcome, prepare
from eckart.jobs.training.fit import fit
from eckart.jobs.training.page import write_page
from eckart.jobs.training.screen import Screen, amount, in_bits, rate
from eckart.jobs.training.stages import (
    Context,
    as_handle,
    memory_of,
    metrics_of,
    run_stages,
    scores,
)
from eckart.jobs.training.trackers import require_trackers
from eckart.recipe import Handle

Write = Callable[[Run, Handle, Any], str]  # (run, handle, reader) -> the format of final/


def begin(job: Job) -> tuple[Job, Screen]:
    """Check the run folder and decide what needs no model; a resumed run's values are kept."""
    launch.follow_starter()
    require_trackers(job)
    if launch.is_first():
        outcome.refuse_early(job)
    if job.flags.resume:
        job = settle.as_it_began(job, Path(job.flags.resume))
    screen, job = Screen(job.flags.json or not launch.is_first()), settle.layerwise(job)
    if "train.clip" in job.settled:
        screen.line("clip", job.settled["train.clip"], "none")
    return settle.precision(job, prepare.device()), screen


def train(job: Job, screen: Screen, opened: Opened, reader: Any, write: Write) -> dict[str, Any]:
    """Train the job's model and write the result. Returns the --json document."""
    device = prepare.device()
    job = prepared(job, screen, opened, reader, device)
    data = modality.read_data(job, reader, opened.model)
    name, _, summary = data.summary.partition(": ")
    screen.line("data", "\n".join([summary, *rows_lines(data)]), name)

    job = settle.metrics(job, held_out.names(data))
    before = {}
    if not job.flags.resume:
        before = held_out.measure(opened.model, data, 8, job.eval.metrics)
    begun = None if job.flags.dry_run else observe.beginnings(data)
    wrote = observe.continued(opened.model, reader, begun, screen) if before else []
    job = settle.horizon(job, len(data.train), job.recipe())
    prepare.require_unfinished(job)
    handle = prepare.attached(job, opened, data)
    screen.line("method", str(handle.coverage), method_name(job))

    job, parts = prepare.into_memory(job, handle, data)
    estimate = sum(parts.values())
    screen.line("memory", described(parts, room(device)[1]))
    screen.line("lr", job.settled.get("train.lr", "as given"), rate(float(job.train.lr)))
    screen.line("steps", steps_line(job), str(job.train.steps))

    parameters = outcome.parameters_of(handle)
    if job.flags.dry_run:
        return outcome.document(job, screen, parameters, estimate)
    with launch.shared(lambda: outcome.open_run(job, data, parameters, estimate)) as run:
        before = before or (run.facts.get("eval") or {}).get("before") or {}
        run.record(eval={"before": before, "after": None})
        wrote = wrote or run.facts.get("wrote_before") or []
        run.record(wrote_before=wrote)
        fitted = fit(job, run, handle, data, screen, prepare.resume_from(job))
        size = int(job.train.batch_size)
        after = held_out.measure(handle.model, data, size, job.eval.metrics)
        outcome.say_nothing_gained(screen, before, after)
        form = write(run, handle, data.keeping(reader))
        found = outcome.document(job, screen, parameters, estimate, run, fitted, before, after)
        memory = found["memory"] = {"estimated": parts, "measured": fitted.memory}
        outcome.record(run, found, form)
        after_it = observe.continued(handle.model, reader, begun, screen)
        if launch.is_first():
            said = observe.samples(begun, reader, wrote, after_it)
            write_page(run, job, handle, memory, samples=said)
    if fitted.memory:
        screen.line("memory", by_category(memory), "measured")
    outcome.report(screen, found, form, fitted)
    return found


def train_in_stages(
    job: Job,
    screen: Screen,
    opened: Opened,
    reader: Any,
    write: Write,
    original: Callable[[], Any],
) -> dict[str, Any]:
    """As `train`, for a method of several stages; each source of the data is a task.

    `original` loads a fresh copy of the model, for stages that start from it.
    """
    device = prepare.device()
    job = prepared(job, screen, opened, reader, device)
    tasks = modality.read_tasks(job, reader, opened.model)
    first = next(iter(tasks.values()))
    job = settle.metrics(job, held_out.names(first))
    for name, data in tasks.items():
        screen.line("task", data.summary.partition(": ")[2], name)
    weights: Any = job.choices["weights"].method
    screen.line("stages", ", ".join(stage.name for stage in weights.stages), weights.slug)
    if job.flags.dry_run:
        return {
            "run": None,
            "command": job.command,
            "exit": 0,
            "recipe": outcome.recipe_of(job),
            "stages": [stage.name for stage in weights.stages],
            "warnings": list(screen.warnings),
        }
    with launch.shared(lambda: outcome.open_run(job, first, {}, 0)) as run:
        begun = time.monotonic()
        folder = run.folder / "stages"
        context = Context(job, folder, lambda: original().to(device), tasks, screen)
        before = scores(context, opened.model)
        work, measured = run_stages(context)
        after = scores(context, work.model)
        handle = as_handle(work)
        form = write(run, handle, first.keeping(reader))
        memory = memory_of(context)
        estimated, peak = (
            max((sum(p.values()) for name, p in memory.items() if name.endswith(kind)), default=0)
            for kind in ("estimated", "measured")
        )
        found = outcome.document(job, screen, outcome.parameters_of(handle), estimated, run)
        found |= {"seconds": time.monotonic() - begun, "tasks": measured}
        found["peak_memory_bytes"] = peak
        found["eval"] = {
            "before": continual.overall(before) or None,
            "after": continual.overall(after) or None,
        }
        found["stream"] = continual.summary(before, [row["held_out"] for row in measured])
        outcome.record(run, found, form)
        if launch.is_first():
            write_page(run, job, handle, memory, metrics_of(context))
    for name in (name for name in tasks if before[name]):
        gained = f"held out {before[name]['loss']:.3f} -> {after[name]['loss']:.3f}"
        screen.line("task", gained, name, result=True)
    if found["stream"] and len(tasks) > 1:
        continual.show(screen, found["stream"])
    said = f"{in_words(peak)} measured, {in_words(estimated)} estimated" if peak else ""
    facts = [said, f"{form}: {outcome.LOADED_BY[form]}"]
    screen.line("done", "; ".join(f for f in facts if f), outcome.shown(found["run"]), result=True)
    outcome.following(screen, found["run"], form)
    return found


def prepared(job: Job, screen: Screen, opened: Opened, reader: Any, device: torch.device) -> Job:
    """Move the model to its device, print its size, and decide the length of rows."""
    opened.model.to(device)
    modality.require_fit(job, reader, opened.model)
    carried = f", continued with {opened.handle.weights.slug}" if opened.handle else ""
    screen.line("model", size_line(opened) + carried, name_of(opened.base))
    return modality.settled(job, opened.model, device)


def size_line(opened: Opened) -> str:
    """`134.5 M parameters, bf16`: the model's own, without those of an adapter on it."""
    dtype = next(opened.model.parameters()).dtype
    return f"{amount(parameter_count(opened.model, opened.handle))} parameters, {in_bits(dtype)}"


def rows_lines(data: Data) -> list[str]:
    """Number of rows, and the start of the first; « and » mark the tokens with a loss."""
    begin = " ".join(data.example.split())
    begin = begin if len(begin) <= 80 else begin[:79] + "…"
    marks = " (« » is learnt)" if "«" in begin else ""
    return [f"{data.unit(len(data.train))}, the first{marks}: {begin}"]


def method_name(job: Job) -> str:
    """`lora`, or `dense + galore` where the update is not the plain one."""
    names = [job.choices["weights"].name]
    if "update.name" not in job.settled:
        names.append(job.choices["update"].name)
    return " + ".join(names + [c.name for c in job.objectives])


def steps_line(job: Job) -> str:
    """The reason for the number of steps, and how a step is split into batches."""
    size, parts = job.train.batch_size, job.train.accumulate
    split = f"batch {size}" + (f" x {parts} accumulated" if parts != 1 else "")
    return f"{job.settled.get('train.steps', 'as given')}; {split}"
