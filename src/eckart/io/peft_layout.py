"""PEFT's layout of adapters: names of tensors, their shapes by kind of layer, and patterns.

A site's tensors are matrices in the layout [*, m, n]: lora_A [*, r, n], lora_B [*, m, r],
lora_magnitude_vector [*, m]. As in PEFT 0.21.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from eckart.linear import Site
from eckart.linear.sites import expert_parameters

DESCRIPTION, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
BASE = "eckart_base"  # in the file's header: the class and the fingerprint of the base
ROOT_PREFIX = "base_model."  # of tensors that all modules share
WITH_WEIGHT = ("lora_A", "lora_B")  # layers in PEFT, so their tensors are called `.weight`
TIED_BY_PEFT = ("embed_tokens",)  # embeddings whose head PEFT adapts too when asked
EMBEDDING = {"lora_A": "lora_embedding_A", "lora_B": "lora_embedding_B"}
PATTERNS = {"r": "rank_pattern", "lora_alpha": "alpha_pattern"}


def to_layout(site: Site, name: str, matrix: Tensor) -> tuple[str, Tensor]:
    """PEFT's suffix and tensor for a matrix; unknown names stay as they are."""
    if site.kind == "embedding" and name in EMBEDDING:
        return EMBEDDING[name], matrix
    if site.kind == "conv":
        axes = [None] * (site.raw.ndim - 2)
        if name == "lora_A":  # [r, c kh kw] -> [r, c, kh, kw]
            matrix = matrix.unflatten(-1, site.raw.shape[1:])
        elif name == "lora_B":  # [m, r] -> [m, r, 1, 1]
            matrix = matrix[(..., *axes)]
        elif name == "lora_magnitude_vector":  # [m] -> [1, m, 1, 1]
            matrix = matrix[(None, slice(None), *axes)]
    if site.kind == "experts":
        if name == "lora_A":  # [e, r, n] -> [e r, n]
            matrix = matrix.flatten(0, 1)
        elif name == "lora_B":  # [e, m, r] -> [m, r e], the expert running fastest
            matrix = matrix.permute(1, 2, 0).flatten(1)
    return (f"{name}.weight" if name in WITH_WEIGHT else name), matrix


def from_layout(site: Site, suffix: str, tensor: Tensor) -> tuple[str, Tensor]:
    """The name and matrix of one of PEFT's tensors: the inverse of `to_layout`."""
    name = suffix.removesuffix(".weight")
    if site.kind == "embedding":
        name = {theirs: ours for ours, theirs in EMBEDDING.items()}.get(name, name)
    if site.kind == "conv" and name in ("lora_A", "lora_B"):
        return name, tensor.flatten(1)
    if site.kind == "conv" and name == "lora_magnitude_vector":
        return name, tensor.flatten()
    if site.kind == "experts" and site.leading:
        experts = site.leading[0]
        if name == "lora_A" and tensor.shape[0] % experts == 0:
            return name, tensor.unflatten(0, (experts, -1))
        if name == "lora_B" and tensor.shape[-1] % experts == 0:
            return name, tensor.unflatten(1, (-1, experts)).permute(2, 0, 1).contiguous()
    return name, tensor


def stem(site: Site, chosen: Iterable[str]) -> str:
    """The prefix of a site's suffixes. `chosen` are the paths of all adapted sites.

    PEFT wraps a module once for each adapted parameter, the last one outermost.
    """
    if site.kind != "experts":
        return PREFIX + site.path
    chosen = set(chosen)
    own = [p for p in parameters(site.module) if f"{site.module_path}.{p}" in chosen]
    depth = len(own) - 1 - own.index(site.param)
    return PREFIX + site.module_path + ".base_layer" * depth


def parameters(module: nn.Module) -> list[str]:
    """The fused parameters of an expert module in the order in which PEFT wraps them."""
    fused = expert_parameters(module)
    return [name for name, _ in module.named_parameters(recurse=False) if name in fused]


def short_names(chosen: Sequence[str], everything: Iterable[str]) -> list[str]:
    """The shortest suffixes of paths that match all of `chosen` and nothing else, sorted.

    PEFT matches a name against a path and against its suffixes.
    """
    wanted, names = set(chosen), set()
    paths = list(everything)
    for path in chosen:
        parts = path.split(".")
        for count in range(1, len(parts) + 1):
            end = ".".join(parts[-count:])
            if all(p in wanted for p in paths if p == end or p.endswith(f".{end}")):
                break
        names.add(end)
    return sorted(names)


def meant(names: str | Iterable[str] | None, path: str) -> bool:
    """Does PEFT's `target_modules` (names, or one regular expression) match this path?"""
    if names is None:
        return False
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in names)


def saved_whole(model: nn.Module, config: Mapping[str, Any]) -> list[str]:
    """Paths of the modules that an adapter stores whole."""
    names = config.get("modules_to_save")
    return [path for path, _ in model.named_modules() if path and meant(names, path)]


def with_patterns(config: Mapping[str, Any], path: str) -> dict[str, Any]:
    """The config as it holds for one path: rank_pattern and alpha_pattern applied."""
    result = dict(config)
    for key, pattern in PATTERNS.items():
        for expression, value in (config.get(pattern) or {}).items():
            if re.match(rf"(.*\.)?({expression})$", path):
                result[key] = value
                break
    return result


def to_patterns(per_site: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """One config for sites whose ranks and alphas may differ; both patterns or neither.

    A rank pattern alone would change the scale. Raises ValueError with the name of an entry that
    has no pattern and differs between sites.
    """
    counted: dict[tuple[Any, ...], int] = {}
    for entries in per_site.values():
        pair = tuple(entries.get(key) for key in PATTERNS)
        counted[pair] = counted.get(pair, 0) + 1
    usual = max(counted, key=lambda pair: counted[pair])
    shared = dict(next(iter(per_site.values())))
    shared |= {k: v for k, v in zip(PATTERNS, usual, strict=True) if k in shared}
    for path, entries in per_site.items():
        for key, value in entries.items():
            if key not in PATTERNS and shared.get(key) != value:
                raise ValueError(f"{key} is {shared.get(key)} elsewhere and {value} at {path}")
        if tuple(entries.get(key) for key in PATTERNS) != usual:
            for key, pattern in PATTERNS.items():
                shared.setdefault(pattern, {})[re.escape(path)] = entries[key]
    return shared


def plain_number(value: float) -> int | float:
    """A number without floating-point noise (31.999999999999996 is 32)."""
    rounded = float(f"{value:.12g}")
    return int(rounded) if rounded.is_integer() else rounded
