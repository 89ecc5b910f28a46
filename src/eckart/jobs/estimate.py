"""`eckart estimate JOB ARGS...`: what a job will take, before anything is loaded.

    eckart estimate finetune MODEL method=galore train.batch_size=8

Reads a configuration and nothing else. Weights, factors, gradients and the optimizer's state
are exact; activations are those of full rows, or where rows are padded of the longest of the
data's first ones, kept as autograd keeps them;
operations are counted in a pass that computes nothing, and become seconds by what this machine
does in one layer of the model (speed.py). With --fit SIZE: which recipes would fit there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from eckart.errors import FileError, OutOfRoom, UsageError, did_you_mean
from eckart.io.headers import read_json
from eckart.io.models import config_of, own_task, recognise, recognise_result
from eckart.io.peft_read import method_of
from eckart.io.tasks import TASKS
from eckart.jobs import pretrain
from eckart.jobs.measuring.imagined import Imagined, imagine
from eckart.jobs.measuring.memory import Line, in_bytes, in_words, line, room
from eckart.jobs.measuring.speed import HELD, Speed, digits, measured, moving
from eckart.jobs.proposals import proposals
from eckart.jobs.proposals import say as say_proposals
from eckart.jobs.settings import settle
from eckart.jobs.settings.config import Choice, Job
from eckart.jobs.training import modality, prepare
from eckart.jobs.training.classes import keeps_head, require_task
from eckart.jobs.training.outcome import recipe_of, shown
from eckart.jobs.training.remedies import SHOWN, remedies
from eckart.jobs.training.screen import Screen, amount, in_bits
from eckart.recipe import Recipe, registry

TRAININGS = ("finetune", "pretrain")
KNOWN = (*TRAININGS, "compress")
ROWS = 1_000_000  # enough that they do not decide the batch: of data that is much, or elsewhere


def run(job: Job) -> dict[str, Any]:
    """Everything from a job to the printed lines; the object of --json."""
    if job.command not in KNOWN:
        raise UsageError(
            f"eckart estimate does not know {job.command}", fix=f"Choices: {', '.join(KNOWN)}."
        )
    require_data(job)
    screen = Screen(quiet=job.flags.json)
    place = prepare.device()
    job, config = of_source(settle.precision(settle.layerwise(job), place))
    task = task_of(job, config)
    if job.command == "compress":
        return compressed(job, config, place, screen)
    job = settle.seq_len(job, getattr(config, "max_position_embeddings", None), place)
    length, (count, packed) = length_of(job, task), rows_of(job, task)
    if limit := job.options.get("fit"):
        size = in_bytes(str(limit))
        return fitting(job, config, place, (count, length, packed), task, size, screen)
    dtype = prepare.dtype_of(job)
    found = imagine(config, job.recipe(), dtype, place, task=task, packed=packed)
    base = found.parameters - (found.trainable if found.factors else 0)
    facts = f"{amount(base)} parameters, {in_bits(dtype)}; from its configuration alone"
    screen.line("model", facts, shown(job.model or ""))
    screen.line("method", found.coverage, job.choices["weights"].name)
    if found.by_formula:
        screen.warn("its sizes depend on the weights: said for one rank at all matrices")

    free, total = room(place)
    job, activations = with_batch(job, found, free, (count, length))
    parts = {**found.fixed, "activations": activations}
    if found.optimizer is not None:
        parts["gradients"] = settle.gradient_bytes(job.train, found.optimizer)
    rows = int(job.train.batch_size)
    forward, backward = found.flops(1, length)
    again = forward if job.train.checkpointing else 0
    per_step = (forward + again + backward) * rows * int(job.train.accumulate)
    peak = found.peak(
        rows, length, bool(job.train.checkpointing), min(2, int(job.train.accumulate))
    )
    whole = sum(parts.values())
    update = job.recipe().update
    rule = update.rule() if update else None
    speed = measured(config, dtype, place, rows, length, rule, found.rank)
    document = {
        "command": "estimate",
        "exit": 0,
        "of": job.command,
        "recipe": recipe_of(job),
        "memory": parts,
        "estimated_memory_bytes": whole,
        "peak_bytes": peak,
        "free_bytes": free,
        "fits": max(peak, whole) <= free,
        "by_formula": found.by_formula,
        "parameters": {
            "total": found.parameters,
            "trainable": found.trainable,
            "by_role": found.by_role,
        },
        "batch": {"rows": rows, "accumulate": int(job.train.accumulate), "seq_len": length},
        "flops": {"forward_per_row": forward, "backward_per_row": backward, "per_step": per_step},
        "seconds": seconds_of(per_step, found.trainable, speed),
        "warnings": list(screen.warnings),
    }
    shape = f"{rows} images" if TASKS[task].sees == "images" else f"{rows} rows of {length} tokens"
    say(screen, job, shape, document, total)
    if not document["fits"]:
        less = found.activations(rows, length, checkpointing=True)
        ways = remedies(job, parts, less)[:SHOWN]
        said = "\n".join(f"{words}   saves {in_words(saved)}" for words, saved in ways)
        screen.line("try", said, result=True)
    return document


def require_data(job: Job) -> None:
    """Raise FileError for data that is not there: it would not be missed before the training."""
    for source in job.data.train:
        path = Path(source.path)
        there = path.exists() or not looks_like_file(path) or any(Path().glob(source.path))
        if not there:
            near = [p.name for p in path.absolute().parent.glob("*")]
            raise FileError(
                "no such file or folder",
                [(source.path, "")],
                did_you_mean(path.name, near, "Type a path such as ./data.jsonl."),
            )


def looks_like_file(path: Path) -> bool:
    """Has it an ending, or a place on this machine, as a hub id has not?"""
    return bool(path.suffix) or path.is_absolute() or str(path).startswith(".")


def task_of(job: Job, config: Any) -> str:
    """What would be learnt; the configuration gets a head for the classes of data that is here."""
    here = [s for s in job.data.train if Path(s.path).exists()]
    if job.command == "compress" or len(here) < max(1, len(job.data.train)):
        return own_task(job.model or "")
    require_task(job)
    task, labels = modality.task_of(job), modality.labels_of(job)
    if labels and not keeps_head(job.model or "", task, labels):
        config.num_labels = len(labels)
    return task


def length_of(job: Job, task: str) -> int:
    """Tokens of a row: as many as fit where rows are filled or the data is elsewhere."""
    most = int(job.data.seq_len)
    here = all(Path(s.path).exists() for s in job.data.train)
    longest = modality.longest_of_first(job, task) if job.data.train and here else None
    return most if longest is None else longest


def rows_of(job: Job, task: str) -> tuple[int, bool]:
    """Rows that the data trains on, and whether one holds several texts.

    ROWS of one each where they do not decide the batch, or nobody can tell.
    """
    if not modality.are_few(job):
        return ROWS, False
    try:
        reader = (
            pretrain.tokenizer_for(job, pretrain.shape_of(job))
            if job.command == "pretrain"
            else modality.reader_of(job)
        )
    except FileError:  # no tokenizer lies beside a configuration
        return ROWS, False
    return modality.count_rows(job, task, reader)


def fitting(
    job: Job,
    config: Any,
    place: torch.device,
    data: tuple[int, int, bool],
    task: str,
    limit: int,
    screen: Screen,
) -> dict[str, Any]:
    """The recipes that fit into a size, best first.

    `data` is its rows, the tokens of one, and whether one holds several texts.
    """
    count, length, packed = data
    rows = settle.rows_per_step(job, count)
    passes = cache(lambda: measured(config, prepare.dtype_of(job), place, rows, length))

    def speed(update: Any) -> Speed:
        rule = update.rule() if update else None
        return replace(passes(), moving=moving(config, place, rule)) if rule else passes()

    found, left = proposals(job, config, place, limit, (rows, length), speed, task, packed)
    say_proposals(screen, found, left, limit)
    return {
        "command": "estimate",
        "exit": 0,
        "of": job.command,
        "limit_bytes": limit,
        "batch": {"rows": rows, "seq_len": length},
        "proposals": [p.document() for p in found],
        "too_large": left,
        "warnings": list(screen.warnings),
    }


def seconds_of(operations: int, trained: int, speed: Speed) -> dict[str, Any]:
    """A step's time on this machine, with the ends of the interval."""
    typical, fastest, slowest = speed.seconds(operations, trained)
    return {
        "per_step": typical,
        "interval": [fastest, slowest],
        "measured": speed.of,
        "flops_per_second": speed.typical,
        "optimizer": speed.moving * trained,
    }


# --- what is estimated ---------------------------------------------------------------------


def of_source(job: Job) -> tuple[Job, Any]:
    """The configuration of MODEL; an adapter brings its method, and its base's configuration."""
    if job.model is None:
        raise UsageError(
            "eckart estimate needs a model",
            fix=f"Type eckart estimate {job.command} MODEL key=value",
        )
    found = recognise_result(job.model)
    if found.kind in ("native", "peft"):
        if not found.base:
            raise FileError("the adapter names no base", [(found.path, "")])
        if "weights.name" not in job.given:
            job = job.choose(
                "weights", adapter_method(found.kind, Path(found.path)), "the adapter's"
            )
        found = recognise(found.base)
    if found.kind == "factored":
        raise UsageError(
            "a factored model is not estimated",
            [(found.path, "its matrices are apart already")],
            "Type eckart inspect for its size.",
        )
    if found.kind == "hub":
        from transformers import AutoConfig

        try:
            return job, config_of(AutoConfig.from_pretrained(found.path))
        except (OSError, ValueError) as fault:
            reason = str(fault).splitlines()[0]
            raise FileError(
                "no configuration can be had",
                [(found.path, reason)],
                "Type a path such as ./model, or the name of a preset such as llama-60m.",
            ) from fault
    return job, config_of(found.path)


def adapter_method(kind: str, folder: Path) -> Choice:
    """The method that an adapter was made by."""
    if kind == "native":
        content = read_json(folder / "eckart.json")
        fields = {k: tuple(v) if isinstance(v, list) else v for k, v in content["fields"].items()}
        return Choice(content["method"], registry.load(content["method"])(**fields))
    method = method_of(read_json(folder / "adapter_config.json"), folder)
    return Choice(method.slug, method)


def with_batch(job: Job, found: Imagined, free: int, data: tuple[int, int]) -> tuple[Job, int]:
    """The job with its batch settled as a training would, and the activations' bytes.

    `data` is its rows and the tokens of one.
    """
    count, length = data

    @cache
    def kept(checkpointing: bool) -> Line:
        return line(lambda rows: found.activations(rows, length, checkpointing))

    fixed = sum(found.fixed.values())
    rows = settle.rows_per_step(job, count)
    try:
        job = settle.batch(job, rows, fixed, kept, free, False)
    except OutOfRoom:  # said below with all numbers, not raised
        job = settle.batch(job, rows, 0, kept, 2**60, False)
    rows, checkpointing = int(job.train.batch_size), bool(job.train.checkpointing)
    return job, found.activations(rows, length, checkpointing)


def compressed(job: Job, config: Any, place: torch.device, screen: Screen) -> dict[str, Any]:
    """A compression: the model's bytes before and after."""
    from eckart.jobs.compress import sized

    method = sized(job)
    dtype = getattr(torch, str(getattr(config, "dtype", None) or "float32").removeprefix("torch."))
    full: Any = registry.load(registry.FULL)
    whole = imagine(config, Recipe(weights=full()), dtype, place)
    found = imagine(config, Recipe(weights=method), dtype, place)
    after = found.weights + found.factors
    parts = {"before": whole.weights, "after": after}
    name = shown(job.model or "")
    screen.line("model", f"{amount(whole.parameters)} parameters", name)
    if found.by_formula:
        screen.warn("its sizes depend on the weights: by formula")
    change = f"{in_words(whole.weights)} -> {in_words(after)} ({after / whole.weights:.0%})"
    screen.line("memory", change, method.slug, result=True)
    return {
        "command": "estimate",
        "exit": 0,
        "of": job.command,
        "recipe": recipe_of(job),
        "memory": parts,
        "estimated_memory_bytes": whole.weights + found.factors,
        "by_formula": found.by_formula,
        "parameters": {"before": whole.parameters, "after": found.parameters},
        "warnings": list(screen.warnings),
    }


# --- what is said --------------------------------------------------------------------------


def say(screen: Screen, job: Job, shape: str, found: Mapping[str, Any], total: int) -> None:
    """The batch, each category, the sum against what is there, the work and time of a step."""
    split = job.train.accumulate
    shape += f", {split} times a step" if split != 1 else ""
    why = [job.settled.get(f"train.{key}", "") for key in ("batch_size", "checkpointing")]
    screen.line("batch", "; ".join([shape, *dict.fromkeys(w for w in why if w)]))
    verdict = "fits" if found["fits"] else "does NOT fit"
    notes = {
        "activations": "recomputed" if job.train.checkpointing else "",
        "together": f"{verdict}: {in_words(found['free_bytes'])} free of {in_words(total)}",
        "at once": "in a pass, temporary tensors included",
    }
    rows = found["memory"] | {
        "together": found["estimated_memory_bytes"],
        "at once": found["peak_bytes"],
    }
    said = [f"{k:<12}{in_words(v):>10}   {notes.get(k, '')}".rstrip() for k, v in rows.items()]
    screen.line("memory", "\n".join(said), result=True)
    screen.line("work", f"{found['flops']['per_step'] / 1e12:.3g} TFLOP a step", result=True)
    seconds = found["seconds"]
    fastest, slowest = map(digits, seconds["interval"])
    interval = f"{digits(seconds['per_step'])} s a step ({fastest} to {slowest})"
    screen.line(
        "time", f"{interval}; by {seconds['measured']} on this machine\n{HELD}", result=True
    )
