"""State by parameter name: flat, so that it survives regrouping and a change of shape."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

from eckart.errors import FileError
from eckart.optim.part import State
from eckart.optim.sharded import layout_of, whole

Named = tuple[str, Tensor, dict[str, Any]]  # name, parameter, its group


def pack(params: Iterable[Named], states: MutableMapping[Tensor, State]) -> dict[str, Any]:
    """{"<name>/<key>": full tensor or number}; of its group "lr" and "taken" are among them."""
    flat: dict[str, Any] = {}
    for name, p, group in params:
        flat[f"{name}/lr"] = float(group["lr"])
        flat[f"{name}/taken"] = group["taken"]
        for key, value in states.get(p, {}).items():
            flat[f"{name}/{key}"] = whole(value) if isinstance(value, Tensor) else value
    return flat


def unpack(flat: Mapping[str, Any], params: Iterable[Named]) -> dict[Tensor, State]:
    """The states of the parameters, copied to where they are; sets the groups' rates.

    Raises FileError where a saved parameter is not here or a tensor does not fit.
    """
    found: dict[str, State] = {}
    for path, value in flat.items():
        name, _, key = path.rpartition("/")
        found.setdefault(name, {})[key] = value
    here = {name: (p, group) for name, p, group in params}
    strangers = [(name, "saved, but not trained here") for name in found if name not in here]
    if strangers:
        raise FileError("the optimizer's state does not fit the model", strangers)
    states: dict[Tensor, State] = {}
    for name, entry in found.items():
        p, group = here[name]
        for key in ("lr", "taken"):
            group[key] = entry.pop(key, group[key])
        if entry:
            states[p] = fitted(name, p, group, entry)
    return states


def fitted(name: str, p: Tensor, group: Mapping[str, Any], entry: State) -> State:
    """A saved state laid out as the parameter is; FileError where keys or shapes differ."""
    rule, leading = group["rule"].on(p.shape, group["leading"]), group["leading"]
    wanted = rule.start(torch.empty(p.shape, dtype=p.dtype, device="meta"), leading)
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
    layout = layout_of(name, p, leading, *rule.sides(p.shape, leading))
    return {
        key: layout.place(copy_to(value, p), rule.kind(key))
        if layout is not None and isinstance(value, Tensor)
        else copy_to(value, p)
        for key, value in entry.items()
    }


def copy_to(value: Any, p: Tensor) -> Any:
    """A copy of a state entry on the parameter's device, its dtype unchanged."""
    return value.detach().to(p.device, copy=True) if isinstance(value, Tensor) else value
