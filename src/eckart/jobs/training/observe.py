"""Observations for a run's page: update norms, spectra, overlaps of bases, and text samples.

    update_norm   |theta_after - theta_before| of a step that is logged, all that is trained
    spectra       singular values of what was learned, six times in a run; see change.py for
                  those of full training
    overlaps      at a refresh of a basis: |P_old^T P_new|^2 / r, the share that is kept;
                  for coordinates or columns the share that is chosen again
    samples       completions of the same held-out prompts, before and after training

Update norms are in metrics.jsonl, spectra and overlaps in spectra.jsonl, one line per step that
has some; a resumed run appends to them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from eckart.io.run import SPECTRA, Run
from eckart.io.text import Data
from eckart.jobs.measuring.memory import size
from eckart.jobs.training.change import changes, starts
from eckart.jobs.training.page import spectra
from eckart.jobs.training.screen import Screen
from eckart.recipe import Handle

COPIED = 256 * 10**6  # update norms are measured up to these bytes of trained tensors
TIMES, REFRESHES = 6, 100  # spectra and overlaps of a run at most
WATCHED, VALUES = 8, 512  # matrices with overlaps; singular values per spectrum
SIDES = {"left": 2, "right": 2, "index": 1}  # state key of a basis -> its number of dimensions
PROMPTS, BEGUN, TOKENS = 2, 64, 32  # samples: how many, tokens given, tokens written


class Observer(TrainerCallback):
    """Callback that measures the updates of a training and logs them for its page."""

    def __init__(self, run: Run, handle: Handle, optimizer: Callable[[], Any]):
        self.run, self.handle, self.optimizer = run, handle, optimizer
        self.before: list[Tensor] = []
        self.bases: dict[tuple[str, str], tuple[int, Tensor]] = {}
        self.start = starts(handle)  # of a full training
        self.next_overlap = 0
        self.update_norm: float | None = None

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        step, trained = state.global_step + 1, self.trained()
        logged = step == 1 or step % int(args.logging_steps) == 0
        if logged and args.world_size == 1 and sum(size(p) for p in trained) <= COPIED:
            self.before = [p.detach().clone() for p in trained]

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self.before:
            pairs = zip(self.trained(), self.before, strict=True)
            norms = [(p.detach() - b).float().norm() for p, b in pairs]
            self.update_norm, self.before = float(torch.stack(norms).norm()), []
        step = state.global_step + 1
        if found := self.turned(measure=step >= self.next_overlap):
            self.next_overlap = step + max(1, state.max_steps // REFRESHES)
            self.run.log(SPECTRA, step=step, overlaps=found)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        step, every = state.global_step, -(-state.max_steps // TIMES)
        due = step % every == 0 or step == state.max_steps
        if due and (found := self.learned(whole=args.world_size == 1)):
            kept = {path: rounded(values[:VALUES]) for path, values in found.items()}
            self.run.log(SPECTRA, step=step, spectra=kept)

    def learned(self, whole: bool) -> dict[str, list[float]]:
        """Spectra by matrix; `whole` says that matrices are not sharded, for full training."""
        if self.handle.attached:
            return spectra(self.handle)
        return changes(self.handle, self.start) if whole else {}

    def trained(self) -> list[Tensor]:
        return list(self.handle.trainable().values())

    def turned(self, measure: bool) -> dict[str, float]:
        """Overlaps of observed bases with the ones before their last refresh, by name.

        A basis is copied after each refresh, and compared only if `measure`, since comparing
        waits for the device.
        """
        found = {}
        for name, side, due, new in self.watched():
            last = self.bases.get((name, side))
            if last is not None and last[0] == due:
                continue
            old = new if last is None or last[1].shape != new.shape else last[1]
            if measure and old is not new and not torch.equal(old, new):
                found[name] = overlap(old, new, side)
            self.bases[name, side] = due, new.clone()
        return found

    def watched(self) -> list[tuple[str, str, int, Tensor]]:
        """(parameter, side, step of its next refresh, directions) of some projected matrices."""
        named = {p: name for name, p, _ in self.optimizer().named()}
        found = [
            (named[p].removesuffix(".weight"), side, entry["due"], entry[side].detach())
            for p, entry in self.optimizer().state.items()
            for side, dims in SIDES.items()
            if p in named and isinstance(entry.get(side), Tensor) and entry[side].ndim == dims
        ]
        step = max(1, len(found) // WATCHED)
        return found[::step][:WATCHED]


def overlap(old: Tensor, new: Tensor, side: str) -> float:
    """|P_old^T P_new|^2 / r, with P [m, r] on the left and [r, n] on the right.

    For an index [r] into a fixed orthogonal basis it is the share of directions in both.
    """
    if side == "index":
        return float(torch.isin(new, old).float().mean())
    product = old.float().mT @ new.float() if side == "left" else old.float() @ new.float().mT
    return float(product.square().sum() / product.shape[-1])


def rounded(values: Sequence[float]) -> list[float]:
    """The values with five significant digits, enough for a figure."""
    return [float(f"{v:.5g}") for v in values]


# --- samples -------------------------------------------------------------------------------


def beginnings(data: Data) -> Tensor | None:
    """Prompts from held-out rows, token ids [prompts, t]; None if the task generates no text."""
    rows = next(iter(data.evaluation.values()), None)
    if data.task != "causal" or rows is None or not len(rows):
        return None
    chosen = [rows[i]["input_ids"] for i in range(0, len(rows), max(1, len(rows) // PROMPTS))]
    length = min(BEGUN, *(len(ids) // 2 for ids in chosen[:PROMPTS]), 10**9)
    return torch.tensor([list(ids[:length]) for ids in chosen[:PROMPTS]]) if length else None


@torch.no_grad()
def continued(model: Any, tokenizer: Any, begun: Tensor | None, screen: Screen) -> list[str]:
    """The greedy completion of each prompt; empty if generation fails."""
    if begun is None or torch.distributed.is_initialized() or not hasattr(model, "generate"):
        return []
    training, begun = model.training, begun.to(model.device)
    room = (getattr(model.config, "max_position_embeddings", None) or 10**9) - begun.shape[1]
    try:
        out = model.eval().generate(
            input_ids=begun, attention_mask=torch.ones_like(begun), do_sample=False,
            max_new_tokens=min(TOKENS, room), pad_token_id=tokenizer.pad_token_id or 0,
        )  # fmt: skip
    except (RuntimeError, ValueError, TypeError, NotImplementedError, IndexError) as fault:
        screen.warn(f"no samples on the page: {str(fault).splitlines()[0]}")
        return []  # a missing sample must not end the run
    finally:
        model.train(training)
    return [tokenizer.decode(ids[begun.shape[1] :], skip_special_tokens=True) for ids in out]


def samples(
    begun: Tensor | None, tokenizer: Any, before: Sequence[str], after: Sequence[str]
) -> list[tuple[str, str, str]]:
    """(prompt, before, after) of each sample, for the page."""
    if begun is None:
        return []
    prompts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in begun]
    return [(p, b, a) for p, b, a in zip(prompts, before, after, strict=False)]
