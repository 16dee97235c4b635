"""A report as Markdown: the same tables and examples; charts are left out, since their numbers stand in tables.

Whatever comes from data, systems or models is text: markup in it is escaped, and a line break cannot end its cell.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from el4ner.bench.report_model import Block, Command, Entry, Example, Examples, Link, Report, Section, Table
from el4ner.lines import visible

_SPECIAL = re.compile(r"([\\`*|~$]|(?<![^\W_])_|_(?![^\W_])|(?<=\])\()")
"""What means something in Markdown: underscores only at the border of a word, brackets only where they make a link."""


def render_markdown(report: Report) -> str:
    """The whole document."""
    return f"# {escape(report.title)}\n\n" + "\n".join(_section(section) for section in report.sections)


def escape(text: str) -> str:
    """Text that cannot become Markdown or HTML, on one line."""
    shown = visible(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _SPECIAL.sub(r"\\\1", " ".join(shown.split()))


def _section(section: Section) -> str:
    blocks = "".join(_block(block) for block in section.blocks)
    return f"{'#' * section.level} {escape(section.title)}\n\n{blocks}"


def _block(block: Block) -> str:
    if isinstance(block, str):
        return f"{escape(block)}\n\n"
    if isinstance(block, Table):
        return render_table(block)
    if isinstance(block, Command):
        return fenced([block.line]) + "\n"
    return _examples(block) if isinstance(block, Examples) else ""  # charts


def fenced(commands: Iterable[str]) -> str:
    """Commands, a line each, in a fence that nothing inside can close."""
    lines = "".join(f"{visible(line)}\n" for line in commands)
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", lines)), default=0))
    return f"{fence}\n{lines}{fence}\n"


def render_table(table: Table) -> str:
    """A pipe table with its caption before and its note after."""
    caption = f"{escape(table.caption)}\n\n" if table.caption else ""
    head = "| " + " | ".join(_header(name) for name in table.columns) + " |\n"
    rule = "| " + " | ".join("---" if table.holds_names(i) else "---:" for i in range(len(table.columns))) + " |\n"
    rows = "".join("| " + " | ".join(_cell(cell) for cell in row) + " |\n" for row in table.rows)
    note = f"\n{escape(table.note)}\n" if table.note else ""
    return f"{caption}{head}{rule}{rows}{note}\n"


def _header(name: str) -> str:
    return escape(name) or " "


def _cell(cell: Entry) -> str:
    if isinstance(cell, Link):
        return f"<{cell.address}>"
    if isinstance(cell, str):
        return escape(cell)
    return f"**{escape(cell.text)}**" if cell.is_strong and cell.text.strip() else escape(cell.text)


def _examples(block: Examples) -> str:
    lines = "".join(_example(example) for example in block.examples)
    return f"{escape(block.caption)}\n\n{lines}\n"


def _example(example: Example) -> str:
    pieces, at = [], 0
    for mark in example.marks:
        pieces.append(escape_inner(example.text[at : mark.start]))
        opening, closing = {"gold": ("{", "}"), "predicted": ("⟦", "⟧")}.get(mark.kind, ("{⟦", "⟧}"))
        pieces.append(opening + escape_inner(example.text[mark.start : mark.end]) + closing)
        at = mark.end
    pieces.append(escape_inner(example.text[at:]))
    return f"- {escape(example.kind)}: {escape(example.says)}; {escape(example.where)}: {''.join(pieces)}\n"


def escape_inner(text: str) -> str:
    """A part of a line: as `escape`, but blanks at its ends stay."""
    inner = escape(text)
    before = " " if text[:1].isspace() else ""
    after = " " if text[-1:].isspace() and inner else ""
    return f"{before}{inner}{after}"
