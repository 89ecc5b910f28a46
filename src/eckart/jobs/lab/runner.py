"""Runs trials in this process or in several, and saves each result as soon as it ends.

A file's name is the hash of everything that its result depends on, so a finished trial is never
run again: not after an interruption, nor for another comparison with the same baseline.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable, Hashable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from eckart.errors import Interrupted, OutOfRoom
from eckart.io.folder import write_json
from eckart.jobs.lab.cluster import Cluster
from eckart.jobs.training.workers import begin

Quantities = dict[str, float]


class Trial(Protocol):
    """One training run. Picklable, so that a worker process can execute it."""

    @property
    def described(self) -> str:
        """A short description for progress lines."""
        ...

    @property
    def file(self) -> Path:
        """The result file; trials with equal `facts` share it."""
        ...

    def facts(self) -> Any:
        """Everything that the result depends on, as plain data."""
        ...

    def prepare(self) -> None:
        """Create what several trials share (a pretrained model), once, before workers start."""
        ...

    def measure(self) -> Mapping[str, float]:
        """Train and evaluate; returns quantities by name."""
        ...


K = TypeVar("K", bound=Hashable)
Progress = Callable[[Trial, Quantities, int, int], None]  # trial, result, done, total


def measured(trial: Trial) -> Quantities:
    """Execute a trial on one thread, without saving."""
    torch.set_num_threads(1)
    return {name: float(value) for name, value in trial.measure().items()}


def execute(trial: Trial) -> Quantities:
    """Execute a trial and save its result."""
    quantities = measured(trial)
    keep(trial, quantities)
    return quantities


def keep(trial: Trial, quantities: Quantities) -> None:
    """Save a trial's result together with its `facts`."""
    write_json(trial.file, {"run": trial.facts(), "quantities": quantities})


def kept(trial: Trial) -> Quantities | None:
    """The saved result of a trial; None where there is none."""
    try:
        return json.loads(trial.file.read_bytes())["quantities"]
    except (OSError, ValueError, KeyError):
        return None


class Runner:
    """Executes trials; finished ones survive an interruption. `close` stops the workers."""

    def __init__(self, processes: int = 1, progress: Progress | None = None, on_ray: bool = False):
        self.processes, self.progress, self.on_ray = processes, progress, on_ray
        self.pool: ProcessPoolExecutor | None = None
        self.cluster: Cluster | None = None

    def __call__(self, trials: Mapping[K, Trial]) -> dict[K, Quantities]:
        """The results of all trials; saved ones are read from their files."""
        found = {key: q for key, trial in trials.items() if (q := kept(trial)) is not None}
        missing: dict[Path, Trial] = {}
        for key, trial in trials.items():
            if key not in found:
                missing.setdefault(trial.file, trial)
        done: dict[Path, Quantities] = {}

        def ended(path: Path, quantities: Quantities) -> None:
            done[path] = quantities
            if self.progress:
                self.progress(missing[path], quantities, len(done), len(missing))

        if missing:
            self.run(missing, ended)
        return {key: found[key] if key in found else done[t.file] for key, t in trials.items()}

    def run(self, trials: Mapping[Path, Trial], ended: Callable[[Path, Quantities], None]) -> None:
        """Execute the trials; calls `ended(path, quantities)` after each result is saved."""
        if self.on_ray:

            def reported(path: Path, quantities: Quantities) -> None:
                keep(trials[path], quantities)
                ended(path, quantities)

            self.cluster = self.cluster or Cluster()
            self.cluster.run(trials, measured, reported)
            return
        if self.processes == 1 or len(trials) == 1:
            for path, trial in trials.items():
                ended(path, execute(trial))
            return
        for trial in trials.values():
            trial.prepare()
        if self.pool is None:
            spawn = multiprocessing.get_context("spawn")
            self.pool = ProcessPoolExecutor(self.processes, spawn, begin, (os.getpid(),))
        futures = {self.pool.submit(execute, trial): path for path, trial in trials.items()}
        try:
            for future in as_completed(futures):
                ended(futures[future], future.result())
        except BrokenProcessPool as fault:  # mostly the kernel's out-of-memory killer
            raise OutOfRoom(
                "a run's process was killed", [("--processes", str(self.processes))],
                "Go on with --processes 1; what has ended is kept.",
            ) from fault  # fmt: skip

    def close(self) -> None:
        """Stop the workers; trials in progress are lost."""
        if self.pool is not None:
            self.pool.shutdown(wait=True, cancel_futures=True)
            self.pool = None
        if self.cluster is not None:
            self.cluster.close()
            self.cluster = None


@contextmanager
def resumable(command: str) -> Iterator[None]:
    """Turn Ctrl-C inside the block into Interrupted, with the command that resumes."""
    try:
        yield
    except KeyboardInterrupt:
        what = "interrupted; what has ended is kept"
        raise Interrupted(what, fix=f"Go on: {command}") from None
