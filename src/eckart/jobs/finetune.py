"""`eckart finetune MODEL DATA`: teach a model, an adapter or a run from data.

An adapter (or a run that made one) is gone on with. The result is PEFT's files where the
method has them, a plain transformers model where the model itself was trained.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from eckart.errors import FileError, UsageError
from eckart.io.models import load_model, load_tokenizer, recognise
from eckart.io.opening import Opened, open_model
from eckart.io.tasks import LANGUAGE
from eckart.jobs import launch, prepare
from eckart.jobs.config import Job
from eckart.jobs.course import begin, course, staged_course
from eckart.jobs.outcome import write_final


def run(job: Job) -> dict[str, Any]:
    """Everything from a job to a finished run; the object of --json."""
    if launch.is_needed(job):
        return launch.in_processes(job)
    job, screen = begin(job)
    require_weights(job)
    tokenizer = load_tokenizer(job.model or "")
    opened = open_base(job, tokenizer)
    weights: Any = job.choices["weights"].method
    if weights.stages:
        return staged_course(
            job, screen, opened, tokenizer, write_final, lambda: open_base(job, tokenizer).model
        )
    return course(job, screen, opened, tokenizer, write_final)


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


def open_base(job: Job, tokenizer: PreTrainedTokenizerBase) -> Opened:
    """The model to teach, with a new head where the data has classes."""
    source = recognise(job.model or "")
    dtype, seed = prepare.dtype_of(job), job.train.seed
    task, labels = prepare.task_of(job), prepare.labels_of(job)
    if labels:
        model = load_model(source.path, dtype, task, seed, **labelled(labels, tokenizer))
        return Opened(model, None, source.path)
    require_language(job, task)
    return open_model(source.path, dtype, seed=seed)


def require_language(job: Job, task: str) -> None:
    """Raise UsageError for a model without a head for words where the data is text."""
    if task not in LANGUAGE:
        what = {"encoder": "gives features", "image": "looks at images"}.get(task, "gives classes")
        raise UsageError(
            f"this model {what}, and the data is text",
            [(str(job.model), task), (str(job.data.train[0].path), prepare.form_of(job))],
            "Give it rows of text + label or tokens + tags, or take a model with a language head.",
        )


def labelled(labels: tuple[str, ...], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What a classifier's configuration says about its classes; decoders find the end by pad."""
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    pad = next((i for i in ids if i is not None), 0)
    by_id = dict(enumerate(labels))
    by_name = {name: i for i, name in by_id.items()}
    return {"num_labels": len(labels), "id2label": by_id, "label2id": by_name, "pad_token_id": pad}
