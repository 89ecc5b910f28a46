"""How long each contestant trains: by steps, tokens, seconds or peak bytes, as one chooses.

steps=300       the same steps and rows for all (the default, from train.steps)
tokens=1e6      the steps that see so many tokens
seconds=60      as many steps as fit, measured on this machine before the first run
bytes=2GB       the most rows in a batch that fit, and the same tokens for all
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from eckart.errors import OutOfRoom, UsageError
from eckart.io.folder import write_json
from eckart.jobs.lab.contest import Contestant, UserLab
from eckart.jobs.measuring.memory import activation_bytes, model_bytes, room, size, state_bytes
from eckart.jobs.settings.job import Job
from eckart.jobs.settings.settle import rows_per_step
from eckart.jobs.training import prepare
from eckart.recipe import attach, registry
from eckart.recipe.groups import default_lr
from eckart.recipe.targets import EVERYTHING, select, sites_of

UNITS = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "kb": 1e3, "mb": 1e6, "gb": 1e9}
TIMED_STEPS = 4  # after one that warms up
PROCESS_BYTES = 700e6  # a worker's interpreter and libraries


@dataclass(frozen=True)
class Length:
    """Steps, and rows in a batch."""

    steps: int
    rows: int


def plan(job: Job, entered: Sequence[Contestant], budget: str, file: Path) -> dict[str, Length]:
    """Every contestant's length. What was measured is kept, so that a resumed bench agrees."""
    kind, amount = parse(budget)
    lab = UserLab(entered[0].job, 0, 1e-3, 1, 1)
    rows = rows_per_step(job, len(lab.ground.data.train))
    steps, seq_len = int(job.train.steps), lab.ground.data.seq_len
    if kind == "steps":
        steps = int(amount) if amount else steps
        return {c.name: Length(steps, rows) for c in entered}
    if kind == "tokens":
        steps = max(1, round(amount / (rows * seq_len)))
        return {c.name: Length(steps, rows) for c in entered}
    if file.is_file():
        kept = json.loads(file.read_text())
        if kept["budget"] == budget and all(c.name in kept["lengths"] for c in entered):
            return {c.name: Length(*kept["lengths"][c.name]) for c in entered}
    if kind == "seconds":
        found = {c.name: Length(max(1, int(amount / pace(c, rows))), rows) for c in entered}
    else:
        tokens = steps * rows
        fitting = {c.name: most_rows(c, amount) for c in entered}
        found = {name: Length(max(1, round(tokens / n)), n) for name, n in fitting.items()}
    lengths = {name: [length.steps, length.rows] for name, length in found.items()}
    write_json(file, {"budget": budget, "lengths": lengths})
    return found


def parse(budget: str) -> tuple[str, float]:
    """`tokens=1e6` -> ("tokens", 1e6); nothing said means the job's steps."""
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


def pace(c: Contestant, rows: int) -> float:
    """Seconds per step on this machine."""
    lab = UserLab(c.job, 0, default_lr(c.recipe), TIMED_STEPS + 1, rows)
    marks: list[float] = []

    def mark(*_: Any) -> dict[str, float]:
        marks.append(time.monotonic())
        return {}

    lab.train(lab.model(), c.recipe, watch={1: mark, TIMED_STEPS + 1: mark})
    return (marks[-1] - marks[0]) / TIMED_STEPS


def most_rows(c: Contestant, limit: float) -> int:
    """The largest power of two of rows whose batch fits into the limit."""
    lab = UserLab(c.job, 0, default_lr(c.recipe), 100, 1)
    handle = attach(
        lab.model(), c.recipe, steps=100,
        calibration=lab.batches(2) if c.recipe.needs else None,
    )  # fmt: skip
    fixed = sum(model_bytes(handle).values()) + state_bytes(handle.optimizer())
    fixed += sum(size(p) for p in handle.trainable().values())
    per_row = activation_bytes(handle.model, lab.batch(0))
    if fixed + per_row > limit:
        raise OutOfRoom(
            "a contestant does not fit into the budget",
            [(c.name, f"{(fixed + per_row) / 1e6:,.1f} MB with one row"),
             ("--budget", f"{limit / 1e6:,.1f} MB")],
            f"Type --budget bytes={(fixed + per_row) / 1e6:.0f}MB or more, or leave it out.",
        )  # fmt: skip
    fits = int((limit - fixed) // per_row)
    return 1 << (min(fits, len(lab.ground.data.train)).bit_length() - 1)


def processes(wanted: int, model: nn.Module) -> int:
    """As many processes as were asked for, if memory and a single GPU allow."""
    if prepare.device().type != "cpu":
        return 1
    each = PROCESS_BYTES + 6 * sum(size(p) for p in model.parameters())
    fit = int(room(torch.device("cpu"))[0] // each)
    return max(1, min(wanted, fit, os.cpu_count() or 1))


def matched(entered: Sequence[Contestant], model: nn.Module) -> list[Contestant]:
    """The contestants with ranks at which they train as many parameters as the baseline.

    Those without a rank, or that were given one, stay as they are.
    """
    target = trained(entered[0], model)
    return [entered[0], *(with_rank(c, model, target) for c in entered[1:])]


def with_rank(c: Contestant, model: nn.Module, target: int) -> Contestant:
    choice = c.job.choices["weights"]
    method: Any = choice.method
    if "rank" not in registry.find(choice.name).fields or ":rank=" in c.name:
        return c
    ranks = range(1, 4 * max(1, method.rank) + 1)
    made = [dataclasses.replace(method, rank=rank) for rank in ranks]
    counts = [parameters(m, model) for m in made]
    best = min(range(len(made)), key=lambda i: (abs(counts[i] - target), i))
    job = c.job.choose(
        "weights",
        dataclasses.replace(choice, method=made[best]),
        "as many parameters as the baseline",
    )
    return Contestant(f"{c.name}:rank={made[best].rank}", job)


def trained(c: Contestant, model: nn.Module) -> int:
    return parameters(c.job.choices["weights"].method, model)


def parameters(method: Any, model: nn.Module) -> int:
    """Trained elements by the method's own cost formula; shared ones once."""
    sites = sites_of(model)
    words = [t for t in method.targets if t != EVERYTHING]
    chosen = select(sites, words) if words else sites
    found = [method.cost(*site.shape) for site in chosen]
    return sum(cost.parameters for cost in found) + max((c.shared for c in found), default=0)
