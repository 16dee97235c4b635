"""What a report consists of, before anybody decides how it looks: sections of tables, charts and examples.

All texts here are as they came; the writers (`report_html`, `report_markdown`) escape them. Only a chart's markup is
ready to use, and only `report_charts` makes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


class Cell(NamedTuple):
    """A table's cell. shade: 0 to 1, how strongly it is tinted; None for not at all."""

    text: str
    shade: float | None = None
    is_strong: bool = False


class Link(NamedTuple):
    """A cell that leads to a source. Only addresses that ship with the package become links."""

    address: str


Entry = Cell | Link | str
Row = Sequence[Entry]


@dataclass(frozen=True)
class Table:
    """Rows under columns; cells that are plain strings have no emphasis.

    The first `names` columns hold names, and so do those whose headings are in `words`; the others hold numbers.
    """

    columns: Sequence[str]
    rows: Sequence[Row]
    caption: str = ""
    note: str = ""
    names: int = 1
    words: Sequence[str] = ()

    def holds_names(self, column: int) -> bool:
        """Whether a column is read as text, from the left, and not as numbers."""
        return column < self.names or (column < len(self.columns) and self.columns[column] in self.words)


@dataclass(frozen=True)
class Chart:
    """Inline SVG; what it shows stands in a table too, so Markdown leaves it out."""

    svg: str
    caption: str = ""


@dataclass(frozen=True)
class Charts:
    """Small charts side by side."""

    charts: Sequence[Chart]


class Mark(NamedTuple):
    """A stretch of an example's text. kind: "gold", "predicted", or "both"."""

    start: int
    end: int
    kind: str


@dataclass(frozen=True)
class Example:
    """A sentence with one mistake: its text cut to what is near, with marks, and what is wrong in words."""

    kind: str
    where: str
    text: str
    marks: Sequence[Mark]
    says: str


@dataclass(frozen=True)
class Examples:
    """Examples of mistakes of one system."""

    examples: Sequence[Example]
    caption: str


@dataclass(frozen=True)
class Command:
    """A command line, as it can be typed."""

    line: str


Block = Table | Chart | Charts | Examples | Command | str
"""A string is a paragraph."""


@dataclass(frozen=True)
class Section:
    """Blocks under a title. level: 2 for a part of the report, 3 inside one. is_folded: shown when asked for."""

    title: str
    blocks: Sequence[Block] = field(default_factory=tuple)
    level: int = 2
    is_folded: bool = False


@dataclass(frozen=True)
class Report:
    """A title and what stands under it, in order."""

    title: str
    sections: Sequence[Section]
