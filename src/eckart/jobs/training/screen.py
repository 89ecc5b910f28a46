"""Terminal output of a job: aligned lines and progress.

Results go to stdout, everything else to stderr. With --json no lines are printed, so that stdout
has the document alone. Progress overwrites its line on a terminal and is a few lines in a pipe.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from eckart.jobs.measuring.memory import in_words

WIDE = 24  # widest column; a longer name, such as a path, exceeds it
FEWEST, MOST = 4, 25  # progress lines in a pipe, besides the first


@dataclass
class Screen:
    """Prints the lines of one job, or nothing if `quiet`."""

    quiet: bool = False
    warnings: list[str] = field(default_factory=list)
    width: int = 0  # of the second column: the longest name so far

    def line(self, label: str, text: str, name: str = "", result: bool = False) -> None:
        """`label    name   text`; a result goes to stdout. Further lines of text are indented."""
        if self.quiet:
            return
        self.width = max(self.width, len(name) if len(name) <= WIDE else 0)
        head, *rest = text.splitlines() or [""]
        column = f"{name:<{self.width}}   " if name else ""
        print(f"{label:<9}{column}{head}".rstrip(), file=sys.stdout if result else sys.stderr)
        for more in rest:
            print(" " * 9 + more, file=sys.stdout if result else sys.stderr)

    def warn(self, text: str) -> None:
        """A line that begins with `warning`; kept for the document."""
        self.warnings.append(text)
        self.line("warning", text)


class Progress(TrainerCallback):
    """`120/300  loss 2.31  held out 2.40  lr 2.1e-3  1.9 s/step  540 tokens/s  1 GB  0:05:42 left`.

    On stderr. `per_step` is the amount per step and its unit; `memory` returns bytes, and is
    called at log steps only.
    """

    def __init__(self, per_step: tuple[float, str], memory: Callable[[], int]):
        self.out, self.live = sys.stderr, sys.stderr.isatty()
        self.per_step, self.memory = per_step, memory
        self.bytes: int | None = None
        self.loss: float | None = None
        self.held_out: str | None = None
        self.rate: float | None = None
        self.begun, self.first = time.monotonic(), 0
        self.step_begun = self.stepping = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.begun, self.first = time.monotonic(), state.global_step

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.step_begun = time.monotonic()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.stepping += time.monotonic() - self.step_begun
        if self.live:
            width = shutil.get_terminal_size().columns - 1  # a wrapped line cannot be overwritten
            self.out.write("\r\x1b[K" + self.text(state)[: max(width, 40)])
            self.out.flush()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        logs = more.get("logs") or {}
        if "eval_loss" in logs:
            right = f" ({logs['eval_accuracy']:.1%} right)" if "eval_accuracy" in logs else ""
            self.held_out = f"{logs['eval_loss']:.3f}{right}"
        if "loss" not in logs:
            return
        self.loss, self.rate = logs["loss"], logs.get("learning_rate")
        self.bytes = self.memory()
        done, total = state.global_step, state.max_steps
        if not self.live and (done in (1, total) or done % every(total) == 0):
            print(self.text(state), file=self.out, flush=True)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self.live:
            print(file=self.out, flush=True)

    def text(self, state: TrainerState) -> str:
        """The current line. The time per step excludes evaluations, the time left includes them."""
        done, total = state.global_step, state.max_steps
        taken = max(1, done - self.first)
        pace, whole = self.stepping / taken, (time.monotonic() - self.begun) / taken
        parts = [f"{done:>{len(str(total))}}/{total}"]
        parts += [f"loss {self.loss:.3f}"] if self.loss is not None else []
        parts += [f"held out {self.held_out}"] if self.held_out is not None else []
        parts += [f"lr {rate(self.rate)}"] if self.rate is not None else []
        seen, unit = self.per_step
        parts += [f"{pace:.2g} s/step", f"{amount(seen / pace)} {unit}/s"]
        parts += [in_words(self.bytes)] if self.bytes else []
        parts += [f"{clock(whole * (total - done))} left"]
        return " " + "  ".join(parts)


def every(steps: int) -> int:
    """Steps between two lines in a pipe: 2 of 8, 3 of 30, 40 of 1000."""
    return max(1, round(steps / MOST), min(3, round(steps / FEWEST)))


def rate(value: float) -> str:
    """A learning rate as `2.1e-3`."""
    if not value:
        return "0"
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def in_bits(dtype: torch.dtype) -> str:
    """The short name of a dtype: fp32, bf16."""
    name = str(dtype).removeprefix("torch.")
    return {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}.get(name, name)


def clock(seconds: float) -> str:
    """h:mm:ss."""
    minutes, s = divmod(round(seconds), 60)
    h, m = divmod(minutes, 60)
    return f"{h}:{m:02d}:{s:02d}"


def amount(count: float) -> str:
    """1,234 below ten thousand, then 134.5 M or 7.1 B."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e4, "K")):
        if count >= size:
            return f"{count / (1e3 if unit == 'K' else size):.1f} {unit}"
    return f"{count:,.0f}"
