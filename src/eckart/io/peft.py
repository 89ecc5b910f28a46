"""Writes adapters in PEFT's format, exactly; nothing is added to its JSON.

A method with its own PEFT type declares it (`peft_type`, `to_peft`). Any other low-rank method is
written as plain LoRA with its exact factors and the scale inside B, so that alpha = r everywhere.
`peft_read.py` reads the format.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from eckart.errors import UsageError
from eckart.io.folder import write_folder, write_text
from eckart.io.heads import save_naming
from eckart.io.peft_layout import (
    BASE,
    DESCRIPTION,
    PATTERNS,
    PREFIX,
    ROOT_PREFIX,
    TENSORS,
    TIED_BY_PEFT,
    plain_number,
    short_names,
    stem,
    to_layout,
    to_patterns,
)
from eckart.io.peft_read import load, method_of, read
from eckart.io.tensors import write_tensors
from eckart.linear import Gain, Site, Term, joint_factors
from eckart.linear.mixing import padded
from eckart.recipe import Handle
from eckart.recipe.fingerprint import class_of, is_quantised_copy, origin
from eckart.recipe.vocabulary import held_whole, tied_ends

__all__ = ["load", "method_of", "obstacle", "read", "save", "translate"]

GENERAL = "LORA"  # what every product of two thin matrices can be written as
TASKS = {  # by the end of a model's class; a classifier's would add a head to the model
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}
Entry = tuple[dict[str, Tensor], dict[str, Any]]  # one site: its tensors, its config's entries


def save(
    handle: Handle,
    folder: str | Path,
    overwrite: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
    uniform: bool = False,
) -> None:
    """Write an adapter that PEFT loads to the same function.

    `uniform` pads every rank with zeros to the largest and stores no scale, for readers that
    support only one rank and one alpha (vLLM, llama.cpp). Raises UsageError if the method has no
    exact form in PEFT.
    """
    reason = obstacle(handle, uniform)
    if reason:
        raise UsageError("this cannot be written for PEFT", [(handle.weights.slug, reason)])
    config, tensors = translate(handle, uniform)
    with write_folder(folder, overwrite) as beside:
        write_text(beside / DESCRIPTION, json.dumps(config, indent=2, sort_keys=True) + "\n")
        base = f"{class_of(handle.model)} {handle.fingerprint}"
        named = {} if is_quantised_copy(handle.model) else {BASE: base}
        write_tensors(beside / TENSORS, tensors, named)
        save_naming(handle, beside)
        if tokenizer is not None:
            tokenizer.save_pretrained(beside)


def obstacle(handle: Handle, uniform: bool = False) -> str | None:
    """Why a handle cannot be written for PEFT; None if it can."""
    weights = handle.weights
    if weights.base != "frozen" or handle.originals:
        return "it changes the base itself, and PEFT's files hold what is added to one"
    if not handle.attached:
        return "nothing is attached"
    if uniform or native_entries(handle) is None:
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
    """What PEFT does not support at this kind of layer."""
    gained = any(isinstance(part, Gain) for part in parts.values())
    if site.kind == "conv":
        module: Any = site.module
        if set(module.dilation) != {1} or module.padding_mode != "zeros":
            return "PEFT ignores a convolution's dilation and padding mode"
    if gained and (site.kind == "experts" or site.ties):
        what = "fused experts" if site.kind == "experts" else "a tied embedding"
        return f"PEFT scales no rows of {what}"
    return None


def expected_trained(handle: Handle) -> list[str]:
    """Raw names of the tensors in an adapter's file: those of terms, and modules trained whole."""
    names = [
        f"{stem}.{key}" for stem, part in handle.carried().items() for key in part.state_dict()
    ]
    for name in held_whole(handle.model, handle.also_train):
        names += [f"{name}.{key}" for key in handle.model.get_submodule(name).state_dict()]
    return names


def native_entries(handle: Handle) -> dict[str, Entry] | None:
    """Every site in the form of the method's own PEFT type; None if it has none."""
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
    """Every site as plain LoRA: the exact factors of its terms, concatenated, alpha = r."""
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for path, terms in handle.terms().items():
        pair = joint_factors(terms.values())
        if pair is not None and pair[1].shape[-2]:  # a site whose rank has become 0 is left out
            pairs[path] = pair
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
    for module in held_whole(handle.model, handle.also_train):
        tensors |= {PREFIX + n: t for n, t in state.items() if n.startswith(f"{module}.")}
    if peft_type != GENERAL:
        shared = handle.weights.to_peft_shared(handle.shared)
        tensors |= {ROOT_PREFIX + name: tensor.detach() for name, tensor in shared.items()}
    config = describe(handle, entries)
    return {"peft_type": peft_type, **config}, tensors


def tied_tensors(site: Site, matrices: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same update for the tied head: (B A)^T = A^T B^T."""
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
    config = patterned(entries, tied)
    if experts:  # PEFT refuses dropout there; it acts in training alone
        config["lora_dropout"] = 0.0
        raw = [name for name, _ in handle.model.named_parameters()]
        config["target_parameters"] = short_names(experts, raw)
    if any(site.kind == "conv1d" for site in sites):
        config["fan_in_fan_out"] = True
    whole = held_whole(handle.model, handle.also_train)
    if by_peft or (handle.vocabulary is not None and tied_ends(handle.model)):
        config["ensure_weight_tying"] = True
        whole = whole[:1] if handle.vocabulary is not None else whole
    if whole:
        config["modules_to_save"] = short_names(whole, all_modules)
    return {
        "base_model_name_or_path": origin(handle.model),
        "revision": None,
        "task_type": task_of(handle.model),
        "inference_mode": True,
        "bias": "none",
        "target_modules": short_names(modules, all_modules),
        **config,
    }


def patterned(entries: Mapping[str, Entry], tied: Sequence[Site]) -> dict[str, Any]:
    """The entries of all sites as one config, with patterns if ranks and alphas differ."""
    per_site = {path: config for path, (_, config) in entries.items()}
    for site in tied:  # PEFT looks the tied head up in the patterns under its own name
        per_site |= dict.fromkeys(site.ties, per_site[site.path])
    try:
        config = to_patterns(per_site)
    except ValueError as fault:
        raise UsageError("PEFT has one value for all sites", [(str(fault), "")]) from fault
    for key, pattern in PATTERNS.items():
        if key in config:
            config[key] = plain_number(config[key])
        if pattern in config:
            config[pattern] = {k: plain_number(v) for k, v in config[pattern].items()}
    return config


def task_of(model: nn.Module) -> str | None:
    """PEFT's task type, if it adds nothing to the model; None for all others."""
    name = type(model).__name__
    return next((task for ending, task in TASKS.items() if name.endswith(ending)), None)
