"""Many runs, each kept as a small file as soon as it ends, in this process or in several.

A file's name is the hash of all that its numbers depend on, so what has ended is never run
again: not after an interruption, nor for another comparison with the same baseline.
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
    """One run: picklable, so that a worker process can do it."""

    @property
    def described(self) -> str:
        """For a progress line."""
        ...

    @property
    def file(self) -> Path:
        """Where its numbers are kept; equal content has the same file."""
        ...

    def facts(self) -> Any:
        """All that its numbers depend on, as plain data."""
        ...

    def prepare(self) -> None:
        """Make what several runs share (a pretrained start), once, before workers begin."""
        ...

    def measure(self) -> Mapping[str, float]:
        """Do it."""
        ...


K = TypeVar("K", bound=Hashable)
Progress = Callable[[Trial, Quantities, int, int], None]  # what ended; how many of how many


def measured(trial: Trial) -> Quantities:
    """Do a run."""
    torch.set_num_threads(1)
    return {name: float(value) for name, value in trial.measure().items()}


def execute(trial: Trial) -> Quantities:
    """Do a run and keep its numbers."""
    quantities = measured(trial)
    keep(trial, quantities)
    return quantities


def keep(trial: Trial, quantities: Quantities) -> None:
    """Write a run's numbers, with all that they depend on beside them."""
    write_json(trial.file, {"run": trial.facts(), "quantities": quantities})


def kept(trial: Trial) -> Quantities | None:
    """The numbers of a run that is already there."""
    try:
        return json.loads(trial.file.read_bytes())["quantities"]
    except (OSError, ValueError, KeyError):
        return None


class Runner:
    """Does trials; finished ones survive any end of the program. `close` ends its workers."""

    def __init__(self, processes: int = 1, progress: Progress | None = None, on_ray: bool = False):
        self.processes, self.progress, self.on_ray = processes, progress, on_ray
        self.pool: ProcessPoolExecutor | None = None
        self.cluster: Cluster | None = None

    def __call__(self, trials: Mapping[K, Trial]) -> dict[K, Quantities]:
        """The numbers of all trials; those kept are read from their files."""
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
        """Do the trials; `ended` is told of each when it has ended and its numbers are kept."""
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
        except BrokenProcessPool as fault:  # the kernel's answer to too little memory, mostly
            raise OutOfRoom(
                "a run's process was killed", [("--processes", str(self.processes))],
                "Go on with --processes 1; what has ended is kept.",
            ) from fault  # fmt: skip

    def close(self) -> None:
        """Let the workers go; what they are doing is lost."""
        if self.pool is not None:
            self.pool.shutdown(wait=True, cancel_futures=True)
            self.pool = None
        if self.cluster is not None:
            self.cluster.close()
            self.cluster = None


@contextmanager
def going_on(command: str) -> Iterator[None]:
    """Ctrl-C inside the block is Interrupted, with the command that goes on from what is kept."""
    try:
        yield
    except KeyboardInterrupt:
        what = "interrupted; what has ended is kept"
        raise Interrupted(what, fix=f"Go on: {command}") from None
