"""Numbers and tables as text, for a terminal, a page or a file."""

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]], between: str = "   ") -> str:
    """A line for each row; columns are as wide as their widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        between.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def fixed(value: float | None, sign: str = "") -> str:
    """Four decimals; empty where the number is not known."""
    return "" if value is None else f"{value:{sign}.4f}"


def significant(value: float | None, digits: int = 4) -> str:
    """So many significant digits; empty where the number is not known."""
    return "" if value is None else f"{value:.{digits}g}"
