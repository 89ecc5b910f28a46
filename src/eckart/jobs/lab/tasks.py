"""Data and initial models of a claim's task: text as tensors, and cached pretrained models.

Tokens are bytes (1 to 256; 0 ends a document), so a loss in nats per token is one in nats per
byte, whatever the corpus.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, PretrainedConfig

from eckart.claims import Batch, Splits, Task
from eckart.errors import UsageError, did_you_mean
from eckart.io.corpora import CORPORA, Corpus
from eckart.io.folder import write_folder
from eckart.io.models import load_model
from eckart.io.presets import build_model, quiet
from eckart.io.text import cache_folder
from eckart.linear.sites import seeded_generator

BYTES = 257
HELD_OUT = 0.1  # share of the documents, which go to validation and test in turns
EVALUATED = 128  # rows of each held-out part
PRETRAINING_LR = 2e-3


@cache
def corpus(name: str) -> Corpus:
    """A built-in corpus by its name, cached. Raises UsageError for an unknown name."""
    if name not in CORPORA:
        raise UsageError("no such corpus", [(name, "")], did_you_mean(name, list(CORPORA)))
    return CORPORA[name]()


def splits_of(task: Task) -> Splits:
    """The task's examples as tensors."""
    return task.data() if callable(task.data) else text_splits(task.data, task.seq_len)


@cache
def text_splits(name: str, seq_len: int) -> Splits:
    """The splits of a corpus by its name, cached."""
    return in_splits(corpus(name), seq_len)


def in_splits(text: Corpus, seq_len: int) -> Splits:
    """Split a corpus into rows of seq_len bytes; whole documents are held out."""
    train, held_out = text.split(HELD_OUT)
    halves = [Corpus(text.name, held_out.documents[i::2]) for i in range(2)]
    validation, test = (rows(half, seq_len, EVALUATED) for half in halves)
    return Splits(rows(train, seq_len), validation, test)


def rows(text: Corpus, seq_len: int, most: int | None = None) -> Batch:
    """The concatenated documents as rows [t, seq_len]; at most `most` of them, evenly spaced."""
    joined = b"\0".join(document.encode() for _, document in text.documents)
    ids = np.frombuffer(joined, dtype=np.uint8).astype(np.int64) + 1
    whole = torch.from_numpy(ids[: len(ids) // seq_len * seq_len]).reshape(-1, seq_len)
    if most is not None and len(whole) > most:
        whole = whole[torch.linspace(0, len(whole) - 1, most).to(torch.int64)]
    return {"input_ids": whole, "labels": whole}


def chosen_rows(examples: Batch, count: int, *names: object) -> dict[str, torch.Tensor]:
    """`count` random examples; the names are the seed, so all processes draw the same."""
    total = len(next(iter(examples.values())))
    ids = torch.randint(total, (count,), generator=seeded_generator(0, *names))
    return {key: tensor[ids] for key, tensor in examples.items()}


def config_for(task: Task) -> PretrainedConfig:
    """The transformers configuration of a task's model."""
    text = {"vocab_size": BYTES} if isinstance(task.data, str) else {}
    config = AutoConfig.for_model(task.kind, **text, **task.shape)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if isinstance(task.data, str) and hasattr(config, name):
            setattr(config, name, None)  # bytes 0 to 2 are text, not special tokens
    return config


def start_model(task: Task, seed: int) -> nn.Module:
    """The task's initial model: the pretrained one, or random weights from the seed."""
    if task.pretrained is None:
        drawn: nn.Module = build_model(config_for(task), seed=seed, task=task.head)
        return drawn.train()
    folder = cache_folder() / "lab" / "models" / base_key(task)
    if not (folder / "config.json").exists():
        model: Any = pretrained(task)
        with write_folder(folder, overwrite=True) as beside, quiet():
            model.save_pretrained(beside)
    fresh: nn.Module = copy.deepcopy(loaded(folder, task.head))
    return fresh.train()


@cache
def loaded(folder: Path, head: str) -> nn.Module:
    """A pretrained model from its folder, cached per process."""
    return load_model(folder, task=head)


def base_key(task: Task) -> str:
    """A hash of everything that the pretrained model depends on."""
    facts = [
        task.kind,
        dict(task.shape),
        task.pretrained,
        corpus(str(task.pretrained)).sha256,
        task.pretraining_steps,
        task.seq_len,
        torch.__version__,
    ]
    return digest(facts)


def digest(facts: Any) -> str:
    """The SHA-256 of plain data, shortened to 24 hex digits."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]


def pretrained(task: Task) -> nn.Module:
    """Pretrain the task's model with plain torch, so that nothing under test is used."""
    assert task.pretrained is not None
    model = build_model(config_for(task), seed=0, task=task.head).train()
    examples = text_splits(task.pretrained, task.seq_len).train
    steps = task.pretraining_steps
    optimizer = torch.optim.AdamW(
        model.parameters(), PRETRAINING_LR, betas=(0.9, 0.95), weight_decay=0.0
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: warm_cosine(step, steps, 0.05, 0.1)
    )
    for step in range(steps):
        batch = chosen_rows(examples, task.batch_size, "pretrain", step)
        model(**batch).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model


def warm_cosine(step: int, steps: int, warmup: float, floor: float = 0.0) -> float:
    """The learning-rate multiplier at a step: linear warm-up, then a cosine to the floor."""
    rise = max(1, round(warmup * steps))
    if step < rise:
        return (step + 1) / rise
    along = (step - rise) / max(1, steps - rise)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, along)))
