"""Every method's class by its name, imported when it is first asked for.

The folders beside this file are the list: one file per method, grouped by the question it
answers. `__init__.pyi` repeats it for type checkers.
"""

from typing import Any

from eckart.recipe import registry


def __getattr__(name: str) -> Any:
    if name == "__all__":
        return sorted(registry.class_names())
    slug = None if name.startswith("_") else registry.class_names().get(name)
    if slug is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return registry.load(slug)


def __dir__() -> list[str]:
    return sorted(registry.class_names())
