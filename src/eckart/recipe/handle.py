"""The handle that attach() returns: a model with its recipe, to train, save, merge or remove."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from eckart.errors import FileError, UsageError
from eckart.linear import Gain, Site, Structured, Term, describe, fold, uninstall
from eckart.linear.sites import quantised
from eckart.optim import LowRankOptimizer
from eckart.recipe import adapters
from eckart.recipe.adapters import DEFAULT, Choice, adapters_of
from eckart.recipe.calibrate import Batch, loss_in
from eckart.recipe.coverage import Coverage
from eckart.recipe.events import EventHook
from eckart.recipe.groups import default_lr, groups
from eckart.recipe.guard import guard_steps, guarded
from eckart.recipe.lock import unlock
from eckart.recipe.method import Objective, Weights
from eckart.recipe.recipe import Recipe
from eckart.recipe.vocabulary import ends, vocabulary_of

ROOT = ""  # the path under which build() returns modules shared by all sites
FORMAT = 1  # version of the structure that is written to disk
CARRIED = "eckart_handle"  # attribute of a model that was loaded with its terms


class Handle:
    """What attach() returns: the model with its recipe, to train, save, merge or remove."""

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        sites: dict[str, Site],
        seed: int = 0,
        also_train: tuple[str, ...] = (),
        teacher: nn.Module | None = None,
        name: str = DEFAULT,
    ):
        assert recipe.weights is not None
        adapters.require_free(model, name)
        self.name = name  # of this adapter among those on the model
        self.suffix = "" if name == DEFAULT else f"@{name}"  # of its children in memory
        self.model, self.recipe, self.sites, self.seed = model, recipe, sites, seed
        self.weights: Weights = recipe.weights
        self.also_train, self.teacher = also_train, teacher
        self.vocabulary = vocabulary_of(model, also_train)  # rows of an embedding trained whole
        self.lr: float | None = None
        self.warmup: int | None = None
        self.fingerprint = ""  # of the base, before anything was attached
        self.originals: dict[str, Tensor] = {}  # stored layout, for bases that were changed
        self.required = {name: p.requires_grad for name, p in model.named_parameters()}
        self.attached: dict[str, list[str]] = {}
        self.bare: list[Site] = []  # sums of a matrix alone, made for a precision
        self.shared: dict[str, nn.Module] = {}  # children of the root that terms refer to
        self.events = EventHook(recipe.choices, model, self.terms, seed)
        self.coverage = Coverage()  # what the recipe reaches, once its parts are in
        self.penalty = torch.zeros(())  # of the last step
        self.resting: Callable[[], set[str]] = set  # trained in alternation, not in this step
        self.loss_was_asked = False  # since the last step; see guard.py
        if self.data_objectives:
            guard_steps(self)

    # --- inspection ------------------------------------------------------------------------

    def terms(self) -> dict[str, dict[str, Term]]:
        """The live terms: site path -> name -> term."""
        return {
            path: {name: part for name, part in by_name.items() if isinstance(part, Term)}
            for path, by_name in self.parts().items()
        }

    def parts(self) -> dict[str, dict[str, nn.Module]]:
        """The live terms and gains: site path -> name -> module."""
        return {
            path: {n: getattr(self.sites[path].module, self.child(path, n)) for n in names}
            for path, names in self.attached.items()
        }

    def child(self, path: str, name: str) -> str:
        """The attribute name of a part in its module: `lora`, or `lora@NAME`."""
        return f"{self.sites[path].prefix}{name}{self.suffix}"

    def children_at(self, path: str) -> tuple[tuple[str, ...], str | None]:
        """The names of the child modules at one site: its terms and gain."""
        parts = {self.child(path, name): part for name, part in self.parts()[path].items()}
        gain = next((name for name, part in parts.items() if isinstance(part, Gain)), None)
        return tuple(name for name in parts if name != gain), gain

    def carried(self) -> dict[str, nn.Module]:
        """The live parts and their shared tensors, by raw name in the model."""
        stems = {
            f"{self.sites[path].module_path}.{self.child(path, name)}": part
            for path, by_name in self.parts().items()
            for name, part in by_name.items()
        }
        return {**stems, **{name + self.suffix: part for name, part in self.shared.items()}}

    def in_files(self, name: str) -> str:
        """A raw parameter name as files store it, without the adapter's name."""
        return name.replace(f"{self.suffix}.", ".") if self.suffix else name

    def trainable(self) -> dict[str, nn.Parameter]:
        """Parameters trained now or in alternation, by raw name; a tied parameter once."""
        resting, others = self.resting(), tuple(f"{s}." for h in self.others() for s in h.carried())
        return {
            name: p
            for name, p in self.model.named_parameters()
            if (p.requires_grad or name in resting) and not name.startswith(others)
        }

    def require_here(self) -> None:
        """Raise UsageError if this handle was detached from its model."""
        if adapters_of(self.model).handles.get(self.name) is not self:
            raise UsageError(
                "this handle was removed, or merged",
                [(self.name, type(self.model).__name__)],
                "Attach again: eckart.attach(model, recipe).",
            )

    def others(self) -> list[Handle]:
        """The other adapters on the model."""
        return [h for h in adapters_of(self.model).handles.values() if h is not self]

    def named_state(self) -> dict[str, Tensor]:
        """What differs from the base, by name in files: trained tensors, buffers of terms."""
        self.require_here()
        names = set(self.trainable())
        for stem, part in self.carried().items():
            names.update(f"{stem}.{key}" for key in part.state_dict())
        for path in self.sites if self.weights.base == "rewritten" else self.originals:
            names.add(f"{self.sites[path].module_path}.{self.sites[path].param}")
        if self.vocabulary is not None:
            names.update(f"{path}.weight" for path in ends(self.model))
        state = self.model.state_dict(keep_vars=True)
        return {self.in_files(name): state[name] for name in sorted(names)}

    def load_named_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Write saved tensors into the model. FileError for missing, extra or misshapen ones."""
        state = self.named_state()
        faults = [(name, "is missing") for name in sorted(state.keys() - tensors.keys())]
        faults += [(name, "has no place") for name in sorted(tensors.keys() - state.keys())]
        faults += [
            (name, f"shape {tuple(tensors[name].shape)}, expected {tuple(state[name].shape)}")
            for name in sorted(state.keys() & tensors.keys())
            if tensors[name].shape != state[name].shape
        ]
        if faults:
            raise FileError("the saved tensors do not fit the model", faults[:8])
        with torch.no_grad():
            for name, tensor in state.items():
                tensor.copy_(tensors[name])

    def structure(self) -> dict[str, Any]:
        """Plain data for `attach_from`: method, fields, shapes by site."""
        fields = {f.name: getattr(self.weights, f.name) for f in dataclasses.fields(self.weights)}
        return {
            "format": FORMAT,
            "method": self.weights.slug,
            "fields": plain(fields),
            "base": self.weights.base,
            "fingerprint": self.fingerprint,
            "seed": self.seed,
            "also_train": list(self.also_train),
            "sites": {
                path: {name: describe(part) for name, part in by_name.items()}
                for path, by_name in self.parts().items()
            },
            "shared": {name: describe(module) for name, module in self.shared.items()},
            "changed": sorted(self.originals),
            **({} if self.vocabulary is None else {"vocabulary": self.vocabulary}),
        }

    # --- training --------------------------------------------------------------------------

    @property
    def steps(self) -> int | None:
        """Optimizer steps of the whole training, if known."""
        return self.events.steps

    @steps.setter
    def steps(self, steps: int | None) -> None:
        self.events.steps = steps

    def optimizer(
        self, lr: float | None = None, clip: float | None = None, layerwise: bool = False
    ) -> torch.optim.Optimizer:
        """The update rule's optimizer, with events and penalties connected.

        `clip` is the maximum norm of the gradients as applied; None disables clipping.
        """
        self.require_here()
        rate = next(r for r in (lr, self.lr, default_lr(self.recipe)) if r is not None)
        optimizer = LowRankOptimizer(groups(self, rate), lr=rate, clip=clip, seed=self.seed)
        self.resting = lambda: optimizer.resting
        if layerwise:
            optimizer.attach_layerwise()
        if self.penalties:
            optimizer.add_penalty(self.penalty_gradients)
        self.events.bind(optimizer)
        return optimizer

    @property
    def penalties(self) -> list[Objective]:
        """Objectives that depend on parameters alone."""
        return [o for o in self.recipe.objective if o.kind == "penalty"]

    @property
    def data_objectives(self) -> list[Objective]:
        """Objectives that depend on the batch."""
        return [o for o in self.recipe.objective if o.kind == "data"]

    def penalty_gradients(self) -> dict[Tensor, Tensor]:
        """The gradient of the penalties, for every trained tensor that they depend on."""
        params = [p for p in self.model.parameters() if p.requires_grad]
        terms = self.terms()
        with torch.enable_grad():
            found = [objective.penalty(terms) for objective in self.penalties]
            total = torch.stack(found).sum()
        for objective, penalty in zip(self.penalties, found, strict=True):
            if not penalty.requires_grad and self.events.step == 0:
                raise UsageError(
                    f"{objective.slug} finds nothing to act on",
                    [
                        (f"objective = {objective.slug}", "wants trained terms of its own kind"),
                        (f"weights = {self.weights.slug}", "trains none of that kind"),
                    ],
                    f"Leave {objective.slug} out, or type weights=lora.",
                )
        self.penalty = total.detach()
        if not total.requires_grad:  # all it acts on is inactive or frozen
            return {}
        grads = torch.autograd.grad(total, params, allow_unused=True)
        return {p: g for p, g in zip(params, grads, strict=True) if g is not None}

    def loss(self, inputs: Batch, outputs: Any, loss: Tensor | None = None) -> Tensor:
        """The loss to train on: the task's own, as modified or replaced by the data objectives."""
        if loss is None:
            loss = loss_in(outputs, inputs)
        self.loss_was_asked = True
        for objective in self.data_objectives:
            reference = self.reference(inputs) if objective.needs_reference else None
            loss = objective.loss(self.model, inputs, outputs, loss, reference)
        return loss

    @torch.no_grad()
    def reference(self, inputs: Batch) -> Any:
        """Outputs of the teacher, or of the base: the same model with its terms disabled."""
        if self.teacher is not None:
            return self.teacher(**inputs)
        if self.weights.base != "frozen" or self.originals:
            raise UsageError(
                "a distillation needs a reference",
                [(f"weights = {self.weights.slug}", "changes the base itself")],
                "Pass attach(..., teacher=MODEL).",
            )
        with terms_off(self.model):
            return self.model(**inputs)

    # --- merging and removing ----------------------------------------------------------------

    def merge(self) -> nn.Module:
        """Fold the active terms into dense matrices, in place; returns the model without terms.

        Inactive adapters are dropped; adapters in a weighted sum are folded with their weights.
        """
        self.require_here()
        here = adapters_of(self.model)
        if here.rows:
            raise UsageError("adapters row by row have no one matrix", fix="Call handle.use first.")
        handles = list(here.handles.values())
        for handle in handles:
            for path, by_name in handle.terms().items():
                for name, term in by_name.items():
                    if handle.name in here.weights and not term.linear:
                        raise UsageError(
                            "this cannot be merged", [(f"{path}.{name}", "is not a linear map")]
                        )
        sites = {path: handle.sites[path] for handle in handles for path in handle.attached}
        for path, site in sites.items():
            if quantised(site.module._parameters.get(site.param)):
                raise UsageError(
                    "this base is quantised, and would lose what is merged into it",
                    [(path, type(site.raw).__name__)],
                    "Write the adapter, and merge it on the base as it was before:\n"
                    "eckart convert ADAPTER --to dense",
                )
        folded = {path: fold(site) for path, site in sites.items()}
        for handle in handles:
            handle.detach()
            handle.originals.clear()
        for path, matrix in folded.items():
            put_dense(sites[path], matrix)
        return self.model

    def remove(self) -> nn.Module:
        """Remove the terms; the base is restored bit for bit where restores_base is promised."""
        if self.weights.base == "dropped" and self.attached:
            raise UsageError("the base was dropped", [(self.weights.slug, "")], "Use merge().")
        if self.weights.base == "rewritten" and self.attached:
            raise UsageError("the base was rewritten", [(self.weights.slug, "")], "Use merge().")
        self.detach()
        with torch.no_grad():
            for path, original in self.originals.items():
                self.sites[path].raw.copy_(original)
        self.originals.clear()
        return self.model

    def detach(self) -> None:
        """Undo the class changes and, with the last adapter, the lock and the freezing."""
        own = [
            (self.sites[p], [self.child(p, n) for n in names]) for p, names in self.attached.items()
        ]
        for site, names in (*own, *((site, []) for site in self.bare)):
            uninstall(site.module, site.param, names)
            if not isinstance(site.module, Structured):
                for other in site.tied_modules:
                    uninstall(other)
        self.attached.clear()
        self.bare.clear()
        for name in self.shared:
            delattr(self.model, name + self.suffix)
        self.shared.clear()
        guarded.discard(self)
        here = adapters_of(self.model)
        here.leave(self)
        if not any(handle.attached for handle in here.handles.values()):
            unlock(self.model)
            self.model.__dict__.pop("resize_token_embeddings", None)

    # --- several adapters on one model --------------------------------------------------------

    @property
    def adapters(self) -> dict[str, Handle]:
        """All adapters on the model by name, including this one."""
        return dict(adapters_of(self.model).handles)

    def use(self, choice: Choice) -> None:
        """Activate adapters of the model: see `eckart.recipe.adapters.use`."""
        adapters.use(self.model, choice)

    def rows(self, names: Sequence[str | None]) -> AbstractContextManager[None]:
        """Use a different adapter for each row of a batch: see `eckart.recipe.adapters.rows`."""
        return adapters.rows(self.model, names)


def handle_of(model: nn.Module) -> Handle | None:
    """The handle of a model loaded from a factored folder; None for any other model."""
    found: Handle | None = model.__dict__.get(CARRIED)
    return found


@contextmanager
def terms_off(model: nn.Module) -> Iterator[None]:
    """Context manager: every structured module runs its own forward, without terms."""
    before = [(m._sum, m._sum.enabled) for m in model.modules() if isinstance(m, Structured)]
    for record, _ in before:
        record.enabled = False
    try:
        yield
    finally:
        for record, enabled in before:
            record.enabled = enabled


def put_dense(site: Site, matrix: Tensor) -> None:
    """Write a merged matrix into a module that has its own class again; ties are kept."""
    existing = site.module._parameters.get(site.param)
    with torch.no_grad():
        if existing is None:
            setattr(site.module, site.param, nn.Parameter(matrix))
        else:
            existing.copy_(matrix)


def plain(value: Any) -> Any:
    """Convert tuples to lists, recursively, as a JSON round trip does."""
    if isinstance(value, Mapping):
        return {key: plain(v) for key, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, list | tuple) else value
