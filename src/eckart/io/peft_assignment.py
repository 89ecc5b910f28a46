"""Assigns each tensor of PEFT's files to a site, or to a module stored whole.

PEFT silently ignores tensors that match nothing, and applies an update to one end of a tied pair
only; both are refused here by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eckart.errors import FileError
from eckart.io.headers import listed, unfit
from eckart.io.peft_layout import (
    TIED_BY_PEFT,
    from_layout,
    meant,
    parameters,
    saved_whole,
    with_patterns,
)
from eckart.linear import Site
from eckart.recipe.targets import sites_of


def assign(
    model: nn.Module, config: Mapping[str, Any], tensors: Mapping[str, Tensor], folder: Path
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Tensors by site and name, and those of whole modules by raw name.

    Raises FileError for every tensor that matches nothing.
    """
    modules = dict(model.named_modules())
    sites = {site.path: site for site in sites_of(model)}
    owner = {tie: site for site in sites.values() for tie in site.ties}
    saved = saved_whole(model, config)
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
        extra += check_tied(owner[path], path, assigned, by_suffix)
    refuse_untied(assigned, sites, tied, config, folder)
    lost = missing(config, assigned, sites, saved, whole, modules)
    if extra or lost:
        facts = listed(sorted(lost), "is missing") + listed(sorted(extra), "has no place")
        raise unfit(folder, facts)
    return assigned, whole


def split(key: str, modules: Mapping[str, nn.Module]) -> tuple[str, str]:
    """A tensor's name as the longest path of a module, and the rest."""
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
    """The site of a tensor; for experts from how often PEFT wrapped the module."""
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
) -> list[str]:
    """Check that a tied head's tensors are the embedding's, transposed; returns all others."""
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
    """Raise FileError for an adapter on one end of a tied pair, or with two scales."""
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
    saved: Sequence[str],
    whole: Mapping[str, Tensor],
    modules: Mapping[str, nn.Module],
) -> list[str]:
    """Tensors that the config requires and the file lacks."""
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
