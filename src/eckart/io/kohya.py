"""Adapters in kohya's names, as webui and ComfyUI take them: one file, both ways.

    lora_te_model_layers_0_self_attn_q_proj.lora_down.weight   A [r, n], or [r, c, kh, kw]
                                           .lora_up.weight     B [m, r], or [m, r, 1, 1]
                                           .alpha              a number; the scale is alpha / r
                                           .dora_scale         [m, 1], DoRA: read alone

Dots become underscores, which cannot be undone by a string rule: names are looked up among those
of the model's own maps, and two that coincide are refused. In a file of several models the prefix
names the model: `unet`, `te`, `te1`, `te2`, `te3`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from eckart.errors import FileError, UsageError
from eckart.io import peft_read
from eckart.io.folder import write_folder
from eckart.io.headers import format_errors, header, listed, read_header, unfit
from eckart.io.peft_layout import to_patterns
from eckart.io.tensors import read_tensors, write_tensors
from eckart.linear import LowRank, Site, Term, joint_factors
from eckart.recipe import Handle
from eckart.recipe.adapters import DEFAULT, require_free
from eckart.recipe.fingerprint import origin
from eckart.recipe.targets import sites_of

TENSORS = "lora.safetensors"
DOWN, UP, ALPHA = "lora_down.weight", "lora_up.weight", "alpha"
MAGNITUDE = "dora_scale"  # DoRA: a length for each row
OTHER = {  # what else the names may say, by how a suffix begins
    "hada_": "LoHa, an elementwise product of two pairs",
    "lokr_": "LoKr, a Kronecker product",
    "lora_mid": "LoCon with a Tucker core",
    "oft_": "OFT, an orthogonal map",
    "diff": "a whole difference",
}
PREFIX = re.compile(r"^lora_(unet|te\d?|transformer)_")
KINDS = ("linear", "conv1d", "conv")  # of layers that the names know
BASE = "ss_sd_model_name"  # kohya's own key for the model that was trained on


# --- out -----------------------------------------------------------------------------------


def save(
    handle: Handle,
    folder: str | Path,
    overwrite: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Write `lora.safetensors` into a folder; deterministic for the same state.

    Raises UsageError if the method is not a product of two thin matrices, or acts on a kind of
    layer that the names do not cover.
    """
    reason = obstacle(handle)
    if reason:
        raise UsageError("kohya's names cannot say this", [(handle.weights.slug, reason)])
    names = flat_names(handle.model)
    tensors: dict[str, Tensor] = {}
    ranks: set[int] = set()
    alphas: set[float] = set()
    for path in handle.attached:
        B, A, alpha = pair_at(handle, path)
        if not A.shape[0]:  # a site whose rank has become 0
            continue
        site = handle.sites[path]
        if site.kind == "conv":
            A, B = A.unflatten(-1, site.raw.shape[1:]), B[(..., *[None] * (site.raw.ndim - 2))]
        stem = f"lora_{part_of(handle.model)}_{names[path]}"
        tensors |= {f"{stem}.{DOWN}": A, f"{stem}.{UP}": B}
        tensors[f"{stem}.{ALPHA}"] = torch.tensor(alpha, dtype=torch.float32)
        ranks.add(A.shape[0])
        alphas.add(alpha)
    metadata = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": f"{alphas.pop():g}" if len(alphas) == 1 else "Dynamic",
        BASE: origin(handle.model) or "",
    }
    with write_folder(folder, overwrite) as beside:
        write_tensors(beside / TENSORS, tensors, metadata)
        if tokenizer is not None:
            tokenizer.save_pretrained(beside)


def obstacle(handle: Handle) -> str | None:
    """Why a handle cannot be written in this format; None if it can."""
    if handle.weights.base != "frozen" or handle.originals:
        return "it changes the base itself, and the file holds what is added to one"
    if not handle.attached:
        return "nothing is attached"
    if handle.also_train:
        return f"{handle.also_train[0]} is trained too"
    for path, by_name in handle.parts().items():
        site = handle.sites[path]
        if site.kind not in KINDS or site.ties:
            return f"{path}: {'a tied map' if site.ties else site.kind} has no name there"
        for name, part in by_name.items():
            if not isinstance(part, Term) or part.factors() is None:
                return f"{path}.{name} is no product of two thin matrices"
    return None


def pair_at(handle: Handle, path: str) -> tuple[Tensor, Tensor, float]:
    """B [m, r], A [r, n] and alpha of one site; alpha = r if the scale must be part of B.

    A single plain pair keeps its tensors, bit for bit, if fp32 represents its alpha.
    """
    terms = list(handle.terms()[path].values())
    if len(terms) == 1 and type(terms[0]) is LowRank:
        term = terms[0]
        alpha = term.scale * term.A.shape[-2]
        held = float(torch.tensor(alpha, dtype=torch.float32))
        if term.R is None and term.B0 is None and held / term.A.shape[-2] == term.scale:
            return term.B.detach(), term.A.detach(), held
    pair = joint_factors(terms)
    assert pair is not None  # `obstacle` was asked
    return pair[0].detach(), pair[1].detach(), float(pair[1].shape[-2])


# --- in ------------------------------------------------------------------------------------


def load(model: nn.Module, file: str | Path, name: str = DEFAULT, part: str = "") -> Handle:
    """Attach an adapter with kohya's names, in place, under a name.

    `part` selects this model's prefix if the file has several. Raises FileError, with the tensor's
    name, for names that match no map of the model, for kinds of adapter other than a plain pair or
    DoRA by rows, and for missing or misshapen tensors.
    """
    file = file_of(file)
    require_free(model, name)
    tensors = chosen(read_tensors(file), part, file)
    by_stem = grouped(tensors, file)
    paths = {flat: path for path, flat in flat_names(model).items()}
    sites = {site.path: site for site in sites_of(model)}
    extra = [stem for stem in by_stem if paths.get(PREFIX.sub("", stem)) not in sites]
    if extra:
        raise unfit(file, listed(sorted(extra), "names no map of it"))
    assigned: dict[str, dict[str, Tensor]] = {}
    entries: dict[str, dict[str, Any]] = {}
    gained = with_magnitudes(by_stem, file)
    with format_errors(file):
        for stem, found in by_stem.items():
            path = paths[PREFIX.sub("", stem)]
            rank = found[DOWN].shape[0]
            assigned[path] = {"lora_A": as_matrix(found[DOWN]), "lora_B": as_matrix(found[UP])}
            if gained:
                assigned[path]["lora_magnitude_vector"] = lengths(
                    found[MAGNITUDE], sites[path], file
                )
            alpha = float(found[ALPHA]) if ALPHA in found else float(rank)
            entries[path] = {"r": rank, "lora_alpha": alpha}
            refuse_kind(sites[path], file)
    config = {"peft_type": "LORA", "use_dora": gained, **to_patterns(entries)}
    method = peft_read.method_of(config, file.parent)
    return peft_read.attach(model, method, config, assigned, {}, {}, file, name)


def chosen(tensors: Mapping[str, Tensor], part: str, file: Path) -> dict[str, Tensor]:
    """The tensors under one prefix. FileError if there are several and none is selected."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = PREFIX.match(key)
        found.setdefault(match[1] if match else "", {})[key] = tensor
    if unnamed := sorted(found.get("", ())):
        raise FileError(
            "these are no names of kohya's", [(str(file), ""), *listed(unnamed, "no known prefix")]
        )
    if part in found or (len(found) == 1 and not part):
        return found.get(part) or next(iter(found.values()))
    raise FileError(
        "this file is for several models" if not part else "the file has no such part",
        [(str(file), ", ".join(sorted(found)))],
        "Pass part= with the one that is meant.",
    )


def grouped(tensors: Mapping[str, Tensor], file: Path) -> dict[str, dict[str, Tensor]]:
    """Tensors by stem and suffix. FileError for an unknown suffix, or half a pair."""
    by_stem: dict[str, dict[str, Tensor]] = {}
    other = []
    for key, tensor in tensors.items():
        stem, _, suffix = key.partition(".")
        by_stem.setdefault(stem, {})[suffix] = tensor
        if suffix not in (DOWN, UP, ALPHA, MAGNITUDE):
            other.append(key)
    if other:
        ends = [key.partition(".")[2] for key in other]
        known = {name for end in ends for start, name in OTHER.items() if end.startswith(start)}
        raise FileError(
            "this is another kind of adapter than a plain pair or DoRA",
            [
                (str(file), ", ".join(sorted(known))),
                *listed(sorted(other), "has no counterpart here"),
            ],
            "Save it as LoRA (lora_down, lora_up), or merge it, with the tool that wrote it.",
        )
    lost = [
        f"{stem}.{half}" for stem, found in by_stem.items() for half in (DOWN, UP)
        if half not in found
    ]  # fmt: skip
    if lost:
        raise FileError("the adapter is not whole", [(str(file), ""), *listed(lost, "is missing")])
    return by_stem


def with_magnitudes(by_stem: Mapping[str, Mapping[str, Tensor]], file: Path) -> bool:
    """Is this DoRA? FileError if only some maps have magnitudes."""
    lost = [f"{stem}.{MAGNITUDE}" for stem, found in by_stem.items() if MAGNITUDE not in found]
    if lost and len(lost) < len(by_stem):
        raise FileError("the adapter is not whole", [(str(file), ""), *listed(lost, "is missing")])
    return not lost


def lengths(tensor: Tensor, site: Site, file: Path) -> Tensor:
    """The magnitudes of rows [m], from [m, 1] or [m, 1, 1, 1]. FileError for those of columns."""
    m = site.shape[0]
    if tensor.shape[:1] == (m,) and tensor.numel() == m:
        return tensor.flatten()
    shapes = f"shape {list(tensor.shape)}, expected {[m, 1]}"
    fix = "Magnitudes of columns, [1, n], are another method (wd_on_out=False): train it by rows."
    raise unfit(file, [(f"{site.path}.{MAGNITUDE}", shapes)], fix)


def refuse_kind(site: Site, file: Path) -> None:
    """Raise FileError for a map on which a pair in these names would mean something else."""
    if site.kind not in KINDS or site.ties:
        what = "a tied map" if site.ties else site.kind
        raise unfit(file, [(site.path, what)])


def as_matrix(tensor: Tensor) -> Tensor:
    """[r, c, kh, kw] as [r, c kh kw], [m, r, 1, 1] as [m, r]."""
    return tensor.flatten(1) if tensor.ndim > 2 else tensor


# --- names ---------------------------------------------------------------------------------


def part_of(model: nn.Module) -> str:
    """`unet` for a denoiser of diffusers, `te` for a language model."""
    return "unet" if type(model).__module__.split(".")[0] == "diffusers" else "te"


def flat_names(model: nn.Module) -> dict[str, str]:
    """Each map's path with underscores for dots. UsageError if two coincide."""
    return flattened(site.path for site in sites_of(model))


def flattened(paths: Iterable[str]) -> dict[str, str]:
    """Path -> flat name, one to one."""
    names: dict[str, str] = {}
    first: dict[str, str] = {}
    for path in paths:
        names[path] = flat = path.replace(".", "_")
        if first.setdefault(flat, path) != path:
            raise UsageError(
                "kohya has one name for two maps", [(flat, f"{first[flat]} and {path}")]
            )
    return names


# --- recognition ---------------------------------------------------------------------------


def file_of(source: str | Path) -> Path:
    """The file itself, or the one in a folder."""
    path = Path(source)
    return next(iter(sorted(path.glob("*.safetensors"))), path) if path.is_dir() else path


def is_one(path: Path) -> bool:
    """Does a safetensors file, or the only one in a folder, use kohya's names?"""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if len(files) != 1:
        return False
    try:
        return any(PREFIX.match(name) for name in header(files[0]))
    except FileError:  # damaged: the caller reports what it expected
        return False


def base_of(path: Path) -> str | None:
    """The model that the file says it was trained on."""
    return read_header(file_of(path))[1].get(BASE) or None
