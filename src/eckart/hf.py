"""Registers factored models with transformers: Auto classes, device maps and generate work.

    import eckart.hf
    model = AutoModelForCausalLM.from_pretrained("runs/0001/final")

A factored folder's config has `model_type: eckart` and the structure. This module registers the
type with AutoConfig, which returns the base's own configuration, and a transformers quantizer that
builds the terms before the (sharded) weights are loaded. The result is the same as a model with
attached terms: it keeps no trace of a quantizer, its configuration is locked (recipe/lock.py), and
any `save_pretrained` writes a folder that loads again.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from eckart.errors import FileError
from eckart.io.headers import format_errors, header, listed
from eckart.recipe import Handle, attach_from, registry
from eckart.recipe.attachment import rebuild_term
from eckart.recipe.handle import CARRIED, handle_of
from eckart.recipe.lock import MODEL_TYPE, lock_config

__all__ = ["handle_of"]

WRITTEN_BY_LOCK = ("model_type", "base_model_type", "transformers_weights")


class EckartConfig(PretrainedConfig):
    """The config class registered for the type; it only returns the base's own configuration."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The base's configuration, locked. FileError if transformers lacks the base's type."""
        data = {k: v for k, v in config_dict.items() if k not in WRITTEN_BY_LOCK}
        base_type = config_dict.get("base_model_type")
        if base_type not in CONFIG_MAPPING:
            raise FileError(
                "transformers has no such architecture",
                [("config.json", f"base_model_type = {base_type}")],
                "Update transformers: pip install -U transformers.",
            )
        found = CONFIG_MAPPING[base_type].from_dict(data, **kwargs)
        config = found[0] if isinstance(found, tuple) else found
        lock_config(config, data["quantization_config"]["structure"])
        return found


@register_quantization_config(MODEL_TYPE)
class FactoredConfig(QuantizationConfigMixin):
    """The structure, as stored under `quantization_config`."""

    def __init__(self, structure: Mapping[str, Any], base: Any = None, **kwargs: Any):
        self.quant_method = MODEL_TYPE
        self.structure, self.base = dict(structure), base

    def to_dict(self) -> dict[str, Any]:
        """Plain data; `from_dict` of it is this again."""
        return {
            "quant_method": MODEL_TYPE,
            "structure": copy.deepcopy(self.structure),
            "base": self.base,
        }


@register_quantizer(MODEL_TYPE)
class FactoredQuantizer(HfQuantizer):
    """Builds the terms before the weights are loaded, and removes its own traces afterwards."""

    requires_calibration = False
    handle: Handle

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True

    def is_serializable(self) -> bool:
        return True

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Raise FileError for a base that is itself quantised."""
        if self.quantization_config.base is not None:
            method = self.quantization_config.base.get("quant_method")
            raise FileError(
                "terms over a quantised base cannot be loaded from one folder",
                [("config.json", f"quantization_config.base = {method}")],
                "Load the base and the adapter: eckart.load(FOLDER, model=BASE).",
            )

    def update_attn_implementation(self, config: Any) -> Any:
        """Remove the lock's entries from the configuration before transformers looks for files.

        They are present where a class such as LlamaForCausalLM read config.json itself.
        """
        for key in WRITTEN_BY_LOCK:
            config.__dict__.pop(key, None)
        return config

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] = (), **kwargs: Any
    ) -> None:
        tie(model)
        wanted = model.dtype
        # On the CPU, not meta: terms may draw tensors that are not saved.
        with torch.device("cpu"), format_errors(Path("config.json")):
            structure = fitted(self.quantization_config.structure, model)
            self.handle = attach_from(model, structure)
            self.derived = derived(self.handle, structure)
        for site in self.handle.sites.values():
            module: Any = site.module
            if site.kind == "experts" and module._parameters.get(site.param) is None:
                module._is_hf_initialized = True  # it would look for the matrix to draw it
        if self.handle.weights.base == "dropped" and of_one_dtype(checkpoint_files or ()):
            for part in self.handle.carried().values():
                part.to(dtype=wanted)  # the terms are the map itself: read as a matrix would be
        dense = [f"{s.module_path}.{s.param}" for s in self.handle.sites.values()]
        ignored = set(model._keys_to_ignore_on_load_unexpected or ())
        model._keys_to_ignore_on_load_unexpected = ignored | {lock_pattern(n) for n in dense}

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        handle = self.handle
        refuse_missing(handle)
        handle.originals.clear()  # of a changed base only what it became is in the folder
        carried = handle.carried()
        with torch.no_grad():
            for stem, tensors in self.derived.items():
                device = next(carried[stem].parameters(), torch.empty(0)).device
                for name, tensor in tensors.items():
                    carried[stem].register_buffer(name, tensor.to(device), persistent=False)
        restore_training(handle)
        self.remove_quantization_config(model)
        del model.is_quantized
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                module.config.__dict__.pop("_is_quantized", None)
        model.__dict__[CARRIED] = handle
        return model


def tie(model: PreTrainedModel) -> None:
    """Make tied modules share one parameter, by which a tied pair is recognised as one site.

    While a model is built for loading, transformers' own `tie_weights` does nothing.
    """
    for target, source in model.all_tied_weights_keys.items():
        path, _, name = target.rpartition(".")
        setattr(model.get_submodule(path), name, model.get_parameter(source))


def fitted(structure: Mapping[str, Any], model: PreTrainedModel) -> dict[str, Any]:
    """The structure with this model's paths, as the model may be the body or have another head.

    `model.layers.0.x` becomes `layers.0.x` in a bare LlamaModel; entries of a missing head are
    left out.
    """
    prefix = f"{model.base_model_prefix}."
    here = {path for path, _ in model.named_modules()}

    def place(path: str) -> str | None:
        owner = path if path in here or "." not in path else path.rsplit(".", 1)[0]
        if owner in here:
            return path
        shorter = path.removeprefix(prefix)
        if shorter != path and (shorter in here or shorter.rsplit(".", 1)[0] in here):
            return shorter
        return path if path.startswith(prefix) else None

    return {
        **structure,
        "sites": {new: s for path, s in structure["sites"].items() if (new := place(path))},
        "changed": [new for path in structure["changed"] if (new := place(path))],
        "also_train": [new for path in structure["also_train"] if (new := place(path)) in here],
    }


def derived(handle: Handle, structure: Mapping[str, Any]) -> dict[str, dict[str, torch.Tensor]]:
    """Tensors that terms recompute instead of saving, by raw name of the part."""
    method = registry.load(handle.weights.slug)
    found = {}
    specs = {
        f"{handle.sites[path].module_path}.{handle.sites[path].prefix}{child}": spec
        for path, parts in structure["sites"].items()
        for child, spec in parts.items()
    }
    for stem, spec in (specs | structure["shared"]).items():
        part = rebuild_term(method, spec)
        names = part._non_persistent_buffers_set
        found[stem] = {n: b for n, b in part.named_buffers(recurse=False) if n in names}
    return found


def of_one_dtype(files: Sequence[str]) -> bool:
    """Do all floating tensors of these files have one dtype?"""
    dtypes = {tensor["dtype"] for file in files for tensor in header(Path(file)).values()}
    return len({name for name in dtypes if "F" in name}) <= 1  # F32, F16, BF16, F8_E4M3


def lock_pattern(name: str) -> str:
    """The regular expression for one tensor's name, with or without the body's prefix."""
    return f"(^|\\.){name.replace('.', chr(92) + '.')}$"


def refuse_missing(handle: Handle) -> None:
    """Raise FileError if a term's tensor was not loaded: its values would be arbitrary.

    transformers marks what it loaded; tensors on another device than requested are on meta.
    """
    lost = [
        f"{stem}.{name}"
        for stem, part in handle.carried().items()
        for name, tensor in part.state_dict(keep_vars=True).items()
        if tensor.device.type != "meta" and not getattr(tensor, "_is_hf_initialized", False)
    ]
    if lost:
        raise FileError(
            "the folder lacks tensors of its own structure",
            listed(sorted(lost), "missing or misshapen"),
        )


def restore_training(handle: Handle) -> None:
    """Freeze what the method froze: transformers makes every loaded parameter trainable."""
    if handle.weights.base != "frozen":
        return
    trained = {
        f"{stem}.{name}"
        for stem, part in handle.carried().items()
        for name, _ in part.named_parameters()
    }
    for name, parameter in handle.model.named_parameters():
        whole = any(name.startswith(f"{module}.") for module in handle.also_train)
        parameter.requires_grad_(name in trained or whole)


AutoConfig.register(MODEL_TYPE, EckartConfig)
