"""A lock on the live model's configuration: what is saved by a foreign loop is not the base.

A model that carries terms, saved by `save_pretrained` from anywhere, would reload as its
base, bit for bit and without a word. While terms are attached, the configuration's own
`to_dict` says `model_type: eckart` and carries the structure, so plain transformers refuses
the folder and `import eckart.hf` loads it as it was. In memory the class and the
`model_type` stay the base's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

MODEL_TYPE = "eckart"
_classes: dict[type, type] = {}


def lock(model: nn.Module, structure: Mapping[str, Any]) -> None:
    """Let the model's configuration say what the model is made of, when it is written."""
    config: Any = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        return
    unlock(model)
    config.__dict__["_eckart_structure"] = dict(structure)
    config.__class__ = locked_class(type(config))


def unlock(model: nn.Module) -> None:
    """Give the configuration its own class back."""
    config: Any = getattr(model, "config", None)
    if config is None or "_eckart_structure" not in config.__dict__:
        return
    del config.__dict__["_eckart_structure"]
    config.__class__ = type(config).__bases__[0]


def locked_class(base: type) -> type:
    """The cached subclass of a configuration class that writes the lock."""
    if base not in _classes:
        _classes[base] = type(base.__name__, (base,), {"to_dict": to_dict, "__reduce__": _reduce})
    return _classes[base]


def to_dict(self: Any) -> dict[str, Any]:
    """The base's dictionary with the type, the structure and the base's own quantisation."""
    data = type(self).__bases__[0].to_dict(self)
    structure = data.pop("_eckart_structure", None) or self.__dict__["_eckart_structure"]
    return locked_dict(data, structure)


def locked_dict(data: dict[str, Any], structure: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration's dictionary as it stands on disk."""
    data = dict(data)
    base_quantization = data.pop("quantization_config", None)
    data["base_model_type"], data["model_type"] = data.get("model_type"), MODEL_TYPE
    data["quantization_config"] = {
        "quant_method": MODEL_TYPE,
        "structure": dict(structure),
        "base": base_quantization,
    }
    return data


def _reduce(self: Any) -> Any:
    state = dict(self.__dict__)
    return _revive, (type(self).__bases__[0], state)


def _revive(base: type, state: dict[str, Any]) -> Any:
    config = base.__new__(locked_class(base))
    config.__dict__.update(state)
    return config
