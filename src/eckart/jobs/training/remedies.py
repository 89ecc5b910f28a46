"""Suggestions when memory runs out in a step: settings that take less, by bytes saved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from eckart.errors import OutOfRoom
from eckart.jobs.measuring.memory import in_words, model_bytes, state_bytes
from eckart.jobs.settings.job import Job
from eckart.jobs.settings.settle import gradient_bytes
from eckart.recipe import Handle, registry

SHOWN = 3


def out_of_memory(job: Job, handle: Handle, optimizer: Any, estimated: int) -> OutOfRoom:
    """The error for a run that ran out of memory, with its estimate and what to type."""
    parts = {
        **model_bytes(handle),
        "gradients": gradient_bytes(job.train, optimizer),
        "state": state_bytes(optimizer),
    }
    parts["activations"] = max(0, estimated - sum(parts.values()))
    found = remedies(job, parts, block_inputs(job, handle.model.config))
    facts = [(words, f"saves {in_words(saved)}") for words, saved in found[:SHOWN]]
    needed = [("needed", f"{in_words(sum(parts.values()))} and more, batch {job.train.batch_size}")]
    return OutOfRoom("out of memory", [*needed, *facts], "Type the first, or several of them.")


def remedies(job: Job, parts: Mapping[str, int], checkpointed: int) -> list[tuple[str, int]]:
    """key=value words with the bytes that each saves, the most first.

    `parts` are a step's bytes by category, `checkpointed` the activations' bytes under
    activation checkpointing.
    """
    size, accumulate = int(job.train.batch_size), int(job.train.accumulate)
    activations, moving = parts["activations"], parts["gradients"] + parts["state"]
    weights: Any = job.choices["weights"].method
    found: dict[str, int] = {}
    if size > 1:
        half = size // 2
        words = f"train.batch_size={half} train.accumulate={-(-size * accumulate // half)}"
        found[words] = activations * (size - half) // size
    if not job.train.checkpointing:
        found["train.checkpointing=true"] = activations - checkpointed
    if int(job.data.seq_len) >= 4:
        found[f"data.seq_len={int(job.data.seq_len) // 2}"] = activations // 2
    if weights.trains_the_model and "train.layerwise" not in job.given:
        found[f"weights={registry.DEFAULTS['weights']}"] = moving
    elif getattr(weights, "rank", 1) > 1:
        found[f"weights.rank={weights.rank // 2}"] = (moving + parts.get("factors", 0)) // 2
    kept = [(words, saved) for words, saved in found.items() if saved > 0]
    return sorted(kept, key=lambda pair: -pair[1])


def block_inputs(job: Job, config: Any) -> int:
    """Bytes of the layers' inputs [batch, t, d] in fp32, all that checkpointing keeps."""
    layers = getattr(config, "num_hidden_layers", 0) or 0
    width = getattr(config, "hidden_size", 0) or 0
    return int(4 * layers * width * int(job.train.batch_size) * int(job.data.seq_len))
