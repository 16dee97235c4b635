"""Charts as inline SVG, drawn by hand so that a report needs no library and no network to be seen.

Every function returns markup that is safe to place in a page: what comes from outside goes through `label`. Colours
are the page's (currentColor and the variables --ink, --line, --accent), so that they suit light and dark alike.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from el4ner.bench.calibration import wilson
from el4ner.lines import visible

_CHARACTER = 6.6  # width of an average character at 12 pixels
_ROW = 22


class Bar(NamedTuple):
    """A value with its interval, both in [0, 1]."""

    name: str
    value: float
    interval: Sequence[float] | None


class Point(NamedTuple):
    """A named place; y in [0, 1] with its interval."""

    name: str
    x: float
    y: float
    interval: Sequence[float] | None


def label(text: str, length: int = 32) -> str:
    """A text for use inside markup: one line, cut, escaped."""
    shown = visible(text)
    return html.escape(shown if len(shown) <= length else shown[: length - 1] + "…", quote=True)


def _svg(width: float, height: float, title: str, parts: Sequence[str]) -> str:
    style = f"min-width:{min(width, 600):.0f}px;max-width:{width:.0f}px"
    return (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" style="{style}" role="img" aria-label="{label(title, 200)}">'
        f"{''.join(parts)}</svg>"
    )


def _text(x: float, y: float, text: str, anchor: str = "start", kind: str = "t", length: int = 32) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{label(text, length)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def _dot(x: float, y: float, radius: float = 4.0, kind: str = "dot") -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}" class="{kind}"/>'


def _width_of(names: Sequence[str]) -> float:
    return max((min(len(name), 32) for name in names), default=0) * _CHARACTER


def _top(values: Sequence[float]) -> float:
    """The end of an axis from 0 in steps of 0.2 that has room for all values; at most 1."""
    return min(1.0, max(0.2, math.ceil(max(values, default=1.0) * 5 - 1e-9) / 5))


def _ticks(top: float) -> list[float]:
    return [n / 10 for n in range(0, round(top * 10) + 1, 2 if top > 0.4 else 1)]


def interval_chart(bars: Sequence[Bar], title: str) -> str:
    """A dot with its interval for each name, below each other, on one axis."""
    left, width = _width_of([bar.name for bar in bars]) + 16, 700.0
    top = _top([bar.interval[1] if bar.interval else bar.value for bar in bars])
    scale = (width - left - 56) / top
    bottom = _ROW * len(bars) + 10
    parts = []
    for tick in _ticks(top):
        x = left + tick * scale
        parts += [_line(x, 4, x, bottom, "grid"), _text(x, bottom + 15, f"{tick:.1f}", "middle", "s")]
    for row, bar in enumerate(bars):
        y = _ROW * row + 18
        parts.append(_text(left - 8, y + 4, bar.name, "end"))
        end = left + bar.value * scale
        if bar.interval:
            parts.append(_line(left + bar.interval[0] * scale, y, left + bar.interval[1] * scale, y, "whisker"))
            end = max(end, left + bar.interval[1] * scale)
        parts += [_dot(left + bar.value * scale, y), _text(end + 8, y + 4, f"{bar.value:.3f}", kind="s")]
    return _svg(width, bottom + 22, title, parts)


def scatter_chart(points: Sequence[Point], title: str, x_title: str) -> str:
    """F1 over a cost, on a logarithmic axis with a place of its own for 0; names stand beside their points."""
    width, height, left, bottom, edge = 700.0, 360.0, 44.0, 312.0, 600.0
    top = _top([point.interval[1] if point.interval else point.y for point in points])
    position, ticks = _log_axis([point.x for point in points], left + 14, edge)

    def y_of(value: float) -> float:
        return bottom - value / top * (bottom - 16)

    parts = [_text(left, height - 4, x_title, kind="s", length=80)]
    for tick in _ticks(top):
        parts += [
            _line(left, y_of(tick), width - 8, y_of(tick), "grid"),
            _text(left - 6, y_of(tick) + 4, f"{tick:.1f}", "end", "s"),
        ]
    for value, name in ticks:
        x = position(value)
        parts += [_line(x, bottom, x, bottom + 5, "axis"), _text(x, bottom + 18, name, "middle", "s")]
    parts.append(_line(left, bottom, width - 8, bottom, "axis"))
    places = [(position(point.x), y_of(point.y)) for point in points]
    for point, (x, y) in zip(points, places, strict=True):
        if point.interval:
            parts.append(_line(x, y_of(point.interval[0]), x, y_of(point.interval[1]), "whisker thin"))
        parts.append(_dot(x, y))
    for point, place, box in zip(points, places, _placed([p.name for p in points], places, width), strict=True):
        x, y = box[0], box[3] - 3
        if abs((box[1] + box[3]) / 2 - place[1]) > 12:
            near = min(max(place[0], box[0]), box[2])
            parts.append(_line(place[0], place[1], near, box[1] if box[1] > place[1] else box[3], "leader"))
        parts.append(_text(x, y, point.name, kind="s name"))
    return _svg(width, height, title, parts)


def _log_axis(
    values: Sequence[float], low: float, high: float
) -> tuple[Callable[[float], float], list[tuple[float, str]]]:
    """Positions from `low` to `high` for values that may be 0, and the ticks (value, name) of powers of ten."""
    positive = [value for value in values if value > 0]
    has_zero = len(positive) < len(values)
    first = math.floor(math.log10(min(positive))) if positive else 0
    last = max(math.ceil(math.log10(max(positive))) if positive else 1, first + 1)
    start = low + 60 if has_zero else low

    def position(value: float) -> float:
        return low if value <= 0 else start + (math.log10(value) - first) / (last - first) * (high - start)

    step = max(1, math.ceil((last - first) / 6))
    ticks = [(10.0**n, _power(n)) for n in range(first, last + 1, step)]
    return position, ([(0.0, "0")] if has_zero else []) + ticks


def _power(n: int) -> str:
    return f"{10**n:,}" if n >= 0 else f"{10.0**n:.{-n}f}"


Box = tuple[float, float, float, float]


def _placed(names: Sequence[str], places: Sequence[tuple[float, float]], width: float) -> list[Box]:
    """A box (x1, y1, x2, y2) for each name near its point, clear of points and other names where that is possible."""
    taken: list[Box] = [(x - 5, y - 5, x + 5, y + 5) for x, y in places]
    boxes = []
    for name, (x, y) in zip(names, places, strict=True):
        size = min(len(name), 32) * _CHARACTER
        shifts = [0.0] + [sign * 15.0 * step for step in range(1, 9) for sign in (-1, 1)]
        choices = [
            (left, y + shift - 8, left + size, y + shift + 7)
            for shift in shifts
            for left in (x + 9, x - 9 - size)
            if left > 40 and left + size < width and 4 < y + shift < 306
        ]
        free = (box for box in choices if not any(_meet(box, other) for other in taken))
        box = next(free, choices[0] if choices else (x + 9, y - 8, x + 9 + size, y + 7))
        taken.append(box)
        boxes.append(box)
    return boxes


def _meet(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def reliability_chart(curve: Sequence[Mapping[str, Any]], title: str) -> str:
    """Share right over mean score, bin by bin, with Wilson intervals; the diagonal is perfect calibration."""
    size, left, top = 190.0, 32.0, 8.0

    def at(x: float, y: float) -> tuple[float, float]:
        return left + x * size, top + (1 - y) * size

    parts = [
        f'<rect x="{left}" y="{top}" width="{size}" height="{size}" class="frame"/>',
        _line(*at(0, 0), *at(1, 1), "diagonal"),
    ]
    for tick in (0.0, 0.5, 1.0):
        x, y = at(tick, tick)
        parts += [
            _text(x, top + size + 15, f"{tick:.1f}", "middle", "s"),
            _text(left - 5, y + 4, f"{tick:.1f}", "end", "s"),
        ]
    sizes: dict[tuple[float, float], int] = {}
    for row in curve:
        sizes[row["score"], row["right"]] = sizes.get((row["score"], row["right"]), 0) + row["n"]
    for (score, right), n in sizes.items():  # bins of one score are one point
        low, high = wilson(right, n)
        parts += [_line(*at(score, low), *at(score, high), "whisker thin"), _dot(*at(score, right), 3)]
    parts.append(_text(left + size / 2, top + size + 30, "score", "middle", "s"))
    return _svg(left + size + 14, top + size + 36, title, parts)


def line_chart(series: Mapping[str, Sequence[Point]], title: str, x_title: str) -> str:
    """F1 over the size of the pool: a line for each name, which stands at its end."""
    width, height, left, bottom = 700.0, 340.0, 44.0, 292.0
    everything = [point for points in series.values() for point in points]
    right = width - _width_of(list(series)) - 24
    top = _top([point.interval[1] if point.interval else point.y for point in everything])
    xs = sorted({point.x for point in everything})
    low, high = math.log(max(xs[0], 1)), math.log(max(xs[-1], xs[0] + 1, 2))

    def at(x: float, y: float) -> tuple[float, float]:
        share = (math.log(max(x, 1)) - low) / max(high - low, 1e-9)
        return left + 14 + share * (right - left - 14), bottom - y / top * (bottom - 16)

    parts = [_line(left, bottom, right, bottom, "axis"), _text(left, height - 6, x_title, kind="s", length=80)]
    for tick in _ticks(top):
        y = at(1, tick)[1]
        parts += [_line(left, y, right, y, "grid"), _text(left - 6, y + 4, f"{tick:.1f}", "end", "s")]
    for x in xs:
        parts.append(_text(at(x, 0)[0], bottom + 18, f"{x:,.0f}", "middle", "s"))
    ends = []
    for number, (name, points) in enumerate(series.items()):
        places = [at(point.x, point.y) for point in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline points="{path}" class="curve c{number % 6}"/>')
        for point, (x, y) in zip(points, places, strict=True):
            if point.interval:
                parts.append(_line(x, at(1, point.interval[0])[1], x, at(1, point.interval[1])[1], "whisker thin"))
            parts.append(_dot(x, y, 3.5))
        ends.append((places[-1][1], name, places[-1]))
    previous = -math.inf
    for y, name, (x, end) in sorted(ends):
        previous = max(y, previous + 15)
        parts += [_line(x + 5, end, right + 4, previous, "leader"), _text(right + 8, previous + 4, name, kind="s name")]
    return _svg(width, height, title, parts)


def stage_chart(rows: Sequence[tuple[str, float, Sequence[float] | None, int]], title: str) -> str:
    """Recall after each stage as bars, with the number of gold entities lost in it."""
    left, width = 84.0, 560.0
    scale = width - left - 150
    parts = []
    for number, (stage, recall, interval, lost) in enumerate(rows):
        y = 26 * number + 6
        parts += [
            _text(left - 8, y + 14, stage, "end"),
            f'<rect x="{left}" y="{y}" width="{scale:.1f}" height="18" class="frame"/>',
            f'<rect x="{left}" y="{y}" width="{recall * scale:.1f}" height="18" class="bar"/>',
        ]
        if interval:
            parts.append(_line(left + interval[0] * scale, y + 9, left + interval[1] * scale, y + 9, "whisker"))
        parts.append(_text(left + scale + 8, y + 14, f"{recall:.3f}, {lost:,} lost here", kind="s"))
    return _svg(width, 26 * len(rows) + 8, title, parts)
