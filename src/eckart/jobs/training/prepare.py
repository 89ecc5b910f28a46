"""Prepares a model for training: device, dtype, attaching the recipe, batch size and memory."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn

from eckart.errors import FileError, UsageError
from eckart.io.data import Data
from eckart.io.heads import outside
from eckart.io.opening import Opened, open_model
from eckart.io.packing import order
from eckart.io.run import latest_checkpoint
from eckart.jobs.measuring.devices import model_device, on_device
from eckart.jobs.measuring.memory import (
    Line,
    activation_bytes,
    autocast,
    autocasts,
    line,
    model_bytes,
    room,
    state_bytes,
)
from eckart.jobs.measuring.norms import hold_statistics
from eckart.jobs.settings import settle
from eckart.jobs.settings.config import Job
from eckart.jobs.training import modality
from eckart.jobs.training.checkpoints import load_model_state, read_state
from eckart.recipe import Handle, Recipe, attach, attach_from
from eckart.recipe.fingerprint import fingerprint
from eckart.recipe.vocabulary import held_whole

CALIBRATION = (8, 4)  # batches and rows in each, for methods that look at gradients first


def device() -> torch.device:
    """The device of this process: its GPU, or the CPU."""
    found: torch.device = PartialState().device
    return found


def dtype_of(job: Job) -> torch.dtype:
    """The dtype in which the model is loaded: fp32 if it is trained (bf16 is by autocast then),
    or bf16 with stochastic rounding. UsageError for that rounding if only terms are trained."""
    weights: Any = job.choices["weights"].method
    precision: Any = job.choices["precision"].method
    trained = weights is not None and weights.trains_the_model
    if getattr(job.choices["update"].method, "rounding", "") == "stochastic":
        if not trained:
            raise UsageError(
                "stochastic rounding is for bf16 weights",
                [
                    ("update.rounding", "stochastic"),
                    (
                        f"weights = {job.choices['weights'].name}",
                        "trains tensors of its own, in fp32",
                    ),
                ],
                "Leave update.rounding out, or type weights=dense.",
            )
        return torch.bfloat16
    return torch.float32 if trained else getattr(torch, precision.dtype)


# --- attaching -----------------------------------------------------------------------------


def attached(job: Job, opened: Opened, data: Data) -> Handle:
    """Attach the recipe: restored from a checkpoint, continued from an adapter, or new."""
    recipe, model = job.recipe(), opened.model
    hold_statistics(model)
    checkpoint = resume_from(job)
    if checkpoint is not None:
        if opened.handle is not None:
            opened.handle.remove()
        handle = rebuilt(model, checkpoint, recipe)
    elif opened.handle is not None:
        handle = continued(opened.handle, job, recipe)
    else:
        handle = attached_anew(job, model, recipe, data)
    handle.steps, handle.lr = int(job.train.steps), float(job.train.lr)
    handle.warmup = settle.warmup_steps(job.train)
    if wants_teacher(handle):
        handle.teacher = teacher(job, handle)
    return handle


def attached_anew(job: Job, model: nn.Module, recipe: Recipe, data: Data) -> Handle:
    """Attach the recipe to a plain model, and train its classification head if there is one."""
    return attach(
        model,
        recipe,
        calibration=calibration(job, model, data) if recipe.needs else None,
        steps=int(job.train.steps),
        lr=float(job.train.lr),
        warmup=settle.warmup_steps(job.train),
        seed=job.train.seed,
        also_train=outside(model) if data.labels else (),
    )


def wants_teacher(handle: Handle) -> bool:
    """Does an objective need the base's outputs while the base itself is trained?"""
    changed = handle.weights.base != "frozen" or bool(handle.originals)
    return changed and any(o.needs_reference for o in handle.recipe.objective)


def teacher(job: Job, handle: Handle) -> nn.Module:
    """A second copy of the base, unchanged. UsageError if the model began with random weights."""
    if job.command == "pretrain":
        raise UsageError(
            "there is no model to stay close to",
            [(o.slug, "compares with a reference") for o in handle.recipe.objective],
            "Type eckart finetune MODEL DATA, or leave the objective out.",
        )
    before = open_model(job.model or "", dtype_of(job), seed=job.train.seed).model
    before.to(model_device(handle.model)).eval().requires_grad_(False)
    model: nn.Module = before
    return model


def resume_from(job: Job) -> Path | None:
    """The newest complete checkpoint of the resumed run; None for a new run."""
    return latest_checkpoint(job.flags.resume) if job.flags.resume else None


def require_unfinished(job: Job) -> None:
    """Raise UsageError if the resumed run has already finished."""
    checkpoint = resume_from(job)
    if checkpoint is None or not (Path(job.flags.resume or "") / "final").is_dir():
        return
    done, steps = int(checkpoint.name.removeprefix("step-")), int(job.train.steps)
    if done >= steps:
        raise UsageError(
            "this run is finished",
            [(str(job.flags.resume), f"{done} of {steps} steps")],
            f"Type train.steps={2 * steps} to train on, or eckart generate {job.flags.resume}",
        )


def rebuilt(model: nn.Module, checkpoint: Path, recipe: Recipe) -> Handle:
    """Attach a checkpoint's terms with their values, without calibrating again."""
    structure = read_state(checkpoint)["structure"]
    found = fingerprint(model, held_whole(model, structure["also_train"]))
    if structure["fingerprint"] != found:
        raise FileError(
            "this run was started on another base",
            [
                (str(checkpoint), f"fingerprint {structure['fingerprint'][:12]}"),
                ("the model now", f"fingerprint {found[:12]}"),
            ],
            "Put the model back that the run's config.yaml names.",
        )
    handle = attach_from(model, structure, recipe=recipe)
    load_model_state(handle, checkpoint)  # first: measuring the memory of a row runs a forward pass
    return handle


def continued(adapter: Handle, job: Job, recipe: Recipe) -> Handle:
    """A loaded adapter with the job's other axes. UsageError if the job names another method."""
    if "weights.name" in job.given and job.choices["weights"].name != adapter.weights.slug:
        raise UsageError(
            "an adapter is trained further by its own method",
            [
                (f"{job.model}", f"made by {adapter.weights.slug}"),
                (f"weights = {job.choices['weights'].name}", "asked for"),
            ],
            f"Merge it first: eckart convert {job.model} --to dense -o MERGED",
        )
    structure = adapter.structure()
    tensors = {name: tensor.detach().clone() for name, tensor in adapter.named_state().items()}
    model = adapter.remove()
    handle = attach_from(model, structure, recipe=recipe)
    handle.load_named_state(tensors)
    return handle


def calibration(job: Job, model: nn.Module, data: Data) -> list[dict[str, Any]]:
    """Batches of shuffled training rows, for methods that need gradients or activations."""
    count, rows = CALIBRATION
    chosen = order(len(data.train), job.train.seed, -1)[: count * rows].tolist()
    groups = [chosen[i : i + rows] for i in range(0, len(chosen), rows)]
    place = model_device(model)
    return [on_device(data.collate([data.train[i] for i in group]), place) for group in groups]


# --- memory --------------------------------------------------------------------------------


def into_memory(job: Job, handle: Handle, data: Data) -> tuple[Job, dict[str, int]]:
    """Decide the batch size by the memory available. Returns estimated bytes by category too."""
    optimizer = handle.optimizer(float(job.train.lr))
    parts = model_bytes(handle)
    parts["gradients"] = settle.gradient_bytes(job.train, optimizer)
    parts["state"] = state_bytes(optimizer)
    place = model_device(handle.model)
    held = ("weights", "factors", "teacher")  # already there
    free = room(place)[0] + sum(parts.get(name, 0) for name in held)
    half = autocasts(job.choices["precision"].method, handle.weights)

    def measure(rows: int, checkpointing: bool) -> int:
        with autocast(handle.model, half):
            return bytes_of_rows(handle.model, data, rows, checkpointing)

    @cache
    def kept(checkpointing: bool) -> Line:
        return line(lambda rows: measure(rows, checkpointing))

    job = settle.batch(
        job,
        settle.rows_per_step(job, len(data.train)),
        sum(parts.values()),
        kept,
        free,
        any(o.couples_batch for o in handle.recipe.objective),
    )
    handle.recipe.require_no_accumulation(int(job.train.accumulate))
    parts["gradients"] = settle.gradient_bytes(job.train, optimizer)  # by what is accumulated
    rows, checkpointing = int(job.train.batch_size), bool(job.train.checkpointing)
    activations = kept(checkpointing).of(rows)
    if sum(parts.values()) + activations <= free:  # exact: several rows may be computed otherwise
        activations = measure(rows, checkpointing)
    return job, {**parts, "activations": activations}


def bytes_of_rows(model: Any, data: Data, count: int, checkpointing: bool) -> int:
    """Bytes that autograd keeps for a number of rows, each as long as the longest of a few."""
    rows = [data.train[i] for i in range(min(len(data.train), modality.FIRST))]
    lengths = data.lengths(rows)
    longest = max(
        zip(map(modality.holds_several, rows), lengths, rows, strict=True), key=lambda r: r[:2]
    )[2]
    batch = on_device(data.collate([longest] * count), model_device(model))
    if not checkpointing:
        return activation_bytes(model, batch)
    model.activation_checkpointing_enable()
    try:
        return activation_bytes(model, batch)
    finally:
        model.activation_checkpointing_disable()
