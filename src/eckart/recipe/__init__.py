"""From words to a model that carries them. Names are found lazily: listing methods needs no torch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eckart.recipe.attachment import Handle, attach, attach_from, terms_off
    from eckart.recipe.events import EventHook
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
    )
    from eckart.recipe.recipe import Recipe
    from eckart.recipe.targets import Coverage

_HOMES = {
    "attachment": ("Handle", "attach", "attach_from", "terms_off"),
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
    ),
    "recipe": ("Recipe",),
    "targets": ("Coverage",),
}
_home_of = {name: home for home, names in _HOMES.items() for name in names}
__all__ = sorted(_home_of)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _home_of:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_home_of[name]}"), name)
