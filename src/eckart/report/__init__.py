"""Results as pages: one self-contained HTML per run and per comparison, a page of the claims."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eckart.report.comparison import page as comparison
    from eckart.report.run import page as page

__all__ = ["comparison", "page"]


def __getattr__(name: str) -> Any:
    """Found when it is used: drawing needs matplotlib, the page of the claims does not."""
    if name == "page":
        from eckart.report.run import page

        return page
    if name == "comparison":
        from eckart.report.comparison import page

        return page
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
