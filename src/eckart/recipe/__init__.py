"""Recipes, and attaching them to models. Imported lazily: listing methods needs no torch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eckart.recipe.attachment import attach, attach_from
    from eckart.recipe.coverage import Coverage
    from eckart.recipe.events import EventHook
    from eckart.recipe.handle import Handle, terms_off
    from eckart.recipe.method import (
        Attention,
        Compose,
        Compress,
        Cost,
        Cut,
        Event,
        Method,
        Now,
        Objective,
        Paper,
        Precision,
        Stage,
        Update,
        Weights,
        Work,
        every_step,
    )
    from eckart.recipe.recipe import Recipe

_HOMES = {
    "attachment": ("attach", "attach_from"),
    "coverage": ("Coverage",),
    "events": ("EventHook",),
    "method": (
        "Attention",
        "Compose",
        "Compress",
        "Cost",
        "Cut",
        "Event",
        "Method",
        "Now",
        "Objective",
        "Paper",
        "Precision",
        "Stage",
        "Update",
        "Weights",
        "Work",
        "every_step",
    ),
    "handle": ("Handle", "terms_off"),
    "recipe": ("Recipe",),
}
_home_of = {name: home for home, names in _HOMES.items() for name in names}
__all__ = [
    "Attention",
    "Compose",
    "Compress",
    "Cost",
    "Coverage",
    "Cut",
    "Event",
    "EventHook",
    "Handle",
    "Method",
    "Now",
    "Objective",
    "Paper",
    "Precision",
    "Recipe",
    "Stage",
    "Update",
    "Weights",
    "Work",
    "attach",
    "attach_from",
    "every_step",
    "terms_off",
]


def __getattr__(name: str) -> Any:
    if name not in _home_of:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_home_of[name]}"), name)
