"""Trainer and SFTTrainer, taught what a handle needs: one mixin for both.

    trainer = eckart.trainer(SFTTrainer)(handle, args=SFTConfig(...), train_dataset=rows)
    trainer.train()

The handle stands where the model stood. The loop, the logging, DDP and FSDP stay theirs;
ours are the optimizer, the norm that is clipped and logged, the objectives, the data order
and the checkpoints (`checkpoints.py`).
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sized
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from eckart.errors import Diverged, UsageError
from eckart.io.noise import Noised
from eckart.io.packing import Shuffled
from eckart.jobs.training.cut import Cutting, DueCut
from eckart.jobs.training.divergence import first_bad_gradient, first_bad_module
from eckart.linear import Structured, seeded_generator
from eckart.optim.named import first_states
from eckart.recipe import Handle
from eckart.recipe.recipe import refuse_two_passes


def trainer(cls: type[Trainer] = Trainer) -> type[Training]:
    """A Trainer, SFTTrainer or subclass that trains a handle: call it with one."""
    return mixed(cls)  # type: ignore[arg-type]  # a class is hashable


@cache
def mixed(cls: Any) -> type[Training]:
    """The mixture of one class, made once."""
    return type(f"Eckart{cls.__name__}", (Training, cls), {"__module__": __name__})


class Training(Cutting):
    """What is ours in the loop. Mixed in before Trainer or a subclass of it."""

    optimizer: Any

    def __init__(
        self,
        handle: Handle,
        args: TrainingArguments | None = None,
        layerwise: bool = False,
        **kwargs: Any,
    ):
        args = copy.copy(args) if args is not None else TrainingArguments("output")
        handle.recipe.require_no_accumulation(args.gradient_accumulation_steps)
        refuse_two_passes(handle.recipe)
        self.handle = handle
        self.refuse_own_loss()
        # Clipping is the optimizer's: Trainer would clip full gradients, not those applied.
        self.clip, args.max_grad_norm = args.max_grad_norm or float("inf"), 0.0
        args.logging_nan_inf_filter = False  # a loss that is not finite is an error here
        self.layerwise = layerwise  # is each gradient projected as it comes, and freed?
        self.applied_rates: list[float] = []
        self.moments: dict[str, Any] = {}  # of an earlier training, by name, to go on with
        super().__init__(handle.model, args=args, **kwargs)
        self.divides_itself = divides_by_items(handle.model)
        self.model_accepts_loss_kwargs = True  # Trainer counts the labels of a step for all
        self.due_cut = DueCut(handle)
        if handle.events.cuts:
            self.add_callback(self.due_cut)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """As Trainer's, through changes of shape; noise differs between processes."""
        if self.args.world_size > 1:  # Trainer gives all the same seed: dropout would repeat
            own = seeded_generator(self.args.seed, "process", self.args.process_index)
            torch.manual_seed(own.initial_seed())
        try:
            return super().train(resume_from_checkpoint, **kwargs)
        finally:
            if self.layerwise and self.optimizer is not None:
                self.inner_optimizer.detach_layerwise()

    # --- the optimizer ---------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The recipe's optimizer; made here, because Trainer takes none from outside under FSDP."""
        if self.optimizer is None:
            self.optimizer = self.handle.optimizer(self.args.learning_rate, self.clip)
            self.optimizer.load_named_state_dict(still_fitting(self.moments, self.optimizer))
            self.optimizer.register_step_pre_hook(self._note_rates)
            # A bad gradient moves nothing and stays where it is, so that it can be found.
            self.optimizer.skip_nonfinite = True
            self.optimizer.register_step_post_hook(self._check_norm)
            if self.layerwise:
                self.attach_layerwise()
        return self.optimizer

    def attach_layerwise(self) -> None:
        """Free each gradient as it comes. DDP, which wraps the model later, leaves those that
        are projected to the optimizer: it averages what is left of them."""
        if self.accelerator.scaler is not None:
            raise UsageError(
                "a gradient that is projected as it comes is not seen by a gradient scaler",
                [("layerwise", "True"), ("fp16", "True")],
                "Train with bf16=True, or leave layer-wise mode out.",
            )
        several = self.args.world_size > 1 and not self.is_fsdp_enabled
        group = torch.distributed.group.WORLD if several else None
        self.optimizer.attach_layerwise(self.refresh_from, group)
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
            self.model, self.optimizer.layerwise_names
        )

    @property
    def refresh_from(self) -> str:
        """Bases come from the first micro-batch where it is the whole step."""
        whole = self.args.gradient_accumulation_steps == 1 and self.args.world_size == 1
        return "first" if whole else "step"

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """As Trainer's; events learn the horizon where attach() was not told."""
        if self.handle.events.steps is None:
            self.handle.events.steps = num_training_steps
        return super().create_scheduler(num_training_steps, optimizer)

    @property
    def inner_optimizer(self) -> Any:
        """The optimizer without accelerate's wrapper."""
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def _note_rates(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Every group's rate; that of train.lr itself stands before those with a ratio to it."""
        given = self.args.learning_rate
        groups = sorted(optimizer.param_groups, key=lambda g: g.get("initial_lr") != given)
        self.applied_rates = [float(group["lr"]) for group in groups]

    def _check_norm(self, optimizer: Any, *_: Any) -> None:
        norm = optimizer.grad_norm
        if norm is not None and not torch.isfinite(norm):
            raise self.diverged("gradient norm", norm, first_bad_gradient(self.handle.model))

    def diverged(self, what: str, value: Tensor, where: tuple[str, str] | None) -> Diverged:
        """`loss is NaN at step 412; first in layers.11.mlp.down_proj (gradient)`."""
        name = "NaN" if torch.isnan(value) else "infinite"
        text = f"{what} is {name} at step {self.state.global_step + 1}"
        return Diverged(text + (f"; first in {where[0]} ({where[1]})" if where else ""))

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> None:
        """No norm before the step: the optimizer measures what it applies."""

    # --- the loss --------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The task's loss, or what the data objectives make of it; in evaluation the task's.

        SFTTrainer computes the loss from a fused head: an objective on `outputs.logits` would
        get no gradient and terms on the head would not run. Then Trainer's own way is taken.
        """
        labels, share = num_items_in_batch, None
        if labels is not None and not self.divides_itself:
            labels, share = None, self.share_of(inputs, num_items_in_batch)
        objectives = bool(self.handle.data_objectives) and model.training
        if objectives or self.head_carries_terms:
            loss, outputs = Trainer.compute_loss(self, model, inputs, True, labels)
        elif return_outputs:
            loss, outputs = super().compute_loss(model, inputs, True, labels)
        else:
            loss, outputs = super().compute_loss(model, inputs, False, labels), None
        if share is not None:
            loss = loss * share
        if objectives:
            # Where the items of all micro-batches divide the loss, it is 1/k of a mean.
            k = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
            loss = self.handle.loss(inputs, outputs, loss * k) / k
        if model.training and not torch.isfinite(loss):
            raise self.diverged("loss", loss, first_bad_module(self.handle.model, inputs))
        return (loss, outputs) if return_outputs else loss

    def refuse_own_loss(self) -> None:
        """UsageError where a trainer of TRL's own loss would pass over terms or objectives.

        DPOTrainer and its like multiply hidden states by the head's matrix and give no logits.
        SFTTrainer does so too, but its loss is Trainer's, which is taken instead.
        """
        own = (c for c in type(self).__mro__ if c.__module__.startswith("trl."))
        cls = next((c.__name__ for c in own if "compute_loss" in vars(c)), "SFTTrainer")
        names = ", ".join(o.slug for o in self.handle.data_objectives)
        facts = [(f"objective = {names}", "would see no logits")] if names else []
        facts += [("the head", "carries terms, which would not run")] * self.head_carries_terms
        if cls != "SFTTrainer" and facts:
            raise UsageError(
                f"{cls} computes its loss from the head's matrix itself",
                facts,
                "Leave the head and a tied embedding out of weights.targets, and objectives away.",
            )

    def share_of(self, inputs: dict[str, Any], items: Any) -> Any:
        """The part of a step's labels that a micro-batch has: its mean times this is its summand.

        Where labels are counted over all processes DDP takes their average, so times as many.
        """
        labels = inputs["labels"][..., 1:] if self._loss_shifts_labels else inputs["labels"]
        across = self.args.world_size if self.args.average_tokens_across_devices else 1
        return labels.ne(-100).sum() * across / items

    @property
    def head_carries_terms(self) -> bool:
        """Does the head, or the embedding it is tied to, run terms of ours?"""
        find = getattr(self.handle.model, "get_output_embeddings", None)
        return find is not None and isinstance(find(), Structured)

    # --- the data --------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> Any:
        """Rows in an order that is a function of seed and epoch."""
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if not isinstance(dataset, Sized):
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        moving = dataset.set_epoch if isinstance(dataset, Noised) else None
        return Shuffled(len(dataset), seed, moving)

    # --- what is logged --------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add our norm, the penalty and the rates that were applied."""
        if "loss" in logs and "learning_rate" in logs:
            logs.update(self.step_facts())
        super().log(logs, start_time)

    def step_facts(self) -> dict[str, float]:
        """grad_norm as applied and before clipping; penalty; one rate per group that differs."""
        facts: dict[str, float] = {}
        norm = getattr(self.inner_optimizer, "grad_norm", None)
        if norm is not None:
            facts["grad_norm"] = float(norm)
        if self.handle.penalties:
            facts["penalty"] = float(self.handle.penalty)
        for i, rate in enumerate(dict.fromkeys(self.applied_rates), 1):
            facts["learning_rate" if i == 1 else f"learning_rate_{i}"] = rate
        return facts


def divides_by_items(model: nn.Module) -> bool:
    """Does the model's loss heed `num_items_in_batch`, the labels of all micro-batches?

    Those that ask `loss_function` do. BERT, T5 and others take the argument, ignore it and give
    the micro-batch's mean, which Trainer would add up: gradients k times too large. Theirs is
    weighted by the micro-batch's share of the labels, which is the mean over all of them.
    """
    return "loss_function" in inspect.unwrap(type(model).forward).__code__.co_names


def still_fitting(moments: dict[str, Any], optimizer: Any) -> dict[str, Any]:
    """The saved entries of parameters whose state has the same shapes under the rule of today.

    Learning rates are left out: they belong to the training that comes.
    """
    entries: dict[str, dict[str, Any]] = {}
    for path, value in moments.items():
        name, _, key = path.rpartition("/")
        if key != "lr":
            entries.setdefault(name, {})[key] = value
    here = {name: (p, group) for name, p, group in optimizer.named()}
    found: dict[str, Any] = {}
    for name, wanted in first_states(here).items():
        entry = entries.get(name, {})
        if all(key in entry and same_shape(entry[key], wanted[key]) for key in wanted):
            found |= {f"{name}/{key}": value for key, value in entry.items()}
    return found


def same_shape(a: Any, b: Any) -> bool:
    return getattr(a, "shape", None) == getattr(b, "shape", None)
