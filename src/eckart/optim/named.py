"""Optimizer state as a flat dict by parameter name, independent of how parameters are grouped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

from eckart.errors import FileError
from eckart.optim.part import State
from eckart.optim.sharded import whole

Named = tuple[str, Tensor, dict[str, Any]]  # name, parameter, its group


def pack(params: Iterable[Named], states: MutableMapping[Tensor, State]) -> dict[str, Any]:
    """{"<name>/<key>": unsharded tensor or number}; includes the group's "lr" and "taken"."""
    flat: dict[str, Any] = {}
    for name, p, group in params:
        flat[f"{name}/lr"] = float(group["lr"])
        flat[f"{name}/taken"] = group["taken"]
        for key, value in states.get(p, {}).items():
            flat[f"{name}/{key}"] = whole(value) if isinstance(value, Tensor) else value
    return flat


def unpack(flat: Mapping[str, Any], params: Iterable[Named]) -> dict[Tensor, State]:
    """The states of the parameters, on their devices and sharded as they are; sets "lr" and
    "taken" of the groups.

    Raises FileError where a saved parameter is not trained here or a tensor's shape differs.
    """
    found: dict[str, State] = {}
    for path, value in flat.items():
        name, _, key = path.rpartition("/")
        found.setdefault(name, {})[key] = value
    here = {name: (p, group) for name, p, group in params}
    unknown = [(name, "saved, but not trained here") for name in found if name not in here]
    if unknown:
        raise FileError("the optimizer's state does not fit the model", unknown)
    states: dict[Tensor, State] = {}
    pairs, wanted = pairs_of(here), first_states(here)
    for name, entry in found.items():
        p, group = here[name]
        for key in ("lr", "taken"):
            group[key] = entry.pop(key, group[key])
        if entry:
            check_fits(name, entry, wanted[name])
            if name in pairs:  # a pair's state is whole on every process
                states[p] = {key: copy_to(value, p) for key, value in entry.items()}
            else:
                states[p] = placed(name, p, group, entry)
    return states


Here = Mapping[str, tuple[Tensor, Mapping[str, Any]]]  # name -> parameter, its group


def pairs_of(here: Here) -> dict[str, tuple[str, str]]:
    """{name: (name of B, name of A)} for both factors of each pair that a pair rule updates."""
    groups = [group for _, group in here.values() if group["rule"].pair is not None]
    pairs = [(b, a) for group in groups for b, a, _ in group["pairs"] if b in here and a in here]
    return {name: pair for pair in pairs for name in pair}


def first_states(here: Here) -> dict[str, State]:
    """The parameters' states before the first step, on the meta device."""
    pairs, found = pairs_of(here), dict[str, State]()
    for name, (p, group) in here.items():
        rule, leading = group["rule"].on(p.shape, group["leading"]), group["leading"]
        found[name] = rule.start(hollow(p), leading)
        if name in pairs:
            B, A = (hollow(here[n][0]) for n in pairs[name])
            found[name] |= rule.pair.init(B, A, rule.inner)[pairs[name].index(name)]
        elif rule.pair is not None:
            found[name] |= rule.inner.init(hollow(p))
    return found


def hollow(p: Tensor) -> Tensor:
    """A meta tensor with the unsharded shape and the dtype of p."""
    return torch.empty(p.shape, dtype=p.dtype, device="meta")


def check_fits(name: str, entry: State, wanted: State) -> None:
    """Raise FileError where keys are missing or shapes differ."""
    facts = [(f"{name}/{key}", "missing") for key in wanted if key not in entry]
    for key, value in entry.items():
        if isinstance(value, Tensor):
            shape = tuple(wanted[key].shape) if key in wanted else None
            if shape != tuple(value.shape):
                facts.append((f"{name}/{key}", f"saved {tuple(value.shape)}, needed {shape}"))
    if facts:
        raise FileError(
            "the optimizer's state does not fit the update rule",
            facts,
            "Resume with the update rule it was saved under, or start the optimizer fresh.",
        )


def placed(name: str, p: Tensor, group: Mapping[str, Any], entry: State) -> State:
    """A copy of a saved state, sharded as the parameter is."""
    rule, leading = group["rule"].on(p.shape, group["leading"]), group["leading"]
    layout = rule.layout(name, p, leading)
    copies = {key: copy_to(value, p) for key, value in entry.items()}
    if layout is None:
        return copies
    return {
        k: layout.place(v, rule.kind(k)) if isinstance(v, Tensor) else v for k, v in copies.items()
    }


def copy_to(value: Any, p: Tensor) -> Any:
    """A copy of a state entry on the parameter's device, its dtype unchanged."""
    return value.detach().to(p.device, copy=True) if isinstance(value, Tensor) else value
