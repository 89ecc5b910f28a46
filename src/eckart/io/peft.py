"""Adapters in PEFT's files, both ways, exactly; nothing is added to its JSON.

Out: a method that has a form of its own in PEFT says so (`peft_type`, `to_peft`). Any other
low-rank method becomes plain LoRA by its exact factors with the scale inside B, so that
alpha = r everywhere. In: missing and left-over tensors are named, where PEFT warns of the
ones and drops the others in silence.
"""

from __future__ import annotations

import dataclasses
import json
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from eckart.errors import FileError, UsageError
from eckart.io.folder import write_folder, write_text
from eckart.io.models import listed, read_json
from eckart.io.peft_layout import (
    PATTERNS,
    PREFIX,
    from_layout,
    meant,
    padded,
    parameters,
    plain_number,
    short_names,
    stem,
    to_layout,
    to_patterns,
    with_patterns,
)
from eckart.io.tensors import read_tensors, write_tensors
from eckart.linear import Gain, Site, Term
from eckart.recipe import Handle, Recipe, Weights, registry
from eckart.recipe.fingerprint import fingerprint, origin
from eckart.recipe.targets import sites_of

DESCRIPTION, TENSORS = "adapter_config.json", "adapter_model.safetensors"
GENERAL = "LORA"  # what every product of two thin matrices can be written as
RENAMED = {"BONE": ("MISS", {"bone_block": "miss_block"})}  # type and tensors, since PEFT 0.17
TIED_BY_PEFT = ("embed_tokens",)  # embeddings whose head PEFT adapts too when asked
TASKS = {  # by the end of a model's class; a classifier's would add a head to the model
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}
Entry = tuple[dict[str, Tensor], dict[str, Any]]  # one site: its tensors, its config's entries


# --- out -----------------------------------------------------------------------------------


def save(
    handle: Handle,
    folder: str | Path,
    overwrite: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
    uniform: bool = False,
) -> None:
    """Write an adapter that stock PEFT loads to the same function.

    `uniform` pads every rank with zeros to the largest and keeps no scale, for readers that
    know one rank and one alpha (vLLM, llama.cpp). Raises UsageError where the method has no
    exact form in PEFT.
    """
    reason = obstacle(handle)
    if reason:
        raise UsageError("this cannot be written for PEFT", [(handle.weights.slug, reason)])
    config, tensors = translate(handle, uniform)
    with write_folder(folder, overwrite) as beside:
        write_text(beside / DESCRIPTION, json.dumps(config, indent=2, sort_keys=True) + "\n")
        write_tensors(beside / TENSORS, tensors)
        if tokenizer is not None:
            tokenizer.save_pretrained(beside)


def obstacle(handle: Handle) -> str | None:
    """Why a handle cannot be written for PEFT; None where it can."""
    weights = handle.weights
    if weights.base != "frozen" or handle.originals:
        return "it changes the base itself, and PEFT's files hold what is added to one"
    if not handle.attached:
        return "nothing is attached"
    if native_entries(handle) is None:
        if not weights.promised("exports_low_rank"):
            return "it is not of low rank, and PEFT has no type for it"
        for path, by_name in handle.parts().items():
            for name, part in by_name.items():
                if not isinstance(part, Term) or part.factors() is None:
                    return f"{path}.{name} is no product of two thin matrices"
    for path in handle.attached:
        if text := unreadable(handle.sites[path], handle.parts()[path]):
            return f"{path}: {text}"
    extra = sorted(set(handle.trainable()) - set(expected_trained(handle)))
    return f"{extra[0]} is trained too" if extra else None


def unreadable(site: Site, parts: Mapping[str, nn.Module]) -> str | None:
    """What PEFT cannot do at this kind of layer."""
    gained = any(isinstance(part, Gain) for part in parts.values())
    if site.kind == "conv2d":
        module: Any = site.module
        if tuple(module.dilation) != (1, 1) or module.padding_mode != "zeros":
            return "PEFT ignores a convolution's dilation and padding mode"
    if gained and (site.kind == "experts" or site.ties):
        what = "fused experts" if site.kind == "experts" else "a tied embedding"
        return f"PEFT scales no rows of {what}"
    return None


def expected_trained(handle: Handle) -> list[str]:
    """Raw names of what an adapter's file holds: the terms', and whole modules trained beside."""
    names = [
        f"{stem}.{key}" for stem, part in handle.carried().items() for key in part.state_dict()
    ]
    for name in handle.also_train:
        names += [f"{name}.{key}" for key in handle.model.get_submodule(name).state_dict()]
    return names


def native_entries(handle: Handle) -> dict[str, Entry] | None:
    """Every site in the words of the method's own PEFT type; None where it has none."""
    if handle.weights.peft_type is None:
        return None
    entries: dict[str, Entry] = {}
    for path, parts in handle.parts().items():
        entry = handle.weights.to_peft(handle.sites[path], parts)
        if entry is None:
            return None
        entries[path] = entry
    return entries


def general_entries(handle: Handle, uniform: bool) -> dict[str, Entry]:
    """Every site as plain LoRA: its terms' exact factors side by side, alpha = r."""
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for path, terms in handle.terms().items():
        factors = [term.factors() for term in terms.values()]
        B = torch.cat([f[0].detach() for f in factors if f is not None], dim=-1)
        A = torch.cat([f[1].detach() for f in factors if f is not None], dim=-2)
        if A.shape[-2]:  # a site whose rank has become 0 is left out
            pairs[path] = B, A
    if uniform:
        largest = max(A.shape[-2] for _, A in pairs.values())
        pairs = {path: padded(B, A, largest) for path, (B, A) in pairs.items()}
    return {
        path: ({"lora_A": A, "lora_B": B}, {"r": A.shape[-2], "lora_alpha": A.shape[-2]})
        for path, (B, A) in pairs.items()
    }


def translate(handle: Handle, uniform: bool = False) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """PEFT's config and tensors for a handle that has no `obstacle`."""
    entries = None if uniform else native_entries(handle)
    peft_type = handle.weights.peft_type if entries is not None else GENERAL
    if entries is None:
        entries = general_entries(handle, uniform)
    tensors: dict[str, Tensor] = {}
    for path, (matrices, _) in entries.items():
        site = handle.sites[path]
        for name, matrix in matrices.items():
            suffix, tensor = to_layout(site, name, matrix.detach())
            tensors[f"{stem(site, entries)}.{suffix}"] = tensor
        tensors |= tied_tensors(site, matrices)
    state = handle.named_state()
    for module in handle.also_train:
        tensors |= {PREFIX + n: t for n, t in state.items() if n.startswith(f"{module}.")}
    config = describe(handle, entries)
    return {"peft_type": peft_type, **config}, tensors


def tied_tensors(site: Site, matrices: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same update as the tied head sees it: (B A)^T = A^T B^T."""
    if site.kind != "embedding" or not site.ties:
        return {}
    A, B = matrices["lora_B"].detach().mT, matrices["lora_A"].detach().mT
    return {
        f"{PREFIX}{path}.{name}.weight": tensor
        for path in site.ties
        for name, tensor in (("lora_A", A), ("lora_B", B))
    }


def describe(handle: Handle, entries: Mapping[str, Entry]) -> dict[str, Any]:
    """PEFT's config without its type: only what changes numbers, so that old readers accept it."""
    sites = [handle.sites[path] for path in entries]
    experts = [s.path for s in sites if s.kind == "experts"]
    modules = [s.path for s in sites if s.kind != "experts"]
    tied = [s for s in sites if s.ties]
    by_peft = [s for s in tied if s.path.rsplit(".", 1)[-1] in TIED_BY_PEFT]
    for site in tied:
        modules += site.ties if site not in by_peft else []
    all_modules = [path for path, _ in handle.model.named_modules()]
    per_site = {path: dict(config) for path, (_, config) in entries.items()}
    for site in tied:  # PEFT looks the tied head up in the patterns under its own name
        per_site |= {path: dict(per_site[site.path]) for path in site.ties}
    try:
        config = to_patterns(per_site)
    except ValueError as fault:
        raise UsageError("PEFT has one value for all sites", [(str(fault), "")]) from fault
    config |= {key: plain_number(config[key]) for key in PATTERNS if key in config}
    for pattern in PATTERNS.values():
        if pattern in config:
            config[pattern] = {k: plain_number(v) for k, v in config[pattern].items()}
    if experts:  # PEFT refuses dropout there; it acts in training alone
        config["lora_dropout"] = 0.0
        raw = [name for name, _ in handle.model.named_parameters()]
        config["target_parameters"] = short_names(experts, raw)
    if any(site.kind == "conv1d" for site in sites):
        config["fan_in_fan_out"] = True
    if by_peft:
        config["ensure_weight_tying"] = True
    if handle.also_train:
        config["modules_to_save"] = short_names(handle.also_train, all_modules)
    return {
        "base_model_name_or_path": origin(handle.model),
        "revision": None,
        "task_type": task_of(handle.model),
        "inference_mode": True,
        "bias": "none",
        "target_modules": short_names(modules, all_modules),
        **config,
    }


def task_of(model: nn.Module) -> str | None:
    """PEFT's task, where it adds nothing to the model; None for all others."""
    name = type(model).__name__
    return next((task for ending, task in TASKS.items() if name.endswith(ending)), None)


# --- in ------------------------------------------------------------------------------------

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


def load(model: nn.Module, folder: str | Path) -> Handle:
    """Attach an adapter that PEFT (or `save`) wrote, in place.

    Raises FileError for a type or option that has no counterpart here, and where tensors are
    missing, left over or misshapen. PEFT's files do not say which base they belong to.
    """
    folder = Path(folder)
    config, tensors = read(folder)
    method = method_of(config, folder)
    assigned, whole = assign(model, config, tensors, folder)
    return attach(model, method, config, assigned, whole, folder)


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
    whole: Mapping[str, Tensor],
    folder: Path,
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
    base = fingerprint(model)
    handle = Handle(model, Recipe(weights=method), sites, also_train=tuple(saved))
    handle.fingerprint = base
    handle.install(parts)
    state = model.state_dict()
    with torch.no_grad():
        for name, tensor in whole.items():
            state[name].copy_(tensor)
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
