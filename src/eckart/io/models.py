"""Recognises, checks and loads what a user names as MODEL.

A path never uses the network. Weights are safetensors only: pickles are refused by name. Files are
checked before transformers reads them, because it fills missing or truncated tensors with random
numbers and only warns.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from eckart.errors import EckartError, FileError, UsageError, did_you_mean, is_out_of_memory
from eckart.io import kohya
from eckart.io.headers import (
    PICKLES,
    check_folder,
    listed,
    pickles_in,
    read_json,
    refused,
    weight_files,
)
from eckart.io.heads import CONFIG, names_in, outside
from eckart.io.presets import PRESETS, build_model, config_of, fill, quiet
from eckart.io.tasks import TASKS, task_class, task_of

__all__ = [
    "PRESETS",
    "Source",
    "build_model",
    "classes_known",
    "config_of",
    "described",
    "load_model",
    "load_tokenizer",
    "own_task",
    "recognise",
    "recognise_result",
    "result_of",
]

Kind = Literal["model", "peft", "native", "run", "config", "preset", "factored", "hub", "kohya"]


ADAPTER_FILES: tuple[tuple[Kind, str, str], ...] = (  # and the key of their base
    ("native", "eckart.json", "base"),
    ("peft", "adapter_config.json", "base_model_name_or_path"),
)


@dataclass(frozen=True)
class Source:
    """What a name refers to: `path` to open, and `base` if it is an adapter."""

    kind: Kind
    path: str
    base: str | None = None


def recognise(source: str | Path) -> Source:
    """What a path, hub id or preset's name is, without reading weights or using the network.

    Raises FileError if a path does not exist or cannot be opened as a model.
    """
    text = str(source)
    path = Path(text).expanduser()
    if not path.exists():
        if text in PRESETS:
            return Source("preset", text)
        if looks_like_hub_id(text):
            return Source("hub", text)
        raise missing(path)
    return file_as_source(path) if path.is_file() else folder_as_source(path)


def file_as_source(path: Path) -> Source:
    """A configuration or an adapter in kohya's names. FileError for any other file."""
    if path.suffix == ".json":
        return Source("config", str(path))
    if path.suffix in PICKLES:
        raise refused(path)
    if path.suffix != ".safetensors":
        fix = "MODEL comes first: a model's folder or hub id. Then DATA."
        raise FileError("this is no model", [(str(path), "a file")], fix)
    if found := named_by_kohya(path):
        return found
    raise FileError(
        "a model is a folder, not one file",
        [(str(path), "weights without their config.json")],
        f"Type {path.parent} if its config.json lies beside it.",
    )


def folder_as_source(path: Path) -> Source:
    """What a folder contains, from the names of its files. FileError if it is not a model."""
    if (path / "run.json").is_file():
        return Source("run", str(path))
    for kind, file, key in ADAPTER_FILES:
        if (path / file).is_file():
            return Source(kind, str(path), base_from(path, read_json(path / file).get(key)))
    if (path / CONFIG).is_file():
        if read_json(path / CONFIG).get("model_type") == "eckart":
            return Source("factored", str(path))
        return Source("model" if weight_files(path) or pickles_in(path) else "config", str(path))
    if found := named_by_kohya(path):
        return found
    raise FileError(
        "this folder holds no model",
        [(str(path), "no config.json, adapter_config.json, eckart.json or run.json")],
        "Type the folder that has one of them.",
    )


def recognise_result(source: str | Path) -> Source:
    """`recognise`, but for a run its `final/`. FileError if it has none yet."""
    found = recognise(source)
    return recognise(result_of(found.path)) if found.kind == "run" else found


def base_from(adapter: Path, base: Any) -> str | None:
    """The base that an adapter's folder names. A relative path is resolved from the working
    directory, or else from a folder above the adapter: the one that it was trained in.
    """
    if not isinstance(base, str) or Path(base).exists():
        return base if isinstance(base, str) else None
    above = (folder / base for folder in adapter.absolute().parents)
    return next((str(path) for path in above if path.is_dir()), base)


def named_by_kohya(path: Path) -> Source | None:
    """Is it an adapter with kohya's names: a file, or a folder with nothing else to load?"""
    return Source("kohya", str(path), kohya.base_of(path)) if kohya.is_one(path) else None


def looks_like_hub_id(text: str) -> bool:
    """Is it NAME or OWNER/NAME, with an optional @REVISION, and not below an existing folder?"""
    if not re.fullmatch(r"[\w][\w.-]*(/[\w][\w.-]*)?(@[\w./-]+)?", text):
        return False
    owner, slash, _ = text.partition("/")
    return not (slash and Path(owner).is_dir())


def missing(path: Path) -> FileError:
    """The error for a path that does not exist, with the closest existing entries."""
    folder = path.parent
    while not folder.is_dir():
        folder = folder.parent
    gone = path.relative_to(folder).parts[0] if path != folder else path.name
    entries = [p.name for p in folder.iterdir() if not p.name.startswith(".")]
    listed = ", ".join(sorted(entries)[:8]) + (", ..." if len(entries) > 8 else "")
    here = str(folder) if str(folder) != "." else "this folder"
    otherwise = f"In {here}: {listed}." if entries else f"{here} is empty."
    several = str(path).split(",")
    if len(several) > 1 and all(Path(one).exists() for one in several):
        return FileError("this names several files", [(str(path), "")], f"Type data=[{path}]")
    return FileError(
        "no such file or folder", [(str(path), "")], did_you_mean(gone, entries, otherwise)
    )


def download(name: str) -> Path:
    """The folder of a hub model in the local cache, downloaded if needed; safetensors only."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    repository, _, revision = name.partition("@")
    try:
        folder = snapshot_download(
            repository,
            revision=revision or None,
            allow_patterns=["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"],
        )
    except GatedRepoError as fault:
        raise FileError(
            "this hub model asks for a login", [(name, "gated")], "Type: hf auth login"
        ) from fault
    except RepositoryNotFoundError as fault:
        raise FileError(
            "no such model on the hub, and no such path here",
            [(name, "")],
            did_you_mean(name, list(PRESETS), "Check the name, or type a path such as ./model."),
        ) from fault
    except (OSError, HfHubHTTPError, ValueError) as fault:
        offline = os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
        reason = "HF_HUB_OFFLINE is set" if offline else str(fault).splitlines()[0]
        raise FileError(
            "this is no path here, and the hub cannot be reached",
            [(name, reason)],
            did_you_mean(name, list(PRESETS), "Type a path such as ./model."),
        ) from fault
    return Path(folder)


def folder_of(source: str | Path) -> Path:
    """The local folder of a model: the path itself, or a hub model's files in the cache.

    Raises FileError for an adapter or a run: its base must be loaded first.
    """
    found = recognise(source)
    if found.kind == "hub":
        return download(found.path)
    if found.kind in ("peft", "native", "kohya"):
        raise UsageError(
            "this is an adapter, not a model",
            [(found.path, f"for {found.base or 'a base it does not name'}")],
        )
    if found.kind == "run":
        return folder_of(result_of(found.path))
    if found.kind == "preset":
        raise UsageError(
            "this is a shape without weights",
            [(found.path, "preset")],
            f"Start from random weights: eckart pretrain {found.path} DATA",
        )
    return Path(found.path)


def load_model(
    source: str | Path,
    dtype: torch.dtype | None = None,
    task: str | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    **config: Any,
) -> PreTrainedModel:
    """Load a model from a folder, a run's `final/`, a factored folder or a hub id.

    dtype None keeps the one it was saved in, task None the one it was made for. `config` overrides
    fields of its configuration; with `num_labels` the head is a new one. Missing, unexpected or
    misshapen tensors raise a FileError with their names; only the head of a classification task
    that was asked for may be missing, and is then initialised from `seed`. In evaluation mode, as
    transformers returns it.
    """
    folder = folder_of(source)
    check_folder(folder)
    facts = read_json(folder / CONFIG)
    if facts.get("model_type") == "eckart":
        import_module("eckart.hf")  # registers the config type and its loader
    with quiet():
        try:
            model, report = task_class(task or task_of(facts)).from_pretrained(
                folder,
                dtype=dtype or "auto",
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported below, all at once
                **({"device_map": device} if device is not None else {}),
                **config,
            )
        except Exception as fault:  # a damaged config.json makes transformers raise anything
            if isinstance(fault, EckartError) or is_out_of_memory(fault):
                raise
            reason = str(fault).strip().splitlines()[0] if str(fault).strip() else repr(fault)
            raise FileError("the model cannot be loaded", [(str(folder), reason)]) from fault
    new_head = outside(model) if "num_labels" in config else ()
    problems(model, report, folder, task, new_head)
    found = recognise(source)  # what an adapter will name as its base: no path into a cache
    model.config._name_or_path = (
        found.path.partition("@")[0] if found.kind == "hub" else str(folder)
    )
    drawn = {name for name, _ in model.named_parameters() if name.startswith(starts(new_head))}
    fill(model, drawn | set(report["missing_keys"]), seed)
    return model


def starts(modules: Sequence[str]) -> tuple[str, ...]:
    """The prefixes of the names of these modules' tensors."""
    return tuple(f"{name}." for name in modules)


def problems(
    model: PreTrainedModel,
    report: dict[str, Any],
    folder: Path,
    task: str | None,
    new_head: Sequence[str] = (),
) -> None:
    """Raise FileError if weights and architecture do not fit; a task's head is not checked."""

    def is_head(name: str) -> bool:
        if "pooler." in name:  # BERT's pooler serves the head, and masked models save none
            return True
        prefix = model.base_model_prefix
        return bool(prefix) and hasattr(model, prefix) and not name.startswith(prefix + ".")

    facts = [
        (name, f"{list(stored)} in the file, {list(wanted)} in the model")
        for name, stored, wanted in sorted(report["mismatched_keys"])
        if not name.startswith(starts(new_head))
    ]
    lost = sorted(report["missing_keys"])
    extra = sorted(report["unexpected_keys"])
    if task == "encoder" or (task and TASKS[task].classes):
        lost = [name for name in lost if not is_head(name)]
        inside = {name.split(".")[0] for name, _ in model.named_parameters()}
        extra = [name for name in extra if name.split(".")[0] in inside and not is_head(name)]
    facts += listed(lost, "missing") + listed(extra, "not part of this architecture")
    facts += [(message.splitlines()[0], "") for message in report.get("error_msgs", [])]
    if facts:
        kind = type(model).__name__
        raise FileError(f"the weights do not fit {kind}", [(str(folder), ""), *facts])


def result_of(run: str | Path) -> Path:
    """A run's `final/`. Raises FileError if it is not written yet."""
    final = Path(run) / "final"
    if not final.is_dir():
        raise FileError(
            "the run has no result yet",
            [(str(run), "final/ is missing")],
            f"Finish it: --resume {run}",
        )
    return final


def name_of(source: str | Path) -> str:
    """A folder's own name, or that of the run if it is a `final/`."""
    path = Path(source)
    return path.parent.name if path.name == "final" else path.name


def described(source: str | Path) -> dict[str, Any]:
    """The configuration of a model, of an adapter's head or base, of a run or a preset.

    No weights are read; empty for an adapter that names no base.
    """
    found = recognise(source)
    if found.kind == "run":
        return described(result_of(found.path))
    if found.kind in ("peft", "native", "kohya"):
        own = Path(found.path) / CONFIG
        if own.is_file():
            return read_json(own)
        return described(found.base) if found.base else {}
    if found.kind in ("preset", "config"):
        return config_of(found.path).to_dict()
    return read_json(folder_of(found.path) / CONFIG)


def own_task(source: str | Path) -> str:
    """The task that a model, an adapter, a run or a preset was made for."""
    return task_of(described(source))


def classes_known(source: str | Path) -> tuple[str, ...]:
    """A model's class names by number; none if it has no classes.

    Also none if neither an adapter nor its base names them.
    """
    facts = described(source)
    return names_in(facts) if TASKS[task_of(facts)].classes else ()


def holds_tokenizer(folder: Path) -> bool:
    """Does the folder have tokenizer files?"""
    names = ("tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json")
    return any((folder / name).is_file() for name in names)


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder (a model's, an adapter's own, a run's), or of an adapter's base.

    Raises FileError if there is none.
    """
    folder, base = Path(source), None
    if not holds_tokenizer(folder):
        found = recognise(source)
        if found.kind == "run":
            return load_tokenizer(result_of(found.path))
        folder, base = download(found.path) if found.kind == "hub" else Path(found.path), found.base
    if base and not holds_tokenizer(folder):
        return load_tokenizer(base)
    if not holds_tokenizer(folder):
        raise FileError("the model has no tokenizer", [(str(folder), "no tokenizer.json")])
    with quiet():
        try:
            return AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except Exception as fault:  # tokenizers raises a bare Exception for a damaged file
            reason = str(fault).strip().splitlines()[0]
            raise FileError("the tokenizer cannot be read", [(str(folder), reason)]) from fault
