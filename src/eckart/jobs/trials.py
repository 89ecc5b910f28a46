"""Runs of the lab, each kept as a small file under the hash of all that it depends on.

A finished run is never repeated: another claim with the same baseline finds it, and so does
the next start after an interruption. The hash covers the task, the arm, the seed, the learning
rate, the steps, the versions, and the source of the rooms that train.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import math
import multiprocessing
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

import eckart
from eckart import claims
from eckart.claims import Arm, Budget, Claim, Task
from eckart.io.folder import write_json
from eckart.io.text import cache_folder
from eckart.jobs.lab import Bench
from eckart.jobs.materials import corpus, digest, shrunk, start_model

QUICK_STEPS, QUICK_PRETRAINING = 6, 10
SRC = Path(eckart.__file__).parent
TRAINING_ROOMS = (
    "linear", "optim", "decompose", "attention", "precision", "kernels", "recipe",
)  # fmt: skip
LOOP = (SRC / "jobs" / "lab.py", SRC / "jobs" / "materials.py")


@dataclass(frozen=True)
class Trial:
    """One run: plain data, so that a worker process can find the claim and do it."""

    slug: str
    arm: str
    budget: Budget
    seed: int
    lr: float | None  # None: nothing to set
    steps: int

    @property
    def described(self) -> str:
        """For a progress line."""
        rate = "" if self.lr is None else f"  lr {self.lr:.2g}"
        return f"{self.slug}  {self.arm}  seed {self.seed}{rate}"


Outcomes = dict[Trial, dict[str, float]]
Progress = Callable[[Trial, int, int], None]  # what has ended, how many are done, of how many


def task_of(claim: Claim, arm: Arm, budget: Budget) -> Task:
    """What an arm trains on under a budget."""
    task = arm.task or (claim.full if budget == "full" and claim.full else claim.task)
    if budget != "quick":
        return task
    return shrunk(
        task,
        steps=min(task.steps, QUICK_STEPS),
        pretraining_steps=min(task.pretraining_steps, QUICK_PRETRAINING),
    )


def find(trial: Trial) -> tuple[Claim, Arm, Task]:
    """The claim, arm and task that a trial names."""
    claim = claims.load(trial.slug)
    arm = next(a for a in claim.arms if a.name == trial.arm)
    return claim, arm, task_of(claim, arm, trial.budget)


def execute(trial: Trial) -> dict[str, float]:
    """Do a run and keep its quantities; called in worker processes too."""
    torch.set_num_threads(1)
    _, arm, task = find(trial)
    lr = math.nan if trial.lr is None else trial.lr
    quantities = Bench(task, trial.seed, lr, trial.steps).measure(arm)
    plain = {name: float(value) for name, value in quantities.items()}
    write_json(file_of(trial), {"run": facts(trial), "quantities": plain})
    return plain


def kept(trial: Trial) -> dict[str, float] | None:
    """The quantities of a run that is already there."""
    try:
        return json.loads(file_of(trial).read_text())["quantities"]
    except (OSError, ValueError, KeyError):
        return None


def file_of(trial: Trial) -> Path:
    """Where a run is kept."""
    return cache_folder() / "lab" / "runs" / f"{digest(facts(trial))}.json"


# --- doing many ----------------------------------------------------------------------------


class Runner:
    """Does trials, in this process or in several; finished ones survive any end."""

    def __init__(self, processes: int = 1, progress: Progress | None = None):
        self.processes, self.progress = processes, progress
        self.pool: ProcessPoolExecutor | None = None

    def __call__(self, trials: Sequence[Trial]) -> Outcomes:
        """The quantities of all trials, those kept read from their files."""
        found = {t: q for t in dict.fromkeys(trials) if (q := kept(t)) is not None}
        missing = [t for t in dict.fromkeys(trials) if t not in found]
        for trial, quantities in self.run(missing):
            found[trial] = quantities
            if self.progress:
                done = len(missing) - sum(t not in found for t in missing)
                self.progress(trial, done, len(missing))
        return found

    def run(self, trials: Sequence[Trial]) -> Iterator[tuple[Trial, dict[str, float]]]:
        """Trials with their quantities as they end. Two that share their content are done once."""
        first = {file_of(t): t for t in reversed(trials)}
        if self.processes == 1 or len(first) == 1:
            for trial in trials:
                yield trial, kept(trial) or execute(trial)
            return
        for task in {base(t): find(t)[2] for t in first.values()}.values():
            start_model(task, 0)  # made once, here, not by every worker
        if self.pool is None:
            spawn = multiprocessing.get_context("spawn")
            self.pool = ProcessPoolExecutor(self.processes, mp_context=spawn)
        futures = {self.pool.submit(execute, t): t for t in first.values()}
        done: dict[Path, dict[str, float]] = {}
        for future in as_completed(futures):
            trial = futures[future]
            done[file_of(trial)] = future.result()
            yield trial, future.result()
        for trial in trials:
            if first[file_of(trial)] is not trial:
                yield trial, done[file_of(trial)]

    def close(self) -> None:
        """Let the workers go, without waiting for what they are doing."""
        if self.pool is not None:
            self.pool.shutdown(wait=True, cancel_futures=True)
            self.pool = None


def base(trial: Trial) -> str:
    """What of a task decides its start model."""
    task = find(trial)[2]
    return digest([task.kind, dict(task.shape), task.pretrained, task.pretraining_steps])


@contextmanager
def runner(processes: int = 1, progress: Progress | None = None) -> Iterator[Runner]:
    """A Runner whose workers are gone when the block ends."""
    it = Runner(processes, progress)
    try:
        yield it
    finally:
        it.close()


# --- what a run depends on -----------------------------------------------------------------


def facts(trial: Trial) -> dict[str, Any]:
    """Everything that decides a run's numbers, as plain data; names of arms and claims do not."""
    _, arm, task = find(trial)
    names = {task.data, task.pretrained}
    return {
        "task": described(dataclasses.replace(task, steps=0, pretraining_steps=0)),
        "pretraining_steps": task.pretraining_steps if task.pretrained else 0,
        "steps": trial.steps,
        "lr": trial.lr,
        "seed": trial.seed,
        "arm": {
            part: described(getattr(arm, part))
            for part in ("recipe", "watch", "loss_at", "also_train", "run")
        },
        "corpora": {n: corpus(n).sha256 for n in sorted(n for n in names if isinstance(n, str))},
        "source": source_of_rooms(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def described(value: Any) -> Any:
    """A value as plain data: dataclasses by class, source and fields; functions by source."""
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
    """The hash of the file in which a method's class or a claim's function stands."""
    path = Path(inspect.getsourcefile(thing) or "")
    inside = path.is_relative_to(SRC) and path.relative_to(SRC).parts[0]
    if inside in TRAINING_ROOMS or path == SRC / "claims" / "__init__.py":
        return ""  # the rooms are hashed as a whole; the contract decides no number
    return hash_of(path)


@cache
def hash_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


@cache
def source_of_rooms() -> str:
    """The hash of the rooms that train, and of the loop."""
    files = [p for room in TRAINING_ROOMS for p in sorted((SRC / room).rglob("*.py"))]
    text = "".join(hash_of(path) for path in (*files, *LOOP))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
