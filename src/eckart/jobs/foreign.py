"""`eckart config import FILE`: converts a PEFT, LLaMA-Factory or axolotl file to a job file.

settings/other_tools.py translates the keys; those without a counterpart are listed with their
line. The job is resolved before it is printed, so that the printed file is valid.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eckart.errors import FileError, UsageError, did_you_mean
from eckart.io.headers import read_json
from eckart.jobs.settings.config import Job, resolve
from eckart.jobs.settings.other_tools import Found, from_keys
from eckart.jobs.settings.words import Setting, read_file
from eckart.recipe.registry import FULL


def run(file: str) -> None:
    """Print a job file to stdout; untranslated keys and the next command go to stderr."""
    found = translated(Path(file))
    job = resolved(found, file)
    print(f"# from {file} ({found.tool})")
    print(job.dump(), end="")
    for key, place, why in found.lost:
        print(f"left out  {key}     {place}: {why}", file=sys.stderr)
    lacking = [w for w, there in (("MODEL", job.model), ("DATA", job.data.train)) if not there]
    typed = " ".join(["eckart finetune", *lacking, "-c job.yaml"])
    print(f"next      save it as job.yaml, then {typed}", file=sys.stderr)


def translated(path: Path) -> Found:
    """Translate a file of any of the three tools. Raises FileError for other files."""
    if path.is_dir():
        within = next(iter(sorted(path.glob("adapter_config.json"))), path / "FILE")
        raise FileError(
            "this is a folder", [(str(path), "")], f"Type eckart config import {within}"
        )
    if not path.is_file():
        near = [p.name for p in path.absolute().parent.glob("*") if p.is_file()]
        raise FileError(
            "no such file",
            [(str(path), "")],
            did_you_mean(path.name, near, "Type the path of a configuration file."),
        )
    if path.suffix == ".json":
        content = read_json(path)
        if "peft_type" in content:
            return from_peft(content, path)
    settings = read_file(path)
    names = {s.key[0] for s in settings}
    if names & {"base_model", "micro_batch_size", "sequence_len"}:
        return from_keys("axolotl", settings)
    if names & {"model_name_or_path", "finetuning_type", "cutoff_len", "stage"}:
        return with_their_defaults(from_keys("LLaMA-Factory", settings), settings, path)
    raise FileError(
        "this is no configuration that is known here",
        [(str(path), f"keys {', '.join(sorted(names)[:6])}")],
        "Known: PEFT's adapter_config.json, YAML of LLaMA-Factory and of axolotl.",
    )


def resolved(found: Found, file: str) -> Job:
    """Resolve the job. Errors about fields that a method lacks name the imported file."""
    words = [f"{key}={json.dumps(value)}" for key, value in found.words.items()]
    try:
        return resolve("finetune", words=words, partial=True)
    except UsageError as fault:
        raise UsageError(
            fault.what, [*fault.facts, (file, f"read as {found.tool}")], fault.fix
        ) from (fault)


# --- PEFT ----------------------------------------------------------------------------------

PEFT_SILENT = (
    "peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "inference_mode",
    "revision", "task_type", "target_modules", "r", "lora_alpha", "lora_dropout", "use_rslora",
    "use_dora", "rank_pattern", "alpha_pattern", "init_lora_weights", "bias", "fan_in_fan_out",
    "ensure_weight_tying", "lora_ga_config",
)  # fmt: skip


def from_peft(content: Mapping[str, Any], path: Path) -> Found:
    """Translate an adapter_config.json to its method."""
    from dataclasses import fields

    from eckart.io.peft_read import method_of

    found = Found("PEFT")
    method = method_of(content, path.parent)
    if content.get("base_model_name_or_path"):
        found.words["model"] = content["base_model_name_or_path"]
    found.words["weights"] = method.slug
    plain = type(method)()
    for f in fields(method):
        value = getattr(method, f.name)
        if value != getattr(plain, f.name) and f.name not in ("targets", "overrides"):
            found.words[f"weights.{f.name}"] = value
    targets = content.get("target_modules")
    if isinstance(targets, list):
        found.words["weights.targets"] = sorted(targets)
    elif targets:
        words = {"all-linear": "linear"}
        found.words["weights.targets"] = [words.get(targets, f"re:^(?:{targets})$")]
    ranks, alphas = content.get("rank_pattern") or {}, content.get("alpha_pattern") or {}
    overrides = [
        {"match": f"re:(^|\\.)(?:{name})$"}
        | ({"rank": ranks[name]} if name in ranks else {})
        | ({"alpha": float(alphas[name])} if name in alphas else {})
        for name in dict.fromkeys([*ranks, *alphas])
    ]
    if overrides:
        found.words["weights.overrides"] = overrides
    for key, value in content.items():
        if key not in PEFT_SILENT and value not in (None, False, {}, [], ""):
            found.lose(Setting((key,), value, str(path), json.dumps(value)))
    return found


# --- LLaMA-Factory and axolotl -------------------------------------------------------------


def with_their_defaults(found: Found, settings: list[Setting], path: Path) -> Found:
    """Add LLaMA-Factory's defaults, and replace its dataset names by their files."""
    if found.words.get("weights", FULL) != FULL:
        rank = found.words.setdefault("weights.rank", 8)
        found.words.setdefault("weights.alpha", 2.0 * rank)
    by_name = {s.key[0]: s for s in settings}
    folder = Path(by_name["dataset_dir"].text if "dataset_dir" in by_name else "data")
    places = [p / "dataset_info.json" for p in (folder, path.parent / folder)]
    table = next((read_json(p) for p in places if p.is_file()), {})
    for ours, theirs in (("data.train", "dataset"), ("data.eval", "eval_dataset")):
        names = found.words.get(ours)
        if not isinstance(names, list):
            continue
        entries = [table.get(name, {}) for name in names]
        files = [e.get("file_name") for e in entries]
        found.words[ours] = [
            str(folder / f) if f else e.get("hf_hub_url", name)
            for f, e, name in zip(files, entries, names, strict=True)
        ]
        if not all(entries):
            found.lose(by_name[theirs], "names of dataset_info.json: write the files' paths there")
    return found
