"""One self-contained page: sections of figures, tables and text. No network, no scripts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from eckart.report.figures import Figure

LONG = 24  # rows of a table above which it is folded


@dataclass(frozen=True)
class Table:
    """Rows of text under a head; columns after the first are set right where they are numbers."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""

    @property
    def kind(self) -> str:
        return "table"

    @property
    def folded(self) -> bool:
        """Is it too long to stand in the way? On paper it is open."""
        return bool(self.caption) and len(self.rows) > LONG

    def numeric(self, column: int) -> bool:
        cells = [row[column] for row in self.rows if row[column]]
        return bool(cells) and all(cell.lstrip("+-−<")[:1].isdigit() for cell in cells)


@dataclass(frozen=True)
class Text:
    """A paragraph, or lines as they are."""

    text: str
    as_is: bool = False

    @property
    def kind(self) -> str:
        return "text"


Item = Table | Text | Figure


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it."""

    title: str
    items: Sequence[Item]

    @property
    def anchor(self) -> str:
        return "".join(c if c.isalnum() else "-" for c in self.title.lower()).strip("-")


def html(title: str, lead: str, sections: Sequence[Section], command: str = "") -> str:
    """The page. Sections without items are left out."""
    shown = [section for section in sections if section.items]
    return template().render(title=title, lead=lead, sections=shown, command=command)


@cache
def template() -> Template:
    environment = Environment(
        loader=PackageLoader("eckart", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["drawn"] = lambda figure: Markup(figure.svg)  # ours, and escaped there
    return environment.get_template("page.html.j2")
