"""How long each candidate trains under a budget of steps, tokens, seconds or peak bytes.

steps=300       the same steps and rows for all (the default, from train.steps)
tokens=1e6      the number of steps that processes this many tokens
seconds=60      as many steps as fit, measured on this machine before the first run
bytes=2GB       the largest batch that fits, and the same number of tokens for all
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from eckart.errors import OutOfRoom, UsageError
from eckart.io.folder import write_json
from eckart.jobs.lab.candidates import Candidate, UserLab, workload
from eckart.jobs.measuring.imagined import imagine
from eckart.jobs.measuring.memory import (
    activation_bytes,
    in_words,
    line,
    model_bytes,
    room,
    size,
    state_bytes,
)
from eckart.jobs.settings.job import Job
from eckart.jobs.settings.settle import rows_per_step
from eckart.jobs.training import prepare
from eckart.recipe import attach
from eckart.recipe.groups import default_lr

UNITS = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "kb": 1e3, "mb": 1e6, "gb": 1e9}
TIMED_STEPS = 4  # after a warm-up step
PROCESS_BYTES = 700e6  # interpreter and libraries of a worker process


@dataclass(frozen=True)
class Length:
    """The length of a training run: optimizer steps, and rows in a batch."""

    steps: int
    rows: int


def plan(job: Job, entered: Sequence[Candidate], budget: str, file: Path) -> dict[str, Length]:
    """The length of each candidate by name.

    Measured lengths are saved in `file`, so that a resumed bench uses the same.
    """
    kind, amount = parse(budget)
    lab = UserLab(entered[0].job, 0, 1e-3, 1, 1)
    rows = rows_per_step(job, len(lab.workload.data.train))
    steps, in_a_row = int(job.train.steps), lab.workload.data.tokens_in_a_row
    if kind == "steps":
        steps = int(amount) if amount else steps
        return {c.name: Length(steps, rows) for c in entered}
    if kind == "tokens":
        if not in_a_row:
            raise UsageError(
                "this data has no tokens", [("--budget", budget)], "Type --budget steps=300."
            )
        steps = max(1, round(amount / (rows * in_a_row)))
        return {c.name: Length(steps, rows) for c in entered}
    if file.is_file():
        kept = json.loads(file.read_bytes())
        if kept["budget"] == budget and all(c.name in kept["lengths"] for c in entered):
            return {c.name: Length(*kept["lengths"][c.name]) for c in entered}
    if kind == "seconds":
        found = {
            c.name: Length(max(1, int(amount / seconds_per_step(c, rows))), rows) for c in entered
        }
    else:
        tokens = steps * rows
        fitting = {c.name: max_rows(c, amount) for c in entered}
        found = {name: Length(max(1, round(tokens / n)), n) for name, n in fitting.items()}
    lengths = {name: [length.steps, length.rows] for name, length in found.items()}
    write_json(file, {"budget": budget, "lengths": lengths})
    return found


def parse(budget: str) -> tuple[str, float]:
    """`tokens=1e6` -> ("tokens", 1e6); an empty budget means the job's steps."""
    if not budget:
        return "steps", 0.0
    match = re.fullmatch(
        r"(steps|tokens|seconds|bytes)=([\d.]+(?:e\d+)?)\s*([kmg]?b?)", budget.lower()
    )
    if match is None or not float(match[2]) > 0:
        raise UsageError(
            f"cannot read --budget {budget}",
            fix="Type one of steps=300, tokens=1e6, seconds=60, bytes=2GB.",
        )
    return match[1], float(match[2]) * UNITS[match[3]]


def seconds_per_step(c: Candidate, rows: int) -> float:
    """Measured seconds per step on this machine."""
    lab = UserLab(c.job, 0, default_lr(c.recipe), TIMED_STEPS + 1, rows)
    marks: list[float] = []

    def mark(*_: Any) -> dict[str, float]:
        marks.append(time.monotonic())
        return {}

    lab.train(lab.model(), c.recipe, watch={1: mark, TIMED_STEPS + 1: mark})
    return (marks[-1] - marks[0]) / TIMED_STEPS


def max_rows(c: Candidate, limit: float) -> int:
    """The largest power of two of rows whose batch fits into `limit` bytes."""
    needed = line(lambda rows: bytes_of(c, rows))
    if needed.of(1) > limit:
        raise OutOfRoom(
            "a method does not fit into the budget",
            [(c.name, f"{needed.of(1) / 1e6:,.1f} MB with one row"),
             ("--budget", f"{limit / 1e6:,.1f} MB")],
            f"Type --budget bytes={needed.of(1) / 1e6:.0f}MB or more, or leave it out.",
        )  # fmt: skip
    fits = needed.rows_within(limit)
    return 1 << (min(fits, len(workload(c.job).data.train)).bit_length() - 1)


def bytes_of(c: Candidate, rows: int) -> int:
    """Estimated peak bytes of tensors in a training step on `rows` rows."""
    lab = UserLab(c.job, 0, default_lr(c.recipe), 100, rows)
    model = lab.model()
    handle = attach(
        model, c.recipe, steps=lab.steps, also_train=lab.heads(model),
        calibration=lab.batches(2) if c.recipe.needs else None,
    )  # fmt: skip
    fixed = sum(model_bytes(handle).values()) + state_bytes(handle.optimizer())
    fixed += sum(size(p) for p in handle.trainable().values())
    return fixed + activation_bytes(handle.model, lab.batch(0))


@dataclass(frozen=True)
class Concurrency:
    """Number of concurrent runs, and the reason where it is fewer than requested."""

    count: int
    reason: str = ""


def concurrency(
    wanted: int, entered: Sequence[Candidate], planned: Mapping[str, Length]
) -> Concurrency:
    """The number of concurrent runs: `wanted`, limited by cores, memory and a single GPU.

    Each process needs the initial model and the peak of the largest candidate, estimated as
    `eckart estimate` does. 1 where that cannot be estimated.
    """
    if wanted == 1:
        return Concurrency(1)
    if prepare.device().type != "cpu":
        return Concurrency(1, "there is one GPU")
    cores = os.cpu_count() or 1
    if min(wanted, cores) == 1:
        return Concurrency(1, "there is one core")
    try:
        largest = max(peak_of(c, planned[c.name].rows) for c in entered)
    except UsageError as fault:
        return Concurrency(1, fault.what)
    model = workload(entered[0].job).model
    each = PROCESS_BYTES + sum(size(p) for p in model.parameters()) + largest
    free = room(torch.device("cpu"))[0]
    count = max(1, min(wanted, cores, int(free // each)))
    reason = f"{in_words(int(each))} each, {in_words(free)} free; {cores} cores"
    return Concurrency(count, reason if count < wanted else "")


def peak_of(c: Candidate, rows: int) -> int:
    """Peak bytes of tensors in a step of `rows` rows, from a pass on fake tensors."""
    start = workload(c.job)
    first = UserLab(c.job, 0, default_lr(c.recipe), 1, rows).batch(0)
    length = first["input_ids"].shape[1] if "input_ids" in first else 1  # 1: images
    model: Any = start.model
    found = imagine(
        model.config, c.recipe, torch.float32, torch.device("cpu"),
        task=start.data.task, packed=start.data.packed,
    )  # fmt: skip
    return found.peak(rows, length)
