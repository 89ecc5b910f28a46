"""Rank reduction during training: some rank components are removed, and training continues.

Tensors that a term no longer trains are removed from the optimizer, with their state.

DDP and FSDP2 keep the shapes that they were built with, so shapes never change inside them.
The training saves a checkpoint and stops; terms and optimizer state in the checkpoint are cut
along the same axes; model, optimizer and wrapper are built again and resume from it. Step
count, schedule and position in the data are kept.

A kill between the two writes leaves the uncut checkpoint, and resuming makes the cut again.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from eckart.io.folder import close_with_manifest, write_folder, write_json
from eckart.io.headers import read_json
from eckart.io.tensors import read_tensors, write_tensors
from eckart.jobs.training.checkpoints import (
    MODEL,
    OPTIMIZER,
    STATE,
    TRAINER,
    Checkpointing,
    load_model_state,
    read_state,
    whole,
)
from eckart.linear import Term, describe
from eckart.recipe import Handle
from eckart.recipe.coverage import cover
from eckart.recipe.lock import lock

Kept = Mapping[str, Mapping[str, Tensor]]  # site path -> term name -> kept rank components
Moments = dict[str, Any]  # {"NAME/KEY": tensor or number}, as the optimizer saves them


def cut_terms(handle: Handle, kept: Kept) -> None:
    """Cut the model's terms to these rank components. The model must not be wrapped."""
    terms = handle.terms()
    for path, by_name in kept.items():
        for name, index in by_name.items():
            terms[path][name].select(index)
    handle.coverage = cover(handle)
    lock(handle.model, handle.structure())


def cut_moments(handle: Handle, kept: Kept, moments: Moments) -> Moments:
    """The saved optimizer state after a cut; call it before the terms are cut.

    State of the parameter's shape is cut like the parameter. Projected state depends on the old
    shape and is dropped. Step counts and learning rates are kept.
    """
    found = dict(moments)
    for path, by_name in kept.items():
        site = handle.sites[path]
        for name, index in by_name.items():
            stem = f"{site.module_path}.{site.prefix}{name}"
            found |= cut_term_moments(handle.terms()[path][name], index, stem, found)
    return {key: value for key, value in found.items() if value is not None}


def cut_term_moments(term: Term, index: Tensor, stem: str, moments: Moments) -> Moments:
    """The entries of one term after the cut; None for dropped ones."""
    found: Moments = {}
    shapes = {name: p.shape for name, p in term.named_parameters(recurse=False)}
    trained = dict(after_cut(term, index, {}).named_parameters(recurse=False))
    same: dict[str, dict[str, Tensor]] = {}  # state key -> tensor name -> state
    for name, shape in shapes.items():
        own = {k: v for k, v in moments.items() if k.rpartition("/")[0] == f"{stem}.{name}"}
        if name not in trained:
            found |= dict.fromkeys(own)
            continue
        entry = {key: value for key, value in own.items() if not key.endswith("/lr")}
        tensors = {k: v for k, v in entry.items() if isinstance(v, Tensor)}
        if any(v.shape != shape for v in tensors.values()):
            found |= dict.fromkeys(entry)
            continue
        for key, value in tensors.items():
            same.setdefault(key.rpartition("/")[2], {})[name] = value
    for key, by_name in same.items():
        twin = after_cut(term, index, by_name)
        found |= {f"{stem}.{name}/{key}": getattr(twin, name).detach() for name in by_name}
    return found


def after_cut(term: Term, index: Tensor, held: Mapping[str, Tensor]) -> Term:
    """A cut term of the same class, with the tensors in `held` in place of its own."""
    spec = describe(term)
    twin = type(term).empty(spec["tensors"], spec["scalars"])
    for name, value in held.items():
        setattr(twin, name, nn.Parameter(value, requires_grad=False))
    twin.select(index.cpu())
    return twin


def cut_checkpoint(handle: Handle, folder: Path, kept: Kept, write: bool = True) -> None:
    """Cut the model's terms, and rewrite the checkpoint to match if `write`.

    Only the writing process may read the folder: it is replaced meanwhile.
    """
    if write:
        state = read_state(folder)
        moments = {**read_tensors(folder / OPTIMIZER), **state["optimizer"]}
        moments = cut_moments(handle, kept, moments)  # before the terms are cut
    shapes = {name: tensor.shape for name, tensor in handle.named_state().items()}
    cut_terms(handle, kept)
    tensors = whole(handle.named_state())
    if not write:
        return
    step = state["events"]["step"]
    state |= {"structure": handle.structure(), "cut_at": step}
    state["optimizer"] = {k: v for k, v in moments.items() if not isinstance(v, Tensor)}
    progress = read_json(folder / TRAINER)
    if shapes != {name: tensor.shape for name, tensor in tensors.items()}:
        # A checkpoint from before the cut has other shapes: it cannot be loaded as the best.
        progress |= dict.fromkeys(("best_metric", "best_global_step", "best_model_checkpoint"))
    with write_folder(folder, overwrite=True) as beside:
        write_tensors(beside / MODEL, tensors)
        write_tensors(
            beside / OPTIMIZER, {k: v for k, v in moments.items() if isinstance(v, Tensor)}
        )
        write_json(beside / STATE, state)
        write_json(beside / TRAINER, progress)
        close_with_manifest(beside, step=step, base=handle.fingerprint)


class DueCut(TrainerCallback):
    """Saves a checkpoint and stops the training at the step of a cut."""

    def __init__(self, handle: Handle):
        self.handle, self.due_at = handle, -1

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if state.global_step < state.max_steps and is_due(self.handle, state.global_step):
            self.due_at = state.global_step
            control.should_save = control.should_training_stop = True


def is_due(handle: Handle, step: int) -> bool:
    """Is there a cut after this step? Under FSDP2, which keeps its own lists of the model's
    tensors, only cuts that the method cannot do without count."""
    sharded = any(isinstance(module, FSDPModule) for module in handle.model.modules())
    cuts = [cut for cut in handle.events.cuts if cut.needed or not sharded]
    return any(cut.at(step, handle.steps) for cut in cuts)


class Cutting(Checkpointing):
    """A Trainer that stops at each cut, changes shapes, and resumes."""

    due_cut: DueCut

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """As Trainer's, resumed after each cut."""
        checkpoint = self.whole_checkpoint(resume_from_checkpoint)
        if checkpoint is not None and self.is_last(Path(checkpoint)):
            return self.restore(Path(checkpoint))
        if checkpoint is not None:
            self.cut_before_resuming(Path(checkpoint))
        output = super().train(checkpoint, **kwargs)
        while self.due_cut.due_at == self.state.global_step and not self.asked_to_stop():
            folder = self.checkpoint_at(self.state.global_step)
            self.cut_here(folder)
            output = super().train(str(folder), **kwargs)
        return output

    def asked_to_stop(self) -> bool:
        """Was the training stopped at this step for another reason than the cut?"""
        return False

    def cut_before_resuming(self, folder: Path) -> None:
        """Make the cut of the checkpoint's step, if the run stopped before it was made."""
        state = read_state(folder)
        step = state["events"]["step"]
        if state.get("cut_at") == step or not is_due(self.handle, step):
            return
        load_model_state(self.handle, folder)
        self.handle.events.load_state_dict(state["events"])
        self.cut_here(folder)

    def cut_here(self, folder: Path) -> None:
        """Release the model's wrapper and the optimizer, then cut the model and its checkpoint."""
        kept = self.handle.events.due_cut()
        self.due_cut.due_at = -1
        self.optimizer = self.lr_scheduler = None
        self.model_wrapped = self.model
        self.accelerator.free_memory()
        gc.collect()  # DDP's reducer is freed with its object, which is in a reference cycle
        self.accelerator.wait_for_everyone()
        with torch.no_grad():
            cut_checkpoint(self.handle, folder, kept or {}, self.args.should_save)
        self.accelerator.wait_for_everyone()
