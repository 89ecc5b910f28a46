"""Functions in gloo processes forked from this one, modules in fresh ones: what came of them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

ROOT = Path(__file__).parents[1]


def in_a_fresh_one(module: str, *words: object) -> Any:
    """`python -m MODULE WORDS` here: the JSON of the line that begins with RESULT."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, words)],
        capture_output=True, text=True, cwd=ROOT, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    line = next(x for x in done.stdout.splitlines() if x.startswith("RESULT "))
    return json.loads(line.removeprefix("RESULT "))


def in_processes(function: Callable[..., Any], *args: Any, count: int = 2) -> list[Any]:
    """function(rank, *args) in `count` processes with a gloo group; results by rank.

    Forked, so that imports are paid once; a failing process' traceback fails the test.
    """
    with tempfile.TemporaryDirectory() as folder:
        processes = _start(folder, function, args, count)
        for process in processes:
            process.join(240)
        for process in processes:
            process.kill()
        results = []
        for rank in range(count):
            error = Path(folder, f"{rank}.error")
            assert not error.exists(), error.read_text()
            results.append(torch.load(Path(folder, f"{rank}.pt"), weights_only=False))
        return results


def until_one_dies(function: Callable[..., Any], *args: Any, count: int = 2) -> dict[int, int]:
    """Run function(rank, *args) until a process ends, then kill the rest as a launcher does.

    The exit codes of those that ended by themselves, by rank: -9 for one that was killed.
    """
    with tempfile.TemporaryDirectory() as folder:
        processes = _start(folder, function, args, count)
        ended = wait([process.sentinel for process in processes], timeout=240)
        codes = {}
        for rank, process in enumerate(processes):
            by_itself = process.sentinel in ended
            if not by_itself:
                process.kill()
            process.join()
            if by_itself:
                codes[rank] = process.exitcode
        return codes


def _start(folder: str, function: Callable[..., Any], args: Any, count: int) -> list[Any]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = mp.get_context("fork")
    processes = [
        context.Process(target=_run, args=(rank, count, port, folder, function, args))
        for rank in range(count)
    ]
    for process in processes:
        process.start()
    return processes


def _run(
    rank: int, count: int, port: int, folder: str, function: Callable[..., Any], args: Any
) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", rank=rank, world_size=count, timeout=timedelta(seconds=60))
        result = function(rank, *args)
        torch.save(result, Path(folder, f"{rank}.pt"))
        dist.barrier()
    except BaseException:
        Path(folder, f"{rank}.error").write_text(traceback.format_exc())
    finally:
        os._exit(0)  # the parent's threads and test runner are not ours to shut down
