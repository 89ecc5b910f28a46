"""A recipe: at most one choice per axis (objectives may be several), and which choices combine."""

from __future__ import annotations

import dataclasses
from collections.abc import Container
from dataclasses import dataclass, field
from typing import Any

from eckart.errors import UsageError
from eckart.recipe import registry
from eckart.recipe.method import AXES, Attention, Method, Objective, Precision, Update, Weights

# What a rule wants -> what it does, what a weights method lacks that does not offer it, a way out.
WANTED = {
    "pairs": (
        "moves factor pairs B, A together",
        "trains no factor pairs that a rule may move",
        "Type weights=lora update={update}, or update=adamw.",
    ),
    "matrices": (
        "changes whole matrices",
        "trains no whole matrix that a rule may change",
        "Type weights=dense update={update}, or update=adamw.",
    ),
}


@dataclass(frozen=True)
class Recipe:
    """What a run does to a model. An axis that is None takes the default.

    Raises UsageError if the choices cannot combine, before anything is loaded.
    """

    weights: Weights | None = None
    update: Update | None = None
    precision: Precision | None = None
    attention: Attention | None = None
    objective: tuple[Objective, ...] = field(default=())

    def __post_init__(self) -> None:
        if isinstance(self.objective, Objective):
            object.__setattr__(self, "objective", (self.objective,))
        for axis in ("weights", "update", "precision", "attention"):
            value = getattr(self, axis)
            if value is not None and not isinstance(value, AXES[axis]):
                raise misplaced(axis, value)
        for value in self.objective:
            if not isinstance(value, Objective):
                raise misplaced("objective", value)
        self.check()

    def check(self) -> None:
        """Raise UsageError for combinations that cannot work, with the reason."""
        weights, update, precision = self.weights, self.update, self.precision
        for method in self.choices:
            registry.refuse_idle(method.slug, method.axis)
        if update is not None:
            update.rule()  # refuses parts that do not go together
        if weights is not None and precision is not None:
            refuse_unconvertible(weights, precision)
        if weights is None or update is None:
            return
        if update.wants != "any" and update.wants not in weights.offers:
            does, lacks, fix = WANTED[update.wants]
            raise conflict(
                (f"update = {update.slug}", does),
                (f"weights = {weights.slug}", lacks),
                fix.format(update=update.slug),
            )
        refuse_unasked(weights, update)
        if precision is not None and precision.multiplies and update.branch_gradient():
            raise conflict(
                (f"update = {update.slug}", "scales gradients in a pair's backward pass"),
                (f"precision = {precision.slug}", "has a backward pass of its own"),
                "Leave one of them out.",
            )

    @property
    def choices(self) -> tuple[Method, ...]:
        """All methods of the recipe."""
        axes = (self.weights, self.update, self.precision, self.attention)
        return tuple(m for m in axes if m is not None) + self.objective

    @property
    def needs(self) -> set[str]:
        """What the methods need of data and horizon."""
        return {need for method in self.choices for need in method.needed}

    def require_no_accumulation(self, accumulate: int) -> None:
        """Raise UsageError for accumulation if an objective couples the whole batch."""
        for objective in self.objective:
            if objective.couples_batch and accumulate > 1:
                raise UsageError(
                    "this objective compares the examples of one batch",
                    [(f"objective = {objective.slug}", f"train.accumulate = {accumulate}")],
                    "Type train.accumulate=1 and a larger train.batch_size.",
                )


def conflict(one: tuple[str, str], other: tuple[str, str], fix: str, place: str = "") -> UsageError:
    """The error for two choices that exclude each other; `place` is their place in the model."""
    at = f"     {place}" if place else ""
    return UsageError(f"these two do not combine{at}", (one, other), fix)


def refuse_unconvertible(weights: Weights, precision: Precision) -> None:
    """Raise UsageError if the precision's format cannot be trained and the base is trained."""
    if precision.converts and weights.base != "frozen":
        raise conflict(
            (f"precision = {precision.slug}", "holds the base in what is not trained"),
            (f"weights = {weights.slug}", f"its base is {weights.base}"),
            "Type precision=bf16, or weights=lora.",
        )


def refuse_two_passes(recipe: Recipe) -> None:
    """Raise UsageError for a rule that needs a closure in a loop that passes none to step()."""
    update = recipe.update
    if update is not None and update.rule().passes > 1:
        raise UsageError(
            "this rule computes the gradient twice in one step, and a Trainer does so once",
            [(f"update = {update.slug}", "needs step(closure)")],
            "Type update.schedule=alternate, or write the loop yourself.",
        )


def refuse_unasked(weights: Weights, update: Update | None, place: str = "") -> None:
    """Raise UsageError if a weights method's fields differ from what the update rule requires."""
    asked = {} if update is None else fields_asked(weights, update)
    wrong = {name: value for name, value in asked.items() if getattr(weights, name) != value}
    if update is not None and wrong:
        has = ", ".join(f"{name} {getattr(weights, name)}" for name in wrong)
        wants = ", ".join(f"{name} {value}" for name, value in wrong.items())
        raise conflict(
            (f"update = {update.slug}", f"asks for {wants}"),
            (f"weights = {weights.slug}", f"has {has}"),
            f"Type {' '.join(f'weights.{name}={value}' for name, value in wrong.items())}.",
            place,
        )


def fields_asked(weights: Weights, update: Update) -> dict[str, Any]:
    """The fields of this weights method that the update rule requires, with their values."""
    own = {f.name for f in dataclasses.fields(weights)}
    return {name: value for name, value in update.asks(weights).items() if name in own}


def fitted(weights: Weights, update: Update, said: Container[str] = ()) -> Weights:
    """The weights method with what the update rule requires, in fields not listed in `said`."""
    asked = fields_asked(weights, update)
    changes = {k: v for k, v in asked.items() if k not in said and getattr(weights, k) != v}
    return dataclasses.replace(weights, **changes) if changes else weights


def misplaced(axis: str, value: object) -> UsageError:
    """The error for a method on the wrong axis."""
    right = getattr(value, "axis", "")
    if isinstance(value, type):
        name, fix = f"the class {value.__name__}", f"Type {axis}={value.__name__}()."
    elif isinstance(value, str):  # as on the command line
        entry = registry.find(value, axis)
        name, fix = f'"{value}"', f"Type {axis}=eckart.{entry.class_name}()."
    else:
        name = getattr(value, "slug", type(value).__name__)
        fix = f"Type {right}={name}." if right else ""
    return UsageError(f"{name} is not a choice for {axis}", [(f"{axis} = {name}", right)], fix)
