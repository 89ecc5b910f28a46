"""Decides keys that are `auto`: each gets a value and a reason.

Each function takes a job and the facts it needs, and returns a job with some keys decided.
Values set by the user are never changed. A resumed run keeps the values that it began with, so
that a machine with other memory trains alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from eckart.errors import OutOfRoom, UsageError, did_you_mean
from eckart.io.run import latest_checkpoint
from eckart.jobs.measuring.memory import Line, size
from eckart.jobs.settings.config import Choice, Job, resolve, value_at
from eckart.jobs.settings.tree import Train
from eckart.optim.layerwise import check_layerwise, peak_gradient_bytes
from eckart.recipe import Recipe, registry
from eckart.recipe.groups import default_lr, default_update

OPEN = (
    "data.seq_len",
    "train.steps",
    "train.batch_size",
    "train.accumulate",
    "train.lr",
    "train.save_every",
    "train.checkpointing",
    "eval.every",
    "eval.metrics",
)
LASTING = ("weights", "update", "attention")  # axes that decide a checkpoint's shapes
ROWS = {"pretrain": 32}  # rows in a step; other commands take 16
EPOCHS = {"pretrain": 1.0}  # passes where neither steps nor epochs are given; others take 3
STEPS = {"pretrain": (100, 10_000)}  # bounds of the steps then; others (30, 1000)
LONGEST = {"cuda": 1024}  # default tokens in a row; 512 on other devices
SHARE = 0.9  # of the free memory that a batch may fill: allocators lose some to gaps


def as_it_began(job: Job, run: Path) -> Job:
    """A resumed job with every `auto` key as the run decided it. UsageError if the checkpoint's
    shapes and moments do not fit the job."""
    file = run / "resolved.yaml"
    if not file.is_file():
        return job  # it stopped before anything was decided
    before = resolve(job.command, files=[file])
    if latest_checkpoint(run) is not None:
        require_same_methods(job, before, run)
    for key in OPEN:
        if value_at(job, key) == "auto":
            job = job.settle(key, value_at(before, key), "as the run began")
    if job.choices["precision"].name == "auto":
        job = job.choose("precision", before.choices["precision"], "as the run began")
    return with_as_many_rows(job, before)


def require_same_methods(job: Job, before: Job, run: Path) -> None:
    """Raise UsageError if weights, update or attention differ from those of the resumed run."""
    facts = []
    for axis in LASTING:
        names = [j.choices[axis].name for j in (before, job)]
        if names[0] != names[1]:
            if f"{axis}.name" in job.given:  # else it comes from the adapter that the run continued
                facts.append((axis, f"the run {names[0]}, now {names[1]}"))
            continue
        for key in (key for key in job.given if key.startswith(f"{axis}.")):
            was, now = (value_at(j, key) for j in (before, job))
            if was != now:
                facts.append((key, f"the run {was}, now {now}"))
    if facts:
        raise UsageError(
            "a resumed run keeps its methods",
            facts,
            f"Leave them out, or begin a new run from this one: eckart finetune {run}",
        )


def with_as_many_rows(job: Job, before: Job) -> Job:
    """A resumed job with the same rows per step, even on another number of processes."""
    train, was = job.train, before.train
    if train.processes == was.processes or "auto" in (train.batch_size, was.batch_size):
        return job
    rows = int(was.batch_size) * int(was.accumulate) * was.processes
    together = int(train.batch_size) * train.processes
    if "train.accumulate" in job.settled and rows % together == 0:
        reason = f"{rows} rows a step, as the run began"
        return job.settle("train.accumulate", rows // together, reason)
    if together * int(train.accumulate) == rows:
        return job
    fits = rows // train.processes
    sizes = f"train.batch_size={fits} train.accumulate=1"
    raise UsageError(
        "a resumed run keeps the rows of its steps",
        [
            ("the run", f"{rows} rows, on {was.processes} processes"),
            ("now", f"{together * int(train.accumulate)} rows, on {train.processes}"),
        ],
        f"Type {sizes}." if fits * train.processes == rows else "Take a number that divides them.",
    )


def precision(job: Job, device: torch.device) -> Job:
    """Decide the precision: bf16 if the device supports it, else fp32."""
    if job.choices["precision"].name != "auto":
        return job
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported()
    name, reason = ("bfloat16", "this GPU computes in it") if fast else ("float32", "no GPU here")
    for slug, entry in registry.methods().items():
        plain = entry.axis == "precision" and not entry.declares.get("converts")
        if plain and entry.declares.get("dtype") == name:
            return job.choose("precision", Choice(slug, registry.load(slug)()), reason)
    return job


def layerwise(job: Job) -> Job:
    """Set what layer-wise mode needs. Raises UsageError if it cannot work with the job."""
    if not job.train.layerwise:
        return job
    recipe, train = job.recipe(), job.train
    rule = (recipe.update or default_update()).rule()
    penalties = [o.slug for o in recipe.objective if o.kind == "penalty"]
    if penalties and rule.projector.names:
        raise UsageError(
            "a penalty needs gradients that layer-wise mode has freed",
            [(f"objective = {name}", "train.layerwise = true") for name in penalties],
            "Leave train.layerwise out, or the penalty.",
        )
    if rule.needs_gradient and train.processes > 1:
        raise UsageError(
            "this update rule cannot share its work layer by layer",
            [(f"update = {job.choices['update'].name}", f"train.processes = {train.processes}")],
            "Leave train.layerwise out, type train.processes=1, or take update=galore.",
        )
    if rule.needs_gradient and train.accumulate == "auto":
        job = job.settle("train.accumulate", 1, "layer by layer this update cannot accumulate")
    elif rule.needs_gradient and train.accumulate != 1:
        raise UsageError(
            "this update rule cannot accumulate micro-batches layer by layer",
            [(f"update = {job.choices['update'].name}", f"train.accumulate = {train.accumulate}")],
            "Type train.accumulate=1, or leave train.layerwise out.",
        )
    if rule.needs_gradient and "train.clip" not in job.given:
        reason = "layer by layer a gradient is gone when the norm of all is known"
        job = job.settle("train.clip", None, reason)
    refresh_from = "first" if rule.needs_gradient else "step"
    check_layerwise([{"rule": rule}], refresh_from, None, job.train.clip)
    return job


def gradient_bytes(train: Train, optimizer: torch.optim.Optimizer) -> int:
    """Peak bytes of gradients that exist at the same time."""
    if not train.layerwise:
        return sum(size(p) for group in optimizer.param_groups for p in group["params"])
    whole = train.accumulate == 1 and train.processes == 1  # a step is one micro-batch
    return peak_gradient_bytes(optimizer.param_groups, "first" if whole else "step")


def seq_len(job: Job, context: int | None, device: torch.device) -> Job:
    """Decide data.seq_len: the model's context, up to a limit that keeps steps fast.

    Raises UsageError if the given length is longer than the context.
    """
    if job.data.seq_len != "auto":
        if context is not None and int(job.data.seq_len) > context:
            raise UsageError(
                "data.seq_len is longer than the model reads",
                [(f"data.seq_len = {job.data.seq_len}", f"at most {context} tokens")],
                f"Type data.seq_len={context}, or leave it out.",
            )
        return job
    longest = LONGEST.get(device.type, 512)
    if context is not None and context <= longest:
        return job.settle("data.seq_len", context, "the model's context")
    return job.settle("data.seq_len", longest, f"enough for most texts on {device.type}")


def horizon(job: Job, rows: int, recipe: Recipe) -> Job:
    """Decide the number of steps, the learning rate, and how often to save and evaluate."""
    per_step = rows_per_step(job, rows)
    if job.train.steps == "auto":
        job = job.settle("train.steps", *steps_for(job, rows, per_step))
    steps = int(job.train.steps)
    if warmup_steps(job.train) > steps:
        raise UsageError(
            "the learning rate would never be reached",
            [
                (f"train.warmup = {job.train.warmup:g}", "steps from 0 to the rate"),
                (f"train.steps = {steps}", job.settled.get("train.steps", "as given")),
            ],
            "Type fewer steps of warm-up, or a share of all: train.warmup=0.03",
        )
    if job.train.lr == "auto":
        update, weights = recipe.update, recipe.weights
        own = update is not None and update.default_lr is not None
        whose: Any = update if own else weights
        rate = default_lr(recipe, scratch=job.command == "pretrain")
        job = job.settle("train.lr", rate, f"the default of {whose.slug}")
    often = max(min(5, steps), round(steps / 10))
    reason = "ten times in the run" if often > 5 else "a short run"
    for key in ("eval.every", "train.save_every"):
        if value_at(job, key) == "auto":
            job = job.settle(key, often, reason)
    return job


def rows_per_step(job: Job, rows: int) -> int:
    """Rows of a step on one process, before they are split to fit memory."""
    batch_size, accumulate = job.train.batch_size, job.train.accumulate
    parts = 1 if accumulate == "auto" else int(accumulate)
    if batch_size != "auto":
        return int(batch_size) * parts
    # few data: at least eight steps an epoch, and powers of two, which split evenly
    usual = min(ROWS.get(job.command, 16), 1 << max(0, (rows // 8).bit_length() - 1))
    usual = max(1, usual // job.train.processes)
    return max(parts, usual // parts * parts)


def steps_for(job: Job, rows: int, per_step: int) -> tuple[int, str]:
    """Steps and the reason, from the epochs or from the amount of data."""
    in_epoch = max(1, rows // (per_step * job.train.processes))
    if job.train.epochs is not None:
        steps = max(1, math.ceil(job.train.epochs * in_epoch))
        return steps, f"{job.train.epochs:g} epochs of {rows:,} rows, {per_step} a step"
    least, most = STEPS.get(job.command, (30, 1000))
    epochs = EPOCHS.get(job.command, 3.0)
    steps = round(epochs * in_epoch)
    plain = f"{epochs:g} epoch{'s' if epochs > 1 else ''} of {rows:,} rows, {per_step} a step"
    if steps < least:
        return least, f"at least; {plain} would be {steps}"
    return (most, f"at most; {plain} would be {steps:,}") if steps > most else (steps, plain)


def batch(
    job: Job, rows: int, fixed: int, kept: Callable[[bool], Line], free: int, whole: bool
) -> Job:
    """Decide the batch size, accumulation and activation checkpointing for `rows` per step.

    `fixed` bytes do not depend on the batch; `kept(checkpointing)` gives the activations' bytes
    by rows; `whole` keeps a step in one batch, for objectives that compare the rows of a step.
    Raises OutOfRoom if the fixed part alone does not fit.
    """
    if fixed > free:
        raise OutOfRoom(
            "the model and its optimizer do not fit into memory",
            [("needed", f"{fixed / 1e9:.3g} GB"), ("free", f"{free / 1e9:.3g} GB")],
            "Type method=lora, or a smaller model.",
        )
    space = SHARE * (free - fixed)
    checkpointing = job.train.checkpointing
    if checkpointing == "auto":
        fits = kept(False).of(1) <= space
        reason = "activations fit" if fits else "activations of one row would not fit"
        job = job.settle("train.checkpointing", not fits, reason)
    if job.train.batch_size == "auto":
        parts = 1 if job.train.accumulate == "auto" else int(job.train.accumulate)
        most = max(1, kept(bool(job.train.checkpointing)).rows_within(space))
        size = rows // parts
        if job.train.accumulate == "auto" and not whole:
            size = largest_divisor(rows, most)
        why = f"{rows} rows a step" + (f", {most} fit at once" if size < rows // parts else "")
        job = job.settle("train.batch_size", size, why)
    if job.train.accumulate == "auto":
        parts = max(1, rows // int(job.train.batch_size))
        reason = f"{rows} rows a step" if parts > 1 else "the batch is a whole step"
        job = job.settle("train.accumulate", parts, reason)
    return job


def largest_divisor(number: int, most: int) -> int:
    """The largest divisor of a number that is at most `most`."""
    return next(d for d in range(min(number, most), 0, -1) if number % d == 0)


def metrics(job: Job, names: tuple[str, ...]) -> Job:
    """Decide the metrics on held-out data. UsageError for an unknown metric."""
    if job.eval.metrics != "auto":
        for name in job.eval.metrics:
            if name not in names:
                raise UsageError(
                    f"no metric of this data is called {name}",
                    [("eval.metrics", f"known here: {', '.join(names)}")],
                    did_you_mean(name, names, "Leave it out for all of them."),
                )
        return job
    return job.settle("eval.metrics", names, "what this task has")


def warmup_steps(train: Train) -> int:
    """Warm-up steps: train.warmup is a share of the steps if below 1, else their number."""
    share = train.warmup
    return round(share * int(train.steps)) if share < 1 else int(share)
