"""Report pages: self-contained HTML for a run or a bench, and Markdown for all claims."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eckart.report.bench import page as comparison
    from eckart.report.run import page as page

__all__ = ["comparison", "page"]
HOMES = {"page": "run", "comparison": "bench"}  # name -> the file whose `page` it is


def __getattr__(name: str) -> Any:
    """Import lazily: figures need matplotlib, the page of the claims does not."""
    if name in HOMES:
        return import_module(f"eckart.report.{HOMES[name]}").page
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
