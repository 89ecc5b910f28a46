"""Checkpoints: written atomically, and holding only what differs from the base model.

    checkpoints/step-400/
      model.safetensors      trained tensors and the terms' buffers, under raw names
      optimizer.safetensors  its tensors, NAME/KEY
      state.json             structure, scalars of optimizer and scheduler, events, generators
      trainer_state.json     Trainer's own: step, epoch, what was logged
      manifest.json          names, sizes, hashes; the base's fingerprint

Nothing is pickled. A checkpoint is written to a temporary folder, gets its manifest last and is
then renamed, so that a kill at any moment leaves the previous one intact.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import Trainer, TrainerState
from transformers.trainer_utils import TrainOutput

from eckart.errors import FileError
from eckart.io.folder import close_with_manifest, manifest_holds, write_folder, write_json
from eckart.io.headers import read_json
from eckart.io.run import checkpoint_folders, latest_checkpoint
from eckart.io.tensors import read_tensors, write_tensors
from eckart.linear import seeded_generator
from eckart.recipe import Handle

MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
TRAINER = "trainer_state.json"  # the name under which Trainer looks for it


# --- generators ----------------------------------------------------------------------------


def generator_state() -> dict[str, Any]:
    """The states of this process's global random generators as plain data."""
    python = random.getstate()
    numpy: Any = np.random.get_state(legacy=True)
    kind, keys, position, has_gauss, gauss = numpy
    return {
        "python": [python[0], list(python[1]), python[2]],
        "numpy": [kind, keys.tolist(), int(position), int(has_gauss), float(gauss)],
        "torch": to_hex(torch.random.get_rng_state()),
        "cuda": [to_hex(s) for s in torch.cuda.get_rng_state_all()]
        if torch.cuda.is_available()
        else [],
    }


def load_generator_state(state: Mapping[str, Any]) -> None:
    """Set this process's global random generators."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, value = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, value))
    torch.random.set_rng_state(from_hex(state["torch"]))
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([from_hex(s) for s in state["cuda"]])


def to_hex(state: Tensor) -> str:
    return bytes(state.tolist()).hex()


def from_hex(text: str) -> Tensor:
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)


# --- folders -------------------------------------------------------------------------------


def read_state(folder: str | Path) -> dict[str, Any]:
    """The contents of a checkpoint's state.json."""
    state: dict[str, Any] = read_json(Path(folder) / STATE)
    return state


def require_whole(folder: Path) -> None:
    """Raise FileError if a checkpoint is incomplete or its hashes do not match."""
    if not manifest_holds(folder):
        raise FileError(
            "this checkpoint is not whole",
            [(str(folder), "its manifest is missing or does not hold")],
            "Resume from another one, or type --resume RUN: the newest whole one is taken.",
        )


def load_model_state(handle: Handle, folder: str | Path) -> None:
    """Load a checkpoint's tensors into the model. FileError for another base or structure."""
    folder = Path(folder)
    require_whole(folder)
    structure = read_state(folder)["structure"]
    if structure["fingerprint"] != handle.fingerprint:
        raise FileError(
            "this checkpoint was made on another base",
            [
                (str(folder), f"fingerprint {structure['fingerprint'][:12]}"),
                ("this model", f"fingerprint {handle.fingerprint[:12]}"),
            ],
            "Resume with the model and seed that the run was started with.",
        )
    handle.load_named_state(placed(read_tensors(folder / MODEL), handle.named_state()))


def prune(run: Path, keep: int, best: int | None) -> None:
    """Remove all but the newest `keep` checkpoints and the best one."""
    for folder in checkpoint_folders(run)[keep:]:
        if folder.name != f"step-{best}":
            shutil.rmtree(folder, ignore_errors=True)


# --- Trainer's side ------------------------------------------------------------------------


class Checkpointing(Trainer):
    """Overrides Trainer's methods that save and load checkpoints."""

    handle: Handle
    inner_optimizer: Any

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """As Trainer's; True means the newest complete checkpoint."""
        return super().train(self.whole_checkpoint(resume_from_checkpoint), **kwargs)

    def whole_checkpoint(self, wanted: str | bool | None) -> str | None:
        """The checkpoint's folder; for True the newest complete one. FileError without one."""
        if not isinstance(wanted, bool):
            return wanted
        if not wanted:
            return None
        found = latest_checkpoint(self.run_folder)
        if found is None:
            raise FileError("no whole checkpoint to resume from", [(str(self.run_folder), "")])
        return str(found)

    def is_last(self, folder: Path) -> bool:
        """Is this checkpoint of the last step? Trainer would take one more step from it."""
        done, args = TrainerState.load_from_json(str(folder / TRAINER)), self.args
        if args.max_steps > 0:
            return bool(done.global_step >= args.max_steps)
        return bool((done.epoch or 0) >= args.num_train_epochs)

    def restore(self, folder: Path) -> TrainOutput:
        """Restore model, optimizer and step from the last checkpoint of a finished training."""
        self.state = TrainerState.load_from_json(str(folder / TRAINER))
        load_model_state(self.handle, folder)
        self.create_optimizer_and_scheduler(self.state.max_steps)
        self._load_optimizer_and_scheduler(str(folder))
        return TrainOutput(self.state.global_step, 0.0, {})

    @property
    def run_folder(self) -> Path:
        """The folder that contains `checkpoints/`."""
        return Path(self.args.output_dir)

    def checkpoint_at(self, step: int) -> Path:
        """The folder of one step's checkpoint."""
        return self.run_folder / "checkpoints" / f"step-{step}"

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        """Write the checkpoint of this step, then remove those that are no longer kept."""
        folder = self.checkpoint_at(self.state.global_step)
        if self.state.best_global_step:
            self.state.best_model_checkpoint = str(self.checkpoint_at(self.state.best_global_step))
        # Sharded tensors are gathered by all processes; the first one writes.
        tensors = whole(self.handle.named_state())
        moments, numbers = apart(self.inner_optimizer.named_state_dict())
        generators = from_all_processes(generator_state())
        if self.args.should_save:
            state = {
                "structure": self.handle.structure(),
                "optimizer": numbers,
                "scheduler": self.lr_scheduler.state_dict() if self.lr_scheduler else {},
                "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else {},
                "events": self.handle.events.state_dict(),
                "generators": generators,
            }
            facts = {"step": self.state.global_step, "base": self.handle.fingerprint}
            with write_folder(folder, overwrite=True) as beside:
                write_tensors(beside / MODEL, tensors)
                write_tensors(beside / OPTIMIZER, moments)
                write_json(beside / STATE, state)
                self.state.save_to_json(str(beside / TRAINER))
                close_with_manifest(beside, **facts)
            if self.args.save_total_limit:
                prune(self.run_folder, self.args.save_total_limit, self.state.best_global_step)
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        load_model_state(self.handle, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        load_model_state(self.handle, self.checkpoint_at(self.state.best_global_step))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        state = read_state(checkpoint)
        tensors = read_tensors(Path(checkpoint) / OPTIMIZER)
        self.inner_optimizer.load_named_state_dict({**tensors, **state["optimizer"]})
        self.handle.events.load_state_dict(state["events"])
        if self.lr_scheduler:
            now = list(self.lr_scheduler.base_lrs)
            self.lr_scheduler.load_state_dict(state["scheduler"])
            change_rates(self.lr_scheduler, now)

    def _load_scaler(self, checkpoint: str | None) -> None:
        state = read_state(checkpoint)["scaler"] if checkpoint else {}
        if state and self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(state)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        saved, index = read_state(checkpoint)["generators"], self.args.process_index
        if len(saved) == self.args.world_size:
            load_generator_state(saved[index])
        else:  # another number of processes: seeds that no process had before
            step = self.state.global_step
            own = seeded_generator(self.args.seed, "process", index, "from step", step)
            torch.manual_seed(own.initial_seed())

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """As Trainer's; a new best is always saved, so that it can be loaded at the end."""
        found: bool = super()._determine_best_metric(metrics, trial)
        if found:
            self.control.should_save = True
        return found


def change_rates(scheduler: Any, base: list[float]) -> None:
    """Continue a loaded scheduler with other base rates, for `--resume RUN train.lr=...`.

    Current rates are scaled in proportion; equal base rates leave them bitwise unchanged.
    """
    saved = scheduler.base_lrs
    if saved == base:
        return
    factors = [new / old for new, old in zip(base, saved, strict=True)]
    scheduler.base_lrs = base
    scheduler._last_lr = [r * f for r, f in zip(scheduler._last_lr, factors, strict=True)]
    for group, rate in zip(scheduler.optimizer.param_groups, scheduler._last_lr, strict=True):
        group["lr"] = rate


def apart(flat: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A state's tensors, and its other values."""
    tensors = {key: value for key, value in flat.items() if isinstance(value, Tensor)}
    return tensors, {key: value for key, value in flat.items() if key not in tensors}


def whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gather sharded tensors on every process; others are returned unchanged."""
    return {
        name: tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        for name, tensor in tensors.items()
    }


def placed(tensors: Mapping[str, Tensor], live: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Shard tensors like the model's of the same names; others are returned unchanged."""
    return {
        name: distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)
        if isinstance(like := live.get(name), DTensor)
        else tensor
        for name, tensor in tensors.items()
    }


def from_all_processes(value: Any) -> list[Any]:
    """Gather one plain value from each process, in order of rank, on every process."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [value]
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, value)
    return found
