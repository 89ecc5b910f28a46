"""Trains one arm of an experiment at one seed and learning rate, in a plain PyTorch loop.

`TaskLab` implements the protocol `Lab` of claims/__init__.py, which a claim's functions
receive. All arms share the initial weights, the batch of each seed and step, the schedule and
the evaluated examples. One thread; only the recipe's own noise (dropout) draws from the global
generator, which is seeded.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from eckart.claims import END, UNTOUCHED, Arm, Batch, Task, Trained, Watches
from eckart.errors import UsageError
from eckart.io.corpora import Corpus
from eckart.jobs.lab.tasks import (
    chosen_rows,
    in_splits,
    splits_of,
    start_model,
    text_splits,
    warm_cosine,
)
from eckart.jobs.measuring.memory import activation_bytes, held_state_bytes, model_bytes, size
from eckart.jobs.training.cut import Kept, cut_moments, cut_terms
from eckart.recipe import Handle, Recipe, attach
from eckart.recipe.groups import default_lr

CALIBRATION = 8  # batches for recipes that need data at initialization
AT_ONCE = 64  # rows in an evaluation batch
WORST = 1.0  # nats above the first loss: a run above this has diverged, and gets this loss


class TaskLab:
    """Trains and evaluates one arm on a task; the methods are documented in `Lab`."""

    def __init__(self, task: Task, seed: int, lr: float = math.nan, steps: int | None = None):
        self.task, self.seed, self.lr = task, seed, lr
        self.steps = steps or task.steps
        self.splits = splits_of(task)

    def model(self) -> nn.Module:
        return start_model(self.task, self.seed)

    def batch(self, step: int) -> dict[str, Tensor]:
        return chosen_rows(self.splits.train, self.task.batch_size, "train", self.seed, step)

    def batches(self, count: int) -> list[Batch]:
        size = self.task.batch_size
        return [
            chosen_rows(self.splits.train, size, "calibration", self.seed, i) for i in range(count)
        ]

    def on(self, text: str | Corpus) -> Self:
        there, length = copy.copy(self), self.task.seq_len
        if isinstance(text, str):
            there.splits = text_splits(text, length)
        else:
            there.splits = in_splits(text, length)
        return there

    def train(
        self,
        model: nn.Module,
        recipe: Recipe,
        *,
        lr: float | None = None,
        steps: int | None = None,
        watch: Watches | None = None,
        **options: Any,
    ) -> Trained:
        steps = steps or self.steps
        rate = self.lr if lr is None else lr
        calibration = self.batches(CALIBRATION) if recipe.needs else None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)  # dropout and other noise of the recipe
            handle = attach(
                model,
                recipe,
                calibration=options.pop("calibration", calibration),
                steps=steps,
                lr=rate,
                warmup=round(self.task.warmup * steps),
                seed=self.seed,
                **options,
            )
            return self.loop(handle, rate, steps, at_steps(watch or {}, steps))

    def rate(self, step: int, steps: int) -> float:
        """The multiplier of the learning rate at a step, between 0 and 1."""
        return warm_cosine(step, steps, self.task.warmup, self.task.floor)

    def loop(self, handle: Handle, lr: float, steps: int, watch: Watches) -> Trained:
        """Train for `steps` steps, or until a loss is not finite."""
        optimizer, rates = self.optimizer(handle, lr)
        trained = Trained(handle.model, handle, optimizer, 0, [], {})
        begun = time.monotonic()
        for step in range(steps):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * self.rate(step, steps)
            batch = self.batch(step)
            loss = handle.loss(batch, handle.model(**batch))
            trained.losses.append(loss.item())
            if not math.isfinite(trained.losses[-1]):
                break
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            trained.step = step + 1
            if step + 1 in watch:
                trained.quantities.update(watch[step + 1](trained, self))
            if handle.events.cuts and (kept := handle.events.due_cut()):
                optimizer, rates = self.cut(handle, kept, optimizer, lr)
                trained.optimizer = optimizer
        trained.quantities["seconds"] = time.monotonic() - begun
        trained.quantities.update(self.outcome(trained))
        return trained

    def optimizer(self, handle: Handle, lr: float) -> tuple[Any, list[float]]:
        """The recipe's optimizer, and the learning rate of each group before the schedule."""
        optimizer = handle.optimizer(lr, self.task.clip)
        return optimizer, [group["lr"] for group in optimizer.param_groups]

    @torch.no_grad()
    def cut(self, handle: Handle, kept: Kept, optimizer: Any, lr: float) -> Any:
        """Apply a rank reduction: cut terms and moments alike, and build a new optimizer."""
        moments = cut_moments(handle, kept, optimizer.named_state_dict())
        cut_terms(handle, kept)
        fresh, rates = self.optimizer(handle, lr)
        fresh.load_named_state_dict(moments)
        return fresh, rates

    def outcome(self, trained: Trained) -> dict[str, float]:
        """The quantities of every trained arm; a diverged run gets its first loss plus `WORST`."""
        losses = trained.losses
        ceiling = losses[0] + WORST if math.isfinite(losses[0]) else math.inf
        found = self.evaluate(trained.model)
        diverged = not all(math.isfinite(x) for x in (*losses, found["loss"]))
        diverged = diverged or found["loss"] > ceiling
        if diverged:
            found.update(loss=ceiling, validation=ceiling)
        last = losses[-max(1, len(losses) // 10) :]
        gradients = sum(size(p) for p in trained.handle.trainable().values())
        held = sum(model_bytes(trained.handle).values()) + gradients
        state = held_state_bytes(trained.optimizer)
        return {
            **found,
            "train": ceiling if diverged else sum(last) / len(last),
            "parameters": float(sum(p.numel() for p in trained.handle.trainable().values())),
            "state_bytes": float(state),
            "peak_bytes": float(held + state + activation_bytes(trained.model, self.batch(0))),
            "steps_done": float(trained.step),
            "diverged": float(diverged),
        }

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        training, rows = model.training, self.task.evaluated
        validation, test = (
            {key: tensor[:rows] for key, tensor in part.items()}
            for part in (self.splits.validation, self.splits.test)
        )
        model.eval()
        try:
            found = {"validation": mean_loss(model, validation), "loss": mean_loss(model, test)}
            if self.task.score is not None:
                found.update(mean_score(model, test, self.task.score))
        finally:
            model.train(training)
        return found

    def measure(self, arm: Arm) -> dict[str, float]:
        """Run an arm at this seed and learning rate and return all its quantities."""
        if arm.run is not None:
            return dict(arm.run(self))
        model = self.model()
        if arm.recipe is None:
            return self.evaluate(model)
        watch = {step: keep_loss(step) for step in arm.loss_at} | dict(arm.watch)
        options: dict[str, Any] = {"also_train": arm.also_train} if arm.also_train else {}
        return self.train(model, arm.recipe, watch=watch, **options).quantities


def start_of(arm: Arm, task: Task) -> float:
    """The learning rate at the centre of an arm's search; NaN where nothing is trained."""
    if arm.lr is not None:
        return arm.lr
    if arm.recipe is not None:
        return default_lr(arm.recipe, scratch=task.pretrained is None)
    if arm.search and arm is not UNTOUCHED:
        raise UsageError(
            "an arm needs a learning rate to begin with",
            [(arm.name, "lr is missing")],
            "Write Arm(..., lr=1e-3), or search=False where nothing is trained.",
        )
    return math.nan


def at_steps(watch: Watches, steps: int) -> Watches:
    """Watches by the step after which they run; those beyond the last step run at the end.

    Several that fall on one step run in the order of their original steps.
    """
    by_step: dict[int, list[Any]] = {}
    for step in sorted(watch, key=lambda s: (s == END, s)):
        by_step.setdefault(steps if step == END else min(step, steps), []).append(watch[step])

    def together(functions: list[Any]) -> Any:
        def run(trained: Trained, lab: Any) -> dict[str, float]:
            return {k: v for f in functions for k, v in f(trained, lab).items()}

        return run

    return {step: together(functions) for step, functions in by_step.items()}


def keep_loss(step: int) -> Any:
    """A watch that measures the test loss as `loss@STEP`."""

    def measure(trained: Trained, lab: Any) -> dict[str, float]:
        return {f"loss@{step}": lab.evaluate(trained.model)["loss"]}

    return measure


def mean_loss(model: nn.Module, examples: Batch) -> float:
    """The model's own mean loss over all examples."""
    total = count = 0.0
    for batch in in_batches(examples):
        size = len(next(iter(batch.values())))
        total += float(model(**batch)["loss"]) * size
        count += size
    return total / count


def mean_score(model: nn.Module, examples: Batch, score: Any) -> dict[str, float]:
    """Means over all examples of what `score(model, batch)` returns."""
    totals: dict[str, float] = {}
    count = 0
    for batch in in_batches(examples):
        size = len(next(iter(batch.values())))
        for name, value in score(model, batch).items():
            totals[name] = totals.get(name, 0.0) + float(value) * size
        count += size
    return {name: total / count for name, total in totals.items()}


def in_batches(examples: Batch) -> list[dict[str, Tensor]]:
    parts: Mapping[str, tuple[Tensor, ...]] = {k: t.split(AT_ONCE) for k, t in examples.items()}
    count = len(next(iter(parts.values())))
    return [{key: tensors[i] for key, tensors in parts.items()} for i in range(count)]
