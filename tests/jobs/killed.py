"""Trainings that are killed at any moment and resumed: run as a program, prints JSON.

    python -m tests.jobs.killed RECIPE,... FOLDER KILLS KILLS_IN_SAVES SEED

One warm process imports everything and never trains; each training is a fork of it, so that
a kill costs no import. A child is killed by the parent after a random time, or kills itself
at a random file operation of a checkpoint's saving.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

from eckart.io.run import latest_checkpoint
from eckart.io.tensors import read_tensors, write_tensors
from eckart.recipe import Recipe, attach, registry
from tests.conftest import tiny
from tests.jobs.loops import SEED, mixed

STEPS, SAVE_EVERY = 14, 3  # rows make 6 steps an epoch: two epoch ends lie inside


def handle_for(recipe: str) -> Any:
    """LoRA with dropout, so that generators matter; or GaLore with saves amid its gaps."""
    model = tiny("llama")
    if recipe == "lora":
        weights: Any = registry.load("lora")
        return attach(model, Recipe(weights=weights(rank=4, dropout=0.2)), seed=SEED)
    dense: Any = registry.load("dense")
    galore: Any = registry.load("galore")
    return attach(model, Recipe(weights=dense(), update=galore(rank=4, every=5)), seed=SEED)


def train(recipe: str, out: Path) -> None:
    """Train, from the newest whole checkpoint where there is one; write the final tensors."""
    handle = handle_for(recipe)
    saves = {"save_strategy": "steps", "save_steps": SAVE_EVERY, "save_total_limit": 2}
    trained = mixed(handle, Trainer, out, STEPS, 2, **saves)
    trained.train(resume_from_checkpoint=latest_checkpoint(out) is not None)
    write_tensors(out / "final.safetensors", handle.named_state())


def forked(work: Callable[[], None]) -> int:
    """Run in a child; its process number."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            work()
        code = 0
    finally:
        os._exit(code)


def killed_after(seconds: float, work: Callable[[], None]) -> int:
    """The signal that ended the child; 0 where it was done first."""
    pid = forked(work)
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    return os.WTERMSIG(os.waitpid(pid, 0)[1])


def die_at_operation(number: int) -> None:
    """Kill this process at its number-th file operation on a checkpoint that is being written."""
    count = 0

    def watch(event: str, args: tuple[Any, ...]) -> None:
        nonlocal count
        if event in ("open", "os.rename", "os.mkdir", "os.remove", "shutil.rmtree"):
            count += any("step-" in str(a) and ".writing-" in str(a) for a in args)
            if count >= number:
                die()

    sys.addaudithook(watch)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_at_operation(number: int, work: Callable[[], None]) -> int:
    """The signal that ended the child; 0 where it was done before that file operation."""

    def suicidal() -> None:
        die_at_operation(number)
        work()

    return os.WTERMSIG(os.waitpid(forked(suicidal), 0)[1])


def finished(work: Callable[[], None]) -> bool:
    return os.waitstatus_to_exitcode(os.waitpid(forked(work), 0)[1]) == 0


def main(recipe: str, folder: Path, kills: int, in_saves: int, seed: int) -> list[dict[str, Any]]:
    """What came of each kill."""
    torch.set_num_threads(1)
    draw = random.Random(seed)
    whole = folder / "whole"
    start = time.monotonic()
    assert finished(lambda: train(recipe, whole))
    usual = time.monotonic() - start
    expected = read_tensors(whole / "final.safetensors")
    results = []
    for number in range(kills + in_saves):
        out = folder / f"killed-{number}"
        if number < kills:
            died = killed_after(draw.uniform(0.2, 0.95) * usual, lambda: train(recipe, out))  # noqa: B023
        else:
            died = killed_at_operation(draw.randint(1, 80), lambda: train(recipe, out))  # noqa: B023
        last = latest_checkpoint(out) if out.is_dir() else None
        torn = [p.name for p in (out / "checkpoints").glob(".*")]
        ok = finished(lambda: train(recipe, out))  # noqa: B023
        found = read_tensors(out / "final.safetensors") if ok else {}
        results.append(
            {
                "signal": died,
                "resumed_at": int(last.name[5:]) if last else 0,
                "torn": len(torn),
                "left_over": len(list((out / "checkpoints").glob(".*"))),
                "equal": found.keys() == expected.keys()
                and all(torch.equal(found[n], t) for n, t in expected.items()),
            }
        )
    return results


if __name__ == "__main__":
    names, where, *words = sys.argv[1:]
    numbers = [int(word) for word in words]
    answers = {name: main(name, Path(where, name), *numbers) for name in names.split(",")}
    print("RESULT " + json.dumps(answers))
