"""`eckart pretrain MODEL DATA`: trains a model from random weights.

MODEL is a preset's name, a config.json, or a folder with one; weights beside it are not
read. A tokenizer beside it is used, or the one that data.tokenizer names; without one, a
byte-level BPE is trained on the training part of the data.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from eckart.errors import UsageError
from eckart.io.corpora import MASK, train_tokenizer
from eckart.io.formats import CLASSES, format_of
from eckart.io.models import config_of, folder_of, holds_tokenizer, load_tokenizer, recognise
from eckart.io.opening import Opened
from eckart.io.presets import build_model
from eckart.io.reading import rows_of
from eckart.io.sources import held_out_share, sources_of
from eckart.io.tasks import TASKS, task_of
from eckart.io.text import split
from eckart.jobs.settings.config import Job
from eckart.jobs.training import launch, modality, prepare
from eckart.jobs.training.outcome import write_whole
from eckart.jobs.training.train import begin, train

SPECIAL = {  # tokens that a new tokenizer needs for a task
    "masked": (MASK,),
    "seq2seq": tuple(f"<extra_id_{i}>" for i in range(32)),  # 15 % of 512 tokens in spans of 3
}


def run(job: Job) -> dict[str, Any]:
    """Run the whole job. Returns the --json document."""
    if launch.is_needed(job):
        return launch.in_processes(job)
    job, screen = begin(job)
    shape = shape_of(job)
    require_text(job, shape)
    tokenizer = tokenizer_for(job, shape)
    vocab = len(tokenizer) if recognise(shape).kind == "preset" else None
    model = build_model(shape, vocab, job.train.seed, dtype=prepare.dtype_of(job))
    share_ends(model, tokenizer)
    screen.line("vocab", f"{len(tokenizer):,} tokens")
    weights: Any = job.choices["weights"].method
    if weights.base == "frozen":
        left = f"{weights.slug} leaves its matrices at random numbers"
        screen.warn(f"{left}; weights=dense trains them")
    return train(job, screen, Opened(model, None, shape), tokenizer, write_whole)


def require_text(job: Job, shape: str) -> None:
    """Raise UsageError if the data is not text, or the model does not take text."""
    task, form = task_of(config_of(shape)), modality.form_of(job)
    if TASKS[task].language and form not in CLASSES:
        return
    learns = f"a task with classes: {CLASSES[form]}" if form in CLASSES else form
    raise UsageError(
        "pretraining learns from text, with a model for words",
        [(shape, TASKS[task].gives), (str(job.data.train[0].path), learns)],
        "Classes are taught to a model with weights, random ones too: save one made by\n"
        "AutoModel.from_config(CONFIG), and type eckart finetune FOLDER DATA method=dense",
    )


def shape_of(job: Job) -> str:
    """The preset or configuration to build. UsageError for an adapter, which has no shape."""
    source = recognise(job.model or "")
    if source.kind in ("peft", "native", "run"):
        raise UsageError(
            "pretraining starts from a shape, not from something trained",
            [(source.path, source.kind)],
            f"Type eckart finetune {source.path} DATA, or name a preset such as llama-tiny.",
        )
    return str(folder_of(source.path)) if source.kind == "hub" else source.path


def tokenizer_for(job: Job, shape: str) -> PreTrainedTokenizerBase:
    """The tokenizer of data.tokenizer or of MODEL, or one trained on the training rows."""
    if (wanted := modality.asked_for(job)) is not None:
        return wanted
    path = Path(shape)
    folder = path.parent if path.is_file() else path
    if folder.is_dir() and recognise(shape).kind != "preset" and holds_tokenizer(folder):
        return load_tokenizer(folder)
    config = config_of(shape)
    special = SPECIAL.get(task_of(config), ())
    return train_tokenizer(training_texts(job), config.vocab_size, special=special)


def share_ends(model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Set the model's BOS, EOS and pad tokens to those of the tokenizer."""
    configs = [model.config]
    configs += [model.generation_config] if model.can_generate() else []
    for config in configs:
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(config, name, getattr(tokenizer, name))
        if (
            model.config.is_encoder_decoder
            and getattr(config, "decoder_start_token_id", None) is None
        ):
            config.decoder_start_token_id = tokenizer.pad_token_id


def training_texts(job: Job) -> Iterator[str]:
    """The text of the training rows; a tokenizer must not be trained on held-out text."""
    held = list(job.data.eval) if isinstance(job.data.eval, tuple) else job.data.eval
    share, _ = held_out_share(held)
    for source in sources_of(modality.entries(job)):
        rows = list(rows_of(source))
        kept, _ = split(rows, format_of(rows[0], job.data.format), share) if rows else ([], [])
        for row in kept:
            for value in row.fields.values():
                yield value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
