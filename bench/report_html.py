"""A report as one HTML file that needs nothing else: no script, no network, colours for light and dark.

Whatever comes from data, systems or models is text and is escaped; the page's policy forbids scripts besides.
"""

from __future__ import annotations

import html
from collections.abc import Sequence

from el4ner.bench.report_model import (
    Block,
    Chart,
    Charts,
    Command,
    Entry,
    Example,
    Examples,
    Link,
    Report,
    Section,
    Table,
)
from el4ner.lines import visible

_DENSE = 11
"""Tables of more columns get small type and upright headings."""
_STYLE = """
:root{color-scheme:light dark;--paper:#fff;--ink:#1c2128;--dim:#57606a;--line:#d5dae1;--soft:#f3f5f8;--accent:#0b5cad;
--tint:11,92,173;--gold:#8a5a00;--pred:rgba(11,92,173,.18)}
@media(prefers-color-scheme:dark){:root{--paper:#14181d;--ink:#e3e7ec;--dim:#9aa5b1;--line:#39414b;--soft:#1d232a;
--accent:#6cb2ff;--tint:108,178,255;--gold:#f0b849;--pred:rgba(108,178,255,.26)}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1160px;padding:20px 16px 60px;background:var(--paper);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",sans-serif;overflow-wrap:anywhere}
h1{font-size:1.7em;line-height:1.2;margin:.2em 0 .4em}
h2{font-size:1.3em;margin:2em 0 .5em;padding-top:.5em;border-top:2px solid var(--line)}
h3{font-size:1.05em;margin:1.6em 0 .4em}
p{max-width:76ch;margin:.4em 0 .8em}
nav ul{columns:2 260px;padding-left:1.2em;margin:.4em 0}
a{color:var(--accent)}
.wide{overflow-x:auto;margin:.5em 0 1em}
table{border-collapse:collapse;font-size:.9em;font-variant-numeric:tabular-nums}
caption{text-align:left;color:var(--dim);padding:0 0 .3em;caption-side:top}
th,td{padding:.28em .6em;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap;overflow-wrap:normal}
th{color:var(--dim);font-weight:600;vertical-align:bottom;white-space:normal;line-height:1.25}
th.n,td.n{text-align:left}
td.n{white-space:normal;max-width:30em}
td.k{white-space:nowrap}
td.l{min-width:16em}
table.dense{font-size:.8em}
table.dense th:not(.n){writing-mode:vertical-rl;transform:rotate(180deg);text-align:left;padding:.4em .2em}
table.dense td{padding:.25em .4em}
tbody tr:hover{background:var(--soft)}
.note{color:var(--dim);font-size:.9em}
figure{margin:.5em 0 1em}
figure>div{overflow-x:auto}
figcaption{color:var(--dim);font-size:.9em}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(236px,1fr));gap:4px 16px}
.grid svg{min-width:0!important;max-width:236px!important}
svg{display:block;width:100%;height:auto;color:var(--ink);font:12px system-ui,"Segoe UI",Roboto,"Noto Sans",sans-serif}
svg text{fill:var(--ink)}
svg text.s{fill:var(--dim);font-size:11.5px}
svg text.name{fill:var(--ink)}
svg line{stroke:var(--line)}
svg line.axis,svg line.diagonal{stroke:var(--dim)}
svg line.diagonal{stroke-dasharray:4 4}
svg line.whisker{stroke:var(--accent);stroke-width:3;stroke-opacity:.45}
svg line.thin{stroke-width:1.5}
svg line.leader{stroke:var(--dim);stroke-width:.8}
svg .dot{fill:var(--accent)}
svg .frame{fill:none;stroke:var(--line)}
svg .bar~line.whisker{stroke:var(--ink);stroke-width:2}
svg .bar{fill:var(--accent);fill-opacity:.5}
svg .curve{fill:none;stroke:var(--accent);stroke-width:2}
svg .c1{stroke-dasharray:7 3}svg .c2{stroke-dasharray:2 3}svg .c3{stroke-dasharray:9 3 2 3}
svg .c4{stroke-dasharray:12 4}svg .c5{stroke-dasharray:4 2}
.example{border-left:3px solid var(--line);padding:.1em 0 .1em .8em;margin:.7em 0;max-width:86ch}
.example .says{color:var(--dim);font-size:.9em}
.kind{display:inline-block;border:1px solid var(--line);border-radius:3px;padding:0 .4em;font-size:.82em;
margin-right:.5em}
mark{color:inherit;background:none;padding:.08em 0}
mark.gold,mark.both{border-bottom:3px double var(--gold)}
mark.predicted,mark.both{background:var(--pred)}
details{margin:.6em 0}
summary{cursor:pointer;font-weight:600}
pre{background:var(--soft);padding:.7em .9em;overflow-x:auto;font-size:.86em;border-radius:4px;margin:.5em 0}
@media print{details{display:block}}
"""


def render_html(report: Report) -> str:
    """The whole page."""
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{_escape(report.title)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{_escape(report.title)}</h1>",
        _contents(report.sections),
    ]
    for number, section in enumerate(report.sections):
        parts.append(_section(section, f"s{number}"))
    parts.append("</body></html>\n")
    return "\n".join(parts)


def _escape(text: str) -> str:
    """Text that cannot become markup; control characters and direction marks become visible."""
    return html.escape(visible(text), quote=True)


def _contents(sections: Sequence[Section]) -> str:
    entries = [
        f'<li><a href="#s{number}">{_escape(section.title)}</a></li>'
        for number, section in enumerate(sections)
        if section.level == 2
    ]
    return f"<nav><ul>{''.join(entries)}</ul></nav>"


def _section(section: Section, anchor: str) -> str:
    blocks = "\n".join(_block(block) for block in section.blocks)
    if section.is_folded:
        return f'<details id="{anchor}"><summary>{_escape(section.title)}</summary>\n{blocks}</details>'
    return f'<h{section.level} id="{anchor}">{_escape(section.title)}</h{section.level}>\n{blocks}'


def _block(block: Block) -> str:
    if isinstance(block, str):
        return f"<p>{_escape(block)}</p>"
    if isinstance(block, Table):
        return _table(block)
    if isinstance(block, Chart):
        return _chart(block)
    if isinstance(block, Charts):
        return f'<div class="grid">{"".join(_chart(chart) for chart in block.charts)}</div>'
    if isinstance(block, Command):
        return f"<pre>{_escape(block.line)}</pre>"
    return _examples(block)


def _chart(chart: Chart) -> str:
    caption = f"<figcaption>{_escape(chart.caption)}</figcaption>" if chart.caption else ""
    return f"<figure>{caption}<div>{chart.svg}</div></figure>"


def _table(table: Table) -> str:
    def kind(column: int) -> str:
        return ' class="n"' if table.holds_names(column) else ""

    head = "".join(f"<th{kind(i)}>{_escape(name)}</th>" for i, name in enumerate(table.columns))
    rows = ["".join(_cell(cell, kind(i)) for i, cell in enumerate(row)) for row in table.rows]
    caption = f"<caption>{_escape(table.caption)}</caption>" if table.caption else ""
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    note = f'<p class="note">{_escape(table.note)}</p>' if table.note else ""
    dense = ' class="dense"' if len(table.columns) > _DENSE else ""
    inner = f"{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="wide"><table{dense}>{inner}</table></div>{note}'


def _cell(cell: Entry, kind: str) -> str:
    if isinstance(cell, Link):
        return f'<td{kind}><a href="{_escape(cell.address)}" rel="noreferrer">{_escape(cell.address.removeprefix("https://"))}</a></td>'
    if isinstance(cell, str):
        if kind:
            kind = ' class="n l"' if len(cell) > 40 else ' class="n k"' if len(cell) < 25 else kind
        return f"<td{kind}>{_escape(cell)}</td>"
    style = "" if cell.shade is None else f' style="background:rgba(var(--tint),{0.04 + 0.5 * cell.shade:.2f})"'
    text = _escape(cell.text)
    return f"<td{kind}{style}>{f'<b>{text}</b>' if cell.is_strong else text}</td>"


def _examples(block: Examples) -> str:
    return f'<p class="note">{_escape(block.caption)}</p>' + "".join(_example(example) for example in block.examples)


def _example(example: Example) -> str:
    pieces, at = [], 0
    for mark in example.marks:
        pieces.append(_escape(example.text[at : mark.start]))
        pieces.append(f'<mark class="{_escape(mark.kind)}">{_escape(example.text[mark.start : mark.end])}</mark>')
        at = mark.end
    pieces.append(_escape(example.text[at:]))
    return (
        f'<div class="example"><div class="says"><span class="kind">{_escape(example.kind)}</span>'
        f"<bdi>{_escape(example.says)}</bdi> · <bdi>{_escape(example.where)}</bdi></div>"
        f"<bdi>{''.join(pieces)}</bdi></div>"
    )
