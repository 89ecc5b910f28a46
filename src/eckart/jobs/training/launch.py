"""One job in several processes: `train.processes=N`.

The first process of all starts N of its own kind, each with its rank in the environment, and
waits. Rank 0 speaks and writes; the others compute the same and keep silent. A cluster's own
launcher (torchrun, accelerate) sets the same variables, and then nothing is started here.
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

STARTED_BY = "ECKART_STARTED_BY"  # the process id of the first process, in the others' environment
GRACE = 60.0  # seconds the others have to end after one has


class Follower(Run):
    """A run's folder as ranks above 0 see it: they read and write nothing."""

    def __init__(self, folder: Path):
        self.folder = folder

    def record(self, **facts: Any) -> None: ...
    def log(self, file: str = METRICS, **values: Any) -> None: ...
    def rewind(self, step: int) -> None: ...
    def drop_from(self, step: int) -> None: ...
    def write_resolved(self, text: str) -> None: ...


def is_first() -> bool:
    """Is this the process that speaks and writes?"""
    return int(os.environ.get("RANK", "0")) == 0


def is_needed(job: Job) -> bool:
    """Are processes to be started, and is this not one of them?"""
    return job.train.processes > 1 and "RANK" not in os.environ


def follow_starter() -> None:
    """In a process that was started here: end when the first one is gone, killed perhaps.

    Without it they would wait for each other, and hold their memory, for half an hour.
    """
    if starter := os.environ.get(STARTED_BY):
        follow(int(starter))


def wait_for_all() -> None:
    """Let every process come here before any goes on."""
    PartialState().wait_for_everyone()


@contextmanager
def shared(opened: Any) -> Iterator[Run]:
    """A run that rank 0 opens (by calling `opened`) and all ranks know the folder of."""
    if not is_first():
        yield Follower(Path(broadcast("")))
        return
    with opened() as run:
        broadcast(str(run.folder))
        yield run


def broadcast(word: str) -> str:
    """Rank 0's word, on every rank."""
    if not (dist.is_available() and dist.is_initialized()):
        return word
    said = [word]
    dist.broadcast_object_list(said, src=0)
    return said[0]


def require_places(count: int) -> None:
    """Raise UsageError where this machine has no places for so many processes.

    One per GPU; without GPUs one per core, and two in any case, to try a job out.
    """
    gpus, cores = torch.cuda.device_count(), os.cpu_count() or 1
    places, what = (gpus, "GPUs") if gpus else (max(2, cores), "cores")
    if count > places:
        raise UsageError(
            "more processes than this machine has places for",
            [(f"train.processes = {count}", f"{gpus or cores} {what}")],
            f"Type train.processes={places} at most.",
        )


def in_processes(job: Job) -> dict[str, Any]:
    """Run the job in its processes; rank 0's document, or SystemExit with its code."""
    # what each of them would refuse is refused before they start
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
    """The words of one process: the whole job from a file, the flags as they were given."""
    flags = job.flags
    words = [sys.executable, "-m", "eckart", job.command, "-c", str(file)]
    words += ["--resume", flags.resume] if flags.resume else []
    given = {"--json": flags.json, "--overwrite": flags.overwrite, "--dry-run": flags.dry_run}
    return words + [name for name, is_given in given.items() if is_given]


def start(words: list[str], count: int, as_json: bool, folder: str) -> list[Any]:
    """The processes by rank. Only rank 0 is heard; what others say goes to a file."""
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
        # A session of their own: a Ctrl-C comes here, and is passed on once.
        started.append(
            subprocess.Popen(
                words, env=env, stdout=out, stderr=err, text=True, start_new_session=True
            )
        )
    return started


@contextmanager
def passing_on(processes: list[Any]) -> Iterator[None]:
    """Pass signals on, so that every rank saves at the same step and ends."""

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
    """Wait for a process whose first one has ended; one that hangs is ended."""
    try:
        process.wait(GRACE if process.poll() is None else 0)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
