"""Trainings that are killed at any moment and resumed: run as a program, prints JSON.

    python -m tests.jobs.killed RECIPE,... FOLDER KILLS KILLS_IN_SAVES SEED

One warm process imports everything and never trains; each training is a fork of it, so that
a kill costs no import. For each recipe one child dies at a step between two checkpoints; then
children are killed by the parent after a random time, or kill themselves at a random file
operation of a checkpoint's saving.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from eckart.io.folder import write_json
from eckart.io.headers import read_json
from eckart.io.run import latest_checkpoint
from eckart.io.tensors import write_tensors
from eckart.jobs.training.checkpoints import apart
from eckart.recipe import Recipe, attach
from tests.conftest import tiny
from tests.jobs.loops import SEED, mixed
from tests.laws.matrix import SMALL, recipe_for, small

# Rows make 6 steps an epoch: two epoch ends lie inside. A rule that does something at every
# third step is between two of them when it is saved at 4 and 8, and when it dies at 11.
STEPS, SAVE_EVERY, DEATH = 14, 4, 11
assert SMALL["every"] == 3


def handle_for(slug: str) -> Any:
    """A method in its small form; one of the weights with dropout, so that generators matter."""
    recipe = recipe_for(slug)
    if recipe.update is None:
        recipe = Recipe(weights=small(slug, dropout=0.2))
    return attach(tiny("llama"), recipe, seed=SEED)


def train(recipe: str, out: Path, *callbacks: TrainerCallback) -> None:
    """Train, from the newest whole checkpoint where there is one; write what it ended with."""
    handle = handle_for(recipe)
    saves = {"save_strategy": "steps", "save_steps": SAVE_EVERY, "save_total_limit": 2}
    trained = mixed(handle, Trainer, out, STEPS, 2, **saves)
    for callback in callbacks:
        trained.add_callback(callback)
    trained.train(resume_from_checkpoint=latest_checkpoint(out) is not None)
    moments, numbers = apart(trained.inner_optimizer.named_state_dict())
    write_tensors(out / "final.safetensors", {**handle.named_state(), **moments})
    write_json(out / "final.json", numbers)


class Die(TrainerCallback):
    """Kills its own process in the middle of a gap."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == DEATH:
            die()


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
    except BaseException:
        traceback.print_exc()
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


def dying_in_a_save(number: int, work: Callable[[], None]) -> None:
    die_at_operation(number)
    work()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def finished(work: Callable[[], None]) -> int:
    """The signal that ended a child which nobody kills from outside; 0 where it was done."""
    code = os.waitstatus_to_exitcode(os.waitpid(forked(work), 0)[1])
    assert code <= 0, "the training failed"
    return -code


def end(out: Path) -> tuple[bytes, Any]:
    """What a training ended with: the bytes of its tensors, and its numbers."""
    return (out / "final.safetensors").read_bytes(), read_json(out / "final.json")


def main(recipe: str, folder: Path, kills: int, in_saves: int, seed: int) -> list[dict[str, Any]]:
    """What came of each kill."""
    torch.set_num_threads(1)
    draw = random.Random(seed)
    whole = folder / "whole"
    start = time.monotonic()
    assert finished(partial(train, recipe, whole)) == 0
    usual = time.monotonic() - start
    results = []
    for number in range(1 + kills + in_saves):
        out = folder / f"killed-{number}"
        work = partial(train, recipe, out)
        if number == 0:
            died = finished(partial(work, Die()))
        elif number <= kills:
            died = killed_after(draw.uniform(0.2, 0.95) * usual, work)
        else:
            died = finished(partial(dying_in_a_save, draw.randint(1, 80), work))
        last = latest_checkpoint(out) if out.is_dir() else None
        torn = [p.name for p in (out / "checkpoints").glob(".*")]
        assert finished(work) == 0
        results.append(
            {
                "signal": died,
                "resumed_at": int(last.name[5:]) if last else 0,
                "torn": len(torn),
                "left_over": len(list((out / "checkpoints").glob(".*"))),
                "equal": end(out) == end(whole),
            }
        )
    return results


if __name__ == "__main__":
    names, where, *words = sys.argv[1:]
    numbers = [int(word) for word in words]
    answers = {name: main(name, Path(where, name), *numbers) for name in names.split(",")}
    print("RESULT " + json.dumps(answers))
