"""A fingerprint of a base model, by which an adapter recognises the model it was trained for."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from eckart.errors import FileError
from eckart.linear import Part
from eckart.linear.sites import dequantised, quantised

SAMPLES = 64  # values read of each tensor: enough to tell two trainings apart, cheap at any size
ESSENTIALS = (
    "model_type",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "tie_word_embeddings",
)


def origin(model: nn.Module) -> str | None:
    """The path or hub id that a model was loaded from; None if it was built in memory."""
    return getattr(getattr(model, "config", None), "_name_or_path", None) or None


def fingerprint(model: nn.Module, without: Sequence[str] = ()) -> str:
    """The fingerprint of a base: its architecture, its tensors and a sample of their values.

    `without` names modules that an adapter stores whole (see vocabulary.py).

    SHA-256 over the config entries that change the function, then each distinct parameter and
    saved buffer (names sorted; the first of a tied pair) with its shape and 64 evenly spaced
    values, rounded to bf16. It therefore does not depend on the dtype a model is loaded in, nor on
    whether a file stores a tied head twice. Attached terms are left out, but changes that a method
    made to the base itself are not: take the fingerprint before those.
    """
    digest = hashlib.sha256()
    config = getattr(model, "config", None)
    for key in ESSENTIALS:
        digest.update(f"{key}={getattr(config, key, None)}\n".encode())
    tensors: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=True))
    saved = model.state_dict(keep_vars=True)
    tensors |= {name: t for name, t in model.named_buffers() if name in saved}
    terms = tuple(
        f"{path}."
        for path, module in model.named_modules()
        if isinstance(module, Part) or path in without
    )
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(terms)}
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        if name.endswith(".weight"):
            tensor = dequantised(tensor, model.get_submodule(name.removesuffix(".weight")))
        flat = tensor.reshape(-1)
        count = min(SAMPLES, flat.numel())
        at = torch.linspace(0, max(flat.numel() - 1, 0), count, dtype=torch.float64, device="cpu")
        sample = flat[at.long().to(flat.device)]
        sample = sample.to(torch.bfloat16) if sample.is_floating_point() else sample
        digest.update(f"{name} {list(tensor.shape)}\n".encode())
        digest.update(sample.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def class_of(model: nn.Module) -> str:
    """The name of a model's class before FSDP wrapped it."""
    return next(c.__name__ for c in type(model).__mro__ if "forward" in vars(c))


def is_quantised_copy(model: nn.Module) -> bool:
    """Is this a quantised copy of a model, which that model's adapters fit too?

    Its fp16 values do not round to the bf16 values that the fingerprint of the other was made
    from.
    """
    return any(quantised(p) or p.dtype == torch.float16 for p in model.parameters())


def require_base(
    model: nn.Module, expected: str, named: str | None, folder: Path, whole: Sequence[str] = ()
) -> None:
    """Raise FileError unless the model is the base that the adapter in a folder was trained for.

    `whole` are modules that the adapter stores.
    """
    found = fingerprint(model, whole)
    if found != expected:
        raise FileError(
            "this adapter was made for another base",
            [
                (str(folder), f"for {named or 'a base without a name'}, "
                              f"fingerprint {expected[:12]}"),
                (type(model).__name__, f"fingerprint {found[:12]}"),
            ],
            "Load the base that it names, unchanged.",
        )  # fmt: skip
