"""Classification heads: class names by number, in a configuration and beside an adapter.

An adapter whose head was trained with it stores the model's `config.json` beside its own files: its
base has another head, or none, and PEFT's config has no entry for the names.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from eckart.io.folder import write_json
from eckart.io.tasks import TASKS, task_of
from eckart.recipe import Handle
from eckart.recipe.lock import STRUCTURE, unlock_config

CONFIG = "config.json"


def names_in(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The class names in the order of their numbers; LABEL_0, ... count as numbers."""
    by_id = config.get("id2label") or {}
    names = tuple(str(by_id[key]) for key in sorted(by_id, key=int))
    unnamed = all(name == f"LABEL_{i}" for i, name in enumerate(names))
    return tuple(str(i) for i in range(len(names))) if unnamed else names


def naming(names: Sequence[str]) -> dict[str, Any]:
    """The configuration entries of a head for these classes."""
    by_id = dict(enumerate(names))
    by_name = {name: i for i, name in by_id.items()}
    return {"num_labels": len(names), "id2label": by_id, "label2id": by_name}


def naming_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same entries from a configuration on disk; empty if its model has no classes."""
    if not TASKS[task_of(config)].classes:
        return {}
    by_id = {int(key): str(name) for key, name in (config.get("id2label") or {}).items()}
    kept = naming([by_id[key] for key in sorted(by_id)])
    pad = config.get("pad_token_id")
    return kept if pad is None else {**kept, "pad_token_id": pad}


def save_naming(handle: Handle, folder: Path, refusal: str = "") -> None:
    """Write the model's configuration beside an adapter that stores a classification head.

    transformers takes a `refusal` for the name of the weights' file and quotes it: for a folder
    whose weights it would otherwise load as a whole model's.
    """
    model: Any = handle.model
    if not (handle.also_train and isinstance(model, PreTrainedModel)):
        return
    config = copy.deepcopy(model.config)
    if STRUCTURE in config.__dict__:
        unlock_config(config)
    config.architectures = [type(model).__name__]
    if TASKS[task_of(config)].classes:
        refused = {"transformers_weights": refusal} if refusal else {}
        write_json(folder / CONFIG, {**config.to_diff_dict(), **refused})


def outside(model: nn.Module) -> tuple[str, ...]:
    """Children of a model outside its pretrained body that hold parameters: its head."""
    body = getattr(model, "base_model_prefix", "")
    with_head = hasattr(model, "num_labels") or TASKS[task_of_live(model)].classes  # T5's has none
    if not body or not hasattr(model, body) or not with_head:
        return ()
    return tuple(
        name for name, child in model.named_children() if name != body and list(child.parameters())
    )


def task_of_live(model: Any) -> str:
    """The task of a model in memory, from its class."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    return task_of({"architectures": [type(model).__name__], "model_type": kind})


def names_of(model: Any) -> tuple[str, ...]:
    """The class names of a model in memory, by number; none if it has no classes."""
    if not TASKS[task_of_live(model)].classes:
        return ()
    return names_in({"id2label": model.config.id2label})
