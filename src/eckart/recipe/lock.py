"""Locks the configuration of a live model, so that it cannot be saved as if it were the base.

A model with terms that is saved by `save_pretrained` would load again as its base, bit for bit and
without a warning. While terms are attached, the configuration is written with three changes:

    model_type            eckart: transformers' Auto classes do not know it and refuse
    transformers_weights  not a file's name: LlamaForCausalLM and its like stop and quote it
    quantization_config   the structure, from which `import eckart.hf` rebuilds the model

In memory the configuration's class is a subclass of the base's own class, with the same name, and
`model_type` is the base's. `state_dict()` is unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from torch import nn

MODEL_TYPE = "eckart"
# transformers takes this for the name of the weights' file, sees that it is none, and quotes it.
ADVICE = "none, since this model is made of eckart's terms: type `import eckart.hf` first"
STRUCTURE = "_eckart_structure"  # attribute of a locked configuration


def lock(model: nn.Module, structure: Mapping[str, Any]) -> None:
    """Make the model's configuration describe its terms when it is written."""
    config: Any = getattr(model, "config", None)
    if config is not None and hasattr(config, "to_dict"):
        lock_config(config, structure)


def unlock(model: nn.Module) -> None:
    """Restore the configuration's own class."""
    config: Any = getattr(model, "config", None)
    if config is not None and STRUCTURE in config.__dict__:
        unlock_config(config)


def lock_config(config: Any, structure: Mapping[str, Any]) -> None:
    """Lock one configuration; replaces a lock that is already set."""
    if STRUCTURE in config.__dict__:
        unlock_config(config)
    config.__dict__[STRUCTURE] = dict(structure)
    config.__class__ = locked_class(config.__class__)


def unlock_config(config: Any) -> None:
    """Undo `lock_config`."""
    del config.__dict__[STRUCTURE]
    config.__class__ = type(config).__bases__[0]


@cache
def locked_class(base: type) -> type:
    """The subclass of a configuration class that writes the lock; cached by class."""
    methods = {"to_dict": to_dict, "to_diff_dict": to_diff_dict, "__reduce__": _reduce}
    return type(base.__name__, (base,), {**methods, "__module__": base.__module__})


def to_dict(self: Any) -> dict[str, Any]:
    """The base's dictionary with the lock."""
    return locked_dict(own(self).to_dict(self), self.__dict__[STRUCTURE])


def to_diff_dict(self: Any) -> dict[str, Any]:
    """What differs from the defaults, with the lock: this is what `save_pretrained` writes."""
    return locked_dict(own(self).to_diff_dict(self), self.__dict__[STRUCTURE])


def own(config: Any) -> Any:
    """The class of a configuration without the lock."""
    return type(config).__bases__[0]


def locked_dict(data: dict[str, Any], structure: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration's dictionary with the lock; one that is locked is returned as it is."""
    data = {key: value for key, value in data.items() if key != STRUCTURE}
    base = data.pop("quantization_config", None)
    if base is not None and base.get("quant_method") == MODEL_TYPE:
        base = base.get("base")
    if data.get("model_type") != MODEL_TYPE:
        data["base_model_type"] = data.get("model_type")
    return {
        **data,
        "model_type": MODEL_TYPE,
        "transformers_weights": ADVICE,
        "quantization_config": {
            "quant_method": MODEL_TYPE,
            "structure": dict(structure),
            "base": base,
        },
    }


def _reduce(self: Any) -> Any:
    return _revive, (own(self), dict(self.__dict__))


def _revive(base: Any, state: dict[str, Any]) -> Any:
    config: Any = base.__new__(locked_class(base))
    config.__dict__.update(state)
    return config
