"""Low-rank learning on transformers: one package for training, compressing and composing.

    recipe = eckart.Recipe(weights=eckart.LoRA(rank=16))
    handle = eckart.attach(model, recipe)
    optimizer = handle.optimizer()

Names are found when they are first used, so that `import eckart` costs nothing. Every method
is here under its class's name (`eckart methods` lists them).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eckart.errors import EckartError as EckartError
    from eckart.io.export import export as export
    from eckart.io.export import load as load
    from eckart.io.export import swap as swap
    from eckart.jobs.training.trainer import trainer as trainer
    from eckart.methods import *  # noqa: F403
    from eckart.recipe import Recipe as Recipe
    from eckart.recipe import attach as attach
    from eckart.recipe import attach_from as attach_from
    from eckart.recipe.foreign import optimizer_for as optimizer_for

PUBLIC = {
    "EckartError": "eckart.errors",
    "Recipe": "eckart.recipe",
    "attach": "eckart.recipe",
    "attach_from": "eckart.recipe",
    "export": "eckart.io.export",
    "load": "eckart.io.export",
    "optimizer_for": "eckart.recipe.foreign",
    "swap": "eckart.io.export",
    "trainer": "eckart.jobs.training.trainer",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value = installed_version()
    elif name in PUBLIC:
        value = getattr(import_module(PUBLIC[name]), name)
    elif name[:1].isupper():  # a method's class
        value = getattr(import_module("eckart.methods"), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*PUBLIC, *import_module("eckart.methods").__all__, "__version__"])


def installed_version() -> str:
    """The distribution's version; 0+unknown in a source tree that is not installed."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("eckart")
    except PackageNotFoundError:
        return "0+unknown"
