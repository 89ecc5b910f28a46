"""Distributed training of one job: `train.processes=N`.

The launching process starts N workers with ranks in their environment, and waits. Rank 0 prints
and writes files; the other ranks only compute. If a launcher such as torchrun or accelerate has
set these variables, no processes are started here.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState

from eckart.errors import EckartError, UsageError
from eckart.io.run import METRICS, Run
from eckart.jobs.settings import settle
from eckart.jobs.settings.config import Job
from eckart.jobs.training.workers import follow

STARTED_BY = "ECKART_STARTED_BY"  # environment variable: the launching process's id
GRACE = 60.0  # seconds that the other ranks have to end after rank 0


class Follower(Run):
    """A run for ranks above 0: it knows the folder, and writes nothing."""

    def __init__(self, folder: Path):
        self.folder = folder

    def record(self, **facts: Any) -> None: ...
    def log(self, file: str = METRICS, **values: Any) -> None: ...
    def rewind(self, step: int) -> None: ...
    def drop_from(self, step: int) -> None: ...
    def write_resolved(self, text: str) -> None: ...


def is_first() -> bool:
    """Is this rank 0, which prints and writes files?"""
    return int(os.environ.get("RANK", "0")) == 0


def is_needed(job: Job) -> bool:
    """Does this process have to start the workers of the job?"""
    return job.train.processes > 1 and "RANK" not in os.environ


def follow_starter() -> None:
    """In a worker: exit when the launching process is gone, for example killed.

    Otherwise workers would wait for each other, and hold their memory, for half an hour.
    """
    if starter := os.environ.get(STARTED_BY):
        follow(int(starter))


def wait_for_all() -> None:
    """Wait until every process has reached this point."""
    PartialState().wait_for_everyone()


@contextmanager
def shared(opened: Any) -> Iterator[Run]:
    """The run opened by rank 0 (by calling `opened`); a `Follower` of its folder on other ranks."""
    if not is_first():
        yield Follower(Path(broadcast("")))
        return
    with opened() as run:
        broadcast(str(run.folder))
        yield run


def broadcast(word: str) -> str:
    """Rank 0's string, on every rank."""
    if not (dist.is_available() and dist.is_initialized()):
        return word
    said = [word]
    dist.broadcast_object_list(said, src=0)
    return said[0]


def require_places(count: int) -> None:
    """Raise UsageError for more processes than GPUs; without GPUs, than cores, with at least 2."""
    gpus, cores = torch.cuda.device_count(), os.cpu_count() or 1
    places, what = (gpus, "GPUs") if gpus else (max(2, cores), "cores")
    if count > places:
        raise UsageError(
            "more processes than this machine has places for",
            [(f"train.processes = {count}", f"{gpus or cores} {what}")],
            f"Type train.processes={places} at most.",
        )


def in_processes(job: Job) -> dict[str, Any]:
    """Run the job in several processes. Returns rank 0's document, or raises SystemExit."""
    # Errors that every process would raise are raised once, before they start.
    require_places(job.train.processes)
    settle.layerwise(settle.as_it_began(job, Path(job.flags.resume)) if job.flags.resume else job)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "job.yaml")
        file.write_text(job.dump(), encoding="utf-8")
        started = start(command_line(job, file), job.train.processes, job.flags.json, folder)
        with passing_on(started):
            out, _ = started[0].communicate()
        code = started[0].returncode
        for process in started[1:]:
            end(process)
        if code == 0 and any(p.returncode for p in started):
            said = "\n".join(
                Path(folder, f"{r}.err").read_text(encoding="utf-8") for r in range(1, len(started))
            )
            raise EckartError("a process of the run failed", [("it said", said[-2000:])])
    if code and job.flags.json:
        sys.stdout.write(out)
    if code:
        raise SystemExit(code)
    return json.loads(out) if job.flags.json else {"command": job.command, "exit": 0}


def command_line(job: Job, file: Path) -> list[str]:
    """The command of one worker: the job from a file, and the given flags."""
    flags = job.flags
    words = [sys.executable, "-m", "eckart", job.command, "-c", str(file)]
    words += ["--resume", flags.resume] if flags.resume else []
    given = {"--json": flags.json, "--overwrite": flags.overwrite, "--dry-run": flags.dry_run}
    return words + [name for name, is_given in given.items() if is_given]


def start(words: list[str], count: int, as_json: bool, folder: str) -> list[Any]:
    """Start the workers, by rank. Rank 0 prints; stderr of the others goes to files."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    place[STARTED_BY] = str(os.getpid())
    started = []
    for rank in range(count):
        env = {**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        heard = rank == 0
        out = (subprocess.PIPE if as_json else None) if heard else subprocess.DEVNULL
        err = None if heard else open(Path(folder, f"{rank}.err"), "w", encoding="utf-8")  # noqa: SIM115
        # In their own session, so that a Ctrl-C reaches this process only and is passed on once.
        started.append(
            subprocess.Popen(
                words, env=env, stdout=out, stderr=err, text=True, start_new_session=True
            )
        )
    return started


@contextmanager
def passing_on(processes: list[Any]) -> Iterator[None]:
    """Forward SIGINT and SIGTERM, so that every rank saves at the same step and exits."""

    def pass_on(number: int, frame: FrameType | None) -> None:
        for process in processes:
            process.send_signal(number)

    before = {s: signal.signal(s, pass_on) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end(process: Any) -> None:
    """Wait for a rank after rank 0 has ended, and kill it if it hangs."""
    try:
        process.wait(GRACE if process.poll() is None else 0)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
