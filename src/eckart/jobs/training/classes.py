"""Models with a classification head.

The model's own head is kept, with its numbering, if it has all classes of the data; else a new
one is initialised from the seed.
"""

from __future__ import annotations

from typing import Any

import torch

from eckart.errors import FileError, UsageError
from eckart.io.formats import CLASSES, IMAGES
from eckart.io.heads import names_of, naming
from eckart.io.models import classes_known, described, load_model, own_task, recognise_result
from eckart.io.opening import ADAPTERS, Opened, open_model
from eckart.io.tasks import TASKS, sees_images
from eckart.jobs.settings.config import Job
from eckart.jobs.training import modality


def require_task(job: Job) -> None:
    """Raise UsageError if the model cannot be trained on this kind of data with any head."""
    source, form = job.model or "", modality.form_of(job)
    made_for, looks = own_task(source), sees_images(described(source))
    facts = [(source, made_for), (str(job.data.train[0].path), form)]
    if looks and form != IMAGES:
        raise UsageError(
            "this model looks at images, and the data is text", facts,
            "Give it a folder with a folder of images for each class, or arrays in an .npz file.",
        )  # fmt: skip
    if form == IMAGES and not looks:
        raise UsageError(
            f"this model {TASKS[made_for].gives}, and the data is images", facts,
            "Take a model for images, such as a ViT or a ResNet.",
        )  # fmt: skip
    if form not in CLASSES and not TASKS[made_for].language:
        raise UsageError(
            f"this model {TASKS[made_for].gives}, and the data is text", facts,
            "Give it rows of text + label or tokens + tags, or take a model with a language head.",
        )  # fmt: skip


def keeps_head(source: str, task: str, labels: tuple[str, ...]) -> bool:
    """Does the model have a head for this task, with all these classes?"""
    return own_task(source) == task and set(labels) <= set(classes_known(source))


def padding(reader: Any) -> dict[str, Any]:
    """The pad token as config fields: decoders need it to find the last token. {} for images."""
    ids = [getattr(reader, name, None) for name in ("pad_token_id", "eos_token_id")]
    pad = next((i for i in ids if i is not None), 0)
    return {"pad_token_id": pad} if hasattr(reader, "pad_token_id") else {}


def open_to_teach(
    job: Job, task: str, labels: tuple[str, ...], reader: Any, dtype: torch.dtype
) -> Opened:
    """Open a model to train on these classes; an adapter keeps its own head.

    Raises UsageError for an adapter that has no head, or one for other classes.
    """
    source, seed = job.model or "", job.train.seed
    keeps, found = keeps_head(source, task, labels), recognise_result(source)
    if found.kind in ADAPTERS:
        if not keeps:
            known = ", ".join(classes_known(source)) or "no head for classes"
            raise UsageError(
                "this adapter was made for other classes",
                [(source, known), ("the data", ", ".join(labels))],
                f"Start from {found.base or 'its base'}, or merge it first: "
                f"eckart convert {source} --to dense -o MERGED",
            )
        return open_model(source, dtype, task, seed)
    if not keeps and len(labels) < 2:
        raise FileError(
            "the data has one class only",
            [(str(job.data.train[0].path), ", ".join(labels))],
            "Two are needed to be told apart: other labels, or a folder for each class.",
        )
    head = {} if keeps else naming(labels)
    model = load_model(source, dtype, task, seed, **head, **padding(reader))
    if task == "classification" and getattr(model.config, "is_encoder_decoder", False):
        require_end(source, model.config.eos_token_id, reader)
    return Opened(model, None, found.path)


def require_end(source: str, end: int | None, tokenizer: Any) -> None:
    """Raise UsageError if the tokenizer appends no EOS, from which T5 and BART classify."""
    last = tokenizer("a")["input_ids"][-1]
    if last != end:
        raise UsageError(
            "this model reads a text's class at its end token, which the tokenizer does not write",
            [
                (f"{source}, config.json", f"eos_token_id: {end}"),
                ("a text's last token", str(last)),
            ],
            "Give it the tokenizer that it was made with, or take an encoder such as BERT.",
        )


def open_to_measure(
    source: str,
    task: str,
    labels: tuple[str, ...],
    reader: Any,
    dtype: torch.dtype | None,
    seed: int,
) -> Opened:
    """Open a model to evaluate on classes. Raises FileError if its head lacks one of them."""
    found = recognise_result(source)
    if found.kind not in ADAPTERS or own_task(source) == task:
        if found.kind in ADAPTERS:
            opened = open_model(source, dtype, task, seed)
        elif not TASKS[own_task(source)].classes:
            raise FileError(
                "the model has no head for classes",
                [(source, own_task(source)), ("labels", ", ".join(labels))],
                "Fine-tune it on these labels first: eckart finetune MODEL DATA",
            )
        else:
            model = load_model(found.path, dtype, task, seed, **padding(reader))
            opened = Opened(model, None, found.path)
        require_known(opened.model, labels)
        return opened
    if not found.base:
        raise FileError("the adapter names no base", [(found.path, "")])
    # PEFT saves the head's weights without class names: they are taken from the data, in order.
    model = load_model(found.base, dtype, task, seed, **naming(labels), **padding(reader))
    handle = ADAPTERS[found.kind](model, found.path)
    if not handle.also_train:
        raise FileError(
            "the adapter has no head for classes",
            [(found.path, f"{handle.weights.slug} alone"), ("labels", ", ".join(labels))],
            "Measure it on text, or fine-tune it on labelled rows first.",
        )
    return Opened(model, handle, found.base)


def require_known(model: Any, labels: tuple[str, ...]) -> None:
    """Raise FileError for a class of the data that the model does not have."""
    known = names_of(model)
    unknown = [name for name in labels if name not in known]
    if unknown:
        names = [str(name) for name in model.config.id2label.values()]
        more = f", ... ({len(names):,})" if len(names) > 12 else ""
        raise FileError(
            "the model has no such class",
            [("in the data", ", ".join(unknown)), ("in the model", ", ".join(names[:12]) + more)],
            "Fine-tune it on these labels first: eckart finetune MODEL DATA",
        )
