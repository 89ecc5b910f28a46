"""A recipe: at most one choice per axis, objectives may be several; what combines, and why not."""

from __future__ import annotations

from dataclasses import dataclass, field

from eckart.errors import UsageError
from eckart.recipe.method import Attention, Method, Objective, Precision, Update, Weights


@dataclass(frozen=True)
class Recipe:
    """What a run does to a model. An axis left out (None) keeps the house's default.

    Raises UsageError when the choices cannot combine, before anything is loaded.
    """

    weights: Weights | None = None
    update: Update | None = None
    precision: Precision | None = None
    attention: Attention | None = None
    objective: tuple[Objective, ...] = field(default=())

    def __post_init__(self) -> None:
        if isinstance(self.objective, Objective):
            object.__setattr__(self, "objective", (self.objective,))
        wanted = {
            "weights": Weights,
            "update": Update,
            "precision": Precision,
            "attention": Attention,
        }
        for axis, kind in wanted.items():
            value = getattr(self, axis)
            if value is not None and not isinstance(value, kind):
                raise misplaced(axis, value)
        for value in self.objective:
            if not isinstance(value, Objective):
                raise misplaced("objective", value)
        self.check()

    def check(self) -> None:
        """Refuse combinations that cannot work, with the reason."""
        weights, update = self.weights, self.update
        if weights is None or update is None:
            return
        if update.wants == "pairs" and "pairs" not in weights.offers:
            raise UsageError(
                "these two do not combine",
                [
                    (f"update = {update.slug}", "changes factor pairs B, A"),
                    (f"weights = {weights.slug}", "trains no factor pairs"),
                ],
                f"Type weights=lora update={update.slug}, or update=adamw.",
            )
        if update.wants == "matrices" and "matrices" not in weights.offers:
            raise UsageError(
                "these two do not combine",
                [
                    (f"update = {update.slug}", "projects the gradients of whole matrices"),
                    (f"weights = {weights.slug}", "trains no whole matrix"),
                ],
                f"Type weights=dense update={update.slug}, or update=adamw.",
            )

    @property
    def choices(self) -> tuple[Method, ...]:
        """All methods of the recipe."""
        axes = (self.weights, self.update, self.precision, self.attention)
        return tuple(m for m in axes if m is not None) + self.objective

    @property
    def needs(self) -> set[str]:
        """What the methods want to know of data and horizon."""
        return {need for method in self.choices for need in method.needed}

    def require_no_accumulation(self, accumulate: int) -> None:
        """Refuse accumulation where an objective couples the whole batch."""
        for objective in self.objective:
            if objective.couples_batch and accumulate > 1:
                raise UsageError(
                    "this objective compares the examples of one batch",
                    [(f"objective = {objective.slug}", f"train.accumulate = {accumulate}")],
                    "Type train.accumulate=1 and a larger train.batch_size.",
                )


def misplaced(axis: str, value: object) -> UsageError:
    """The error for a method on the wrong axis."""
    right = getattr(value, "axis", "")
    name = getattr(value, "slug", type(value).__name__)
    fix = f"Type {right}={name}." if right else ""
    return UsageError(f"{name} is not a choice for {axis}", [(f"{axis} = {name}", right)], fix)
