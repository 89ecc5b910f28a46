"""Several adapters on one base: which of them are active, for the whole batch or row by row.

Each adapter is a handle with a name. In memory its tensors are called `lora@NAME.A`; the adapter
without a name is selected as `default`, and its tensors are `lora.A`. Files never carry a name.
The adapter attached last is active and trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from eckart.errors import UsageError, did_you_mean
from eckart.linear.mixing import NOTHING, Branch
from eckart.linear.structured import activate

if TYPE_CHECKING:
    from eckart.recipe.handle import Handle

DEFAULT = "default"  # the name of an adapter without one of its own
HERE = "eckart_adapters"  # attribute of a model that carries some
Choice = str | Mapping[str, float] | Sequence[str] | None


@dataclass
class Adapters:
    """The adapters of one model, in the order in which they were attached."""

    handles: dict[str, Handle] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)  # of those in use
    rows: tuple[str | None, ...] = ()  # one for each row, where rows are told apart

    def __deepcopy__(self, memo: object) -> Adapters:
        return Adapters()  # a copied model has no handle, whatever it carries

    def __reduce__(self) -> tuple[type[Adapters], tuple[()]]:
        return Adapters, ()

    def enter(self, handle: Handle) -> None:
        """Add an adapter and make it the only active one."""
        self.handles[handle.name] = handle
        self.choose({handle.name: 1.0})

    def leave(self, handle: Handle) -> None:
        """Remove an adapter; the others stay active. Removing the last one undoes the freezing.

        A handle remembers which parameters were trained before it was attached; the next handle
        takes this record over.
        """
        if self.handles.get(handle.name) is not handle:  # it was never entered, or has left
            self.choose(self.weights)
            return
        names = list(self.handles)
        after = names[names.index(handle.name) + 1 :]
        del self.handles[handle.name]
        self.weights.pop(handle.name, None)
        if after:
            heir = self.handles[after[0]].required
            heir.update({name: was for name, was in handle.required.items() if name in heir})
        else:
            for name, parameter in handle.model.named_parameters():
                parameter.requires_grad_(handle.required.get(name, True))
        self.choose(self.weights)

    def choose(self, weights: Mapping[str, float], rows: Sequence[str | None] = ()) -> None:
        """Activate adapters: a weighted sum for all rows, or one adapter per row."""
        self.weights = {name: w for name, w in weights.items() if name in self.handles}
        self.rows = tuple(rows)
        kinds = list(dict.fromkeys(rows))
        sites = {path: h.sites[path] for h in self.handles.values() for path in h.attached}
        for path, site in sites.items():
            module: Any = site.module
            if rows:
                branches = [self.branch(name, path) for name in kinds]
                index = torch.tensor([kinds.index(name) for name in rows])
                index = index.to(next(module.parameters()).device)
                activate(module, site.param, branches, index)
            else:
                chosen = [self.branch(name, path, w) for name, w in self.weights.items()]
                activate(module, site.param, [b for b in chosen if b.terms])

    def branch(self, name: str | None, path: str, weight: float = 1.0) -> Branch:
        """One adapter's part at one site; empty where the adapter has no terms there."""
        if name is None or path not in self.handles[name].attached:
            return NOTHING
        terms, gain = self.handles[name].children_at(path)
        return Branch(terms, gain, weight)


def adapters_of(model: nn.Module) -> Adapters:
    """The adapters of a model; an empty record if there are none."""
    found: Adapters = model.__dict__.setdefault(HERE, Adapters())
    return found


def require_free(model: nn.Module, name: str) -> None:
    """Raise UsageError for an adapter name that is taken or invalid."""
    if not name or "." in name or "@" in name:
        raise UsageError("this cannot be the name of an adapter", [("name", repr(name))])
    if name in adapters_of(model).handles and adapters_of(model).handles[name].attached:
        raise UsageError(
            "an adapter of this name is attached already",
            [("name", name)],
            "Pass another name=, or take that one away: handle.remove().",
        )


def require_beside(handle: Handle, parts: Mapping[str, Mapping[str, nn.Module]]) -> None:
    """Raise UsageError if an adapter cannot share its base with those already attached."""
    others = [h for h in adapters_of(handle.model).handles.values() if h.attached]
    if not others:
        return
    for one in (handle, *others):
        slug = one.weights.slug
        changed = one.originals or (one is handle and any("dense" in p for p in parts.values()))
        if one.weights.base != "frozen" or changed:
            reason = f"{slug} changes the base itself"
        elif one.also_train:
            reason = f"{slug} trains whole modules beside its terms: {one.also_train[0]}"
        else:
            continue
        raise UsageError(
            "these adapters cannot share one base",
            [(one.name, reason)],
            "Load them on models of their own.",
        )


def known(model: nn.Module, name: str) -> str:
    """The name, if this model has an adapter of that name. UsageError otherwise."""
    names = list(adapters_of(model).handles)
    if name not in names:
        fix = did_you_mean(name, names, f"There are: {', '.join(names) or 'none'}.")
        raise UsageError("no adapter of this name", [(str(name), "")], fix)
    return name


def use(model: nn.Module, choice: Choice) -> None:
    """Activate adapters: one by name, several summed (a mapping gives weights), None for none.

    The changes are summed: with DoRA each adapter's gain scales its own sum with the base.
    """
    if choice is None:
        weights: dict[str, float] = {}
    elif isinstance(choice, str):
        weights = {known(model, choice): 1.0}
    elif isinstance(choice, Mapping):
        weights = {known(model, name): float(weight) for name, weight in choice.items()}
    else:
        weights = {known(model, name): 1.0 for name in choice}
    adapters_of(model).choose(weights)


@contextmanager
def alone(handle: Handle) -> Iterator[None]:
    """Context manager: only this adapter is active."""
    here = adapters_of(handle.model)
    before = here.weights, here.rows
    here.choose({handle.name: 1.0})
    try:
        yield
    finally:
        here.choose(*before)


@contextmanager
def rows(model: nn.Module, names: Sequence[str | None]) -> Iterator[None]:
    """Context manager: row i of every batch uses adapter names[i], or the base where that is None.

    Beams and returned sequences of `generate` follow their row. With activation checkpointing the
    backward pass must run inside too. Raises UsageError for fused experts, which see tokens
    without their rows, and for position embeddings, which see no rows.
    """
    here = adapters_of(model)
    chosen = [None if name is None else known(model, name) for name in names]
    if not chosen:
        raise UsageError("no rows are named", fix="Name one adapter, or None, for each row.")
    before = here.weights, here.rows
    if len(set(chosen)) == 1:
        here.choose({} if chosen[0] is None else {chosen[0]: 1.0})
    else:
        for name in filter(None, dict.fromkeys(chosen)):
            require_rows(here.handles[name])
        here.choose({}, chosen)
    try:
        yield
    finally:
        here.choose(*before)


def require_rows(handle: Handle) -> None:
    """Raise UsageError if an adapter has terms on a map that cannot tell rows apart."""
    for path in handle.attached:
        site = handle.sites[path]
        if site.kind == "experts" or site.role == "embedding.other":
            what = "fused experts" if site.kind == "experts" else "this embedding"
            raise UsageError(
                f"{what} cannot tell the rows of a batch apart",
                [(path, f"adapter {handle.name}")],
                'Run one adapter at a time: handle.use("NAME").',
            )
