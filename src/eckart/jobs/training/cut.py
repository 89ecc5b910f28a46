"""A change of shape inside one training: some rank components go, everything else goes on.

A tensor that a term trains no longer leaves the optimizer, with its state.

Wrappers (DDP, FSDP2) hold on to the shapes they were given, so nothing is cut under them.
The training saves a checkpoint and stops; the checkpoint is rewritten with its terms and the
optimizer's state cut along the same axes; model, optimizer and wrapper are made again and
resume from it. Step count, schedule and data position go on.

A kill between the two writings leaves the uncut checkpoint: resuming finds the cut still due.
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

Kept = Mapping[str, Mapping[str, Tensor]]  # site path -> term name -> components that live on
Moments = dict[str, Any]  # {"NAME/KEY": tensor or number}, as the optimizer saves them


def cut_terms(handle: Handle, kept: Kept) -> None:
    """Keep these rank components of the live terms; no wrapper may hold them."""
    terms = handle.terms()
    for path, by_name in kept.items():
        for name, index in by_name.items():
            terms[path][name].select(index)
    handle.coverage = cover(handle)
    lock(handle.model, handle.structure())


def cut_moments(handle: Handle, kept: Kept, moments: Moments) -> Moments:
    """The optimizer's saved state after a cut, for terms that are still whole.

    State of a tensor's own shape is cut as the tensor is; a projected one belongs to the old
    shape and starts afresh. Step counts and learning rates stay.
    """
    found = dict(moments)
    for path, by_name in kept.items():
        site = handle.sites[path]
        for name, index in by_name.items():
            stem = f"{site.module_path}.{site.prefix}{name}"
            found |= cut_term_moments(handle.terms()[path][name], index, stem, found)
    return {key: value for key, value in found.items() if value is not None}


def cut_term_moments(term: Term, index: Tensor, stem: str, moments: Moments) -> Moments:
    """One term's entries after the cut; None for those that are dropped."""
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
    """A term of this kind that holds other tensors in some places, cut as it will be cut."""
    spec = describe(term)
    twin = type(term).empty(spec["tensors"], spec["scalars"])
    for name, value in held.items():
        setattr(twin, name, nn.Parameter(value, requires_grad=False))
    twin.select(index.cpu())
    return twin


def cut_checkpoint(handle: Handle, folder: Path, kept: Kept, write: bool = True) -> None:
    """Cut the live terms, and rewrite their checkpoint to match (on the process that writes).

    No other process reads the folder: it may be moved aside at any moment.
    """
    if write:
        state = read_state(folder)
        moments = {**read_tensors(folder / OPTIMIZER), **state["optimizer"]}
        moments = cut_moments(handle, kept, moments)  # while the terms are whole
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
        # A better model before the cut has another shape and cannot be the result.
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
    """Ends the training with a checkpoint at the step where a cut is due."""

    def __init__(self, handle: Handle):
        self.handle, self.due_at = handle, -1

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if state.global_step < state.max_steps and is_due(self.handle, state.global_step):
            self.due_at = state.global_step
            control.should_save = control.should_training_stop = True


def is_due(handle: Handle, step: int) -> bool:
    """Does any cut want to happen after this step? FSDP2, which keeps the tensors of a model in
    its own lists, is spared those that can be left out."""
    sharded = any(isinstance(module, FSDPModule) for module in handle.model.modules())
    cuts = [cut for cut in handle.events.cuts if cut.needed or not sharded]
    return any(cut.at(step, handle.steps) for cut in cuts)


class Cutting(Checkpointing):
    """Trainer in as many parts as there are changes of shape."""

    due_cut: DueCut

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """As Trainer's, going on after each cut."""
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
        """Did something else end the training at this very step?"""
        return False

    def cut_before_resuming(self, folder: Path) -> None:
        """Do a cut that was due when the run stopped."""
        state = read_state(folder)
        step = state["events"]["step"]
        if state.get("cut_at") == step or not is_due(self.handle, step):
            return
        load_model_state(self.handle, folder)
        self.handle.events.load_state_dict(state["events"])
        self.cut_here(folder)

    def cut_here(self, folder: Path) -> None:
        """Cut the model and its checkpoint; what was wrapped around it is let go."""
        kept = self.handle.events.due_cut()
        self.due_cut.due_at = -1
        self.optimizer = self.lr_scheduler = None
        self.model_wrapped = self.model
        self.accelerator.free_memory()
        gc.collect()  # a reducer of DDP goes with its object
        self.accelerator.wait_for_everyone()
        with torch.no_grad():
            cut_checkpoint(self.handle, folder, kept or {}, self.args.should_save)
        self.accelerator.wait_for_everyone()
