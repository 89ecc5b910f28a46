"""A mixin for Trainer and SFTTrainer that trains a handle.

    trainer = eckart.trainer(SFTTrainer)(handle, args=SFTConfig(...), train_dataset=rows)
    trainer.train()

The handle is passed in place of the model. The loop, logging, DDP and FSDP are Trainer's; the
mixin replaces the optimizer, gradient clipping and its norm, the loss where there are
objectives, the order of the data and the checkpoints (`checkpoints.py`).
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
    """The subclass of Trainer, SFTTrainer or the like whose first argument is a handle."""
    return mixed(cls)  # type: ignore[arg-type]  # a class is hashable


@cache
def mixed(cls: Any) -> type[Training]:
    """The subclass of one class, created once."""
    return type(f"Eckart{cls.__name__}", (Training, cls), {"__module__": __name__})


class Training(Cutting):
    """The mixin. It comes before Trainer, or a subclass of it, in the bases."""

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
        # The optimizer clips: Trainer would clip full gradients, not the projected ones applied.
        self.clip, args.max_grad_norm = args.max_grad_norm or float("inf"), 0.0
        args.logging_nan_inf_filter = False  # a loss that is not finite is an error here
        self.layerwise = layerwise  # projects and frees each gradient in the backward pass
        self.applied_rates: list[float] = []
        self.moments: dict[str, Any] = {}  # optimizer state of an earlier training, by name
        super().__init__(handle.model, args=args, **kwargs)
        self.divides_itself = divides_by_items(handle.model)
        self.model_accepts_loss_kwargs = True  # Trainer then counts the labels of a step
        self.due_cut = DueCut(handle)
        if handle.events.cuts:
            self.add_callback(self.due_cut)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """As Trainer's; dropout differs between processes."""
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
        """The recipe's optimizer; created here because Trainer accepts no other under FSDP."""
        if self.optimizer is None:
            self.optimizer = self.handle.optimizer(self.args.learning_rate, self.clip)
            self.optimizer.load_named_state_dict(still_fitting(self.moments, self.optimizer))
            self.optimizer.register_step_pre_hook(self._note_rates)
            # A non-finite gradient is not applied and is kept, so that its module can be named.
            self.optimizer.skip_nonfinite = True
            self.optimizer.register_step_post_hook(self._check_norm)
            if self.layerwise:
                self.attach_layerwise()
        return self.optimizer

    def attach_layerwise(self) -> None:
        """Project and free each gradient in the backward pass. DDP is told to ignore these
        parameters: the optimizer averages their projected gradients itself."""
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
        """When bases are refreshed: at the first micro-batch if it is the whole step."""
        whole = self.args.gradient_accumulation_steps == 1 and self.args.world_size == 1
        return "first" if whole else "step"

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """As Trainer's; tells the events the number of steps if attach() was not given it."""
        if self.handle.events.steps is None:
            self.handle.events.steps = num_training_steps
        return super().create_scheduler(num_training_steps, optimizer)

    @property
    def inner_optimizer(self) -> Any:
        """The optimizer without accelerate's wrapper."""
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def _note_rates(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Record every group's rate; groups at train.lr itself come first."""
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
        """None: the optimizer measures the norm of what it applies."""

    # --- the loss --------------------------------------------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The task's loss; in training, with the data objectives applied to it.

        SFTTrainer computes the loss in a fused head: an objective on `outputs.logits` would get
        no gradient, and terms on the head would not run. Trainer's loss is used in these cases.
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
            # A loss divided by the labels of all k micro-batches is 1/k of a mean.
            k = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
            loss = self.handle.loss(inputs, outputs, loss * k) / k
        if model.training and not torch.isfinite(loss):
            raise self.diverged("loss", loss, first_bad_module(self.handle.model, inputs))
        return (loss, outputs) if return_outputs else loss

    def refuse_own_loss(self) -> None:
        """Raise UsageError if a TRL trainer's own loss would skip terms or objectives.

        DPOTrainer and others multiply hidden states by the head's matrix and return no logits.
        SFTTrainer does so too, but its loss can be replaced by Trainer's.
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
        """The share of a step's labels in a micro-batch, by which its mean loss is weighted.

        Times the number of processes if labels are counted over all of them: DDP averages.
        """
        labels = inputs["labels"][..., 1:] if self._loss_shifts_labels else inputs["labels"]
        across = self.args.world_size if self.args.average_tokens_across_devices else 1
        return labels.ne(-100).sum() * across / items

    @property
    def head_carries_terms(self) -> bool:
        """Does the head, or the embedding that it is tied to, carry terms?"""
        find = getattr(self.handle.model, "get_output_embeddings", None)
        return find is not None and isinstance(find(), Structured)

    # --- the data --------------------------------------------------------------------------

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> Any:
        """A sampler whose order depends on seed and epoch alone."""
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if not isinstance(dataset, Sized):
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        moving = dataset.set_epoch if isinstance(dataset, Noised) else None
        return Shuffled(len(dataset), seed, moving)

    # --- what is logged --------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As Trainer's, with the gradient norm, the penalty and the rates that were applied."""
        if "loss" in logs and "learning_rate" in logs:
            logs.update(self.step_facts())
        super().log(logs, start_time)

    def step_facts(self) -> dict[str, float]:
        """grad_norm (projected, before clipping), penalty, and each distinct learning rate."""
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
    """Does the model divide its loss by `num_items_in_batch`, the labels of all micro-batches?

    Models that call `loss_function` do. BERT, T5 and others ignore the argument and return the
    mean of the micro-batch; Trainer would sum k of them, which makes gradients k times too
    large. Their loss is weighted by the micro-batch's share of the labels instead.
    """
    return "loss_function" in inspect.unwrap(type(model).forward).__code__.co_names


def still_fitting(moments: dict[str, Any], optimizer: Any) -> dict[str, Any]:
    """The saved entries of parameters whose state has the same keys and shapes in this optimizer.

    Saved learning rates are left out: the new training has its own.
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
