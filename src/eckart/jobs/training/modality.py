"""How data becomes model inputs: text by a tokenizer, images by a preprocessing.

The task follows from the data and the model (io/tasks.py) and has one modality, text or
images. What differs between the two is in the table at the end of this file. The rest of a job
only knows a `reader`, a tokenizer or a `Preprocessing`, which is saved with the result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState
from torch import nn

from eckart.errors import FileError, UsageError
from eckart.io import images, text
from eckart.io.corpora import bytes_tokenizer
from eckart.io.data import Data
from eckart.io.encoding import class_names
from eckart.io.formats import CLASSES, IMAGES, format_of
from eckart.io.heads import names_of
from eckart.io.image_sources import found_in, holds_images
from eckart.io.models import load_tokenizer, own_task
from eckart.io.packing import isolates_documents
from eckart.io.preprocessing import Preprocessing, load_preprocessing
from eckart.io.reading import in_order, rows_of
from eckart.io.sources import DataSource, files_of, is_hub, sources_of
from eckart.io.tasks import TASKS
from eckart.jobs.settings import settle
from eckart.jobs.settings.config import Job

Reader = Any  # a tokenizer or a Preprocessing
FIRST = 16  # rows whose longest is the length that an estimate assumes
SMALL = 2_000_000  # bytes up to which an estimate reads the data, to count its rows


@dataclass(frozen=True)
class Modality:
    """What differs between text and images, for a job."""

    reader: Callable[[Job], Reader]
    require_fit: Callable[[Reader, Any], None]  # raises if reader and model do not match
    length: Callable[[Job, Any, torch.device], Job]  # decides the length of a row
    read: Callable[[Job, Reader, Any, Any, Any], Data]  # (job, reader, model, sources, eval)


def of(job: Job) -> Modality:
    """The modality of a job's data."""
    return MODALITIES[TASKS[task_of(job)].sees]


def reader_of(job: Job) -> Reader:
    """The tokenizer or preprocessing of a job."""
    return of(job).reader(job)


def beside(source: str, task: str) -> Reader:
    """The tokenizer or preprocessing saved with a model, adapter or run. FileError without one."""
    sees = TASKS[task].sees
    return load_tokenizer(source) if sees == "text" else load_preprocessing(source)


def require_fit(job: Job, reader: Reader, model: Any) -> None:
    """Raise FileError if the reader's tokens or image size do not fit the model."""
    of(job).require_fit(reader, model)


def settled(job: Job, model: Any, place: torch.device) -> Job:
    """The job with `data.seq_len` decided; unchanged for images."""
    return of(job).length(job, model, place)


def read_data(job: Job, reader: Reader, model: nn.Module) -> Data:
    """The job's data, its classes numbered as in the model's config."""
    held = list(job.data.eval) if isinstance(job.data.eval, tuple) else job.data.eval
    with PartialState().main_process_first():  # the other processes read its cache
        return of(job).read(job, reader, model, entries(job), held)


def read_tasks(job: Job, reader: Reader, model: nn.Module) -> dict[str, Data]:
    """The data of each source by name, in the order given: each source is a task."""
    found: dict[str, Data] = {}
    for source in job.data.train:
        alone = dataclasses.replace(job.data, train=(source,))
        data = read_data(dataclasses.replace(job, data=alone), reader, model)
        found[next(iter(data.hashes))] = data
    return found


def read_to_measure(job: Job, reader: Reader, model: nn.Module) -> Data:
    """The rows to evaluate on: all of the data, or the held-out part if data.eval was given."""
    if "data.eval" in job.given:
        return read_data(job, reader, model)
    return of(job).read(job, reader, model, [], entries(job))


# --- what the data is ----------------------------------------------------------------------


def entries(job: Job) -> list[dict[str, Any]]:
    """The data's sources as dicts, the form that `io` takes."""
    return [dataclasses.asdict(source) for source in job.data.train]


def all_sources(job: Job) -> list[DataSource]:
    """The data's sources, and those that data.eval names."""
    named = list(job.data.eval) if isinstance(job.data.eval, tuple) else []
    return [*sources_of(entries(job)), *sources_of(named)]


def task_of(job: Job) -> str:
    """The job's task: classification if the data has classes, else the model's own task."""
    return CLASSES.get(form_of(job)) or own_task(job.model or "")


def form_of(job: Job) -> str:
    """The format of the data. FileError without rows, UsageError for images mixed with text."""
    sources = all_sources(job)
    pictured = [isinstance(s.path, str) and holds_images(s.path) for s in sources]
    if all(pictured):
        return IMAGES
    if any(pictured):
        kinds = ["images" if p else "text" for p in pictured]
        facts = [(str(s.path), kind) for s, kind in zip(sources, kinds, strict=True)]
        raise UsageError("images and text cannot be mixed", facts)
    return form_in(job, sources[0])


def form_in(job: Job, source: DataSource) -> str:
    """The format of one text source, from its first row. FileError without rows."""
    first = next(iter(rows_of(source)), None)
    if first is None:
        raise FileError("no rows in the data", [(str(source.path), "")])
    return format_of(first, job.data.format)


def labels_of(job: Job) -> tuple[str, ...]:
    """Names of the classes or tags in the data; empty for plain text."""
    form = form_of(job)
    if form not in CLASSES:
        return ()
    sources = all_sources(job)
    if form == IMAGES:
        return tuple(in_order({c for s in sources for c in found_in(str(s.path)).classes}))
    text.task_for({s.name: form_in(job, s) for s in sources}, own_task(job.model or ""))
    return tuple(class_names((row for source in sources for row in rows_of(source)), form))


# --- text ----------------------------------------------------------------------------------


def tokenizer_of(job: Job) -> Reader:
    """The tokenizer of data.tokenizer, or the model's own."""
    return asked_for(job) or load_tokenizer(job.model or "")


def asked_for(job: Job) -> Reader | None:
    """The tokenizer that data.tokenizer names; None if it is not set."""
    wanted = job.data.tokenizer
    if wanted == "bytes":
        return bytes_tokenizer()
    return None if wanted is None else load_tokenizer(wanted)


def require_tokens(tokenizer: Any, model: Any) -> None:
    """Raise FileError if the tokenizer has more tokens than the model has embeddings."""
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise FileError(
            "the tokenizer has more tokens than the model",
            [("tokenizer", f"{len(tokenizer):,} tokens"), ("model", f"{rows:,} embeddings")],
            "Use the tokenizer that the model was trained with.",
        )


def context_of(model: Any) -> int | None:
    """The model's `max_position_embeddings`; None if its config has none."""
    found = getattr(model.config, "max_position_embeddings", None)
    return found if isinstance(found, int) else None


def tokens_in_a_row(job: Job, model: Any, place: torch.device) -> Job:
    return settle.seq_len(job, context_of(model), place)


def read_text(job: Job, tokenizer: Reader, model: Any, sources: Any, eval: Any) -> Data:
    """Tokenized rows. Training rows are packed if the model masks attention across documents."""
    task = task_of(job)
    return text.read(
        sources,
        tokenizer,
        int(job.data.seq_len),
        packing=bool(sources) and task == "causal" and isolates_documents(model),
        eval=eval,
        format=job.data.format,
        task=task,
        seed=job.train.seed,
        labels=names_of(model) if TASKS[task].classes else (),
    )


def longest_of_first(job: Job, task: str) -> int | None:
    """Tokens of the longest of the data's first rows; None for packed rows and images."""
    if task == "causal" or TASKS[task].sees != "text":
        return None
    length = int(job.data.seq_len)
    tokenizer = tokenizer_of(job)
    data = text.first_rows(entries(job), tokenizer, length, job.data.format, task, FIRST)
    return max(len(row["input_ids"]) for row in data.train)


def are_few(job: Job) -> bool:
    """Is the data local, and small enough to be read for an estimate?"""
    sources = sources_of(entries(job))
    if not sources or any(not isinstance(s.path, str) or is_hub(s.path) for s in sources):
        return False
    pictured = all(holds_images(str(s.path)) for s in sources)
    return pictured or sum(f.stat().st_size for s in sources for f in files_of(s)) <= SMALL


def count_rows(job: Job, task: str, reader: Reader) -> tuple[int, bool]:
    """The number of training rows, and whether one of the first packs several documents.

    Text is read as for a model that masks attention across documents.
    """
    held = job.data.eval
    if TASKS[task].sees == "images":
        found = sum(len(found_in(str(s.path)).pictures) for s in sources_of(entries(job)))
        return round(found * (1 - held)) if isinstance(held, float) else found, False
    length, eval = int(job.data.seq_len), list(held) if isinstance(held, tuple) else held
    data = text.read(
        entries(job), reader, length, task == "causal", eval, job.data.format, task=task
    )
    first = (data.train[i] for i in range(min(len(data.train), FIRST)))
    return len(data.train), any(map(holds_several, first))


def holds_several(row: dict[str, Any]) -> bool:
    """Whether a row is packed with several texts, which need a mask to be kept apart."""
    return sum(place == 0 for place in row.get("position_ids", ())) > 1


# --- images --------------------------------------------------------------------------------


def preprocessing_of(job: Job) -> Preprocessing:
    """The model's preprocessing. Without a size of its own it takes that of the first image."""
    first = all_sources(job)[0]
    array = found_in(str(first.path)).pictures[0]
    shape = getattr(array, "shape", None)  # of an array [c, h, w]
    return load_preprocessing(job.model or "", None if shape is None else tuple(shape[1:]))


def require_channels(preprocessing: Preprocessing, model: Any) -> None:
    """Raise FileError if the preprocessing's image size is not the model's."""
    size = getattr(model.config, "image_size", None)
    height, width = (size, size) if isinstance(size, int) else (size or (None, None))
    fixed = hasattr(model.config, "patch_size")  # models of convolutions alone take any size
    if fixed and height and (height, width) != (preprocessing.height, preprocessing.width):
        raise FileError(
            "the preprocessing is not this model's",
            [
                (preprocessing.source, f"{preprocessing.height} x {preprocessing.width}"),
                ("the model's config.json", f"{height} x {width}"),
            ],
            "Put the preprocessor_config.json back that the model came with.",
        )


def any_size(job: Job, model: Any, place: torch.device) -> Job:
    return job


def read_images(job: Job, reader: Reader, model: Any, sources: Any, eval: Any) -> Data:
    """Images at the model's size."""
    return images.read(sources, reader, eval, labels=names_of(model))


MODALITIES = {
    "text": Modality(tokenizer_of, require_tokens, tokens_in_a_row, read_text),
    "images": Modality(preprocessing_of, require_channels, any_size, read_images),
}
