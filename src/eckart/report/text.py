"""Formats numbers and tables as text."""

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]], between: str = "   ") -> str:
    """Format rows as aligned columns, one line per row."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        between.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def fixed(value: float | None, sign: str = "") -> str:
    """The value with four decimals; an empty string for None."""
    return "" if value is None else f"{value:{sign}.4f}"


def significant(value: float | None, digits: int = 4) -> str:
    """The value with `digits` significant digits; an empty string for None."""
    return "" if value is None else f"{value:.{digits}g}"
