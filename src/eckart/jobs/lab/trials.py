"""The training runs of a claim, cached under a hash of everything they depend on.

The hash covers the task, the arm, the seed, the learning rate, the steps, the versions and the
source code that trains. Names of arms and claims are not in it, so a baseline that several
claims share is run once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import math
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import torch

import eckart
from eckart import claims
from eckart.claims import Arm, Budget, Claim, Task
from eckart.io.presets import build_model
from eckart.io.text import cache_folder
from eckart.jobs.lab.bare_loop import TaskLab
from eckart.jobs.lab.tasks import config_for, corpus, digest, start_model

QUICK_STEPS, QUICK_PRETRAINING, QUICK_ROWS = 6, 10, 16
TIMED = 6  # steps, the first of which is a warm-up
SRC = Path(eckart.__file__).parent
TRAINING_ROOMS = (
    "linear", "optim", "decompose", "attention", "precision", "kernels", "recipe",
)  # fmt: skip
LOOP = (SRC / "jobs/lab/bare_loop.py", SRC / "jobs/lab/tasks.py")


@dataclass(frozen=True)
class ClaimTrial:
    """One run of one arm, as plain data that a worker process can receive."""

    slug: str
    arm: str
    budget: Budget
    seed: int
    lr: float | None  # None: the arm has no learning rate
    steps: int

    @property
    def described(self) -> str:
        rate = "" if self.lr is None else f"  lr {self.lr:.2g}"
        return f"{self.slug}  {self.arm}  seed {self.seed}{rate}"

    @property
    def file(self) -> Path:
        return cache_folder() / "lab" / "runs" / f"{digest(self.facts())}.json"

    def find(self) -> tuple[Arm, Task]:
        """The claim's arm of this name, and its task under this budget."""
        claim = claims.load(self.slug)
        arm = next(a for a in claim.arms if a.name == self.arm)
        return arm, task_of(claim, arm, self.budget)

    def prepare(self) -> None:
        start_model(self.find()[1], 0)

    def measure(self) -> dict[str, float]:
        arm, task = self.find()
        lr = math.nan if self.lr is None else self.lr
        return TaskLab(task, self.seed, lr, self.steps).measure(arm)

    def facts(self) -> dict[str, Any]:
        arm, task = self.find()
        names = sorted(n for n in {task.data, task.pretrained} if isinstance(n, str))
        return {
            "task": described(dataclasses.replace(task, steps=0, pretraining_steps=0)),
            "pretraining_steps": task.pretraining_steps if task.pretrained else 0,
            "steps": self.steps,
            "lr": self.lr,
            "seed": self.seed,
            "arm": {
                part: described(getattr(arm, part))
                for part in ("recipe", "watch", "loss_at", "also_train", "run")
            },
            "corpora": {n: corpus(n).sha256 for n in names},
            "source": source_of_rooms(),
            "torch": torch.__version__,
            "python": platform.python_version(),
        }


def task_of(claim: Claim, arm: Arm, budget: Budget) -> Task:
    """The task of an arm under a budget."""
    task = arm.task or (claim.full if budget == "full" and claim.full else claim.task)
    if budget != "quick":
        return task
    return dataclasses.replace(
        task,
        steps=min(task.steps, QUICK_STEPS),
        pretraining_steps=min(task.pretraining_steps, QUICK_PRETRAINING),
        evaluated=QUICK_ROWS,
    )


def step_seconds(task: Task) -> float:
    """Measured seconds of a forward and a backward pass; optimizer and method are not included."""
    lab, model = TaskLab(task, 0), build_model(config_for(task), seed=0, task=task.head).train()
    taken = []
    for step in range(TIMED):
        batch, begun = lab.batch(step), time.monotonic()
        model(**batch)["loss"].backward()
        taken.append(time.monotonic() - begun)
    return median(taken[1:])


# --- what a run depends on -----------------------------------------------------------------


def described(value: Any) -> Any:
    """A value as plain data: dataclasses by class, source hash and fields; functions by source."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: described(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"is": type(value).__qualname__, "source": own_source(type(value)), **fields}
    if callable(value):
        return {"is": value.__qualname__, "source": own_source(value)}
    if isinstance(value, Mapping):
        return {str(k): described(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [described(v) for v in value]
    return value


def own_source(thing: Any) -> str:
    """The hash of the file that defines a method's class or a claim's function."""
    path = Path(inspect.getsourcefile(thing) or "")
    inside = path.is_relative_to(SRC) and path.relative_to(SRC).parts[0]
    if inside in TRAINING_ROOMS or path == SRC / "claims" / "__init__.py":
        return ""  # hashed by source_of_rooms; claims/__init__.py decides no number
    return hash_of(path)


@cache
def hash_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


@cache
def source_of_rooms() -> str:
    """The hash of the packages that train (TRAINING_ROOMS) and of the training loop."""
    files = [p for room in TRAINING_ROOMS for p in sorted((SRC / room).rglob("*.py"))]
    text = "".join(hash_of(path) for path in (*files, *LOOP))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
