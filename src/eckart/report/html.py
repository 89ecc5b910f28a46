"""A self-contained HTML page of figures, tables and text, without scripts or network access."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from eckart.report.figures import Figure

LONG = 24  # rows; longer tables are collapsed


@dataclass(frozen=True)
class Table:
    """A table of text cells; numeric columns after the first are right-aligned."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""

    @property
    def kind(self) -> str:
        return "table"

    @property
    def folded(self) -> bool:
        """Is the table long enough to be collapsed? In print it is expanded."""
        return bool(self.caption) and len(self.rows) > LONG

    def numeric(self, column: int) -> bool:
        cells = [row[column] for row in self.rows if row[column]]
        return bool(cells) and all(cell.lstrip("+-−<")[:1].isdigit() for cell in cells)


@dataclass(frozen=True)
class Text:
    """A paragraph, or preformatted lines (`as_is`)."""

    text: str
    as_is: bool = False

    @property
    def kind(self) -> str:
        return "text"


Item = Table | Text | Figure


@dataclass(frozen=True)
class Section:
    """A heading and the items under it."""

    title: str
    items: Sequence[Item]

    @property
    def anchor(self) -> str:
        return "".join(c if c.isalnum() else "-" for c in self.title.lower()).strip("-")


def html(title: str, lead: str, sections: Sequence[Section], command: str = "") -> str:
    """Render the page. Sections without items are left out."""
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
    environment.filters["drawn"] = lambda figure: Markup(figure.svg)  # escaped in to_svg
    return environment.get_template("page.html.j2")
