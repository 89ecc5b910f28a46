"""Adapters that PEFT (or `peft.save`) wrote, read to the last tensor.

PEFT warns of missing tensors and drops left-over ones in silence; here both are named and
refused, and so is every option that has no counterpart.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eckart.errors import FileError
from eckart.io.headers import listed, read_json
from eckart.io.peft_layout import (
    DESCRIPTION,
    PREFIX,
    TENSORS,
    TIED_BY_PEFT,
    from_layout,
    meant,
    parameters,
    short_names,
    with_patterns,
)
from eckart.io.tensors import read_tensors
from eckart.linear import Site
from eckart.recipe import Handle, Recipe, Weights, registry
from eckart.recipe.adapters import DEFAULT, require_free
from eckart.recipe.fingerprint import fingerprint
from eckart.recipe.handle import ROOT
from eckart.recipe.installing import install_parts
from eckart.recipe.targets import sites_of
from eckart.recipe.vocabulary import (
    ends,
    held_whole,
    resized,
    rows_of,
    tied_ends,
    vocabulary_of,
)

RENAMED = {"BONE": ("MISS", {"bone_block": "miss_block"})}  # type and tensors, since PEFT 0.17
# Options that change the forward and have no counterpart here; harmless where they are empty.
UNKNOWN = (
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "monteclora_config",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
)
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "milora")


def load(model: nn.Module, folder: str | Path, name: str = DEFAULT) -> Handle:
    """Attach an adapter that PEFT (or `save`) wrote, in place, under a name among others.

    Raises FileError for a type or option that has no counterpart here, and where tensors are
    missing, left over or misshapen. PEFT's files do not say which base they belong to.
    """
    folder = Path(folder)
    require_free(model, name)
    config, tensors = read(folder)
    method = method_of(config, folder)
    shared, tensors = take_shared(method, tensors, folder)
    config, tensors, rows = take_vocabulary(model, config, tensors, folder)
    with resized(model, rows):
        assigned, whole = assign(model, config, tensors, folder)
        return attach(model, method, config, assigned, shared, whole, folder, name)


def take_vocabulary(
    model: nn.Module, config: dict[str, Any], tensors: dict[str, Tensor], folder: Path
) -> tuple[dict[str, Any], dict[str, Tensor], int | None]:
    """Config, tensors and rows of an embedding that was resized or trained whole; None elsewhere.

    PEFT writes such an embedding under `modules_to_save`, beside its own wrappings, or without
    a word in the config, and a tied head once more.
    """
    tensors = {k: t for k, t in tensors.items() if ".original_module." not in k}
    for path in ends(model):
        wrapped = [k for k in tensors if k.startswith(f"{path}.modules_to_save.")]
        for key in wrapped:
            tensors[f"{path}.weight"] = tensors.pop(key)
    held = [path for path in ends(model) if f"{path}.weight" in tensors]
    before = rows_of(model)
    rows = len(tensors[f"{held[0]}.weight"]) if held else before
    named = any(meant(config.get("modules_to_save"), path) for path in held)
    if rows == before and not named:
        return config, tensors, None
    if tied_ends(model) and len(held) == 2:
        embedding, head = (tensors[f"{path}.weight"] for path in held)
        if not torch.equal(embedding, head):
            raise FileError(
                "this adapter does not act alike on both ends of a tied pair",
                [(str(folder), held[0]), ("tied with", held[1])],
                "Train it with ensure_weight_tying=True, or untie the model.",
            )
        del tensors[f"{held.pop()}.weight"]
    saved = [path for path in paths_of(model) if meant(config.get("modules_to_save"), path)]
    if tied_ends(model):
        saved = [path for path in saved if path != ends(model)[1]]
    config = {**config, "modules_to_save": list(dict.fromkeys((*saved, *held)))}
    return config, tensors, rows if held[:1] == list(ends(model)[:1]) else None


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and tensors of a folder, renamed types brought up to date, prefix off."""
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
    """The method that a config means. Raises FileError where there is none here."""
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
    """What the method keeps once at the root, by name, and all other tensors.

    PEFT up to 0.21 repeats these for every module; copies that differ are a FileError, and
    so is one that is missing.
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


def assign(
    model: nn.Module, config: Mapping[str, Any], tensors: Mapping[str, Tensor], folder: Path
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Tensors by site and name, and those of whole modules by raw name.

    Raises FileError for every tensor that has no place.
    """
    modules = dict(model.named_modules())
    sites = {site.path: site for site in sites_of(model)}
    owner = {tie: site for site in sites.values() for tie in site.ties}
    saved = [path for path in paths_of(model) if meant(config.get("modules_to_save"), path)]
    assigned: dict[str, dict[str, Tensor]] = {}
    whole, tied, extra = dict[str, Tensor](), dict[str, dict[str, Tensor]](), list[str]()
    for key, tensor in tensors.items():
        path, suffix = split(key, modules)
        if any(key.startswith(f"{name}.") for name in saved):
            whole[key] = tensor
        elif suffix in ("base_layer.weight", "weight") and is_base(modules[path], tensor):
            continue  # PEFT copies an adapted embedding into the file
        elif path in owner:
            tied.setdefault(path, {})[suffix] = tensor
        elif site := site_of(path, suffix, sites, modules, config):
            name, matrix = from_layout(site, suffix.replace("base_layer.", ""), tensor)
            assigned.setdefault(site.path, {})[name] = matrix
        else:
            extra.append(key)
    for path, by_suffix in tied.items():
        extra += check_tied(owner[path], path, assigned, by_suffix, folder)
    refuse_untied(assigned, sites, tied, config, folder)
    lost = missing(config, assigned, sites, owner, saved, whole, modules)
    if extra or lost:
        facts = listed(sorted(lost), "is missing") + listed(sorted(extra), "has no place")
        raise FileError("the adapter does not fit the model", [(str(folder), ""), *facts])
    return assigned, whole


def split(key: str, modules: Mapping[str, nn.Module]) -> tuple[str, str]:
    """A tensor's name as the longest path of a module and the rest."""
    parts = key.split(".")
    for count in range(len(parts) - 1, 0, -1):
        path = ".".join(parts[:count])
        if path in modules:
            return path, ".".join(parts[count:])
    return "", key


def is_base(module: nn.Module, tensor: Tensor) -> bool:
    """Is this the module's own weight?"""
    own = getattr(module, "weight", None)
    if not isinstance(own, Tensor) or own.shape != tensor.shape:
        return False
    return torch.equal(own.to(tensor.dtype).cpu(), tensor)


def site_of(
    path: str,
    suffix: str,
    sites: Mapping[str, Site],
    modules: Mapping[str, nn.Module],
    config: Mapping[str, Any],
) -> Site | None:
    """The site of a tensor; for experts told by how often PEFT wrapped the module."""
    if path in sites:
        return sites[path]
    names = config.get("target_parameters") or []
    own = [p for p in parameters(modules[path]) if meant(names, f"{path}.{p}")] if path else []
    depth = suffix.count("base_layer.")
    if depth >= len(own):
        return None
    return sites.get(f"{path}.{own[len(own) - 1 - depth]}")


def check_tied(
    site: Site,
    path: str,
    assigned: Mapping[str, Mapping[str, Tensor]],
    by_suffix: Mapping[str, Tensor],
    folder: Path,
) -> list[str]:
    """Tensors of a tied head must be the embedding's, transposed; returns those that are not."""
    ours = assigned.get(site.path, {})
    same = {"lora_A.weight": ours.get("lora_B"), "lora_B.weight": ours.get("lora_A")}
    wrong = []
    for suffix, tensor in by_suffix.items():
        expected = same.get(suffix)
        if expected is None or not torch.equal(expected.mT, tensor):
            wrong.append(f"{path}.{suffix}")
    return wrong


def refuse_untied(
    assigned: Mapping[str, Any],
    sites: Mapping[str, Site],
    tied: Mapping[str, Any],
    config: Mapping[str, Any],
    folder: Path,
) -> None:
    """An adapter on one end of a tied pair, or with two scales, is another function: FileError."""
    for path in assigned:
        ties = sites[path].ties
        by_peft = config.get("ensure_weight_tying") and path.rsplit(".", 1)[-1] in TIED_BY_PEFT
        both = by_peft or all(tie in tied for tie in ties)
        here = with_patterns(config, path)
        if not (both and all(with_patterns(config, tie) == here for tie in ties)):
            raise FileError(
                "this adapter does not act alike on both ends of a tied pair",
                [(str(folder), path), ("tied with", ", ".join(ties))],
                "Train it with ensure_weight_tying=True, or untie the model.",
            )


def missing(
    config: Mapping[str, Any],
    assigned: Mapping[str, Any],
    sites: Mapping[str, Site],
    owner: Mapping[str, Site],
    saved: Sequence[str],
    whole: Mapping[str, Tensor],
    modules: Mapping[str, nn.Module],
) -> list[str]:
    """What the config promises and the file does not hold."""
    layers = config.get("layers_to_transform")
    numbers = {layers} if isinstance(layers, int) else set(layers or ())
    lost = []
    for path, site in sites.items():
        names = "target_parameters" if site.kind == "experts" else "target_modules"
        wanted = meant(config.get(names), path) and not meant(config.get("exclude_modules"), path)
        if numbers and not any(p.isdigit() and int(p) in numbers for p in path.split(".")):
            wanted = False
        if wanted and path not in assigned:
            lost.append(f"{path} (all of it)")
    for name in saved:
        own = [f"{name}.{key}" for key in modules[name].state_dict()]
        lost += [key for key in own if key not in whole]
    return lost


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
    """Build the parts of every site and put them in; nothing is drawn at random."""
    sites = {site.path: site for site in sites_of(model) if site.path in assigned}
    each = {path: of_type(method, with_patterns(config, path)) for path in sites}
    method = dataclasses.replace(
        method,
        targets=tuple(short_names(list(sites), [s.path for s in sites_of(model)])),
        overrides=overrides(method, each),
    )
    parts, faults = dict[str, dict[str, nn.Module]](), list[tuple[str, str]]()
    for path, site in sites.items():
        tensors = {name: standing(t) for name, t in assigned[path].items()}
        try:
            parts[path] = each[path].parts_from_peft(site, tensors)
        except KeyError as fault:
            faults.append((f"{path}.{fault.args[0]}", "is missing"))
            continue
        entry = each[path].to_peft(site, parts[path])
        assert entry is not None
        faults += [(f"{path}.{name}", "has no place") for name in tensors.keys() - entry[0].keys()]
        faults += misshapen(site, tensors, each[path])
    saved = [path for path in paths_of(model) if meant(config.get("modules_to_save"), path)]
    state = model.state_dict()
    faults += [
        (name, f"shape {list(t.shape)}, expected {list(state[name].shape)}")
        for name, t in whole.items()
        if name in state and t.shape != state[name].shape
    ]
    if faults:
        raise FileError("the adapter does not fit the model", [(str(folder), ""), *faults[:8]])
    parts[ROOT] = method.shared_from_peft({name: standing(t) for name, t in shared.items()})
    new = vocabulary_of(model, saved) is not None
    base = fingerprint(model, held_whole(model, saved) if new else ())
    handle = Handle(model, Recipe(weights=method), sites, also_train=tuple(saved), name=name)
    handle.fingerprint = base
    install_parts(handle, parts)
    state = model.state_dict()
    with torch.no_grad():
        for key, tensor in whole.items():
            state[key].copy_(tensor)
    return handle


def of_type(method: Weights, config: Mapping[str, Any]) -> Weights:
    """The same method for another config."""
    found = type(method).from_peft(config)
    assert found is not None
    return found


def paths_of(model: nn.Module) -> list[str]:
    """Paths of all modules but the root."""
    return [path for path, _ in model.named_modules() if path]


def standing(tensor: Tensor) -> Tensor:
    """Half precision becomes fp32, as PEFT trains it; all else stays."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def misshapen(
    site: Site, tensors: Mapping[str, Tensor], method: Weights
) -> Iterable[tuple[str, str]]:
    """Faults of a factor pair whose shapes do not fit the site or the config's rank."""
    if not {"lora_A", "lora_B"} <= set(tensors):
        return
    (m, n), rank = site.shape, getattr(method, "rank", tensors["lora_A"].shape[-2])
    for name, shape in (("lora_A", (rank, n)), ("lora_B", (m, rank))):
        expected = (*site.leading, *shape)
        if tuple(tensors[name].shape) != expected:
            shapes = f"shape {list(tensors[name].shape)}, expected {list(expected)}"
            yield f"{site.path}.{name}", shapes


def overrides(method: Weights, each: Mapping[str, Weights]) -> tuple[dict[str, Any], ...]:
    """The fields in which sites differ from the method, one override for those that agree."""
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
