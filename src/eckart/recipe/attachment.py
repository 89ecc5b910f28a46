"""attach(): a recipe becomes part of a model, and a handle to train, save, merge or remove it."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from eckart.errors import FileError, UsageError
from eckart import linear
from eckart.linear import (
    Gain,
    LowRank,
    Shared,
    Site,
    Structured,
    Term,
    describe,
    fold,
    install,
    uninstall,
)
from eckart.linear.sites import as_stored
from eckart.optim import LowRankOptimizer
from eckart.recipe import registry
from eckart.recipe.calibrate import Batch, gather_activations, gather_gradients
from eckart.recipe.events import EventHook
from eckart.recipe.fingerprint import fingerprint
from eckart.recipe.guard import guard_steps, guarded
from eckart.recipe.lock import lock, unlock
from eckart.recipe.method import Objective, Update, Weights
from eckart.recipe.recipe import Recipe
from eckart.recipe.targets import (
    EVERYTHING,
    Coverage,
    apply_overrides,
    matches,
    refuse_unreachable,
    select,
    sites_of,
)

try:
    import eckart.kernels  # noqa: F401  # registers faster forms; without it all still runs
except ModuleNotFoundError:
    pass

ROOT = ""  # the path under which build() returns modules shared by all sites
FORMAT = 1  # version of the structure that is written to disk


def attach(
    model: nn.Module,
    recipe: Recipe,
    *,
    calibration: Iterable[Batch] | None = None,
    steps: int | None = None,
    lr: float | None = None,
    warmup: int | None = None,
    seed: int = 0,
    also_train: Sequence[str] = (),
    teacher: nn.Module | None = None,
) -> Handle:
    """Put a recipe's terms into a model, in place.

    `calibration` are batches (dicts for `model(**batch)`) for methods that need gradients or
    activations; `steps`, `lr` and `warmup` the horizon for methods that need it. `also_train`
    names modules to train whole beside the terms (a new classification head). `teacher`
    is the reference of a distillation where the base itself is trained or dropped.

    Raises UsageError for targets that match nothing, ranks too large everywhere, missing
    calibration or horizon, and combinations that cannot work.
    """
    if recipe.weights is None:
        raise UsageError("a recipe needs weights", fix="For example Recipe(weights=eckart.LoRA()).")
    recipe.check()
    sites = choose(model, recipe.weights, seed)
    calibrate(model, recipe, sites, calibration, steps)
    base = fingerprint(model)
    parts = recipe.weights.build(sites) if sites else {}
    handle = Handle(model, recipe, {s.path: s for s in sites}, seed, tuple(also_train), teacher)
    handle.fingerprint = base
    handle.steps, handle.lr, handle.warmup = steps, lr, warmup
    handle.install(parts)
    for site in sites:
        site.gradient = site.activations = None
    return handle


def attach_from(
    model: nn.Module,
    structure: Mapping[str, Any],
    *,
    recipe: Recipe | None = None,
    teacher: nn.Module | None = None,
) -> Handle:
    """Rebuild an attachment from stored plain data, its tensors still without values.

    `structure` is what `Handle.structure()` gave; `recipe` may bring the other axes. Follow
    it with `handle.load_named_state(...)`. Raises FileError where the model has no such site.
    """
    if structure.get("format") != FORMAT:
        found = str(structure.get("format"))
        raise FileError("unknown format version", [(found, f"this eckart reads {FORMAT}")])
    cls = registry.load(structure["method"])
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in structure["fields"].items()}
    recipe = dataclasses.replace(recipe or Recipe(), weights=cls(**fields))
    here = {site.path: site for site in sites_of(model, structure["seed"])}
    missing = [path for path in structure["sites"] if path not in here]
    if missing:
        raise FileError("the model has no such map", [(path, "") for path in missing[:8]])
    wanted = {**structure["sites"], **dict.fromkeys(structure["changed"], None)}
    sites = (
        {p: here[p] for p in wanted} if wanted else {s.path: s for s in choose_all(recipe, here)}
    )
    handle = Handle(
        model, recipe, sites, structure["seed"], tuple(structure["also_train"]), teacher
    )
    handle.fingerprint = structure["fingerprint"]
    for path in structure["changed"]:
        handle.originals[path] = sites[path].raw.detach().clone()
    stored = {**structure["sites"], ROOT: structure["shared"]}
    handle.install(
        {
            path: {name: revive(cls, spec) for name, spec in parts.items()}
            for path, parts in stored.items()
        }
    )
    return handle


def choose_all(recipe: Recipe, here: Mapping[str, Site]) -> list[Site]:
    """The sites of a method that has no terms (full training)."""
    assert recipe.weights is not None
    words = [t for t in recipe.weights.targets if t != EVERYTHING]
    return select(list(here.values()), words) if words else list(here.values())


def revive(method: type, spec: Mapping[str, Any]) -> nn.Module:
    """A term of a stored description: a class of the maths room or of the method's own file."""
    own = sys.modules[method.__module__]
    cls = getattr(linear, spec["type"], None) or getattr(own, spec["type"], None)
    if not (isinstance(cls, type) and issubclass(cls, Term | Gain | Shared)):
        raise FileError("unknown kind of term", [(spec["type"], f"method {method.__name__}")])
    return cls.empty(spec["tensors"], spec["scalars"])


def choose(model: nn.Module, weights: Weights, seed: int) -> list[Site]:
    """The sites that a weights method acts on, checked and with their overrides."""
    everything = sites_of(model, seed)
    targets = [t for t in weights.targets if t != EVERYTHING]
    sites = everything if EVERYTHING in weights.targets else select(everything, targets)
    if weights.base != "trained":
        refuse_unreachable(model, sites)
    taken = [s.path for s in sites if isinstance(s.module, Structured) and weights.base != "frozen"]
    if taken:
        raise UsageError(
            "terms are attached here already", [(taken[0], "")], "Call remove() first."
        )
    names = [f.name for f in dataclasses.fields(weights) if f.name not in ("targets", "overrides")]
    apply_overrides(sites, weights.overrides, names)
    check_ranks(sites, weights)
    return sites


def check_ranks(sites: Sequence[Site], weights: Weights) -> None:
    """A rank above min(m, n) is an error where it is so at every site, or by an override."""
    if not hasattr(weights, "rank") or not sites:
        return
    for site in sites:
        if site.overrides.get("rank", 0) > min(site.shape):
            raise UsageError(
                "rank is larger than the matrix",
                [(f"weights.overrides rank = {site.overrides['rank']}", site.path)],
                f"At most {min(site.shape)} fits there.",
            )
    largest = max(min(site.shape) for site in sites)
    if weights.rank > largest:
        m, n = sites[0].shape
        raise UsageError(
            "rank is larger than the matrix",
            [
                (f"weights.rank = {weights.rank}", ""),
                (sites[0].path, f"{m} x {n}, so at most {largest} at every site"),
            ],
            f"Type weights.rank={largest}, or less.",
        )


def calibrate(
    model: nn.Module,
    recipe: Recipe,
    sites: Sequence[Site],
    calibration: Iterable[Batch] | None,
    steps: int | None,
) -> None:
    """Gather what the methods declare they need; UsageError where it cannot be had."""
    for method in recipe.choices:
        for need in method.needs:
            missing = steps is None if need == "horizon" else calibration is None
            if missing:
                argument = "steps=" if need == "horizon" else "calibration="
                raise UsageError(
                    f"{method.slug} needs {need}", [("attach(...)", f"{argument} is missing")]
                )
    batches = list(calibration) if calibration is not None and recipe.needs else []
    if "gradients" in recipe.needs:
        gather_gradients(model, sites, batches)
    if "activations" in recipe.needs:
        gather_activations(model, sites, batches)


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
    ):
        assert recipe.weights is not None
        self.model, self.recipe, self.sites, self.seed = model, recipe, sites, seed
        self.weights: Weights = recipe.weights
        self.also_train, self.teacher = also_train, teacher
        self.steps: int | None = None
        self.lr: float | None = None
        self.warmup: int | None = None
        self.fingerprint = ""  # of the base, before anything was attached
        self.originals: dict[str, Tensor] = {}  # stored layout, for bases that were changed
        self.required = {name: p.requires_grad for name, p in model.named_parameters()}
        self.attached: dict[str, list[str]] = {}
        self.shared: dict[str, nn.Module] = {}  # children of the root that terms refer to
        self.events = EventHook(recipe.choices, self.terms, seed)
        self.penalty = torch.zeros(())  # of the last step
        self.loss_was_asked = False  # since the last step; see guard.py
        if self.data_objectives:
            guard_steps(self)

    # --- attaching -------------------------------------------------------------------------

    def install(self, parts: Mapping[str, Mapping[str, nn.Module]]) -> None:
        """Freeze or drop the base as the method says and put the parts into their sites."""
        weights, drop = self.weights, self.weights.base == "dropped"
        if weights.rest == "frozen" and EVERYTHING not in weights.targets:
            for parameter in self.model.parameters():
                parameter.requires_grad_(False)
        for name, module in parts.get(ROOT, {}).items():
            self.model.add_module(name, module)
            self.shared[name] = module
        for path, by_name in parts.items():
            if path == ROOT:
                continue
            site = self.sites[path]
            if drop and site.ties:
                raise UsageError(
                    "a tied matrix cannot be replaced",
                    [(path, f"tied with {', '.join(site.ties)}")],
                    "Leave it out of weights.targets.",
                )
            self.install_one(site, dict(by_name), drop and bool(by_name))
        if weights.base == "trained":
            for site in self.sites.values():
                site.raw.requires_grad_(True)
        for name in self.also_train:
            self.model.get_submodule(name).requires_grad_(True)
        for by_term in self.terms().values():
            for term in by_term.values():
                term.bind(self.shared)
        self.set_products()
        self.coverage = cover(self)
        if self.attached:
            lock(self.model, self.structure())

    def install_one(self, site: Site, parts: dict[str, nn.Module], drop: bool) -> None:
        """One site: a changed base first (its original kept), then the terms."""
        dense = parts.pop("dense", None)
        if dense is not None:
            assert isinstance(dense, Term)
            self.originals[site.path] = site.raw.detach().clone()
            changed = as_stored(dense.dense(), site.module, site.kind, site.raw.shape)
            site.raw.data.copy_(changed)
        if not parts:
            return
        for part in parts.values():
            part.to(device=site.raw.device)
            self.declare_gradient_rule(part)
        install(site, parts, drop)
        self.attached[site.path] = list(parts)

    def declare_gradient_rule(self, part: nn.Module) -> None:
        """Hand the update's row factor to factor pairs."""
        update = self.recipe.update
        if isinstance(update, Update) and isinstance(part, LowRank):
            part.branch_gradient = update.branch_gradient()

    def set_products(self) -> None:
        """Let the precision compute the products of the sites and of their terms."""
        mm = self.recipe.precision.mm() if self.recipe.precision is not None else None
        if mm is None:
            return
        for path in self.attached:
            module: Any = self.sites[path].module
            module._sum.mm = mm
            for term in module.children_of(self.sites[path].param).values():
                term.mm = mm

    # --- looking ---------------------------------------------------------------------------

    def terms(self) -> dict[str, dict[str, Term]]:
        """The live terms: site path -> name -> term."""
        return {
            path: self.sites[path].module.children_of(self.sites[path].param)  # type: ignore
            for path in self.attached
        }

    def parts(self) -> dict[str, dict[str, nn.Module]]:
        """The live terms and gains: site path -> child name -> module."""
        return {
            path: {n: getattr(self.sites[path].module, self.sites[path].prefix + n) for n in names}
            for path, names in self.attached.items()
        }

    def trainable(self) -> dict[str, nn.Parameter]:
        """What is trained, by raw parameter name; a tied parameter once."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def named_state(self) -> dict[str, Tensor]:
        """What differs from the base, by raw name: trained tensors and the terms' buffers."""
        names = set(self.trainable())
        for path, by_name in self.parts().items():
            site = self.sites[path]
            for child, part in by_name.items():
                stem = f"{site.module_path}.{site.prefix}{child}"
                names.update(f"{stem}.{key}" for key in part.state_dict())
            if path in self.originals:
                names.add(f"{site.module_path}.{site.param}")
        for child, module in self.shared.items():
            names.update(f"{child}.{key}" for key in module.state_dict())
        state = self.model.state_dict(keep_vars=True)
        return {name: state[name] for name in sorted(names)}

    def load_named_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Write saved tensors into the model. Missing, extra or misshapen ones: FileError."""
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
        """Plain data from which the attachment is rebuilt: method, fields, shapes by site."""
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
        }

    # --- training --------------------------------------------------------------------------

    def optimizer(
        self, lr: float | None = None, clip: float | None = None, layerwise: bool = False
    ) -> torch.optim.Optimizer:
        """The update rule's optimizer over what is trained, events and penalties bound.

        `clip` is the largest norm of the gradients as applied; None leaves them as they are.
        """
        rate = lr or self.lr or self.default_lr
        optimizer = LowRankOptimizer(self.groups(rate), lr=rate, clip=clip, seed=self.seed)
        if layerwise:
            optimizer.attach_layerwise()
        if self.penalties:
            optimizer.add_penalty(self.penalty_gradients)
        self.events.steps = self.steps
        self.events.bind(optimizer)
        return optimizer

    @property
    def default_lr(self) -> float:
        """The update's own default learning rate, else the weights method's."""
        update = self.recipe.update
        own = update.default_lr if update is not None else None
        return own if own is not None else self.weights.default_lr

    def groups(self, lr: float) -> list[dict[str, Any]]:
        """Parameter groups by rule and ratios, in the order of the model's parameters."""
        update = self.recipe.update or default_update()
        rules = {True: update.rule(), False: update.plain()}
        special = self.special_parameters(update)
        pairs = self.pairs()
        grouped: dict[tuple[Any, ...], list[tuple[str, nn.Parameter]]] = {}
        for name, parameter in self.trainable().items():
            ratios = {"lr": 1.0, "weight_decay": 1.0 if parameter.ndim > 1 else 0.0, "clip": 1.0}
            ratios.update(self.weights.ratios(name, parameter))
            key = (name in special, *sorted(ratios.items()))
            grouped.setdefault(key, []).append((name, parameter))
        groups = []
        for key, params in grouped.items():
            ratios = dict(key[1:])
            names = {name for name, _ in params}
            group: dict[str, Any] = {
                "params": params,
                "rule": rules[key[0]],
                "lr": lr * ratios["lr"],
                "weight_decay": getattr(update, "weight_decay", 0.0) * ratios["weight_decay"],
                "clip_weight": ratios["clip"],
            }
            if update.wants == "pairs" and key[0]:
                group["pairs"] = [p for p in pairs if p[0] in names]
            groups.append(group)
        return groups

    def special_parameters(self, update: Update) -> set[str]:
        """Names of the parameters that the update rule is about; the rest is plain."""
        if update.wants == "any":
            return set(self.trainable())
        if update.wants == "pairs":
            return {name for pair in self.pairs() for name in pair[:2]}
        words = [t for t in update.targets if t != EVERYTHING]
        everything = sites_of(self.model, self.seed)
        chosen = select(everything, words, axis="update") if words else everything
        return {f"{s.module_path}.{s.param}" for s in chosen if s.raw.requires_grad}

    def pairs(self) -> list[tuple[str, str, float]]:
        """Trained factor pairs as (name of B, name of A, scale)."""
        found = []
        for path, by_name in self.terms().items():
            site = self.sites[path]
            for child, term in by_name.items():
                if isinstance(term, LowRank) and {"A", "B"} <= set(term._parameters):
                    stem = f"{site.module_path}.{site.prefix}{child}"
                    found.append((f"{stem}.B", f"{stem}.A", term.scale))
        return found

    @property
    def penalties(self) -> list[Objective]:
        """Objectives that are functions of parameters alone."""
        return [o for o in self.recipe.objective if o.kind == "penalty"]

    @property
    def data_objectives(self) -> list[Objective]:
        """Objectives that see the batch."""
        return [o for o in self.recipe.objective if o.kind == "data"]

    def penalty_gradients(self) -> dict[nn.Parameter, Tensor]:
        """The penalties' gradient, for every trained tensor that they touch."""
        params = [p for p in self.model.parameters() if p.requires_grad]
        terms = self.terms()
        with torch.enable_grad():
            total = torch.stack([o.penalty(terms) for o in self.penalties]).sum()
        self.penalty = total.detach()
        grads = torch.autograd.grad(total, params, allow_unused=True)
        return {p: g for p, g in zip(params, grads, strict=True) if g is not None}

    def loss(self, inputs: Batch, outputs: Any, loss: Tensor | None = None) -> Tensor:
        """The loss to train on: the task's own, or what the data objectives make of it."""
        if loss is None:
            loss = outputs["loss"] if isinstance(outputs, Mapping) else outputs[0]
        self.loss_was_asked = True
        for objective in self.data_objectives:
            reference = self.reference(inputs) if objective.needs_reference else None
            loss = objective.loss(self.model, inputs, outputs, loss, reference)
        return loss

    @torch.no_grad()
    def reference(self, inputs: Batch) -> Any:
        """Outputs of the teacher, or of the base: the same model with its terms switched off."""
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

    # --- leaving ---------------------------------------------------------------------------

    def merge(self) -> nn.Module:
        """Fold the terms into dense matrices, in place; returns the model, free of eckart."""
        for path, by_name in self.terms().items():
            for name, term in by_name.items():
                if not term.linear:
                    raise UsageError(
                        "this cannot be merged", [(f"{path}.{name}", "is not a linear map")]
                    )
        folded = {path: fold(self.sites[path]) for path in self.attached}
        self.detach()
        for path, matrix in folded.items():
            put_dense(self.sites[path], matrix)
        self.originals.clear()
        return self.model

    def remove(self) -> nn.Module:
        """Take the terms away; the base is back bit for bit where restores_base is promised."""
        if self.weights.base == "dropped" and self.attached:
            raise UsageError("the base was dropped", [(self.weights.slug, "")], "Use merge().")
        self.detach()
        with torch.no_grad():
            for path, original in self.originals.items():
                self.sites[path].raw.copy_(original)
        self.originals.clear()
        return self.model

    def detach(self) -> None:
        """Undo the class changes, the lock and the freezing."""
        for path in list(self.attached):
            site = self.sites[path]
            uninstall(site.module, site.param)
            for other in site.tied_modules:
                uninstall(other)
        self.attached.clear()
        guarded.discard(self)
        unlock(self.model)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self.required.get(name, True))


@contextmanager
def terms_off(model: nn.Module):
    """The base alone: every structured module runs its own forward."""
    sums = [m._sum for m in model.modules() if isinstance(m, Structured)]
    for record in sums:
        record.enabled = False
    try:
        yield
    finally:
        for record in sums:
            record.enabled = True


def put_dense(site: Site, matrix: Tensor) -> None:
    """Write a folded matrix into a module that is its own again; a tie is kept."""
    existing = site.module._parameters.get(site.param)
    with torch.no_grad():
        if existing is None:
            setattr(site.module, site.param, nn.Parameter(matrix))
        else:
            existing.copy_(matrix)


def cover(handle: Handle) -> Coverage:
    """Count every element of the model once, by role and by what becomes of it."""
    coverage = Coverage(matrices=len(handle.attached) or len(handle.sites))
    update = handle.recipe.update
    projected: set[str] = set()
    if update is not None and update.wants == "matrices":
        projected = handle.special_parameters(update)
    roles = {f"{s.module_path}.{s.param}": s.role for s in sites_of(handle.model)}
    for path, by_name in handle.parts().items():
        site = handle.sites[path]
        for child in by_name:
            roles[f"{site.module_path}.{site.prefix}{child}"] = site.role
    rank = getattr(handle.weights, "rank", 0)
    sites = handle.sites.values()
    coverage.cut = sum(1 for s in sites if s.path in handle.attached and rank > min(s.shape))
    for name, parameter in handle.model.named_parameters():
        owner = name.rsplit(".", 1)[0]
        role = roles.get(name) or roles.get(owner) or "rest"
        if parameter.requires_grad:
            state = "projected" if name in projected else "trained"
        else:
            state = "frozen" if role != "rest" else "unreachable"
        coverage.add(role.split(".")[0], state, parameter.numel())
    return coverage


def default_update() -> Update:
    """What a recipe without an update rule gets."""
    update = registry.load(registry.DEFAULTS["update"])
    return update()  # type: ignore[return-value]


def plain(value: Any) -> Any:
    """Tuples as lists, recursively: what JSON gives back."""
    if isinstance(value, Mapping):
        return {key: plain(v) for key, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, list | tuple) else value
