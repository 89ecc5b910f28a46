"""`eckart finetune MODEL DATA`: finetunes a model, an adapter or the result of a run.

An adapter (or a run that made one) is trained further. The result is in PEFT's format if the
method has one, or a plain transformers model if the model itself was trained.
"""

from __future__ import annotations

from typing import Any

from eckart.errors import FileError, UsageError
from eckart.io.models import recognise
from eckart.io.opening import Opened, open_model
from eckart.jobs.settings.config import Job
from eckart.jobs.training import launch, modality, prepare
from eckart.jobs.training.classes import open_to_teach, require_task
from eckart.jobs.training.outcome import write_final
from eckart.jobs.training.train import begin, train, train_in_stages
from eckart.recipe.handle import handle_of


def run(job: Job) -> dict[str, Any]:
    """Run the whole job. Returns the --json document."""
    if launch.is_needed(job):
        return launch.in_processes(job)
    job, screen = begin(job)
    require_weights(job)
    require_task(job)
    reader = modality.reader_of(job)
    opened = open_base(job, reader)
    weights: Any = job.choices["weights"].method
    if weights.base == "dropped":
        better = f"a trained model becomes smaller by eckart compress {job.model} DATA"
        screen.warn(f"{weights.slug} drops what the matrices had learnt; {better}")
    if weights.stages:
        return train_in_stages(
            job, screen, opened, reader, write_final, lambda: open_base(job, reader).model
        )
    return train(job, screen, opened, reader, write_final)


def require_weights(job: Job) -> None:
    """Raise UsageError for a preset, FileError for a folder that lacks its weights."""
    source = recognise(job.model or "")
    if source.kind in ("preset", "config"):
        error = UsageError if source.kind == "preset" else FileError
        raise error(
            "this is a shape without weights",
            [(source.path, source.kind)],
            f"Start from random weights: eckart pretrain {source.path} DATA",
        )


def open_base(job: Job, reader: modality.Reader) -> Opened:
    """Open the model to finetune, with a classification head if the data has classes.

    Raises UsageError for a model with replaced matrices, which only its own method can train.
    """
    dtype, labels = prepare.dtype_of(job), modality.labels_of(job)
    opened = (
        open_to_teach(job, modality.task_of(job), labels, reader, dtype)
        if labels
        else open_model(recognise(job.model or "").path, dtype, seed=job.train.seed)
    )
    if made := handle_of(opened.model):
        raise UsageError(
            "a model of thin matrices cannot be fine-tuned",
            [(str(job.model), f"made by {made.weights.slug}")],
            "Train it while it is compressed: eckart compress MODEL DATA heal.steps=300. "
            f"Or fold it: eckart convert {job.model} --to dense -o FOLDED",
        )
    return opened
