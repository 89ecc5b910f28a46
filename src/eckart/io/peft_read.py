"""Reads adapters that PEFT (or `peft.save`) wrote, without ignoring any tensor.

PEFT warns of missing tensors and ignores unexpected ones silently; both are refused here by name,
and so is every option without a counterpart.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eckart.errors import FileError
from eckart.io.headers import format_errors, read_header, read_json, unfit
from eckart.io.peft_assignment import assign
from eckart.io.peft_layout import (
    BASE,
    DESCRIPTION,
    PREFIX,
    TENSORS,
    saved_whole,
    short_names,
    with_patterns,
)
from eckart.io.peft_vocabulary import take_vocabulary
from eckart.io.tensors import read_tensors
from eckart.linear import Site
from eckart.recipe import Handle, Recipe, Weights, registry
from eckart.recipe.adapters import DEFAULT, require_free
from eckart.recipe.fingerprint import class_of, fingerprint, is_quantised_copy, require_base
from eckart.recipe.handle import ROOT
from eckart.recipe.installing import install_parts
from eckart.recipe.targets import sites_of
from eckart.recipe.vocabulary import held_whole, resized

RENAMED = {"BONE": ("MISS", {"bone_block": "miss_block"})}  # type and tensors, since PEFT 0.17
# Options that change the forward and have no counterpart here; harmless where they are empty.
UNKNOWN = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "monteclora_config",
    "use_bdlora",
    "use_qalora",
)
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "milora")


def load(model: nn.Module, folder: str | Path, name: str = DEFAULT) -> Handle:
    """Attach an adapter that PEFT (or `save`) wrote, in place, under a name.

    Raises FileError for a type or option without a counterpart here, and for missing, unexpected or
    misshapen tensors. PEFT's own files do not identify their base; those of `save` do, and another
    base raises a FileError.
    """
    folder = Path(folder)
    require_free(model, name)
    with format_errors(folder / DESCRIPTION):
        config, tensors = read(folder)
        method = method_of(config, folder)
        shared, tensors = take_shared(method, tensors, folder)
        config, tensors, rows = take_vocabulary(model, config, tensors, folder)
    with resized(model, rows):
        with format_errors(folder / DESCRIPTION):
            require_its_base(model, config, folder)
            assigned, whole = assign(model, config, tensors, folder)
        return attach(model, method, config, assigned, shared, whole, folder, name)


def require_its_base(model: nn.Module, config: Mapping[str, Any], folder: Path) -> None:
    """Raise FileError if the file's header names another base.

    Not compared for a model of another class: its head differs, and the adapter may fit both.
    """
    made_on, _, expected = read_header(folder / TENSORS)[1].get(BASE, "").partition(" ")
    if made_on == class_of(model) and not is_quantised_copy(model):
        brought = held_whole(model, saved_whole(model, config))
        require_base(model, expected, config.get("base_model_name_or_path"), folder, brought)


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and tensors of a folder, with current type names and without PEFT's prefix."""
    if not (folder / DESCRIPTION).is_file():
        raise FileError("this folder holds no PEFT adapter", [(str(folder), f"no {DESCRIPTION}")])
    config = read_json(folder / DESCRIPTION)
    tensors = {k.removeprefix(PREFIX): t for k, t in read_tensors(folder / TENSORS).items()}
    if config.get("peft_type") in RENAMED:
        old = config["peft_type"]
        config["peft_type"], names = RENAMED[old]
        warnings.warn(f"{folder}: {old} is called {config['peft_type']} now", stacklevel=4)
        for before, after in names.items():
            tensors = {re.sub(rf"\b{before}\b", after, k): t for k, t in tensors.items()}
    return config, tensors


def method_of(config: Mapping[str, Any], folder: Path) -> Weights:
    """The method that a config describes. Raises FileError if there is none."""
    where = str(folder / DESCRIPTION)
    set_options = [name for name in UNKNOWN if config.get(name)]
    if set_options:
        raise FileError(
            "this adapter uses what eckart has no counterpart for",
            [(where, f"{name} = {config[name]!r}") for name in set_options],
        )
    init = str(config.get("init_lora_weights", True)).lower()
    if init.startswith(CHANGES_BASE):
        raise FileError(
            "this adapter belongs to a base that its initialisation changed",
            [(where, f"init_lora_weights = {init!r}")],
            "Save it in PEFT with path_initial_model_for_weight_conversion=FOLDER first.",
        )
    kind = config.get("peft_type")
    known: set[str] = set()
    for entry in registry.methods().values():
        theirs = entry.declares.get("peft_type")
        known |= {theirs} if theirs else set()
        if theirs == kind and kind is not None:
            cls = registry.load(entry.name)
            assert issubclass(cls, Weights)
            method = cls.from_peft(config)
            if method is not None:
                return method
    raise FileError(
        "this type of adapter is not known here",
        [(where, f"peft_type = {kind}")],
        f"Known: {', '.join(sorted(known))}.",
    )


def take_shared(
    method: Weights, tensors: Mapping[str, Tensor], folder: Path
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors that the method stores once at the root, by name, and all others.

    PEFT up to 0.21 repeats these for every module; copies that differ, or a missing one, raise a
    FileError.
    """
    shared, rest = dict[str, Tensor](), dict[str, Tensor]()
    for key, tensor in tensors.items():
        name = key.rpartition(".")[2]
        if name not in method.peft_shared:
            rest[key] = tensor
        elif not torch.equal(shared.setdefault(name, tensor), tensor):
            raise FileError("copies of a shared tensor differ", [(str(folder), key)])
    missing = [(name, "is missing") for name in method.peft_shared if name not in shared]
    if missing:
        raise FileError(
            "this adapter leaves its random bases to the machine that made it",
            [(str(folder), ""), *missing],
            "Save it in PEFT with save_projection=True.",
        )
    return shared, rest


def attach(
    model: nn.Module,
    method: Weights,
    config: Mapping[str, Any],
    assigned: Mapping[str, Mapping[str, Tensor]],
    shared: Mapping[str, Tensor],
    whole: Mapping[str, Tensor],
    folder: Path,
    name: str = DEFAULT,
) -> Handle:
    """Build the parts of every site and install them; nothing is drawn at random."""
    sites = {site.path: site for site in sites_of(model) if site.path in assigned}
    with format_errors(folder / DESCRIPTION):
        each = {path: of_type(method, with_patterns(config, path)) for path in sites}
        parts, faults = built(sites, each, assigned)
        saved = saved_whole(model, config)
    state = model.state_dict()
    faults += [
        (name, f"shape {list(t.shape)}, expected {list(state[name].shape)}")
        for name, t in whole.items()
        if name in state and t.shape != state[name].shape
    ]
    if faults:
        raise unfit(folder, faults[:8])
    parts[ROOT] = method.shared_from_peft({name: in_fp32(t) for name, t in shared.items()})
    method = dataclasses.replace(
        method,
        targets=tuple(short_names(list(sites), [s.path for s in sites_of(model)])),
        overrides=overrides(method, each),
    )
    base = fingerprint(model, held_whole(model, saved))
    handle = Handle(model, Recipe(weights=method), sites, also_train=tuple(saved), name=name)
    handle.fingerprint = base
    install_parts(handle, parts)
    state = model.state_dict()
    with torch.no_grad():
        for key, tensor in whole.items():
            state[key].copy_(tensor)
    return handle


def built(
    sites: Mapping[str, Site],
    each: Mapping[str, Weights],
    assigned: Mapping[str, Mapping[str, Tensor]],
) -> tuple[dict[str, dict[str, nn.Module]], list[tuple[str, str]]]:
    """The parts of every site by its own method, and errors in their tensors."""
    parts, faults = dict[str, dict[str, nn.Module]](), list[tuple[str, str]]()
    for path, site in sites.items():
        tensors = {name: in_fp32(t) for name, t in assigned[path].items()}
        try:
            parts[path] = each[path].parts_from_peft(site, tensors)
        except KeyError as fault:
            faults.append((f"{path}.{fault.args[0]}", "is missing"))
            continue
        entry = each[path].to_peft(site, parts[path])
        assert entry is not None
        faults += [(f"{path}.{name}", "has no place") for name in tensors.keys() - entry[0].keys()]
        faults += misshapen(site, tensors, each[path])
    return parts, faults


def of_type(method: Weights, config: Mapping[str, Any]) -> Weights:
    """The same method for another config."""
    found = type(method).from_peft(config)
    assert found is not None
    return found


def in_fp32(tensor: Tensor) -> Tensor:
    """Half precision converted to fp32, as PEFT trains it; other dtypes unchanged."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def misshapen(
    site: Site, tensors: Mapping[str, Tensor], method: Weights
) -> Iterable[tuple[str, str]]:
    """Errors of a factor pair whose shapes do not fit the site or the config's rank."""
    if not {"lora_A", "lora_B"} <= set(tensors):
        return
    (m, n), rank = site.shape, getattr(method, "rank", tensors["lora_A"].shape[-2])
    for name, shape in (("lora_A", (rank, n)), ("lora_B", (m, rank))):
        expected = (*site.leading, *shape)
        if tuple(tensors[name].shape) != expected:
            shapes = f"shape {list(tensors[name].shape)}, expected {list(expected)}"
            yield f"{site.path}.{name}", shapes


def overrides(method: Weights, each: Mapping[str, Weights]) -> tuple[dict[str, Any], ...]:
    """The fields in which sites differ from the method, grouped into one override per value."""
    names = [f.name for f in dataclasses.fields(method) if f.name not in ("targets", "overrides")]
    grouped: dict[tuple[tuple[str, Any], ...], list[str]] = {}
    for path, own in each.items():
        pairs = [(n, getattr(own, n)) for n in names if getattr(own, n) != getattr(method, n)]
        if pairs:
            grouped.setdefault(tuple(pairs), []).append(path)
    return tuple(
        {"match": f"re:^({'|'.join(re.escape(p) for p in paths)})$", **dict(pairs)}
        for pairs, paths in grouped.items()
    )
