"""Trains a handle on data as the job says, in a run's folder.

Trainer runs the loop. This file has its arguments, the callbacks for metrics, progress and
Ctrl-C, and turns errors of the loop into messages for the user.
"""

from __future__ import annotations

import math
import shlex
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import (
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from eckart.errors import Diverged, Interrupted, is_out_of_memory
from eckart.io.run import Run
from eckart.io.tasks import TASKS
from eckart.io.text import Data
from eckart.jobs.measuring.devices import model_device
from eckart.jobs.measuring.memory import Kept, autocasts, held_state_bytes, model_bytes
from eckart.jobs.settings.config import Job
from eckart.jobs.settings.settle import gradient_bytes, warmup_steps
from eckart.jobs.training import held_out
from eckart.jobs.training.checkpoints import from_all_processes, load_model_state
from eckart.jobs.training.observe import Observer
from eckart.jobs.training.remedies import out_of_memory
from eckart.jobs.training.screen import Progress, Screen
from eckart.jobs.training.trainer import Training
from eckart.recipe import Handle


@dataclass(frozen=True)
class Fitted:
    """Results of a training besides the handle's tensors."""

    steps: int
    best_step: int | None  # step of the checkpoint that is the result; None for the last step
    seconds: float  # of this process, evaluations included
    tokens_per_second: float
    memory: dict[str, int]  # peak tensor bytes by category

    @property
    def peak_bytes(self) -> int:
        return sum(self.memory.values())


def fit(
    job: Job,
    run: Run,
    handle: Handle,
    data: Data,
    screen: Screen,
    resume: Path | None = None,
    moments: Mapping[str, Any] | None = None,
) -> Fitted:
    """Train to the last step, from a checkpoint if one is given, and load the best one after it.

    `moments` is an earlier training's optimizer state by name; entries of matching shape are used.
    Raises Interrupted after saving a checkpoint, Diverged naming the first module that is not
    finite, OutOfRoom if memory runs out.
    """
    trained = RunTraining(job, run, handle, data, screen)
    trained.moments = dict(moments or {})
    first = step_of(resume)
    run.rewind(first)
    begun = time.monotonic()
    try:
        with listening(trained.interrupt):
            trained.train(resume_from_checkpoint=str(resume) if resume else None)
    except Diverged as fault:
        raise last_good(fault, run, job, trained.state.global_step) from None
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as fault:
        if is_out_of_memory(fault):
            optimizer = trained.inner_optimizer or handle.optimizer(float(job.train.lr))
            raise out_of_memory(job, handle, optimizer, estimated_bytes(run)) from fault
        raise
    steps, seconds = trained.state.global_step, time.monotonic() - begun
    if trained.interrupt.asked and steps < int(job.train.steps):
        raise interrupted(job, run, steps)
    memory = trained.memory() if steps > first else {}  # else killed after the last step
    tokens = trained.tokens(steps - first)
    return Fitted(steps, take_best(trained), seconds, tokens / seconds, memory)


def take_best(trained: RunTraining) -> int | None:
    """Load the best checkpoint if the job asks for it; returns its step, or None."""
    job, step = trained.job, trained.state.best_global_step
    if not (job.train.best and trained.data.evaluation and step):
        return None
    if step != trained.state.global_step:
        load_model_state(trained.handle, trained.checkpoint_at(step))
    return step


def step_of(checkpoint: Path | None) -> int:
    """The step in a checkpoint folder's name; 0 for None."""
    return int(checkpoint.name.removeprefix("step-")) if checkpoint else 0


def arguments(job: Job, run: Run, handle: Handle, data: Data) -> TrainingArguments:
    """TrainingArguments from the job's keys."""
    train, steps = job.train, int(job.train.steps)
    device = model_device(handle.model)
    evaluated = bool(data.evaluation)
    schedule = "constant_with_warmup" if train.schedule == "constant" else train.schedule
    return TrainingArguments(
        output_dir=str(run.folder),
        max_steps=steps,
        per_device_train_batch_size=int(train.batch_size),
        gradient_accumulation_steps=int(train.accumulate),
        learning_rate=float(train.lr),
        lr_scheduler_type=schedule,
        warmup_steps=warmup_steps(train),
        max_grad_norm=train.clip or 0.0,
        logging_steps=max(1, round(steps / 25)),
        logging_first_step=True,
        save_strategy="steps",
        save_steps=int(train.save_every),
        save_total_limit=train.keep,
        eval_strategy="steps" if evaluated else "no",
        eval_steps=int(job.eval.every) if evaluated else None,
        metric_for_best_model="loss" if evaluated and (train.best or train.patience) else None,
        greater_is_better=False,
        seed=train.seed,
        activation_checkpointing=bool(train.checkpointing),
        torch_compile=train.compile,
        # Trained weights stay in fp32: in bf16 small updates would be rounded to nothing.
        bf16=autocasts(job.choices["precision"].method, handle.weights),
        use_cpu=device.type == "cpu",
        report_to=list(job.track) or "none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=device.type == "cuda",
        ddp_find_unused_parameters=idles(handle),
    )


def idles(handle: Handle) -> bool:
    """Does the update leave parameters without a gradient at some steps? DDP has to be told."""
    update = handle.recipe.update
    return update is not None and update.rule().idles


class RunTraining(Training):
    """Training with evaluation on held-out tokens, metrics.jsonl, progress and Ctrl-C."""

    control: TrainerControl

    def __init__(self, job: Job, run: Run, handle: Handle, data: Data, screen: Screen):
        super().__init__(
            handle,
            arguments(job, run, handle, data),
            layerwise=job.train.layerwise,
            train_dataset=data.train,
            eval_dataset=data.evaluation or None,
            data_collator=data.collate,
        )
        self.job, self.data = job, data
        self.interrupt = Interrupt()
        self.kept_bytes = 0
        self.before_cut: dict[str, int] = {}  # peak bytes before a cut, which frees memory
        self.remove_callback(PrinterCallback)
        self.add_callback(self.interrupt)
        self.observer: Observer | None = None
        if self.args.should_save:
            self.observer = Observer(run, handle, lambda: self.inner_optimizer)
            self.add_callback(self.observer)
            self.add_callback(Metrics(run))
            if not screen.quiet:
                self.add_callback(Progress(self.pace(), lambda: sum(self.memory().values())))
        self.patience = Patience(job.train.patience)
        self.add_callback(self.patience)

    def asked_to_stop(self) -> bool:
        return self.interrupt.asked or self.patience.ran_out

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Means over tokens, comparable with the evaluations before and after training."""
        found = held_out.measure(
            self.handle.model,
            self.data,
            self.args.per_device_train_batch_size,
            self.job.eval.metrics,
        )
        if not math.isfinite(found["loss"]):
            raise Diverged(f"held-out loss is {found['loss']} at step {self.state.global_step}")
        logs = {f"eval_{name}": value for name, value in found.items() if name != "sources"}
        self.log(logs)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, dict(logs)
        )
        return logs

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """As Training's; measures the bytes that autograd keeps on the first batch."""
        if self.kept_bytes or not model.training:
            return super().compute_loss(model, inputs, *args, **kwargs)
        kept = Kept(self.handle.model)
        with kept.count():
            loss = super().compute_loss(model, inputs, *args, **kwargs)
        self.kept_bytes = kept.bytes
        return loss

    def step_facts(self) -> dict[str, float]:
        """As Training's, with the norm of the update."""
        norm = self.observer.update_norm if self.observer else None
        return super().step_facts() | ({} if norm is None else {"update_norm": norm})

    def rows(self, steps: int) -> int:
        """Rows in this number of steps, over all processes."""
        each = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return steps * each * self.args.world_size

    def tokens(self, steps: int) -> float:
        """Tokens without padding in this number of steps; 0 for images."""
        return self.rows(steps) * self.data.tokens_in_a_row

    def pace(self) -> tuple[float, str]:
        """Tokens per step, or rows for images, and the unit."""
        tokens = self.tokens(1)
        return (tokens, "tokens") if tokens else (self.rows(1), TASKS[self.data.task].sees)

    def memory(self) -> dict[str, int]:
        """Peak tensor bytes by category: the allocator's on a GPU, else counted."""
        device = model_device(self.handle.model)
        if device.type == "cuda":
            return {"allocated": torch.cuda.max_memory_allocated(device)}
        found = {
            **model_bytes(self.handle),
            "gradients": gradient_bytes(self.job.train, self.inner_optimizer),
            "state": held_state_bytes(self.inner_optimizer),
            "activations": self.kept_bytes,
        }
        return max(found, self.before_cut, key=lambda parts: sum(parts.values()))

    def cut_here(self, folder: Path) -> None:
        """As Cutting's; memory before the cut counts as the peak."""
        if self.inner_optimizer is not None:  # there is none if the cut comes right after resuming
            self.before_cut = self.memory()
        super().cut_here(folder)


# --- callbacks -----------------------------------------------------------------------------


class Metrics(TrainerCallback):
    """One line of metrics.jsonl for each log step."""

    def __init__(self, run: Run):
        self.run, self.begun = run, time.monotonic()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        logs = {k: v for k, v in (more.get("logs") or {}).items() if k != "step"}
        if "train_runtime" in logs:  # Trainer's closing summary: run.json has these
            return
        seconds = round(time.monotonic() - self.begun, 3)
        self.run.log(step=state.global_step, seconds=seconds, **logs)


class Patience(TrainerCallback):
    """Stops after N evaluations in a row without a better loss, counted across resumes."""

    def __init__(self, patience: int | None):
        self.patience, self.ran_out = patience, False

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        losses = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry]
        since_best = len(losses) - 1 - losses.index(min(losses))
        if self.patience is not None and since_best >= self.patience:
            control.should_training_stop = self.ran_out = True


class Interrupt(TrainerCallback):
    """On a request to stop, ends the step, saves a checkpoint and stops the training."""

    def __init__(self) -> None:
        self.asked = False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.asked = any(from_all_processes(self.asked))  # a signal may reach one a step earlier
        if self.asked:
            control.should_save = control.should_training_stop = True


@contextmanager
def listening(interrupt: Interrupt) -> Iterator[None]:
    """The first Ctrl-C or SIGTERM requests a stop; a second one ends the program as usual."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python handles signals in the main thread only
        return
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def asked(number: int, frame: FrameType | None) -> None:
        if interrupt.asked:
            raise KeyboardInterrupt
        interrupt.asked = True

    for number in before:
        signal.signal(number, asked)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --- what an ending means ------------------------------------------------------------------


def interrupted(job: Job, run: Run, step: int) -> Interrupted:
    """The error that ends a run which was asked to stop."""
    return Interrupted(
        f"interrupted at step {step}; a checkpoint is saved",
        [("checkpoint", str(run.latest()))],
        f"Go on: eckart {job.command} --resume {shlex.quote(str(run.folder))}",
    )


def last_good(fault: Diverged, run: Run, job: Job, step: int) -> Diverged:
    """The error of a divergence, with the last good checkpoint and how to continue from it.

    The checkpoint of the diverged step is removed: resuming from it would diverge again at any lr.
    """
    run.drop_from(step)
    found = run.latest()
    lower = f"train.lr={float(job.train.lr) / 2:.2g}"
    if found is None:
        fact, fix = "none was saved before", f"Start again with a lower rate: {lower}"
    else:
        again = f"eckart {job.command} --resume {shlex.quote(str(run.folder))} {lower}"
        fact, fix = str(found), f"Go on with a lower rate: {again}"
    return Diverged(fault.what, [*fault.facts, ("last good checkpoint", fact)], fix)


def estimated_bytes(run: Run) -> int:
    """The memory estimate that was recorded before the run or stage began."""
    facts = run.facts
    parts = (facts.get("memory") or {}).get("estimated")
    return sum(parts.values()) if parts else int(facts.get("estimated_memory_bytes") or 0)
