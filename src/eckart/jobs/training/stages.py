"""A job of several stages, declared by its method: operations and trainings in sequence.

    stages/
      00-prune/        state/ (the model after it, its output), closed with a manifest
      01-align-news/   run.json, metrics.jsonl, checkpoints/, state/
      ...

A stage with a complete state/ is skipped when the run is resumed; an interrupted training stage
continues from its checkpoint. Adjacent stages with repeat="tasks" run once for each source of
the data, in order, and all tasks are evaluated after each. Shapes are constant within a stage.
Between stages the optimizer starts fresh, or keeps the moments of parameters that still exist.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from eckart.errors import UsageError
from eckart.io.folder import close_with_manifest, manifest_holds, write_folder, write_json
from eckart.io.headers import read_json
from eckart.io.run import METRICS, SPECTRA, Run, latest_checkpoint, read_lines
from eckart.io.tensors import read_tensors, write_tensors
from eckart.io.text import Data
from eckart.jobs.measuring.devices import model_device
from eckart.jobs.measuring.memory import Line, described, room
from eckart.jobs.measuring.norms import hold_statistics
from eckart.jobs.settings import settle
from eckart.jobs.settings.config import Job
from eckart.jobs.training import held_out, launch, prepare
from eckart.jobs.training.checkpoints import OPTIMIZER, read_state
from eckart.jobs.training.fit import fit
from eckart.jobs.training.screen import Screen
from eckart.linear.narrow import take_shapes
from eckart.linear.sites import dequantised, quantised
from eckart.recipe import Handle, Recipe, Stage, Work, attach, attach_from, registry

ORIGINAL = "original"  # the base of a stage that starts from the model as it was loaded
MODEL, OUTPUT, STRUCTURE = "model.safetensors", "output.safetensors", "structure.json"


@dataclass(frozen=True)
class StageRun:
    """One execution of a stage, for one task if the stage is repeated; gives the folder's name."""

    number: int
    stage: Stage
    task: str = ""
    last: bool = False  # the last stage of a task: all tasks are evaluated after it

    @property
    def name(self) -> str:
        return "-".join(
            [f"{self.number:02d}", self.stage.name, *([self.task] if self.task else [])]
        )


@dataclass(frozen=True)
class Context:
    """What all stages share. `original` loads a fresh model; `data` is each task's, by name."""

    job: Job
    folder: Path
    original: Callable[[], nn.Module]
    data: Mapping[str, Data]
    screen: Screen

    @property
    def weights(self) -> Any:
        """The method that declares the stages."""
        return self.job.choices["weights"].method


def schedule(stages: Sequence[Stage], tasks: Sequence[str]) -> list[StageRun]:
    """All stages in order of execution. UsageError if one refers to a stage not before it."""
    check(stages)
    found: list[StageRun] = []
    for repeated, group in groupby(stages, key=lambda stage: stage.repeat):
        block = list(group)
        for task in tasks if repeated else [""]:
            for stage in block:
                last = bool(repeated) and stage is block[-1]
                found.append(StageRun(len(found), stage, task, last))
    return found


def check(stages: Sequence[Stage]) -> None:
    """Raise UsageError if a stage refers to one that does not come before it."""
    before = [ORIGINAL]
    for stage in stages:
        for name in (*stage.reads, *([stage.base] if stage.base else [])):
            if name not in before:
                raise UsageError(
                    "a stage names one that does not come before it",
                    [(stage.name, f"names {name}; before it: {', '.join(before)}")],
                )
        before.append(stage.name)


def run_stages(context: Context) -> tuple[Work, list[dict[str, Any]]]:
    """Run all unfinished stages. Returns the final model, and the scores after each task."""
    planned = schedule(context.weights.stages, list(context.data))
    work: Work | None = None
    measured: list[dict[str, Any]] = []
    for current in planned:
        folder = context.folder / current.name
        if manifest_holds(folder / "state"):
            work = None  # loaded only if the next stage needs it
        else:
            work = start(context, planned, current, work)
            if current.stage.kind == "train":
                work = train(context, planned, current, work)
            else:
                work = operate(context, work)
            if launch.is_first():
                save(folder, work, scores(context, work.model) if current.last else {})
            launch.wait_for_all()
            context.screen.line("stage", "done", current.name)
        if current.last:
            after = read_json(folder / "state" / "scores.json")
            measured.append({"after": current.task, "held_out": after})
    work = work or load(context, planned[-1])
    return work, measured


def start(context: Context, planned: list[StageRun], current: StageRun, work: Work | None) -> Work:
    """The input of a stage: its model, and the outputs of the stages that it reads."""
    before = [p for p in planned if p.number < current.number]
    if current.stage.base == ORIGINAL or not before:
        work = Work(current.stage, context.original())
    elif current.stage.base:
        work = load(context, [p for p in before if p.stage.name == current.stage.base][-1])
    elif work is None:
        work = load(context, before[-1])
    read = {
        p.stage.name: read_tensors(context.folder / p.name / "state" / OUTPUT)
        for p in before
        if p.stage.name in current.stage.reads
    }
    model, data = work.model, task_data(context, current.task)
    return dataclasses.replace(
        work,
        stage=current.stage,
        task=current.task,
        read=read,
        output={},
        batches=lambda: prepare.calibration(context.job, model, data),
    )


def task_data(context: Context, task: str) -> Data:
    """A task's data; that of the first source for a stage that is not repeated."""
    return context.data[task] if task else next(iter(context.data.values()))


# --- one stage -----------------------------------------------------------------------------


def operate(context: Context, work: Work) -> Work:
    """Run a stage that is one operation of the method, without training."""
    after: Work = context.weights.operate(work)
    return after


def train(context: Context, planned: list[StageRun], current: StageRun, work: Work) -> Work:
    """Run a training stage, from its checkpoint if it has one; the output is what was trained."""
    folder, data = context.folder / current.name, task_data(context, current.task)
    job = stage_job(context.job, current.stage, data)
    checkpoint = latest_checkpoint(folder)
    handle = work.handle or attached(context, job, work, data, checkpoint)
    train_only(handle, current.stage.train)
    opened = Run.resume if (folder / "run.json").is_file() else Run.create
    with launch.shared(lambda: opened(folder)) as run:
        run.write_resolved(job.dump_resolved())
        moments = {}
        if current.stage.optimizer == "migrate" and checkpoint is None:
            moments = moments_before(context, planned, current)
        told = run.facts.get("memory") or {}
        if checkpoint is None:  # resumed terms get their values later, in fit()
            parts = prepare.into_memory(job, handle, data)[1]
            context.screen.line(
                "memory", described(parts, room(model_device(handle.model))[1]), current.name
            )
            told = {"estimated": parts}
            run.record(memory=told)
        fitted = fit(job, run, handle, data, context.screen, checkpoint, moments)
        run.record(memory={**told, "measured": fitted.memory}, seconds=fitted.seconds)
    return dataclasses.replace(
        work, handle=handle, model=handle.model, output=dict(handle.named_state())
    )


def stage_job(job: Job, stage: Stage, data: Data) -> Job:
    """The job with the stage's options (steps, lr, ...) in `train`, and its `auto` keys decided."""
    for key, value in stage.options.items():
        job = job.settle(f"train.{key}", value, f"the stage {stage.name}")
    job = settle.horizon(job, len(data.train), job.recipe())
    rows = settle.rows_per_step(job, len(data.train))
    # Memory differs between stages, so a step is one batch unless the job splits it.
    return settle.batch(job, rows, 0, lambda checkpointing: Line(0, 1), 2 * rows, False)


def attached(context: Context, job: Job, work: Work, data: Data, checkpoint: Path | None) -> Handle:
    """Attach the recipe to a model without terms: new, or with a checkpoint's structure."""
    hold_statistics(work.model)
    recipe = recipe_of(context, work.stage)
    if checkpoint is not None:
        return attach_from(work.model, read_state(checkpoint)["structure"], recipe=recipe)
    return prepare.attached_anew(job, work.model, recipe, data)


def recipe_of(context: Context, stage: Stage) -> Recipe:
    """The job's recipe; without quantisation if the stage trains the base itself."""
    recipe = context.job.recipe()
    if stage.train == "terms" or recipe.precision is None or not recipe.precision.converts:
        return recipe
    return dataclasses.replace(recipe, precision=None)


def train_only(handle: Handle, what: str) -> None:
    """Set requires_grad: `what` is terms, all, or a glob of parameter names."""
    if what == "terms":
        return
    named = dict(handle.model.named_parameters())
    chosen = set(named) if what == "all" else set(fnmatch.filter(named, what))
    if not chosen:
        raise UsageError("a stage trains nothing", [(what, "matches no parameter")])
    for name, parameter in named.items():
        parameter.requires_grad_(name in chosen)


def moments_before(context: Context, planned: list[StageRun], current: StageRun) -> dict[str, Any]:
    """The optimizer state at the end of the previous training stage, by name."""
    before = [p for p in planned if p.number < current.number and p.stage.kind == "train"]
    checkpoint = latest_checkpoint(context.folder / before[-1].name) if before else None
    if checkpoint is None:
        return {}
    return {**read_tensors(checkpoint / OPTIMIZER), **read_state(checkpoint)["optimizer"]}


def memory_of(context: Context) -> dict[str, dict[str, int]]:
    """Estimated and measured bytes of every training stage, by category."""
    found = {}
    for folder in trained_folders(context):
        for kind, parts in (read_json(folder / "run.json").get("memory") or {}).items():
            if parts:  # empty if the stage was resumed after its last step
                found[f"{folder.name} {kind}"] = parts
    return found


def metrics_of(context: Context) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The lines of all stages' metrics.jsonl and spectra.jsonl, with steps counted over stages."""
    metrics: list[dict[str, Any]] = []
    spectra: list[dict[str, Any]] = []
    for folder in trained_folders(context):
        before = metrics[-1]["step"] if metrics else 0
        for found, file in ((metrics, METRICS), (spectra, SPECTRA)):
            lines = read_lines(folder, file)
            found += [{**line, "step": before + line["step"]} for line in lines]
    return metrics, spectra


def trained_folders(context: Context) -> list[Path]:
    """The folders of training stages, in order."""
    found = (path.parent for path in context.folder.glob("*/run.json"))
    return sorted(found, key=lambda folder: int(folder.name.partition("-")[0]))  # 100 after 99


def scores(context: Context, model: nn.Module) -> dict[str, Any]:
    """Held-out metrics of every task, by name."""
    job = context.job
    size = int(job.train.batch_size) if job.train.batch_size != "auto" else 8
    return {
        task: held_out.measure(model, data, size, job.eval.metrics)
        for task, data in context.data.items()
    }


# --- between stages ------------------------------------------------------------------------


def save(folder: Path, work: Work, measured: Mapping[str, Any]) -> None:
    """Write the model after a stage, its structure, its output and its scores."""
    tensors = dict(work.model.state_dict())
    for name, tensor in quantised_in(work.model).items():
        tensors |= {f"{name}:{part}": held for part, held in parts_of(tensor).items()}
        tensors[name] = dequantised(tensor, work.model.get_submodule(name.rpartition(".")[0]))
    with write_folder(folder / "state", overwrite=True) as beside:
        write_tensors(beside / MODEL, tensors)
        write_tensors(beside / OUTPUT, work.output)
        write_json(beside / STRUCTURE, work.handle.structure() if work.handle else {})
        write_json(beside / "scores.json", measured)
        close_with_manifest(beside, stage=work.stage.name, task=work.task)


def quantised_in(model: nn.Module) -> dict[str, Any]:
    """The quantised weights of a model by name."""
    return {name: t for name, t in model.state_dict().items() if quantised(t)}


def parts_of(tensor: Any) -> dict[str, Tensor]:
    """The inner tensors of a quantised tensor, by attribute."""
    names = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else []
    return {name: held for name in names if (held := getattr(tensor, name)) is not None}


def load(context: Context, current: StageRun) -> Work:
    """Load the model and terms saved by a stage."""
    folder = context.folder / current.name / "state"
    model, tensors = context.original(), read_tensors(folder / MODEL)
    take_shapes(model, tensors)  # a stage may have pruned rows and columns
    structure, handle = read_json(folder / STRUCTURE), None
    if structure:
        model.load_state_dict(tensors, strict=False)  # attaching quantises these values
        handle = attach_from(model, structure, recipe=recipe_of(context, current.stage))
    held = quantised_in(model)
    for name, tensor in held.items():
        for part, values in parts_of(tensor).items():
            values.copy_(tensors[f"{name}:{part}"])  # quantising again would round again
    plain = {name: t for name, t in tensors.items() if name.partition(":")[0] not in held}
    model.load_state_dict(plain, strict=not held)
    return Work(current.stage, model, handle, current.task)


def as_handle(work: Work) -> Handle:
    """A handle to export: the stage's own, or one of the whole model if no terms are left."""
    if work.handle is not None:
        return work.handle
    dense: Any = registry.load(registry.FULL)
    return attach(work.model, Recipe(weights=dense()))
